"""Which gradients are added up before they are summed over devices: partial sums that wait for one all-reduce.

A weight that is used several times has several gradients, which are added (`graph.sums`). Where two of them are still to be summed over the
same devices, and are split alike, the addition works on what each device has, and its result is still to be summed. The last such
addition is followed by one all-reduce. Written into the program this is Shardy's `unreduced`, which XLA's partitioner keeps to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from partita.graph.gradient_sums import gradient_sums
from partita.graph.operator_graph import IdentityKey, Instruction, OperatorGraph, per_graph
from partita.plans.layout import Layout


@per_graph
def seen_labels(graph: OperatorGraph) -> dict[tuple[int, int], tuple[int, ...]]:
    """(instruction, operand position) -> the label under which it reads, where that is not the tensor's own."""
    return {read: use.label for use in graph.uses for read in use.instructions}


def reduced_factors(x: Instruction, labels: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The graph's factors that an instruction sums away, given the labels under which it reads its operands."""
    if x.rule is None or not x.rule.reduction:
        return ()
    found: dict[int, None] = {}
    for label, mapped in zip(labels, x.rule.operands, strict=False):
        for f, dim in zip(label, mapped, strict=False):
            if f >= 0 and dim and dim[0] in x.rule.reduction:
                found[f] = None
    return tuple(found)


@dataclass(frozen=True)
class Gradient:
    """A sum of gradients as an operator adds them up: `reduced` are the operator's factors over which its own ones are still to be summed."""

    operator: int
    additions: tuple[int, ...]
    result: int
    reduced: tuple[int, ...]
    leaves: dict[int, tuple[int, ...]]
    """Tensor that is added -> the factors, of its own operator, over which it is still to be summed."""


@per_graph
def gradients(graph: OperatorGraph) -> tuple[Gradient, ...]:
    """The gradients that an operator adds up from several, one of them its own."""
    seen, found = seen_labels(graph), []
    for s in gradient_sums(graph.instructions, graph.loops, graph.outputs):
        leaves, operator = {}, graph.owner[s.additions[-1]]
        for i in s.leaves:
            x = graph.instructions[i]
            labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
            leaves[x.results[0]] = reduced_factors(x, labels)
        own = [f for t, f in leaves.items() if graph.home[t] == operator and f]
        if own and all(graph.owner[i] == operator for i in s.additions):
            result = graph.instructions[s.additions[-1]].results[0]
            found.append(Gradient(operator, s.additions, result, own[0], leaves))
    return tuple(found)


def waiting(
    graph: OperatorGraph, layout: Layout
) -> tuple[Mapping[int, tuple[int, ...]], Mapping[int, int]]:
    """(tensor -> the axes over which it is still to be summed as it is made; those that are summed then -> the addition that makes it).

    A tensor that is summed over devices as soon as it is made is in neither.
    """
    return _waiting(IdentityKey(graph), IdentityKey(layout))


@lru_cache(maxsize=4)
def _waiting(
    graph_key: IdentityKey[OperatorGraph], layout_key: IdentityKey[Layout]
) -> tuple[Mapping[int, tuple[int, ...]], Mapping[int, int]]:
    graph, layout = graph_key.value, layout_key.value
    moved = {reader for read in layout.reads for reader in read.readers}
    wait: dict[int, tuple[int, ...]] = {}
    tops: dict[int, int] = {}
    for g in gradients(graph):
        left: dict[int, tuple[int, ...]] = {}
        for t, factors in g.leaves.items():
            assignment = layout.assignments[graph.home[t]] if graph.home[t] >= 0 else {}
            left[t] = tuple(sorted({a for f in factors for a in assignment.get(f, ())}))
        for i in g.additions:
            x = graph.instructions[i]
            a, b = (left.get(t, ()) for t in x.operands)
            stays = all(
                layout.shardings[t] == layout.shardings[x.results[0]] and (i, p) not in moved
                for p, t in enumerate(x.operands)
            )
            if a and a == b and stays:
                left[x.results[0]] = a
                wait |= dict.fromkeys((*x.operands, x.results[0]), a)
                for t in x.operands:
                    tops.pop(t, None)
                tops[x.results[0]] = i
    return wait, tops

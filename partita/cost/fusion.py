"""Which instructions XLA fuses into one kernel: what is written to memory, and what is computed more than once.

XLA's instruction fusion goes from the last instruction to the first and pulls producers into their consumer. A cheap producer
with several consumers is computed again in each of them; a dear one is written once and read. This is that algorithm on an OperatorGraph, as the
CPU backend runs it (xla/service/instruction_fusion.cc and cpu/cpu_instruction_fusion.cc), without what depends on layouts and
index arithmetic. FLOPs, traffic and peak memory of light instructions all follow from it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

from partita.cost.collectives import sums_and_reaches
from partita.cost.partial import waiting
from partita.graph.operator_graph import IdentityKey, Instruction, OperatorGraph, per_graph
from partita.plans.layout import Layout

ALONE = {
    "dot_general",
    "convolution",
    "reduce_window",
    "scatter",
    "select_and_scatter",
    "sort",
    "while",
    "case",
    "if",
    "custom_call",
    "optimization_barrier",
    "all_reduce",
    "fft",
    "cholesky",
    "triangular_solve",
    "rng_bit_generator",
    "top_k",
    "dynamic_reshape",
}
"""Instructions that are kernels of their own."""
DEAR = {
    "exponential",
    "exponential_minus_one",
    "log",
    "log_plus_one",
    "tanh",
    "power",
    "divide",
    "remainder",
    "rsqrt",
    "sqrt",
    "cbrt",
    "logistic",
    "erf",
    "sine",
    "cosine",
    "tan",
    "atan2",
    "reduce",
    "gather",
}
"""Instructions that are computed once and written, rather than again in every reader."""
FREE = {"constant", "iota", "broadcast_in_dim", "reshape", "bitcast_convert"}
"""Instructions that neither read nor write where they are a kernel of their own: XLA makes them part of their readers."""
OUTSIDE = 1 << 60
"""Stands for a reader that is no instruction: the results of the step, the values that a loop yields."""


@dataclass(frozen=True)
class Fusion:
    """Kernels of a graph: `kernels[r]` are the instructions computed in the kernel whose result is that of instruction r.

    `computed_in[i]` are the kernels that compute instruction i: several where doing it again is cheaper than to write it.
    """

    kernels: dict[int, tuple[int, ...]]
    computed_in: tuple[tuple[int, ...], ...]

    def written(self, graph: OperatorGraph) -> set[int]:
        """The tensors that exist in memory: results of kernels, and what loops carry."""
        found = {t for r in self.kernels for t in graph.instructions[r].results}
        return found | {t for loop in graph.loops for values in loop.carried for t in values}


def fusion(graph: OperatorGraph, recompute: bool = False) -> Fusion:
    """The kernels of a graph; kept, so that asking again costs nothing. For `recompute` see `Backend.recomputes`."""
    return _fusion(IdentityKey(graph), recompute)


@lru_cache(maxsize=8)
def _fusion(key: IdentityKey[OperatorGraph], recompute: bool) -> Fusion:
    return _Fuser(key.value, recompute).run()


def transposes(x: Instruction) -> bool:
    """Whether an instruction first transposes its operands, and so computes them once more: the weight gradient of a convolution.

    There the batch, dim 0 of the first operand, is summed away.
    """
    return (
        x.name == "convolution"
        and x.rule is not None
        and any(f in x.rule.reduction for f in x.rule.operands[0][0])
    )


class _Fuser:
    def __init__(self, graph: OperatorGraph, recompute: bool) -> None:
        self.graph, self.recompute = graph, recompute
        instructions, tensors = graph.instructions, graph.tensors
        self.producer = {t: i for i, x in enumerate(instructions) for t in x.results}
        self.producers = [
            [self.producer[t] for t in dict.fromkeys(x.operands) if t in self.producer]
            for x in instructions
        ]
        self.readers: list[set[int]] = [set() for _ in instructions]
        for i, found in enumerate(self.producers):
            for p in found:
                self.readers[p].add(i)
        yielded = [y for loop in graph.loops for _, _, y, _ in loop.carried]
        for t in (*graph.outputs, *yielded):
            if t in self.producer:
                self.readers[self.producer[t]].add(OUTSIDE)
        self.nbytes = [sum(tensors[t].nbytes for t in x.results) for x in instructions]
        self.rank = [
            max((len(tensors[t].shape) for t in x.results), default=0) for x in instructions
        ]
        self.dear = [x.name in DEAR and r > 0 for x, r in zip(instructions, self.rank, strict=True)]
        self.joins = [self._joins(x) for x in instructions]
        self.members: list[set[int]] = [set() for _ in instructions]
        """Per instruction, the kernels that compute it."""

    def run(self) -> Fusion:
        single = self._once()
        kernels = {}
        for root in reversed(range(len(self.joins))):
            if self.graph.instructions[root].name != "constant" and self._needed(root):
                kernels[root] = self._kernel(root, single)
        return Fusion(dict(sorted(kernels.items())), tuple(tuple(sorted(m)) for m in self.members))

    def _joins(self, x: Instruction) -> bool:
        """Whether an instruction can be computed inside its reader."""
        if x.name in ALONE or len(x.results) != 1:
            return False
        shapes = [self.graph.tensors[t].shape for t in (*x.operands[:1], *x.results)]
        if x.name == "reduce":
            # Reductions over the major dims have a kernel of their own.
            dims = x.rule.operands[0] if x.rule else ()
            return bool(dims and dims[-1] and x.rule and dims[-1][0] in x.rule.reduction)
        # Joined along the minor dim, every element would ask which part it is of.
        return x.name != "concatenate" or shapes[0][-1] == shapes[1][-1]

    def _needed(self, i: int) -> bool:
        """Whether some kernel reads the instruction's result without computing it."""
        mine = self.members[i]
        return not self.readers[i] or any(
            r == OUTSIDE or not self.members[r] <= mine for r in self.readers[i]
        )

    def _kernel(self, root: int, single: set[int]) -> tuple[int, ...]:
        """The instructions that the kernel of `root` computes: producers are asked latest first."""
        inside = {root: False}  # instruction -> whether its elements are read more than once
        self.members[root].add(root)
        name = self.graph.instructions[root].name
        library = name == "reduce" and not self.joins[root]
        alone = name in ALONE and not transposes(self.graph.instructions[root])
        waiting = [] if alone else [-p for p in self.producers[root]]
        heapq.heapify(waiting)
        asked: set[int] = set()
        while waiting:
            p = -heapq.heappop(waiting)
            if p in asked or not self.joins[p]:
                continue
            asked.add(p)
            shared = any(r not in inside or len(self.members[r]) > 1 for r in self.readers[p])
            reused = any(inside[r] or self._spreads(r, p) for r in self.readers[p] if r in inside)
            if shared and (self.dear[p] or library or p in single) or reused and self.dear[p]:
                continue
            inside[p] = reused
            self.members[p].add(root)
            for q in self.producers[p]:
                heapq.heappush(waiting, -q)
        return tuple(sorted(inside))

    def _spreads(self, reader: int, producer: int) -> bool:
        return (
            self.graph.instructions[reader].name == "broadcast_in_dim"
            and self.nbytes[reader] > self.nbytes[producer]
        )

    def _once(self) -> set[int]:
        """Producers that are never computed twice, because that would read more than it saves. A backend that recomputes does it even
        then, unless some reader needs them written."""
        found: set[int] = set()
        for p, readers in enumerate(self.readers):
            costly = len(readers) > 1 and self.joins[p] and self._gathers(p)
            if costly and not (
                self.recompute and all(self._absorbed(p, r, found) for r in readers)
            ):
                found.add(p)
        return found

    def _gathers(self, p: int) -> bool:
        """Whether an instruction reads several tensors of its own rank, and more bytes than it makes."""
        x, tensors = self.graph.instructions[p], self.graph.tensors
        made = {
            t: self.graph.instructions[self.producer[t]].name
            for t in x.operands
            if t in self.producer
        }
        full = [
            t
            for t in x.operands
            if made.get(t) not in FREE - {"reshape", "bitcast_convert"}
            and len(tensors[t].shape) >= self.rank[p]
        ]
        return (
            len(full) > 1
            and sum(tensors[t].nbytes for t in dict.fromkeys(x.operands)) > self.nbytes[p]
        )

    def _absorbed(self, p: int, reader: int, single: set[int]) -> bool:
        """Whether everything on the ways from `p` to one of its readers can be fused into that reader."""
        if reader == OUTSIDE:
            return False
        behind, waiting = {reader}, [reader]
        while waiting:
            new = {q for q in self.producers[waiting.pop()] if q > p} - behind
            behind |= new
            waiting += new
        leads = {p}
        for i in sorted(behind):
            if not leads.isdisjoint(self.producers[i]):
                leads.add(i)
        return all(
            (q == p or q not in single) and self._fits(q, i)
            for i in behind & leads
            for q in self.producers[i]
            if q in leads
        )

    def _fits(self, p: int, reader: int) -> bool:
        """Whether a producer may be pulled into one reader, taken by itself."""
        name = self.graph.instructions[reader].name
        if not self.joins[p] or name in ALONE or name == "reduce" and not self.joins[reader]:
            return False
        return not self.dear[p] or len(self.readers[p]) == 1 and not self._spreads(reader, p)


def cut(
    graph: OperatorGraph, fused: Fusion, barriers: Set[tuple[int, int]], ends: Set[int]
) -> Fusion:
    """The kernels where collectives are in between: at the reads (instruction, operand position) of `barriers`, and after `ends`."""
    producer = _producers(graph)
    touched = {root for i, _ in barriers for root in fused.computed_in[i]}
    touched |= {root for i in ends for root in fused.computed_in[i] if root != i}
    kernels = {root: kernel for root, kernel in fused.kernels.items() if root not in touched}
    waiting = sorted(touched, reverse=True)
    allowed = {root: set(fused.kernels[root]) for root in touched}
    while waiting:
        root = waiting.pop()
        inside, stack, within = {root}, [root], allowed[root]
        while stack:
            i = stack.pop()
            for position, t in enumerate(graph.instructions[i].operands):
                p = producer.get(t)
                if p is None or p not in within or p in inside:
                    continue
                if p in ends or (i, position) in barriers:
                    if p not in fused.kernels and graph.instructions[p].name != "constant":
                        if p not in allowed:
                            allowed[p] = set()
                            waiting.append(p)
                        allowed[p] |= within
                else:
                    inside.add(p)
                    stack.append(p)
        kernels[root] = tuple(sorted(inside))
    changed = {i for root in touched for i in fused.kernels[root]}
    computed = list(fused.computed_in)
    where: dict[int, list[int]] = {i: [r for r in computed[i] if r not in touched] for i in changed}
    for root in allowed:
        for i in kernels[root]:
            where[i].append(root)
    for i, roots in where.items():
        computed[i] = tuple(sorted(roots))
    return Fusion(dict(sorted(kernels.items())), tuple(computed))


def fused_under(graph: OperatorGraph, layout: Layout, recompute: bool) -> Fusion:
    """The kernels of a laid-out graph: what is moved to another sharding, and sums over split dims, are written in between."""
    return _fused_under(IdentityKey(graph), IdentityKey(layout), recompute)


@lru_cache(maxsize=2)
def _fused_under(
    graph_key: IdentityKey[OperatorGraph], layout_key: IdentityKey[Layout], recompute: bool
) -> Fusion:
    graph, layout = graph_key.value, layout_key.value
    wait, tops = waiting(graph, layout)
    ends = {
        i
        for i, o, factors, _ in sums_and_reaches(graph)
        if any(layout.assignments[o].get(f) for f in factors)
    }
    ends = {i for i in ends if wait.keys().isdisjoint(graph.instructions[i].results)} | set(
        tops.values()
    )
    barriers = {read for r in layout.reads for read in r.readers if read[0] >= 0}
    return cut(graph, fusion(graph, recompute), barriers, ends)


@per_graph
def _producers(graph: OperatorGraph) -> dict[int, int]:
    return {t: i for i, x in enumerate(graph.instructions) for t in x.results}


def reads(graph: OperatorGraph, kernel: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """The tensors that a kernel reads from memory, each with the (instruction, operand position) pairs that read it."""
    made = {t for i in kernel for t in graph.instructions[i].results}
    found: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for i in kernel:
        for position, t in enumerate(graph.instructions[i].operands):
            if t not in made:
                found[t].append((i, position))
    return found

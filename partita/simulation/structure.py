"""A training step as tasks: what every device computes and sends, phase by phase, and what waits for what.

An operator is up to seven tasks: its kernels forward, backward and in the update; the collectives of its activations forward and
backward; the sum of its gradients; the gathering of variables that are stored in parts. A value that another operator wants
under another sharding is a task between the two. Which tasks there are, and what comes before what, follows from the graph alone
(`structure`); a plan only gives them seconds (`durations`), none where a task is not needed.

Devices that do the same at the same time are one cell (`simulate.cells`), which one of them stands for: their number changes seconds, not
tasks. A device runs its kernels in program order, and its collectives in the order in which what they send is made, as XLA issues them. What
runs at the same time follows from the machine's backend. Where it hides nothing (`overlap` 0, XLA:CPU), kernels and collectives are one
sequence, and a step takes the sum of its parts. Where it does, collectives have a stream of their own, and hinder the kernels
beside them for the part of their time that is not hidden.

Times are those of `cost.evaluate` and `cost.moves`. Who does what of a slot where there are several cells: `simulate.placed`; microbatches:
`simulate.stages`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from partita.cost.evaluate import PHASES
from partita.cost.terms import Terms
from partita.graph.flat import HEAVY
from partita.graph.operator_graph import IdentityKey, OperatorGraph, Phase, constant_tensors

SlotKind = Literal["compute", "exchange", "sum", "gather", "move", "join"]


@dataclass(frozen=True, slots=True)
class Slot:
    """A task that a step may have. `reader` is the operator that a move is for, -1 otherwise; a join only waits.

    `share` is the part of the operator's kernels of that phase: 1 unless they run in several pieces, with others in between.
    """

    kind: SlotKind
    operator: int
    phase: Phase
    reader: int = -1
    share: float = 1.0
    read_phase: Phase = "forward"
    """Of a move, the phase in which it is read."""


@dataclass(frozen=True)
class Structure:
    """The tasks of a graph's step in the order in which a device issues them, and per task those whose results it reads."""

    slots: tuple[Slot, ...]
    before: tuple[tuple[int, ...], ...]
    of: tuple[int, ...]
    """Per instruction of the graph the slot that it is computed in, -1 for none."""


Node = tuple[str, int, str, int]
"""(kind of slot, operator or instruction, phase, piece or reader)."""


@lru_cache(maxsize=8)
def _structure(
    key: IdentityKey[OperatorGraph], terms_key: IdentityKey[Terms], placed: bool
) -> Structure:
    graph, terms = key.value, terms_key.value
    nodes = _pieces(graph, placed)
    work = _shares(graph, nodes)
    moved = {(m.tensor, m.reader): m for m in terms.edges}
    after: dict[Node, set[Node]] = defaultdict(set)
    order: dict[Node, float] = {}
    last: dict[tuple[int, str], Node] = {}
    slots: dict[Node, Slot] = {}
    for i, node in enumerate(nodes):
        if node is not None and node[0] == "compute":
            _, o, phase, _ = node
            slots[node] = Slot("compute", o, graph.instructions[i].phase, share=work[node][1])
            order[node] = work[node][0]
            if 0 <= node[3] < POST:
                last[o, phase] = max(last.get((o, phase), node), node, key=lambda n: n[3])
    for o, own in enumerate(terms.operators):
        for phase in PHASES:
            end = last.get((o, phase))
            if end is None:
                continue
            talks = any(
                r.phase == phase and not (r.parameter >= 0 and r.trips == 1) for r in own.reductions
            )
            if (
                talks
                or any(h.phase == phase for h in own.halos)
                or any(m.phase == phase for m in own.moves)
            ):
                slots["exchange", o, phase, 0] = Slot("exchange", o, phase)
                after["exchange", o, phase, 0].add(end)
                order["exchange", o, phase, 0] = order[end] + 0.2
        end = last.get((o, "backward"))
        if end is not None and any(r.parameter >= 0 and r.trips == 1 for r in own.reductions):
            slots["sum", o, "backward", 0] = Slot("sum", o, "backward")
            after["sum", o, "backward", 0].add(end)
            order["sum", o, "backward", 0] = order[end] + 0.4
        begin = ("compute", o, "forward", 0)
        if own.stored and begin in slots:
            slots["gather", o, "forward", 0] = Slot("gather", o, "forward")
            order["gather", o, "forward", 0] = order[begin] - 0.2
            after[begin].add(("gather", o, "forward", 0))

    def outlets(node: Node, to: str) -> list[Node]:
        """Where the results of a task's kernels come out, for readers of a phase."""
        _, o, phase, _ = node
        if node != last.get((o, phase)):
            return [node]
        through = [("exchange", o, phase, 0)] + (
            [("sum", o, phase, 0)] if to == "update" and phase == "backward" else []
        )
        return [n for n in through if n in slots] or [node]

    made = {t: i for i, x in enumerate(graph.instructions) for t in x.results}
    free = constant_tensors(graph)
    feeds: dict[Node, Node | None] = {}
    for i, (x, node) in enumerate(zip(graph.instructions, nodes, strict=True)):
        if node is None:
            continue
        if node not in slots:  # of no operator
            slots[node], order[node] = Slot("join", -1, x.phase), float(i)
        for t in x.operands:
            source = nodes[made[t]] if t in made and t not in free else None
            if source == node:
                continue
            move = moved.get((t, graph.owner[i]))
            ends = (
                []
                if source is None
                else outlets(source, x.phase)
                if source[0] == "compute"
                else [source]
            )
            if (
                move is not None
                and node[0] == "compute"
                and (source is None or source[1] != node[1])
            ):
                between = ("move", move.home, f"{move.phase} {move.read_phase}", move.reader)
                if between not in slots:
                    slots[between] = Slot(
                        "move", move.home, move.phase, move.reader, read_phase=move.read_phase
                    )
                    order[between] = (
                        (order[source] + 0.6)
                        if source is not None and source in order
                        else order[node] - 0.1
                    )
                    feeds[between] = source
                    after[between].update(ends)
                if (
                    feeds[between] == source
                ):  # what comes from another piece of the operator is waited for by itself
                    after[node].add(between)
                    continue
            after[node].update(ends)
    return _ordered(slots, after, order, nodes)


def structure(graph: OperatorGraph, terms: Terms, placed: bool = False) -> Structure:
    """The tasks that a step of this graph may have, whatever its plan; computed once per graph.

    Where operators are `placed` apart, what one only passes on between others is a task by itself.
    """
    return _structure(IdentityKey(graph), IdentityKey(terms), placed)


PRE, POST = -1 << 20, 1 << 20
"""Numbers of the pieces of an operator before and after those with its heavy instructions."""


def _passing(graph: OperatorGraph) -> dict[int, int]:
    """Instruction -> PRE or POST, where it is light and not on the way from what its operator's heavy instructions of that phase read to what they make.

    A branch's values are joined, and their gradients taken apart again, in the operator of one of the branches; the other branches do not wait for the
    heavy work of that one, nor it for theirs.
    """
    made = {t: i for i, x in enumerate(graph.instructions) for t in x.results}
    home = lambda i: (graph.owner[i], graph.instructions[i].phase)  # noqa: E731
    before: list[frozenset[int]] = []
    behind, read_by_others = [False] * len(graph.instructions), [False] * len(graph.instructions)
    needs: dict[tuple[int, Phase], frozenset[int]] = {}
    for i, x in enumerate(graph.instructions):
        found, heavy = set(), x.name in HEAVY
        for j in (made[t] for t in x.operands if t in made and made[t] < i):
            if home(j) == home(i):
                found |= before[j]
                heavy |= behind[j]
            else:
                found |= {graph.owner[j]} - {-1, graph.owner[i]}
                read_by_others[j] |= graph.owner[i] not in (-1, graph.owner[j])
        before.append(frozenset(found))
        behind[i] = heavy
        if x.name in HEAVY:
            needs[home(i)] = needs.get(home(i), frozenset()) | before[i]
    place: dict[int, int] = {}
    for i in reversed(range(len(graph.instructions))):
        x = graph.instructions[i]
        if graph.owner[i] < 0 or home(i) not in needs:
            continue
        if not before[i] <= needs[home(i)]:
            place[i] = POST
        elif not behind[i] and read_by_others[i]:
            place[i] = PRE
            for j in (made[t] for t in x.operands if t in made and made[t] < i):
                read_by_others[j] |= home(j) == home(i)
    return place


def _pieces(graph: OperatorGraph, placed: bool) -> list[Node | None]:
    """Per instruction the task that its kernels belong to; None for what takes no time and waits for nothing.

    An operator's phase is one task, unless another operator's work comes between two parts of it; then each part is a task.
    """
    passing = _passing(graph) if placed else {}
    free = constant_tensors(graph)
    made = {t: i for i, x in enumerate(graph.instructions) for t in x.results}
    loops = {loop.instruction for loop in graph.loops}
    nodes: list[Node | None] = []
    for i, x in enumerate(graph.instructions):
        if all(t in free for t in x.results) and i not in loops:
            nodes.append(None)
        elif graph.owner[i] >= 0:
            nodes.append(("compute", graph.owner[i], x.phase, passing.get(i, 0)))
        else:
            sources = {
                node
                for t in x.operands
                if t in made and made[t] < i
                for node in [nodes[made[t]]]
                if node is not None
            }
            joins = [node for node in sources if node[0] == "join"]
            nodes.append(joins[0] if len(sources) == len(joins) == 1 else ("join", i, x.phase, 0))
    number = {node: n for n, node in enumerate(dict.fromkeys(nodes)) if node is not None}
    pairs = {
        (number[a], number[b])
        for i, b in enumerate(nodes)
        if b is not None
        for t in graph.instructions[i].operands
        if t in made and t not in free
        for a in [nodes[made[t]]]
        if a is not None and a != b
    }
    knot = _knots(pairs, 1 + max(number.values(), default=0))
    piece: dict[Node, int] = {}
    before: dict[int, Node] = {}
    for i, node in enumerate(nodes):
        if node is None or number[node] not in knot:
            continue
        tied = knot[number[node]]
        if node in piece and before[tied] != node:
            piece[node] += 1
        piece.setdefault(node, 0)
        before[tied] = node
        nodes[i] = (*node[:3], node[3] + piece[node])
    return nodes


def _knots(pairs: set[tuple[int, int]], count: int) -> dict[int, int]:
    """Of the nodes of a directed graph that lie on a cycle, which strongly connected component each is in."""
    if not pairs:
        return {}
    rows, columns = zip(*pairs, strict=True)
    _, component = connected_components(
        csr_matrix((np.ones(len(pairs)), (rows, columns)), (count, count)), connection="strong"
    )
    size = np.bincount(component)
    return {n: int(c) for n, c in enumerate(component) if size[c] > 1}


def _shares(graph: OperatorGraph, nodes: Sequence[Node | None]) -> dict[Node, tuple[float, float]]:
    """Per task of kernels: where in the program its heaviest instruction stands, and its part of the work of its phase."""
    weight: dict[Node, float] = defaultdict(float)
    whole: dict[Node, float] = defaultdict(float)
    heaviest: dict[Node, tuple[float, int]] = {}
    for i, node in enumerate(nodes):
        if node is None or node[0] != "compute":
            continue
        x = graph.instructions[i]
        work = 1.0 + (x.flops + sum(graph.tensors[t].nbytes for t in x.results)) * x.trips
        weight[node] += work
        whole[*node[:3], 0] += work
        heaviest[node] = max(heaviest.get(node, (0.0, i)), (x.flops * x.trips, i))
    return {node: (float(heaviest[node][1]), w / whole[*node[:3], 0]) for node, w in weight.items()}


def _ordered(
    slots: dict[Node, Slot],
    after: dict[Node, set[Node]],
    order: dict[Node, float],
    nodes: Sequence[Node | None],
) -> Structure:
    """The slots in program order, as far as what comes before what allows it."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    waits = {node: 0 for node in slots}
    for node in slots:
        for source in after[node]:
            readers[source].append(node)
            waits[node] += 1
    ready = [(order[node], node) for node in slots if not waits[node]]
    heapq.heapify(ready)
    place: dict[Node, int] = {}
    while ready:
        _, node = heapq.heappop(ready)
        place[node] = len(place)
        for reader in readers[node]:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, (order[reader], reader))
    assert len(place) == len(slots), "tasks wait for each other in a circle"
    before = tuple(tuple(sorted(place[s] for s in after[node])) for node in place)
    return Structure(
        tuple(slots[node] for node in place),
        before,
        tuple(-1 if node is None else place[node] for node in nodes),
    )


def thinned(step: Structure, keep: Sequence[bool]) -> Structure:
    """The structure without slots that never take time: what waited for one waits for what it waited for.

    One that is not to be kept stays where it joins many to many: it stands for as many pairs.
    """
    readers = np.bincount([b for mine in step.before for b in mine], minlength=len(step.slots))
    left: list[int] = []
    place: dict[int, int] = {}
    through: list[frozenset[int]] = []
    before: list[tuple[int, ...]] = []
    for n, mine in enumerate(step.before):
        sources: frozenset[int] = frozenset().union(*(through[b] for b in mine))
        if keep[n] or len(sources) * readers[n] > len(sources) + readers[n]:
            place[n] = len(left)
            left.append(n)
            before.append(tuple(sorted(place[s] for s in sources)))
            sources = frozenset((n,))
        through.append(sources)
    of = tuple(place.get(slot, -1) for slot in step.of)
    return Structure(tuple(step.slots[n] for n in left), tuple(before), of)

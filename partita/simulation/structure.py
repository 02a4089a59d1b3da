"""The slots of a training step: everything that a device may compute or send, and the slots that
each one waits for.

An operator has up to nine slots: its kernels in the forward pass, the backward pass and the
update; the collectives of its activations forward and backward; the sum of its gradients; the
gathers of variables that are stored in shards, before each pass that reads them or after the
update. A value that another operator reads in another
sharding has a slot for the move. The slots and their order depend on the graph alone; a plan gives
them seconds (`tasks`), none where a slot is not needed. Kernels are in program order, collectives
in the order in which their operands are computed.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Literal

import numpy as np

from partita.cost.evaluate import PHASES
from partita.cost.operator_terms import Move, OperatorTerms, Reduction
from partita.cost.terms import Terms
from partita.graph.flat import HEAVY
from partita.graph.operator_graph import (
    IdentityKey,
    OperatorGraph,
    Phase,
    constant_tensors,
    producers,
)
from partita.plans.layout import prefetching_product
from partita.plans.plan import is_gpu
from partita.simulation.pieces import GRADIENT_PIECE, LAST_PIECE, Node, kernel_nodes, kernel_work

SlotKind = Literal["compute", "exchange", "sum", "gather", "move", "join"]
REPEATED = ("compute", "exchange", "move")
"""Slots of the forward pass that are repeated where an operator is computed again."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A task that a step may have."""

    kind: SlotKind
    """A "join" takes no time and only waits."""
    operator: int
    phase: Phase
    reader: int = -1
    """The reading operator of a move, -1 for other kinds."""
    share: float = 1.0
    """The fraction of the operator's kernels of that phase: 1 unless they run in several pieces."""
    read_phase: Phase = "forward"
    """The phase in which a moved value is read."""
    again: bool = False
    """Whether the backward pass repeats a slot of the forward pass (`with_repeated_slots`)."""


@dataclass(frozen=True)
class Structure:
    """The slots of a step, in the order in which a device issues them."""

    slots: tuple[Slot, ...]
    before: tuple[tuple[int, ...], ...]
    """[slot]: the slots whose results it reads."""
    slot_of: tuple[int, ...]
    """[instruction]: the slot that computes it, -1 for none."""


def step_structure(
    graph: OperatorGraph,
    terms: Terms,
    placed: bool = False,
) -> Structure:
    """The slots of a step under any plan; computed once per graph.

    With `placed` operators, instructions that only pass values on between other operators have
    slots of their own.
    """
    return _structure(IdentityKey(graph), IdentityKey(terms), placed)


@lru_cache(maxsize=8)
def _structure(
    graph_key: IdentityKey[OperatorGraph],
    terms_key: IdentityKey[Terms],
    placed: bool,
) -> Structure:
    builder = _StructureBuilder(graph_key.value, terms_key.value, placed)
    builder.add_kernels()
    builder.add_collectives()
    builder.add_dependences()
    return builder.structure()


class _StructureBuilder:
    """Slots by node, with the nodes before each and its position in the program."""

    def __init__(
        self,
        graph: OperatorGraph,
        terms: Terms,
        placed: bool,
    ) -> None:
        self.graph = graph
        self.terms = terms
        self.nodes = kernel_nodes(graph, placed)
        self.slots: dict[Node, Slot] = {}
        self.before: dict[Node, set[Node]] = defaultdict(set)
        self.position: dict[Node, float] = {}
        """Node -> its position in the program: an instruction, or between two."""
        self.last_kernels: dict[tuple[int, str], Node] = {}
        """(operator, phase) -> the last piece of its kernels that is not an outer one."""
        self.gradient_kernels: dict[int, Node] = {}
        """Operator -> the piece with its weight gradients, if they are apart."""
        self.move_source: dict[Node, Node | None] = {}
        """Move -> the node whose result it moves; None for an argument of the step."""
        self.first_product: dict[Node | None, int] = {}
        """Node -> its first product, or its first instruction if it has none."""
        for i in range(len(self.nodes)):
            self.first_product.setdefault(self.nodes[i], i)
        for i in reversed(range(len(self.nodes))):
            if graph.instructions[i].name in HEAVY:
                self.first_product[self.nodes[i]] = i

    def add_kernels(self) -> None:
        """Adds the pieces of all operators' kernels."""
        work = kernel_work(self.graph, self.nodes)
        for instruction, node in zip(self.graph.instructions, self.nodes, strict=True):
            if node is None or node.kind != "compute":
                continue
            self.slots[node] = Slot(
                "compute", node.number, instruction.phase, share=work[node].share
            )
            self.position[node] = work[node].position
            if GRADIENT_PIECE <= node.piece < LAST_PIECE:
                self.gradient_kernels[node.number] = node
            elif 0 <= node.piece < LAST_PIECE:
                last = self.last_kernels.setdefault((node.number, node.phase), node)
                if node.piece > last.piece:
                    self.last_kernels[node.number, node.phase] = node

    def add_collectives(self) -> None:
        """Adds exchanges of activations, sums of gradients and gathers of variables."""
        for o, operator_terms in enumerate(self.terms.operators):
            for phase in PHASES:
                last = self.last_kernels.get((o, phase))
                if last is not None and _exchanges(operator_terms, phase):
                    self._add_after(
                        last, Node("exchange", o, phase, 0), Slot("exchange", o, phase), 0.2
                    )
            last = self.last_kernels.get((o, "backward"))
            gradient = self.gradient_kernels.get(o)
            if last is not None and gradient is not None:
                position = self.position[last] + 0.8
                self.position[gradient] = max(self.position[gradient], position)
            if last is not None and _sums_gradients(operator_terms):
                self._add_after(
                    gradient or last, Node("sum", o, "backward", 0), Slot("sum", o, "backward"), 0.4
                )
            if operator_terms.stored:
                self._add_gathers(o, operator_terms)

    def _add_gathers(self, operator: int, operator_terms: OperatorTerms) -> None:
        """Adds the gathers of an operator's variables: before its passes, or after the update."""
        passes: tuple[Phase, ...] = ("forward",)
        if any(variable.passes > 1 for variable in operator_terms.stored):
            passes = ("forward", "backward")
        for phase in passes:
            first = Node("compute", operator, phase, 0)
            if first in self.slots:
                gather = Node("gather", operator, phase, 0)
                self.slots[gather] = Slot("gather", operator, phase)
                self.position[gather] = self.position[first] - 0.2
                self.before[first].add(gather)
                if phase == "backward" or is_gpu(self.graph.target):
                    self._start_late(gather, first)
        last = self.last_kernels.get((operator, "update"))
        if last is not None:
            gather = Node("gather", operator, "update", 0)
            self._add_after(last, gather, Slot("gather", operator, "update"), 0.2)

    def _start_late(self, gather: Node, reader: Node) -> None:
        """Lets the gather for a pass begin a few products before it."""
        product = prefetching_product(self.graph, self.first_product[reader], reader.phase)
        node = self.nodes[product] if product >= 0 else None
        if node is not None and node in self.slots:
            self.before[gather].add(node)
            self.position[gather] = self.position[node] + 0.1

    def _add_after(
        self,
        source: Node,
        node: Node,
        slot: Slot,
        offset: float,
    ) -> None:
        """Adds a slot that waits for `source`, at this offset from it in the program."""
        self.slots[node] = slot
        self.before[node].add(source)
        self.position[node] = self.position[source] + offset

    def add_dependences(self) -> None:
        """Adds joins, moves and the dependences of all nodes, in program order."""
        producer = producers(self.graph)
        constants = constant_tensors(self.graph)
        moves = {(move.tensor, move.reader): move for move in self.terms.edges}
        for i, (instruction, node) in enumerate(
            zip(self.graph.instructions, self.nodes, strict=True)
        ):
            if node is None:
                continue
            if node not in self.slots:
                self.slots[node] = Slot("join", -1, instruction.phase)
                self.position[node] = float(i)
            for tensor in instruction.operands:
                source = None
                if tensor in producer and tensor not in constants:
                    source = self.nodes[producer[tensor]]
                if source == node:
                    continue
                sources = self._outlets(source, instruction.phase)
                move = moves.get((tensor, self.graph.owner[i]))
                moved = source is None or source.number != node.number
                if move is not None and node.kind == "compute" and moved:
                    move_node = self._add_move(move, source, node, sources)
                    if self.move_source[move_node] == source:
                        self.before[node].add(move_node)
                        continue
                    # A value of another piece of the home operator is waited for directly.
                self.before[node].update(sources)

    def _outlets(self, node: Node | None, read_phase: Phase) -> list[Node]:
        """The nodes with the results of a node for readers of a phase: after kernels, their
        exchange and sum.
        """
        if node is None:
            return []
        if node.kind == "compute" and node == self.gradient_kernels.get(node.number):
            total = Node("sum", node.number, node.phase, 0)
            return [total] if total in self.slots else [node]
        if node.kind != "compute" or node != self.last_kernels.get((node.number, node.phase)):
            return [node]
        outlets = [Node("exchange", node.number, node.phase, 0)]
        if read_phase == "update" and node.phase == "backward":
            outlets.append(Node("sum", node.number, node.phase, 0))
        return [outlet for outlet in outlets if outlet in self.slots] or [node]

    def _add_move(
        self,
        move: Move,
        source: Node | None,
        reader: Node,
        sources: Sequence[Node],
    ) -> Node:
        """The node of a move, which is added if it is new."""
        phases = f"{move.phase} {move.read_phase}"
        node = Node("move", move.home, phases, move.reader)
        if node not in self.slots:
            self.slots[node] = Slot(
                kind="move",
                operator=move.home,
                phase=move.phase,
                reader=move.reader,
                read_phase=move.read_phase,
            )
            if source is not None and source in self.position:
                self.position[node] = self.position[source] + 0.6
            else:
                self.position[node] = self.position[reader] - 0.1
            self.move_source[node] = source
            self.before[node].update(sources)
        return node

    def structure(self) -> Structure:
        """The structure of all slots."""
        number = self._program_order()
        before = [tuple(sorted(number[source] for source in self.before[node])) for node in number]
        slot_of = [-1 if node is None else number[node] for node in self.nodes]
        slots = [self.slots[node] for node in number]
        return Structure(
            tuple(slots),
            tuple(before),
            tuple(slot_of),
        )

    def _program_order(self) -> dict[Node, int]:
        """Node -> its number: of the nodes whose sources are numbered, always the first in the
        program.
        """
        readers: dict[Node, list[Node]] = defaultdict(list)
        waits = dict.fromkeys(self.slots, 0)
        for node in self.slots:
            for source in self.before[node]:
                readers[source].append(node)
                waits[node] += 1
        ready = [(self.position[node], node) for node in self.slots if not waits[node]]
        heapq.heapify(ready)
        number: dict[Node, int] = {}
        while ready:
            _, node = heapq.heappop(ready)
            number[node] = len(number)
            for reader in readers[node]:
                waits[reader] -= 1
                if not waits[reader]:
                    heapq.heappush(ready, (self.position[reader], reader))
        assert len(number) == len(self.slots), "slots wait for each other in a circle"
        return number


def _exchanges(terms: OperatorTerms, phase: Phase) -> bool:
    """Whether an operator may exchange activations in a phase."""
    reduces = any(not _is_gradient(r) and r.phase == phase for r in terms.reductions)
    sends = any(part.phase == phase for part in (*terms.halos, *terms.moves))
    return reduces or sends


def _sums_gradients(terms: OperatorTerms) -> bool:
    return any(_is_gradient(reduction) for reduction in terms.reductions)


def _is_gradient(reduction: Reduction) -> bool:
    """Whether a reduction sums a gradient, once in a step."""
    return reduction.parameter >= 0 and reduction.trips == 1


def without_idle_slots(structure: Structure, takes_time: Sequence[bool]) -> Structure:
    """The structure without slots that never take time. Their readers wait for their sources.

    A slot that joins many sources with many readers stays, because it stands for more pairs than it
    has neighbors.
    """
    all_sources = list(chain.from_iterable(structure.before))
    readers = np.bincount(all_sources, minlength=len(structure.slots))
    number: dict[int, int] = {}
    """Old number -> new number of the slots that stay."""
    before: list[tuple[int, ...]] = []
    seen_through: list[frozenset[int]] = []
    """[slot]: the staying slots that its readers wait for."""
    for n, direct_before in enumerate(structure.before):
        sources: frozenset[int] = frozenset().union(*(seen_through[b] for b in direct_before))
        pairs = len(sources) * readers[n]
        if takes_time[n] or pairs > len(sources) + readers[n]:
            number[n] = len(number)
            before.append(tuple(sorted(number[source] for source in sources)))
            sources = frozenset((n,))
        seen_through.append(sources)
    slots = tuple(structure.slots[n] for n in number)
    slot_of = tuple(number.get(slot, -1) for slot in structure.slot_of)
    return Structure(slots, tuple(before), slot_of)


def with_repeated_slots(structure: Structure, runs: Sequence[Collection[int]]) -> Structure:
    """The structure in which the backward pass may repeat the forward pass of some operators.

    The kernels, the exchanges and the moves to the operators of a run are repeated in front of the
    first kernel of its backward pass, and wait for the same gradients. Variables for this backward
    pass are gathered before them.
    """
    run_of = {operator: run for run, operators in enumerate(runs) for operator in operators}
    slots = structure.slots
    run_of_slot = [run_of.get(s.reader if s.kind == "move" else s.operator, -1) for s in slots]
    first: dict[int, int] = {}
    """Run -> the first kernel of its backward pass."""
    repeated: dict[int, list[int]] = defaultdict(list)
    gathers: dict[int, list[int]] = defaultdict(list)
    """Run -> its gathers for the backward pass that are behind this kernel."""
    gather_of: dict[int, int] = {}
    """Operator -> its gather for the backward pass."""
    for n, (slot, run) in enumerate(zip(slots, run_of_slot, strict=True)):
        if slot.phase == slot.read_phase == "forward" and slot.kind in REPEATED:
            repeated[run].append(n)
        if slot.phase == "backward" and slot.kind == "compute":
            first.setdefault(run, n)
        if slot.phase == "backward" and slot.kind == "gather":
            gather_of[slot.operator] = n
            if run in first:
                gathers[run].append(n)
    moved = {n for run in run_of.values() for n in gathers[run]}
    order: list[tuple[int, bool]] = []
    """[new slot]: its number in the structure, and whether it is repeated there."""
    for n, run in enumerate(run_of_slot):
        if run >= 0 and first.get(run) == n:
            order += [(gather, False) for gather in gathers[run]]
            order += [(source, True) for source in repeated[run]]
        if n not in moved:
            order.append((n, False))
    number = {place: new for new, place in enumerate(order)}

    def sources(n: int, again: bool) -> Iterator[int]:
        """The new slots that one waits for."""
        slot, run = slots[n], run_of_slot[n]
        if again:
            gradients = structure.before[first[run]]
            yield from (number[b, False] for b in gradients if slots[b].phase == "backward")
        for source in structure.before[n]:
            is_repeated = (source, True) in number and run_of_slot[source] == run
            if is_repeated and (again or slot.phase == "backward"):
                yield number[source, True]
            elif not again:
                yield number[source, False]
            elif slots[source].kind == "gather" and slot.operator in gather_of:
                yield number[gather_of[slot.operator], False]

    before = []
    for new, place in enumerate(order):
        before.append(tuple(sorted({source for source in sources(*place) if source < new})))
    slot_of = tuple(number[n, False] if n >= 0 else -1 for n in structure.slot_of)
    new_slots = tuple(replace(slots[n], again=again) for n, again in order)
    return Structure(new_slots, tuple(before), slot_of)

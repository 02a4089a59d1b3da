"""Light statements at the border of two stages, on the side that makes fewest bytes cross.

Values cross a border for every microbatch. A statement starts on the stage of its operator, and the
layer normalization between two blocks belongs to the block before. So its result and its input both
cross, and the gradients of query, key and value cross one by one. If the normalization runs on the
later stage, one value and one gradient cross.

The statements near a border, its two stages and the tensors between them are a directed graph; the
places with fewest crossing bytes are a minimum cut of it (Ford and Fulkerson, 1956). A tensor is a
node of its own, so that several readers on one side receive it once (Ihler et al., 1993). Edges
without limit keep forward values from going back, and gradients from going on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from partita.graph.operator_graph import OperatorGraph, per_graph
from partita.plans.phases import LIGHT, Class, DataFlow

MOVABLE = LIGHT | {"reduce"}
"""Instructions that may run on either side of a border."""
DISTANCE = 30
"""Statements from a crossing tensor to one that may move, at most: both passes of a layer
normalization and a residual sum."""
NO_LIMIT = 1 << 30
LARGEST_SUM = 1 << 28
"""Sum of all limited capacities, at most: the flow of a graph is an int32."""
EARLIER, LATER = 0, 1
"""The nodes of the two stages."""
FORWARD, BACKWARD, UPDATE, COPIED = range(4)
CODES: dict[Class, int] = {
    "forward": FORWARD,
    "backward": BACKWARD,
    "update": UPDATE,
    "copied": COPIED,
}
"""Class of a statement -> its number."""

Array = np.ndarray


def least_crossing(
    flow: DataFlow,
    classes: Sequence[Class],
    places: Sequence[int],
    nbytes: Sequence[int],
    microbatches: int,
) -> list[int]:
    """[statement]: its stage, after light statements moved over the borders of stages.

    `places`: the stages of their operators; `nbytes`: per tensor the bytes of a microbatch.
    """
    program = _Program.of(flow, classes)
    moved = np.array(places)
    tensor_bytes = np.array(nbytes, float)
    crossing = program.crossing(moved)
    for stage in range(max(places, default=0)):
        border = _Border(program, moved, tensor_bytes, microbatches, stage)
        moved = border.places_with_least_crossing(crossing)
    return moved.tolist()


def crossing_tensors(flow: DataFlow, ends: Sequence[int]) -> list[list[int]]:
    """Per end of a stage the tensors that cross it in every microbatch, with fewest bytes.

    `ends`: the last operator before each.
    """
    operators = np.array(_operators(flow))
    nbytes = np.array([tensor.nbytes for tensor in flow.graph.tensors], float)
    program = _Program.of(flow, flow.classes)
    tensors, first, last = program.operators_of_tensors(operators)
    result = []
    for end in ends:
        places = (operators > end).astype(int)
        near = tensors[(first <= end) & (end < last)]
        border = _Border(program, places, nbytes, 1, 0)
        moved = border.places_with_least_crossing(near)
        after = _Border(program, moved, nbytes, 1, 0)
        around = program.tensors_of(np.flatnonzero(border.near))
        result.append(after.sent(np.union1d(near, around)).tolist())
    return result


def _operators(flow: DataFlow) -> list[int]:
    """[statement]: its operator, or the last one of its operands, or the first one; see
    `pieces` for the places of a plan.
    """
    operators: list[int] = []
    for k, statement in enumerate(flow.statements):
        before = [operators[flow.producer[t]] for t in statement.reads if t in flow.producer]
        operators.append(flow.owner(k) if flow.owner(k) >= 0 else max(before, default=0))
    return operators


class _Rows(NamedTuple):
    """Rows of numbers: `values[first[row] : first[row + 1]]`."""

    first: Array
    values: Array

    @staticmethod
    def of(rows: Sequence[Sequence[int]]) -> _Rows:
        """The rows of a list."""
        values = np.array(list(chain.from_iterable(rows)), np.int64)
        return _Rows(np.cumsum([0, *map(len, rows)]), values)

    def of_rows(self, rows: Array) -> tuple[Array, Array]:
        """(the values of some rows, one row after the other; per value the position of its row)."""
        begins = self.first[rows]
        counts = self.first[rows + 1] - begins
        position = np.repeat(np.arange(len(rows)), counts)
        skipped = np.cumsum(counts) - counts
        index = np.arange(len(position)) + np.repeat(begins - skipped, counts)
        return self.values[index], position

    def where(self, chosen: Array) -> _Rows:
        """The rows with the chosen values alone."""
        kept = np.concatenate([[0], np.cumsum(chosen)])
        return _Rows(kept[self.first], self.values[chosen])


class _Tables(NamedTuple):
    """The statements of a step, and the tensors between them, as arrays."""

    reads: _Rows
    makes: _Rows
    readers: _Rows
    """Tensor -> the statements that read it."""
    producer: Array
    """[tensor]: the statement that makes it, -1 for arguments."""
    is_light: Array
    """[statement]: whether it may run on either side of a border, and changes no state."""


@per_graph
def _tables(graph: OperatorGraph) -> _Tables:
    flow = DataFlow.of(graph)
    count = len(graph.tensors)
    producer = np.full(count, -1)
    producer[list(flow.producer)] = list(flow.producer.values())
    outputs = set(graph.outputs)
    is_light = []
    for k, statement in enumerate(flow.statements):
        roles = {flow.roles.get(t) for t in statement.reads}
        may_move = flow.instruction(k).name in MOVABLE and roles <= {None, "parameter"}
        is_light.append(may_move and outputs.isdisjoint(statement.makes))
    return _Tables(
        reads=_Rows.of([statement.reads for statement in flow.statements]),
        makes=_Rows.of([statement.makes for statement in flow.statements]),
        readers=_Rows.of([flow.readers.get(t, ()) for t in range(count)]),
        producer=producer,
        is_light=np.array(is_light, bool),
    )


@dataclass(frozen=True, eq=False)
class _Program:
    """The statements of a step with their classes; values computed anywhere have no producer."""

    tables: _Tables
    code: Array
    """[statement]: the number of its class."""

    @staticmethod
    def of(flow: DataFlow, classes: Sequence[Class]) -> _Program:
        return _Program(_tables(flow.graph), np.array([CODES[one] for one in classes]))

    @cached_property
    def producer(self) -> Array:
        """[tensor]: its statement; -1 for arguments and values computed anywhere."""
        producer = self.tables.producer
        is_copied = self.code[producer] == COPIED
        return np.where(is_copied, -1, producer)

    @cached_property
    def readers(self) -> _Rows:
        """Tensor -> the statements that read it, except those that run anywhere."""
        readers = self.tables.readers
        return readers.where(self.code[readers.values] != COPIED)

    @cached_property
    def may_move(self) -> Array:
        """[statement]: whether it is a light one of a pass."""
        return self.tables.is_light & (self.code <= BACKWARD)

    def crossing(self, places: Array) -> Array:
        """The tensors that one stage computes and another one reads."""
        tensors = np.flatnonzero(self.producer >= 0)
        readers, position = self.readers.of_rows(tensors)
        source = self.producer[tensors]
        differs = places[readers] != places[source[position]]
        return np.unique(tensors[position[differs]])

    def operators_of_tensors(self, operators: Array) -> tuple[Array, Array, Array]:
        """(tensors of the passes, the first operator that computes or reads each, the last)."""
        tensors = np.flatnonzero(self.producer >= 0)
        tensors = tensors[self.code[self.producer[tensors]] <= BACKWARD]
        readers, position = self.readers.of_rows(tensors)
        first = operators[self.producer[tensors]]
        last = first.copy()
        np.minimum.at(first, position, operators[readers])
        np.maximum.at(last, position, operators[readers])
        return tensors, first, last

    def tensors_of(self, statements: Array) -> Array:
        """The tensors that statements read or make, with repetitions."""
        reads, _ = self.tables.reads.of_rows(statements)
        makes, _ = self.tables.makes.of_rows(statements)
        return np.concatenate([reads, makes])

    def neighbours(self, statements: Array) -> Array:
        """The statements that compute their operands, and all readers of these and of results."""
        tensors = self.tensors_of(statements)
        tensors = np.unique(tensors[self.producer[tensors] >= 0])
        readers, _ = self.readers.of_rows(tensors)
        return np.concatenate([self.producer[tensors], readers])


class _Border:
    """The border between a stage and the next one."""

    def __init__(
        self,
        program: _Program,
        places: Array,
        nbytes: Array,
        microbatches: int,
        stage: int,
    ) -> None:
        self.program = program
        self.places = places
        self.nbytes = nbytes
        self.microbatches = microbatches
        self.stage = stage
        self.is_later = places > stage
        self.near = np.zeros(len(places), bool)
        """[statement]: whether it may move over the border."""

    def places_with_least_crossing(self, crossing: Array) -> Array:
        """The places of all statements, those of a minimum cut for statements that may move.

        `crossing`: tensors that go from stage to stage, and perhaps others.
        """
        own = self._crosses(crossing)
        self.near = self._near_statements(own)
        if not self.near.any() or self._goes_against(own):
            return self.places
        graph = _CutGraph(self)
        places = self.places.copy()
        places[graph.near] = np.where(graph.is_earlier(), self.stage, self.stage + 1)
        return places

    def sent(self, tensors: Array) -> Array:
        """The tensors that cross for another pass, in every microbatch."""
        source = self.program.producer[tensors]
        tensors = tensors[source >= 0]
        tensors = tensors[self.program.code[self.program.producer[tensors]] != UPDATE]
        readers, position = self.program.readers.of_rows(tensors)
        is_later = self.is_later[self.program.producer[tensors]]
        differs = self.is_later[readers] != is_later[position]
        differs &= self.program.code[readers] != UPDATE
        return tensors[np.unique(position[differs])]

    def _crosses(self, tensors: Array) -> Array:
        """The tensors that cross the border."""
        readers, position = self.program.readers.of_rows(tensors)
        is_later = self.is_later[self.program.producer[tensors]]
        differs = self.is_later[readers] != is_later[position]
        return tensors[np.unique(position[differs])]

    def _goes_against(self, tensors: Array) -> bool:
        """Whether a forward value goes back, or a gradient on: then the plan cannot run."""
        code, places = self.program.code, self.places
        readers, position = self.program.readers.of_rows(tensors)
        source = self.program.producer[tensors][position]
        goes_back = places[readers] < places[source]
        goes_on = places[readers] > places[source]
        against = np.where(code[source] == BACKWARD, goes_on, goes_back)
        is_same_pass = (code[readers] == code[source]) & (code[source] != UPDATE)
        return bool((against & is_same_pass).any())

    def _near_statements(self, crossing: Array) -> Array:
        """[statement]: whether it may move, by its distance from a tensor that crosses."""
        program = self.program
        is_here = (self.places == self.stage) | (self.places == self.stage + 1)
        may_move = program.may_move & is_here
        near = np.zeros(len(may_move), bool)
        readers, _ = program.readers.of_rows(crossing)
        found = np.concatenate([program.producer[crossing], readers])
        for _ in range(DISTANCE):
            found = np.unique(found)
            found = found[may_move[found] & ~near[found]]
            if not len(found):
                break
            near[found] = True
            found = program.neighbours(found)
        return near


class _CutGraph:
    """The directed graph of a border, whose minimum cut are the places with fewest bytes."""

    def __init__(self, border: _Border) -> None:
        program = border.program
        self.near = np.flatnonzero(border.near)
        self._code = program.code
        self._node = np.where(border.is_later, LATER, EARLIER)
        """[statement]: its node."""
        self._node[self.near] = 2 + np.arange(len(self.near))
        self._count = 2 + len(self.near)
        self._edges: list[tuple[Array, Array, Array]] = []
        """(start, end, capacity in bytes)."""
        # Of several minimum cuts the one that moves the fewest statements.
        nodes = self._node[self.near]
        is_later = border.is_later[self.near]
        starts, ends = np.where(is_later, nodes, EARLIER), np.where(is_later, LATER, nodes)
        self._add_edges(starts, ends, np.ones(len(nodes)))
        tensors = np.unique(program.tensors_of(self.near))
        tensors = tensors[program.producer[tensors] >= 0]
        self._add_tensors(program, tensors, border.nbytes[tensors], border.microbatches)

    def _add_tensors(
        self, program: _Program, tensors: Array, nbytes: Array, microbatches: int
    ) -> None:
        """Adds tensors with their producers and their readers."""
        sources = program.producer[tensors]
        readers, position = program.readers.of_rows(tensors)
        repeated = self._code[readers] != UPDATE
        self._add_transfers(sources, readers[repeated], position[repeated], nbytes)
        once = ~repeated
        self._add_transfers(sources, readers[once], position[once], nbytes / microbatches)
        readers, source = readers[repeated], sources[position[repeated]]
        before, after = self._node[source], self._node[readers]
        is_forward = self._code[readers] == FORWARD
        is_backward = ~is_forward & (self._code[source] == BACKWARD)
        self._add_edges(after[is_forward], before[is_forward])
        self._add_edges(before[is_backward], after[is_backward])

    def _add_transfers(
        self, sources: Array, readers: Array, position: Array, nbytes: Array
    ) -> None:
        """Adds the costs of tensors that are sent over the border, in either direction.

        `position`: per reader, the position of its tensor.
        """
        read, number = np.unique(position, return_inverse=True)
        sent = self._count + np.arange(len(read))
        returned = sent + len(read)
        self._count += 2 * len(read)
        source = self._node[sources[read]]
        self._add_edges(source, sent, nbytes[read])
        self._add_edges(returned, source, nbytes[read])
        reader = self._node[readers]
        self._add_edges(sent[number], reader)
        self._add_edges(reader, returned[number])

    def _add_edges(self, starts: Array, ends: Array, capacities: Array | None = None) -> None:
        """Adds edges, without limit by default."""
        if capacities is None:
            capacities = np.full(len(starts), float(NO_LIMIT))
        is_edge = starts != ends
        self._edges.append((starts[is_edge], ends[is_edge], capacities[is_edge]))

    def is_earlier(self) -> Array:
        """[statement that may move]: whether it is on the side of the earlier stage."""
        starts, ends, capacities = map(np.concatenate, zip(*self._edges, strict=True))
        keys, number = np.unique(starts * self._count + ends, return_inverse=True)
        limits = np.zeros(len(keys))
        np.maximum.at(limits, number, capacities)
        is_limited = limits < NO_LIMIT
        scale = min(1.0, LARGEST_SUM / limits[is_limited].sum())
        limits = np.where(is_limited, np.maximum(1, np.rint(limits * scale)), NO_LIMIT)
        starts, ends = np.divmod(keys, self._count)
        shape = (self._count, self._count)
        graph = csr_matrix((limits.astype(np.int32), (starts, ends)), shape)
        flow = maximum_flow(graph, EARLIER, LATER).flow
        residual = graph - flow
        residual.data = np.maximum(residual.data, 0)
        residual.eliminate_zeros()
        reached = np.zeros(self._count, bool)
        reached[breadth_first_order(residual, EARLIER, return_predecessors=False)] = True
        return reached[self._node[self.near]]

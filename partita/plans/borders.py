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

from collections.abc import Collection, Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

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
    moved = list(places)
    crossing = _crossing(flow, classes, places)
    for stage in range(max(places, default=0)):
        border = _Border(flow, classes, moved, nbytes, microbatches, stage)
        moved = border.places_with_least_crossing(crossing)
    return moved


def crossing_tensors(flow: DataFlow, ends: Sequence[int]) -> list[list[int]]:
    """Per end of a stage the tensors that cross it in every microbatch, with fewest bytes.

    `ends`: the last operator before each.
    """
    operators = np.array(_operators(flow))
    nbytes = [tensor.nbytes for tensor in flow.graph.tensors]
    tensors, first, last = _operators_of_tensors(flow, operators)
    result = []
    for end in ends:
        places = (operators > end).astype(int).tolist()
        near = tensors[(first <= end) & (end < last)].tolist()
        border = _Border(flow, flow.classes, places, nbytes, 1, 0)
        moved = border.places_with_least_crossing(near)
        for k in border.node:
            near += [*flow.statements[k].reads, *flow.statements[k].makes]
        after = _Border(flow, flow.classes, moved, nbytes, 1, 0)
        result.append([t for t in dict.fromkeys(near) if after.is_sent(t)])
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


def _operators_of_tensors(
    flow: DataFlow, operators: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tensors, the first operator that computes or reads each, the last one)."""
    rows = []
    for t, k in flow.producer.items():
        if flow.classes[k] in ("forward", "backward"):
            readers = [r for r in flow.readers.get(t, ()) if flow.classes[r] != "copied"]
            own = operators[[k, *readers]]
            rows.append((t, own.min(), own.max()))
    tensors, first, last = np.array(rows, int).reshape(-1, 3).T
    return tensors, first, last


def _crossing(flow: DataFlow, classes: Sequence[Class], places: Sequence[int]) -> list[int]:
    """The tensors that one stage computes and another one reads."""
    crossing = []
    for t, k in flow.producer.items():
        readers = flow.readers.get(t, ()) if classes[k] != "copied" else ()
        if any(places[r] != places[k] for r in readers if classes[r] != "copied"):
            crossing.append(t)
    return crossing


class _Border:
    """The border between a stage and the next one."""

    def __init__(
        self,
        flow: DataFlow,
        classes: Sequence[Class],
        places: Sequence[int],
        nbytes: Sequence[int],
        microbatches: int,
        stage: int,
    ) -> None:
        self.flow = flow
        self.classes = classes
        self.places = places
        self.nbytes = nbytes
        self.microbatches = microbatches
        self.stage = stage
        self.outputs = set(flow.graph.outputs)
        self.node: dict[int, int] = {}
        """Statement that may move -> its node."""
        self.capacities: dict[tuple[int, int], float] = {}
        """Edge of the graph -> its capacity, bytes."""
        self.count = 2

    def places_with_least_crossing(self, crossing: Sequence[int]) -> list[int]:
        """The places of all statements, those of a minimum cut for statements that may move.

        `crossing`: all tensors that go from stage to stage.
        """
        places = list(self.places)
        own = [t for t in crossing if self._crosses(t)]
        near = self._near_statements(own)
        if not near or any(self._goes_against(t) for t in own):
            return places
        for k in near:
            self.node[k] = self._new_node()
        for k, node in self.node.items():
            # Of several minimum cuts the one that moves the fewest statements.
            edge = (EARLIER, node) if places[k] == self.stage else (node, LATER)
            self.capacities[edge] = 1.0
        tensors = set()
        for k in near:
            statement = self.flow.statements[k]
            tensors.update(statement.makes)
            tensors.update(t for t in statement.reads if self._producer(t) >= 0)
        for t in sorted(tensors):
            self._add_tensor(t)
        earlier = self._earlier_side()
        for k, node in self.node.items():
            places[k] = self.stage if node in earlier else self.stage + 1
        return places

    # -------------------------------------------------------------------------------- statements

    def _producer(self, tensor: int) -> int:
        """The statement that computes a tensor; -1 for arguments and values computed anywhere."""
        k = self.flow.producer.get(tensor, -1)
        return k if k >= 0 and self.classes[k] != "copied" else -1

    def _readers(self, tensor: int) -> list[int]:
        return [k for k in self.flow.readers.get(tensor, ()) if self.classes[k] != "copied"]

    def _is_later(self, statement: int) -> bool:
        return self.places[statement] > self.stage

    def is_sent(self, tensor: int) -> bool:
        """Whether a tensor of a pass crosses for another pass, in every microbatch."""
        source = self._producer(tensor)
        if source < 0 or self.classes[source] == "update":
            return False
        repeated = [r for r in self._readers(tensor) if self.classes[r] != "update"]
        return any(self._is_later(r) != self._is_later(source) for r in repeated)

    def _crosses(self, tensor: int) -> bool:
        is_later = self._is_later(self._producer(tensor))
        return any(self._is_later(r) != is_later for r in self._readers(tensor))

    def _goes_against(self, tensor: int) -> bool:
        """Whether a forward value goes back, or a gradient on: then the plan cannot run."""
        source = self._producer(tensor)
        phase = self.classes[source]
        readers = [r for r in self._readers(tensor) if self.classes[r] == phase]
        against = [self.places[r] < self.places[source] for r in readers]
        if phase == "backward":
            against = [self.places[r] > self.places[source] for r in readers]
        return phase != "update" and any(against)

    def _near_statements(self, crossing: Sequence[int]) -> list[int]:
        """The statements that may move, by their distance from a tensor that crosses."""
        distance: dict[int, int] = {}
        for t in crossing:
            for k in (self._producer(t), *self._readers(t)):
                if self._may_move(k):
                    distance[k] = 1
        waiting = list(distance)
        for k in waiting:
            for other in self._neighbours(k) if distance[k] < DISTANCE else ():
                if other not in distance and self._may_move(other):
                    distance[other] = distance[k] + 1
                    waiting.append(other)
        return waiting

    def _neighbours(self, statement: int) -> Iterator[int]:
        own = self.flow.statements[statement]
        for t in own.reads:
            yield self._producer(t)
            yield from self._readers(t) if self._producer(t) >= 0 else ()
        for t in own.makes:
            yield from self._readers(t)

    def _may_move(self, statement: int) -> bool:
        """Whether a statement is a light one of a pass, of one of the two stages, and changes no
        state.
        """
        if statement < 0 or self.classes[statement] not in ("forward", "backward"):
            return False
        if self.places[statement] not in (self.stage, self.stage + 1):
            return False
        own = self.flow.statements[statement]
        roles = {self.flow.roles.get(t) for t in own.reads}
        is_light = self.flow.instruction(statement).name in MOVABLE
        return is_light and roles <= {None, "parameter"} and self.outputs.isdisjoint(own.makes)

    # ------------------------------------------------------------------------------------- graph

    def _new_node(self) -> int:
        self.count += 1
        return self.count - 1

    def _node_of(self, statement: int) -> int:
        return self.node.get(statement, LATER if self._is_later(statement) else EARLIER)

    def _add_tensor(self, tensor: int) -> None:
        """Adds a tensor with its producer and its readers."""
        source = self._producer(tensor)
        repeated = [r for r in self._readers(tensor) if self.classes[r] != "update"]
        once = [r for r in self._readers(tensor) if self.classes[r] == "update"]
        self._add_transfer(source, repeated, self.nbytes[tensor])
        self._add_transfer(source, once, self.nbytes[tensor] / self.microbatches)
        for reader in repeated:
            before, after = self._node_of(source), self._node_of(reader)
            if self.classes[reader] == "forward":
                self._add_edge(after, before, NO_LIMIT)
            elif self.classes[source] == "backward":
                self._add_edge(before, after, NO_LIMIT)

    def _add_transfer(self, source: int, readers: Collection[int], nbytes: float) -> None:
        """Adds the cost of a tensor that is sent over the border, in either direction."""
        if not readers:
            return
        sent, returned = self._new_node(), self._new_node()
        self._add_edge(self._node_of(source), sent, nbytes)
        self._add_edge(returned, self._node_of(source), nbytes)
        for reader in readers:
            self._add_edge(sent, self._node_of(reader), NO_LIMIT)
            self._add_edge(self._node_of(reader), returned, NO_LIMIT)

    def _add_edge(self, start: int, end: int, capacity: float) -> None:
        if start != end:
            self.capacities[start, end] = max(capacity, self.capacities.get((start, end), 0.0))

    def _earlier_side(self) -> set[int]:
        """The nodes on the side of the earlier stage in a minimum cut."""
        total = sum(c for c in self.capacities.values() if c < NO_LIMIT)
        scale = min(1.0, LARGEST_SUM / total)
        limits = [
            NO_LIMIT if c >= NO_LIMIT else max(1, round(c * scale))
            for c in self.capacities.values()
        ]
        starts, ends = np.array(list(self.capacities)).T
        shape = (self.count, self.count)
        graph = csr_matrix((np.array(limits, np.int32), (starts, ends)), shape)
        flow = maximum_flow(graph, EARLIER, LATER).flow
        residual = graph - flow
        residual.data = np.maximum(residual.data, 0)
        residual.eliminate_zeros()
        reached = breadth_first_order(residual, EARLIER, return_predecessors=False)
        return set(reached.tolist())

"""Contiguous parts of a graph: split points, sizes, and the rows that each part fetches.

A partitioner returns the split points alone: part i is the vertices from `points[i]` to
`points[i + 1]`, possibly none. `cut` sizes the parts and finds the rows that each needs of others.
`block_of_part` makes the block of one part, so that a process makes those of its own devices only.
Blocks are padded to equal sizes, since every device runs one program.

A row that a part needs of another is fetched once, whatever the number of edges that begin there.
Rows are exchanged in rounds: in round k every part sends to the one k further on. The length
of a round is that of its longest message. A round without messages is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from numba import njit

from partita.errors import GraphError
from partita.files.reading import short_reason
from partita.gnn.data.csr import aligned, offsets_of, transpose_csr
from partita.gnn.data.graph import Graph
from partita.gnn.nn.block import Aggregation, Block, Edges, HaloMessage, edges_of, of_vertices

SPARE_ROWS = 0.0625
"""Share of the rows of equal parts that stays free where a graph will be split again. Every device
computes those rows."""

SPARE_MESSAGES = 0.125
"""Share of the rows of a message that stays free where a graph will be split again."""

SPARE_EDGES = 0.25
"""Share of the edges that stays free where a graph will be split again."""

NEAR = 0.5
"""Share of the edges that is stored a second time at most, for the vertices near the training ones.
"""


# ---------------------------------------------------------------------------------- partitioners


def by_vertices(graph: Graph, parts: int) -> np.ndarray:
    """int64 [parts + 1]: split points with an equal number of vertices in every part.

    >>> by_vertices(Graph.from_edges([0, 0, 0, 1], [0, 1, 1, 2], 4), 2)
    array([0, 2, 4])
    """
    return np.arange(parts + 1, dtype=np.int64) * graph.vertices // parts


def by_edges(graph: Graph, parts: int) -> np.ndarray:
    """int64 [parts + 1]: split points with about equal in-edges in every part.

    >>> by_edges(Graph.from_edges([0, 0, 0, 1], [0, 0, 0, 2], 4), 2)
    array([0, 1, 4])
    """
    inner = np.searchsorted(graph.offsets, np.arange(1, parts) * graph.edges / parts)
    return np.array([0, *inner, graph.vertices], np.int64)


PARTITIONERS: dict[str, Callable[[Graph, int], np.ndarray]] = {
    "vertices": by_vertices,
    "edges": by_edges,
}
"""Partitioners that read the graph alone and keep its numbers; 'learned' reads the model as well
(`learned.initial_points`)."""


def by_metis(graph: Graph, parts: int) -> np.ndarray:
    """int64 [vertices]: the part of every vertex by METIS.

    Parts have equal sums of vertices and in-edges, and few edges between them.

    METIS (Karypis and Kumar 1998) cuts the undirected graph without self edges. GraphError where
    pymetis is not installed.
    """
    try:
        import pymetis  # type: ignore[import-not-found]
    except ImportError:
        raise GraphError(
            "The partitioner 'metis' needs the package pymetis: run `pip install pymetis`, "
            "or use 'edges' or 'learned'."
        ) from None
    shape = (graph.vertices, graph.vertices)
    ones = np.ones(graph.edges, np.int8)
    directed = scipy.sparse.csr_array((ones, graph.sources, graph.offsets), shape=shape)
    undirected = scipy.sparse.csr_array(((directed + directed.T) != 0).astype(np.int8))
    undirected.setdiag(0)
    undirected.eliminate_zeros()
    _, part = pymetis.part_graph(
        parts,
        xadj=undirected.indptr.tolist(),
        adjncy=undirected.indices.tolist(),
        vweights=(graph.in_degrees() + 1).tolist(),
    )
    return np.asarray(part, np.int64)


def arranged(
    graph: Graph, parts: int, partition: Any
) -> tuple[Graph, np.ndarray, np.ndarray | None]:
    """(graph to split, split points, order it was relabelled by or None).

    `partition` is a name, split points, or the part of every vertex. GraphError if it does not fit
    the graph.
    """
    if isinstance(partition, str):
        if partition != "metis":
            return graph, split_points(graph, parts, partition), None
        partition = by_metis(graph, parts)
    elif len(partition) == parts + 1 or len(partition) != graph.vertices:
        return graph, split_points(graph, parts, partition), None
    part = np.asarray(partition)
    outside = (part < 0) | (part >= parts)
    if outside.any():
        vertex = int(np.argmax(outside))
        raise GraphError(
            f"Vertex {vertex:,} is given to part {part[vertex]}, and there are {parts} parts: "
            f"use parts 0 to {parts - 1}."
        )
    order = np.argsort(part, kind="stable")
    sizes = np.bincount(part, minlength=parts)
    points = np.concatenate([[0], np.cumsum(sizes)])
    return graph.relabelled(order), points, order


def split_points(graph: Graph, parts: int, partition: Any) -> np.ndarray:
    """int64 [parts + 1]: the split points of a named partitioner, or given ones, checked."""
    if isinstance(partition, str):
        if partition not in PARTITIONERS:
            names = ", ".join(map(repr, PARTITIONERS))
            raise GraphError(
                f"partition={partition!r} is no partitioner: use {names}, 'learned' or 'metis', "
                "or give split points."
            )
        return PARTITIONERS[partition](graph, parts)
    points = np.asarray(partition)
    if points.shape != (parts + 1,) or not _covers(points, graph.vertices):
        given = short_reason(str(points.tolist()))
        raise GraphError(
            f"The split points {given} do not cut {graph.vertices:,} vertices into "
            f"{parts} parts: give {parts + 1} numbers that rise from 0 to {graph.vertices}."
        )
    return points.astype(np.int64)


def _covers(points: np.ndarray, vertices: int) -> bool:
    """Whether split points rise from 0 to the number of vertices."""
    return bool(points[0] == 0 and points[-1] == vertices and (np.diff(points) >= 0).all())


# ---------------------------------------------------------------------------- sizes of the parts


@dataclass(frozen=True)
class AggregationCapacity:
    """The sizes of one kind of aggregation on every device.

    edges   in-edges
    rounds  (round, rows of a message) of every exchange round
    far     edges from rows of other devices, where those are stored apart
    """

    edges: int
    rounds: tuple[tuple[int, int], ...]
    far: int

    def holds(self, other: AggregationCapacity) -> bool:
        """Whether an aggregation that needs `other` fits."""
        rows = dict(self.rounds)
        rounds_fit = all(rows.get(number, 0) >= needed for number, needed in other.rounds)
        return self.edges >= other.edges and self.far >= other.far and rounds_fit

    def with_spare(self) -> AggregationCapacity:
        """Larger sizes, for other parts.

        Where edges are stored apart, any of them may be on either side.
        """
        edges = _with_spare(self.edges + self.far, SPARE_EDGES)
        rounds = [(number, _with_spare(rows, SPARE_MESSAGES)) for number, rows in self.rounds]
        return AggregationCapacity(edges, tuple(rounds), edges if self.far else 0)


@dataclass(frozen=True)
class Capacity:
    """The sizes of every device: rows, and those of each kind of aggregation."""

    rows: int
    kinds: tuple[AggregationCapacity, ...]

    def holds(self, other: Capacity) -> bool:
        """Whether parts that need `other` fit."""
        if len(self.kinds) != len(other.kinds) or self.rows < other.rows:
            return False
        pairs = zip(self.kinds, other.kinds, strict=True)
        return all(kind.holds(needed) for kind, needed in pairs)

    def with_spare(self, equal_rows: int) -> Capacity:
        """Larger sizes, for other parts; `equal_rows`: rows of parts of equal size."""
        rows = max(self.rows, _with_spare(equal_rows, SPARE_ROWS))
        return Capacity(rows, tuple(kind.with_spare() for kind in self.kinds))


def _with_spare(size: int, share: float) -> int:
    return int(size * (1 + share))


@dataclass(frozen=True)
class AggregationKind:
    """A kind of aggregation that parts are made for (`block.Aggregation`).

    columns     parts of a group that share their vertices and split the features
    near        edges from the vertices of `keep` to a training vertex at most; -1: all vertices
    keep        bool [vertices]: vertices whose in-edges are there, or None for all
    apart       whether edges from the rows of other groups are stored apart
    """

    columns: int = 1
    near: int = -1
    keep: np.ndarray | None = None
    apart: bool = False


@dataclass(frozen=True)
class Exchange:
    """The rows that groups of parts fetch for one kind of aggregation.

    needed      `needed[i][k]`: vertices whose rows group i needs of the group k before it,
                cyclically; ascending
    capacity    the sizes that hold all groups
    """

    kind: AggregationKind
    needed: list[list[np.ndarray]]
    capacity: AggregationCapacity


@dataclass(frozen=True)
class Parts:
    """The parts of a graph.

    points      int64 [parts + 1]: split points
    vertices    [parts]: vertices of each
    edges       [parts]: in-edges of each
    fetched     [parts]: rows that each fetches
    capacity    sizes of every device
    exchanges   rows that are fetched for each kind of aggregation
    order       the user's number of each vertex if the graph was relabelled, else None
    """

    points: np.ndarray
    vertices: np.ndarray
    edges: np.ndarray
    fetched: np.ndarray
    capacity: Capacity
    exchanges: tuple[Exchange, ...] = field(repr=False)
    order: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.vertices)

    @property
    def rows(self) -> int:
        """Rows of every device, padding included."""
        return self.capacity.rows

    @property
    def edge_capacity(self) -> int | None:
        """In-edges of its own vertices that every device can store.

        None where groups share vertices.
        """
        for exchange, capacity in zip(self.exchanges, self.capacity.kinds, strict=True):
            if exchange.kind.columns == 1 and exchange.kind.keep is None:
                return capacity.edges
        return None

    def of_part(self, i: int, table: np.ndarray) -> np.ndarray:
        """[rows, ...]: the rows of part i of a table of vertices, padded with zeros."""
        return _padded(table[self.points[i] : self.points[i + 1]], self.rows)

    def joined(self, stacked: np.ndarray) -> np.ndarray:
        """[vertices, ...] in the user's numbers, of rows [parts, rows, ...]."""
        pieces = [stacked[i, : self.vertices[i]] for i in range(self.count)]
        rows = np.concatenate(pieces)
        return rows if self.order is None else restored(rows, self.order)


def restored(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of vertices in this order, in the user's numbers."""
    out = np.empty_like(rows)
    out[order] = rows
    return out


def cut(
    graph: Graph,
    points: np.ndarray,
    capacity: Capacity | None = None,
    kinds: Sequence[AggregationKind] = (AggregationKind(),),
    moves: bool = False,
) -> Parts:
    """The parts between split points, for these kinds of aggregation.

    With the `capacity` of an earlier cut they have its sizes if they fit, so that no step is
    compiled anew. Otherwise they have the sizes they need, and spare ones if the split `moves`.
    """
    exchanges = tuple(exchange_of(graph, points, kind) for kind in kinds)
    vertices = np.diff(points)
    edges = np.diff(graph.offsets[points])
    needed = Capacity(int(vertices.max()), tuple(e.capacity for e in exchanges))
    if capacity is None or not capacity.holds(needed):
        equal_rows = -(-graph.vertices // len(vertices))
        capacity = needed.with_spare(equal_rows) if moves else needed
    fetched = np.zeros(len(vertices), np.int64)
    for exchange in exchanges:
        if exchange.kind.columns == 1:
            fetched = np.array([sum(map(len, rows)) for rows in exchange.needed])
            break
    return Parts(points, vertices, edges, fetched, capacity, exchanges)


def exchange_of(graph: Graph, points: np.ndarray, kind: AggregationKind) -> Exchange:
    """The rows that groups of parts fetch for one kind of aggregation, and its sizes."""
    ends = points[:: kind.columns]
    groups = len(ends) - 1
    needed = []
    far = []
    for i in range((len(points) - 1) // kind.columns):
        vertices, far_edges = _needed(graph, ends, i, kind.keep)
        needed.append(vertices)
        far.append(far_edges)
    rounds = []
    for number in range(1, groups):
        longest = max(len(vertices[number]) for vertices in needed)
        if longest:
            rounds.append((number, longest))
    edges = _edges_before(graph, kind.keep)[ends]
    group_edges = np.diff(edges) - (np.array(far) if kind.apart else 0)
    capacity = AggregationCapacity(
        edges=int(group_edges.max()), rounds=tuple(rounds), far=max(far) if kind.apart else 0
    )
    return Exchange(kind, needed, capacity)


def _edges_before(graph: Graph, keep: np.ndarray | None) -> np.ndarray:
    """int64 [vertices + 1]: in-edges of the vertices before each, of those in `keep`."""
    if keep is None:
        return graph.offsets
    return np.append(0, np.cumsum(graph.in_degrees() * keep))


def _needed(
    graph: Graph, points: np.ndarray, i: int, keep: np.ndarray | None
) -> tuple[list[np.ndarray], int]:
    """(vertices whose rows part i needs, edges from them).

    The vertices are a list: those of the part k before it, cyclically, for each k.
    """
    parts = len(points) - 1
    marked = np.zeros(graph.vertices, np.bool_)
    far = _mark(graph.offsets, graph.sources, points[i], points[i + 1], _keep(keep), marked)
    ids = np.flatnonzero(marked)
    between = np.searchsorted(ids, points)
    others = [(i - k) % parts for k in range(parts)]
    return [ids[between[j] : between[j + 1]] for j in others], far


def _keep(keep: np.ndarray | None) -> np.ndarray:
    """The vertices of an `AggregationKind` as loops read them: an empty array stands for all."""
    return np.zeros(0, np.bool_) if keep is None else keep


@njit(nogil=True, cache=True)
def _mark(offsets, sources, first, last, keep, marked):
    """The number of edges into a part from outside, whose sources are marked."""
    count = 0
    for v in range(first, last):
        if len(keep) == 0 or keep[v]:
            for e in range(offsets[v], offsets[v + 1]):
                s = sources[e]
                marked[s] = True
                count += (s < first) | (s >= last)
    marked[first:last] = False
    return count


def near_training(graph: Graph, most: int) -> list[np.ndarray]:
    """bool [vertices] for 0, 1, 2 ... edges: vertices at most that far from a training vertex.

    At most `most` of them, and only while they have few in-edges, `NEAR` of all edges together:
    edges of these vertices are stored beside those of all.
    """
    near = []
    edges_left = NEAR * graph.edges
    reached = np.zeros(graph.vertices, np.bool_) if graph.train is None else np.array(graph.train)
    while len(near) < most and reached.any():
        edges_left -= int(graph.in_degrees()[reached].sum())
        if edges_left < 0:
            break
        near.append(reached)
        reached = reached.copy()
        _reach(graph.offsets, graph.sources, near[-1], reached)
    return near


@njit(nogil=True, cache=True)
def _reach(offsets, sources, into, reached):
    """Marks the sources of all edges into marked vertices."""
    for v in range(len(into)):
        if into[v]:
            for e in range(offsets[v], offsets[v + 1]):
                reached[sources[e]] = True


# ---------------------------------------------------------------------------------------- blocks


def block_of_part(graph: Graph, parts: Parts, i: int) -> Block:
    """The block of part i, of the sizes that all parts have."""
    first, last = int(parts.points[i]), int(parts.points[i + 1])
    tables = of_vertices(graph, first, last)
    degree, self_correction, load = (_padded(table, parts.rows) for table in tables)
    vertex = None if parts.order is None else parts.of_part(i, parts.order.astype(np.int32))
    return Block(
        degree,
        self_correction,
        load,
        np.array([first], np.int32),
        np.array([last - first], np.int32),
        aggregations_of_part(graph, parts, i),
        parts.count,
        vertex,
        member=None if graph.members is None else parts.of_part(i, graph.members),
        graphs=graph.graphs,
    )


def aggregations_of_part(graph: Graph, parts: Parts, i: int) -> tuple[Aggregation, ...]:
    """The aggregations of part i, one for each of `parts.exchanges`."""
    pairs = zip(parts.exchanges, parts.capacity.kinds, strict=True)
    return tuple(_aggregation(graph, parts, exchange, capacity, i) for exchange, capacity in pairs)


class GraphArrays(NamedTuple):
    """The arrays of a graph as loops read them; empty weights where there are none."""

    offsets: np.ndarray
    sources: np.ndarray
    weights: np.ndarray


class EdgeArrays(NamedTuple):
    """Edges by row: the number of each row, the columns, the weights or nothing."""

    degrees: np.ndarray
    ids: np.ndarray
    weights: np.ndarray


def _aggregation(
    graph: Graph, parts: Parts, exchange: Exchange, capacity: AggregationCapacity, i: int
) -> Aggregation:
    """One aggregation of part i."""
    kind = exchange.kind
    columns = kind.columns
    group = i // columns
    ends = parts.points[group * columns : (group + 1) * columns + 1]
    group_rows = columns * parts.rows
    column_of, halos, width = _halos(graph, parts, exchange, capacity, group)
    edge_features = _edge_features(graph, kind, (int(ends[0]), int(ends[-1])), capacity.edges)
    apart = kind.apart and bool(halos)
    weighted = graph.weights is not None
    near = _empty_edges(group_rows, capacity.edges, weighted)
    far = _empty_edges(group_rows, capacity.far if apart else 0, weighted)
    first_far = group_rows if apart else width
    column_edges = np.zeros(width, np.int64)
    weights = graph.weights if graph.weights is not None else np.zeros(0, np.float32)
    _fill(
        GraphArrays(graph.offsets, graph.sources, weights),
        (int(ends[0]), int(ends[-1])),
        _keep(kind.keep),
        column_of,
        first_far,
        column_edges,
        near,
        far,
    )
    ordered = weighted or edge_features is not None
    return Aggregation(
        *_edges(near, column_edges[:first_far], ordered),
        tuple(halos),
        _edges(far, column_edges[first_far:], ordered) if apart else None,
        edge_features,
        columns,
        kind.near,
    )


def _edge_features(
    graph: Graph, kind: AggregationKind, vertices: tuple[int, int], edges: int
) -> np.ndarray | None:
    """float32 [edges, D]: features of the in-edges of a range of vertices, of those in `keep`."""
    if graph.edge_features is None or kind.columns > 1:
        return None
    first, last = vertices
    features = graph.edge_features[graph.offsets[first] : graph.offsets[last]]
    if kind.keep is not None:
        degrees = np.diff(graph.offsets[first : last + 1])
        features = features[np.repeat(kind.keep[first:last], degrees)]
    return _padded(features, edges)


def _halos(
    graph: Graph, parts: Parts, exchange: Exchange, capacity: AggregationCapacity, group: int
) -> tuple[np.ndarray, list[HaloMessage], int]:
    """(column of every vertex that a group reads, its messages, the number of columns).

    The first is int32 [vertices], -1 for a vertex that is not read.
    """
    columns = exchange.kind.columns
    groups = parts.count // columns
    group_rows = columns * parts.rows
    column_of = np.full(graph.vertices, -1, np.int32)
    for j in range(columns):
        first, last = parts.points[group * columns + j : group * columns + j + 2]
        column_of[first:last] = j * parts.rows + np.arange(last - first)
    start = group_rows
    halos = []
    for number, longest in capacity.rounds:
        sent = exchange.needed[(group + number) % groups][number]
        received = exchange.needed[group][number]
        halos.append(HaloMessage(_picked(column_of[sent], longest, group_rows), number))
        column_of[received] = start + np.arange(len(received))
        start += longest
    return column_of, halos, start


def _empty_edges(rows: int, most: int, weighted: bool) -> EdgeArrays:
    """Arrays for at most `most` edges and one more place.

    `_fill` writes an edge to both sides before it knows the right one.
    """
    return EdgeArrays(
        np.zeros(rows, np.int64),
        aligned(most + 1, np.int32),
        aligned(most + 1 if weighted else 0, np.float32),
    )


@njit(nogil=True, cache=True)
def _fill(graph, vertices, keep, column_of, first_far, column_edges, near, far):
    """Fills in the in-edges of a range of vertices, of those in `keep`.

    Edges from columns from `first_far` on go to `far`, counted from there. `column_edges` counts
    the edges of each column. There are no branches on the side of an edge, which no processor can
    foresee.
    """
    first, last = vertices
    k = j = 0
    for v in range(first, last):
        if len(keep) == 0 or keep[v]:
            k_before = k
            j_before = j
            for e in range(graph.offsets[v], graph.offsets[v + 1]):
                column = column_of[graph.sources[e]]
                column_edges[column] += 1
                near.ids[k] = column
                far.ids[j] = column - first_far
                if len(graph.weights):
                    near.weights[k] = graph.weights[e]
                    far.weights[j] = graph.weights[e]
                apart = column >= first_far
                k += not apart
                j += apart
            row = column_of[v]
            near.degrees[row] = k - k_before
            far.degrees[row] = j - j_before
    # The place behind the last edge may have been written for an edge of the other side.
    near.ids[k] = 0
    far.ids[j] = 0
    if len(graph.weights):
        near.weights[k] = 0
        far.weights[j] = 0


def _edges(
    arrays: EdgeArrays, column_edges: np.ndarray, ordered: bool
) -> tuple[Edges, np.ndarray | None]:
    """(edges, their weights) of filled arrays; `column_edges`: edges of each column.

    `ordered`: whether the transpose has its order.
    """
    offsets = offsets_of(arrays.degrees)
    ids = arrays.ids[:-1]
    weighted = len(arrays.weights) > 0
    edges = edges_of(offsets, ids, transpose_csr(offsets, ids, column_edges, ordered))
    return edges, arrays.weights[:-1] if weighted else None


def _picked(ids: np.ndarray, longest: int, rows: int) -> Edges:
    """Rows of a message as edges: row r is row ids[r] of the device, and nothing beyond them."""
    offsets = offsets_of(np.arange(longest) < len(ids))
    sent = _padded(ids.astype(np.int32), longest)
    column_edges = np.zeros(rows, np.int64)
    column_edges[ids] = 1
    return edges_of(offsets, sent, transpose_csr(offsets, sent, column_edges, False))


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """An array with zeros behind it up to a number of rows; the array itself if it has them."""
    if len(array) == rows:
        return array
    shape = (rows, *array.shape[1:])
    out = aligned(int(np.prod(shape)), array.dtype).reshape(shape)
    out[: len(array)] = array
    return out

"""Where a graph is cut into contiguous parts of vertices, and what each part then holds and fetches.

A partitioner returns the split points alone: part i is the vertices from `points[i]` to `points[i + 1]`, possibly none. `cut` says what the
parts hold and what each needs of others; `block_of_part` makes the block of one of them, so that a process makes those of its own devices
and no more. Blocks are filled up to equal sizes, since every device runs the same program.

A row that a part needs of another is fetched once, however many edges begin there. Rows go round in turns: in turn k every part sends
to the one k further on what that one needs, so a turn is as long as the longest of its messages, and a turn without any is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse
from numba import njit

from partita.errors import GraphError
from partita.gnn.data.csr import aligned, offsets_of, transpose_csr
from partita.gnn.data.graph import Graph
from partita.gnn.nn.block import Aggregation, Block, Edges, HaloMessage, edges_of, of_vertices


def by_vertices(graph: Graph, parts: int) -> np.ndarray:
    """int64 [parts + 1]: split points with as many vertices in every part.

    >>> by_vertices(Graph.from_edges([0, 0, 0, 1], [0, 1, 1, 2], 4), 2)
    array([0, 2, 4])
    """
    return np.arange(parts + 1, dtype=np.int64) * graph.vertices // parts


def by_edges(graph: Graph, parts: int) -> np.ndarray:
    """int64 [parts + 1]: split points with as many in-edges in every part, as far as vertices are whole.

    >>> by_edges(Graph.from_edges([0, 0, 0, 1], [0, 0, 0, 2], 4), 2)
    array([0, 1, 4])
    """
    inner = np.searchsorted(graph.offsets, np.arange(1, parts) * graph.edges / parts)
    return np.array([0, *inner, graph.vertices], np.int64)


PARTITIONERS: dict[str, Callable[[Graph, int], np.ndarray]] = {
    "vertices": by_vertices,
    "edges": by_edges,
}
"""Partitioners that cut the vertices as they are numbered, by the graph alone; 'learned' asks the model as well (`learned.begun`)."""


def by_metis(graph: Graph, parts: int) -> np.ndarray:
    """int64 [vertices]: the part of every vertex by METIS: as many vertices and in-edges together in each, and few edges between them.

    METIS (Karypis and Kumar 1998) cuts the undirected graph without self edges. GraphError where pymetis is not installed.
    """
    try:
        import pymetis  # type: ignore[import-not-found]
    except ImportError:
        raise GraphError(
            "The partitioner 'metis' needs the package pymetis: run `pip install pymetis`, or use 'edges' or 'learned'."
        ) from None
    ones = scipy.sparse.csr_array(
        (np.ones(graph.edges, np.int8), graph.sources, graph.offsets), shape=(graph.vertices,) * 2
    )
    both = scipy.sparse.csr_array(((ones + ones.T) != 0).astype(np.int8))
    both.setdiag(0)
    both.eliminate_zeros()
    _, part = pymetis.part_graph(
        parts,
        xadj=both.indptr.tolist(),
        adjncy=both.indices.tolist(),
        vweights=(graph.in_degrees() + 1).tolist(),
    )
    return np.asarray(part, np.int64)


def arranged(
    graph: Graph, parts: int, partition: Any
) -> tuple[Graph, np.ndarray, np.ndarray | None]:
    """(graph to split, split points, order it was relabelled by or None): `partition` is a name, split points, or the part of every vertex."""
    if isinstance(partition, str) and partition == "metis":
        partition = by_metis(graph, parts)
    elif (
        isinstance(partition, str)
        or len(partition) == parts + 1
        or len(partition) != graph.vertices
    ):
        return graph, split_points(graph, parts, partition), None
    part = np.asarray(partition)
    if part.min() < 0 or part.max() >= parts:
        v = int(np.argmax((part < 0) | (part >= parts)))
        raise GraphError(
            f"Vertex {v:,} is given to part {part[v]}, and there are parts 0 to {parts - 1}."
        )
    order = np.argsort(part, kind="stable")
    return (
        graph.relabelled(order),
        np.concatenate([[0], np.cumsum(np.bincount(part, minlength=parts))]),
        order,
    )


def split_points(graph: Graph, parts: int, partition: Any) -> np.ndarray:
    """The split points of a named partitioner, or those that are given, checked."""
    if isinstance(partition, str):
        if partition not in PARTITIONERS:
            raise GraphError(
                f"There is no partitioner {partition!r}: use {', '.join(map(repr, PARTITIONERS))}, 'learned' or 'metis', or give split points."
            )
        return PARTITIONERS[partition](graph, parts)
    points = np.asarray(partition)
    if (
        points.shape != (parts + 1,)
        or points[0] != 0
        or points[-1] != graph.vertices
        or (np.diff(points) < 0).any()
    ):
        raise GraphError(
            f"The split points {points.tolist()} do not cut {graph.vertices:,} vertices into {parts} parts: give {parts + 1} numbers that rise "
            f"from 0 to {graph.vertices}."
        )
    return points.astype(np.int64)


SPARE_ROWS, SPARE_SENT, SPARE_EDGES = 0.0625, 0.125, 0.25
"""Shares of place left free where a graph will be split again: of the rows of equal parts, which every device computes, where parts do not differ by more; of
rows that are sent; of edges."""


@dataclass(frozen=True)
class Place:
    """What every device has place for of one way to aggregate: edges, in which turns how many rows of others, and of edges from those that lie apart."""

    edges: int
    turns: tuple[tuple[int, int], ...]
    far: int

    def holds(self, other: Place) -> bool:
        """Whether what needs `other` fits in here."""
        turns = dict(self.turns)
        return (
            self.edges >= other.edges
            and self.far >= other.far
            and all(turns.get(k, 0) >= n for k, n in other.turns)
        )


@dataclass(frozen=True)
class Room:
    """What every device has place for: rows, and of every way to aggregate its own."""

    rows: int
    ways: tuple[Place, ...]

    def holds(self, other: Room) -> bool:
        """Whether parts that need `other` fit in here."""
        same = len(self.ways) == len(other.ways)
        return (
            same
            and self.rows >= other.rows
            and all(a.holds(b) for a, b in zip(self.ways, other.ways, strict=True))
        )

    def wider(self, equal: int) -> Room:
        """With place for other parts, where equal ones have so many rows; where some edges lie apart, for any of them on either side."""
        more = lambda n, share: int(n * (1 + share))
        edges = lambda w: more(w.edges + w.far, SPARE_EDGES)
        place = lambda w: Place(
            edges(w), tuple((k, more(n, SPARE_SENT)) for k, n in w.turns), edges(w) if w.far else 0
        )
        return Room(max(self.rows, more(equal, SPARE_ROWS)), tuple(map(place, self.ways)))


@dataclass(frozen=True)
class Kind:
    """A way to aggregate (`block.Aggregation`): groups of `columns` parts; edges into vertices of `keep` [vertices] only, which are `near` the training ones, if it is
    given; whether edges from the rows of other groups lie apart."""

    columns: int = 1
    near: int = -1
    keep: np.ndarray | None = None
    apart: bool = False


@dataclass(frozen=True)
class Exchange:
    """What a way to aggregate needs. `needed[i][k]` are the vertices whose rows group i needs of the group k before it, round the end; ascending, none of its
    own. `least`: the place for it."""

    kind: Kind
    needed: list[list[np.ndarray]]
    least: Place


@dataclass(frozen=True)
class Parts:
    """What the parts of a graph hold: split points [parts + 1]; vertices, in-edges and fetched rows [parts] of each; the place for them.

    `exchanges`: in which ways they aggregate. `order`: by which the vertices were relabelled first, if they
    were.
    """

    points: np.ndarray
    vertices: np.ndarray
    edges: np.ndarray
    fetched: np.ndarray
    room: Room
    exchanges: tuple[Exchange, ...] = field(repr=False)
    order: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.vertices)

    @property
    def rows(self) -> int:
        """Rows that every device has place for."""
        return self.room.rows

    @property
    def edge_room(self) -> int | None:
        """In-edges of its own vertices that every device has place for; None where groups share them."""
        whole = lambda kind: kind.columns == 1 and kind.keep is None
        return next(
            (
                place.edges
                for e, place in zip(self.exchanges, self.room.ways, strict=True)
                if whole(e.kind)
            ),
            None,
        )

    def of_part(self, i: int, table: np.ndarray) -> np.ndarray:
        """[rows, ...]: the rows of a table of vertices that part i has, filled up with zeros."""
        return _filled(table[self.points[i] : self.points[i + 1]], self.rows)

    def joined(self, stacked: np.ndarray) -> np.ndarray:
        """[vertices, ...]: the way back, to the user's numbers."""
        found = np.concatenate([stacked[i, : self.vertices[i]] for i in range(self.count)])
        return found if self.order is None else restored(found, self.order)


def restored(rows: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Rows of vertices that are in this order, in the user's numbers."""
    out = np.empty_like(rows)
    out[order] = rows
    return out


def cut(
    graph: Graph,
    points: np.ndarray,
    room: Room | None = None,
    kinds: Sequence[Kind] = (Kind(),),
    moves: bool = False,
) -> Parts:
    """What the parts between split points hold, for these ways to aggregate.

    If the split `moves` they have more place than needed. With `room` of an earlier cut they have its sizes if they fit, so that no step is compiled anew.
    """
    exchanges = tuple(exchange_of(graph, points, kind) for kind in kinds)
    vertices, edges = np.diff(points), np.diff(graph.offsets[points])
    least = Room(int(vertices.max()), tuple(e.least for e in exchanges))
    if room is None or not room.holds(least):
        room = least.wider(-(-graph.vertices // len(vertices))) if moves else least
    needed = next((e.needed for e in exchanges if e.kind.columns == 1), [[] for _ in vertices])
    fetched = [sum(map(len, n)) for n in needed]
    return Parts(points, vertices, edges, np.array(fetched), room, exchanges)


def exchange_of(graph: Graph, points: np.ndarray, kind: Kind) -> Exchange:
    """What one way to aggregate needs."""
    whose = points[:: kind.columns]
    groups, found = (
        len(whose) - 1,
        [_needed(graph, whose, i, kind.keep) for i in range((len(points) - 1) // kind.columns)],
    )
    needed, far = [n for n, _ in found], [f for _, f in found]
    turns = tuple(
        (k, longest) for k in range(1, groups) if (longest := max(len(n[k]) for n in needed))
    )
    before = (
        graph.offsets[whose]
        if kind.keep is None
        else np.append(0, np.cumsum(graph.in_degrees() * kind.keep))[whose]
    )
    edges = np.diff(before) - (np.array(far) if kind.apart else 0)
    return Exchange(kind, needed, Place(int(edges.max()), turns, max(far) if kind.apart else 0))


def block_of_part(graph: Graph, parts: Parts, i: int) -> Block:
    """The block of part i, of the sizes that all have."""
    first, last = int(parts.points[i]), int(parts.points[i + 1])
    degree, alone, load = (_filled(table, parts.rows) for table in of_vertices(graph, first, last))
    vertex = None if parts.order is None else parts.of_part(i, parts.order.astype(np.int32))
    return Block(
        degree,
        alone,
        load,
        np.array([first], np.int32),
        aggregations_of_part(graph, parts, i),
        parts.count,
        vertex,
    )


def aggregations_of_part(graph: Graph, parts: Parts, i: int) -> tuple[Aggregation, ...]:
    """The ways of part i to aggregate, one for each of `parts.exchanges`."""
    return tuple(
        _aggregation(graph, parts, exchange, place, i)
        for exchange, place in zip(parts.exchanges, parts.room.ways, strict=True)
    )


def _aggregation(
    graph: Graph, parts: Parts, exchange: Exchange, room: Place, i: int
) -> Aggregation:
    """One way to aggregate, for part i."""
    kind, rows = exchange.kind, parts.rows
    columns, keep = kind.columns, kind.keep
    group, groups = i // columns, parts.count // columns
    ends = parts.points[group * columns : (group + 1) * columns + 1]
    first, last, own = int(ends[0]), int(ends[-1]), columns * rows
    place = np.full(graph.vertices, -1, np.int32)
    for j in range(columns):
        place[ends[j] : ends[j + 1]] = j * rows + np.arange(ends[j + 1] - ends[j])
    start, halos = own, []
    for k, longest in room.turns:
        sent, came = exchange.needed[(group + k) % groups][k], exchange.needed[group][k]
        halos.append(HaloMessage(_picked(place[sent], longest, own), k))
        place[came] = start + np.arange(len(came))
        start += longest
    apart, weighted = kind.apart and bool(halos), graph.weights is not None
    near, far = (_unfilled(own, most, weighted) for most in (room.edges, room.far if apart else 0))
    split, back = own if apart else start, np.zeros(start, np.int64)
    weights = graph.weights if graph.weights is not None else _NO_WEIGHTS
    _fill(
        graph.offsets,
        graph.sources,
        weights,
        first,
        last,
        _kept(keep),
        place,
        split,
        back,
        near,
        far,
    )
    return Aggregation(
        *_edges(*near, back[:split]),
        tuple(halos),
        _edges(*far, back[split:]) if apart else None,
        columns,
        kind.near,
    )


def _unfilled(rows: int, most: int, weighted: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges of each row, the columns of at most so many edges, their weights or nothing), to be filled in: with one place more, where what is of the
    other side may be written before it is known to be."""
    return (
        np.zeros(rows, np.int64),
        aligned(most + 1, np.int32),
        aligned(most + 1 if weighted else 0, np.float32),
    )


_NO_WEIGHTS = np.zeros(0, np.float32)


def _kept(keep: np.ndarray | None) -> np.ndarray:
    """The vertices of a `Kind` as loops read them: none stands for all."""
    return np.zeros(0, np.bool_) if keep is None else keep


@njit(nogil=True, cache=True)
def _fill(offsets, sources, weights, first, last, keep, place, split, back, near, far):
    """The in-edges of vertices from `first` to before `last`, those that are kept; those from columns from `split` on go to `far`, counted from there.

    `back` counts the edges of each column. There are no branches on what no processor can foresee.
    """
    degrees, ids, heavy = near
    far_degrees, far_ids, far_heavy = far
    k = j = 0
    for v in range(first, last):
        if len(keep) == 0 or keep[v]:
            row, k_before, j_before = place[v], k, j
            for e in range(offsets[v], offsets[v + 1]):
                column = place[sources[e]]
                back[column] += 1
                ids[k], far_ids[j] = column, column - split
                if len(weights):
                    heavy[k], far_heavy[j] = weights[e], weights[e]
                apart = column >= split
                k += not apart
                j += apart
            degrees[row], far_degrees[row] = k - k_before, j - j_before
    ids[k], far_ids[j] = 0, 0  # of the other side
    if len(weights):
        heavy[k], far_heavy[j] = 0, 0


def _edges(
    degrees: np.ndarray, ids: np.ndarray, weights: np.ndarray, back: np.ndarray
) -> tuple[Edges, np.ndarray | None]:
    """(edges, their weights), of what `_unfilled` has become."""
    offsets, weighted, ids = offsets_of(degrees), len(weights) > 0, ids[:-1]
    return edges_of(offsets, ids, transpose_csr(offsets, ids, back, weighted)), weights[
        :-1
    ] if weighted else None


def near_training(graph: Graph, most: int) -> list[np.ndarray]:
    """bool [vertices], per number of edges from 0 on: the vertices from which a training vertex is no more away; `most` of them at most.

    Only as many as have few edges into them, NEAR of all edges together: a way with few edges is cheap to keep beside the one with all.
    """
    found, left = [], NEAR * graph.edges
    reached = np.zeros(graph.vertices, np.bool_) if graph.train is None else np.array(graph.train)
    while len(found) < most and reached.any():
        left -= int(graph.in_degrees()[reached].sum())
        if left < 0:
            break
        found.append(reached)
        reached = reached.copy()
        _reach(graph.offsets, graph.sources, found[-1], reached)
    return found


NEAR = 0.5
"""Share of the edges that are kept a second time at most."""


@njit(nogil=True, cache=True)
def _reach(offsets, sources, into, reached):
    for v in range(len(into)):
        if into[v]:
            for e in range(offsets[v], offsets[v + 1]):
                reached[sources[e]] = True


@njit(nogil=True, cache=True)
def _mark(offsets, sources, first, last, keep, seen):
    """Marks where edges come from that go from outside into a part; how many those are."""
    count = 0
    for v in range(first, last):
        if len(keep) == 0 or keep[v]:
            for e in range(offsets[v], offsets[v + 1]):
                s = sources[e]
                seen[s] = True
                count += (s < first) | (s >= last)
    seen[first:last] = False
    return count


def _needed(
    graph: Graph, points: np.ndarray, i: int, keep: np.ndarray | None
) -> tuple[list[np.ndarray], int]:
    """(vertices whose rows part i needs, by how many parts before it they lie, round the end, ascending, none of its own; the edges from them)."""
    parts, seen = len(points) - 1, np.zeros(graph.vertices, np.bool_)
    far = _mark(graph.offsets, graph.sources, points[i], points[i + 1], _kept(keep), seen)
    ids = np.flatnonzero(seen)
    between = np.searchsorted(ids, points)
    return [ids[between[j] : between[j + 1]] for j in ((i - k) % parts for k in range(parts))], far


def _picked(ids: np.ndarray, longest: int, rows: int) -> Edges:
    """Rows that are sent, as edges: row r of the message is row ids[r] of the device, beyond them nothing."""
    offsets = offsets_of(np.arange(longest) < len(ids))
    sent, back = _filled(ids.astype(np.int32), longest), np.zeros(rows, np.int64)
    back[ids] = 1
    return edges_of(offsets, sent, transpose_csr(offsets, sent, back, False))


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """An array with zeros behind it, up to so many rows; itself where it has them."""
    if len(array) == rows:
        return array
    shape = (rows, *array.shape[1:])
    out = aligned(int(np.prod(shape)), array.dtype).reshape(shape)
    out[: len(array)] = array
    return out

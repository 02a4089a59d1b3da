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
from partita.gnn.block import Block, Edges, Halo, Way, edges_of, of_vertices
from partita.gnn.graph import Graph, offsets_of


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


PARTITIONERS: dict[str, Callable[[Graph, int], np.ndarray]] = {"vertices": by_vertices, "edges": by_edges, "learned": by_edges}
"""Partitioners that cut the vertices as they are numbered; 'learned' is where learning begins."""


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
    ones = scipy.sparse.csr_array((np.ones(graph.edges, np.int8), graph.sources, graph.offsets), shape=(graph.vertices,) * 2)
    both = scipy.sparse.csr_array(((ones + ones.T) != 0).astype(np.int8))
    both.setdiag(0)
    both.eliminate_zeros()
    _, part = pymetis.part_graph(parts, xadj=both.indptr.tolist(), adjncy=both.indices.tolist(), vweights=(graph.in_degrees() + 1).tolist())
    return np.asarray(part, np.int64)


def arranged(graph: Graph, parts: int, partition: Any) -> tuple[Graph, np.ndarray, np.ndarray | None]:
    """(graph to split, split points, order it was relabelled by or None): `partition` is a name, split points, or the part of every vertex."""
    if isinstance(partition, str) and partition == "metis":
        partition = by_metis(graph, parts)
    elif isinstance(partition, str) or len(partition) == parts + 1 or len(partition) != graph.vertices:
        return graph, split_points(graph, parts, partition), None
    part = np.asarray(partition)
    if part.min() < 0 or part.max() >= parts:
        v = int(np.argmax((part < 0) | (part >= parts)))
        raise GraphError(f"Vertex {v:,} is given to part {part[v]}, and there are parts 0 to {parts - 1}.")
    order = np.argsort(part, kind="stable")
    return graph.relabelled(order), np.concatenate([[0], np.cumsum(np.bincount(part, minlength=parts))]), order


def split_points(graph: Graph, parts: int, partition: Any) -> np.ndarray:
    """The split points of a named partitioner, or those that are given, checked."""
    if isinstance(partition, str):
        if partition not in PARTITIONERS:
            raise GraphError(
                f"There is no partitioner {partition!r}: use {', '.join(map(repr, PARTITIONERS))} or 'metis', or give split points."
            )
        return PARTITIONERS[partition](graph, parts)
    points = np.asarray(partition)
    if points.shape != (parts + 1,) or points[0] != 0 or points[-1] != graph.vertices or (np.diff(points) < 0).any():
        raise GraphError(
            f"The split points {points.tolist()} do not cut {graph.vertices:,} vertices into {parts} parts: give {parts + 1} numbers that rise "
            f"from 0 to {graph.vertices}."
        )
    return points.astype(np.int64)


SPARE = 0.0625
"""Share of place left free when a graph is split again, for the times after that."""


@dataclass(frozen=True)
class Place:
    """What every device has place for of one way to aggregate: edges, and in which turns how many rows of others."""

    edges: int
    turns: tuple[tuple[int, int], ...]

    def holds(self, other: Place) -> bool:
        """Whether what needs `other` fits in here."""
        turns = dict(self.turns)
        return self.edges >= other.edges and all(turns.get(k, 0) >= n for k, n in other.turns)


@dataclass(frozen=True)
class Room:
    """What every device has place for: rows, and of every way to aggregate its own."""

    rows: int
    ways: tuple[Place, ...]

    def holds(self, other: Room) -> bool:
        """Whether parts that need `other` fit in here."""
        same = len(self.ways) == len(other.ways)
        return same and self.rows >= other.rows and all(a.holds(b) for a, b in zip(self.ways, other.ways, strict=True))

    def wider(self, share: float) -> Room:
        """With place for so much more."""
        more = lambda n: int(n * (1 + share))
        return Room(more(self.rows), tuple(Place(more(w.edges), tuple((k, more(n)) for k, n in w.turns)) for w in self.ways))


@dataclass(frozen=True)
class Exchange:
    """What one way to aggregate needs (`block.Way`): groups of `columns` parts, and edges into vertices of `keep` [vertices] only, if it is given.

    `needed[i][k]` are the vertices whose rows group i needs of the group k before it, round the end; ascending, none of its own. `least`: the place
    for it.
    """

    columns: int
    near: int
    keep: np.ndarray | None
    needed: list[list[np.ndarray]]
    least: Place


@dataclass(frozen=True)
class Parts:
    """What the parts of a graph hold: split points [parts + 1]; vertices, in-edges and fetched rows [parts] of each; the place for them.

    `exchanges`: in which ways they aggregate, the first by vertices alone and of all edges. `order`: by which the vertices were relabelled first, if they
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

    def of_part(self, i: int, table: np.ndarray) -> np.ndarray:
        """[rows, ...]: the rows of a table of vertices that part i has, filled up with zeros."""
        return _filled(table[self.points[i] : self.points[i + 1]], self.rows)

    def joined(self, stacked: np.ndarray) -> np.ndarray:
        """[vertices, ...]: the way back, to the user's numbers."""
        found = np.concatenate([stacked[i, : self.vertices[i]] for i in range(self.count)])
        if self.order is None:
            return found
        out = np.empty_like(found)
        out[self.order] = found
        return out


def cut(graph: Graph, points: np.ndarray, room: Room | None = None, others: Sequence[tuple[int, int, np.ndarray | None]] = ()) -> Parts:
    """What the parts between split points hold. `others`: (columns, near, keep) of ways to aggregate beside the first.

    With `room` of an earlier cut they have its sizes if they fit, so that no step is compiled anew, and some more than needed if not.
    """
    exchanges = tuple(exchange_of(graph, points, *way) for way in ((1, -1, None), *others))
    vertices, edges = np.diff(points), np.diff(graph.offsets[points])
    least = Room(int(vertices.max()), tuple(e.least for e in exchanges))
    if room is None:
        room = least
    elif not room.holds(least) or room.rows > least.rows * (1 + 2 * SPARE):
        room = least.wider(SPARE)
    return Parts(points, vertices, edges, np.array([sum(map(len, n)) for n in exchanges[0].needed]), room, exchanges)


def exchange_of(graph: Graph, points: np.ndarray, columns: int, near: int, keep: np.ndarray | None) -> Exchange:
    """What one way to aggregate needs."""
    whose = points[::columns]
    groups = len(whose) - 1
    needed = [_needed(graph, whose, i, keep) for i in range(groups)]
    turns = tuple((k, longest) for k in range(1, groups) if (longest := max(len(needed[i][k]) for i in range(groups))))
    before = graph.offsets[whose] if keep is None else np.append(0, np.cumsum(graph.in_degrees() * keep))[whose]
    return Exchange(columns, near, keep, needed, Place(int(np.diff(before).max()), turns))


def block_of_part(graph: Graph, parts: Parts, i: int) -> Block:
    """The block of part i, of the sizes that all have."""
    first, last = int(parts.points[i]), int(parts.points[i + 1])
    degree, alone, load = (_filled(table, parts.rows) for table in of_vertices(graph, first, last))
    ways = tuple(_way(graph, parts, exchange, place, i) for exchange, place in zip(parts.exchanges, parts.room.ways, strict=True))
    vertex = None if parts.order is None else parts.of_part(i, parts.order.astype(np.int32))
    return Block(degree, alone, load, np.array([first], np.int32), ways, parts.count, vertex)


def _way(graph: Graph, parts: Parts, exchange: Exchange, room: Place, i: int) -> Way:
    """One way to aggregate, for part i."""
    columns, rows, keep = exchange.columns, parts.rows, exchange.keep
    group, groups = i // columns, parts.count // columns
    ends = parts.points[group * columns : (group + 1) * columns + 1]
    first, last, own = int(ends[0]), int(ends[-1]), columns * rows
    place = np.full(graph.vertices, -1, np.int32)
    for j in range(columns):
        place[ends[j] : ends[j + 1]] = j * rows + np.arange(ends[j + 1] - ends[j])
    start, halos = own, []
    for k, longest in room.turns:
        sent, came = exchange.needed[(group + k) % groups][k], exchange.needed[group][k]
        halos.append(Halo(_picked(place[sent], longest, own), k))
        place[came] = start + np.arange(len(came))
        start += longest
    degrees, edges = np.diff(graph.offsets[first : last + 1]), slice(graph.offsets[first], graph.offsets[last])
    kept = None if keep is None else np.repeat(keep[first:last], degrees)
    of_edges = lambda values: values[edges] if kept is None else values[edges][kept]
    spread = np.zeros(start, np.int64)
    spread[place[first:last]] = degrees if keep is None else degrees * keep[first:last]
    weights = None if graph.weights is None else _filled(of_edges(graph.weights), room.edges)
    mine = _edges(offsets_of(spread), place[of_edges(graph.sources)], own, room.edges, weights is not None)
    return Way(mine, weights, tuple(halos), columns, exchange.near)


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
    for v in range(first, last):
        if len(keep) == 0 or keep[v]:
            for e in range(offsets[v], offsets[v + 1]):
                s = sources[e]
                if s < first or s >= last:
                    seen[s] = True


def _needed(graph: Graph, points: np.ndarray, i: int, keep: np.ndarray | None) -> list[np.ndarray]:
    """Vertices whose rows part i needs, by how many parts before it they lie, round the end; ascending, none of its own."""
    parts, seen = len(points) - 1, np.zeros(graph.vertices, np.bool_)
    _mark(graph.offsets, graph.sources, points[i], points[i + 1], np.zeros(0, np.bool_) if keep is None else keep, seen)
    ids = np.flatnonzero(seen)
    between = np.searchsorted(ids, points)
    return [ids[between[j] : between[j + 1]] for j in ((i - k) % parts for k in range(parts))]


def _picked(ids: np.ndarray, longest: int, rows: int) -> Edges:
    """Rows that are sent, as edges: row r of the message is row ids[r] of the device, beyond them nothing."""
    offsets = np.minimum(np.arange(max(longest, rows) + 1), len(ids)).astype(np.int64)
    edges = _edges(offsets, ids.astype(np.int32), longest, longest, False)
    return Edges(edges.offsets, edges.ids, edges.back_offsets[: rows + 1], edges.back_ids)


def _edges(offsets: np.ndarray, ids: np.ndarray, rows: int, most: int, weighted: bool) -> Edges:
    """Edges of as many rows and of room for as many edges as asked for."""
    edges = edges_of(offsets[: rows + 1], ids, Graph(offsets, ids).transposed(weighted))
    order = None if edges.back_order is None else _filled(edges.back_order, most)
    return Edges(edges.offsets, _filled(edges.ids, most), edges.back_offsets, _filled(edges.back_ids, most), order)


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """An array with zeros behind it, up to so many rows; itself where it has them."""
    if len(array) == rows:
        return array
    out = np.zeros((rows, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out

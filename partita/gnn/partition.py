"""Where a graph is cut into contiguous parts of vertices, and what each part then holds and fetches.

A partitioner returns the split points alone: part i is the vertices from `points[i]` to `points[i + 1]`, possibly none. `split` makes the
blocks of all parts, one above the other, filled up to equal sizes since every device runs the same program; `Parts` says what they hold.

A row that a part needs of another is fetched once, however many edges begin there. Rows go round in turns: in turn k every part sends
to the one k further on what that one needs, so a turn is as long as the longest of its messages, and a turn without any is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import scipy.sparse

from partita.errors import GraphError
from partita.gnn.block import Block, Edges, Halo, block_of, edges_of
from partita.gnn.graph import Graph


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
class Room:
    """What every device has place for: rows, edges, and in which turns how many rows of others."""

    rows: int
    edges: int
    turns: tuple[tuple[int, int], ...]

    def holds(self, other: Room) -> bool:
        """Whether parts that need `other` fit in here."""
        turns = dict(self.turns)
        return self.rows >= other.rows and self.edges >= other.edges and all(turns.get(k, 0) >= n for k, n in other.turns)

    def wider(self, share: float) -> Room:
        """With place for so much more."""
        more = lambda n: int(n * (1 + share))
        return Room(more(self.rows), more(self.edges), tuple((k, more(n)) for k, n in self.turns))


@dataclass(frozen=True)
class Parts:
    """What the parts of a graph hold: split points [parts + 1]; vertices, in-edges and fetched rows [parts] of each; the place for them.

    `order`: by which the vertices were relabelled first, if they were.
    """

    points: np.ndarray
    vertices: np.ndarray
    edges: np.ndarray
    fetched: np.ndarray
    room: Room
    order: np.ndarray | None = None

    @property
    def count(self) -> int:
        return len(self.vertices)

    @property
    def rows(self) -> int:
        """Rows that every device has place for."""
        return self.room.rows

    def stacked(self, table: np.ndarray) -> np.ndarray:
        """[parts, rows, ...]: a table of vertices cut into parts, filled up with zeros."""
        out = np.zeros((self.count, self.rows, *table.shape[1:]), table.dtype)
        for i in range(self.count):
            out[i, : self.vertices[i]] = table[self.points[i] : self.points[i + 1]]
        return out

    def joined(self, stacked: np.ndarray) -> np.ndarray:
        """[vertices, ...]: the way back, to the user's numbers."""
        found = np.concatenate([stacked[i, : self.vertices[i]] for i in range(self.count)])
        if self.order is None:
            return found
        out = np.empty_like(found)
        out[self.order] = found
        return out


def split(graph: Graph, points: np.ndarray, room: Room | None = None) -> tuple[Block, Parts]:
    """(block of arrays with a first dim of parts, what the parts hold).

    With `room` of an earlier split the arrays have its sizes if the parts fit, so that no step is compiled anew, and some more than needed if not.
    """
    parts, whole = len(points) - 1, block_of(graph)
    needed = [_needed(graph, points, i) for i in range(parts)]
    vertices, edges = np.diff(points), np.diff(graph.offsets[points])
    turns = tuple((k, longest) for k in range(1, parts) if (longest := max(len(needed[i][k]) for i in range(parts))))
    least = Room(int(vertices.max()), int(edges.max()), turns)
    if room is None:
        room = least
    elif not room.holds(least) or room.rows > least.rows * (1 + 2 * SPARE):
        room = least.wider(SPARE)
    held = Parts(points, vertices, edges, np.array([sum(map(len, n)) for n in needed]), room)
    turns, most = room.turns, room.edges
    places = held.rows + sum(longest for _, longest in turns)
    blocks = []
    for i in range(parts):
        first, last = points[i], points[i + 1]
        edges = slice(graph.offsets[first], graph.offsets[last])
        place = np.full(graph.vertices, -1, np.int64)
        place[first:last] = np.arange(last - first)
        start, halos = held.rows, []
        for k, longest in turns:
            place[needed[i][k]] = start + np.arange(len(needed[i][k]))
            start += longest
            halos.append(Halo(_picked(needed[(i + k) % parts][k] - first, longest, held.rows), k))
        offsets = np.full(places + 1, edges.stop - edges.start, np.int64)
        offsets[: last - first + 1] = graph.offsets[first : last + 1] - edges.start
        mine = _edges(offsets, place[graph.sources[edges]].astype(np.int32), held.rows, most)
        rows = lambda table, a=first, b=last: _filled(table[a:b], held.rows)
        weights = None if graph.weights is None else _filled(graph.weights[edges], most)
        blocks.append(
            Block(
                mine,
                rows(whole.degree),
                rows(whole.alone),
                rows(whole.load),
                np.array([first], np.int32),
                weights,
                tuple(halos),
                parts,
            )
        )
    return jax.tree.map(lambda *arrays: np.stack(arrays), *blocks), held


def _needed(graph: Graph, points: np.ndarray, i: int) -> list[np.ndarray]:
    """Vertices whose rows part i needs, by how many parts before it they lie, round the end; ascending, none of its own."""
    parts = len(points) - 1
    sources = np.unique(graph.sources[graph.offsets[points[i]] : graph.offsets[points[i + 1]]])
    owner = np.searchsorted(points, sources, side="right") - 1
    before = (i - owner) % parts
    return [sources[before == k] if k else sources[:0] for k in range(parts)]


def _picked(ids: np.ndarray, longest: int, rows: int) -> Edges:
    """Rows that are sent, as edges: row r of the message is row ids[r] of the device, beyond them nothing."""
    offsets = np.minimum(np.arange(max(longest, rows) + 1), len(ids)).astype(np.int64)
    edges = _edges(offsets, ids.astype(np.int32), longest, longest)
    return Edges(edges.offsets, edges.ids, edges.back_offsets[: rows + 1], edges.back_ids, edges.back_order)


def _edges(offsets: np.ndarray, ids: np.ndarray, rows: int, most: int) -> Edges:
    """Edges of as many rows and of room for as many edges as asked for."""
    back = Graph(offsets, ids).transposed()
    edges = edges_of(offsets[: rows + 1], ids, back)
    return Edges(
        edges.offsets,
        _filled(edges.ids, most),
        edges.back_offsets,
        _filled(edges.back_ids, most),
        _filled(edges.back_order, most),
    )


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """An array with zeros behind it, up to so many rows."""
    out = np.zeros((rows, *array.shape[1:]), array.dtype)
    out[: len(array)] = array
    return out

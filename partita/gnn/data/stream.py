"""Edges in pieces, and how they become a graph in bounded memory.

`EdgeStream` is common to edge lists, OGB folders and generators: pieces of (source, target, weight)
that can be read any number of times. `graph()` gathers them in memory. `save()` sorts them into a
.lux file: the first pass counts the in-edges of every vertex. The second pass distributes the edges
to scratch files of consecutive destinations, each small enough to be sorted in memory, and appends
the sorted files. Both give the same graph to the bit.

The price of `save`: reading the stream twice, and scratch files of 8 bytes per edge (12 with
weights) beside the result, unless all sources fit in the memory limit. It needs that memory, 24
bytes per vertex, and 4 bytes for every in-edge of the vertex with the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import TABLES, check_ids, check_plausible
from partita.gnn.data.csr import count, fill, id_type, offsets_of, position_type, targets_of
from partita.gnn.data.drafts import Drafts, open_drafts
from partita.gnn.data.graph import Graph, check
from partita.gnn.data.lux import (
    FILES,
    MAX_VERTICES,
    TRANSPOSE_FILES,
    companion,
    lux_size,
    read_lux,
    remove_stale,
    write_array,
    write_header,
)

Piece = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Sources, targets and weights (or None) of some edges; positions instead in a transpose."""

Report = Callable[[str, int, int | None], None]
"""Progress report: the activity, how much is done, and the whole if it is known."""

MEMORY = 2**30
"""Memory limit of sorting, bytes for edges."""

PIECE = 2**20
"""Edges that are read from a scratch file, or generated, at a time."""

CHANGED = "The edges changed while they were read: convert again when nothing writes to them."


def silent(activity: str, done: int, whole: int | None) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class EdgeStream:
    """Edges in pieces, and the tables of their vertices.

    pieces      starts again from the first edge at every call
    vertices    number of vertices; None: the largest id plus one
    edges       number of edges, if it is known before they are counted
    tables      features, labels, train, validation, test as in `Graph`, each in pieces of rows
                that start again at every call
    """

    pieces: Callable[[], Iterator[Piece]]
    vertices: int | None = None
    edges: int | None = None
    tables: Mapping[str, Callable[[], Iterable[np.ndarray]]] = field(default_factory=dict)
    name: str = "graph"

    def with_reverse_edges(self) -> EdgeStream:
        """The stream with the reverse of every edge, for undirected graphs stored one way."""

        def pieces() -> Iterator[Piece]:
            for source, target, weights in self.pieces():
                yield source, target, weights
                yield target, source, weights

        return replace(self, pieces=pieces, edges=None if self.edges is None else 2 * self.edges)

    def graph(self, report: Report = silent) -> Graph:
        """The graph, in memory."""
        sources: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        weights: list[np.ndarray] = []
        edges = 0
        for piece_sources, piece_targets, piece_weights in self.pieces():
            sources.append(piece_sources)
            targets.append(piece_targets)
            if piece_weights is not None:
                weights.append(piece_weights)
            edges += len(piece_sources)
            report("reading edges", edges, self.edges)
        if self.vertices is not None:
            check_plausible(self.vertices - 1, edges)
        tables: dict[str, Any] = {}
        for name, table in self.tables.items():
            rows = list(table())
            if not rows:
                raise GraphError(f"{name} has no rows: give one per vertex.")
            tables[name] = np.concatenate(rows)
        if weights:
            tables["weights"] = np.concatenate(weights)
        source = _join_ids(sources)
        target = _join_ids(targets)
        return Graph.from_edges(source, target, self.vertices, name=self.name, **tables)

    def save(self, path: Path, report: Report = silent, memory: int = MEMORY) -> Graph:
        """The graph as a .lux file with its tables beside it, memory-mapped.

        Sorting uses at most `memory` bytes for edges. Files get their names when all are written
        and checked.
        """
        offsets, weighted = self._count(report)
        vertices = len(offsets) - 1
        edges = int(offsets[-1])
        sorting = _plan_sort(offsets, np.float32 if weighted else None, memory)
        weight_bytes = 4 * edges if weighted else 0
        size = lux_size(vertices, edges) + weight_bytes + sorting.scratch_bytes
        with open_drafts(path, size) as drafts:
            for name, table in self.tables.items():
                with drafts.open(companion(path, FILES[name])) as file:
                    self._write_table(name, table(), file, vertices, report)
            weights_path = companion(path, FILES["weights"])
            _sort(self.pieces, sorting, drafts, path, weights_path, report)
            report("checking", 0, None)
            check(read_lux(drafts.path(path)))
            remove_stale(drafts, path)
        return read_lux(path)

    def _write_table(
        self, name: str, pieces: Iterable[np.ndarray], file: BinaryIO, vertices: int, report: Report
    ) -> None:
        done = 0
        for rows in pieces:
            write_array(file, rows.astype(TABLES[name], copy=False))
            done += len(rows)
            report(f"writing {name}", done, vertices)
        if done != vertices:
            raise GraphError(
                f"{self.name}: {name} has {done:,} rows for {vertices:,} vertices: give one per "
                "vertex."
            )

    def _count(self, report: Report) -> tuple[np.ndarray, bool]:
        """Offsets of the in-edges of every vertex, and whether edges have weights."""
        degrees = np.zeros(self.vertices or 1024, np.int64)
        largest = -1
        edges = 0
        weighted = False
        for source, target, weights in self.pieces():
            if self.vertices is not None:
                check_ids(source, target, self.vertices, edges)
            elif len(source):
                largest = max(largest, int(source.max()), int(target.max()))
                check_ids(source, target, MAX_VERTICES, edges)
                check_plausible(largest, edges + len(source))
                degrees = _enlarged(degrees, largest + 1)
            count(target, degrees)
            edges += len(source)
            weighted = weighted or weights is not None
            report("counting edges", edges, self.edges)
        if not edges and self.vertices is None:
            raise GraphError(
                f"{self.name} has no edge, so the number of vertices is unknown: give at least "
                "one edge."
            )
        return offsets_of(degrees[: self.vertices or largest + 1]), weighted


def _join_ids(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _enlarged(counts: np.ndarray, size: int) -> np.ndarray:
    """The counts with zeros behind them, at least twice the length if `size` exceeds it."""
    if size <= len(counts):
        return counts
    padding = np.zeros(max(len(counts), size - len(counts)), np.int64)
    return np.concatenate([counts, padding])


def save_transpose(path: Path, report: Report = silent, memory: int = MEMORY) -> Graph:
    """Writes the transpose of a .lux file beside it in bounded memory; the graph with it."""
    graph = check(read_lux(path))
    positions = position_type(graph.edges)

    def pieces() -> Iterator[Piece]:
        for begin in range(0, graph.edges, PIECE):
            end = min(begin + PIECE, graph.edges)
            targets = np.empty(end - begin, graph.sources.dtype)
            targets_of(graph.offsets, begin, targets)
            yield targets, graph.sources[begin:end], np.arange(begin, end, dtype=positions)

    sorting = _plan_sort(offsets_of(graph.out_degrees()), positions, memory)
    edges_path, order_path = (companion(path, ending) for ending in TRANSPOSE_FILES)
    order_bytes = np.dtype(positions).itemsize * graph.edges
    size = lux_size(graph.vertices, graph.edges) + order_bytes + sorting.scratch_bytes
    with open_drafts(edges_path, size) as drafts:
        _sort(pieces, sorting, drafts, edges_path, order_path, report)
    return read_lux(path)


# --------------------------------------------------------------------------------------- sorting


@dataclass(frozen=True)
class _Sorting:
    """How edges are sorted by destination.

    offsets     int64 [vertices + 1]: the edges of every destination in the result
    bounds      destinations between which a range of edges is sorted in memory
    value       number type of the third column of the pieces, or None
    """

    offsets: np.ndarray
    bounds: np.ndarray
    value: type[np.generic] | None

    @property
    def edges(self) -> int:
        return int(self.offsets[-1])

    @property
    def id(self) -> type[np.signedinteger[Any]]:
        """Number type of vertex ids."""
        return id_type(len(self.offsets) - 1)

    @property
    def ranges(self) -> int:
        """Number of ranges; a single one needs no scratch files."""
        return len(self.bounds) - 1

    @property
    def columns(self) -> tuple[type[np.generic] | None, ...]:
        """Number types of source, target and value."""
        return self.id, self.id, self.value

    @property
    def scratch_bytes(self) -> int:
        """Size of the scratch files."""
        if self.ranges == 1:
            return 0
        return self.edges * sum(_itemsize(kind) for kind in self.columns)


def _itemsize(kind: type[np.generic] | None) -> int:
    return 0 if kind is None else np.dtype(kind).itemsize


def _plan_sort(offsets: np.ndarray, value: type[np.generic] | None, memory: int) -> _Sorting:
    """Ranges of destinations whose edges, sources and values, fit in `memory` bytes."""
    edge_bytes = _itemsize(id_type(len(offsets) - 1)) + _itemsize(value)
    return _Sorting(offsets, _bounds(offsets, max(1, memory // edge_bytes)), value)


def _bounds(offsets: np.ndarray, max_edges: int) -> np.ndarray:
    """Cuts between destinations into ranges of at most `max_edges` edges, or of one vertex.

    >>> _bounds(np.array([0, 2, 3, 9, 10]), 4)
    array([0, 2, 3, 4])
    """
    bounds = [0]
    vertices = len(offsets) - 1
    while bounds[-1] < vertices:
        end = int(np.searchsorted(offsets, offsets[bounds[-1]] + max_edges, "right")) - 1
        bounds.append(min(vertices, max(bounds[-1] + 1, end)))
    return np.array(bounds)


def _sort(
    pieces: Callable[[], Iterator[Piece]],
    sorting: _Sorting,
    drafts: Drafts,
    path: Path,
    value_path: Path,
    report: Report,
) -> None:
    """Writes a .lux file of the sources by destination, and the values in the same order."""
    if sorting.ranges == 1:
        ranges: list[Callable[[], Iterator[Piece]]] = [pieces]
    else:
        ranges = _distribute(pieces(), sorting, drafts, report)
    done = 0

    def reported(pieces: Iterator[Piece]) -> Iterator[Piece]:
        nonlocal done
        for piece in pieces:
            yield piece
            done += len(piece[0])
            report("sorting edges", done, sorting.edges)

    with ExitStack() as stack:
        value_file = None
        if sorting.value is not None:
            value_file = stack.enter_context(drafts.open(value_path))
        file = stack.enter_context(drafts.open(path))
        write_header(file, sorting.offsets, sorting.edges)
        for i, read in enumerate(ranges):
            sources, values = _sort_range(reported(read()), sorting, i)
            write_array(file, sources)
            if value_file is not None:
                write_array(value_file, values)


def _sort_range(
    pieces: Iterator[Piece], sorting: _Sorting, i: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sources and values of range i by destination; GraphError if the edges have changed."""
    begin, end = sorting.bounds[i : i + 2]
    first, last = sorting.offsets[[begin, end]]
    source_cursor = sorting.offsets[begin:end] - first
    value_cursor = source_cursor if sorting.value is None else source_cursor.copy()
    sources = np.empty(last - first, sorting.id)
    values = np.empty(len(sources) if sorting.value is not None else 0, sorting.value)
    done = 0
    for piece_sources, targets, piece_values in pieces:
        rows = targets if begin == 0 else targets - sorting.id(begin)
        placed = fill(rows, piece_sources, source_cursor, sources)
        if piece_values is not None:
            placed = min(placed, fill(rows, piece_values, value_cursor, values))
        if placed < len(piece_sources):
            raise GraphError(CHANGED)
        done += placed
    if done != len(sources):
        raise GraphError(CHANGED)
    return sources, values


def _distribute(
    pieces: Iterator[Piece], sorting: _Sorting, drafts: Drafts, report: Report
) -> list[Callable[[], Iterator[Piece]]]:
    """Writes edges to a scratch file per range of destinations; returns how to read each range."""
    done = 0
    with ExitStack() as stack:
        files = [
            [stack.enter_context(path.open("wb")) for path in _scratch_paths(drafts, i)]
            for i in range(sorting.ranges)
        ]
        for piece in pieces:
            _distribute_piece(piece, sorting, files)
            done += len(piece[0])
            report("distributing edges", done, sorting.edges)
    return [partial(_read_scratch, sorting, drafts, i) for i in range(sorting.ranges)]


def _distribute_piece(piece: Piece, sorting: _Sorting, files: Sequence[Sequence[BinaryIO]]) -> None:
    """Appends each edge of a piece to the files of its range, in order."""
    ranges = np.searchsorted(sorting.bounds, piece[1], "right") - 1
    cuts = offsets_of(np.bincount(ranges, minlength=sorting.ranges))
    for column, kind in enumerate(sorting.columns):
        values = piece[column]
        if values is None:
            continue
        gathered = np.empty(len(values), kind)
        fill(ranges, values, cuts[:-1].copy(), gathered)
        for i in np.flatnonzero(np.diff(cuts)).tolist():
            files[i][column].write(gathered[cuts[i] : cuts[i + 1]].data)


def _scratch_paths(drafts: Drafts, i: int) -> list[Path]:
    """Scratch files of the three columns of range i."""
    return [drafts.scratch(f"{i}.{column}") for column in range(3)]


def _read_scratch(sorting: _Sorting, drafts: Drafts, i: int) -> Iterator[Piece]:
    """The edges of range i, in pieces."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in _scratch_paths(drafts, i)]
        while len(sources := np.fromfile(files[0], sorting.id, PIECE)):
            targets = np.fromfile(files[1], sorting.id, PIECE)
            values = None
            if sorting.value is not None:
                values = np.fromfile(files[2], sorting.value, PIECE)
            yield sources, targets, values

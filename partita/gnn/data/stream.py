"""Edges that come in pieces, and how they become a graph in bounded memory.

An `EdgeStream` is what edge lists, OGB folders and generators have in common: pieces of (source, target, weight) that can be gone through as
often as one likes. `graph()` gathers them in memory; `save()` sorts them into a .lux file: one pass counts the in-edges of every vertex,
a second drops the edges into files of consecutive destinations, each small enough to be sorted in memory, and appends those in turn. Both
give the same graph to the bit. The price of `save`: going through the stream twice, and a scratch file of 8 bytes an edge (12 with weights)
beside the result, unless all sources fit in the memory that it may use. It needs that memory, 24 bytes a vertex, and 4 bytes for every
in-edge of the most popular vertex.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import TABLES, check_ids, check_plausible
from partita.gnn.data.csr import count, fill, id_type, offsets_of, position_type, targets_of
from partita.gnn.data.drafts import Drafts, drafts
from partita.gnn.data.graph import Graph, check
from partita.gnn.data.lux import (
    FILES,
    TRANSPOSED,
    WIDEST,
    beside,
    forget,
    read_lux,
    size,
    write,
    write_header,
)

Piece = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Sources, targets and weights (or None) of some edges; while transposing, positions are in the place of weights."""

Report = Callable[[str, int, int | None], None]
"""Is told what is being done, how much of it is done, and of how much, where that is known."""

MEMORY = 2**30
"""Bytes that sorting may use for edges."""

PIECE = 2**20
"""Edges read in one go from a scratch file, and made in one go by a generator."""


def silent(what: str, done: int, whole: int | None) -> None:
    """A report that nobody reads."""


@dataclass(frozen=True)
class EdgeStream:
    """Edges in pieces, and the tables of their vertices.

    pieces      begins again from the first edge at every call
    vertices    how many there are; None: the largest id and one more
    edges       how many there are, where that is known before they are counted
    tables      features, labels, train, validation, test as in `Graph`, each in pieces of rows that begin again at every call
    """

    pieces: Callable[[], Iterator[Piece]]
    vertices: int | None = None
    edges: int | None = None
    tables: Mapping[str, Callable[[], Iterable[np.ndarray]]] = field(default_factory=dict)
    name: str = "graph"

    def with_reverse_edges(self) -> EdgeStream:
        """The stream in which the reverse of every edge comes too: for undirected graphs that are kept in one direction."""

        def pieces() -> Iterator[Piece]:
            for source, target, weights in self.pieces():
                yield source, target, weights
                yield target, source, weights

        return replace(self, pieces=pieces, edges=None if self.edges is None else 2 * self.edges)

    def graph(self, report: Report = silent) -> Graph:
        """The graph, in memory."""
        given: list[Piece] = []
        for piece in self.pieces():
            given.append(piece)
            report("reading edges", sum(len(p[0]) for p in given), self.edges)
        heavy = [p[2] for p in given if p[2] is not None]
        tables: dict[str, Any] = {
            what: np.concatenate(list(table())) for what, table in self.tables.items()
        }
        if heavy:
            tables["weights"] = np.concatenate(heavy)
        source = np.concatenate([p[0] for p in given]) if given else np.zeros(0, np.int64)
        target = np.concatenate([p[1] for p in given]) if given else np.zeros(0, np.int64)
        return Graph.from_edges(source, target, self.vertices, name=self.name, **tables)

    def save(self, path: Path, report: Report = silent, memory: int = MEMORY) -> Graph:
        """The graph as a .lux file with its tables beside it, memory-mapped; `memory` bytes are used for edges at most.

        Nothing stands under the final names unless all of it was written and checked.
        """
        offsets, heavy = self._counted(report)
        vertices, edges = len(offsets) - 1, int(offsets[-1])
        weight = np.float32 if heavy else None
        bounds, scratch = _ranges(offsets, weight, memory)
        with drafts(path, size(vertices, edges) + 4 * heavy * edges + scratch) as made:
            for what, table in self.tables.items():
                with made.open(beside(path, FILES[what])) as file:
                    self._write_table(what, table(), file, vertices, report)
            _sort(
                self.pieces,
                offsets,
                bounds,
                made,
                path,
                beside(path, FILES["weights"]),
                weight,
                report,
            )
            report("checking", 0, None)
            check(read_lux(made.path(path)))
            forget(made, path)
        return read_lux(path)

    def _write_table(
        self, what: str, pieces: Iterable[np.ndarray], file: BinaryIO, vertices: int, report: Report
    ) -> None:
        done = 0
        for rows in pieces:
            write(file, rows.astype(TABLES[what], copy=False))
            done += len(rows)
            report(f"writing {what}", done, vertices)
        if done != vertices:
            raise GraphError(
                f"{self.name}: {what} has {done:,} rows for {vertices:,} vertices: it needs one for each."
            )

    def _counted(self, report: Report) -> tuple[np.ndarray, bool]:
        """Where the in-edges of every vertex begin, and whether edges have weights."""
        counts, largest, edges, heavy = np.zeros(self.vertices or 1024, np.int64), -1, 0, False
        for source, target, weights in self.pieces():
            if self.vertices is not None:
                check_ids(source, target, self.vertices, edges)
            elif len(source):
                largest = max(largest, int(source.max()), int(target.max()))
                check_ids(source, target, WIDEST, edges)
                check_plausible(largest, edges + len(source))
                if largest >= len(counts):
                    counts = np.concatenate(
                        [counts, np.zeros(max(len(counts), largest + 1 - len(counts)), np.int64)]
                    )
            count(target, counts)
            edges, heavy = edges + len(source), heavy or weights is not None
            report("counting edges", edges, self.edges)
        if not edges and self.vertices is None:
            raise GraphError(
                f"{self.name} has no edge: it is not known how many vertices there are."
            )
        return offsets_of(counts[: self.vertices or largest + 1]), heavy


def save_transposed(path: Path, report: Report = silent, memory: int = MEMORY) -> Graph:
    """Writes the transpose of a .lux file beside it, in bounded memory; the graph, whose `transposed()` is mapped from now on."""
    graph = check(read_lux(path))
    order = position_type(graph.edges)

    def pieces() -> Iterator[Piece]:
        for begin in range(0, graph.edges, PIECE):
            end = min(begin + PIECE, graph.edges)
            target = np.empty(end - begin, graph.sources.dtype)
            targets_of(graph.offsets, begin, target)
            yield target, graph.sources[begin:end], np.arange(begin, end, dtype=order)

    offsets = offsets_of(graph.out_degrees())
    bounds, scratch = _ranges(offsets, order, memory)
    final, positions = (beside(path, ending) for ending in TRANSPOSED)
    with drafts(
        final, size(graph.vertices, graph.edges) + np.dtype(order).itemsize * graph.edges + scratch
    ) as made:
        _sort(pieces, offsets, bounds, made, final, positions, order, report)
    return read_lux(path)


# ---------------------------------------------------------------------------------------------------------------- sorting


def _ranges(
    offsets: np.ndarray, third: type[np.generic] | None, memory: int
) -> tuple[np.ndarray, int]:
    """Where to cut the destinations so that a range's edges fit in memory, and the bytes of scratch files that it takes."""
    row, more = (
        np.dtype(id_type(len(offsets) - 1)).itemsize,
        np.dtype(third).itemsize if third else 0,
    )
    bounds = _bounds(offsets, max(1, memory // (row + more)))
    return bounds, 0 if len(bounds) == 2 else (2 * row + more) * int(offsets[-1])


def _sort(
    pieces: Callable[[], Iterator[Piece]],
    offsets: np.ndarray,
    bounds: np.ndarray,
    made: Drafts,
    path: Path,
    third_path: Path,
    third: type[np.generic] | None,
    report: Report,
) -> None:
    """Writes a .lux file of the sources by destination, and the third column of the pieces, of this type, in the same order to another file."""
    edges, kind, done = int(offsets[-1]), id_type(len(offsets) - 1), 0
    if len(bounds) == 2:
        ranges: list[Callable[[], Iterator[Piece]]] = [pieces]
    else:
        ranges = _dropped(pieces(), bounds, made, kind, third, edges, report)
    with ExitStack() as stack:
        third_file = stack.enter_context(made.open(third_path)) if third else None
        file = stack.enter_context(made.open(path))
        write_header(file, offsets, edges)
        for begin, end, read in zip(bounds[:-1], bounds[1:], ranges, strict=True):
            cursor = offsets[begin:end] - offsets[begin]
            second = cursor.copy() if third else cursor
            sources = np.empty(offsets[end] - offsets[begin], kind)
            thirds = np.empty(len(sources) if third else 0, third)
            for source, target, values in read():
                local = target if begin == 0 else target - kind(begin)
                placed = fill(local, source, cursor, sources)
                if values is not None:
                    placed = min(placed, fill(local, values, second, thirds))
                if placed < len(source):
                    raise GraphError(
                        "The edges changed between their counting and their sorting: convert again when nobody writes to them."
                    )
                done += len(source)
                report("sorting edges", done, edges)
            write(file, sources)
            if third_file is not None:
                write(third_file, thirds)
    if done != edges:
        raise GraphError(
            "The edges changed between their counting and their sorting: convert again when nobody writes to them."
        )


def _bounds(offsets: np.ndarray, most: int) -> np.ndarray:
    """Where to cut the destinations so that no range has more than so many edges, unless it is one vertex.

    >>> _bounds(np.array([0, 2, 3, 9, 10]), 4)
    array([0, 2, 3, 4])
    """
    bounds, vertices = [0], len(offsets) - 1
    while bounds[-1] < vertices:
        end = int(np.searchsorted(offsets, offsets[bounds[-1]] + most, "right")) - 1
        bounds.append(min(vertices, max(bounds[-1] + 1, end)))
    return np.array(bounds)


def _dropped(
    pieces: Iterator[Piece],
    bounds: np.ndarray,
    made: Drafts,
    kind: type[np.signedinteger[Any]],
    third: type[np.generic] | None,
    edges: int,
    report: Report,
) -> list[Callable[[], Iterator[Piece]]]:
    """Edges dropped into a scratch file per range of destinations, in their order; how to read each range again."""
    n, done = len(bounds) - 1, 0
    with ExitStack() as stack:
        files = [
            [stack.enter_context(made.scratch(f"{i}.{column}").open("wb")) for column in range(3)]
            for i in range(n)
        ]
        for source, target, values in pieces:
            into = np.searchsorted(bounds, target, "right") - 1
            cuts = offsets_of(np.bincount(into, minlength=n))
            for column, (given, dtype) in enumerate(
                [(source, kind), (target, kind), (values, third)]
            ):
                if given is not None:
                    gathered = np.empty(len(given), dtype)
                    fill(into, given, cuts[:-1].copy(), gathered)
                    for i in np.flatnonzero(np.diff(cuts)):
                        files[i][column].write(gathered[cuts[i] : cuts[i + 1]].data)
            done += len(source)
            report("dropping edges", done, edges)

    def read(i: int) -> Iterator[Piece]:
        with ExitStack() as stack:
            columns = [
                stack.enter_context(made.scratch(f"{i}.{column}").open("rb")) for column in range(3)
            ]
            while len(source := np.fromfile(columns[0], kind, PIECE)):
                yield (
                    source,
                    np.fromfile(columns[1], kind, PIECE),
                    np.fromfile(columns[2], third, PIECE) if third else None,
                )

    return [partial(read, i) for i in range(n)]

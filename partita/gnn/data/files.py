"""Graphs in files: open one by what it is, save one, convert one into another in bounded memory.

| what | read | written | |
|---|---|---|---|
| `.lux` | yes, mapped | yes | `lux` |
| `.npz` | yes | yes | `npz` |
| edge list, packed with gzip or not | yes | | `text` |
| `.parquet` | yes | | `parquet` |
| folder of OGB's | yes | | `ogb` |
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from partita.errors import GraphError
from partita.gnn.data.graph import Graph, check
from partita.gnn.data.lux import read_lux, save_lux
from partita.gnn.data.npz import open_npz, save_npz
from partita.gnn.data.ogb import is_ogb, stream
from partita.gnn.data.parquet import edge_table
from partita.gnn.data.stream import EdgeStream, Report, save_transposed, silent
from partita.gnn.data.text import blocks, edge_list


def open(path: str | Path, *, split: str | None = None, report: Report = silent) -> Graph:
    """The graph of a file or folder, checked; a .lux file is memory-mapped, everything else in memory.

    Raises GraphError, which says what is wrong where, if it is truncated, of another kind, or holds what is no graph. `split` names one of several splits of an OGB folder.
    """
    path = Path(path)
    edges = edges_of(path, split)
    if edges is not None:
        return _named(path, lambda: edges.graph(report))
    return open_npz(path) if _kind(path) == "npz" else check(read_lux(path))


def save(graph: Graph, path: str | Path) -> None:
    """Writes a graph to a .lux or .npz file, which gets its name when it is whole."""
    path = Path(path)
    _written(path)
    (save_npz if path.suffix == ".npz" else save_lux)(graph, path)


def convert(
    path: str | Path,
    into: str | Path,
    *,
    undirected: bool = False,
    split: str | None = None,
    report: Report = silent,
) -> Graph:
    """Makes a .lux or .npz file of any other; the graph of the result.

    Edge lists and OGB folders become .lux in bounded memory, however large. `undirected` adds the reverse of every edge; `split` names
    one of several splits of an OGB folder.
    """
    path, into = Path(path), Path(into)
    _written(into)
    edges = edges_of(path, split)
    if edges is not None:
        return _named(
            path, lambda: gather(edges.with_reverse_edges() if undirected else edges, into, report)
        )
    graph = open(path, report=report)
    save(graph.with_reverse_edges() if undirected else graph, into)
    return open(into)


def gather(edges: EdgeStream, into: Path, report: Report = silent) -> Graph:
    """The graph of a stream, as a .lux file in bounded memory or as an .npz file."""
    _written(into)
    if into.suffix == ".lux":
        return edges.save(into, report)
    save(edges.graph(report), into)
    return open(into)


def transpose(path: str | Path, report: Report = silent) -> Graph:
    """Writes the transpose of a .lux file beside it, in bounded memory; the graph, which has it mapped, as `open` will from now on.

    Otherwise training makes it in memory, 8 bytes an edge.
    """
    path = Path(path)
    if _kind(path) != "lux":
        raise GraphError(
            f"A transpose lies beside a .lux file, and {str(path)!r} is none: convert it first."
        )
    return save_transposed(path, report)


def edges_of(path: Path, split: str | None = None) -> EdgeStream | None:
    """The edges of what is read in pieces; None for .lux and .npz."""
    kind = _kind(path)
    if kind == "ogb":
        return stream(path, split)
    return edge_table(path) if kind == "parquet" else edge_list(path) if kind == "text" else None


def _kind(path: Path) -> str:
    """What a path is, by its ending, or by how it begins."""
    if path.is_dir():
        if is_ogb(path):
            return "ogb"
        raise GraphError(
            f"{str(path)!r} is a folder without raw/ in it: a data set of OGB's has raw/ and split/. Name a file otherwise."
        )
    if not path.exists():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, 1)
        raise GraphError(
            f"There is no file {str(path)!r}.{f' Did you mean {str(path.with_name(near[0]))!r}?' if near else ''}"
        )
    if path.suffix in (".lux", ".npz", ".parquet"):
        return path.suffix[1:]
    with path.open("rb") as file:
        begins = file.read(4)
    if begins == b"PK\x03\x04":
        return "npz"
    if begins == b"PAR1":
        return "parquet"
    first = next(blocks(path), None)
    if first is None:
        raise GraphError(f"{str(path)!r} is empty.")
    if not first[:4096].all():  # a byte of 0 is in no text
        raise GraphError(
            f"{str(path)!r} is no graph that is known: name a .lux, .npz or .parquet file, an edge list in text, or a folder of OGB's."
        )
    return "text"


def _written(path: Path) -> None:
    """GraphError if a graph cannot be written there: it is better known before an hour's work than after."""
    if path.suffix not in (".lux", ".npz"):
        raise GraphError(
            f"A graph is written to a .lux or an .npz file, and {path.name!r} is neither: call it {path.stem + '.lux'!r}."
        )
    if not path.parent.is_dir():
        raise GraphError(
            f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}."
        )


def _named(path: Path, make: Callable[[], Graph]) -> Graph:
    """What is made of a path, its errors with the path in them."""
    try:
        return make()
    except GraphError as error:
        raise error if str(path) in str(error) else GraphError(f"{str(path)!r}: {error}") from None

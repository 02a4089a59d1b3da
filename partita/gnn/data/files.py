"""Graphs in files: open one by its ending or first bytes, save one, convert one in bounded memory.

| format | read | written | module |
|---|---|---|---|
| `.lux` | yes, memory-mapped | yes | `lux` |
| `.npz` | yes | yes | `npz` |
| edge list in text, also gzipped | yes | | `text` |
| `.parquet` | yes | | `parquet` |
| OGB folder | yes | | `ogb` |

A new format is a module and an entry in `WHOLE` or `STREAMED`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from partita.errors import GraphError
from partita.gnn.data.graph import Graph
from partita.gnn.data.lux import has_file, open_lux, save_lux
from partita.gnn.data.npz import open_npz, save_npz
from partita.gnn.data.ogb import is_ogb, ogb_edges
from partita.gnn.data.parquet import parquet_edges
from partita.gnn.data.stream import EdgeStream, Report, save_transpose, silent
from partita.gnn.data.text import blocks, text_edges

WHOLE: dict[str, Callable[[Path], Graph]] = {"lux": open_lux, "npz": open_npz}
"""Formats that are opened whole: readers of a graph."""


def _open_parquet(path: Path, split: str | None) -> EdgeStream:
    return parquet_edges(path)


def _open_text(path: Path, split: str | None) -> EdgeStream:
    return text_edges(path)


STREAMED: dict[str, Callable[[Path, str | None], EdgeStream]] = {
    "ogb": ogb_edges,
    "parquet": _open_parquet,
    "text": _open_text,
}
"""Formats that are read in pieces: readers of edges from a path and the name of a split."""

WRITERS: dict[str, Callable[[Graph, Path], None]] = {".lux": save_lux, ".npz": save_npz}
"""Formats that are written, by ending."""


def open(path: str | Path, *, split: str | None = None, report: Report = silent) -> Graph:
    """The graph of a file or folder, checked.

    A .lux file is memory-mapped; other formats are read into memory. `split` names one of several
    splits of an OGB folder. Raises GraphError for a file that is truncated, of an unknown format,
    or no graph.
    """
    path = Path(path)
    with _explained(path):
        kind = _kind(path)
        if kind in WHOLE:
            return WHOLE[kind](path)
        return _name_errors(path, lambda: STREAMED[kind](path, split).graph(report))


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Inside, an error of the system while reading is a GraphError."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or path)
        raise GraphError(f"{name!r} cannot be read: {error.strerror}.") from None


def save(graph: Graph, path: str | Path) -> None:
    """Writes a graph to a .lux or .npz file, which gets its name when it is complete."""
    path = Path(path)
    _check_writable(path)
    WRITERS[path.suffix](graph, path)


def convert(
    path: str | Path,
    into: str | Path,
    *,
    undirected: bool = False,
    split: str | None = None,
    report: Report = silent,
) -> Graph:
    """Converts any format to a .lux or .npz file; returns the graph of the result.

    Edge lists, Parquet files and OGB folders of any size become .lux in bounded memory.
    `undirected` adds the reverse of every edge. `split` names one of several splits of an OGB
    folder.
    """
    path = Path(path)
    into = Path(into)
    _check_writable(into)
    kind = _kind(path)
    if kind in STREAMED:
        return _name_errors(
            path, lambda: _convert_stream(STREAMED[kind](path, split), into, undirected, report)
        )
    graph = WHOLE[kind](path)
    save(graph.with_reverse_edges() if undirected else graph, into)
    return open(into)


def _convert_stream(edges: EdgeStream, into: Path, undirected: bool, report: Report) -> Graph:
    return save_stream(edges.with_reverse_edges() if undirected else edges, into, report)


def save_stream(edges: EdgeStream, into: Path, report: Report = silent) -> Graph:
    """Writes a stream to a .lux file, in bounded memory, or to an .npz file; returns its graph."""
    _check_writable(into)
    if into.suffix == ".lux":
        return edges.save(into, report)
    save(edges.graph(report), into)
    return open(into)


def transpose(path: str | Path, report: Report = silent) -> Graph:
    """Writes the transpose of a .lux file beside it, in bounded memory; returns the graph with it.

    `open` maps the transpose from then on. Otherwise training makes it in memory, 8 bytes per edge.
    """
    path = Path(path)
    if _kind(path) != "lux":
        raise GraphError(f"{str(path)!r} is no .lux file: convert it first, then transpose it.")
    return save_transpose(path, report)


def _kind(path: Path) -> str:
    """The format of a path, by its ending or its first bytes: a key of `WHOLE` or `STREAMED`."""
    if path.is_dir():
        if is_ogb(path):
            return "ogb"
        raise GraphError(
            f"{str(path)!r} is a folder without raw/: name a file, or an OGB folder with raw/ "
            "and split/."
        )
    if not has_file(path):
        raise GraphError(f"There is no file {str(path)!r}.{_suggestion(path)}")
    if path.suffix in (".lux", ".npz", ".parquet"):
        return path.suffix[1:]
    with path.open("rb") as file:
        first_bytes = file.read(4)
    if first_bytes == b"PK\x03\x04":
        return "npz"
    if first_bytes == b"PAR1":
        return "parquet"
    first_block = next(blocks(path), None)
    if first_block is None:
        raise GraphError(f"{str(path)!r} is empty: name a file with edges.")
    has_zero_byte = not first_block[:4096].all()
    if has_zero_byte:
        raise GraphError(
            f"{str(path)!r} is no text: name a .lux, .npz or .parquet file, an edge list in text, "
            "or an OGB folder."
        )
    return "text"


def _suggestion(path: Path) -> str:
    """A question that names a similar file in the same folder, or nothing."""
    if not path.parent.is_dir():
        return ""
    names = [p.name for p in path.parent.iterdir()]
    similar = difflib.get_close_matches(path.name, names, 1)
    return f" Did you mean {str(path.with_name(similar[0]))!r}?" if similar else ""


def _check_writable(path: Path) -> None:
    """GraphError for a path that cannot be written, before an hour's work."""
    if path.suffix not in WRITERS:
        raise GraphError(
            f"{path.name!r} does not end in .lux or .npz: call it {path.stem + '.lux'!r}."
        )
    if not path.parent.is_dir():
        raise GraphError(
            f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}."
        )


def _name_errors(path: Path, read: Callable[[], Graph]) -> Graph:
    """The graph that `read` returns; its errors name the path."""
    try:
        return read()
    except GraphError as error:
        if str(path) in str(error):
            raise
        raise GraphError(f"{str(path)!r}: {error}") from None

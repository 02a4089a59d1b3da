"""Graphs as Roc's .lux family of files, memory-mapped: this is Partita's own format.

| file | what | |
|---|---|---|
| `<p>.lux` (or `<p>.add_self_edge.lux`) | u32 vertices, u64 edges, u64 row_end[vertices], u32 source[edges] | Roc's |
| `<p>.feats.bin` | f32 [vertices, F], F by the file's length | Roc's; `<p>.feats.csv` is read too |
| `<p>.label.bin` | i32 [vertices] | Roc's `<p>.label`, a number a line, is read too |
| `<p>.train.bin`, `<p>.validation.bin`, `<p>.test.bin` | a byte per vertex, 0 or 1 | Roc's `<p>.mask`, a word a line, is read too |
| `<p>.transposed.lux`, `<p>.transposed.order.bin` | the transpose, where it was asked for: i32 or i64 [edges] | |
| `<p>.weights.bin` | f32 [edges] in the order of the sources | |

All little-endian. Beyond 2^31 vertices sources are 64 bits wide, which shows in the file's length. (Roc, MLSys 2020; the layout is that of its
public code, load_task.cu.) Opening reads everything once to check it, and keeps in memory what a row is found by, 8 bytes a vertex.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import TABLES
from partita.gnn.data.checks import pieces_of
from partita.gnn.data.csr import NARROW, Transposed, id_type, position_type
from partita.gnn.data.drafts import Drafts, drafts
from partita.gnn.data.graph import Graph, check

HEADER = 12
WIDEST = 2**32
"""A header has 32 bits for the number of vertices."""

FILES = {
    "features": ".feats.bin",
    "labels": ".label.bin",
    "train": ".train.bin",
    "validation": ".validation.bin",
    "test": ".test.bin",
    "weights": ".weights.bin",
}
TRANSPOSED = (".transposed.lux", ".transposed.order.bin")
TEXTS = (".feats.csv", ".label", ".mask")
MASKS = {"Train": "train", "Val": "validation", "Test": "test", "None": None}


def beside(path: Path, ending: str) -> Path:
    """A file of the same graph.

    >>> beside(Path("a/cora.add_self_edge.lux"), ".mask").name, beside(Path("b.lux"), ".mask").name
    ('cora.mask', 'b.mask')
    """
    stem = path.name.removesuffix(".lux").removesuffix(".add_self_edge")
    return path.with_name(stem + ending)


def size(vertices: int, edges: int) -> int:
    """Bytes of a .lux file."""
    return HEADER + 8 * vertices + np.dtype(id_type(vertices)).itemsize * edges


# ---------------------------------------------------------------------------------------------------------------- reading


def read_lux(path: Path) -> Graph:
    """The graph of a .lux file and what lies beside it, memory-mapped, not checked yet."""
    offsets, sources = read_edges(path)
    vertices, edges = len(offsets) - 1, len(sources)
    tables: dict[str, Any] = {what: _binary(path, what, vertices, edges) for what in FILES}
    tables |= {
        what: table for what, table in _texts(path, vertices).items() if tables[what] is None
    }
    graph = Graph(offsets, sources, **tables, name=beside(path, "").name)
    back, order = (beside(path, ending) for ending in TRANSPOSED)
    if back.exists() and order.exists():
        kind = np.dtype(position_type(edges))
        if order.stat().st_size != kind.itemsize * edges:
            raise GraphError(
                f"{str(order)!r} is truncated or of another graph: {edges:,} positions take {kind.itemsize * edges:,} bytes, and it has {order.stat().st_size:,}."
            )
        graph = graph.with_transpose(
            Transposed(*read_edges(back), _mapped(order, kind.newbyteorder("<").str, 0, (edges,)))
        )
    return graph


def read_edges(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sources of a .lux file; GraphError if its length is not what its header says."""
    length = path.stat().st_size
    if length < HEADER:
        raise GraphError(
            f"{str(path)!r} is {length} bytes long: a .lux file begins with 12 bytes, its numbers of vertices and of edges."
        )
    with path.open("rb") as file:
        vertices, edges = (
            int.from_bytes(file.read(4), "little"),
            int.from_bytes(file.read(8), "little"),
        )
    start, widths = HEADER + 8 * vertices, (4, 8) if vertices > NARROW else (4,)
    width = next((w for w in widths if start + w * edges == length), None)
    if width is None:
        need = size(vertices, edges)
        where = (
            f"it ends within edge {(length - start) // widths[-1]:,}"
            if need > length >= start
            else "it ends within the offsets"
            if need > length
            else ""
        )
        raise GraphError(
            f"{str(path)!r} is truncated or no .lux file: its first 12 bytes say {vertices:,} vertices and {edges:,} edges, "
            f"which takes {need:,} bytes, and it has {length:,}{f' ({where})' if where else ''}."
        )
    offsets = np.zeros(vertices + 1, np.int64)
    offsets[1:] = _mapped(path, "<i8", HEADER, (vertices,))
    sources = _mapped(
        path, {8: "<i8", 4: "<u4" if vertices > NARROW else "<i4"}[width], start, (edges,)
    )
    return offsets, sources.astype(id_type(vertices), copy=False)


def _mapped(path: Path, dtype: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Part of a file as an array that is read when it is looked at."""
    if not np.prod(shape):
        return np.empty(shape, dtype)  # there is no empty map
    return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)


def _binary(path: Path, what: str, vertices: int, edges: int) -> np.ndarray | None:
    """A table beside a .lux file; None where there is no such file."""
    file = beside(path, FILES[what])
    if not file.exists():
        return None
    length, dtype = file.stat().st_size, np.dtype(TABLES.get(what, np.float32))
    rows = edges if what == "weights" else vertices
    if what == "features":
        row = 4 * max(1, vertices)
        if length % row:
            raise GraphError(
                f"{str(file)!r} is truncated or of another graph: {length:,} bytes are no whole number of float32 for each of {vertices:,} vertices."
            )
        return _mapped(file, "<f4", 0, (vertices, length // row))
    if length != rows * dtype.itemsize:
        kind = "edges" if what == "weights" else "vertices"
        raise GraphError(
            f"{str(file)!r} is truncated or of another graph: {rows:,} {kind} take {rows * dtype.itemsize:,} bytes, and it has {length:,}."
        )
    if dtype == np.bool_:
        found = _mapped(file, "u1", 0, (rows,))
        if found.max(initial=0) > 1:
            v = int(np.argmax(found > 1))
            raise GraphError(
                f"{str(file)!r} says {found[v]} of vertex {v:,}: a mask is a byte per vertex, 0 or 1."
            )
        return found.view(np.bool_)
    return _mapped(file, dtype.newbyteorder("<").str, 0, (rows,))


def _texts(path: Path, vertices: int) -> dict[str, np.ndarray]:
    """The tables that Roc keeps as text."""
    features, labels, masks = (beside(path, ending) for ending in TEXTS)
    found: dict[str, np.ndarray] = {}
    if features.exists() and not beside(path, FILES["features"]).exists():
        found["features"] = _numbers(features, np.float32, ",")
    if labels.exists():
        found["labels"] = _numbers(labels, np.int32, None).reshape(-1)
    if masks.exists():
        words = masks.read_text(encoding="utf-8", errors="replace").split("\n")
        words = words[:-1] if words and not words[-1] else words
        strange = next((i for i, word in enumerate(words) if word.strip() not in MASKS), None)
        if strange is not None:
            raise GraphError(
                f"{str(masks)!r}, line {strange + 1:,}: {words[strange][:40]!r} is no mask: write Train, Val, Test or None."
            )
        for word, what in MASKS.items():
            if what is not None:
                found[what] = np.array([w.strip() == word for w in words], np.bool_)
        found = {
            what: table
            for what, table in found.items()
            if what not in ("validation", "test") or table.any()
        }
    return found


def _numbers(file: Path, dtype: Any, delimiter: str | None) -> np.ndarray:
    """[lines, numbers of a line]."""
    try:
        return np.loadtxt(file, dtype, delimiter=delimiter, ndmin=2, encoding="utf-8")
    except (ValueError, UnicodeDecodeError) as error:
        raise GraphError(f"{str(file)!r} cannot be read: {error}") from None


# ---------------------------------------------------------------------------------------------------------------- writing


def save_lux(graph: Graph, path: Path) -> None:
    """Writes a graph to a .lux file, and its tables beside it. What lay there before stays until all is written."""
    check(graph)
    tables = [t for what in FILES if (t := getattr(graph, what)) is not None]
    with drafts(path, size(graph.vertices, graph.edges) + sum(t.nbytes for t in tables)) as made:
        for what in FILES:
            if (table := getattr(graph, what)) is not None:
                with made.open(beside(path, FILES[what])) as file:
                    write(file, table)
        with made.open(path) as file:
            write_header(file, graph.offsets, graph.edges)
            write(file, graph.sources)
        forget(made, path)


def write_header(file: Any, offsets: np.ndarray, edges: int) -> None:
    """What a .lux file has before its sources."""
    vertices = len(offsets) - 1
    if vertices >= WIDEST:
        raise GraphError(f"A .lux file holds fewer than 2^32 vertices, and there are {vertices:,}.")
    file.write(vertices.to_bytes(4, "little") + edges.to_bytes(8, "little"))
    write(file, offsets[1:])


def write(file: Any, array: np.ndarray) -> None:
    """An array's bytes, little-endian, a few MiB at a time."""
    for _, part in pieces_of(array):
        file.write(np.ascontiguousarray(part, part.dtype.newbyteorder("<")).data)


def forget(made: Drafts, path: Path) -> None:
    """Removes what lies beside a .lux file and is not of the graph that is about to take its place."""
    for ending in (*FILES.values(), *TRANSPOSED, *TEXTS):
        if not made.has(beside(path, ending)):
            beside(path, ending).unlink(missing_ok=True)

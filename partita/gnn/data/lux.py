"""Graphs in Roc's .lux family of files, memory-mapped: Partita's own format.

| file of graph p | content |
|---|---|
| p.lux, p.add_self_edge.lux | u32 vertices, u64 edges, u64 row_end[vertices], u32 source[edges] |
| p.feats.bin | f32 [vertices, F], F by the file's length (Roc) |
| p.feats.csv | the same as text (Roc), only read |
| p.label.bin | i32 [vertices] |
| p.label | one number per line (Roc), only read |
| p.train.bin, p.validation.bin, p.test.bin | one byte per vertex, 0 or 1 |
| p.mask | one word per line (Roc), only read |
| p.transposed.lux, p.transposed.order.bin | the transpose, if requested: i32 or i64 [edges] |
| p.weights.bin | f32 [edges] in the order of the sources |

All little-endian. Beyond 2^31 vertices sources have 64 bits, which the file's length shows. (Roc,
MLSys 2020; the layout is that of its public code, load_task.cu.) Opening a file reads everything
once to check it, and keeps the offsets in memory, 8 bytes per vertex.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.files.reading import FileKind, is_file
from partita.gnn.data.arrays import TABLES
from partita.gnn.data.checks import pieces_of
from partita.gnn.data.csr import NARROW, Transposed, id_type, position_type
from partita.gnn.data.drafts import Drafts, open_drafts
from partita.gnn.data.graph import Graph, check

HEADER = 12
"""Bytes of a header: the numbers of vertices and edges."""

MAX_VERTICES = 2**32
"""A header has 32 bits for the number of vertices."""

FILES = {
    "features": ".feats.bin",
    "labels": ".label.bin",
    "train": ".train.bin",
    "validation": ".validation.bin",
    "test": ".test.bin",
    "weights": ".weights.bin",
}
"""Endings of the files of tables and weights."""

TRANSPOSE_FILES = (".transposed.lux", ".transposed.order.bin")
"""Endings of the files of the transpose: its edges, and their positions."""

TEXT_FILES = (".feats.csv", ".label", ".mask")
"""Endings of Roc's tables in text: features, labels, masks."""

GRAPH_FILE = FileKind("a file of a graph", "name another file", GraphError)

MASK_WORDS = {"Train": "train", "Val": "validation", "Test": "test"}
"""Masks by Roc's words; a vertex of no mask has the word None."""


def companion(path: Path, ending: str) -> Path:
    """Another file of the same graph.

    >>> companion(Path("a/cora.add_self_edge.lux"), ".mask").name
    'cora.mask'
    >>> companion(Path("b.lux"), ".mask").name
    'b.mask'
    """
    stem = path.name.removesuffix(".lux").removesuffix(".add_self_edge")
    return path.with_name(stem + ending)


def lux_size(vertices: int, edges: int) -> int:
    """Size of a .lux file, bytes."""
    return HEADER + 8 * vertices + np.dtype(id_type(vertices)).itemsize * edges


# --------------------------------------------------------------------------------------- reading


def open_lux(path: Path) -> Graph:
    """The graph of a .lux file and its companions, memory-mapped and checked."""
    return check(read_lux(path))


def read_lux(path: Path) -> Graph:
    """The graph of a .lux file and its companions, memory-mapped, not checked."""
    offsets, sources = _read_edges(path)
    vertices = len(offsets) - 1
    edges = len(sources)
    arrays: dict[str, Any] = {name: _read_table(path, name, vertices, edges) for name in FILES}
    for name, table in _read_text_tables(path).items():
        if arrays[name] is None:
            arrays[name] = table
    graph = Graph(offsets, sources, **arrays, name=companion(path, "").name)
    transposed = _read_transpose(path, edges)
    return graph if transposed is None else graph.with_transpose(transposed)


def has_file(path: Path) -> bool:
    """Whether a file of a graph is there; GraphError for one that cannot be read as a file: a link
    to nothing, a folder, a device or a pipe."""
    return is_file(path, GRAPH_FILE)


def _read_transpose(path: Path, edges: int) -> Transposed | None:
    """The transpose beside a .lux file; None without one."""
    edge_file, order_file = (companion(path, ending) for ending in TRANSPOSE_FILES)
    if not all([has_file(edge_file), has_file(order_file)]):
        return None
    kind = np.dtype(position_type(edges))
    size = order_file.stat().st_size
    if size != kind.itemsize * edges:
        raise GraphError(
            f"{str(order_file)!r} is truncated or of another graph: {edges:,} positions need "
            f"{kind.itemsize * edges:,} bytes, and it has {size:,}."
        )
    offsets, destinations = _read_edges(edge_file)
    order = _map(order_file, kind.newbyteorder("<").str, 0, (edges,))
    return Transposed(offsets, destinations, order)


def _read_edges(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sources of a .lux file; GraphError if its length contradicts its header."""
    length = path.stat().st_size
    if length < HEADER:
        raise GraphError(
            f"{str(path)!r} has {length} bytes: a .lux file begins with {HEADER} bytes, the "
            "numbers of vertices and edges."
        )
    with path.open("rb") as file:
        vertices = int.from_bytes(file.read(4), "little")
        edges = int.from_bytes(file.read(8), "little")
    start = HEADER + 8 * vertices
    source_types = {4: "<i4"} if vertices <= NARROW else {4: "<u4", 8: "<i8"}
    widths = [width for width in source_types if start + width * edges == length]
    if not widths:
        raise GraphError(_wrong_length(path, length, vertices, edges, max(source_types)))
    offsets = np.zeros(vertices + 1, np.int64)
    offsets[1:] = _map(path, "<i8", HEADER, (vertices,))
    sources = _map(path, source_types[widths[0]], start, (edges,))
    return offsets, sources.astype(id_type(vertices), copy=False)


def _wrong_length(path: Path, length: int, vertices: int, edges: int, width: int) -> str:
    """Message for a .lux file whose length contradicts its header."""
    start = HEADER + 8 * vertices
    needed = lux_size(vertices, edges)
    place = ""
    if start <= length < needed:
        place = f" (it ends within edge {(length - start) // width:,})"
    elif length < needed:
        place = " (it ends within the offsets)"
    return (
        f"{str(path)!r} is truncated or no .lux file: its header says {vertices:,} vertices and "
        f"{edges:,} edges, which need {needed:,} bytes, and it has {length:,}{place}."
    )


def _map(path: Path, dtype: str, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """A section of a file as an array that is read on access."""
    if not np.prod(shape):
        return np.empty(shape, dtype)  # there is no empty map
    return np.memmap(path, dtype, "r", start, shape).view(np.ndarray)


def _read_table(path: Path, name: str, vertices: int, edges: int) -> np.ndarray | None:
    """A table or the weights beside a .lux file; None without that file."""
    file = companion(path, FILES[name])
    if not has_file(file):
        return None
    size = file.stat().st_size
    if name == "features":
        column_bytes = 4 * max(1, vertices)
        if size % column_bytes:
            raise GraphError(
                f"{str(file)!r} is truncated or of another graph: {size:,} bytes are no multiple "
                f"of {column_bytes:,}, a float32 for each of {vertices:,} vertices."
            )
        return _map(file, "<f4", 0, (vertices, size // column_bytes))
    rows = edges if name == "weights" else vertices
    dtype = np.dtype(TABLES.get(name, np.float32))
    if size != rows * dtype.itemsize:
        row_name = "edges" if name == "weights" else "vertices"
        raise GraphError(
            f"{str(file)!r} is truncated or of another graph: {rows:,} {row_name} need "
            f"{rows * dtype.itemsize:,} bytes, and it has {size:,}."
        )
    if dtype == np.bool_:
        return _map_mask(file, rows)
    return _map(file, dtype.newbyteorder("<").str, 0, (rows,))


def _map_mask(file: Path, rows: int) -> np.ndarray:
    """A mask of one byte per vertex; GraphError for a byte other than 0 and 1."""
    mask = _map(file, "u1", 0, (rows,))
    if mask.max(initial=0) > 1:
        v = int(np.argmax(mask > 1))
        raise GraphError(
            f"{str(file)!r} has {mask[v]} for vertex {v:,}: a mask has one byte per vertex, 0 or 1."
        )
    return mask.view(np.bool_)


def _read_text_tables(path: Path) -> dict[str, np.ndarray]:
    """The tables that Roc stores as text."""
    features, labels, masks = (companion(path, ending) for ending in TEXT_FILES)
    tables: dict[str, np.ndarray] = {}
    if has_file(features) and not companion(path, FILES["features"]).exists():
        tables["features"] = _load_numbers(features, np.float32, ",")
    if has_file(labels):
        tables["labels"] = _load_numbers(labels, np.int32, None).reshape(-1)
    if has_file(masks):
        tables |= _read_text_masks(masks)
    return tables


def _read_text_masks(file: Path) -> dict[str, np.ndarray]:
    """The masks of Roc's .mask file; empty ones but the training mask are left out."""
    lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    words = [line.strip() for line in lines]
    for number, word in enumerate(words, 1):
        if word not in MASK_WORDS and word != "None":
            raise GraphError(
                f"{str(file)!r}, line {number:,}: {word[:40]!r} is unknown: use Train, Val, Test "
                "or None."
            )
    masks = {}
    for word, name in MASK_WORDS.items():
        mask = np.array([w == word for w in words], np.bool_)
        if name == "train" or mask.any():
            masks[name] = mask
    return masks


def _load_numbers(file: Path, dtype: Any, delimiter: str | None) -> np.ndarray:
    """Numbers of a text file, [lines, numbers per line]."""
    try:
        return np.loadtxt(file, dtype, delimiter=delimiter, ndmin=2, encoding="utf-8-sig")
    except (ValueError, UnicodeDecodeError) as error:
        raise GraphError(f"{str(file)!r} cannot be read: {error}") from None


# --------------------------------------------------------------------------------------- writing


def save_lux(graph: Graph, path: Path) -> None:
    """Writes a graph to a .lux file and its companions, renamed when all are complete."""
    check(graph)
    if graph.has_targets or graph.edge_features is not None or graph.members is not None:
        table = "edge features" if graph.edge_features is not None else "members of graphs"
        table = "targets" if graph.has_targets else table
        raise GraphError(
            f"{path.name!r} cannot hold the {table} of '{graph.name}': save the graph as "
            f"{path.stem + '.npz'!r}."
        )
    fields = {name: getattr(graph, name) for name in FILES}
    tables = {name: table for name, table in fields.items() if table is not None}
    size = lux_size(graph.vertices, graph.edges)
    size += sum(table.nbytes for table in tables.values())
    with open_drafts(path, size) as drafts:
        for name, table in tables.items():
            with drafts.open(companion(path, FILES[name])) as file:
                write_array(file, table)
        with drafts.open(path) as file:
            write_header(file, graph.offsets, graph.edges)
            write_array(file, graph.sources)
        remove_stale(drafts, path)


def write_header(file: Any, offsets: np.ndarray, edges: int) -> None:
    """Writes everything that a .lux file has before its sources."""
    vertices = len(offsets) - 1
    if vertices >= MAX_VERTICES:
        raise GraphError(f"{vertices:,} vertices exceed a .lux file: it can have fewer than 2^32.")
    file.write(vertices.to_bytes(4, "little") + edges.to_bytes(8, "little"))
    write_array(file, offsets[1:])


def write_array(file: Any, array: np.ndarray) -> None:
    """Writes an array, little-endian, a few MiB at a time."""
    for _, piece in pieces_of(array):
        file.write(np.ascontiguousarray(piece, piece.dtype.newbyteorder("<")).data)


def remove_stale(drafts: Drafts, path: Path) -> None:
    """Removes companions of a .lux file that are not among the drafts and so of another graph."""
    for ending in (*FILES.values(), *TRANSPOSE_FILES, *TEXT_FILES):
        file = companion(path, ending)
        if not drafts.has(file):
            file.unlink(missing_ok=True)

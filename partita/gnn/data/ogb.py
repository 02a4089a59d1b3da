"""Node-property data sets of the Open Graph Benchmark, as they are on disk.

```
<folder>/raw/edge.csv.gz               source, target
            num-node-list.csv.gz       number of vertices
            node-feat.csv.gz           one row per vertex
            node-label.csv.gz          one number per vertex, nan or nothing for no label
            data.npz, node-label.npz   instead, in large sets: edge_index, num_nodes_list, node_feat
        split/<scheme>/{train,valid,test}.csv.gz         lists of vertices
```

(ogb/io/README.md and read_graph_raw.py of the public code.) The folder `processed/` holds pickles
and is not read. Text is read in pieces: `open(folder)` keeps the graph in memory and `convert` does
not. The arrays of a data.npz are in memory in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import as_labels, as_mask
from partita.gnn.data.lux import MAX_VERTICES, has_file
from partita.gnn.data.npz import read_arrays
from partita.gnn.data.stream import PIECE, EdgeStream, Piece
from partita.gnn.data.text import table, text_edges

SPLIT_FILES = {"train": "train", "validation": "valid", "test": "test"}
"""Names of a split's files by mask."""

Tables = dict[str, Callable[[], Iterable[np.ndarray]]]
"""Tables of an `EdgeStream`."""


def is_ogb(folder: Path) -> bool:
    """Whether a folder looks like an OGB data set."""
    return (folder / "raw").is_dir()


def ogb_edges(folder: Path, split: str | None = None) -> EdgeStream:
    """The edges and tables of a data set.

    `split` names a folder under split/, which is needed where there are several.
    """
    raw = folder / "raw"
    if (raw / "triplet-type-list.csv.gz").exists():
        raise GraphError(
            f"{str(folder)!r} has several kinds of vertices: use a data set with one kind of "
            "vertex and of edge."
        )
    if has_file(raw / "edge.csv.gz"):
        edges, tables = _read_text(folder)
    elif has_file(raw / "data.npz"):
        edges, tables = _read_binary(folder)
    else:
        raise GraphError(
            f"{str(raw)!r} has neither edge.csv.gz nor data.npz: download the data set again."
        )
    assert edges.vertices is not None
    for name, mask in _masks(folder, split, edges.vertices).items():
        tables[name] = partial(_one_piece, mask)
    return EdgeStream(edges.pieces, edges.vertices, edges.edges, tables, folder.name)


def _one_piece(array: np.ndarray) -> Iterable[np.ndarray]:
    return [array]


def _read_text(folder: Path) -> tuple[EdgeStream, Tables]:
    """The edges and tables of a data set in text."""
    raw = folder / "raw"
    vertices = _vertex_count(raw / "num-node-list.csv.gz")
    edges = text_edges(raw / "edge.csv.gz", folder.name, vertices)
    tables: Tables = {}
    if has_file(raw / "node-feat.csv.gz"):
        tables["features"] = partial(table, raw / "node-feat.csv.gz", np.float32)
    label_file = raw / "node-label.csv.gz"
    if has_file(label_file):
        labels = np.concatenate([*table(label_file, np.float64)] or [np.zeros((0, 1))])
        tables["labels"] = partial(_labels, label_file, labels)
    return edges, tables


def _vertex_count(path: Path) -> int:
    """The number of vertices that num-node-list.csv.gz states."""
    if not has_file(path):
        raise GraphError(
            f"There is no file {str(path)!r} with the number of vertices: download the data set "
            "again."
        )
    counts = np.concatenate([np.zeros((0, 1), np.int64), *_columns(path)]).ravel()
    if len(counts) != 1:
        raise GraphError(
            f"{str(path)!r} lists {len(counts):,} graphs: use a node-property data set, which "
            "has one."
        )
    return _checked_count(path, counts)


def _columns(path: Path) -> Iterable[np.ndarray]:
    """The rows of a file with one whole number per line."""
    for rows in table(path, np.int64):
        if rows.shape[1] != 1:
            raise GraphError(f"{str(path)!r} has {rows.shape[1]} numbers per line: write one.")
        yield rows


def _checked_count(path: Path, counts: np.ndarray) -> int:
    """The number of vertices; GraphError for one that no graph has."""
    count = int(counts[0])
    if not 0 < count < MAX_VERTICES:
        raise GraphError(f"{str(path)!r} says {count:,} vertices: give 1 to {MAX_VERTICES:,}.")
    return count


def _labels(path: Path, labels: np.ndarray) -> Iterable[np.ndarray]:
    if labels.ndim == 2 and labels.shape[1] != 1:
        raise GraphError(
            f"{str(path)!r} has {labels.shape[1]} labels per vertex: use a data set with one class "
            "per vertex."
        )
    return [as_labels(labels)]


def _read_binary(folder: Path) -> tuple[EdgeStream, Tables]:
    """The edges and tables of a large data set in .npz files."""
    raw = folder / "raw"
    arrays = read_arrays(raw / "data.npz")
    if "edge_index" not in arrays or "num_nodes_list" not in arrays:
        raise GraphError(
            f"{str(raw / 'data.npz')!r} has the arrays {', '.join(sorted(arrays))}: edge_index and "
            "num_nodes_list are needed."
        )
    counts = arrays["num_nodes_list"].reshape(-1)
    if len(counts) != 1:
        raise GraphError(
            f"{str(folder)!r} has {len(counts):,} graphs: use a node-property data set, which "
            "has one."
        )
    index = arrays["edge_index"]
    if index.ndim != 2 or len(index) != 2 or index.dtype.kind not in "iu":
        raise GraphError(
            f"{str(raw / 'data.npz')!r}: edge_index is {index.dtype} {list(index.shape)}: give "
            "integers [2, edges]."
        )
    source, target = index

    def pieces() -> Iterator[Piece]:
        for start in range(0, len(source), PIECE):
            yield source[start : start + PIECE], target[start : start + PIECE], None

    tables: Tables = {}
    if "node_feat" in arrays:
        tables["features"] = partial(_one_piece, arrays["node_feat"])
    label_file = raw / "node-label.npz"
    if has_file(label_file):
        label_arrays = read_arrays(label_file)
        if len(label_arrays) != 1:
            raise GraphError(f"{str(label_file)!r} has {len(label_arrays)} arrays: give one.")
        (labels,) = label_arrays.values()
        tables["labels"] = partial(_labels, label_file, labels)
    vertices = _checked_count(raw / "data.npz", counts)
    return EdgeStream(pieces, vertices, len(source)), tables


def _masks(folder: Path, split: str | None, vertices: int) -> dict[str, np.ndarray]:
    """The masks of a split; empty where the data set has none."""
    schemes = sorted(p.name for p in (folder / "split").glob("*") if p.is_dir())
    if not schemes:
        return {}
    if split is None and len(schemes) > 1:
        raise GraphError(f"{str(folder)!r} has the splits {', '.join(schemes)}: name one.")
    scheme = split or schemes[0]
    if scheme not in schemes:
        raise GraphError(f"{str(folder)!r} has no split {scheme!r}: use {', '.join(schemes)}.")
    masks = {}
    for name, stem in SPLIT_FILES.items():
        path = _split_file(folder / "split" / scheme, stem)
        vertex_lists = np.concatenate([np.zeros((0, 1), np.int64), *_columns(path)])
        try:
            masks[name] = as_mask(name, vertex_lists[:, 0], vertices)
        except GraphError as error:
            raise GraphError(f"{str(path)!r}: {error}") from None
    return masks


def _split_file(folder: Path, stem: str) -> Path:
    """The list of vertices of a mask, gzipped or not."""
    for ending in (".csv.gz", ".csv"):
        path = folder / f"{stem}{ending}"
        if has_file(path):
            return path
    if (folder / "split_dict.pt").exists():
        raise GraphError(
            f"{str(folder)!r} has no {stem}.csv.gz, only a pickle, and Partita unpickles nothing: "
            "save the lists of vertices as text."
        )
    raise GraphError(f"{str(folder)!r} has no {stem}.csv.gz: download the data set again.")

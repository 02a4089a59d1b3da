"""Node-property data sets of the Open Graph Benchmark, as they lie on disk.

```
<folder>/raw/edge.csv.gz               source, target
            num-node-list.csv.gz       vertices
            node-feat.csv.gz           a row per vertex
            node-label.csv.gz          a number per vertex, nan or nothing for none
            data.npz, node-label.npz   instead of those, in large sets: edge_index, num_nodes_list, node_feat
        split/<scheme>/{train,valid,test}.csv.gz         lists of vertices
```

(ogb/io/README.md and read_graph_raw.py of the public code.) The folder `processed/` holds pickles and is not read. Text is gone through in pieces, so
`open(folder)` keeps the graph in memory and `convert` does not; of a data.npz the arrays are in memory in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import as_labels, as_mask
from partita.gnn.data.npz import read_arrays
from partita.gnn.data.stream import PIECE, EdgeStream, Piece
from partita.gnn.data.text import edge_list, table

SPLITS = {"train": "train", "validation": "valid", "test": "test"}


def is_ogb(folder: Path) -> bool:
    """Whether a folder looks like a data set of OGB."""
    return (folder / "raw").is_dir()


def stream(folder: Path, split: str | None = None) -> EdgeStream:
    """The edges and tables of a data set. `split` names a folder under split/; needed where there are several."""
    raw = folder / "raw"
    if (raw / "triplet-type-list.csv.gz").exists():
        raise GraphError(
            f"{str(folder)!r} has several kinds of vertices: full-graph training takes one kind of vertex and of edge."
        )
    if (raw / "edge.csv.gz").exists():
        vertices = _vertices(raw / "num-node-list.csv.gz")
        edges = edge_list(raw / "edge.csv.gz", folder.name, vertices)
        tables: dict[str, Callable[[], Iterable[np.ndarray]]] = {}
        if (raw / "node-feat.csv.gz").exists():
            tables["features"] = partial(table, raw / "node-feat.csv.gz", np.float32)
        if (raw / "node-label.csv.gz").exists():
            labels = np.concatenate(list(table(raw / "node-label.csv.gz", np.float64)))
            tables["labels"] = partial(_labels, raw / "node-label.csv.gz", labels)
    elif (raw / "data.npz").exists():
        edges, tables = _binary(folder, raw)
        vertices = edges.vertices
    else:
        raise GraphError(
            f"{str(raw)!r} has neither edge.csv.gz nor data.npz: it is no data set of OGB's as it is downloaded."
        )
    assert vertices is not None
    tables |= {ours: partial(_one, mask) for ours, mask in _masks(folder, split, vertices).items()}
    return EdgeStream(edges.pieces, vertices, edges.edges, tables, folder.name)


def _one(array: np.ndarray) -> Iterable[np.ndarray]:
    return [array]


def _vertices(path: Path) -> int:
    if not path.exists():
        raise GraphError(
            f"There is no {str(path)!r}, which says how many vertices there are: it is no whole data set of OGB's."
        )
    counts = np.concatenate(list(table(path, np.int64))).ravel()
    if len(counts) != 1:
        raise GraphError(
            f"{str(path)!r} lists {len(counts):,} graphs: full-graph training takes one (a node-property set)."
        )
    return int(counts[0])


def _labels(path: Path, labels: np.ndarray) -> Iterable[np.ndarray]:
    if labels.ndim == 2 and labels.shape[1] != 1:
        raise GraphError(
            f"{str(path)!r} has {labels.shape[1]} labels of every vertex: full-graph training takes one class for each."
        )
    return [as_labels(labels)]


def _binary(
    folder: Path, raw: Path
) -> tuple[EdgeStream, dict[str, Callable[[], Iterable[np.ndarray]]]]:
    """The edges and tables of a large set."""
    arrays = read_arrays(raw / "data.npz")
    if not {"edge_index", "num_nodes_list"} <= set(arrays):
        raise GraphError(
            f"{str(raw / 'data.npz')!r} has the arrays {', '.join(sorted(arrays))}: edge_index and num_nodes_list are needed."
        )
    if arrays["num_nodes_list"].size != 1:
        raise GraphError(
            f"{str(folder)!r} holds {arrays['num_nodes_list'].size:,} graphs: full-graph training takes one (a node-property set)."
        )
    source, target = arrays["edge_index"]

    def pieces() -> Iterable[Piece]:
        for start in range(0, len(source), PIECE):
            yield source[start : start + PIECE], target[start : start + PIECE], None

    tables: dict[str, Callable[[], Iterable[np.ndarray]]] = {}
    if "node_feat" in arrays:
        tables["features"] = partial(_one, arrays["node_feat"])
    if (raw / "node-label.npz").exists():
        tables["labels"] = partial(
            _labels,
            raw / "node-label.npz",
            next(iter(read_arrays(raw / "node-label.npz").values())),
        )
    return EdgeStream(
        lambda: iter(pieces()), int(arrays["num_nodes_list"].reshape(-1)[0]), len(source)
    ), tables


def _masks(folder: Path, split: str | None, vertices: int) -> dict[str, np.ndarray]:
    """The masks of a split; none where there is none."""
    schemes = sorted(p.name for p in (folder / "split").glob("*") if p.is_dir())
    if not schemes:
        return {}
    if split is None and len(schemes) > 1:
        raise GraphError(f"{str(folder)!r} has the splits {', '.join(schemes)}: name one.")
    chosen = split or schemes[0]
    if chosen not in schemes:
        raise GraphError(f"{str(folder)!r} has no split {chosen!r}: it has {', '.join(schemes)}.")
    masks = {}
    for ours, theirs in SPLITS.items():
        path = next(
            (
                p
                for p in (folder / "split" / chosen / f"{theirs}.csv{end}" for end in (".gz", ""))
                if p.exists()
            ),
            None,
        )
        if path is None:
            pickled = (folder / "split" / chosen / "split_dict.pt").exists()
            raise GraphError(
                f"{str(folder / 'split' / chosen)!r} has no {theirs}.csv.gz{', only a pickle, and nothing is unpickled' if pickled else ''}."
            )
        lists = np.concatenate([np.zeros((0, 1), np.int64), *table(path, np.int64)])
        try:
            masks[ours] = as_mask(ours, lists[:, 0], vertices)
        except GraphError as error:
            raise GraphError(f"{str(path)!r}: {error}") from None
    return masks

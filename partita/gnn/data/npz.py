"""Graphs in .npz files: Partita's own arrays, and Planetoid's public splits.

| layout | arrays |
|---|---|
| Partita | offsets, sources, and the tables and weights that the graph has, as in `Graph` |
| Planetoid | source, target, label; train, validation, test as lists of vertices |
| Planetoid's features (CSR) | feature_data, feature_indices, feature_indptr, feature_shape |

Nothing is unpickled. The arrays are in memory; a .lux file is mapped instead.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from partita.errors import GraphError
from partita.gnn.data.arrays import ARRAYS, MASKS
from partita.gnn.data.drafts import open_drafts
from partita.gnn.data.graph import Graph, check

CSR = ("feature_data", "feature_indices", "feature_indptr")
"""Arrays of Planetoid's features, beside feature_shape."""


def open_npz(path: Path) -> Graph:
    """The graph of an .npz file, checked."""
    arrays = read_arrays(path)
    if "offsets" in arrays and "sources" in arrays:
        fields = {name: arrays[name] for name in ARRAYS if name in arrays}
        return check(Graph(**fields, name=path.stem))
    if "source" in arrays and "target" in arrays:
        return _planetoid(path, arrays)
    names = ", ".join(sorted(arrays)) or "none"
    raise GraphError(
        f"{str(path)!r} has the arrays {names}: a graph needs source and target (Planetoid), or "
        "offsets "
        "and sources (Partita)."
    )


def _planetoid(path: Path, arrays: Mapping[str, np.ndarray]) -> Graph:
    tables: dict[str, Any] = {name: arrays[name] for name in MASKS if name in arrays}
    if all(name in arrays for name in (*CSR, "feature_shape")):
        tables["features"] = _csr_features(path, arrays)
    try:
        return Graph.from_edges(
            arrays["source"],
            arrays["target"],
            labels=arrays.get("label"),
            name=path.stem,
            **tables,
        )
    except GraphError as error:
        raise GraphError(f"{str(path)!r}: {error}") from None


def _csr_features(path: Path, arrays: Mapping[str, np.ndarray]) -> Any:
    parts = tuple(arrays[name] for name in CSR)
    try:
        features = scipy.sparse.csr_array(parts, shape=tuple(arrays["feature_shape"]))
        # without the check SciPy may write beyond its arrays
        features.check_format(full_check=True)
    except ValueError as error:
        raise GraphError(f"{str(path)!r}: The features are no CSR matrix: {error}.") from None
    return features


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; GraphError for another or a truncated file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it holds one array, not several")
            return {name: file[name] for name in file.files}
    except (
        ValueError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        KeyError,
        NotImplementedError,
    ) as error:
        reason = str(error).rstrip(".")
    if "pickle" in reason.lower():
        raise GraphError(
            f"{str(path)!r} holds Python objects or is no .npz file: save plain arrays with "
            "numpy.savez."
        )
    raise GraphError(f"{str(path)!r} is truncated or no .npz file: {reason}.")


def save_npz(graph: Graph, path: Path) -> None:
    """Writes a graph to an .npz file, which gets its name when it is complete."""
    check(graph)
    fields = {name: getattr(graph, name) for name in ARRAYS}
    arrays = {name: array for name, array in fields.items() if array is not None}
    size = sum(array.nbytes for array in arrays.values())
    with open_drafts(path, size) as drafts, drafts.open(path) as file:
        np.savez(file, **arrays)

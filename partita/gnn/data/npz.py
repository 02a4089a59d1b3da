"""Graphs in .npz files: our own, and Planetoid's public splits as they are commonly handed on.

| whose | arrays |
|---|---|
| Partita's | offsets, sources, and of features, labels, train, validation, test, weights those that there are, as in `Graph` |
| Planetoid's | source, target, label, train, validation, test (lists of vertices), feature_data, feature_indices, feature_indptr, feature_shape (CSR) |

Nothing is unpickled. The arrays are in memory; a .lux file is mapped instead.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from partita.errors import GraphError
from partita.gnn.data.arrays import TABLES
from partita.gnn.data.drafts import drafts
from partita.gnn.data.graph import Graph, check

OURS = ("offsets", "sources", *TABLES, "weights")
CSR = ("feature_data", "feature_indices", "feature_indptr", "feature_shape")


def open_npz(path: Path) -> Graph:
    """The graph of an .npz file, checked."""
    arrays = read_arrays(path)
    if "offsets" in arrays and "sources" in arrays:
        return check(
            Graph(**{what: arrays[what] for what in OURS if what in arrays}, name=path.stem)
        )
    if "source" in arrays and "target" in arrays:
        tables: dict[str, Any] = {
            what: arrays[what] for what in ("train", "validation", "test") if what in arrays
        }
        if all(name in arrays for name in CSR):
            try:
                features = scipy.sparse.csr_array(
                    tuple(arrays[name] for name in CSR[:3]), shape=tuple(arrays["feature_shape"])
                )
                features.check_format(full_check=True)  # SciPy writes beyond its arrays otherwise
                tables["features"] = features
            except ValueError as error:
                raise GraphError(
                    f"{str(path)!r}: the features are no CSR matrix: {error}."
                ) from None
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
    raise GraphError(
        f"{str(path)!r} has the arrays {', '.join(sorted(arrays)) or 'none'}: a graph has source and target (Planetoid's layout), or offsets and sources."
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; GraphError if it is none or was cut off."""
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
        if "pickle" in str(error).lower():
            raise GraphError(
                f"{str(path)!r} holds Python objects or is no .npz file: only plain arrays are read. Save it anew with numpy.savez."
            ) from None
        raise GraphError(
            f"{str(path)!r} is truncated or no .npz file: {str(error).rstrip('.')}."
        ) from None


def save_npz(graph: Graph, path: Path) -> None:
    """Writes a graph to an .npz file, which gets its name when it is whole."""
    check(graph)
    arrays = {what: array for what in OURS if (array := getattr(graph, what)) is not None}
    with (
        drafts(path, sum(array.nbytes for array in arrays.values())) as made,
        made.open(path) as file,
    ):
        np.savez(file, **arrays)

"""Graphs in .npz files: Partita's own arrays, and Planetoid's public splits.

| layout | arrays |
|---|---|
| Partita | offsets, sources, and the tables and weights that the graph has, as in `Graph` |
| Planetoid | source, target, label; train, validation, test as lists of vertices |
| Planetoid's features (CSR) | feature_data, feature_indices, feature_indptr, feature_shape |

Nothing is unpickled. The arrays are in memory; a .lux file is mapped instead.
"""

from __future__ import annotations

import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.format as npy
import scipy.sparse

from partita.errors import GraphError
from partita.files.reading import short_reason
from partita.gnn.data.arrays import ARRAYS, MASKS
from partita.gnn.data.drafts import open_drafts
from partita.gnn.data.graph import Graph, check

MOST_RATIO = 1100
"""Bytes that one compressed byte can become (deflate: 1,032)."""
HEADER_BYTES = 2**16
"""Bytes of the longest header of an array."""
MOST_FEATURES = 2**34
"""Elements of the largest feature table that is made dense."""
DIMS = {"features": (2,), "labels": (1, 2), "edge_features": (2,)}
"""Numbers of dims of arrays that are not plain lists."""
END_OF_ARCHIVE = b"PK\x05\x06"
"""Signature of the record at the end of a zip archive; 6 bytes later is the number of entries."""
MOST_END_BYTES = 22 + 2**16
"""Bytes of that record with the longest comment."""
MANY_ENTRIES = 2**16 - 1
"""Recorded in place of larger numbers of entries."""
CSR = ("feature_data", "feature_indices", "feature_indptr")
"""Arrays of Planetoid's features, beside feature_shape."""


def open_npz(path: Path) -> Graph:
    """The graph of an .npz file, checked."""
    arrays = read_arrays(path)
    if "offsets" in arrays and "sources" in arrays:
        fields = {name: arrays[name] for name in ARRAYS if name in arrays}
        _check_dims(path, fields)
        try:
            return check(Graph(**fields, name=path.stem))
        except GraphError as error:
            raise GraphError(f"{str(path)!r}: {error}") from None
    if "source" in arrays and "target" in arrays:
        return _planetoid(path, arrays)
    names = ", ".join(sorted(arrays)) or "none"
    raise GraphError(
        f"{str(path)!r} has the arrays {names}: a graph needs source and target (Planetoid), or "
        "offsets and sources (Partita)."
    )


def _check_dims(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """GraphError for an array with a number of dims that its field does not have."""
    for name, array in arrays.items():
        dims = DIMS.get(name, (1,))
        if array.ndim not in dims:
            possible = " or ".join(map(str, dims))
            raise GraphError(
                f"{str(path)!r}: {name} is {array.dtype} {list(array.shape)}: give {possible} "
                f"dim{'s' if dims != (1,) else ''}."
            )


def _planetoid(path: Path, arrays: Mapping[str, np.ndarray]) -> Graph:
    tables: dict[str, Any] = {name: arrays[name] for name in MASKS if name in arrays}
    if all(name in arrays for name in (*CSR, "feature_shape")):
        tables["features"] = _csr_features(path, arrays)
    try:
        return Graph.from_edges(
            arrays["source"], arrays["target"], labels=arrays.get("label"), name=path.stem, **tables
        )
    except GraphError as error:
        raise GraphError(f"{str(path)!r}: {error}") from None


def _csr_features(path: Path, arrays: Mapping[str, np.ndarray]) -> Any:
    parts = tuple(arrays[name] for name in CSR)
    shape = arrays["feature_shape"]
    if shape.shape != (2,) or shape.dtype.kind not in "iu" or shape.min() < 0:
        raise GraphError(f"{str(path)!r}: feature_shape is no pair of sizes: give rows, columns.")
    if int(shape[0]) * int(shape[1]) > MOST_FEATURES:
        raise GraphError(
            f"{str(path)!r}: feature_shape is {int(shape[0]):,} x {int(shape[1]):,}: use at most "
            f"{MOST_FEATURES:,} features in all, or a .lux file."
        )
    try:
        features = scipy.sparse.csr_array(parts, shape=(int(shape[0]), int(shape[1])))
        # without the check SciPy may write beyond its arrays
        features.check_format(full_check=True)
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise GraphError(f"{str(path)!r}: The features are no CSR matrix: {error}.") from None
    return features


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; GraphError for another, a truncated or a damaged file.

    Headers are compared with the file before anything is allocated.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            arrays = {}
            _check_count(path, len(archive.infolist()))
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"the array {name!r} occurs twice")
                arrays[name] = _read_array(archive, entry)
            return arrays
    except OSError as error:
        reason = error.strerror or str(error)
    except (
        ValueError,
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        KeyError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        reason = short_reason(str(error)) or type(error).__name__
    raise GraphError(
        f"{str(path)!r} is truncated or no .npz file: {reason}. Save plain arrays with numpy.savez."
    )


def _check_count(path: Path, count: int) -> None:
    """ValueError unless a zip archive has as many entries as its end records.

    `zipfile` does not compare them: a damaged entry can hide the next one.
    """
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - MOST_END_BYTES))
        end = file.read().rpartition(END_OF_ARCHIVE)[2]
    recorded = int.from_bytes(end[6:8], "little")
    if recorded not in (count, MANY_ENTRIES):
        raise ValueError(f"it has {count} of {recorded} arrays")


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """An array of an archive; ValueError if its header is wrong or contradicts the size."""
    if entry.file_size > MOST_RATIO * entry.compress_size + HEADER_BYTES:
        raise ValueError(f"{entry.filename!r} claims {entry.file_size:,} bytes")
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename!r} has the unknown version {version}")
        read_header = npy.read_array_header_1_0 if version[0] == 1 else npy.read_array_header_2_0
        shape, _, dtype = read_header(file)
    if dtype.kind not in "biuf":
        raise ValueError(f"{entry.filename!r} holds {dtype} and no plain numbers")
    count = math.prod(int(size) for size in shape)
    if len(shape) > 8 or any(size < 0 for size in shape):
        raise ValueError(f"{entry.filename!r} has the shape {shape}")
    if not 0 <= entry.file_size - count * dtype.itemsize <= HEADER_BYTES:
        claimed = f"{count * dtype.itemsize:,} bytes of numbers in {entry.file_size:,}"
        raise ValueError(f"{entry.filename!r} claims {claimed}")
    with archive.open(entry) as file:
        array: np.ndarray = npy.read_array(file, allow_pickle=False)
        # Read to the end, so that the checksum is compared.
        if file.read(1):
            raise ValueError(f"{entry.filename!r} is longer than its header says")
    return array


def save_npz(graph: Graph, path: Path) -> None:
    """Writes a graph to an .npz file, which gets its name when it is complete."""
    check(graph)
    fields = {name: getattr(graph, name) for name in ARRAYS}
    arrays = {name: array for name, array in fields.items() if array is not None}
    size = sum(array.nbytes for array in arrays.values())
    with open_drafts(path, size) as drafts, drafts.open(path) as file:
        np.savez(file, **arrays)

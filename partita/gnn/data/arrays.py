"""User input as arrays of a graph's number types: ids, weights, features, labels, masks.

GraphError names the first bad entry. Lists, NumPy arrays and PyTorch tensors are accepted. Nothing
here knows `Graph`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from partita.errors import GraphError
from partita.files.reading import short_reason
from partita.gnn.data.csr import NARROW
from partita.units import is_whole_number

TABLES: dict[str, type[np.generic]] = {
    "features": np.float32,
    "labels": np.int32,
    "train": np.bool_,
    "validation": np.bool_,
    "test": np.bool_,
    "members": np.int32,
}
"""Fields of a graph with one row per vertex, and their number types."""

MASKS = ("train", "validation", "test")
"""The tables that are masks."""


ARRAYS = ("offsets", "sources", *TABLES, "weights", "edge_features")
"""Fields of a graph that are arrays."""


class VertexTables(TypedDict, total=False):
    """Tables of the vertices as a user gives them.

    features    numbers [vertices, F], also a SciPy sparse matrix
    labels      classes, integers [vertices], -1 for no label; or targets, numbers
                [vertices] with fractions or [vertices, n], NaN for no target
    train, validation, test     bool [vertices], or a list of vertices
    members     integers [vertices] from 0: the graph of a batch that each vertex belongs to
    """

    features: Any
    labels: Any
    train: Any
    validation: Any
    test: Any
    members: Any


def as_array(values: Any) -> Any:
    """NumPy array of a list, an array or a PyTorch tensor on any device, also a sparse one; None
    stays None."""
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise GraphError("An array has masked entries: give it with numbers, array.filled(0).")
    if values is None or isinstance(values, np.ndarray):
        return values
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if str(getattr(values, "layout", "")).startswith("torch.sparse"):
            values = values.to_dense()
        if str(getattr(values, "dtype", "")) == "torch.bfloat16":  # NumPy has no such type
            values = values.float()
        values = values.numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        reason = short_reason(str(error))
        raise GraphError(f"A list is no array: {reason}. Give rows of one length.") from error


def as_ids(name: str, values: Any) -> np.ndarray:
    """Vertex ids, an integer array [n]; GraphError for anything else."""
    ids = np.asarray(as_array(values))
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise GraphError(f"{name} is {ids.dtype} {list(ids.shape)}: give a list of integers.")
    return ids


def as_count(name: str, value: Any, least: int, fix: str = "") -> int:
    """A whole number of at least `least`; GraphError, with another `fix` if given, for others.

    >>> as_count("epochs", np.int32(3), 0)
    3
    """
    if not is_whole_number(value, least):
        fix = fix or f"give a whole number of at least {least}"
        raise GraphError(f"{name}={short_reason(repr(value))} is out of range: {fix}.")
    return int(value)


def as_weights(values: Any, edges: int) -> np.ndarray | None:
    """Weights [edges] in their own number type; GraphError for another number of them."""
    if values is None:
        return None
    weights = as_array(values)
    if weights.dtype.kind not in "fiub" or weights.shape[1:] not in ((), (1,)):
        raise GraphError(
            f"weights is {weights.dtype} {list(weights.shape)}: give one number per edge."
        )
    weights = weights.reshape(-1)
    if weights.dtype in (np.float16, np.longdouble):  # numba has no such numbers
        weights = weights.astype(np.float32)
    if len(weights) != edges:
        raise GraphError(
            f"weights has {len(weights):,} entries for {edges:,} edges: give one per edge, in the "
            "order of the edges."
        )
    return weights


def as_edge_features(values: Any, edges: int) -> np.ndarray | None:
    """Numbers [edges, D] as they are given; GraphError for another shape."""
    if values is None:
        return None
    features = as_array(values)
    if features.ndim != 2 or len(features) != edges or features.dtype.kind not in "fiub":
        raise GraphError(
            f"edge_features is {features.dtype} {list(features.shape)}: give numbers [{edges}, "
            "features], one row per edge, in the order of the edges."
        )
    return features


def as_tables(tables: Mapping[str, Any], vertices: int) -> dict[str, np.ndarray]:
    """The tables that are given, each in its number type (`TABLES`).

    >>> as_tables({"train": [1], "labels": None}, 2)
    {'train': array([False,  True])}
    """
    arrays = {}
    for name, values in tables.items():
        if name not in TABLES:
            raise TypeError(f"{name!r} is an unknown table: use {', '.join(TABLES)}.")
        if values is not None:
            arrays[name] = _as_table(name, values, vertices)
    return arrays


def _as_table(name: str, values: Any, vertices: int) -> np.ndarray:
    if name == "features":
        return as_features(values)
    if name == "labels":
        return as_labels(as_array(values))
    if name == "members":
        members = as_ids(name, values)
        if members.max(initial=0) >= NARROW:
            raise GraphError(f"members has {members.max():,}: number graphs from 0 without gaps.")
        return members.astype(np.int32)
    return as_mask(name, as_array(values), vertices)


def as_features(values: Any) -> np.ndarray:
    """float32 [vertices, F] of an array or a SciPy sparse matrix."""
    features = values.toarray() if hasattr(values, "toarray") else as_array(values)
    if features.ndim != 2 or features.dtype.kind not in "fiub":
        raise GraphError(
            f"features is {features.dtype} {list(features.shape)}: give numbers [vertices, "
            "features]."
        )
    return np.ascontiguousarray(features, np.float32)


def as_mask(name: str, values: np.ndarray, vertices: int) -> np.ndarray:
    """bool [vertices] of a mask or of a list of vertices."""
    if values.size and values.dtype.kind not in "biu" or values.ndim != 1:
        raise GraphError(
            f"{name} is {values.dtype} {list(values.shape)}: give one bool per vertex, or a list "
            "of vertices."
        )
    if values.dtype == np.bool_ or _is_byte_mask(values, vertices):
        return values.astype(np.bool_, copy=False)
    if len(values) == vertices > 2 and values.min() >= 0 and values.max() <= 1:
        raise GraphError(
            f"{name} has a 0 or 1 for every vertex: give bools, mask.astype(bool), or the numbers "
            "of the marked vertices."
        )
    outside = (values < 0) | (values >= vertices)
    if outside.any():
        vertex = values[np.argmax(outside)]
        raise GraphError(
            f"{name} lists vertex {vertex:,} of {vertices:,} vertices: use ids from 0 to "
            f"{vertices - 1:,}."
        )
    mask = np.zeros(vertices, np.bool_)
    mask[values.astype(np.int64)] = True
    return mask


def _is_byte_mask(values: np.ndarray, vertices: int) -> bool:
    """Whether values are a mask stored as bytes, 0 or 1, as DGL stores it."""
    if values.dtype != np.uint8 or len(values) != vertices:
        return False
    return bool(values.max(initial=0) <= 1)


def as_labels(values: np.ndarray) -> np.ndarray:
    """Classes, int32 [vertices], or targets, float32 [vertices, n].

    Integers, or floats without fractions that are not below -1, [vertices] or [vertices, 1] are
    classes. NaN, which OGB's papers100M uses, is no label: -1. Other floats and several numbers per
    vertex are targets.
    """
    if values.ndim not in (1, 2) or values.dtype.kind not in "iufb" or 0 in values.shape[1:]:
        raise GraphError(
            f"labels is {values.dtype} {list(values.shape)}: give one integer per vertex, or "
            "numbers [vertices, n] to predict."
        )
    if values.ndim == 2 and values.shape[1] > 1:
        return np.ascontiguousarray(values, np.float32)
    values = values.reshape(-1)
    if values.dtype.kind == "f":
        if _are_no_classes(values):
            return values.astype(np.float32).reshape(-1, 1)
        values = np.where(np.isnan(values), -1, values)
    if len(values) and (values.max() >= NARROW or values.min() < -NARROW):
        v = int(np.argmax((values >= NARROW) | (values < -NARROW)))
        raise GraphError(
            f"Label {values[v]} of vertex {v:,} is out of range: use 0 to {NARROW - 1:,}, or -1 "
            "for no label."
        )
    return values.astype(np.int32)


def _are_no_classes(values: np.ndarray) -> bool:
    """Whether some number is no integer or below -1; infinities count, NaN does not."""
    given = values[~np.isnan(values)]
    return bool((~np.isfinite(given) | (given != np.floor(given)) | (given < -1)).any())


def vertex_count(source: np.ndarray, target: np.ndarray, tables: Mapping[str, Any]) -> int:
    """Number of vertices: the rows of features or labels, or else the largest id plus one."""
    for name in ("features", "labels"):
        table = tables.get(name)
        if table is not None:
            return int(table.shape[0]) if hasattr(table, "shape") else len(table)
    if not len(source):
        raise GraphError("The number of vertices is unknown without edges: give vertices=.")
    largest = max(int(source.max()), int(target.max()))
    check_plausible(largest, len(source))
    return largest + 1


def check_plausible(largest: int, edges: int) -> None:
    """GraphError for a huge largest id beside few edges, which would take all memory.

    Such ids are numbers of something else.
    """
    if largest >= 2**28 and largest > 256 * edges:
        raise GraphError(
            f"The largest id is {largest:,} for {edges:,} edges: number the vertices from 0 "
            "without gaps, or give vertices=."
        )


def check_ids(source: np.ndarray, target: np.ndarray, vertices: int, position: int = 0) -> None:
    """GraphError for the first edge with an end outside the vertices.

    `position` is the position of the first of these edges among all.
    """
    first_bad = []
    for ids in (source, target):
        if len(ids) and (ids.min() < 0 or ids.max() >= vertices):
            first_bad.append(int(np.argmax((ids < 0) | (ids >= vertices))))
    if first_bad:
        i = min(first_bad)
        raise GraphError(
            f"Edge {position + i:,} from {source[i]:,} to {target[i]:,} is outside the "
            f"{vertices:,} vertices: use ids from 0 to {vertices - 1:,}."
        )

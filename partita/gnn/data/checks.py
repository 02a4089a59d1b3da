"""Checks of a graph's arrays, which later stages rely on; `graph.check` runs them all on a graph.

Each check raises GraphError for the first bad entry. They read everything once, in pieces: a few
MiB of memory beside the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import MASKS, TABLES
from partita.gnn.data.csr import Transposed, id_type

PIECE = 2**22
"""Numbers of a table that are checked or written at a time, which bounds the memory."""


def pieces_of(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """An array in pieces of some rows, each with the number of its first row."""
    row_size = max(1, int(np.prod(array.shape[1:])))
    rows = max(1, PIECE // row_size)
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def _first(table: np.ndarray, is_bad: Callable[[np.ndarray], np.ndarray]) -> tuple[int, ...] | None:
    """The position of the first entry that `is_bad` marks, bool of a piece's shape; or None."""
    for start, piece in pieces_of(table):
        bad = is_bad(piece)
        if bad.any():
            row, *columns = np.unravel_index(np.argmax(bad), bad.shape)
            return (start + int(row), *map(int, columns))
    return None


def _is_not_finite(numbers: np.ndarray) -> np.ndarray:
    return ~np.isfinite(numbers)


def check_edges(offsets: np.ndarray, sources: np.ndarray) -> None:
    """Offsets int64 from 0, never decreasing, up to the number of edges; sources in range."""
    vertices = len(offsets) - 1
    if vertices < 0 or offsets.dtype != np.int64:
        raise GraphError(
            f"offsets is {offsets.dtype} {list(offsets.shape)}: use int64 [vertices + 1]."
        )
    if vertices == 0:
        raise GraphError("The graph has no vertices: give edges, or vertices=.")
    if sources.dtype != id_type(vertices):
        raise GraphError(
            f"sources is {sources.dtype}: use {np.dtype(id_type(vertices))} for {vertices:,} "
            "vertices."
        )
    if offsets[0] != 0:
        raise GraphError(f"The first offset is {offsets[0]:,}: it must be 0.")
    decreasing = np.diff(offsets) < 0
    if decreasing.any():
        v = int(np.argmax(decreasing))
        raise GraphError(
            f"offsets fall from {offsets[v]:,} to {offsets[v + 1]:,} at vertex {v:,}: they must "
            "not decrease."
        )
    if offsets[-1] != len(sources):
        raise GraphError(
            f"The last offset is {offsets[-1]:,} for {len(sources):,} sources: they must be equal."
        )
    _check_sources(offsets, sources)


def _check_sources(offsets: np.ndarray, sources: np.ndarray) -> None:
    vertices = len(offsets) - 1
    if not len(sources) or (sources.min() >= 0 and sources.max() < vertices):
        return
    bad = _first(sources, lambda ids: (ids < 0) | (ids >= vertices))
    assert bad is not None
    v = int(np.searchsorted(offsets, bad[0], "right")) - 1
    raise GraphError(
        f"Edge {bad[0]:,} into vertex {v:,} comes from vertex {sources[bad]:,}: use ids from 0 to "
        f"{vertices - 1:,}."
    )


def check_weights(weights: np.ndarray, edges: int) -> None:
    """Weights float32 [edges], finite."""
    if weights.shape != (edges,) or weights.dtype != np.float32:
        raise GraphError(
            f"weights is {weights.dtype} {list(weights.shape)}: use float32 [{edges}], one per "
            "edge."
        )
    bad = _first(weights, _is_not_finite)
    if bad is not None:
        raise GraphError(f"The weight of edge {bad[0]:,} is {weights[bad]}: use finite weights.")


def check_edge_features(features: np.ndarray, edges: int) -> None:
    """Edge features float32 [edges, D], finite."""
    shape = features.shape
    if len(shape) != 2 or shape[0] != edges or not shape[1] or features.dtype != np.float32:
        raise GraphError(
            f"edge_features is {features.dtype} {list(shape)}: use float32 [{edges}, features], "
            "one row per edge."
        )
    bad = _first(features, _is_not_finite)
    if bad is not None:
        raise GraphError(
            f"Feature {bad[1]:,} of edge {bad[0]:,} is {features[bad]}: use finite numbers."
        )


def check_transpose(transposed: Transposed, vertices: int, edges: int) -> None:
    """A transpose read from a file: valid by itself, and of the graph's size."""
    try:
        check_edges(transposed.offsets, transposed.destinations)
    except GraphError as error:
        raise GraphError(f"In the transpose: {error}") from None
    order = transposed.order
    assert order is not None, "a transpose in files has its order"
    same_size = (
        len(transposed.offsets) == vertices + 1
        and len(transposed.destinations) == edges
        and len(order) == edges
    )
    in_range = not len(order) or (order.min() >= 0 and order.max() < edges)
    if not same_size or not in_range:
        raise GraphError(
            "The transpose belongs to another graph: delete its files and transpose again."
        )


def check_tables(tables: Mapping[str, np.ndarray | None], vertices: int) -> None:
    """Tables of their types, one row per vertex; finite features, valid labels, labelled masks."""
    for name, table in tables.items():
        if table is not None:
            _check_shape(name, table, vertices)
    features = tables["features"]
    if features is not None:
        if not features.shape[1]:
            raise GraphError("features has no columns: give at least one, or no features.")
        _check_finite(features)
    labels = tables["labels"]
    if labels is not None and labels.ndim == 2:
        _check_targets(labels)
    elif labels is not None and len(labels) and labels.min() < -1:
        v = int(np.argmax(labels < -1))
        raise GraphError(
            f"Label {labels[v]} of vertex {v:,} is negative: use 0, 1, ..., or -1 for no label."
        )
    members = tables["members"]
    if members is not None:
        _check_members(members)
    train = tables["train"]
    if train is not None and not train.any():
        raise GraphError("The training mask is empty: mark vertices to train on, or omit the mask.")
    for name in MASKS:
        _check_labelled(name, tables[name], labels)


def _check_shape(name: str, table: np.ndarray, vertices: int) -> None:
    if name == "labels" and table.dtype == np.float32:
        if table.ndim != 2 or not table.shape[1]:
            raise GraphError(
                f"labels is float32 {list(table.shape)}: use int32 [vertices] for classes, or "
                "float32 [vertices, n] for targets."
            )
        return _check_rows(name, table, vertices)
    dims = 2 if name == "features" else 1
    if table.ndim != dims or table.dtype != TABLES[name]:
        shape = "[vertices, features]" if name == "features" else "[vertices]"
        raise GraphError(
            f"{name} is {table.dtype} {list(table.shape)}: use {np.dtype(TABLES[name])} {shape}."
        )
    _check_rows(name, table, vertices)


def _check_rows(name: str, table: np.ndarray, vertices: int) -> None:
    if len(table) != vertices:
        raise GraphError(
            f"{name} has {len(table):,} rows for {vertices:,} vertices: give one per vertex."
        )


def _check_members(members: np.ndarray) -> None:
    """Numbers of graphs from 0, every one of which has a vertex."""
    if members.min(initial=0) < 0:
        v = int(np.argmax(members < 0))
        raise GraphError(f"Vertex {v:,} is a member of graph {members[v]}: number graphs from 0.")
    counts = np.bincount(members)
    if (counts == 0).any():
        raise GraphError(
            f"Graph {int(np.argmax(counts == 0)):,} of the batch has no vertex: number graphs "
            "without gaps."
        )


def _check_targets(targets: np.ndarray) -> None:
    """Targets are finite, or NaN where there is none."""
    bad = _first(targets, np.isinf)
    if bad is not None:
        raise GraphError(
            f"Target {bad[1]:,} of vertex {bad[0]:,} is {targets[bad]}: use finite numbers, or NaN "
            "for no target."
        )


def _check_finite(features: np.ndarray) -> None:
    bad = _first(features, _is_not_finite)
    if bad is not None:
        raise GraphError(
            f"Feature {bad[1]:,} of vertex {bad[0]:,} is {features[bad]}: replace it with a finite "
            "number, for example with numpy.nan_to_num."
        )


def _no_label(labels: np.ndarray) -> str:
    """The value that stands for no label."""
    return "NaN" if labels.ndim == 2 else "-1"


def _check_labelled(name: str, mask: np.ndarray | None, labels: np.ndarray | None) -> None:
    """GraphError for a vertex of the mask without a label."""
    if mask is None or labels is None:
        return
    no_label = np.isnan(labels).any(axis=1) if labels.ndim == 2 else labels < 0
    unlabelled = mask & no_label
    if unlabelled.any():
        v = int(np.argmax(unlabelled))
        raise GraphError(
            f"Vertex {v:,} is in the {name} mask and has no label ({_no_label(labels)}): remove it "
            "from the mask, or label it."
        )

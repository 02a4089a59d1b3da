"""Batches of graphs: one graph of all vertices, each a member of one of the graphs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import MASKS, as_array, as_labels, as_mask
from partita.gnn.data.graph import Graph, check

EDGE_TABLES = ("weights", "edge_features")
"""Tables of edges, which all graphs of a batch have, or none."""


def batch(
    graphs: Sequence[Graph],
    *,
    labels: Any = None,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    name: str = "batch",
) -> Graph:
    """The union of graphs, for models with a readout: a label and masks for each graph.

    labels      a class for each graph, or targets, [graphs] or [graphs, n]
    train, validation, test     bool [graphs], or a list of graphs

    Labels and masks of the graphs themselves do not count. In the union the first vertex of a graph
    has its label and masks, so that losses and metrics are over graphs. GraphError names the first
    graph that does not suit the others.

    >>> pair = Graph.from_edges([0, 1], [1, 0], features=[[1.0], [2.0]])
    >>> union = batch([pair, pair, pair], labels=[0, 1, 1], train=[0, 2])
    >>> union
    batch: 3 graphs, 6 vertices, 6 edges, 1 features, 2 classes; 2 of train
    >>> union.members, union.labels
    (array([0, 0, 1, 1, 2, 2], dtype=int32), array([ 0, -1,  1, -1,  1, -1], dtype=int32))
    """
    graphs = list(graphs) if isinstance(graphs, Iterable) else [graphs]
    wrong = [type(graph).__name__ for graph in graphs if not isinstance(graph, Graph)]
    if wrong:
        raise GraphError(f"A batch has a {wrong[0]} among its graphs: give a list of gnn.Graph.")
    if not graphs:
        raise GraphError("A batch of no graphs: give at least one.")
    _check_alike(graphs)
    counts = np.array([graph.vertices for graph in graphs])
    first = np.append(0, np.cumsum(counts))
    edges = np.append(0, np.cumsum([graph.edges for graph in graphs]))
    offsets = [graph.offsets[:-1] + start for graph, start in zip(graphs, edges, strict=False)]
    sources = [graph.sources + start for graph, start in zip(graphs, first, strict=False)]
    arrays: dict[str, Any] = {
        "features": _joined(graphs, "features"),
        "members": np.repeat(np.arange(len(graphs), dtype=np.int32), counts),
    }
    for table in EDGE_TABLES:
        arrays[table] = _joined(graphs, table)
    vertices = int(first[-1])
    if labels is not None:
        arrays["labels"] = _labels_of_first(as_labels(as_array(labels)), first[:-1], vertices)
    for mask, values in zip(MASKS, (train, validation, test), strict=True):
        if values is not None:
            marked = as_mask(mask, as_array(values), len(graphs))
            arrays[mask] = np.zeros(vertices, np.bool_)
            arrays[mask][first[:-1][marked]] = True
    return check(
        Graph(
            np.append(np.concatenate(offsets), edges[-1]),
            np.concatenate(sources).astype(np.int32),
            **arrays,
            name=name,
        )
    )


def _check_alike(graphs: Sequence[Graph]) -> None:
    """GraphError unless all graphs have vertices and the tables of the first one."""
    for i, graph in enumerate(graphs):
        if not graph.vertices:
            raise GraphError(f"Graph {i:,} of the batch has no vertices: leave it out.")
        for table in ("features", *EDGE_TABLES):
            given, expected = (_width(g, table) for g in (graph, graphs[0]))
            if given != expected:
                raise GraphError(
                    f"Graph {i:,} of the batch has {table} of width {given}, and the first one of "
                    f"{expected}: give all graphs the same tables."
                )


def _width(graph: Graph, table: str) -> int:
    """Numbers per row of a table, 0 without it."""
    array = getattr(graph, table)
    return 0 if array is None else int(np.prod(array.shape[1:]))


def _joined(graphs: Sequence[Graph], table: str) -> np.ndarray | None:
    if getattr(graphs[0], table) is None:
        return None
    return np.concatenate([getattr(graph, table) for graph in graphs])


def _labels_of_first(labels: np.ndarray, first: np.ndarray, vertices: int) -> np.ndarray:
    """Labels of graphs at their first vertices; others have none."""
    if len(labels) != len(first):
        raise GraphError(
            f"labels has {len(labels):,} rows for {len(first):,} graphs: give one for each graph."
        )
    if labels.ndim == 1:
        all_labels = np.full(vertices, -1, np.int32)
    else:
        all_labels = np.full((vertices, labels.shape[1]), np.nan, np.float32)
    all_labels[first] = labels
    return all_labels

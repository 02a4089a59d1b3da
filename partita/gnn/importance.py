"""Weights of vertices in the training loss, from weights of classes and of single vertices."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import as_array
from partita.gnn.data.graph import Graph


def importance_of(
    graph: Graph, class_weight: Mapping[int, float] | None, vertex_weight: Any
) -> np.ndarray | None:
    """float32 [vertices]: the product of both weights of each vertex; None without weights.

    A class that is not listed has the weight 1, as in Keras. GraphError for weights that are
    negative, not finite, 0 for all training vertices, or of classes or vertices that the graph does
    not have.

    >>> graph = Graph.from_edges([0], [1], labels=[0, 1])
    >>> importance_of(graph, {1: 3.0}, [1.0, 0.5]).tolist()
    [1.0, 1.5]
    """
    if class_weight is None and vertex_weight is None:
        return None
    importance = np.ones(graph.vertices, np.float32)
    if vertex_weight is not None:
        importance *= _vertex_weights(graph, vertex_weight)
    if class_weight is not None:
        importance *= _class_weights(graph, class_weight)
    trained = graph.train
    if trained is not None and trained.any() and not importance[trained].any():
        weights = {"vertex_weight": vertex_weight, "class_weight": class_weight}
        given = " and ".join(name for name, value in weights.items() if value is not None)
        raise GraphError(
            f"By {given} all {np.count_nonzero(trained):,} training vertices of '{graph.name}' "
            "have the weight 0, so nothing would be trained: give some of them a positive weight."
        )
    return importance


def _vertex_weights(graph: Graph, vertex_weight: Any) -> np.ndarray:
    weights = as_array(vertex_weight)
    if weights.shape != (graph.vertices,) or weights.dtype.kind not in "fiub":
        raise GraphError(
            f"vertex_weight is {weights.dtype} {list(weights.shape)}: give one weight for each of "
            f"the {graph.vertices:,} vertices."
        )
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        vertex = int(np.argmax(bad))
        raise GraphError(
            f"The vertex_weight of vertex {vertex:,} is {weights[vertex]}: use finite weights that "
            "are not negative."
        )
    return weights.astype(np.float32)


def _class_weights(graph: Graph, class_weight: Mapping[int, float]) -> np.ndarray:
    if graph.labels is None or graph.has_targets:
        raise GraphError(
            f"class_weight needs classes, and '{graph.name}' has "
            f"{'targets' if graph.has_targets else 'no labels'}: use vertex_weight."
        )
    if not isinstance(class_weight, Mapping):
        raise GraphError(
            f"class_weight is a {type(class_weight).__name__}: give a dict, such as "
            "{0: 1.0, 1: 3.0}."
        )
    weights = np.ones(graph.classes + 1, np.float32)
    for label, weight in class_weight.items():
        if label not in range(graph.classes):
            raise GraphError(
                f"class_weight has the class {label!r}, and '{graph.name}' has the classes 0 to "
                f"{graph.classes - 1}: remove it."
            )
        if not isinstance(weight, numbers.Real) or not (np.isfinite(weight) and weight >= 0):
            raise GraphError(
                f"The class_weight of class {label} is {weight}: use finite weights that are not "
                "negative."
            )
        weights[label] = weight
    # the weight behind the last class belongs to vertices without a label, -1
    return weights[graph.labels]

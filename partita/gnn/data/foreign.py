"""Graphs of other libraries as arguments of `Graph.from_edges`: SciPy, NetworkX, PyG, DGL.

Objects are read by their attributes; no library is imported. Each function returns a dict with
source, target, vertices, weights, and the vertex tables that the object has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import MASKS, as_array, as_ids

PYG_NAMES = {
    "features": "x",
    "labels": "y",
    "train": "train_mask",
    "validation": "val_mask",
    "test": "test_mask",
}
"""Attributes of a PyG Data."""

DGL_NAMES = PYG_NAMES | {"features": "feat", "labels": "label"}
"""Keys of a DGL graph's ndata."""


def scipy_edges(matrix: Any) -> dict[str, Any]:
    """Edges of a square sparse matrix; its values are the weights unless every value is 1."""
    rows, columns = matrix.shape
    if rows != columns:
        raise GraphError(
            f"The matrix has {rows:,} rows and {columns:,} columns: give a square one, with a row "
            "and a column per vertex."
        )
    entries = matrix.tocoo()
    return {
        "source": entries.row,
        "target": entries.col,
        "vertices": rows,
        "weights": _unless_plain(entries.data),
    }


def _unless_plain(values: np.ndarray) -> np.ndarray | None:
    """Values of a sparse matrix, which are weights unless every value is 1."""
    return None if (values == 1).all() else values


def networkx_edges(graph: Any, weights: str | None, tables: Mapping[str, Any]) -> dict[str, Any]:
    """Edges of a NetworkX graph, and its tables; names of attributes become their values."""
    nodes = list(graph.nodes)
    number = {node: i for i, node in enumerate(nodes)}
    edges = [(number[a], number[b], attributes) for a, b, attributes in graph.edges(data=True)]
    if not graph.is_directed():
        edges += [(b, a, attributes) for a, b, attributes in edges if a != b]
    edge_weights = None if weights is None else _edge_weights(nodes, edges, weights)
    columns = {}
    for name, table in tables.items():
        columns[name] = _node_table(graph, name, table) if isinstance(table, str) else table
    return {
        "source": np.array([a for a, _, _ in edges], np.int64),
        "target": np.array([b for _, b, _ in edges], np.int64),
        "vertices": len(nodes),
        "weights": edge_weights,
        **columns,
    }


def _edge_weights(nodes: list[Any], edges: list[tuple[int, int, Any]], key: str) -> np.ndarray:
    """float32 [edges]: an attribute of every edge of a NetworkX graph."""
    for a, b, attributes in edges:
        if key not in attributes:
            raise GraphError(
                f"The edge from {nodes[a]!r} to {nodes[b]!r} has no attribute {key!r}: give one to "
                "every edge."
            )
    return np.array([attributes[key] for _, _, attributes in edges], np.float32)


def _node_table(graph: Any, name: str, key: str) -> np.ndarray:
    """An attribute of every node of a NetworkX graph, one row per node."""
    for node in graph.nodes:
        if key not in graph.nodes[node]:
            raise GraphError(
                f"Node {node!r} has no attribute {key!r} for {name}={key!r}: give one to every "
                "node."
            )
    return np.array([graph.nodes[node][key] for node in graph.nodes])


def pyg_edges(data: Any) -> dict[str, Any]:
    """Edges of a PyG Data with edge_index or adj_t, and the tables that it has."""
    source, target, weights = _pyg_ends(data)
    tables = {name: as_array(getattr(data, key, None)) for name, key in PYG_NAMES.items()}
    for name in MASKS:
        mask = tables[name]
        if mask is not None and mask.ndim == 2:
            key = PYG_NAMES[name]
            raise GraphError(
                f"{key} has {mask.shape[1]} columns, one per split: choose one, for example "
                f"data.{key} = data.{key}[:, 0]."
            )
    vertices = getattr(data, "num_nodes", None)
    return {
        "source": source,
        "target": target,
        "vertices": None if vertices is None else int(vertices),
        "weights": weights,
        "edge_features": _pyg_edge_features(data),
        **tables,
    }


def _pyg_ends(data: Any) -> tuple[Any, Any, Any]:
    """(source, target, weights or None) of a PyG Data."""
    edge_index: Any = getattr(data, "edge_index", None)
    if edge_index is not None:
        edge_index = as_array(edge_index)
        if edge_index.ndim != 2 or edge_index.shape[0] != 2:
            raise GraphError(
                f"edge_index has shape {list(edge_index.shape)}: give [2, edges], sources above "
                "targets."
            )
        source, target = edge_index
        return source, target, _pyg_weights(data)
    matrix: Any = getattr(data, "adj_t", None)
    if matrix is None:
        raise GraphError(_without_edges(data))
    if hasattr(matrix, "coo"):
        # a SparseTensor of torch_sparse
        target, source, weights = matrix.coo()
    else:
        entries = matrix.to_sparse_coo().coalesce()
        target, source = entries.indices()
        weights = entries.values()
    return source, target, None if weights is None else _unless_plain(as_array(weights))


def _pyg_weights(data: Any) -> Any:
    """A PyG Data's edge_weight, or its edge_attr if that has one number per edge; or None."""
    weights = getattr(data, "edge_weight", None)
    attributes = getattr(data, "edge_attr", None)
    if weights is not None or attributes is None:
        return weights
    attributes = as_array(attributes)
    return attributes if attributes.ndim == 1 or attributes.shape[1] == 1 else None


def _pyg_edge_features(data: Any) -> Any:
    """A PyG Data's edge_attr of several numbers per edge of its edge_index, or None.

    An edge_type becomes a column for each type, as `Graph.from_relations` makes them.
    """
    attributes = as_array(getattr(data, "edge_attr", None))
    types = as_array(getattr(data, "edge_type", None))
    if getattr(data, "edge_index", None) is None:
        return None
    if types is not None:
        return _columns_of_types(types, attributes)
    if attributes is None:
        return None
    return attributes if attributes.ndim == 2 and attributes.shape[1] > 1 else None


def _columns_of_types(types: np.ndarray, attributes: np.ndarray | None) -> np.ndarray:
    """float32 [edges, types]: 1 in the column of an edge's type, 0 in the others."""
    if attributes is not None:
        raise GraphError(
            "The data has edge_type and edge_attr, and edges have one table of features: make one "
            "of them, and set the other one to None."
        )
    numbers = as_ids("edge_type", types)
    if numbers.min(initial=0) < 0:
        raise GraphError(f"edge_type has {numbers.min()}: number the types from 0.")
    return np.eye(int(numbers.max(initial=0)) + 1, dtype=np.float32)[numbers]


def _without_edges(data: Any) -> str:
    problem = f"The {type(data).__name__} has neither edge_index nor adj_t"
    edge_types = getattr(data, "edge_types", None)
    if edge_types:
        problem += f", but the edge types {', '.join(map(str, edge_types))}"
    return f"{problem}: give a Data, for example data.to_homogeneous()."


def dgl_edges(graph: Any, weights: str | None) -> dict[str, Any]:
    """Edges of a homogeneous DGL graph, and the tables that its ndata has."""
    if not getattr(graph, "is_homogeneous", True):
        edge_types = ", ".join(map(str, graph.canonical_etypes))
        raise GraphError(
            f"The DGL graph has the edge types {edge_types}: give a graph of one type, for example "
            "dgl.to_homogeneous(graph)."
        )
    if weights is not None and weights not in graph.edata:
        names = ", ".join(map(repr, graph.edata)) or "nothing"
        raise GraphError(f"The DGL graph has no edge data {weights!r}: its edata has {names}.")
    source, target = graph.edges(order="eid")
    tables = {name: graph.ndata[key] for name, key in DGL_NAMES.items() if key in graph.ndata}
    return {
        "source": source,
        "target": target,
        "vertices": int(graph.num_nodes()),
        "weights": None if weights is None else graph.edata[weights],
        **tables,
    }

"""Full-graph training of graph neural networks: graphs, and models that train on whole graphs.

>>> import partita.gnn as gnn
>>> gnn.Graph.from_edges([0, 1], [1, 0], features=[[1.0], [2.0]])
graph: 2 vertices, 2 edges, 1 features

Models and layers need Keras on JAX. They are imported on first use, so that graphs alone need
neither.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from partita.errors import GraphError
from partita.gnn.data import generate, order
from partita.gnn.data.batch import batch
from partita.gnn.data.csr import Transposed
from partita.gnn.data.files import convert, open, save, transpose
from partita.gnn.data.graph import Graph, check
from partita.gnn.data.links import LinkSplit, split_links, with_pairs
from partita.gnn.data.stream import EdgeStream
from partita.keras_backend import chosen_backend, running_backend

if TYPE_CHECKING:
    from partita.gnn.nn.attention import GATConv, GATv2Conv
    from partita.gnn.nn.isomorphism import GINConv, GINEConv
    from partita.gnn.nn.layers import CommNetConv, GatedGraphConv, GCNConv, SAGEConv
    from partita.gnn.nn.messages import MessagePassing
    from partita.gnn.nn.models import GAT, GCN, GIN, SAGE, CommNet, GatedGraph, GATv2, GraphModel
    from partita.gnn.nn.pyg_weights import load_pyg_state, pyg_state
    from partita.gnn.nn.relations import RelationalConv
    from partita.gnn.nn.vertices import VertexBatchNormalization, VertexDropout
    from partita.gnn.plans import GraphPlan, GraphPlans, plan
    from partita.gnn.train import normalised

__all__ = [
    "GAT",
    "GCN",
    "GIN",
    "SAGE",
    "CommNet",
    "CommNetConv",
    "EdgeStream",
    "GATConv",
    "GATv2",
    "GATv2Conv",
    "GCNConv",
    "GINConv",
    "GINEConv",
    "GatedGraph",
    "GatedGraphConv",
    "Graph",
    "GraphModel",
    "GraphPlan",
    "GraphPlans",
    "LinkSplit",
    "MessagePassing",
    "RelationalConv",
    "SAGEConv",
    "Transposed",
    "VertexBatchNormalization",
    "VertexDropout",
    "batch",
    "check",
    "convert",
    "generate",
    "load_pyg_state",
    "normalised",
    "open",
    "order",
    "plan",
    "pyg_state",
    "save",
    "split_links",
    "transpose",
    "with_pairs",
]

_MODULES = {
    "partita.gnn.nn.attention": "GATConv GATv2Conv",
    "partita.gnn.nn.isomorphism": "GINConv GINEConv",
    "partita.gnn.nn.layers": "CommNetConv GatedGraphConv GCNConv SAGEConv",
    "partita.gnn.nn.messages": "MessagePassing",
    "partita.gnn.nn.models": "GAT GCN GIN SAGE CommNet GatedGraph GATv2 GraphModel",
    "partita.gnn.nn.pyg_weights": "load_pyg_state pyg_state",
    "partita.gnn.nn.relations": "RelationalConv",
    "partita.gnn.nn.vertices": "VertexBatchNormalization VertexDropout",
    "partita.gnn.plans": "GraphPlan GraphPlans plan",
    "partita.gnn.train": "normalised",
}
"""Names that are imported at their first use, by module."""


def require_jax() -> None:
    """GraphError if Keras runs, or would start, on another backend than JAX.

    `import partita` requests JAX, unless the user has chosen a backend.
    """
    backend = running_backend() or chosen_backend()
    if backend not in (None, "jax"):
        raise GraphError(
            f"Keras's backend is {backend!r} and graph networks need 'jax': set KERAS_BACKEND=jax "
            "before Keras is imported."
        )


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            require_jax()
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'partita.gnn' has no attribute {name!r}")

"""Full-graph training of graph neural networks: the graph store, and models that train on whole graphs.

>>> import partita.gnn as gnn
>>> gnn.Graph.from_edges([0, 1], [1, 0], features=[[1.0], [2.0]])
graph: 2 vertices, 2 edges, 1 features

Models and layers need Keras on JAX; they are imported when they are first asked for, so that graphs alone need neither.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from partita.gnn.data import generate, order
from partita.gnn.data.csr import Transposed
from partita.gnn.data.files import convert, open, save, transpose
from partita.gnn.data.graph import Graph, check
from partita.gnn.data.stream import EdgeStream

if TYPE_CHECKING:
    from partita.gnn.nn.layers import (
        CommNetConv,
        GatedGraphConv,
        GATv2Conv,
        GCNConv,
        GINConv,
        SAGEConv,
    )
    from partita.gnn.nn.models import (
        GCN,
        GIN,
        SAGE,
        CommNet,
        GatedGraph,
        GATv2,
        GraphModel,
        VertexDropout,
    )
    from partita.gnn.train import normalised

__all__ = [
    "GCN",
    "GIN",
    "SAGE",
    "CommNet",
    "CommNetConv",
    "EdgeStream",
    "GATv2",
    "GATv2Conv",
    "GCNConv",
    "GINConv",
    "GatedGraph",
    "GatedGraphConv",
    "Graph",
    "GraphModel",
    "SAGEConv",
    "Transposed",
    "check",
    "convert",
    "generate",
    "normalised",
    "open",
    "order",
    "VertexDropout",
    "save",
    "transpose",
]

_LATER = {
    "partita.gnn.nn.layers": (
        "CommNetConv",
        "GATv2Conv",
        "GatedGraphConv",
        "GCNConv",
        "GINConv",
        "SAGEConv",
    ),
    "partita.gnn.nn.models": (
        "GCN",
        "GIN",
        "SAGE",
        "CommNet",
        "GatedGraph",
        "GATv2",
        "GraphModel",
        "VertexDropout",
    ),
    "partita.gnn.train": ("normalised",),
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _LATER.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'partita.gnn' has no attribute {name!r}")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return getattr(importlib.import_module(module), name)

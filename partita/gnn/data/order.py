"""Orders that number vertices near those that are read with them, for `graph.relabelled(order)`.

An aggregation reads rows of features in the order of the sources. An order gains from rows that are
still in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import reverse_cuthill_mckee

from partita.errors import GraphError
from partita.gnn.data.graph import Graph


def by_degree(graph: Graph) -> np.ndarray:
    """int64 [vertices]: vertices with the most out-edges first, so that their rows fill the cache.

    Good for skewed graphs.

    >>> by_degree(Graph.from_edges([2, 2, 1], [0, 1, 2]))
    array([2, 1, 0])
    """
    return np.lexsort((-graph.in_degrees(), -graph.out_degrees()))


def by_neighbours(graph: Graph) -> np.ndarray:
    """int64 [vertices]: neighbours near each other, breadth first from vertices of low degree.

    Good for meshes and road networks. SciPy's reverse Cuthill-McKee (Cuthill and McKee 1969; George
    1971) on the undirected graph, isolated vertices included.

    >>> by_neighbours(Graph.from_edges([0, 3, 1], [3, 1, 2]))
    array([2, 1, 3, 0])
    """
    matrix = scipy.sparse.csr_array(
        (np.ones(graph.edges, np.int8), graph.sources, graph.offsets),
        shape=(graph.vertices, graph.vertices),
    )
    return reverse_cuthill_mckee(matrix.tocsr(), symmetric_mode=False).astype(np.int64)


ORDERS: dict[str, Callable[[Graph], np.ndarray]] = {
    "degree": by_degree,
    "neighbours": by_neighbours,
}
"""Orders by name."""


def order_of(graph: Graph, order: Any) -> np.ndarray:
    """int64 [vertices]: the order with a name, or the order that is given."""
    if not isinstance(order, str):
        return np.asarray(order)
    if order not in ORDERS:
        names = ", ".join(map(repr, ORDERS))
        raise GraphError(f"order={order!r} is unknown: use {names}, or list every vertex once.")
    return ORDERS[order](graph)

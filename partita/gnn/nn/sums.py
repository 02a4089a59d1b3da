"""Sums and maxima over edges with exact gradients: `kernels` with the transpose as backward pass.

`Edges` holds the edges both ways as arrays, so that a graph is an argument of a compiled step and
not a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.errors import GraphError
from partita.gnn.data.csr import Transposed
from partita.gnn.kernels.largest import largest, largest_back
from partita.gnn.kernels.total import targets, total

MAX_EDGES = 2**31 - 1
"""Edges that kernels can number."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edges:
    """Edges from columns to rows, in both directions; all arrays int32.

    offsets, ids    row r has the columns `ids[offsets[r]:offsets[r + 1]]`
    back_offsets, back_ids
                    column c has the rows `back_ids[back_offsets[c]:back_offsets[c + 1]]`, ascending
    back_order      position in `ids` of each edge of `back_ids`; only for edges with weights
    """

    offsets: Any
    ids: Any
    back_offsets: Any
    back_ids: Any
    back_order: Any = None


def edges_of(offsets: np.ndarray, ids: np.ndarray, back: Transposed) -> Edges:
    """Edges in the number types that kernels read."""
    if len(ids) > MAX_EDGES:
        raise GraphError(
            f"{len(ids):,} edges exceed the {MAX_EDGES:,} that one device can have: split the "
            "graph over more devices."
        )
    order = None if back.order is None else _as_int32(back.order)
    return Edges(
        _as_int32(offsets),
        _as_int32(ids),
        _as_int32(back.offsets),
        _as_int32(back.destinations),
        order,
    )


def _as_int32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).astype(np.int32, copy=False)


def edges_by_position(edges: Edges) -> Edges:
    """Edges from the positions 0, 1, ... of edges to their rows; padding leads to no row.

    Sums and maxima of them aggregate one row per edge.
    """
    count = edges.ids.shape[0]
    last_row = edges.offsets.shape[0] - 2
    rows = jnp.minimum(targets(edges.offsets, count), last_row).astype(jnp.int32)
    offsets = jnp.minimum(jnp.arange(count + 1, dtype=jnp.int32), edges.offsets[-1])
    return Edges(edges.offsets, jnp.arange(count, dtype=jnp.int32), offsets, rows)


def taken(edges: Edges, x: Any) -> Any:
    """[edges, features]: the row of x [columns, features] that each edge begins at.

    Padding has the row of the first edge, and no gradient. Functions of rows are finite there as
    they are for edges, so that their gradients, times zero, are zero.
    """
    ids = like_first(edges, edges.ids)
    if edges.back_order is None:
        return x[ids]
    positions = jnp.arange(edges.ids.shape[0] + 1, dtype=jnp.int32)
    return edge_sum(Edges(positions, ids, edges.back_offsets, edges.back_order), x)


def spread(by_edge: Edges, x: Any) -> Any:
    """[edges, features]: the row of x [rows, features] that each edge ends at.

    Padding has the row of the first edge, and no gradient.
    """
    positions = jnp.arange(by_edge.ids.shape[0] + 1, dtype=jnp.int32)
    rows = like_first(by_edge, by_edge.back_ids)
    return edge_sum(Edges(positions, rows, by_edge.offsets, by_edge.ids), x)


def like_first(edges: Edges, values: Any) -> Any:
    """Values [edges, ...] with the first one in the place of padding."""
    is_edge = jnp.arange(edges.ids.shape[0]) < edges.offsets[-1]
    return jnp.where(is_edge.reshape(-1, *[1] * (values.ndim - 1)), values, values[:1])


def edge_sum(edges: Edges, x: Any) -> Any:
    """[rows, features]: the sum of x over the edges of each row."""
    return scaled_sum(edges, None, None, None, x)


@jax.custom_vjp
def scaled_sum(edges: Edges, before: Any, share: Any, after: Any, x: Any) -> Any:
    """[rows, features]: after[v] * (share[v] * y[v] + sum over edges from u of y[u]).

    y is before * x. One pass over the edges. With a share, row v belongs to column v. The factors
    are float32 [rows]; None stands for 1, 0 and 1. They are constants without a gradient.
    """
    return _scaled_total(edges.offsets, edges.ids, before, share, after, x)


def _scaled_total(offsets: Any, ids: Any, before: Any, share: Any, after: Any, x: Any) -> Any:
    if before is None:
        return total(offsets, ids, x, share=share, factor=after)
    scaled_share = None if share is None else share * before
    return total(offsets, ids, x, before, ids, scaled_share, after)


def _scaled_forward(edges: Edges, before: Any, share: Any, after: Any, x: Any) -> Any:
    return scaled_sum(edges, before, share, after, x), (edges, before, share, after)


def _scaled_backward(saved: Any, dy: Any) -> Any:
    edges, before, share, after = saved
    dx = _scaled_total(edges.back_offsets, edges.back_ids, after, share, before, dy)
    return None, None, None, None, dx


scaled_sum.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def weighted_sum(edges: Edges, weights: Any, x: Any) -> Any:
    """[rows, features]: the sum over the edges of each row of x times the edge's weight.

    `weights` is float32 [edges] in the order of `edges.ids`.
    """
    return total(edges.offsets, edges.ids, x, weights)


def _weighted_forward(edges: Edges, weights: Any, x: Any) -> Any:
    return weighted_sum(edges, weights, x), (edges, weights, x)


def _weighted_backward(saved: Any, dy: Any) -> Any:
    edges, weights, x = saved
    to = jnp.minimum(targets(edges.offsets, edges.ids.shape[0]), dy.shape[0] - 1)
    is_edge = jnp.arange(edges.ids.shape[0]) < edges.offsets[-1]
    products = (x[edges.ids] * dy[to]).sum(axis=1)
    # XLA removes it where no caller uses it
    dweights = jnp.where(is_edge, products, 0)
    dx = total(edges.back_offsets, edges.back_ids, dy, weights, edges.back_order)
    return None, dweights, dx


weighted_sum.defvjp(_weighted_forward, _weighted_backward)


@jax.custom_vjp
def edge_max(edges: Edges, x: Any) -> Any:
    """[rows, features]: the maximum of x over the edges of each row, 0 without edges.

    Of equal maxima the first edge has the gradient.
    """
    return largest(edges.offsets, edges.ids, x)[0]


def _max_forward(edges: Edges, x: Any) -> Any:
    top, winner = largest(edges.offsets, edges.ids, x)
    return top, (edges, winner)


def _max_backward(saved: Any, dy: Any) -> Any:
    edges, winner = saved
    return None, largest_back(edges.back_offsets, edges.back_ids, winner, dy)


edge_max.defvjp(_max_forward, _max_backward)

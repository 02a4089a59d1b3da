"""Maxima over in-edges and the source of each, so that the gradient goes to that source alone.

out[v]    = max over edges e into v of x[source[e]], 0 without edges
winner[v] = source of the first e that has the maximum, -1 without edges
dx[u]     = sum over the distinct v that u has edges to of dy[v] where winner[v] = u
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit, prange

from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import (
    answers_metadata,
    argument,
    int_matrix,
    ints,
    matrix,
    parts_of,
    result,
    rows_of,
)
from partita.gnn.kernels.total import targets


@njit(nogil=True, boundscheck=False, cache=True)
def _max_rows(span, offsets, ids, x, out, winner):
    first, stop = span
    columns = x.shape[1]
    for v in range(first, stop):
        for q in range(columns):
            out[v, q] = np.float32(0)
            winner[v, q] = np.int32(-1)
        for e in range(offsets[v], offsets[v + 1]):
            source = ids[e]
            first_edge = e == offsets[v]
            for q in range(columns):
                value = x[source, q]
                better = first_edge or value > out[v, q]
                out[v, q] = value if better else out[v, q]
                winner[v, q] = source if better else winner[v, q]


@njit(nogil=True, boundscheck=False, cache=True)
def _back_rows(span, offsets, ids, winner, dy, dx):
    first, stop = span
    columns = dy.shape[1]
    for u in range(first, stop):
        for q in range(columns):
            dx[u, q] = np.float32(0)
        for k in range(offsets[u], offsets[u + 1]):
            v = ids[k]
            if k > offsets[u] and ids[k - 1] == v:  # repeated edges are side by side
                continue
            for q in range(columns):
                dx[u, q] += dy[v, q] if winner[v, q] == u else np.float32(0)


@njit(nogil=True, inline="always")
def _edges(frame):
    """Arguments 1 and 2 of both: offsets [rows + 1], ids [edges]."""
    return ints(argument(frame, 1)), ints(argument(frame, 2))


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    """Handlers by name; argument 0 is the number of threads, int32 [1]."""

    def maxima(frame):  # type: ignore[no-untyped-def]
        """Argument x [vertices, columns]; results float32 and int32 [rows, columns]."""
        if not answers_metadata(frame, version):
            offsets, ids = _edges(frame)
            x = matrix(argument(frame, 3))
            out, winner = matrix(result(frame, 0)), int_matrix(result(frame, 1))
            parts = parts_of(frame, threaded)
            for part in prange(parts):
                _max_rows(rows_of(offsets, part, parts), offsets, ids, x, out, winner)
        return 0

    def gradients(frame):  # type: ignore[no-untyped-def]
        """Arguments winner, dy [rows, columns]; result [vertices, columns]."""
        if not answers_metadata(frame, version):
            offsets, ids = _edges(frame)
            winner, dy = int_matrix(argument(frame, 3)), matrix(argument(frame, 4))
            dx = matrix(result(frame, 0))
            parts = parts_of(frame, threaded)
            for part in prange(parts):
                _back_rows(rows_of(offsets, part, parts), offsets, ids, winner, dy, dx)
        return 0

    return {"partita_gnn_largest": maxima, "partita_gnn_largest_back": gradients}


def _self_test() -> None:
    """Registers the kernels and tries them on a small graph; AssertionError for a wrong result."""
    bridge.register(_handlers)
    offsets = np.array([0, 2, 2, 5], np.int32)
    ids = np.array([1, 2, 0, 0, 1], np.int32)
    back_offsets = np.array([0, 2, 4, 5], np.int32)
    back_ids = np.array([2, 2, 0, 2, 0], np.int32)
    x = np.array([[1], [3], [2]], np.float32)
    with jax.ensure_compile_time_eval():
        out, winner = _call(offsets, ids, x)
        dx = _call_back(back_offsets, back_ids, winner, x)
    assert np.array_equal(out, [[3], [0], [3]]), "a maximum is wrong"
    assert np.array_equal(winner, [[1], [-1], [1]]), "the source of a maximum is wrong"
    assert np.array_equal(dx, [[0], [3], [0]]), "the gradient of a maximum is wrong"


def _call(offsets: Any, ids: Any, x: Any) -> Any:
    shape = (offsets.shape[0] - 1, x.shape[1])
    results = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32))
    kernel = bridge.kernel("partita_gnn_largest", results)
    return kernel(bridge.thread_argument(), offsets, ids, x)


def _call_back(offsets: Any, ids: Any, winner: Any, dy: Any) -> Any:
    shape = jax.ShapeDtypeStruct((offsets.shape[0] - 1, dy.shape[1]), jnp.float32)
    kernel = bridge.kernel("partita_gnn_largest_back", shape)
    return kernel(bridge.thread_argument(), offsets, ids, winner, dy)


def largest(offsets: Any, ids: Any, x: Any) -> tuple[Any, Any]:
    """Each row's maximum over its edges, and the source of the first edge that has it.

    float32 [rows, columns] and int32 [rows, columns].
    """
    if bridge.works(_self_test, "maximum"):
        return _call(offsets, ids, x)
    rows, edges = offsets.shape[0] - 1, ids.shape[0]
    to = targets(offsets, edges)
    values = x[ids]
    positions = jnp.arange(edges, dtype=jnp.int32)[:, None]
    top = jax.ops.segment_max(values, to, rows, indices_are_sorted=True)
    padded_top = jnp.concatenate([top, top[:0] if rows == 0 else top[-1:]])
    has_top = values == padded_top[to]
    first_edge = jax.ops.segment_min(
        jnp.where(has_top, positions, edges), to, rows, indices_are_sorted=True
    )
    winner = ids[jnp.clip(first_edge, 0, edges - 1)] if edges else first_edge
    empty = (offsets[1:] == offsets[:-1])[:, None]
    return jnp.where(empty, 0, top), jnp.where(empty, -1, winner)


def largest_back(offsets: Any, ids: Any, winner: Any, dy: Any) -> Any:
    """float32 [vertices, columns]: the gradient of `largest`.

    Edges are the transpose, with the ids of each row in ascending order.
    """
    if bridge.works(_self_test, "maximum"):
        return _call_back(offsets, ids, winner, dy)
    to = targets(offsets, ids.shape[0])
    same_as_previous = (jnp.roll(ids, 1) == ids) & (jnp.roll(to, 1) == to)
    repeated = same_as_previous & (jnp.arange(ids.shape[0]) > 0)
    counts = (winner[ids] == to[:, None]) & ~repeated[:, None]
    return jax.ops.segment_sum(
        jnp.where(counts, dy[ids], 0), to, offsets.shape[0] - 1, indices_are_sorted=True
    )

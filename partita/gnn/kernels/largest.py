"""Maxima over in-edges, and which source each came from, so that the gradient goes there and nowhere else.

out[v] = max over edges e into v of x[source[e]], 0 where there is none;  came[v] = the source of the first e that has it, -1 where there is none
dx[u]  = sum over the different v that u has edges to of dy[v] where came[v] = u
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit, prange

from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import (
    ARGUMENTS,
    RESULTS,
    asked,
    buffer,
    int_matrix,
    ints,
    matrix,
    rows_of,
)
from partita.gnn.kernels.total import targets


@njit(nogil=True, boundscheck=False, cache=True)
def _largest_rows(first, stop, offsets, ids, x, out, came):
    columns = x.shape[1]
    for v in range(first, stop):
        for q in range(columns):
            out[v, q] = np.float32(0)
            came[v, q] = np.int32(-1)
        for e in range(offsets[v], offsets[v + 1]):
            row, begins = ids[e], e == offsets[v]
            for q in range(columns):
                value = x[row, q]
                better = begins or value > out[v, q]
                out[v, q] = value if better else out[v, q]
                came[v, q] = row if better else came[v, q]


@njit(nogil=True, boundscheck=False, cache=True)
def _back_rows(first, stop, offsets, ids, came, dy, dx):
    columns = dy.shape[1]
    for u in range(first, stop):
        for q in range(columns):
            dx[u, q] = np.float32(0)
        for k in range(offsets[u], offsets[u + 1]):
            v = ids[k]
            if k > offsets[u] and ids[k - 1] == v:  # repeated edges stand side by side
                continue
            for q in range(columns):
                dx[u, q] += dy[v, q] if came[v, q] == u else np.float32(0)


@njit(nogil=True, parallel=True, cache=True)
def _largest_threads(threads, offsets, ids, x, out, came):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _largest_rows(first, stop, offsets, ids, x, out, came)


@njit(nogil=True, parallel=True, cache=True)
def _back_threads(threads, offsets, ids, came, dy, dx):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _back_rows(first, stop, offsets, ids, came, dy, dx)


@njit(nogil=True, inline="always")
def _largest(frame):
    """Arguments: threads, offsets [rows + 1], ids [edges], x [vertices, columns]; results [rows, columns], int32 [rows, columns]."""
    threads, offsets, ids = (
        ints(buffer(frame, ARGUMENTS, 0)),
        ints(buffer(frame, ARGUMENTS, 1)),
        ints(buffer(frame, ARGUMENTS, 2)),
    )
    x, out, came = (
        matrix(buffer(frame, ARGUMENTS, 3)),
        matrix(buffer(frame, RESULTS, 0)),
        int_matrix(buffer(frame, RESULTS, 1)),
    )
    return threads[0], offsets, ids, x, out, came


@njit(nogil=True, inline="always")
def _back(frame):
    """Arguments: threads, offsets [vertices + 1], ids [edges], came, dy [rows, columns]; result [vertices, columns]."""
    threads, offsets, ids = (
        ints(buffer(frame, ARGUMENTS, 0)),
        ints(buffer(frame, ARGUMENTS, 1)),
        ints(buffer(frame, ARGUMENTS, 2)),
    )
    came, dy = int_matrix(buffer(frame, ARGUMENTS, 3)), matrix(buffer(frame, ARGUMENTS, 4))
    return threads[0], offsets, ids, came, dy, matrix(buffer(frame, RESULTS, 0))


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    def largest(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, x, out, came = _largest(frame)
            _largest_rows(0, len(offsets) - 1, offsets, ids, x, out, came)
        return 0

    def largest_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, x, out, came = _largest(frame)
            _largest_threads(threads, offsets, ids, x, out, came)
        return 0

    def back(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, came, dy, dx = _back(frame)
            _back_rows(0, len(offsets) - 1, offsets, ids, came, dy, dx)
        return 0

    def back_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, came, dy, dx = _back(frame)
            _back_threads(threads, offsets, ids, came, dy, dx)
        return 0

    chosen = (largest_threaded, back_threaded) if threaded else (largest, back)
    return dict(zip(("partita_gnn_largest", "partita_gnn_largest_back"), chosen, strict=True))


def _try() -> None:
    bridge.register(_handlers(bridge.version(), bridge.threads() > 1))
    offsets, ids = np.array([0, 2, 2, 5], np.int32), np.array([1, 2, 0, 0, 1], np.int32)
    back_offsets, back_ids = np.array([0, 2, 4, 5], np.int32), np.array([2, 2, 0, 2, 0], np.int32)
    x = np.array([[1], [3], [2]], np.float32)
    with jax.ensure_compile_time_eval():
        out, came = _call(offsets, ids, x)
        assert np.array_equal(out, [[3], [0], [3]]) and np.array_equal(came, [[1], [-1], [1]]), (
            "a maximum is wrong"
        )
        dx = _call_back(back_offsets, back_ids, came, x)
        assert np.array_equal(dx, [[0], [3], [0]]), "the gradient of a maximum is wrong"


def _call(offsets: Any, ids: Any, x: Any) -> Any:
    shape = (offsets.shape[0] - 1, x.shape[1])
    results = (jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int32))
    return jax.ffi.ffi_call("partita_gnn_largest", results)(
        np.array([bridge.threads()], np.int32), offsets, ids, x
    )


def _call_back(offsets: Any, ids: Any, came: Any, dy: Any) -> Any:
    result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, dy.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("partita_gnn_largest_back", result)(
        np.array([bridge.threads()], np.int32), offsets, ids, came, dy
    )


def largest(offsets: Any, ids: Any, x: Any) -> tuple[Any, Any]:
    """(float32 [rows, columns], int32 [rows, columns]): each row's maximum over its edges, and the source of the first edge that has it."""
    if bridge.works(_try, "maximum"):
        return _call(offsets, ids, x)
    rows, edges = offsets.shape[0] - 1, ids.shape[0]
    to, values, number = targets(offsets, edges), x[ids], jnp.arange(edges, dtype=jnp.int32)
    top = jax.ops.segment_max(values, to, rows, indices_are_sorted=True)
    has = values == jnp.concatenate([top, top[:0] if rows == 0 else top[-1:]])[to]
    edge = jax.ops.segment_min(
        jnp.where(has, number[:, None], edges), to, rows, indices_are_sorted=True
    )
    bare = (offsets[1:] == offsets[:-1])[:, None]
    return jnp.where(bare, 0, top), jnp.where(
        bare, -1, ids[jnp.clip(edge, 0, edges - 1)] if edges else edge
    )


def largest_back(offsets: Any, ids: Any, came: Any, dy: Any) -> Any:
    """float32 [vertices, columns]: the gradient of `largest`, along the transpose, the ids of a row in order."""
    if bridge.works(_try, "maximum"):
        return _call_back(offsets, ids, came, dy)
    to = targets(offsets, ids.shape[0])
    again = (jnp.roll(ids, 1) == ids) & (jnp.roll(to, 1) == to) & (jnp.arange(ids.shape[0]) > 0)
    kept = (came[ids] == to[:, None]) & ~again[:, None]
    return jax.ops.segment_sum(
        jnp.where(kept, dy[ids], 0), to, offsets.shape[0] - 1, indices_are_sorted=True
    )

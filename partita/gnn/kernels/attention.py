"""Attention over in-edges (Brody et al. 2022, eq. 7), without anything of the size of the edges being kept.

For every head, with l of the source u and r of the destination v, slope 0.2 below zero:

    score(u, v) = sum over features of a * leaky_relu(l[u] + r[v])
    out[v] = sum over edges of softmax over v's edges of score * l[u]

`alone[v]` is 1 where an edge from v to itself is to be added; row v of l is then its source. The forward pass keeps the logarithm of the
softmax's denominator. The backward pass computes scores again, once by destination for r and a, once by source for l.
"""

from __future__ import annotations

import math
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
    cube,
    ints,
    matrix,
    rows_of,
)
from partita.gnn.kernels.total import targets

SLOPE = np.float32(0.2)
ONE, ZERO = np.float32(1), np.float32(0)


@njit(nogil=True, boundscheck=False, inline="always", fastmath={"reassoc", "contract", "nsz"})
def _score(left, u, right, v, h, a):
    total = ZERO
    for c in range(left.shape[2]):
        z = left[u, h, c] + right[v, h, c]
        total += a[h, c] * (z if z > ZERO else SLOPE * z)
    return total


@njit(nogil=True, boundscheck=False, inline="always", fastmath={"reassoc", "contract", "nsz"})
def _product(one, i, other, j, h):
    total = ZERO
    for c in range(one.shape[2]):
        total += one[i, h, c] * other[j, h, c]
    return total


@njit(nogil=True, boundscheck=False, cache=True)
def _attend_rows(first, stop, offsets, ids, alone, left, right, a, out, log):
    """Softmax as it goes: when a larger score comes, what was summed is scaled down."""
    heads, columns = left.shape[1], left.shape[2]
    for v in range(first, stop):
        start, end = offsets[v], offsets[v + 1]
        for h in range(heads):
            top, weight = np.float32(-np.inf), ZERO
            for c in range(columns):
                out[v, h, c] = ZERO
            for e in range(start, end + alone[v]):
                u = v if e == end else ids[e]
                score = _score(left, u, right, v, h, a)
                if score > top:
                    shrink = np.float32(math.exp(top - score))
                    top = score
                    weight *= shrink
                    for c in range(columns):
                        out[v, h, c] *= shrink
                w = np.float32(math.exp(score - top))
                weight += w
                for c in range(columns):
                    out[v, h, c] += w * left[u, h, c]
            if weight > ZERO:
                for c in range(columns):
                    out[v, h, c] /= weight
                log[v, h] = top + np.float32(math.log(weight))
            else:
                log[v, h] = ZERO


@njit(nogil=True, boundscheck=False, cache=True)
def _by_destination_rows(
    first, stop, offsets, ids, alone, left, right, a, log, dot, dy, dright, da
):
    """dot [rows, heads]: dy times out. `da` [heads, columns] is added to."""
    heads, columns = left.shape[1], left.shape[2]
    for v in range(first, stop):
        start, end = offsets[v], offsets[v + 1]
        for h in range(heads):
            for c in range(columns):
                dright[v, h, c] = ZERO
            for e in range(start, end + alone[v]):
                u = v if e == end else ids[e]
                w = np.float32(math.exp(_score(left, u, right, v, h, a) - log[v, h]))
                ds = w * (_product(dy, v, left, u, h) - dot[v, h])
                for c in range(columns):
                    z = left[u, h, c] + right[v, h, c]
                    bend = ONE if z > ZERO else SLOPE
                    dright[v, h, c] += ds * a[h, c] * bend
                    da[h, c] += ds * bend * z


@njit(nogil=True, boundscheck=False, cache=True)
def _by_source_rows(first, stop, offsets, ids, alone, left, right, a, log, dot, dy, dleft):
    """By source: ids are destinations; `alone` [rows of destinations] is of the first rows of sources."""
    heads, columns = left.shape[1], left.shape[2]
    for u in range(first, stop):
        start, end = offsets[u], offsets[u + 1]
        more = alone[u] if u < len(alone) else 0
        for h in range(heads):
            for c in range(columns):
                dleft[u, h, c] = ZERO
            for k in range(start, end + more):
                v = u if k == end else ids[k]
                w = np.float32(math.exp(_score(left, u, right, v, h, a) - log[v, h]))
                ds = w * (_product(dy, v, left, u, h) - dot[v, h])
                for c in range(columns):
                    z = left[u, h, c] + right[v, h, c]
                    dleft[u, h, c] += w * dy[v, h, c] + ds * a[h, c] * (ONE if z > ZERO else SLOPE)


@njit(nogil=True, parallel=True, cache=True)
def _attend_threads(threads, offsets, ids, alone, left, right, a, out, log):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _attend_rows(first, stop, offsets, ids, alone, left, right, a, out, log)


@njit(nogil=True, parallel=True, cache=True)
def _by_destination_threads(threads, offsets, ids, alone, left, right, a, log, dot, dy, dright, da):
    shares = np.zeros((threads, a.shape[0], a.shape[1]), np.float32)
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _by_destination_rows(
            first, stop, offsets, ids, alone, left, right, a, log, dot, dy, dright, shares[part]
        )
    for part in range(threads):
        for h in range(a.shape[0]):
            for c in range(a.shape[1]):
                da[h, c] += shares[part, h, c]


@njit(nogil=True, parallel=True, cache=True)
def _by_source_threads(threads, offsets, ids, alone, left, right, a, log, dot, dy, dleft):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _by_source_rows(first, stop, offsets, ids, alone, left, right, a, log, dot, dy, dleft)


@njit(nogil=True, inline="always")
def _edges(frame):
    """Arguments, of all three: threads, offsets, ids, alone, left [vertices, heads, columns], right [rows, heads, columns], a."""
    return (
        ints(buffer(frame, ARGUMENTS, 0))[0],
        ints(buffer(frame, ARGUMENTS, 1)),
        ints(buffer(frame, ARGUMENTS, 2)),
        ints(buffer(frame, ARGUMENTS, 3)),
        cube(buffer(frame, ARGUMENTS, 4)),
        cube(buffer(frame, ARGUMENTS, 5)),
        matrix(buffer(frame, ARGUMENTS, 6)),
    )


@njit(nogil=True, inline="always")
def _gradient(frame):
    """More arguments, of both gradients: log, dot [rows, heads], dy [rows, heads, columns]."""
    return (
        matrix(buffer(frame, ARGUMENTS, 7)),
        matrix(buffer(frame, ARGUMENTS, 8)),
        cube(buffer(frame, ARGUMENTS, 9)),
    )


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    def attend(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, alone, left, right, a = _edges(frame)
            out, log = cube(buffer(frame, RESULTS, 0)), matrix(buffer(frame, RESULTS, 1))
            _attend_rows(0, len(offsets) - 1, offsets, ids, alone, left, right, a, out, log)
        return 0

    def attend_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, alone, left, right, a = _edges(frame)
            out, log = cube(buffer(frame, RESULTS, 0)), matrix(buffer(frame, RESULTS, 1))
            _attend_threads(threads, offsets, ids, alone, left, right, a, out, log)
        return 0

    def by_destination(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, alone, left, right, a = _edges(frame)
            log, dot, dy = _gradient(frame)
            dright, da = cube(buffer(frame, RESULTS, 0)), matrix(buffer(frame, RESULTS, 1))
            da[:] = ZERO
            _by_destination_rows(
                0, len(offsets) - 1, offsets, ids, alone, left, right, a, log, dot, dy, dright, da
            )
        return 0

    def by_destination_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, alone, left, right, a = _edges(frame)
            log, dot, dy = _gradient(frame)
            dright, da = cube(buffer(frame, RESULTS, 0)), matrix(buffer(frame, RESULTS, 1))
            da[:] = ZERO
            _by_destination_threads(
                threads, offsets, ids, alone, left, right, a, log, dot, dy, dright, da
            )
        return 0

    def by_source(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, alone, left, right, a = _edges(frame)
            log, dot, dy = _gradient(frame)
            _by_source_rows(
                0,
                len(offsets) - 1,
                offsets,
                ids,
                alone,
                left,
                right,
                a,
                log,
                dot,
                dy,
                cube(buffer(frame, RESULTS, 0)),
            )
        return 0

    def by_source_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, alone, left, right, a = _edges(frame)
            log, dot, dy = _gradient(frame)
            _by_source_threads(
                threads,
                offsets,
                ids,
                alone,
                left,
                right,
                a,
                log,
                dot,
                dy,
                cube(buffer(frame, RESULTS, 0)),
            )
        return 0

    threaded_ones, others = (
        (attend_threaded, by_destination_threaded, by_source_threaded),
        (attend, by_destination, by_source),
    )
    names = (
        "partita_gnn_attend",
        "partita_gnn_attend_by_destination",
        "partita_gnn_attend_by_source",
    )
    return dict(zip(names, threaded_ones if threaded else others, strict=True))


def _try() -> None:
    bridge.register(_handlers(bridge.version(), bridge.threads() > 1))
    offsets, ids = np.array([0, 2, 2, 4], np.int32), np.array([1, 2, 0, 1], np.int32)
    alone = np.array([1, 0, 1], np.int32)
    random = np.random.default_rng(0)
    left, right, a = (
        random.standard_normal(shape).astype(np.float32) for shape in ((3, 1, 3), (3, 1, 3), (1, 3))
    )
    with jax.ensure_compile_time_eval():
        out, _ = _forward(offsets, ids, alone, left, right, a)
        expected, _ = _plain_forward(offsets, ids, alone, left, right, a)
        assert np.allclose(out, expected, atol=1e-5), "attention is wrong"


def _arguments(*arrays: Any) -> Any:
    return np.array([bridge.threads()], np.int32), *arrays


def _forward(offsets: Any, ids: Any, alone: Any, left: Any, right: Any, a: Any) -> Any:
    results = (
        jax.ShapeDtypeStruct(right.shape, jnp.float32),
        jax.ShapeDtypeStruct(right.shape[:2], jnp.float32),
    )
    return jax.ffi.ffi_call("partita_gnn_attend", results)(
        *_arguments(offsets, ids, alone, left, right, a)
    )


def _plain_forward(offsets: Any, ids: Any, alone: Any, left: Any, right: Any, a: Any) -> Any:
    """(out, None), by XLA's own operations."""
    rows = right.shape[0]
    own = jnp.arange(rows, dtype=jnp.int32)
    u, v = (
        jnp.concatenate([ids, own]),
        jnp.concatenate([targets(offsets, ids.shape[0]), jnp.where(alone > 0, own, rows)]),
    )
    z = left[u] + jnp.concatenate([right, jnp.zeros_like(right[:1])])[v]
    score = (a * jnp.where(z > 0, z, SLOPE * z)).sum(-1)
    top = jax.lax.stop_gradient(jax.ops.segment_max(score, v, rows + 1))
    w = jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0)[v])
    below = jax.ops.segment_sum(w, v, rows + 1)[:rows]
    above = jax.ops.segment_sum(w[:, :, None] * left[u], v, rows + 1)[:rows]
    return above / jnp.where(below > 0, below, 1)[:, :, None], None


@jax.custom_vjp
def _attend(edges: Any, back: Any, alone: Any, left: Any, right: Any, a: Any) -> Any:
    return _forward(edges[0], edges[1], alone, left, right, a)[0]


def _attend_forward(edges: Any, back: Any, alone: Any, left: Any, right: Any, a: Any) -> Any:
    out, log = _forward(edges[0], edges[1], alone, left, right, a)
    return out, (edges, back, alone, left, right, a, out, log)


def _attend_backward(saved: Any, dy: Any) -> Any:
    edges, back, alone, left, right, a, out, log = saved
    dot = (dy * out).sum(axis=2)
    shape = lambda like: jax.ShapeDtypeStruct(like.shape, jnp.float32)
    dright, da = jax.ffi.ffi_call("partita_gnn_attend_by_destination", (shape(right), shape(a)))(
        *_arguments(*edges, alone, left, right, a, log, dot, dy)
    )
    dleft = jax.ffi.ffi_call("partita_gnn_attend_by_source", shape(left))(
        *_arguments(*back, alone, left, right, a, log, dot, dy)
    )
    return None, None, None, dleft, dright, da


_attend.defvjp(_attend_forward, _attend_backward)


def attend(edges: Any, back: Any, alone: Any, left: Any, right: Any, a: Any) -> Any:
    """float32 [rows, heads, columns]; its gradient is exact in left, right and a.

    edges: (offsets [rows + 1], ids [edges]) by destination; back: the same by source. left [vertices, heads, columns], its first rows
    those of the destinations; right [rows, heads, columns]; a [heads, columns].
    """
    if bridge.works(_try, "attention"):
        return _attend(edges, back, alone, left, right, a)
    return _plain_forward(edges[0], edges[1], alone, left, right, a)[0]

"""Attention over in-edges (GATv2, Brody et al. 2022, eq. 7), without storing anything per edge.

For every head, with l of the source u, r of the destination v, and slope 0.2 below zero:

    score(u, v) = sum over features of a * leaky_relu(l[u] + r[v])
    out[v] = sum over edges into v of softmax(scores of the edges into v) * l[u]

Row v of l is the source of a self edge of v. `self_correction[v]` is 1 where a self edge of v is to
be added; if it is -k, k of its self edges do not count, so that exactly one does. The forward pass
stores the logarithm of the softmax's denominator. The backward pass rematerializes scores: once by
destination for r and a, once by source for l.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit, prange

from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import (
    answers_metadata,
    argument,
    cube,
    ints,
    matrix,
    result,
    rows_of,
)
from partita.gnn.kernels.total import targets

SLOPE = np.float32(0.2)
"""Slope of the leaky ReLU below zero."""

ONE = np.float32(1)
ZERO = np.float32(0)


class AttentionEdges(NamedTuple):
    """Edges by destination or by source.

    int32 offsets [rows + 1], ids [edges], self_correction [destinations].
    """

    offsets: Any
    ids: Any
    self_correction: Any


class AttentionRows(NamedTuple):
    """Inputs of attention, float32.

    l       [vertices, heads, columns]
    r       [destinations, heads, columns]
    a       [heads, columns]
    """

    l: Any
    r: Any
    a: Any


class AttentionGradient(NamedTuple):
    """Inputs of the backward pass, per destination.

    log     float32 [destinations, heads], logarithm of the softmax's denominator
    dot     float32 [destinations, heads], dy times out
    dy      float32 [destinations, heads, columns]
    """

    log: Any
    dot: Any
    dy: Any


@njit(nogil=True, boundscheck=False, inline="always", fastmath={"reassoc", "contract", "nsz"})
def _score(
    l,
    u,
    r,
    v,
    h,
    a,
):
    total = ZERO
    for c in range(l.shape[2]):
        z = l[u, h, c] + r[v, h, c]
        total += a[h, c] * (z if z > ZERO else SLOPE * z)
    return total


@njit(nogil=True, boundscheck=False, inline="always", fastmath={"reassoc", "contract", "nsz"})
def _dot(x, i, y, j, h):
    total = ZERO
    for c in range(x.shape[2]):
        total += x[i, h, c] * y[j, h, c]
    return total


@njit(nogil=True, boundscheck=False, cache=True)
def _attend_rows(
    first,
    stop,
    edges,
    rows,
    out,
    log,
):
    """Online softmax: a larger score scales down the sum so far."""
    offsets, ids, self_correction = edges
    l, r, a = rows
    heads, columns = l.shape[1], l.shape[2]
    for v in range(first, stop):
        start, end = offsets[v], offsets[v + 1]
        for h in range(heads):
            top = np.float32(-np.inf)
            denominator = ZERO
            for c in range(columns):
                out[v, h, c] = ZERO
            extra = max(self_correction[v], 0)
            skipped = max(-self_correction[v], 0)
            for e in range(start, end + extra):
                u = v if e == end else ids[e]
                if u == v and skipped > 0:
                    skipped -= 1
                    continue
                score = _score(
                    l,
                    u,
                    r,
                    v,
                    h,
                    a,
                )
                if score > top:
                    shrink = np.float32(math.exp(top - score))
                    top = score
                    denominator *= shrink
                    for c in range(columns):
                        out[v, h, c] *= shrink
                w = np.float32(math.exp(score - top))
                denominator += w
                for c in range(columns):
                    out[v, h, c] += w * l[u, h, c]
            if denominator > ZERO:
                for c in range(columns):
                    out[v, h, c] /= denominator
                log[v, h] = top + np.float32(math.log(denominator))
            else:
                log[v, h] = ZERO


@njit(nogil=True, boundscheck=False, cache=True)
def _by_destination_rows(
    first,
    stop,
    edges,
    rows,
    gradient,
    dr,
    da,
):
    """Writes dr of the rows, and adds to da [heads, columns]."""
    offsets, ids, self_correction = edges
    l, r, a = rows
    log, dot, dy = gradient
    heads, columns = l.shape[1], l.shape[2]
    for v in range(first, stop):
        start, end = offsets[v], offsets[v + 1]
        for h in range(heads):
            for c in range(columns):
                dr[v, h, c] = ZERO
            extra = max(self_correction[v], 0)
            skipped = max(-self_correction[v], 0)
            for e in range(start, end + extra):
                u = v if e == end else ids[e]
                if u == v and skipped > 0:
                    skipped -= 1
                    continue
                w = np.float32(
                    math.exp(
                        _score(
                            l,
                            u,
                            r,
                            v,
                            h,
                            a,
                        )
                        - log[v, h]
                    )
                )
                ds = w * (_dot(dy, v, l, u, h) - dot[v, h])
                for c in range(columns):
                    z = l[u, h, c] + r[v, h, c]
                    slope = ONE if z > ZERO else SLOPE
                    dr[v, h, c] += ds * a[h, c] * slope
                    da[h, c] += ds * slope * z


@njit(nogil=True, boundscheck=False, cache=True)
def _by_source_rows(
    first,
    stop,
    edges,
    rows,
    gradient,
    dl,
):
    """Writes dl of the rows.

    Edges are by source and their ids are destinations, which are the first of the sources.
    """
    offsets, ids, self_correction = edges
    l, r, a = rows
    log, dot, dy = gradient
    heads, columns = l.shape[1], l.shape[2]
    for u in range(first, stop):
        start, end = offsets[u], offsets[u + 1]
        correction = self_correction[u] if u < len(self_correction) else 0
        extra = max(correction, 0)
        for h in range(heads):
            for c in range(columns):
                dl[u, h, c] = ZERO
            skipped = max(-correction, 0)
            for k in range(start, end + extra):
                v = u if k == end else ids[k]
                if u == v and skipped > 0:
                    skipped -= 1
                    continue
                w = np.float32(
                    math.exp(
                        _score(
                            l,
                            u,
                            r,
                            v,
                            h,
                            a,
                        )
                        - log[v, h]
                    )
                )
                ds = w * (_dot(dy, v, l, u, h) - dot[v, h])
                for c in range(columns):
                    z = l[u, h, c] + r[v, h, c]
                    dl[u, h, c] += w * dy[v, h, c] + ds * a[h, c] * (ONE if z > ZERO else SLOPE)


@njit(nogil=True, parallel=True, cache=True)
def _attend_threads(threads, edges, rows, out, log):
    for part in prange(threads):
        first, stop = rows_of(edges.offsets, part, threads)
        _attend_rows(
            first,
            stop,
            edges,
            rows,
            out,
            log,
        )


@njit(nogil=True, parallel=True, cache=True)
def _by_destination_threads(
    threads,
    edges,
    rows,
    gradient,
    dr,
    da,
):
    heads, columns = da.shape
    shares = np.zeros((threads, heads, columns), np.float32)
    for part in prange(threads):
        first, stop = rows_of(edges.offsets, part, threads)
        _by_destination_rows(
            first,
            stop,
            edges,
            rows,
            gradient,
            dr,
            shares[part],
        )
    for part in range(threads):
        for h in range(heads):
            for c in range(columns):
                da[h, c] += shares[part, h, c]


@njit(nogil=True, parallel=True, cache=True)
def _by_source_threads(threads, edges, rows, gradient, dl):
    for part in prange(threads):
        first, stop = rows_of(edges.offsets, part, threads)
        _by_source_rows(
            first,
            stop,
            edges,
            rows,
            gradient,
            dl,
        )


@njit(nogil=True, inline="always")
def _edges(frame):
    """Arguments 1 to 3."""
    return AttentionEdges(
        ints(argument(frame, 1)),
        ints(argument(frame, 2)),
        ints(argument(frame, 3)),
    )


@njit(nogil=True, inline="always")
def _rows(frame):
    """Arguments 4 to 6."""
    return AttentionRows(
        cube(argument(frame, 4)),
        cube(argument(frame, 5)),
        matrix(argument(frame, 6)),
    )


@njit(nogil=True, inline="always")
def _gradient(frame):
    """Arguments 7 to 9, of both gradients."""
    return AttentionGradient(
        matrix(argument(frame, 7)),
        matrix(argument(frame, 8)),
        cube(argument(frame, 9)),
    )


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    """Handlers by name; argument 0 is the number of threads, int32 [1]."""
    handlers = _threaded_handlers(version) if threaded else _handlers_alone(version)
    names = (
        "partita_gnn_attend",
        "partita_gnn_attend_by_destination",
        "partita_gnn_attend_by_source",
    )
    return dict(zip(names, handlers, strict=True))


def _handlers_alone(version: int) -> tuple[Any, Any, Any]:
    def attend_alone(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges = _edges(frame)
            out, log = cube(result(frame, 0)), matrix(result(frame, 1))
            _attend_rows(
                0,
                len(edges.offsets) - 1,
                edges,
                _rows(frame),
                out,
                log,
            )
        return 0

    def by_destination_alone(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges = _edges(frame)
            rows, gradient = _rows(frame), _gradient(frame)
            dr, da = cube(result(frame, 0)), matrix(result(frame, 1))
            da[:] = ZERO
            _by_destination_rows(
                0,
                len(edges.offsets) - 1,
                edges,
                rows,
                gradient,
                dr,
                da,
            )
        return 0

    def by_source_alone(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges = _edges(frame)
            rows, gradient = _rows(frame), _gradient(frame)
            dl = cube(result(frame, 0))
            _by_source_rows(
                0,
                len(edges.offsets) - 1,
                edges,
                rows,
                gradient,
                dl,
            )
        return 0

    return attend_alone, by_destination_alone, by_source_alone


def _threaded_handlers(version: int) -> tuple[Any, Any, Any]:
    def attend_threaded(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            threads = ints(argument(frame, 0))[0]
            out, log = cube(result(frame, 0)), matrix(result(frame, 1))
            _attend_threads(threads, _edges(frame), _rows(frame), out, log)
        return 0

    def by_destination_threaded(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            threads = ints(argument(frame, 0))[0]
            dr, da = cube(result(frame, 0)), matrix(result(frame, 1))
            da[:] = ZERO
            _by_destination_threads(
                threads,
                _edges(frame),
                _rows(frame),
                _gradient(frame),
                dr,
                da,
            )
        return 0

    def by_source_threaded(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            threads = ints(argument(frame, 0))[0]
            dl = cube(result(frame, 0))
            _by_source_threads(threads, _edges(frame), _rows(frame), _gradient(frame), dl)
        return 0

    return attend_threaded, by_destination_threaded, by_source_threaded


def _self_test() -> None:
    """Registers the kernels and tries the forward one; AssertionError for a wrong result."""
    bridge.register(_handlers(bridge.version(), bridge.threads() > 1))
    offsets = np.array([0, 2, 2, 4], np.int32)
    ids = np.array([1, 2, 0, 1], np.int32)
    self_correction = np.array([1, 0, 1], np.int32)
    random = np.random.default_rng(0)
    l = random.standard_normal((3, 1, 3)).astype(np.float32)
    r = random.standard_normal((3, 1, 3)).astype(np.float32)
    a = random.standard_normal((1, 3)).astype(np.float32)
    with jax.ensure_compile_time_eval():
        out, _ = _forward((offsets, ids), self_correction, l, r, a)
        expected = _plain_attention((offsets, ids), self_correction, l, r, a)
        assert np.allclose(out, expected, atol=1e-5), "attention is wrong"


def _float32(like: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, jnp.float32)


def _forward(edges: Any, self_correction: Any, l: Any, r: Any, a: Any) -> Any:
    """(out, log) by the kernel."""
    log = jax.ShapeDtypeStruct(r.shape[:2], jnp.float32)
    kernel = jax.ffi.ffi_call("partita_gnn_attend", (_float32(r), log))
    return kernel(
        bridge.thread_argument(),
        *edges,
        self_correction,
        l,
        r,
        a,
    )


def _plain_attention(edges: Any, self_correction: Any, l: Any, r: Any, a: Any) -> Any:
    """`out` by XLA's own operations."""
    offsets, ids = edges
    rows = r.shape[0]
    vertices = jnp.arange(rows, dtype=jnp.int32)
    self_targets = jnp.where(self_correction != 0, vertices, rows)
    to = targets(offsets, ids.shape[0])
    replaced = (ids == to) & (self_correction[jnp.minimum(to, rows - 1)] < 0)
    u = jnp.concatenate([ids, vertices])
    v = jnp.concatenate([jnp.where(replaced, rows, to), self_targets])
    padded_r = jnp.concatenate([r, jnp.zeros_like(r[:1])])
    z = l[u] + padded_r[v]
    score = (a * jnp.where(z > 0, z, SLOPE * z)).sum(-1)
    top = jax.lax.stop_gradient(jax.ops.segment_max(score, v, rows + 1))
    w = jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0)[v])
    denominator = jax.ops.segment_sum(w, v, rows + 1)[:rows]
    numerator = jax.ops.segment_sum(w[:, :, None] * l[u], v, rows + 1)[:rows]
    return numerator / jnp.where(denominator > 0, denominator, 1)[:, :, None]


@jax.custom_vjp
def _attend(
    edges: Any,
    back: Any,
    self_correction: Any,
    l: Any,
    r: Any,
    a: Any,
) -> Any:
    return _forward(edges, self_correction, l, r, a)[0]


def _attend_forward(
    edges: Any,
    back: Any,
    self_correction: Any,
    l: Any,
    r: Any,
    a: Any,
) -> Any:
    out, log = _forward(edges, self_correction, l, r, a)
    return out, (edges, back, self_correction, l, r, a, out, log)


def _attend_backward(saved: Any, dy: Any) -> Any:
    edges, back, self_correction, l, r, a, out, log = saved
    dot = (dy * out).sum(axis=2)
    threads = bridge.thread_argument()
    shapes = (_float32(r), _float32(a))
    by_destination = jax.ffi.ffi_call("partita_gnn_attend_by_destination", shapes)
    dr, da = by_destination(
        threads,
        *edges,
        self_correction,
        l,
        r,
        a,
        log,
        dot,
        dy,
    )
    by_source = jax.ffi.ffi_call("partita_gnn_attend_by_source", _float32(l))
    dl = by_source(
        threads,
        *back,
        self_correction,
        l,
        r,
        a,
        log,
        dot,
        dy,
    )
    return None, None, None, dl, dr, da


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    edges: Any,
    back: Any,
    self_correction: Any,
    l: Any,
    r: Any,
    a: Any,
) -> Any:
    """float32 [rows, heads, columns]: attention, differentiable in l, r and a.

    edges       (offsets [rows + 1], ids [edges]) by destination
    back        the same edges by source
    l           [vertices, heads, columns], its first rows those of the destinations
    r           [rows, heads, columns]
    a           [heads, columns]
    """
    if bridge.works(_self_test, "attention"):
        return _attend(
            edges,
            back,
            self_correction,
            l,
            r,
            a,
        )
    return _plain_attention(edges, self_correction, l, r, a)

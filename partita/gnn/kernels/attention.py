"""Attention over in-edges (GATv2, Brody et al. 2022, eq. 7), without storing anything per edge.

For every head, with l of the source u, r of the destination v, and slope 0.2 below zero:

    score(u, v) = sum over features of a * leaky_relu(l[u] + r[v])
    out[v] = sum over edges into v of softmax(scores of the edges into v) * l[u]

Row v of l is the source of a self edge of v. `self_correction[v]` is 1 where a self edge of v is to
be added; if it is -k, k of its self edges do not count, so that exactly one does. The forward pass
stores the logarithm of the softmax's denominator. The backward pass rematerializes scores: once by
destination for r and a, once by source for l.

With a `PairPattern` (dropout) an edge counts by its factor after the softmax. That is compiled by
itself, so that kernels without it stay as fast.
"""

from __future__ import annotations

import math
from functools import partial
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
    parts_of,
    result,
    rows_of,
)
from partita.gnn.kernels.pairs import (
    PairPattern,
    pair_bits,
    pair_factor,
    pair_factors,
    pattern_at,
)
from partita.gnn.kernels.total import targets
from partita.gnn.kernels.vectors import (
    SLOPE,
    add_destination,
    add_scaled,
    add_source,
    dot,
    exponential,
    fetch_ahead,
    score,
)

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


AHEAD = 4
"""Edges between the one that is computed and the one whose row is fetched."""


@njit(nogil=True)
def _largest_degree(offsets, first, stop):
    """The largest number of edges of a row, and one more for a self edge."""
    largest = 0
    for v in range(first, stop):
        largest = max(largest, offsets[v + 1] - offsets[v])
    return largest + 1


@njit(nogil=True, boundscheck=False, cache=True)
def _attend_rows(span, edges, rows, pattern, out, log):
    """Scores of all heads edge by edge, then the softmax of a vertex, then the sums.

    `pattern` is a `PairPattern`, or None: numba compiles both by themselves.
    """
    first, stop = span
    offsets, ids, self_correction = edges
    l, r, a = rows
    heads, columns = l.shape[1], l.shape[2]
    head_bytes = np.int64(4 * columns)
    row_bytes = heads * head_bytes
    l_rows, r_rows, a_rows = l.ctypes.data, r.ctypes.data, a.ctypes.data
    out_rows = out.ctypes.data
    shares = np.empty((_largest_degree(offsets, first, stop), heads), np.float32)
    for v in range(first, stop):
        start, end = np.int64(offsets[v]), np.int64(offsets[v + 1])
        extra = max(self_correction[v], 0)
        skipped = max(-self_correction[v], 0)
        count = 0
        for e in range(start, end + extra):
            u = np.int64(v if e == end else ids[e])
            if u == v and skipped > 0:
                skipped -= 1
                continue
            if e + AHEAD < len(ids):
                fetch_ahead(l_rows + ids[e + AHEAD] * row_bytes)  # type: ignore[reportCallIssue]
            for h in range(heads):
                b = h * head_bytes
                tables = (l_rows + u * row_bytes + b, r_rows + v * row_bytes + b, a_rows + b)
                shares[count, h] = score(tables, (), columns)
            count += 1
        _softmax(shares, count, log[v])
        out[v] = ZERO
        skipped = max(-self_correction[v], 0)
        count = 0
        for e in range(start, end + extra):
            u = np.int64(v if e == end else ids[e])
            if u == v and skipped > 0:
                skipped -= 1
                continue
            if pattern is not None:
                bits = pair_bits(pattern, u, v)
                for h in range(heads):
                    shares[count, h] *= pair_factor(pattern, bits, h)
            for h in range(heads):
                b = h * head_bytes
                tables = (out_rows + v * row_bytes + b, l_rows + u * row_bytes + b)
                add_scaled(tables, (shares[count, h],), columns)
            count += 1


@njit(nogil=True, boundscheck=False, inline="always")
def _softmax(shares, count, log):
    """Scores of `count` edges become their softmax; log [heads], of its denominator."""
    heads = shares.shape[1]
    for h in range(heads):
        top = np.float32(-np.inf)
        for k in range(count):
            top = max(top, shares[k, h])
        log[h] = top
    for k in range(count):
        for h in range(heads):
            shares[k, h] = exponential(shares[k, h] - log[h])
    for h in range(heads):
        denominator = ZERO
        for k in range(count):
            denominator += shares[k, h]
        if count:
            inverse = np.float32(1) / denominator
            for k in range(count):
                shares[k, h] *= inverse
            log[h] += np.float32(math.log(denominator))
        else:
            log[h] = ZERO


@njit(nogil=True, boundscheck=False, cache=True)
def _by_destination_rows(span, edges, rows, pattern, gradient, dr, da):
    """Writes dr of the rows, and adds to da [heads, columns]."""
    first, stop = span
    offsets, ids, self_correction = edges
    l, r, a = rows
    log, dots, dy = gradient
    heads, columns = l.shape[1], l.shape[2]
    head_bytes = np.int64(4 * columns)
    row_bytes = heads * head_bytes
    l_rows, r_rows, a_rows = l.ctypes.data, r.ctypes.data, a.ctypes.data
    dy_rows, dr_rows, da_rows = dy.ctypes.data, dr.ctypes.data, da.ctypes.data
    shares = np.empty(heads, np.float32)
    for v in range(first, stop):
        dr[v] = ZERO
        start, end = np.int64(offsets[v]), np.int64(offsets[v + 1])
        extra = max(self_correction[v], 0)
        skipped = max(-self_correction[v], 0)
        target = v * row_bytes
        for e in range(start, end + extra):
            u = np.int64(v if e == end else ids[e])
            if u == v and skipped > 0:
                skipped -= 1
                continue
            if e + AHEAD < len(ids):
                fetch_ahead(l_rows + ids[e + AHEAD] * row_bytes)  # type: ignore[reportCallIssue]
            source = l_rows + u * row_bytes
            for h in range(heads):
                b = h * head_bytes
                tables = (source + b, r_rows + target + b, a_rows + b)
                shares[h] = score(tables, (), columns) - log[v, h]
            for h in range(heads):
                shares[h] = exponential(shares[h])
            if pattern is not None:
                bits = pair_bits(pattern, u, v)
            for h in range(heads):
                b = h * head_bytes
                left, right = source + b, r_rows + target + b
                of_share = dot((dy_rows + target + b, left), (), columns)
                if pattern is not None:
                    of_share *= pair_factor(pattern, bits, h)
                tables = (left, right, a_rows + b, dr_rows + target + b, da_rows + b)
                add_destination(tables, (shares[h] * (of_share - dots[v, h]),), columns)


@njit(nogil=True, boundscheck=False, cache=True)
def _by_source_rows(span, edges, rows, pattern, gradient, dl):
    """Writes dl of the rows.

    Edges are by source and their ids are destinations, which are the first of the sources.
    """
    first, stop = span
    offsets, ids, self_correction = edges
    l, r, a = rows
    log, dots, dy = gradient
    heads, columns = l.shape[1], l.shape[2]
    head_bytes = np.int64(4 * columns)
    row_bytes = heads * head_bytes
    l_rows, r_rows, a_rows = l.ctypes.data, r.ctypes.data, a.ctypes.data
    dy_rows, dl_rows = dy.ctypes.data, dl.ctypes.data
    shares = np.empty(heads, np.float32)
    for u in range(first, stop):
        dl[u] = ZERO
        start, end = np.int64(offsets[u]), np.int64(offsets[u + 1])
        correction = self_correction[u] if u < len(self_correction) else 0
        extra = max(correction, 0)
        skipped = max(-correction, 0)
        source = u * row_bytes
        for k in range(start, end + extra):
            v = np.int64(u if k == end else ids[k])
            if u == v and skipped > 0:
                skipped -= 1
                continue
            if k + AHEAD < len(ids):
                fetch_ahead(r_rows + ids[k + AHEAD] * row_bytes)  # type: ignore[reportCallIssue]
                fetch_ahead(dy_rows + ids[k + AHEAD] * row_bytes)  # type: ignore[reportCallIssue]
            target = v * row_bytes
            for h in range(heads):
                b = h * head_bytes
                tables = (l_rows + source + b, r_rows + target + b, a_rows + b)
                shares[h] = score(tables, (), columns) - log[v, h]
            for h in range(heads):
                shares[h] = exponential(shares[h])
            if pattern is not None:
                bits = pair_bits(pattern, u, v)
            for h in range(heads):
                b = h * head_bytes
                left, above = l_rows + source + b, dy_rows + target + b
                of_share = dot((above, left), (), columns)
                share = shares[h]
                if pattern is not None:
                    factor = pair_factor(pattern, bits, h)
                    of_share *= factor
                    share *= factor
                ds = shares[h] * (of_share - dots[v, h])
                tables = (left, r_rows + target + b, a_rows + b, above, dl_rows + source + b)
                add_source(tables, (share, ds), columns)


@njit(nogil=True, cache=True)
def _add_up(parts, out):
    """Writes the sum of parts [n, heads, columns] to out [heads, columns]."""
    out[:] = ZERO
    for part in parts:
        out += part


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
def _gradient(frame, first):
    """Arguments from `first` on, of both gradients."""
    return AttentionGradient(
        matrix(argument(frame, first)),
        matrix(argument(frame, first + 1)),
        cube(argument(frame, first + 2)),
    )


def _handlers(drops: bool, version: int, threaded: bool) -> dict[str, Any]:
    """Handlers by name; argument 0 is the number of threads, int32 [1].

    With `drops` a pattern comes before the arguments of gradients.
    """
    first = 12 if drops else 7

    def forward(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges, rows = _edges(frame), _rows(frame)
            pattern = pattern_at(frame, 7) if drops else None
            out, log = cube(result(frame, 0)), matrix(result(frame, 1))
            parts = parts_of(frame, threaded)
            for part in prange(parts):
                span = rows_of(edges.offsets, part, parts)
                _attend_rows(span, edges, rows, pattern, out, log)
        return 0

    def by_destination(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges, rows, gradient = _edges(frame), _rows(frame), _gradient(frame, first)
            pattern = pattern_at(frame, 7) if drops else None
            dr, da = cube(result(frame, 0)), matrix(result(frame, 1))
            parts = parts_of(frame, threaded)
            shares = np.zeros((parts, da.shape[0], da.shape[1]), np.float32)
            for part in prange(parts):
                span = rows_of(edges.offsets, part, parts)
                _by_destination_rows(span, edges, rows, pattern, gradient, dr, shares[part])
            _add_up(shares, da)
        return 0

    def by_source(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges, rows, gradient = _edges(frame), _rows(frame), _gradient(frame, first)
            pattern = pattern_at(frame, 7) if drops else None
            dl = cube(result(frame, 0))
            parts = parts_of(frame, threaded)
            for part in prange(parts):
                span = rows_of(edges.offsets, part, parts)
                _by_source_rows(span, edges, rows, pattern, gradient, dl)
        return 0

    return {
        _name(drops): forward,
        _name(drops, "_by_destination"): by_destination,
        _name(drops, "_by_source"): by_source,
    }


def _name(drops: bool, gradient: str = "") -> str:
    """The name of a handler."""
    return f"partita_gnn_attend{'_dropped' if drops else ''}{gradient}"


def _self_test() -> None:
    """Registers the kernels and tries the forward one; AssertionError for a wrong result."""
    _try(None)


def _dropped_self_test() -> None:
    """`_self_test` of the kernels with dropout."""
    numbers = np.arange(3, dtype=np.int32)
    least, scale = np.array([1 << 30], np.int32), np.array([1.5], np.float32)
    _try(PairPattern(numbers, numbers, np.array([7], np.int32), least, scale))


def _try(pattern: PairPattern | None) -> None:
    bridge.register(partial(_handlers, pattern is not None))
    offsets = np.array([0, 2, 2, 4], np.int32)
    ids = np.array([1, 2, 0, 1], np.int32)
    edges = AttentionEdges(offsets, ids, np.array([1, 0, 1], np.int32))
    random = np.random.default_rng(0)
    l, r = random.standard_normal((2, 3, 1, 3)).astype(np.float32)
    rows = AttentionRows(l, r, random.standard_normal((1, 3)).astype(np.float32))
    with jax.ensure_compile_time_eval():
        out, _ = _forward(edges, rows, pattern)
        plain = _plain_attention(edges, rows, pattern)
        assert np.allclose(out, plain, atol=1e-5), "attention is wrong"


def _float32(like: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(like.shape, jnp.float32)


def _forward(edges: AttentionEdges, rows: AttentionRows, pattern: PairPattern | None) -> Any:
    """(out, log) by the kernel."""
    log = jax.ShapeDtypeStruct(rows.r.shape[:2], jnp.float32)
    kernel = bridge.kernel(_name(pattern is not None), (_float32(rows.r), log))
    return kernel(bridge.thread_argument(), *edges, *rows, *(pattern or ()))


def _plain_attention(
    edges: AttentionEdges, tables: AttentionRows, pattern: PairPattern | None
) -> Any:
    """`out` by XLA's own operations."""
    offsets, ids, self_correction = edges
    l, r, a = tables
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
    if pattern is not None:
        ends = pattern.source[u], pattern.target[jnp.minimum(v, rows - 1)]
        w = w * pair_factors(pattern, *ends)
    numerator = jax.ops.segment_sum(w[:, :, None] * l[u], v, rows + 1)[:rows]
    return numerator / jnp.where(denominator > 0, denominator, 1)[:, :, None]


@jax.custom_vjp
def _attend(
    edges: AttentionEdges,
    back: AttentionEdges,
    rows: AttentionRows,
    pattern: PairPattern | None,
) -> Any:
    return _forward(edges, rows, pattern)[0]


def _attend_forward(
    edges: AttentionEdges,
    back: AttentionEdges,
    rows: AttentionRows,
    pattern: PairPattern | None,
) -> Any:
    out, log = _forward(edges, rows, pattern)
    return out, (edges, back, rows, pattern, out, log)


def _attend_backward(saved: Any, dy: Any) -> Any:
    edges, back, rows, pattern, out, log = saved
    gradient = AttentionGradient(log, (dy * out).sum(axis=2), dy)
    threads = bridge.thread_argument()
    drops, dropped = pattern is not None, pattern or ()
    shapes = (_float32(rows.r), _float32(rows.a))
    by_destination = bridge.kernel(_name(drops, "_by_destination"), shapes)
    dr, da = by_destination(threads, *edges, *rows, *dropped, *gradient)
    by_source = bridge.kernel(_name(drops, "_by_source"), _float32(rows.l))
    dl = by_source(threads, *back, *rows, *dropped, *gradient)
    return None, None, AttentionRows(dl, dr, da), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    edges: AttentionEdges,
    back: AttentionEdges,
    rows: AttentionRows,
    pattern: PairPattern | None = None,
) -> Any:
    """float32 [rows, heads, columns]: attention, differentiable in `rows`.

    `edges` are by destination, `back` the same ones by source. The first rows of l are those of the
    destinations. `pattern`: the edges that count for each head after the softmax, by default all.
    """
    self_test = _self_test if pattern is None else _dropped_self_test
    if bridge.works(self_test, "attention"):
        return _attend(edges, back, rows, pattern)
    return _plain_attention(edges, rows, pattern)

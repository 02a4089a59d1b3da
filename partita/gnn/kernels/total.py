"""Sums over in-edges, Y = A X, and A^T dY for their gradient: the heart of a graph layer.

    out[v] = sum over edges e into v of weight[e] * x[source[e]]          (weight[e] = 1 without weights)

A row of the result is summed in vector registers over its edges while rows further ahead are fetched, so what remains is the memory's
speed. Rows wider than the registers are summed in blocks of columns; what is left over at the end is a block that overlaps the one before.
`pick` and `order` say where an edge's weight is: the transpose has its edges in an order of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import ARGUMENTS, RESULTS, asked, buffer, floats, ints, matrix, rows_of

AHEAD = 12
"""Edges ahead of the one that is added at which rows are fetched."""


def _block(vectors: int, width: int, weighted: bool) -> Any:
    """Adds up `vectors` times `width` columns of one row, in registers. All arguments are int64: addresses, edges, bytes."""

    @intrinsic
    def add(typing, x, ids, weights, order, out, first, stop, last, row_bytes, column):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            b, long, int32, float32 = builder, ir.IntType(64), ir.IntType(32), ir.FloatType()
            vector = ir.VectorType(float32, width)
            x, ids, weights, order, out, first, stop, last, row_bytes, column = arguments
            number = lambda value: ir.Constant(long, value)
            at = lambda base, index, kind: b.load(b.inttoptr(b.add(base, b.mul(index, number(4))), kind.as_pointer()), align=4)
            name = "llvm.prefetch.p0"
            fetch = b.module.globals.get(name) or ir.Function(
                b.module, ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), int32, int32, int32]), name
            )
            entry, function = b.basic_block, b.function
            body, done = function.append_basic_block("edges"), function.append_basic_block("done")
            zero = ir.Constant(vector, None)
            x0, out0 = b.add(x, b.mul(column, number(4))), b.add(out, b.mul(column, number(4)))
            b.cbranch(b.icmp_signed("<", first, stop), body, done)
            b.position_at_end(body)
            edge = b.phi(long)
            edge.add_incoming(first, entry)
            sums = [b.phi(vector) for _ in range(vectors)]
            for s in sums:
                s.add_incoming(zero, entry)
            row = lambda e: b.add(x0, b.mul(b.sext(at(ids, e, int32), long), row_bytes))
            far = b.add(edge, number(AHEAD))
            far = row(b.select(b.icmp_signed("<", far, last), far, last))
            for q in range(0, vectors * width * 4, 64):
                b.call(
                    fetch,
                    [
                        b.inttoptr(b.add(far, number(q)), ir.IntType(8).as_pointer()),
                        ir.Constant(int32, 0),
                        ir.Constant(int32, 3),
                        ir.Constant(int32, 1),
                    ],
                )
            here, new = row(edge), []
            if weighted:
                weight = at(weights, b.sext(at(order, edge, int32), long), float32)
                spread = b.shuffle_vector(
                    b.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.Constant(int32, 0)),
                    ir.Constant(vector, ir.Undefined),
                    ir.Constant(ir.VectorType(int32, width), [0] * width),
                )
            for j, s in enumerate(sums):
                v = b.load(b.inttoptr(b.add(here, number(j * width * 4)), vector.as_pointer()), align=4)
                if weighted:
                    v = b.fmul(v, spread, flags=("contract",))
                new.append(b.fadd(s, v, flags=("contract",)))
            after = b.add(edge, number(1))
            edge.add_incoming(after, body)
            for s, n in zip(sums, new, strict=True):
                s.add_incoming(n, body)
            b.cbranch(b.icmp_signed("<", after, stop), body, done)
            b.position_at_end(done)
            for j, n in enumerate(new):
                total = b.phi(vector)
                total.add_incoming(zero, entry)
                total.add_incoming(n, body)
                new[j] = total
            for j, total in enumerate(new):
                b.store(total, b.inttoptr(b.add(out0, number(j * width * 4)), vector.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), generate

    return add


_p128, _p64, _p16, _p8, _p4 = (_block(v, w, False) for v, w in ((8, 16), (4, 16), (1, 16), (1, 8), (1, 4)))
_w128, _w64, _w16, _w8, _w4 = (_block(v, w, True) for v, w in ((8, 16), (4, 16), (1, 16), (1, 8), (1, 4)))


@njit(nogil=True, boundscheck=False, cache=True)
def _plain_rows(first, stop, offsets, ids, x, out):
    last, columns = np.int64(offsets[len(offsets) - 1]) - 1, x.shape[1]
    xp, ip, op, row = np.int64(x.ctypes.data), np.int64(ids.ctypes.data), np.int64(out.ctypes.data), np.int64(4 * columns)
    for v in range(first, stop):
        e0, e1, here, c = np.int64(offsets[v]), np.int64(offsets[v + 1]), op + v * row, 0
        while c + 128 <= columns:
            _p128(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(c))
            c += 128
        while c + 64 <= columns:
            _p64(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(c))
            c += 64
        while c + 16 <= columns:
            _p16(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(c))
            c += 16
        if c < columns:
            if columns >= 16:
                _p16(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(columns - 16))
            elif columns >= 8:
                _p8(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(0))
                _p8(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(columns - 8))
            elif columns >= 4:
                _p4(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(0))
                _p4(xp, ip, 0, 0, here, e0, e1, last, row, np.int64(columns - 4))
            else:
                for q in range(columns):
                    total = np.float32(0)
                    for e in range(e0, e1):
                        total += x[ids[e], q]
                    out[v, q] = total


@njit(nogil=True, boundscheck=False, cache=True)
def _weighted_rows(first, stop, offsets, ids, weights, order, x, out):
    last, columns = np.int64(offsets[len(offsets) - 1]) - 1, x.shape[1]
    xp, ip, op, row = np.int64(x.ctypes.data), np.int64(ids.ctypes.data), np.int64(out.ctypes.data), np.int64(4 * columns)
    wp, rp = np.int64(weights.ctypes.data), np.int64(order.ctypes.data)
    for v in range(first, stop):
        e0, e1, here, c = np.int64(offsets[v]), np.int64(offsets[v + 1]), op + v * row, 0
        while c + 128 <= columns:
            _w128(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(c))
            c += 128
        while c + 64 <= columns:
            _w64(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(c))
            c += 64
        while c + 16 <= columns:
            _w16(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(c))
            c += 16
        if c < columns:
            if columns >= 16:
                _w16(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(columns - 16))
            elif columns >= 8:
                _w8(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(0))
                _w8(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(columns - 8))
            elif columns >= 4:
                _w4(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(0))
                _w4(xp, ip, wp, rp, here, e0, e1, last, row, np.int64(columns - 4))
            else:
                for q in range(columns):
                    total = np.float32(0)
                    for e in range(e0, e1):
                        total += weights[order[e]] * x[ids[e], q]
                    out[v, q] = total


@njit(nogil=True, parallel=True, cache=True)
def _plain_threads(threads, offsets, ids, x, out):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _plain_rows(first, stop, offsets, ids, x, out)


@njit(nogil=True, parallel=True, cache=True)
def _weighted_threads(threads, offsets, ids, weights, order, x, out):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        _weighted_rows(first, stop, offsets, ids, weights, order, x, out)


@njit(nogil=True, inline="always")
def _plain(frame):
    """Arguments: threads int32 [1], offsets [rows + 1], ids [edges], x [vertices, columns]; result [rows, columns]."""
    threads, offsets, ids = (
        ints(buffer(frame, ARGUMENTS, 0)),
        ints(buffer(frame, ARGUMENTS, 1)),
        ints(buffer(frame, ARGUMENTS, 2)),
    )
    return threads[0], offsets, ids, matrix(buffer(frame, ARGUMENTS, 3)), matrix(buffer(frame, RESULTS, 0))


@njit(nogil=True, inline="always")
def _weighted(frame):
    """Arguments: threads, offsets, ids, weights [all edges], order [edges], x; result [rows, columns]."""
    threads, offsets, ids = (
        ints(buffer(frame, ARGUMENTS, 0)),
        ints(buffer(frame, ARGUMENTS, 1)),
        ints(buffer(frame, ARGUMENTS, 2)),
    )
    weights, order = floats(buffer(frame, ARGUMENTS, 3)), ints(buffer(frame, ARGUMENTS, 4))
    return threads[0], offsets, ids, weights, order, matrix(buffer(frame, ARGUMENTS, 5)), matrix(buffer(frame, RESULTS, 0))


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    def plain(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, x, out = _plain(frame)
            _plain_rows(0, len(offsets) - 1, offsets, ids, x, out)
        return 0

    def plain_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, x, out = _plain(frame)
            _plain_threads(threads, offsets, ids, x, out)
        return 0

    def weighted(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, weights, order, x, out = _weighted(frame)
            _weighted_rows(0, len(offsets) - 1, offsets, ids, weights, order, x, out)
        return 0

    def weighted_threaded(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, weights, order, x, out = _weighted(frame)
            _weighted_threads(threads, offsets, ids, weights, order, x, out)
        return 0

    chosen = (plain_threaded, weighted_threaded) if threaded else (plain, weighted)
    return dict(zip(("partita_gnn_sum", "partita_gnn_weighted_sum"), chosen, strict=True))


def _try() -> None:
    """Registers the kernels and sums a small graph by each: AssertionError where a sum is wrong."""
    bridge.register(_handlers(bridge.version(), bridge.threads() > 1))
    offsets, ids, order = (
        np.array([0, 2, 2, 5], np.int32),
        np.array([1, 2, 0, 0, 1], np.int32),
        np.arange(5, dtype=np.int32)[::-1].copy(),
    )
    weights = np.arange(5, dtype=np.float32)
    for columns in (1, 7, 21):
        x = np.arange(3 * columns, dtype=np.float32).reshape(3, columns)
        dense = np.array([[0, 1, 1], [0, 0, 0], [2, 1, 0]], np.float32)
        heavy = np.array([[0, 4, 3], [0, 0, 0], [3, 0, 0]], np.float32)
        with jax.ensure_compile_time_eval():
            assert np.allclose(_call(offsets, ids, x, None, None), dense @ x), "a sum is wrong"
            assert np.allclose(_call(offsets, ids, x, weights, order), heavy @ x), "a weighted sum is wrong"


def _call(offsets: Any, ids: Any, x: Any, weights: Any, order: Any) -> Any:
    result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, x.shape[1]), jnp.float32)
    threads = np.array([bridge.threads()], np.int32)
    if weights is None:
        return jax.ffi.ffi_call("partita_gnn_sum", result)(threads, offsets, ids, x)
    return jax.ffi.ffi_call("partita_gnn_weighted_sum", result)(threads, offsets, ids, weights, order, x)


def total(offsets: Any, ids: Any, x: Any, weights: Any = None, order: Any = None) -> Any:
    """float32 [rows, columns]: for every row the sum of x over its edges; one direction, without a gradient of its own.

    offsets int32 [rows + 1], ids int32 [edges] into x [vertices, columns]; edge e weighs `weights[order[e]]`, or `weights[e]` without order.
    """
    if bridge.works(_try, "sum"):
        if weights is not None and order is None:
            order = jnp.arange(ids.shape[0], dtype=jnp.int32)
        return _call(offsets, ids, x, weights, order)
    rows = x[ids]
    if weights is not None:
        rows = rows * (weights if order is None else weights[order])[:, None]
    return jax.ops.segment_sum(rows, targets(offsets, ids.shape[0]), offsets.shape[0] - 1, indices_are_sorted=True)


def targets(offsets: Any, edges: int) -> Any:
    """int32 [edges]: the row of every edge; beyond the last edge of the offsets, the number of rows."""
    return jnp.searchsorted(offsets[1:], jnp.arange(edges, dtype=jnp.int32), side="right").astype(jnp.int32)

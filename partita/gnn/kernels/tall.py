"""Products over rows, x^T y, of tables with many rows and few columns: the gradient of a layer's weights.

XLA's library multiplies matrices in tiles of its own, into which it copies both tables, and the copy of one that lies across takes as long
again as the product. Here a tile of the result stays in vector registers while a panel of rows goes by, which stays in the cache for all tiles.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import (
    ARGUMENTS,
    FLOAT,
    LONG,
    RESULTS,
    asked,
    buffer,
    cube,
    ints,
    matrix,
    spread,
    switch,
)

PANEL = 64
"""Rows that are multiplied at a time: so many of 128 columns of both tables stay in a first-level cache."""
LARGEST = 2**15
"""Elements of a result, beyond which what XLA copies no longer counts and it multiplies as fast."""


TILES = {
    (rows, vectors * width): (rows, vectors, width)
    for rows in (4, 1)
    for vectors, width in ((4, 16), (1, 16), (1, 8), (1, 1))
}
"""(rows, columns) of the result that are made at a time, in how many rows of how many registers of how many numbers."""


@intrinsic
def _multiply(typing, rows, columns, x, y, out, count, x_bytes, y_bytes, out_bytes):  # type: ignore[no-untyped-def]
    """Adds to a tile of the result (one of `TILES`) the products of a panel of `count` rows. All arguments are int64: addresses, rows, bytes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, columns, *rest = arguments
        key = builder.add(builder.mul(rows, ir.Constant(LONG, 100)), columns)
        switch(
            builder,
            key,
            {100 * r + c: partial(_tile, builder, *tile, *rest) for (r, c), tile in TILES.items()},
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9), generate


def _tile(b, rows, vectors, width, x, y, out, count, x_bytes, y_bytes, out_bytes):  # type: ignore[no-untyped-def]
    """Code for a tile whose sums are in registers."""
    vector = ir.VectorType(FLOAT, width)
    number = lambda value: ir.Constant(LONG, value)
    at = lambda base, offset, kind: b.inttoptr(b.add(base, offset), kind.as_pointer())
    entry, body, done = b.block, b.append_basic_block("rows"), b.append_basic_block("done")
    b.branch(body)
    b.position_at_end(body)
    k, xk, yk = (b.phi(LONG) for _ in range(3))
    sums = [[b.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    right = [b.load(at(yk, number(4 * width * j), vector), align=4) for j in range(vectors)]
    new = []
    for i, row in enumerate(sums):
        left = spread(b, b.load(at(xk, number(4 * i), FLOAT), align=4), width)
        new.append(
            [
                b.fadd(s, b.fmul(left, r, flags=("contract",)), flags=("contract",))
                for s, r in zip(row, right, strict=True)
            ]
        )
    after = b.add(k, number(1))
    for phi, begin, value in (
        (k, number(0), after),
        (xk, x, b.add(xk, x_bytes)),
        (yk, y, b.add(yk, y_bytes)),
    ):
        phi.add_incoming(begin, entry)
        phi.add_incoming(value, body)
    for row, found in zip(sums, new, strict=True):
        for s, n in zip(row, found, strict=True):
            s.add_incoming(ir.Constant(vector, None), entry)
            s.add_incoming(n, body)
    b.cbranch(b.icmp_signed("<", after, count), body, done)
    b.position_at_end(done)
    for i, found in enumerate(new):
        for j, n in enumerate(found):
            place = at(out, b.add(b.mul(number(i), out_bytes), number(4 * width * j)), vector)
            b.store(b.fadd(b.load(place, align=4), n), place, align=4)


@njit(nogil=True, boundscheck=False, cache=True)
def _product(x, y, first, stop, out):
    """out = x^T y over rows from `first` to before `stop`."""
    out[:, :] = np.float32(0)
    tall, wide = x.shape[1], y.shape[1]
    xw, yw, op = np.int64(4 * tall), np.int64(4 * wide), np.int64(out.ctypes.data)
    for row in range(first, stop, PANEL):
        n = np.int64(min(PANEL, stop - row))
        xp, yp = np.int64(x.ctypes.data) + row * xw, np.int64(y.ctypes.data) + row * yw
        c = np.int64(0)
        while c < wide:
            left = wide - c
            across = np.int64(64 if left >= 64 else 16 if left >= 16 else 8 if left >= 8 else 1)
            r = np.int64(0)
            while r < tall:
                down = np.int64(4 if tall - r >= 4 else 1)
                _multiply(down, across, xp + 4 * r, yp + 4 * c, op + r * yw + 4 * c, n, xw, yw, yw)  # type: ignore[reportCallIssue]
                r += down
            c += across


@njit(nogil=True, parallel=True, cache=True)
def _threads(threads, x, y, out):
    rows = x.shape[0]
    for part in prange(threads):
        _product(x, y, rows * part // threads, rows * (part + 1) // threads, out[part])


@njit(nogil=True, inline="always")
def _arguments(frame):
    """Arguments: threads int32 [1], x [rows, a], y [rows, b]; result [threads, a, b], of which the sum is asked for."""
    return (
        ints(buffer(frame, ARGUMENTS, 0))[0],
        matrix(buffer(frame, ARGUMENTS, 1)),
        matrix(buffer(frame, ARGUMENTS, 2)),
        cube(buffer(frame, RESULTS, 0)),
    )


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    def alone(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, x, y, out = _arguments(frame)
            _product(x, y, 0, x.shape[0], out[0])
        return 0

    def several(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, x, y, out = _arguments(frame)
            _threads(threads, x, y, out)
        return 0

    return {"partita_gnn_tall": several if threaded else alone}


def _try() -> None:
    """Registers the kernel and multiplies small tables by it: AssertionError where a product is wrong."""
    bridge.register(_handlers(bridge.version(), bridge.threads() > 1))
    for rows, a, b in ((3, 1, 1), (70, 5, 7), (200, 6, 90)):
        x, y = (np.sin(np.arange(rows * n, dtype=np.float32)).reshape(rows, n) for n in (a, b))
        with jax.ensure_compile_time_eval():
            assert np.allclose(_call(x, y), x.T @ y, rtol=1e-4, atol=1e-4), "a product is wrong"


def _call(x: Any, y: Any) -> Any:
    threads = bridge.threads()
    parts = jax.ffi.ffi_call(
        "partita_gnn_tall", jax.ShapeDtypeStruct((threads, x.shape[1], y.shape[1]), jnp.float32)
    )(np.array([threads], np.int32), x, y)
    return parts.sum(axis=0)


@jax.custom_vjp
def product(x: Any, w: Any) -> Any:
    """x w of x [rows, a] and w [a, b], a layer's dense product."""
    return x @ w


def _backward(saved: Any, dy: Any) -> Any:
    x, w = saved
    return dy @ w.T, tall(x, dy)


product.defvjp(lambda x, w: (x @ w, (x, w)), _backward)


def tall(x: Any, y: Any) -> Any:
    """float32 [a, b]: x^T y of x [rows, a] and y [rows, b]."""
    a, b = x.shape[1], y.shape[1]
    if (
        x.dtype != jnp.float32
        or y.dtype != jnp.float32
        or a * b > LARGEST
        or not bridge.works(_try, "product")
    ):
        return x.T @ y
    return _call(x, y) if _effort(a, b) <= _effort(b, a) else _call(y, x).T


def _effort(tall: int, wide: int) -> int:
    """Vector products of a row, where the columns of one table lie in vectors."""
    vectors = wide // 16 + wide % 16 // 8 + wide % 8
    return (tall // 4 * 4 + 4 * (tall % 4)) * vectors

"""Products over rows, x^T y, of tall narrow tables: the gradient of a layer's weights.

XLA's library multiplies matrices in tiles and copies both tables into them. The copy of the
transposed table doubles the time. Here a tile of the result stays in vector registers while a panel
of rows passes; the panel stays in the cache for all tiles.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import answers_metadata, argument, cube, matrix, parts_of, result
from partita.gnn.kernels.codegen import (
    FLOAT,
    LONG,
    number,
    pointer,
    spread,
    switch,
    unpack,
    vector_pointer,
)

PANEL = 64
"""Rows multiplied at a time: 64 rows of 128 columns of both tables fit a first-level cache."""

LARGEST = 2**15
"""Elements of a result beyond which XLA's copies no longer count and it is as fast."""


class Tile(NamedTuple):
    """A tile of the result: `rows` rows of `vectors` registers of `width` float32 each."""

    rows: int
    vectors: int
    width: int


TILES = [
    Tile(rows, vectors, width)
    for rows in (4, 1)
    for vectors, width in ((4, 16), (1, 16), (1, 8), (1, 1))
]
"""Tiles that can be computed at a time."""


class Panel(NamedTuple):
    """Operands of a tile, all int64: addresses, rows of the panel, bytes of a row of each table."""

    x: Any
    y: Any
    out: Any
    count: Any
    x_bytes: Any
    y_bytes: Any
    out_bytes: Any


@intrinsic
def _multiply(typing, rows, columns, panel):  # type: ignore[no-untyped-def]
    """Adds the products of a `Panel` to a tile of `rows` by `columns`, one of `TILES`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        rows, columns, panel = arguments
        panel = unpack(builder, signature.args[2], panel)
        key = builder.add(builder.mul(rows, ir.Constant(LONG, 100)), columns)
        cases = {}
        for tile in TILES:
            case = 100 * tile.rows + tile.vectors * tile.width
            cases[case] = partial(_generate_tile, builder, tile, panel)
        switch(builder, key, cases)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, panel), generate


def _generate_tile(b, tile, panel):  # type: ignore[no-untyped-def]
    """Code of a tile whose sums are in registers."""
    vector = ir.VectorType(FLOAT, tile.width)
    entry = b.block
    body = b.append_basic_block("rows")
    done = b.append_basic_block("done")
    b.branch(body)

    b.position_at_end(body)
    k, x, y = (b.phi(LONG) for _ in range(3))
    sums = []
    for _ in range(tile.rows):
        sums.append([b.phi(vector) for _ in range(tile.vectors)])
    y_values = [b.load(vector_pointer(b, y, j, vector), align=4) for j in range(tile.vectors)]
    next_sums = []
    for i, row in enumerate(sums):
        x_value = b.load(pointer(b, b.add(x, number(4 * i)), FLOAT), align=4)
        next_sums.append(_add_products(b, row, spread(b, x_value, tile.width), y_values))
    next_k = b.add(k, number(1))
    _step(k, (number(0), entry), (next_k, body))
    _step(x, (panel.x, entry), (b.add(x, panel.x_bytes), body))
    _step(y, (panel.y, entry), (b.add(y, panel.y_bytes), body))
    zero = ir.Constant(vector, None)
    for row, next_row in zip(sums, next_sums, strict=True):
        for value, next_value in zip(row, next_row, strict=True):
            _step(value, (zero, entry), (next_value, body))
    b.cbranch(b.icmp_signed("<", next_k, panel.count), body, done)

    b.position_at_end(done)
    for i, row in enumerate(next_sums):
        out_row = b.add(panel.out, b.mul(number(i), panel.out_bytes))
        for j, value in enumerate(row):
            place = vector_pointer(b, out_row, j, vector)
            b.store(b.fadd(b.load(place, align=4), value), place, align=4)


def _add_products(b, sums, x_values, y_values):  # type: ignore[no-untyped-def]
    """A row of sums plus x times y, one vector each."""
    results = []
    for value, y in zip(sums, y_values, strict=True):
        product = b.fmul(x_values, y, flags=("contract",))
        results.append(b.fadd(value, product, flags=("contract",)))
    return results


def _step(phi, *branches):  # type: ignore[no-untyped-def]
    """Gives a loop's value its (value, block) at the start and after each round."""
    for value, block in branches:
        phi.add_incoming(value, block)


@njit(nogil=True)
def _tile_columns(remaining):
    if remaining >= 64:
        return np.int64(64)
    if remaining >= 16:
        return np.int64(16)
    if remaining >= 8:
        return np.int64(8)
    return np.int64(1)


@njit(nogil=True, boundscheck=False, cache=True)
def _product(x, y, first, stop, out):
    """out = x^T y over the rows from `first` to before `stop`."""
    out[:, :] = np.float32(0)
    a = x.shape[1]
    b = y.shape[1]
    x_bytes = np.int64(4 * a)
    y_bytes = np.int64(4 * b)
    out_address = np.int64(out.ctypes.data)
    for start in range(first, stop, PANEL):
        count = np.int64(min(PANEL, stop - start))
        x_address = np.int64(x.ctypes.data) + start * x_bytes
        y_address = np.int64(y.ctypes.data) + start * y_bytes
        column = np.int64(0)
        while column < b:
            width = _tile_columns(b - column)
            row = np.int64(0)
            while row < a:
                height = np.int64(4 if a - row >= 4 else 1)
                panel = Panel(
                    x_address + 4 * row,
                    y_address + 4 * column,
                    out_address + row * y_bytes + 4 * column,
                    count,
                    x_bytes,
                    y_bytes,
                    y_bytes,
                )
                _multiply(height, width, panel)  # type: ignore[reportCallIssue]
                row += height
            column += width


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    """Arguments: threads int32 [1], x [rows, a], y [rows, b]; result [threads, a, b], to add up."""

    def products(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            x, y = matrix(argument(frame, 1)), matrix(argument(frame, 2))
            out = cube(result(frame, 0))
            rows = x.shape[0]
            parts = parts_of(frame, threaded)
            for part in prange(parts):
                _product(x, y, rows * part // parts, rows * (part + 1) // parts, out[part])
        return 0

    return {"partita_gnn_tall": products}


def _self_test() -> None:
    """Registers the kernel and tries it on small tables; AssertionError for a wrong product."""
    bridge.register(_handlers)
    for rows, a, b in ((3, 1, 1), (70, 5, 7), (200, 6, 90)):
        x = np.sin(np.arange(rows * a, dtype=np.float32)).reshape(rows, a)
        y = np.sin(np.arange(rows * b, dtype=np.float32)).reshape(rows, b)
        with jax.ensure_compile_time_eval():
            computed = _call(x, y)
        assert np.allclose(computed, x.T @ y, rtol=1e-4, atol=1e-4), "a product is wrong"


def _call(x: Any, y: Any) -> Any:
    shape = (bridge.threads(), x.shape[1], y.shape[1])
    kernel = jax.ffi.ffi_call("partita_gnn_tall", jax.ShapeDtypeStruct(shape, jnp.float32))
    return kernel(bridge.thread_argument(), x, y).sum(axis=0)


@jax.custom_vjp
def product(x: Any, w: Any) -> Any:
    """x w of x [rows, a] and w [a, b], a layer's dense product."""
    return x @ w


def _product_forward(x: Any, w: Any) -> Any:
    return x @ w, (x, w)


def _product_backward(saved: Any, dy: Any) -> Any:
    x, w = saved
    return dy @ w.T, tall(x, dy)


product.defvjp(_product_forward, _product_backward)


def tall(x: Any, y: Any) -> Any:
    """float32 [a, b]: x^T y of x [rows, a] and y [rows, b]."""
    a, b = x.shape[1], y.shape[1]
    float32 = x.dtype == jnp.float32 and y.dtype == jnp.float32
    if not float32 or a * b > LARGEST or bridge.is_symbolic():
        return jnp.tensordot(x, y, axes=(0, 0))
    if not bridge.works(_self_test, "product"):
        return jnp.tensordot(x, y, axes=(0, 0))
    return _call(x, y) if _effort(a, b) <= _effort(b, a) else _call(y, x).T


def _effort(rows: int, columns: int) -> int:
    """Vector products per row of the tables, with the result's columns in vectors."""
    vectors = columns // 16 + columns % 16 // 8 + columns % 8
    return (rows // 4 * 4 + 4 * (rows % 4)) * vectors

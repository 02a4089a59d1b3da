"""Operations on consecutive float32 at addresses, in vector registers, for kernels by numba.

Each operation handles any number of columns in blocks of 16, 8 and 4, and the rest one by one.
`leaky(z)` is z above zero and `SLOPE * z` below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from partita.gnn.kernels.codegen import FLOAT, pointer, prefetch, spread

SLOPE = 0.2
"""Slope of the leaky ReLU below zero."""

FAST = ("reassoc", "contract", "nsz")
"""Freedom to add in another order and to fuse products with sums."""


class Block:
    """`width` consecutive float32 in one register, in LLVM code."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder = builder
        self.width = width
        self.kind: Any = FLOAT if width == 1 else ir.VectorType(FLOAT, width)

    def load(self, address: Any) -> Any:
        return self.builder.load(pointer(self.builder, address, self.kind), align=4)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, pointer(self.builder, address, self.kind), align=4)

    def copies(self, value: Any) -> Any:
        """A register of copies of a float32."""
        return value if self.width == 1 else spread(self.builder, value, self.width)

    def constant(self, value: float) -> Any:
        if self.width == 1:
            return ir.Constant(FLOAT, float(value))
        return ir.Constant(self.kind, [ir.Constant(FLOAT, float(value))] * self.width)

    def add(self, x: Any, y: Any) -> Any:
        return self.builder.fadd(x, y, flags=FAST)

    def times(self, x: Any, y: Any) -> Any:
        return self.builder.fmul(x, y, flags=FAST)

    def by_sign(self, z: Any, above: Any, below: Any) -> Any:
        """`above` where z > 0, else `below`."""
        positive = self.builder.fcmp_ordered(">", z, self.constant(0.0))
        return self.builder.select(positive, above, below)

    def leaky(self, z: Any) -> Any:
        return self.by_sign(z, z, self.times(z, self.constant(SLOPE)))

    def slopes(self, z: Any) -> Any:
        """The derivative of `leaky`."""
        return self.by_sign(z, self.constant(1.0), self.constant(SLOPE))

    def total(self, x: Any) -> Any:
        """The sum of a register, a float32."""
        if self.width == 1:
            return x
        name = f"llvm.vector.reduce.fadd.v{self.width}f32"
        function = self.builder.module.globals.get(name)
        if function is None:
            kind = ir.FunctionType(FLOAT, [FLOAT, self.kind])
            function = ir.Function(self.builder.module, kind, name)
        zero = ir.Constant(FLOAT, 0.0)
        return self.builder.call(function, [zero, x], fastmath=FAST)


def _operation(
    generate: Callable[..., Any], width: int, addresses: int, factors: int, returns: bool
) -> Any:
    """A numba function of addresses, int64, and factors, float32, on one block."""
    result = types.float32 if returns else types.void
    signature = result(*[types.int64] * addresses, *[types.float32] * factors)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = generate(Block(builder, width), *arguments)
        return value if returns else context.get_dummy_value()

    # numba reads the number of arguments from the function's text
    if (addresses, factors) == (3, 0):
        return intrinsic(lambda typing, i, j, k: (signature, emit))
    if (addresses, factors) == (2, 0):
        return intrinsic(lambda typing, i, j: (signature, emit))
    if (addresses, factors) == (2, 1):
        return intrinsic(lambda typing, i, j, f: (signature, emit))
    if (addresses, factors) == (5, 1):
        return intrinsic(lambda typing, i, j, k, m, n, f: (signature, emit))
    assert (addresses, factors) == (5, 2)
    return intrinsic(lambda typing, i, j, k, m, n, f, g: (signature, emit))


def _score_block(block: Block, l: Any, r: Any, a: Any) -> Any:
    z = block.add(block.load(l), block.load(r))
    return block.total(block.times(block.load(a), block.leaky(z)))


def _dot_block(block: Block, x: Any, y: Any) -> Any:
    return block.total(block.times(block.load(x), block.load(y)))


def _add_block(block: Block, out: Any, x: Any, w: Any) -> None:
    product = block.times(block.copies(w), block.load(x))
    block.store(block.add(block.load(out), product), out)


def _destination_block(block: Block, l: Any, r: Any, a: Any, dr: Any, da: Any, ds: Any) -> None:
    z = block.add(block.load(l), block.load(r))
    copies = block.copies(ds)
    of_score = block.times(block.times(copies, block.load(a)), block.slopes(z))
    block.store(block.add(block.load(dr), of_score), dr)
    block.store(block.add(block.load(da), block.times(copies, block.leaky(z))), da)


def _source_block(block: Block, l: Any, r: Any, a: Any, dy: Any, dl: Any, w: Any, ds: Any) -> None:
    z = block.add(block.load(l), block.load(r))
    of_score = block.times(block.times(block.copies(ds), block.load(a)), block.slopes(z))
    of_row = block.times(block.copies(w), block.load(dy))
    block.store(block.add(block.load(dl), block.add(of_score, of_row)), dl)


def _blocks(generate: Callable[..., Any], addresses: int, factors: int, returns: bool) -> Any:
    """The operation on blocks of 16, 8, 4 and 1 columns."""
    return [_operation(generate, w, addresses, factors, returns) for w in (16, 8, 4, 1)]


_score_16, _score_8, _score_4, _score_1 = _blocks(_score_block, 3, 0, True)
_dot_16, _dot_8, _dot_4, _dot_1 = _blocks(_dot_block, 2, 0, True)
_add_16, _add_8, _add_4, _add_1 = _blocks(_add_block, 2, 1, False)
_destination_16, _destination_8, _destination_4, _destination_1 = _blocks(
    _destination_block, 5, 1, False
)
_source_16, _source_8, _source_4, _source_1 = _blocks(_source_block, 5, 2, False)


@njit(nogil=True, inline="always")
def score(l, r, a, columns):
    """The sum over columns of a * leaky(l + r)."""
    total = np.float32(0)
    c = 0
    while columns - c >= 16:
        total += _score_16(l + 4 * c, r + 4 * c, a + 4 * c)
        c += 16
    if columns - c >= 8:
        total += _score_8(l + 4 * c, r + 4 * c, a + 4 * c)
        c += 8
    if columns - c >= 4:
        total += _score_4(l + 4 * c, r + 4 * c, a + 4 * c)
        c += 4
    while c < columns:
        total += _score_1(l + 4 * c, r + 4 * c, a + 4 * c)
        c += 1
    return total


@njit(nogil=True, inline="always")
def dot(x, y, columns):
    """The sum over columns of x * y."""
    total = np.float32(0)
    c = 0
    while columns - c >= 16:
        total += _dot_16(x + 4 * c, y + 4 * c)
        c += 16
    if columns - c >= 8:
        total += _dot_8(x + 4 * c, y + 4 * c)
        c += 8
    if columns - c >= 4:
        total += _dot_4(x + 4 * c, y + 4 * c)
        c += 4
    while c < columns:
        total += _dot_1(x + 4 * c, y + 4 * c)
        c += 1
    return total


@njit(nogil=True, inline="always")
def add_scaled(out, x, w, columns):
    """Adds w * x to out."""
    c = 0
    while columns - c >= 16:
        _add_16(out + 4 * c, x + 4 * c, w)
        c += 16
    if columns - c >= 8:
        _add_8(out + 4 * c, x + 4 * c, w)
        c += 8
    if columns - c >= 4:
        _add_4(out + 4 * c, x + 4 * c, w)
        c += 4
    while c < columns:
        _add_1(out + 4 * c, x + 4 * c, w)
        c += 1


@njit(nogil=True, inline="always")
def add_destination(l, r, a, dr, da, ds, columns):
    """Adds ds times the derivatives of a score in r and a to dr and da."""
    c = 0
    while columns - c >= 16:
        b = 4 * c
        _destination_16(l + b, r + b, a + b, dr + b, da + b, ds)
        c += 16
    if columns - c >= 8:
        b = 4 * c
        _destination_8(l + b, r + b, a + b, dr + b, da + b, ds)
        c += 8
    if columns - c >= 4:
        b = 4 * c
        _destination_4(l + b, r + b, a + b, dr + b, da + b, ds)
        c += 4
    while c < columns:
        b = 4 * c
        _destination_1(l + b, r + b, a + b, dr + b, da + b, ds)
        c += 1


@njit(nogil=True, inline="always")
def add_source(l, r, a, dy, dl, w, ds, columns):
    """Adds w * dy and ds times the derivative of a score in l to dl."""
    c = 0
    while columns - c >= 16:
        b = 4 * c
        _source_16(l + b, r + b, a + b, dy + b, dl + b, w, ds)
        c += 16
    if columns - c >= 8:
        b = 4 * c
        _source_8(l + b, r + b, a + b, dy + b, dl + b, w, ds)
        c += 8
    if columns - c >= 4:
        b = 4 * c
        _source_4(l + b, r + b, a + b, dy + b, dl + b, w, ds)
        c += 4
    while c < columns:
        b = 4 * c
        _source_1(l + b, r + b, a + b, dy + b, dl + b, w, ds)
        c += 1


@intrinsic
def fetch_ahead(typing, address):  # type: ignore[no-untyped-def]
    """Fetches up to four cache lines, 256 bytes, at an address, to be read."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        prefetch(builder, arguments[0], 256)
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def _float_of_bits(typing, bits):  # type: ignore[no-untyped-def]
    """The float32 of these bits, int32."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], FLOAT)

    return types.float32(types.int32), generate


@njit(nogil=True, inline="always", fastmath={"contract"})
def exponential(x):
    """e^x of a float32 to 2e-7 of its value, in operations that LLVM can vectorize.

    x is reduced to n ln 2 + y with |y| < 0.35; a polynomial of degree 6 (Taylor) gives e^y.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    y = x - n * np.float32(0.693359375)
    y = y + n * np.float32(2.12194440e-4)
    p = np.float32(1.0 / 720)
    p = p * y + np.float32(1.0 / 120)
    p = p * y + np.float32(1.0 / 24)
    p = p * y + np.float32(1.0 / 6)
    p = p * y + np.float32(0.5)
    p = p * y + np.float32(1.0)
    p = p * y + np.float32(1.0)
    bits = (np.int32(n) + np.int32(127)) << np.int32(23)
    return p * _float_of_bits(np.int32(bits))  # type: ignore[reportCallIssue]

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
from numba.core import cgutils
from numba.extending import intrinsic

from partita.gnn.kernels.codegen import FLOAT, number, pointer, prefetch, spread

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


def _operation(code: Callable[..., Any]) -> Any:
    """A numba function of (addresses, int64; factors, float32; columns), both of them tuples.

    It runs `code(block, *addresses, *factors)` on blocks of columns. The result is the sum of the
    numbers that it returns.
    """

    def operation(typing: Any, addresses: Any, factors: Any, columns: Any) -> Any:
        return types.float32(addresses, factors, columns), generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        addresses, factors = (cgutils.unpack_tuple(builder, given) for given in arguments[:2])
        columns = context.cast(builder, arguments[2], signature.args[2], types.int64)
        column = cgutils.alloca_once_value(builder, number(0))
        total = cgutils.alloca_once_value(builder, ir.Constant(FLOAT, 0.0))
        for width, repeats in ((16, True), (8, False), (4, False), (1, True)):
            body = builder.append_basic_block("columns")
            end = builder.append_basic_block("end")

            def fits(width: int = width) -> Any:
                left = builder.sub(columns, builder.load(column))
                return builder.icmp_signed(">=", left, number(width))

            builder.cbranch(fits(), body, end)
            builder.position_at_end(body)
            offset = builder.mul(builder.load(column), number(4))
            places = [builder.add(address, offset) for address in addresses]
            value = code(Block(builder, width), *places, *factors)
            if value is not None:
                builder.store(builder.fadd(builder.load(total), value), total)
            builder.store(builder.add(builder.load(column), number(width)), column)
            builder.cbranch(fits(), body, end) if repeats else builder.branch(end)
            builder.position_at_end(end)
        return builder.load(total)

    return intrinsic(operation)


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


score = _operation(_score_block)
"""score((l, r, a), (), columns): the sum over columns of a * leaky(l + r)."""

dot = _operation(_dot_block)
"""dot((x, y), (), columns): the sum over columns of x * y."""

add_scaled = _operation(_add_block)
"""add_scaled((out, x), (w,), columns) adds w * x to out."""

add_destination = _operation(_destination_block)
"""add_destination((l, r, a, dr, da), (ds,), columns) adds ds times the derivatives of a score in r
and a to dr and da."""

add_source = _operation(_source_block)
"""add_source((l, r, a, dy, dl), (w, ds), columns) adds w * dy, and ds times the derivative of a
score in l, to dl."""


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

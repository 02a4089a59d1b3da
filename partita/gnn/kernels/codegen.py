"""LLVM instructions for kernels whose sums must stay in registers, which numba does not promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

LONG = ir.IntType(64)
INT = ir.IntType(32)
FLOAT = ir.FloatType()


def number(value: int) -> Any:
    """An int64 constant."""
    return ir.Constant(LONG, value)


def unpack(b: Any, kind: Any, value: Any) -> Any:
    """A numba NamedTuple of numbers of one type, as the same NamedTuple of LLVM values."""
    fields = [b.extract_value(value, i) for i in range(len(kind.fields))]
    return kind.instance_class(*fields)


def pointer(b: Any, address: Any, kind: Any) -> Any:
    """An address, int64, as a pointer to an LLVM type."""
    return b.inttoptr(address, kind.as_pointer())


def vector_pointer(b: Any, address: Any, j: int, vector: Any) -> Any:
    """Pointer to vector j of consecutive float32 vectors at an address."""
    return pointer(b, b.add(address, number(4 * vector.count * j)), vector)


def load_element(b: Any, address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of an array of a type of 4 bytes at an address."""
    element = b.add(address, b.mul(index, number(4)))
    return b.load(pointer(b, element, kind), align=4)


def spread(b: Any, value: Any, width: int) -> Any:
    """A vector of `width` copies of a float32."""
    undefined = ir.Constant(ir.VectorType(FLOAT, width), ir.Undefined)
    first = b.insert_element(undefined, value, ir.Constant(INT, 0))
    lanes = ir.Constant(ir.VectorType(INT, width), [0] * width)
    return b.shuffle_vector(first, undefined, lanes)


def switch(b: Any, key: Any, cases: dict[int, Callable[[], None]]) -> None:
    """Runs the case whose number equals `key`, which must be one of them, and goes on after it."""
    end = b.append_basic_block("end")
    choice = b.switch(key, end)
    for value, generate in cases.items():
        case = b.append_basic_block("case")
        choice.add_case(number(value), case)
        b.position_at_end(case)
        generate()
        b.branch(end)
    b.position_at_end(end)


def prefetch(b: Any, address: Any, size: int) -> None:
    """Fetches `size` bytes at an address into the nearest cache, to be read."""
    byte_pointer = ir.IntType(8).as_pointer()
    name = "llvm.prefetch.p0"
    function = b.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, INT, INT, INT])
        function = ir.Function(b.module, kind, name)
    read, most_local, data = (ir.Constant(INT, flag) for flag in (0, 3, 1))
    for offset in range(0, size, 64):
        line = b.inttoptr(b.add(address, number(offset)), byte_pointer)
        b.call(function, [line, read, most_local, data])

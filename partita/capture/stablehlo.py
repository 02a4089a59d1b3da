"""Access to StableHLO modules: parse, print, walk, number.

The numbering of values is the contract of the whole project. `numbered` visits a module in one
fixed order: here to number the tensors of an OperatorGraph, and in `execute.annotate` to find them
again in a fresh parse of the same text.

Only this folder and `execute.annotate` touch MLIR's Python bindings and JAX's dialect registry.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# The only way to a context with every dialect registered.
from jax._src.interpreters import mlir as jax_mlir
from jax.extend.mlir import ir, passmanager

from partita.errors import CaptureError

OPAQUE = {
    "reduce",
    "reduce_window",
    "scatter",
    "select_and_scatter",
    "sort",
    "map",
    "all_reduce",
    "reduce_scatter",
    "custom_call",
}
"""Instructions whose regions only combine two elements."""
BRANCHING = ("while", "case", "if")
"""Instructions whose regions are part of the program."""

DTYPES = {
    "i1": "bool",
    "i4": "int4",
    "i8": "int8",
    "i16": "int16",
    "i32": "int32",
    "i64": "int64",
    "ui4": "int4",
    "ui8": "uint8",
    "ui16": "uint16",
    "ui32": "uint32",
    "ui64": "uint64",
    "f16": "float16",
    "bf16": "bfloat16",
    "f32": "float32",
    "f64": "float64",
    "complex<f32>": "complex64",
    "complex<f64>": "complex128",
}


def context() -> ir.Context:
    """An MLIR context that knows StableHLO, CHLO and Shardy."""
    return jax_mlir.make_ir_context()


def parse(source: bytes) -> ir.Module:
    """A fresh module from prepared bytes, in the current context. Edit only a module from here."""
    return ir.Module.parse(source)


def serialize(module: ir.Module) -> bytes:
    """MLIR bytecode of a module."""
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    return buffer.getvalue()


def zeros(kind: Any, point: ir.InsertionPoint) -> Any:
    """Zeros of a tensor type, as a constant at a point of a module."""
    element = str(ir.RankedTensorType(kind).element_type)
    zero = "0"
    if element.startswith("complex"):
        zero = "(0.0, 0.0)"
    elif element.startswith(("f", "bf")):
        zero = "0.0"
    elif element == "i1":
        zero = "false"
    # MLIR's Python cannot hold the value of a complex constant.
    value = f"dense<{zero}> : {kind}"
    constant = ir.Operation.parse(
        f'%0 = "stablehlo.constant"() <{{value = {value}}}> : () -> {kind}'
    )
    point.insert(constant)
    return constant.results[0]


def run(module: ir.Module, pipeline: str) -> None:
    """Runs MLIR passes on a module."""
    passmanager.PassManager.parse(pipeline).run(module.operation)


def functions_of(module: ir.Module) -> dict[str, Any]:
    """The functions of a module by name."""
    functions = {}
    for op in module.body:
        operation = op.operation
        if operation.name == "func.func":
            functions[ir.StringAttr(operation.attributes["sym_name"]).value] = operation
    return functions


def main_block(module: ir.Module) -> ir.Block:
    """The body of the function 'main'."""
    functions = functions_of(module)
    if "main" not in functions:
        raise CaptureError("The program has no function 'main'. Export it with jax.export.")
    return functions["main"].regions[0].blocks[0]


def short(name: str) -> str:
    """The name of an instruction without its dialect."""
    return name.split(".", 1)[1]


def inner_blocks(operation: Any) -> Iterator[ir.Block]:
    """The blocks of an operation's regions."""
    for region in operation.regions:
        yield from region.blocks


def walk(block: ir.Block) -> Iterator[Any]:
    """Every operation of a block in program order.

    The bodies of loops and branches follow their operation.
    """
    for op in block:
        operation = op.operation
        yield operation
        if short(operation.name) not in OPAQUE:
            for inner in inner_blocks(operation):
                yield from walk(inner)


def producer_of(value: Any) -> Any:
    """The operation that computes a value, None for an argument of a block."""
    return None if isinstance(value.owner, ir.Block) else value.owner.operation


def elements_of(value: Any) -> ir.DenseElementsAttr | None:
    """The elements of a constant.

    None for other values, and for complex ones, which MLIR's Python cannot represent.
    """
    constant = producer_of(value)
    if constant is None or constant.name != "stablehlo.constant":
        return None
    if "complex" in str(value.type):
        return None
    return ir.DenseElementsAttr(constant.attributes["value"])


def copy_operations(
    operations: Iterable[Any],
    position: ir.InsertionPoint,
    copies: dict[Any, Any],
) -> None:
    """Copies operations in order. `copies` replaces the values that they read, and grows."""
    for operation in operations:
        copy = operation.clone(position)
        replace_operands(copy, copies)
        copies.update(zip(operation.results, copy.results, strict=True))


def replace_operands(operation: Any, values: Mapping[Any, Any]) -> None:
    """Replaces the operands of an operation and of all inside it."""
    for position, operand in enumerate(operation.operands):
        if operand in values:
            operation.operands[position] = values[operand]
    for block in inner_blocks(operation):
        for op in block:
            replace_operands(op.operation, values)


def numbered(block: ir.Block) -> tuple[list[Any], list[Any]]:
    """The values and operations of a block and its inner blocks.

    They are in the order of the tensors and instructions of a graph.
    """
    values: dict[Any, None] = dict.fromkeys(block.arguments)
    operations: list[Any] = []
    _number(block, values, operations)
    return list(values), operations


def _number(block: ir.Block, values: dict[Any, None], operations: list[Any]) -> None:
    for op in block:
        operation = op.operation
        name = short(operation.name)
        values.update(dict.fromkeys(operation.operands))
        if name == "return":
            continue
        values.update(dict.fromkeys(operation.results))
        operations.append(operation)
        if name in BRANCHING:
            for inner in inner_blocks(operation):
                values.update(dict.fromkeys(inner.arguments))
                _number(inner, values, operations)

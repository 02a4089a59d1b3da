"""A piece as a program of its own: the step's text with all other statements erased."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.jax_functions import Text
from partita.execute.annotate import Annotator, join_split
from partita.execute.late_copies import LateCopies
from partita.graph.operator_graph import OperatorGraph, Tensor
from partita.plans.phases import DataFlow, Statement
from partita.plans.pieces import Piece


def statements(source: bytes) -> tuple[Statement, ...]:
    """The statements of a program, in order."""
    with stablehlo.context(), ir.Location.unknown():
        module = stablehlo.parse(source)
        block = stablehlo.main_block(module)
        values, operations = stablehlo.numbered(block)
        tensor_of = {value: t for t, value in enumerate(values)}
        index_of = {operation: n for n, operation in enumerate(operations)}
        result = []
        for op in _statements_of(block):
            inner: set[Any] = set()
            operands = [*op.operands, *_inner_operands(op, inner)]
            outer = [tensor_of[value] for value in operands if value not in inner]
            makes = tuple(tensor_of[value] for value in op.results)
            result.append(Statement(index_of[op], tuple(dict.fromkeys(outer)), makes))
        return tuple(result)


def constant_operands(source: bytes) -> list[dict[int, float]]:
    """Per instruction the numbers among its operands, broadcast ones included: position -> number.

    Constants and their broadcasts are no instructions here, so that programs for batches of several
    sizes have the same list but for the numbers that depend on the size.
    """
    with stablehlo.context(), ir.Location.unknown():
        module = stablehlo.parse(source)
        operations = stablehlo.walk(stablehlo.main_block(module))
        return [numbers for _, numbers in _with_numbers(operations)]


def other_numbers(whole: bytes, part: bytes) -> dict[tuple[int, int], float]:
    """The numbers of a program that another one has in place of those of `part`.

    (Statement of `part`, position among its operands) -> number in `whole`. None for programs of
    other statements.
    """
    with stablehlo.context(), ir.Location.unknown():
        programs = []
        for source in (whole, part):
            module = stablehlo.parse(source)
            block = stablehlo.main_block(module)
            programs.append(list(_with_numbers(_statements_of(block))))
        of_whole, of_part = programs
        if len(of_whole) != len(of_part):
            return {}
        other = {}
        for (_, large), (k, small) in zip(of_whole, of_part, strict=True):
            for position, number in large.items():
                if small.get(position, number) != number:
                    other[k, position] = number
        return other


def _with_numbers(operations: Iterable[Any]) -> Iterator[tuple[int, dict[int, float]]]:
    """(number of an operation, its operands that are numbers); none for constants."""
    numbers: dict[Any, float] = {}
    for n, operation in enumerate(operations):
        operands = list(operation.operands)
        if operation.name == "stablehlo.constant":
            number = _number(operation)
            if number is not None:
                numbers[operation.results[0]] = number
        elif operation.name == "stablehlo.broadcast_in_dim" and operands[0] in numbers:
            numbers[operation.results[0]] = numbers[operands[0]]
        else:
            yield n, {i: numbers[value] for i, value in enumerate(operands) if value in numbers}


def _number(constant: Any) -> float | None:
    """The number that all elements of a constant are."""
    value = stablehlo.elements_of(constant.results[0])
    if value is None or not value.is_splat:
        return None
    element = value.get_splat_value()
    for kind in (ir.FloatAttr, ir.IntegerAttr):
        if isinstance(element, kind):
            return kind(element).value
    return None


def _replace_number(operation: Any, position: int, number: float) -> None:
    """Gives an operation another constant operand."""
    kind = operation.operands[position].type
    element = ir.RankedTensorType(kind).element_type
    is_integer = isinstance(element, ir.IntegerType)
    value = ir.IntegerAttr.get(element, int(number)) if is_integer else None
    attribute = ir.DenseElementsAttr.get_splat(kind, value or ir.FloatAttr.get(element, number))
    with ir.InsertionPoint(operation):
        constant = ir.Operation.create(
            "stablehlo.constant", results=[kind], attributes={"value": attribute}
        )
    operation.operands[position] = constant.results[0]


def _statements_of(block: Any) -> list[Any]:
    """The operations of a block but its return."""
    return [op.operation for op in block][:-1]


def _inner_operands(operation: Any, inner: set[Any]) -> Iterator[Any]:
    """All operands inside an operation's regions; adds the values made there to `inner`."""
    for block in stablehlo.inner_blocks(operation):
        inner.update(block.arguments)
        for op in block:
            yield from op.operation.operands
            inner.update(op.operation.results)
            yield from _inner_operands(op.operation, inner)


def piece_text(
    text: Text,
    flow: DataFlow,
    piece: Piece,
    name: str,
    annotator: Annotator | None,
    numbers: Mapping[tuple[int, int], float] = MappingProxyType({}),
    runs: Sequence[int] = (),
) -> Text:
    """A piece as a function from the list of its `reads` to the list of its `gives`.

    With an annotator, the layout inside the piece is written into it. `numbers`: (statement,
    position) -> a number in place of the constant operand there. `runs`: the rematerialized run of
    every statement, if the copies of a backward piece are to wait for gradients.
    """
    with stablehlo.context(), ir.Location.unknown():
        module = stablehlo.parse(text.mlir_module_serialized)
        block = stablehlo.main_block(module)
        values, _ = stablehlo.numbered(block)
        operations = [op.operation for op in block]
        assert len(operations) == len(flow.statements) + 1, "the text has the flow's statements"
        if annotator is not None:
            annotator.annotate(module)
        for (k, position), number in numbers.items():
            _replace_number(operations[k], position, number)
        kept = {operations[k] for k in piece.statements}
        own = set(operations)
        _replace_interface(block, values, piece)
        _erase_others(block, own, kept)
        if runs and piece.phase == "backward":
            made = [t for k in piece.statements for t in flow.statements[k].makes]
            tensors = {values[t]: t for t in (*piece.reads, *made)}
            of_piece = {operations[k]: k for k in piece.statements}
            LateCopies(block, flow, runs, of_piece, tensors, annotator).write()
        if annotator is not None:
            annotator.finish(block, flow.instructions(piece.statements))
        else:
            join_split(block)
        _set_type(block, piece, annotator)
        module.operation.verify()
        source = stablehlo.serialize(module)
    return _exported(text, flow.graph, piece, name, source)


def _replace_interface(block: Any, values: list[Any], piece: Piece) -> None:
    """Makes `reads` arguments, behind the present ones, and returns `gives`."""
    for t in piece.reads:
        argument = block.add_argument(values[t].type, ir.Location.unknown())
        values[t].replace_all_uses_with(argument)
        values[t] = argument
    list(block)[-1].operation.erase()
    with ir.InsertionPoint(block):
        ir.Operation.create("func.return", operands=[values[t] for t in piece.gives])


def _erase_others(block: Any, own: set[Any], kept: set[Any]) -> None:
    """Erases the other statements, and constraints that no kept statement reads."""
    for operation in reversed(_statements_of(block)):
        if operation in kept:
            continue
        is_constraint = operation not in own
        is_read = any(list(result.uses) for result in operation.results)
        if is_constraint and is_read:
            continue
        assert not is_read, "a statement of the piece reads one of another piece"
        operation.erase()


def _set_type(block: Any, piece: Piece, annotator: Annotator | None) -> None:
    """Erases the step's arguments; the function's type becomes the piece's."""
    for number in reversed(range(len(block.arguments) - len(piece.reads))):
        block.erase_argument(number)
    results = [value.type for value in list(block)[-1].operation.operands]
    arguments = [argument.type for argument in block.arguments]
    function = block.owner
    function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(arguments, results))
    for name in ("arg_attrs", "res_attrs"):
        if name in function.attributes:
            del function.attributes[name]
    if annotator is not None:
        shardings = [annotator.argument_attribute(t) for t in piece.reads]
        function.attributes["arg_attrs"] = ir.ArrayAttr.get(shardings)


def _exported(
    text: Text,
    graph: OperatorGraph,
    piece: Piece,
    name: str,
    source: bytes,
) -> Text:
    """The exported program of a piece's module."""
    inputs = [aval(graph.tensors[t]) for t in piece.reads]
    outputs = [aval(graph.tensors[t]) for t in piece.gives]
    fields = {f.name: getattr(text, f.name) for f in dataclasses.fields(text)}
    fields.update(
        fun_name=name,
        mlir_module_serialized=source,
        in_tree=jax.tree.structure(((inputs,), {})),
        in_avals=tuple(inputs),
        out_tree=jax.tree.structure(outputs),
        out_avals=tuple(outputs),
        _in_named_shardings=_no_shardings(inputs),
        _out_named_shardings=_no_shardings(outputs),
        in_shardings_hlo=_no_shardings(inputs),
        out_shardings_hlo=_no_shardings(outputs),
        module_kept_var_idx=tuple(range(len(inputs))),
    )
    return Text(**fields)


def _no_shardings(values: Sequence[Any]) -> tuple[None, ...]:
    return (None,) * len(values)


def aval(tensor: Tensor) -> Any:
    """JAX's shape and dtype of a tensor."""
    return ShapedArray(tensor.shape, jnp.dtype(tensor.dtype))

"""Prepares an exported module for planning: inlined calls, folded gradients, constants in place.

`prepare` returns the text that is planned and run. Every rewrite keeps the values of the program.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
from jax.extend.mlir import deserialize_portable_artifact, ir

from partita.capture.barriers import drop_barriers, split_barriers
from partita.capture.conditionals import split_conditionals
from partita.capture.fused_products import PAD, split_fused_products
from partita.capture.instructions import adds, dot_dims
from partita.capture.names import location_name, phase_of
from partita.capture.single_device import drop_collectives
from partita.capture.stablehlo import (
    DTYPES,
    OPAQUE,
    context,
    elements_of,
    functions_of,
    inner_blocks,
    main_block,
    producer_of,
    replace_operands,
    run,
    serialize,
    short,
    walk,
)

CALLS = {"func.call": "callee", "stablehlo.composite": "decomposition"}
"""Instruction that stands for a function -> the attribute with the function's name."""


def prepare(portable: bytes, platform: str) -> bytes:
    """The module with calls inlined and constants split per use, as MLIR bytecode.

    `platform` is the one that will run it: "cpu", "cuda" or "tpu".

    Not as a portable artifact: writing one hoists constants out of loops again.
    """
    with context(), ir.Location.unknown():
        return _prepared(deserialize_portable_artifact(portable), platform)


def prepare_text(text: str, platform: str) -> bytes:
    """A module of StableHLO text, prepared as `prepare` does it."""
    with context(), ir.Location.unknown():
        return _prepared(ir.Module.parse(text), platform)


def _prepared(module: ir.Module, platform: str) -> bytes:
    _inline_calls(module)
    drop_collectives(module)
    if platform == "cpu":
        drop_barriers(module)
    _drop_identities(module)
    run(module, "builtin.module(cse)")
    _fold_transposes(module)
    _fold_sums(module)
    if platform != "cpu":
        split_fused_products(module)
    split_barriers(module)
    split_conditionals(module)
    run(module, "builtin.module(sdy-constant-or-scalar-splitter)")
    _restore_constants(module)
    _sink_constants(main_block(module), None)
    return serialize(module)


# ---- calls


def _inline_calls(module: ir.Module) -> None:
    """Replaces every call, and every composite (JAX's `top_k` is one), by its body.

    The caller's name is put before the callee's. MLIR's own `inline` pass leaves the calls of
    jitted helpers (no inliner interface is registered for them), and Shardy's rules stop at a call.
    """
    functions = functions_of(module)
    _expand_all([op.operation for op in main_block(module)], functions)
    for name, function in functions.items():
        if name != "main":
            function.erase()


def _expand_all(operations: list[Any], functions: dict[str, Any]) -> None:
    """Expands the calls among operations and inside them."""
    for operation in operations:
        if operation.name in CALLS:
            attribute = operation.attributes[CALLS[operation.name]]
            function = functions[ir.FlatSymbolRefAttr(attribute).value]
            _expand_all(_expand(operation, function), functions)
        elif short(operation.name) not in OPAQUE:
            for block in inner_blocks(operation):
                _expand_all([op.operation for op in block], functions)


def _expand(call: Any, function: Any) -> list[Any]:
    """Replaces a call by a copy of the function's body, and returns the copied operations."""
    body = function.regions[0].blocks[0]
    value_of = dict(zip(body.arguments, call.operands, strict=True))
    prefix = location_name(call)
    position = ir.InsertionPoint(call)
    copies = []
    for op in body:
        source = op.operation
        if source.name == "func.return":
            for result, value in zip(call.results, source.operands, strict=True):
                result.replace_all_uses_with(value_of.get(value, value))
            continue
        # A clone is a view of its class, whose `name` may be an attribute (of a composite).
        copy = source.clone(position).operation
        replace_operands(copy, value_of)
        _prefix_names(copy, prefix)
        value_of.update(zip(source.results, copy.results, strict=True))
        copies.append(copy)
    call.erase()
    return copies


def _prefix_names(operation: Any, prefix: str) -> None:
    """Puts a name before those of an operation and of all inside it."""
    operation.location = ir.Location.name(f"{prefix}/{location_name(operation)}")
    for block in inner_blocks(operation):
        for op in block:
            _prefix_names(op.operation, prefix)


# ---- transposed products


def _fold_transposes(module: ir.Module) -> None:
    """Exchanges the sides of products whose result is only read transposed.

    XLA does so too, but not where a collective comes in between, as it does for the weight gradient
    of a product. There it leaves an optimizer that reads the sum column by column (seen on jax
    0.10.2, CPU: a tenth of the memory's bandwidth).
    """
    for operation in list(walk(main_block(module))):
        if operation.name != "stablehlo.transpose":
            continue
        dot = producer_of(operation.operands[0])
        if dot is None or dot.name != "stablehlo.dot_general" or "algorithm" in dot.attributes:
            continue
        if _use_count(dot) != 1:
            continue
        permutation = list(ir.DenseI64ArrayAttr(operation.attributes["permutation"]))
        if permutation != _exchanging_permutation(dot):
            continue
        attributes = _exchanged_attributes(dot)
        operands = list(dot.operands)[::-1]
        exchanged = _recreated(dot, operation.results[0].type, operands, attributes)
        operation.results[0].replace_all_uses_with(exchanged.results[0])
        operation.erase()
        dot.erase()


def _exchanging_permutation(dot: Any) -> list[int]:
    """The permutation of a product's result that exchanges the free dims of its sides."""
    batch, contracted = dot_dims(dot, "lhs")
    rank = len(dot.results[0].type.shape)
    free = len(dot.operands[0].type.shape) - len(batch) - len(contracted)
    left_end = len(batch) + free
    return [*range(len(batch)), *range(left_end, rank), *range(len(batch), left_end)]


def _exchanged_attributes(dot: Any) -> dict[str, Any]:
    """The attributes of a product with its sides exchanged."""
    attributes = dict(dot.attributes.items())
    other_side = {"lhs": "rhs", "rhs": "lhs"}
    dimension_numbers = re.sub(
        "lhs|rhs",
        lambda side: other_side[side.group()],
        str(dot.attributes["dot_dimension_numbers"]),
    )
    attributes["dot_dimension_numbers"] = ir.Attribute.parse(dimension_numbers)
    if "precision_config" in attributes:
        precisions = list(ir.ArrayAttr(attributes["precision_config"]))
        attributes["precision_config"] = ir.ArrayAttr.get(precisions[::-1])
    return attributes


# ---- sums of gradients


def _fold_sums(module: ir.Module) -> None:
    """Simplifies the gradients of shared weights, so that additions read them directly.

    - A sum over dims of size 1 becomes a reshape.
    - A reshape of a reshape becomes one reshape.
    - A product in 16 bits that is widened to be added has a wide result.

    JAX writes the gradient of a bias as a sum, a reshape and a sum over nothing, and that of a
    weight kept in float32 as a product in bfloat16 that is converted. Where a weight is used more
    than once, such gradients are added. Read directly, they can be added before devices sum them
    (`graph.gradient_sums`), and they are not rounded in between.
    """
    for operation in list(walk(main_block(module))):
        if operation.name == "stablehlo.reduce":
            _reduce_as_reshape(operation)
        elif operation.name == "stablehlo.reshape":
            _merge_reshapes(operation)
        elif operation.name == "stablehlo.convert":
            _widen_product(operation)


def _reduce_as_reshape(reduce: Any) -> None:
    """Replaces a sum over dims of size 1 by a reshape."""
    if len(reduce.results) > 1 or not adds(reduce, "reduce"):
        return
    operand = reduce.operands[0]
    if math.prod(operand.type.shape) != math.prod(reduce.results[0].type.shape):
        return
    start = elements_of(reduce.operands[-1])
    if start is None or np.any(np.asarray(start)):
        return
    reshape = ir.Operation.create(
        "stablehlo.reshape",
        results=[reduce.results[0].type],
        operands=[operand],
        loc=reduce.location,
        ip=ir.InsertionPoint(reduce),
    )
    reduce.results[0].replace_all_uses_with(reshape.results[0])
    reduce.erase()
    _merge_reshapes(reshape)


def _merge_reshapes(reshape: Any) -> None:
    """Skips the reshape that a reshape reads, and removes a reshape to the same shape."""
    source = producer_of(reshape.operands[0])
    if source is not None and source.name == "stablehlo.reshape":
        reshape.operands[0] = source.operands[0]
        if not _use_count(source):
            source.erase()
    if reshape.operands[0].type == reshape.results[0].type:
        reshape.results[0].replace_all_uses_with(reshape.operands[0])
        reshape.erase()


def _widen_product(convert: Any) -> None:
    """Gives a product in 16 bits a float32 result.

    Only if a backward addition is the only reader, and reads it converted.
    """
    dot = producer_of(convert.operands[0])
    if dot is None or dot.name != "stablehlo.dot_general" or "algorithm" in dot.attributes:
        return
    readers = [use.owner for use in convert.results[0].uses]
    if _use_count(dot) != 1 or len(readers) != 1 or readers[0].name != "stablehlo.add":
        return
    if phase_of(location_name(readers[0])) != "backward":
        return
    narrow = DTYPES.get(str(convert.operands[0].type.element_type))
    wide = DTYPES.get(str(convert.results[0].type.element_type))
    if narrow not in ("bfloat16", "float16") or wide != "float32":
        return
    result_type = convert.results[0].type
    product = _recreated(dot, result_type, list(dot.operands), dict(dot.attributes.items()))
    convert.results[0].replace_all_uses_with(product.results[0])
    convert.erase()
    dot.erase()


# ---- identities


def _drop_identities(module: ir.Module) -> None:
    """Removes pads that add nothing, slices that take all of a value, and conversions to the same
    dtype.

    JAX writes the first two around the gradient of pooling whose windows cover the image, and the
    last one for complex numbers, where only the forward product reads it.
    """
    for operation in list(walk(main_block(module))):
        if operation.name == PAD:
            paddings = ("edge_padding_low", "edge_padding_high", "interior_padding")
            is_identity = not any(
                size
                for name in paddings
                for size in ir.DenseI64ArrayAttr(operation.attributes[name])
            )
        elif operation.name in ("stablehlo.slice", "stablehlo.convert"):
            is_identity = operation.operands[0].type == operation.results[0].type
        else:
            continue
        if is_identity:
            operation.results[0].replace_all_uses_with(operation.operands[0])
            operation.erase()


# ---- constants


def _restore_constants(module: ir.Module) -> None:
    """Turns the `sdy.constant` of the splitter back into StableHLO's, which can be serialized."""
    for operation in list(walk(main_block(module))):
        if operation.name != "sdy.constant":
            continue
        position = ir.InsertionPoint(operation)
        if "complex" in str(operation.results[0].type):
            # MLIR's Python cannot hold the value of a complex constant.
            text = operation.get_asm(print_generic_op_form=True)
            constant = ir.Operation.parse(text.replace("sdy.constant", "stablehlo.constant", 1))
            position.insert(constant)
        else:
            constant = ir.Operation.create(
                "stablehlo.constant",
                results=[operation.results[0].type],
                attributes={"value": operation.attributes["value"]},
                loc=operation.location,
                ip=position,
            )
        operation.results[0].replace_all_uses_with(constant.results[0])
        operation.erase()


def _sink_constants(block: ir.Block, outside: set[Any] | None) -> None:
    """Copies constants into the loop bodies that use them.

    As HLO, a loop carries every value that it captures. Its values then outnumber its shardings.
    `outside` is None for the body of the function.
    """
    inside: set[Any] = set(block.arguments)
    for op in list(block):
        operation = op.operation
        if outside is not None:
            _copy_constants(operation, inside)
        inside.update(operation.results)
        if short(operation.name) not in OPAQUE:
            for inner in inner_blocks(operation):
                _sink_constants(inner, inside)


def _copy_constants(operation: Any, inside: set[Any]) -> None:
    """Copies the constants that an operation reads and that are not `inside` its block."""
    for position, operand in enumerate(operation.operands):
        if operand in inside:
            continue
        source = producer_of(operand)
        if source is not None and source.name == "stablehlo.constant":
            copy = source.clone(ir.InsertionPoint(operation))
            operation.operands[position] = copy.results[0]


# ---- operations


def _use_count(operation: Any) -> int:
    """Reads of the first result of an operation."""
    return sum(1 for _ in operation.results[0].uses)


def _recreated(
    operation: Any,
    result_type: Any,
    operands: list[Any],
    attributes: dict[str, Any],
) -> Any:
    """An operation like another one, in front of it, with other operands, attributes and type."""
    return ir.Operation.create(
        operation.name,
        results=[result_type],
        operands=operands,
        attributes=attributes,
        loc=operation.location,
        ip=ir.InsertionPoint(operation),
    )

"""Optimization barriers, one operation per value.

A barrier of `n` operands ties values of different operators, which are split differently:
`jax.checkpoint` puts one around all that a rematerialized block reads. So capture splits it into
`n` barriers of one operand. Execution joins them again: the compiler must not rematerialize a block
before the gradient that its barrier waits for exists.
"""

from __future__ import annotations

from typing import Any

from jax.extend.mlir import ir

from partita.capture.stablehlo import BRANCHING, inner_blocks, main_block, short, walk

BARRIER = "stablehlo.optimization_barrier"
ATTRIBUTES = "mhlo.frontend_attributes"
GROUP = "partita.barrier"
"""The frontend attribute of a barrier with the number of its group."""


def split_barriers(module: ir.Module) -> None:
    """Splits every barrier of several operands into barriers of one operand each, a group."""
    count = 0
    for operation in list(walk(main_block(module))):
        if operation.name != BARRIER or len(operation.operands) < 2:
            continue
        group = ir.Attribute.parse(f'{{{GROUP} = "{count}"}}')
        count += 1
        for operand, result in zip(operation.operands, operation.results, strict=True):
            single = _barrier([operand], operation, ir.InsertionPoint(operation))
            single.attributes[ATTRIBUTES] = group
            result.replace_all_uses_with(single.results[0])
        operation.erase()


def join_barriers(block: ir.Block) -> None:
    """Joins the barriers of each group that `split_barriers` made, with their shardings.

    Operations between them are kept: those that read a barrier move behind the joined one.
    """
    groups: dict[str, list[Any]] = {}
    for op in block:
        operation = op.operation
        if operation.name == BARRIER and ATTRIBUTES in operation.attributes:
            groups.setdefault(str(operation.attributes[ATTRIBUTES]), []).append(operation)
        elif short(operation.name) in BRANCHING:
            for inner in inner_blocks(operation):
                join_barriers(inner)
    for barriers in groups.values():
        _join(block, barriers)


def _join(block: ir.Block, barriers: list[Any]) -> None:
    last = barriers[-1]
    operands = [barrier.operands[0] for barrier in barriers]
    joined = _barrier(operands, last, ir.InsertionPoint(last))
    shardings = [_sharding(barrier) for barrier in barriers]
    if all(shardings):
        text = ", ".join(shardings)
        joined.attributes["sdy.sharding"] = ir.Attribute.parse(f"#sdy.sharding_per_value<[{text}]>")
    position = joined
    for operation in _readers_before(block, barriers):
        operation.move_after(position)
        position = operation
    for barrier, result in zip(barriers, joined.results, strict=True):
        barrier.results[0].replace_all_uses_with(result)
        barrier.erase()


def _readers_before(block: ir.Block, barriers: list[Any]) -> list[Any]:
    """Operations in front of the last barrier that depend on another one, in program order."""
    dependent = {barrier.results[0] for barrier in barriers[:-1]}
    readers = []
    operations = [op.operation for op in block]
    first = operations.index(barriers[0])
    last = operations.index(barriers[-1])
    for operation in operations[first + 1 : last]:
        if operation.name == BARRIER and operation in barriers:
            continue
        if any(operand in dependent for operand in operation.operands):
            dependent.update(operation.results)
            readers.append(operation)
    return readers


def _barrier(operands: list[Any], like: Any, position: ir.InsertionPoint) -> Any:
    """A barrier of operands, with the location of another operation."""
    return ir.Operation.create(
        BARRIER,
        results=[operand.type for operand in operands],
        operands=operands,
        loc=like.location,
        ip=position,
    )


def _sharding(barrier: Any) -> str:
    """The sharding of a barrier of one operand, as text; empty if it has none."""
    if "sdy.sharding" not in barrier.attributes:
        return ""
    text = str(barrier.attributes["sdy.sharding"])
    return text.removeprefix("#sdy.sharding_per_value<[").removesuffix("]>")

"""Optimization barriers, one operation per value.

`jax.checkpoint` puts one barrier around all that a rematerialized block reads: values of several
operators, which are split differently. So capture splits it into siblings of one operand. They are
joined for the compiler, which must not rematerialize a block before the gradient exists that its
barrier waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.mlir import ir

from partita.capture.siblings import mark, replace_siblings, sibling_groups
from partita.capture.stablehlo import main_block, walk

BARRIER = "stablehlo.optimization_barrier"


def drop_barriers(module: ir.Module) -> None:
    """Removes all barriers.

    XLA:CPU removes them too, and then merges rematerialized values with their originals (jax
    0.10.2: a rematerialized network has the FLOPs and the memory of a plain one). So that is the
    program to plan for a CPU.
    """
    for operation in list(walk(main_block(module))):
        if operation.name == BARRIER:
            for operand, result in zip(operation.operands, operation.results, strict=True):
                result.replace_all_uses_with(operand)
            operation.erase()


def split_barriers(module: ir.Module) -> None:
    """Splits every barrier of several operands into barriers of one operand each."""
    for group, operation in enumerate(list(walk(main_block(module)))):
        if operation.name != BARRIER or len(operation.operands) < 2:
            continue
        results = split_barrier(list(operation.operands), operation, group)
        for result, single in zip(operation.results, results, strict=True):
            result.replace_all_uses_with(single)
        operation.erase()


def split_barrier(operands: list[Any], like: Any, group: int | str) -> list[Any]:
    """The results of a new barrier in front of an operation, split into siblings of one operand."""
    siblings = [barrier([operand], like) for operand in operands]
    mark(siblings, group)
    return [sibling.results[0] for sibling in siblings]


def join_barriers(block: ir.Block) -> None:
    """Joins the barriers that `split_barriers` made, with their shardings."""
    for inner, barriers in sibling_groups(block, BARRIER):
        shardings = [_sharding(one) for one in barriers]
        split = next(filter(None, shardings), "")
        if split:
            # Scalars have no sharding of their own.
            whole = split.split(",")[0] + ", []>"
            shardings = [sharding or whole for sharding in shardings]
        operands = [one.operands[0] for one in barriers]
        joined = barrier(operands, barriers[-1], shardings if split else ())
        replace_siblings(inner, barriers, joined)


def barrier(operands: Sequence[Any], like: Any, shardings: Sequence[str] = ()) -> Any:
    """A barrier of operands, in front of another operation and with its location.

    `shardings`: those of its results in the text of `sdy`, `<@mesh, [...]>`; () for none.
    """
    text = f"#sdy.sharding_per_value<[{', '.join(shardings)}]>"
    return ir.Operation.create(
        BARRIER,
        results=[operand.type for operand in operands],
        operands=operands,
        attributes={"sdy.sharding": ir.Attribute.parse(text)} if shardings else {},
        loc=like.location,
        ip=ir.InsertionPoint(like),
    )


def _sharding(barrier: Any) -> str:
    """The sharding of a barrier of one operand, as text; empty if it has none."""
    if "sdy.sharding" not in barrier.attributes:
        return ""
    text = str(barrier.attributes["sdy.sharding"])
    return text.removeprefix("#sdy.sharding_per_value<[").removesuffix("]>")

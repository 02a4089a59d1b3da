"""Collectives of a program for one device, as `shard_map` over a mesh of one device writes them.

Among one device each of them returns its operand. Left in place, XLA would refuse the program on
several devices, since their groups name one.
"""

from __future__ import annotations

from typing import Any

from jax.extend.mlir import ir

from partita.capture.stablehlo import main_block, walk, zeros

COLLECTIVES = (
    "stablehlo.all_gather",
    "stablehlo.all_reduce",
    "stablehlo.all_to_all",
    "stablehlo.collective_broadcast",
    "stablehlo.reduce_scatter",
)
PERMUTATION = "stablehlo.collective_permute"
NUMBERS = ("stablehlo.partition_id", "stablehlo.replica_id")


def drop_collectives(module: ir.Module) -> None:
    """Replaces the collectives of a module for one device by their operands, and the number of the
    device by 0."""
    for operation in list(walk(main_block(module))):
        if operation.name in COLLECTIVES:
            values = list(operation.operands)
        elif operation.name == PERMUTATION:
            is_sent = len(ir.DenseElementsAttr(operation.attributes["source_target_pairs"])) > 0
            values = [operation.operands[0] if is_sent else _zeros(operation)]
        elif operation.name in NUMBERS:
            values = [_zeros(operation)]
        else:
            continue
        for result, value in zip(operation.results, values, strict=True):
            result.replace_all_uses_with(value)
        operation.erase()


def _zeros(like: Any) -> Any:
    """Zeros of the type of an operation's result, in front of it."""
    value = zeros(like.results[0].type, ir.InsertionPoint(like))
    value.owner.location = like.location
    return value

"""Siblings: operations that were one, and are one again for the compiler.

Some operations have results of several operators: an optimization barrier around the weights of a
block, a conditional around an optimizer's update. A plan splits each result in its own way, so
capture divides such an operation into siblings (`capture.barriers`, `capture.conditionals`), marked
with the number of their group. Execution joins them again: a barrier waits for all its operands,
and every conditional costs a GPU a round trip to the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from jax.extend.mlir import ir

from partita.capture.stablehlo import BRANCHING, inner_blocks, short

ATTRIBUTES = "mhlo.frontend_attributes"
GROUP = "partita.siblings"


def mark(siblings: Iterable[Any], group: int | str) -> None:
    """Marks operations as siblings."""
    attribute = ir.Attribute.parse(f'{{{GROUP} = "{group}"}}')
    for operation in siblings:
        operation.attributes[ATTRIBUTES] = attribute


def sibling_groups(block: ir.Block, name: str) -> list[tuple[ir.Block, list[Any]]]:
    """The groups of siblings with an operation name, each with its block, inner blocks first."""
    found = []
    groups: dict[str, list[Any]] = {}
    for op in block:
        operation = op.operation
        if short(operation.name) in BRANCHING:
            for inner in inner_blocks(operation):
                found += sibling_groups(inner, name)
        if operation.name == name and ATTRIBUTES in operation.attributes:
            groups.setdefault(str(operation.attributes[ATTRIBUTES]), []).append(operation)
    return found + [(block, siblings) for siblings in groups.values()]


def replace_siblings(block: ir.Block, siblings: list[Any], joined: Any) -> None:
    """Replaces siblings by one operation, which stands beside the last of them.

    Its results are those of the siblings, in order. Operations between the siblings that read one
    of them move behind it.
    """
    position = joined
    for operation in _readers_between(block, siblings):
        operation.move_after(position)
        position = operation
    results = [result for sibling in siblings for result in sibling.results]
    for old, new in zip(results, joined.results, strict=True):
        old.replace_all_uses_with(new)
    for sibling in siblings:
        sibling.erase()


def _readers_between(block: ir.Block, siblings: list[Any]) -> list[Any]:
    """Operations between siblings that depend on one of them, in program order."""
    operations = [op.operation for op in block]
    first = operations.index(siblings[0])
    last = operations.index(siblings[-1])
    dependent = set(siblings[0].results)
    readers = []
    for operation in operations[first + 1 : last]:
        if operation in siblings:
            dependent.update(operation.results)
        elif any(operand in dependent for operand in operation.operands):
            dependent.update(operation.results)
            readers.append(operation)
    return readers

"""The text of a step with the copies of rematerialized runs (`graph.rematerialize`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jax.extend.mlir import ir

from partita.capture import stablehlo
from partita.capture.barriers import split_barrier
from partita.capture.jax_functions import Captured, Text
from partita.graph.rematerialize import Copies, copies_of, rematerialized
from partita.plans.plan import Plan


def rematerialized_step(captured: Captured, plan: Plan) -> Captured:
    """The captured step with the copies of a plan's rematerialized runs in its graph and text."""
    if not plan.recompute:
        return captured
    copies = copies_of(captured.graph, plan.recompute)
    source = written_copies(captured.text.mlir_module_serialized, copies)
    graph = rematerialized(captured.graph, plan.recompute)
    return replace(captured, graph=graph, text=Text.of(captured.text, source))


def written_copies(source: bytes, copies: Sequence[Copies]) -> bytes:
    """A program with copies in front of their positions, as portable bytes."""
    with stablehlo.context(), ir.Location.unknown():
        module = stablehlo.parse(source)
        values, operations = stablehlo.numbered(stablehlo.main_block(module))
        gradients: dict[int, Any] = {}
        for number, one in enumerate(copies):
            _write(one, f"copies {number}", values, operations, gradients)
        return stablehlo.serialize(module)


def _write(
    copies: Copies,
    group: str,
    values: Sequence[Any],
    operations: Sequence[Any],
    gradients: dict[int, Any],
) -> None:
    """Writes the barriers and copied operations of one run.

    `gradients`: gradient -> its value behind the last barrier.
    """
    reader = operations[copies.position]
    operands = [gradients.get(tensor, values[tensor]) for tensor in copies.barrier]
    results = split_barrier(operands, reader, group)
    copy_of = {values[t]: result for t, result in zip(copies.barrier, results, strict=True)}
    copied = [operations[index] for index in copies.instructions]
    stablehlo.copy_operations(copied, ir.InsertionPoint(reader), copy_of)
    for index, position in copies.readers:
        operand = operations[index].operands[position]
        operations[index].operands[position] = copy_of[operand]
    if copies.gradient < 0:
        return
    gradients[copies.gradient] = results[0]
    for index, position in copies.gradient_readers:
        operations[index].operands[position] = results[0]

"""Slices of a weight as an operator of their own.

Products that read slices of one matrix (`capture.fused_products`) are split by columns, each slice
over all devices. A device's share of the matrix is no share of each slice. So the slices have a
choice of their own: split by rows, each device cuts its rows, and devices exchange parts of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from partita.graph.flat import FlatProgram

WEIGHT_SLICES = "slice"
"""Kind of an operator that is slices of a weight."""

READERS = {"dot_general", "convert", "optimization_barrier"}


@dataclass(frozen=True)
class WeightSlices:
    """The slices of one weight."""

    parameter: int
    instructions: tuple[int, ...]
    """Instructions of the forward pass that slice it, in program order."""


def weight_slices(program: FlatProgram) -> list[WeightSlices]:
    """The slices of weights that only products read, by weight."""
    parameters = {a.tensor for a in program.arguments if a.role == "parameter"}
    slices: dict[int, list[int]] = defaultdict(list)
    for index in program.top_level("forward"):
        parameter = _sliced_weight(program, index)
        if parameter in parameters:
            slices[parameter].append(index)
    return [WeightSlices(p, tuple(parts)) for p, parts in slices.items() if len(parts) > 1]


def weights_of(program: FlatProgram, slices: Sequence[WeightSlices]) -> frozenset[int]:
    """The parameters and their slices."""
    weights = {a.tensor for a in program.arguments if a.role == "parameter"}
    for one in slices:
        for index in one.instructions:
            weights.update(_converted(program, index))
    return frozenset(weights)


def product_readers(program: FlatProgram, slices: WeightSlices) -> list[int]:
    """The readers of slices and of their conversions."""
    readers = []
    for index in slices.instructions:
        for tensor in _converted(program, index):
            readers += program.readers[tensor]
    return readers


def _converted(program: FlatProgram, index: int) -> list[int]:
    """The results of an instruction and of conversions of it."""
    tensors = list(program.instructions[index].results)
    for tensor in tensors:
        for reader in program.readers[tensor]:
            if program.instructions[reader].name == "convert":
                tensors += program.instructions[reader].results
    return tensors


def _sliced_weight(program: FlatProgram, index: int) -> int:
    """The tensor of two dims or more that an instruction slices for products, -1 for none."""
    instruction = program.instructions[index]
    if instruction.name != "slice":
        return -1
    slices = WeightSlices(-1, (index,))
    readers = {program.instructions[i].name for i in product_readers(program, slices)}
    weight = program.base(instruction.operands[0])
    is_weight = len(program.tensors[weight].shape) > 1 and "dot_general" in readers
    return weight if is_weight and readers <= READERS else -1

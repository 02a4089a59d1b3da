"""Sums of partial gradients, for weights that are used several times.

An LSTM of 40 steps reads its weights 40 times, and its backward pass adds 40 products for each.
Where samples are split, every product is itself a sum over devices. Addition is linear: each device
adds its products first, and one sum over devices follows. The additions then work on values that
are still partial.

Only values that are added at once can stay partial: products, scatters and sums, and additions of
these. Convolutions cannot: XLA's partitioner sums the weight gradient of a convolution that is
split in space before it checks whether it should.

Here: all candidates. Those that stay partial under a plan: `cost.partial`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from partita.graph.operator_graph import Instruction, Loop, carried_tensors

SUMMING = {"dot_general", "scatter", "reduce"}
PASSING = {"reshape", "transpose", "convert", "negate", "copy"}


@dataclass(frozen=True, slots=True)
class GradientSum:
    """A gradient that is a sum of partial gradients."""

    additions: tuple[int, ...]
    """Additions in program order; the last one computes the gradient."""
    leaves: tuple[int, ...]
    """Instructions that compute the summands."""


def gradient_sums(
    instructions: Sequence[Instruction],
    loops: Sequence[Loop],
    outputs: Collection[int],
) -> list[GradientSum]:
    """All gradients of weights that are sums of two or more summing instructions.

    The summands have no other reader.
    """
    readers: dict[int, list[int]] = defaultdict(list)
    for index, instruction in enumerate(instructions):
        for tensor in instruction.operands:
            readers[tensor].append(index)
    sums = _partial_sums(
        instructions,
        loops,
        outputs,
        readers,
    )
    summands: set[int] = set()
    for partial in sums.values():
        if partial.additions:
            summands.update(instructions[partial.additions[-1]].operands)
    gradients = []
    for tensor, partial in sums.items():
        is_whole = partial.additions and tensor not in summands
        if is_whole and _is_gradient(instructions, readers, partial.additions[-1]):
            gradients.append(partial)
    return gradients


def _partial_sums(
    instructions: Sequence[Instruction],
    loops: Sequence[Loop],
    outputs: Collection[int],
    readers: dict[int, list[int]],
) -> dict[int, GradientSum]:
    """Tensor -> the sum that it is, for results of summing instructions and of their additions."""
    producer: dict[int, int] = {}
    for index, instruction in enumerate(instructions):
        for tensor in instruction.results:
            producer[tensor] = index
    inside_loops: set[int] = set()
    for loop in loops:
        inside_loops.update(range(*loop.body))
    used_elsewhere = carried_tensors(loops) | set(outputs)
    sums: dict[int, GradientSum] = {}

    def is_summand(tensor: int) -> bool:
        has_one_reader = len(readers[tensor]) == 1 and tensor not in used_elsewhere
        return tensor in sums and has_one_reader

    for index, instruction in enumerate(instructions):
        if instruction.phase != "backward" or index in inside_loops:
            continue
        if len(instruction.results) != 1:
            continue
        result = instruction.results[0]
        if is_partial_sum(instruction, instructions, producer):
            sums[result] = GradientSum((), (index,))
        elif instruction.name == "add":
            one, other = instruction.operands
            if one != other and is_summand(one) and is_summand(other):
                sums[result] = _added(sums[one], sums[other], index)
    return sums


def _added(
    one: GradientSum,
    other: GradientSum,
    addition: int,
) -> GradientSum:
    additions = sorted((*one.additions, *other.additions))
    return GradientSum((*additions, addition), (*one.leaves, *other.leaves))


def is_partial_sum(
    instruction: Instruction,
    instructions: Sequence[Instruction],
    producer: Mapping[int, int],
) -> bool:
    """Whether an instruction sums nothing but its own reads, so that its result can stay partial.

    A scatter adds to its first operand, which must be a constant.
    """
    rule = instruction.rule
    if instruction.name not in SUMMING or not instruction.adds or rule is None:
        return False
    if not rule.reduction:
        return False
    if instruction.name != "scatter":
        return True
    start = producer.get(instruction.operands[0])
    return start is not None and instructions[start].name in ("constant", "broadcast_in_dim")


def _is_gradient(
    instructions: Sequence[Instruction],
    readers: dict[int, list[int]],
    addition: int,
) -> bool:
    """Whether only the update reads the sum, directly or through rearrangements and additions."""
    pending = [addition]
    visited = set()
    while pending:
        for tensor in instructions[pending.pop()].results:
            for reader in readers[tensor]:
                instruction = instructions[reader]
                if instruction.phase == "update" or reader in visited:
                    continue
                if instruction.name != "add" and instruction.name not in PASSING:
                    return False
                visited.add(reader)
                pending.append(reader)
    return True

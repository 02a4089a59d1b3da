"""Rematerialized values: the forward values that a program computes again in its backward pass.

`jax.checkpoint` repeats a block behind optimization barriers, which keep the compiler from merging
the copies. A copy belongs to the operator of its original and is split like it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from partita.graph.operator_graph import Instruction

BARRIER = "optimization_barrier"


def originals(instructions: Sequence[Instruction], loop_of: Mapping[int, int]) -> dict[int, int]:
    """Tensor -> the earlier tensor with the same value, for tensors behind barriers.

    Args:
        instructions: A step in program order.
        loop_of: Instructions inside loops, which are left out.

    Instructions are compared by name, rule and operands, not by attributes. Of several that are
    equal so, as slices of one tensor, each repeats the one with its position among them.
    """
    original: dict[int, int] = {}
    if not any(instruction.name == BARRIER for instruction in instructions):
        return original
    first: dict[tuple[object, ...], list[Instruction]] = defaultdict(list)
    repeated: Counter[tuple[object, ...]] = Counter()
    for index, instruction in enumerate(instructions):
        if index in loop_of:
            continue
        if instruction.name == BARRIER:
            for operand, result in zip(instruction.operands, instruction.results, strict=True):
                original[result] = original.get(operand, operand)
            continue
        operands = tuple(original.get(tensor, tensor) for tensor in instruction.operands)
        if operands == instruction.operands:
            first[_key(instruction, operands)].append(instruction)
            continue
        sources = first.get(_key(instruction, operands))
        if sources:
            key = _key(instruction, instruction.operands)
            source = sources[min(repeated[key], len(sources) - 1)]
            repeated[key] += 1
            original.update(zip(instruction.results, source.results, strict=True))
    return original


def _key(instruction: Instruction, operands: tuple[int, ...]) -> tuple[object, ...]:
    """Equal for instructions that compute the same of the same operands."""
    return (instruction.name, instruction.rule, instruction.windows, operands)

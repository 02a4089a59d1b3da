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
    Capture gives each reader its own copy of a constant; all copies count as the same operand.
    """
    original: dict[int, int] = {}
    if not any(instruction.name == BARRIER for instruction in instructions):
        return original
    same = _equal_constants(instructions, loop_of)
    first: dict[tuple[object, ...], list[Instruction]] = defaultdict(list)
    repeated: Counter[tuple[object, ...]] = Counter()
    for index, instruction in enumerate(instructions):
        if index in loop_of:
            continue
        if instruction.name == BARRIER:
            for operand, result in zip(instruction.operands, instruction.results, strict=True):
                original[result] = original.get(operand, operand)
            continue
        reads = tuple(same.get(tensor, tensor) for tensor in instruction.operands)
        operands = tuple(original.get(tensor, tensor) for tensor in reads)
        if operands == reads:
            first[_key(instruction, operands)].append(instruction)
            continue
        sources = first.get(_key(instruction, operands))
        if sources:
            key = _key(instruction, reads)
            source = sources[min(repeated[key], len(sources) - 1)]
            repeated[key] += 1
            original.update(zip(instruction.results, source.results, strict=True))
    return original


def _equal_constants(
    instructions: Sequence[Instruction], loop_of: Mapping[int, int]
) -> dict[int, int]:
    """Tensor -> the first tensor that is computed alike, for constants and broadcasts.

    Attributes are not compared here either.
    """
    same: dict[int, int] = {}
    first: dict[tuple[object, ...], Instruction] = {}
    constants: set[int] = set()
    for index, instruction in enumerate(instructions):
        is_constant = constants.issuperset(instruction.operands)
        if index in loop_of or not (is_constant or instruction.name == "broadcast_in_dim"):
            continue
        if is_constant:
            constants.update(instruction.results)
        if instruction.name != "constant":
            operands = tuple(same.get(tensor, tensor) for tensor in instruction.operands)
            source = first.setdefault(_key(instruction, operands), instruction)
            same.update(zip(instruction.results, source.results, strict=True))
    return same


def _key(instruction: Instruction, operands: tuple[int, ...]) -> tuple[object, ...]:
    """Equal for instructions that compute the same of the same operands."""
    results = len(instruction.results)
    return (instruction.name, instruction.rule, instruction.windows, operands, results)

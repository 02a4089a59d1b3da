"""Rematerialized values: the forward values that a program computes again in its backward pass.

`jax.checkpoint` repeats a block behind optimization barriers, which keep the compiler from merging
the copies. A copy belongs to the operator of its original and is split like it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from partita.graph.operator_graph import Instruction

BARRIER = "optimization_barrier"


def originals(instructions: Sequence[Instruction], loop_of: Mapping[int, int]) -> dict[int, int]:
    """Tensor -> the earlier tensor with the same value, for tensors behind barriers.

    Args:
        instructions: A step in program order.
        loop_of: Instructions inside loops, which are left out.

    Instructions are compared by name, rule and operands, not by attributes: two slices of one
    tensor are taken for the same. That suffices for ownership and for shardings.
    """
    original: dict[int, int] = {}
    if not any(instruction.name == BARRIER for instruction in instructions):
        return original
    first: dict[tuple[object, ...], Instruction] = {}
    for index, instruction in enumerate(instructions):
        if index in loop_of:
            continue
        if instruction.name == BARRIER:
            for operand, result in zip(instruction.operands, instruction.results, strict=True):
                original[result] = original.get(operand, operand)
            continue
        operands = tuple(original.get(tensor, tensor) for tensor in instruction.operands)
        if operands == instruction.operands:
            first.setdefault(_key(instruction, operands), instruction)
            continue
        source = first.get(_key(instruction, operands))
        if source is not None:
            original.update(zip(instruction.results, source.results, strict=True))
    return original


def _key(instruction: Instruction, operands: tuple[int, ...]) -> tuple[object, ...]:
    """Equal for instructions that compute the same of the same operands."""
    return (instruction.name, instruction.rule, instruction.windows, operands)

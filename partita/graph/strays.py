"""Instructions that share no dim with their operator.

The layer path decides the owner of most instructions (`ownership`). A program without names, or a
penalty on weights that is added to the loss, has instructions that no rule ties to the dims of
their operator. There they would be computed whole, and their split operands gathered. So they move
to the operator of an operand that can be split.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from partita.graph.flat import FlatProgram
from partita.graph.operator_graph import Instruction, Label, Use


class Labels(NamedTuple):
    """The labels of an operator graph."""

    tensors: Sequence[Label]
    """Per tensor its label in the factors of its home."""
    home: Sequence[int]
    """Per tensor the operator that computes it; for an argument its first reader."""
    uses: Sequence[Use]


def strays(program: FlatProgram, labels: Labels, heavy: Collection[int]) -> dict[int, int]:
    """Instruction -> the operator that it moves to.

    Instructions of the update stay with their variable, and those of a loop with the loop.
    """
    has_factor = _with_factors(program, labels)
    movable = [index for index in _movable(program, heavy) if index not in has_factor]
    moves = _moves_to_operands(program, labels, movable)
    for index in reversed(movable):
        # Zeros for a scatter, say.
        tensors = program.instructions[index].results
        readers = [reader for tensor in tensors for reader in program.readers[tensor]]
        if index not in moves and readers and moves.keys() >= set(readers):
            moves[index] = moves[readers[0]]
    for index, instruction in enumerate(program.instructions):
        for tensor in instruction.results:
            original = program.originals.get(tensor)
            if original is not None and program.producer.get(original) in moves:
                moves[index] = moves[program.producer[original]]
    return moves


def _movable(program: FlatProgram, heavy: Collection[int]) -> list[int]:
    """The instructions that may move."""
    fixed = {*heavy, *program.loop_of, *(loop.instruction for loop in program.loops)}
    movable = []
    for phase in ("forward", "backward"):
        for index in program.top_level(phase):
            instruction = program.instructions[index]
            is_clone = any(tensor in program.originals for tensor in instruction.results)
            if not is_clone and not program.is_barrier(index):
                movable.append(index)
    return sorted(set(movable) - fixed)


def _moves_to_operands(
    program: FlatProgram, labels: Labels, movable: Sequence[int]
) -> dict[int, int]:
    """Instructions without a factor -> the operator of their largest operand with a factor that
    their rule does not keep whole."""
    label_of = list(labels.tensors)
    home = list(labels.home)
    moves: dict[int, int] = {}
    for index in movable:
        instruction = program.instructions[index]
        best = (0, 0, -1)
        best_factors: dict[int, int] = {}
        for position, tensor in enumerate(instruction.operands):
            factors = _factors_by_rule(instruction, position, label_of[tensor])
            fit = (program.tensors[tensor].nbytes, len(factors), home[tensor])
            if factors and fit >= best:
                best = fit
                best_factors = factors
        if not best_factors:
            continue
        moves[index] = best[-1]
        assert instruction.rule is not None
        for tensor, mapping in zip(instruction.results, instruction.rule.results, strict=False):
            home[tensor] = best[-1]
            label_of[tensor] = tuple(
                best_factors.get(factors[0], -1) if factors else -1 for factors in mapping
            )
    return moves


def _with_factors(program: FlatProgram, labels: Labels) -> set[int]:
    """The instructions that read or compute a tensor with a factor of their operator."""
    read_label = {read: use.label for use in labels.uses for read in use.instructions}
    found = set()
    for index, instruction in enumerate(program.instructions):
        own = [labels.tensors[tensor] for tensor in instruction.results]
        for position, tensor in enumerate(instruction.operands):
            own.append(read_label.get((index, position), labels.tensors[tensor]))
        if any(factor >= 0 for label in own for factor in label):
            found.add(index)
    return found


def _factors_by_rule(instruction: Instruction, position: int, label: Label) -> dict[int, int]:
    """Factor of an instruction's rule -> the graph's factor that an operand brings to it."""
    rule = instruction.rule
    if rule is None or position >= len(rule.operands):
        return {}
    mapping = rule.operands[position]
    if len(mapping) != len(label):
        return {}
    whole = instruction.whole_factors
    return {
        factors[0]: factor
        for factors, factor in zip(mapping, label, strict=True)
        if factor >= 0 and factors and not whole.intersection(factors)
    }

"""Normalizations as operators of their own: the light instructions after a product with a table or
matrix of weights, up to the next products.

The product of a row-parallel layer is a partial sum over devices. The bias, dropout, residual sum
and normalization after it work on single tokens, so devices can divide the tokens: the all-reduce
becomes a reduce-scatter before them and an all-gather after them (sequence parallelism, Korthikanti
et al. 2022, section 4.2.2). For that, they need a choice of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partita.graph.flat import FlatProgram

NORMALIZATION = "reduce"
"""Kind of an operator that is a normalization."""
PRODUCTS = ("dot_general", "gather")


@dataclass(frozen=True)
class Normalization:
    """The instructions of a normalization, in the operator of the product before it."""

    operator: int
    """The operator of the product."""
    heavy: int
    """A reduction: the instruction that stands for the normalization."""
    instructions: frozenset[int]


def normalizations(
    program: FlatProgram, owner: Sequence[int], heavy: Sequence[int]
) -> list[Normalization]:
    """The normalizations after products, given the owners of forward instructions.

    A normalization reduces all features of a product, and other heavy instructions read it.
    """
    members: list[list[int]] = [[] for _ in heavy]
    for index in program.top_level("forward"):
        if owner[index] >= 0:
            members[owner[index]].append(index)
    result = []
    for operator, product in enumerate(heavy):
        features = _features(program, product)
        if not features or not _is_read_by_products(program, owner, heavy, operator):
            continue
        needed = _needed(program, product, set(members[operator]))
        later = [index for index in members[operator] if index not in needed]
        for index in later:
            if _reduces_features(program, index, product, features):
                result.append(Normalization(operator, index, frozenset(later)))
                break
    return result


def _features(program: FlatProgram, product: int) -> tuple[int, ...]:
    """The trailing dims of a product's result that index its weights; () if others are too few."""
    instruction = program.instructions[product]
    if instruction.name not in PRODUCTS or instruction.rule is None:
        return ()
    parameters = {a.tensor for a in program.arguments if a.role == "parameter"}
    factors: set[int] = set()
    for tensor, dims in zip(instruction.operands, instruction.rule.operands, strict=False):
        if program.base(tensor) in parameters:
            for dim in dims:
                factors.update(dim)
    result_dims = instruction.rule.results[0]
    features = [n for n, dim in enumerate(result_dims) if dim and dim[0] in factors]
    rank = len(result_dims)
    first = rank - len(features)
    is_trailing = features == list(range(first, rank))
    return tuple(features) if is_trailing and first >= 2 else ()


def _reduces_features(
    program: FlatProgram, index: int, product: int, features: tuple[int, ...]
) -> bool:
    """Whether an instruction reduces the features of a tensor that has the product's shape."""
    instruction = program.instructions[index]
    rule = instruction.rule
    if instruction.name != "reduce" or rule is None:
        return False
    shape = program.tensors[program.instructions[product].results[0]].shape
    if program.tensors[instruction.operands[0]].shape != shape:
        return False
    dims = [n for n, dim in enumerate(rule.operands[0]) if dim and dim[0] in rule.reduction]
    return tuple(dims) == features


def _needed(program: FlatProgram, product: int, members: set[int]) -> set[int]:
    """A product and the members of its operator that it needs."""
    needed: set[int] = set()
    pending = [product]
    while pending:
        index = pending.pop()
        if index in needed or index not in members:
            continue
        needed.add(index)
        operands = program.instructions[index].operands
        pending += [program.producer[tensor] for tensor in operands if tensor in program.producer]
    return needed


def _is_read_by_products(
    program: FlatProgram, owner: Sequence[int], heavy: Sequence[int], operator: int
) -> bool:
    """Whether a forward heavy instruction of another operator reads values of an operator."""
    for number, index in enumerate(heavy):
        if number == operator:
            continue
        for tensor in program.instructions[index].operands:
            producer = program.producer.get(program.base(tensor), -1)
            if producer >= 0 and owner[producer] == operator:
                return True
    return False

"""Conditionals, one operation per variable that they update.

`optax.MultiSteps`, `optax.apply_if_finite`, Keras's loss scale and its gradient accumulation put
the whole update of an optimizer into one conditional, whose results belong to all operators.
Capture splits it into siblings with the results of one variable each. They are joined for the
compiler.

Two results stay together where a branch computes both from one array. A sum over an array that
several of them need, the square of a gradient for the global norm say, becomes a conditional of its
own in front of them. Scalars and arrays made of scalars are computed in each sibling.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jax.extend.mlir import ir

from partita.capture.siblings import mark, replace_siblings, sibling_groups
from partita.capture.stablehlo import copy_operations, inner_blocks, main_block, walk, zeros

CONDITIONALS = ("stablehlo.case", "stablehlo.if")


def split_conditionals(module: ir.Module) -> None:
    """Splits every conditional whose results belong to several variables, inner ones first."""
    conditionals = [
        (group, operation)
        for group, operation in enumerate(walk(main_block(module)))
        if operation.name in CONDITIONALS
    ]
    for group, operation in reversed(conditionals):
        arrays = [result for result in operation.results if result.type.shape]
        if len(arrays) > 1:
            _split(operation, group)


def join_conditionals(block: ir.Block) -> None:
    """Joins the conditionals that `split_conditionals` made."""
    for name in CONDITIONALS:
        for inner, siblings in sibling_groups(block, name):
            joined = _joined(siblings)
            replace_siblings(inner, siblings, joined)


def _split(operation: Any, group: int) -> None:
    branches = [_Branch(block) for block in inner_blocks(operation)]
    components = _components(branches, len(operation.results))
    siblings = []
    for number, branch in enumerate(branches):
        for value in branch.shared_sums(components):
            sibling = _conditional(operation, [value.type])
            for other, target in enumerate(inner_blocks(sibling)):
                if other == number:
                    branch.copy_into(target, [value])
                else:
                    _yield(target, [zeros(value.type, ir.InsertionPoint(target))])
            branch.sums[value] = sibling.results[0]
            siblings.append(sibling)
    for positions in components:
        results = [operation.results[position] for position in positions]
        sibling = _conditional(operation, [result.type for result in results])
        for branch, target in zip(branches, inner_blocks(sibling), strict=True):
            branch.copy_into(target, [branch.yielded[position] for position in positions])
        for old, new in zip(results, sibling.results, strict=True):
            old.replace_all_uses_with(new)
        siblings.append(sibling)
    if len(siblings) > 1:
        mark(siblings, group)
    operation.erase()


@dataclass
class _Branch:
    """A branch of a conditional, and the sums that were moved in front of it."""

    block: ir.Block
    sums: dict[Any, Any] = field(default_factory=dict)
    """Scalar summed over an array in this branch -> the result of the conditional for it."""

    def __post_init__(self) -> None:
        operations = [op.operation for op in self.block]
        self.operations = operations[:-1]
        self.yielded = list(operations[-1].operands)
        self.reads = {operation: _reads(operation) for operation in self.operations}
        self.number = {operation: number for number, operation in enumerate(self.operations)}
        self.producer: dict[Any, Any] = {
            result: operation for operation in self.operations for result in operation.results
        }
        self.made_of_scalars: set[Any] = set()
        """Arrays that depend on scalars only, through operations of this branch."""
        for operation in self.operations:
            inputs = self.reads[operation]
            if all(not value.type.shape or value in self.made_of_scalars for value in inputs):
                self.made_of_scalars.update(operation.results)

    def reads_arrays(self, operation: Any) -> bool:
        """Whether an operation reads an array that is more than scalars."""
        return operation.results[0] not in self.made_of_scalars

    def sums_up(self, operation: Any) -> bool:
        """Whether an operation makes scalars of arrays."""
        is_scalar = all(not result.type.shape for result in operation.results)
        return is_scalar and self.reads_arrays(operation)

    def users(self, positions: Sequence[Sequence[int]]) -> dict[Any, set[int]]:
        """Operation -> the groups of results that need it."""
        needed: dict[Any, set[int]] = {operation: set() for operation in self.operations}
        for group, members in enumerate(positions):
            for position in members:
                producer = self.producer.get(self.yielded[position])
                if producer is not None:
                    needed[producer].add(group)
        for operation in reversed(self.operations):
            for value in self.reads[operation]:
                producer = self.producer.get(value)
                if producer is not None:
                    needed[producer] |= needed[operation]
        return needed

    def array_users(self) -> list[set[int]]:
        """Per operation on arrays, the results that read it through arrays only."""
        needed: dict[Any, set[int]] = {operation: set() for operation in self.operations}
        for position, value in enumerate(self.yielded):
            producer = self.producer.get(value)
            if producer is not None and value.type.shape:
                needed[producer].add(position)
        for operation in reversed(self.operations):
            for value in self.reads[operation]:
                producer = self.producer.get(value)
                if producer is not None and value.type.shape:
                    needed[producer] |= needed[operation]
        return [needed[operation] for operation in self.operations if self.reads_arrays(operation)]

    def shared_sums(self, components: Sequence[Sequence[int]]) -> list[Any]:
        """Sums over arrays that other variables than the array's own need, in program order."""
        users = self.users(components)
        has_arrays = [
            any(self.yielded[position].type.shape for position in component)
            for component in components
        ]
        shared = []
        for operation in self.operations:
            groups = users[operation]
            if not self.sums_up(operation) or not groups:
                continue
            if len(groups) > 1 or not has_arrays[min(groups)]:
                shared += list(operation.results)
        return shared

    def copy_into(self, target: ir.Block, values: Sequence[Any]) -> None:
        """Copies the computation of values into a branch, and yields them there."""
        copies: dict[Any, Any] = {
            value: outside for value, outside in self.sums.items() if value not in values
        }
        chosen: set[Any] = set()
        pending = list(values)
        while pending:
            value = pending.pop()
            operation = self.producer.get(value)
            if operation is None or value in copies or operation in chosen:
                continue
            chosen.add(operation)
            pending += self.reads[operation]
        ordered = sorted(chosen, key=self.number.__getitem__)
        copy_operations(ordered, ir.InsertionPoint(target), copies)
        _yield(target, [copies.get(value, value) for value in values])


def _components(branches: Sequence[_Branch], count: int) -> list[list[int]]:
    """Groups of results that share arrays in some branch. All scalars are one group."""
    parent = list(range(count))

    def root(position: int) -> int:
        while parent[position] != position:
            position = parent[position]
        return position

    def unite(positions: Iterable[int]) -> None:
        roots = sorted({root(position) for position in positions})
        for other in roots[1:]:
            parent[other] = roots[0]

    types = [value.type for value in branches[0].yielded]
    unite(position for position, kind in enumerate(types) if not kind.shape)
    for branch in branches:
        for positions in branch.array_users():
            unite(positions)
    groups: dict[int, list[int]] = {}
    for position in range(count):
        groups.setdefault(root(position), []).append(position)
    return list(groups.values())


def _reads(operation: Any) -> list[Any]:
    """The values that an operation reads, in its regions too."""
    values = list(operation.operands)
    for block in inner_blocks(operation):
        for op in block:
            values += _reads(op.operation)
    return values


def _conditional(like: Any, types: Sequence[Any]) -> Any:
    """A conditional in front of another one, on its predicate, with empty branches."""
    operation = ir.Operation.create(
        like.name,
        results=list(types),
        operands=list(like.operands),
        regions=len(like.regions),
        loc=like.location,
        ip=ir.InsertionPoint(like),
    )
    for region in operation.regions:
        region.blocks.append()
    return operation


def _yield(target: ir.Block, values: Sequence[Any]) -> None:
    ir.Operation.create("stablehlo.return", operands=list(values), ip=ir.InsertionPoint(target))


def _joined(siblings: Sequence[Any]) -> Any:
    """One conditional of several, in front of the last one."""
    last = siblings[-1]
    types = [result.type for sibling in siblings for result in sibling.results]
    joined = _conditional(last, types)
    for number, target in enumerate(inner_blocks(joined)):
        copies: dict[Any, Any] = {}
        yielded = []
        for sibling in siblings:
            operations = [op.operation for op in sibling.regions[number].blocks[0]]
            copy_operations(operations[:-1], ir.InsertionPoint(target), copies)
            values = [copies.get(value, value) for value in operations[-1].operands]
            copies.update(zip(sibling.results, values, strict=True))
            yielded += values
        _yield(target, yielded)
    return joined

"""Partial sums: gradients that a device adds up before one all-reduce sums them over devices.

A weight that is used several times has several gradients, which are added (`graph.gradient_sums`).
Where two of them are partial sums over the same devices, and are split alike, each device adds its
own values and the result is a partial sum again. One all-reduce follows the last such addition. In
the program this is Shardy's `unreduced`, which XLA's partitioner respects.

A partial sum of activations that another operator reads is summed on its way there
(`moved_sums`), and sums that meet in additions are joined.

Also: the labels under which an instruction reads its operands, the factors that it sums away, and
whether it is the weight gradient of a convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from partita.cost.reshard import Axes
from partita.graph.flat import LIBRARY_CALLS, Reader, readers_of
from partita.graph.gradient_sums import PASSING, GradientSum, gradient_sums, is_partial_sum
from partita.graph.operator_graph import (
    IdentityKey,
    Instruction,
    Label,
    OperatorGraph,
    Use,
    constant_tensors,
    operand_labels,
    per_graph,
    producers,
)
from partita.plans.layout import Layout

Factors = tuple[int, ...]
"""Factors of the graph, by index."""


def reduced_factors(instruction: Instruction, labels: Sequence[Label]) -> Factors:
    """The graph's factors that an instruction sums away, given the labels of its operands."""
    rule = instruction.rule
    if rule is None or not rule.reduction:
        return ()
    factors: dict[int, None] = {}
    for label, mapping in zip(labels, rule.operands, strict=False):
        for factor, dim in zip(label, mapping, strict=False):
            if factor >= 0 and dim and dim[0] in rule.reduction:
                factors[factor] = None
    return tuple(factors)


@dataclass(frozen=True)
class Gradient:
    """A gradient that one operator adds up from several partial sums."""

    operator: int
    additions: tuple[int, ...]
    """Instructions that add, in program order."""
    result: int
    """Tensor of the last addition."""
    reduced: Factors
    """The operator's factors over which its own leaves are partial sums."""
    leaves: dict[int, Factors]
    """Added tensor -> the factors, of its own operator, over which it is a partial sum."""


@per_graph
def gradients(graph: OperatorGraph) -> tuple[Gradient, ...]:
    """The gradients that an operator adds up from several, at least one of them its own."""
    result = []
    for gradient_sum in gradient_sums(graph.instructions, graph.loops, graph.outputs):
        gradient = _gradient_of(graph, gradient_sum)
        if gradient is not None:
            result.append(gradient)
    return tuple(result)


def _gradient_of(graph: OperatorGraph, gradient_sum: GradientSum) -> Gradient | None:
    """The gradient of one sum.

    None where several operators add, or where the adding operator adds nothing of its own.
    """
    additions = gradient_sum.additions
    operator = graph.owner[additions[-1]]
    if any(graph.owner[i] != operator for i in additions):
        return None
    leaves: dict[int, Factors] = {}
    for i in gradient_sum.leaves:
        instruction = graph.instructions[i]
        leaves[instruction.results[0]] = reduced_factors(instruction, operand_labels(graph, i))
    for tensor, factors in leaves.items():
        if factors and graph.home[tensor] == operator:
            result = graph.instructions[additions[-1]].results[0]
            return Gradient(operator, additions, result, factors, leaves)
    return None


@dataclass(frozen=True)
class PendingSums:
    """Tensors that are partial sums under a layout.

    A tensor that is all-reduced right away is in neither mapping.
    """

    axes: Mapping[int, Axes]
    """Tensor -> the mesh axes over which it is a partial sum when it is computed."""
    totals: Mapping[int, int]
    """Tensor that is all-reduced after its additions -> the last addition."""


def pending_sums(graph: OperatorGraph, layout: Layout) -> PendingSums:
    """The partial sums of a graph under a layout."""
    return _pending_sums(IdentityKey(graph), IdentityKey(layout))


@lru_cache(maxsize=4)
def _pending_sums(
    graph_key: IdentityKey[OperatorGraph], layout_key: IdentityKey[Layout]
) -> PendingSums:
    graph = graph_key.value
    layout = layout_key.value
    pending: dict[int, Axes] = {}
    totals: dict[int, int] = {}
    for gradient in gradients(graph):
        partial_axes = {
            tensor: split_axes(layout, graph.home[tensor], factors)
            for tensor, factors in gradient.leaves.items()
        }
        for i in gradient.additions:
            operands = graph.instructions[i].operands
            result = graph.instructions[i].results[0]
            axes = partial_axes.get(operands[0], ())
            if not axes or partial_axes.get(operands[1], ()) != axes:
                continue
            if not _operands_stay(layout, i, operands, result):
                continue
            partial_axes[result] = axes
            for tensor in (*operands, result):
                pending[tensor] = axes
            for tensor in operands:
                totals.pop(tensor, None)
            totals[result] = i
    return PendingSums(pending, totals)


def unsummed(
    graph: OperatorGraph,
    layout: Layout,
    tensors: Iterable[int],
) -> dict[int, Axes]:
    """Tensor -> the mesh axes over which it can stay a partial sum, of tensors that are only added
    up further: the gradients of several microbatches.

    With each come the values of which it is a sum or another form.
    """
    producer = producers(graph)
    axes_of: dict[int, Axes] = {}
    for tensor in tensors:
        values = summed_values(graph, tensor)
        splits: set[Axes] = set()
        for value in values:
            i = producer[value]
            instruction = graph.instructions[i]
            if instruction.name == "add":
                stays = _operands_stay(layout, i, instruction.operands, value)
                splits.update([] if stays else [()])
            elif not keeps_elements(graph, instruction):
                reduced = reduced_factors(instruction, operand_labels(graph, i))
                splits.add(split_axes(layout, graph.home[value], reduced))
        # Of a value in slices (ZeRO), every device has the sum of its own slice only.
        sliced = {axis for value in values for axes in layout.shardings[value] for axis in axes}
        if len(splits) == 1 and all(splits) and sliced.isdisjoint(*splits):
            axes_of.update(dict.fromkeys(values, splits.pop()))
    return axes_of


@per_graph
def waiting_sums(graph: OperatorGraph) -> dict[int, int]:
    """Tensor -> gradient, for the gradients that devices can add up over microbatches before they
    sum them, and the values of which they are sums or other forms.
    """
    producer = producers(graph)
    waiting: dict[int, int] = {}
    for instruction in graph.instructions:
        for tensor in instruction.operands if instruction.phase == "update" else ():
            if tensor in producer and graph.instructions[producer[tensor]].phase == "backward":
                waiting.update(dict.fromkeys(summed_values(graph, tensor), tensor))
    return waiting


def summed_values(graph: OperatorGraph, tensor: int) -> list[int]:
    """A value and those of which it is a sum or another form, back to instructions that sum nothing
    but their own reads; empty where it is more than that.
    """
    values = []
    pending = [tensor]
    while pending:
        value = pending.pop()
        values.append(value)
        i = producers(graph).get(value, -1)
        instruction = graph.instructions[i]
        if i < 0 or len(instruction.results) != 1 or instruction.trips > 1:
            return []
        is_added = instruction.name == "add" and len(set(instruction.operands)) == 2
        if is_added or keeps_elements(graph, instruction):
            parts = instruction.operands if is_added else instruction.operands[:1]
            if any(len(readers_of(graph)[part]) > 1 for part in parts):
                return []
            pending += parts
        elif not is_partial_sum(instruction, graph.instructions, producers(graph)):
            return []
    return values


def summed_leaves(graph: OperatorGraph, tensor: int) -> list[int]:
    """The results of those instructions."""
    leaves = []
    for value in summed_values(graph, tensor):
        instruction = graph.instructions[producers(graph)[value]]
        if instruction.name != "add" and not keeps_elements(graph, instruction):
            leaves.append(value)
    return leaves


def keeps_elements(graph: OperatorGraph, instruction: Instruction) -> bool:
    """Whether an instruction changes the shape, dtype or sign of its operand only."""
    if instruction.name in PASSING:
        return True
    if instruction.name != "reduce" or len(instruction.results) != 1:
        return False
    operand = graph.tensors[instruction.operands[0]]
    return operand.size == graph.tensors[instruction.results[0]].size


def _operands_stay(
    layout: Layout,
    addition: int,
    operands: Sequence[int],
    result: int,
) -> bool:
    """Whether an addition reads its operands split as its result, without a reshard."""
    sharding = layout.shardings[result]
    return all(
        (addition, position) not in layout.targets and layout.shardings[tensor] == sharding
        for position, tensor in enumerate(operands)
    )


def split_axes(
    layout: Layout,
    operator: int,
    factors: Iterable[int],
) -> Axes:
    """The mesh axes, sorted, that split factors of an operator. No operator (-1) has none."""
    if operator < 0:
        return ()
    assignment = layout.assignments[operator]
    axes = {axis for factor in factors for axis in assignment.get(factor, ())}
    return tuple(sorted(axes))


@per_graph
def summed_factors(graph: OperatorGraph) -> dict[int, Factors]:
    """Instruction -> the factors that it sums away, where it does."""
    reduced = {}
    for i, instruction in enumerate(graph.instructions):
        factors = reduced_factors(instruction, operand_labels(graph, i))
        if factors:
            reduced[i] = factors
    return reduced


def sums_over_devices(graph: OperatorGraph, layout: Layout, i: int) -> bool:
    """Whether the result of an instruction is summed over devices."""
    reduced = summed_factors(graph).get(i)
    return reduced is not None and bool(split_axes(layout, graph.owner[i], reduced))


@dataclass(frozen=True, slots=True)
class MovedSum:
    """A partial sum that only one other operator reads."""

    reduced: Factors
    """Factors of its home over which it is partial."""
    use: Use
    """The read."""
    joined: int
    """The last of the additions in which partial sums meet, its result; -1 for none."""
    share: int
    """Number of partial sums that meet there, this one included."""


@per_graph
def moved_sums(graph: OperatorGraph) -> dict[int, MovedSum]:
    """Tensor -> how it is summed, of partial sums that only one other operator reads.

    The compiler of an accelerator adds partial sums of one addition before it sums them over
    devices: the gradients of the input of query, key and value, say.
    """
    reduced = _moving_partial_sums(graph)
    uses = {use.tensor: use for use in graph.uses if use.tensor in reduced}
    groups: dict[int, tuple[int, ...]] = {tensor: (tensor,) for tensor in reduced}
    """Added tensor -> the partial sums in it."""
    for instruction in graph.instructions:
        operands = set(instruction.operands)
        is_joined = instruction.name == "add" and len(operands) == 2 and operands <= groups.keys()
        if is_joined and all(len(readers_of(graph)[tensor]) == 1 for tensor in operands):
            first, second = instruction.operands
            groups[instruction.results[0]] = groups.pop(first) + groups.pop(second)
    sums = {}
    for result, tensors in groups.items():
        joined = result if len(tensors) > 1 else -1
        for tensor in tensors:
            sums[tensor] = MovedSum(reduced[tensor], uses[tensor], joined, len(tensors))
    return sums


def _are_updates(graph: OperatorGraph, reads: Iterable[Reader]) -> bool:
    """Whether reads belong to the update, which sums gradients as its variable is stored.

    The concatenation of the gradients of a weight's slices has no storage of its own.
    """
    readers = [graph.instructions[reader] for reader, _ in reads]
    return any(one.phase == "update" and one.name != "concatenate" for one in readers)


def _moving_partial_sums(graph: OperatorGraph) -> dict[int, Factors]:
    """Partial sum that only one other operator reads -> the factors over which it is partial."""
    constants = constant_tensors(graph)
    weight_gradients = {tensor for gradient in gradients(graph) for tensor in gradient.leaves}
    uses: dict[int, list[Use]] = {}
    for use in graph.uses:
        uses.setdefault(use.tensor, []).append(use)
    moving = {}
    for i, instruction in enumerate(graph.instructions):
        if instruction.rule is None or len(instruction.results) != 1 or instruction.trips > 1:
            continue
        (tensor,) = instruction.results
        if tensor in constants or tensor in weight_gradients or instruction.name in LIBRARY_CALLS:
            continue
        label = graph.labels[tensor]
        reduced = reduced_factors(instruction, operand_labels(graph, i))
        summed = tuple(factor for factor in reduced if factor not in label)
        around = uses.get(tensor, [])
        if not summed or len(around) != 1 or around[0].operator == graph.home[tensor]:
            continue
        reads = around[0].instructions
        if set(readers_of(graph)[tensor]) == set(reads) and not _are_updates(graph, reads):
            moving[tensor] = summed
    return moving

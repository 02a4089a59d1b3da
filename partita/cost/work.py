"""FLOPs of one device in a step.

The work of every instruction is divided by the shards of its iteration space.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from partita.cost.backends import compiler_of
from partita.cost.backends.base import Compiler, ProductShape
from partita.cost.collectives import DEFAULT, Collective, Reach, collectives, reaches
from partita.cost.image_pieces import piece_ratios
from partita.cost.laid_out_fusion import fused_under
from partita.cost.partial import Factors, reduced_factors
from partita.graph.flat import dilates_operand, transposes
from partita.graph.operator_graph import (
    Count,
    Instruction,
    Label,
    OperatorGraph,
    Window,
    constant_tensors,
    operand_labels,
    per_graph,
    producers,
)
from partita.machine import Backend
from partita.plans.layout import Layout, Sharding, local_shape
from partita.plans.plan import Mesh


def local_flops(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    backend: Backend = DEFAULT,
    loops_once: bool = False,
    traffic: Sequence[Collective] | None = None,
) -> float:
    """FLOPs per device of one step, counted as XLA does.

    An instruction that several kernels compute counts in each. The sums of all-reduces count.
    `loops_once` counts a loop's body once, as XLA's cost analysis does. `traffic` are the layout's
    collectives, computed unless given.
    """
    if traffic is None:
        traffic = collectives(graph, mesh, layout, backend)
    total = 0.0
    compiler = compiler_of(backend)
    fused = fused_under(graph, layout, compiler.fusion_rules, mesh)
    shards = _Shards(mesh, layout)
    of_pieces = piece_ratios(graph, mesh, layout, compiler)
    for computation in _computations(graph):
        instruction = graph.instructions[computation.instruction]
        operator = graph.owner[computation.instruction]
        kernels = max(1, len(fused.computed_in[computation.instruction]))
        trips = 1 if loops_once else instruction.trips
        flops = instruction.flops * kernels * trips * of_pieces.get(computation.instruction, 1.0)
        result_size = graph.tensors[instruction.results[0]].size
        if instruction.name == "concatenate" and compiler.fusion_rules.joins_by_maximum:
            maxima = len(instruction.operands) - 1
            flops = maxima * result_size * kernels * trips
        if operator < 0:
            total += flops
            continue
        assignment = layout.assignments[operator]
        results = tuple(layout.shardings[tensor] for tensor in instruction.results)
        if any(assignment.get(factor) for factor in computation.table_rows):
            # Devices read rows that they do not have, and then select zeros instead.
            total += result_size * kernels * trips / shards.of_sharding(results[0])
        flops *= _padding_ratio(graph, mesh, layout, compiler, computation.instruction)
        if instruction.windows:
            split = [
                (reach.window, math.prod(mesh.sizes[axis] for axis in assignment[reach.factor]))
                for reach in computation.reaches
                if assignment.get(reach.factor)
            ]
            flops *= _window_ratio(instruction, split, compiler.buffers.filled_gradients)
        if backend.dense_grouped_gradients and instruction.batch_groups > 1:
            split = math.prod(
                mesh.sizes[axis]
                for factor in computation.group_factors
                for axis in assignment.get(factor, ())
            )
            groups = instruction.batch_groups / split
            # Of the pairs of groups, those of a group with itself are then selected (a comparison,
            # a selection) and summed up.
            total += 3 * groups * result_size / shards.of_sharding(results[0])
            flops *= groups
        if instruction.name == "scatter":
            # Each device adds all rows that it reads, those that it does not have as well.
            results = ()
        total += flops / shards.of_computation(operator, computation.factors, results)
    if compiler.buffers.selected_starts:
        for start in _constant_starts(graph):
            trips = 1 if loops_once else start.trips
            selected = graph.tensors[start.tensor].size * trips
            total += selected / shards.of_sharding(layout.shardings[start.tensor])
    for collective in traffic:
        if collective.kind == "all_reduce":
            trips = 1 if loops_once else collective.trips
            total += collective.nbytes / collective.itemsize * trips
    return total


def product_shape(graph: OperatorGraph, mesh: Mesh, layout: Layout, i: int) -> ProductShape:
    """The local sizes of a dot_general."""
    instruction = graph.instructions[i]
    rule = instruction.rule
    assert rule is not None, "products have a rule"
    size: dict[int, int] = {}
    """Factor of the rule -> its local size."""
    for position, (tensor, mapping) in enumerate(
        zip(instruction.operands, rule.operands, strict=True)
    ):
        sharding = layout.targets.get((i, position), layout.shardings[tensor])
        shape = local_shape(graph.tensors[tensor].shape, sharding, mesh.sizes)
        for local_size, factors in zip(shape, mapping, strict=True):
            if factors:
                size[factors[0]] = min(size.get(factors[0], local_size), local_size)
    left, right = ({factors[0] for factors in mapping if factors} for mapping in rule.operands[:2])
    summed = set(rule.reduction)

    def product_of(factors: set[int]) -> int:
        return math.prod(size[factor] for factor in factors)

    return ProductShape(
        product_of(left - right - summed),
        product_of(right - left - summed),
        product_of(summed & size.keys()),
    )


def _padding_ratio(
    graph: OperatorGraph, mesh: Mesh, layout: Layout, compiler: Compiler, i: int
) -> float:
    """Multiplications of a product as a compiler pads it, over those without padding."""
    instruction = graph.instructions[i]
    if instruction.name != "dot_general" or instruction.rule is None:
        return 1.0
    product = product_shape(graph, mesh, layout, i)
    dtypes = [graph.tensors[tensor].dtype for tensor in instruction.operands[:2]]
    padded = compiler.padded_product(product, dtypes)
    return padded.multiplications / max(product.multiplications, 1)


def _window_ratio(
    instruction: Instruction, split: Sequence[tuple[Window, int]], fills: bool
) -> float:
    """FLOPs of windows as they are computed, over those without padding and holes.

    `split` are the windows over split dims, each with its number of parts. There, halos make
    padding explicit. `fills` says whether the compiler writes the holes of a dilated operand.
    """
    ratio = dense_ratio(instruction) if fills else 1.0
    if fills and _is_filled_by_group(instruction):
        return ratio
    for window, parts in split:
        if not (fills and _pads(instruction, window)):
            ratio *= window.padding_ratio()
        if fills and dilates_operand(instruction):
            ratio *= window.filled_ratio(parts) / window.filled_ratio()
    return ratio


def filled_ratio(instruction: Instruction) -> float:
    """Elements of a weight gradient's dilated operand with zeros in its holes, over those without.

    1 for other instructions.
    """
    if not dilates_operand(instruction):
        return 1.0
    return math.prod(window.filled_ratio() for _, window in instruction.windows)


def dense_ratio(instruction: Instruction) -> float:
    """FLOPs of a convolution by cuDNN, over those without padding and holes.

    cuDNN has no dilated operand, except in the input gradient of a convolution without groups, and
    pads both ends alike. XLA writes all other holes and padding into memory as zeros.
    """
    if _is_filled_by_group(instruction):
        return math.prod(w.base * w.padding_ratio() for _, w in instruction.windows)
    ratio = filled_ratio(instruction)
    for _, window in instruction.windows:
        if _pads(instruction, window):
            ratio *= window.padding_ratio()
    return ratio


def _is_filled_by_group(instruction: Instruction) -> bool:
    """Whether an instruction is the input gradient of a grouped convolution with strides."""
    is_dilated = any(window.base > 1 for _, window in instruction.windows)
    return is_dilated and instruction.is_grouped and not transposes(instruction)


def _pads(instruction: Instruction, window: Window) -> bool:
    """Whether XLA pads an operand of a convolution (ConvPaddingLegalization)."""
    if instruction.name != "convolution":
        return False
    moved = window.transposed() if dilates_operand(instruction) else window
    return not moved.is_padded_evenly


class _Shards:
    """Numbers of devices that share an instruction."""

    def __init__(self, mesh: Mesh, layout: Layout) -> None:
        self.mesh = mesh
        self.layout = layout
        self.counts: dict[tuple[int, frozenset[int], tuple[Sharding, ...]], int] = {}

    def of_sharding(self, sharding: Sharding) -> int:
        """Shards of a tensor."""
        return math.prod(self.mesh.sizes[axis] for dim in sharding for axis in dim)

    def of_computation(
        self,
        operator: int,
        factors: frozenset[int],
        results: tuple[Sharding, ...],
    ) -> int:
        """Devices over which an operator's factors and its results are split.

        The results matter where an update runs on the shards of its optimizer slots.
        """
        key = (operator, factors, results)
        if key not in self.counts:
            assignment = self.layout.assignments[operator]
            axes = {axis for factor in factors for axis in assignment.get(factor, ())}
            for sharding in results:
                for dim in sharding:
                    axes.update(dim)
            self.counts[key] = math.prod(self.mesh.sizes[axis] for axis in axes)
        return self.counts[key]


@dataclass(frozen=True, slots=True)
class _Computation:
    """An instruction that takes FLOPs, on some compilers or in some plans."""

    instruction: int
    factors: frozenset[int]
    """Of its operands and results, those of the added rows for a scatter."""
    reaches: tuple[Reach, ...]
    """Windows of a convolution."""
    group_factors: Factors
    """Factors over the groups of a grouped convolution."""
    table_rows: Factors
    """Factors over the rows of the table of a gather."""


@per_graph
def _computations(graph: OperatorGraph) -> tuple[_Computation, ...]:
    """The instructions that may take FLOPs."""
    result = []
    for i, instruction in enumerate(graph.instructions):
        if not instruction.flops and instruction.name not in ("gather", "concatenate"):
            continue
        labels = [
            *operand_labels(graph, i),
            *(graph.labels[tensor] for tensor in instruction.results),
        ]
        counted = labels[2:3] if instruction.name == "scatter" else labels
        factors = frozenset(factor for label in counted for factor in label if factor >= 0)
        windows: tuple[Reach, ...] = ()
        if instruction.name == "convolution":
            windows = reaches(instruction, labels, graph.labels[instruction.results[0]])
        groups: Factors = ()
        if instruction.batch_groups > 1:
            groups = group_factors(labels)
        table_rows: Factors = ()
        if instruction.name == "gather":
            table_rows = reduced_factors(instruction, labels)
        result.append(_Computation(i, factors, windows, groups, table_rows))
    return tuple(result)


@dataclass(frozen=True, slots=True)
class _ConstantStart:
    """A value that a loop carries, and that starts as a constant."""

    tensor: int
    trips: Count


@per_graph
def _constant_starts(graph: OperatorGraph) -> tuple[_ConstantStart, ...]:
    """Those of sums, not of results that each trip writes a slice of."""
    producer = producers(graph)
    starts = []
    for loop in graph.loops:
        for before, inside, yielded, _ in loop.carried:
            is_constant = before in constant_tensors(graph) and graph.tensors[before].shape
            if not is_constant or yielded == inside:
                continue
            source = producer.get(yielded)
            if source is None or graph.instructions[source].name != "dynamic_update_slice":
                starts.append(_ConstantStart(inside, loop.trips))
    return tuple(starts)


def group_factors(labels: Sequence[Label]) -> Factors:
    """The graph's factors over the groups of a grouped convolution.

    They index both operands and the result. `labels` are those of the operands, then of the result.
    """
    shared = set(labels[0]) & set(labels[1]) & set(labels[2])
    return tuple(sorted(factor for factor in shared if factor >= 0))

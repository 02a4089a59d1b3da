"""The kernels of a graph under a layout: collectives divide them, and sizes of a device count."""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache

from partita.cost.backends.base import FusionRules
from partita.cost.collectives import communicating
from partita.cost.differences import written_differences
from partita.cost.fusion import Fusion, Kernel, fusion
from partita.cost.gathered import kernels_of_gathers, with_gathered_sums, written_masks
from partita.cost.partial import pending_sums, split_axes, summed_factors
from partita.cost.reshard import Axes
from partita.graph.flat import Reader, readers_of
from partita.graph.operator_graph import (
    IdentityKey,
    OperatorGraph,
    first_backward,
    producers,
)
from partita.plans.layout import Layout
from partita.plans.plan import Mesh


def fused_under(
    graph: OperatorGraph,
    layout: Layout,
    rules: FusionRules,
    mesh: Mesh | None = None,
) -> Fusion:
    """The kernels of a laid-out graph: tensors before a reshard or an all-reduce are written.

    With a mesh, so are differences by the sizes of a device (`cost.differences`).
    """
    return _fused_under(IdentityKey(graph), IdentityKey(layout), rules, mesh)


@lru_cache(maxsize=2)
def _fused_under(
    graph_key: IdentityKey[OperatorGraph],
    layout_key: IdentityKey[Layout],
    rules: FusionRules,
    mesh: Mesh | None,
) -> Fusion:
    graph = graph_key.value
    layout = layout_key.value
    barriers, ends = collective_borders(graph, layout)
    if rules.joins_sums:
        ends |= added_sums(graph, layout)
    fused = fusion(graph, rules, frozenset(ends))
    if mesh is not None and rules.longest_column:
        rows = kernels_of_gathers(layout, fused) if rules.gathers_first else frozenset()
        ends |= written_differences(graph, layout, mesh, fused.computed_in, rules, rows)
    fused = cut(graph, fused, barriers, ends)
    if not rules.gathers_first:
        return fused
    fused, kernels = with_gathered_sums(graph, layout, fused)
    masks = written_masks(graph, layout, mesh, fused, kernels) if mesh is not None else set()
    return cut(graph, fused, barriers, ends | masks) if masks else fused


def collective_borders(graph: OperatorGraph, layout: Layout) -> tuple[set[Reader], set[int]]:
    """(reads of resharded tensors, instructions whose results devices sum)."""
    pending = pending_sums(graph, layout)
    ends = set(pending.totals.values())
    for communication in communicating(graph):
        results = graph.instructions[communication.instruction].results
        is_split = split_axes(layout, communication.operator, communication.reduced)
        if is_split and pending.axes.keys().isdisjoint(results):
            ends.add(communication.instruction)
    barriers = set()
    for read in layout.reads:
        barriers.update(reader for reader in read.readers if reader[0] >= 0)
    return barriers, ends


def added_sums(graph: OperatorGraph, layout: Layout) -> set[int]:
    """Additions of the backward pass after which devices sum, instead of the operands."""
    axes_of: dict[int, Axes] = {}
    """Tensor that devices sum -> the mesh axes."""
    additions: dict[int, int] = {}
    targets = layout.targets
    for i in range(first_backward(graph), len(graph.instructions)):
        instruction = graph.instructions[i]
        if instruction.phase != "backward" or len(instruction.results) != 1:
            continue
        (result,) = instruction.results
        operands = instruction.operands
        axes = split_axes(layout, graph.owner[i], summed_factors(graph).get(i, ()))
        is_sum = instruction.name == "add" and len(set(operands)) == 2
        if axes:
            axes_of[result] = axes
        elif is_sum and operands[0] in axes_of and axes_of[operands[0]] == axes_of.get(operands[1]):
            readers = {r for tensor in operands for r in readers_of(graph)[tensor]}
            if len(readers) == 2 and targets.keys().isdisjoint(readers):
                axes_of[result] = axes_of[operands[0]]
                for tensor in operands:
                    additions.pop(tensor, None)
                additions[result] = i
    return set(additions.values())


def cut(
    graph: OperatorGraph,
    fused: Fusion,
    barriers: Set[Reader],
    ends: Set[int],
) -> Fusion:
    """The kernels of a graph when collectives divide them.

    Collectives happen at the reads `barriers`, pairs (instruction, operand position), and after the
    instructions `ends`, which may be others that are written.
    """
    return _Cutter(graph, fused, barriers, ends).run()


class _Cutter:
    """Cuts kernels at collectives. A cut part becomes a kernel, unless it is one already."""

    def __init__(
        self,
        graph: OperatorGraph,
        fused: Fusion,
        barriers: Set[Reader],
        ends: Set[int],
    ) -> None:
        self.graph = graph
        self.fused = fused
        self.barriers = barriers
        self.ends = ends
        self.producer = producers(graph)
        touched: set[int] = set()
        for instruction, _ in barriers:
            touched.update(fused.computed_in[instruction])
        for instruction in ends:
            roots = fused.computed_in[instruction]
            touched.update(root for root in roots if root != instruction)
        self.touched = touched
        self.allowed = {root: set(fused.kernels[root]) for root in touched}
        """Root of a kernel to rebuild -> the instructions that it may compute."""
        self.roots = sorted(touched, reverse=True)
        """Roots of kernels still to rebuild, the next one last."""

    def run(self) -> Fusion:
        kernels = {
            root: kernel for root, kernel in self.fused.kernels.items() if root not in self.touched
        }
        while self.roots:
            root = self.roots.pop()
            kernels[root] = self._kernel(root)
        return Fusion(dict(sorted(kernels.items())), self._computed_in(kernels))

    def _kernel(self, root: int) -> Kernel:
        """The instructions of a kernel up to its collectives.

        Instructions behind a collective get kernels of their own.
        """
        allowed = self.allowed[root]
        inside = {root}
        stack = [root]
        while stack:
            instruction = stack.pop()
            for position, tensor in enumerate(self.graph.instructions[instruction].operands):
                producer = self.producer.get(tensor)
                if producer is None or producer not in allowed or producer in inside:
                    continue
                if producer in self.ends or (instruction, position) in self.barriers:
                    self._add_root(producer, allowed)
                else:
                    inside.add(producer)
                    stack.append(producer)
        return tuple(sorted(inside))

    def _add_root(self, instruction: int, allowed: set[int]) -> None:
        """Gives an instruction behind a collective a kernel, unless it has one or is a constant."""
        if instruction in self.fused.kernels:
            return
        if self.graph.instructions[instruction].name == "constant":
            return
        if instruction not in self.allowed:
            self.allowed[instruction] = set()
            self.roots.append(instruction)
        self.allowed[instruction] |= allowed

    def _computed_in(self, kernels: dict[int, Kernel]) -> tuple[tuple[int, ...], ...]:
        new_roots: dict[int, set[int]] = {}
        for root in self.touched:
            for instruction in self.fused.kernels[root]:
                if instruction not in new_roots:
                    old_roots = self.fused.computed_in[instruction]
                    new_roots[instruction] = set(old_roots) - self.touched
        for root in self.allowed:
            for instruction in kernels[root]:
                new_roots[instruction].add(root)
        computed_in = list(self.fused.computed_in)
        for instruction, roots in new_roots.items():
            computed_in[instruction] = tuple(sorted(roots))
        return tuple(computed_in)

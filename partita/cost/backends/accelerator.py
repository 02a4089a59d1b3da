"""The part of XLA that GPUs and TPUs share: sums over devices, and buffers."""

from __future__ import annotations

from collections.abc import Sequence

from partita.cost.backends.base import Buffers, Compiler
from partita.cost.sums import LaidOutProgram, Sum, fold, join_additions, leave_loops, scatter
from partita.graph.flat import Reader, readers_of
from partita.graph.operator_graph import ITEMSIZE, Instruction, OperatorGraph
from partita.plans.layout import COMBINED_BYTES


class XlaAccelerator(Compiler):
    """XLA for devices that are not the host's cores."""

    def sums(self, program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
        """The sums folded, moved out of loops, joined by additions, narrowed to slices."""
        moved = join_additions(program, leave_loops(program, fold(program, sums, self.folds)))
        return join_additions(program, scatter(program, moved)) if self.scatters else moved

    @property
    def buffers(self) -> Buffers:
        """None: products read operands as they are, and scatters add in place."""
        return Buffers(
            transposed_copies=False,
            early_zeros=False,
            pool_positions=False,
            early_reductions=False,
            hides_collectives=False,
            early_runs=False,
            joined_results=False,
            replaced_operands=False,
            copied_slots=False,
        )

    @property
    def combined_sum_bytes(self) -> float:
        """That of its combiner of all-reduces."""
        return COMBINED_BYTES

    def moved_itemsize(self, graph: OperatorGraph, tensor: int, readers: Sequence[Reader]) -> int:
        """That of the narrower dtype to which the only reader converts for the only reader of its
        own: the conversion moves before the reshard."""
        itemsize = super().moved_itemsize(graph, tensor, readers)
        if len(readers) != 1 or readers[0][0] < 0:
            return itemsize
        instruction = graph.instructions[readers[0][0]]
        result = instruction.results[0]
        if instruction.name != "convert" or len(readers_of(graph).get(result, ())) != 1:
            return itemsize
        return min(itemsize, ITEMSIZE.get(graph.tensors[result].dtype, itemsize))

    def folds(self, instruction: Instruction) -> bool:
        """A tensor is summed over all its axes at once."""
        return True

    @property
    def leaves_loops(self) -> bool:
        """A gradient that a loop adds up is summed once."""
        return True

    @property
    def joins_collectives(self) -> bool:
        """By AllReduceReassociate and ReduceScatterReassociate."""
        return True

    @property
    def joins_kernels(self) -> bool:
        """MultiOutputFusion joins siblings, and producers with consumers; products add biases."""
        return True

    @property
    def scatters(self) -> bool:
        """Unless the machine's description forbids reduce-scatters."""
        return self.backend.reduce_scatter

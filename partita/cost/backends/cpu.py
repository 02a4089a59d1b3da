"""XLA:CPU, and every machine whose description names no platform.

All-reduces stay where the partitioner puts them. A slice of a sum is taken after the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from partita.cost.backends.base import Buffers, Compiler, FusionRules
from partita.cost.sums import LaidOutProgram, Sum
from partita.graph.operator_graph import Instruction


class XlaCpu(Compiler):
    """XLA:CPU."""

    def sums(self, program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
        """The sums of the partitioner."""
        return list(sums)

    @cached_property
    def fusion_rules(self) -> FusionRules:
        """Those of its instruction fusion."""
        return FusionRules(self.backend.recomputes, cheap_elementwise=False, reads_written=False)

    @cached_property
    def buffers(self) -> Buffers:
        """Zeros and positions of maxima, and transposed copies if the description says so.

        It schedules breadth-first, so that kernels run at the same time.
        """
        return Buffers(
            self.backend.transposed_copies,
            early_zeros=True,
            pool_positions=True,
            early_reductions=False,
            hides_collectives=False,
            early_runs=True,
            joined_results=False,
            replaced_operands=False,
            copied_slots=True,
        )

    def folds(self, instruction: Instruction) -> bool:
        """There is a sum for each factor."""
        return False

    @property
    def leaves_loops(self) -> bool:
        """A sum inside a loop happens in every trip."""
        return False

    @property
    def scatters(self) -> bool:
        """There is no reduce-scatter."""
        return False

"""XLA:GPU, as of jax 0.10.2, compiled for H100s."""

from __future__ import annotations

from collections.abc import Sequence

from partita.cost.backends.base import Buffers, Compiler, FusionRules, ProductShape
from partita.cost.sums import LaidOutProgram, Sum, fold, join_additions, leave_loops, scatter

TILE = 32
"""Rows and columns of a result that a block of threads computes in a small product."""
BLOCKS = 264
"""Two blocks for each of the 132 cores of an H100."""
SHORTEST_SUM = 16
"""Elements of the summed dim in a part, at least."""


class XlaGpu(Compiler):
    """XLA:GPU."""

    def sums(self, program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
        """The sums folded, moved out of loops, joined by additions, narrowed to slices."""
        moved = join_additions(program, leave_loops(program, fold(sums)))
        return scatter(program, moved) if self.scatters else moved

    @property
    def fusion_rules(self) -> FusionRules:
        """Those of its priority fusion.

        It fuses a producer into all of its readers, or writes it, and computes slow elementwise
        instructions again.
        """
        return FusionRules(duplicates=False, cheap_elementwise=True, reads_written=True)

    @property
    def buffers(self) -> Buffers:
        """None: cuDNN reads operands as they are, and scatters add in place."""
        return Buffers(transposed_copies=False, early_zeros=False, pool_positions=False)

    def product_parts(self, product: ProductShape) -> int:
        """A power of two, so that a small product occupies all cores (SplitkRewriter)."""
        tiles = product.batch * -(-product.rows // TILE) * -(-product.columns // TILE)
        parts = min(BLOCKS // tiles, product.summed // SHORTEST_SUM)
        return 1 << (parts.bit_length() - 1) if parts > 1 else 1

    @property
    def folds(self) -> bool:
        """A tensor is summed over all its axes at once."""
        return True

    @property
    def leaves_loops(self) -> bool:
        """A gradient that a loop adds up is summed once."""
        return True

    @property
    def scatters(self) -> bool:
        """Unless the machine's description forbids reduce-scatters."""
        return self.backend.reduce_scatter

"""XLA:TPU, as of libtpu 0.0.52, compiled for v5e slices."""

from __future__ import annotations

from partita.cost.backends.gpu import GpuCompiler


class TpuCompiler(GpuCompiler):
    """XLA:TPU. It moves and narrows sums as XLA:GPU does."""

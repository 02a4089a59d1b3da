"""Differences from a mean over a batch that XLA:GPU writes.

As a rule each reader computes such a difference (`FusionRules.repeats_differences`). A reduction
over the rows of a batch then reads the mean again for every row, and has few blocks, which limits
its bandwidth (AdjustBandwidth of XLA's gpu_performance_model_base). If that takes longer than a
kernel of its own for the difference, PriorityFusion leaves the difference in memory. Longer
reductions are split into many blocks before (TreeReductionRewriter).
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set

from partita.cost.backends.base import FusionRules
from partita.graph.operator_graph import ITEMSIZE, Instruction, OperatorGraph, producers
from partita.plans.layout import Layout, local_shape
from partita.plans.plan import Mesh

BLOCK_COLUMNS = 128
"""Columns of a block of a reduction over rows: 32 threads of 16 bytes."""
BLOCK_BANDWIDTH = 32 * 1.98e9
"""Bytes a second that a block reads: 32 in a cycle of an H100 (memory_transactions_per_clock)."""
BANDWIDTH = 3.35e12
"""Bytes a second of an H100's memory."""
LAUNCH_SECONDS = 1e-6
"""Start of a kernel (kKernelLaunchOverhead)."""


def written_differences(
    graph: OperatorGraph,
    layout: Layout,
    mesh: Mesh,
    computed_in: Sequence[Sequence[int]],
    rules: FusionRules,
    over_rows: Set[int],
) -> set[int]:
    """The differences that are written although every reader could compute them.

    `computed_in`: instruction -> roots of the kernels that compute it. Those `over_rows` sum over
    minor dims, whatever their shapes say. Reductions of more than `rules.longest_column` rows are
    split.
    """
    written = set()
    for i, instruction in enumerate(graph.instructions):
        if len(computed_in[i]) < 2 or not _spreads_rows(graph, instruction):
            continue
        for root in set(computed_in[i]) - over_rows:
            rows, columns = _rows_and_columns(graph, layout, mesh, root)
            itemsize = ITEMSIZE.get(graph.tensors[instruction.results[0]].dtype, 4)
            if 0 < rows <= rules.longest_column and is_slower_fused(rows, columns, itemsize):
                written.add(i)
    return written


def _spreads_rows(graph: OperatorGraph, instruction: Instruction) -> bool:
    """Whether an instruction subtracts values that are the same for many rows."""
    if instruction.name != "subtract" or instruction.phase != "forward":
        return False
    source = producers(graph).get(instruction.operands[1], -1)
    if source < 0 or graph.instructions[source].name != "broadcast_in_dim":
        return False
    return graph.tensors[graph.instructions[source].operands[0]].size > 1


def _rows_and_columns(
    graph: OperatorGraph, layout: Layout, mesh: Mesh, root: int
) -> tuple[int, int]:
    """(elements that are summed, sums) of a reduction over major dims on a device, else (0, 0)."""
    instruction = graph.instructions[root]
    rule = instruction.rule
    if instruction.name != "reduce" or rule is None:
        return 0, 0
    operand, mapping = instruction.operands[0], rule.operands[0]
    shape = local_shape(graph.tensors[operand].shape, layout.shardings[operand], mesh.sizes)
    is_summed = [not set(rule.reduction).isdisjoint(factors) for factors in mapping]
    if not shape or is_summed[-1]:
        return 0, 0
    rows = math.prod(size for size, summed in zip(shape, is_summed, strict=True) if summed)
    return rows, math.prod(shape) // rows


def is_slower_fused(rows: int, columns: int, itemsize: int) -> bool:
    """Whether reading the mean for every row takes longer than writing the difference."""
    nbytes = itemsize * rows * columns
    blocks = math.ceil(columns / BLOCK_COLUMNS)
    return nbytes / (blocks * BLOCK_BANDWIDTH) > LAUNCH_SECONDS + 2 * nbytes / BANDWIDTH

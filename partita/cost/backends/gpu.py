"""XLA:GPU, as of jax 0.10.2, compiled for H100s."""

from __future__ import annotations

from collections.abc import Sequence

from partita.cost.backends.base import Buffers, Compiler, FusionRules, ProductShape
from partita.cost.sums import (
    LaidOutProgram,
    Sum,
    fold,
    join_additions,
    leave_loops,
    readers_of,
    scatter,
)
from partita.graph.operator_graph import ITEMSIZE, OperatorGraph
from partita.plans.layout import Reader

WORK_SPACE_BYTES = 4 << 20
HOPPER_WORK_SPACE_BYTES = 32 << 20
"""Work space of a product by cuBLAS, before and since Hopper (GemmConfig), as NVIDIA recommends for
cublasSetWorkspace."""
HOPPER = 9
"""Major number of its compute capability."""
LONGEST_CHAIN = 24
"""Instructions: a GELU by exponentials has 10 to 15, an error function 40."""
COMBINED_BYTES = 30 << 20
"""Bytes of a combined collective (xla/service/collective_utils.h)."""
SMALLEST_CUBLAS_PRODUCT = 100
"""Summed elements times rows and columns, below which XLA writes a kernel of its own
(xla_gpu_gemm_rewrite_size_threshold)."""


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
        instructions again. A softmax is one kernel (SoftmaxRewriterTriton). Queries, keys and
        values are one product (DotMerger). The code of an error function is too long to be computed
        again, that of other functions is not.
        """
        return FusionRules(
            duplicates=False,
            cheap_elementwise=True,
            reads_written=True,
            row_kernels=True,
            merges_products=True,
            longest_chain=LONGEST_CHAIN,
        )

    @property
    def buffers(self) -> Buffers:
        """None: cuDNN reads operands as they are, and scatters add in place."""
        return Buffers(
            transposed_copies=False,
            early_zeros=False,
            pool_positions=False,
            early_reductions=False,
        )

    @property
    def combined_sum_bytes(self) -> float:
        """That of its combiner of all-reduces."""
        return COMBINED_BYTES

    @property
    def combined_gather_bytes(self) -> float:
        """That of its combiner of all-gathers."""
        return COMBINED_BYTES

    def work_space_bytes(self, product: ProductShape) -> int:
        """The work space of cuBLAS, which XLA allocates for each product while it runs."""
        if (product.rows + product.columns) * product.summed < SMALLEST_CUBLAS_PRODUCT:
            return 0
        capability = self.backend.compute_capability
        is_older = capability and float(capability) < HOPPER
        return WORK_SPACE_BYTES if is_older else HOPPER_WORK_SPACE_BYTES

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

    @property
    def joins_kernels(self) -> bool:
        """MultiOutputFusion joins siblings, and producers with consumers."""
        return True

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

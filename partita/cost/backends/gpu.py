"""XLA:GPU, as of jax 0.10.2, compiled for H100s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from partita.cost.backends.accelerator import XlaAccelerator
from partita.cost.backends.base import Buffers, FusionRules, ProductShape
from partita.plans.layout import COMBINED_BYTES

WORK_SPACE_BYTES = 4 << 20
HOPPER_WORK_SPACE_BYTES = 32 << 20
"""Work space of a product by cuBLAS, before and since Hopper (GemmConfig), as NVIDIA recommends for
cublasSetWorkspace."""
HOPPER = 9
"""Major number of its compute capability."""
LONGEST_ROW = 1 << 14
"""Elements of a row that Triton's kernels take, at most: softmaxes of 16,384 elements are one
kernel, of 20,000 are several."""
LONGEST_COLUMN = 1 << 12
"""Rows of a reduction over major dims, beyond which it is two (ReductionDimensionRaceFreeBound)."""
LONGEST_CHAIN = 24
"""Instructions: a GELU by exponentials has 10 to 15, an error function 40."""
SMALLEST_CUBLAS_PRODUCT = 100
"""Summed elements times rows and columns, below which XLA writes a kernel of its own
(xla_gpu_gemm_rewrite_size_threshold)."""

PADDED_SINCE = {"float16": 7, "bfloat16": 8}
"""Dtype of operands -> major number of the first compute capability with tensor cores for it
(CublasPaddingRequirements)."""
PADDED_MULTIPLE = 8
"""Rows, columns and summed elements of such products are multiples of it."""

PROGRAM_SHARE = 0.8
"""The part of a device's memory that a program's buffers may take (GetSchedulerMemoryLimit)."""
LIMIT_SLOP = 0.95
"""The part of what arguments leave, beyond which values are computed again
(xla_gpu_memory_limit_slop_factor)."""


class XlaGpu(XlaAccelerator):
    """XLA:GPU."""

    @cached_property
    def fusion_rules(self) -> FusionRules:
        """Those of its priority fusion.

        It fuses a producer into all of its readers, or writes it, and computes slow elementwise
        instructions again. A softmax is one kernel if its rows are short enough
        (SoftmaxRewriterTriton). Queries, keys and values are one product (DotMerger). cuBLAS adds a
        product to a sum (GemmRewriter). The code of an error function is too long to be computed
        again, that of other functions is not. cuDNN has a call for input gradients, which reads the
        kernel as it is (ConvRewriter).
        """
        return FusionRules(
            duplicates=False,
            cheap_elementwise=True,
            reads_written=True,
            longest_row=LONGEST_ROW,
            repeats_differences=True,
            repeats_concatenations=True,
            fuses_windows=True,
            counts_reads=True,
            longest_column=LONGEST_COLUMN,
            reads_reversed=True,
            merges_products=True,
            adds_in_products=True,
            joins_sums=True,
            gathers_first=True,
            longest_chain=LONGEST_CHAIN,
        )

    @cached_property
    def buffers(self) -> Buffers:
        """Kernels with their input channels last, as cuDNN reads them.

        Of a transposed convolution's weight gradient the two operands are exchanged
        (AlgebraicSimplifier), and cuDNN has no dilated window (ConvPaddingLegalization). A
        joined kernel writes all its results at once (MultiOutputFusion).
        """
        return replace(
            super().buffers,
            hides_collectives=True,
            joined_results=True,
            replaced_operands=True,
            ordered_kernels=True,
            filled_gradients=True,
            computed_slices=True,
            shared_zeros=True,
            late_positions=True,
        )

    @property
    def combined_gather_bytes(self) -> float:
        """That of its combiner of all-gathers."""
        return COMBINED_BYTES

    def work_space_bytes(self, product: ProductShape) -> int:
        """The work space of cuBLAS, which XLA allocates for each product while it runs."""
        if (product.rows + product.columns) * product.summed < SMALLEST_CUBLAS_PRODUCT:
            return 0
        return WORK_SPACE_BYTES if self._is_before(HOPPER) else HOPPER_WORK_SPACE_BYTES

    def _is_before(self, major: int) -> bool:
        """Whether the device is older than a compute capability."""
        capability = self.backend.compute_capability
        return bool(capability) and float(capability) < major

    def padded_product(self, product: ProductShape, dtypes: Sequence[str]) -> ProductShape:
        """Products of 16 bits are padded with zeros for tensor cores (CublasPadForGemms), unless an
        operand is a vector."""
        left, right = dtypes
        has_vector = 1 in (product.rows, product.columns, product.summed)
        if left != right or left not in PADDED_SINCE or has_vector:
            return product
        if self._is_before(PADDED_SINCE[left]):
            return product
        return ProductShape(
            _padded(product.rows), _padded(product.columns), _padded(product.summed)
        )

    def temporary_limit_bytes(self, device_bytes: float, argument_bytes: int) -> float:
        """The limit of its scheduler."""
        return LIMIT_SLOP * max(0.0, PROGRAM_SHARE * device_bytes - argument_bytes)


def _padded(size: int) -> int:
    """The next multiple of PADDED_MULTIPLE."""
    return -(-size // PADDED_MULTIPLE) * PADDED_MULTIPLE

"""The contract of a backend: a compiler, as far as cost and memory depend on it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from partita.cost.sums import LaidOutProgram, Sum
from partita.graph.flat import Reader
from partita.graph.images import TiledDims
from partita.graph.operator_graph import ITEMSIZE, Instruction, OperatorGraph, Window
from partita.machine import Backend


@dataclass(frozen=True)
class FusionRules:
    """The choices of a compiler that decide which values exist in memory (`cost.fusion`)."""

    duplicates: bool
    """A value with several kernels as readers is computed in each of them where possible, not only
    where that saves reads."""
    cheap_elementwise: bool
    """Exponentials, divisions and other slow elementwise instructions are duplicated as well."""
    reads_written: bool
    """A value that one of its readers needs in memory is read by all of them. If False: others
    compute it again where that is cheap."""
    longest_row: int = 0
    """Elements of a row that a kernel computes whole, at most: it takes in a sum over the minor dim
    that only it reads, as in a softmax."""
    fuses_operands: bool = False
    """A product or a convolution computes its operands, even those that others read too."""
    repeats_differences: bool = False
    """A difference from a broadcast value, as from a mean, is computed by each of its readers, also
    by reductions over columns."""
    repeats_concatenations: bool = False
    """A concatenation is computed by each of its readers, also by reductions over columns, unless
    one needs it in memory."""
    fuses_windows: bool = False
    """Pooling computes its operand."""
    counts_reads: bool = False
    """A value of several tensors is computed by its readers if their kernels then read and write
    no more tensors of its size."""
    recomputes_summed: bool = False
    """A value that a reduction over columns reads is computed again by its other readers, if the
    kernel of the reduction would read no more elements without it in memory."""
    longest_column: int = 0
    """Rows of a reduction that is not split: a shorter one may read a difference from memory
    (`cost.differences`). 0: none does."""
    writes_sums: bool = False
    """A sum of two floating-point tensors of the forward pass that several kernels read is written,
    as a residual sum, and so is the gradient of a concatenation."""
    writes_after_products: bool = False
    """A product computes the elementwise instructions that alone read its result, and writes what
    several kernels read of them."""
    joins_by_maximum: bool = False
    """A concatenation is the maximum of its padded operands, which its readers compute."""
    reads_reversed: bool = False
    """A convolution without groups reads a reversed kernel as it is, so no copy is written."""
    merges_products: bool = False
    """Products of one operand with several are one product, which also converts these others."""
    adds_in_products: bool = False
    """A product adds its result to another value of the same dtype, which it replaces."""
    joins_sums: bool = False
    """Devices sum the result of an addition, not both of its operands, so it is in memory."""
    gathers_first: bool = False
    """A gather makes the gathered dim the major one, and elementwise kernels keep this order."""
    longest_chain: float = math.inf
    """Instructions, one after another, that are computed again for another reader, at most."""


@dataclass(frozen=True)
class Buffers:
    """The buffers of a compiler beside the values of a program (`cost.memory`)."""

    transposed_copies: bool
    """Convolutions of the backward pass read transposed copies, which are made early."""
    early_zeros: bool
    """The zeros that a scatter adds to exist from the start of the step. If False: they are made
    just before, and the scatter adds in place."""
    pool_positions: bool
    """The backward pass of pooling by maximum stores the positions of maxima."""
    early_reductions: bool
    """A metric is computed as soon as its operand exists, not in the order of the program."""
    hides_collectives: bool
    """Gradients for which only updates wait run late, beside collectives (`cost.delayed`), and a
    metric with a collective runs as soon as its operand exists."""
    early_runs: bool
    """Rematerialized values are computed as soon as their operands exist, all runs at once. If
    False: a run is computed just before its first reader."""
    joined_results: bool
    """All results of a joined kernel are in memory when it runs (`cost.joined`)."""
    replaced_operands: bool
    """An elementwise kernel writes its result over an operand that nothing reads afterwards."""
    copied_slots: bool
    """An update copies optimizer slots that a kernel reads after they are replaced."""
    late_gradients: bool = False
    """Gradients of weights that no devices sum run with their updates: beside the next gather of
    the backward pass, or after that pass (`cost.delayed`)."""
    ordered_kernels: bool = False
    """Convolutions read a variable in a copy with its dims in another order, which stays in memory
    from the first convolution to the last."""
    stored_program: bool = False
    """The program itself is in main memory, beside its values."""
    selected_starts: bool = False
    """A loop selects, in each of its trips, between a value that it carries and the constant with
    which that starts. If False: the constant is written before the loop."""
    shared_zeros: bool = False
    """Scatters to zeros of one shape get them from one kernel, which runs before the first other
    reader of such zeros."""
    late_positions: bool = False
    """The gradient of pooling by maximum has zeros and the positions of maxima in memory, from
    before it (`cost.delayed.independent_times`) until it has run."""
    computed_slices: bool = False
    """Of an elementwise value, a device computes only the slices that its readers read."""
    filled_gradients: bool = False
    """The weight gradient of a convolution over a dilated operand is a dense convolution: its
    window is the operand with zeros in its holes, and the other operand has a copy."""


class Kernel(NamedTuple):
    """Sizes of a kernel on a device."""

    elements: int
    """Of its largest operand or result. Images of convolutions are whole tiles."""
    positions: int = 1
    """Elements of the window of its convolution."""
    is_divided: bool = False
    """Whether its images are divided into pieces."""


class TableAccess(NamedTuple):
    """A gather of rows of a table, or a scatter into them. Sizes are those of a device."""

    shape: tuple[int, int]
    """(rows, columns) of the table."""
    itemsize: int
    """Of an element, bytes."""
    rows: int
    """Rows that are read or added."""
    is_written: bool
    """Whether it is a scatter."""


class DimOrder(NamedTuple):
    """The dims of a tensor that are tiled in memory."""

    minor: int
    second: int


@dataclass(frozen=True)
class ProductShape:
    """The local sizes of a product of matrices."""

    rows: int
    columns: int
    summed: int

    @property
    def multiplications(self) -> int:
        """Products of two elements."""
        return self.rows * self.columns * self.summed


@dataclass(frozen=True)
class Compiler(ABC):
    """A compiler. Callers ask it for a program's properties, never for its name."""

    backend: Backend
    """The machine's settings."""

    @abstractmethod
    def sums(self, program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
        """The sums over devices that it emits, given those of the partitioner."""

    @property
    @abstractmethod
    def fusion_rules(self) -> FusionRules:
        """How it fuses."""

    @property
    @abstractmethod
    def buffers(self) -> Buffers:
        """What it stores beside values."""

    @property
    def merges_exchanges(self) -> bool:
        """Whether several windows over a tensor that read the same elements of neighbours share
        one exchange."""
        return False

    @abstractmethod
    def folds(self, instruction: Instruction) -> bool:
        """Whether sums of an instruction's result over several factors are one (`sums.fold`)."""

    @property
    @abstractmethod
    def leaves_loops(self) -> bool:
        """Whether a sum that a loop adds up happens once, after the loop (`sums.leave_loops`)."""

    @property
    @abstractmethod
    def scatters(self) -> bool:
        """Whether a sum of which devices read slices is a reduce-scatter (`sums.scatter`)."""

    @property
    def joins_collectives(self) -> bool:
        """Whether sums that meet in additions are one sum (`sums.join_additions`), and a sum that
        another operator reads happens with its reshard."""
        return False

    @property
    def combined_sum_bytes(self) -> float:
        """Bytes of gradients whose sums over devices are one all-reduce, at most."""
        return math.inf

    @property
    def combined_gather_bytes(self) -> float:
        """Bytes of gathered variables that are one all-gather, at most."""
        return 0

    def temporary_limit_bytes(self, device_bytes: float, argument_bytes: int) -> float:
        """Bytes of temporaries beyond which it computes values again (`cost.recomputed`)."""
        return math.inf

    @property
    def joins_kernels(self) -> bool:
        """Whether kernels that pass over the same values are one kernel, and products add biases
        (`cost.joined`)."""
        return False

    def orders(self, program: LaidOutProgram) -> dict[int, DimOrder]:
        """Tensor -> the order of its dims in memory, where more than its shape decides it."""
        return {}

    def stored_bytes(
        self,
        shape: Sequence[int],
        itemsize: int,
        order: DimOrder | None = None,
    ) -> int:
        """Bytes in memory of an array of a local shape."""
        return itemsize * math.prod(shape)

    def gathered_bytes(
        self,
        shape: tuple[int, ...],
        shard: tuple[int, ...],
        itemsize: int,
        order: DimOrder | None = None,
    ) -> int:
        """Bytes of the buffers of an all-gather of shards of a local shape, beside its result.

        The result has `shape`, and is read with its dims in `order`.
        """
        return 0

    def stored_itemsize(self, graph: OperatorGraph, tensor: int) -> int:
        """Bytes of an element of a computed tensor in memory."""
        return ITEMSIZE.get(graph.tensors[tensor].dtype, 4)

    def work_space_bytes(self, product: ProductShape) -> int:
        """Memory that the kernel of a product asks for beside its operands and its result."""
        return 0

    def padded_product(self, product: ProductShape, dtypes: Sequence[str]) -> ProductShape:
        """The sizes with which a product is computed, given the dtypes of its two operands."""
        return product

    def temporary_bytes(
        self,
        live_bytes: np.ndarray,
        largest_bytes: int = 0,
    ) -> np.ndarray:
        """Bytes of temporaries in the main memory, given all that live at each time.

        `largest_bytes` are those of the largest temporary.
        """
        return live_bytes

    def program_bytes(
        self,
        kernels: Sequence[Kernel],
        collectives: Mapping[str, int],
        tables: Sequence[TableAccess] = (),
    ) -> int:
        """Bytes of the program itself in main memory, if `buffers.stored_program`.

        `collectives` are the numbers of each kind. Gathers of `kernels` read `tables`. Scatters,
        which are in no kernel, write them.
        """
        return 0

    def image_pieces(self, shape: tuple[int, ...], dims: TiledDims) -> tuple[int, ...]:
        """Sizes of an image as a convolution with a window computes it. Pieces are more samples."""
        return shape

    @property
    def image_parts(self) -> int:
        """Pieces into which images of few samples are divided, 1 if none are."""
        return 1

    def piece_columns(self, window: Window, columns: int | None) -> int | None:
        """Columns of a piece that a convolution computes, None if it does not divide its image.

        `window` is over the dim that is divided, `columns` are those of a piece of an image that
        comes divided.
        """
        return None

    def ordered_table_bytes(self, table: TableAccess) -> int:
        """Bytes of the copy of a table in which rows are contiguous, 0 without a copy.

        A gather reads the copy. A scatter writes it, and the table is a copy of it.
        """
        return 0

    def orders_update(self, table: TableAccess) -> bool:
        """Whether an update reads the table as a scatter wrote it, and its variables so ordered."""
        return False

    def copies_bytes(self, state_bytes: Sequence[int], joined_kernels: int) -> int:
        """Main memory of copies of variables to a chip's own memory, if `buffers.stored_program`.

        `state_bytes` are those of each array of the state. `joined_kernels` is the number of
        kernels with several results.
        """
        return 0

    def moved_itemsize(self, graph: OperatorGraph, tensor: int, readers: Sequence[Reader]) -> int:
        """Bytes of an element of a tensor while it is resharded for its readers."""
        return ITEMSIZE.get(graph.tensors[tensor].dtype, 4)

    def moved_bytes(self, graph: OperatorGraph, tensor: int, readers: Sequence[Reader]) -> int:
        """Bytes of a whole tensor while it is resharded for its readers."""
        value = graph.tensors[tensor]
        itemsize = ITEMSIZE.get(value.dtype, 4)
        return value.nbytes * self.moved_itemsize(graph, tensor, readers) // itemsize

    def sum_itemsize(self, graph: OperatorGraph, tensor: int) -> int:
        """Bytes of an element of a tensor while it is summed over devices."""
        dtype = graph.tensors[tensor].dtype
        if dtype == "bfloat16" and self.backend.promotes_16_bit_all_reduce:
            return 4
        return ITEMSIZE.get(dtype, 4)

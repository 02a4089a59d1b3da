"""XLA:TPU, as of libtpu 0.0.42.1, compiled for v5e slices.

Its memory is tiled: the minor dim is padded to 128 and the next one to 8. Any two dims can be
these, and those that pad least are. Of an image, samples and channels are. Samples are the minor
dim if that pads less for one image that a convolution reads or writes, among all to which it passes
its order of dims, although others grow: seen in programs of a U-Net and of ResNet50, split by
channels, by rows and by samples.

Vector memory on the chip holds most temporaries of a small step. XLA:TPU gives values 112 of its
128 MiB. Of these, 16 are counted as copies that kernels read next, of variables and of values that
moved to main memory: five programs of a GPT have copies of 0 to 18 MiB at their peak. The program
takes main memory as well, which matters for small models only. Its bytes follow from the sizes of
kernels and from the collectives. Copies of variables to the chip have tables in main memory. The
instructions that call kernels and copy were counted in the low-level programs of perceptrons and of
a two-tower model, those for windows in convolutions of one layer, and those for tables in programs
of one gather or scatter.

A gather and a scatter of rows address whole rows, so the columns are the minor dim of their table.
Where tables of this shape have another order because that pads less, XLA:TPU copies the table. It
does not where the copy would be much larger.

Its matrix unit takes bfloat16. A float32 operand of products alone is converted first, so it is
also resharded in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from itertools import permutations

import numpy as np

from partita.cost.backends.accelerator import XlaAccelerator
from partita.cost.backends.base import Buffers, DimOrder, FusionRules, Kernel, TableAccess
from partita.cost.sums import LaidOutProgram
from partita.graph.flat import PRODUCTS, Reader, readers_of
from partita.graph.images import TiledDims, images
from partita.graph.operator_graph import ITEMSIZE, Instruction, Loop, OperatorGraph, Window
from partita.plans.layout import local_shape

LANES = 128
"""Elements of a tile along the minor dim."""
SUBLANES = 8
"""Elements of a tile along the next dim."""
ON_CHIP_SHARE = 0.75
"""The part of vector memory that holds temporaries at the peak of a step: 96 of 128 MiB."""
PROGRAM_BYTES = 80 << 10
"""Main memory that a program takes beside its kernels: constants, start and end."""
KERNEL_BYTES = 3 << 10
"""Instructions that call a kernel: 47 bundles of 64 bytes."""
COPY_BYTES = 19 * 64
"""Instructions that start a copy and wait for it: 19 bundles."""
TABLE_BYTES = 16 << 10
"""Main memory of the table of a value that is a tuple: 512 bytes in a stride of 16 KiB."""
SLICED_BYTES = 1 << 20
"""Bytes of an array from which on it is copied to the chip in slices."""
SLICES = 4
"""Slices of such an array; the copy of a slice is a tuple in a tuple, so it has two tables."""
REGISTER_BYTES = 256
"""Instructions of a kernel for each register of its largest value: four bundles of 64 bytes."""
POSITION_BYTES = 64
"""The same in a convolution, for each element of its window: one bundle."""
UNROLLED_REGISTERS = 512
"""Registers over which the loop of a kernel is unrolled, at most."""
PIECES = 8
"""Pieces into which images of few samples are divided."""
DILATED_PIECE = 3
"""Columns of each piece from which on a dilated image is divided."""
COPIES_OF_PIECES = 2
"""Kernels that divide, pad and join them, for each convolution."""
BUNDLE_BYTES = 64
"""Instructions of one cycle."""
ORDERING_BUNDLES = 2
"""Bundles of a copy in another order of dims, for each register."""
UNROLLED_ROWS = 512
"""Rows over which the loop of a scatter is unrolled, at most."""
UNROLLED_TABLE_BYTES = 16 << 20
"""Bytes of a table below which the scatter's loops are unrolled, over all its registers."""
SCATTER_BUNDLES = 1000
"""Bundles of a scatter into a larger table."""
COLLECTIVE_BYTES = {
    "all_gather": 60 << 10,
    "all_to_all": 120 << 10,
    "collective_permute": 120 << 10,
    "all_reduce": 32 << 10,
}
"""Kind of a collective -> bytes of its instructions."""
ROW_ORDER = DimOrder(1, 0)
"""The order of dims of a table of which rows are read."""
SELECTING = {
    "reshape",
    "transpose",
    "convert",
    "copy",
    "gather",
    "dynamic_slice",
    "select",
    "pad",
    "reverse",
}
"""Instructions past which a conversion to bfloat16 moves."""


class XlaTpu(XlaAccelerator):
    """XLA:TPU. Variables are gathered one by one, asynchronously."""

    @cached_property
    def fusion_rules(self) -> FusionRules:
        """Products compute their operands, and what alone reads their results. Everything else
        elementwise but residual sums is computed again."""
        return FusionRules(
            duplicates=True,
            cheap_elementwise=True,
            reads_written=True,
            fuses_operands=True,
            repeats_differences=True,
            recomputes_summed=True,
            writes_sums=True,
            writes_after_products=True,
            joins_by_maximum=True,
        )

    @cached_property
    def buffers(self) -> Buffers:
        """A product also computes the metric that reads its result."""
        return replace(
            super().buffers,
            early_reductions=True,
            late_gradients=True,
            selected_starts=True,
            stored_program=True,
        )

    @property
    def merges_exchanges(self) -> bool:
        """A convolution and its weight gradient exchange the rows of the image once."""
        return True

    def folds(self, instruction: Instruction) -> bool:
        """Not those of a weight gradient whose window moves over the rows that it sums: the sum
        over rows lists devices, that over samples names axes of the mesh."""
        rule = instruction.rule
        if rule is None or instruction.name != "convolution":
            return True
        windows = (window for factor, window in instruction.windows if factor in rule.reduction)
        return all(window.is_pointwise for window in windows)

    def orders(self, program: LaidOutProgram) -> dict[int, DimOrder]:
        """Those of images: samples are the minor dim of a group of images if that pads less for one
        that a convolution reads or writes, else channels are."""
        found = images(program.graph)
        moved = program.layout.targets
        by_samples: set[int] = set()
        """Groups of images whose minor dim are the samples."""
        for tensor, reader in found.convolved:
            sharding = program.layout.shardings[tensor]
            if reader in moved:
                sharding = moved[reader]
            shape = local_shape(program.graph.tensors[tensor].shape, sharding, program.mesh.sizes)
            samples, channels = found.dims[tensor]
            if _elements_in_tiles(shape, samples, channels) < _elements_in_tiles(
                shape, channels, samples
            ):
                by_samples.add(found.group[tensor])
        arguments = {argument.tensor for argument in program.graph.arguments}
        orders = {}
        for tensor, (samples, channels) in found.dims.items():
            if tensor in arguments:
                continue
            if found.group[tensor] in by_samples:
                orders[tensor] = DimOrder(samples, channels)
            elif tensor not in found.divided:
                orders[tensor] = DimOrder(channels, samples)
        return orders

    def stored_bytes(
        self,
        shape: Sequence[int],
        itemsize: int,
        order: DimOrder | None = None,
    ) -> int:
        """Bytes of whole tiles, by default in the order of dims that pads least."""
        if not shape:
            return itemsize
        if len(shape) == 1:
            return itemsize * _padded(shape[0], LANES)
        if order is not None:
            return itemsize * _elements_in_tiles(shape, *order)
        return itemsize * _least_elements_in_tiles(tuple(shape))

    def gathered_bytes(
        self,
        shape: tuple[int, ...],
        shard: tuple[int, ...],
        itemsize: int,
        order: DimOrder | None = None,
    ) -> int:
        """A copy of the result and one of the shard, in the order of dims that pads least of those
        in which shards are whole tiles, unless the result is read in such an order."""
        return itemsize * _gather_elements(shape, shard, order)

    def temporary_bytes(
        self,
        live_bytes: np.ndarray,
        largest_bytes: int = 0,
    ) -> np.ndarray:
        """Bytes that do not fit on the chip.

        Temporaries as large as the chip's memory leave gaps in main memory, so nothing is counted
        on the chip beside them: a U-Net has 427 MiB of values in 557 MiB of temporaries.
        """
        capacity = self.backend.on_chip_memory or 0
        on_chip = ON_CHIP_SHARE * capacity if largest_bytes < capacity else 0
        return np.maximum(live_bytes - on_chip, 0)

    def program_bytes(
        self,
        kernels: Sequence[Kernel],
        collectives: Mapping[str, int],
        tables: Sequence[TableAccess] = (),
    ) -> int:
        """Instructions of kernels and collectives, and constants."""
        total = PROGRAM_BYTES + len(kernels) * KERNEL_BYTES
        for kernel in kernels:
            registers = min(-(-kernel.elements // (LANES * SUBLANES)), UNROLLED_REGISTERS)
            total += registers * max(REGISTER_BYTES, kernel.positions * POSITION_BYTES)
            if kernel.is_divided:
                total += COPIES_OF_PIECES * (KERNEL_BYTES + registers * REGISTER_BYTES)
        for kind, count in collectives.items():
            total += count * COLLECTIVE_BYTES.get(kind, 0)
        for table in tables:
            if self.ordered_table_bytes(table):
                registers = min(_row_registers(table), UNROLLED_REGISTERS)
                total += KERNEL_BYTES + registers * ORDERING_BUNDLES * BUNDLE_BYTES
            if table.is_written:
                total += KERNEL_BYTES + _scatter_bundles(table) * BUNDLE_BYTES
        return total

    def image_pieces(self, shape: tuple[int, ...], dims: TiledDims) -> tuple[int, ...]:
        """Eight pieces of the width, with one more column each, of images of fewer than 8 samples
        (XLA's SpaceToBatchConverter)."""
        width = max(d for d in range(len(shape)) if d not in dims)
        if shape[dims.samples] >= SUBLANES or shape[width] < 2 * PIECES:
            return shape
        pieces = list(shape)
        pieces[dims.samples] *= PIECES
        pieces[width] = -(-shape[width] // PIECES) + 1
        return tuple(pieces)

    @property
    def image_parts(self) -> int:
        """Eight, if a device has fewer than 8 samples (`image_pieces`)."""
        return PIECES

    def piece_columns(self, window: Window, columns: int | None) -> int | None:
        """As XLA's SpaceToBatchConverter: even parts of the positions, rounded up until the pieces
        cover the padding too. Of a divided image, a halo covers a part, and larger pieces stay."""
        covered = (window.count - 1) * window.step + window.reach
        elements = -(-covered // window.base)
        halo = max(0, window.reach - window.step - window.base + 1)
        least = (DILATED_PIECE if window.base > 1 else 2) * PIECES
        is_small = (columns is None or window.base > 1) and window.size < least
        if is_small or halo > -(-elements // PIECES):
            return None
        positions = -(-window.count // PIECES)
        part = -(-positions // window.base) * window.step
        while part * PIECES + (halo if columns else 0) < elements:
            part += window.step
        if columns and columns > part and columns % window.step == 0 and window.base == 1:
            part = columns
        return part * window.base // window.step

    def ordered_table_bytes(self, table: TableAccess) -> int:
        """Bytes of the table in an order that pads more, if the copy fits on the chip or is not
        larger than twice the table (a scatter: smaller than that)."""
        stored = self.stored_bytes(table.shape, table.itemsize)
        ordered = self.stored_bytes(table.shape, table.itemsize, ROW_ORDER)
        if ordered <= (self.backend.on_chip_memory or 0):
            return ordered if ordered > stored else 0
        is_copied = stored < ordered <= 2 * stored - table.is_written
        return ordered if is_copied else 0

    def orders_update(self, table: TableAccess) -> bool:
        """If the copies are smaller than twice the variables. From 1.7 times on it depends on the
        optimizer."""
        stored = self.stored_bytes(table.shape, table.itemsize)
        return stored < self.ordered_table_bytes(table) < 2 * stored

    def copies_bytes(self, state_bytes: Sequence[int], joined_kernels: int) -> int:
        """Tables and instructions. Each array is copied to the chip, and back once it is new."""
        tables = joined_kernels
        copies = 0
        for nbytes in state_bytes:
            is_sliced = nbytes >= SLICED_BYTES
            copies += SLICES + 1 if is_sliced else 2
            tables += 2 * SLICES + 1 if is_sliced else 2
        return tables * TABLE_BYTES + copies * COPY_BYTES

    def stored_itemsize(self, graph: OperatorGraph, tensor: int) -> int:
        """Two bytes for operands of products, where products run in bfloat16. A kernel that
        computes such a value also sums it, if a bias needs that."""
        if graph.tensors[tensor].dtype != "float32" or not self._narrows_products:
            return super().stored_itemsize(graph, tensor)
        readers = readers_of(graph).get(tensor, ())
        operands = [(i, position) for i, position in readers if not _is_reduction(graph, i)]
        return 2 if _feeds_products(graph, operands) else super().stored_itemsize(graph, tensor)

    def sum_itemsize(self, graph: OperatorGraph, tensor: int) -> int:
        """That of the narrower dtype to which the only reader converts, and two bytes for operands
        of products alone: the kernel before the sum converts."""
        readers = readers_of(graph).get(tensor, ())
        itemsize = min(
            super().sum_itemsize(graph, tensor), self.moved_itemsize(graph, tensor, readers)
        )
        if len(readers) == 1 and readers[0][0] >= 0:
            reader = graph.instructions[readers[0][0]]
            if reader.name == "convert":
                dtype = graph.tensors[reader.results[0]].dtype
                itemsize = min(itemsize, ITEMSIZE.get(dtype, itemsize))
        return itemsize

    @property
    def _narrows_products(self) -> bool:
        return self.backend.float32_products == "bfloat16"

    def moved_itemsize(self, graph: OperatorGraph, tensor: int, readers: Sequence[Reader]) -> int:
        """Two bytes for operands of products alone, where products run in bfloat16."""
        is_converted = (
            self._narrows_products
            and graph.tensors[tensor].dtype == "float32"
            and _feeds_products(graph, readers)
        )
        return 2 if is_converted else super().moved_itemsize(graph, tensor, readers)


def _row_registers(table: TableAccess) -> int:
    """Registers that a table fills whose columns are the minor dim."""
    return -(-_elements_in_tiles(table.shape, *ROW_ORDER) // (LANES * SUBLANES))


def _scatter_bundles(table: TableAccess) -> int:
    """Bundles of a scatter: 130, two to clear each register of the table, and for each row four and
    two for each of its registers."""
    registers = _row_registers(table)
    if registers * LANES * SUBLANES * table.itemsize >= UNROLLED_TABLE_BYTES:
        return SCATTER_BUNDLES
    row_registers = -(-table.shape[1] // LANES)
    return 130 + 2 * registers + min(table.rows, UNROLLED_ROWS) * (4 + 2 * row_registers)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@lru_cache(maxsize=1 << 12)
def _least_elements_in_tiles(shape: tuple[int, ...]) -> int:
    """Elements of whole tiles in the order of dims that pads least."""
    orders = permutations(range(len(shape)), 2)
    return min(_elements_in_tiles(shape, minor, second) for minor, second in orders)


def _elements_in_tiles(shape: Sequence[int], minor: int, second: int) -> int:
    """Elements of whole tiles. A short second dim has a tile of its own, of a power of two."""
    size = math.prod(shape)
    if not size:
        return 0
    sublanes = min(SUBLANES, 1 << (shape[second] - 1).bit_length())
    rest = size // (shape[minor] * shape[second])
    return rest * _padded(shape[minor], LANES) * _padded(shape[second], sublanes)


@lru_cache(maxsize=1 << 12)
def _gather_elements(shape: tuple[int, ...], shard: tuple[int, ...], order: DimOrder | None) -> int:
    """Elements of the buffers of an all-gather whose result is read in `order`, by default in one
    that pads least."""
    orders = [DimOrder(*dims) for dims in permutations(range(len(shape)), 2)]
    elements = {x: _elements_in_tiles(shape, *x) for x in orders}
    whole = [x for x in orders if _are_whole_tiles(shape, shard, x)]
    if not whole:
        return 0
    written = min(whole, key=lambda x: elements[x])
    is_read_so = order in whole or (order is None and elements[written] == min(elements.values()))
    return 0 if is_read_so else elements[written] + _elements_in_tiles(shard, *written)


def _are_whole_tiles(shape: Sequence[int], shard: Sequence[int], order: DimOrder) -> bool:
    """Whether the dims along which a shape is divided into shards are cut between tiles."""
    tile = {order.minor: LANES, order.second: SUBLANES}
    return all(
        part == size or part % tile.get(d, 1) == 0
        for d, (size, part) in enumerate(zip(shape, shard, strict=True))
    )


def _feeds_products(graph: OperatorGraph, readers: Sequence[Reader]) -> bool:
    """Whether products alone read a value, directly, rearranged or in a loop."""
    loops = {loop.instruction: loop for loop in graph.loops}
    pending = list(readers)
    visited: set[Reader] = set()
    while pending:
        place = pending.pop()
        reader, position = place
        if reader < 0:
            return False
        instruction = graph.instructions[reader]
        if instruction.name in PRODUCTS or place in visited:
            continue
        visited.add(place)
        if reader in loops:
            pending += _readers_inside(graph, loops[reader], position)
        elif instruction.name in SELECTING:
            for result in instruction.results:
                pending += readers_of(graph).get(result, ())
        else:
            return False
    return bool(readers)


def _is_reduction(graph: OperatorGraph, reader: int) -> bool:
    return reader >= 0 and graph.instructions[reader].name == "reduce"


def _readers_inside(graph: OperatorGraph, loop: Loop, position: int) -> list[Reader]:
    """Readers of an operand inside of a loop, with one outside if the loop changes the operand."""
    operand = graph.instructions[loop.instruction].operands[position]
    readers = []
    for carried, body, yielded, _ in loop.carried:
        if carried != operand:
            continue
        if body != yielded:
            readers.append((-1, 0))
        readers += [place for place in readers_of(graph).get(body, ()) if place[0] >= 0]
    return readers

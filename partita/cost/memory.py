"""Peak memory of a step per device: liveness over the program at local sizes.

A value takes memory from the kernel that computes it to the last one that reads it. Exceptions:

- Fused values are computed inside their readers (`cost.fusion`). The readers then read the operands
  of the kernel.
- The state is donated: new variables take the place of the old ones.
- A reshard is a value of its own.
- Reduced gradients wait for each other, because XLA combines their all-reduces. The sums are new
  values.

When values are in memory says `cost.lifetimes`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from partita.cost.backends import compiler_of
from partita.cost.backends.base import Kernel, TableAccess
from partita.cost.collectives import DEFAULT, collectives, emitted_sums
from partita.cost.early_sums import early_sums, update_gradients
from partita.cost.fusion import ALONE, Fusion, kernel_reads
from partita.cost.joined import computed_together
from partita.cost.laid_out_fusion import fused_under
from partita.cost.lifetimes import Lifetimes, lifetimes_under, static_lifetimes
from partita.cost.partial import split_axes
from partita.cost.recomputed import Lifetime, Recomputable, drops
from partita.cost.reshard import Axes
from partita.cost.sums import LaidOutProgram
from partita.cost.work import filled_ratio, group_factors, product_shape
from partita.graph.clones import BARRIER
from partita.graph.flat import Reader, readers_of
from partita.graph.images import images
from partita.graph.operator_graph import (
    ITEMSIZE,
    IdentityKey,
    Instruction,
    OperatorGraph,
    first_backward,
)
from partita.machine import Backend
from partita.plans.layout import Layout, Read, Sharding, local_shape
from partita.plans.plan import Mesh

MARGIN = 1.05
"""Factor for memory that the model omits (copies for another layout, padding).

An estimate that is too low is worse than one that is too high.
"""


KINDS = ("parameters", "optimizer", "state", "batch", "activations", "gradients", "temporaries")
"""Kinds of memory at the peak of a step: the fields of `PeakMemory` beside the peak itself."""
ROLES = {
    "parameter": "parameters",
    "optimizer": "optimizer",
    "state": "state",
    "batch": "batch",
}
"""Role of an argument -> kind of memory."""
TEMPORARY = -1
"""Kind of an allocation that is no activation and no gradient."""
SUMS = {"all_reduce", "reduce_scatter"}
"""Kinds of collectives that add."""
ADDRESSING = {"gather", "dynamic_slice", "dynamic_update_slice"}
"""Instructions that access a part of their first operand."""
WORK_SPACE = -2
"""Kind of the work space of a library's kernel, whose size is known exactly."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes per device at the peak of a step, by kind."""

    peak: int
    parameters: int
    optimizer: int
    state: int
    batch: int
    activations: int
    gradients: int
    temporaries: int
    operator: str
    """The operator that runs at the peak."""
    course: np.ndarray = field(compare=False, repr=False)
    """Bytes allocated while each instruction runs, and after the last."""
    by_operator: np.ndarray = field(compare=False, repr=False)
    """[operator]: bytes of its arguments and values at the peak; empty where they are not known."""


def memory(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    backend: Backend = DEFAULT,
    operators: frozenset[int] | None = None,
    device_bytes: float = math.inf,
) -> PeakMemory:
    """Bytes per device at the peak of one step under a layout.

    `operators` are those of the device, by default all. `device_bytes` is the main memory of a
    device: compilers compute values again where a step exceeds it.
    """
    keys = IdentityKey(graph), IdentityKey(layout)
    allocations = _allocations(*keys, mesh, backend)
    count = len(graph.instructions)
    is_present = np.full(len(graph.operators) + 1, operators is None)
    if operators is not None:
        is_present[list(operators)] = True
    by_role: dict[str, int] = defaultdict(int)
    for kind, home, nbytes in allocations.arguments:
        if is_present[home]:
            by_role[kind] += nbytes
    constant = sum(by_role.values())
    compiler = compiler_of(backend)
    fused = fused_under(graph, layout, compiler.fusion_rules, mesh)
    limit = compiler.temporary_limit_bytes(device_bytes, constant)
    present = is_present[allocations.home]
    live = allocations.live(present, count)
    # With slots in host memory, XLA:GPU's second computations freed nothing in compiled programs.
    if live.max() > limit and not layout.host:
        # Kernels are delayed up to the limit, and computed again beyond it.
        lifetimes = lifetimes_under(*keys, mesh, backend, is_limited=True)
        allocations = _allocations(*keys, mesh, backend, is_limited=True)
        allocations = _within(graph, layout, fused, lifetimes, allocations, is_present, limit)
        present = is_present[allocations.home]
        live = np.maximum(allocations.live(present, count), np.minimum(live, limit))
    is_work_space = allocations.kind == WORK_SPACE
    live = live * MARGIN + _work_space(graph, allocations, present & is_work_space)
    largest = int(allocations.nbytes[present & ~is_work_space].max(initial=0))
    course = compiler.temporary_bytes(live, largest) + allocations.program_bytes
    peak = int(np.argmax(course))
    operator = graph.owner[peak] if peak < count else -1
    by_operator = np.zeros(len(graph.operators) + 1)
    for _, home, nbytes in allocations.arguments:
        by_operator[home] += nbytes * is_present[home]
    at_peak = present & ~is_work_space & (allocations.start <= peak) & (peak <= allocations.stop)
    np.add.at(by_operator, allocations.home[at_peak], allocations.nbytes[at_peak])
    by_kind = {}
    for kind in ("activations", "gradients"):
        chosen = present & (allocations.kind == KINDS.index(kind))
        nbytes = int(allocations.course(chosen, count)[peak])
        if live[peak] > course[peak]:
            nbytes = int(nbytes * course[peak] / live[peak])
        by_kind[kind] = nbytes
    return PeakMemory(
        constant + int(course[peak]),
        by_role["parameters"],
        by_role["optimizer"],
        by_role["state"],
        by_role["batch"],
        by_kind["activations"],
        by_kind["gradients"],
        int(course[peak]) - by_kind["activations"] - by_kind["gradients"],
        graph.operators[operator].name if operator >= 0 else "",
        constant + course[: count + 1].astype(np.int64),
        by_operator[:-1],
    )


def argument_bytes(graph: OperatorGraph, mesh: Mesh, layout: Layout) -> int:
    """Bytes of a device's shards of variables and batch without padding, at most the peak."""
    total = 0
    for argument in graph.arguments:
        if argument.tensor in layout.host:
            continue
        value = graph.tensors[argument.tensor]
        shape = local_shape(value.shape, layout.shardings[argument.tensor], mesh.sizes)
        total += math.prod(shape) * ITEMSIZE.get(value.dtype, 4)
    return total


def _work_space(graph: OperatorGraph, allocations: _Allocations, chosen: np.ndarray) -> np.ndarray:
    """[instruction]: bytes of the work space of library calls, from the first to the last.

    One call at a time has it.
    """
    course = np.zeros(len(graph.instructions) + 2, np.int64)
    if chosen.any():
        first = int(allocations.start[chosen].min())
        last = int(allocations.stop[chosen].max())
        course[first : last + 1] = allocations.nbytes[chosen].max()
    return course


# ---- allocations under a layout


@dataclass(frozen=True)
class _Allocations:
    """All allocations of a device under a layout, an entry per value and reason.

    `home` is the operator of the value, -1 for none, and `tensor` the value that its kernel wrote,
    -1 for a copy of one. An allocation takes `nbytes`, those of the
    device's shard, from instruction `start` to `stop`. `kind` is an index of KINDS, TEMPORARY or
    WORK_SPACE.
    """

    arguments: tuple[tuple[str, int, int], ...]
    """(kind, home, bytes), allocated during the whole step."""
    home: np.ndarray
    nbytes: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    kind: np.ndarray
    tensor: np.ndarray
    program_bytes: int = 0
    """Main memory that the program itself takes."""

    def course(self, chosen: np.ndarray, instructions: int) -> np.ndarray:
        """[instruction]: bytes of the chosen allocations."""
        change = np.zeros(instructions + 2, np.int64)
        np.add.at(change, self.start[chosen], self.nbytes[chosen])
        np.subtract.at(change, self.stop[chosen] + 1, self.nbytes[chosen])
        return np.cumsum(change)

    def live(self, present: np.ndarray, instructions: int) -> np.ndarray:
        """[instruction]: bytes of present allocations other than work space."""
        return self.course(present & (self.kind != WORK_SPACE), instructions)


@lru_cache(maxsize=4)
def _allocations(
    graph_key: IdentityKey[OperatorGraph],
    layout_key: IdentityKey[Layout],
    mesh: Mesh,
    backend: Backend,
    is_limited: bool = False,
) -> _Allocations:
    lifetimes = lifetimes_under(graph_key, layout_key, mesh, backend, is_limited)
    allocator = _Allocator(graph_key.value, mesh, layout_key.value, backend, lifetimes)
    allocator.add_values(scalars=is_limited)
    allocator.add_reshards()
    buffers = compiler_of(backend).buffers
    if buffers.transposed_copies:
        allocator.add_transposed_copies()
    allocator.add_gradient_sums()
    allocator.add_offloaded()
    allocator.add_work_spaces()
    allocator.add_ordered_tables()
    if buffers.ordered_kernels:
        allocator.add_ordered_kernels()
    if buffers.filled_gradients:
        allocator.add_filled_operands()
    if buffers.early_zeros:
        allocator.add_zeros()
    if buffers.shared_zeros:
        allocator.add_shared_zeros()
    if buffers.pool_positions:
        allocator.add_pool_gradients()
    if buffers.late_positions:
        allocator.add_late_positions()
    return allocator.allocations()


def _within(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
    lifetimes: Lifetimes,
    allocations: _Allocations,
    is_present: np.ndarray,
    limit_bytes: float,
) -> _Allocations:
    """The allocations of present operators when values are computed again to respect a limit."""
    present = is_present[allocations.home]
    live = allocations.live(present, len(graph.instructions))
    if live.max() <= limit_bytes:
        return allocations
    columns = zip(
        allocations.tensor.tolist(),
        allocations.nbytes.tolist(),
        allocations.start.tolist(),
        allocations.stop.tolist(),
        strict=True,
    )
    values = {
        index: Lifetime(*column)
        for index, column in enumerate(columns)
        if column[0] >= 0 and present[index]
    }
    recomputed = drops(values, _recomputable(graph, layout, fused, lifetimes), live, limit_bytes)
    dropped = recomputed.drops
    index = np.array([drop.allocation for drop in dropped], np.int64)
    stop = allocations.stop.copy()
    stop[list(recomputed.stops)] = list(recomputed.stops.values())
    stop_again = stop[index]
    stop[index] = [drop.last for drop in dropped]
    again = replace(
        allocations,
        home=allocations.home[index],
        nbytes=allocations.nbytes[index],
        start=np.array([drop.next for drop in dropped], np.int64),
        stop=stop_again,
        kind=np.full(len(index), TEMPORARY),
        tensor=allocations.tensor[index],
    )
    shortened = replace(allocations, stop=stop)
    joined = {
        column: np.concatenate([getattr(shortened, column), getattr(again, column)])
        for column in ("home", "nbytes", "start", "stop", "kind", "tensor")
    }
    return replace(allocations, **joined)


def _recomputable(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
    lifetimes: Lifetimes,
) -> list[Recomputable]:
    """The kernels that can run again: those other than products and calls.

    What a rematerialized run reads behind a barrier is part of a tuple. XLA does not compute that
    again, because it does not follow readers of tuples.
    """
    stored = {argument.result for argument in graph.arguments}
    for instruction in graph.instructions:
        if instruction.name == BARRIER:
            stored.update(instruction.operands)
    reads_of: dict[int, set[int]] = defaultdict(set)
    """Tensor -> roots of the kernels that read it."""
    read_by = kernel_reads(graph, fused)
    for root, tensors in read_by.items():
        for tensor in tensors:
            reads_of[tensor].add(root)
    groups = list(computed_together(graph, layout, fused))
    together = {root for roots in groups for root in roots}
    groups += [(root,) for root in fused.kernels if root not in together]
    kernels = []
    for roots in groups:
        instructions = [graph.instructions[root] for root in roots]
        if any(x.name in ALONE or x.trips != 1 for x in instructions):
            continue
        written = [x.results[0] for x in instructions if x.results[0] in lifetimes.born]
        if not written or not stored.isdisjoint(written):
            continue
        computed = {t for root in roots for t in read_by[root] if lifetimes.born.get(t, -1) >= 0}
        results = {tensor: tuple(sorted(reads_of[tensor].difference(roots))) for tensor in written}
        kernels.append(Recomputable(results, tuple(sorted(computed.difference(written)))))
    return kernels


class _Resharded(NamedTuple):
    """A value of a collective, in memory while instructions `start` to `stop` run."""

    start: int
    stop: int
    tensor: int
    nbytes: int


def _combined(values: Sequence[_Resharded], limit: float) -> list[list[_Resharded]]:
    """Values in groups of at most `limit` bytes, in their order, by starting time."""
    groups: list[list[_Resharded]] = []
    total = math.inf
    for value in sorted(values, key=lambda value: value.start):
        total += value.nbytes
        if total > limit or not groups:
            groups.append([])
            total = value.nbytes
        groups[-1].append(value)
    return groups


class _Allocator:
    """Adds the allocations of a layout, reason by reason."""

    def __init__(
        self,
        graph: OperatorGraph,
        mesh: Mesh,
        layout: Layout,
        backend: Backend,
        lifetimes: Lifetimes,
    ) -> None:
        self.graph = graph
        self.mesh = mesh
        self.layout = layout
        self.backend = backend
        self.compiler = compiler_of(backend)
        self.lifetimes = lifetimes
        self.orders = self.compiler.orders(LaidOutProgram(graph, mesh, layout))
        """Tensor -> the order of its dims in memory."""
        self.program = static_lifetimes(graph)
        self.arguments = {argument.tensor for argument in graph.arguments}
        self.sums = emitted_sums(graph, mesh, layout, backend)
        """Sums over devices."""
        self.scattered = {total.tensor for total in self.sums if total.kind == "reduce_scatter"}
        """Tensors of which a device keeps a slice of the sum."""
        self.groups = self._groups()
        self.meeting = {
            value.tensor: max(member.start for member in group)
            for group in self.groups
            for value in group
        }
        """Gradient -> the instruction at which it is summed with those that wait for each other."""
        self.early = early_sums(graph, layout, mesh)
        """Gradients for whose sums products wait."""
        for tensor, total in self.early.items():
            self.meeting[tensor] = total.summed
        self.entries: list[tuple[int, int, int, int, int, int]] = []

    def allocations(self) -> _Allocations:
        """All allocations added, and those of arguments."""
        arguments = tuple(
            (ROLES[argument.role], self.graph.home[argument.tensor], self._bytes(argument.tensor))
            for argument in self.graph.arguments
            if argument.tensor not in self.layout.host
        )
        columns = np.array(self.entries, np.int64).reshape(-1, 6).T.copy()
        program_bytes = self._program_bytes() if self.compiler.buffers.stored_program else 0
        return _Allocations(arguments, *columns, program_bytes=program_bytes)

    def _program_bytes(self) -> int:
        """Bytes of the compiled program itself, with the collectives that no gradients share."""
        graph = self.graph
        fused = fused_under(graph, self.layout, self.compiler.fusion_rules, self.mesh)
        tables = self._tables
        kernels = []
        for root, read in kernel_reads(graph, fused).items():
            instruction = graph.instructions[root]
            if root in tables and tables[root].is_written:
                continue
            if not self.lifetimes.replaced.isdisjoint(read):
                continue
            read_values = [
                (tensor, self.layout.targets.get(readers[0]))
                for tensor, readers in read.items()
                if not all(self._is_addressed(reader) for reader in readers)
            ]
            is_slice = instruction.name == "dynamic_update_slice"
            written = [] if is_slice else [(tensor, None) for tensor in instruction.results]
            values = [*read_values, *written]
            if instruction.name == "convolution":
                kernels.append(self._convolution_kernel(instruction, values))
            else:
                elements = max((self._elements(*value) for value in values), default=0)
                kernels.append(Kernel(elements))
        moves = collectives(graph, self.mesh, self.layout, self.backend)
        kinds = Counter(move.kind for move in moves if move.kind not in SUMS)
        for total in self.sums:
            is_scalar = not graph.tensors[total.tensor].shape
            kinds[total.kind] += not is_scalar and total.tensor not in self.meeting
        state_bytes = [
            self._bytes(argument.tensor)
            for argument in graph.arguments
            if argument.result is not None and graph.tensors[argument.tensor].shape
        ]
        joined = sum(1 for _ in computed_together(graph, self.layout, fused))
        program_bytes = self.compiler.program_bytes(kernels, kinds, list(tables.values()))
        return program_bytes + self.compiler.copies_bytes(state_bytes, joined)

    def _convolution_kernel(
        self, instruction: Instruction, values: Sequence[tuple[int, Sharding | None]]
    ) -> Kernel:
        """The sizes of the kernel of a convolution, given its operands and results."""
        positions = math.prod(min(w.reach, w.count) for _, w in instruction.windows)
        dims = images(self.graph).dims if positions > 1 else {}
        most = 0
        is_divided = False
        for tensor, sharding in values:
            shape = pieces = self._local_shape(tensor, sharding)
            if tensor in dims:
                pieces = self.compiler.image_pieces(shape, dims[tensor])
            is_divided |= pieces != shape
            most = max(most, self.compiler.stored_bytes(pieces, 1, self.orders.get(tensor)))
        return Kernel(most, positions, is_divided)

    def _is_addressed(self, reader: Reader) -> bool:
        """Whether an instruction reads or writes a small part of an operand, by its address."""
        i, position = reader
        return position == 0 and self.graph.instructions[i].name in ADDRESSING

    @cached_property
    def _tables(self) -> dict[int, TableAccess]:
        """Gather or scatter of rows of a table -> its local sizes."""
        tables = {}
        for i, instruction in enumerate(self.graph.instructions):
            rule = instruction.rule
            if instruction.name not in ("gather", "scatter") or rule is None:
                continue
            is_written = instruction.name == "scatter"
            if is_written:
                table, dims = instruction.results[0], rule.results[0]
                slices, slice_dims = instruction.operands[2], rule.operands[2]
            else:
                table, dims = instruction.operands[0], rule.operands[0]
                slices, slice_dims = instruction.results[0], rule.results[0]
            if len(dims) != 2 or dims[0] in slice_dims or dims[1:] != slice_dims[-1:]:
                continue
            sharding = None if is_written else self.layout.targets.get((i, 0))
            rows, columns = self._local_shape(table, sharding)
            itemsize = ITEMSIZE.get(self.graph.tensors[table].dtype, 4)
            count = math.prod(self._local_shape(slices)[:-1])
            tables[i] = TableAccess((rows, columns), itemsize, count, is_written)
        return tables

    def _elements(self, tensor: int, sharding: Sharding | None = None) -> int:
        """Elements of a device's shard of a tensor, under the tensor's own sharding by default."""
        return math.prod(self._local_shape(tensor, sharding))

    def _local_shape(self, tensor: int, sharding: Sharding | None = None) -> tuple[int, ...]:
        """Sizes of a device's shard of a tensor, under the tensor's own sharding by default."""
        if sharding is None:
            sharding = self.layout.shardings[tensor]
        return local_shape(self.graph.tensors[tensor].shape, sharding, self.mesh.sizes)

    def _bytes(
        self,
        tensor: int,
        sharding: Sharding | None = None,
        itemsize: int | None = None,
    ) -> int:
        """Bytes of a device's shard of a tensor, under the tensor's own sharding by default."""
        value = self.graph.tensors[tensor]
        shape = self._local_shape(tensor, sharding)
        itemsize = itemsize or ITEMSIZE.get(value.dtype, 4)
        return self.compiler.stored_bytes(shape, itemsize, self.orders.get(tensor))

    def _add(
        self,
        tensor: int,
        nbytes: int,
        start: int,
        stop: int,
        kind: int = TEMPORARY,
        written: bool = False,
    ) -> None:
        """Adds an allocation, `written` if it is the tensor itself."""
        value = tensor if written else -1
        self.entries.append((self.graph.home[tensor], nbytes, start, stop, kind, value))

    def add_values(self, scalars: bool) -> None:
        """Adds the values that kernels write. New variables take the place of the old ones.

        Scalars take no memory to speak of, but their kernels may run again (`cost.recomputed`).
        """
        variables = {
            argument.result for argument in self.graph.arguments if argument.result is not None
        }
        for tensor, born in self.lifetimes.born.items():
            if tensor in self.arguments or tensor in variables or tensor in self.lifetimes.sliced:
                continue
            if tensor in self.program.work_spaces:
                self._add(tensor, self._bytes(tensor), born, born, WORK_SPACE)
                continue
            if not scalars and not self.graph.tensors[tensor].shape:
                continue
            lifetime = self._lifetime(tensor, born)
            if lifetime is None:
                continue
            start, stop = lifetime
            if tensor in self.scattered:
                stop = self.meeting.get(tensor, stop)
            is_activation = start < first_backward(self.graph) <= stop
            kind = KINDS.index("activations") if is_activation else TEMPORARY
            itemsize = self.compiler.stored_itemsize(self.graph, tensor)
            nbytes = self._bytes(tensor, itemsize=itemsize)
            if tensor in self._ordered_gradients:
                if tensor not in self.meeting:
                    continue
                start = self.meeting[tensor]
            self._add(tensor, nbytes, start, max(start, stop), kind, written=True)

    def _lifetime(self, tensor: int, born: int) -> tuple[int, int] | None:
        """(first, last) instruction at which a value has memory of its own, None if it never has.

        The result of a loop takes the place of its operand.
        """
        dies = self.lifetimes.dies
        start = born
        stop = dies.get(tensor, -1) - (tensor in self.lifetimes.replaced)
        if born in self.program.loops:
            loop = self.program.loops[born]
            operand = loop.operand_of.get(tensor, -1)
            if operand in self.program.constants:
                stop = max(stop, loop.end)
            elif dies.get(operand, -1) <= loop.end:
                if stop <= loop.end:
                    return None
                start = loop.end + 1
        return (start, stop) if start >= 0 else None

    def add_reshards(self) -> None:
        """Adds the values that reshards produce, until the last kernel that reads them.

        Variables that one all-gather combines are in memory from the first use of any.
        """
        count = len(self.graph.instructions)
        gathered: list[_Resharded] = []
        for read in self._copies():
            if read.tensor in self.program.constants:
                continue
            readers = [i for i, _ in read.readers if i >= 0]
            stop = max((self.lifetimes.last_kernel[i] for i in readers), default=count)
            itemsize = self.compiler.moved_itemsize(self.graph, read.tensor, read.readers)
            nbytes = self._bytes(read.tensor, read.target, itemsize)
            buffers = self._gather_buffers(read, itemsize)
            if read.after < 0 and self._is_variable(read.tensor):
                start = min(readers, default=count)
                if buffers:
                    self._add(read.tensor, buffers, start, start)
                gathered.append(_Resharded(start, stop, read.tensor, nbytes))
                continue
            waited_for = read.after if read.after >= 0 else read.tensor
            start = self.lifetimes.born.get(waited_for, 0)
            kind = TEMPORARY
            if read.tensor in self.scattered:
                start = self.meeting.get(read.tensor, start)
                kind = KINDS.index("gradients")
            self._add(read.tensor, nbytes, max(0, start), stop, kind)
            if buffers:
                self._add(read.tensor, buffers, max(0, start), max(0, start))
        for group in _combined(gathered, self.compiler.combined_gather_bytes):
            for value in group:
                self._add(value.tensor, value.nbytes, group[0].start, value.stop)

    def _gather_buffers(self, read: Read, itemsize: int) -> int:
        """Bytes of the buffers of an all-gather beside its result, 0 for other reads."""
        shape = self._local_shape(read.tensor, read.target)
        shard = self._local_shape(read.tensor)
        if any(part > size for part, size in zip(shard, shape, strict=True)) or shape == shard:
            return 0
        return self.compiler.gathered_bytes(shape, shard, itemsize, self.orders.get(read.tensor))

    def _copies(self) -> list[Read]:
        """The reads under another sharding, as one where a compiler makes one copy of several.

        Query, key and value read one gathered copy of their input.
        """
        if not self.compiler.joins_collectives:
            return list(self.layout.reads)
        copies: dict[tuple[int, Sharding, int], Read] = {}
        for read in self.layout.reads:
            key = (read.tensor, read.target, read.after)
            readers = copies[key].readers if key in copies else ()
            copies[key] = replace(read, readers=(*readers, *read.readers))
        return list(copies.values())

    def _is_variable(self, tensor: int) -> bool:
        """Whether a tensor is an argument or the conversion of one."""
        producer = self.program.producer.get(tensor)
        if producer is None:
            return tensor in self.arguments
        instruction = self.graph.instructions[producer]
        return instruction.name == "convert" and instruction.operands[0] in self.arguments

    def _groups(self) -> list[list[_Resharded]]:
        """Gradients that are summed over the same devices, and wait for each other.

        Their bytes are those of a device before the sum. A gradient starts when it is computed.
        """
        groups: dict[Axes, list[_Resharded]] = defaultdict(list)
        for gradient in self.program.gradient_sums:
            operator = self.graph.owner[gradient.instruction]
            axes = split_axes(self.layout, operator, gradient.factors)
            dies = self.lifetimes.dies.get(gradient.result, -1)
            if axes and dies >= 0 and self.graph.instructions[dies].phase == "update":
                nbytes = self._bytes(gradient.result)
                value = _Resharded(gradient.instruction, dies, gradient.result, nbytes)
                groups[axes].append(value)
        return list(groups.values())

    def add_gradient_sums(self) -> None:
        """Adds the sums of gradients that wait for a combined all-reduce.

        At the all-reduce every gradient is in memory twice: as computed, and summed. If all-reduces
        have a largest size, they follow each other, as do those that products wait for. XLA joins
        the operands of one in a buffer, sums in place (all-reduce-start), and drops the operands.
        The slices that a reduce-scatter leaves are reshards.
        """
        limit = self.compiler.combined_sum_bytes
        for group in self.groups:
            others = self.scattered | self._ordered_gradients.keys()
            summed = [value for value in group if value.tensor not in others]
            part = min(1.0, limit / max(sum(value.nbytes for value in summed), 1))
            for value in summed:
                meeting = self.meeting[value.tensor]
                nbytes = value.nbytes if value.tensor in self.early else int(value.nbytes * part)
                self._add(value.tensor, nbytes, meeting, meeting, KINDS.index("gradients"))

    def add_offloaded(self) -> None:
        """Adds new optimizer slots on their way to the memory of the host.

        The update of a variable reads the old ones there. The new ones are copied while the update
        of the next variable runs.
        """
        written: dict[str, list[int]] = defaultdict(list)
        for argument in self.graph.arguments:
            if argument.result in self.layout.host and argument.parameter:
                written[argument.parameter].append(argument.result)
        updates = []
        for slots in written.values():
            updates.append((max(self.program.producer.get(slot, 0) for slot in slots), slots))
        updates.sort()
        ends = [time for time, _ in updates[1:]] + [len(self.graph.instructions)]
        for (time, slots), end in zip(updates, ends, strict=False):
            for slot in slots:
                self._add(slot, self._bytes(slot), time, end)

    def add_work_spaces(self) -> None:
        """Adds the work space of products while they run.

        Compilers compute a weight gradient when it is needed: beside the sum for which a product
        waits, or at the end of the backward pass.
        """
        backward = [i for i, x in enumerate(self.graph.instructions) if x.phase == "backward"]
        late = update_gradients(self.graph)
        for i, instruction in enumerate(self.graph.instructions):
            if instruction.name != "dot_general" or instruction.rule is None:
                continue
            work_space = self.compiler.work_space_bytes(
                product_shape(self.graph, self.mesh, self.layout, i)
            )
            if work_space:
                result = instruction.results[0]
                stop = i
                if result in self.early:
                    stop = self.early[result].computed
                elif result in late:
                    stop = backward[-1]
                self._add(result, work_space, i, stop, WORK_SPACE)

    def add_transposed_copies(self) -> None:
        """Adds the copies that XLA:CPU transposes for the gradients of convolutions."""
        waiting = self.meeting.keys()
        for i in self.program.kernel_gradients:
            instruction = self.graph.instructions[i]
            result = instruction.results[0]
            # The weight gradient is in memory as computed and transposed.
            if result not in waiting:
                dies = self.lifetimes.dies.get(result, i)
                self._add(result, self._bytes(result), i, max(i, dies))
            for position, operand in enumerate(instruction.operands):
                nbytes = self._bytes(operand, self.layout.targets.get((i, position)))
                start = max(0, self.program.producer.get(operand, 0))
                self._add(operand, nbytes, start, i)
            if instruction.batch_groups > 1 and self.backend.dense_grouped_gradients:
                self._add_dense_gradient(i, result)
        for flipped in self.program.flipped:
            target = self.layout.targets.get((flipped.instruction, 1))
            nbytes = self._bytes(flipped.tensor, target)
            self._add(flipped.tensor, nbytes, flipped.available, flipped.instruction)

    def add_ordered_kernels(self) -> None:
        """Adds the copies of variables that convolutions read, and updates after convolutions.

        A device orders its slice of a stored variable before it gathers the whole. A kernel of one
        position is gathered as it is, because its input gradient reads it so, and copied for its
        convolution. An input gradient reads the reversed kernel, for which cuDNN has a call of its
        own.
        """
        for kernel, readers in self._ordered_kernels.items():
            stop = readers[-1]
            if kernel in self._ordered_gradients.values():
                stop = max(stop, self.lifetimes.dies.get(kernel, -1))
            self._add(kernel, self._bytes(kernel), readers[0], stop)
        for (i, position), target in self.layout.targets.items():
            if position == 1 and self.graph.instructions[i].name == "convolution":
                kernel = self.graph.instructions[i].operands[1]
                has_one_position = sum(size > 1 for size in self.graph.tensors[kernel].shape) <= 2
                if kernel in self.arguments and has_one_position:
                    self._add(kernel, self._bytes(kernel, target), i, i)

    @cached_property
    def _ordered_kernels(self) -> dict[int, list[int]]:
        """Variable of which convolutions read a copy -> these convolutions."""
        times: dict[int, list[int]] = defaultdict(list)
        if not self.compiler.buffers.ordered_kernels:
            return times
        for i, instruction in enumerate(self.graph.instructions):
            if instruction.name != "convolution" or i in self.program.kernel_gradients:
                continue
            kernel = instruction.operands[1]
            reader = i, 1
            source = self.program.producer.get(kernel)
            if source is not None and self.graph.instructions[source].name == "reverse":
                kernel = self.graph.instructions[source].operands[0]
                reader = source, 0
            if kernel in self.arguments and reader not in self.layout.targets:
                times[kernel].append(i)
        return times

    @cached_property
    def _ordered_gradients(self) -> dict[int, int]:
        """Gradient in the place of its variable -> the variable.

        An update computes in the order of its gradient (LayoutAssignment), so it reads the copy of
        the variable for convolutions. Nothing reads the variable itself from the copy on, and XLA
        writes the gradient of a device there.
        """
        gradients = {}
        for i in self.program.kernel_gradients:
            gradient = self.graph.instructions[i].results[0]
            for variable in self._updated_from(gradient):
                readers = readers_of(self.graph).get(variable, ())
                if variable in self._ordered_kernels and not self.layout.targets.keys() & readers:
                    gradients[gradient] = variable
        return gradients

    def add_ordered_tables(self) -> None:
        """Adds the copies of tables with contiguous rows, while a gather or scatter runs.

        An update that reads the table of a scatter, without a sum between, reads and writes its
        variables in the same order. A gather then reads the copy that the update reads.
        """
        summed = {total.tensor for total in self.sums}
        tables = self._tables
        updates: dict[int, int] = {}
        """Variable that is copied for its update -> the start of the update."""
        for i, table in tables.items():
            nbytes = self.compiler.ordered_table_bytes(table)
            if not (nbytes and table.is_written):
                continue
            result = self.graph.instructions[i].results[0]
            variables = self._updated_from(result)
            if result in summed or not variables or not self.compiler.orders_update(table):
                self._add(result, nbytes, i, i)
                continue
            times = [self.program.producer.get(variables[tensor], i) for tensor in variables]
            self._add(result, nbytes - self._bytes(result), i, max(times))
            for tensor in variables:
                self._add(tensor, nbytes, min(times), max(times))
                updates[tensor] = min(times)
        for i, table in tables.items():
            nbytes = self.compiler.ordered_table_bytes(table)
            if nbytes and not table.is_written:
                operand = self.graph.instructions[i].operands[0]
                self._add(operand, nbytes, i, max(i, updates.get(operand, 0) - 1))

    def _updated_from(self, gradient: int) -> dict[int, int]:
        """Variable of a gradient's operator and shape -> its new value."""
        home = self.graph.home
        shape = self.graph.tensors[gradient].shape
        return {
            argument.tensor: argument.result
            for argument in self.graph.arguments
            if argument.result is not None
            and home[argument.tensor] == home[gradient]
            and self.graph.tensors[argument.tensor].shape == shape
        }

    def add_filled_operands(self) -> None:
        """Adds the operands of weight gradients over dilated operands: the one with zeros in its
        holes, and a copy of the other."""
        for i in self.program.kernel_gradients:
            instruction = self.graph.instructions[i]
            growth = filled_ratio(instruction)
            if growth == 1:
                continue
            dilated, gradient = (
                self._bytes(operand, self.layout.targets.get((i, position)))
                for position, operand in enumerate(instruction.operands[:2])
            )
            self._add(instruction.operands[0], int(dilated * growth), i, i)
            self._add(instruction.operands[1], gradient, i, i)

    def _add_dense_gradient(self, i: int, result: int) -> None:
        """Adds the weight gradient of a grouped convolution.

        XLA:CPU computes it for all pairs of groups and then takes the diagonal.
        """
        instruction = self.graph.instructions[i]
        labels = [self.graph.labels[tensor] for tensor in (*instruction.operands, result)]
        operator = self.graph.owner[i]
        assignment = self.layout.assignments[operator] if operator >= 0 else {}
        shards = 1
        for factor in group_factors(labels):
            for axis in assignment.get(factor, ()):
                shards *= self.mesh.sizes[axis]
        nbytes = 2 * self._bytes(result) * instruction.batch_groups // shards
        self._add(result, nbytes, i, i)

    def add_zeros(self) -> None:
        """Adds the constants that scatters add to, from the start of the step."""
        for i in self.program.zeros:
            instruction = self.graph.instructions[i]
            operand = instruction.operands[0]
            result_sharding = self.layout.shardings[instruction.results[0]]
            self._add(operand, self._bytes(operand, result_sharding), 0, i - 1)

    def add_shared_zeros(self) -> None:
        """Adds the zeros that scatters share with other scatters or other readers.

        XLA:GPU computes equal broadcasts once. A scatter needs its operand in memory, so the other
        readers of the zeros read them from memory too. It also needs a copy of its own (except for
        the last reader), which the kernel of the zeros writes as well (CopyFusion).
        """
        for scatters, (first, last) in self._shared_zeros():
            times = [self.lifetimes.born.get(result, i) for i, result in scatters.items()]
            first = min(first, *times, *(self.lifetimes.pooled_at.get(i, first) for i in scatters))
            for time, result in zip(times, scatters.values(), strict=True):
                if first < time:
                    self._add(result, self._bytes(result), first, time - 1)
            if last > max(times):
                result = scatters[max(scatters)]
                self._add(result, self._bytes(result), first, last)

    def _shared_zeros(self) -> list[tuple[dict[int, int], tuple[int, int]]]:
        """Groups of scatters to equal zeros: scatter -> result, and (first, last) instruction at
        which anything else reads the zeros."""
        graph = self.graph
        groups: dict[tuple[int, tuple[int, ...]], dict[int, int]] = defaultdict(dict)
        """(scalar, shape on a device) -> scatter -> result."""
        for i, instruction in enumerate(graph.instructions):
            if instruction.trips != 1 or instruction.name not in ("scatter", "select_and_scatter"):
                continue
            result = instruction.results[0]
            scalar = instruction.operands[2]
            if instruction.name == "scatter":
                scalar = self._broadcast_scalar(instruction.operands[0])
            if scalar is not None:
                groups[scalar, self._local_shape(result)][i] = result
        if not groups:
            return []
        spans = {key: (len(graph.instructions), -1) for key in groups}
        fused = fused_under(graph, self.layout, self.compiler.fusion_rules, self.mesh)
        for tensor, readers in readers_of(graph).items():
            scalar = self._broadcast_scalar(tensor)
            if scalar is None:
                continue
            for i, position in readers:
                shape = self._local_shape(tensor, self.layout.targets.get((i, position)))
                if (scalar, shape) not in groups or i < 0 or i in groups[scalar, shape]:
                    continue
                first, last = spans[scalar, shape]
                roots = fused.computed_in[i]
                spans[scalar, shape] = (
                    min(first, *roots, self.lifetimes.last_kernel[i]),
                    max(last, self.lifetimes.last_kernel[i]),
                )
        return [(scatters, spans[key]) for key, scatters in groups.items()]

    def _broadcast_scalar(self, tensor: int) -> int | None:
        """The constant scalar of which a tensor is a broadcast, else None."""
        producer = self.program.producer.get(tensor, -1)
        if producer < 0 or self.graph.instructions[producer].name != "broadcast_in_dim":
            return None
        (scalar,) = self.graph.instructions[producer].operands
        is_scalar = scalar in self.program.constants and not self.graph.tensors[scalar].shape
        return scalar if is_scalar else None

    def add_pool_gradients(self) -> None:
        """Adds the positions of maxima, for backward passes of pooling.

        XLA:CPU finds the largest element of every window early, by a window over positions (an
        index per dim for every element), and keeps them.
        """
        for i, available in self.program.pool_gradients:
            operand, source = self.graph.instructions[i].operands[:2]
            rank = len(self.graph.tensors[operand].shape)
            self._add(operand, rank * self._bytes(operand), 0, available)
            self._add(source, rank * self._bytes(source), available, i)
            self._add(operand, self._bytes(operand), 0, i - 1)

    def add_late_positions(self) -> None:
        """Adds the positions of maxima, an index per dim for every window, and the maxima.

        XLA finds them before it scatters a gradient of pooling to them (SelectAndScatterExpander).
        """
        for i, _ in self.program.pool_gradients:
            source = self.graph.instructions[i].operands[1]
            target = self.layout.targets.get((i, 1))
            rank = len(self.graph.tensors[source].shape)
            positions = rank * self._bytes(source, target, itemsize=ITEMSIZE["int32"])
            start = self.lifetimes.pooled_at[i]
            self._add(source, positions + self._bytes(source, target), start, i)

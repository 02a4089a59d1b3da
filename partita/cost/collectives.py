"""The collectives of a plan, as XLA's partitioner is expected to emit them.

Four causes:

- a reduction over a split factor: an all-reduce of the result, one for each dim that is summed;
- a window that reaches over a split dim: a halo exchange by permutes;
- a read under another sharding: the steps of its reshard;
- a variable stored in shards: the same.

The search's tables (`cost.terms`) sum the same formulas. A test holds them equal.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from partita.cost.backends import Compiler, compiler_of
from partita.cost.partial import (
    Factors,
    pending_sums,
    reduced_factors,
)
from partita.cost.reshard import Axes, emitted_steps, step_bytes
from partita.cost.sums import LaidOutProgram, Sum
from partita.graph.flat import LIBRARY_CALLS, Reader, dilates_operand, readers_of
from partita.graph.operator_graph import (
    ITEMSIZE,
    DimFactors,
    Instruction,
    Label,
    OperatorGraph,
    Phase,
    Tensor,
    Window,
    constant_tensors,
    operand_labels,
    per_graph,
)
from partita.machine import Backend
from partita.plans.layout import (
    Layout,
    Sharding,
    label_sharding,
    local_shape,
    over_devices,
    time_axes,
)
from partita.plans.plan import Mesh

DEFAULT = Backend()


@dataclass(frozen=True, slots=True)
class Collective:
    """One expected collective."""

    kind: str
    nbytes: int
    """Per device and execution: of the result of an all_gather, of the operand of any other."""
    axes: Axes
    trips: int
    operator: int
    phase: Phase
    cause: str
    path: str
    itemsize: int = 4
    tensor: int = -1
    """The tensor that a sum over devices computes, -1 for other collectives."""

    @property
    def total(self) -> int:
        """Bytes per device and step."""
        return self.nbytes * self.trips


def local_bytes(
    shape: Sequence[int],
    itemsize: int,
    sharding: Sharding,
    sizes: Sequence[int],
) -> int:
    """Bytes of the elements of one device's shard of a tensor."""
    return itemsize * math.prod(local_shape(shape, sharding, sizes))


def collectives(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    backend: Backend = DEFAULT,
    in_pieces: bool = False,
) -> list[Collective]:
    """Every collective of one step under the layout, in program order of their causes.

    `in_pieces`: whether the update is a program of its own.
    """
    computed = _Computed(graph, mesh, layout, backend, in_pieces)
    return [*computed.collectives(), *_reshards(graph, mesh, layout, compiler_of(backend))]


def over_microbatches(
    collectives: Iterable[Collective],
    sums: Mapping[int, int],
    nbytes: Sequence[int],
    runs: Callable[[Collective], int],
) -> Iterator[Collective]:
    """The collectives of a whole step, from those of one microbatch, each `runs` times.

    `sums`: tensor -> gradient, as `waiting_sums`: such a gradient is summed once, by its bytes.
    """
    summed: set[int] = set()
    for collective in collectives:
        gradient = sums.get(collective.tensor, -1)
        if gradient < 0:
            yield replace(collective, trips=collective.trips * runs(collective))
        elif gradient not in summed:
            summed.add(gradient)
            yield replace(collective, nbytes=nbytes[gradient])


def emitted_sums(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    backend: Backend,
) -> list[Sum]:
    """The sums over devices of one step under the layout."""
    return _Computed(graph, mesh, layout, backend).sums()


@dataclass(frozen=True, slots=True)
class Reversal:
    """A reversed dim: where it is split, devices exchange whole shards, the first with the last."""

    size: int

    def halo_elements(self, parts: int) -> tuple[int, int]:
        """Elements that a device receives when the dim is split into `parts`, and 0."""
        return -(-self.size // parts), 0


@dataclass(frozen=True, slots=True)
class Reach:
    """A window over a dim of an operand that may be split."""

    factor: int
    """The graph's factor of the dim."""
    dim: int
    window: Window
    label: Label
    """The factors that split the operand."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """The elements of an operand that a device receives where a dim is split."""

    operand: int
    """Position of the operand."""
    factor: int
    """The graph's factor of the dim."""
    dim: int
    window: Window | Reversal
    label: Label
    """The factors that split the operand."""


def reaches(
    instruction: Instruction,
    labels: Sequence[Label],
    result: Label,
) -> tuple[Reach, ...]:
    """The windows of an instruction that reach over dims that may be split.

    `labels` are those of its operands, `result` that of its result. XLA cuts the whole operand of a
    convolution as its result is split, and the parts then exchange halos as well. Pooling reads its
    window from the whole operand.
    """
    rule = instruction.rule
    if rule is None or not instruction.windows:
        return ()
    label = labels[0]
    if instruction.name == "convolution":
        label = _split_like_result(label, rule.operands[0], result, rule.results[0])
    windows = dict(instruction.windows)
    result_reaches = []
    for dim, (factor, mapping) in enumerate(zip(label, rule.operands[0], strict=False)):
        if factor < 0 or not mapping or mapping[0] not in windows:
            continue
        window = windows[mapping[0]]
        if window.halo_elements(2) != (0, 0):
            result_reaches.append(Reach(factor, dim, window, label))
    return tuple(result_reaches)


def exchanges(
    instruction: Instruction,
    labels: Sequence[Label],
    result: Label,
) -> list[Exchange]:
    """The exchanges of an instruction between neighbours; labels as for `reaches`.

    XLA first exchanges the operands of a weight gradient over a dilated operand, which reverses
    both (AlgebraicSimplifier's SwapConvOperands). The window then moves over the second.
    """
    rule = instruction.rule
    if rule is None or not dilates_operand(instruction):
        windows = reaches(instruction, labels, result)
        return [Exchange(0, r.factor, r.dim, r.window, r.label) for r in windows]
    found = []
    for windowed, window in instruction.windows:
        for operand, moved in enumerate((None, window.transposed())):
            label = labels[operand]
            mapping = rule.operands[operand]
            if (windowed,) not in mapping:  # a kernel of its operand's size
                continue
            dim = mapping.index((windowed,))
            if label[dim] < 0:
                continue
            size = window.count if moved else window.size
            found.append(Exchange(operand, label[dim], dim, Reversal(size), label))
            if moved:
                found.append(Exchange(operand, label[dim], dim, moved, label))
    return found


def new_exchanges(
    graph: OperatorGraph,
    number: int,
    compiler: Compiler,
    exchanged: set[tuple[int, Exchange]],
) -> Iterator[Exchange]:
    """The exchanges of an instruction that earlier ones do not share.

    `exchanged` are those of the earlier ones, with their tensors; these are added to it.
    """
    instruction = graph.instructions[number]
    result = graph.labels[instruction.results[0]]
    for exchange in exchanges(instruction, operand_labels(graph, number), result):
        key = instruction.operands[exchange.operand], replace(exchange, operand=0)
        if not compiler.merges_exchanges or key not in exchanged:
            exchanged.add(key)
            yield exchange


def _split_like_result(
    label: Label,
    operand_mapping: DimFactors,
    result: Label,
    result_mapping: DimFactors,
) -> Label:
    """An operand's label with the factors of the result on the dims that it leaves whole."""
    factor_of = {
        mapping[0]: factor
        for factor, mapping in zip(result, result_mapping, strict=False)
        if mapping and factor >= 0
    }
    factors = []
    for factor, mapping in zip(label, operand_mapping, strict=False):
        if factor < 0 and mapping:
            factor = factor_of.get(mapping[0], -1)
        factors.append(factor)
    return tuple(factors)


@dataclass(frozen=True, slots=True)
class Communicating:
    """An instruction that communicates where its factors are split."""

    instruction: int
    operator: int
    reduced: Factors
    """Factors that it sums away."""
    reaches: tuple[Reach, ...]
    """Windows over dims of its operand."""


@per_graph
def communicating(graph: OperatorGraph) -> tuple[Communicating, ...]:
    """The instructions that sum factors away or reach over dims."""
    result = []
    for i, instruction in enumerate(graph.instructions):
        operator = graph.owner[i]
        if operator < 0 or instruction.rule is None:
            continue
        labels = operand_labels(graph, i)
        reduced = reduced_factors(instruction, labels)
        windows = reaches(instruction, labels, graph.labels[instruction.results[0]])
        if reduced or windows:
            result.append(Communicating(i, operator, reduced, windows))
    return tuple(result)


class _Computed:
    """The collectives of computation: sums over devices and halo exchanges."""

    def __init__(
        self,
        graph: OperatorGraph,
        mesh: Mesh,
        layout: Layout,
        backend: Backend,
        in_pieces: bool = False,
    ) -> None:
        self.graph = graph
        self.mesh = mesh
        self.layout = layout
        self.in_pieces = in_pieces
        self.compiler = compiler_of(backend)
        self.pending_sums = pending_sums(graph, layout)

    def collectives(self) -> Iterator[Collective]:
        """The sums that the compiler emits, and the halos, in program order of their causes."""
        exchanged: set[tuple[int, Exchange]] = set()
        halos = {c.instruction: list(self._halos(c, exchanged)) for c in self._communicating()}
        emitted: dict[int, list[Sum]] = defaultdict(list)
        for total in self.sums():
            emitted[total.instruction].append(total)
        for i in sorted(emitted.keys() | halos.keys()):
            yield from map(self._collective, emitted[i])
            yield from halos.get(i, ())

    def sums(self) -> list[Sum]:
        """The sums that the compiler makes of the partitioner's."""
        partitioned = [*self._pending()]
        for communication in self._communicating():
            results = self.graph.instructions[communication.instruction].results
            if self.pending_sums.axes.keys().isdisjoint(results):
                partitioned += self._sums(communication)
        program = LaidOutProgram(self.graph, self.mesh, self.layout, self.in_pieces)
        return self.compiler.sums(program, partitioned)

    def _communicating(self) -> Iterator[Communicating]:
        """The instructions that communicate and depend on an argument."""
        constants = constant_tensors(self.graph)
        for communication in communicating(self.graph):
            results = self.graph.instructions[communication.instruction].results
            if not all(tensor in constants for tensor in results):
                yield communication

    def _pending(self) -> Iterator[Sum]:
        """The sums of gradients that devices add up first."""
        for tensor, addition in self.pending_sums.totals.items():
            axes = self.pending_sums.axes[tensor]
            yield Sum("all_reduce", addition, tensor, self.layout.shardings[tensor], axes, 1)

    def _sums(self, communication: Communicating) -> Iterator[Sum]:
        """The sums of an instruction, one for each factor and result."""
        assignment = self.layout.assignments[communication.operator]
        instruction = self.graph.instructions[communication.instruction]
        is_sum = len(instruction.results) == 1 or instruction.name in LIBRARY_CALLS
        kind = "all_reduce" if is_sum else "all_gather"
        for factor in communication.reduced:
            axes = assignment.get(factor, ())
            if not axes:
                continue
            for tensor in instruction.results:
                if factor in self.graph.labels[tensor]:
                    continue
                if is_sum and tensor not in readers_of(self.graph):
                    # The work space of a kernel is a result that nothing reads.
                    continue
                sharding = label_sharding(self.graph.labels[tensor], assignment)
                yield Sum(
                    kind,
                    communication.instruction,
                    tensor,
                    sharding,
                    axes,
                    instruction.trips,
                )

    def _collective(self, total: Sum) -> Collective:
        """The collective of a sum."""
        instruction = self.graph.instructions[total.instruction]
        tensor = self.graph.tensors[total.tensor]
        itemsize = _itemsize(tensor)
        group_size = 1
        if total.kind == "all_gather":
            group_size = math.prod(self.mesh.sizes[axis] for axis in total.axes)
        else:
            itemsize = self.compiler.sum_itemsize(self.graph, total.tensor)
        shard_bytes = local_bytes(tensor.shape, itemsize, total.sharding, self.mesh.sizes)
        return Collective(
            total.kind,
            shard_bytes * group_size,
            total.axes,
            total.trips,
            self.graph.owner[total.instruction],
            instruction.phase,
            "reduction",
            instruction.path,
            itemsize,
            total.tensor,
        )

    def _halos(
        self, communication: Communicating, exchanged: set[tuple[int, Exchange]]
    ) -> Iterator[Collective]:
        """The collectives of an instruction's exchanges; `exchanged` as for `new_exchanges`."""
        assignment = self.layout.assignments[communication.operator]
        number = communication.instruction
        instruction = self.graph.instructions[number]
        for exchange in new_exchanges(self.graph, number, self.compiler, exchanged):
            axes = assignment.get(exchange.factor, ())
            if not axes:
                continue
            operand = instruction.operands[exchange.operand]
            tensor = self.graph.tensors[operand]
            shards = math.prod(self.mesh.sizes[axis] for axis in axes)
            sharding = label_sharding(exchange.label, assignment)
            reader = (number, exchange.operand)
            itemsize = self.compiler.moved_itemsize(self.graph, operand, [reader])
            shard_bytes = local_bytes(tensor.shape, itemsize, sharding, self.mesh.sizes)
            shard_rows = -(-tensor.shape[exchange.dim] // shards)
            row_bytes = shard_bytes // shard_rows
            for rows in exchange.window.halo_elements(shards):
                if not rows:
                    continue
                yield Collective(
                    "collective_permute",
                    row_bytes * rows,
                    axes,
                    instruction.trips,
                    communication.operator,
                    instruction.phase,
                    "halo",
                    instruction.path,
                )


def _itemsize(tensor: Tensor) -> int:
    return ITEMSIZE.get(tensor.dtype, 4)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a tensor comes from: executions in a step, phase, path of the layer."""

    trips: int
    phase: Phase
    path: str


@per_graph
def _origins(graph: OperatorGraph) -> dict[int, _Origin]:
    """Tensor -> its origin."""
    origins = {
        argument.tensor: _Origin(1, "forward", argument.path) for argument in graph.arguments
    }
    for loop in graph.loops:
        outer_trips = graph.instructions[loop.instruction].trips
        for _, inside, _, _ in loop.carried:
            origins[inside] = _Origin(outer_trips * loop.trips, "forward", "")
    for instruction in graph.instructions:
        origin = _Origin(instruction.trips, instruction.phase, instruction.path)
        for tensor in instruction.results:
            origins[tensor] = origin
    return origins


def _reshards(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    compiler: Compiler,
) -> Iterator[Collective]:
    """The collectives of reads under another sharding.

    A sharding that one read has produced serves all others of the tensor.
    """
    origins = _origins(graph)
    unknown = _Origin(1, "forward", "")
    constants = constant_tensors(graph)
    produced: set[tuple[int, int, Sharding]] = set()
    readers: dict[int, list[Reader]] = defaultdict(list)
    """Tensor -> its readers under another sharding."""
    for read in layout.reads:
        readers[read.tensor] += read.readers
    for read in layout.reads:
        if read.tensor in constants:
            continue
        tensor = graph.tensors[read.tensor]
        origin = origins.get(read.tensor, unknown)
        source = layout.shardings[read.tensor]
        shape = _microbatch_shape(tensor.shape, (source, read.target), mesh)
        itemsize = compiler.moved_itemsize(graph, read.tensor, readers[read.tensor])
        sharding = over_devices(source, mesh)
        target = over_devices(read.target, mesh)
        for step in emitted_steps(sharding, target, mesh.sizes, shape):
            nbytes = step_bytes(step, sharding, shape, itemsize, mesh.sizes)
            sharding = step.result
            if nbytes and (read.tensor, read.after, sharding) not in produced:
                yield Collective(
                    step.kind,
                    nbytes,
                    step.axes,
                    origin.trips,
                    read.operator,
                    origin.phase,
                    "reshard",
                    origin.path,
                )
            produced.add((read.tensor, read.after, sharding))


def _microbatch_shape(
    shape: tuple[int, ...],
    shardings: Sequence[Sharding],
    mesh: Mesh,
) -> tuple[int, ...]:
    """Shape of the part of a tensor that is resharded at once.

    It is one microbatch if either sharding splits samples over time.
    """
    sizes = list(shape)
    for a in time_axes(mesh):
        for sharding in shardings:
            dim = next((d for d, axes in enumerate(sharding) if a in axes), None)
            if dim is not None:
                sizes[dim] = -(-sizes[dim] // mesh.sizes[a])
                break
    return tuple(sizes)

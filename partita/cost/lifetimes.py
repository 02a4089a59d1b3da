"""When the values of a step are in memory: from the kernel that computes each to its last reader.

The static part (readers of each value, in program order) is computed once per graph and cached. A
layout adds the fused kernels, and kernels that a compiler delays.

Not here: bytes (`cost.memory`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from partita.cost.backends import compiler_of
from partita.cost.delayed import (
    Delay,
    delayed_by_repetitions,
    delayed_kernels,
    gather_times,
    independent_times,
    joined_repetitions,
    late_gradients,
)
from partita.cost.fusion import (
    ALONE,
    Fusion,
    kernel_reads,
    unwritten_products,
)
from partita.cost.gathered import gathered_dims
from partita.cost.joined import MOVING, joined_ends
from partita.cost.laid_out_fusion import collective_borders, fused_under
from partita.cost.partial import (
    Factors,
    gradients,
    reduced_factors,
    sums_over_devices,
)
from partita.graph.flat import LIBRARY_CALLS, readers_of, transposes
from partita.graph.operator_graph import (
    IdentityKey,
    OperatorGraph,
    constant_tensors,
    operand_labels,
    per_graph,
    producers,
)
from partita.machine import Backend
from partita.plans.layout import Layout
from partita.plans.plan import Mesh


@dataclass(frozen=True)
class CarriedLoop:
    """A loop whose results take the place of its operands."""

    end: int
    """The last instruction of its body."""
    operand_of: dict[int, int]
    """Result -> operand."""


@dataclass(frozen=True)
class FlippedKernel:
    """A kernel that the input gradient of a convolution reads transposed."""

    instruction: int
    tensor: int
    available: int
    """The instruction from which on the kernel is in memory, -1 for an argument."""


@dataclass(frozen=True)
class SummedGradient:
    """A reduction of gradients over factors."""

    instruction: int
    factors: Factors
    result: int


@dataclass(frozen=True)
class StaticLifetimes:
    """The part of a graph's memory that does not depend on the layout.

    Instructions stand for the time at which they run.
    """

    constants: frozenset[int]
    """Tensors computed from scalars only.

    Every device computes its own part of them, inside the readers.
    """
    producer: dict[int, int]
    """Tensor -> instruction."""
    gradient_sums: tuple[SummedGradient, ...]
    pool_gradients: tuple[tuple[int, int], ...]
    """(instruction, first position of its operand) of backward passes of pooling by maximum."""
    kernel_gradients: tuple[int, ...]
    """Weight gradients of convolutions."""
    loops: dict[int, CarriedLoop]
    zeros: tuple[int, ...]
    """Scatters into a constant, which XLA allocates at the start of the step."""
    flipped: tuple[FlippedKernel, ...]
    work_spaces: frozenset[int]
    """Results of library calls that nothing reads."""


@per_graph
def static_lifetimes(graph: OperatorGraph) -> StaticLifetimes:
    constants = constant_tensors(graph)
    producer = producers(graph)
    pool_gradients = []
    kernel_gradients = []
    zeros = []
    flipped = []
    first_read: dict[int, int] = {}
    for i, instruction in enumerate(graph.instructions):
        for tensor in instruction.operands:
            first_read.setdefault(tensor, i)
    for i, instruction in enumerate(graph.instructions):
        operands = instruction.operands
        if transposes(instruction):
            kernel_gradients.append(i)
        elif instruction.name == "convolution" and instruction.phase == "backward":
            available = _available(graph, operands[1], producer, first_read)
            flipped.append(FlippedKernel(i, operands[1], available))
        if instruction.name == "select_and_scatter":
            pool_gradients.append((i, _available(graph, operands[0], producer, first_read)))
        if instruction.name == "scatter" and operands[0] in constants:
            zeros.append(i)
    return StaticLifetimes(
        constants,
        producer,
        _gradient_sums(graph),
        tuple(pool_gradients),
        tuple(kernel_gradients),
        _loops(graph),
        tuple(zeros),
        tuple(flipped),
        _work_spaces(graph),
    )


def _work_spaces(graph: OperatorGraph) -> frozenset[int]:
    """The results of library calls that nothing reads."""
    calls = (x for x in graph.instructions if x.name in LIBRARY_CALLS)
    results = {tensor for call in calls for tensor in call.results}
    return frozenset(results - readers_of(graph).keys())


def _gradient_sums(graph: OperatorGraph) -> tuple[SummedGradient, ...]:
    """Every reduction of gradients."""
    sums = []
    for i, instruction in enumerate(graph.instructions):
        rule = instruction.rule
        if instruction.phase != "backward" or instruction.trips != 1:
            continue
        if rule is None or not rule.reduction:
            continue
        factors = reduced_factors(instruction, operand_labels(graph, i))
        if factors:
            sums.append(SummedGradient(i, factors, instruction.results[0]))
    for gradient in gradients(graph):
        last_addition = gradient.additions[-1]
        sums.append(SummedGradient(last_addition, gradient.reduced, gradient.result))
    return tuple(sums)


def _loops(graph: OperatorGraph) -> dict[int, CarriedLoop]:
    """While loops by instruction."""
    loops = {}
    for loop in graph.loops:
        instruction = graph.instructions[loop.instruction]
        if instruction.name == "while":
            operand_of = dict(zip(instruction.results, instruction.operands, strict=False))
            loops[loop.instruction] = CarriedLoop(loop.body[1] - 1, operand_of)
    return loops


def _available(
    graph: OperatorGraph,
    tensor: int,
    producer: dict[int, int],
    first_read: dict[int, int],
) -> int:
    """The instruction that computes a tensor, of an argument the first reader.

    A tensor that rearranges another is available from the other on.
    """
    while tensor in producer:
        instruction = graph.instructions[producer[tensor]]
        if instruction.name not in ("reverse", "transpose", "reshape", "convert", "pad"):
            break
        tensor = instruction.operands[0]
    return producer.get(tensor, first_read[tensor])


@dataclass(frozen=True)
class Lifetimes:
    """Lifetimes of values, as instructions."""

    born: dict[int, int]
    """Tensor in memory -> the instruction that computes it, -1 for an argument."""
    dies: dict[int, int]
    """Tensor -> the root of the last kernel that reads it."""
    last_kernel: tuple[int, ...]
    """Per instruction, the root of the last kernel that computes it."""
    replaced: frozenset[int] = frozenset()
    """Tensors whose memory the result of their last reader takes, or in whose place a product
    writes it."""
    sliced: frozenset[int] = frozenset()
    """Tensors of which a device computes only the slices that it reads."""
    pooled_at: dict[int, int] = field(default_factory=dict)
    """Scatter of a gradient of pooling -> the instruction before which its zeros and the positions
    of maxima are written."""


@lru_cache(maxsize=4)
def lifetimes_under(
    graph_key: IdentityKey[OperatorGraph],
    layout_key: IdentityKey[Layout],
    mesh: Mesh,
    backend: Backend,
    is_limited: bool = False,
) -> Lifetimes:
    """The lifetimes of all values; `is_limited` if the memory of a device limits delays."""
    graph = graph_key.value
    layout = layout_key.value
    program = static_lifetimes(graph)
    fused = fused_under(graph, layout, compiler_of(backend).fusion_rules, mesh)
    delayed: dict[int, Delay] = {}
    hides_collectives = compiler_of(backend).buffers.hides_collectives
    if hides_collectives:
        gathers = gather_times(graph, layout, compiler_of(backend).combined_gather_bytes)
        delayed = delayed_kernels(graph, layout, mesh, fused, gathers, is_limited)
    elif compiler_of(backend).buffers.late_gradients:
        delayed = late_gradients(graph, layout, fused)
    ends = _joined_ends(graph, layout, fused, backend)
    if compiler_of(backend).buffers.joined_results:
        waiting = delayed_by_repetitions(graph, fused, joined_ends(graph, layout, fused))
        for root, delay in waiting.items():
            if root not in delayed or delayed[root].time < delay.time:
                delayed[root] = delay
    dies: dict[int, int] = {}
    for root in fused.kernels:
        last_reads = _last_reads(graph, program, fused, root, backend)
        is_early = compiler_of(backend).buffers.early_reductions or (
            hides_collectives and sums_over_devices(graph, layout, root)
        )
        if is_early and _reduces(graph, root):
            ready = max((program.producer.get(tensor, -1) for tensor in last_reads), default=root)
            last_reads = dict.fromkeys(last_reads, max(ready, 0))
        if root in delayed:
            last_reads.update(dict.fromkeys(delayed[root].reads, delayed[root].time))
        for tensor, last_read in last_reads.items():
            dies[tensor] = max(dies.get(tensor, -1), last_read)
    for tensor, end in ends.items():
        dies[tensor] = max(dies.get(tensor, -1), end)
    sliced: dict[int, int] = {}
    if compiler_of(backend).buffers.computed_slices:
        sliced = _sliced(graph, layout, fused, delayed)
    for tensor, time in sliced.items():
        for operand in kernel_reads(graph, fused)[program.producer[tensor]]:
            dies[operand] = max(dies.get(operand, -1), time)
    in_memory = fused.written(graph) - program.constants
    in_memory -= _read_through_barriers(graph, layout, dies)
    runs_at = {root: delayed[root].time if root in delayed else root for root in fused.kernels}
    born = {}
    for tensor in in_memory:
        producer = program.producer.get(tensor, -1)
        born[tensor] = runs_at.get(producer, producer)
    replaced: frozenset[int] = frozenset()
    if compiler_of(backend).buffers.replaced_operands:
        replaced = _replaced_operands(graph, layout, fused, born, dies, runs_at)
    if compiler_of(backend).fusion_rules.writes_after_products:
        replaced = _computed_in_products(graph, layout, fused)
    last_kernel = [roots[-1] if roots else i for i, roots in enumerate(fused.computed_in)]
    for root, delay in delayed.items():
        for i in (*fused.kernels[root], *fused.kernels.get(delay.includes, ())):
            last_kernel[i] = max(last_kernel[i], delay.time)
    scatters = [i for i, _ in program.pool_gradients]
    pooled_at = dict(zip(scatters, scatters, strict=True))
    if hides_collectives and scatters:
        pooled_at = independent_times(graph, layout, fused, delayed, scatters)
    for tensor, time in sliced.items():
        for i in fused.kernels[program.producer[tensor]]:
            last_kernel[i] = max(last_kernel[i], time)
    return Lifetimes(born, dies, tuple(last_kernel), replaced, frozenset(sliced), pooled_at)


def _replaced_operands(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
    born: dict[int, int],
    dies: dict[int, int],
    runs_at: dict[int, int],
) -> frozenset[int]:
    """Values that elementwise kernels, their last readers, replace by their results.

    XLA:GPU allows it where every element is read before it is written (FusionCanShareBufferHint).
    New variables take the place of the old ones instead.
    """
    kept = {argument.tensor for argument in graph.arguments}
    variables = {argument.result for argument in graph.arguments}
    replaced: set[int] = set()
    for root, kernel in fused.kernels.items():
        result = graph.instructions[root].results[0]
        if result in variables or result not in born:
            continue
        if any(graph.instructions[i].name in MOVING for i in kernel):
            continue
        time = runs_at[root]
        for tensor in kernel_reads(graph, fused)[root].keys() - kept - replaced:
            is_last = dies.get(tensor) == time and born.get(tensor, time) < time
            if is_last and _are_alike(graph, layout, tensor, result):
                replaced.add(tensor)
                break
    return frozenset(replaced)


def _sliced(
    graph: OperatorGraph, layout: Layout, fused: Fusion, delayed: Mapping[int, Delay]
) -> dict[int, int]:
    """Value of an elementwise kernel of which every reader reads a slice -> the instruction at
    which the last of the slices is computed.

    XLA:GPU's fusion moves the kernel into the slices, and these into elementwise readers.
    """
    _, ends = collective_borders(graph, layout)
    read_whole = {*graph.outputs}
    for loop in graph.loops:
        read_whole.update(tensor for tensors in loop.carried for tensor in tensors)
    times: dict[int, int] = {}
    producer = producers(graph)
    for root, read in kernel_reads(graph, fused).items():
        for tensor, readers in read.items():
            own = layout.shardings[tensor]
            targets = {layout.targets[reader] for reader in readers if reader in layout.targets}
            is_whole = any(reader not in layout.targets for reader in readers)
            if is_whole or any(any(gathered_dims(own, target)) for target in targets):
                read_whole.add(tensor)
                continue
            time = delayed[root].time if root in delayed else root
            if graph.instructions[root].name in ALONE:
                time = producer.get(tensor, -1)
            times[tensor] = max(time, times.get(tensor, -1))
    return {
        tensor: time
        for tensor, time in times.items()
        if tensor not in read_whole
        and producer.get(tensor, -1) in fused.kernels
        and producer[tensor] not in ends
        and graph.instructions[producer[tensor]].name not in ALONE | {"reduce"}
    }


def _computed_in_products(graph: OperatorGraph, layout: Layout, fused: Fusion) -> frozenset[int]:
    """Results of products that only their products read, not summed or moved between devices."""
    barriers, ends = collective_borders(graph, layout)
    moved = {graph.instructions[reader].operands[position] for reader, position in barriers}
    moved.update(tensor for i in ends for tensor in graph.instructions[i].results)
    return unwritten_products(graph, fused) - moved


def _are_alike(graph: OperatorGraph, layout: Layout, tensor: int, other: int) -> bool:
    """Whether two tensors have one shape, dtype and sharding."""
    first, second = graph.tensors[tensor], graph.tensors[other]
    is_alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return is_alike and layout.shardings[tensor] == layout.shardings[other]


def _joined_ends(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
    backend: Backend,
) -> dict[int, int]:
    """Result of a joined kernel -> the instruction at which that still has it in memory."""
    buffers = compiler_of(backend).buffers
    ends = {} if buffers.early_runs else joined_repetitions(graph, fused)
    if buffers.joined_results:
        for tensor, end in joined_ends(graph, layout, fused).items():
            ends[tensor] = max(ends.get(tensor, -1), end)
    return ends


def _reduces(graph: OperatorGraph, root: int) -> bool:
    """Whether a kernel after the backward pass reduces its operand, as a metric does."""
    instruction = graph.instructions[root]
    return instruction.phase == "update" and instruction.name == "reduce"


def _read_through_barriers(
    graph: OperatorGraph,
    layout: Layout,
    dies: dict[int, int],
) -> set[int]:
    """The results of optimization barriers, which are their operands. Extends the operands' `dies`.

    A barrier between two shardings has a result of its own.
    """
    aliases = set()
    for instruction in reversed(graph.instructions):
        if instruction.name != "optimization_barrier":
            continue
        for operand, result in zip(instruction.operands, instruction.results, strict=True):
            if layout.shardings[operand] == layout.shardings[result]:
                dies[operand] = max(dies.get(operand, -1), dies.get(result, -1))
                aliases.add(result)
    return aliases


def _last_reads(
    graph: OperatorGraph,
    program: StaticLifetimes,
    fused: Fusion,
    root: int,
    backend: Backend,
) -> dict[int, int]:
    """Tensor that a kernel reads from memory -> the instruction at which it is last read."""
    instruction = graph.instructions[root]
    readers = kernel_reads(graph, fused)[root]
    if not compiler_of(backend).buffers.transposed_copies or not transposes(instruction):
        end = program.loops[root].end if root in program.loops else root
        return dict.fromkeys(readers, end)
    # Transposed copies of operands are made as soon as the operands exist, and stay in memory.
    copy_times = sorted(program.producer.get(tensor, -1) for tensor in instruction.operands)
    last_reads = {}
    for tensor, reading in readers.items():
        latest = max(program.producer.get(tensor, -1) if i == root else i for i, _ in reading)
        last_reads[tensor] = next((time for time in copy_times if time >= latest), root)
    return last_reads

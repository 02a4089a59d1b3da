"""Kernels that XLA:GPU delays: gradients of parameters, losses, and forward values computed again.

Its scheduler starts from the end of the program and fills the time of collectives with kernels on
which nothing but an update waits (LatencyHidingScheduler). The values that a delayed kernel reads
stay in memory until then:

- The gradient of a bias or of a scale, a reduction that needs no sum over devices, waits for the
  end of the backward pass.
- The product for the gradient of a weight waits for a collective that the backward pass needs. The
  last collective takes the last gradients before it, the one before takes those before them. That
  for the gradient of a stored weight waits for the next gather of variables at least. One whose
  result devices exchange, as of a fused weight, precedes that collective: it is not delayed.
  Beyond the memory of a device, no kernel is delayed further than to that gather. A sum that a
  product waits for (`cost.early_sums`) takes the products for its own gradients, whatever the
  memory.
- The loss, for whose number no gradient waits, is computed at the end of the backward pass where
  its sum over devices is joined with the sums of gradients.

Kernels that need nothing of the backward pass, the zeros and the positions of a pooling's gradient,
take the room that is left, and run earlier than in program order.

Two kinds of reductions:

- One that is joined with another kernel runs with it and is not delayed (`cost.joined`). Nothing is
  joined with a kernel of rows, as of a softmax, or with one whose result devices sum. Gradients of
  a scale and a bias that are joined with each other alone are delayed.
- One that sums the result of another one further, as the gradient of a group normalization's scale,
  sums the operand of that other one in one pass (AlgebraicSimplifier), so it reads large values.

A forward value that the backward pass computes again is often joined with the kernel of a gradient
that reads the same tensor, as of an activation function. Then it is in memory beside that gradient.
Other kernels that read it, such as the product for the gradient of a weight, wait for that kernel.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain

from partita.cost.early_sums import EarlySum, early_sums
from partita.cost.fusion import Fusion, kernel_reads
from partita.cost.gathered import gathered_reads, is_moved
from partita.cost.joined import computed_together, computes_rows, joined_kernels, light_reads
from partita.cost.laid_out_fusion import collective_borders
from partita.cost.partial import summed_factors, sums_over_devices
from partita.graph.flat import PRODUCTS, Reader, readers_of
from partita.graph.gradient_sums import PASSING
from partita.graph.operator_graph import (
    Instruction,
    OperatorGraph,
    first_backward,
    is_repeated,
    per_graph,
    producers,
)
from partita.plans.layout import Layout
from partita.plans.plan import Mesh

KERNELS_PER_COLLECTIVE = 5
"""Library calls and loops that run during one collective (GpuLatencyEstimator counts 5000 for a
collective, 1000 for each of them)."""
GRADIENTS_PER_COLLECTIVE = math.ceil(KERNELS_PER_COLLECTIVE / 2)
"""Gradients of weights that run beside a collective, each with the update or slice behind it."""


@dataclass(frozen=True)
class Delay:
    """A kernel that runs later than in program order."""

    time: int
    """The instruction at which it runs."""
    reads: frozenset[int]
    """The tensors that it reads from memory."""
    includes: int = -1
    """The root of another kernel that it computes as well, -1 for none."""


def delayed_kernels(
    graph: OperatorGraph,
    layout: Layout,
    mesh: Mesh,
    fused: Fusion,
    gathers: Sequence[int] = (),
    is_limited: bool = False,
) -> dict[int, Delay]:
    """Root of a delayed kernel -> its delay.

    `gathers` are the `gather_times`. If the memory of a device limits delays (`is_limited`), no
    kernel is delayed beyond the next of them, but for sums that a product waits for.

    None in a plan with offloaded slots: compiled with tensor parallelism, it delays nothing. (On
    one device, all weight gradients follow those of inputs then, below the peak.)
    """
    if layout.host:
        return {}
    delays = {}
    for root, first in delayed_reductions(graph, layout, fused).items():
        tensors = {t for i in (root, first) for t in _fewest_reads(graph, layout, fused, i)}
        delays[root] = Delay(_end_of_backward(graph), frozenset(tensors), first)
    sums = early_sums(graph, layout, mesh)
    products = _delayed_products(graph, layout, fused, sums)
    products |= _delayed_slices(graph, fused, layout, gathers, sums)
    for root, time in products.items():
        delays[root] = Delay(time, frozenset(kernel_reads(graph, fused)[root]))
    for root in _delayed_losses(graph, layout, fused):
        delays[root] = Delay(_end_of_backward(graph), _reads_of_quotients(graph, fused, root))
    if is_limited:
        for root, delay in delays.items():
            if sums.keys().isdisjoint(graph.instructions[root].results):
                time = next((time for time in gathers if time > root), root)
                delays[root] = replace(delay, time=min(delay.time, time))
    return {root: delay for root, delay in delays.items() if delay.time > root}


def _fewest_reads(graph: OperatorGraph, layout: Layout, fused: Fusion, root: int) -> Set[int]:
    """The tensors that a kernel reads; light ones are computed from others if these are smaller."""
    direct = frozenset(kernel_reads(graph, fused).get(root, ()))
    light = light_reads(graph, layout, fused).get(root, direct)
    return min(direct, light, key=lambda tensors: sum(graph.tensors[t].nbytes for t in tensors))


def late_gradients(graph: OperatorGraph, layout: Layout, fused: Fusion) -> dict[int, Delay]:
    """Root of a product for the gradient of a weight that no devices sum -> its delay, on TPUs.

    The product also updates the weight. XLA:TPU's scheduler starts from the end of the program and
    takes the kernels first that follow the most asynchronous collectives, which are gathers. So
    such a product runs beside the next gather of the backward pass, or after that pass.
    """
    times = [*sorted(_gathers_of_gradients(graph, layout)), _end_of_backward(graph)]
    delays = {}
    for products in _weight_gradients(graph, layout, fused):
        for root in products:
            if not sums_over_devices(graph, layout, root):
                time = next((time for time in times if time > root), root)
                delays[root] = Delay(time, frozenset(kernel_reads(graph, fused)[root]))
    return delays


def _delayed_losses(graph: OperatorGraph, layout: Layout, fused: Fusion) -> list[int]:
    """Kernels of a loss that devices sum, those for which no gradient waits.

    The sum of its scalar over devices is joined with sums of gradients. One of more numbers is a
    collective of its own, which runs as soon as it can.
    """
    awaited = _awaited_by_gradients(graph)
    if not awaited:
        return []
    late = [
        i
        for i, x in enumerate(graph.instructions)
        if x.phase == "forward" and i not in awaited and sums_over_devices(graph, layout, i)
    ]
    results = [tensor for i in late for tensor in graph.instructions[i].results]
    if any(graph.tensors[tensor].shape for tensor in results):
        return []
    source = producers(graph)
    loss = set(late)
    for i in reversed(range(max(late, default=-1) + 1)):
        if i in loss:
            operands = (source.get(tensor, -1) for tensor in graph.instructions[i].operands)
            loss.update(operand for operand in operands if operand >= 0 and operand not in awaited)
    return sorted({root for i in loss for root in fused.computed_in[i]} - awaited)


def _reads_of_quotients(graph: OperatorGraph, fused: Fusion, root: int) -> frozenset[int]:
    """The tensors that a kernel reads, and the operands of the quotients that it divides.

    AlgebraicSimplifier makes (a / b) / c into a / (b * c).
    """
    source = producers(graph)
    kernel = fused.kernels[root]
    tensors = set(kernel_reads(graph, fused)[root])
    for i in kernel:
        if graph.instructions[i].name == "divide":
            divided = source.get(graph.instructions[i].operands[0], -1)
            if divided in fused.kernels and graph.instructions[divided].name == "divide":
                tensors.update(kernel_reads(graph, fused)[divided])
    return frozenset(tensors)


@per_graph
def _awaited_by_gradients(graph: OperatorGraph) -> frozenset[int]:
    """The instructions on which the backward pass depends, and its own."""
    source = producers(graph)
    awaited: set[int] = set()
    for i in reversed(range(len(graph.instructions))):
        instruction = graph.instructions[i]
        if instruction.phase == "backward" or i in awaited:
            awaited.add(i)
            awaited.update(source[tensor] for tensor in instruction.operands if tensor in source)
    return frozenset(awaited)


def _end_of_backward(graph: OperatorGraph) -> int:
    """The last instruction of the backward pass."""
    backward = (i for i, x in enumerate(graph.instructions) if x.phase == "backward")
    return max(backward, default=0)


def delayed_reductions(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
) -> dict[int, int]:
    """Root of a delayed reduction -> the reduction whose result it sums further, -1 for none."""
    late = [
        root
        for root in fused.kernels
        if _adds_up(graph.instructions[root])
        and root in _gradients(graph)
        and not sums_over_devices(graph, layout, root)
    ]
    if not late:
        return {}
    source = producers(graph)
    gathered = gathered_reads(layout)
    _, ends = collective_borders(graph, layout)
    apart = {*late, *ends}
    together = {
        root
        for roots in computed_together(graph, layout, fused)
        if not apart.issuperset(roots)
        for root in roots
    }
    joined = {
        root
        for root, tensor in joined_kernels(graph, fused).saved
        if root in together and not computes_rows(graph, fused, source.get(tensor, -1))
    }
    delayed = {}
    for root in late:
        readers = set(chain.from_iterable(kernel_reads(graph, fused)[root].values()))
        if root not in joined or not gathered.isdisjoint(readers):
            delayed[root] = _first_reduction(graph, source, root)
    return delayed


def _delayed_products(
    graph: OperatorGraph, layout: Layout, fused: Fusion, sums: Mapping[int, EarlySum]
) -> dict[int, int]:
    """Product for the gradient of a weight -> the instruction at which it runs, if it is delayed.

    Inputs' gradients wait for merged products of mixed precision: there the updates also convert
    the weights that they read. So the sum of such a product over devices is a collective that the
    backward pass needs. The other sums follow it. Those of one dtype are joined, and while they
    run, the gradients of another dtype are computed. An update follows its gradient in the time of
    the same collective, unless devices sum gradients.
    """
    gradients = _weight_gradients(graph, layout, fused)
    waiting = [products for products in gradients if not _converts_weights(graph, products)]
    if not waiting:
        return {}
    delayed = {
        root: sums[graph.instructions[root].results[0]].computed
        for products in waiting
        for root in products
        if graph.instructions[root].results[0] in sums
    }
    waiting = [products for products in waiting if delayed.keys().isdisjoint(products)]
    dtypes = _summed_dtypes(graph, layout, fused)
    times = set(_awaited_sums(graph, layout)) | _gathers_of_gradients(graph, layout)
    for products in gradients:
        if dtypes and _converts_weights(graph, products):
            times.add(max(products))
    if len(dtypes) > 1:
        times.add(_end_of_backward(graph))
    return delayed | _beside(waiting, times, _room(dtypes))


def _beside(waiting: Sequence[tuple[int, ...]], times: Iterable[int], room: int) -> dict[int, int]:
    """Product -> the instruction at which it runs beside a collective: the latest products beside
    the last collectives, `room` gradients to each."""
    delayed: dict[int, int] = {}
    left = list(waiting)
    for time in sorted(times, reverse=True):
        ready = [products for products in left if max(products) < time]
        for products in ready[-room:]:
            delayed.update(dict.fromkeys(products, time))
            left.remove(products)
    return delayed


def independent_times(
    graph: OperatorGraph,
    layout: Layout,
    fused: Fusion,
    delayed: Mapping[int, Delay],
    scatters: Iterable[int],
) -> dict[int, int]:
    """Scatter of a gradient of pooling -> the instruction before which kernels run that only it
    waits for, and that need nothing of the backward pass: its zeros and the positions of maxima.

    XLA:GPU's scheduler goes from the end of the program to its start. Of the kernels that are ready
    beside a collective it takes those first that follow the most collectives. So these run
    beside the last sum before the scatter that leaves room beside the gradients of weights.
    """
    sums = _awaited_sums(graph, layout)
    room = _room(_summed_dtypes(graph, layout, fused))
    beside = Counter(
        delay.time for root, delay in delayed.items() if graph.instructions[root].name in PRODUCTS
    )
    times = {}
    for scatter in scatters:
        before = [time for time in reversed(sums) if time < scatter]
        free = (time for time in before if beside[time] < room)
        times[scatter] = next(free, first_backward(graph)) if before else scatter
    return times


def _room(dtypes: Set[str]) -> int:
    """Gradients of weights that run beside a collective. `dtypes`: those of summed gradients."""
    return KERNELS_PER_COLLECTIVE if dtypes else GRADIENTS_PER_COLLECTIVE


def _delayed_slices(
    graph: OperatorGraph,
    fused: Fusion,
    layout: Layout,
    gathers: Sequence[int],
    sums: Mapping[int, EarlySum],
) -> dict[int, int]:
    """Product for the gradient of a stored weight -> the instruction at which it runs.

    It waits for its sum. Otherwise it runs beside one of the last sums that the backward pass waits
    for, as of a batch normalization, if these follow all gathers of variables for that pass, or
    once the next of the gathers has begun; without gathers, at the end of the pass.
    """
    sliced = _sliced(graph, layout)
    source = producers(graph)
    moved = {source.get(read.tensor, -1) for read in layout.reads if is_moved(layout, read)}
    delayed = {}
    waiting = []
    for root in fused.kernels:
        is_product = graph.instructions[root].name in PRODUCTS
        if not (is_product and root in sliced and root in _gradients(graph)) or root in moved:
            continue
        total = sums.get(graph.instructions[root].results[0])
        if total:
            delayed[root] = total.computed
        else:
            waiting.append((root,))
    if not gathers:
        return delayed | {root: _end_of_backward(graph) for (root,) in waiting}
    last_sums = [time for time in _awaited_sums(graph, layout) if time > max(gathers)]
    delayed |= _beside(waiting, last_sums, GRADIENTS_PER_COLLECTIVE)
    for (root,) in waiting:
        if root not in delayed:
            delayed[root] = next((time for time in gathers if time > root), -1)
    return delayed


def _sliced(graph: OperatorGraph, layout: Layout) -> set[int]:
    """The instructions of whose results devices read other parts than they compute."""
    source = producers(graph)
    return {source.get(read.tensor, -1) for read in layout.reads}


def gather_times(graph: OperatorGraph, layout: Layout, combined_bytes: float) -> list[int]:
    """The instructions before gathers of variables for the backward pass, in their order.

    Gathers of at most `combined_bytes` together are one, which begins after the last gradient that
    any of them waits for.
    """
    source = producers(graph)
    times: list[int] = []
    nbytes = math.inf
    waiting = [(source.get(read.after, -1), read) for read in layout.reads if read.after >= 0]
    waiting = [(time, read) for time, read in waiting if time >= first_backward(graph)]
    for time, read in sorted(waiting, key=lambda gather: gather[0]):
        nbytes += graph.tensors[read.tensor].nbytes
        if nbytes > combined_bytes:
            times.append(time)
            nbytes = graph.tensors[read.tensor].nbytes
        times[-1] = time
    return times


def _summed_dtypes(graph: OperatorGraph, layout: Layout, fused: Fusion) -> set[str]:
    """The dtypes of gradients of parameters that devices sum."""
    return {
        graph.tensors[graph.instructions[root].results[0]].dtype
        for root in fused.kernels
        if root in _gradients(graph) and sums_over_devices(graph, layout, root)
    }


def _weight_gradients(graph: OperatorGraph, layout: Layout, fused: Fusion) -> list[tuple[int, ...]]:
    """Products that only updates wait for, in their order; those of one operand are merged.

    Not those of which a device keeps a slice, as for a stored weight.
    """
    sliced = _sliced(graph, layout)
    merged: dict[int, list[int]] = defaultdict(list)
    """Shared operand -> products that read it."""
    for root in sorted(fused.kernels):
        instruction = graph.instructions[root]
        if instruction.name in PRODUCTS and root not in sliced and root in _gradients(graph):
            merged[_shared_operand(graph, root)].append(root)
    return sorted((tuple(products) for products in merged.values()), key=max)


def _converts_weights(graph: OperatorGraph, products: tuple[int, ...]) -> bool:
    """Whether products are merged gradients of weights that are read in a lower precision."""
    return len(products) > 1 and any(_is_converted(graph, root) for root in products)


def _shared_operand(graph: OperatorGraph, root: int) -> int:
    """The operand of a weight gradient that the forward pass computes, by which it is merged."""
    source = producers(graph)
    for operand in graph.instructions[root].operands:
        if operand not in source or source[operand] < first_backward(graph):
            return operand
    return graph.instructions[root].operands[0]


def _awaited_sums(graph: OperatorGraph, layout: Layout) -> list[int]:
    """The instructions before sums over devices that the backward pass waits for, in their order.

    Sums that meet in an addition are one.
    """
    partial: dict[int, int] = {}
    """Tensor that is summed over devices -> the instruction that computes it."""
    for i in range(first_backward(graph), len(graph.instructions)):
        instruction = graph.instructions[i]
        if instruction.phase == "update" or len(instruction.results) != 1:
            continue
        operands = set(instruction.operands)
        if sums_over_devices(graph, layout, i):
            partial[instruction.results[0]] = i
        elif _joins(graph, instruction) and partial.keys() >= operands:
            for operand in operands:
                del partial[operand]
            partial[instruction.results[0]] = i
    return [i for i in partial.values() if not _is_waited_for_by_updates(graph, i)]


def _gathers_of_gradients(graph: OperatorGraph, layout: Layout) -> set[int]:
    """The instructions before gathers of values that the backward pass computes and reads."""
    source = producers(graph)
    times = set()
    for read in layout.reads:
        i = source.get(read.tensor, -1)
        if i < 0 or graph.instructions[i].phase != "backward":
            continue
        readers = [graph.instructions[reader] for reader, _ in read.readers if reader >= 0]
        if is_moved(layout, read) and any(reader.phase == "backward" for reader in readers):
            times.add(i)
    return times


def _joins(graph: OperatorGraph, instruction: Instruction) -> bool:
    """Whether an instruction adds or passes on values that nothing else reads."""
    if instruction.name != "add" and instruction.name not in PASSING:
        return False
    return all(len(readers_of(graph)[tensor]) == 1 for tensor in instruction.operands)


def joined_repetitions(graph: OperatorGraph, fused: Fusion) -> dict[int, int]:
    """Forward value computed again in the backward pass -> the last root of its joined kernel."""
    repeated = [root for root in fused.kernels if is_repeated(graph, root)]
    if not repeated:
        return {}
    joined = joined_kernels(graph, fused)
    last: dict[int, int] = {}
    """Earliest root of a joined kernel -> its last one."""
    for root in joined.parts:
        start = joined.start(root)
        last[start] = max(last.get(start, start), root)
    ends = {}
    for root in repeated:
        end = last.get(joined.start(root), root)
        ends.update(dict.fromkeys(graph.instructions[root].results, end))
    return ends


def delayed_by_repetitions(
    graph: OperatorGraph,
    fused: Fusion,
    ends: Mapping[int, int],
) -> dict[int, Delay]:
    """Root of a kernel that waits for a forward value computed again -> its delay.

    `ends`: result of a joined kernel -> the instruction at which that runs. Kernels that read
    results of a waiting kernel wait too.
    """
    repeated = [root for root in fused.kernels if is_repeated(graph, root)]
    results = {tensor for root in repeated for tensor in graph.instructions[root].results}
    ready_at = {tensor: ends[tensor] for tensor in results & ends.keys()}
    """Tensor -> the instruction at which it is computed, if that is later than in program order."""
    if not ready_at:
        return {}
    delays = {}
    for root, read in kernel_reads(graph, fused).items():
        tensors = frozenset(read)
        time = max((ready_at[tensor] for tensor in tensors & ready_at.keys()), default=-1)
        is_joined = ends.get(graph.instructions[root].results[0], -1) >= time
        if time > root and not is_joined:
            delays[root] = Delay(time, tensors)
            ready_at.update(dict.fromkeys(graph.instructions[root].results, time))
    return delays


@per_graph
def _gradients(graph: OperatorGraph) -> frozenset[int]:
    """The instructions that sum in the backward pass, and for which only updates wait."""
    gradients = set()
    for i in summed_factors(graph):
        instruction = graph.instructions[i]
        is_backward = instruction.phase == "backward" and instruction.trips == 1
        if is_backward and _is_waited_for_by_updates(graph, i):
            gradients.add(i)
    return frozenset(gradients)


def _is_waited_for_by_updates(graph: OperatorGraph, i: int) -> bool:
    """Whether only updates read the result of an instruction."""
    readers = _last_readers(graph, i)[1]
    return bool(readers) and all(
        reader >= 0 and graph.instructions[reader].phase == "update" for reader, _ in readers
    )


def _is_converted(graph: OperatorGraph, i: int) -> bool:
    """Whether the result of an instruction is read in another dtype."""
    last = _last_readers(graph, i)[0]
    result = graph.instructions[i].results[0]
    return graph.tensors[last].dtype != graph.tensors[result].dtype


def _last_readers(graph: OperatorGraph, i: int) -> tuple[int, tuple[Reader, ...]]:
    """The result of an instruction as it is passed on, and its readers."""
    result = graph.instructions[i].results[0]
    readers = readers_of(graph).get(result, ())
    while len(readers) == 1 and _passes_on(graph, readers[0][0]):
        result = graph.instructions[readers[0][0]].results[0]
        readers = readers_of(graph).get(result, ())
    return result, tuple(readers)


def _passes_on(graph: OperatorGraph, reader: int) -> bool:
    return reader >= 0 and graph.instructions[reader].name in PASSING


def _adds_up(instruction: Instruction) -> bool:
    return instruction.name == "reduce" and instruction.adds and len(instruction.results) == 1


def _first_reduction(graph: OperatorGraph, source: dict[int, int], root: int) -> int:
    """The reduction whose result another one sums further, -1 if it is none."""
    first = source.get(graph.instructions[root].operands[0], -1)
    while _passes_on(graph, first):
        first = source.get(graph.instructions[first].operands[0], -1)
    return first if first >= 0 and _adds_up(graph.instructions[first]) else -1

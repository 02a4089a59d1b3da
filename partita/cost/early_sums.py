"""Sums of gradients over devices for which the backward pass waits, on GPUs.

XLA:GPU's scheduler would delay the gradients of weights and their sums to the end of the backward
pass (LatencyHidingScheduler), and the activations that those gradients read would stay in memory.
So gradients are summed in groups of at least `COMBINED_BYTES`, and a later product of the backward
pass waits for each group: the annotated program has a barrier there.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import lru_cache

from partita.cost.partial import pending_sums, sums_over_devices
from partita.graph.flat import PRODUCTS, Reader, readers_of
from partita.graph.gradient_sums import PASSING
from partita.graph.operator_graph import (
    ITEMSIZE,
    IdentityKey,
    OperatorGraph,
    per_graph,
    producers,
)
from partita.plans.layout import COMBINED_BYTES, Layout, Sharding, local_shape
from partita.plans.plan import Mesh, is_gpu

WAITING_PRODUCTS = 4
"""Products of the backward pass between the next sum's last gradient and the product that waits.
While a sum is waited for, the next one can be sent."""


@dataclass(frozen=True)
class Wait:
    """An operand of a product of the backward pass that waits for sums of gradients."""

    reader: Reader
    sums: tuple[tuple[int, Sharding], ...]
    """Gradients, and their shardings behind the sum."""


@dataclass(frozen=True)
class EarlySum:
    """A sum of a gradient for which a product waits."""

    computed: int
    """The instruction beside which the gradient is computed."""
    summed: int
    """That beside which its sum exists."""


def waits(graph: OperatorGraph, layout: Layout) -> tuple[Wait, ...]:
    """The products of the backward pass that wait for sums of gradients."""
    return _waits(IdentityKey(graph), IdentityKey(layout))


@lru_cache(maxsize=4)
def _waits(
    graph_key: IdentityKey[OperatorGraph], layout_key: IdentityKey[Layout]
) -> tuple[Wait, ...]:
    graph = graph_key.value
    products = _products(graph)
    producer = producers(graph)
    result = []
    earlier: list[tuple[int, Sharding]] = []
    """The sums before those in `waiting`."""
    waiting: list[tuple[int, Sharding]] = []
    nbytes = 0
    sums = sorted(_sums(graph, layout_key.value), key=lambda total: producer[total[0]])
    for tensor, sharding in sums:
        waiting.append((tensor, sharding))
        nbytes += graph.tensors[tensor].nbytes
        if nbytes < COMBINED_BYTES:
            continue
        number = bisect_right(products, (producer[tensor], 0)) + WAITING_PRODUCTS
        if earlier and number < len(products):
            result.append(Wait(products[number], tuple(earlier)))
        earlier, waiting, nbytes = waiting, [], 0
    return tuple(result)


def _sums(graph: OperatorGraph, layout: Layout) -> Iterator[tuple[int, Sharding]]:
    """Gradients that devices sum, and their shardings behind the sum."""
    if not is_gpu(graph.target):
        return
    gradients = update_gradients(graph)
    pending = pending_sums(graph, layout)
    sliced = set()
    for read in layout.reads:
        if read.tensor in gradients:
            sliced.add(read.tensor)
            yield read.tensor, read.target
    producer = producers(graph)
    for tensor in gradients - sliced:
        is_partial = tensor in pending.axes
        is_sum = not is_partial and sums_over_devices(graph, layout, producer[tensor])
        if is_sum or tensor in pending.totals:
            yield tensor, layout.shardings[tensor]


@per_graph
def update_gradients(graph: OperatorGraph) -> frozenset[int]:
    """The tensors of the backward pass for which only updates wait."""
    gradients: set[int] = set()
    nested = _nested(graph)
    for i in reversed(range(len(graph.instructions))):
        instruction = graph.instructions[i]
        if instruction.phase != "backward" or len(instruction.results) != 1 or i in nested:
            continue
        readers = readers_of(graph).get(instruction.results[0], ())
        if readers and all(_only_updates(graph, reader[0], gradients) for reader in readers):
            gradients.add(instruction.results[0])
    return frozenset(gradients)


@per_graph
def _nested(graph: OperatorGraph) -> frozenset[int]:
    """The instructions in bodies of loops and branches of conditionals."""
    return frozenset(i for loop in graph.loops for i in range(*loop.body))


def _only_updates(graph: OperatorGraph, reader: int, gradients: Set[int]) -> bool:
    """Whether a reader is an update, or passes on or adds a value for updates alone."""
    if reader < 0:
        return False
    instruction = graph.instructions[reader]
    is_passed = instruction.name == "add" or instruction.name in PASSING
    return instruction.phase == "update" or (is_passed and instruction.results[0] in gradients)


@per_graph
def _products(graph: OperatorGraph) -> list[Reader]:
    """The products of the backward pass that are no gradients of weights, in their order, each with
    the position of the gradient that it reads."""
    gradients, nested = update_gradients(graph), _nested(graph)
    producer = producers(graph)
    products = []
    for i, instruction in enumerate(graph.instructions):
        is_product = instruction.name in PRODUCTS and instruction.phase == "backward"
        if not is_product or i in nested or instruction.results[0] in gradients:
            continue
        for position, tensor in enumerate(instruction.operands):
            source = producer.get(tensor, -1)
            if source >= 0 and graph.instructions[source].phase == "backward":
                products.append((i, position))
                break
    return products


@dataclass
class _Combined:
    """Sums that XLA combines into one."""

    wait: int
    """Number of the first wait for any of them."""
    nbytes: int = 0
    """Of their results on a device."""
    tensors: list[int] = field(default_factory=list)
    """The gradients."""

    def takes(self, nbytes: int, passed: int) -> bool:
        """Whether a gradient of a result of `nbytes`, computed after `passed` waits, joins it."""
        return self.nbytes + nbytes <= COMBINED_BYTES and passed <= self.wait


def early_sums(graph: OperatorGraph, layout: Layout, mesh: Mesh) -> dict[int, EarlySum]:
    """Gradient -> its sum, for those for which products wait.

    The scheduler goes backward from that product: the sums follow each other, a product of the
    backward pass beside each, and a gradient is computed just before its sum begins.
    """
    producer = producers(graph)
    waiting = waits(graph, layout)
    groups: dict[int, list[_Combined]] = defaultdict(list)
    for combined in _combined(graph, layout, mesh):
        groups[waiting[combined.wait].reader[0]].append(combined)
    products = [i for i, _ in _products(graph)]
    sums = {}
    for end, combined in groups.items():
        times = products[: bisect_right(products, end)]
        summed = end
        for group in reversed(combined):
            if len(times) > 1:
                times.pop()
            computed = times[-1]
            for tensor in group.tensors:
                source = producer[tensor]
                sums[tensor] = EarlySum(max(source, computed), max(source, summed))
            summed = computed
    return sums


def _combined(graph: OperatorGraph, layout: Layout, mesh: Mesh) -> list[_Combined]:
    """The sums for which products wait, in groups that XLA combines.

    The results of a group on a device, slices after a reduce-scatter, have at most `COMBINED_BYTES`
    (CombineInstructionsByKey). So a group may contain sums for which a later product waits, if
    their gradients do not depend on the product that waits for the first one.
    """
    producer = producers(graph)
    waiting = waits(graph, layout)
    passed = _passed_waits(graph, waiting)
    groups: list[_Combined] = []
    last: dict[tuple[str, bool], _Combined] = {}
    """(dtype, whether devices keep slices) -> the group that may grow."""
    for number, wait in enumerate(waiting):
        for tensor, sharding in wait.sums:
            value = graph.tensors[tensor]
            key = value.dtype, sharding != layout.shardings[tensor]
            shape = local_shape(value.shape, sharding, mesh.sizes)
            nbytes = ITEMSIZE.get(value.dtype, 4) * math.prod(shape)
            group = last.get(key)
            if group is None or not group.takes(nbytes, passed[producer[tensor]]):
                group = _Combined(number)
                groups.append(group)
                if nbytes <= COMBINED_BYTES:
                    last[key] = group
            group.nbytes += nbytes
            group.tensors.append(tensor)
    return groups


def _passed_waits(graph: OperatorGraph, waiting: Sequence[Wait]) -> list[int]:
    """[instruction]: waits up to the last one on which it depends."""
    producer = producers(graph)
    number_of = {wait.reader[0]: number for number, wait in enumerate(waiting, 1)}
    passed: list[int] = []
    for i, instruction in enumerate(graph.instructions):
        sources = (producer.get(tensor, i) for tensor in instruction.operands)
        earlier = (passed[source] for source in sources if source < i)
        passed.append(max(number_of.get(i, 0), max(earlier, default=0)))
    return passed

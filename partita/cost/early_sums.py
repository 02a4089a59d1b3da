"""Sums of gradients over devices for which the backward pass waits, on GPUs.

XLA:GPU's scheduler would delay the gradients of weights and their sums to the end of the backward
pass (LatencyHidingScheduler), and the activations that those gradients read would stay in memory.
So gradients are summed in groups of at least `COMBINED_BYTES`, and a later product of the backward
pass waits for each group: the annotated program has a barrier there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import lru_cache

from partita.cost.partial import pending_sums, sums_over_devices
from partita.graph.flat import PRODUCTS, Reader, readers_of
from partita.graph.gradient_sums import PASSING
from partita.graph.operator_graph import IdentityKey, OperatorGraph, per_graph, producers
from partita.plans.layout import COMBINED_BYTES, Layout, Sharding
from partita.plans.plan import is_gpu

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
    gradients = _gradients(graph)
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
def _gradients(graph: OperatorGraph) -> frozenset[int]:
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
    gradients, nested = _gradients(graph), _nested(graph)
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


def early_sums(graph: OperatorGraph, layout: Layout) -> dict[int, EarlySum]:
    """Gradient -> its sum, for those for which products wait.

    The scheduler goes backward from that product: the sums follow each other, a product of the
    backward pass beside each, and a gradient is computed just before its sum begins. Gradients of
    less than `COMBINED_BYTES` together are one sum.
    """
    producer = producers(graph)
    groups: dict[int, set[int]] = defaultdict(set)
    for wait in waits(graph, layout):
        groups[wait.reader[0]].update(tensor for tensor, _ in wait.sums)
    products = [i for i, _ in _products(graph)]
    sums = {}
    for end, tensors in groups.items():
        times = products[: bisect_right(products, end)]
        computed = summed = end
        nbytes = 0
        for tensor in sorted(tensors, key=producer.__getitem__, reverse=True):
            source = producer[tensor]
            sums[tensor] = EarlySum(max(source, computed), max(source, summed))
            nbytes += graph.tensors[tensor].nbytes
            if nbytes >= COMBINED_BYTES and len(times) > 1:
                times.pop()
                computed, summed = times[-1], computed
                nbytes = 0
    return sums

"""Rematerialized runs of plans that exceed device memory.

`OperatorRuns` makes runs of given operators, each between two narrow cuts of the graph
(`pipeline_cuts`).

`with_fewest_runs` takes the splits of a given plan. Short runs store more borders, long ones need
more memory at once, so several lengths are tried (`groupings`). All runs of a length are priced
together: the seconds that they add, and the bytes that they free. Those that free most bytes per
second come first (the greedy rule of a knapsack), as few as the peak of a step needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from partita.cost.memory import PeakMemory, memory
from partita.cost.predict import Prediction
from partita.cost.terms import Terms
from partita.graph.flat import SHAPE_ONLY
from partita.graph.operator_graph import OperatorGraph, producers
from partita.graph.rematerialize import Run, rematerialized, useful_runs
from partita.machine import Machine
from partita.plans.layout import layout_of
from partita.plans.plan import Plan
from partita.search.base import States
from partita.search.network import CostNetwork
from partita.search.pipeline_cuts import Cuts
from partita.search.recomputation import PRODUCTS
from partita.simulation.simulate import predicted

PARTS = (1, 2, 4, 8)
"""Numbers of parts between narrow cuts that make a run."""
PEAKS = 5
"""Numbers of runs whose peak memory is computed at most."""


@dataclass(frozen=True)
class Rematerialized:
    """A plan with rematerialization, and its memory."""

    plan: Plan
    memory: PeakMemory

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a device."""
        return self.memory.peak


def groupings(graph: OperatorGraph, terms: Terms) -> list[tuple[Run, ...]]:
    """Runs of one or several parts between narrow cuts, a list for each number of parts.

    The part behind the last cut is left out: the backward pass begins with it.
    """
    names = [operator.name for operator in graph.operators]
    ends = Cuts(graph, terms).ends
    of_parts = []
    for parts in PARTS:
        runs = []
        first = 0
        for end in [*ends[parts - 1 :: parts], *ends[-1:]]:
            if first <= end:
                runs.append((names[first], names[end]))
            first = end + 1
        useful = useful_runs(graph, runs)
        if useful and useful not in of_parts:
            of_parts.append(useful)
    return of_parts


class OperatorRuns:
    """Runs of a graph in which chosen operators are computed again."""

    def __init__(self, graph: OperatorGraph, terms: Terms) -> None:
        self.names = [operator.name for operator in graph.operators]
        self.ends = Cuts(graph, terms).ends
        heavy = [graph.instructions[operator.heavy].name for operator in graph.operators]
        self.is_light = [name not in PRODUCTS for name in heavy]
        self.values = _values_read(graph)
        self.backward_readers = _backward_readers(graph)

    def of(self, operators: Collection[int]) -> tuple[Run, ...]:
        """The shortest runs that free values of some operators, each between two narrow cuts.

        A run ends with the last operator whose backward pass reads one of the values. If it has a
        product, it begins with the normalization in front of it, whose inputs are smaller than what
        its backward pass stores, and with products of the same operand.
        """
        runs: list[tuple[int, int]] = []
        first = 0
        for end in self.ends:
            chosen = [o for o in range(first, end + 1) if o in operators]
            if chosen:
                after = runs[-1][1] + 1 if runs else 0
                readers = [r for o in chosen for r in self.backward_readers[o] if r <= end]
                last = max([*chosen, *readers])
                runs.append((self._start(chosen, after), last))
            first = end + 1
        return tuple((self.names[start], self.names[last]) for start, last in runs)

    def _start(self, chosen: Sequence[int], after: int) -> int:
        """The first operator of a run with chosen ones, from `after` on."""
        start = chosen[0]
        if all(self.is_light[o] for o in chosen):
            return start
        while start > after:
            is_beside = not self.values[start - 1].isdisjoint(self.values[start])
            if not is_beside and not self.is_light[start - 1]:
                break
            start -= 1
        return start


def _values_read(graph: OperatorGraph) -> list[set[int]]:
    """[operator]: the forward values of others that it reads."""
    producer = producers(graph)
    values: list[set[int]] = [set() for _ in graph.operators]
    for use in graph.uses:
        index = producer.get(use.tensor, -1)
        is_forward = index >= 0 and graph.instructions[index].phase == "forward"
        if is_forward and graph.home[use.tensor] != use.operator:
            values[use.operator].add(use.tensor)
    return values


def _backward_readers(graph: OperatorGraph) -> list[set[int]]:
    """[operator]: the operators whose backward pass reads forward values of it."""
    readers: list[set[int]] = [set() for _ in graph.operators]
    for index, instruction in enumerate(graph.instructions):
        if instruction.phase != "backward" or graph.owner[index] < 0:
            continue
        for operand in instruction.operands:
            for tensor in _rearranged(graph, operand):
                if graph.home[tensor] >= 0:
                    readers[graph.home[tensor]].add(graph.owner[index])
    return readers


def _rearranged(graph: OperatorGraph, tensor: int) -> Iterator[int]:
    """A forward value, and those that it merely rearranges."""
    producer = producers(graph)
    while (index := producer.get(tensor, -1)) >= 0:
        instruction = graph.instructions[index]
        if instruction.phase != "forward":
            break
        yield tensor
        if instruction.name not in SHAPE_ONLY:
            break
        tensor = instruction.operands[0]


def with_fewest_runs(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    prediction: Prediction,
    runs: Sequence[Run],
    limit_bytes: int,
) -> Rematerialized:
    """A plan with the fewest of some runs that fit in `limit_bytes`, else with all of them.

    `prediction` is the one of the plan, whose peak is above the limit.
    """
    best = with_runs(graph, machine, plan, runs)
    if best.peak_bytes > limit_bytes:
        return best
    ordered = _by_gain(graph, machine, plan, prediction, best.plan.recompute)
    largest = len(ordered)
    smallest = 0
    smallest_peak = prediction.peak_bytes
    for _ in range(PEAKS):
        if largest - smallest < 2:
            break
        # The peak falls about linearly with the number of runs.
        missing = (smallest_peak - limit_bytes) / max(1, smallest_peak - best.peak_bytes)
        count = smallest + round(missing * (largest - smallest))
        count = min(max(count, smallest + 1), largest - 1)
        attempt = with_runs(graph, machine, plan, ordered[:count])
        if attempt.peak_bytes <= limit_bytes:
            largest = count
            best = attempt
        else:
            smallest = count
            smallest_peak = attempt.peak_bytes
    return best


def _by_gain(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    prediction: Prediction,
    runs: Sequence[Run],
) -> list[Run]:
    """The runs by the seconds that a freed byte costs, without those that free none."""
    dropped = predicted(graph, machine, replace(plan, recompute=tuple(runs)))
    numbers = {operator.name: number for number, operator in enumerate(graph.operators)}
    gains = []
    for position, (first, last) in enumerate(runs):
        seconds = 0.0
        freed_bytes = 0.0
        for number in range(numbers[first], numbers[last] + 1):
            before = prediction.operators[number]
            after = dropped.operators[number]
            seconds += after.seconds - before.seconds
            freed_bytes += before.nbytes - after.nbytes
        if freed_bytes > 0:
            gains.append((seconds / freed_bytes, position))
    return [runs[position] for _, position in sorted(gains)]


def with_runs(
    graph: OperatorGraph, machine: Machine, plan: Plan, runs: Sequence[Run]
) -> Rematerialized:
    """The plan with runs, and its peak memory."""
    number = {operator.name: n for n, operator in enumerate(graph.operators)}
    in_order = sorted(runs, key=lambda run: number[run[0]])
    useful = useful_runs(graph, in_order)
    changed = rematerialized(graph, useful)
    plan = replace(plan, recompute=useful)
    layout = layout_of(changed, plan)
    peak = memory(
        changed,
        plan.mesh,
        layout,
        machine.backend,
        device_bytes=machine.memory_bytes,
    )
    return Rematerialized(plan, peak)


def stored_bytes(network: CostNetwork, states: States) -> float:
    """Bytes of variables and other state on a device, without activations."""
    activations = sum(a[i] for a, i in zip(network.activations, states, strict=True))
    return network.problem.memory_bytes(states) - activations

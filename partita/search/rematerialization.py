"""Rematerialization for plans that exceed device memory: which runs of operators to compute again.

Runs end at narrow cuts of the graph (`pipeline_cuts`). Short runs store more borders, long ones
need more memory at once; the length that frees most is taken. All its runs are priced together
under the plan that is too large: the seconds that they add, and the bytes that they free. Those
that free most bytes per second come first (the greedy rule of a knapsack), as few as the peak of a
step needs.
Freed bytes are no sum, because a step has one peak, so peaks are computed for a few numbers of
runs.

The choice is no state of the exact search: its splits are those of the given plan. The lower bound
(`activations_free`) holds for every plan with rematerialization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from partita.cost.memory import memory
from partita.cost.predict import Prediction
from partita.cost.terms import Terms
from partita.graph.operator_graph import OperatorGraph
from partita.graph.rematerialize import Run, rematerialized, useful_runs
from partita.machine import Machine
from partita.plans.layout import layout_of
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.search.network import CostNetwork
from partita.search.pipeline_cuts import Cuts
from partita.simulation.simulate import predicted
from partita.units import format_bytes, format_seconds

PARTS = (1, 2, 4, 8)
"""Numbers of parts between narrow cuts that make a run."""
PEAKS = 5
"""Numbers of runs whose peak memory is computed at most."""


@dataclass(frozen=True)
class Rematerialized:
    """A plan with rematerialization: the fastest that fits, or else the smallest."""

    plan: Plan
    peak_bytes: int


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


def smallest_and_fastest(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    prediction: Prediction,
    choices: Sequence[Sequence[Run]],
    limit_bytes: int,
) -> Rematerialized:
    """A plan with the fewest rematerialized runs that fit in `limit_bytes`, else with all runs.

    `prediction` is the one of the plan, whose peak is above the limit. Of the `choices` of runs, it
    has runs of the one that frees most memory.
    """
    attempts = [_with_runs(graph, machine, plan, runs) for runs in choices]
    best = min(attempts, key=lambda attempt: attempt.peak_bytes)
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
        attempt = _with_runs(graph, machine, plan, ordered[:count])
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


def _with_runs(
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
    return Rematerialized(plan, peak.peak)


def rematerialization_notes(
    graph: OperatorGraph, machine: Machine, plan: Plan, prediction: Prediction
) -> list[str]:
    """A note on the seconds that a plan's rematerialization adds, and the bytes that it frees; none
    for other plans and for pipelines.
    """
    if not plan.recompute or not is_one_program(plan):
        return []
    stored = predicted(graph, machine, replace(plan, recompute=()))
    added = max(0.0, prediction.seconds - stored.seconds)
    freed_bytes = max(0, stored.peak_bytes - prediction.peak_bytes)
    runs = "1 run" if len(plan.recompute) == 1 else f"{len(plan.recompute)} runs"
    return [
        f"rematerialization of {runs} of operators adds {format_seconds(added)} to a step of "
        f"{format_seconds(stored.seconds)} and frees {format_bytes(freed_bytes)} of "
        f"{format_bytes(stored.peak_bytes)} a device"
    ]


def activations_free(network: CostNetwork) -> CostNetwork:
    """The network in which activations take no memory.

    Its lower bounds hold for plans with rematerialization: that frees activations at most, and adds
    seconds.
    """
    nbytes = []
    for all_bytes, activations in zip(network.problem.nbytes, network.activations, strict=True):
        nbytes.append(all_bytes - activations)
    return replace(network, problem=replace(network.problem, nbytes=nbytes))

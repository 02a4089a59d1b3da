"""Splits and rematerialization, searched together for a memory that limits plans.

Whether an operator is computed again is a part of its state (`search.recomputation`). The operators
that are become runs between narrow cuts of the graph (`search.rematerialization`).

The exact search comes first, with several budgets of bytes: the peak memory of a step is no sum. At
its moment some activations are not stored any more, and others have gradients and copies beside
them. So the bytes of states are corrected by the peak of the first plan. A walk over simulated
steps follows, then longer runs for the same splits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partita.cost.memory import PeakMemory
from partita.cost.predict import Prediction
from partita.graph.rematerialize import Run
from partita.plans.plan import Plan
from partita.search.base import Array, RecomputedProblem, States
from partita.search.elimination import eliminate
from partita.search.network import CostNetwork
from partita.search.portfolio import MIN_GAIN, Limits, descended, is_large, sampled
from partita.search.recomputation import with_recomputation
from partita.search.reduce import reduce
from partita.search.rematerialization import (
    OperatorRuns,
    Rematerialized,
    groupings,
    with_fewest_runs,
    with_runs,
)
from partita.search.simulated import simulated
from partita.simulation.simulate import predicted

BUDGETS = 8
"""Budgets of bytes of the exact search, at most."""
CLOSE_BUDGETS = 0.98
"""Ratio of two budgets between which none is tried: plans come in steps of bytes."""
SMALL_GAP = 0.05
"""Relative excess over the lower bound up to which no longer runs are tried."""

Kind = tuple[int, bool]
"""A kind of operator, and whether it is computed again."""


@dataclass(frozen=True)
class Together:
    """The fastest plan that fits of a search; none if no plan does."""

    plan: Plan | None = None
    prediction: Prediction | None = None
    smallest_bytes: float = math.inf
    """Least peak memory of the plans examined."""
    stopped: bool = False
    """Whether Ctrl-C ended the search."""


def best_together(
    network: CostNetwork,
    limits: Limits,
    baselines: Sequence[States] = (),
    bound_seconds: float = 0.0,
) -> Together:
    """The plan whose splits and rematerialization are the best together; none if none fits.

    Args:
        limits: `budget` is the memory of a device that a plan may use.
        baselines: States of the network whose splits a walk starts from, too.
        bound_seconds: Lower bound of all plans.
    """
    search = _Search(network, int(limits.budget))
    try:
        search.run(limits, baselines, bound_seconds)
    except KeyboardInterrupt:
        if search.best.plan is None:
            raise
        return replace(search.best, stopped=True)
    return search.best


class _Search:
    """The search of one network for one memory."""

    def __init__(self, network: CostNetwork, limit_bytes: int) -> None:
        self.network = network
        self.limit_bytes = limit_bytes
        self.best = Together()
        self._runs = OperatorRuns(network.graph, network.terms)
        self._tried: dict[States, Rematerialized] = {}

    def run(self, limits: Limits, baselines: Sequence[States], bound_seconds: float) -> None:
        """The exact search, the walk, and longer runs."""
        space, states, budget = self._exact()
        if self.best.prediction is None:
            return
        starts = [states]
        for origin in baselines:
            start = space.with_origin(states, origin)
            starts += [start] if start is not None else []
        for walked in _walked(self.network, space, replace(limits, budget=budget), starts):
            self._consider(self._attempt(space, walked), MIN_GAIN)
        graph, terms = self.network.graph, self.network.terms
        assert self.best.plan is not None
        stored = replace(self.best.plan, recompute=())
        prediction = predicted(graph, self.network.placement.machine, stored, terms)
        self._drop_runs(stored, prediction, self.best.plan.recompute)
        if self.best.prediction.seconds > bound_seconds * (1 + SMALL_GAP):
            for runs in groupings(graph, terms):
                self._drop_runs(stored, prediction, runs)

    def _exact(self) -> tuple[RecomputedProblem, States, float]:
        """The corrected problem, the states of the best plan, and the largest budget that fits."""
        space = with_recomputation(self.network)
        reduced = reduce(space.problem)
        best: States = ()
        most_that_fits, least_that_does_not = 0.0, math.inf
        budget = float(self.limit_bytes)
        for number in range(BUDGETS):
            searched = eliminate(reduced.problem, budget)
            states = reduced.lift(searched.states)
            if searched.stopped:
                raise KeyboardInterrupt
            if not searched.feasible or states in self._tried:
                break
            one = self._attempt(space, states)
            if self._consider(one):
                best = states
            if number == 0:
                space = corrected(self.network, space, states, one.memory)
                reduced = reduce(space.problem)
                budget = space.problem.memory_bytes(states)
            nbytes = space.problem.memory_bytes(states)
            if one.peak_bytes <= self.limit_bytes:
                most_that_fits = budget
            else:
                least_that_does_not = min(budget, nbytes)
            if most_that_fits >= least_that_does_not * CLOSE_BUDGETS:
                break
            budget = (most_that_fits + least_that_does_not) / 2
            if not most_that_fits or least_that_does_not == math.inf:
                budget = nbytes + (self.limit_bytes - one.peak_bytes) / CLOSE_BUDGETS
        return space, best, most_that_fits

    def _attempt(self, space: RecomputedProblem, states: States) -> Rematerialized:
        """The plan of states, with its memory."""
        if states not in self._tried:
            network = self.network
            runs = self._runs.of(space.recomputed(states))
            plan = network.plan(space.lift(states))
            machine = network.placement.machine
            self._tried[states] = with_runs(network.graph, machine, plan, runs)
        return self._tried[states]

    def _consider(self, one: Rematerialized, gain: float = 0.0) -> bool:
        """Whether a plan becomes the best: it fits, and has a relative gain over the last one."""
        smallest_bytes = min(self.best.smallest_bytes, one.peak_bytes)
        self.best = replace(self.best, smallest_bytes=smallest_bytes)
        if one.peak_bytes > self.limit_bytes:
            return False
        network = self.network
        prediction = predicted(network.graph, network.placement.machine, one.plan)
        before = self.best.prediction
        if before is not None and prediction.seconds >= before.seconds * (1 - gain):
            return False
        self.best = replace(self.best, plan=one.plan, prediction=prediction)
        return True

    def _drop_runs(self, stored: Plan, prediction: Prediction, runs: Sequence[Run]) -> None:
        """Considers a plan that exceeds the memory with the fewest of some runs that fit."""
        network = self.network
        machine = network.placement.machine
        fewer = with_fewest_runs(network.graph, machine, stored, prediction, runs, self.limit_bytes)
        self._consider(fewer)


def corrected(
    network: CostNetwork, space: RecomputedProblem, states: States, memory: PeakMemory
) -> RecomputedProblem:
    """The problem whose bytes of activations are those at the peak of a plan.

    The activations of equal operators that are computed again have a common factor, and so have
    those of the others.

    Args:
        states: The plan's.
        memory: Its peak.
    """
    problem = space.problem
    activations = [_activations(network, space, o) for o in range(problem.size)]
    at_peak: dict[Kind, float] = defaultdict(float)
    stored: dict[Kind, float] = defaultdict(float)
    for o, state in enumerate(states):
        key = problem.kinds[o], bool(space.again[o][state])
        variables = problem.nbytes[o][state] - activations[o][state]
        at_peak[key] += max(0.0, memory.by_operator[o] - variables)
        stored[key] += activations[o][state]
    nbytes: dict[int, Array] = {}
    for o, kind in enumerate(problem.kinds):
        if kind not in nbytes:
            again, once = (_ratio(at_peak, stored, (kind, flag)) for flag in (True, False))
            factors = np.where(space.again[o], again, once)
            nbytes[kind] = problem.nbytes[o] + activations[o] * (factors - 1)
    changed = replace(problem, nbytes=[nbytes[kind] for kind in problem.kinds])
    return replace(space, problem=changed)


def _ratio(at_peak: Mapping[Kind, float], stored: Mapping[Kind, float], kind: Kind) -> float:
    """Bytes at a peak over those of a sum, 1 for those that the plan does not have."""
    return at_peak[kind] / stored[kind] if stored.get(kind) else 1.0


def _activations(network: CostNetwork, space: RecomputedProblem, operator: int) -> Array:
    """[state]: bytes of an operator's activations in the sum of a plan."""
    variables = network.problem.nbytes[operator] - network.activations[operator]
    return space.problem.nbytes[operator] - variables[space.origin[operator]]


def _walked(
    network: CostNetwork,
    space: RecomputedProblem,
    limits: Limits,
    starts: Sequence[States],
) -> list[States]:
    """The states of a descent and of Markov chains on the simulated step, the fastest first.

    A state says whether its operator is computed again. The first start fits.
    """
    problem = simulated(network, space)
    fitting = [states for states in starts if problem.memory_bytes(states) <= limits.budget]
    walked = [min(fitting, key=problem.seconds)]
    if is_large(problem):
        walked.append(descended(problem, walked[0], limits.budget))
    result = sampled(problem, limits, [*fitting, *walked], 0.0)
    if result.stopped:
        raise KeyboardInterrupt
    walked.append(result.states)
    return sorted(set(walked), key=problem.seconds)

"""The searches behind one form: `SearchSpace` and `Limits` in, `SearchResult` out.

    elimination  the least sum, exactly; a shorter step may exist where collectives overlap
    mcmc         Markov chains from the baselines alone, as in FlexFlow
    exhaustive   the shortest step, proved, without a time limit of its own
    portfolio    elimination, chains from its plan and all baselines, a proof for small networks;
                 on large ones a descent first (`search.descent`)

The seconds of a result are those of the simulated step. Its bound holds for every plan of the
space, whichever search states it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partita.search.base import Problem, Report, SearchResult, States
from partita.search.descent import cross, descend
from partita.search.elimination import eliminate
from partita.search.exhaustive import prove
from partita.search.mcmc import chain_length, run_chains
from partita.search.network import CostNetwork
from partita.search.optional import PROOF
from partita.search.reduce import Reduced, reduce
from partita.search.simulated import Simulated, relaxed, simulated, weighted

PROPOSALS = 1 << 27
"""Proposals of chains times tasks of the step, unless seconds are given: a second or two."""
MIN_PROPOSALS = 20_000
DESCENT = 1 << 25
"""Steps that a descent or the crossovers simulate times tasks of the step, at most: about half a
second."""
MIN_GAIN = 0.01
"""Least relative gain of a plan over the exact one, which is the more regular plan.

A smaller gain is below the error of predictions.
"""
ROUNDING = 1e-6
"""Relative difference of seconds within which two plans are equally fast."""
SMALL = 24
"""Operators of a network up to which the portfolio tries a proof."""
NODES = 3_000_000
"""Choices of such a proof, at most: a second or two."""


@dataclass(frozen=True)
class Limits:
    """Limits of a search: bytes of a device, seconds (None: a fixed number of proposals), seed."""

    budget: float = np.inf
    seconds: float | None = None
    seed: int = 0
    report: Report | None = None


class SearchSpace:
    """A cost network with its derived problems, each computed at its first use.

    `baselines` are states from which Markov chains start.
    """

    def __init__(self, network: CostNetwork, baselines: Sequence[Sequence[int]]) -> None:
        self.network = network
        self.baselines = baselines
        self._exact: dict[float, tuple[SearchResult, tuple[int, ...]]] = {}

    @cached_property
    def reduced(self) -> Reduced:
        """The additive problem, reduced."""
        return reduce(self.network.problem)

    @cached_property
    def simulated(self) -> Simulated:
        return simulated(self.network)

    @cached_property
    def relaxed(self) -> Problem:
        """An additive lower bound of every simulated step."""
        return relaxed(self.network)

    @cached_property
    def reduced_relaxed(self) -> Reduced:
        """The lower bound, reduced."""
        return reduce(self.relaxed)

    @property
    def halfway(self) -> float:
        """Share of moves halfway between those of the lower bound and all of them."""
        return 1 - self.network.placement.machine.backend.overlap / 2

    @property
    def overlaps(self) -> bool:
        """Whether a step may be shorter than the sum of its parts."""
        return self.network.placement.machine.backend.overlap > 0

    def exact(self, limits: Limits) -> tuple[SearchResult, tuple[int, ...]]:
        """(result of the least sum, states of the least lower bound), computed once per budget.

        The result's seconds are those of the step, and its bound holds for every step.
        """
        if limits.budget not in self._exact:
            answer = self._compute_exact(limits)
            if answer[0].stopped:
                return answer
            self._exact[limits.budget] = answer
        return self._exact[limits.budget]

    def _compute_exact(self, limits: Limits) -> tuple[SearchResult, tuple[int, ...]]:
        result = eliminate(self.reduced.problem, limits.budget, limits.report)
        result = replace(result, states=self.reduced.lift(result.states))
        if not self.overlaps or not result.feasible or result.stopped:
            return result, result.states
        lower = eliminate(self.reduced_relaxed.problem, limits.budget)
        seconds = self.simulated.seconds(result.states)
        result = replace(result, seconds=seconds, bound=min(lower.bound, seconds))
        return result, self.reduced_relaxed.lift(lower.states)


def without_idle_splits(space: SearchSpace, states: States) -> tuple[int, ...]:
    """The states with those operators whole whose splits save neither time nor memory.

    All of them together make the step longer by ROUNDING at most.
    """
    network = space.network
    problem = network.problem
    step_seconds = space.simulated.seconds if space.overlaps else problem.cost
    seconds = step_seconds(states)
    chosen = list(states)
    for o, state in enumerate(states):
        whole = network.whole(o, state)
        if whole in (None, state) or problem.nbytes[o][whole] > problem.nbytes[o][state]:
            continue
        added_seconds = problem.seconds[o][whole] - problem.seconds[o][state]
        for neighbour, table in network.neighbours[o]:
            moves = table[:, chosen[neighbour]]
            added_seconds += moves[whole] - moves[state]
        if added_seconds > seconds * ROUNDING:
            continue
        chosen[o] = whole
        if step_seconds(chosen) > seconds * (1 + ROUNDING):
            chosen[o] = state
    return tuple(chosen)


Search = Callable[[SearchSpace, Limits], SearchResult]


def elimination(space: SearchSpace, limits: Limits) -> SearchResult:
    """The least sum of a plan's parts, exactly."""
    return space.exact(limits)[0]


def mcmc(space: SearchSpace, limits: Limits) -> SearchResult:
    """Markov chains from the baselines that fit; from the least sum if none does."""
    exact, _ = space.exact(limits)
    if not exact.feasible or exact.stopped:
        return exact
    starts = [s for s in space.baselines if space.simulated.memory_bytes(s) <= limits.budget]
    return sampled(space.simulated, limits, starts or [exact.states], exact.bound)


def exhaustive(space: SearchSpace, limits: Limits) -> SearchResult:
    """The shortest step, proved; the best so far if the seconds run out."""
    exact, _ = space.exact(limits)
    if not exact.feasible or exact.stopped:
        return exact
    starts = [exact.states, *space.baselines]
    shortest = sampled(space.simulated, replace(limits, seconds=None), starts, exact.bound)
    seconds = np.inf if limits.seconds is None else limits.seconds
    return _proved(space, limits, shortest, seconds)


def portfolio(space: SearchSpace, limits: Limits) -> SearchResult:
    """The least sum, chains from it and from all baselines, then a proof for small networks."""
    begin = time.perf_counter()
    exact, lower_states = space.exact(limits)
    if not space.overlaps or not exact.feasible or exact.stopped:
        return exact
    starts = [exact.states, lower_states, *space.baselines]
    if is_large(space.simulated):
        try:
            starts.append(_descended(space, limits, starts))
        except KeyboardInterrupt:
            return replace(exact, stopped=True)
    result = sampled(space.simulated, limits, starts, exact.bound)
    out_of_time = limits.seconds is not None and time.perf_counter() - begin > limits.seconds
    provable = result.gap > 0 and len(space.network.states) <= SMALL
    if provable and not result.stopped and not out_of_time:
        proved = _proved(space, limits, result, np.inf, NODES)
        result = replace(proved, history=(*result.history, *proved.history), stopped=False)
    if exact.seconds <= result.seconds * (1 + MIN_GAIN):
        result = replace(result, states=exact.states, seconds=exact.seconds, nbytes=exact.nbytes)
    return replace(result, history=(*exact.history, *result.history))


def is_large(problem: Simulated) -> bool:
    """Whether a network has so many states that no Markov chain ends."""
    return chain_length(problem) > _proposals(problem)


def _proposals(problem: Simulated) -> int:
    """Proposals of all chains without a time limit."""
    return max(MIN_PROPOSALS, PROPOSALS // max(1, problem.tasks.count))


def _descended(space: SearchSpace, limits: Limits, starts: Sequence[Sequence[int]]) -> States:
    """The states below the best crossover of some starts and the one between the additive problems.

    In a step some moves delay kernels for all of their time and others for a part of it.
    """
    problem = space.simulated
    between = reduce(weighted(space.network, space.halfway))
    states = between.lift(eliminate(between.problem, limits.budget).states)
    fitting = [s for s in (states, *starts) if problem.memory_bytes(s) <= limits.budget]
    best = min(fitting, key=problem.seconds)
    crossed = cross(problem, best, fitting, limits.budget, _simulations(problem))
    return descended(problem, crossed, limits.budget)


def descended(problem: Simulated, start: Sequence[int], budget: float) -> States:
    """The states of a descent of about half a second."""
    return descend(problem, start, budget, _simulations(problem))


def _simulations(problem: Simulated) -> int:
    """Steps that a descent or the crossovers simulate, at most."""
    return DESCENT // max(1, problem.tasks.count)


def _proved(
    space: SearchSpace,
    limits: Limits,
    result: SearchResult,
    seconds: float,
    nodes: int = sys.maxsize,
) -> SearchResult:
    """The proof of a result or a better one; the result with its failures if the proof fails."""
    proofs: list[SearchResult] = []

    def attempt() -> None:
        proof = prove(
            space.simulated,
            space.relaxed,
            result.states,
            limits.budget,
            seconds,
            nodes=nodes,
            report=limits.report,
        )
        proofs.append(proof)

    failures = PROOF.run(attempt)
    return proofs[0] if proofs else replace(result, failures=failures)


def sampled(
    problem: Simulated, limits: Limits, starts: Sequence[Sequence[int]], bound: float
) -> SearchResult:
    """The best states of Markov chains, within seconds or a fixed number of proposals."""
    proposals = None
    seconds = limits.seconds
    if seconds is None:
        proposals = _proposals(problem)
        seconds = np.inf
    result, _ = run_chains(
        problem,
        starts,
        limits.budget,
        bound,
        seconds,
        limits.seed,
        limits.report,
        proposals,
    )
    return result


SEARCHES: Mapping[str, Search] = {
    "portfolio": portfolio,
    "elimination": elimination,
    "mcmc": mcmc,
    "exhaustive": exhaustive,
}

"""The searches behind one form: each takes a `Space` and `Limits` and returns a SearchResult whose seconds are those of the simulated step.

    elimination  the least sum, exactly; where collectives hide behind kernels the best step may be another
    mcmc         walks from the baselines alone, as FlexFlow walks
    exhaustive   the shortest step, proved; as long as it takes
    portfolio    elimination, walks from what it found and from all baselines, and a proof where the space is small

A bound holds for every plan of the space, whichever search states it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from partita.search.base import Problem, Report, SearchResult
from partita.search.elimination import eliminate
from partita.search.exhaustive import prove
from partita.search.mcmc import run_chains
from partita.search.network import CostNetwork
from partita.search.optional import PROOF
from partita.search.reduce import Reduced, reduce
from partita.search.simulated import Simulated, relaxed, simulated

PROPOSALS = 1 << 27
"""Proposals of a walk times tasks of the step, unless seconds are given: a second or two."""
MIN_GAIN = 0.01
"""What a walk must gain over the exact plan, which is the more regular one: less than predictions can tell apart is not worth it."""
SMALL = 24
"""Operators of a network for which the portfolio tries a proof."""
NODES = 3_000_000
"""Choices that such a proof may make: a second or two."""


@dataclass(frozen=True)
class Limits:
    """What a search may use: bytes of a device, seconds (None: a fixed number of proposals), and what its random numbers begin with."""

    budget: float = np.inf
    seconds: float | None = None
    seed: int = 0
    report: Report | None = None


@dataclass(frozen=True, eq=False)
class SearchSpace:
    """A cost network with what searches need of it, made when it is first asked for. `baselines` are states to begin walks from."""

    network: CostNetwork
    baselines: Sequence[Sequence[int]]
    _least: dict[float, tuple[SearchResult, tuple[int, ...]]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def reduced(self) -> Reduced:
        return reduce(self.network.problem)

    @cached_property
    def simulated(self) -> Simulated:
        return simulated(self.network)

    @cached_property
    def relaxed(self) -> Problem:
        """An additive problem that no simulated step is shorter than."""
        return relaxed(self.network)

    @cached_property
    def below(self) -> Reduced:
        """The same, with less to look at and the same optimum."""
        return reduce(self.relaxed)

    @property
    def overlaps(self) -> bool:
        """Whether a step may be shorter than the sum of its parts."""
        return self.network.placement.machine.backend.overlap > 0

    def least_sum(self, limits: Limits) -> SearchResult:
        """The least sum; its seconds are the sum."""
        result = eliminate(self.reduced.problem, limits.budget, limits.report)
        return replace(result, states=self.reduced.lift(result.states))

    def least(self, limits: Limits) -> tuple[SearchResult, tuple[int, ...]]:
        """(least sum; what is least below all steps). The result's seconds are the step's, and its bound that of every step.

        Searches begin with it, one after the other: it is made once for a budget.
        """
        if limits.budget not in self._least:
            found = self._searched(limits)
            if found[0].stopped:
                return found
            self._least[limits.budget] = found
        return self._least[limits.budget]

    def _searched(self, limits: Limits) -> tuple[SearchResult, tuple[int, ...]]:
        exact = self.least_sum(limits)
        if not self.overlaps or not exact.feasible or exact.stopped:
            return exact, exact.states
        below = eliminate(self.below.problem, limits.budget)
        seconds = self.simulated.seconds(exact.states)
        return replace(exact, seconds=seconds, bound=min(below.bound, seconds)), self.below.lift(
            below.states
        )


Search = Callable[[SearchSpace, Limits], SearchResult]


def elimination(space: SearchSpace, limits: Limits) -> SearchResult:
    """The least sum of a plan's parts, exactly."""
    return space.least(limits)[0]


def mcmc(space: SearchSpace, limits: Limits) -> SearchResult:
    """Walks on the simulator from those baselines that fit; where none does, from the least sum."""
    exact, _ = space.least(limits)
    if not exact.feasible or exact.stopped:
        return exact
    starts = [s for s in space.baselines if space.simulated.memory_bytes(s) <= limits.budget] or [
        exact.states
    ]
    return _walked(space, limits, starts, exact.bound)


def exhaustive(space: SearchSpace, limits: Limits) -> SearchResult:
    """The shortest step, proved; where the seconds run out, the best so far."""
    exact, _ = space.least(limits)
    if not exact.feasible or exact.stopped:
        return exact
    found = _walked(
        space, replace(limits, seconds=None), [exact.states, *space.baselines], exact.bound
    )
    seconds = np.inf if limits.seconds is None else limits.seconds
    return _proved(space, limits, found, seconds)


def portfolio(space: SearchSpace, limits: Limits) -> SearchResult:
    """The least sum, then walks from it and from all baselines, then a proof where the space is small."""
    begun = time.perf_counter()
    exact, below = space.least(limits)
    if not space.overlaps or not exact.feasible or exact.stopped:
        return exact
    found = _walked(space, limits, [exact.states, below, *space.baselines], exact.bound)
    over = limits.seconds is not None and time.perf_counter() - begun > limits.seconds
    if found.gap > 0 and len(space.network.states) <= SMALL and not found.stopped and not over:
        proved = _proved(space, limits, found, np.inf, NODES)
        found = replace(proved, history=(*found.history, *proved.history), stopped=False)
    if exact.seconds <= found.seconds * (1 + MIN_GAIN):
        found = replace(found, states=exact.states, seconds=exact.seconds, nbytes=exact.nbytes)
    return replace(found, history=(*exact.history, *found.history))


def _proved(
    space: SearchSpace,
    limits: Limits,
    result: SearchResult,
    seconds: float,
    nodes: int = sys.maxsize,
) -> SearchResult:
    """The proof of a result, or a better one on the way; the result itself with a sentence if the proof fails."""
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


def _walked(
    space: SearchSpace, limits: Limits, starts: Sequence[Sequence[int]], bound: float
) -> SearchResult:
    problem, seconds = space.simulated, limits.seconds
    most = None if seconds is not None else max(20_000, PROPOSALS // max(1, problem.tasks.count))
    return run_chains(
        problem,
        starts,
        limits.budget,
        bound,
        np.inf if seconds is None else seconds,
        limits.seed,
        limits.report,
        most,
    )[0]


SEARCHES: Mapping[str, Search] = {
    "portfolio": portfolio,
    "elimination": elimination,
    "mcmc": mcmc,
    "exhaustive": exhaustive,
}

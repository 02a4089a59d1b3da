"""The best states of a small cost network by looking at all of them: what the other searches are held against."""

from __future__ import annotations

from itertools import product

import numpy as np

from partita.search.base import Problem, SearchResult


def exhaust(problem: Problem, budget: float = np.inf) -> SearchResult:
    """The states of least seconds within the budget, proved by enumeration; the smallest in bytes if none fits."""
    best: tuple[float, tuple[int, ...]] | None = None
    smallest: tuple[float, tuple[int, ...]] | None = None
    for states in product(*(range(len(s)) for s in problem.seconds)):
        seconds, held = problem.cost(states), problem.held(states)
        if held <= budget and (best is None or seconds < best[0]):
            best = (seconds, states)
        if smallest is None or held < smallest[0]:
            smallest = (held, states)
    assert smallest is not None
    states = best[1] if best is not None else smallest[1]
    seconds = problem.cost(states)
    return SearchResult(states, seconds, problem.held(states), seconds, best is not None)

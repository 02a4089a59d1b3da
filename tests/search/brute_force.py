"""The optimum of a small cost network, by enumeration of all assignments."""

from itertools import product

import numpy as np

from partita.search.base import Problem, SearchResult


def brute_force(problem: Problem, budget: float = np.inf) -> SearchResult:
    """The states of least seconds within the budget; the smallest in bytes if none fits."""
    assignments = list(product(*(range(len(seconds)) for seconds in problem.seconds)))
    fitting = [states for states in assignments if problem.memory_bytes(states) <= budget]
    if fitting:
        states = min(fitting, key=problem.cost)
    else:
        states = min(assignments, key=problem.memory_bytes)
    seconds = problem.cost(states)
    return SearchResult(states, seconds, problem.memory_bytes(states), seconds, bool(fitting))

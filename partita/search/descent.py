"""Changes of many operators of a plan at once, on the simulator.

Markov chains change operators one by one, or few equal ones (`search.mcmc`). A network of many
blocks has so many states that a chain of a second or two hardly begins. Its blocks are alike, so
the descent tries every state for all operators of a kind together, one kind after the other, and
stays with each one that makes the step shorter. Where operators of several kinds must change
together, as a recurrent layer of many steps and the layer behind it, another plan often has their
states: a crossover of two plans finds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.search.base import States
from partita.search.simulated import Simulated

LEAST_GAIN = 1e-6
"""Relative gain of a change, at least."""


def cross(
    problem: Simulated,
    start: Sequence[int],
    others: Sequence[Sequence[int]],
    budget: float,
    steps: int,
) -> States:
    """States from `start` on, with those of other plans before or after an operator.

    One-point crossovers (Holland, Adaptation in Natural and Artificial Systems, 1975) at operators
    in equal distances, so that about `steps` are simulated. `budget`: bytes of a device, at most.
    """
    best = np.array(start, np.int64)
    seconds = problem.seconds(best)
    distance = max(1, -(-2 * len(others) * len(best) // max(1, steps)))
    for other in others:
        states = np.array(other, np.int64)
        for cut in range(distance, len(best), distance):
            for crossed in (
                np.concatenate([best[:cut], states[cut:]]),
                np.concatenate([states[:cut], best[cut:]]),
            ):
                if (crossed == best).all():
                    continue
                changed = problem.seconds(crossed)
                if changed < seconds * (1 - LEAST_GAIN) and problem.memory_bytes(crossed) <= budget:
                    best, seconds = crossed, changed
    return tuple(best.tolist())


def descend(problem: Simulated, start: Sequence[int], budget: float, steps: int) -> States:
    """States from `start` on, until no change is faster or `steps` were simulated.

    `budget`: bytes of a device, at most; `start` has no more.
    """
    states = np.array(start, np.int64)
    seconds = problem.seconds(states)
    members = [np.flatnonzero(problem.kinds == kind) for kind in range(problem.kinds.max() + 1)]
    is_faster = True
    while is_faster:
        is_faster = False
        for operators in members:
            for state in range(int(problem.states[operators[0]])):
                before = states[operators]
                if (before == state).all():
                    continue
                if steps == 0:
                    return tuple(states.tolist())
                steps -= 1
                states[operators] = state
                changed = problem.seconds(states)
                if changed < seconds * (1 - LEAST_GAIN) and problem.memory_bytes(states) <= budget:
                    seconds = changed
                    is_faster = True
                else:
                    states[operators] = before
    return tuple(states.tolist())

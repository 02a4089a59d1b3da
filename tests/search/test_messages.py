"""Messages bound every plan, never drop the best one, and move cost without changing any sum."""

import itertools

import numpy as np
import pytest
from brute_force import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.search.base import Ends, Problem
from partita.search.messages import Messages
from partita.search.minima import least_of


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    states = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 6)))]
    seconds = [rng.random(n) for n in states]
    tables: dict[Ends, np.ndarray] = {}
    for u, v in itertools.combinations(range(len(states)), 2):
        if rng.random() < 0.6:
            tables[u, v] = rng.random((states[u], states[v]))
    return Problem.of(seconds, [np.zeros(n) for n in states], tables)


@given(problems(), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_the_bound_holds_and_the_best_states_remain(problem: Problem, sweeps: int) -> None:
    messages = Messages(problem)
    costs = np.concatenate(problem.seconds)
    best = brute_force(problem)
    bound = messages.sweep(costs, sweeps)
    assert bound <= best.seconds + 1e-9 <= problem.cost(messages.states(costs)) + 2e-9
    possible = messages.possible(costs, best.seconds - bound + 1e-9)
    assert all(i in states for i, states in zip(best.states, possible, strict=True))


@given(problems(), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_moved_costs_have_the_same_sums_and_their_least_entries_are_the_bound(
    problem: Problem, sweeps: int
) -> None:
    messages = Messages(problem)
    costs = np.concatenate(problem.seconds)
    bound = messages.sweep(costs, sweeps)
    moved = messages.reparametrized(costs, [np.arange(len(s)) for s in problem.seconds])
    assignments = itertools.product(*(range(len(s)) for s in problem.seconds))
    for states in itertools.islice(assignments, 50):
        assert moved.cost(states) == pytest.approx(problem.cost(states))
    minima = [s.min() for s in moved.seconds] + [t.min() for t in moved.tables.values()]
    assert sum(minima) == pytest.approx(bound)


def test_a_tree_is_solved_in_one_sweep() -> None:
    rng = np.random.default_rng(1)
    problem = Problem.of(
        seconds=[rng.random(5) for _ in range(6)],
        nbytes=[np.zeros(5) for _ in range(6)],
        tables={(v - 1, v): rng.random((5, 5)) for v in range(1, 6)},
    )
    bound = Messages(problem).sweep(np.concatenate(problem.seconds))
    assert bound == pytest.approx(brute_force(problem).seconds)


@given(st.lists(st.floats(allow_nan=False), max_size=9))
@settings(deadline=None)
def test_the_least_of_an_array_is_its_minimum(values: list[float]) -> None:
    assert least_of(np.array(values, float)) == min(values, default=np.inf)

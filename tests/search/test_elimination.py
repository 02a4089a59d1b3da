"""Elimination is exact: it equals exhaustive search on random networks, with and without a memory budget, and proves a bound."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.search.base import Problem
from partita.search.elimination import eliminate
from partita.search.exhaustive import exhaust
from partita.search.reduce import reduce


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 6))
    states = [draw(st.integers(1, 4)) for _ in range(count)]
    problem = Problem(
        [rng.integers(0, 20, n).astype(float) for n in states],
        [rng.integers(1, 9, n).astype(float) for n in states],
    )
    for u in range(count):
        for v in range(u + 1, count):
            if rng.random() < 0.5:
                problem.add_table(u, v, rng.integers(0, 20, (states[u], states[v])).astype(float))
    return problem


@given(problems())
@settings(max_examples=150, deadline=None)
def test_elimination_equals_exhaustive_search(problem: Problem) -> None:
    exact, brute = eliminate(problem), exhaust(problem)
    assert exact.seconds == pytest.approx(brute.seconds)
    assert exact.bound == pytest.approx(brute.seconds)
    assert problem.cost(exact.states) == pytest.approx(exact.seconds)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_merging_states_keeps_the_optimum(problem: Problem) -> None:
    reduced = reduce(problem)
    result = eliminate(reduced.problem)
    assert problem.cost(reduced.lift(result.states)) == pytest.approx(exhaust(problem).seconds)


@given(problems(), st.floats(0.3, 1.0))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_kept_and_the_bound_holds(problem: Problem, share: float) -> None:
    budget = share * sum(float(b.max()) for b in problem.nbytes)
    result, brute = eliminate(problem, budget), exhaust(problem, budget)
    if brute.feasible:
        assert result.feasible, "the smallest plan fits, so one is found"
        assert result.nbytes <= budget
        assert result.bound <= brute.seconds + 1e-9 <= result.seconds + 2e-9
    else:
        assert not result.feasible


def test_a_chain_worked_by_hand() -> None:
    """Two operators of two states: alone 1 + 1 is best, but changing over costs 5, so both stay in state 1 at 2 + 1."""
    problem = Problem([np.array([1.0, 2.0]), np.array([4.0, 1.0])], [np.zeros(2), np.zeros(2)])
    problem.add_table(0, 1, np.array([[0.0, 5.0], [5.0, 0.0]]))
    result = eliminate(problem)
    assert (result.states, result.seconds, result.gap) == ((1, 1), 3.0, 0.0)


def test_a_table_may_be_given_either_way_round() -> None:
    table = np.array([[1.0, 2.0], [3.0, 4.0]])
    left = Problem([np.zeros(2)] * 2, [np.zeros(2)] * 2)
    right = Problem([np.zeros(2)] * 2, [np.zeros(2)] * 2)
    left.add_table(0, 1, table)
    right.add_table(1, 0, table.T)
    assert np.array_equal(left.tables[0, 1], right.tables[0, 1])


def test_an_interrupt_gives_the_best_so_far() -> None:
    rng = np.random.default_rng(0)
    problem = Problem([rng.random(3) for _ in range(4)], [rng.random(3) for _ in range(4)])

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    result = eliminate(problem, 1.0, interrupt)
    assert result.stopped
    assert len(result.states) == 4

"""Elimination equals exhaustive search on random networks, with and without a memory budget."""

import numpy as np
import pytest
from brute_force import brute_force
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.search.base import Ends, Problem
from partita.search.elimination import PricedProblem, eliminate
from partita.search.reduce import reduce


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 6))
    states = [draw(st.integers(1, 4)) for _ in range(count)]
    seconds = [rng.integers(0, 20, n).astype(float) for n in states]
    nbytes = [rng.integers(1, 9, n).astype(float) for n in states]
    tables: dict[Ends, np.ndarray] = {}
    for u in range(count):
        for v in range(u + 1, count):
            if rng.random() < 0.5:
                tables[u, v] = rng.integers(0, 20, (states[u], states[v])).astype(float)
    return Problem.of(seconds, nbytes, tables)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_elimination_equals_exhaustive_search(problem: Problem) -> None:
    exact = eliminate(problem)
    brute = brute_force(problem)
    assert exact.seconds == pytest.approx(brute.seconds)
    assert exact.bound == pytest.approx(brute.seconds)
    assert problem.cost(exact.states) == pytest.approx(exact.seconds)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_reduction_keeps_the_optimum(problem: Problem) -> None:
    reduced = reduce(problem)
    states = reduced.lift(eliminate(reduced.problem).states)
    assert problem.cost(states) == pytest.approx(brute_force(problem).seconds)


@given(problems(), st.floats(0.3, 1.0))
@settings(max_examples=150, deadline=None)
def test_a_budget_is_respected_and_the_bound_holds(problem: Problem, share: float) -> None:
    budget = share * sum(float(nbytes.max()) for nbytes in problem.nbytes)
    result = eliminate(problem, budget)
    brute = brute_force(problem, budget)
    if brute.feasible:
        assert result.feasible, "the smallest plan fits, so the search returns a plan"
        assert result.nbytes <= budget
        assert result.bound <= brute.seconds + 1e-9 <= result.seconds + 2e-9
    else:
        assert not result.feasible


def test_no_price_is_searched_where_no_plan_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    prices = []

    def solve(self: PricedProblem, price: float) -> tuple[tuple[int, ...], float]:
        prices.append(price)
        return original(self, price)

    original = PricedProblem.solve
    monkeypatch.setattr(PricedProblem, "solve", solve)
    seconds = [np.array([3.0, 2.0, 1.0])] * 4
    nbytes = [np.array([5.0, 5.0, 6.0])] * 4
    result = eliminate(Problem.of(seconds, nbytes, {}), budget=19.0)
    assert (result.feasible, result.states, result.nbytes) == (False, (1, 1, 1, 1), 20.0)
    assert len(prices) == 1


def test_a_chain_worked_by_hand() -> None:
    """Two operators of two states: 1 + 1 is best alone, but different states cost 5 in between.

    Both therefore stay in state 1, at 2 + 1.
    """
    problem = Problem.of(
        seconds=[np.array([1.0, 2.0]), np.array([4.0, 1.0])],
        nbytes=[np.zeros(2), np.zeros(2)],
        tables={(0, 1): np.array([[0.0, 5.0], [5.0, 0.0]])},
    )
    result = eliminate(problem)
    assert (result.states, result.seconds, result.gap) == ((1, 1), 3.0, 0.0)


def test_a_table_may_be_given_either_way_round() -> None:
    table = np.array([[1.0, 2.0], [3.0, 4.0]])
    zeros = [np.zeros(2)] * 2
    left = Problem.of(zeros, zeros, {(0, 1): table})
    right = Problem.of(zeros, zeros, {(1, 0): table.T})
    assert np.array_equal(left.tables[0, 1], right.tables[0, 1])
    assert left == right


def test_tables_of_both_ways_round_add_up() -> None:
    table = np.array([[1.0, 2.0], [3.0, 4.0]])
    zeros = [np.zeros(2)] * 2
    both = Problem.of(zeros, zeros, {(0, 1): table, (1, 0): table})
    assert both.tables.keys() == {(0, 1)}
    assert np.array_equal(both.tables[0, 1], table + table.T)


def test_an_interrupt_gives_the_best_so_far() -> None:
    rng = np.random.default_rng(0)
    seconds = [rng.random(3) for _ in range(4)]
    problem = Problem.of(seconds, [rng.random(3) for _ in range(4)])

    def interrupt(progress: object) -> None:
        raise KeyboardInterrupt

    result = eliminate(problem, 1.0, interrupt)
    assert result.stopped
    assert len(result.states) == 4


def test_bytes_that_are_left_are_filled_with_parts_that_change_together() -> None:
    """Six equal pairs: no price of a byte takes some and not others, nor does a single change."""
    slow, fast = 0, 1
    apart = np.array([[0.0, 9.0], [9.0, 0.0]])
    pairs = 6
    seconds = [np.array([2.0, 1.0])] * 2 * pairs
    nbytes = [np.array([1.0, 10.0])] * 2 * pairs
    tables = {(2 * n, 2 * n + 1): apart for n in range(pairs)}
    budget = 4 * 10.0 + 8 * 1.0 + 5
    result = eliminate(Problem.of(seconds, nbytes, tables), budget)
    assert sorted(result.states) == [slow] * 8 + [fast] * 4
    assert result.seconds == 4 * 1.0 + 8 * 2.0

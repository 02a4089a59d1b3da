"""Messages bound every plan, never drop the best one, and move cost without changing any sum."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.search.base import Problem
from partita.search.exhaustive import exhaust
from partita.search.messages import Messages


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    states = [draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 6)))]
    problem = Problem([rng.random(n) for n in states], [np.zeros(n) for n in states])
    for u, v in itertools.combinations(range(len(states)), 2):
        if rng.random() < 0.6:
            problem.add_table(u, v, rng.random((states[u], states[v])))
    return problem


@given(problems(), st.integers(1, 20))
@settings(max_examples=150, deadline=None)
def test_the_bound_holds_and_the_best_states_are_kept(problem: Problem, sweeps: int) -> None:
    messages, own, best = Messages(problem), np.concatenate(problem.seconds), exhaust(problem)
    bound = messages.sweep(own, sweeps)
    assert bound <= best.seconds + 1e-9 <= problem.cost(messages.states(own)) + 2e-9
    kept = messages.kept(own, best.seconds - bound + 1e-9)
    assert all(i in states for i, states in zip(best.states, kept, strict=True))


@given(problems(), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_moved_costs_have_the_same_sums_and_their_least_entries_are_the_bound(
    problem: Problem, sweeps: int
) -> None:
    messages, own = Messages(problem), np.concatenate(problem.seconds)
    bound = messages.sweep(own, sweeps)
    moved = messages.moved(own, [np.arange(len(s)) for s in problem.seconds])
    for states in itertools.islice(
        itertools.product(*(range(len(s)) for s in problem.seconds)), 50
    ):
        assert moved.cost(states) == pytest.approx(problem.cost(states))
    least = sum(s.min() for s in moved.seconds) + sum(t.min() for t in moved.tables.values())
    assert least == pytest.approx(bound)


def test_a_tree_is_solved_in_one_sweep() -> None:
    rng = np.random.default_rng(1)
    problem = Problem([rng.random(5) for _ in range(6)], [np.zeros(5) for _ in range(6)])
    for v in range(1, 6):
        problem.add_table(v - 1, v, rng.random((5, 5)))
    messages, own = Messages(problem), np.concatenate(problem.seconds)
    assert messages.sweep(own) == pytest.approx(exhaust(problem).seconds)

"""Folding: a plan of the folded network costs and holds what it does in the whole one, and blocks that are equal are one."""

from pathlib import Path

import numpy as np
import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.search.base import Problem
from partita.search.elimination import eliminate
from partita.search.find import mesh_of
from partita.search.fold import fold
from partita.search.network import build

DATA = Path(__file__).parents[1] / "data"


def chain(length: int, states: int = 3, seed: int = 0) -> Problem:
    """Equal variables in a row, each beside the next by the same table: the first and the last have one neighbour."""
    rng = np.random.default_rng(seed)
    seconds, nbytes, table = rng.random(states), rng.random(states), rng.random((states, states))
    return Problem(
        [seconds] * length, [nbytes] * length, {(v, v + 1): table for v in range(length - 1)}
    )


def test_a_long_chain_is_its_ends_and_one_in_the_middle() -> None:
    for length in (6, 20, 100):
        folded = fold(chain(length))
        assert folded.problem.size == 5  # two from either end see it
        assert list(folded.of) == [0, 1, *[2] * (length - 4), 3, 4]


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "chain"])
def test_what_is_chosen_costs_and_holds_the_same_in_the_whole_network(name: str) -> None:
    if name == "chain":
        problem = chain(12)
    else:
        machine = load("h100:8")
        problem = build(
            OperatorGraph.load(DATA / f"{name}.graph.json"), machine, mesh_of(machine)
        ).problem
    folded, rng = fold(problem), np.random.default_rng(1)
    assert folded.problem.size <= problem.size
    for _ in range(20):
        states = [int(rng.integers(len(s))) for s in folded.problem.seconds]
        whole = folded.lift(states)
        assert folded.problem.cost(states) == pytest.approx(problem.cost(whole), rel=1e-12)
        assert folded.problem.memory_bytes(states) == pytest.approx(
            problem.memory_bytes(whole), rel=1e-12
        )
    assert eliminate(folded.problem).seconds >= eliminate(problem).bound * (1 - 1e-12)


def test_equal_numbers_that_stand_apart_are_not_one() -> None:
    problem = chain(3)
    problem.seconds[1] = problem.seconds[1].copy()  # what is equal is the same array
    assert fold(problem).problem.size == 3

"""A folded plan has the seconds and bytes of the whole one, and equal blocks become one."""

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
    """Equal variables in a row, tied by equal tables; the first and the last have one neighbour."""
    rng = np.random.default_rng(seed)
    seconds = rng.random(states)
    nbytes = rng.random(states)
    table = rng.random((states, states))
    return Problem.of(
        [seconds.copy() for _ in range(length)],
        [nbytes.copy() for _ in range(length)],
        {(v, v + 1): table.copy() for v in range(length - 1)},
    )


def test_a_long_chain_is_its_ends_and_one_in_the_middle() -> None:
    for length in (6, 20, 100):
        folded = fold(chain(length))
        assert folded.problem.size == 5  # two from either end see it
        assert list(folded.representative) == [0, 1, *[2] * (length - 4), 3, 4]


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "chain"])
def test_folded_states_have_the_cost_and_memory_of_the_whole_network(name: str) -> None:
    if name == "chain":
        problem = chain(12)
    else:
        machine = load("h100:8")
        graph = OperatorGraph.load(DATA / f"{name}.graph.json")
        problem = build(graph, machine, mesh_of(machine)).problem
    folded = fold(problem)
    rng = np.random.default_rng(1)
    assert folded.problem.size <= problem.size
    for _ in range(20):
        states = [int(rng.integers(len(s))) for s in folded.problem.seconds]
        whole = folded.lift(states)
        assert folded.problem.cost(states) == pytest.approx(problem.cost(whole), rel=1e-12)
        folded_bytes = folded.problem.memory_bytes(states)
        assert folded_bytes == pytest.approx(problem.memory_bytes(whole), rel=1e-12)
    assert eliminate(folded.problem).seconds >= eliminate(problem).bound * (1 - 1e-12)


def test_variables_that_differ_in_one_number_are_not_folded() -> None:
    whole = chain(20)
    seconds = [*whole.seconds]
    seconds[10] = seconds[10] + np.array([0.0, 0.0, 1e-15])
    assert fold(Problem.of(seconds, whole.nbytes, whole.tables)).problem.size > 5

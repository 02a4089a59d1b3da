"""Equal operators and tables are equal by value: a copy of a network takes the same work."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.search.base import Problem
from partita.search.elimination import eliminate
from partita.search.find import mesh_of
from partita.search.fold import fold
from partita.search.messages import Messages
from partita.search.network import CostNetwork, build
from partita.search.portfolio import SEARCHES, Limits, SearchSpace
from partita.search.reduce import reduce
from partita.search.simulated import relaxed, simulated

DATA = Path(__file__).parents[1] / "data"


def rebuilt(problem: Problem) -> Problem:
    """The problem of arrays that nothing shares; kinds read off their content."""
    return Problem.of(
        [seconds.copy() for seconds in problem.seconds],
        [nbytes.copy() for nbytes in problem.nbytes],
        {ends: table.copy() for ends, table in problem.tables.items()},
    )


def separate(problem: Problem) -> Problem:
    """The problem of arrays that nothing shares, with its kinds."""
    whole = rebuilt(problem)
    return Problem(whole.seconds, whole.nbytes, whole.tables, problem.kinds, problem.table_kinds)


def pickled(problem: Problem) -> Problem:
    return pickle.loads(pickle.dumps(problem))


@pytest.fixture(scope="module")
def network() -> CostNetwork:
    """A transformer, which has equal operators."""
    machine = load("h100:8")
    graph = OperatorGraph.load(DATA / "transformer.graph.json")
    mesh = mesh_of(machine)
    baselines = [make(graph, machine.name, mesh) for make in BASELINES.values()]
    return build(graph, machine, mesh, baselines)


def work(problem: Problem) -> tuple[int, ...]:
    """Sizes that the time of a search follows from."""
    reduced = reduce(problem).problem
    return (
        len(set(problem.kinds)),
        len(set(problem.table_kinds.values())),
        len(set(reduced.kinds)),
        len(set(reduced.table_kinds.values())),
        sum(map(len, reduced.seconds)),
        fold(problem).problem.size,
        Messages(problem).network.data.size,
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, separate])
def test_a_copied_problem_has_the_same_result_after_the_same_work(
    network: CostNetwork, copied: Callable[[Problem], Problem]
) -> None:
    problem = network.problem
    budget = 0.8 * sum(float(nbytes.max()) for nbytes in problem.nbytes)
    twin = copied(problem)
    assert twin == problem and twin is not problem
    assert work(twin) == work(problem)
    assert len(set(problem.kinds)) < problem.size
    for limit in (np.inf, budget):
        assert eliminate(twin, limit) == eliminate(problem, limit)


def test_kinds_read_off_the_content_merge_whatever_the_network_merges(
    network: CostNetwork,
) -> None:
    problem = network.problem
    twin = rebuilt(problem)
    pairs = set(zip(problem.kinds, twin.kinds, strict=True))
    assert len(pairs) == len(set(problem.kinds)), "a kind of the network is one by content"
    assert all(size <= whole for size, whole in zip(work(twin), work(problem), strict=True))
    assert eliminate(twin) == eliminate(problem)


def test_a_copied_network_searches_the_same(network: CostNetwork) -> None:
    twin = copy.deepcopy(network)
    assert simulated(twin) == simulated(network)
    assert relaxed(twin) == relaxed(network)
    make = BASELINES["data parallel"]
    plan = make(network.graph, network.placement.machine.name, network.placement.mesh)
    states = network.states_of(plan)
    assert states is not None and twin.states_of(plan) == states
    limits = Limits(seed=1)
    results = [
        SEARCHES["portfolio"](SearchSpace(each, [states]), limits) for each in (network, twin)
    ]
    assert results[0] == results[1]


def test_problems_are_equal_by_content() -> None:
    seconds = [np.array([1.0, 2.0]), np.array([3.0, 4.0])]
    zeros = [np.zeros(2)] * 2
    problem = Problem.of(seconds, zeros, {(0, 1): np.eye(2)})
    assert problem == Problem.of([s.copy() for s in seconds], zeros, {(0, 1): np.eye(2)})
    assert problem != Problem.of(seconds, zeros, {(0, 1): np.eye(2) + 1})
    assert problem != Problem.of(seconds, zeros)
    assert problem != "a problem"

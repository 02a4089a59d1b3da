"""Walks on the simulator: what they evaluate is what is simulated, they find proved optima, and
the same seed finds the same plan.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.search.elimination import eliminate
from partita.search.find import find, mesh_of
from partita.search.mcmc import run_chains
from partita.search.network import CostNetwork, build
from partita.search.portfolio import MIN_GAIN
from partita.search.simulated import relaxed, simulated
from partita.simulation.simulate import simulate

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def machine(overlap: float = 0.5, name: str = "h100:4") -> Machine:
    whole = load(name)
    return replace(whole, backend=replace(whole.backend, overlap=overlap))


def network(graph: OperatorGraph, where: Machine) -> CostNetwork:
    mesh = mesh_of(where)
    return build(graph, where, mesh, [make(graph, where.name, mesh) for make in BASELINES.values()])


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_states_cost_what_their_plan_is_simulated_to_take(
    graph: OperatorGraph, overlap: float
) -> None:
    where = machine(overlap)
    net = network(graph, where)
    problem, rng = simulated(net), np.random.default_rng(0)
    for _ in range(10):
        states = [int(rng.integers(len(s))) for s in net.states]
        assert problem.seconds(states) == pytest.approx(
            simulate(graph, where, net.plan(states)).seconds, rel=1e-9
        )
        assert problem.memory_bytes(states) == pytest.approx(net.problem.memory_bytes(states))
        if overlap == 0:
            assert problem.seconds(states) == pytest.approx(net.problem.cost(states), rel=1e-9)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_bound_is_below_what_any_states_are_simulated_to_take(graph: OperatorGraph) -> None:
    net = network(graph, machine())
    problem, below, rng = simulated(net), relaxed(net), np.random.default_rng(1)
    least = eliminate(below).bound
    for _ in range(200):
        states = [int(rng.integers(len(s))) for s in net.states]
        assert least <= below.cost(states) * (1 + 1e-12) <= problem.seconds(states) * (1 + 1e-9)


def test_a_walk_finds_the_optimum_that_trying_everything_proves_with_any_seed() -> None:
    graph, where = GRAPHS["mlp"], machine(0.5, "k80-cluster:1").with_devices(2)
    net = network(graph, where)
    problem = simulated(net)
    assert 100 < np.prod(problem.states) < 100_000
    best = min(problem.seconds(states) for states in product(*map(range, problem.states)))
    worst = [int(np.argmax(s)) for s in net.problem.seconds]
    for seed in range(10):
        found, proposals = run_chains(problem, [worst], seconds=np.inf, seed=seed, proposals=20_000)
        assert found.seconds == pytest.approx(best, rel=1e-12) and proposals == 20_000


def test_the_same_seed_makes_the_same_plan_and_bytes_are_a_constraint() -> None:
    net = network(GRAPHS["transformer"], machine(0.5, "dgx-h100:2"))
    problem = simulated(net)
    smallest = tuple(int(np.argmin(b)) for b in net.problem.nbytes)
    budget = 1.2 * problem.memory_bytes(smallest)
    first, again, other = (
        run_chains(problem, [smallest], budget, seconds=np.inf, seed=s, proposals=20_000)[0]
        for s in (3, 3, 4)
    )
    assert (
        first == again
        and first.seconds < problem.seconds(smallest)
        and other.states != first.states
    )
    for found in (first, other):
        assert problem.memory_bytes(found.states) <= budget and found.seconds == problem.seconds(
            found.states
        )


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_plan_found_is_never_slower_than_the_exact_one_or_a_baseline_and_says_how_good_it_is(
    graph: OperatorGraph,
) -> None:
    where = machine(0.5, "dgx-h100:2")
    found = find(graph, where)
    exact = eliminate(found.network.problem).states
    plain, *others = (
        simulate(graph, where, plan).seconds
        for plan in (found.network.plan(exact), *(p for p, _ in found.baselines.values()))
    )
    assert (
        found.bound_seconds * (1 - 1e-12)
        <= found.prediction.seconds
        <= min(plain, *others) * (1 + MIN_GAIN)
    )
    assert found.plan.choices == found.network.plan(
        exact
    ).choices or found.prediction.seconds < plain / (1 + MIN_GAIN)
    assert found.prediction.seconds == pytest.approx(
        simulate(graph, where, found.plan).seconds, rel=1e-12
    )
    assert found.plan.predicted["seconds"] == found.prediction.seconds
    walked = [p.best for p in found.history if p.step == "simulated"]
    assert walked == sorted(walked, reverse=True)

"""Searches behind one form: the proof equals enumeration, and every bound holds."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.search.exhaustive import prove
from partita.search.find import find, mesh_of
from partita.search.network import build
from partita.search.portfolio import SEARCHES, Limits, SearchSpace
from partita.search.simulated import relaxed

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def space(name: str, machine_name: str, devices: int, overlap: float = 0.5) -> SearchSpace:
    machine = load(machine_name).with_devices(devices)
    machine = replace(machine, backend=replace(machine.backend, overlap=overlap))
    graph = GRAPHS[name]
    mesh = mesh_of(machine)
    plans = [make(graph, machine.name, mesh) for make in BASELINES.values()]
    network = build(graph, machine, mesh, plans)
    states = [network.states_of(plan) for plan in plans]
    return SearchSpace(network, [each for each in states if each is not None])


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_the_proof_equals_enumeration_from_any_start(overlap: float, share: float) -> None:
    small = space("mlp", "k80-cluster", 2, overlap)
    problem = small.simulated
    assignments = list(product(*map(range, problem.states)))
    nbytes = {states: problem.memory_bytes(states) for states in assignments}
    seconds = {states: problem.seconds(states) for states in assignments}
    smallest, largest = min(nbytes.values()), max(nbytes.values())
    budget = smallest + share * (largest - smallest)
    fitting = [states for states in assignments if nbytes[states] <= budget]
    best = min(seconds[states] for states in fitting)
    lightest_start = min(assignments, key=nbytes.__getitem__)
    fastest_start = min(fitting, key=seconds.__getitem__)
    for start in (lightest_start, fastest_start):
        proof = prove(problem, relaxed(small.network), start, budget)
        assert proof.seconds == proof.bound == pytest.approx(best, rel=1e-12)
        assert not proof.stopped
        assert problem.seconds(proof.states) == proof.seconds
        assert problem.memory_bytes(proof.states) <= budget


@pytest.mark.parametrize("name", GRAPHS)
def test_every_bound_holds_and_the_proof_is_below_all_results(name: str) -> None:
    whole = space(name, "p100-cluster", 4)
    results = {}
    for search, run in SEARCHES.items():
        if search != "exhaustive" or name == "mlp":
            results[search] = run(whole, Limits(seed=1))
    best = min(result.seconds for result in results.values())
    for search, result in results.items():
        assert result.bound <= best * (1 + 1e-12), search
        assert result.seconds == pytest.approx(whole.simulated.seconds(result.states)), search
    assert results["portfolio"].seconds <= best * 1.01
    if "exhaustive" in results:
        assert results["exhaustive"].seconds == best
        assert results["exhaustive"].gap == 0


def test_a_proof_without_enough_choices_is_stopped_and_no_worse_than_its_start() -> None:
    whole = space("transformer", "p100-cluster", 4)
    start = [int(np.argmin(nbytes)) for nbytes in whole.network.problem.nbytes]
    proof = prove(whole.simulated, relaxed(whole.network), start, nodes=1000)
    assert proof.stopped
    assert proof.seconds <= whole.simulated.seconds(start)
    assert proof.bound < proof.seconds


def test_an_unknown_search_and_a_short_time_limit_are_refused() -> None:
    with pytest.raises(
        PlanError,
        match="There is no search 'best': use 'portfolio', 'elimination', 'mcmc', 'exhaustive'",
    ):
        find(GRAPHS["mlp"], load("h100:4"), search="best")
    with pytest.raises(
        PlanError,
        match="too short to find one plan of '.*' on h100:4: its costs alone took .*"
        "Use at least --seconds",
    ):
        find(GRAPHS["mlp"], load("h100:4"), seconds=1e-9)

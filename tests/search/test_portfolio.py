"""Searches behind one form: the proof equals trying everything, every bound holds, and what
cannot be searched is said.
"""

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


def space(name: str, machine: str, devices: int, overlap: float = 0.5) -> SearchSpace:
    where = load(machine).with_devices(devices)
    where = replace(where, backend=replace(where.backend, overlap=overlap))
    mesh, graph = mesh_of(where), GRAPHS[name]
    network = build(
        graph, where, mesh, [make(graph, where.name, mesh) for make in BASELINES.values()]
    )
    states = [network.states_of(make(graph, where.name, mesh)) for make in BASELINES.values()]
    return SearchSpace(network, [s for s in states if s is not None])


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
def test_the_proof_equals_trying_everything_from_any_start(overlap: float, share: float) -> None:
    small = space("mlp", "k80-cluster", 2, overlap)
    problem = small.simulated
    everything = [
        (problem.seconds(s), problem.memory_bytes(s), s)
        for s in product(*map(range, problem.states))
    ]
    least, most = min(held for _, held, _ in everything), max(held for _, held, _ in everything)
    budget = least + share * (most - least)
    best = min(seconds for seconds, held, _ in everything if held <= budget)
    for start in (
        min(everything, key=lambda e: e[1])[2],
        min(e for e in everything if e[1] <= budget)[2],
    ):
        found = prove(problem, relaxed(small.network), start, budget)
        assert found.seconds == found.bound == pytest.approx(best, rel=1e-12) and not found.stopped
        assert (
            problem.seconds(found.states) == found.seconds
            and problem.memory_bytes(found.states) <= budget
        )


@pytest.mark.parametrize("name", GRAPHS)
def test_every_search_states_a_bound_that_holds_and_the_proof_is_below_them_all(name: str) -> None:
    whole = space(name, "p100-cluster", 4)
    found = {
        search: run(whole, Limits(seed=1))
        for search, run in SEARCHES.items()
        if search != "exhaustive" or name == "mlp"
    }
    best = min(result.seconds for result in found.values())
    for search, result in found.items():
        assert result.bound <= best * (1 + 1e-12), search
        assert result.seconds == pytest.approx(whole.simulated.seconds(result.states)), search
    assert found["portfolio"].seconds <= best * 1.01
    if "exhaustive" in found:
        assert found["exhaustive"].seconds == best and found["exhaustive"].gap == 0


def test_a_proof_that_runs_out_says_so_and_keeps_its_start() -> None:
    whole = space("transformer", "p100-cluster", 4)
    start = [int(np.argmin(b)) for b in whole.network.problem.nbytes]
    found = prove(whole.simulated, relaxed(whole.network), start, nodes=1000)
    assert (
        found.stopped
        and found.seconds <= whole.simulated.seconds(start)
        and found.bound < found.seconds
    )


def test_what_cannot_be_searched_is_said_in_a_sentence() -> None:
    with pytest.raises(
        PlanError,
        match="There is no search 'best': use 'portfolio', 'elimination', 'mcmc', 'exhaustive'",
    ):
        find(GRAPHS["mlp"], load("h100:4"), search="best")
    with pytest.raises(
        PlanError,
        match="too short to find one plan of '.*' on h100:4: its costs alone took .*Use at least --seconds",
    ):
        find(GRAPHS["mlp"], load("h100:4"), seconds=1e-9)

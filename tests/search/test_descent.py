"""The descent over equal operators: never slower, within memory, deterministic, and used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.search import portfolio as portfolio_module
from partita.search.descent import cross, descend
from partita.search.find import mesh_of
from partita.search.network import build
from partita.search.portfolio import Limits, SearchSpace, portfolio
from partita.search.simulated import relaxed, simulated, weighted

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "transformer")}


def space(name: str) -> SearchSpace:
    machine = load("dgx-h100:1").with_devices(4)
    return SearchSpace(build(GRAPHS[name], machine, mesh_of(machine)), [])


@pytest.mark.parametrize("name", GRAPHS)
def test_no_state_of_all_equal_operators_is_faster_within_the_budget(name: str) -> None:
    problem = simulated(space(name).network)
    start = [0] * len(problem.states)
    budget = 0.7 * problem.memory_bytes(start)
    while problem.memory_bytes(start) > budget:
        start = [int(n) for n in np.random.default_rng(len(start)).integers(problem.states)]
        budget *= 1.1
    states = descend(problem, start, budget, 1 << 20)
    seconds = problem.seconds(states)
    assert seconds <= problem.seconds(start) and problem.memory_bytes(states) <= budget
    assert states == descend(problem, start, budget, 1 << 20)
    for kind in set(problem.kinds.tolist()):
        operators = np.flatnonzero(problem.kinds == kind)
        for state in range(int(problem.states[operators[0]])):
            changed = np.array(states)
            changed[operators] = state
            is_faster = problem.seconds(changed) < seconds * (1 - 1e-6)
            assert not is_faster or problem.memory_bytes(changed) > budget


@pytest.mark.parametrize("steps", [1 << 20, 12])
def test_a_crossover_puts_the_halves_of_two_plans_together(steps: int) -> None:
    network = space("transformer")
    problem = network.simulated
    exact, _ = network.exact(Limits())
    best = np.array(exact.states)
    half = len(best) // 2
    whole = np.zeros_like(best)
    start = np.concatenate([best[:half], whole[half:]])
    other = np.concatenate([whole[:half], best[half:]])
    states = cross(problem, start, [other], np.inf, steps)
    assert problem.seconds(states) < min(problem.seconds(start), problem.seconds(other))
    if steps > 12:
        assert problem.seconds(states) <= exact.seconds * (1 + 1e-9)
    assert cross(problem, start, [other], 0.0, steps) == tuple(start.tolist())


def test_no_steps_change_nothing() -> None:
    problem = simulated(space("mlp").network)
    start = tuple([0] * len(problem.states))
    assert descend(problem, start, np.inf, 0) == start


def test_large_networks_descend_before_their_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfolio_module, "SMALL", 0)
    monkeypatch.setattr(portfolio_module, "MIN_PROPOSALS", 1)
    monkeypatch.setattr(portfolio_module, "PROPOSALS", 1)
    monkeypatch.setattr(portfolio_module, "MIN_GAIN", 0.0)
    large = space("transformer")
    with_descent = portfolio(large, Limits()).seconds
    monkeypatch.setattr(portfolio_module, "is_large", lambda _: False)
    without = portfolio(space("transformer"), Limits()).seconds
    assert with_descent <= without
    assert large.simulated.seconds(
        descend(large.simulated, portfolio(large, Limits()).states, np.inf, 1 << 20)
    ) >= with_descent * (1 - 1e-3)


def test_ctrl_c_in_a_descent_takes_the_exact_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(portfolio_module, "is_large", lambda _: True)
    monkeypatch.setattr(portfolio_module, "descend", interrupted)
    small = space("mlp")
    result = portfolio(small, Limits())
    assert result.stopped and result.states == small.exact(Limits())[0].states


def test_moves_count_between_their_delay_and_all_of_their_time() -> None:
    network = space("transformer").network
    least, all_of_them = relaxed(network), weighted(network, 1.0)
    between = weighted(network, 0.75)
    for ends, table in between.tables.items():
        assert np.allclose(table, 0.75 * all_of_them.tables[ends])
    for one, other in zip(least.seconds, between.seconds, strict=True):
        assert (one <= other + 1e-12).all()
    assert replace(between).kinds == least.kinds

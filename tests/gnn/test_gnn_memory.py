"""Memory plans: the dynamic programme finds the least, no cache does better, and training under a plan gives the numbers of training without."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn import models
from partita.gnn.memory import Action, MemoryPlan, Operator, Work, lru, planned


def network(sizes: list[int], seconds: list[float | None]) -> Work:
    """Layers forward and backward: x0 to xn, then dn to d1; sizes of x0 to xn, seconds to run each layer again."""
    n = len(sizes) - 1
    forward = [Operator(f"f{i}", (f"x{i}",), (f"x{i + 1}",), seconds=seconds[i]) for i in range(n)]
    back = [Operator(f"b{i}", (f"x{i}", f"d{i + 1}"), (f"d{i}",) if i else ()) for i in reversed(range(n))]
    loss = Operator("loss", (f"x{n}",), (f"d{n}",))
    return Work((*forward, loss, *back), {f"{k}{i}": s for i, s in enumerate(sizes) for k in ("xd" if i else "x")})


def least(work: Work, budget: int, bandwidth: float) -> float:
    """The least cost, by going over all states again and again until no cost falls; nothing is left out and nothing dropped for free."""
    costs = {(0, frozenset(), work.given()): 0.0}
    while True:
        before = dict(costs)
        for (done, device, host), cost in before.items():

            def reach(state: Any, price: float, cost: float = cost) -> None:
                costs[state] = min(costs.get(state, float("inf")), cost + price)

            for i, o in enumerate(work.operators[: done + 1]):
                after = device | set(o.writes)
                price = 0.0 if i == done else None if o.seconds is None else o.seconds * bandwidth
                if price is not None and device >= set(o.reads) and work.size(after) + o.scratch <= budget:
                    reach((max(done, i + 1), after, host), price)
            for t in work.bytes:
                if t in device:
                    reach((done, device - {t}, host), 0.0)
                    reach((done, device, host | {t}), 0.0 if t in host else work.bytes[t])
                elif t in host and work.size(device | {t}) <= budget:
                    reach((done, device | {t}, host), work.bytes[t])
        if costs == before:
            return min(cost for (done, _, _), cost in costs.items() if done == len(work.operators))


def keeps_to(work: Work, plan: MemoryPlan, budget: int) -> int:
    """Bytes moved by a plan that is followed; fails where it reads what is not there or holds more than the budget."""
    operators = {o.name: o for o in work.operators}
    device: set[str] = set()
    host, moved = set(work.given()), 0
    for action in plan.actions:
        if action.what == "load":
            assert action.name in host
            device.add(action.name)
            moved += work.bytes[action.name]
        elif action.what == "save":
            assert action.name in device
            host.add(action.name)
            moved += work.bytes[action.name]
        elif action.what == "drop":
            device.remove(action.name)
        else:
            o = operators[action.name]
            assert device >= set(o.reads)
            device |= set(o.writes)
            assert work.fixed + work.size(frozenset(device)) + o.scratch <= budget
        assert work.fixed + work.size(frozenset(device)) <= budget
    assert [a.name for a in plan.actions if a.what == "run"] == [o.name for o in work.operators]
    return moved


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_plans_cost_the_least_and_a_cache_no_less(data: Any) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))
    seconds = data.draw(st.lists(st.none() | st.integers(0, 4).map(float), min_size=2, max_size=2))
    work = network(sizes, seconds)
    budget = work.least() + data.draw(st.integers(0, 5))
    plan, cache = planned(work, budget, 1.0), lru(work, budget)
    assert plan.exact and plan.cost == least(work, budget, 1.0)
    assert plan.cost <= cache.cost == cache.traffic == keeps_to(work, cache, budget)
    assert plan.traffic == keeps_to(work, plan, budget)


def test_what_fits_is_loaded_once_and_what_is_cheap_is_run_again() -> None:
    work = network([2, 4, 4, 4], [0.5, None, None])
    assert planned(work, work.need(), 1.0).traffic == 2
    plan = planned(work, work.least(), 1.0)
    assert Action("again", "f0") in plan.actions and (plan.traffic, plan.cost) == (6, 6.5)  # x0 three times, f0 again
    assert planned(network([2, 4, 4, 4], [None] * 3), 12, 1.0).cost == 12  # x1 saved and loaded, x0 twice


def test_a_budget_below_the_least_is_refused() -> None:
    work = network([2, 4, 4], [None, None])
    with pytest.raises(GraphError, match='the largest operator alone needs 12 bytes; give memory="12 B" or more'):
        planned(work, 11, 1.0)


def drawn(vertices: int = 500, edges: int = 900) -> gnn.Graph:
    random = np.random.default_rng(0)
    sources, targets = random.integers(0, vertices, (2, edges))
    return gnn.Graph.from_edges(
        sources, targets, vertices, features=random.standard_normal((vertices, 9)),
        labels=random.integers(0, 3, vertices), train=np.arange(200), validation=np.arange(200, 300),
    )  # fmt: skip


def trained(make: Callable[..., Any], graph: gnn.Graph, **how: Any) -> tuple[Any, dict[str, list[float]]]:
    keras.utils.set_random_seed(0)
    model = make(hidden=8, classes=3, layers=3, l2=0.01)
    model.compile(keras.optimizers.Adam(0.05), metrics=["accuracy"])
    return model, model.fit(graph, epochs=3, verbose=0, **how).history


@pytest.mark.parametrize("name", models.MODELS)
def test_training_within_the_least_memory_gives_the_same_numbers(name: str) -> None:
    graph = drawn()
    alone, history = trained(models.MODELS[name], graph)
    with pytest.raises(GraphError, match="give memory=") as refused:
        trained(models.MODELS[name], graph, memory=1)
    least = int(str(refused.value).split('memory="')[1].split(" B")[0])
    model, found = trained(models.MODELS[name], graph, memory=least)
    for what, values in history.items():
        np.testing.assert_allclose(found[what], values, rtol=1e-4, atol=1e-6, err_msg=what)
    for a, b in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    for mask in ("train", "validation"):
        np.testing.assert_allclose(model.evaluate(graph, mask), alone.evaluate(graph, mask), rtol=1e-3, atol=1e-5)
    within = model.memory
    assert within.moved == within.plan.traffic == keeps_to(within.work, within.plan, least)
    assert within.plan.exact and within.plan.traffic <= within.lru.traffic


def test_a_model_with_a_call_of_its_own_is_refused() -> None:
    class Mine(models.GCN):
        def call(self, x: Any, graph: Any, training: bool = False) -> Any:
            return 2 * super().call(x, graph, training)

    with pytest.raises(GraphError, match="Mine has a call of its own, and a memory plan runs a model's stages"):
        trained(Mine, drawn(), memory="1GiB")


def test_several_devices_are_refused() -> None:
    with pytest.raises(GraphError, match="A memory plan is of one device, and here are 2"):
        trained(models.GCN, drawn(), memory="1GiB", devices=2)

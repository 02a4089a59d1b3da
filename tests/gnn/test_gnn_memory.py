"""Memory plans.

The search gives the cheapest plan, no cache is cheaper, and training under a plan gives the numbers
of training without.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn.nn import models
from partita.gnn.spill import hosts, operators
from partita.gnn.spill import plan as memory
from partita.gnn.spill.plan import (
    Action,
    LayerOperator,
    MemoryPlan,
    StepWork,
    lru_plan,
    plan_memory,
    traffic_bound,
)


def network(sizes: list[int], seconds: list[float | None]) -> StepWork:
    """Layers forward and backward: x0 to xn, then dn to d1.

    `sizes` of x0 to xn, `seconds` of rematerializing each layer.
    """
    n = len(sizes) - 1
    forward = [
        LayerOperator(f"f{i}", (f"x{i}",), (f"x{i + 1}",), seconds=seconds[i], family=f"f{i}")
        for i in range(n)
    ]
    back = [
        LayerOperator(f"b{i}", (f"x{i}", f"d{i + 1}"), (f"d{i}",) if i else ())
        for i in reversed(range(n))
    ]
    loss = LayerOperator("loss", (f"x{n}",), (f"d{n}",))
    return StepWork(
        (*forward, loss, *back),
        {f"{k}{i}": s for i, s in enumerate(sizes) for k in ("xd" if i else "x")},
    )


def tiled(layers: int, cuts: int) -> StepWork:
    """Layers of an aggregation, by columns, and a product, by rows, forward and backward.

    Tables have `cuts` by `cuts` tiles of one byte.
    """
    rows = lambda t, k: tuple(f"{t}[{k},{c}]" for c in range(cuts))
    columns = lambda t, k: tuple(f"{t}[{r},{k}]" for r in range(cuts))
    operators: list[LayerOperator] = []
    for i in range(layers):
        operators += [
            LayerOperator(f"sum {i} {k}", columns(f"x{i}", k), columns(f"s{i}", k), 2 * cuts)
            for k in range(cuts)
        ]
        operators += [
            LayerOperator(f"product {i} {k}", rows(f"s{i}", k), rows(f"x{i + 1}", k), cuts)
            for k in range(cuts)
        ]
    operators += [
        LayerOperator(f"loss {k}", rows(f"x{layers}", k), rows(f"d{layers}", k), cuts)
        for k in range(cuts)
    ]
    for i in reversed(range(layers)):
        back = range(cuts - 1, -1, -1)
        operators += [
            LayerOperator(
                f"slope {i} {k}",
                rows(f"s{i}", k) + rows(f"d{i + 1}", k),
                rows(f"e{i}", k) if i else (),
                cuts,
            )
            for k in back
        ]
        operators += [
            LayerOperator(f"spread {i} {k}", columns(f"e{i}", k), columns(f"d{i}", k), 2 * cuts)
            for k in back
            if i
        ]
    return StepWork(tuple(operators), {t: 1 for o in operators for t in o.reads + o.writes})


def lowest_cost(work: StepWork, budget: int, bandwidth: float) -> float:
    """The lowest cost, by relaxing all states until no cost falls, without any shortcut."""
    costs = {(0, frozenset(), work.inputs()): 0.0}
    while True:
        before = dict(costs)
        for (done, device, host), cost in before.items():

            def reach(state: Any, price: float, cost: float = cost) -> None:
                costs[state] = min(costs.get(state, float("inf")), cost + price)

            for i, o in enumerate(work.operators[: done + 1]):
                after = device | set(o.writes)
                price = 0.0 if i == done else None if o.seconds is None else o.seconds * bandwidth
                if (
                    price is not None
                    and device >= set(o.reads)
                    and work.size(after) + o.scratch <= budget
                ):
                    reach((max(done, i + 1), after, host), price)
            for t in work.bytes:
                if t in device:
                    reach((done, device - {t}, host), 0.0)
                    reach((done, device, host | {t}), 0.0 if t in host else work.bytes[t])
                elif t in host and work.size(device | {t}) <= budget:
                    reach((done, device | {t}, host), work.bytes[t])
        if costs == before:
            return min(cost for (done, _, _), cost in costs.items() if done == len(work.operators))


def keeps_to(work: StepWork, plan: MemoryPlan, budget: int) -> int:
    """Bytes moved by a plan; fails if it reads a missing tensor or exceeds the budget."""
    operators = {o.name: o for o in work.operators}
    device: set[str] = set()
    host, moved = set(work.inputs()), 0
    for action in plan.actions:
        if action.kind == "load":
            assert action.name in host
            device.add(action.name)
            moved += work.bytes[action.name]
        elif action.kind == "save":
            assert action.name in device
            host.add(action.name)
            moved += work.bytes[action.name]
        elif action.kind == "drop":
            device.remove(action.name)
        else:
            o = operators[action.name]
            assert device >= set(o.reads)
            device |= set(o.writes)
            assert work.fixed + work.size(frozenset(device)) + o.scratch <= budget
        assert work.fixed + work.size(frozenset(device)) <= budget
    assert [a.name for a in plan.actions if a.kind == "run"] == [o.name for o in work.operators]
    return moved


def drawn_network(data: Any, layers: int) -> tuple[StepWork, int]:
    """Work of so many layers, and a budget that it can be done in."""
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=layers + 1, max_size=layers + 1))
    seconds = data.draw(
        st.lists(st.none() | st.integers(0, 4).map(float), min_size=layers, max_size=layers)
    )
    work = network(sizes, seconds)
    return work, work.smallest_budget() + data.draw(st.integers(0, 5))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_plans_cost_the_least_and_a_cache_no_less(data: Any) -> None:
    work, budget = drawn_network(data, 2)
    plan, cache = plan_memory(work, budget, 1.0), lru_plan(work, budget)
    assert plan.exact and plan.cost == lowest_cost(work, budget, 1.0)
    assert plan.cost <= cache.cost == cache.traffic == keeps_to(work, cache, budget)
    assert plan.traffic == keeps_to(work, plan, budget)
    once = replace(work, operators=tuple(replace(o, seconds=None) for o in work.operators))
    assert (
        work.size(once.inputs() & once.alive(0))
        <= traffic_bound(once, budget)
        <= plan_memory(once, budget, 1.0).traffic + 1e-6
    )


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_plans_too_large_to_search_keep_to_the_budget_and_say_so(data: Any) -> None:
    work, budget = drawn_network(data, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SMALL", 0)
        plan = plan_memory(work, budget, 1.0)
    best = plan_memory(work, budget, 1.0)
    assert best.exact and best.cost <= plan.cost <= lru_plan(work, budget).cost
    assert plan.traffic == keeps_to(work, plan, budget)
    assert not plan.exact or plan.cost == best.cost


def test_in_a_quarter_of_the_need_tiles_move_half_as_often_again_in_a_cache() -> None:
    work = tiled(layers=3, cuts=12)
    budget = work.need() // 4
    plan, cache = plan_memory(work, budget, 1.0), lru_plan(work, budget)
    assert plan.traffic == keeps_to(work, plan, budget) and cache.traffic == keeps_to(
        work, cache, budget
    )
    assert cache.traffic > 1.5 * plan.traffic and not plan.exact
    assert plan.traffic < 1.01 * traffic_bound(work, budget)


def test_what_fits_is_loaded_once_and_what_is_cheap_is_run_again() -> None:
    work = network([2, 4, 4, 4], [0.5, None, None])
    assert plan_memory(work, work.need(), 1.0).traffic == 2
    plan = plan_memory(work, work.smallest_budget(), 1.0)
    assert Action("rematerialize", "f0") in plan.actions and (plan.traffic, plan.cost) == (
        6,
        6.5,
    )  # x0 three times, f0 again
    assert (
        plan_memory(network([2, 4, 4, 4], [None] * 3), 12, 1.0).cost == 12
    )  # x1 saved and loaded, x0 twice


def test_a_budget_below_the_least_is_refused() -> None:
    work = network([2, 4, 4], [None, None])
    with pytest.raises(
        GraphError, match='the largest operator alone needs 12 bytes. Use memory="12 B" or more'
    ):
        plan_memory(work, 11, 1.0)


def drawn(vertices: int = 500, edges: int = 900, weights: bool = False) -> gnn.Graph:
    random = np.random.default_rng(0)
    sources, targets = random.integers(0, vertices, (2, edges))
    return gnn.Graph.from_edges(
        sources,
        targets,
        vertices,
        features=random.standard_normal((vertices, 9)),
        labels=random.integers(0, 3, vertices),
        train=np.arange(200),
        validation=np.arange(200, 300),
        weights=random.random(edges) if weights else None,
    )


def trained(
    make: Callable[..., Any], graph: gnn.Graph, **how: Any
) -> tuple[Any, dict[str, list[float]]]:
    keras.utils.set_random_seed(0)
    model = make(hidden=8, classes=3, layers=3, l2=0.01)
    model.compile(keras.optimizers.Adam(0.05), metrics=["accuracy"])
    return model, model.fit(graph, epochs=3, verbose=0, **how).history


@pytest.fixture(autouse=True)
def few_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 6 ranges of rows and 3 of columns: fewer programs compile sooner."""
    monkeypatch.setattr(operators, "FINENESS", (1, 3))


def same(make: Callable[..., Any], graph: gnn.Graph, budget: int, **how: Any) -> Any:
    """A model trained within a budget, which gives the numbers of training without."""
    alone, history = trained(make, graph)
    model, planned_history = trained(make, graph, memory=budget, **how)
    for name, values in history.items():
        np.testing.assert_allclose(
            planned_history[name], values, rtol=1e-4, atol=1e-6, err_msg=name
        )
    for a, b in zip(model.get_weights(), alone.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-4)
    for mask in ("train", "validation"):
        np.testing.assert_allclose(
            model.evaluate(graph, mask), alone.evaluate(graph, mask), rtol=1e-3, atol=1e-5
        )
    np.testing.assert_allclose(
        model.predict(graph, [7, 0]), alone.predict(graph, [7, 0]), rtol=1e-3, atol=1e-4
    )
    within = model.memory
    assert within.moved == within.plan.traffic == keeps_to(within.work, within.plan, budget)
    assert within.plan.traffic <= within.lru.traffic
    return model


MODELS = {name: models.MODELS[name] for name in ("gcn", "gatv2", "gatedgraph")} | {
    "sage-max": lambda **named: models.SAGE(aggregation="max", **named)
}
"""One of each kind of piece: a weighted sum, attention, steps, a maximum beside the own row."""


@pytest.mark.parametrize("name", MODELS)
def test_training_within_the_least_memory_gives_the_same_numbers(name: str) -> None:
    graph = drawn(weights=name in ("gcn", "gatedgraph"), vertices=500 if name == "gcn" else 480)
    model = same(MODELS[name], graph, 100_000 if name == "gcn" else 130_000)
    assert model.memory.facts()["need"] > model.memory.budget
    assert len(model.memory.work.operators) > 30


def test_an_accelerator_saves_to_memory_of_the_host_that_it_reads_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A CPU has this kind of memory too, though it uses it only here."""
    cpu = jax.devices()[0]
    assert isinstance(hosts.host_of(cpu), hosts.FileHost)
    host = hosts.host_of(
        SimpleNamespace(platform="gpu", addressable_memories=cpu.addressable_memories)
    )  # type: ignore[arg-type]
    monkeypatch.setattr(hosts, "host_of", lambda device: host)
    model = same(models.MODELS["gatedgraph"], drawn(), 130_000, order="degree")
    assert isinstance(host, hosts.PinnedHost) and model.memory.host is host
    saved = {a.name for a in model.memory.plan.actions if a.kind == "save"}
    assert saved and saved <= set(host.arrays)
    assert {kept.sharding.memory_kind for kept in host.arrays.values()} == {"pinned_host"}


class Penalty(keras.layers.Layer):
    """The rows themselves, with a penalty that is not a sum over ranges of rows."""

    def call(self, x: Any, graph: Any) -> Any:
        self.add_loss(graph.vertex_mean(x**2).max())
        return x


class Mixed(models.GCN):
    """A stage of one's own in the middle, and penalties of its rows and of the features."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.penalties = [Penalty(), Penalty()]

    def stages(self) -> Any:
        first, second, last = super().stages()
        of_features, of_rows = self.penalties

        def middle(x: Any, graph: Any, training: bool) -> Any:
            return of_rows(2 * second(x, graph, training), graph=graph)

        return [lambda x, graph, training: of_features(x, graph=graph), first, middle, last]

    def call(self, x: Any, graph: Any, training: bool = False) -> Any:
        for stage in self.stages():
            x = stage(x, graph, training)
        return x


@pytest.mark.parametrize(
    "make",
    [Mixed, lambda **named: models.GCN(activation=lambda y: y / (1 + abs(y).max()), **named)],
)
def test_stages_that_cannot_be_cut_are_whole(make: Callable[..., Any]) -> None:
    graph = drawn()
    model = same(make, graph, 160_000)
    whole = {o.name for o in model.memory.work.operators if o.family and "[" not in o.name}
    assert {"forward 4", "backward 4"} <= whole if make is Mixed else len(whole) > 3


def test_arrays_on_the_device_keep_to_the_budget() -> None:
    """As JAX itself counts them, with every copy, while a step runs."""
    graph = drawn(3000, 3000)
    budget = 600_000
    peak = 0

    class Watched(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            within, load = self.model.memory, self.model.memory._loaded

            def loaded(*given: Any) -> Any:
                nonlocal peak
                tile = load(*given)
                peak = max(peak, sum(a.nbytes for a in jax.live_arrays()) - before)
                return tile

            within._loaded = loaded

    gc.collect()  # of models of other tests
    before = sum(a.nbytes for a in jax.live_arrays())
    model, _ = trained(models.SAGE, graph, memory=budget, callbacks=[Watched()])
    assert model.memory.facts()["need"] > budget >= peak > budget // 2, peak


def test_a_compiler_that_does_not_say_what_it_needs_is_not_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    model, _ = trained(models.GCN, drawn(), memory="1MiB")
    assert all(o.scratch > 0 for o in model.memory.work.operators if o.reads)


def test_a_plan_is_used_again_for_an_equal_graph() -> None:
    graph = drawn()
    model, _ = trained(models.GCN, graph, memory="1MiB")
    plan = model.memory
    model.fit(replace(drawn(), name="equal"), verbose=0, memory=2**20)
    model.evaluate(drawn(), "train")
    assert model.memory is plan and model.parts is None
    model.compile(keras.optimizers.SGD(0.01), metrics=["accuracy"])
    model.evaluate(graph, "train")
    assert model.memory is not plan and model.memory.budget == plan.budget
    plan = model.memory
    graph.labels[:] = 0
    model.fit(graph, verbose=0, memory="1MiB")
    assert model.memory is not plan
    assert model.evaluate(graph, "train")[1] == pytest.approx(
        np.mean(model.predict(graph).argmax(axis=1)[:200] == 0)
    )
    model.fit(graph, verbose=0)
    assert model.memory is None


def test_a_layer_in_two_stages_is_refused() -> None:
    class Twice(models.GCN):
        def stages(self) -> Any:
            first, second, last = super().stages()
            return [first, second, second, last]

    with pytest.raises(
        GraphError,
        match="Stages 1 and 2 both change seed_generator.*give each stage layers of its own",
    ):
        trained(Twice, drawn(), memory="1GiB")


def test_a_model_with_a_call_of_its_own_is_refused() -> None:
    class Mine(models.GCN):
        def call(self, x: Any, graph: Any, training: bool = False) -> Any:
            return 2 * super().call(x, graph, training)

    with pytest.raises(
        GraphError, match="Mine has a call of its own, and a memory plan runs a model's stages"
    ):
        trained(Mine, drawn(), memory="1GiB")


def test_a_regularizer_of_results_reads_the_rows_of_all_vertices() -> None:
    graph = drawn(300, 400)
    options = {"dropout": 0.0, "layer_options": {"activity_regularizer": "l2"}}
    make = lambda **given: models.GCN(**given | options | {"layers": 1})
    model, history = trained(make, graph)
    within, planned = trained(make, graph, memory="1MiB")
    np.testing.assert_allclose(planned["loss"], history["loss"], rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.0))
    rows = model.predict(graph)
    weights = model.get_weights()[0]
    train = graph.train
    likelihood = keras.losses.sparse_categorical_crossentropy(graph.labels[train], rows[train])
    penalty = 0.01 * (rows**2).sum() / graph.vertices  # as Keras, by the number of rows
    loss = float(np.mean(likelihood)) + penalty + 0.005 * (weights**2).sum()
    assert model.fit(graph, verbose=0).history["loss"][0] == pytest.approx(loss, rel=1e-4)
    with pytest.raises(GraphError, match="penalizes the rows of each device"):
        trained(make, graph, devices=2)


@pytest.mark.parametrize("devices", [1, 2])
def test_weights_of_vertices_within_memory_count_in_training_alone(devices: int) -> None:
    graph = drawn()
    weights = {"class_weight": {0: 3.0}, "vertex_weight": np.linspace(0.5, 2, 500)}
    results = []
    for limit in (None, "1MiB"):
        keras.utils.set_random_seed(0)
        model = gnn.GCN(8, graph.classes)
        model.compile("adam", metrics=["accuracy"])
        done = model.fit(graph, 2, verbose=0, devices=devices, memory=limit, **weights)
        logs = [*done.history.values(), model.evaluate(graph, "train")]
        results.append((np.concatenate(logs), model.predict(graph)))
    for free, limited in zip(*results, strict=True):
        np.testing.assert_allclose(limited, free, rtol=1e-5, atol=1e-6)


def test_parts_within_memory_give_the_numbers_of_one_device() -> None:
    """Dropout, penalties, exchanged rows and padding included, by any part of each vertex."""
    graph = drawn(weights=True)
    parts = np.random.default_rng(1).integers(0, 2, graph.vertices)
    two_layers = lambda **options: models.GCN(**options | {"layers": 2})
    model = same(two_layers, graph, 80_000, devices=2, partition=parts)
    assert len(model.memory.work.operators) > 20 and model.traffic(graph) > 0
    assert model.memory.moved >= 4 * 9 * graph.vertices / 2  # the features of a device


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"partition": "learned"}, "partition='learned' cannot be combined with memory.*'edges'"),
        ({"columns": 2}, "columns=2 cannot be combined with memory.*Remove columns"),
    ],
)
def test_splits_that_move_or_cut_features_are_refused(how: dict[str, Any], text: str) -> None:
    with pytest.raises(GraphError, match=text):
        trained(models.GCN, drawn(), memory="1GiB", devices=2, **how)

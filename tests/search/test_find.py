"""Plans of saved graphs, without JAX: no baseline is faster, they fit, and they are proved best."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.cost.memory import argument_bytes
from partita.cost.predict import predict
from partita.errors import MemoryBudgetError
from partita.graph.check import check as check_graph
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, host, load
from partita.plans.adapt import fit_plan
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.layout import layout_of
from partita.plans.plan import Mesh
from partita.search.alternatives import alternatives
from partita.search.baselines import Baselines
from partita.search.candidates import REPLICATE, candidates, names_of
from partita.search.find import PlanResult, bound_of_all_plans, find, mesh_of
from partita.search.network import build
from partita.search.portfolio import SearchSpace, without_idle_splits
from partita.simulation.simulate import predicted

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def eight() -> Machine:
    return host(8, 8 << 30)


@pytest.fixture(scope="module", params=GRAPHS)
def found(request: pytest.FixtureRequest) -> PlanResult:
    return find(GRAPHS[request.param], eight())


def test_a_saved_graph_is_sound_and_loads_as_it_was(tmp_path: Path) -> None:
    for graph in GRAPHS.values():
        check_graph(graph)
        graph.save(tmp_path / "again.json")
        assert OperatorGraph.load(tmp_path / "again.json") == graph


def test_the_found_plan_is_never_worse_than_a_baseline(found: PlanResult) -> None:
    assert set(found.baselines) == set(BASELINES) - {"tensor parallel with sequence"}
    for name, (_, prediction) in found.baselines.items():
        assert found.prediction.seconds <= prediction.seconds * (1 + 1e-12), name


def test_a_baseline_whose_variables_exceed_memory_does_not_fit_without_its_peak(
    found: PlanResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    baselines = found.baselines
    for plan, prediction in baselines.values():
        parts = prediction.memory
        variables = parts.parameters + parts.optimizer + parts.state + parts.batch
        layout = layout_of(baselines.network.graph, plan)
        assert argument_bytes(baselines.network.graph, plan.mesh, layout) == variables
    fresh = Baselines(baselines.network, baselines.plans)
    monkeypatch.setattr(Baselines, "peak_bytes", None)
    assert not fresh.fits("data parallel", variables // 8, hopeless=np.inf)


def test_the_bound_is_below_every_plan_and_met_by_the_found_one(found: PlanResult) -> None:
    assert found.bound_seconds <= found.prediction.seconds * (1 + 1e-9)
    assert found.gap == pytest.approx(0, abs=1e-9)


def test_what_is_predicted_is_what_was_minimised(found: PlanResult) -> None:
    for name, (plan, prediction) in found.baselines.items():
        states = found.network.states_of(plan)
        assert states is not None, name
        assert found.network.problem.cost(states) == pytest.approx(prediction.seconds, rel=1e-9), (
            name
        )


def test_found_and_baseline_plans_fit_their_graph(found: PlanResult) -> None:
    check(found.plan, found.network.graph)
    for plan, _ in found.baselines.values():
        check(plan, found.network.graph)


def test_no_other_choice_for_one_layer_is_faster(found: PlanResult) -> None:
    every = alternatives(found.baselines.space, found.plan)
    assert len(every) == len(found.network.graph.operators) and any(every)
    assert all(seconds >= -1e-12 for others in every for _, _, seconds, _ in others)


def test_an_alternative_costs_the_difference_of_two_steps() -> None:
    graph, machine = GRAPHS["cnn"], load("h100:8")
    result = find(graph, machine)
    plan, prediction = result.baselines["data parallel"]
    for o, others in enumerate(alternatives(result.baselines.space, plan, limit=2)):
        for choice, storage, added_seconds, _ in others:
            if storage:
                continue
            name = graph.operators[o].name
            other = predicted(graph, machine, replace(plan, choices={**plan.choices, name: choice}))
            difference = other.seconds - prediction.seconds
            assert added_seconds == pytest.approx(difference, rel=1e-6, abs=1e-12)


def test_less_memory_never_makes_a_plan_faster_and_too_little_is_refused() -> None:
    graph = GRAPHS["cnn"]
    free = find(graph, eight())
    tight = find(graph, host(8, int(8 * free.prediction.peak_bytes * 0.9)))
    assert tight.prediction.peak_bytes <= 0.9 * free.prediction.peak_bytes
    assert tight.prediction.seconds >= free.prediction.seconds
    with pytest.raises(
        MemoryBudgetError,
        match="'cnn' with batch 32 fits host:8 under no plan: the smallest needs .* per device",
    ):
        find(graph, host(8, 8 << 10))


def test_one_device_can_be_the_answer_and_says_why() -> None:
    slow = eight()
    slow = slow.revised(
        {"level.process.bandwidth": 1e3, "level.process.latency": 1.0},
        "a link that nobody would use",
    )
    result = find(GRAPHS["mlp"], slow)
    assert result.plan.mesh == Mesh(())
    assert "one of 8 devices is used: splitting does not pay" in result.plan.notes[0]


def test_a_number_of_devices_that_divides_no_size_is_named() -> None:
    result = find(GRAPHS["mlp"], host(11, 8 << 30))
    assert result.plan.notes[0] == (
        "one of 11 devices is used: no size that a plan could split (batch 32, channels, units) is a "
        "multiple of a prime factor of 11"
    )


def test_a_split_that_saves_less_than_rounding_leaves_one_device() -> None:
    figures = {"device.overhead": 1e6, "level.process.bandwidth": 1e30, "level.process.latency": 0}
    result = find(GRAPHS["mlp"], eight().revised(figures, "launches alone take time"))
    assert result.plan.mesh == Mesh(())
    assert "one of 8 devices is used" in result.plan.notes[0]


def test_operators_stay_whole_where_a_split_saves_neither_time_nor_memory() -> None:
    network = build(GRAPHS["mlp"], eight(), mesh_of(eight()))
    states = tuple(len(costs) - 1 for costs in network.problem.seconds)
    whole = tuple(network.whole(o, state) for o, state in enumerate(states))
    free = replace(
        network.problem,
        seconds=[np.zeros_like(costs) for costs in network.problem.seconds],
        nbytes=[np.zeros_like(nbytes) for nbytes in network.problem.nbytes],
        tables={ends: np.zeros_like(table) for ends, table in network.problem.tables.items()},
    )
    space = SearchSpace(replace(network, problem=free), [])
    assert states != whole == without_idle_splits(space, states)
    for costs in ("seconds", "nbytes"):
        first = np.zeros_like(free.seconds[0])
        first[whole[0]] = 1.0
        dear = replace(free, **{costs: [first, *getattr(free, costs)[1:]]})
        space = SearchSpace(replace(network, problem=dear), [])
        assert without_idle_splits(space, states) == (states[0], *whole[1:])


def test_more_bandwidth_never_hurts() -> None:
    times = []
    for bandwidth in (1e8, 1e9, 1e10):
        machine = eight().revised({"level.process.bandwidth": bandwidth}, "varied")
        times.append(find(GRAPHS["transformer"], machine).prediction.seconds)
    assert times == sorted(times, reverse=True)


def test_a_plan_of_one_device_has_no_communication() -> None:
    machine = host(1, 1 << 30)
    result = find(GRAPHS["cnn"], machine)
    assert result.prediction.traffic == {}
    assert all(not choice for choice in result.plan.choices.values())


def test_large_machines_keep_the_space_small_and_prove_their_plan() -> None:
    machine = load("dgx-h100:8")
    graph = replace(GRAPHS["transformer"])
    mesh = mesh_of(machine)
    assert max(len(candidates(graph, o, mesh)) for o in range(len(graph.operators))) <= 260
    result = find(graph, machine)
    assert result.gap < 0.05


def test_a_bound_holds_for_plans_that_portions_of_axes_leave_out() -> None:
    machine = load("dgx-h100:8")
    graph = GRAPHS["transformer"]
    mesh = mesh_of(machine)
    network = build(graph, machine, mesh, limit=20)
    assert not network.deals_singly
    start = BASELINES["data parallel"](graph, machine.name, mesh)
    bound_seconds = bound_of_all_plans(network, 1e9)
    draw = random.Random(0)
    for _ in range(10):
        choices = {}
        for operator in graph.operators:
            choice = [draw.choice([*operator.factors, REPLICATE]) for _ in mesh.axes]
            choices[operator.name] = names_of(graph, mesh, tuple(choice))
        plan = fit_plan(replace(start, choices=choices), graph)
        assert network.states_of(plan) is None
        assert predicted(graph, machine, plan).seconds >= bound_seconds
    assert bound_of_all_plans(replace(network, deals_singly=True), 1e9) == 1e9


def test_every_degree_of_tensor_parallelism_in_a_node_is_a_candidate() -> None:
    graph = GRAPHS["transformer"]
    mesh = mesh_of(load("dgx-h100:512"))
    number, operator = next((n, o) for n, o in enumerate(graph.operators) if o.kind == "dot")
    columns = next(f for f in operator.factors if graph.factors[f].kind == "P")
    degrees = {choice[-3:].count(columns) for choice in candidates(graph, number, mesh)}
    assert {0, 1, 2} <= degrees


def test_data_parallel_halves_per_device_work_worked_by_hand() -> None:
    """Twice the devices compute half the FLOPs of a split operator each."""
    graph, one, two = GRAPHS["mlp"], host(1, 1 << 30), host(2, 1 << 30)
    alone = predict(graph, one, BASELINES["data parallel"](graph, one.name, mesh_of(one)))
    pair = predict(graph, two, BASELINES["data parallel"](graph, two.name, mesh_of(two)))
    assert (
        alone.by_cause()["compute"] / 2 < pair.by_cause()["compute"] < alone.by_cause()["compute"]
    )
    gradient_bytes = 4 * (64 * 256 + 256 + 256 * 256 + 256 + 256 * 16 + 16)
    assert pair.traffic["all_reduce"] == pytest.approx(gradient_bytes, rel=0.01)


def test_equal_blocks_are_costed_once() -> None:
    graph = GRAPHS["transformer"]
    network = build(graph, eight(), mesh_of(eight()))
    keys = {terms.key(graph, o) for o, terms in enumerate(network.terms.operators)}
    assert len(keys) < len(graph.operators)

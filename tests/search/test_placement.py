"""Placement: forks of graphs, and placed plans that are simulated, fit, and are faster."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from partita.cost.terms import Terms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.pipeline import stage_axes
from partita.plans.plan import Plan
from partita.search import placement
from partita.search.bound import lower_bound_seconds
from partita.search.branches import branches
from partita.search.find import find, find_placed, mesh_of
from partita.search.optional import BestStep
from partita.search.placement import at, placements
from partita.search.portfolio import MIN_GAIN, Limits
from partita.simulation.base import SimulatedStep
from partita.simulation.placed import PlacedStep
from partita.simulation.simulate import predicted

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def inception() -> OperatorGraph:
    """An Inception block of four branches, with one sample: only placement can use several
    devices.
    """
    import keras

    import partita
    from partita.capture.program import capture_program

    conv = lambda name, filters, size, x: keras.layers.Conv2D(
        filters, size, padding="same", activation="relu", name=name
    )(x)
    with partita.abstract():
        x = keras.Input((17, 17, 64))
        one = conv("one", 64, 1, x)
        three = conv("three_b", 64, 3, conv("three_a", 48, 1, x))
        five = conv("five_b", 64, 5, conv("five_a", 48, 1, x))
        pool = conv("pool_b", 64, 1, keras.layers.AveragePooling2D(3, 1, "same", name="pool_a")(x))
        both = keras.layers.GlobalAveragePooling2D()(
            keras.layers.Concatenate()([one, three, five, pool])
        )
        model = keras.Model(x, keras.layers.Dense(7, name="out")(both))
    model.compile("sgd", "mse")
    return capture_program(model, 1).graph


def place(
    graph: OperatorGraph,
    machine: Machine,
    start: Plan,
    terms: Terms,
    limit_seconds: float,
    fits: Callable[[PlacedStep], bool],
) -> SimulatedStep | None:
    """The fastest placement of a search."""
    best = BestStep()
    best.follow(placements(graph, machine, start, terms, Limits(), limit_seconds, fits))
    return best.step


def slow_to_start(machine: Machine) -> Machine:
    """The machine with kernels so slow to start that Python's time to start programs is little."""
    return replace(machine, device=replace(machine.device, overhead=1e-4))


@pytest.fixture(scope="module")
def block() -> OperatorGraph:
    return inception()


def names(graph: OperatorGraph) -> list[list[set[str]]]:
    return [
        [{graph.operators[o].name for o in branch} for branch in fork] for fork in branches(graph)
    ]


def test_branches_are_what_need_not_wait_for_each_other(block: OperatorGraph) -> None:
    (fork,) = names(block)
    assert sorted(map(sorted, fork)) == [
        ["five_a", "five_b"],
        ["one"],
        ["pool_a", "pool_b"],
        ["three_a", "three_b"],
    ]
    assert names(GRAPHS["mlp"]) == names(GRAPHS["cnn"]) == []
    assert {"multi_head_attention/value"} in names(GRAPHS["transformer"])[0]


def test_branches_of_a_block_are_placed_and_faster_than_anything_split(
    block: OperatorGraph,
) -> None:
    where = slow_to_start(load("h100:4"))
    plain, found = find(block, where), find(block, where, stages=True, seconds=3)
    assert found.prediction.seconds < plain.prediction.seconds * (1 - MIN_GAIN)
    plan = check(Plan.from_json(found.plan.to_json()), block)
    assert stage_axes(plan) and predicted(block, where, plan).seconds == found.prediction.seconds
    assert found.staged_bound_seconds is not None
    assert found.staged_bound_seconds <= found.prediction.seconds
    assert "programs of their own" in found.plan.notes[-1]


def test_branches_are_placed_without_stages_in_the_space(block: OperatorGraph) -> None:
    where = slow_to_start(load("h100:4"))
    plain, found = find(block, where), find_placed(block, where)
    assert found.prediction.seconds < plain.prediction.seconds * (1 - MIN_GAIN)
    assert stage_axes(found.plan) and found.plan.microbatches == 1
    assert found.placed_bound_seconds is not None and found.staged_bound_seconds is None
    assert found.gap == pytest.approx(found.prediction.seconds / found.placed_bound_seconds - 1)
    alone = load("h100:1")
    assert find_placed(GRAPHS["mlp"], alone).plan == find(GRAPHS["mlp"], alone).plan


def test_a_step_shorter_than_the_start_of_its_programs_is_not_placed(
    block: OperatorGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlacedStep, "of", None)  # no step is simulated for it
    where = load("h100:2")
    terms = cost_terms(block, where.backend)
    start = BASELINES["one device"](block, where.name, mesh_of(where))
    seconds = predicted(block, where, start, terms).seconds
    assert place(block, where, start, terms, seconds, lambda placed: True) is None


def test_what_does_not_gain_or_does_not_fit_is_not_found(
    block: OperatorGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = slow_to_start(load("h100:2"))
    found, start = (
        cost_terms(block, where.backend),
        BASELINES["one device"](block, where.name, mesh_of(where)),
    )
    seconds = predicted(block, where, start, found).seconds
    best = place(block, where, start, found, seconds, lambda placed: True)
    assert best is not None and lower_bound_seconds(found, where, 2) <= best.seconds < seconds
    assert place(block, where, start, found, seconds, lambda placed: False) is None
    assert (
        place(block, where, start, found, lower_bound_seconds(found, where, 2), lambda placed: True)
        is None
    )
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(placement.time, "perf_counter", lambda: float(next(hours)))
    again = place(block, where, start, found, seconds, lambda placed: True)
    assert again is not None and again.plan == best.plan, "a busy machine finds another plan"


def test_a_chain_has_nothing_to_place() -> None:
    graph, where = GRAPHS["mlp"], load("h100:4")
    assert (
        place(
            graph,
            where,
            BASELINES["one device"](graph, where.name, mesh_of(where)),
            cost_terms(graph),
            float("inf"),
            lambda placed: True,
        )
        is None
    )


def test_what_is_placed_is_stored_over_other_axes() -> None:
    graph, where = GRAPHS["transformer"], load("h100:4")
    start = BASELINES["ZeRO-3"](graph, where.name, mesh_of(where))
    moved = at(start, graph, {1: 1}, (0,))
    assert moved.choices[graph.operators[1].name] == {"a": "at(1)", "b": "S"} and len(
        moved.storage
    ) < len(start.storage)
    assert check(moved, graph) and at(moved, graph, {1: None}, (0,)).choices[
        graph.operators[1].name
    ] == {"b": "S"}


def test_ctrl_c_keeps_the_best_so_far(
    block: OperatorGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = slow_to_start(load("h100:2"))
    found, start = (
        cost_terms(block, where.backend),
        BASELINES["one device"](block, where.name, mesh_of(where)),
    )

    def moved(*arguments: object) -> Plan:
        raise KeyboardInterrupt

    monkeypatch.setattr(placement, "_moved", moved)
    best = place(
        block,
        where,
        start,
        found,
        predicted(block, where, start, found).seconds,
        lambda placed: True,
    )
    assert best is not None and stage_axes(best.plan)

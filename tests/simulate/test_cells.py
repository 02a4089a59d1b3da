"""Cells: what is folded takes as long and sends as much as every device by itself, and operators live where they are pinned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cost.predict import predict
from partita.graph.graph import Graph
from partita.machine import Machine, load
from partita.plan.baselines import BASELINES
from partita.plan.plan import Plan, check
from partita.search.find import mesh_of
from partita.simulate.placed import Placed
from partita.simulate.simulate import simulate

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {name: Graph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")}


def machine(overlap: float = 0.0, name: str = "k80-cluster", devices: int = 8) -> Machine:
    whole = load(name).with_devices(devices)
    return replace(whole, backend=replace(whole.backend, overlap=overlap))


@st.composite
def plans(draw: st.DrawFn) -> tuple[Graph, Machine, Plan]:
    """A baseline of a graph on a machine, some operators pinned at some slices of some axes."""
    graph = GRAPHS[draw(st.sampled_from(["mlp", "cnn"] * 3 + ["transformer"]))]
    where = machine(draw(st.sampled_from([0.0, 0.4, 1.0])), *draw(st.sampled_from([("k80-cluster", 8), ("h100:4", 4), ("dgx-h100:2", 16)])))
    mesh = mesh_of(where)
    base = BASELINES[draw(st.sampled_from(list(BASELINES)))](graph, where.name, mesh)
    axes = draw(st.lists(st.sampled_from(mesh.axes), max_size=3, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    choices = {o: {**choice, **{a.name: f"at({rng.integers(a.size)})" for a in axes if rng.random() < 0.5}} for o, choice in base.choices.items()}
    conv = {graph.operators[n].name for n in range(len(graph.operators)) if graph.operators[n].kind == "conv"}
    choices = {o: {a: use for a, use in c.items() if use[:3] == "at(" or o not in conv} if axes else c for o, c in choices.items()}
    return graph, where, check(replace(base, choices=choices, storage={} if axes else base.storage), graph)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_folded_and_every_device_by_itself_take_as_long_and_send_as_much(case: tuple[Graph, Machine, Plan]) -> None:
    folded, unfolded = Placed.of(*case), Placed.of(*case, fold=False)
    assert unfolded.cells.count == case[2].devices
    assert folded.seconds == unfolded.seconds
    assert folded.traffic == unfolded.traffic
    assert [m.peak for m in folded.memories] == [unfolded.memories[unfolded.cells.number.reshape(-1)[d]].peak for d in _first_devices(folded)]


def _first_devices(placed: Placed) -> list[int]:
    """A device of every cell."""
    whole = placed.cells.number.reshape([s if a in placed.cells.told else 1 for a, s in enumerate(placed.plan.mesh.sizes)])
    return [int(np.flatnonzero(np.broadcast_to(whole, placed.plan.mesh.sizes).reshape(-1) == c)[0]) for c in range(placed.cells.count)]


@pytest.mark.parametrize(("graph", "overlap"), [(GRAPHS["mlp"], 0.0), (GRAPHS["mlp"], 1.0), (GRAPHS["cnn"], 0.4)])
def test_where_nothing_is_pinned_one_cell_takes_what_a_step_does(graph: Graph, overlap: float) -> None:
    where = machine(overlap)
    for make in BASELINES.values():
        plan = make(graph, where.name, mesh_of(where))
        placed = Placed.of(graph, where, plan)
        assert placed.cells.count == 1 and placed.seconds == simulate(graph, where, plan).seconds
        assert placed.prediction().memory.peak == predict(graph, where, plan).memory.peak
        assert {kind: round(sent / plan.devices) for kind, sent in placed.traffic.items()} == predict(graph, where, plan).traffic


def test_tasks_do_not_grow_with_devices() -> None:
    graph, tasks = GRAPHS["mlp"], []
    for devices in (8, 64):
        where = machine(0.5, devices=devices)
        axis = mesh_of(where).axes[-1].name
        choices = {o.name: {axis: f"at({n % 2})"} for n, o in enumerate(graph.operators)}
        tasks.append(Placed.of(graph, where, Plan(graph.name, where.name, mesh_of(where), choices)).laid.tasks.count)
    assert tasks[0] == tasks[1]

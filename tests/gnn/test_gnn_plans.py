"""Plans of full-graph training for machines that are not here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from partita import gnn  # before Keras, which it starts on JAX
from partita.cli.main import app
from partita.errors import GraphError, MachineError
from partita.gnn.fitting import check_fits, least_bytes
from partita.gnn.prepare import Split
from partita.machine import Machine, load
from partita.units import format_bytes

GRAPH = gnn.generate.blocks(600, 6000, classes=4, features=16).graph()


def compiled(kind: Any) -> Any:
    model = kind(hidden=16, classes=4, layers=2)
    model.compile("adam", metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def plans() -> gnn.GraphPlans:
    return gnn.plan(compiled(gnn.GCN), GRAPH, "h100:2")


def test_repeated_layers_exchange_rows_and_gather_none() -> None:
    planned = gnn.plan(compiled(gnn.GatedGraph), GRAPH, "h100:4", devices=4).plans[0]
    assert set(planned.timeline.traffic) == {"all_reduce", "all_to_all"}


def test_the_exchanged_rows_are_those_of_training() -> None:
    model = compiled(gnn.GCN)
    planned = gnn.plan(model, GRAPH, "h100:4", devices=4).plans[0]
    model.fit(GRAPH, devices=4, columns=1, verbose=0)
    traffic = planned.timeline.traffic
    assert set(traffic) == {"all_reduce", "all_to_all"}
    # A quarter of an all-to-all stays; messages are padded to an equal length for every device.
    trained = model.traffic(GRAPH)
    assert trained <= 3 * traffic["all_to_all"] < 1.01 * trained


def test_every_number_of_parts_is_priced_and_the_fastest_that_fits_is_best(
    plans: gnn.GraphPlans,
) -> None:
    one, two = plans.plans
    assert (one.parts, two.parts) == (1, 2) and one.needed_bytes > two.needed_bytes
    best = plans.best
    assert best is not None and best.seconds == min(one.seconds, two.seconds)
    parts = {1: "1 part", 2: "2 parts"}[best.parts]
    assert plans.sentence == f"fastest that fits: {parts}"
    html = plans._repr_html_()
    assert html.count("<tr>") == 3 and html.endswith(f"<div>{plans.sentence}</div></div>")
    assert "a step of" in best._repr_html_()


def test_a_graph_that_does_not_fit_is_named_with_both_numbers(plans: gnn.GraphPlans) -> None:
    small = tuple(replace(plan, available_bytes=2**20) for plan in plans.plans)
    none_fits = replace(plans, plans=small)
    assert none_fits.best is None
    needed = format_bytes(plans.plans[1].needed_bytes)
    assert none_fits.sentence == (
        f"'blocks' does not fit on h100:2: 2 parts need {needed} of each device, and a step may "
        "use 1.0 MiB. Use more devices, or devices with more memory."
    )


def test_more_bandwidth_never_makes_a_step_slower(plans: gnn.GraphPlans) -> None:
    machine = plans.plans[1].machine
    memories = [replace(m, bandwidth=4 * m.bandwidth) for m in machine.device.memories]
    device = replace(machine.device, memories=tuple(memories))
    faster = replace(plans.plans[1], machine=replace(machine, device=device))
    assert faster.seconds < plans.plans[1].seconds


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    gnn.save(GRAPH, tmp_path / "g.npz")
    command = ["gnn", "plan", str(tmp_path / "g.npz"), "--machine", "h100:2", "--devices", "2"]
    page = tmp_path / "step.html"
    done = CliRunner().invoke(app, [*command, "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert "fastest that fits: 2 parts" in done.stdout
    assert "conv_0" in page.read_text()
    done = CliRunner().invoke(app, [*command, "--memory", "200 kB", "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert "copying to and from the host" in done.stdout
    assert "host copies" in page.read_text()
    done = CliRunner().invoke(app, command[:3])
    assert done.exit_code and "give --machine, such as h100:8" in done.stderr


LIMIT = 200_000
"""Bytes of a device in which GCN's step over half of the graph has to copy."""


def test_a_memory_plan_is_priced_with_its_copies(plans: gnn.GraphPlans) -> None:
    limited = gnn.plan(compiled(gnn.GCN), GRAPH, "h100:2", memory=LIMIT).plans
    for plan, free in zip(limited, plans.plans, strict=True):
        assert plan.needed_bytes <= LIMIT and plan.host_bytes > 0
        link = plan.machine.host_bandwidth()
        assert plan.host_bytes / link <= plan.host_seconds <= 2 * plan.host_bytes / link + 1e-4
        assert plan.seconds >= free.seconds + plan.host_seconds
        copies = [span for span in plan.timeline.spans if span.kind == "host"]
        assert sum(span.seconds for span in copies) == pytest.approx(plan.host_seconds)
        assert {span.phase for span in copies} <= {"forward", "backward"}
        busy = plan.timeline.busy_part() * plan.seconds
        assert busy + sum(plan.timeline.idle.values()) == pytest.approx(plan.seconds)


@pytest.mark.parametrize("kind", [gnn.GCN, gnn.SAGE, gnn.GATv2])
def test_the_priced_traffic_is_near_that_of_training(kind: Any) -> None:
    graph = gnn.generate.erdos_renyi(2000, 4000, classes=4, features=32).graph()
    model = kind(hidden=32, classes=4, layers=4)
    model.compile("adam")
    model.fit(graph, verbose=0, memory="900 kB")
    facts = model.memory.facts()
    planned = gnn.plan(model, graph, "h100:1", memory="900 kB").plans[0]
    assert facts["traffic"] > 0
    assert planned.host_bytes == pytest.approx(facts["traffic"], rel=0.35)


def test_a_faster_link_to_the_host_makes_copies_faster() -> None:
    plan = gnn.plan(compiled(gnn.GCN), GRAPH, "h100:1", memory=LIMIT).plans[0]
    memories = [replace(m, bandwidth=8 * m.bandwidth) for m in plan.machine.device.memories]
    device = replace(plan.machine.device, memories=(plan.machine.device.memories[0], memories[1]))
    faster = replace(plan, machine=replace(plan.machine, device=device))
    assert faster.host_seconds < plan.host_seconds and faster.host_bytes == plan.host_bytes


def test_a_step_that_does_not_fit_has_a_memory_plan() -> None:
    small = with_memory("h100:1", 2**18)
    (plan,) = gnn.plan(compiled(gnn.GCN), GRAPH, small).plans
    assert plan.fits and plan.host_bytes > 0
    smaller = with_memory("h100:1", 2**16)
    (plan,) = gnn.plan(compiled(gnn.GCN), GRAPH, smaller).plans
    assert not plan.fits and plan.host_bytes == 0


def test_a_machine_without_a_link_to_its_host_is_refused() -> None:
    with pytest.raises(MachineError) as raised:
        gnn.plan(compiled(gnn.GCN), GRAPH, "tpu-v5e:4", devices=1, memory=LIMIT)
    assert str(raised.value) == (
        "'tpu-v5e:4' describes no link to the host: add [device.memory.host] with its capacity "
        "and bandwidth."
    )


def with_memory(name: str, nbytes: int) -> Machine:
    machine = load(name)
    main, *others = machine.device.memories
    memories = (replace(main, capacity=nbytes), *others)
    return replace(machine, device=replace(machine.device, memories=memories))


def test_a_step_that_certainly_fits_or_does_not_is_told_by_sizes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("partita.gnn.plans.plan_of", None)
    model = compiled(gnn.GCN)
    key = model._graph_trainer.checked_key(GRAPH, Split(2))
    check_fits(model, GRAPH, key, load("h100:2"))
    with pytest.raises(GraphError) as raised:
        check_fits(model, GRAPH, key, with_memory("h100:2", 2**16))
    needed = format_bytes(least_bytes(model, GRAPH, key))
    assert str(raised.value) == (
        f"Training '{model.name}' on 'blocks' needs {needed} of each device, and a step may use "
        "60.8 KiB: use more parts, such as devices=4, or use a memory plan, "
        'memory="60.8 KiB".'
    )


def test_fit_refuses_a_graph_near_the_limit_by_its_simulated_peak(
    plans: gnn.GraphPlans, monkeypatch: pytest.MonkeyPatch
) -> None:
    peak = plans.plans[0].needed_bytes
    model = compiled(gnn.GCN)
    key = model._graph_trainer.checked_key(GRAPH, Split())
    assert least_bytes(model, GRAPH, key) < peak
    small = with_memory("h100:1", peak)
    monkeypatch.setattr("partita.gnn.fitting.at_hand", lambda devices: small)
    with pytest.raises(GraphError, match=f"needs {format_bytes(peak)} of each device, and a step"):
        model.fit(GRAPH, verbose=0)
    assert model._graph_trainer.device is None
    fitting = with_memory("h100:1", 2 * peak)
    monkeypatch.setattr("partita.gnn.fitting.at_hand", lambda devices: fitting)
    model.fit(GRAPH, verbose=0)


def test_wide_rows_between_narrow_aggregations_are_counted() -> None:
    model = gnn.GCN(hidden=2**16, classes=4)
    model.compile("sgd")
    key = model._graph_trainer.checked_key(GRAPH, Split())
    rows = GRAPH.vertices * 4 * 2**16
    assert least_bytes(model, GRAPH, key) < rows / 10
    with pytest.raises(GraphError, match="needs .* of each device, and a step may use"):
        check_fits(model, GRAPH, key, with_memory("h100:1", 2 * rows))


def test_wide_rows_inside_an_operator_are_scratch_of_a_memory_plan() -> None:
    graph = gnn.generate.erdos_renyi(3200, 3200, classes=4, features=4).graph()
    model = gnn.GCN(hidden=2**12, classes=4)
    model.compile("sgd")
    with pytest.raises(GraphError, match="the largest operator alone needs") as raised:
        gnn.plan(model, graph, "h100:1", memory="1kB")
    needed = int(str(raised.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
    # The backward operator on 100 rows, the smallest range, holds the rows and their gradients.
    assert needed > 2 * 100 * 4 * 2**12

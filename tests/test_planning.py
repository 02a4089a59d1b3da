"""Searches offer stages and microbatches where a plan needs them and can run."""

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partita import planning
from partita.capture.functions import call_of, capture_call
from partita.capture.jax_functions import Captured
from partita.errors import MachineError, PlanError
from partita.keras.layout_map import layout_map
from partita.machine import host
from partita.offers import compare_machines
from partita.planning import (
    CLAIMS,
    SearchOptions,
    best_plan,
    check_plan,
    given_plan,
    make_planner,
    predict_plan,
    resolve_machine,
    resolve_plan,
    search_fitting_plan,
    search_plan,
    simulate_plan,
)

SMALL = host(2, 2_000_000)
LARGE = host(2, 2_000_000_000)


def captured(reduce: Callable[[Any], Any]) -> Captured:
    """Eight layers, whose values on the batch take more memory than their weights."""

    def step(weights, x):
        def loss(weights):
            hidden = x
            for weight in weights:
                hidden = jnp.tanh(hidden @ weight)
            return reduce(hidden**2)

        return jax.tree.map(lambda w, g: w - 0.1 * g, weights, jax.grad(loss)(weights))

    weights = [jax.ShapeDtypeStruct((16, 16), "float32")] * 8
    x = jax.ShapeDtypeStruct((8192, 16), "float32")
    return capture_call(step, call_of(step, (weights, x), {})).captured


@pytest.mark.parametrize("devices", [0, -1, True, 1.5, "2"])
def test_a_number_of_devices_that_is_none_is_refused(devices: Any) -> None:
    with pytest.raises(MachineError, match=f"devices={devices!r} is no number of devices: give"):
        resolve_machine("h100:8", devices)
    with pytest.raises(MachineError, match="is no number of devices"):
        make_planner(devices=devices)


def test_a_part_of_a_machine_is_named_by_its_devices() -> None:
    names = [resolve_machine("dgx-h100:1", devices).name for devices in (1, 2, 8)]
    assert names == ["dgx-h100:1, 1 device", "dgx-h100:1, 2 devices", "dgx-h100:1"]


def test_a_number_of_devices_may_be_a_small_integer() -> None:
    count: Any = np.int32(1)
    assert resolve_machine(None, count).device.memories[0].capacity > 2**31


@pytest.mark.parametrize("seconds", [-1, "x", float("nan")])
def test_a_time_limit_is_a_number(seconds: Any) -> None:
    with pytest.raises(PlanError, match=f"seconds={seconds!r} is no time limit: give"):
        SearchOptions(seconds=seconds)


@pytest.mark.parametrize("plan", [5, {"mesh": [2]}, ["dp"], "x" * 5000])
def test_a_plan_that_is_none_is_refused(plan: Any) -> None:
    with pytest.raises(PlanError, match="is no plan: give a Plan|There is no plan file"):
        given_plan(plan)


def test_arguments_of_another_type_are_named() -> None:
    step = captured(jnp.mean)
    with pytest.raises(PlanError, match="graph is of type 'Captured', not OperatorGraph: give "):
        best_plan(step, SMALL)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="machine is of type 'str', not Machine: give partita.load"):
        best_plan(step.graph, "h100:8")  # type: ignore[arg-type]
    for function in (predict_plan, lambda graph, machine, plan: check_plan(plan, graph, machine)):
        with pytest.raises(PlanError, match="plan is of type 'NoneType', not Plan: give a Plan"):
            function(step.graph, SMALL, None)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="captured is of type 'int', not Captured: give the step"):
        compare_machines(3, [SMALL])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="machine is of type 'str', not Machine"):
        compare_machines(step, ["h100:8"])  # type: ignore[list-item]
    with pytest.raises(PlanError, match=r"plan is of type 'str', not Plan"):
        layout_map("plan.json", None)  # type: ignore[arg-type]
    with pytest.raises(MachineError, match=r"machine is of type 'list': give a name \('h100:8'\)"):
        resolve_machine(["h100:8"])  # type: ignore[arg-type]
    with pytest.raises(MachineError, match="count=2.5 is no number of devices"):
        SMALL.with_devices(2.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"There is no search \['mcmc'\]: use 'portfolio'"):
        search_plan(step, SMALL, SearchOptions(search=["mcmc"]))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="report is of type 'bool', which cannot be called"):
        SearchOptions(report=True)  # type: ignore[arg-type]


def test_microbatches_are_searched_only_where_no_other_plan_fits() -> None:
    assert search_fitting_plan(captured(jnp.mean), LARGE).plan.microbatches == 1
    result = search_fitting_plan(captured(jnp.mean), SMALL)
    assert result.plan.microbatches > 1 and result.fits
    assert not any("cannot run" in note for note in result.plan.notes)


def test_a_plan_that_cannot_run_says_why() -> None:
    result = search_fitting_plan(captured(jnp.sum), SMALL)
    assert result.plan.notes[-1].startswith(
        "this plan cannot run: The loss of step is not a mean over the samples"
    )


def test_a_plan_that_can_run_comes_before_a_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    step = captured(jnp.sum)
    staged = planning.find(step.graph, SMALL, stages=True)
    runnable = planning.find(step.graph, LARGE)
    found = {True: staged, False: runnable}
    monkeypatch.setattr(planning, "find", lambda *_, stages, **__: found[stages])
    result = search_plan(step, LARGE, planning.SearchOptions(stages=True))
    assert result.plan.choices == runnable.plan.choices
    assert result.plan.microbatches == 1
    assert "a faster plan (8 of 8 operators by S, " in result.plan.notes[-1]
    assert "cannot run: The loss of step is not a mean" in result.plan.notes[-1]


def test_a_part_of_a_machine_is_named_as_the_machine_of_that_size() -> None:
    assert resolve_machine("h100:4", 2).name == "h100:2"
    assert resolve_machine("dgx-h100:2", 8).name == "dgx-h100:1"
    assert resolve_machine("dgx-h100:2", 4).name == "dgx-h100:2, 4 devices"


def test_a_baseline_that_splits_nothing_says_so() -> None:
    step = jax.jit(lambda w: (w * 1.1, w.sum()))
    weights = jax.ShapeDtypeStruct((7, 5), "float32")
    graph = capture_call(step, call_of(step, (weights,), {})).captured.graph
    plan = resolve_plan("dp", graph, host(4, 1 << 30))
    assert plan.notes == (
        "'data parallel' splits no operator here: every device computes the whole step",
    )


def test_a_plan_for_other_numbers_of_a_machine_is_predicted_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = captured(jnp.mean)
    fast = host(2, 1 << 30)
    slow = fast.revised({"device.overhead": 1.0}, "an edit", "assumed")
    saved = best_plan(step.graph, fast)
    assert make_planner(saved, machine=fast)(step) == saved
    plan = make_planner(saved, machine=slow)(step)
    assert plan.predicted["seconds"] > 1.0 > saved.predicted["seconds"]
    assert plan.notes == (
        "the saved predictions are for other numbers of 'host:2' and are dropped",
    )
    assert make_planner(plan, machine=slow)(step) == plan, "saved again, the claims hold"
    notes = simulate_plan(step, slow, saved).notes
    assert plan.notes[0] in notes
    # All processes take the first one's claims, whatever the numbers of their own hosts are.
    claims = {name: getattr(plan, name) for name in CLAIMS}
    first = lambda name, make: json.dumps(claims)
    monkeypatch.setattr("partita.execute.processes.from_first", first)
    assert make_planner(saved, machine=fast)(step) == plan

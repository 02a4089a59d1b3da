"""Steps that are compiled beforehand: a loss, another plan and shares then compile nothing. Batches
that are kept for a loss."""

import time
from dataclasses import dataclass
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

from partita.capture.keras_models import ModelVariables, capture_model
from partita.errors import PlanError
from partita.execute import members
from partita.execute.function import compiled_in_turn
from partita.execute.program import runnable_step
from partita.execute.steps import StepRunner
from partita.execute.verify import check_compiled
from partita.keras.fit import is_of_arrays
from partita.management.survival import fingerprint_of
from partita.plans.baselines import BASELINES
from partita.plans.plan import Mesh, Plan

COMPILATION = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True)
class Step:
    """A planned step and its program."""

    planned: Any
    program: Any


@pytest.fixture
def compilations():
    """The compilations so far, one entry each."""
    entries: list[float] = []

    def note(event: str, duration_secs: float, **more: Any) -> None:
        if event == COMPILATION:
            entries.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield entries
    jax.monitoring.unregister_event_duration_listener(note)


def plan_of(name: str, graph: Any, devices: int) -> Plan:
    mesh = Mesh.of((2, 2) if devices == 4 else (2,))
    return BASELINES[name](graph, "host", mesh)


def training() -> tuple[StepRunner, Any, Any, Any]:
    """A runner with a step on four devices, the state before it, and a batch."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).standard_normal((24, 6)).astype("float32")
    batch = (x, x[:, :4])
    captured = capture_model(model, batch)
    plan = plan_of("data parallel", captured.graph, 4)
    planned = runnable_step(captured, plan, members.devices())
    runner = StepRunner("test")
    runner.plan = plan
    runner.steps["key"] = Step(planned, planned.compile())
    values = [np.array(v.value) for group in ModelVariables.of(model).groups() for v in group]
    return runner, jax.tree.unflatten(jax.tree.structure(captured.state), values), batch, captured


def lose(monkeypatch: pytest.MonkeyPatch, is_lost: bool) -> None:
    """Four devices of two processes; the second one, with two of them, may be lost."""
    there = jax.devices()[:4]

    def devices(without: int | None = None) -> list[Any]:
        return there[1::-1] if is_lost or without == 1 else there

    monkeypatch.setattr(members, "devices", devices)
    monkeypatch.setattr(members, "alive", lambda: (0,) if is_lost else (0, 1))
    monkeypatch.setattr(members, "count", lambda: 1)
    monkeypatch.setattr(members, "lost", lambda: frozenset({1} if is_lost else ()))
    monkeypatch.setattr(members, "generation", lambda: int(is_lost))


@pytest.mark.parametrize("beside", [False, True])
def test_a_loss_that_was_prepared_compiles_nothing(
    beside: bool, monkeypatch: pytest.MonkeyPatch, compilations: list[float]
) -> None:
    lose(monkeypatch, is_lost=False)
    runner, state, batch, captured = training()

    def plan_for(graph: Any, plan: Plan, devices: int) -> Plan:
        return plan_of(plan.name, graph, devices)

    copy = runner.to_host(state)
    straight, _ = runner.execute("key", state, batch)
    runner.prepare("key", plan_for, beside=beside)
    loss = "loss", "key", frozenset({1}), 1
    while not runner.table.is_done(loss):
        time.sleep(0.005)
    assert runner.table.get(loss).planned.plan.devices == 2
    lose(monkeypatch, is_lost=True)
    del compilations[:]
    runner.change_members(plan_for)
    outputs, _ = runner.execute("key", runner.with_leaves(state, copy), batch)
    assert compilations == []
    assert float(outputs["loss"]) == pytest.approx(float(straight["loss"]), rel=1e-6)
    assert runner.running.planned.mesh.devices.tolist() == jax.devices()[1::-1]


def test_a_plan_and_shares_that_were_prepared_compile_nothing(
    monkeypatch: pytest.MonkeyPatch, compilations: list[float]
) -> None:
    lose(monkeypatch, is_lost=False)
    runner, state, batch, captured = training()
    other = plan_of("ZeRO-1", captured.graph, 4)
    runner.prepare_plan("key", other)
    while not runner.begin_shares("key"):
        time.sleep(0.005)
    del compilations[:]
    assert runner.prepare_shares("key") == 12
    runner.change(other)
    runner.execute("key", state, batch)
    assert runner.running.planned.plan == other
    # The state moves by programs without a name of ours: none of them is the step.
    assert compilations == []


def test_an_error_beside_the_training_is_that_of_preparing_shares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lose(monkeypatch, is_lost=False)
    runner, _, _, captured = training()
    runner.change(plan_of("ZeRO-3", captured.graph, 4))
    while not runner.begin_shares("key"):
        time.sleep(0.005)
    with pytest.raises(PlanError, match="ZeRO-3"):
        runner.prepare_shares("key")


@pytest.mark.parametrize("source", ["shuffled", "in order", "generator"])
def test_a_batch_is_kept_for_a_loss_and_copied_where_others_may_write_in_it(source: str) -> None:
    x = np.zeros((12, 2), "float32")
    if source == "generator":
        batches = ((x[rows], x) for rows in [slice(0, 4)])
    else:
        adapter = ArrayDataAdapter(x, x, batch_size=4, shuffle=source == "shuffled")
        batches = adapter.get_jax_iterator()
    runner = StepRunner("test")
    runner.keeps_batches = is_of_arrays(batches)
    batch: Any = next(batches)
    kept = runner.batch_copy(batch)
    fingerprint = fingerprint_of(kept, is_summed=False)
    x[:] = 1.0
    is_copied = [copy is not array for copy, array in zip(kept, batch, strict=True)]
    assert is_copied == [source == "generator"] * 2
    # The slices have changed, and that is noticed.
    is_slice = source == "in order"
    assert [array.max() for array in kept] == [float(is_slice)] * 2
    assert (fingerprint_of(kept, is_summed=False) != fingerprint) == is_slice


@pytest.mark.parametrize("losses", [0, 2])
def test_processes_that_met_again_go_on_with_planned_steps(losses: int, monkeypatch) -> None:
    """The others run a planned step, so a process that comes back must not train by itself."""
    *_, captured = training()
    choices: dict[str, dict[str, str]] = {one.name: {} for one in captured.graph.operators}
    whole = Plan(captured.graph.name, "host", Mesh.of((2,)), choices, batch_size=24)
    monkeypatch.setattr(members, "generation", lambda: losses)
    planned, *_ = compiled_in_turn(captured, whole, Any, check_compiled, print)
    assert (planned is not None) == bool(losses)

"""Optimizer slots in the memory of the host: only where memory needs it, priced by the link, and
the same step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.errors import MemoryBudgetError, PlanError
from partita.execute import program
from partita.execute.verify import compare_steps
from partita.machine import load
from partita.planning import predict_plan
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.diff import diff
from partita.plans.plan import Plan
from partita.search.find import capacity, find, mesh_of
from partita.search.memory_notes import memory_notes
from partita.units import format_bytes, format_seconds

LAYERS, WIDTH, BATCH = 4, 256, 16
MATRIX = 4 * WIDTH * WIDTH


def step(state, x):
    """Momentum and its square root, two slots of a weight."""

    def loss(weights):
        h = x
        for w in weights:
            h = jnp.tanh(h @ w)
        return (h**2).mean()

    weights, first, second = state
    value, gradients = jax.value_and_grad(loss)(weights)
    first = [0.9 * m + g for m, g in zip(first, gradients, strict=True)]
    second = [0.9 * v + g * g for v, g in zip(second, gradients, strict=True)]
    changes = [m / (1 + jnp.sqrt(v)) for m, v in zip(first, second, strict=True)]
    weights = [w - 0.1 * change for w, change in zip(weights, changes, strict=True)]
    return {"loss": value}, (weights, first, second)


@pytest.fixture(scope="module")
def captured():
    matrices = [jax.ShapeDtypeStruct((WIDTH, WIDTH), "float32")] * LAYERS
    leaves = [Leaf(f"w{n}", "parameter") for n in range(LAYERS)]
    for slot in ("m", "v"):
        leaves += [Leaf(f"w{n}/{slot}", "optimizer", f"w{n}") for n in range(LAYERS)]
    batch = jax.ShapeDtypeStruct((BATCH, WIDTH), "float32")
    found = capture_step(step, (matrices,) * 3, batch, leaves, batch_size=BATCH)
    return replace(found, graph=replace(found.graph, target="cuda"))


def with_memory(machine, nbytes):
    """A machine of whose devices a plan may use so many bytes."""
    capacity_bytes = {"device.memory.hbm.capacity": int(nbytes / 0.95) + 1}
    return machine.revised(capacity_bytes, source="the test", status="assumed")


def bytes_of_one(graph, machine):
    """Peak memory of one device."""
    plan = BASELINES["one device"](graph, machine.name, mesh_of(machine))
    return predict_plan(graph, machine, plan).peak_bytes


def offloaded(graph, machine, name="ZeRO-1") -> Plan:
    plan = BASELINES[name](graph, machine.name, mesh_of(machine))
    return replace(plan, offload=tuple(f"w{n}" for n in range(LAYERS)))


def test_less_memory_offloads_more_and_is_slower(captured):
    machine = load("h100:1")
    large = bytes_of_one(captured.graph, machine)
    results = []
    for freed in (0, 2 * MATRIX, 4 * MATRIX):
        machine = with_memory(machine, large - freed)
        result = find(captured.graph, machine, search="elimination")
        assert result.prediction.peak_bytes <= capacity(machine)
        assert result.bound_seconds <= result.prediction.seconds
        again = predict_plan(captured.graph, machine, replace(result.plan, predicted={}))
        assert again.seconds == pytest.approx(result.prediction.seconds, rel=1e-12)
        results.append(result)
    counts = [len(result.plan.offload) for result in results]
    assert counts[0] == 0 < counts[1] <= counts[2] <= LAYERS
    seconds = [result.prediction.seconds for result in results]
    assert seconds == sorted(set(seconds))
    assert any("in host memory: adds" in note for note in results[1].plan.notes)


def test_notes_compare_a_plan_with_itself_without_each_means(captured):
    machine = load("h100:4")
    plan = offloaded(captured.graph, machine, "ZeRO-3")
    prediction = predict_plan(captured.graph, machine, plan)
    notes = memory_notes(captured.graph, machine, plan, prediction)
    plains = [replace(plan, storage={}), replace(plan, offload=())]
    for note, plain in zip(notes, plains, strict=True):
        before = predict_plan(captured.graph, machine, plain)
        freed = before.peak_bytes - prediction.peak_bytes
        assert freed > 0
        assert f"a step of {format_seconds(before.seconds)}" in note
        assert f"frees {format_bytes(freed)} of {format_bytes(before.peak_bytes)} a device" in note
        change = prediction.seconds - before.seconds
        assert f"{'adds' if change >= 0 else 'takes'} {format_seconds(abs(change))} " in note
    assert notes[0].startswith("4 variables stored ZeRO-3 over a,b: ")


def test_an_update_reads_its_slots_over_the_link(captured):
    machine = load("h100:4")
    plan = offloaded(captured.graph, machine)
    kept = predict_plan(captured.graph, machine, replace(plan, offload=()))
    host = predict_plan(captured.graph, machine, plan)
    slots = 2 * LAYERS * MATRIX / 4
    added = host.by_cause()["compute"] - kept.by_cause()["compute"]
    assert added == pytest.approx(slots / (64e9 * 0.8))
    assert kept.memory.optimizer == slots
    assert host.memory.optimizer == 0


def test_a_machine_without_a_host_offloads_nothing(captured):
    machine = load("h100:1")
    alone = replace(machine, device=replace(machine.device, memories=machine.device.memories[:1]))
    small = with_memory(alone, bytes_of_one(captured.graph, alone) - MATRIX)
    with pytest.raises(MemoryBudgetError):
        find(captured.graph, small, search="elimination")


def test_the_step_is_that_of_one_device(captured, monkeypatch):
    monkeypatch.setattr(program, "_check_platform", lambda graph, mesh: None)
    planned = program.planned_step(captured, offloaded(captured.graph, load("h100:4")))
    kinds = [s.memory_kind for s in jax.tree.leaves(planned.state_shardings)]
    assert kinds == ["device"] * LAYERS + ["pinned_host"] * 2 * LAYERS
    generator = np.random.default_rng(0)
    arrays = [generator.uniform(0.1, 0.2, (WIDTH, WIDTH)).astype("float32") for _ in range(12)]
    state = arrays[:4], arrays[4:8], arrays[8:]
    batch = generator.normal(size=(BATCH, WIDTH)).astype("float32")
    differences = compare_steps(captured, planned, state, batch)
    assert max(difference.relative for difference in differences) < 1e-5


def test_slots_that_cannot_be_offloaded_are_refused(captured):
    plan = offloaded(captured.graph, load("h100:4"))
    with pytest.raises(PlanError, match="the optimizer slots of 'w9', which has none. Plan"):
        check(replace(plan, offload=("w9",)), captured.graph)
    with pytest.raises(PlanError, match="pieces have no optimizer slots in host memory"):
        check(replace(plan, microbatches=2), captured.graph)


def test_a_plan_says_what_it_offloads(captured):
    plan = offloaded(captured.graph, load("h100:4"))
    assert Plan.from_json(plan.to_json()) == plan
    assert "  optimizer slots of 4 variables in host memory" in str(plan).splitlines()
    assert "offloaded: optimizer slots of 4 variables in host memory -> " in "\n".join(
        diff(plan, replace(plan, offload=("w0",)))
    )

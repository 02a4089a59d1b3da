"""Rematerialization in the search: only where memory needs it, and as little as it needs."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from partita.capture.program import capture_program
from partita.cost.terms import cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.planning import predict_plan
from partita.plans.baselines import BASELINES
from partita.search.find import capacity, find, mesh_of
from partita.search.rematerialization import groupings, with_fewest_runs

SAMPLES, WIDTH, HIDDEN, BLOCKS = 1 << 18, 64, 256, 6


def step(parameters, x):
    def loss(parameters):
        h = x
        for up, down in parameters:
            h = h + jnp.tanh(h @ up) @ down
        return jnp.mean(h**2)

    value, gradients = jax.value_and_grad(loss)(parameters)
    return jax.tree.map(lambda w, g: w - 0.1 * g, parameters, gradients), value


@pytest.fixture(scope="module")
def graph():
    up = jax.ShapeDtypeStruct((WIDTH, HIDDEN), "float32")
    down = jax.ShapeDtypeStruct((HIDDEN, WIDTH), "float32")
    batch = jax.ShapeDtypeStruct((SAMPLES, WIDTH), "float32")
    return capture_program(step, args=([(up, down)] * BLOCKS, batch), target="cuda").graph


def machine_of(mebibytes):
    return load("h100:2").revised(
        {"device.memory.hbm.capacity": mebibytes << 20}, source="the test", status="assumed"
    )


@pytest.fixture(scope="module")
def results(graph):
    """MiB of a device -> the result of a search."""
    sizes = (4096, 900, 720)
    return {size: find(graph, machine_of(size), search="elimination") for size in sizes}


def test_a_plan_that_fits_rematerializes_nothing(results):
    assert results[4096].plan.recompute == ()
    assert not any("rematerialization" in note for note in results[4096].plan.notes)


def test_less_memory_rematerializes_more_and_is_slower(results):
    fits, tight, tighter = results.values()
    assert 1 <= len(tight.plan.recompute) <= len(tighter.plan.recompute)
    assert fits.prediction.seconds < tight.prediction.seconds <= tighter.prediction.seconds
    assert any("adds" in note and "frees" in note for note in tight.plan.notes)


def test_the_plan_fits_and_its_prediction_is_that_of_the_simulator(graph, results):
    for size in (900, 720):
        result = results[size]
        machine = machine_of(size)
        assert result.fits
        assert result.prediction.peak_bytes <= capacity(machine)
        again = predict_plan(graph, machine, replace(result.plan, predicted={}))
        assert again.peak_bytes == result.prediction.peak_bytes
        assert again.seconds == pytest.approx(result.prediction.seconds, rel=1e-12)


def test_the_bound_rises_with_less_memory_and_holds_for_all_runs(graph, results):
    bounds = [result.bound_seconds for result in results.values()]
    assert bounds == sorted(bounds)
    assert bounds[-1] > bounds[0] * 1.001
    fitting = 0
    for size in (900, 720):
        machine = machine_of(size)
        bound = results[size].bound_seconds
        assert bound <= results[size].prediction.seconds
        plan = BASELINES["data parallel"](graph, machine.name, mesh_of(machine))
        for runs in groupings(graph, cost_terms(graph, machine.backend)):
            prediction = predict_plan(graph, machine, replace(plan, recompute=runs))
            if prediction.peak_bytes <= capacity(machine):
                assert bound <= prediction.seconds
                fitting += 1
    assert fitting


def test_runs_on_a_smaller_gpu_take_less():
    graph = OperatorGraph.load(Path(__file__).parents[1] / "data/transformer.graph.json")
    peaks = []
    for mebibytes in (1, 4096):
        machine = machine_of(mebibytes)
        plan = BASELINES["data parallel"](graph, machine.name, mesh_of(machine))
        prediction = predict_plan(graph, machine, plan)
        smaller = []
        for runs in groupings(graph, cost_terms(graph, machine.backend)):
            smaller.append(with_fewest_runs(graph, machine, plan, prediction, runs, 0).peak_bytes)
        peaks.append(min(smaller))
    assert peaks[0] < peaks[1]

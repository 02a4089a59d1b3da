"""Storage of variables in slices on accelerators: gathers by pass and dtype, nodes, equal steps."""

import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.cost import early_sums
from partita.cost.collectives import collectives
from partita.cost.evaluate import operator_costs
from partita.cost.memory import memory
from partita.cost.moves import Placement
from partita.cost.terms import cost_terms
from partita.execute import program
from partita.execute.verify import compare_steps
from partita.graph.operator_graph import first_backward, producers
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.plans.plan import Plan
from partita.search.find import mesh_of
from partita.search.network import build
from partita.simulation.simulate import predicted

LAYERS, WIDTH, BATCH = 6, 64, 16
GPUS, NODES = load("h100:4"), load("h100:16")


def layers_for_gpus(layers: int, width: int, batch: int = BATCH):
    """Dense layers in mixed precision, as captured for GPUs."""

    def loss(weights, x):
        for w in weights:
            x = jnp.tanh(x @ w.astype("bfloat16"))
        return (x.astype("float32") ** 2).mean()

    def step(state, x):
        value, gradients = jax.value_and_grad(loss)(state, x)
        return {"loss": value}, tuple(w - g for w, g in zip(state, gradients, strict=True))

    shape = jax.ShapeDtypeStruct
    found = capture_step(
        step,
        (shape((width, width), "float32"),) * layers,
        shape((batch, width), "bfloat16"),
        [Leaf(f"w{n}", "parameter") for n in range(layers)],
        batch_size=batch,
    )
    return replace(found, graph=replace(found.graph, target="cuda"))


@pytest.fixture(scope="module")
def captured():
    return layers_for_gpus(LAYERS, WIDTH)


def plan_of(captured, name: str, machine=GPUS) -> Plan:
    return BASELINES[name](captured.graph, machine.name, mesh_of(machine))


def sent(captured, plan: Plan, machine=GPUS) -> Counter:
    """(kind, bytes) -> number of collectives."""
    layout = layout_of(captured.graph, plan)
    planned = collectives(captured.graph, plan.mesh, layout, machine.backend)
    return Counter((c.kind, c.nbytes) for c in planned)


def test_slices_are_gathered_in_the_compute_dtype_for_both_passes(captured):
    counts = sent(captured, plan_of(captured, "ZeRO-3"))
    matrix = WIDTH * WIDTH
    # The backward pass of the first layer needs no weight, that of the last three comes at once.
    assert counts["all_gather", 2 * matrix] == LAYERS + LAYERS - 4
    assert counts["reduce_scatter", 2 * matrix] == LAYERS
    assert counts["all_gather", 4 * matrix] == 0


def test_a_step_for_a_cpu_gathers_once(captured):
    for_cpu = replace(captured, graph=replace(captured.graph, target="cpu"))
    cpus = replace(GPUS, backend=replace(GPUS.backend, platform="cpu"))
    counts = sent(for_cpu, plan_of(for_cpu, "ZeRO-3"), cpus)
    assert counts["all_gather", 4 * WIDTH * WIDTH] == LAYERS


def test_what_is_gathered_twice_leaves_memory_between(captured):
    graph = captured.graph
    plan = plan_of(captured, "ZeRO-3")
    layout = layout_of(graph, plan)
    assert sum(read.after >= 0 for read in layout.reads) == (LAYERS - 4) + (LAYERS - 3)
    kept = replace(layout, reads=tuple(replace(read, after=-1) for read in layout.reads))
    peak = memory(graph, plan.mesh, layout, GPUS.backend).peak
    assert peak <= memory(graph, plan.mesh, kept, GPUS.backend).peak


@pytest.fixture
def summed_early(captured, monkeypatch):
    """The same layers, whose products wait for sums of gradients as those of large layers do."""
    monkeypatch.setattr(early_sums, "COMBINED_BYTES", 0)
    monkeypatch.setattr(early_sums, "WAITING_PRODUCTS", 0)
    return replace(captured, graph=replace(captured.graph))


def test_gathers_of_the_forward_pass_wait_for_products():
    large = layers_for_gpus(16, 4096)
    reads = [r for r in layout_of(large.graph, plan_of(large, "ZeRO-3")).reads if r.after >= 0]
    computed_at = producers(large.graph)
    forward = [read for read in reads if computed_at[read.after] < first_backward(large.graph)]
    assert len({read.after for read in forward}) == len(forward) == 16 - 3, "one by one"
    assert all(computed_at[read.after] < min(read.readers)[0] for read in reads)


@pytest.mark.parametrize("name", ["ZeRO-3", "ZeRO-1", "data parallel"])
def test_products_wait_for_sums_of_large_gradients(name, captured):
    assert not early_sums.waits(captured.graph, layout_of(captured.graph, plan_of(captured, name)))
    large = layers_for_gpus(24, 4096)
    plan = plan_of(large, name)
    layout = layout_of(large.graph, plan)
    computed_at = producers(large.graph)
    waiting = early_sums.waits(large.graph, layout)
    gradients = [tensor for wait in waiting for tensor, _ in wait.sums]
    assert len(set(gradients)) == len(gradients) == 24 - 2 - early_sums.WAITING_PRODUCTS
    for wait in waiting:
        assert all(computed_at[tensor] < wait.reader[0] for tensor, _ in wait.sums)


def test_sums_are_combined_by_the_bytes_of_their_results():
    """Gradients of 32 MiB: XLA combines sums of at most 30 MiB, here three slices of 8 MiB."""
    large = layers_for_gpus(24, 4096)
    for name, slices in (("data parallel", 1), ("ZeRO-3", 3)):
        plan = plan_of(large, name)
        sums = early_sums.early_sums(large.graph, layout_of(large.graph, plan), plan.mesh)
        together = Counter(total.summed for total in sums.values())
        assert set(together.values()) == {slices}


def test_activations_leave_memory_before_the_end_of_the_backward_pass(monkeypatch):
    rows = 1 << 16
    large = layers_for_gpus(24, 4096, rows)
    plan = plan_of(large, "ZeRO-1")
    layout = layout_of(large.graph, plan)
    early = memory(large.graph, plan.mesh, layout, GPUS.backend).peak
    monkeypatch.setattr(early_sums, "WAITING_PRODUCTS", 24)
    late = memory(replace(large.graph), plan.mesh, layout, GPUS.backend).peak
    assert late - early > 24 // 2 * (rows // GPUS.devices * 4096 * 2)


def gathers(captured, plan: Plan, machine=GPUS) -> np.ndarray:
    """[phase]: seconds of gathers of all operators."""
    graph = captured.graph
    terms = cost_terms(graph, machine.backend)
    placement = Placement(machine, plan.mesh)
    costs = operator_costs(terms, placement, layout_of(graph, plan), plan)
    return sum(cost.gather_seconds[:, 0] for cost in costs)


def test_each_level_of_zero_is_priced_by_its_gathers(captured):
    forward, backward, update = gathers(captured, plan_of(captured, "ZeRO-3"))
    assert 0 < backward < forward
    assert update == 0
    slots = gathers(captured, plan_of(captured, "ZeRO-1"))
    assert slots[0] == slots[1] == 0
    assert slots[2] > forward


def test_the_axes_of_a_plan_are_priced(captured):
    everywhere = plan_of(captured, "ZeRO-3", NODES)
    inner = tuple(axis.name for axis in everywhere.mesh.axes if axis.level == 1)
    storage = {path: replace(s, axes=inner) for path, s in everywhere.storage.items()}
    hybrid = replace(everywhere, storage=storage)
    for_node = gathers(captured, hybrid, NODES)
    assert (for_node[:2] < gathers(captured, everywhere, NODES)[:2]).all()
    network = build(captured.graph, NODES, hybrid.mesh)
    states = network.states_of(hybrid)
    assert states is not None
    assert network.plan(states).storage == storage
    seconds = sum(network.problem.seconds[o][i] for o, i in enumerate(states))
    assert seconds == pytest.approx(
        sum(o.seconds - o.moves for o in predicted(captured.graph, NODES, hybrid).operators)
    )


@pytest.mark.parametrize("name", ["ZeRO-3", "ZeRO-1", "data parallel"])
@pytest.mark.parametrize("size", ["captured", "summed_early"])
def test_the_step_is_that_of_one_device(name, size, request, monkeypatch):
    captured = request.getfixturevalue(size)
    monkeypatch.setattr(program, "_check_platform", lambda graph, mesh: None)
    plan = plan_of(captured, name)
    step = program.planned_step(captured, plan)
    text = step.lower().as_text()
    barriers = re.findall(r"stablehlo\.optimization_barrier .* : (.*)", text)
    gathers = (LAYERS - 4) + (LAYERS - 3) if name == "ZeRO-3" else 0
    waiting = early_sums.waits(captured.graph, layout_of(captured.graph, plan))
    assert len(waiting) == (LAYERS - 2 if size == "summed_early" else 0)
    assert len(barriers) == gathers + len(waiting)
    read = re.findall(r"stablehlo\.optimization_barrier (?:\{.*\} )?(%\S+), ", text)
    slices = [value for value in read if f"{value} = sdy.sharding_constraint" in text]
    assert len(slices) == gathers, "else XLA slices the gathered copy"
    results = re.findall(r"(%\S+):2 = stablehlo\.optimization_barrier", text)
    read_behind = [result for result in results if f" {result}#1," in text]
    assert len(read_behind) >= (LAYERS - 4 if gathers else 0), "else XLA drops the gradient"
    generator = np.random.default_rng(0)
    state = tuple(
        generator.normal(size=(WIDTH, WIDTH)).astype("float32") / 8 for _ in range(LAYERS)
    )
    batch = generator.normal(size=(BATCH, WIDTH)).astype(jnp.bfloat16)
    differences = compare_steps(captured, step, state, batch)
    assert max(difference.relative for difference in differences) < 0.02


def test_both_gradients_of_a_tied_weight_are_summed_in_slices(monkeypatch):
    words, width = 64, 32

    def loss(weight, ids):
        x = jnp.tanh(weight.astype("bfloat16")[ids])
        scores = jnp.einsum("bw,vw->bv", x, weight.astype("bfloat16"))
        return (scores.astype("float32") ** 2).mean()

    def step(state, ids):
        value, gradient = jax.value_and_grad(loss)(state["weight"], ids)
        moment = 0.9 * state["moment"] + gradient**2
        weight = state["weight"] - gradient / (jnp.sqrt(moment) + 1)
        return {"loss": value}, {"moment": moment, "weight": weight}

    matrix = jax.ShapeDtypeStruct((words, width), "float32")
    captured = capture_step(
        step,
        {"moment": matrix, "weight": matrix},
        jax.ShapeDtypeStruct((BATCH,), "int32"),
        [Leaf("moment", "optimizer", parameter="weight"), Leaf("weight", "parameter")],
        batch_size=BATCH,
    )
    captured = replace(captured, graph=replace(captured.graph, target="cuda"))
    plan = plan_of(captured, "ZeRO-3")
    assert "weight" in plan.storage
    kinds = Counter(kind for kind, nbytes in sent(captured, plan).elements() if nbytes > 4)
    assert kinds["reduce_scatter"] == 2
    assert kinds["all_reduce"] == 0
    monkeypatch.setattr(program, "_check_platform", lambda graph, mesh: None)
    generator = np.random.default_rng(0)
    state = {
        name: generator.normal(size=(words, width)).astype("float32")
        for name in ("moment", "weight")
    }
    state["moment"] **= 2
    ids = generator.integers(0, words, BATCH).astype("int32")
    differences = compare_steps(captured, program.planned_step(captured, plan), state, ids)
    assert max(difference.relative for difference in differences) < 0.02

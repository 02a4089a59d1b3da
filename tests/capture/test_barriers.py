"""Programs that rematerialize: barriers split for planning, joined for the compiler."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import partita
from partita.capture.program import capture_program
from partita.capture.stablehlo import context, parse
from partita.cost.memory import memory
from partita.cost.work import local_flops
from partita.execute.annotate import annotate
from partita.machine import load
from partita.planning import resolve_machine, resolve_plan
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

SAMPLES, WIDTH, HIDDEN, BLOCKS = 1024, 16, 64, 4


def block(x, weights):
    up, down = weights
    return x + jnp.tanh(x @ up) @ down


def step_of(block):
    """A training step of a residual network, and the arguments of a call."""

    def step(parameters, x, y):
        def loss(parameters):
            h = x
            for weights in parameters:
                h = block(h, weights)
            return jnp.mean((h - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(parameters)
        updated = jax.tree.map(lambda w, g: w - 0.1 * g, parameters, gradients)
        return updated, value

    keys = jax.random.split(jax.random.key(0), 2 * BLOCKS + 1)
    parameters = []
    for n in range(BLOCKS):
        up = jax.random.normal(keys[2 * n], (WIDTH, HIDDEN)) / 4
        down = jax.random.normal(keys[2 * n + 1], (HIDDEN, WIDTH)) / 8
        parameters.append((up, down))
    x = jax.random.normal(keys[-1], (SAMPLES, WIDTH))
    return step, (parameters, x, jnp.ones_like(x))


def named(graph, name, machine):
    mesh = mesh_of(machine)
    plan = BASELINES[name](graph, machine.name, mesh)
    return mesh, layout_of(graph, plan)


@pytest.fixture(scope="module")
def rematerialized():
    step, args = step_of(jax.checkpoint(block))
    return capture_program(step, args=args, target="cuda")


def test_every_barrier_has_one_operand(rematerialized):
    barriers = [x for x in rematerialized.graph.instructions if x.name == "optimization_barrier"]
    assert len(barriers) >= 3 * BLOCKS
    assert all(len(barrier.operands) == 1 for barrier in barriers)


@pytest.mark.parametrize("plan", ["data parallel", "tensor parallel"])
def test_a_rematerialized_block_is_split_like_its_original(plan, rematerialized):
    """Each of four devices does a fourth of all products, those of the backward pass included."""
    machine = load("h100:4")
    graph = rematerialized.graph
    mesh, layout = named(graph, plan, machine)
    products = sum(x.flops for x in graph.instructions if x.name == "dot_general")
    # Two products forward, one of them again, and two gradients of each, less that of the input.
    one = 2 * SAMPLES * WIDTH * HIDDEN
    assert products == one * (BLOCKS * (2 + 1 + 4) - 1)
    assert local_flops(graph, mesh, layout, machine.backend) == pytest.approx(
        graph.flops / 4, rel=0.1
    )


def normalized_block(x, weights):
    """A block with constants: in a mean, a maximum, a GELU, a mask."""
    up, down = weights
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    hidden = jax.nn.relu(y @ up) + jax.nn.gelu(y @ up)
    even = jnp.arange(HIDDEN) % 2 == 0
    return x + jnp.where(even, hidden, 0.5 * hidden) @ down


def test_a_copy_that_reads_constants_is_split_like_its_original():
    """Capture gives each reader its own copy of a constant, also a copy and its original."""
    step, args = step_of(jax.checkpoint(normalized_block))
    graph = capture_program(step, args=args, target="cuda").graph
    machine = load("h100:4")
    mesh, layout = named(graph, "data parallel", machine)
    flops = local_flops(graph, mesh, layout, machine.backend)
    assert flops == pytest.approx(graph.flops / 4, rel=0.1)


def test_rematerialization_saves_activation_memory(rematerialized):
    machine = load("h100:4")
    step, args = step_of(block)
    plain = capture_program(step, args=args).graph
    peaks = []
    for graph in (plain, rematerialized.graph):
        mesh, layout = named(graph, "data parallel", machine)
        peaks.append(memory(graph, mesh, layout, machine.backend).activations)
    assert peaks[1] < 0.5 * peaks[0]


def test_the_compiler_gets_one_barrier_per_block(rematerialized):
    """With a sharding per value, in front of all that reads it."""
    machine = load("h100:4")
    graph = rematerialized.graph
    mesh, layout = named(graph, "tensor parallel", machine)
    source = annotate(rematerialized.text.mlir_module_serialized, graph, mesh, layout)
    with context():
        text = str(parse(source))
    joined = re.findall(r"stablehlo.optimization_barrier .*", text)
    assert len(joined) == BLOCKS
    for line in joined:
        count = line.split("=")[0].count(",") + 1
        assert line.count("<@partita_mesh") == len(re.findall(r"tensor<", line.split(" : ")[-1]))
        assert count >= 1
    assert "partita.siblings" not in text


def test_on_a_cpu_a_rematerialized_network_is_a_plain_one(rematerialized):
    """XLA:CPU merges rematerialized values with their originals."""
    graphs = []
    for wrapped in (block, jax.checkpoint(block)):
        step, args = step_of(wrapped)
        graphs.append(capture_program(step, args=args, target="cpu").graph)
    assert graphs[0].flops == graphs[1].flops < rematerialized.graph.flops
    assert all(x.name != "optimization_barrier" for x in graphs[1].instructions)


@pytest.mark.parametrize("plan", ["data parallel", "tensor parallel"])
def test_losses_are_those_of_one_device(plan):
    step, args = step_of(jax.checkpoint(block))
    expected, loss = jax.jit(step)(*args)
    graph = capture_program(step, args=args).graph
    chosen = resolve_plan(plan, graph, resolve_machine(None, 4))
    run = partita.parallelize(step, args, plan=chosen, say=lambda line: None)
    updated, split_loss = run(*jax.tree.map(jnp.copy, args))
    np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(updated), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)

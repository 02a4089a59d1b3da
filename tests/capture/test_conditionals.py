"""Updates inside conditionals: split for planning, joined for the compiler, the same numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import partita
from partita.capture.program import capture_program
from partita.capture.stablehlo import context, main_block, parse, walk
from partita.execute.annotate import annotate
from partita.planning import resolve_machine, resolve_plan
from partita.plans.layout import layout_of

OPTIMIZERS = {
    "MultiSteps": optax.MultiSteps(optax.adamw(1e-2), 2),
    "apply_if_finite": optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), 5
    ),
}


def step_of(optimizer):
    """A training step of two layers, and the arguments of a call."""

    def step(parameters, slots, x, y):
        def loss(parameters):
            return jnp.mean((jnp.tanh(x @ parameters["up"]) @ parameters["down"] - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(parameters)
        updates, slots = optimizer.update(gradients, slots, parameters)
        return optax.apply_updates(parameters, updates), slots, value

    keys = jax.random.split(jax.random.key(0), 3)
    parameters = {
        "up": jax.random.normal(keys[0], (32, 128)) / 6,
        "down": jax.random.normal(keys[1], (128, 32)) / 11,
    }
    x = jax.random.normal(keys[2], (16, 32))
    return step, (parameters, optimizer.init(parameters), x, jnp.ones_like(x))


@pytest.fixture(scope="module", params=OPTIMIZERS)
def optimizer(request):
    step, args = step_of(OPTIMIZERS[request.param])
    return step, args, capture_program(step, args=args)


def test_each_conditional_updates_one_variable(optimizer):
    """And belongs to its operator. Sums over gradients are conditionals of their own."""
    graph = optimizer[2].graph
    for index, instruction in enumerate(graph.instructions):
        if instruction.name != "case":
            continue
        shapes = {graph.tensors[tensor].shape for tensor in instruction.results} - {()}
        assert len(shapes) <= 1
        if shapes:
            (shape,) = shapes
            operator = graph.operators[graph.owner[index]].name
            assert shape == {"parameters/up": (32, 128), "parameters/down": (128, 32)}[operator]


def test_the_compiler_gets_one_conditional(optimizer):
    captured = optimizer[2]
    machine = resolve_machine(None, 4)
    plan = resolve_plan("tensor parallel", captured.graph, machine)
    layout = layout_of(captured.graph, plan)
    source = annotate(captured.text.mlir_module_serialized, captured.graph, plan.mesh, layout)
    with context():
        module = parse(source)
        names = [operation.name for operation in walk(main_block(module))]
    assert names.count("stablehlo.case") == 1


@pytest.mark.parametrize("plan", ["data parallel", "ZeRO-3", "tensor parallel"])
def test_four_devices_do_as_planned_and_compute_the_same(plan, optimizer):
    """Nothing is gathered that the plan does not gather; the numbers are those of one device."""
    step, args, captured = optimizer
    machine = resolve_machine(None, 4)
    chosen = resolve_plan(plan, captured.graph, machine)
    lines: list[str] = []
    split = partita.parallelize(step, args, plan=chosen, say=lines.append)
    one_device = jax.jit(step)
    parameters, slots, x, y = args
    split_parameters, split_slots = jax.tree.map(jnp.copy, (parameters, slots))
    for _ in range(4):
        parameters, slots, loss = one_device(parameters, slots, x, y)
        split_parameters, split_slots, split_loss = split(split_parameters, split_slots, x, y)
        np.testing.assert_allclose(split_loss, loss, rtol=1e-5)
    traffic = re.findall(r"(\S.*): (.+) planned, (.+) emitted", "\n".join(lines))
    assert traffic
    assert all(planned == emitted for _, planned, emitted in traffic), lines


def test_branches_that_yield_different_shardings_are_brought_to_one():
    def step(weights, count, x):
        gradient = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(weights)
        branches = [lambda w: w, lambda w: w + 1, lambda w: jnp.flip(w, 0)]
        return jax.lax.switch(count % 3, branches, weights - 0.1 * gradient), count + 1

    weights, count = jnp.ones((12, 8)), jnp.int32(0)
    state = jnp.ones((12, 8)), jnp.int32(0)
    x = jnp.linspace(0, 1, 16 * 12).reshape(16, 12)
    parallel = partita.parallelize(step, (weights, count, x), devices=2, plan="fsdp")
    for _ in range(3):
        weights, count = step(weights, count, x)
        state = parallel(*state, x)
    assert jnp.allclose(weights, state[0], rtol=1e-5)


@pytest.mark.parametrize("plan", ["dp", "tp"])
def test_complex_values_are_padded_and_summed(plan):
    def step(weights, phases, x):
        def loss(weights, phases):
            waves = jnp.fft.rfft(x @ weights, axis=1) * jnp.exp(1j * phases)
            return jnp.mean(jnp.abs(waves[:, 1:3] + waves[:, 2:4]) ** 2)

        gradients = jax.grad(loss, (0, 1))(weights, phases)
        return weights - 0.1 * gradients[0], phases - 0.1 * gradients[1]

    x = jnp.linspace(0, 1, 16 * 12).reshape(16, 12)
    args = (jnp.linspace(-1, 1, 96).reshape(12, 8), jnp.linspace(0, 1, 5), x)
    expected = step(*args)
    results = partita.parallelize(step, args, devices=2, plan=plan)(*args)
    for result, value in zip(results, expected, strict=True):
        assert jnp.allclose(result, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_in_16_bit_are_emitted_as_planned(dtype):
    """XLA:CPU sums bfloat16 as float32, and float16 as it is."""

    def step(weights, x):
        gradient = jax.grad(lambda w: jnp.max(jnp.abs(x @ w)))(weights)
        return weights - gradient

    args = jnp.ones((32, 16), dtype), jnp.ones((8, 32), dtype)
    lines: list[str] = []
    partita.parallelize(step, args, devices=2, plan="dp", say=lines.append)(*args)
    (traffic,) = re.findall(r"all_reduce: (.+) planned, (.+) emitted", "\n".join(lines))
    assert traffic[0] == traffic[1], lines

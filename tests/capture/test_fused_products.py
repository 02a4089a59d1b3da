"""Fused projections: one product with slices is split like separate products."""

from collections import Counter

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import partita
from partita.capture import jax_functions
from partita.capture.prepare import prepare
from partita.capture.program import capture_program
from partita.cost.collectives import collectives
from partita.execute.program import planned_step
from partita.graph.grouping import group
from partita.graph.weight_slices import WEIGHT_SLICES
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.layout import layout_of
from partita.plans.plan import mesh_for
from partita.search.find import mesh_of

SAMPLES, POSITIONS, WIDTH, HEADS, INNER = 4, 8, 16, 4, 64
MACHINE = load("h100:4")


def heads_of(x):
    return x.reshape(SAMPLES, POSITIONS, HEADS, WIDTH // HEADS)


def fused_block(p, x):
    """Attention whose query, key and value are one product, and a gated layer of one matrix."""
    x = x @ p["first"] @ p["second"]
    q, k, v = map(heads_of, jnp.split(x @ p["qkv"] + p["bias"], 3, -1))
    scores = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k), -1)
    x = x + jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(x.shape) @ p["out"]
    hidden = x @ p["gate_up"]
    return x + (jax.nn.silu(hidden[..., :INNER]) * hidden[..., INNER:]) @ p["down"]


def step_of(block):
    """A training step with momentum."""

    def step(state, x, y):
        parameters, slots = state

        def loss(parameters):
            return jnp.mean((block(parameters, x) - y) ** 2)

        value, gradients = jax.value_and_grad(loss)(parameters)
        slots = jax.tree.map(lambda slot, g: 0.9 * slot + g, slots, gradients)
        parameters = jax.tree.map(lambda p, slot: p - 0.1 * slot, parameters, slots)
        return (parameters, slots), value

    return step


def arguments(shapes):
    generator = np.random.default_rng(0)
    parameters = {}
    for name, shape in shapes.items():
        parameters[name] = generator.standard_normal(shape).astype("float32") / 4
    x = generator.standard_normal((SAMPLES, POSITIONS, WIDTH)).astype("float32")
    return (parameters, jax.tree.map(np.ones_like, parameters)), x, np.ones_like(x)


OTHERS = {name: (WIDTH, WIDTH) for name in ("first", "second", "out")}
OTHERS |= {"down": (INNER, WIDTH)}
FUSED = {"qkv": (WIDTH, 3 * WIDTH), "bias": (3 * WIDTH,), "gate_up": (WIDTH, 2 * INNER), **OTHERS}


RECURRENT = {"input": (WIDTH, 2 * WIDTH), "state": (WIDTH, 2 * WIDTH), "bias": (2 * WIDTH,)}


def recurrent_block(p, x):
    """An unrolled recurrence with two gates: each weight is in a product of every step."""
    states = [jnp.zeros_like(x[:, 0])]
    for position in range(POSITIONS):
        gates = x[:, position] @ p["input"] + p["bias"] + states[-1] @ p["state"]
        forget, new = jnp.split(gates, 2, -1)
        states.append(jax.nn.sigmoid(forget) * states[-1] + jnp.tanh(new))
    return jnp.stack(states[1:], 1)


@pytest.fixture(scope="module")
def graph():
    return capture_program(step_of(fused_block), args=arguments(FUSED), target="cuda").graph


def test_slices_of_a_weight_are_an_operator_beside_their_products(graph):
    kinds = Counter(operator.kind for operator in graph.operators)
    assert kinds == {WEIGHT_SLICES: 2, "dot": 2 + 3 + 2 + 1 + 2 + 1}
    slices = next(o for o in graph.operators if o.kind == WEIGHT_SLICES)
    assert [graph.factors[f].size for f in slices.factors] == [WIDTH]
    products = [o for o in graph.operators if o.kind == "dot"]
    for product in products[2:5]:
        kinds = {graph.factors[f].kind for f in product.factors}
        assert kinds == {"S", "A", "P", "R"}
        names = Counter(graph.instructions[i].name for i in product.instructions)
        assert names["dot_general"] == 3
    update = [i for i in slices.instructions if graph.instructions[i].phase == "update"]
    assert "concatenate" in {graph.instructions[i].name for i in update}


def test_tensor_parallelism_exchanges_rows_of_weights_only(graph):
    plan = check(BASELINES["tensor parallel"](graph, MACHINE.name, mesh_of(MACHINE)), graph)
    sent = Counter()
    for collective in collectives(graph, plan.mesh, layout_of(graph, plan), MACHINE.backend):
        sent[collective.kind] += collective.nbytes
    weights = 4 * WIDTH * (3 * WIDTH + 2 * INNER)
    # As with separate products: forward twice in a block and once before it, backward twice.
    assert sent["all_reduce"] == (3 + 2) * 4 * SAMPLES * POSITIONS * WIDTH
    # Each weight on its way to the products, and each gradient on its way back, by quarters.
    assert sent["all_to_all"] == 2 * weights / 4
    # The gradient of the bias is no operator of its own.
    assert sent["all_gather"] == 4 * 3 * WIDTH


def test_gradients_of_several_products_are_added_before_they_are_joined():
    graph = capture_program(
        step_of(recurrent_block), args=arguments(RECURRENT), target="cuda"
    ).graph
    joined = [x for x in graph.instructions if x.name == "concatenate" and x.phase == "update"]
    assert len(joined) == len(RECURRENT)


def test_devices_sum_the_gradients_of_an_unrolled_lstm_at_most_twice():
    """Once, and once for the first step, whose product stays whole: its state has no gradient."""
    with partita.abstract():
        inputs = keras.Input((POSITIONS, WIDTH))
        model = keras.Model(inputs, keras.layers.LSTM(WIDTH, unroll=True)(inputs))
    model.compile("sgd", "mse")
    graph = capture_program(model, 8, target="cuda").graph
    plan = BASELINES["data parallel"](graph, MACHINE.name, mesh_of(MACHINE))
    summed = 0
    for collective in collectives(graph, plan.mesh, layout_of(graph, plan), MACHINE.backend):
        summed += collective.total if collective.kind == "all_reduce" else 0
    scalar = 4
    assert summed <= 2 * 4 * graph.parameter_count + scalar


def test_a_converted_weight_that_only_a_fused_product_reads_is_erased_once():
    def gated(p, x):
        hidden = x.astype("bfloat16") @ p["w"].astype("bfloat16")
        gate, up = jnp.split(hidden, 2, -1)
        return jax.nn.silu(gate) * up

    assert len(slices_in(gated, {"w": (WIDTH, 2 * WIDTH)})) == 1


@pytest.mark.parametrize(
    ("block", "shapes"),
    [(fused_block, FUSED), (recurrent_block, RECURRENT)],
    ids=["fused", "recurrent"],
)
@pytest.mark.parametrize("name", ["ZeRO-3", "tensor parallel"])
def test_losses_and_updates_are_those_of_one_device(monkeypatch, name, block, shapes):
    def prepared(source, platform):
        return prepare(source, "cuda")

    def grouped(*values, is_accelerated):
        return group(*values, is_accelerated=True)

    monkeypatch.setattr(jax_functions, "prepare", prepared)
    monkeypatch.setattr(jax_functions, "group", grouped)
    step = step_of(block)
    state, x, y = arguments(shapes)
    captured = capture_program(step, args=(state, x, y), target="cpu")
    assert any(operator.kind == WEIGHT_SLICES for operator in captured.graph.operators)
    planned = planned_step(captured, BASELINES[name](captured.graph, "host", mesh_for((4,))))
    placed = planned.place_state(jax.tree.leaves(state))
    outputs, updated = planned.step(placed, planned.place_batch([x, y]))
    expected, value = jax.jit(step)(state, x, y)
    np.testing.assert_allclose(jax.tree.leaves(outputs)[0], value, rtol=1e-5)
    for one, other in zip(updated, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def slices_in(function, shape):
    step = step_of(function)
    captured = capture_program(step, args=arguments(shape), target="cuda")
    return [o for o in captured.graph.operators if o.kind == WEIGHT_SLICES]


def test_other_products_stay_whole():
    def read_whole(p, x):
        hidden = x @ p["w"]
        return x + hidden[..., :WIDTH] * hidden[..., WIDTH:] + jnp.sum(hidden)

    def overlapping(p, x):
        hidden = x @ p["w"]
        return x + hidden[..., :WIDTH] + hidden[..., WIDTH // 2 : WIDTH // 2 + WIDTH]

    def joined_inputs(p, x):
        return x + jnp.concatenate([x, x * x], -1) @ p["w"].T

    for function in (read_whole, overlapping, joined_inputs):
        assert not slices_in(function, {"w": (WIDTH, 2 * WIDTH)})

"""Splits of functions whose gradients read no forward value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.cost.collectives import collectives
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

SAMPLES, ROWS, WIDTH = 16, 12, 8

FUNCTIONS = {
    "chosen rows": lambda x: x[:, jnp.array([0, 3, 3, 7])],
    "chosen columns": lambda x: x[:, :, jnp.array([5, 1])],
    "replaced rows": lambda x: x.at[:, 2:5].set(0),
    "sums of rows": lambda x: jax.vmap(
        lambda rows: jax.ops.segment_sum(rows, jnp.arange(ROWS) // 3, 4)
    )(x),
    "resized": lambda x: jax.image.resize(x, (SAMPLES, 7, WIDTH), "bilinear"),
    "resized twice, as many rows as samples": lambda x: jax.image.resize(
        jax.image.resize(x, (SAMPLES, SAMPLES, WIDTH), "cubic"), (SAMPLES, 5, WIDTH), "linear"
    ),
    "filtered": jax.vmap(jax.vmap(lambda row: jnp.convolve(row, jnp.ones(3) / 3, "same"))),
    "median": lambda x: x - jnp.median(x, axis=1, keepdims=True),
    "means of windows": lambda x: jax.lax.reduce_window(
        x, 0.0, jax.lax.add, (1, 3, 1), (1, 2, 1), "SAME"
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_stay_on_the_devices_of_their_samples(name):
    function = FUNCTIONS[name]

    def step(weights, batch):
        def loss(weights):
            x = jnp.tanh(batch @ weights[0])
            with jax.named_scope("function"):
                x = function(x)
            return ((x @ weights[1][: x.shape[-1]]) ** 2).mean()

        value, slopes = jax.value_and_grad(loss)(weights)
        return {"loss": value}, [w - slope for w, slope in zip(weights, slopes, strict=True)]

    weights = [np.zeros((WIDTH, WIDTH), "float32") for _ in range(2)]
    leaves = [Leaf(str(number), "parameter") for number in range(2)]
    batch = np.zeros((SAMPLES, ROWS, WIDTH), "float32")
    graph = capture_step(step, weights, batch, leaves, batch_size=SAMPLES).graph
    machine = load("h100:4")
    plan = BASELINES["data parallel"](graph, machine.name, mesh_of(machine))
    moved = collectives(graph, plan.mesh, layout_of(graph, plan), machine.backend)
    assert {collective.kind for collective in moved} == {"all_reduce"}

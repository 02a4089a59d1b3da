"""Weights that a network uses many times: their gradients are added up on every device, and
summed over devices once, as planned.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from partita.capture.jax_functions import Captured, Leaf, capture_step
from partita.capture.program import capture_program
from partita.cost.collectives import collectives
from partita.cost.partial import gradients, pending_sums
from partita.execute.emitted import emitted
from partita.execute.program import PlannedStep, planned_step
from partita.execute.verify import compare_steps
from partita.graph.operator_graph import OperatorGraph
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan, mesh_for
from partita.search.candidates import candidates, names_of

WORDS, WIDTH, BATCH, STEPS = 12, 8, 8, 3
SHAPES = {
    "table": (WORDS, WIDTH),
    "kernel": (WIDTH, WIDTH),
    "recurrent": (WIDTH, WIDTH),
    "bias": (WIDTH,),
    "filters": (3, 3, 2, 2),
}


def recurrent(p: dict[str, Any], x: Any) -> Any:
    """A recurrence of three steps: words looked up one step at a time, two products, a bias."""
    h = jnp.zeros((x["words"].shape[0], WIDTH))
    for t in range(STEPS):
        h = jnp.tanh(p["table"][x["words"][:, t]] @ p["kernel"] + h @ p["recurrent"] + p["bias"])
    return (h * h).mean()


def tied(p: dict[str, Any], x: Any) -> Any:
    """One table for the words that come in and the words that go out, and a weight that decays."""
    h = jnp.tanh(p["table"][x["words"]] @ p["kernel"])
    h = jnp.tanh(h @ p["kernel"] + p["bias"]) + p["bias"]
    return jax.nn.logsumexp(h @ p["table"].T, axis=-1).mean() + 0.01 * (p["kernel"] ** 2).sum()


def pyramid(p: dict[str, Any], x: Any) -> Any:
    """One convolution for images of three sizes."""
    convolve = lambda y: jax.lax.conv_general_dilated(
        y, p["filters"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return sum((convolve(x["image"][:, ::s, ::s]) ** 2).mean() for s in (1, 2, 4))


def half(p: dict[str, Any], x: Any) -> Any:
    """Weights kept in float32, products in bfloat16: gradients are widened, then added."""
    h = x["rows"].astype(jnp.bfloat16)
    for _ in range(STEPS):
        h = jnp.tanh(h @ p["kernel"].astype(jnp.bfloat16))
    return (h.astype(jnp.float32) ** 2).mean()


def largest(p: dict[str, Any], x: Any) -> Any:
    """A gradient of the user's own making is a largest value, which is no sum."""

    @jax.custom_vjp
    def shifted(y, b):
        return y + b

    shifted.defvjp(lambda y, b: (y + b, None), lambda _, g: (g, g.max(0)))
    h = x["rows"]
    for _ in range(STEPS):
        h = jnp.tanh(shifted(h @ p["kernel"], p["bias"]))
    return (h * h).mean()


ADDED = ("recurrent", "tied", "half", "largest")
"""Those with gradients that are added before they are summed: XLA sums those of convolutions at
once.
"""
PROGRAMS = {f.__name__: f for f in (recurrent, tied, pyramid, half, largest)}


def captured(loss: Any) -> Captured:
    def step(state, batch):
        value, slopes = jax.value_and_grad(
            lambda state: loss(dict(zip(SHAPES, state, strict=True)), batch)
        )(state)
        return {"loss": value}, jax.tree.map(lambda w, g: w - 0.1 * g, state, slopes)

    shape = jax.ShapeDtypeStruct
    state, batch = arrays()
    like = lambda tree: jax.tree.map(lambda v: shape(v.shape, v.dtype), tree)
    return capture_step(
        step, like(state), like(batch), [Leaf(n, "parameter") for n in SHAPES], batch_size=BATCH
    )


def arrays() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    state = tuple(rng.normal(size=s).astype("float32") for s in SHAPES.values())
    words = rng.integers(0, WORDS, (BATCH, STEPS)).astype("int32")
    rows, image = (
        rng.normal(size=(BATCH, WIDTH)).astype("float32"),
        rng.normal(size=(BATCH, 8, 8, 2)).astype("float32"),
    )
    return state, {"image": image, "rows": rows, "words": words}


def random_plan(graph: OperatorGraph, mesh: Mesh, draw: random.Random) -> Plan:
    """Most operators by sample, the others any way they can be."""
    plan = BASELINES["data parallel"](graph, "host", mesh)
    some = [o for o in range(len(graph.operators)) if draw.random() < 0.4]
    choices = {
        graph.operators[o].name: names_of(graph, mesh, draw.choice(candidates(graph, o, mesh)))
        for o in some
    }
    return check(replace(plan, choices={**plan.choices, **choices}), graph)


def sums(found: Any) -> Counter[tuple[str, int]]:
    """How many collectives there are of each kind and size."""
    return Counter(
        {
            key: n
            for key, n in Counter((c.kind, c.nbytes * c.trips) for c in found).items()
            if key[1] > 4
        }
    )


def planned_sums(step: PlannedStep) -> Counter[tuple[str, int]]:
    return sums(collectives(step.captured.graph, step.plan.mesh, step.layout))


@pytest.mark.parametrize("name", ADDED)
def test_every_gradient_is_summed_over_devices_once_and_the_step_is_the_same(name: str) -> None:
    found = captured(PROGRAMS[name])
    step = planned_step(found, BASELINES["data parallel"](found.graph, "host", mesh_for((2,))))
    pending = pending_sums(found.graph, step.layout)
    assert len(pending.totals) == len(gradients(found.graph)) > 0
    compiled = step.lower().compile()
    assert sums(emitted(compiled.as_text())) == planned_sums(step)
    tolerance = 2e-2 if name == "half" else 1e-5
    assert max(d.relative for d in compare_steps(found, step, *arrays())) < tolerance


@pytest.mark.parametrize(
    ("name", "seed"),
    [("recurrent", 0), ("recurrent", 1), ("tied", 0), ("tied", 1), ("pyramid", 15)],
)
def test_random_plans_of_shared_weights_equal_one_device_and_emit_the_plan(
    name: str, seed: int
) -> None:
    found = captured(PROGRAMS[name])
    step = planned_step(found, random_plan(found.graph, mesh_for((2, 2)), random.Random(seed)))
    compiled = step.lower().compile()
    assert max(d.relative for d in compare_steps(found, step, *arrays())) < 1e-5
    assert (
        sums(emitted(compiled.as_text()))["all_reduce", WIDTH * WIDTH * 4]
        == planned_sums(step)["all_reduce", WIDTH * WIDTH * 4]
    )


def test_an_unrolled_lstm_sums_every_weight_once_and_trains_as_on_one_device() -> None:
    words = keras.Input((STEPS,), dtype="int32")
    h = keras.layers.Embedding(WORDS, WIDTH)(words)
    h = keras.layers.LSTM(WIDTH, return_sequences=True, unroll=True)(h)
    model = keras.Model(words, keras.layers.Dense(WORDS)(h))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = capture_program(model, BATCH)
    step = planned_step(found, BASELINES["data parallel"](found.graph, "host", mesh_for((2,))))
    planned = planned_sums(step)
    assert planned == Counter(
        ("all_reduce", 4 * int(np.prod(w.shape))) for w in model.trainable_variables
    )
    assert planned == sums(emitted(step.lower().compile().as_text()))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: (rng.normal(size=s.shape) * 0.3).astype(s.dtype), found.state)
    batch = jax.tree.map(lambda s: rng.integers(0, WORDS, s.shape).astype(s.dtype), found.batch)
    alone, one, many = jax.jit(found.text.call), state, step.place_state(state)
    for _ in range(3):
        log, one = alone(one, batch)
        split, many = step.step(many, step.place_batch(batch))
        np.testing.assert_allclose(jax.tree.leaves(log)[0], jax.tree.leaves(split)[0], rtol=1e-5)

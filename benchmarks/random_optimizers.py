"""Small random models with random optimizers, for `staged_equality.py --optimizers`: a Keras model
or a JAX step, captured, with a batch for each of a few steps.

Optimizers have conditionals, accumulators, averages and schedules, and some read the loss. Every
loss is a mean over samples and no layer sees the batch as a whole, so a step in microbatches has
the result of one step on the batch. Divisors have an epsilon of 0.1: Adam would turn the rounding of
a gradient that is zero in mathematics into a full step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
from keras import layers, optimizers

from partita.capture.functions import call_of, capture_call
from partita.capture.jax_functions import Captured
from partita.capture.keras_models import ModelVariables, capture_model

SAMPLES = 16
WIDTH = 16
STEPS = 4
"""More than two periods of an accumulator of 2, and one of 3."""


@dataclass(frozen=True)
class Case:
    """A captured step, the state it starts from, and a batch per step."""

    name: str
    captured: Captured
    state: Any
    batches: tuple[Any, ...]


def random_case(seed: int) -> Case:
    """A Keras model, or a JAX step; the same for the same seed."""
    r = random.Random(seed)
    return r.choice([keras_case, jax_case])(seed, r)


# -------------------------------------------------------------------------------------------- Keras


def keras_case(seed: int, r: random.Random) -> Case:
    """A perceptron, some with a shared layer or normalized residuals."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((WIDTH,))
    shared = layers.Dense(WIDTH, activation="tanh", name="shared")
    for number in range(r.randint(2, 4)):
        kind = r.choice(["dense", "dense", "shared", "residual"])
        if kind == "dense":
            x = layers.Dense(WIDTH, activation="tanh", name=f"dense_{number}")(x)
        elif kind == "shared":
            x = shared(x)
        else:
            x = x + layers.Dense(WIDTH, name=f"residual_{number}")(layers.LayerNormalization()(x))
    outputs = layers.Dense(8, activation="softmax", name="head")(x)
    model = keras.Model(inputs, outputs)
    optimizer, name = keras_optimizer(r)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    is_guarded = isinstance(optimizer, optimizers.LossScaleOptimizer)
    rng = np.random.default_rng(seed)
    batches = []
    for x in _inputs(rng, is_guarded and r.random() < 0.7):
        batches.append((x, rng.integers(0, 8, SAMPLES).astype("int32")))
    captured = capture_model(model, batches[0])
    state = tuple([np.array(v.value) for v in group] for group in ModelVariables.of(model).groups())
    return Case(f"keras {name}", captured, state, tuple(batches))


def keras_optimizer(r: random.Random) -> tuple[keras.Optimizer, str]:
    """(an optimizer with random options, its description)."""
    rate = r.choice(
        [
            0.1,
            optimizers.schedules.ExponentialDecay(0.1, 2, 0.5, staircase=r.random() < 0.5),
            optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.1, 0.02, 0.05]),
            optimizers.schedules.CosineDecay(0.02, 3, warmup_target=0.1, warmup_steps=2),
        ]
    )
    options: dict[str, Any] = {"learning_rate": rate}
    if r.random() < 0.5:
        options["gradient_accumulation_steps"] = r.choice([2, 3])
    clip = r.choice(["", "clipnorm", "global_clipnorm", "clipvalue"])
    if clip:
        options[clip] = r.choice([0.02, 0.3])
    if r.random() < 0.5:
        options |= {"use_ema": True, "ema_momentum": 0.8}
        options["ema_overwrite_frequency"] = r.choice([None, 2])
    if r.random() < 0.4:
        options["weight_decay"] = 0.05
    kind = r.choice(["SGD", "SGD", "Adam", "Nadam", "Adafactor"])
    if kind == "SGD":
        options |= {"momentum": r.choice([0.0, 0.9]), "nesterov": r.random() < 0.5}
    elif kind in ("Adam", "Nadam"):
        options["epsilon"] = 0.1
    if kind == "Adam" and r.random() < 0.3:
        options["amsgrad"] = True
    scaling = r.choice(["", "fixed", "dynamic"])
    if scaling == "fixed":
        options["loss_scale_factor"] = 64.0
    optimizer = getattr(optimizers, kind)(**options)
    if scaling == "dynamic":
        optimizer = optimizers.LossScaleOptimizer(
            optimizer, initial_scale=64.0, dynamic_growth_steps=2
        )
    return optimizer, f"{kind} {options} {scaling}"


# ---------------------------------------------------------------------------------------------- JAX


def jax_case(seed: int, r: random.Random) -> Case:
    """Layers, an Optax chain, and scalars that the step updates by itself."""
    rng = np.random.default_rng(seed)
    count = r.randint(2, 4)
    weights = {}
    for number in range(count):
        kernel = rng.normal(size=(WIDTH, WIDTH)) / WIDTH**0.5
        weights[f"layer{number}"] = {
            "kernel": kernel.astype("float32"),
            "bias": np.zeros(WIDTH, "float32"),
        }
    chain, name, is_guarded = random_chain(r)
    by_hand = r.sample(list(BY_HAND), r.randint(0, 2))
    reads_loss = "polyak" in name or "plateau" in name
    is_ahead = not reads_loss and r.random() < 0.2
    if is_ahead:
        chain = optax.lookahead(chain, sync_period=2, slow_step_size=0.5)
    optimizer = optax.with_extra_args_support(chain)
    parameters: Any = optax.LookaheadParams.init_synced(weights) if is_ahead else weights
    state = {
        "weights": parameters,
        "slots": optimizer.init(parameters),
        "by_hand": {name: BY_HAND[name].initial(weights) for name in by_hand},
    }

    def step(state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        old = state["weights"]
        fast: Any = getattr(old, "fast", old)
        loss, gradients = jax.value_and_grad(_mean_loss)(fast, x, y)
        more = {} if is_ahead else {"value": loss}
        updates, slots = optimizer.update(gradients, state["slots"], old, **more)
        new = optax.apply_updates(old, updates)
        new_fast = getattr(new, "fast", new)
        scalars = {}
        for name, value in state["by_hand"].items():
            rule = BY_HAND[name]
            scalars[name] = rule.update(value, loss, new_fast, len(x))
        return loss, {"weights": new, "slots": slots, "by_hand": scalars}

    batches = []
    for x in _inputs(rng, is_guarded and r.random() < 0.7):
        batches.append((x, rng.normal(size=(SAMPLES, WIDTH)).astype("float32")))
    captured = capture_call(step, call_of(step, (state, *batches[0]), {}))
    state_leaves = captured.split(call_of(step, (state, *batches[0]), {}))[0]
    parts = [captured.split(call_of(step, (state, *batch), {}))[1] for batch in batches]
    name = f"jax {name}{' lookahead' if is_ahead else ''} {by_hand}"
    start = [np.array(leaf) for leaf in state_leaves]
    return Case(name, captured.captured, start, tuple(parts))


def _mean_loss(weights: Any, x: Any, y: Any) -> Any:
    for name in sorted(weights):
        with jax.named_scope(name):
            x = jnp.tanh(x @ weights[name]["kernel"] + weights[name]["bias"])
    return jnp.mean((x - y) ** 2)


def random_chain(r: random.Random) -> tuple[optax.GradientTransformation, str, bool]:
    """(a chain of random transformations, its description, whether it skips infinite gradients)."""
    names = r.sample(list(TRANSFORMATIONS), r.randint(0, 3))
    base = r.choice(list(BASES))
    last = ["plateau"] if r.random() < 0.4 else []
    steps = [TRANSFORMATIONS[name]() for name in names]
    steps.append(BASES[base]())
    if last:
        steps.append(
            optax.contrib.reduce_on_plateau(
                factor=0.5, patience=1, cooldown=1, accumulation_size=r.choice([1, 2])
            )
        )
    chain = optax.chain(*steps)
    around = r.choice(["", "", *AROUND])
    if around in MULTI_STEPS and (last or base == "polyak"):
        around = "finite"  # MultiSteps passes no loss on.
    if around:
        chain = AROUND[around](chain)
    description = " ".join([*names, base, *last, around])
    return chain, description, around in ("finite", "skip")


def _schedule() -> optax.Schedule:
    return optax.join_schedules(
        [optax.linear_schedule(0.02, 0.1, 2), optax.exponential_decay(0.1, 2, 0.5)], [2]
    )


def _is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim == 2, tree)


def _kinds(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "vector", tree)


TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "global norm": lambda: optax.clip_by_global_norm(0.05),
    "adaptive": lambda: optax.adaptive_grad_clip(0.02),
    "block": lambda: optax.clip_by_block_rms(0.005),
    "value": lambda: optax.clip(0.003),
    "centralize": optax.centralize,
    "decay": lambda: optax.masked(optax.add_decayed_weights(0.05), _is_matrix),
    "average": lambda: optax.ema(0.8),
    "zero nans": optax.zero_nans,
    "every second": lambda: optax.conditionally_mask(
        optax.scale(1.0), lambda step, **_: jnp.asarray(step) % 2 == 0
    ),
    "accumulated": lambda: optax.apply_every(2),
}
BASES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(_schedule(), 0.9),
    "adam": lambda: optax.adam(0.1, eps=0.1),
    "injected": lambda: optax.inject_hyperparams(optax.sgd)(_schedule()),
    "scheduled": lambda: optax.chain(optax.scale_by_schedule(_schedule()), optax.scale(-1)),
    "partition": lambda: optax.partition(
        {"matrix": optax.sgd(0.1, 0.9), "vector": optax.adam(0.1, eps=0.1)}, _kinds
    ),
    "polyak": lambda: optax.polyak_sgd(0.1, eps=0.1),
    "schedule-free": lambda: optax.contrib.schedule_free_sgd(0.1),
}
AROUND: dict[str, Callable[[Any], Any]] = {
    "steps": lambda chain: optax.MultiSteps(chain, 2).gradient_transformation(),
    "steps of 3": lambda chain: optax.MultiSteps(chain, 3, False).gradient_transformation(),
    "skip": lambda chain: optax.MultiSteps(
        chain, 2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "finite": lambda chain: optax.apply_if_finite(chain, 3),
    "flat": optax.flatten,
}


MULTI_STEPS = ("steps", "steps of 3", "skip")


@dataclass(frozen=True)
class Rule:
    """State that a step updates by itself."""

    initial: Callable[[Any], Any]
    """From weights."""
    update: Callable[[Any, Any, Any, int], Any]
    """From its old value, the loss, the new weights, and the number of samples."""


def _patience(value: Any, loss: Any, weights: Any, samples: int) -> Any:
    best, waited = value
    return jnp.minimum(best, loss), jnp.where(loss < best, 0, waited + 1)


def _every_third(value: Any, loss: Any, weights: Any, samples: int) -> Any:
    count, average = value
    average = jax.lax.cond(
        count % 3 == 2,
        lambda: jax.tree.map(lambda a, w: 0.5 * a + 0.5 * w, average, weights),
        lambda: average,
    )
    return count + 1, average


def _of_samples(value: Any, loss: Any, weights: Any, samples: int) -> Any:
    count, total = value
    return count + samples, total + samples * loss


def _average(value: Any, loss: Any, weights: Any, samples: int) -> Any:
    return jax.tree.map(lambda average, weight: 0.9 * average + 0.1 * weight, value, weights)


BY_HAND = {
    "counter": Rule(lambda weights: jnp.int32(0), lambda n, *_: n + 1),
    "average of loss": Rule(lambda weights: jnp.float32(1), lambda a, loss, *_: 0.9 * a + loss),
    "patience": Rule(lambda weights: (jnp.float32(9), jnp.int32(0)), _patience),
    "average of weights": Rule(lambda weights: weights, _average),
    "every third": Rule(lambda weights: (jnp.int32(0), weights), _every_third),
    "sum of losses": Rule(lambda weights: jnp.float32(0), lambda s, loss, *_: s + loss),
    "samples": Rule(lambda weights: (jnp.int32(0), jnp.float32(0)), _of_samples),
}


def _inputs(rng: np.random.Generator, is_infinite: bool) -> Sequence[np.ndarray]:
    """Inputs of each step; the second has an infinite value, if asked."""
    batches = [rng.normal(size=(SAMPLES, WIDTH)).astype("float32") for _ in range(STEPS)]
    if is_infinite:
        batches[1][rng.integers(SAMPLES)] = np.nan
    return batches

"""Random models under random legal plans against one device: loss, metrics, and every updated
variable.

    python benchmarks/equality.py --models 60 --plans 5            # 300 pairs in float32
    python benchmarks/equality.py --models 60 --plans 5 --float64  # the same in float64, to 1e-9
    python benchmarks/equality.py --models 100 --plans 3 --layers  # kinds of `layer_models.py`
    python benchmarks/equality.py --models 60 --plans 5 --rematerialize
    python benchmarks/equality.py --models 60 --plans 5 --offload

With `--layers`, plans go beyond those of a search: every axis of a mesh of 2 to 8 devices splits
any factor that it divides, in any order, and variables are stored over any free axes.

With `--rematerialize`, random runs of operators are computed again in the backward pass, and some
variables are stored over a part of their free axes (HSDP). XLA:CPU merges a copy with its original
if both are equal, so the results test the copies, not the memory.

With `--offload`, the slots of random variables are in host memory (`pinned_host` of a CPU), and
some variables are stored over a part of their free axes.

The optimizer is SGD with momentum, so that an updated variable and its slot are the gradient
itself; Adam would turn the rounding of a gradient that is zero in mathematics (a bias before a
normalisation) into a full step. A difference is relative to the largest value of its tensor, and at
least to a thousandth of the largest value of all.

Pairs of an unstable model are counted apart, as neither equal nor different: its step on one device
returns values that are not a number, or changes by more than the tolerance if its state is rounded
differently. With `--xla_backend_optimization_level=0`, XLA:CPU rounds `x * scale + shift` in two
ways: for the maximum, and again for the comparison with it. No value may then equal the maximum,
and its gradient is lost or not a number.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import layers
from layer_models import random_case

from partita.capture.keras_models import ModelVariables, capture_model
from partita.errors import PlanError
from partita.execute.program import planned_step
from partita.graph.operator_graph import Argument, OperatorGraph
from partita.graph.rematerialize import useful_runs
from partita.plans.baselines import storage_for
from partita.plans.check import check, illegal_reason
from partita.plans.plan import Mesh, Plan, Storage, mesh_for
from partita.search.candidates import candidates, names_of

TOLERANCE = {"float32": 2e-3, "float64": 1e-9}
MESHES = ((2,), (3,), (2, 2), (5,), (2, 3), (3, 2), (6,), (7,), (8,), (2, 4), (4, 2), (2, 2, 2))
"""Devices of each level of a mesh, outermost first."""


Change = Callable[[OperatorGraph, Plan, random.Random], Plan]
"""Adds random states to a plan."""


class Standardize(keras.layers.Layer):
    """A normalisation over some axes in the model's own precision; Keras' own means are float32,
    whatever goes in.
    """

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def build(self, shape: tuple[int, ...]) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        x = x - jnp.mean(x, self.axes, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x * x, self.axes, keepdims=True) + 1e-3) * self.scale


class Attention(keras.layers.Layer):
    """Self-attention of four heads in the model's own precision."""

    def build(self, shape: tuple[int, ...]) -> None:
        d = shape[-1]
        self.kernels = [
            self.add_weight(shape=(d, 4, d // 4), name=n) for n in ("query", "key", "value")
        ]
        self.out = self.add_weight(shape=(4, d // 4, d), name="out")

    def call(self, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, w.value) for w in self.kernels)
        scores = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2, axis=-1)
        return jnp.einsum("bhts,bshk,hkd->btd", scores, v, self.out.value)


def normalization(r: random.Random, rank: int) -> keras.layers.Layer:
    """A normalisation layer of random kind: Keras' own in float32."""
    if keras.config.floatx() == "float64":
        return Standardize(r.choice([(-1,), tuple(range(rank - 1)), tuple(range(1, rank))]))
    images = [
        layers.BatchNormalization,
        lambda: layers.GroupNormalization(4),
        layers.LayerNormalization,
    ]
    return r.choice(images if rank == 4 else [layers.LayerNormalization, layers.RMSNormalization])()


def pooled(rank: int) -> type[keras.layers.Layer]:
    """Global pooling: by average, which Keras computes in float32, only where that is the
    precision.
    """
    if keras.config.floatx() == "float64":
        return (layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D)[rank - 1]
    return (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D)[rank - 1]


def image_model(r: random.Random) -> tuple[keras.Model, np.ndarray]:
    """A few convolutional blocks of random kind: strides, groups, dilation, normalisation,
    residuals, gates, pooling.
    """
    size, channels = r.choice([8, 16]), r.choice([4, 8])
    x = inputs = keras.Input((size, size, channels))
    for _ in range(r.randint(1, 3)):
        before, width = x, r.choice([8, 16])
        kind = r.choice(
            ["conv", "stride", "separable", "depthwise", "dilated", "grouped", "transposed"]
        )
        if kind == "conv":
            x = layers.Conv2D(width, r.choice([1, 3]), padding="same")(x)
        elif kind == "stride":
            x = layers.Conv2D(width, 3, strides=2, padding=r.choice(["same", "valid"]))(
                layers.ZeroPadding2D(1)(x)
            )
        elif kind == "separable":
            x = layers.SeparableConv2D(width, 3, padding="same")(x)
        elif kind == "depthwise":
            x = layers.DepthwiseConv2D(3, strides=r.choice([1, 2]), padding="same")(x)
        elif kind == "dilated":
            x = layers.Conv2D(width, 3, padding="same", dilation_rate=2)(x)
        elif kind == "grouped":
            x = layers.Conv2D(width, 3, padding="same", groups=2)(x)
        else:
            x = layers.Conv2DTranspose(width, 3, strides=2, padding="same")(x)
        x = normalization(r, 4)(x)
        x = layers.Activation(r.choice(["relu", "gelu", "silu"]))(x)
        if x.shape == before.shape and r.random() < 0.5:
            x = layers.Add()([x, before])
        elif x.shape[1:3] == before.shape[1:3] and r.random() < 0.3:
            x = layers.Concatenate()([x, before])
        if r.random() < 0.3:
            gate = layers.Dense(x.shape[-1], activation="sigmoid")(pooled(2)(keepdims=True)(x))
            x = layers.Multiply()([x, gate])
        if r.random() < 0.4 and x.shape[1] >= 4:
            x = r.choice([layers.MaxPooling2D, layers.AveragePooling2D])(
                r.choice([2, 3]), strides=2, padding="same"
            )(x)
    x = r.choice([layers.Flatten, pooled(2), layers.GlobalMaxPooling2D])()(x)
    return keras.Model(inputs, layers.Dense(16, activation="softmax")(x)), np.zeros(
        (16, size, size, channels)
    )


def sequence_model(r: random.Random) -> tuple[keras.Model, np.ndarray]:
    """Embedding, then attention, recurrent or convolutional layers over a sequence."""
    length, width = r.choice([8, 16]), r.choice([16, 32])
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(64, width)(inputs)
    for _ in range(r.randint(1, 2)):
        kind = r.choice(["attention", "grouped", "lstm", "gru", "rnn", "conv", "both"])
        if keras.config.floatx() == "float64":
            kind = r.choice(["own", "conv"])
        h = normalization(r, 3)(x)
        if kind == "attention":
            h = layers.MultiHeadAttention(4, width // 4)(h, h, use_causal_mask=r.random() < 0.5)
        elif kind == "grouped":
            h = layers.GroupQueryAttention(8, 4, 2)(h, h)
        elif kind == "own":
            h = Attention()(h)
        elif kind == "conv":
            h = layers.Conv1D(width, 3, padding="causal")(h)
        elif kind == "both":
            h = layers.Bidirectional(layers.GRU(width // 2, return_sequences=True))(h)
        else:
            cell = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.SimpleRNN}[kind]
            h = cell(width, return_sequences=True)(h)
        x = x + h
        if r.random() < 0.5:
            x = x + layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(x))
    x = r.choice([pooled(1), layers.Flatten, layers.GlobalMaxPooling1D])()(x)
    return keras.Model(inputs, layers.Dense(16, activation="softmax")(x)), np.zeros(
        (16, length), "int32"
    )


def dense_model(r: random.Random) -> tuple[keras.Model, np.ndarray]:
    """A multi-layer perceptron, its layers sometimes shared, with dropout."""
    x = inputs = keras.Input((32,))
    shared = layers.Dense(32, activation="relu")
    for _ in range(r.randint(1, 4)):
        x = r.choice(
            [
                layers.Dense(r.choice([32, 64]), activation="tanh"),
                layers.Dense(32),
                layers.Dropout(0.3),
            ]
        )(x)
        if x.shape[-1] == 32 and r.random() < 0.4:
            x = shared(x)
    return keras.Model(inputs, layers.Dense(16, activation="softmax")(x)), np.zeros((16, 32))


MAKERS = (image_model, image_model, sequence_model, sequence_model, dense_model)


def random_model(seed: int) -> tuple[keras.Model, tuple[np.ndarray, np.ndarray]]:
    """A compiled model and a batch, the same for the same seed."""
    r, rng = random.Random(seed), np.random.default_rng(seed)
    keras.utils.set_random_seed(seed)
    model, x = r.choice(MAKERS)(r)
    x = (
        rng.integers(0, 64, x.shape).astype("int32")
        if x.dtype == np.int32
        else rng.standard_normal(x.shape).astype(keras.config.floatx())
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model, (x, rng.integers(0, 16, 16).astype("int32"))


def random_plan(graph: OperatorGraph, mesh: Mesh, generator: random.Random) -> Plan:
    """A legal plan with a random candidate per operator; half of the plans store some variables
    split.
    """
    choices = {}
    for number, operator in enumerate(graph.operators):
        choice = generator.choice(candidates(graph, number, mesh))
        choices[operator.name] = names_of(graph, mesh, choice)
    plan = Plan(graph.name, "host", mesh, choices, {}, "random", graph.batch_size)
    if generator.random() >= 0.5:
        return plan
    storage = {}
    for path, stored in storage_for(graph, plan, generator.choice([1, 3])).items():
        if generator.random() < 0.7:
            storage[path] = stored
    return replace(plan, storage=storage)


def with_random_runs(graph: OperatorGraph, plan: Plan, generator: random.Random) -> Plan:
    """The plan with random rematerialized runs, of one to six operators."""
    names = [operator.name for operator in graph.operators]
    runs = []
    first = 0
    while first < len(names):
        last = min(first + generator.randint(0, 5), len(names) - 1)
        if generator.random() < 0.7:
            runs.append((names[first], names[last]))
        first = last + 1
    plan = replace(plan, recompute=useful_runs(graph, runs))
    return with_hybrid_storage(plan, generator)


def with_random_offload(graph: OperatorGraph, plan: Plan, generator: random.Random) -> Plan:
    """The plan with the optimizer slots of some variables in host memory."""
    with_slots = dict.fromkeys(a.parameter for a in graph.arguments if a.parameter)
    offload = tuple(path for path in with_slots if generator.random() < 0.6)
    return with_hybrid_storage(replace(plan, offload=offload), generator)


def with_hybrid_storage(plan: Plan, generator: random.Random) -> Plan:
    """The plan with some of its variables stored over a part of their axes."""
    storage = {}
    for path, stored in plan.storage.items():
        count = generator.randint(1, len(stored.axes))
        storage[path] = replace(stored, axes=stored.axes[-count:])
    return replace(plan, storage=storage)


def any_plan(graph: OperatorGraph, mesh: Mesh, generator: random.Random) -> Plan:
    """A valid plan that a search need not consider: any factor on any axis, any storage."""
    choices = {}
    for number, operator in enumerate(graph.operators):
        choices[operator.name] = _any_choice(graph, number, mesh, generator)
    plan = Plan(graph.name, "host", mesh, choices, {}, "any", graph.batch_size)
    if generator.random() < 0.5:
        return check(plan, graph)
    for argument in graph.arguments:
        home = graph.home[argument.tensor]
        if argument.role == "parameter" and home >= 0 and generator.random() < 0.6:
            plan = _with_storage(graph, plan, argument, generator)
    return plan


def _any_choice(
    graph: OperatorGraph, number: int, mesh: Mesh, generator: random.Random
) -> dict[str, str]:
    """Factors of an operator on the axes of a mesh, in any order; none where that is illegal."""
    choice: dict[str, str] = {}
    ways: dict[str, int] = {}
    factors = [graph.factors[factor] for factor in graph.operators[number].factors]
    for axis in generator.sample(mesh.axes, len(mesh.axes)):
        possible = [
            factor.name
            for factor in factors
            if factor.size % (ways.get(factor.name, 1) * axis.size) == 0
        ]
        if possible and generator.random() < 0.8:
            name = generator.choice(possible)
            choice[axis.name] = name
            ways[name] = ways.get(name, 1) * axis.size
    return {} if illegal_reason(graph, number, choice, mesh) else choice


def _with_storage(
    graph: OperatorGraph, plan: Plan, argument: Argument, generator: random.Random
) -> Plan:
    """The plan with a variable stored over some axes, or the plan itself where that is invalid."""
    dims = len(graph.tensors[argument.tensor].shape)
    if not dims:
        return plan
    count = generator.randint(1, len(plan.mesh.axes))
    axes = tuple(axis.name for axis in generator.sample(plan.mesh.axes, count))
    stored = Storage(generator.randrange(dims), axes, generator.choice([1, 2, 3]))
    try:
        return check(replace(plan, storage={**plan.storage, argument.path: stored}), graph)
    except PlanError:
        return plan


def difference(left, right, precision: str) -> float:
    """The largest difference of any leaf of this precision, relative as the module's docstring
    says.

    Infinity if one of two different values is not finite.

    In float64, leaves that are float32 all the same (Keras keeps metrics so) must agree to float32
    rounding.
    """
    a, b = ([np.asarray(v) for v in jax.tree.leaves(tree)] for tree in (left, right))
    typical = 1e-3 * max(_largest(v) for v in a if v.dtype.kind == "f")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.dtype.kind == "f" and x.size:
            apart = (x != y) & ~(np.isnan(x) & np.isnan(y))
            if not np.isfinite(x[apart] - y[apart]).all():
                return float("inf")
            error = _largest(x[apart] - y[apart]) / max(_largest(x), typical)
            if x.dtype == precision:
                worst = max(worst, error)
            elif error > 1e-5:
                return float("inf")
        elif (x != y).any():
            return float("inf")
    return worst


def _largest(values: np.ndarray) -> float:
    """The largest absolute value that is finite; 0 if none is."""
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def plain(graph: OperatorGraph, plan: Plan, generator: random.Random) -> Plan:
    return plan


def pairs(
    models: int, plans: int, precision: str, first: int = 0, change: Change = plain
) -> Iterator[tuple[str, Plan, float, bool]]:
    """(name of the model, plan, difference, whether the model is unstable) of every pair of a model
    and a plan of a search.
    """
    mesh = mesh_for((8,))
    for seed in range(first, first + models):
        model, batch = random_model(seed)
        comparison = Comparison(model, batch)
        unstable = is_unstable(comparison.step, comparison.state, comparison.batch, precision)
        generator = random.Random(1000 + seed)
        for _ in range(plans):
            plan = random_plan(comparison.captured.graph, mesh, generator)
            plan = change(comparison.captured.graph, plan, generator)
            yield f"model {seed}", plan, comparison.difference(plan, precision), unstable


def layer_pairs(
    models: int, plans: int, precision: str, first: int = 0, change: Change = plain
) -> Iterator[tuple[str, Plan, float, bool]]:
    """The same for the kinds of `layer_models.py`, under any valid plans of 2 to 8 devices."""
    for seed in range(first, first + models):
        case = random_case(seed)
        comparison = Comparison(case.model, case.batch)
        unstable = is_unstable(comparison.step, comparison.state, comparison.batch, precision)
        generator = random.Random(1000 + seed)
        for _ in range(plans):
            mesh = mesh_for(generator.choice(MESHES))
            plan = any_plan(comparison.captured.graph, mesh, generator)
            plan = change(comparison.captured.graph, plan, generator)
            error = comparison.difference(plan, precision)
            yield f"model {seed} ({case.kind})", plan, error, unstable


class Comparison:
    """A model's step on one device, to be compared with the same step under plans."""

    def __init__(self, model: keras.Model, batch: Any) -> None:
        self.captured = capture_model(model, batch)
        self.batch = batch
        self.state = tuple(
            [np.asarray(v.value) for v in group] for group in ModelVariables.of(model).groups()
        )
        self.step = jax.jit(model.train_step)
        outputs = self.step(jax.tree.map(jnp.asarray, self.state), batch)
        self.outputs = jax.tree.map(np.asarray, outputs)

    def difference(self, plan: Plan, precision: str) -> float:
        """The largest difference of the step under a plan; see `difference`."""
        step = planned_step(self.captured, plan)
        state = step.place_state(jax.tree.map(jnp.asarray, self.state))
        return difference(self.outputs, step.step(state, step.place_batch(self.batch)), precision)


def is_unstable(step: Callable[..., Any], state: Any, batch: Any, precision: str) -> bool:
    """Whether a step returns values that are not a number, or changes by more than the tolerance
    if its state is rounded differently.
    """
    rng = np.random.default_rng(0)
    outputs = jax.tree.map(np.asarray, step(state, batch))
    if any(np.isnan(v).any() for v in jax.tree.leaves(outputs) if v.dtype.kind == "f"):
        return True
    rounded = jax.tree.map(lambda value: _rounded(value, rng), state)
    return difference(outputs, step(rounded, batch), precision) > TOLERANCE[precision]


def _rounded(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The value, each number of it changed at random by at most the precision of its type."""
    if value.dtype.kind != "f":
        return value
    factors = 1 + np.finfo(value.dtype).eps * rng.integers(-1, 2, value.shape)
    return (value * factors).astype(value.dtype)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=60)
    parser.add_argument("--plans", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--layers", action="store_true", help="models of layer_models.py")
    changed = parser.add_mutually_exclusive_group()
    changed.add_argument("--rematerialize", action="store_true", help="plans with random runs")
    changed.add_argument("--offload", action="store_true", help="plans with slots in host memory")
    arguments = parser.parse_args()
    precision = "float64" if arguments.float64 else "float32"
    if arguments.float64:
        jax.config.update("jax_enable_x64", True)
    keras.config.set_floatx(precision)
    keras.config.set_dtype_policy(precision)
    start = time.time()
    worst = 0.0
    failed = 0
    unstable = 0
    count = 0
    chosen = layer_pairs if arguments.layers else pairs
    change = plain
    if arguments.rematerialize:
        change = with_random_runs
    elif arguments.offload:
        change = with_random_offload
    for name, plan, error, unstable_model in chosen(
        arguments.models, arguments.plans, precision, arguments.first, change
    ):
        count += 1
        if count % 30 == 0:
            print(f"{count} pairs, largest {worst:.3g}", flush=True)
        if unstable_model:
            unstable += 1
            print(f"{name} is unstable on one device: a plan differs by {error:.3g}", flush=True)
            continue
        worst = error if math.isnan(error) else max(worst, error)
        if not error <= TOLERANCE[precision]:
            failed += 1
            print(f"{name}: differs by {error:.3g}\n{plan}", flush=True)
    print(
        f"{count} pairs in {precision}, {failed} differ by more than {TOLERANCE[precision]:g}, "
        f"{unstable} of unstable models, largest {worst:.3g}, {time.time() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

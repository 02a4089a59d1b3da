"""Steps with unequal shares equal the plain step; steps that are no sums over samples are refused."""

import itertools

import jax
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from partita.capture.keras_models import ModelVariables, capture_model
from partita.errors import PlanError
from partita.execute.program import planned_step
from partita.execute.shares import SharesStep, check_shares, shares_step
from partita.management.shares import microbatch_count, shares_of
from partita.plans.baselines import BASELINES
from partita.plans.plan import Mesh

BATCH = 32


def step_of(model: keras.Model, data, plan: str = "data parallel") -> SharesStep:
    captured = capture_model(model, data)
    return shares_step(captured, BASELINES[plan](captured.graph, "host", Mesh.of((2, 2))))


def compiled(inputs, outputs, loss=None, **more) -> keras.Model:
    model = keras.Model(inputs, outputs)
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, **more), loss, metrics=["accuracy"])
    return model


def tokens():
    """Sums over samples of several kinds: a scatter, products; also a penalty and a norm of all."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Flatten()(layers.Dropout(0.2)(layers.Embedding(50, 4)(inputs)))
    outputs = layers.Dense(8, kernel_regularizer="l2")(x)
    model = compiled(inputs, outputs, global_clipnorm=0.1)
    rng = np.random.default_rng(0)
    return model, (rng.integers(0, 50, (BATCH, 6)).astype("int32"), labels())


def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 8, BATCH).astype("int32")


def vectors() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((BATCH, 16)).astype("float32")


def with_weights():
    """As many features as samples: the program of a part has a number more."""
    inputs = keras.Input((16,))
    x = layers.Dense(BATCH, activity_regularizer="l2")(inputs)
    model = compiled(inputs, layers.Dense(8)(layers.LayerNormalization()(x)))
    return model, (vectors(), labels(), np.linspace(0, 1, BATCH, dtype="float32"))


def difference(ours, theirs) -> float:
    largest = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, "f8"), np.asarray(b, "f8")
        largest = max(largest, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3)))
    return largest


@pytest.mark.parametrize(
    "make, plan", [(tokens, "ZeRO-1"), (with_weights, "data parallel")], ids=["tokens", "weights"]
)
def test_changing_shares_equal_the_plain_step(make, plan: str):
    keras.utils.set_random_seed(0)
    model, data = make()
    step = step_of(model, data, plan)
    program = step.compile()
    assert check_shares(step, program).peak_bytes > 0
    plain = planned_step(step.captured, step.plan)
    plain_program = plain.compile()
    variables = [v for group in ModelVariables.of(model).groups() for v in group]
    values = [np.array(variable.value) for variable in variables]
    theirs = ours = jax.tree.unflatten(jax.tree.structure(step.captured.state), values)
    ours, theirs = step.place_state(ours), plain.place_state(theirs)
    for shares in [(4, 4, 4, 4), (16, 0, 0, 0), (1, 5, 8, 2), (0, 0, 3, 13)]:
        logs, ours = program(ours, step.with_shares(shares).place_batch(data))
        their_logs, theirs = plain_program(theirs, plain.place_batch(data))
        assert difference((logs, ours), (their_logs, theirs)) < 2e-6


def normalized():
    inputs = keras.Input((16,))
    x = layers.BatchNormalization(name="norm")(layers.Dense(8)(inputs))
    return compiled(inputs, x), (vectors(), labels())


def root():
    inputs = keras.Input((16,))

    def loss(_, outputs):
        return keras.ops.sqrt(keras.ops.mean(outputs**2))

    return compiled(inputs, layers.Dense(8)(inputs), loss), (vectors(), labels())


def contrasted():
    inputs = keras.Input((16,))

    def loss(_, outputs):
        pairs = keras.ops.matmul(outputs, keras.ops.transpose(outputs))
        return keras.ops.mean(keras.ops.logsumexp(pairs, axis=-1))

    return compiled(inputs, layers.Dense(8)(inputs), loss), (vectors(), labels())


def recurrent():
    inputs = keras.Input((6, 3))
    model = compiled(inputs, layers.Dense(8)(layers.SimpleRNN(4, name="rnn")(inputs)))
    return model, (np.ones((BATCH, 6, 3), "float32"), labels())


@pytest.mark.parametrize(
    "make, sentence",
    [
        (normalized, "'norm' computes a sample with values of the other samples"),
        (root, "computes a sample with values of the other samples"),
        (contrasted, "computes a sample with values of the other samples"),
        (recurrent, "'rnn' computes samples in a while"),
    ],
)
def test_steps_that_are_no_sums_over_samples_are_refused(make, sentence: str):
    with pytest.raises(PlanError, match=sentence) as error:
        step_of(*make())
    assert "it has no shares" in str(error.value)


def small():
    inputs = keras.Input((16,))
    return compiled(inputs, layers.Dense(8, name="out")(inputs)), (vectors(), labels())


@pytest.mark.parametrize(
    "plan, sentence",
    [
        ("tensor parallel", "splits 'out' by P over axis a, so devices need each other"),
        ("ZeRO-3", "stores 'out/kernel' in parts .ZeRO-3., so devices need each other"),
    ],
)
def test_plans_that_need_other_devices_in_a_microbatch_are_refused(plan: str, sentence: str):
    with pytest.raises(PlanError, match=sentence):
        step_of(*small(), plan)


def test_shares_are_whole_numbers_that_add_up():
    step = step_of(*small())
    assert step.shares == (4, 4, 4, 4)
    for shares in [(4, 4, 4), (4, 4, 4, 5), (-1, 5, 6, 6), (4.0, 4, 4, 4)]:
        with pytest.raises(PlanError, match="are not 4 whole numbers from 0 that add up to 16"):
            step.with_shares(shares)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0, 0.1, 0.3, 0.5, 1, 2]), min_size=2, max_size=3))
def test_shares_end_as_soon_as_any(speeds: list[float]):
    count = 6
    if not any(speeds):
        with pytest.raises(PlanError, match="No device has a speed above 0"):
            shares_of(speeds, count)
        return

    def seconds(shares) -> float:
        times = [n / s if s else (np.inf if n else 0) for n, s in zip(shares, speeds, strict=True)]
        return max(times)

    tries = itertools.product(range(count + 1), repeat=len(speeds))
    best = min(seconds(shares) for shares in tries if sum(shares) == count)
    shares = shares_of(speeds, count)
    assert sum(shares) == count
    assert seconds(shares) == pytest.approx(best)


def test_a_batch_without_two_microbatches_per_device_has_no_shares():
    assert microbatch_count(10, 2) == 5
    with pytest.raises(PlanError, match="no 8 equal microbatches of 2 or more samples for 4"):
        microbatch_count(14, 4)

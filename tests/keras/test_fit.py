"""A planned `fit` does what Keras's own does: same losses, metrics and weights, to float32
rounding.
"""

import copy
import dataclasses
import itertools
import pickle
import signal
import warnings
from typing import Any

import jax
import keras
import numpy as np
import pytest
from keras import layers

from partita.errors import MemoryBudgetError, PartitaError, PlanError
from partita.execute.verify import Verification
from partita.keras.fit import attach, attached
from partita.plans.baselines import BASELINES
from partita.plans.plan import mesh_for

MESH = mesh_for((4,))


def planner(name, calls=None):
    def plan(captured):
        if calls is not None:
            calls.append(captured.graph.batch_size)
        return BASELINES[name](captured.graph, "host", MESH)

    return plan


def data(shape, classes=5, count=52, integers=0):
    rng = np.random.RandomState(0)
    x = (
        rng.randint(0, integers, (count, *shape))
        if integers
        else rng.rand(count, *shape).astype("float32")
    )
    return x, rng.randint(0, classes, count)


def mlp():
    return keras.Sequential(
        [layers.Dense(32, activation="relu", name="d1"), layers.Dense(5, name="d2")]
    )


def cnn():
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(8, 3, padding="same", use_bias=False, name="c1"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(),
            layers.MaxPool2D(),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(5, name="d"),
        ]
    )


def lstm():
    return keras.Sequential(
        [keras.Input((6, 4)), layers.LSTM(8, name="lstm"), layers.Dense(5, name="d")]
    )


def attention():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(20, 8, name="embed")(tokens)
    x = layers.LayerNormalization(name="norm")(
        x + layers.MultiHeadAttention(2, 4, name="mha")(x, x)
    )
    return keras.Model(tokens, layers.Dense(5, name="d")(layers.GlobalAveragePooling1D()(x)))


MODELS = {
    "mlp": (mlp, data((12,))),
    "cnn": (cnn, data((8, 8, 3))),
    "lstm": (lstm, data((6, 4))),
    "attention": (attention, data((6,), integers=20)),
}


def made(
    build=mlp, plan=None, optimizer: Any = "adam", report=None, calls=None, **compiling
) -> Any:
    """A model from fixed seeds; attached to the plan of a baseline if one is named."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = build()
    if plan is not None:
        model = attach(model, planner(plan, calls), report=report)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **{"metrics": ["accuracy"], **compiling})
    return model


def trained(model, x, y, **how):
    return model.fit(
        x, y, **{"batch_size": 16, "epochs": 2, "shuffle": False, "verbose": 0, **how}
    ).history


def close(left, right, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a, "float64"), np.asarray(b, "float64")
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(a).max(initial=0))
        )


def devices_of(model):
    return len(model.trainable_variables[0].value.sharding.device_set)


@pytest.mark.parametrize(
    ("name", "other"),
    [("mlp", "tensor parallel"), ("cnn", "spatial"), ("lstm", "ZeRO-1"), ("attention", "ZeRO-3")],
)
def test_two_epochs_and_what_follows_equal_plain_keras(name, other, tmp_path):
    build, (x, y) = MODELS[name]

    def run(model):
        history = trained(
            model, x, y, validation_data=(x[:7], y[:7])
        )  # 52 samples: 16 + 16 + 16 + 4
        return [
            history,
            model.get_weights(),
            model.evaluate(x[:23], y[:23], batch_size=16, verbose=0),
            model.predict(x[:7], verbose=0),
        ]

    momentum = {"class_name": "SGD", "config": {"learning_rate": 0.1, "momentum": 0.9}}
    expected = run(made(build, optimizer=momentum))
    for plan in ("data parallel", other):
        planned = made(build, plan, momentum)
        close(expected, run(planned), 1e-4)
        assert devices_of(planned) == 4
        assert len(attached(planned).steps) == 2
        planned.save(tmp_path / "model.keras")
        close(
            planned.get_weights(),
            keras.models.load_model(tmp_path / "model.keras").get_weights(),
            0,
        )


def plain_and_planned(
    prepare=lambda model: None,
    plan="data parallel",
    build=mlp,
    x=None,
    y=None,
    compiling=None,
    **how,
):
    """Fits a plain and a planned model the same way; both, and their histories."""
    found = []
    for name in (None, plan):
        model = made(build, name, **(compiling or {}))
        prepare(model)
        kwargs = {k: v() if callable(v) else v for k, v in how.items()}
        found.append(
            (model, trained(model, *((x, y) if x is not None else MODELS["mlp"][1]), **kwargs))
        )
    (plain, a), (planned, b) = found
    close(a, b)
    close(plain.get_weights(), planned.get_weights(), 1e-4)
    return plain, planned


def test_steps_per_execution_sample_weight_class_weight_and_validation_split():
    x, _ = MODELS["mlp"][1]
    weights = np.linspace(0, 2, len(x)).astype("float32")
    plain_and_planned(
        compiling={"steps_per_execution": 3}, sample_weight=weights, validation_split=0.25
    )
    plain_and_planned(class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0, 4: 3.0}, batch_size=13)


def test_generators_pydatasets_and_steps_per_epoch():
    x, y = MODELS["mlp"][1]

    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return x[13 * i : 13 * i + 13], y[13 * i : 13 * i + 13]

    def endless():
        while True:
            yield x[:16], y[:16]
            yield x[16:24], y[16:24]

    def ending():
        yield from itertools.islice(endless(), 5)

    for make, how in ((Rows, {}), (endless, {"steps_per_epoch": 3}), (ending, {})):
        histories = []
        for plan in (None, "data parallel"):
            model = made(plan=plan)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a generator that ends
                histories.append(
                    model.fit(make(), epochs=2, shuffle=False, verbose=0, **how).history
                )
        close(*histories)


def test_train_on_batch_and_test_on_batch_and_predict_on_batch():
    x, y = MODELS["mlp"][1]
    results = []
    for plan in (None, "tensor parallel"):
        model = made(plan=plan)
        results.append(
            [
                [model.train_on_batch(x[i : i + 8], y[i : i + 8]) for i in range(0, 24, 8)],
                model.test_on_batch(x, y),
                model.predict_on_batch(x[:5]),
                model(x[:3]),
            ]
        )
    close(*results)
    assert devices_of(model) == 4


def test_a_trained_model_is_moved_and_keeps_its_optimizer_and_a_second_compile_keeps_the_plan():
    x, y = MODELS["mlp"][1]
    calls, results = [], []
    for plan in (None, "data parallel"):
        model = made()
        trained(model, x, y)
        before = model.get_weights()
        if plan is not None:
            attach(model, planner(plan, calls))
        first = trained(model, x, y)
        model.optimizer.learning_rate = 0.01
        second = trained(model, x, y)
        model.compile("sgd", "sparse_categorical_crossentropy")
        third = trained(model, x, y)
        results.append((before, first, second, third, model.get_weights()))
    close(*results)
    assert calls == [16]


def test_a_layer_that_is_never_called_is_no_obstacle():
    class Deep(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = [layers.Dense(8, activation="relu") for _ in range(3)]
            self.last = layers.Dense(5)

        def call(self, x, training=False, depth=2):
            for layer in self.inner[:depth]:
                x = layer(x)
            return self.last(x * 2 if training else x)

    _, planned = plain_and_planned(build=Deep)
    assert devices_of(planned) == 4


def test_another_model_size_after_a_compile_is_planned_again():
    x, y = MODELS["mlp"][1]
    calls = []
    model = made(plan="data parallel", calls=calls)
    trained(model, x, y, epochs=1)
    model.get_layer("d1").trainable = False
    model.compile("sgd", "sparse_categorical_crossentropy")
    trained(model, x[:12], y[:12], batch_size=6, epochs=1)
    assert calls == [16, 6]


def test_callbacks_see_and_set_the_weights(tmp_path):
    x, y = MODELS["mlp"][1]

    def callbacks():
        return [
            keras.callbacks.EarlyStopping(
                monitor="val_loss", patience=0, min_delta=10.0, restore_best_weights=True
            ),
            keras.callbacks.ModelCheckpoint(
                str(tmp_path / "best.weights.h5"), save_weights_only=True, save_freq=2
            ),
            keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr / 2),
            keras.callbacks.BackupAndRestore(str(tmp_path / "backup")),
            keras.callbacks.TerminateOnNaN(),
        ]

    _, planned = plain_and_planned(callbacks=callbacks, validation_split=0.25, epochs=4)
    restored = made()
    restored.build((None, 12))
    restored.load_weights(tmp_path / "best.weights.h5")
    planned.load_weights(tmp_path / "best.weights.h5")
    close(restored.evaluate(x, y, verbose=0), planned.evaluate(x, y, verbose=0))
    close(trained(restored, x, y, epochs=1)["loss"], trained(planned, x, y, epochs=1)["loss"], 1e-2)
    assert devices_of(planned) == 4


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=3),
        lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1, global_clipnorm=0.5),
    ],
)
def test_optimizers_with_state_of_their_own(optimizer):
    results = []
    for plan in (None, "ZeRO-1"):
        model = made(plan=plan, optimizer=optimizer())
        results.append((trained(model, *MODELS["mlp"][1]), model.get_weights()))
    close(*results, 1e-4)


def test_mixed_float16_scales_its_loss():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        results = []
        for plan in (None, "data parallel"):
            model = made(plan=plan)
            results.append(
                (
                    trained(model, *MODELS["mlp"][1])["loss"],
                    [v.value for v in model.optimizer.variables][:2],
                )
            )
        close(*results, 2e-3)
    finally:
        keras.config.set_dtype_policy("float32")


def test_two_models_take_turns():
    x, y = MODELS["mlp"][1]
    results = []
    for plan in (None, "data parallel"):
        first, second = made(plan=plan), made(plan=plan)
        for _ in range(2):
            first.train_on_batch(x[:16], y[:16])
            second.train_on_batch(x[16:32], np.asarray(first(x[16:32])).argmax(-1))
        results.append((first.get_weights(), second.get_weights()))
    close(*results)


@pytest.mark.parametrize("compiling", [{"run_eagerly": True}, {"jit_compile": False}])
def test_what_runs_eagerly_trains_unplanned_with_one_sentence(compiling):
    said = []
    model = made(plan="data parallel", report=said.append, **compiling)
    x, y = MODELS["mlp"][1]
    trained(model, x[:8], y[:8], epochs=1)
    assert devices_of(model) == 1
    given = "run_eagerly=True" if "run_eagerly" in compiling else "jit_compile=False"
    assert said == [
        f"The model 'sequential' is compiled with {given}, so it trains on one device, as Keras runs it."
    ]


def test_a_step_without_compilation_trains_unplanned_with_one_sentence():
    said = []
    model = made(plan="data parallel", report=said.append)
    with jax.disable_jit():
        trained(model, *MODELS["mlp"][1], batch_size=4)
    assert said == [
        "The training step of 'sequential' cannot be captured without compilation. Unset "
        "JAX_DISABLE_JIT (jax_disable_jit). It trains on one device, as Keras runs it."
    ]


def test_augmentation_that_keras_does_not_compile_is_planned_all_the_same():
    def build():
        return keras.Sequential(
            [keras.Input((8, 8, 3)), layers.RandomRotation(0.1), layers.Flatten(), layers.Dense(5)]
        )

    x, y = MODELS["cnn"][1]
    plain, planned = plain_and_planned(build=build, x=x[:16], y=y[:16], epochs=1, plan="spatial")
    close(plain.evaluate(x[:8], y[:8], verbose=0), planned.evaluate(x[:8], y[:8], verbose=0), 1e-4)
    assert not planned.jit_compile
    assert devices_of(planned) == 4


def test_what_cannot_be_captured_trains_unplanned_with_one_sentence():
    def build():
        return keras.Sequential([layers.Dense(8), layers.Lambda(tapped), layers.Dense(5)])

    seen = []

    def tapped(x):
        jax.debug.callback(lambda v: seen.append(float(v)), x.mean())
        return x

    said = []
    plain, model = made(build), made(build, "data parallel", report=said.append)
    close(trained(plain, *MODELS["mlp"][1]), trained(model, *MODELS["mlp"][1]))
    assert devices_of(model) == 1
    assert len(said) == 1
    start = "The training step of 'sequential' cannot be captured: it calls Python on the host ("
    assert said[0].startswith(start)
    assert said[0].endswith("Remove these calls. It trains on one device, as Keras runs it.")
    assert seen


def test_a_step_that_another_process_cannot_compile_is_left_to_keras_by_all(monkeypatch):
    def agreed(name, reason):
        return reason or ("Process 1: out of memory." if name == "compiled steps" else "")

    said = []
    model = made(plan="data parallel", report=said.append)
    monkeypatch.setitem(attach.__globals__, "agreed_failure", agreed)
    trained(model, *MODELS["mlp"][1], epochs=1)
    assert devices_of(model) == 1
    assert said == ["Process 1: out of memory. It trains on one device, as Keras runs it."]


def test_a_first_batch_that_is_wrong_is_an_error_of_keras_and_the_next_one_is_planned():
    said = []
    model = made(report=said.append)
    x, y = MODELS["mlp"][1]
    trained(model, x, y, epochs=1)
    attach(model, planner("data parallel"), report=said.append)
    with pytest.raises(
        ValueError,
        match="expected axis -1 of input shape to have value 12, but received input with shape",
    ):
        trained(model, x[:, :11], y, epochs=1)
    assert said == []
    trained(model, x, y, epochs=1)
    assert devices_of(model) == 4


def test_a_plan_of_one_device_leaves_training_to_keras():
    model = made(plan="one device")
    trained(model, *MODELS["mlp"][1])
    assert devices_of(model) == 1
    assert model.train_function is not None


def test_many_shapes_of_batches_are_said_where_keras_trains_too():
    said = []
    model = made(plan="one device", report=said.append)
    x, y = MODELS["mlp"][1]
    for count in (3, 4, 5, 4, 6, 7, 8):
        trained(model, x[:count], y[:count], epochs=2)
    assert [sentence.split(",")[0] for sentence in said] == [
        "'sequential' has had batches of 5 shapes"
    ]
    assert "train_step" not in vars(model)


def test_a_plan_for_more_devices_than_there_are_is_refused_and_nothing_is_lost():
    model = made()
    model.build((None, 12))
    before = model.get_weights()
    attach(
        model, lambda captured: BASELINES["data parallel"](captured.graph, "host", mesh_for((16,)))
    )
    with pytest.raises(
        PlanError, match=r"is for 16 devices, and JAX has 8\. Plan for 8, or start with 16\."
    ):
        trained(model, *MODELS["mlp"][1])
    close(before, model.get_weights(), 0)


def test_what_the_compiler_refuses_is_planned_again_with_its_word():
    said, asked = [], []

    def choose(captured, refused=None):
        asked.append(refused and refused.excess)
        return planner("ZeRO-3" if refused else "data parallel")(captured)

    def refuse(step, compiled, state, batch):
        if step.plan.name == "data parallel":
            raise MemoryBudgetError(
                "The plan needs 9 GiB, and a device has 1 GiB. Use a smaller batch.", 1.5
            )
        return Verification(1 << 20, None, (), None, None)

    model = made()
    attach(model, choose, report=said.append, verifier=refuse)
    trained(model, *MODELS["mlp"][1])
    assert asked == [None, 1.5]
    assert said[:2] == [
        "The plan needs 9 GiB, and a device has 1 GiB. Planned again within that limit.",
        "memory per device, by the compiler: 1.0 MiB",
    ]
    assert attached(model).plan.name == "ZeRO-3"


def test_a_step_that_does_not_fit_is_refused_before_it_runs_and_nothing_is_lost():
    def refuse(step, compiled, state, batch):
        raise MemoryBudgetError("too large")

    model = made()
    model.build((None, 12))
    before = model.get_weights()
    attach(model, planner("data parallel"), verifier=refuse)
    with pytest.raises(MemoryBudgetError, match="too large"):
        trained(model, *MODELS["mlp"][1])
    close(before, model.get_weights(), 0)


def test_an_interrupt_or_an_error_in_the_data_keeps_what_was_learned():
    x, y = MODELS["mlp"][1]
    plain = made()
    plain.fit(x[:32], y[:32], batch_size=16, shuffle=False, verbose=0)
    for error in (KeyboardInterrupt, ValueError):

        def broken(error=error):
            yield x[:16], y[:16]
            yield x[16:32], y[16:32]
            raise error

        model = made(plan="ZeRO-3")
        with pytest.raises(error):
            model.fit(broken(), verbose=0)
        close(plain.get_weights(), model.get_weights())
        model.fit(x, y, verbose=0)

        model = made(plan="ZeRO-3")
        model.build((None, 12))
        before = model.get_weights()
        with pytest.raises(error):
            model.fit((raising(error) for _ in range(1)), verbose=0, steps_per_epoch=1)
        close(before, model.get_weights(), 0)


@pytest.fixture
def interrupts():
    """Python's own SIGINT handler, also where tests run in the background and the shell has it
    ignored.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(interrupts):
    x, y = MODELS["mlp"][1]
    plain = made()
    plain.train_on_batch(x[:16], y[:16])
    plain.train_on_batch(x[16:32], y[16:32])
    model = made(plan="data parallel")
    model.train_on_batch(x[:16], y[:16])
    fit = attached(model)
    ((key, step),) = fit.steps.items()

    def interrupted(*arguments):
        found = step.program(*arguments)
        signal.raise_signal(signal.SIGINT)
        return found

    fit.steps[key] = dataclasses.replace(step, program=interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.train_on_batch(x[16:32], y[16:32])
    close(plain.get_weights(), model.get_weights())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_attached_model_is_copied_and_pickled_as_keras_does():
    model = made(plan="data parallel")
    trained(model, *MODELS["mlp"][1], epochs=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(model.get_weights(), other.get_weights(), 0)
    assert attached(keras.models.clone_model(model)) is None


def raising(error):
    raise error


def test_only_keras_models_that_make_keras_train_functions_are_attached():
    class Own(keras.Sequential):
        def make_train_function(self, force=False):
            return super().make_train_function(force)

    with pytest.raises(PartitaError, match="'Own' makes its own train function"):
        attach(Own([layers.Dense(1)]), planner("data parallel"))
    with pytest.raises(
        PartitaError,
        match="Only a Keras model on the JAX backend can be attached, and this is a 'Dense'",
    ):
        attach(layers.Dense(1), planner("data parallel"))

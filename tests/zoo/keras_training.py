"""Programs of the zoo: ways to train, evaluate, feed and save."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from zoo.keras_models import SPARSE, trained
from zoo.programs import Par, images, program, tokens, vectors


def mlp(**last: Any) -> Any:
    return keras.Sequential(
        [
            keras.Input((12,)),
            layers.Dense(24, activation="relu"),
            layers.Dense(12, activation="relu"),
            layers.Dense(4, **last),
        ]
    )


@program("mixed precision in float16, the loss scaled", tolerance=2e-2)
def mixed_float16(par: Par) -> Any:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return trained(
            par,
            mlp(dtype="float32"),
            *vectors(),
            optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05)),
        )
    finally:
        keras.config.set_dtype_policy("float32")


@program("mixed precision in bfloat16", tolerance=5e-2)
def mixed_bfloat16(par: Par) -> Any:
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = keras.Sequential(
            [
                layers.Conv2D(8, 3, use_bias=False),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dense(4, dtype="float32"),
            ]
        )
        return trained(par, model, *images())
    finally:
        keras.config.set_dtype_policy("float32")


@program("gradient accumulation over steps")
def gradient_accumulation(par: Par) -> Any:
    return trained(
        par, mlp(), *vectors(), optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    )


@program("exponential moving average of the weights, overwritten at the end")
def moving_average(par: Par) -> Any:
    return trained(
        par,
        mlp(),
        *vectors(),
        optimizer=keras.optimizers.SGD(
            0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=3
        ),
    )


@program("SwapEMAWeights callback")
def swap_average(par: Par) -> Any:
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)
    return trained(
        par,
        mlp(),
        *vectors(),
        optimizer=optimizer,
        callbacks=[keras.callbacks.SwapEMAWeights(swap_on_epoch=True)],
    )


@program("frozen layers, then fine-tuned after a second compile")
def frozen_then_tuned(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.layers[0].trainable = False
    first = trained(par, model, x, y)
    model.layers[0].trainable = True
    model.compile(keras.optimizers.SGD(0.01), SPARSE)
    second = model.fit(x, y, batch_size=12, epochs=1, verbose=0, shuffle=False).history
    return first, second, model.get_weights()


@program("LoRA on dense and embedding layers")
def lora(par: Par) -> Any:
    x, y = tokens()
    model = keras.Sequential(
        [
            keras.Input((8,), dtype="int32"),
            layers.Embedding(24, 8),
            layers.Flatten(),
            layers.Dense(16),
            layers.Dense(4),
        ]
    )
    keras.utils.set_random_seed(4)
    model.layers[0].enable_lora(2)
    model.layers[2].enable_lora(4)
    return trained(par, model, x, y)


@program("weights quantised to int8, trained through LoRA")
def int8(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model(x)
    model.layers[0].quantize("int8")
    keras.utils.set_random_seed(4)
    model.layers[0].enable_lora(2)
    return trained(par, model, x, y)


@program("jit_compile=False", sentence="jit_compile=False")
def not_jitted(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile("sgd", SPARSE, jit_compile=False)
    model = par(model)
    return model.fit(x, y, batch_size=12, verbose=0, shuffle=False).history, model.get_weights()


@program("run_eagerly=True", sentence="run_eagerly=True")
def eagerly(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile("sgd", SPARSE, run_eagerly=True)
    model = par(model)
    return model.fit(x, y, batch_size=12, verbose=0, shuffle=False).history, model.get_weights()


@program("train_on_batch, test_on_batch, predict_on_batch in a custom loop")
def on_batch(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile("sgd", SPARSE, metrics=["accuracy"])
    model = par(model)
    logs = [
        model.train_on_batch(x[i : i + 8], y[i : i + 8], return_dict=True) for i in range(0, 26, 8)
    ]
    return (
        logs,
        model.test_on_batch(x[:7], y[:7]),
        model.predict_on_batch(x[:5]),
        model.get_weights(),
    )


@program("batch sizes that do not divide: 7, 5 and a last one of 1")
def odd_batches(par: Par) -> Any:
    x, y = images(count=15)
    model = keras.Sequential(
        [layers.Conv2D(8, 3), layers.BatchNormalization(), layers.Flatten(), layers.Dense(4)]
    )
    model.compile("sgd", SPARSE, metrics=["accuracy"])
    model = par(model)
    history = model.fit(x, y, batch_size=7, epochs=2, verbose=0, shuffle=False).history
    return (
        history,
        model.evaluate(x, y, batch_size=5, verbose=0),
        model.predict(x, batch_size=7, verbose=0),
        model.get_weights(),
    )


@program("callbacks that stop, reduce, schedule, save and log")
def callbacks(par: Par) -> Any:
    x, y = vectors()
    seen: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = [
            keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True),
            keras.callbacks.ReduceLROnPlateau("val_loss", patience=1, min_delta=1.0),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
            keras.callbacks.ModelCheckpoint(
                f"{folder}/best.weights.h5", save_best_only=True, save_weights_only=True
            ),
            keras.callbacks.ModelCheckpoint(f"{folder}/{{epoch}}.keras"),
            keras.callbacks.CSVLogger(f"{folder}/log.csv"),
            keras.callbacks.TerminateOnNaN(),
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: seen.append(logs["loss"])
            ),
        ]
        first = trained(par, mlp(), x, y, validation_split=0.25, epochs=4, callbacks=chosen)
        saved = keras.models.load_model(f"{folder}/2.keras")
        return first, seen, saved.get_weights(), Path(f"{folder}/log.csv").read_text().count("\n")


@program("BackupAndRestore: interrupted and resumed")
def backup(par: Par) -> Any:
    x, y = vectors()

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 1:
                raise RuntimeError("stopped")

    with tempfile.TemporaryDirectory() as folder:
        keras.utils.set_random_seed(0)
        model = mlp()
        model.compile("sgd", SPARSE)
        model = par(model)
        with contextlib.suppress(RuntimeError):
            model.fit(
                x,
                y,
                batch_size=12,
                epochs=4,
                verbose=0,
                shuffle=False,
                callbacks=[keras.callbacks.BackupAndRestore(folder), Stop()],
            )
        history = model.fit(
            x,
            y,
            batch_size=12,
            epochs=4,
            verbose=0,
            shuffle=False,
            callbacks=[keras.callbacks.BackupAndRestore(folder)],
        ).history
        return history, model.get_weights()


@program("TerminateOnNaN ends a training that diverged")
def diverged(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile(keras.optimizers.SGD(1e30), SPARSE)
    model = par(model)
    history = model.fit(
        x,
        y,
        batch_size=12,
        epochs=3,
        verbose=0,
        shuffle=False,
        callbacks=[keras.callbacks.TerminateOnNaN()],
    ).history
    return len(history["loss"])


@program("validation_data with its own batch size, validation_split, validation_freq")
def validation(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile("sgd", SPARSE, metrics=["accuracy"])
    model = par(model)
    a = model.fit(
        x,
        y,
        batch_size=12,
        epochs=2,
        verbose=0,
        shuffle=False,
        validation_data=(x[:9], y[:9]),
        validation_batch_size=5,
    ).history
    b = model.fit(
        x,
        y,
        batch_size=12,
        epochs=2,
        verbose=0,
        shuffle=False,
        validation_split=0.3,
        validation_freq=2,
    ).history
    return a, b, model.get_weights()


@program("sample weights and class weights")
def weighted(par: Par) -> Any:
    x, y = vectors()
    weight = np.linspace(0.1, 2, len(x)).astype("float32")
    model = mlp()
    model.compile("sgd", SPARSE, weighted_metrics=["accuracy"])
    model = par(model)
    a = model.fit(x, y, sample_weight=weight, batch_size=12, verbose=0, shuffle=False).history
    b = model.fit(
        x, y, class_weight={0: 1.0, 1: 2.0, 2: 0.5, 3: 1.0}, batch_size=12, verbose=0, shuffle=False
    ).history
    return (
        a,
        b,
        model.evaluate(x, y, sample_weight=weight, batch_size=12, verbose=0),
        model.get_weights(),
    )


@program("several steps an execution")
def steps_per_execution(par: Par) -> Any:
    x, y = vectors(count=42)
    model = mlp()
    model.compile("sgd", SPARSE, steps_per_execution=3, metrics=["accuracy"])
    model = par(model)
    history = model.fit(x, y, batch_size=12, epochs=2, verbose=0, shuffle=False).history
    return history, model.get_weights(), model.predict(x, batch_size=12, verbose=0)


@program("a generator, endless, with steps_per_epoch")
def generator(par: Par) -> Any:
    x, y = vectors()

    def batches() -> Any:
        while True:
            for i in range(0, 24, 6):
                yield x[i : i + 6], y[i : i + 6]

    model = mlp()
    model.compile("sgd", SPARSE)
    model = par(model)
    history = model.fit(
        batches(),
        steps_per_epoch=4,
        epochs=2,
        verbose=0,
        validation_data=batches(),
        validation_steps=2,
    ).history
    return history, model.get_weights()


@program("a generator that ends early")
def short_generator(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile("sgd", SPARSE)
    model = par(model)
    history = model.fit(
        ((x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)), steps_per_epoch=5, verbose=0
    ).history
    return history, model.get_weights()


class Data(keras.utils.PyDataset):
    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.x, self.y = vectors()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return self.x[8 * i : 8 * i + 8], self.y[8 * i : 8 * i + 8]


@program("PyDataset with workers")
def py_dataset(par: Par) -> Any:
    model = mlp()
    model.compile("sgd", SPARSE)
    model = par(model)
    history = model.fit(
        Data(workers=2, max_queue_size=4), epochs=2, verbose=0, shuffle=False
    ).history
    return history, model.get_weights(), model.predict(Data(), verbose=0)


@program("saved, loaded, get_weights and set_weights, trained on")
def saving(par: Par) -> Any:
    x, y = vectors()
    with tempfile.TemporaryDirectory() as folder:
        model = mlp()
        first = trained(par, model, x, y)
        model.save(f"{folder}/model.keras")
        model.save_weights(f"{folder}/model.weights.h5")
        again = par(keras.models.load_model(f"{folder}/model.keras"))
        second = again.fit(x, y, batch_size=12, verbose=0, shuffle=False).history
        model.load_weights(f"{folder}/model.weights.h5")
        model.set_weights([w * 0.5 for w in model.get_weights()])
        third = model.fit(x, y, batch_size=12, verbose=0, shuffle=False).history
        return (
            first,
            second,
            third,
            again.get_weights(),
            model.get_weights(),
            again.optimizer.iterations.numpy(),
        )


@program("a second fit, after which the model is cloned and used as a layer")
def second_fit(par: Par) -> Any:
    x, y = vectors()
    model = mlp()
    model.compile("sgd", SPARSE)
    model = par(model)
    history = [
        model.fit(x, y, batch_size=12, epochs=1, verbose=0, shuffle=False).history for _ in range(2)
    ]
    history.append(
        model.fit(x, y, batch_size=6, initial_epoch=1, epochs=2, verbose=0, shuffle=False).history
    )
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return history, clone.predict(x, verbose=0), np.asarray(model(x)), model.get_weights()


@program("two models that train in turns, one plan each")
def two_models(par: Par) -> Any:
    x, y = vectors()
    models = [
        mlp(),
        keras.Sequential([keras.Input((12,)), layers.Dense(6, activation="tanh"), layers.Dense(4)]),
    ]
    for model in models:
        model.compile("sgd", SPARSE)
    models = [par(m) for m in models]
    logs = [m.train_on_batch(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16) for m in models]
    return logs, [m.get_weights() for m in models]


@program("a teacher's predictions as a student's targets")
def distillation(par: Par) -> Any:
    x, y = vectors()
    teacher, student = (
        mlp(),
        keras.Sequential([keras.Input((12,)), layers.Dense(8, activation="relu"), layers.Dense(4)]),
    )
    first = trained(par, teacher, x, y)
    return first, trained(par, student, x, teacher.predict(x, verbose=0), "mse")


@program("metrics with state: AUC, F1, top-k, confusion by thresholds")
def metrics(par: Par) -> Any:
    x, y = vectors(classes=2)
    one_hot = np.eye(2, dtype="float32")[y]
    model = keras.Sequential(
        [layers.Dense(16, activation="relu"), layers.Dense(2, activation="softmax")]
    )
    chosen = [
        "accuracy",
        keras.metrics.AUC(),
        keras.metrics.F1Score(),
        keras.metrics.Precision(),
        keras.metrics.TopKCategoricalAccuracy(1),
    ]
    return trained(par, model, x, one_hot, "categorical_crossentropy", metrics=chosen)


def _optimized(par: Par, optimizer: Any) -> Any:
    return trained(par, mlp(), *vectors(), optimizer=optimizer)


@program("Adam with a schedule and clipping by the global norm")
def adam(par: Par) -> Any:
    return _optimized(
        par,
        keras.optimizers.Adam(
            keras.optimizers.schedules.CosineDecay(1e-2, 20), global_clipnorm=1.0
        ),
    )


@program("AdamW with weight decay and clipping by value")
def adamw(par: Par) -> Any:
    return _optimized(par, keras.optimizers.AdamW(1e-2, weight_decay=0.01, clipvalue=0.5))


@program("RMSprop, centered, with momentum")
def rmsprop(par: Par) -> Any:
    return _optimized(
        par, keras.optimizers.RMSprop(1e-3, momentum=0.9, centered=True, clipnorm=1.0)
    )


@program("Adafactor, with factored slots", tolerance=2e-3)
def adafactor(par: Par) -> Any:
    return _optimized(par, keras.optimizers.Adafactor(1e-2))


@program("Lion, Nadam, Adamax, Adagrad, Adadelta and Ftrl, one after the other", tolerance=2e-3)
def other_optimizers(par: Par) -> Any:
    kinds = (
        keras.optimizers.Nadam,
        keras.optimizers.Adamax,
        keras.optimizers.Adagrad,
        keras.optimizers.Adadelta,
        keras.optimizers.Ftrl,
    )
    return [_optimized(par, kind(1e-2)) for kind in kinds]


@program("Muon: orthogonalised updates of matrices", tolerance=5e-3)
def muon(par: Par) -> Any:
    return _optimized(par, keras.optimizers.Muon(1e-2))


@program("a list of losses and lists of metrics")
def list_of_losses(par: Par) -> Any:
    x, y = vectors()
    i = keras.Input((12,))
    h = layers.Dense(16, activation="relu")(i)
    model = keras.Model(i, [layers.Dense(4)(h), layers.Dense(12)(h)])
    model.compile("sgd", [SPARSE, "mae"], loss_weights=[1.0, 0.1], metrics=[["accuracy"], ["mse"]])
    model = par(model)
    history = model.fit(x, [y, x], batch_size=12, verbose=0, shuffle=False).history
    return history, model.evaluate(x, [y, x], batch_size=12, verbose=0), model.get_weights()

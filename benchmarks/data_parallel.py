"""A planned data-parallel `fit` against `keras.distribution.DataParallel`: the same model, data and
devices, in turns.

python benchmarks/data_parallel.py --devices 2 --rounds 7
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--devices", type=int, default=2)
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--samples", type=int, default=1024, help="of an epoch, in batches of 64")
arguments = parser.parse_args()
os.environ["KERAS_BACKEND"] = "jax"
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={arguments.devices}"
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers

from partita.keras.fit import attach
from partita.plans.baselines import BASELINES
from partita.plans.plan import mesh_for


def build() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
        ]
    )
    for layer in (
        layers.Conv2D(64, 3, padding="same", activation="relu"),
        layers.Flatten(),
        layers.Dense(256, activation="relu"),
    ):
        model.add(layer)
    model.add(layers.Dense(10, activation="softmax"))
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


rng = np.random.default_rng(0)
x = rng.random((arguments.samples, 32, 32, 3), dtype="float32")
y = rng.integers(0, 10, arguments.samples).astype("int32")
distribution = keras.distribution.DataParallel(
    devices=keras.distribution.list_devices()[: arguments.devices]
)
planned = attach(
    build(), lambda c: BASELINES["data parallel"](c.graph, "host", mesh_for((arguments.devices,)))
)
keras.distribution.set_distribution(distribution)
peer = build()
times: dict[str, list[float]] = {"partita": [], "keras": []}
for turn in range(arguments.rounds + 1):
    for name, model, where in (("partita", planned, None), ("keras", peer, distribution)):
        keras.distribution.set_distribution(where)
        start = time.perf_counter()
        model.fit(x, y, batch_size=64, epochs=1, verbose=0, shuffle=False)
        if turn:
            times[name].append((time.perf_counter() - start) * 64 / arguments.samples)
medians = {name: statistics.median(t) for name, t in times.items()}
print(
    f"{arguments.devices} devices, median seconds per step: "
    + ", ".join(f"{n} {t * 1e3:.2f} ms" for n, t in medians.items())
)
print(f"ratio {medians['partita'] / medians['keras']:.3f}")

"""Plans a model from Python: look at the plan and at what it beats, keep it as a file, and train by
it.

python examples/plan_from_python.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

from partita.execute.devices import request_cpu_devices

request_cpu_devices(4)  # on a CPU: four virtual devices; changes nothing about accelerators

import keras
import numpy as np
from keras import layers

import partita


def classifier() -> keras.Model:
    """A wide dense classifier: much more to multiply and to store than to send."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(2048, activation="relu", name="wide"),
            layers.Dense(2048, activation="relu", name="deep"),
            layers.Dense(10, name="classes"),
        ],
        name="classifier",
    )
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def main() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(1024, 784)).astype("float32"), random.integers(0, 10, 1024)

    model = classifier()
    plan = partita.plan(model, batch_size=128, devices=4)
    print(plan)

    print("\nbest first, by prediction:")
    for row in partita.compare(model, batch_size=128, devices=4).rows[:4]:
        print(f"  {row.name:16} {row.prediction.seconds * 1e3:6.1f} ms")

    plan.save("plan.json")
    again = partita.Plan.load("plan.json")
    print("\nsaved and loaded is the same plan:", again == plan)

    how = {"batch_size": 128, "epochs": 2, "shuffle": False, "verbose": 0}
    planned = partita.parallelize(model, plan=again).fit(x, y, **how).history["loss"]
    alone = classifier().fit(x, y, **how).history["loss"]
    print("same losses as on one device:", np.allclose(planned, alone, rtol=1e-5))
    print(
        "devices that hold the first kernel:", len(model.layers[0].kernel.value.sharding.device_set)
    )


if __name__ == "__main__":
    main()

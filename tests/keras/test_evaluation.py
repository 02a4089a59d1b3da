"""Evaluation on the mesh: XLA never replicates an activation as a last resort."""

import subprocess
import sys
import textwrap

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partita.keras.evaluation import batch_axes, split_batch

MESH = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))


def sharded(shape, *spec):
    return jax.device_put(np.zeros(shape, np.float32), NamedSharding(MESH, PartitionSpec(*spec)))


def test_axes_of_contractions_come_first():
    assert batch_axes([], MESH) == ["a", "b"]
    assert batch_axes([sharded((4, 4), "b", "a")], MESH) == ["b", "a"]
    assert batch_axes([sharded((4, 4), "a", "b"), sharded((8, 4), "b", None)], MESH) == ["b", "a"]
    assert batch_axes([sharded((4,), "b")], MESH) == ["a", "b"], "a bias has no rows"


def test_a_batch_is_split_by_the_axes_that_divide_it():
    for samples, spec in [(8, ("b", "a")), (6, ("b",)), (3, ())]:
        placed = split_batch(np.zeros((samples, 2)), MESH, ["b", "a"])
        expected = PartitionSpec(spec) if spec else PartitionSpec()
        assert placed.sharding.spec == expected


PROGRAM = """
    import jax, numpy as np, keras
    from keras import layers
    import partita
    from partita.plans.plan import Plan

    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((8, 8, 4)),
        layers.Conv2D(8, 3, padding="same", name="conv"),
        layers.Flatten(),
        layers.Dense(16, name="wide"),
        layers.Dense(4, name="out"),
    ])
    model.compile("sgd", "mse")
    value = {"schema": 1, "graph": "sequential", "machine": "host:4", "batch_size": 8,
             "mesh": {"a": {"size": 2, "level": 0}, "b": {"size": 2, "level": 0}},
             "operators": {"conv": "S:a,b", "wide": "P:a R:b", "out": "R:a"}}
    partita.parallelize(model, plan=Plan.from_json(value))
    x, y = np.ones((16, 8, 8, 4), "float32"), np.ones((16, 4), "float32")
    model.fit(x, y, batch_size=8, verbose=0)
    model.evaluate(x, y, batch_size=8, verbose=0)
    print("devices", len(model.layers[0].kernel.value.sharding.device_set))
"""


def test_the_partitioner_has_nothing_to_warn_of():
    import os

    unset = ("TF_CPP_MIN_LOG_LEVEL", "XLA_FLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment | {"JAX_NUM_CPU_DEVICES": "4"},
    )
    assert done.stdout == "devices 4\n", done.stderr
    assert "rematerialization" not in done.stderr

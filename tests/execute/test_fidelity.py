"""What is planned is what the compiler emits: collectives byte for byte, FLOPs and memory
closely, on small models of every kind.
"""

import keras
import numpy as np
import pytest
from keras import layers

from partita.capture.keras_models import capture_model
from partita.cost.collectives import collectives
from partita.cost.memory import memory
from partita.cost.work import local_flops
from partita.execute.emitted import emitted, peak_bytes
from partita.execute.program import planned_step
from partita.machine import host
from partita.plans.baselines import BASELINES
from partita.search.find import mesh_of

MACHINE = host(8, 8 << 30)


def strided():
    x = inputs = keras.Input((32, 32, 3))
    x = layers.ReLU()(
        layers.BatchNormalization()(layers.Conv2D(16, 7, strides=2, padding="same")(x))
    )
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(32, 1, strides=2)(layers.Conv2D(32, 3, padding="same", activation="relu")(x))
    return keras.Model(inputs, layers.Dense(8)(layers.GlobalAveragePooling2D()(x))), (32, 32, 3)


def patches():
    x = inputs = keras.Input((32, 32, 3))
    x = layers.DepthwiseConv2D(3, padding="same")(layers.Conv2D(16, 4, strides=4)(x))
    return keras.Model(
        inputs, layers.Dense(8)(layers.GlobalAveragePooling2D()(layers.LayerNormalization()(x)))
    ), (32, 32, 3)


def attention():
    x = inputs = keras.Input((16, 32))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 8)(x, x))
    x = x + layers.Dense(32)(layers.Dense(64, activation="gelu")(x))
    return keras.Model(inputs, layers.Dense(8)(layers.Flatten()(x))), (16, 32)


def enlarged(strides, size):
    x = inputs = keras.Input((16, 16, 4))
    x = layers.Conv2DTranspose(8, size, strides=strides, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(8)(layers.GlobalAveragePooling2D()(x))), (16, 16, 4)


@pytest.mark.parametrize(
    "plan", ["data parallel", "ZeRO-3", "tensor parallel", "spatial", "data x tensor"]
)
@pytest.mark.parametrize("make", [strided, patches, attention])
def test_the_compiler_emits_the_planned_collectives(make, plan):
    compare(make, plan)


@pytest.mark.parametrize(("strides", "size"), [((2, 2), 3), ((1, 2), 2), ((1, 1), 3)])
def test_transposed_convolutions_split_in_space(strides, size):
    """Every device computes the whole weight gradient where strides dilate split positions."""
    compare(lambda: enlarged(strides, size), "spatial")


def compare(make, plan):
    """The compiled step of a model under a plan with its plan."""
    keras.utils.clear_session()
    model, shape = make()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    captured = capture_model(model, (np.zeros((16, *shape), "float32"), np.zeros(16, "int32")))
    graph = captured.graph
    step = planned_step(captured, BASELINES[plan](graph, MACHINE.name, mesh_of(MACHINE)))
    compiled = step.lower().compile()
    mesh, backend = step.plan.mesh, MACHINE.backend
    planned = sorted((c.kind, c.nbytes) for c in collectives(graph, mesh, step.layout, backend))
    found = emitted(compiled.as_text())
    assert sum(n for _, n in planned) == sum(e.nbytes * e.trips for e in found)
    assert {k for k, _ in planned} == {e.kind for e in found}
    flops = local_flops(graph, mesh, step.layout, backend, loops_once=True)
    assert flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)
    peak = memory(graph, mesh, step.layout, backend).peak
    assert 0.8 <= peak / peak_bytes(compiled) <= 1.5

"""Peak memory of pipeline stages: planned by the simulator, and by XLA:CPU's compiler.

    python benchmarks/staged_memory.py
    python benchmarks/staged_memory.py --stages 4 --microbatches 8 --only gpt,lstm

Models with Adam, their operators in equal runs on the stages. The rules of the simulator were found
with dense, gpt and cnn; residual and lstm were not looked at.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import keras
import numpy as np
from keras import layers

from partita.capture.keras_models import capture_model
from partita.execute.devices import detect
from partita.execute.program import runnable_step
from partita.execute.staged import StagedStep
from partita.execute.staged_verify import place_peaks, planned_peaks
from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import Mesh, Plan

BATCH = 64
CLASSES = 16
WORDS = 512
LENGTH = 64
WIDTH = 128


def dense() -> keras.Model:
    """Eight dense layers."""
    inputs = x = keras.Input((256,))
    for _ in range(8):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def gpt() -> keras.Model:
    """Four blocks of attention and a dense layer on token numbers."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(tokens)
    for _ in range(4):
        normal = layers.LayerNormalization()(x)
        attention = layers.MultiHeadAttention(4, WIDTH // 4)
        x = x + attention(normal, normal, use_causal_mask=True)
        wide = layers.Dense(4 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(wide)
    return keras.Model(tokens, layers.Dense(WORDS)(x))


def cnn() -> keras.Model:
    """Three convolutions with batch normalization."""
    inputs = x = keras.Input((32, 32, 3))
    for channels in (32, 64, 64):
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(128, activation="relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def residual() -> keras.Model:
    """Six residual blocks of two dense layers with dropout."""
    inputs = keras.Input((256,))
    x = layers.Dense(512)(inputs)
    for _ in range(6):
        y = layers.Dense(1024, activation="swish")(layers.LayerNormalization()(x))
        x = x + layers.Dropout(0.1)(layers.Dense(512)(y))
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def lstm() -> keras.Model:
    """Two recurrent layers over words."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    x = layers.Embedding(WORDS, WIDTH)(tokens)
    x = layers.LSTM(WIDTH, return_sequences=True)(x)
    return keras.Model(tokens, layers.Dense(CLASSES)(layers.LSTM(WIDTH)(x)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "dense": dense,
    "gpt": gpt,
    "cnn": cnn,
    "residual": residual,
    "lstm": lstm,
}


def pipeline(graph: OperatorGraph, stages: int, microbatches: int) -> Plan:
    """The operators in equal runs on the stages."""
    count = len(graph.operators)
    choices = {}
    for number, operator in enumerate(graph.operators):
        choices[operator.name] = {"a": f"at({number * stages // count})"}
    return Plan(
        graph.name,
        f"host:{stages}",
        Mesh.of((stages,)),
        choices,
        batch_size=graph.batch_size,
        microbatches=microbatches,
    )


def peaks(name: str, stages: int, microbatches: int) -> list[tuple[int, int]]:
    """(planned, compiled) bytes of every stage of a model."""
    model = MODELS[name]()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    inputs = np.zeros((BATCH, *model.input_shape[1:]), model.inputs[0].dtype)
    targets = np.zeros((BATCH, *model.output_shape[1:-1]), "int32")
    captured = capture_model(model, (inputs, targets))
    step = runnable_step(captured, pipeline(captured.graph, stages, microbatches))
    assert isinstance(step, StagedStep)
    planned = planned_peaks(step, detect(stages))
    return list(zip(planned, place_peaks(step, step.compile()), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="Planned and compiled memory of stages.")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--only", help="names of models, separated by commas; by default all")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(MODELS)
    print(f"{arguments.stages} stages, {arguments.microbatches} microbatches of {BATCH} samples")
    for name in names:
        rows = peaks(name, arguments.stages, arguments.microbatches)
        for stage, (planned, compiled) in enumerate(rows):
            ratio = planned / compiled
            megabytes = f"{planned / 1e6:8.3f} {compiled / 1e6:8.3f}"
            print(f"{name:10s} stage {stage}: {megabytes} MB, {ratio:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

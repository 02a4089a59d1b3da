"""Captures the seven Keras training steps that policies are trained and compared on.

    python benchmarks/manage_programs.py [--only mlp] [--output programs.json]

`partita/management/programs.json` is its output. Steps of 0.1 to 32 GFLOP; kernels of at least a
thousandth of a step's work stay apart, smaller ones are merged into the kernel before them.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import keras
from keras import layers

from partita.capture.program import capture_program
from partita.machine import Backend
from partita.management.program import Program, merged, program_rows, step_program

Layers = list[Any]


def _conv(filters: int) -> Any:
    return layers.Conv2D(filters, 3, padding="same", activation="relu")


def cnn() -> Layers:
    convolutions = [_conv(64), _conv(64), layers.MaxPooling2D(), _conv(128), layers.MaxPooling2D()]
    head = [layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(10)]
    return [layers.Input((32, 32, 3)), *convolutions, *head]


def mlp() -> Layers:
    hidden = [layers.Dense(2048, activation="relu") for _ in range(4)]
    return [layers.Input((1024,)), *hidden, layers.Dense(10)]


def lstm() -> Layers:
    return [layers.Input((32, 256)), layers.LSTM(512, unroll=True), layers.Dense(10)]


def embedding() -> Layers:
    head = [layers.Dense(256, activation="relu"), layers.Dense(10)]
    body = [layers.Embedding(60000, 128), layers.GlobalAveragePooling1D()]
    return [layers.Input((64,)), *body, *head]


def depthwise() -> Layers:
    blocks: Layers = [layers.Conv2D(32, 3, strides=2, padding="same")]
    for filters in (64, 128, 128):
        blocks.append(layers.DepthwiseConv2D(3, padding="same", activation="relu"))
        blocks.append(layers.Conv2D(filters, 1, activation="relu"))
        blocks.append(layers.BatchNormalization())
    return [layers.Input((64, 64, 3)), *blocks, layers.GlobalAveragePooling2D(), layers.Dense(10)]


def autoencoder() -> Layers:
    hidden = [layers.Dense(units, activation="relu") for units in (1024, 512, 64, 512, 1024)]
    return [layers.Input((784,)), *hidden, layers.Dense(784)]


def transformer() -> keras.Model:
    tokens = layers.Input((128,))
    x = layers.Embedding(2000, 256)(tokens)
    for _ in range(3):
        attention = layers.MultiHeadAttention(4, 64)(x, x)
        x = layers.LayerNormalization()(x + attention)
        hidden = layers.Dense(1024, activation="gelu")(x)
        x = layers.LayerNormalization()(x + layers.Dense(256)(hidden))
    return keras.Model(tokens, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


NETWORKS: dict[str, tuple[Callable[[], Layers | keras.Model], int]] = {
    "cnn": (cnn, 64),
    "mlp": (mlp, 128),
    "lstm": (lstm, 48),
    "transformer": (transformer, 16),
    "embedding": (embedding, 128),
    "depthwise": (depthwise, 32),
    "autoencoder": (autoencoder, 512),
}
"""Name -> layers or model, and batch size."""


def program(name: str) -> Program:
    """A captured training step with Adam."""
    build, batch_size = NETWORKS[name]
    built = build()
    model = built if isinstance(built, keras.Model) else keras.Sequential(built)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", "mse" if name == "autoencoder" else loss)
    captured = capture_program(model, batch_size)
    return merged(step_program(captured.graph, Backend()), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=list(NETWORKS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    programs = {}
    for name in arguments.only:
        step = program(name)
        programs[name] = program_rows(step)
        nbytes = sum(kernel.nbytes for kernel in step.kernels)
        print(
            f"{name:12} {len(step.kernels):4} kernels {step.flops / 1e9:6.2f} GFLOP "
            f"{nbytes / 1e9:6.3f} GB"
        )
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(programs, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()

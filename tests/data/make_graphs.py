"""Writes the graphs that tests plan from without JAX: `python tests/data/make_graphs.py` after a
change of the graph format.
"""

import os
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import keras
from keras import layers

from partita.capture.program import capture_program


def mlp() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(256, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(16),
        ],
        name="mlp",
    )


def cnn() -> keras.Model:
    x = inputs = keras.Input((16, 16, 8))
    for width in (16, 32):
        x = layers.Conv2D(width, 3, padding="same")(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.Add()([x, layers.Conv2D(width, 1)(x)])
        x = layers.MaxPooling2D()(x)
    x = layers.Dense(64, activation="relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(16)(x), name="cnn")


def transformer() -> keras.Model:
    tokens = keras.Input((16,), dtype="int32")
    x = layers.Embedding(64, 32)(tokens)
    for _ in range(2):
        a = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 8)(a, a, use_causal_mask=True)
        b = layers.LayerNormalization()(x)
        x = x + layers.Dense(32)(layers.Dense(128, activation="gelu")(b))
    return keras.Model(tokens, layers.Dense(64)(x), name="transformer")


if __name__ == "__main__":
    for make in (mlp, cnn, transformer):
        model = make()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        capture_program(model, 32).graph.save(Path(__file__).parent / f"{make.__name__}.graph.json")

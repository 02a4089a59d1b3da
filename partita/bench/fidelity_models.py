"""The models of `partita bench fidelity`: eight small ones of the kinds that people train.

Each function returns a compiled Keras model and its batch size. Nothing in Partita is fitted to
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
from keras import layers

ModelAndBatch = tuple[Any, int]


def mlp() -> ModelAndBatch:
    """Four dense layers of 1024 units."""
    hidden = [layers.Dense(1024, activation="relu") for _ in range(4)]
    model = keras.Sequential([keras.Input((512,)), *hidden, layers.Dense(16)])
    model.compile("adam", "mse")
    return model, 256


def cnn() -> ModelAndBatch:
    """Three convolutions with batch normalization and pooling, two dense layers."""
    stack: list[Any] = [keras.Input((32, 32, 3))]
    for width in (32, 64, 128):
        stack.append(layers.Conv2D(width, 3, padding="same"))
        stack.append(layers.BatchNormalization())
        stack.append(layers.ReLU())
        stack.append(layers.MaxPooling2D())
    stack.append(layers.Flatten())
    stack.append(layers.Dense(256, activation="relu"))
    stack.append(layers.Dense(16))
    return classifier(keras.Sequential(stack), "adam"), 64


def alexnet() -> ModelAndBatch:
    """AlexNet in one tower (Krizhevsky 2014, arXiv 1404.5997), 61 million parameters."""
    convolutions = [
        layers.Conv2D(64, 11, 4, padding="same", activation="relu"),
        layers.MaxPooling2D(3, 2),
        layers.Conv2D(192, 5, padding="same", activation="relu"),
        layers.MaxPooling2D(3, 2),
        layers.Conv2D(384, 3, padding="same", activation="relu"),
        layers.Conv2D(256, 3, padding="same", activation="relu"),
        layers.Conv2D(256, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(3, 2),
    ]
    dense = [
        layers.Flatten(),
        layers.Dense(4096, activation="relu"),
        layers.Dense(4096, activation="relu"),
        layers.Dense(1000),
    ]
    model = keras.Sequential([keras.Input((224, 224, 3)), *convolutions, *dense])
    return classifier(model), 32


def transformer() -> ModelAndBatch:
    """Two blocks of causal attention and GELU, 256 features, 8192 words."""
    words = keras.Input((64,), dtype="int32")
    x = layers.Embedding(8192, 256)(words)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 64)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(y))
    logits = layers.Dense(8192)(x)
    return classifier(keras.Model(words, logits)), 16


def resnet() -> ModelAndBatch:
    """ResNet-18 for images of 32 x 32 pixels."""

    def convolve(
        x: Any,
        width: int,
        size: int,
        stride: int = 1,
    ) -> Any:
        padding = "same" if size > 1 else "valid"
        x = layers.Conv2D(width, size, stride, padding=padding, use_bias=False)(x)
        return layers.BatchNormalization()(x)

    image = keras.Input((32, 32, 3))
    x = layers.ReLU()(convolve(image, 64, 3))
    for stage, width in enumerate((64, 128, 256, 512)):
        for stride in (1 if stage == 0 else 2, 1):
            y = layers.ReLU()(convolve(x, width, 3, stride))
            y = convolve(y, width, 3)
            if x.shape != y.shape:
                x = convolve(x, width, 1, stride)
            x = layers.ReLU()(x + y)
    logits = layers.Dense(100)(layers.GlobalAveragePooling2D()(x))
    return classifier(keras.Model(image, logits)), 32


def recommender() -> ModelAndBatch:
    """Eight embeddings of 50,000 rows and three dense layers."""
    inputs = [keras.Input((), dtype="int32", name=f"column{i}") for i in range(8)]
    x = layers.Concatenate()([layers.Embedding(50_000, 32)(column) for column in inputs])
    for width in (1024, 512, 256):
        x = layers.Dense(width, activation="relu")(x)
    return classifier(keras.Model(inputs, layers.Dense(2)(x))), 512


def lstm() -> ModelAndBatch:
    """Two LSTM layers of 512 units over 32 words."""
    words = keras.Input((32,), dtype="int32")
    x = layers.Embedding(8192, 256)(words)
    x = layers.LSTM(512)(layers.LSTM(512, return_sequences=True)(x))
    return classifier(keras.Model(words, layers.Dense(8192)(x))), 64


def unet() -> ModelAndBatch:
    """A U-Net of three levels for images of 64 x 64 pixels."""

    def block(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same")(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
        return x

    image = keras.Input((64, 64, 3))
    x = image
    skips = []
    for width in (16, 32, 64):
        x = block(x, width)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = block(x, 128)
    for width in (64, 32, 16):
        x = layers.Conv2DTranspose(width, 2, 2)(x)
        x = block(layers.Concatenate()([x, skips.pop()]), width)
    return classifier(keras.Model(image, layers.Conv2D(4, 1)(x)), "adam"), 16


def classifier(model: Any, optimizer: str = "") -> Any:
    """The model compiled for cross-entropy, with SGD and momentum unless an optimizer is named."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


FUNCTIONS = (mlp, cnn, alexnet, transformer, resnet, recommender, lstm, unet)
MODELS: Mapping[str, Callable[[], ModelAndBatch]] = {f.__name__: f for f in FUNCTIONS}
"""Name -> function that makes the compiled model with its batch size."""

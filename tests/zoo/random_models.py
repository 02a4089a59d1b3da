"""Random Keras models for planning: shapes without values, layers of many kinds.

Each model is one seed. Sizes are odd as often as even, batches have many divisors or few.
"""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from partita.capture.keras_models import abstract

BATCHES = (6, 8, 12, 15, 16, 24, 30, 32, 48, 64, 96)
CLASSES = 8
SCALES = (1, 8, 64)
"""Factors of all widths: small models are bound by latencies, large ones by products."""


class Between(layers.Layer):
    """Products between samples, as in attention over a batch or a contrastive loss."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed

    def call(self, x: Any) -> Any:
        scores = x @ ops.transpose(x)
        if self.transposed:
            scores = scores + ops.transpose(ops.softmax(scores))
        return ops.softmax(scores) @ x


class Einsum(layers.Layer):
    """A product with a weight of three dims; its heads merge with the samples and part again."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.width = width

    def build(self, shape: tuple[int, ...]) -> None:
        size = (shape[-1], self.heads, self.width)
        self.kernel = self.add_weight(shape=size, name="kernel")

    def call(self, x: Any) -> Any:
        split = ops.einsum("btd,dhk->bhtk", x, self.kernel)
        batch, length = ops.shape(x)[:2]
        merged = ops.reshape(split, (batch * self.heads, length, self.width))
        mixed = merged * ops.sigmoid(ops.mean(merged, axis=1, keepdims=True))
        apart = ops.reshape(mixed, (batch, self.heads, length, self.width))
        return ops.reshape(
            ops.transpose(apart, (0, 2, 1, 3)), (batch, length, self.heads * self.width)
        )


class Normalized(layers.Layer):
    """A normalization over the samples of a batch, written by hand."""

    def call(self, x: Any) -> Any:
        mean = ops.mean(x, axis=0, keepdims=True)
        return (x - mean) / (ops.std(x, axis=0, keepdims=True) + 0.1)


def image_block(draw: random.Random, x: Any, scale: int) -> Any:
    """A random convolution with normalization, and sometimes a branch beside it."""
    before = x
    width = scale * draw.choice([4, 6, 8, 12, 16, 24])
    channels = int(x.shape[-1])
    kernel = draw.choice([1, 2, 3, 5])
    stride = draw.choice([1, 1, 2])
    kind = draw.choice(["plain", "grouped", "depthwise", "separable", "dilated", "transposed"])
    if kind == "plain":
        x = layers.Conv2D(width, kernel, strides=stride, padding="same")(x)
    elif kind == "grouped":
        groups = draw.choice([g for g in (1, 2, 3, 4) if channels % g == 0])
        x = layers.Conv2D(
            groups * 4 * scale, kernel, strides=stride, padding="same", groups=groups
        )(x)
    elif kind == "depthwise":
        multiplier = draw.choice([1, 2])
        depthwise = layers.DepthwiseConv2D(
            kernel, strides=stride, padding="same", depth_multiplier=multiplier
        )
        x = depthwise(x)
    elif kind == "separable":
        x = layers.SeparableConv2D(width, kernel, padding="same")(x)
    elif kind == "dilated":
        x = layers.Conv2D(width, kernel, padding="same", dilation_rate=2)(x)
    else:
        x = layers.Conv2DTranspose(width, kernel, strides=stride, padding="same")(x)
    normalization = draw.choice(["batch", "layer", "none"])
    if normalization == "batch":
        x = layers.BatchNormalization()(x)
    elif normalization == "layer":
        x = layers.LayerNormalization()(x)
    x = layers.Activation(draw.choice(["relu", "gelu", "silu"]))(x)
    if x.shape == before.shape and draw.random() < 0.6:
        x = layers.Add()([x, before])
    elif x.shape[1:3] == before.shape[1:3] and draw.random() < 0.4:
        x = layers.Concatenate()([x, before])
    if draw.random() < 0.25:
        gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
        x = layers.Multiply()([x, layers.Dense(int(x.shape[-1]), activation="sigmoid")(gate)])
    if draw.random() < 0.25 and int(x.shape[1]) >= 4:
        pooling = draw.choice([layers.MaxPooling2D, layers.AveragePooling2D])
        x = pooling(draw.choice([2, 3]), strides=2, padding=draw.choice(["same", "valid"]))(x)
    return x


def image_model(draw: random.Random) -> tuple[Any, Any]:
    """Convolutions of random kinds over images of odd and even sides."""
    scale = draw.choice(SCALES)
    side = draw.choice([8, 9, 12, 15, 16])
    channels = draw.choice([3, 4, 6, 8])
    x = inputs = keras.Input((side, side, channels))
    for _ in range(draw.randint(1, 4)):
        x = image_block(draw, x, scale)
    heads = [layers.Flatten, layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D]
    return inputs, draw.choice(heads)()(x)


def sequence_block(draw: random.Random, x: Any, length: int, width: int) -> Any:
    """Random attention, recurrence, convolution or einsum with a residual connection."""
    kinds = ["attention", "causal", "grouped", "lstm", "gru", "rnn", "both", "conv", "einsum"]
    kind = draw.choice(kinds)
    dropout = draw.choice([0.0, 0.1])
    h = draw.choice([layers.LayerNormalization, layers.RMSNormalization])()(x)
    if kind in ("attention", "causal"):
        attention = layers.MultiHeadAttention(4, width // 4, dropout=dropout)
        h = attention(h, h, use_causal_mask=kind == "causal")
    elif kind == "grouped":
        h = layers.GroupQueryAttention(width // 4, 4, 2, dropout=dropout)(h, h)
    elif kind == "conv":
        groups = draw.choice([1, 2, 4])
        h = layers.Conv1D(width, 3, padding="causal", groups=groups)(h)
    elif kind == "einsum":
        h = layers.Dense(width)(Einsum(draw.choice([2, 3]), 4)(h))
    elif kind == "both":
        h = layers.Bidirectional(layers.GRU(width // 2, return_sequences=True))(h)
    else:
        cell = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.SimpleRNN}[kind]
        h = cell(width, return_sequences=True, dropout=dropout)(h)
    x = x + layers.Dropout(draw.choice([0.0, 0.2]))(h)
    if draw.random() < 0.5:
        x = x + layers.Dense(width)(layers.Dense(3 * width, activation="gelu")(x))
    if draw.random() < 0.15:
        x = layers.Reshape((width, length))(layers.Permute((2, 1))(x))
        x = layers.Permute((2, 1))(layers.Dense(length)(x))
    return x


def sequence_model(draw: random.Random) -> tuple[Any, Any]:
    """An embedding, then attention, recurrent, convolutional and einsum layers."""
    scale = draw.choice(SCALES)
    length = draw.choice([5, 8, 12, 15, 16])
    width = scale * draw.choice([8, 16, 24])
    inputs = keras.Input((length,), dtype="int32")
    x = layers.Embedding(draw.choice([48, 50, 96]), width)(inputs)
    for _ in range(draw.randint(1, 3)):
        x = sequence_block(draw, x, length, width)
    heads = [layers.GlobalAveragePooling1D, layers.Flatten, layers.GlobalMaxPooling1D]
    return inputs, draw.choice(heads)()(x)


def vector_block(draw: random.Random, x: Any, scale: int) -> Any:
    """A random dense layer, product between samples, reshape or pair of branches."""
    kind = draw.choice(["dense", "dense", "between", "branches", "reshape", "norm", "standard"])
    width = int(x.shape[-1])
    if kind == "dense":
        x = layers.Dense(scale * draw.choice([10, 16, 21, 32]), activation="relu")(x)
    elif kind == "between":
        x = layers.Concatenate()([x, Between(draw.random() < 0.5)(x)])
    elif kind == "branches":
        branches = [layers.Dense(16 * scale, activation=a)(x) for a in ("relu", "tanh", "gelu")]
        join = draw.choice([layers.Add, layers.Multiply, layers.Concatenate, layers.Maximum])
        x = join()(branches)
    elif kind == "reshape":
        rows = next(d for d in (4, 3, 2, 7, 5, 1) if width % d == 0)
        h = layers.Dense(8)(layers.Reshape((rows, width // rows))(x))
        x = layers.Flatten()(layers.Permute((2, 1))(h))
    elif kind == "norm":
        x = layers.Dropout(0.1)(layers.BatchNormalization()(x))
    else:
        x = Normalized()(x)
    return x


def vector_model(draw: random.Random) -> tuple[Any, Any]:
    """Dense layers with branches, reshapes, batch statistics and products between samples."""
    scale = draw.choice(SCALES)
    x = inputs = keras.Input((draw.choice([12, 15, 32]),))
    for _ in range(draw.randint(2, 5)):
        x = vector_block(draw, x, scale)
    return inputs, x


def tower_model(draw: random.Random) -> tuple[Any, Any]:
    """Two encoders that meet: by concatenation, products, or a contrast of all pairs of samples."""
    first, x = draw.choice([image_model, sequence_model, vector_model])(draw)
    second, y = draw.choice([sequence_model, vector_model])(draw)
    x, y = layers.Dense(16)(x), layers.Dense(16)(y)
    meeting = draw.choice(["concatenate", "product", "contrast"])
    if meeting == "concatenate":
        joined = layers.Concatenate()([x, y])
    elif meeting == "product":
        joined = layers.Dot(axes=1, normalize=True)([x, y])
    else:
        pairs = layers.Lambda(lambda v: v[0] @ ops.transpose(v[1]) @ v[1], output_shape=(16,))
        joined = pairs([x, y])
    return [first, second], joined


KINDS = (image_model, sequence_model, vector_model, tower_model)


def random_model(seed: int) -> tuple[keras.Model, Any]:
    """A compiled model without values and a batch (x, y) of zeros, the same for the same seed."""
    draw = random.Random(seed)
    keras.utils.set_random_seed(seed)
    with abstract():
        inputs, x = draw.choice(KINDS)(draw)
        model = keras.Model(inputs, layers.Dense(CLASSES)(x), name=f"random_{seed}")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(draw.choice(["sgd", "adam"]), loss, metrics=draw.choice([[], ["accuracy"]]))
    batch = draw.choice(BATCHES)
    features = [np.zeros((batch, *x.shape[1:]), x.dtype) for x in model.inputs]
    return model, (features if len(features) > 1 else features[0], np.zeros(batch, "int32"))

"""Small random models of many kinds of layers, with the losses and optimizers of real scripts.

`random_case(seed)` gives a compiled model and a batch; `KINDS` lists the kinds. Every kind is a
function that appends a block to a tensor of [samples, positions, width] or [samples, height, width,
channels]. Sizes are odd as often as even, so that many splits divide and many do not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras import layers

CLASSES = 12
BATCHES = (12, 16, 24, 30)
WIDTHS = (12, 16, 24)
LENGTHS = (6, 8, 10, 12)
VOCABULARY = 48

Block = Callable[[random.Random, Any], Any]


@dataclass(frozen=True)
class Case:
    """A compiled model and one batch of it: (inputs, targets) or (inputs, targets, weights)."""

    kind: str
    model: keras.Model
    batch: tuple[Any, ...]


class Function(layers.Layer):
    """A layer without weights that computes a function of JAX."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def call(self, x: Any) -> Any:
        return self.function(x)

    def compute_output_shape(self, shape: Any) -> Any:
        sample = jax.ShapeDtypeStruct((2, *shape[1:]), "float32")
        return (shape[0], *jax.eval_shape(self.function, sample).shape[1:])


class Weighted(layers.Layer):
    """A layer that computes a function of its input and some weights.

    `shapes` gives the shape of each weight for the shape of the input.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        shapes: Callable[[tuple[int, ...]], list[tuple[int, ...]]],
    ) -> None:
        super().__init__()
        self.function = function
        self.shapes = shapes

    def build(self, shape: tuple[int, ...]) -> None:
        self.kernels = [
            self.add_weight(shape=size, initializer="glorot_uniform", name=f"kernel{number}")
            for number, size in enumerate(self.shapes(shape))
        ]

    def call(self, x: Any) -> Any:
        return self.function(x, *(kernel.value for kernel in self.kernels))

    def compute_output_shape(self, shape: Any) -> Any:
        sizes = [(2, *shape[1:]), *self.shapes(shape)]
        shapes = [jax.ShapeDtypeStruct(size, "float32") for size in sizes]
        return (shape[0], *jax.eval_shape(self.function, *shapes).shape[1:])


# ---------------------------------------------------------------------------------- sequences


def norms(r: random.Random, x: Any) -> Any:
    """Normalizations over unusual axes."""
    kind = r.choice(["layer", "batch", "group", "unit", "rms", "spectral"])
    if kind == "layer":
        axes: Any = r.choice([1, -1, (1, 2)])
        return layers.LayerNormalization(axis=axes)(x)
    if kind == "batch":
        return layers.BatchNormalization(axis=r.choice([1, 2]), momentum=0.7)(x)
    if kind == "group":
        return layers.GroupNormalization(2, axis=r.choice([1, -1]))(x)
    if kind == "unit":
        axes = r.choice([1, -1, (1, 2)])
        return layers.UnitNormalization(axis=axes)(x)
    if kind == "rms":
        return layers.RMSNormalization(axis=-1)(x)
    return layers.SpectralNormalization(layers.Dense(x.shape[-1]))(x)


def recurrent(r: random.Random, x: Any) -> Any:
    """Recurrent layers in wrappers: both directions, stacked cells, reversed, with dropout."""
    width = r.choice(WIDTHS)
    kind = r.choice(["both", "stacked", "reversed", "dropout", "state", "convolution"])
    cell = r.choice([layers.LSTM, layers.GRU, layers.SimpleRNN])
    if kind == "both":
        mode = r.choice(["sum", "mul", "concat", "ave"])
        return layers.Bidirectional(cell(width, return_sequences=True), merge_mode=mode)(x)
    if kind == "stacked":
        cells = [layers.LSTMCell(width), layers.GRUCell(r.choice(WIDTHS))]
        return layers.RNN(cells, return_sequences=True)(x)
    if kind == "reversed":
        return cell(width, return_sequences=True, go_backwards=True)(x)
    if kind == "dropout":
        options: Any = {"dropout": 0.2, "recurrent_dropout": r.choice([0.0, 0.2]), "seed": 3}
        return cell(width, return_sequences=True, **options)(x)
    if kind == "state":
        sequence, *states = cell(width, return_sequences=True, return_state=True)(x)
        return layers.Add()([sequence, layers.RepeatVector(x.shape[1])(states[0])])
    images = layers.Reshape((x.shape[1], x.shape[2] // 2, 2))(x)
    y = layers.ConvLSTM1D(4, 3, padding="same", return_sequences=True)(images)
    return layers.Reshape((x.shape[1], -1))(y)


def distributed(r: random.Random, x: Any) -> Any:
    """One layer at every position, and convolutions over positions."""
    width = r.choice(WIDTHS)
    kind = r.choice(["dense", "separable", "depthwise", "transposed", "causal", "grouped"])
    if kind == "dense":
        return layers.TimeDistributed(layers.Dense(width, activation="gelu"))(x)
    if kind == "separable":
        return layers.SeparableConv1D(width, 3, padding="same", depth_multiplier=2)(x)
    if kind == "depthwise":
        return layers.DepthwiseConv1D(3, padding="same", depth_multiplier=r.choice([1, 2]))(x)
    if kind == "transposed":
        y = layers.Conv1DTranspose(width, r.choice([3, 4]), strides=2, padding="same")(x)
        return layers.AveragePooling1D(2)(y)
    if kind == "causal":
        return layers.Conv1D(width, 2, padding="causal", dilation_rate=2)(x)
    return layers.Conv1D(width, 3, padding="same", groups=r.choice([2, 4]))(x)


def attention(r: random.Random, x: Any) -> Any:
    """Attention variants: cross, additive, over other axes, one key for many queries, rotary."""
    width = x.shape[-1]
    kind = r.choice(["cross", "additive", "axes", "query", "scaled", "rotary", "linear", "window"])
    if kind == "cross":
        memory = layers.Dense(width)(layers.MaxPooling1D(2)(x))
        attend = layers.MultiHeadAttention(4, width // 4, value_dim=3, use_bias=r.random() < 0.5)
        return attend(x, memory)
    if kind == "additive":
        return layers.AdditiveAttention()([x, layers.Dense(width)(x)])
    if kind == "axes":
        grid = layers.Reshape((2, x.shape[1] // 2, width))(x)
        axes = r.choice([(1,), (2,), (1, 2)])
        y = layers.MultiHeadAttention(2, width // 2, attention_axes=axes)(grid, grid)
        return layers.Reshape((x.shape[1], width))(y)
    if kind == "query":
        heads, groups = r.choice([(4, 1), (4, 2), (6, 3)])
        y = layers.GroupQueryAttention(4, heads, groups)(x, x, use_causal_mask=r.random() < 0.5)
        return y
    if kind == "scaled":
        return layers.Attention(use_scale=True, score_mode=r.choice(["dot", "concat"]))([x, x])
    function = {"rotary": _rotary, "linear": _linear, "window": _window}[kind]
    return Weighted(function, lambda shape: [(shape[-1], 3, 2, shape[-1] // 2)])(x)


def _heads(x: Any, kernel: Any) -> Any:
    """Queries, keys and values, [3, samples, heads, positions, width]."""
    return jnp.einsum("btd,dnhk->nbhtk", x, kernel)


def _joined(y: Any) -> Any:
    samples, heads, positions, width = y.shape
    return jnp.transpose(y, (0, 2, 1, 3)).reshape(samples, positions, heads * width)


def _rotary(x: Any, kernel: Any) -> Any:
    query, key, value = _heads(x, kernel)
    half = query.shape[-1] // 2
    angle = jnp.arange(query.shape[2])[:, None] / (1 + jnp.arange(half))

    def rotated(y: Any) -> Any:
        left, right = y[..., :half], y[..., half : 2 * half]
        turned = left * jnp.cos(angle) - right * jnp.sin(angle)
        other = left * jnp.sin(angle) + right * jnp.cos(angle)
        return jnp.concatenate([turned, other], axis=-1)

    scores = jnp.einsum("bhtk,bhsk->bhts", rotated(query), rotated(key))
    return _joined(jax.nn.softmax(scores, axis=-1) @ value)


def _linear(x: Any, kernel: Any) -> Any:
    """Attention without a softmax over positions (Katharopoulos et al., 2020)."""
    query, key, value = _heads(x, kernel)
    query = jax.nn.elu(query) + 1
    key = jax.nn.elu(key) + 1
    summed = jnp.einsum("bhsk,bhsv->bhkv", key, value)
    scale = jnp.einsum("bhtk,bhk->bht", query, key.sum(axis=2))
    return _joined(jnp.einsum("bhtk,bhkv->bhtv", query, summed) / scale[..., None])


def _window(x: Any, kernel: Any) -> Any:
    query, key, value = _heads(x, kernel)
    positions = jnp.arange(x.shape[1])
    near = jnp.abs(positions[:, None] - positions) < 3
    scores = jnp.einsum("bhtk,bhsk->bhts", query, key) - 0.1 * jnp.abs(positions[:, None])
    weights = jax.nn.softmax(jnp.where(near, scores, -1e9), axis=-1)
    return _joined(weights @ value)


def einsums(r: random.Random, x: Any) -> Any:
    """Products with unusual indices."""
    kind = r.choice(["dense", "positions", "three", "outer", "diagonal", "mixed"])
    length, width = x.shape[1:]
    if kind == "dense":
        heads = r.choice([2, 3, 4])
        y = layers.EinsumDense("abc,cde->aebd", (6, length, heads), bias_axes="e")(x)
        return layers.Reshape((length, heads * 6))(layers.Permute((2, 3, 1))(y))
    sizes: Callable[[tuple[int, ...]], list[tuple[int, ...]]]
    if kind == "positions":
        sizes = lambda shape: [(shape[1], shape[2], width)]
        return Weighted(lambda x, w: jnp.einsum("btd,tde->bte", x, w), sizes)(x)
    if kind == "three":
        sizes = lambda shape: [(shape[2], 6), (6, width)]
        return Weighted(lambda x, u, v: jnp.einsum("btd,dr,re->bte", x, u, v), sizes)(x)
    if kind == "outer":
        sizes = lambda shape: [(shape[2], 4), (shape[2], 5)]
        return Weighted(_outer, sizes)(x)
    if kind == "diagonal":
        return Function(lambda x: x * jnp.einsum("btd,btd->bt", x, x)[..., None] / x.shape[-1])(x)
    sizes = lambda shape: [(shape[1], shape[1]), (shape[2], width)]
    return Weighted(lambda x, u, v: jax.nn.gelu(jnp.einsum("btd,ts,de->bse", x, u, v)), sizes)(x)


def _outer(x: Any, u: Any, v: Any) -> Any:
    products = jnp.einsum("bti,btj->btij", x @ u, x @ v)
    return products.reshape(*x.shape[:2], -1)


def scans(r: random.Random, x: Any) -> Any:
    """Loops of JAX and sums along positions."""
    kind = r.choice(["scan", "associative", "fori", "cumulative", "map"])
    sizes = lambda shape: [(shape[2], shape[2])]
    if kind == "scan":
        return Weighted(_scanned, sizes)(x)
    if kind == "associative":
        return Function(_associative)(x)
    if kind == "fori":
        step = lambda x, w: jax.lax.fori_loop(0, 3, lambda i, y: jnp.tanh(y @ w) + x, x)
        return Weighted(step, sizes)(x)
    if kind == "cumulative":
        function = r.choice([jnp.cumsum, jnp.cumprod, jax.lax.cummax])
        if function is jax.lax.cummax:
            return Function(lambda x: jax.lax.cummax(x, axis=1))(x)
        return Function(lambda x: jnp.tanh(function(jnp.tanh(x), axis=1)))(x)
    return Weighted(lambda x, w: jax.lax.map(lambda y: jax.nn.silu(y @ w), x), sizes)(x)


def _scanned(x: Any, w: Any) -> Any:
    def step(state: Any, row: Any) -> tuple[Any, Any]:
        state = jnp.tanh(state @ w + row)
        return state, state

    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(x[:, 0]), jnp.swapaxes(x, 0, 1))[1], 0, 1)


def _associative(x: Any) -> Any:
    """A linear recurrence with a decay per entry, as in state space models."""
    decay = jax.nn.sigmoid(x)

    def joined(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return jax.lax.associative_scan(joined, (decay, x), axis=1)[1]


def sorts(r: random.Random, x: Any) -> Any:
    """Sorted and selected entries."""
    kind = r.choice(["sort", "top", "gather", "median", "maximum"])
    axis = r.choice([1, 2])
    if kind == "sort":
        return Function(lambda x: jnp.sort(x, axis=axis))(x)
    if kind == "top":
        return Function(lambda x: jax.lax.top_k(x, x.shape[-1] // 2)[0])(x)
    if kind == "gather":
        return Function(_rearranged)(x)
    if kind == "median":
        return Function(lambda x: x - jnp.median(x, axis=axis, keepdims=True))(x)
    return Function(lambda x: x * (x == jnp.max(x, axis=axis, keepdims=True)) + x)(x)


def _rearranged(x: Any) -> Any:
    """The positions of a sample in the order of their sums."""
    order = jnp.argsort(x.sum(axis=-1), axis=1)
    return jnp.take_along_axis(x, order[..., None], axis=1) + x


def linear(r: random.Random, x: Any) -> Any:
    """Linear functions of a sample, whose gradients read no forward value."""
    rows = x.shape[1]
    functions: list[Callable[[Any], Any]] = [
        lambda x: x[:, jnp.array([1, 0, rows - 1, 1])],
        lambda x: x[:, :, jnp.array([2, 0, 2])],
        lambda x: x.at[:, 1 : rows // 2].set(0),
        lambda x: jax.vmap(lambda y: jax.ops.segment_sum(y, jnp.arange(rows) // 2, rows))(x),
        lambda x: jax.image.resize(x, (x.shape[0], 2 * rows, x.shape[2]), "linear"),
        lambda x: jax.image.resize(x, (x.shape[0], rows, 5), "cubic"),
        jax.vmap(jax.vmap(lambda row: jnp.convolve(row, jnp.ones(3) / 3, "same"))),
    ]
    return Function(r.choice(functions))(x)


def experts(r: random.Random, x: Any) -> Any:
    """A mixture of experts: all of them weighted, or the best one within a capacity."""
    count, hidden = r.choice([2, 4, 6]), 8

    def sizes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        width = shape[-1]
        return [(width, count), (count, width, hidden), (count, hidden, width)]

    return Weighted(r.choice([_all_experts, _best_expert]), sizes)(x)


def _all_experts(x: Any, gate: Any, up: Any, down: Any) -> Any:
    weights = jax.nn.softmax(x @ gate, axis=-1)
    hidden = jax.nn.gelu(jnp.einsum("btd,edh->bteh", x, up))
    return jnp.einsum("bteh,ehd,bte->btd", hidden, down, weights)


def _best_expert(x: Any, gate: Any, up: Any, down: Any) -> Any:
    """Every position goes to its best expert, which takes at most half of the positions (Switch
    Transformer, Fedus et al., 2021)."""
    weights = jax.nn.softmax(x @ gate, axis=-1)
    chosen = jax.nn.one_hot(jnp.argmax(weights, axis=-1), gate.shape[-1])
    places = jnp.cumsum(chosen, axis=1) * chosen - 1
    sent = jax.nn.one_hot(places.astype("int32"), x.shape[1] // 2) * chosen[..., None]
    rows = jnp.einsum("btec,btd->ebcd", sent, x)
    rows = jnp.einsum("ebch,ehd->ebcd", jax.nn.gelu(jnp.einsum("ebcd,edh->ebch", rows, up)), down)
    gated = sent * weights[..., None]
    return x + jnp.einsum("btec,ebcd->btd", gated, rows)


def between_samples(r: random.Random, x: Any) -> Any:
    """Products, means and maxima over the samples of a batch."""
    kind = r.choice(["scores", "deviation", "rolled"])
    if kind == "scores":
        return Function(lambda x: jax.nn.softmax(jnp.einsum("btd,ctd->bc", x, x)) @ x[:, 0])(x)
    if kind == "deviation":
        deviation = lambda x: jnp.std(x, axis=0, keepdims=True)
        return Function(lambda x: x / (deviation(x) + 0.5) + jnp.max(x, axis=0))(x)
    return Function(lambda x: x + jnp.roll(x, 1, axis=0) * jnp.flip(x, axis=1))(x)


# -------------------------------------------------------------------------------------- images


def convolutions(r: random.Random, x: Any) -> Any:
    """Transposed, grouped, dilated and three-dimensional convolutions; resampling."""
    width = r.choice([6, 8, 12])
    kind = r.choice(["transposed", "grouped", "depthwise", "volume", "resampled", "cropped"])
    if kind == "transposed":
        strides = r.choice([1, 2])
        options: Any = {"strides": strides, "padding": r.choice(["same", "valid"])}
        return layers.Conv2DTranspose(width, r.choice([2, 3]), **options)(x)
    if kind == "grouped":
        x = layers.Conv2D(12, 1)(x)
        return layers.Conv2D(12, 3, padding="same", groups=r.choice([2, 3, 4, 6, 12]))(x)
    if kind == "depthwise":
        options: Any = {"depth_multiplier": r.choice([1, 2]), "dilation_rate": r.choice([1, 2])}
        return layers.DepthwiseConv2D(3, padding="same", **options)(x)
    if kind == "volume":
        height, width_, channels = x.shape[1:]
        volume = layers.Reshape((height, width_, channels, 1))(x)
        y = layers.Conv3D(2, (3, 3, 2), padding="same")(volume)
        return layers.Reshape((height, width_, 2 * channels))(y)
    if kind == "resampled":
        interpolation = r.choice(["nearest", "bilinear"])
        y = layers.UpSampling2D(2, interpolation=interpolation)(x)
        return layers.Conv2D(width, 3, strides=2, padding="same")(y)
    return layers.Conv2D(width, 3)(layers.Cropping2D(1)(layers.ZeroPadding2D((2, 1))(x)))


def image_norms(r: random.Random, x: Any) -> Any:
    """Normalizations of images over unusual axes."""
    kind = r.choice(["batch", "layer", "group", "instance", "local"])
    if kind == "batch":
        return layers.BatchNormalization(axis=r.choice([1, 2, 3]), renorm=False)(x)
    if kind == "layer":
        axes: Any = r.choice([(1, 2), (1, 3), 1, (1, 2, 3)])
        return layers.LayerNormalization(axis=axes)(x)
    if kind == "group":
        return layers.GroupNormalization(r.choice([1, 2]), axis=-1)(x)
    if kind == "instance":
        return layers.GroupNormalization(groups=-1)(x)
    return Function(lambda x: x / (1 + jnp.mean(x * x, axis=-1, keepdims=True)))(x)


SEQUENCES: dict[str, Block] = {
    "norms": norms,
    "recurrent": recurrent,
    "distributed": distributed,
    "attention": attention,
    "einsums": einsums,
    "scans": scans,
    "sorts": sorts,
    "linear": linear,
    "experts": experts,
    "between samples": between_samples,
}
IMAGES: dict[str, Block] = {"convolutions": convolutions, "image norms": image_norms}
KINDS = (*SEQUENCES, *IMAGES, "tied")
"""Names of all kinds of models."""


# ----------------------------------------------------------------------------- models and losses


def random_case(seed: int) -> Case:
    """A compiled model and a batch, the same for the same seed; kinds take turns."""
    r = random.Random(seed)
    keras.utils.set_random_seed(seed)
    values = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    batch = r.choice(BATCHES)
    if kind == "tied":
        inputs, outputs = _tied(r)
        tokens = values.integers(0, VOCABULARY, (batch, inputs.shape[1])).astype("int32")
        return _compiled(kind, r, inputs, outputs, tokens, values)
    if kind in IMAGES:
        inputs, outputs = _image_model(r, IMAGES[kind])
    else:
        inputs, outputs = _sequence_model(r, SEQUENCES[kind])
    x = values.standard_normal((batch, *inputs.shape[1:])).astype("float32")
    return _compiled(kind, r, inputs, outputs, x, values)


def _sequence_model(r: random.Random, block: Block) -> tuple[Any, Any]:
    inputs = keras.Input((r.choice(LENGTHS), r.choice(WIDTHS)))
    x = layers.Dense(r.choice(WIDTHS), activation="tanh")(inputs)
    for _ in range(r.randint(1, 2)):
        y = block(r, x)
        x = layers.Add()([x, y]) if y.shape == x.shape and r.random() < 0.5 else y
        if len(x.shape) < 3:
            break
    if len(x.shape) == 3:
        x = r.choice([layers.Flatten(), layers.GlobalAveragePooling1D()])(x)
    return inputs, layers.Dense(CLASSES)(x)


def _image_model(r: random.Random, block: Block) -> tuple[Any, Any]:
    size = r.choice([6, 8, 9])
    inputs = keras.Input((size, size, r.choice([2, 3, 4])))
    x = layers.Conv2D(r.choice([6, 8]), 3, padding="same", activation="relu")(inputs)
    for _ in range(r.randint(1, 2)):
        x = layers.Activation("gelu")(block(r, x))
    x = r.choice([layers.Flatten(), layers.GlobalMaxPooling2D()])(x)
    return inputs, layers.Dense(CLASSES)(x)


class TiedOutput(layers.Layer):
    """Logits by the transposed table of an embedding."""

    def __init__(self, embedding: layers.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def call(self, x: Any) -> Any:
        table: Any = self.embedding.embeddings
        return x @ jnp.swapaxes(table.value, 0, 1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (*shape[:-1], VOCABULARY)


def _tied(r: random.Random) -> tuple[Any, Any]:
    """A language model whose embedding is its output, with and without masked positions."""
    inputs = keras.Input((r.choice(LENGTHS),), dtype="int32")
    width = r.choice(WIDTHS)
    if r.random() < 0.5:
        embedding: Any = layers.ReversibleEmbedding(VOCABULARY, width)
        output = lambda x: embedding(x, reverse=True)
    else:
        embedding = layers.Embedding(VOCABULARY, width, mask_zero=r.random() < 0.5)
        output = TiedOutput(embedding)
    x = embedding(inputs)
    shared = layers.Dense(width, activation="gelu")
    x = layers.LSTM(width, return_sequences=True)(shared(shared(x)))
    return inputs, layers.Dense(CLASSES)(layers.Flatten()(output(x)))


def _loss(r: random.Random, values: np.random.Generator, batch: int) -> tuple[Any, np.ndarray]:
    """A loss of logits, and targets for it."""
    classes = values.integers(0, CLASSES, batch).astype("int32")
    one_hot = np.eye(CLASSES, dtype="float32")[classes]
    kind = r.choice(["sparse", "smoothed", "focal", "huber", "cosine", "contrastive"])
    if kind == "sparse":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True), classes
    if kind == "smoothed":
        smoothed = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
        return smoothed, one_hot
    if kind == "focal":
        return keras.losses.BinaryFocalCrossentropy(from_logits=True), one_hot
    if kind == "huber":
        return keras.losses.Huber(delta=0.5), one_hot
    if kind == "cosine":
        return keras.losses.CosineSimilarity(), one_hot
    return _contrastive, one_hot


def _contrastive(targets: Any, logits: Any) -> Any:
    """The cross-entropy of samples against each other, by products between samples."""
    rows = logits / (1e-3 + jnp.linalg.norm(logits, axis=-1, keepdims=True))
    scores = rows @ rows.T - 1e3 * jnp.eye(len(rows))
    alike = targets @ targets.T
    return -jnp.sum(jax.nn.log_softmax(scores) * alike, axis=-1) / len(rows)


def _optimizer(r: random.Random) -> keras.optimizers.Optimizer:
    """SGD with momentum and one of the options that people use."""
    options: dict[str, Any] = r.choice(
        [
            {},
            {"clipnorm": 0.1},
            {"global_clipnorm": 0.1},
            {"clipvalue": 0.01},
            {"use_ema": True, "ema_momentum": 0.9},
            {"weight_decay": 0.01, "nesterov": True},
            {"gradient_accumulation_steps": 2},
        ]
    )
    return keras.optimizers.SGD(0.05, momentum=0.9, **options)


def _compiled(
    kind: str,
    r: random.Random,
    inputs: Any,
    outputs: Any,
    x: np.ndarray,
    values: np.random.Generator,
) -> Case:
    if r.random() < 0.2:
        outputs = layers.ActivityRegularization(l2=1e-3)(outputs)
    model = keras.Model(inputs, outputs)
    loss, targets = _loss(r, values, len(x))
    model.compile(_optimizer(r), loss)
    if loss is not _contrastive and r.random() < 0.4:
        weights = values.random(len(x), dtype="float32")
        return Case(kind, model, (x, targets, weights))
    return Case(kind, model, (x, targets))

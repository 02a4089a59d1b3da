"""Networks of the FlexFlow and OptCNN papers with the papers' sizes, and two large transformers.

`NETWORKS` maps names to PaperNetwork; `model(name)` is a compiled Keras model without values.
Sources: FlexFlow's six networks (arXiv 1807.05358, section 8.1), OptCNN's (arXiv 1802.04924,
section 6), GPT-3 (arXiv 2005.14165, table 2.1), Llama 3 8B (arXiv 2407.21783, table 3).

Choices that the papers leave open: AlexNet is the one-tower variant (arXiv 1404.5997). A vocabulary
has 32,000 words. NMT's attention is Luong's (dot products, then a dense layer over context and
state). RNNTC has two classes. Recurrent layers are unrolled, so that every step has operators of
its own, as in FlexFlow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import keras
from keras import layers

from partita.capture.keras_models import abstract

Family = Literal["convolutional", "recurrent", "transformer"]
VOCABULARY = 32_000
"""Words of a vocabulary."""
STEPS = 40
"""Steps of a recurrent layer."""
# Keras's annotations forbid the None that its documentation asks for.
applications: Any = keras.applications


@dataclass(frozen=True)
class PaperNetwork:
    """A network: its layers, batch per device, family (for the expert plan), optimizer, dtype
    policy.
    """

    build: Callable[[], keras.Model]
    batch: int
    family: Family = "convolutional"
    optimizer: str = "sgd"
    dtype: str = "float32"


def model(name: str) -> keras.Model:
    """The network of that name, compiled, without values.

    >>> model("lenet").count_params()
    61706
    """
    network = NETWORKS[name]
    with _policy(network.dtype), abstract():
        keras_model = network.build()
    keras_model.compile(
        network.optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return keras_model


@contextmanager
def _policy(dtype: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


# Convolutions


def lenet() -> keras.Model:
    """LeNet-5: two convolutions, three dense layers, on 32 x 32 images."""
    stack = [
        layers.Conv2D(6, 5, activation="tanh", name="conv1"),
        layers.AveragePooling2D(2, name="pool1"),
        layers.Conv2D(16, 5, activation="tanh", name="conv2"),
        layers.AveragePooling2D(2, name="pool2"),
        layers.Flatten(),
        layers.Dense(120, activation="tanh", name="fc1"),
        layers.Dense(84, activation="tanh", name="fc2"),
        layers.Dense(10, name="fc3"),
    ]
    return keras.Sequential([keras.Input((32, 32, 1)), *stack], name="lenet")


def alexnet() -> keras.Model:
    """AlexNet in one tower: five convolutions, three poolings, three dense layers, a softmax."""

    def conv(name: str, filters: int, size: int) -> layers.Layer:
        return layers.Conv2D(
            filters,
            size,
            padding="same",
            activation="relu",
            name=name,
        )

    def pool(name: str) -> layers.Layer:
        return layers.MaxPooling2D(3, 2, name=name)

    stack = [
        layers.ZeroPadding2D(2),
        layers.Conv2D(64, 11, 4, activation="relu", name="conv1"),
        pool("pool1"),
        conv("conv2", 192, 5),
        pool("pool2"),
        conv("conv3", 384, 3),
        conv("conv4", 256, 3),
        conv("conv5", 256, 3),
        pool("pool3"),
        layers.Flatten(),
        layers.Dense(4096, activation="relu", name="fc1"),
        layers.Dense(4096, activation="relu", name="fc2"),
        layers.Dense(1000, name="fc3"),
    ]
    return keras.Sequential([keras.Input((224, 224, 3)), *stack], name="alexnet")


def vgg16() -> keras.Model:
    return applications.VGG16(weights=None, classifier_activation=None, name="vgg16")


def inception_v3() -> keras.Model:
    return applications.InceptionV3(
        weights=None, classifier_activation=None, input_shape=(299, 299, 3), name="inception-v3"
    )


def resnet101() -> keras.Model:
    return applications.ResNet101(weights=None, classifier_activation=None, name="resnet-101")


# Recurrent


def rnntc(
    width: int = 1024,
    depth: int = 4,
    classes: int = 2,
) -> keras.Model:
    """Text classification: four LSTM layers, then a softmax over the last step."""
    words = keras.Input((STEPS,), dtype="int32", name="words")
    h = layers.Embedding(VOCABULARY, width, name="embedding")(words)
    for i in range(depth):
        h = layers.LSTM(width, return_sequences=i < depth - 1, unroll=True, name=f"lstm{i}")(h)
    return keras.Model(
        words,
        layers.Dense(classes, name="classes")(h),
        name="rnntc",
    )


def rnnlm(
    steps: int = STEPS,
    width: int = 2048,
    depth: int = 2,
) -> keras.Model:
    """A language model: two LSTM layers, then a softmax over the vocabulary at every step."""
    words = keras.Input((steps,), dtype="int32", name="words")
    h = layers.Embedding(VOCABULARY, width, name="embedding")(words)
    for i in range(depth):
        h = layers.LSTM(width, return_sequences=True, unroll=True, name=f"lstm{i}")(h)
    return keras.Model(
        words,
        layers.Dense(VOCABULARY, name="logits")(h),
        name=f"rnnlm-{steps}",
    )


def nmt(
    width: int = 1024, depth: int = 2, steps: int = STEPS, words: int = VOCABULARY
) -> keras.Model:
    """Translation: encoder and decoder of two LSTM layers each, attention, a softmax at every
    step.
    """
    source = keras.Input((steps,), dtype="int32", name="source")
    target = keras.Input((steps,), dtype="int32", name="target")
    states = []
    h = layers.Embedding(words, width, name="source_embedding")(source)
    for i in range(depth):
        h, *state = layers.LSTM(
            width, return_sequences=True, return_state=True, unroll=True, name=f"encoder{i}"
        )(h)
        states.append(state)
    d = layers.Embedding(words, width, name="target_embedding")(target)
    for i in range(depth):
        d = layers.LSTM(width, return_sequences=True, unroll=True, name=f"decoder{i}")(
            d, initial_state=states[i]
        )
    context = layers.Attention(name="attention")([d, h])
    d = layers.Dense(width, "tanh", use_bias=False, name="combine")(
        layers.Concatenate()([context, d])
    )
    return keras.Model(
        [source, target],
        layers.Dense(words, name="logits")(d),
        name="nmt",
    )


# Transformers


class Positions(layers.Layer):
    """Adds a learned vector per position."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x: Any) -> Any:
        return x + self.table


def gpt3(
    width: int = 12288,
    blocks: int = 96,
    heads: int = 96,
    length: int = 2048,
    vocabulary: int = 51_200,
) -> keras.Model:
    """A transformer of the GPT-3 175B shape, its vocabulary padded to a multiple of 1024."""
    words = keras.Input((length,), dtype="int32", name="words")
    h = Positions(name="positions")(layers.Embedding(vocabulary, width, name="embedding")(words))
    for i in range(blocks):
        a = layers.LayerNormalization(name=f"norm_a{i}")(h)
        h = h + layers.MultiHeadAttention(heads, width // heads, name=f"attention{i}")(
            a, a, use_causal_mask=True
        )
        b = layers.LayerNormalization(name=f"norm_b{i}")(h)
        up = layers.Dense(4 * width, "gelu", name=f"up{i}")(b)
        h = h + layers.Dense(width, name=f"down{i}")(up)
    h = layers.LayerNormalization(name="norm")(h)
    logits = layers.Dense(vocabulary, use_bias=False, name="logits")(h)
    return keras.Model(words, logits, name="gpt3")


def llama(
    width: int = 4096,
    blocks: int = 32,
    heads: int = 32,
    groups: int = 8,
    hidden: int = 14_336,
    length: int = 2048,
    vocabulary: int = 128_256,
) -> keras.Model:
    """A transformer of the Llama 3 8B shape: grouped queries, gated layers, no rotary positions."""
    words = keras.Input((length,), dtype="int32", name="words")
    h = layers.Embedding(vocabulary, width, name="embedding")(words)
    for i in range(blocks):
        a = layers.RMSNormalization(name=f"norm_a{i}")(h)
        attention = layers.GroupQueryAttention(
            width // heads, heads, groups, use_bias=False, name=f"attention{i}"
        )
        h = h + attention(a, a, use_causal_mask=True)
        b = layers.RMSNormalization(name=f"norm_b{i}")(h)
        gate = layers.Dense(hidden, "silu", use_bias=False, name=f"gate{i}")(b)
        up = layers.Dense(hidden, use_bias=False, name=f"up{i}")(b)
        h = h + layers.Dense(width, use_bias=False, name=f"down{i}")(gate * up)
    h = layers.RMSNormalization(name="norm")(h)
    logits = layers.Dense(vocabulary, use_bias=False, name="logits")(h)
    return keras.Model(words, logits, name="llama")


NETWORKS = {
    "lenet": PaperNetwork(lenet, 32),
    "alexnet": PaperNetwork(alexnet, 256),
    "vgg16": PaperNetwork(vgg16, 32),
    "inception-v3": PaperNetwork(inception_v3, 64),
    "resnet-101": PaperNetwork(resnet101, 64),
    "rnntc": PaperNetwork(rnntc, 64, "recurrent"),
    "rnnlm": PaperNetwork(rnnlm, 64, "recurrent"),
    "rnnlm-2": PaperNetwork(lambda: rnnlm(2), 64, "recurrent"),
    "nmt": PaperNetwork(nmt, 64, "recurrent"),
    "llama": PaperNetwork(llama, 1, "transformer", "adam", "mixed_bfloat16"),
    "gpt3": PaperNetwork(gpt3, 1, "transformer", "adam", "mixed_bfloat16"),
}

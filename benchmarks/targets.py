"""Every layer of Keras, model of keras.applications and architecture of keras_hub, captured for
platforms that are not here.

    python benchmarks/targets.py                                 # all: some twenty minutes
    python benchmarks/targets.py --groups layers --targets cuda  # two minutes
    python benchmarks/targets.py --groups hub --only llama       # needs keras_hub

Each is a model with one output, in mixed bfloat16, without allocated weights. Its training step is
captured for each target. A layer that Keras itself cannot train is listed with the reason.
Architectures of keras_hub get two layers and a width of 32; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import keras
from hub_models import LENGTH, backbones, tiny_backbone
from keras import layers

import partita

BATCH = 4
TARGETS = ("cpu", "cuda", "tpu")
Make = Callable[[], keras.Model]

VECTOR, SEQUENCE, IMAGE, VOLUME = (8,), (LENGTH, 8), (16, 16, 4), (8, 8, 8, 2)
TWO_INPUTS = "Add Average Concatenate Maximum Minimum Multiply Subtract"
LAYERS: dict[tuple[int, ...], str] = {
    VECTOR: "ActivityRegularization AlphaDropout BatchNormalization ELU EinsumDense GaussianDropout "
    "GaussianNoise Identity LeakyReLU Normalization PReLU RMSNormalization ReLU RepeatVector "
    "Rescaling Softmax UnitNormalization LayerNormalization Dropout Activation Dense Lambda "
    "SpectralNormalization ReversibleEmbedding",
    SEQUENCE: "AdaptiveAveragePooling1D AdaptiveMaxPooling1D AveragePooling1D Bidirectional Conv1D "
    "Conv1DTranspose Cropping1D DepthwiseConv1D GRU GlobalAveragePooling1D GlobalMaxPooling1D "
    "LSTM MaxPooling1D Permute RNN Reshape SeparableConv1D SimpleRNN SpatialDropout1D "
    "TimeDistributed UpSampling1D ZeroPadding1D Masking Attention AdditiveAttention "
    "MultiHeadAttention GroupQueryAttention Flatten Dot",
    IMAGE: "AdaptiveAveragePooling2D AdaptiveMaxPooling2D AveragePooling2D CenterCrop Conv2D "
    "Conv2DTranspose Cropping2D DepthwiseConv2D GlobalAveragePooling2D GlobalMaxPooling2D "
    "GroupNormalization MaxPooling2D Resizing SeparableConv2D SpatialDropout2D UpSampling2D "
    "ZeroPadding2D ConvLSTM1D",
    VOLUME: "AdaptiveAveragePooling3D AdaptiveMaxPooling3D AveragePooling3D Conv3D Conv3DTranspose "
    "Cropping3D GlobalAveragePooling3D GlobalMaxPooling3D MaxPooling3D SpatialDropout3D "
    "UpSampling3D ZeroPadding3D ConvLSTM2D",
    (4, *VOLUME): "ConvLSTM3D",
}
"""Shape of a sample -> layers that take it."""
PICTURES = (
    "AugMix AutoContrast ContrastLimitedAdaptiveHistogramEqualization CutMix Equalization MixUp "
    "RandAugment RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast "
    "RandomCrop RandomElasticTransform RandomErasing RandomFlip RandomGaussianBlur "
    "RandomGrayscale RandomHue RandomInvert RandomPerspective RandomPosterization RandomRotation "
    "RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom Solarization"
)
"""Layers that change pictures of three channels, in models that train behind them."""
OPTIONS: dict[str, dict[str, Any]] = {
    "Activation": {"activation": "gelu"},
    "Bidirectional": {"layer": lambda: layers.LSTM(8)},
    "CenterCrop": {"height": 8, "width": 8},
    "Dot": {"axes": 2},
    "EinsumDense": {"equation": "ab,bc->ac", "output_shape": 8},
    "GroupNormalization": {"groups": 2},
    "GroupQueryAttention": {"head_dim": 8, "num_query_heads": 4, "num_key_value_heads": 2},
    "Lambda": {"function": lambda: keras.ops.sin},
    "MultiHeadAttention": {"num_heads": 2, "key_dim": 8},
    "Permute": {"dims": (2, 1)},
    "RNN": {"cell": lambda: layers.StackedRNNCells([layers.LSTMCell(8), layers.GRUCell(8)])},
    "RandomContrast": {"factor": 0.2},
    "RandomCrop": {"height": 8, "width": 8},
    "RandomPosterization": {"factor": 4},
    "RepeatVector": {"n": 3},
    "Rescaling": {"scale": 0.5},
    "Reshape": {"target_shape": (8, LENGTH)},
    "Resizing": {"height": 8, "width": 8},
    "SpectralNormalization": {"layer": lambda: layers.Dense(8)},
    "TimeDistributed": {"layer": lambda: layers.Dense(8)},
}
"""Arguments of layers; a function makes its value."""
COMMON = {
    "alpha": 0.1,
    "factor": 0.2,
    "filters": 4,
    "input_dim": 40,
    "kernel_size": 3,
    "output_dim": 8,
    "output_size": 4,
    "pool_size": 2,
    "rate": 0.2,
    "stddev": 0.1,
    "units": 8,
    "value_range": (0, 1),
}
"""Arguments of layers without a default, by name."""
VARIANTS: dict[str, dict[str, Any]] = {
    "MultiHeadAttention, dropout": {"dropout": 0.1},
    "MultiHeadAttention, float32": {"dtype": "float32"},
    "MultiHeadAttention, float16": {"dtype": "mixed_float16"},
    "GroupQueryAttention, dropout": {"dropout": 0.1},
    "LSTM, float32": {"dtype": "float32"},
    "GRU, float32": {"dtype": "float32"},
    "Bidirectional, float32": {"layer": lambda: layers.LSTM(8, dtype="float32")},
}


def layer_cases() -> Iterator[tuple[str, Make]]:
    """Every layer, as the part of a model that has a weight before and behind it."""
    for shape, names in LAYERS.items():
        for name in names.split():
            yield name, lambda name=name, shape=shape: layer_model(name, shape)
    for name in TWO_INPUTS.split():
        yield name, lambda name=name: layer_model(name, SEQUENCE)
    for name in PICTURES.split():
        yield name, lambda name=name: layer_model(name, (16, 16, 3))
    yield "Embedding", embedding_model
    for name, options in VARIANTS.items():
        layer, _, _ = name.partition(",")
        yield name, lambda layer=layer, options=options: layer_model(layer, SEQUENCE, options)


def layer_model(
    name: str, shape: tuple[int, ...], changes: dict[str, Any] | None = None
) -> keras.Model:
    """A model: a weighted input, the layer, a dense output."""
    options = {**OPTIONS.get(name, {}), **(changes or {})}
    layer_type = getattr(layers, name)
    for parameter in inspect.signature(layer_type.__init__).parameters.values():
        is_needed = parameter.default is parameter.empty
        if parameter.name in COMMON and is_needed:
            options.setdefault(parameter.name, COMMON[parameter.name])
    made = {key: value() if inspect.isfunction(value) else value for key, value in options.items()}
    layer = layer_type(**made)
    inputs = keras.Input(shape)
    hidden = inputs
    if name not in PICTURES.split():
        hidden = layers.Dense(shape[-1])(inputs)
    if name in (*TWO_INPUTS.split(), "Dot", "Attention", "AdditiveAttention"):
        output = layer([hidden, inputs])
    elif name in ("MultiHeadAttention", "GroupQueryAttention"):
        output = layer(hidden, inputs, use_causal_mask=True)
    else:
        output = layer(hidden)
    return whole_model(inputs, output)


def embedding_model() -> keras.Model:
    """A model of an embedding."""
    tokens = keras.Input((LENGTH,), dtype="int32")
    return whole_model(tokens, layers.Embedding(40, 8)(tokens))


def whole_model(inputs: Any, output: Any) -> keras.Model:
    """A model with one more dense layer."""
    output = layers.Dense(2, dtype="float32")(layers.Flatten()(output))
    return keras.Model(inputs, output)


def application_cases() -> Iterator[tuple[str, Make]]:
    """Every model of keras.applications, for images of 75 pixels where it takes them."""
    for name, make in sorted(vars(keras.applications).items()):
        if inspect.isfunction(make):
            yield name, lambda make=make: application_model(make)


def application_model(make: Callable[..., keras.Model]) -> keras.Model:
    """A model of keras.applications with random weights."""
    for side in (75, 224, 331):
        with contextlib.suppress(ValueError):
            return make(weights=None, input_shape=(side, side, 3), classes=16)
    raise ValueError("no size of images is accepted")


def hub_cases() -> Iterator[tuple[str, Make]]:
    """Every backbone of keras_hub, in a tiny size."""
    for name, backbone in backbones():
        yield name, lambda name=name, backbone=backbone: hub_model(name, backbone)


def hub_model(name: str, backbone: Any) -> keras.Model:
    """A tiny model of a backbone, with a dense layer behind its first output."""
    inputs, outputs = tiny_backbone(name, backbone)
    output = keras.tree.flatten(outputs)[0]
    if output.shape[-1] is None:
        # Similarities of all pairs of samples.
        return keras.Model(inputs, output)
    return keras.Model(inputs, layers.Dense(2, dtype="float32")(output))


def batch_of(model: keras.Model) -> Any:
    """Shapes of a batch of a model, open dims with a length. Labels have the shape that the model
    computes: some layers of keras_hub declare another one."""
    inputs = keras.tree.map_structure(shape_of, model._inputs_struct)
    variables = [variable.value for variable in model.trainable_variables]
    others = [variable.value for variable in model.non_trainable_variables]
    outputs, _ = jax.eval_shape(model.stateless_call, variables, others, inputs)
    return inputs, outputs


def shape_of(tensor: Any) -> jax.ShapeDtypeStruct:
    """The shape of a batch of a symbolic tensor."""
    dims = [LENGTH if size is None else size for size in tensor.shape[1:]]
    return jax.ShapeDtypeStruct((BATCH, *dims), jax.dtypes.canonicalize_dtype(tensor.dtype))


GROUPS = {"layers": layer_cases, "applications": application_cases, "hub": hub_cases}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", default="layers,applications", help="of " + ", ".join(GROUPS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--only", default="", help="parts of names, with commas")
    given = parser.parse_args()
    failed = 0
    for group in given.groups.split(","):
        count = 0
        for name, make in GROUPS[group]():
            if not any(part in name.lower() for part in given.only.lower().split(",")):
                continue
            texts = captured(make, given.targets.split(","))
            failed += any("NOT CAPTURED" in text for text in texts)
            count += 1
            print(f"{name:32} {'; '.join(texts)}", flush=True)
        print(f"{group}: {count} models")
    print(f"{failed} not captured")
    return 1 if failed else 0


def captured(make: Make, targets: list[str]) -> list[str]:
    """For every target its kernels of libraries and its notes, or the reason of a failure."""
    keras.backend.clear_session()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with partita.abstract():
            model = make()
        model.compile("adam", "mse")
        batch = batch_of(model)
    except Exception as error:
        return [f"not built: {type(error).__name__}: {str(error).splitlines()[0][:120]}"]
    texts = []
    for target in targets:
        try:
            graph = partita.capture_program(model, batch=batch, target=target).graph
        except Exception as error:
            texts.append(f"{target} NOT CAPTURED: {str(error)[:300]}")
            continue
        names = [i.name for i in graph.instructions]
        kernels = [k for k in ("fused_attention", "recurrence") if k in names]
        texts.append(" ".join([target, *kernels, *graph.notes]))
    return texts


if __name__ == "__main__":
    sys.exit(main())

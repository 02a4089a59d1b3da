"""Keras layers one after the other on rows of vertices: networks inside of a layer (`mlp=`)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import keras

from partita.errors import GraphError

BY_ROWS = (
    keras.layers.Dense,
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.LayerNormalization,
)
"""Layers whose result for a row depends on that row alone."""


def as_layers(mlp: Any) -> list[Any]:
    """A Keras layer, a `keras.Sequential` or a list of layers as a list; GraphError otherwise."""
    if isinstance(mlp, keras.Sequential):
        return list(mlp.layers)
    layers = list(mlp) if isinstance(mlp, (list, tuple)) else [mlp]
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise GraphError(
                f"mlp has a {type(layer).__name__}: give a Keras layer, or a list of Keras layers."
            )
    return layers


def build_layers(layers: Sequence[Any], width: int) -> int:
    """Builds layers for rows of `width` features; the number of features of their result."""
    for layer in layers:
        if not layer.built:
            layer.build((None, width))
        width = layer.compute_output_shape((None, width))[-1]
    return width


def apply_layer(layer: Any, x: Any, graph: Any, training: bool) -> Any:
    """The result of a layer on rows x, which is given `graph` and `training` if it takes them."""
    names = inspect.signature(layer.call).parameters
    options: dict[str, Any] = {}
    if "graph" in names:
        options["graph"] = graph
    if "training" in names:
        options["training"] = training
    return layer(x, **options)


def apply_layers(layers: Sequence[Any], x: Any, graph: Any, training: bool) -> Any:
    """The result of layers one after the other."""
    for layer in layers:
        x = apply_layer(layer, x, graph, training)
    return x


def is_by_rows(layer: Any) -> bool:
    """Whether a layer combines the rows of vertices by the block's aggregations alone."""
    return (is_ours(layer) or type(layer) in BY_ROWS) and not penalizes(layer)


def is_ours(layer: Any) -> bool:
    """Whether a layer or model is of this package."""
    return type(layer).__module__.startswith("partita.")


def penalizes(layer: Any) -> bool:
    """Whether Keras penalizes a layer's result."""
    return getattr(layer, "activity_regularizer", None) is not None


def are_by_rows(layers: Sequence[Any]) -> bool:
    """Whether no layer mixes the rows of vertices."""
    return all(type(layer) in BY_ROWS for layer in layers)


def layers_config(layers: Sequence[Any] | None) -> Any:
    """Layers as a config of Keras."""
    if layers is None:
        return None
    return [keras.saving.serialize_keras_object(layer) for layer in layers]


def layers_of_config(config: Any) -> Any:
    """The layers of a config; layers themselves stay."""
    if config is None:
        return None
    entries = config if isinstance(config, (list, tuple)) else [config]
    return [
        keras.saving.deserialize_keras_object(entry) if isinstance(entry, dict) else entry
        for entry in entries
    ]

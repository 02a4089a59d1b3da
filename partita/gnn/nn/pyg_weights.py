"""Weights of layers in PyG's names and shapes, both ways.

PyG (PyTorch Geometric) stores matrices as [outputs, inputs], the transpose of ours. Nothing of it
is imported: a state is a mapping from names to arrays or tensors, as `module.state_dict()` gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import as_array
from partita.gnn.nn.layers import (
    GatedGraphConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    SAGEConv,
)

NAMES: dict[type, dict[str, str]] = {
    GCNConv: {"kernel": "lin.weight", "shift": "bias"},
    SAGEConv: {
        "kernel": "lin_l.weight",
        "shift": "lin_l.bias",
        "own": "lin_r.weight",
        "projection": "lin.weight",
        "projection_shift": "lin.bias",
    },
    GINConv: {
        "epsilon": "eps",
        "kernel": "nn.0.weight",
        "shift": "nn.0.bias",
        "second": "nn.2.weight",
        "second_shift": "nn.2.bias",
    },
    GATv2Conv: {
        "kernel": "lin_l.weight",
        "kernel_shift": "lin_l.bias",
        "destination": "lin_r.weight",
        "destination_shift": "lin_r.bias",
        "score": "att",
        "shift": "bias",
        "own": "res.weight",
    },
    GatedGraphConv: {
        "kernels": "weight",
        "gates": "rnn.weight_ih",
        "recurrent": "rnn.weight_hh",
        "shift": "rnn.bias_ih",
        "recurrent_shift": "rnn.bias_hh",
    },
}
"""PyG's name of each attribute of a layer."""


def pyg_state(layer: Any) -> dict[str, np.ndarray]:
    """Weights of a built layer, float32, under PyG's names and in PyG's shapes."""
    state = {}
    for attribute, name in _names(layer).items():
        if attribute == "kernels":
            state[name] = np.stack([np.asarray(kernel) for kernel in layer.kernels])
            continue
        array = np.asarray(getattr(layer, attribute))
        state[name] = _in_shape_of_pyg(attribute, array)
    return state


def load_pyg_state(layer: Any, state: Mapping[str, Any]) -> None:
    """Puts the weights of a PyG module into a built layer of the same options.

    GraphError if a name is missing or unknown, or a shape differs.
    """
    names = _names(layer)
    unknown = sorted(set(state) - set(names.values()))
    missing = sorted(set(names.values()) - set(state))
    if unknown or missing:
        title = f"{type(layer).__name__} {layer.name!r}"
        raise GraphError(
            f"The weights do not fit {title}: missing {', '.join(missing) or 'none'}; unknown "
            f"{', '.join(unknown) or 'none'}. Make both layers with the same options."
        )
    for attribute, name in names.items():
        array = as_array(state[name])
        if attribute == "kernels":
            for kernel, matrix in zip(layer.kernels, array, strict=True):
                kernel.assign(matrix)
            continue
        variable = getattr(layer, attribute)
        expected = _in_shape_of_pyg(attribute, np.asarray(variable)).shape
        if array.shape != expected:
            raise GraphError(
                f"{name} has the shape {list(array.shape)}, and {layer.name!r} needs "
                f"{list(expected)}: make both layers with the same options."
            )
        matrix = array.T if array.ndim == 2 else array
        variable.assign(matrix.reshape(variable.shape))


def _in_shape_of_pyg(attribute: str, array: np.ndarray) -> np.ndarray:
    """An array as PyG stores it: matrices transposed, scores [1, heads, features], e as [1]."""
    if attribute == "score":
        return array[None]
    if attribute == "epsilon":
        return array.reshape(1)
    return array.T if array.ndim == 2 else array


def _names(layer: Any) -> dict[str, str]:
    """PyG's names of the weights that a layer has."""
    names = NAMES.get(type(layer))
    if names is None:
        known = ", ".join(kind.__name__ for kind in NAMES)
        raise GraphError(
            f"{type(layer).__name__} has no weights in PyG's names: use one of {known}."
        )
    if not layer.built:
        raise GraphError(f"{layer.name!r} has no weights yet: build it, or fit the model once.")
    return {a: name for a, name in names.items() if getattr(layer, a, None) is not None}

"""Weights of layers and models in PyG's names and shapes, both ways.

PyG (PyTorch Geometric) stores matrices as [outputs, inputs], the transpose of ours. Nothing of it
is imported: a state is a mapping from names to arrays or tensors, as `module.state_dict()` gives.

| ours | PyG's |
|---|---|
| GCNConv, SAGEConv, GINConv, GINEConv, GATConv, GATv2Conv, GatedGraphConv | the same names |
| RelationalConv | `RGCNConv` |
| GCN, SAGE | `GCN`, `GraphSAGE` of `torch_geometric.nn.models` |
| Dense, VertexBatchNormalization, LayerNormalization | `Linear`, `BatchNorm`, `LayerNorm` |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np

from partita.errors import GraphError
from partita.gnn.data.arrays import as_array
from partita.gnn.nn.attention import GATConv, GATv2Conv
from partita.gnn.nn.isomorphism import GINConv, GINEConv
from partita.gnn.nn.layers import GatedGraphConv, GCNConv, SAGEConv
from partita.gnn.nn.models import GraphModel
from partita.gnn.nn.relations import RelationalConv
from partita.gnn.nn.vertices import VertexBatchNormalization


@dataclass(frozen=True)
class StateEntry:
    """A number of PyG's state: the array as PyG stores it, and a function that takes another."""

    array: np.ndarray
    assign: Callable[[np.ndarray], None]


def pyg_state(layer: Any) -> dict[str, np.ndarray]:
    """Weights of a built layer or model, float32, under PyG's names and in PyG's shapes."""
    return {name: entry.array for name, entry in _entries(layer).items()}


def load_pyg_state(layer: Any, state: Mapping[str, Any]) -> None:
    """Puts the weights of a PyG module into a built layer or model of the same options.

    GraphError if a name is missing or unknown, a shape differs, or names of one weight have several
    values; then nothing has changed.
    """
    entries = _entries(layer)
    unknown = sorted(set(state) - set(entries))
    missing = sorted(set(entries) - set(state))
    if unknown or missing:
        title = f"{type(layer).__name__} {layer.name!r}"
        raise GraphError(
            f"The weights do not fit {title}: missing {', '.join(missing) or 'none'}; unknown "
            f"{', '.join(unknown) or 'none'}. Make both layers with the same options."
        )
    arrays = {name: as_array(state[name]) for name in entries}
    for name, entry in entries.items():
        if arrays[name].shape != entry.array.shape:
            raise GraphError(
                f"{name} has the shape {list(arrays[name].shape)}, and {layer.name!r} needs "
                f"{list(entry.array.shape)}: make both layers with the same options."
            )
        first = next(other for other, known in entries.items() if known is entry)
        if first != name and not np.array_equal(arrays[first], arrays[name]):
            raise GraphError(
                f"{first} and {name} differ, and {layer.name!r} has one weight for both: make both "
                "layers with the same options."
            )
    for name, entry in entries.items():
        entry.assign(arrays[name])


# ----------------------------------------------------------------------------- shapes of PyG


def _plain(variable: Any) -> StateEntry:
    """An array of the same shape."""
    return StateEntry(np.asarray(variable, np.float32), variable.assign)


def _transposed(variable: Any) -> StateEntry:
    """A matrix, [outputs, inputs] in PyG."""
    array = np.asarray(variable, np.float32).T
    return StateEntry(array, lambda given: variable.assign(given.T))


def _reshaped(variable: Any, shape: tuple[int, ...]) -> StateEntry:
    """An array of another shape in PyG."""
    array = np.asarray(variable, np.float32).reshape(shape)
    return StateEntry(array, lambda given: variable.assign(given.reshape(variable.shape)))


def _scores(variable: Any) -> StateEntry:
    """Scores, [1, heads, features] in PyG."""
    return _reshaped(variable, (1, *variable.shape))


def _stacked(variables: Sequence[Any]) -> StateEntry:
    """Matrices in one array."""

    def assign(given: np.ndarray) -> None:
        for variable, matrix in zip(variables, given, strict=True):
            variable.assign(matrix)

    return StateEntry(np.stack([np.asarray(v, np.float32) for v in variables]), assign)


# ----------------------------------------------------------------------------- names of PyG

Named = Sequence[tuple[str, str, Callable[[Any], StateEntry]]]
"""(attribute of a layer, name in PyG, shape in PyG); attributes that are None are left out."""

NAMES: dict[type, Named] = {
    GCNConv: (("kernel", "lin.weight", _transposed), ("shift", "bias", _plain)),
    SAGEConv: (
        ("kernel", "lin_l.weight", _transposed),
        ("shift", "lin_l.bias", _plain),
        ("own", "lin_r.weight", _transposed),
        ("projection", "lin.weight", _transposed),
        ("projection_shift", "lin.bias", _plain),
    ),
    GINConv: (
        ("epsilon", "eps", partial(_reshaped, shape=(1,))),
        ("kernel", "nn.0.weight", _transposed),
        ("shift", "nn.0.bias", _plain),
        ("second", "nn.2.weight", _transposed),
        ("second_shift", "nn.2.bias", _plain),
        ("edge_kernel", "lin.weight", _transposed),
        ("edge_shift", "lin.bias", _plain),
    ),
    GATv2Conv: (
        ("kernel", "lin_l.weight", _transposed),
        ("kernel_shift", "lin_l.bias", _plain),
        ("destination", "lin_r.weight", _transposed),
        ("destination_shift", "lin_r.bias", _plain),
        ("score", "att", _scores),
        ("shift", "bias", _plain),
        ("own", "res.weight", _transposed),
        ("edge_kernel", "lin_edge.weight", _transposed),
    ),
    GATConv: (
        ("source_score", "att_src", _scores),
        ("target_score", "att_dst", _scores),
        ("edge_score", "att_edge", _scores),
        ("shift", "bias", _plain),
        ("own", "res.weight", _transposed),
        ("edge_kernel", "lin_edge.weight", _transposed),
    ),
    GatedGraphConv: (
        ("kernels", "weight", _stacked),
        ("gates", "rnn.weight_ih", _transposed),
        ("recurrent", "rnn.weight_hh", _transposed),
        ("shift", "rnn.bias_ih", _plain),
        ("recurrent_shift", "rnn.bias_hh", _plain),
    ),
    RelationalConv: (
        ("kernels", "weight", _plain),
        ("shares", "comp", _plain),
        ("own", "root", _plain),
        ("shift", "bias", _plain),
    ),
    keras.layers.Dense: (("kernel", "weight", _transposed), ("bias", "bias", _plain)),
    keras.layers.LayerNormalization: (("gamma", "weight", _plain), ("beta", "bias", _plain)),
    VertexBatchNormalization: (
        ("gamma", "weight", _plain),
        ("beta", "bias", _plain),
        ("moving_mean", "running_mean", _plain),
        ("moving_variance", "running_var", _plain),
    ),
}
NAMES[GINEConv] = NAMES[GINConv]


def _entries(layer: Any) -> dict[str, StateEntry]:
    """The entries of PyG's state of a built layer or model."""
    if not isinstance(layer, keras.layers.Layer):
        raise GraphError(f"A {type(layer).__name__} is no layer: give a layer or model of gnn.")
    if not layer.built:
        raise GraphError(f"{layer.name!r} has no weights yet: build it, or fit the model once.")
    if isinstance(layer, GraphModel):
        return _model_entries(layer)
    names = NAMES.get(type(layer))
    if names is None:
        known = ", ".join(kind.__name__ for kind in NAMES)
        raise GraphError(
            f"{type(layer).__name__} has no weights in PyG's names: use one of {known}."
        )
    entries = {}
    for attribute, name, entry in names:
        variable = getattr(layer, attribute, None)
        if variable is not None:
            entries[name] = entry(variable)
    if isinstance(layer, GATConv):
        entries |= _gat_matrices(layer)
    if isinstance(layer, GATv2Conv) and layer.share_weights:
        # The state of a module has its shared matrix under both names.
        entries |= {
            name.replace("lin_l", "lin_r"): entry
            for name, entry in entries.items()
            if name.startswith("lin_l")
        }
    if isinstance(layer, VertexBatchNormalization):
        entries["num_batches_tracked"] = StateEntry(np.zeros((), np.int64), lambda given: None)
    if isinstance(layer, GINConv) and layer.mlp is not None:
        entries |= _network_entries(layer.mlp)
    return entries


def _gat_matrices(layer: GATConv) -> dict[str, StateEntry]:
    """One matrix for both ends is `lin`, two are `lin_src` and `lin_dst`."""
    if layer.destination is None:
        return {"lin.weight": _transposed(layer.kernel)}
    return {
        "lin_src.weight": _transposed(layer.kernel),
        "lin_dst.weight": _transposed(layer.destination),
    }


def _network_entries(layers: Sequence[Any]) -> dict[str, StateEntry]:
    """A network under `nn`, by positions in a `torch.nn.Sequential`.

    There an activation is a module of its own.
    """
    entries = {}
    position = 0
    for layer in layers:
        if layer.weights:
            named = _entries(layer).items()
            entries |= {f"nn.{position}.{name}": entry for name, entry in named}
        activation = getattr(layer, "activation", None)
        active = activation is not None and activation is not keras.activations.linear
        apart = active and not isinstance(layer, keras.layers.Activation)
        position += 2 if apart else 1
    return entries


def _model_entries(model: GraphModel) -> dict[str, StateEntry]:
    """The layers of a model: `convs`, `norms`, and `lin` after jumping knowledge."""
    parts = [(f"convs.{i}", conv) for i, conv in enumerate(model.convs)]
    for index, norm in enumerate(model.norms):
        inner = ".module" if isinstance(norm, VertexBatchNormalization) else ""
        parts.append((f"norms.{index}{inner}", norm))
    if model.leave is not None:
        parts.append(("lin", model.leave))
    if not model.convs:
        raise GraphError(f"{type(model).__name__} has no weights in PyG's names: use its layers.")
    entries = {}
    for prefix, part in parts:
        entries |= {f"{prefix}.{name}": entry for name, entry in _entries(part).items()}
    return entries

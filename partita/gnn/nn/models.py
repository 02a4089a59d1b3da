"""Keras models for full-graph training: a stack of layers over one graph, with `fit(graph)`, `evaluate(graph)` and `predict(graph)`.

A model is a Keras model in all else: compile, callbacks, saving and loading, weights. A step trains on the whole graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import keras
import numpy as np

from partita.gnn.nn import layers
from partita.gnn.nn.block import Block
from partita.gnn.nn.layers import PACKAGE, AbstractConv, GatedGraphConv
from partita.gnn.nn.pieces import Piece, by_rows
from partita.gnn.train import FullGraphTraining

Stage = Callable[[Any, Block, bool], Any]
"""A part of a model: rows from rows, over a graph, in training or not. One that has `pieces` can be cut."""


@keras.saving.register_keras_serializable(PACKAGE)
class VertexDropout(keras.layers.Layer):
    """Dropout whose pattern belongs to the vertex and not to the device: the same numbers however a graph is split."""

    def __init__(self, rate: float, **named: Any) -> None:
        super().__init__(**named)
        self.rate = rate
        self.seed_generator = keras.random.SeedGenerator()
        self.built = True

    def call(self, x: Any, graph: Block, training: bool = False, column: Any = 0) -> Any:
        """`column` is the number of the first column of x."""
        if not training or not self.rate:
            return x
        seed = jnp.asarray(self.seed_generator.next()).astype(jnp.uint32)
        number = (
            graph.first[0] + jnp.arange(x.shape[0], dtype=jnp.int32)
            if graph.vertex is None
            else graph.vertex
        )
        vertex = number.astype(jnp.uint32)
        columns = _mixed(
            jnp.arange(x.shape[1], dtype=jnp.uint32)
            + jnp.asarray(column).astype(jnp.uint32)
            + seed[1]
        )
        bits = _mixed(_mixed(vertex ^ seed[0])[:, None] + columns)
        kept = bits >= jnp.uint32(min(self.rate * 2.0**32, 2**32 - 1))
        return jnp.where(kept, x / (1 - self.rate), 0)

    def save_own_variables(self, store: Any) -> None:
        """The seed too, which Keras's own Dropout forgets: training goes on from a file as it would have."""
        store["seed"] = np.asarray(self.seed_generator.state.value)

    def load_own_variables(self, store: Any) -> None:
        self.seed_generator.state.assign(np.asarray(store["seed"]))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate}


def _mixed(bits: Any) -> Any:
    """Every bit of a uint32 spread over all others (the integer hash 'lowbias32' of C. Wellons)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


@dataclass(frozen=True)
class Dropped:
    """The stage of a layer, one over a graph or a Dense, after dropout if there is some."""

    drop: VertexDropout | None
    layer: Any

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        x = x if self.drop is None else self.drop(x, graph=graph, training=training)
        return self.layer(x, graph=graph) if isinstance(self.layer, AbstractConv) else self.layer(x)

    def pieces(self, width: int, training: bool) -> Sequence[Piece] | None:
        """The stage from rows of `width` features, in pieces; None where it cannot be cut: a layer with a call of its own, an activation that is not
        one of Keras's functions, or numbers other than float32."""
        layer = self.layer
        if not (
            inspect.isfunction(layer.activation)
            and layer.activation.__module__.startswith("keras.")
        ):
            return None
        if layer.compute_dtype != "float32":
            return None
        if type(layer) is keras.layers.Dense:
            pieces: Sequence[Piece] = [by_rows("x", "y", layer)]
        elif isinstance(layer, AbstractConv) and type(layer).call is AbstractConv.call:
            pieces = layer.pieces(width)
        else:
            return None
        return [
            self._dropped(p, training) if "x" in p.reads and self.drop is not None else p
            for p in pieces
        ]

    def _dropped(self, piece: Piece, training: bool) -> Piece:
        """Dropout of "x" anew in every piece that reads it, so that its result need not be kept."""
        drop: Any = self.drop

        def function(graph: Block, column: Any, *tables: Any) -> tuple[Any, ...]:
            named = dict(zip(piece.reads, tables, strict=True))
            named["x"] = drop(named["x"], graph=graph, training=training, column=column)
            return piece.function(graph, column, *named.values())

        return replace(piece, function=function)


class GraphModel(FullGraphTraining, keras.Model):
    """`layers` layers of `hidden` features, the last of `classes`, each after dropout; probabilities come out.

    `l2` penalises the first layer's weights, as weight decay of that strength in gradient descent. `output` is the last activation:
    None for logits, with a loss of `from_logits=True`.
    """

    def __init__(
        self,
        hidden: int = 16,
        classes: int = 2,
        layers: int = 2,
        dropout: float = 0.5,
        l2: float = 0.0,
        output: str | None = "softmax",
        activation: str = "relu",
        **named: Any,
    ) -> None:
        super().__init__(**named)
        self.hidden, self.classes, self.depth, self.dropout, self.l2 = (
            hidden,
            classes,
            layers,
            dropout,
            l2,
        )
        self.output_activation, self.hidden_activation = output, activation
        self.convs, self.drops = [], []
        for i in range(layers):
            last = i == layers - 1
            regularizer = keras.regularizers.L2(l2 / 2) if l2 and i == 0 else None
            self.drops.append(VertexDropout(dropout, name=f"dropout_{i}"))
            self.convs.append(
                self.conv(
                    last,
                    activation=output if last else activation,
                    kernel_regularizer=regularizer,
                    name=f"conv_{i}",
                )
            )

    def conv(self, last: bool, **named: Any) -> layers.AbstractConv:
        """A layer: the last one, or one before."""
        raise NotImplementedError

    def units(self, last: bool) -> int:
        return self.classes if last else self.hidden

    def build(self, input_shape: Any) -> None:
        width = input_shape[-1]
        for conv in self.convs:
            conv.build((None, width))
            width = conv.compute_output_shape((None, width))[-1]
        self.built = True

    def stages(self) -> list[Stage]:
        """The model as functions of (x, graph, training), one after the other: what a memory plan runs one at a time."""
        return [Dropped(drop, conv) for drop, conv in zip(self.drops, self.convs, strict=True)]

    def call(self, x: Any, graph: Block, training: bool = False) -> Any:
        for stage in self.stages():
            x = stage(x, graph, training)
        return x

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "hidden": self.hidden,
            "classes": self.classes,
            "layers": self.depth,
            "dropout": self.dropout,
            "l2": self.l2,
            "output": self.output_activation,
            "activation": self.hidden_activation,
        }


@keras.saving.register_keras_serializable(PACKAGE)
class GCN(GraphModel):
    """Graph convolutional network (Kipf and Welling 2017)."""

    def conv(self, last: bool, **named: Any) -> layers.AbstractConv:
        return layers.GCNConv(self.units(last), **named)


@keras.saving.register_keras_serializable(PACKAGE)
class SAGE(GraphModel):
    """GraphSAGE on whole neighbourhoods (Hamilton et al. 2017); `aggregation` is 'mean' or 'max'."""

    def __init__(
        self, hidden: int = 16, classes: int = 2, *, aggregation: str = "mean", **named: Any
    ) -> None:
        self.aggregation = aggregation
        super().__init__(hidden, classes, **named)

    def conv(self, last: bool, **named: Any) -> layers.AbstractConv:
        return layers.SAGEConv(self.units(last), self.aggregation, **named)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "aggregation": self.aggregation}


@keras.saving.register_keras_serializable(PACKAGE)
class GIN(GraphModel):
    """Graph isomorphism network (Xu et al. 2019), without batch normalisation."""

    def conv(self, last: bool, **named: Any) -> layers.AbstractConv:
        return layers.GINConv(self.units(last), **named)


@keras.saving.register_keras_serializable(PACKAGE)
class GATv2(GraphModel):
    """Graph attention network (Brody et al. 2022): `heads` heads share `hidden` features, one head makes the last layer."""

    def __init__(
        self,
        hidden: int = 16,
        classes: int = 2,
        *,
        heads: int = 8,
        activation: str = "elu",
        **named: Any,
    ) -> None:
        self.heads = heads
        super().__init__(hidden, classes, activation=activation, **named)

    def conv(self, last: bool, **named: Any) -> layers.AbstractConv:
        return layers.GATv2Conv(self.units(last), 1 if last else self.heads, **named)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}


@keras.saving.register_keras_serializable(PACKAGE)
class CommNet(GraphModel):
    """Communication network (Sukhbaatar et al. 2016)."""

    def __init__(
        self, hidden: int = 16, classes: int = 2, *, activation: str = "tanh", **named: Any
    ) -> None:
        super().__init__(hidden, classes, activation=activation, **named)

    def conv(self, last: bool, **named: Any) -> layers.AbstractConv:
        return layers.CommNetConv(self.units(last), **named)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedGraph(GraphModel):
    """Gated graph network (Li et al. 2016): a dense layer, `layers` steps of one recurrent unit, a dense layer to the classes."""

    def __init__(
        self,
        hidden: int = 16,
        classes: int = 2,
        layers: int = 2,
        dropout: float = 0.5,
        l2: float = 0.0,
        output: str | None = "softmax",
        activation: str = "relu",
        **named: Any,
    ) -> None:
        super().__init__(hidden, classes, 0, dropout, l2, output, activation, **named)
        self.depth = layers
        self.drop, self.last_drop = (
            VertexDropout(dropout, name="dropout"),
            VertexDropout(dropout, name="last_dropout"),
        )
        regularizer = keras.regularizers.L2(l2 / 2) if l2 else None
        self.enter = keras.layers.Dense(
            hidden, activation, kernel_regularizer=regularizer, name="enter"
        )
        self.gated = GatedGraphConv(hidden, layers, name="gated")
        self.leave = keras.layers.Dense(classes, output, name="leave")

    def build(self, input_shape: Any) -> None:
        self.enter.build(input_shape)
        self.gated.build((None, self.hidden))
        self.leave.build((None, self.hidden))
        self.built = True

    def stages(self) -> list[Stage]:
        return [
            Dropped(self.drop, self.enter),
            Dropped(None, self.gated),
            Dropped(self.last_drop, self.leave),
        ]


MODELS = {
    "gcn": GCN,
    "sage": SAGE,
    "gin": GIN,
    "gatv2": GATv2,
    "commnet": CommNet,
    "gatedgraph": GatedGraph,
}
"""Models by the names that the command line knows."""

for _model in MODELS.values():
    _model.by_vertex = True

"""Keras models for full-graph training: layers with fit, evaluate and predict on a `Graph`.

A model is a Keras model in everything else: compile, callbacks, saving and loading, weights. A step
trains on the whole graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras

from partita.gnn.nn import layers
from partita.gnn.nn.block import Block
from partita.gnn.nn.layers import PACKAGE, AbstractConv, GatedGraphConv
from partita.gnn.nn.pieces import BlockPiece, by_rows
from partita.gnn.nn.vertices import VertexDropout
from partita.gnn.train import FullGraphTraining

Stage = Callable[[Any, Block, bool], Any]
"""A stage of a model: `(x, graph, training) -> x`. A stage with a method `pieces` can be cut."""


@dataclass(frozen=True)
class LayerStage:
    """The stage of one layer, over a graph or a Dense, after dropout if there is any."""

    dropout: VertexDropout | None
    layer: Any

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        if self.dropout is not None:
            x = self.dropout(x, graph=graph, training=training)
        if isinstance(self.layer, AbstractConv):
            return self.layer(x, graph=graph)
        return self.layer(x)

    def pieces(self, width: int, training: bool) -> Sequence[BlockPiece] | None:
        """The stage on rows of `width` features, in pieces; None if it cannot be cut.

        Reasons: a layer with a `call` of its own, an activation that is no function of Keras, or
        numbers other than float32.
        """
        pieces = self._layer_pieces(width)
        if pieces is None or self.dropout is None:
            return pieces
        return [self._dropped(p, training) if "x" in p.reads else p for p in pieces]

    def _layer_pieces(self, width: int) -> Sequence[BlockPiece] | None:
        layer = self.layer
        activation = layer.activation
        if not inspect.isfunction(activation) or not activation.__module__.startswith("keras."):
            return None
        if layer.compute_dtype != "float32":
            return None
        if type(layer) is keras.layers.Dense:
            return [by_rows("x", "y", layer)]
        if isinstance(layer, AbstractConv) and type(layer).call is AbstractConv.call:
            return layer.pieces(width)
        return None

    def _dropped(self, piece: BlockPiece, training: bool) -> BlockPiece:
        """The piece with dropout of "x", rematerialized in every piece that reads it."""
        dropout: Any = self.dropout

        def function(graph: Block, column: Any, *tables: Any) -> tuple[Any, ...]:
            inputs = dict(zip(piece.reads, tables, strict=True))
            inputs["x"] = dropout(inputs["x"], graph=graph, training=training, column=column)
            return piece.function(graph, column, *inputs.values())

        return replace(piece, function=function)


class GraphModel(FullGraphTraining, keras.Model):
    """`layers` layers of `hidden` features, the last of `classes`, each after dropout.

    The output is probabilities. `l2` penalizes the first layer's weights, like weight decay of that
    strength in gradient descent. `output` is the last activation: None for logits, with a loss of
    `from_logits=True`.
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
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.hidden = hidden
        self.classes = classes
        self.depth = layers
        self.dropout = dropout
        self.l2 = l2
        self.output_activation = output
        self.hidden_activation = activation
        self.convs = []
        self.drops = []
        for i in range(layers):
            last = i == layers - 1
            regularizer = keras.regularizers.L2(l2 / 2) if l2 and i == 0 else None
            self.drops.append(VertexDropout(dropout, name=f"dropout_{i}"))
            conv = self.conv(
                last,
                activation=output if last else activation,
                kernel_regularizer=regularizer,
                name=f"conv_{i}",
            )
            self.convs.append(conv)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        """A new layer, the last one or another."""
        raise NotImplementedError

    def units(self, last: bool) -> int:
        """Features of a layer."""
        return self.classes if last else self.hidden

    def build(self, input_shape: Any) -> None:
        width = input_shape[-1]
        for conv in self.convs:
            conv.build((None, width))
            width = conv.compute_output_shape((None, width))[-1]
        self.built = True

    def stages(self) -> list[Stage]:
        """The model as functions of (x, graph, training), which a memory plan runs one by one."""
        return [LayerStage(drop, conv) for drop, conv in zip(self.drops, self.convs, strict=True)]

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

    by_vertex = True

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.GCNConv(self.units(last), **options)


@keras.saving.register_keras_serializable(PACKAGE)
class SAGE(GraphModel):
    """GraphSAGE on whole neighbourhoods (Hamilton et al. 2017), by 'mean' or 'max'."""

    by_vertex = True

    def __init__(
        self, hidden: int = 16, classes: int = 2, *, aggregation: str = "mean", **options: Any
    ) -> None:
        self.aggregation = aggregation
        super().__init__(hidden, classes, **options)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.SAGEConv(self.units(last), self.aggregation, **options)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "aggregation": self.aggregation}


@keras.saving.register_keras_serializable(PACKAGE)
class GIN(GraphModel):
    """Graph isomorphism network (Xu et al. 2019), without batch normalization."""

    by_vertex = True

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.GINConv(self.units(last), **options)


@keras.saving.register_keras_serializable(PACKAGE)
class GATv2(GraphModel):
    """Graph attention network (Brody et al. 2022).

    `heads` heads share `hidden` features; the last layer has one head.
    """

    by_vertex = True

    def __init__(
        self,
        hidden: int = 16,
        classes: int = 2,
        *,
        heads: int = 8,
        activation: str = "elu",
        **options: Any,
    ) -> None:
        self.heads = heads
        super().__init__(hidden, classes, activation=activation, **options)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.GATv2Conv(self.units(last), 1 if last else self.heads, **options)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}


@keras.saving.register_keras_serializable(PACKAGE)
class CommNet(GraphModel):
    """Communication network (Sukhbaatar et al. 2016)."""

    by_vertex = True

    def __init__(
        self, hidden: int = 16, classes: int = 2, *, activation: str = "tanh", **options: Any
    ) -> None:
        super().__init__(hidden, classes, activation=activation, **options)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.CommNetConv(self.units(last), **options)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedGraph(GraphModel):
    """Gated graph network (Li et al. 2016).

    A dense layer, `layers` steps of one recurrent unit, and a dense layer to the classes.
    """

    by_vertex = True

    def __init__(
        self,
        hidden: int = 16,
        classes: int = 2,
        layers: int = 2,
        dropout: float = 0.5,
        l2: float = 0.0,
        output: str | None = "softmax",
        activation: str = "relu",
        **options: Any,
    ) -> None:
        super().__init__(
            hidden,
            classes,
            0,
            dropout,
            l2,
            output,
            activation,
            **options,
        )
        self.depth = layers
        self.drop = VertexDropout(dropout, name="dropout")
        self.last_drop = VertexDropout(dropout, name="last_dropout")
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
            LayerStage(self.drop, self.enter),
            LayerStage(None, self.gated),
            LayerStage(self.last_drop, self.leave),
        ]


MODELS: dict[str, type[GraphModel]] = {
    "gcn": GCN,
    "sage": SAGE,
    "gin": GIN,
    "gatv2": GATv2,
    "commnet": CommNet,
    "gatedgraph": GatedGraph,
}
"""Models by their names on the command line."""

"""Keras models for full-graph training: layers with fit, evaluate and predict on a `Graph`.

A model is a Keras model in everything else: compile, callbacks, saving and loading, weights. A step
trains on the whole graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import keras

from partita.errors import GraphError
from partita.files.reading import short_reason
from partita.gnn.data.arrays import as_count
from partita.gnn.data.graph import Graph
from partita.gnn.nn import layers
from partita.gnn.nn.attention import GATConv, GATv2Conv
from partita.gnn.nn.block import READOUTS, Block, TakesGraph, as_block
from partita.gnn.nn.isomorphism import GINConv
from partita.gnn.nn.layers import PACKAGE, GatedGraphConv
from partita.gnn.nn.rows import is_by_rows
from partita.gnn.nn.stages import (
    FirstColumns,
    JumpStage,
    LayerStage,
    LinkStage,
    ReadoutStage,
    ResidualStage,
    Stage,
)
from partita.gnn.nn.vertices import VertexBatchNormalization, VertexDropout
from partita.gnn.train import FullGraphTraining

NORMS = {
    "batch": VertexBatchNormalization,
    "layer": lambda **options: keras.layers.LayerNormalization(epsilon=1e-5, **options),
}
"""Normalizations of models by name."""

JUMPS = ("cat", "max")
"""Modes of jumping knowledge."""


class ModelOptions(TypedDict, total=False):
    """More options of graph models.

    norm            'batch' or 'layer': normalization between a layer and its activation, but for
                    the last layer
    residual        adds its input to each layer's result, where both have equal widths
    jk              'cat' or 'max' (jumping knowledge): a dense layer to the classes reads the
                    results of all layers
    readout         'mean', 'sum' or 'max' over the vertices of each graph of a batch
                    (`gnn.batch`), then a dense layer to the classes
    links           whether the last layer's `classes` features are embeddings, and the output is
                    the probability of a link of each pair (`gnn.with_pairs`); its logit for
                    output=None
    layer_options   options of every layer over the graph, such as {"improved": True}
    name, dtype     as in Keras
    """

    norm: str | None
    residual: bool
    jk: str | None
    readout: str | None
    links: bool
    layer_options: dict[str, Any] | None
    name: str
    dtype: Any


class GraphModel(TakesGraph, FullGraphTraining, keras.Model):
    """`layers` layers of `hidden` features, the last of `classes`, each after dropout.

    `hidden` may be a list of widths, one for each layer but the last. The output is probabilities.
    `l2` penalizes the first layer's weights, like weight decay of that strength in gradient
    descent. `output` is the last activation: None for logits, with a loss of `from_logits=True`.
    More options: `ModelOptions`.
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = 16,
        classes: int = 2,
        layers: int | None = None,
        dropout: float = 0.5,
        l2: float = 0.0,
        output: str | None = "softmax",
        activation: str = "relu",
        **options: Unpack[ModelOptions],
    ) -> None:
        keras_options: dict[str, Any] = dict(options)
        norm = keras_options.pop("norm", None)
        residual = keras_options.pop("residual", False)
        jk = keras_options.pop("jk", None)
        readout = keras_options.pop("readout", None)
        links = keras_options.pop("links", False)
        layer_options = _known_options(keras_options.pop("layer_options", None))
        super().__init__(**keras_options)
        self.hidden = _known_widths(hidden)
        self.classes = as_count("classes", classes, 1)
        if layers is not None:
            is_own = (type(self).call, type(self).stages) != (GraphModel.call, GraphModel.stages)
            as_count("layers", layers, 0 if is_own or readout or jk else 1)
        self.dropout = dropout
        self.l2 = l2
        self.links = links
        self.output_activation = output
        self.hidden_activation = activation
        self.norm = _known("norm", norm, tuple(NORMS))
        self.jk = _known("jk", jk, JUMPS)
        self.readout = _known("readout", readout, READOUTS)
        self.residual = residual
        if links and (self.norm == "batch" or self.readout is not None):
            raise GraphError(
                "links=True cannot be combined with norm='batch' or a readout, which would count "
                "pairs as vertices: use norm='layer', and no readout."
            )
        self.layer_options = layer_options
        self.widths = layer_widths(hidden, classes, layers, self.leaves, self.jk is not None)
        self.depth = len(self.widths)
        self.convs = []
        self.drops = []
        self.norms = []
        self.leave: Any = None
        self._make_layers()
        inner = self._flatten_layers(include_self=False)
        if self.readout is not None or any(map(reads_all_rows, inner)):
            # these need the rows of all vertices, not only of those near training
            self.by_vertex = False
        if self.links:
            # most edges are near pairs, and other pairs must have arrays of the same shapes
            self.by_vertex = False

    @property
    def last_activation(self) -> str | None:
        """Activation of the last layer, none of embeddings."""
        return None if self.links else self.output_activation

    @property
    def leaves(self) -> bool:
        """Whether a dense layer to the classes follows the layers over the graph."""
        return self.jk is not None or self.readout is not None

    def _make_layers(self) -> None:
        """Makes dropout, convolution and normalization of every layer."""
        apart = self.norm is not None or self.residual
        for i, units in enumerate(self.widths):
            last = i == self.depth - 1 and not self.leaves
            regularizer = keras.regularizers.L2(self.l2 / 2) if self.l2 and i == 0 else None
            self.drops.append(VertexDropout(self.dropout, name=f"dropout_{i}"))
            hidden_activation = None if apart else self.hidden_activation
            options: dict[str, Any] = {
                "units": units,
                "activation": self.last_activation if last else hidden_activation,
                "kernel_regularizer": regularizer,
                "name": f"conv_{i}",
            }
            self.convs.append(self._conv_of(last, options))
            if self.norm is not None and not last:
                self.norms.append(NORMS[self.norm](name=f"norm_{i}"))
        if self.leaves:
            self.leave_drop = VertexDropout(self.dropout, name="last_dropout")
            self.leave = keras.layers.Dense(
                self.classes, activation=self.last_activation, name="leave"
            )

    def _conv_of(self, last: bool, options: dict[str, Any]) -> layers.AbstractConv:
        """A new layer of these options and `layer_options`; GraphError for wrong ones."""
        try:
            return self.conv(last, **options | self.layer_options)
        except (TypeError, ValueError) as error:
            if not self.layer_options:
                raise
            names = ", ".join(map(str, self.layer_options))
            raise GraphError(
                f"No layer has these layer_options ({names}): {short_reason(str(error))}. "
                "Give options of the layers over the graph, by name."
            ) from error

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        """A new layer of these options, `units` among them, the last one or another."""
        raise NotImplementedError

    def build(self, input_shape: Any) -> None:
        width = input_shape[-1]
        total = 0
        for i, conv in enumerate(self.convs):
            conv.build((None, width))
            width = conv.compute_output_shape((None, width))[-1]
            total += width
            if i < len(self.norms):
                self.norms[i].build((None, width))
        if self.leaves:
            self.leave.build((None, total if self.jk == "cat" else width))
        self.built = True

    def stages(self) -> list[Stage]:
        """The model as functions of (x, graph, training), which a memory plan runs one by one."""
        stages = self._layer_stages()
        if not self.links:
            return stages
        name = None if self.output_activation is None else "sigmoid"
        return [*stages, LinkStage(keras.activations.get(name))]

    def _layer_stages(self) -> list[Stage]:
        """The stages of the layers, and of the dense layer behind them."""
        stages = [self._stage(i) for i in range(self.depth)]
        if not self.leaves:
            return stages
        if self.jk is not None:
            for i, stage in enumerate(stages):
                stages[i] = JumpStage(stage, self.jk, self.widths[i - 1] if i else None)
        if self.jk == "max":
            stages.append(FirstColumns(self.widths[-1]))
        if self.readout is not None:
            stages.append(ReadoutStage(self.readout))
        return [*stages, LayerStage(self.leave_drop, self.leave)]

    def _stage(self, i: int) -> Stage:
        """The stage of layer i."""
        stage = LayerStage(self.drops[i], self.convs[i])
        last = i == self.depth - 1 and not self.leaves
        if last or (self.norm is None and not self.residual):
            return stage
        norm = self.norms[i] if self.norms else None
        activation = keras.activations.get(self.hidden_activation)
        return ResidualStage(stage, norm, activation, self.residual)

    def call(self, x: Any, graph: Block | Graph, training: bool = False) -> Any:
        block: Block = as_block(graph, x)
        for stage in self.stages():
            x = stage(x, block, training)
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
            "norm": self.norm,
            "residual": self.residual,
            "jk": self.jk,
            "readout": self.readout,
            "links": self.links,
            "layer_options": dict(self.layer_options),
        }


def reads_all_rows(layer: Any) -> bool:
    """Whether a layer, or its penalty, reads the rows of all vertices outside of aggregations."""
    return isinstance(layer, VertexBatchNormalization) or not is_by_rows(layer)


def layer_widths(
    hidden: int | Sequence[int], classes: int, layers: int | None, leaves: bool, jumps: bool
) -> list[int]:
    """Features of each layer, the last one of `classes` unless a dense layer `leaves`.

    Jumping knowledge (`jumps`) needs equal widths.

    >>> layer_widths(16, 7, 3, False, False), layer_widths([32, 8], 7, None, False, False)
    ([16, 16, 7], [32, 8, 7])
    """
    last = [] if leaves else [classes]
    if isinstance(hidden, int):
        depth = 2 if layers is None else layers
        return [hidden] * (depth - len(last)) + last if depth else []
    widths = [*hidden, *last]
    if layers not in (None, len(widths)):
        raise GraphError(
            f"hidden={list(hidden)} makes {len(widths)} layers, and layers={layers}: remove layers."
        )
    if jumps and len(set(widths)) > 1:
        raise GraphError(f"hidden={list(hidden)} with jk needs equal widths: use one number.")
    return widths


def _known_widths(hidden: Any) -> int | list[int]:
    """One number of features, or a list of them; GraphError for anything else."""
    if isinstance(hidden, (list, tuple)):
        return [as_count("hidden", width, 1) for width in hidden]
    return as_count("hidden", hidden, 1, "give a whole number of at least 1, or a list of them")


def _known_options(given: Any) -> dict[str, Any]:
    """Options of layers by name; GraphError for anything else, and for widths."""
    if given is not None and not isinstance(given, Mapping):
        raise GraphError(
            f"layer_options={given!r} is no dictionary: give options by name, as "
            "{'use_bias': False}."
        )
    options = dict(given or {})
    if "units" in options:
        raise GraphError("layer_options has 'units': give the widths as hidden= and classes=.")
    return options


def _known(option: str, value: Any, known: Sequence[str]) -> Any:
    """The value itself; GraphError unless it is None or known."""
    if value is not None and value not in known:
        names = ", ".join(map(repr, known))
        raise GraphError(f"{option}={value!r} is unknown: use None, {names}.")
    return value


@keras.saving.register_keras_serializable(PACKAGE)
class GCN(GraphModel):
    """Graph convolutional network (Kipf and Welling 2017)."""

    by_vertex = True

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.GCNConv(**options)


@keras.saving.register_keras_serializable(PACKAGE)
class SAGE(GraphModel):
    """GraphSAGE on whole neighbourhoods (Hamilton et al. 2017), by 'mean', 'max' or 'sum'."""

    by_vertex = True

    def __init__(
        self,
        hidden: int | Sequence[int] = 16,
        classes: int = 2,
        *,
        aggregation: str = "mean",
        **options: Any,
    ) -> None:
        self.aggregation = aggregation
        super().__init__(hidden, classes, **options)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.SAGEConv(aggregation=self.aggregation, **options)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "aggregation": self.aggregation}


@keras.saving.register_keras_serializable(PACKAGE)
class GIN(GraphModel):
    """Graph isomorphism network (Xu et al. 2019), without batch normalization by default."""

    by_vertex = True

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return GINConv(**options)


@keras.saving.register_keras_serializable(PACKAGE)
class GATv2(GraphModel):
    """Graph attention network (Brody et al. 2022).

    `heads` heads share `hidden` features. The last layer has `last_heads` heads, whose mean is the
    result. `layer_options={"dropout": 0.6}` drops attention.
    """

    by_vertex = True

    def __init__(
        self,
        hidden: int | Sequence[int] = 16,
        classes: int = 2,
        *,
        heads: int = 8,
        last_heads: int = 1,
        activation: str = "elu",
        **options: Any,
    ) -> None:
        self.heads = heads
        self.last_heads = last_heads
        super().__init__(hidden, classes, activation=activation, **options)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return GATv2Conv(**self.head_options(last), **options)

    def head_options(self, last: bool) -> dict[str, Any]:
        """Options of a layer's heads."""
        if not last:
            return {"heads": self.heads}
        return {"heads": self.last_heads, "concat": self.last_heads == 1}

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads, "last_heads": self.last_heads}


@keras.saving.register_keras_serializable(PACKAGE)
class GAT(GATv2):
    """Graph attention network (Velickovic et al. 2018), options as in `GATv2`."""

    by_vertex = True

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return GATConv(**self.head_options(last), **options)


@keras.saving.register_keras_serializable(PACKAGE)
class CommNet(GraphModel):
    """Communication network (Sukhbaatar et al. 2016)."""

    by_vertex = True

    def __init__(
        self,
        hidden: int | Sequence[int] = 16,
        classes: int = 2,
        *,
        activation: str = "tanh",
        **options: Any,
    ) -> None:
        super().__init__(hidden, classes, activation=activation, **options)

    def conv(self, last: bool, **options: Any) -> layers.AbstractConv:
        return layers.CommNetConv(**options)


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
        layers: int | None = None,
        dropout: float = 0.5,
        l2: float = 0.0,
        output: str | None = "softmax",
        activation: str = "relu",
        **options: Any,
    ) -> None:
        if any(options.get(name) for name in ("norm", "jk", "residual", "readout")):
            raise GraphError(
                "GatedGraph has no norm, jk, residual and readout: use GCN, SAGE, GIN or GAT."
            )
        super().__init__(hidden, classes, 0, dropout, l2, output, activation, **options)
        self.depth = 2 if layers is None else layers
        self.drop = VertexDropout(dropout, name="dropout")
        self.last_drop = VertexDropout(dropout, name="last_dropout")
        regularizer = keras.regularizers.L2(l2 / 2) if l2 else None
        self.enter = keras.layers.Dense(
            hidden, activation, kernel_regularizer=regularizer, name="enter"
        )
        self.gated = GatedGraphConv(hidden, self.depth, name="gated")
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
    "gat": GAT,
    "gatv2": GATv2,
    "commnet": CommNet,
    "gatedgraph": GatedGraph,
}
"""Models by their names on the command line."""

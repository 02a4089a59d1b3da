"""Stages of models: layers with dropout, normalization, residuals and jumping knowledge.

A stage maps rows of vertices to rows: `(x, graph, training) -> x`. One with a method `pieces` can
be cut for a memory plan; any other runs whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import keras

from partita.gnn.nn.block import Block
from partita.gnn.nn.layers import AbstractConv
from partita.gnn.nn.pieces import BlockPiece, by_rows
from partita.gnn.nn.rows import apply_layer, are_by_rows, penalizes
from partita.gnn.nn.vertices import VertexDropout

Stage = Callable[[Any, Block, bool], Any]
"""A stage of a model: `(x, graph, training) -> x`."""


@dataclass(frozen=True)
class LayerStage:
    """The stage of one layer, over a graph or a Dense, after dropout if there is any."""

    dropout: VertexDropout | None
    layer: Any

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        if self.dropout is not None:
            x = self.dropout(x, graph=graph, training=training)
        return apply_layer(self.layer, x, graph, training)

    def pieces(self, width: int, training: bool) -> Sequence[BlockPiece] | None:
        """The stage on rows of `width` features, in pieces; None if it cannot be cut.

        Reasons: a layer with a `call` of its own, an activation that is no function of Keras,
        numbers other than float32, or a penalty of the layer's result.
        """
        pieces = self._layer_pieces(width, training)
        if pieces is None or self.dropout is None:
            return pieces
        return [self._dropped(p, training) if "x" in p.reads else p for p in pieces]

    def _layer_pieces(self, width: int, training: bool) -> Sequence[BlockPiece] | None:
        layer = self.layer
        activation = getattr(layer, "activation", None)
        if not inspect.isfunction(activation) or not activation.__module__.startswith("keras."):
            return None
        if layer.compute_dtype != "float32" or penalizes(layer):
            return None
        if type(layer) is keras.layers.Dense:
            return [by_rows("x", "y", layer)]
        if isinstance(layer, AbstractConv) and type(layer).call is AbstractConv.call:
            return layer.pieces(width, training)
        return None

    def _dropped(self, piece: BlockPiece, training: bool) -> BlockPiece:
        """The piece with dropout of "x", rematerialized in every piece that reads it."""
        dropout: Any = self.dropout

        def function(graph: Block, column: Any, *tables: Any) -> tuple[Any, ...]:
            inputs = dict(zip(piece.reads, tables, strict=True))
            inputs["x"] = dropout(inputs["x"], graph=graph, training=training, column=column)
            return piece.function(graph, column, *inputs.values())

        return replace(piece, function=function)


@dataclass(frozen=True)
class ResidualStage:
    """activation(norm(layer(x))), plus x if `residual` and both have equal widths.

    The layer has no activation of its own (Li et al. 2019, DeepGCNs, section 3.2).
    """

    layer_stage: LayerStage
    norm: Any
    activation: Callable[[Any], Any]
    residual: bool

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        y = self.layer_stage(x, graph, training)
        return self._finished(x, y, graph, training)

    def _finished(self, x: Any, y: Any, graph: Block, training: bool) -> Any:
        if self.norm is not None:
            y = apply_layer(self.norm, y, graph, training)
        y = self.activation(y)
        return x + y if self.residual and x.shape[-1] == y.shape[-1] else y

    def pieces(self, width: int, training: bool) -> Sequence[BlockPiece] | None:
        """The layer's pieces and one for the rest; None if the layer cannot be cut."""
        pieces = self.layer_stage.pieces(width, training)
        if pieces is None:
            return None
        renamed = []
        for piece in pieces:
            writes = tuple("layer" if name == "y" else name for name in piece.writes)
            renamed.append(replace(piece, writes=writes))
        by = "rows" if self.norm is None or are_by_rows([self.norm]) else "whole"

        def finish(graph: Block, column: Any, x: Any, y: Any) -> tuple[Any]:
            return (self._finished(x, y, graph, training),)

        return [*renamed, BlockPiece(by, ("x", "layer"), ("y",), finish)]


@dataclass(frozen=True)
class JumpStage:
    """A stage whose results so far stay beside the newest (Xu et al. 2018, jumping knowledge).

    mode        'cat': rows are the results of all stages; 'max': their maximum, then the newest
    width       features of the newest result in the rows that it takes; None: there is none yet
    """

    stage: Stage
    mode: str
    width: int | None

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        if self.width is None:
            y = self.stage(x, graph, training)
            return y if self.mode == "cat" else jnp.concatenate([y, y], axis=1)
        y = self.stage(x[:, -self.width :], graph, training)
        if self.mode == "cat":
            return jnp.concatenate([x, y], axis=1)
        top = x[:, : self.width]
        # The gradient of jnp.maximum compares its result with both arguments. XLA may compute an
        # argument a second time for that, with other rounding: neither is equal, and the gradient
        # is lost.
        return jnp.concatenate([jnp.where(top >= y, top, y), y], axis=1)


@dataclass(frozen=True)
class FirstColumns:
    """The first `width` features."""

    width: int

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        return x[:, : self.width]


@dataclass(frozen=True)
class ReadoutStage:
    """`Block.readout`: every vertex has the aggregated row of its graph."""

    aggregation: str

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        return graph.readout(x, self.aggregation)


@dataclass(frozen=True)
class LinkStage:
    """[rows, 1]: the activation of the product u v of the rows of both ends of each pair.

    A pair (`gnn.with_pairs`) receives their sum, and |u + v|^2 = |u|^2 + |v|^2 + 2 u v.
    """

    activation: Callable[[Any], Any]

    def __call__(self, x: Any, graph: Block, training: bool) -> Any:
        rows = x.astype(jnp.float32)
        sums = graph.sum(jnp.concatenate([rows, rows * rows], axis=1), weighted=False)
        of_rows, of_squares = jnp.split(sums, 2, axis=1)
        products = (of_rows * of_rows - of_squares).sum(axis=1, keepdims=True) / 2
        return self.activation(products)

"""Layers of one's own: a message along every edge, and their aggregation at its end.

A layer derives from `MessagePassing` and states `message` and, if it likes, `update`. Both work on
plain arrays, a row per edge or vertex. Gradients, devices and partial graphs are those of the other
layers. The price: a row per edge and feature in memory, which the layers of `layers` avoid.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.nn.block import Block, TakesGraph, as_block
from partita.gnn.nn.layers import PACKAGE
from partita.gnn.nn.sums import Edges, edge_max, edge_sum, spread

AGGREGATES = ("sum", "mean", "max", "softmax")
"""Aggregations of messages."""


@keras.saving.register_keras_serializable(PACKAGE)
class MessagePassing(TakesGraph, keras.layers.Layer):
    """A layer of messages along in-edges (Gilmer et al. 2017, eq. 1): `layer(x, graph=graph)`.

    aggregate   'sum', 'mean' or 'max' of the messages into a vertex, 0 without any; or 'softmax':
                the mean weighted by the softmax of scores over the in-edges

    Weights are made in `build(input_shape)`, as in any Keras layer. Every vertex has its own edges
    only: `Graph.with_self_edges` adds an edge from each vertex to itself.
    """

    def __init__(self, aggregate: str = "sum", **options: Any) -> None:
        super().__init__(**options)
        if aggregate not in AGGREGATES:
            names = ", ".join(map(repr, AGGREGATES))
            raise GraphError(f"aggregate={aggregate!r} is unknown: use {names}.")
        self.aggregate = aggregate

    def message(self, x_source: Any, x_target: Any, edge: Any) -> Any:
        """Messages [edges, ...] of the rows at the ends of edges, both [edges, features].

        By default they are the rows that edges begin at, times the weights of the edges.

        `edge` is [edges, D]: the graph's edge features, or its weights with D = 1, or None. With
        'softmax', a pair (scores, values): scores [edges, heads] weight values [edges, heads, F],
        and an array alone is its own scores (Li et al. 2020, GENConv).
        """
        if edge is None:
            return x_source
        if edge.shape[1] != 1:
            raise GraphError(
                f"The graph has {edge.shape[1]} edge features, and the message of "
                f"{type(self).__name__} does not read them: write a message(x_source, x_target, "
                "edge) of your own."
            )
        return x_source * edge

    def update(self, x: Any, aggregated: Any) -> Any:
        """Result [rows, ...] of the vertices' own rows and their aggregated messages."""
        return aggregated

    def call(self, x: Any, graph: Block) -> Any:
        return self.propagate(x, graph)

    def propagate(self, x: Any, graph: Block) -> Any:
        """`update` of x [rows, features] and the aggregated messages.

        A `call` that transforms rows first, once per vertex and not per edge, returns this.
        """
        graph = as_block(graph, x)
        ends = graph.ends(x)
        messages = self.message(ends.source, ends.target, ends.features)
        self._check_messages(messages, ends.source.shape[0])
        if self.aggregate == "softmax":
            scores, values = messages if isinstance(messages, tuple) else (messages, messages)
            aggregated = _softmax_mean(ends.by_edge, scores, values)
        elif self.aggregate == "max":
            aggregated = _by_rows(edge_max, ends.by_edge, messages)
        else:
            aggregated = _by_rows(edge_sum, ends.by_edge, messages)
        if self.aggregate == "mean":
            degrees = jnp.maximum(graph.degree, 1)
            aggregated = aggregated / degrees.reshape(-1, *[1] * (aggregated.ndim - 1))
        return self.update(x, graph.filled(aggregated.astype(x.dtype)))

    def _check_messages(self, messages: Any, edges: int) -> None:
        """GraphError unless messages have a row for every edge: kernels do not read shapes."""
        name = type(self).__name__
        is_pair = isinstance(messages, tuple)
        if is_pair and (self.aggregate != "softmax" or len(messages) != 2):
            raise GraphError(
                f"The message of {name} is a tuple of {len(messages)}: return one array, or with "
                "aggregate='softmax' a pair of scores and values."
            )
        shapes = [tuple(jnp.shape(array)) for array in (messages if is_pair else (messages,))]
        for shape in shapes:
            if shape[:1] != (edges,):
                raise GraphError(
                    f"The message of {name} is {list(shape)}, and {edges:,} edges have a message: "
                    "return a row for every row of x_source."
                )
        scores, values = shapes[0], shapes[-1]
        if values[: len(scores)] != scores:
            raise GraphError(
                f"The message of {name} has scores {list(scores)} and values {list(values)}: "
                "return scores [edges, heads] and values [edges, heads, features]."
            )

    def build(self, input_shape: Any) -> None:
        self.built = True

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "aggregate": self.aggregate}


def _by_rows(aggregate: Any, by_edge: Edges, values: Any) -> Any:
    """[rows, ...]: an aggregation of values [edges, ...]."""
    width = math.prod(values.shape[1:])
    flat = values.reshape(values.shape[0], width).astype(jnp.float32)
    result = aggregate(by_edge, flat)
    return result.reshape(result.shape[0], *values.shape[1:])


def _softmax_mean(by_edge: Edges, scores: Any, values: Any) -> Any:
    """[rows, ...]: the mean of values by the softmax of scores over the edges of a row."""
    edges = by_edge.ids.shape[0]
    is_edge = (jnp.arange(edges) < by_edge.offsets[-1])[:, None]
    width = math.prod(scores.shape[1:])
    flat_scores = scores.reshape(edges, width).astype(jnp.float32)
    top = jax.lax.stop_gradient(spread(by_edge, edge_max(by_edge, flat_scores)))
    shares = jnp.exp(jnp.where(is_edge, flat_scores - top, 0))
    total = edge_sum(by_edge, shares)
    shares = shares.reshape(scores.shape)
    sums = _by_rows(edge_sum, by_edge, _like(shares, values) * values)
    total = jnp.where(total > 0, total, 1).reshape(-1, *scores.shape[1:])
    return sums / _like(total, sums)


def _like(array: Any, other: Any) -> Any:
    """An array with dims of size 1 behind it, up to the number of dims of the other one."""
    return array.reshape(*array.shape, *[1] * (other.ndim - array.ndim))

"""Keras layers over the in-edges of a graph: each is called with rows of vertices and the `Block` of their edges.

| layer | result for vertex v, from its in-neighbours u | source |
|---|---|---|
| GCNConv | sum of x_u W / sqrt(d_u d_v), with an edge to itself | Kipf and Welling 2017, eq. 2 |
| SAGEConv | x_v S + (mean or maximum of x_u) W | Hamilton et al. 2017, alg. 1 |
| GINConv | MLP((1 + e) x_v + sum of x_u) | Xu et al. 2019, eq. 4.1 |
| GATv2Conv | sum of a_uv x_u W, a_uv a softmax over u, with an edge to itself | Brody et al. 2022, eq. 7 |
| CommNetConv | tanh(x_v S + (mean of x_u) W) | Sukhbaatar et al. 2016, eq. 2 |
| GatedGraphConv | a GRU of x_v, fed the sum of x_u W, several times | Li et al. 2016, eq. 2 to 6 |

Sums and products with weights can change places: a layer whose aggregation is linear aggregates where rows are narrower, before or
after the product. The price of rounding apart, the result is the same. Weights of edges count in GCNConv and GatedGraphConv.
A layer is written as pieces (`pieces.Piece`): products by rows, aggregations by columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.kernels import tall
from partita.gnn.nn.block import Block
from partita.gnn.nn.pieces import Piece, by_columns, by_rows, run

PACKAGE = "partita"
plus: Any = keras.ops.add


def product(x: Any, kernel: Any) -> Any:
    """x [rows, features] times a layer's matrix."""
    return tall.product(x, jnp.asarray(keras.ops.convert_to_tensor(kernel, x.dtype)))


class AbstractConv(keras.layers.Layer):
    """A layer of `units` features per vertex, called with x [rows, features] and `graph=` a Block."""

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_regularizer: Any = None,
        **named: Any,
    ) -> None:
        super().__init__(**named)
        self.units, self.use_bias = units, use_bias
        self.activation = keras.activations.get(activation)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        """A weight of Glorot's uniform distribution."""
        return self.add_weight(
            shape=(rows, columns),
            initializer="glorot_uniform",
            regularizer=self.kernel_regularizer,
            name=name,
        )

    def bias(self, width: int | None = None, name: str = "bias") -> Any:
        return (
            self.add_weight(shape=(width or self.units,), initializer="zeros", name=name)
            if self.use_bias
            else None
        )

    def finished(self, y: Any, bias: Any) -> Any:
        return self.activation(y if bias is None else plus(y, bias))

    def pieces(self, width: int) -> Sequence[Piece]:
        """The layer of rows of `width` features: from "x", the last one writes the result."""
        raise NotImplementedError

    def call(self, x: Any, graph: Block) -> Any:
        return run(self.pieces(x.shape[-1]), graph, x)

    def compute_output_shape(self, input_shape: Any, *_: Any) -> Any:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "use_bias": self.use_bias,
            "activation": keras.activations.serialize(self.activation),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


@keras.saving.register_keras_serializable(PACKAGE)
class GCNConv(AbstractConv):
    """Graph convolution with symmetric normalisation. Degrees count in-edges (their weights) and the edge to itself."""

    def build(self, input_shape: Any) -> None:
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[Piece]:
        def spread(graph: Block, column: Any, rows: Any) -> Any:
            scale = jax.lax.rsqrt(jnp.maximum(graph.load + graph.alone, 1e-12))
            return graph.sum(
                rows,
                weighted=True,
                before=scale,
                share=graph.alone.astype(scale.dtype),
                after=scale,
            )

        if width > self.units:
            multiply = by_rows("x", "p", lambda x: product(x, self.kernel))
            return (
                multiply,
                by_columns("p", "s", spread),
                by_rows("s", "y", lambda s: self.finished(s, self.shift)),
            )
        return by_columns("x", "s", spread), by_rows(
            "s", "y", lambda s: self.finished(product(s, self.kernel), self.shift)
        )


@keras.saving.register_keras_serializable(PACKAGE)
class SAGEConv(AbstractConv):
    """The vertex's own row and the `aggregation` ('mean' or 'max') of those it has edges from, each times a matrix."""

    def __init__(self, units: int, aggregation: str = "mean", **named: Any) -> None:
        super().__init__(units, **named)
        if aggregation not in ("mean", "max"):
            raise GraphError(f"SAGEConv aggregates by 'mean' or 'max', and not by {aggregation!r}.")
        self.aggregation = aggregation

    def build(self, input_shape: Any) -> None:
        self.own = self.matrix("own", input_shape[-1], self.units)
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[Piece]:
        if self.aggregation == "max":
            return _beside(self, lambda graph, column, x: graph.max(x), linear=False)
        return _beside(self, _mean, multiply_first=width > self.units)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "aggregation": self.aggregation}


@keras.saving.register_keras_serializable(PACKAGE)
class GINConv(AbstractConv):
    """Two dense layers, of `units` each and a ReLU between, of the sum over in-edges and (1 + e) times the vertex's own row; e is learned."""

    def build(self, input_shape: Any) -> None:
        self.epsilon = self.add_weight(shape=(), initializer="zeros", name="epsilon")
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()
        self.second = self.matrix("second", self.units, self.units)
        self.second_shift = self.bias(name="second_bias")

    def pieces(self, width: int) -> Sequence[Piece]:
        gather = lambda x, s: s + keras.ops.multiply(x, 1 + self.epsilon)

        def dense(y: Any) -> Any:
            y = y if self.shift is None else plus(y, self.shift)
            return self.finished(product(keras.ops.relu(y), self.second), self.second_shift)

        if width > self.units:
            multiply = by_rows("x", "p", lambda x: product(x, self.kernel))
            return (
                multiply,
                by_columns("p", "s", _sum),
                by_rows("p s", "y", lambda p, s: dense(gather(p, s))),
            )
        return by_columns("x", "s", _sum), by_rows(
            "x s", "y", lambda x, s: dense(product(gather(x, s), self.kernel))
        )


@keras.saving.register_keras_serializable(PACKAGE)
class GATv2Conv(AbstractConv):
    """Attention of `heads` heads over in-edges and an edge to itself; their results stand side by side, `units` features in all."""

    def __init__(self, units: int, heads: int = 1, **named: Any) -> None:
        super().__init__(units, **named)
        if heads < 1 or units % heads:
            raise GraphError(
                f"{units} features cannot be shared out to {heads} heads: units must be a multiple of heads."
            )
        self.heads = heads

    def build(self, input_shape: Any) -> None:
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.destination = self.matrix("destination", input_shape[-1], self.units)
        self.score = self.matrix("score", self.heads, self.units // self.heads)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[Piece]:
        each = self.units // self.heads

        def attention(graph: Block, column: Any, left: Any, right: Any) -> Any:
            heads = left.shape[1] // each
            score: Any = keras.ops.convert_to_tensor(self.score)
            score = jax.lax.dynamic_slice_in_dim(score, column // each, heads)
            return graph.attention(
                left.reshape(-1, heads, each), right.reshape(-1, heads, each), score
            ).reshape(-1, heads * each)

        return (
            by_rows("x", "l r", lambda x: (product(x, self.kernel), product(x, self.destination))),
            by_columns("l r", "s", attention, linear=False, grain=each),
            by_rows("s", "y", lambda s: self.finished(s, self.shift)),
        )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}


@keras.saving.register_keras_serializable(PACKAGE)
class CommNetConv(AbstractConv):
    """The vertex's own row and the mean of those it has edges from, each times a matrix; tanh of the sum, no bias."""

    def __init__(
        self, units: int, activation: Any = "tanh", use_bias: bool = False, **named: Any
    ) -> None:
        super().__init__(units, activation, use_bias, **named)

    def build(self, input_shape: Any) -> None:
        self.own = self.matrix("own", input_shape[-1], self.units)
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[Piece]:
        return _beside(self, _mean, multiply_first=width > self.units)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedGraphConv(AbstractConv):
    """`steps` steps of a gated recurrent unit whose input is the sum over in-edges of rows times that step's matrix.

    Rows begin as the vertex's, filled up with zeros to `units` features; they cannot have more.
    """

    def __init__(self, units: int, steps: int = 2, **named: Any) -> None:
        super().__init__(units, **named)
        self.steps = steps

    def build(self, input_shape: Any) -> None:
        if input_shape[-1] > self.units:
            raise GraphError(
                f"GatedGraphConv of {self.units} units cannot take rows of {input_shape[-1]} features: use more units, or a Dense layer before it."
            )
        self.kernels = [
            self.matrix(f"kernel_{i}", self.units, self.units) for i in range(self.steps)
        ]
        self.gates = self.matrix("gates", self.units, 3 * self.units)
        self.recurrent = self.matrix("recurrent", self.units, 3 * self.units)
        self.shift, self.recurrent_shift = (
            self.bias(3 * self.units),
            self.bias(3 * self.units, "recurrent_bias"),
        )

    def pieces(self, width: int) -> Sequence[Piece]:
        def recurrent(state: Any, message: Any) -> Any:
            fed, kept = product(message, self.gates), product(state, self.recurrent)
            if self.shift is not None:
                fed, kept = plus(fed, self.shift), plus(kept, self.recurrent_shift)
            (r1, z1, n1), (r2, z2, n2) = jnp.split(fed, 3, axis=1), jnp.split(kept, 3, axis=1)
            reset, update = jax.nn.sigmoid(r1 + r2), jax.nn.sigmoid(z1 + z2)
            return update * state + (1 - update) * jnp.tanh(n1 + reset * n2)

        found = [by_rows("x", "h0", lambda x: jnp.pad(x, ((0, 0), (0, self.units - x.shape[-1]))))]
        for i, kernel in enumerate(self.kernels):
            found += [
                by_rows(f"h{i}", f"p{i}", lambda h, kernel=kernel: product(h, kernel)),
                by_columns(f"p{i}", f"s{i}", lambda graph, column, p: graph.sum(p, weighted=True)),
                by_rows(f"h{i} s{i}", f"h{i + 1}", recurrent),
            ]
        return [*found, by_rows(f"h{self.steps}", "y", self.activation)]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "steps": self.steps}


def _sum(graph: Block, column: Any, rows: Any) -> Any:
    return graph.sum(rows)


def _mean(graph: Block, column: Any, rows: Any) -> Any:
    return graph.mean(rows)


def _beside(
    layer: Any, aggregate: Callable[..., Any], linear: bool = True, multiply_first: bool = False
) -> Sequence[Piece]:
    """The vertex's own row times `own` and what is aggregated times `kernel`, added, with bias and activation."""
    done = lambda y: layer.finished(y, layer.shift)
    if multiply_first:
        return (
            by_rows("x", "p q", lambda x: (product(x, layer.kernel), product(x, layer.own))),
            by_columns("p", "s", aggregate, linear),
            by_rows("q s", "y", lambda q, s: done(q + s)),
        )
    return (
        by_columns("x", "s", aggregate, linear),
        by_rows("x s", "y", lambda x, s: done(product(x, layer.own) + product(s, layer.kernel))),
    )

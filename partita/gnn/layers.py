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
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras

from partita.gnn.block import Block

PACKAGE = "partita"


class AbstractConv(keras.layers.Layer):
    """A layer of `units` features per vertex, called with x [rows, features] and `graph=` a Block."""

    def __init__(
        self, units: int, activation: Any = None, use_bias: bool = True, kernel_regularizer: Any = None, **named: Any
    ) -> None:
        super().__init__(**named)
        self.units, self.use_bias = units, use_bias
        self.activation = keras.activations.get(activation)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        """A weight of Glorot's uniform distribution."""
        return self.add_weight(
            shape=(rows, columns), initializer="glorot_uniform", regularizer=self.kernel_regularizer, name=name
        )

    def bias(self, width: int | None = None, name: str = "bias") -> Any:
        return self.add_weight(shape=(width or self.units,), initializer="zeros", name=name) if self.use_bias else None

    def finished(self, y: Any, bias: Any) -> Any:
        return self.activation(y if bias is None else keras.ops.add(y, bias))

    def compute_output_shape(self, input_shape: Any, *_: Any) -> Any:
        return (*input_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(), "units": self.units, "use_bias": self.use_bias,
            "activation": keras.activations.serialize(self.activation),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }  # fmt: skip


@keras.saving.register_keras_serializable(PACKAGE)
class GCNConv(AbstractConv):
    """Graph convolution with symmetric normalisation. Degrees count in-edges (their weights) and the edge to itself."""

    def build(self, input_shape: Any) -> None:
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def call(self, x: Any, graph: Block) -> Any:
        scale = jax.lax.rsqrt(jnp.maximum(graph.load + graph.alone, 1e-12))[:, None]

        def spread(rows: Any) -> Any:
            rows = rows * scale
            return (graph.sum(rows, weighted=True) + rows * graph.alone[:, None]) * scale

        wide = x.shape[-1] > self.units
        y = spread(keras.ops.matmul(x, self.kernel)) if wide else keras.ops.matmul(spread(x), self.kernel)
        return self.finished(y, self.shift)

"""Keras layers of sums through a network of dense layers.

| layer | result for vertex v, from its in-neighbours u | source |
|---|---|---|
| GINConv | MLP((1 + e) x_v + sum of x_u) | Xu et al. 2019, eq. 4.1 |
| GINEConv | MLP((1 + e) x_v + sum of ReLU(x_u + edge features)) | Hu et al. 2020, eq. A.2 |

The network is two dense layers with a ReLU between, or Keras layers of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.nn import rows
from partita.gnn.nn.block import Block
from partita.gnn.nn.layers import PACKAGE, AbstractConv, product, sum_of_edges, widths_of, with_bias
from partita.gnn.nn.pieces import BlockPiece, by_columns, by_rows
from partita.gnn.nn.sums import edge_sum


@keras.saving.register_keras_serializable(PACKAGE)
class GINConv(AbstractConv):
    """A network of the sum over in-edges plus (1 + e) times the vertex's own row.

    mlp         Keras layers whose result has `units` features; by default two dense layers of
                `units` features with a ReLU between
    epsilon     first value of e, which is trained unless `train_epsilon=False`
    """

    OPTIONS = ("train_epsilon",)

    def __init__(
        self,
        units: int,
        *,
        mlp: Any = None,
        epsilon: float = 0.0,
        train_epsilon: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.mlp = None if mlp is None else rows.as_layers(rows.layers_of_config(mlp))
        self.first_epsilon = epsilon
        self.train_epsilon = train_epsilon

    def build(self, input_shape: Any) -> None:
        width, target_width = widths_of(input_shape)
        if target_width != width:
            raise GraphError(
                f"{type(self).__name__} adds rows of {width} and {target_width} features: give a "
                "pair of rows of equal width."
            )
        self.epsilon = self.add_weight(
            shape=(),
            initializer=keras.initializers.Constant(self.first_epsilon),
            trainable=self.train_epsilon,
            name="epsilon",
        )
        if self.mlp is None:
            self.kernel = self.matrix("kernel", width, self.units)
            self.shift = self.bias()
            self.second = self.matrix("second", self.units, self.units)
            self.second_shift = self.bias(name="second_bias")
            return
        result_width = rows.build_layers(self.mlp, width)
        if result_width != self.units:
            raise GraphError(
                f"The mlp of {type(self).__name__} has {result_width} features, and units="
                f"{self.units}: make them equal."
            )

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        if self.mlp is not None:
            return (self.aggregation(), self.own_network(training, target))

        def multiply(*tables: Any) -> Any:
            if len(tables) == 1:
                return product(tables[0], self.kernel)
            return product(tables[0], self.kernel), product(tables[1], self.kernel)

        def dense_of_products(p: Any, s: Any) -> Any:
            return self.dense(self.gathered(p, s))

        def dense_of_rows(x: Any, s: Any) -> Any:
            return self.dense(product(self.gathered(x, s), self.kernel))

        if width > self.units and type(self) is GINConv:
            same = target == "x"
            own = "p" if same else "q"
            return (
                by_rows("x" if same else f"x {target}", "p" if same else "p q", multiply),
                by_columns("p", "s", sum_of_edges),
                by_rows(f"{own} s", "y", dense_of_products),
            )
        return (self.aggregation(), by_rows(f"{target} s", "y", dense_of_rows))

    def aggregation(self) -> BlockPiece:
        """Table "s", the sum over in-edges of table "x"."""
        return by_columns("x", "s", sum_of_edges)

    def gathered(self, x: Any, s: Any) -> Any:
        """The sum s with (1 + e) times the vertex's own row."""
        return s + keras.ops.multiply(x, 1 + self.epsilon)

    def dense(self, y: Any) -> Any:
        """The default network after its first product."""
        hidden = keras.ops.relu(with_bias(y, self.shift))
        return self.finished(product(hidden, self.second), self.second_shift)

    def own_network(self, training: bool, target: str) -> BlockPiece:
        """The given network, cut by rows if it does not mix them."""
        assert self.mlp is not None
        layers = self.mlp

        def network(graph: Block, column: Any, x: Any, s: Any) -> tuple[Any]:
            y = rows.apply_layers(layers, self.gathered(x, s), graph, training)
            return (self.activation(y),)

        by = "rows" if rows.are_by_rows(layers) else "whole"
        return BlockPiece(by, (target, "s"), ("y",), network)

    def get_config(self) -> dict[str, Any]:
        options = {"mlp": rows.layers_config(self.mlp), "epsilon": self.first_epsilon}
        return {**super().get_config(), **options}


@keras.saving.register_keras_serializable(PACKAGE)
class GINEConv(GINConv):
    """`GINConv` whose sums are of ReLU(row + edge features), one row per edge in memory.

    The edge features, or weights, have the width of the rows. With `edge_dim`, their number, they
    first pass a dense layer to that width.
    """

    OPTIONS = ("edge_dim",)

    def __init__(self, units: int, *, edge_dim: int | None = None, **options: Any) -> None:
        super().__init__(units, **options)
        self.edge_dim = edge_dim

    def build(self, input_shape: Any) -> None:
        super().build(input_shape)
        self.width, _ = widths_of(input_shape)
        if self.edge_dim is not None:
            self.edge_kernel = self.matrix("edge_kernel", self.edge_dim, self.width)
            self.edge_shift = self.bias(self.width, "edge_bias")

    def aggregation(self) -> BlockPiece:
        return BlockPiece("whole", ("x",), ("s",), self._sum_of_messages)

    def _sum_of_messages(self, graph: Block, column: Any, x: Any) -> tuple[Any]:
        ends = graph.ends(x)
        edge = checked_edges(self, ends.features, self.edge_dim or self.width)
        if self.edge_dim is not None:
            edge = with_bias(product(edge, self.edge_kernel), self.edge_shift)
        messages: Any = keras.ops.relu(ends.source + edge)
        return (edge_sum(ends.by_edge, messages.astype(jnp.float32)).astype(x.dtype),)


def checked_edges(layer: Any, features: Any, width: int) -> Any:
    """Edge features [edges, width]; GraphError if there are none, or others."""
    if features is None or features.shape[1] != width:
        count = 0 if features is None else features.shape[1]
        fix = (
            f"make it with edge_dim={count}"
            if count
            else "give Graph.from_edges(edge_features=...)"
        )
        raise GraphError(
            f"{type(layer).__name__} {layer.name!r} needs {width} features of every edge, and the "
            f"graph has {count or 'no'} edge features: {fix}."
        )
    return features

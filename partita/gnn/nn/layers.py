"""Keras layers over in-edges, called with rows of vertices and the `Block` of their edges.

| layer | result for vertex v, from its in-neighbours u | source |
|---|---|---|
| GCNConv | sum of x_u W / sqrt(d_u d_v), with a self edge | Kipf and Welling 2017, eq. 2 |
| SAGEConv | x_v S + (mean or maximum of x_u) W | Hamilton et al. 2017, alg. 1 |
| GINConv | MLP((1 + e) x_v + sum of x_u) | Xu et al. 2019, eq. 4.1 |
| GATv2Conv | sum of softmax_u(a_uv) x_u W, with a self edge | Brody et al. 2022, eq. 7 |
| CommNetConv | tanh(x_v S + (mean of x_u) W) | Sukhbaatar et al. 2016, eq. 2 |
| GatedGraphConv | GRU steps of x_v with the sum of x_u W as input | Li et al. 2016, eq. 2 to 6 |

Linear aggregations and products with weights commute: a layer aggregates where rows are narrower,
before or after the product. The result is the same up to rounding. A weight of an edge multiplies
its row in sums and means. Maxima and attention refuse graphs with weights. A layer is a sequence of
pieces (`pieces.Piece`): products by rows, aggregations by columns.
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
from partita.gnn.nn.pieces import BlockPiece, by_columns, by_rows, run

PACKAGE = "partita"
"""Name under which Keras registers the layers."""

add: Any = keras.ops.add


def product(x: Any, kernel: Any) -> Any:
    """x [rows, features] times a layer's matrix."""
    return tall.product(x, jnp.asarray(keras.ops.convert_to_tensor(kernel, x.dtype)))


class AbstractConv(keras.layers.Layer):
    """A layer of `units` features per vertex: `layer(x, graph=block)` of x [rows, features]."""

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_regularizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.units = units
        self.use_bias = use_bias
        self.activation = keras.activations.get(activation)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def matrix(self, name: str, rows: int, columns: int) -> Any:
        """A new weight [rows, columns] of Glorot's uniform distribution."""
        return self.add_weight(
            shape=(rows, columns),
            initializer="glorot_uniform",
            regularizer=self.kernel_regularizer,
            name=name,
        )

    def bias(self, width: int | None = None, name: str = "bias") -> Any:
        """A new weight [width] of zeros; None without biases."""
        if not self.use_bias:
            return None
        return self.add_weight(shape=(width or self.units,), initializer="zeros", name=name)

    def finished(self, y: Any, bias: Any) -> Any:
        """y with bias and activation."""
        return self.activation(y if bias is None else add(y, bias))

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        """The layer on rows of `width` features, table "x"; the last piece writes the result."""
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
    """Graph convolution with symmetric normalization.

    Degrees count in-edges, or their weights, and the self edge. `self_edges=False` uses the edges
    as given. `normalize=False` sums the rows of in-edges, and adds no self edge either.
    """

    def __init__(
        self, units: int, *, normalize: bool = True, self_edges: bool = True, **options: Any
    ) -> None:
        super().__init__(units, **options)
        self.normalize = normalize
        self.self_edges = self_edges

    def build(self, input_shape: Any) -> None:
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        def multiply(x: Any) -> Any:
            return product(x, self.kernel)

        def finish(s: Any) -> Any:
            return self.finished(s, self.shift)

        def multiply_and_finish(s: Any) -> Any:
            return finish(multiply(s))

        if width > self.units:
            return (
                by_rows("x", "p", multiply),
                by_columns("p", "s", self._sum),
                by_rows("s", "y", finish),
            )
        return (
            by_columns("x", "s", self._sum),
            by_rows("s", "y", multiply_and_finish),
        )

    def _sum(self, graph: Block, column: Any, rows: Any) -> Any:
        """The sum over in-edges, by default divided by the square roots of both ends' degrees."""
        if not self.normalize:
            return graph.sum(rows)
        scale = graph.inverse_root_degrees(self.self_edges)
        share = graph.self_correction if self.self_edges else None
        return graph.sum(rows, before=scale, share=share, after=scale)

    def get_config(self) -> dict[str, Any]:
        options = {"normalize": self.normalize, "self_edges": self.self_edges}
        return {**super().get_config(), **options}


@keras.saving.register_keras_serializable(PACKAGE)
class SAGEConv(AbstractConv):
    """The vertex's own row and the 'mean', 'max' or 'sum' over in-edges, each times a matrix.

    `project` first passes the rows of in-edges through a dense layer with ReLU. `normalize` divides
    results by their Euclidean norm, before the activation.
    """

    def __init__(
        self,
        units: int,
        aggregation: str = "mean",
        *,
        project: bool = False,
        normalize: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        if aggregation not in AGGREGATIONS:
            names = ", ".join(map(repr, AGGREGATIONS))
            raise GraphError(f"aggregation={aggregation!r} is unknown: use {names}.")
        self.aggregation = aggregation
        self.project = project
        self.normalize = normalize

    def build(self, input_shape: Any) -> None:
        if self.project:
            width = input_shape[-1]
            self.projection = self.matrix("projection", width, width)
            self.projection_shift = self.bias(width, "projection_bias")
        self.own = self.matrix("own", input_shape[-1], self.units)
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        linear = self.aggregation != "max"
        return _own_and_aggregated(
            self,
            AGGREGATIONS[self.aggregation],
            linear,
            multiply_first=linear and width > self.units and not self.project,
            project=self._projected if self.project else None,
        )

    def _projected(self, x: Any) -> Any:
        y = product(x, self.projection)
        return keras.ops.relu(y if self.projection_shift is None else add(y, self.projection_shift))

    def finished(self, y: Any, bias: Any) -> Any:
        if not self.normalize:
            return super().finished(y, bias)
        y = y if bias is None else add(y, bias)
        norm = jnp.sqrt(jnp.maximum((y**2).sum(axis=1, keepdims=True), 1e-24))
        return self.activation(y / norm)

    def get_config(self) -> dict[str, Any]:
        options = {
            "aggregation": self.aggregation,
            "project": self.project,
            "normalize": self.normalize,
        }
        return {**super().get_config(), **options}


@keras.saving.register_keras_serializable(PACKAGE)
class GINConv(AbstractConv):
    """Two dense layers of the sum over in-edges plus (1 + e) times the vertex's own row.

    Both have `units` features, with a ReLU between. e is trained.
    """

    def build(self, input_shape: Any) -> None:
        self.epsilon = self.add_weight(shape=(), initializer="zeros", name="epsilon")
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()
        self.second = self.matrix("second", self.units, self.units)
        self.second_shift = self.bias(name="second_bias")

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        def multiply(x: Any) -> Any:
            return product(x, self.kernel)

        def gather(x: Any, s: Any) -> Any:
            return s + keras.ops.multiply(x, 1 + self.epsilon)

        def dense(y: Any) -> Any:
            y = y if self.shift is None else add(y, self.shift)
            return self.finished(product(keras.ops.relu(y), self.second), self.second_shift)

        def dense_of_products(p: Any, s: Any) -> Any:
            return dense(gather(p, s))

        def dense_of_rows(x: Any, s: Any) -> Any:
            return dense(multiply(gather(x, s)))

        if width > self.units:
            return (
                by_rows("x", "p", multiply),
                by_columns("p", "s", _sum),
                by_rows("p s", "y", dense_of_products),
            )
        return (
            by_columns("x", "s", _sum),
            by_rows("x s", "y", dense_of_rows),
        )


@keras.saving.register_keras_serializable(PACKAGE)
class GATv2Conv(AbstractConv):
    """Attention of `heads` heads over in-edges and a self edge.

    All heads together have `units` features; with `concat=False` each has them, and the result is
    the mean over heads. `self_edges=False` uses the edges as given. `head_bias` adds biases to the
    rows of both ends. `residual` adds the vertex's own row times a matrix.
    """

    def __init__(
        self,
        units: int,
        heads: int = 1,
        *,
        concat: bool = True,
        self_edges: bool = True,
        head_bias: bool = False,
        residual: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.concat = concat
        self.self_edges = self_edges
        self.head_bias = head_bias
        self.residual = residual
        if heads < 1 or (concat and units % heads):
            raise GraphError(
                f"units={units} is not a multiple of heads={heads}: every head has the same "
                "number of "
                "features."
            )
        self.heads = heads

    def build(self, input_shape: Any) -> None:
        features = input_shape[-1]
        head_width = self.units // self.heads if self.concat else self.units
        width = self.heads * head_width
        self.kernel = self.matrix("kernel", features, width)
        self.destination = self.matrix("destination", features, width)
        self.score = self.matrix("score", self.heads, head_width)
        self.shift = self.bias()
        if self.head_bias:
            self.kernel_shift = self.bias(width, "kernel_bias")
            self.destination_shift = self.bias(width, "destination_bias")
        if self.residual:
            self.own = self.matrix("own", features, self.units)

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        head_width = self.units // self.heads if self.concat else self.units

        def multiply(x: Any) -> Any:
            l, r = product(x, self.kernel), product(x, self.destination)
            if not self.head_bias or not self.use_bias:
                return l, r
            return add(l, self.kernel_shift), add(r, self.destination_shift)

        def attention(graph: Block, column: Any, l: Any, r: Any) -> Any:
            heads = l.shape[1] // head_width
            all_scores: Any = keras.ops.convert_to_tensor(self.score)
            first_head = column // head_width
            score = jax.lax.dynamic_slice_in_dim(all_scores, first_head, heads)
            source_rows = l.reshape(-1, heads, head_width)
            target_rows = r.reshape(-1, heads, head_width)
            out = graph.attention(source_rows, target_rows, score, self.self_edges)
            return out.reshape(-1, heads * head_width)

        def finish(s: Any) -> Any:
            if not self.concat:
                s = s.reshape(-1, self.heads, self.units).mean(axis=1)
            return self.finished(s, self.shift)

        def finish_with_own(x: Any, s: Any) -> Any:
            if not self.concat:
                s = s.reshape(-1, self.heads, self.units).mean(axis=1)
            return self.finished(s + product(x, self.own), self.shift)

        last = by_rows("s", "y", finish)
        return (
            by_rows("x", "l r", multiply),
            by_columns("l r", "s", attention, linear=False, grain=head_width),
            by_rows("x s", "y", finish_with_own) if self.residual else last,
        )

    def get_config(self) -> dict[str, Any]:
        options = {
            "heads": self.heads,
            "concat": self.concat,
            "self_edges": self.self_edges,
            "head_bias": self.head_bias,
            "residual": self.residual,
        }
        return {**super().get_config(), **options}


@keras.saving.register_keras_serializable(PACKAGE)
class CommNetConv(AbstractConv):
    """The vertex's own row and the mean over in-edges, each times a matrix; tanh, no bias."""

    def __init__(
        self, units: int, activation: Any = "tanh", use_bias: bool = False, **options: Any
    ) -> None:
        super().__init__(units, activation, use_bias, **options)

    def build(self, input_shape: Any) -> None:
        self.own = self.matrix("own", input_shape[-1], self.units)
        self.kernel = self.matrix("kernel", input_shape[-1], self.units)
        self.shift = self.bias()

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        return _own_and_aggregated(self, _mean, multiply_first=width > self.units)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedGraphConv(AbstractConv):
    """`steps` steps of a gated recurrent unit over the rows.

    The input of a step is the sum over in-edges of rows times that step's matrix. Rows begin as the
    vertex's, padded with zeros to `units` features; they must not be wider.
    """

    def __init__(self, units: int, steps: int = 2, **options: Any) -> None:
        super().__init__(units, **options)
        self.steps = steps

    def build(self, input_shape: Any) -> None:
        if input_shape[-1] > self.units:
            raise GraphError(
                f"Rows of {input_shape[-1]} features exceed the {self.units} units of "
                "GatedGraphConv: "
                "use more units, or a Dense layer before it."
            )
        self.kernels = []
        for i in range(self.steps):
            self.kernels.append(self.matrix(f"kernel_{i}", self.units, self.units))
        self.gates = self.matrix("gates", self.units, 3 * self.units)
        self.recurrent = self.matrix("recurrent", self.units, 3 * self.units)
        self.shift = self.bias(3 * self.units)
        self.recurrent_shift = self.bias(3 * self.units, "recurrent_bias")

    def pieces(self, width: int) -> Sequence[BlockPiece]:
        def pad(x: Any) -> Any:
            return jnp.pad(x, ((0, 0), (0, self.units - x.shape[-1])))

        pieces = [by_rows("x", "h0", pad)]
        for i, kernel in enumerate(self.kernels):
            pieces.append(by_rows(f"h{i}", f"p{i}", _product_with(kernel)))
            pieces.append(by_columns(f"p{i}", f"s{i}", _sum))
            pieces.append(by_rows(f"h{i} s{i}", f"h{i + 1}", self.recurrent_unit))
        pieces.append(by_rows(f"h{self.steps}", "y", self.activation))
        return pieces

    def recurrent_unit(self, state: Any, message: Any) -> Any:
        """The next state of a GRU (Li et al. 2016, eq. 3 to 6).

        r is the reset gate, z the update gate, n the candidate.
        """
        from_message = product(message, self.gates)
        from_state = product(state, self.recurrent)
        if self.shift is not None:
            from_message = add(from_message, self.shift)
            from_state = add(from_state, self.recurrent_shift)
        message_r, message_z, message_n = jnp.split(from_message, 3, axis=1)
        state_r, state_z, state_n = jnp.split(from_state, 3, axis=1)
        r = jax.nn.sigmoid(message_r + state_r)
        z = jax.nn.sigmoid(message_z + state_z)
        return z * state + (1 - z) * jnp.tanh(message_n + r * state_n)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "steps": self.steps}


def _sum(graph: Block, column: Any, rows: Any) -> Any:
    return graph.sum(rows)


def _mean(graph: Block, column: Any, rows: Any) -> Any:
    return graph.mean(rows)


def _max(graph: Block, column: Any, rows: Any) -> Any:
    return graph.max(rows)


AGGREGATIONS = {"mean": _mean, "max": _max, "sum": _sum}
"""Aggregations of SAGEConv."""


def _product_with(kernel: Any) -> Callable[[Any], Any]:
    """The product of rows with a matrix."""

    def multiply(x: Any) -> Any:
        return product(x, kernel)

    return multiply


def _own_and_aggregated(
    layer: Any,
    aggregate: Callable[..., Any],
    linear: bool = True,
    multiply_first: bool = False,
    project: Callable[[Any], Any] | None = None,
) -> Sequence[BlockPiece]:
    """The vertex's own row times `own` plus aggregated rows times `kernel`, finished."""

    def multiply(x: Any) -> Any:
        return product(x, layer.kernel), product(x, layer.own)

    def add_products(q: Any, s: Any) -> Any:
        return layer.finished(q + s, layer.shift)

    def add_rows(x: Any, s: Any) -> Any:
        total = product(x, layer.own) + product(s, layer.kernel)
        return layer.finished(total, layer.shift)

    if multiply_first:
        return (
            by_rows("x", "p q", multiply),
            by_columns("p", "s", aggregate, linear),
            by_rows("q s", "y", add_products),
        )
    if project is not None:
        return (
            by_rows("x", "j", project),
            by_columns("j", "s", aggregate, linear),
            by_rows("x s", "y", add_rows),
        )
    return (
        by_columns("x", "s", aggregate, linear),
        by_rows("x s", "y", add_rows),
    )

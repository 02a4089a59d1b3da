"""Keras layers over in-edges, called with rows of vertices and the `Block` of their edges.

| layer | result for vertex v, from its in-neighbours u | source |
|---|---|---|
| GCNConv | sum of x_u W / sqrt(d_u d_v), with a self edge | Kipf and Welling 2017, eq. 2 |
| SAGEConv | x_v S + (mean or maximum of x_u) W | Hamilton et al. 2017, alg. 1 |
| CommNetConv | tanh(x_v S + (mean of x_u) W) | Sukhbaatar et al. 2016, eq. 2 |
| GatedGraphConv | GRU steps of x_v with the sum of x_u W as input | Li et al. 2016, eq. 2 to 6 |

Linear aggregations and products with weights commute: a layer aggregates where rows are narrower,
before or after the product. The result is the same up to rounding. A weight of an edge multiplies
its row in sums and means. Maxima and attention refuse graphs with weights. A layer is a sequence of
pieces (`pieces.Piece`): products by rows, aggregations by columns. `attention` and `isomorphism`
have more layers.

Some layers take a pair (x_source, x_target): edges begin at rows of the first and end at rows of
the second, for graphs whose two kinds of vertices have different features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.data.arrays import as_count
from partita.gnn.data.graph import Graph
from partita.gnn.kernels import tall
from partita.gnn.nn.block import Block, TakesGraph, as_block
from partita.gnn.nn.pieces import BlockPiece, by_columns, by_rows, run

PACKAGE = "partita"
"""Name under which Keras registers the layers."""


def with_bias(y: Any, bias: Any) -> Any:
    """y [rows, features] plus a layer's bias, if it has one."""
    return y if bias is None else keras.ops.add(y, bias)


def product(x: Any, kernel: Any) -> Any:
    """x [rows, features] times a layer's matrix."""
    return tall.product(x, jnp.asarray(keras.ops.convert_to_tensor(kernel, x.dtype)))


def shapes_of(input_shape: Any) -> tuple[Any, Any]:
    """(shape of the rows that edges begin at, of those they end at): one shape, or a pair."""
    if isinstance(input_shape[0], (tuple, list)):
        return input_shape[0], input_shape[1]
    return input_shape, input_shape


def widths_of(input_shape: Any) -> tuple[int, int]:
    """(features of the rows that edges begin at, of those they end at)."""
    source, target = shapes_of(input_shape)
    return source[-1], target[-1]


class AbstractConv(TakesGraph, keras.layers.Layer):
    """A layer of `units` features per vertex: `layer(x, graph=block)` of x [rows, features].

    SAGEConv, GINConv and layers of attention take a pair (x_source, x_target), both [rows, ...].
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ()
    """Options of this class beside its parent's: attributes of the same names."""

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_regularizer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.units = as_count("units", units, 1)
        self.use_bias = use_bias
        self.activation = keras.activations.get(activation)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)

    def width_of(self, input_shape: Any) -> int:
        """Features of the rows; GraphError for a pair, which some layers take."""
        if isinstance(input_shape[0], (tuple, list)):
            raise GraphError(
                f"{type(self).__name__} takes one table of rows, not a pair: use SAGEConv, "
                "GINConv, GINEConv, GATConv or GATv2Conv for rows of two kinds."
            )
        return input_shape[-1]

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
        return self.activation(with_bias(y, bias))

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        """The layer on rows of `width` features, table "x"; the last piece writes the result.

        `target`: the table of the rows at the ends of edges.
        """
        raise NotImplementedError

    def call(self, x: Any, graph: Block | Graph, training: bool = False) -> Any:
        block: Block = as_block(graph, x)
        if not isinstance(x, (tuple, list)):
            return block.filled(run(self.pieces(x.shape[-1], training), block, {"x": x}))
        source, target = x
        pieces = self.pieces(source.shape[-1], training, "t")
        return block.filled(run(pieces, block, {"x": source, "t": target}))

    def compute_output_shape(self, input_shape: Any, *_: Any) -> Any:
        source, _ = shapes_of(input_shape)
        return (*source[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        config = {
            **super().get_config(),
            "units": self.units,
            "use_bias": self.use_bias,
            "activation": keras.activations.serialize(self.activation),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }
        for kind in reversed(type(self).__mro__):
            for option in vars(kind).get("OPTIONS", ()):
                config[option] = getattr(self, option)
        return config


@keras.saving.register_keras_serializable(PACKAGE)
class GCNConv(AbstractConv):
    """Graph convolution with symmetric normalization.

    Degrees count in-edges, or their weights, and the self edge. `self_edges=False` uses the edges
    as given. `improved` gives added self edges the weight 2. `normalize=False` sums the rows of
    in-edges, and adds no self edge either.
    """

    OPTIONS = ("normalize", "self_edges", "improved")

    def __init__(
        self,
        units: int,
        *,
        normalize: bool = True,
        self_edges: bool = True,
        improved: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.normalize = normalize
        self.self_edges = self_edges
        self.improved = improved

    def build(self, input_shape: Any) -> None:
        self.kernel = self.matrix("kernel", self.width_of(input_shape), self.units)
        self.shift = self.bias()

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
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
        return (by_columns("x", "s", self._sum), by_rows("s", "y", multiply_and_finish))

    def _sum(self, graph: Block, column: Any, rows: Any) -> Any:
        """The sum over in-edges, by default divided by the square roots of both ends' degrees."""
        if not self.normalize:
            return graph.sum(rows)
        missing = (2.0 if self.improved else 1.0) if self.self_edges else 0.0
        scale = graph.inverse_root_degrees(missing)
        share = graph.corrected_self_edges(missing) if self.self_edges else None
        return graph.sum(rows, before=scale, share=share, after=scale)


@keras.saving.register_keras_serializable(PACKAGE)
class SAGEConv(AbstractConv):
    """The vertex's own row and the 'mean', 'max' or 'sum' over in-edges, each times a matrix.

    `project` first passes the rows of in-edges through a dense layer with ReLU. `normalize` divides
    results by their Euclidean norm, before the activation. `root_weight=False` leaves the vertex's
    own row out.
    """

    OPTIONS = ("aggregation", "project", "normalize", "root_weight")

    def __init__(
        self,
        units: int,
        aggregation: str = "mean",
        *,
        project: bool = False,
        normalize: bool = False,
        root_weight: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        if aggregation not in AGGREGATIONS:
            names = ", ".join(map(repr, AGGREGATIONS))
            raise GraphError(f"aggregation={aggregation!r} is unknown: use {names}.")
        self.aggregation = aggregation
        self.project = project
        self.normalize = normalize
        self.root_weight = root_weight

    def build(self, input_shape: Any) -> None:
        width, target_width = widths_of(input_shape)
        if self.project:
            self.projection = self.matrix("projection", width, width)
            self.projection_shift = self.bias(width, "projection_bias")
        self.own = self.matrix("own", target_width, self.units) if self.root_weight else None
        self.kernel = self.matrix("kernel", width, self.units)
        self.shift = self.bias()

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        linear = self.aggregation != "max"
        return _own_and_aggregated(
            self,
            AGGREGATIONS[self.aggregation],
            linear,
            multiply_first=linear and width > self.units and not self.project,
            project=self._projected if self.project else None,
            target=target,
        )

    def _projected(self, x: Any) -> Any:
        y = product(x, self.projection)
        return keras.ops.relu(with_bias(y, self.projection_shift))

    def finished(self, y: Any, bias: Any) -> Any:
        if not self.normalize:
            return super().finished(y, bias)
        y = with_bias(y, bias)
        norm = jnp.sqrt(jnp.maximum((y**2).sum(axis=1, keepdims=True), 1e-24))
        return self.activation(y / norm)


@keras.saving.register_keras_serializable(PACKAGE)
class CommNetConv(AbstractConv):
    """The vertex's own row and the mean over in-edges, each times a matrix; tanh, no bias."""

    def __init__(
        self, units: int, activation: Any = "tanh", use_bias: bool = False, **options: Any
    ) -> None:
        super().__init__(units, activation, use_bias, **options)

    def build(self, input_shape: Any) -> None:
        width = self.width_of(input_shape)
        self.own = self.matrix("own", width, self.units)
        self.kernel = self.matrix("kernel", width, self.units)
        self.shift = self.bias()

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        return _own_and_aggregated(self, _mean, multiply_first=width > self.units)


@keras.saving.register_keras_serializable(PACKAGE)
class GatedGraphConv(AbstractConv):
    """`steps` steps of a gated recurrent unit over the rows.

    The input of a step is the sum over in-edges of rows times that step's matrix. Rows begin as the
    vertex's, padded with zeros to `units` features; they must not be wider.
    """

    OPTIONS = ("steps",)

    def __init__(self, units: int, steps: int = 2, **options: Any) -> None:
        super().__init__(units, **options)
        self.steps = steps

    def build(self, input_shape: Any) -> None:
        width = self.width_of(input_shape)
        if width > self.units:
            raise GraphError(
                f"Rows of {width} features exceed the {self.units} units of GatedGraphConv: use "
                "more units, or a Dense layer before it."
            )
        self.kernels = []
        for i in range(self.steps):
            self.kernels.append(self.matrix(f"kernel_{i}", self.units, self.units))
        self.gates = self.matrix("gates", self.units, 3 * self.units)
        self.recurrent = self.matrix("recurrent", self.units, 3 * self.units)
        self.shift = self.bias(3 * self.units)
        self.recurrent_shift = self.bias(3 * self.units, "recurrent_bias")

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        def pad(x: Any) -> Any:
            return jnp.pad(x, ((0, 0), (0, self.units - x.shape[-1])))

        pieces = [by_rows("x", "h0", pad)]
        for i, kernel in enumerate(self.kernels):
            pieces.append(by_rows(f"h{i}", f"p{i}", _product_with(kernel)))
            pieces.append(by_columns(f"p{i}", f"s{i}", sum_of_edges))
            pieces.append(by_rows(f"h{i} s{i}", f"h{i + 1}", self.recurrent_unit))
        pieces.append(by_rows(f"h{self.steps}", "y", self.activation))
        return pieces

    def recurrent_unit(self, state: Any, message: Any) -> Any:
        """The next state of a GRU (Li et al. 2016, eq. 3 to 6).

        r is the reset gate, z the update gate, n the candidate.
        """
        from_message = with_bias(product(message, self.gates), self.shift)
        from_state = with_bias(product(state, self.recurrent), self.recurrent_shift)
        message_r, message_z, message_n = jnp.split(from_message, 3, axis=1)
        state_r, state_z, state_n = jnp.split(from_state, 3, axis=1)
        r = jax.nn.sigmoid(message_r + state_r)
        z = jax.nn.sigmoid(message_z + state_z)
        return z * state + (1 - z) * jnp.tanh(message_n + r * state_n)


def sum_of_edges(graph: Block, column: Any, rows: Any) -> Any:
    """The sum over in-edges, as a piece by columns."""
    return graph.sum(rows)


def _mean(graph: Block, column: Any, rows: Any) -> Any:
    return graph.mean(rows)


def _max(graph: Block, column: Any, rows: Any) -> Any:
    return graph.max(rows)


AGGREGATIONS = {"mean": _mean, "max": _max, "sum": sum_of_edges}
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
    target: str = "x",
) -> Sequence[BlockPiece]:
    """The vertex's own row times `own` plus aggregated rows times `kernel`, finished.

    Without `own`, aggregated rows alone.
    """

    def multiply(*tables: Any) -> Any:
        return product(tables[0], layer.kernel), own_product(tables[-1])

    def own_product(t: Any) -> Any:
        if layer.own is None:
            return jnp.zeros((t.shape[0], layer.units), t.dtype)
        return product(t, layer.own)

    def add_products(q: Any, s: Any) -> Any:
        return layer.finished(q + s, layer.shift)

    def add_rows(t: Any, s: Any) -> Any:
        total = own_product(t) + product(s, layer.kernel)
        return layer.finished(total, layer.shift)

    if multiply_first:
        return (
            by_rows("x" if target == "x" else f"x {target}", "p q", multiply),
            by_columns("p", "s", aggregate, linear),
            by_rows("q s", "y", add_products),
        )
    if project is not None:
        return (
            by_rows("x", "j", project),
            by_columns("j", "s", aggregate, linear),
            by_rows(f"{target} s", "y", add_rows),
        )
    return (by_columns("x", "s", aggregate, linear), by_rows(f"{target} s", "y", add_rows))

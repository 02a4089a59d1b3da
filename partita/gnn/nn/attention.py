"""Keras layers of attention over in-edges.

| layer | score of an edge from u to v | source |
|---|---|---|
| GATv2Conv | a . leaky_relu(x_u W + x_v R + edge E) | Brody et al. 2022, eq. 7 |
| GATConv | leaky_relu(a . x_u W + b . x_v W + edge features) | Velickovic et al. 2018, eq. 3 |

The result for v is the sum of x_u W weighted by the softmax of scores over the in-edges of v and a
self edge. GATv2Conv without edge features stores nothing per edge (`kernels.attention`). With edge
features, and in GATConv, messages and scores are rows per edge (`edge_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras

from partita.errors import GraphError
from partita.gnn.kernels.pairs import pair_factors
from partita.gnn.nn.block import Block, EdgeEnds, halves, whole
from partita.gnn.nn.isomorphism import checked_edges
from partita.gnn.nn.layers import PACKAGE, AbstractConv, product, widths_of, with_bias
from partita.gnn.nn.pieces import BlockPiece, by_columns, by_rows
from partita.gnn.nn.sums import edge_max, edge_sum, spread
from partita.gnn.nn.vertices import PairDropout

MASKED = -1e30
"""Score of an edge that does not count."""


class AttentionConv(AbstractConv):
    """Options that layers of attention share.

    All heads together have `units` features; with `concat=False` each has them, and the result is
    the mean over heads. `self_edges=False` uses the edges as given. `residual` adds the vertex's
    own row times a matrix. `dropout` is the rate of dropped attention; its pattern depends on the
    numbers of both vertices, so that repeated edges share it. `edge_dim` features of each edge, or
    its weight with 1, are part of the scores. A self edge has the mean of those of the other
    in-edges.
    """

    OPTIONS = ("heads", "concat", "self_edges", "residual", "dropout", "edge_dim", "negative_slope")

    def __init__(
        self,
        units: int,
        heads: int = 1,
        *,
        concat: bool = True,
        self_edges: bool = True,
        residual: bool = False,
        dropout: float = 0.0,
        edge_dim: int | None = None,
        negative_slope: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(units, **options)
        self.concat = concat
        self.self_edges = self_edges
        self.residual = residual
        self.attention_dropout = PairDropout(dropout)
        self.edge_dim = edge_dim
        self.negative_slope = negative_slope
        if heads < 1 or (concat and units % heads):
            raise GraphError(
                f"units={units} is not a multiple of heads={heads}: every head has the same "
                "number of features."
            )
        self.heads = heads

    @property
    def dropout(self) -> float:
        """Rate of dropped attention."""
        return self.attention_dropout.rate

    def drops(self, training: bool) -> bool:
        """Whether attention is dropped."""
        return training and self.dropout > 0

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return self.units // self.heads if self.concat else self.units

    def leaky(self, z: Any) -> Any:
        """The leaky ReLU of scores."""
        return jnp.where(z > 0, z, self.negative_slope * z)

    def by_heads(self, x: Any) -> Any:
        """[rows, heads, head_width] of rows of any number of heads."""
        return x.reshape(x.shape[0], x.shape[1] // self.head_width, self.head_width)

    def heads_of(self, variable: Any, column: Any, heads: int) -> Any:
        """The rows of a variable [heads, ...] for `heads` heads from a column on."""
        array: Any = keras.ops.convert_to_tensor(variable, "float32")
        return jax.lax.dynamic_slice_in_dim(array, column // self.head_width, heads)

    def edge_rows(self, edges: Any, column: Any, columns: int) -> Any:
        """Features of edges times the edge matrix, some of its columns."""
        matrix: Any = keras.ops.convert_to_tensor(self.edge_kernel, "float32")
        return edges @ jax.lax.dynamic_slice_in_dim(matrix, column, columns, 1)

    def finish(self, t: Any, s: Any) -> Any:
        """The result of attended rows s and of the vertices' own rows t."""
        if not self.concat:
            s = s.reshape(-1, self.heads, self.units).mean(axis=1)
        return self.finished(s + product(t, self.own) if self.residual else s, self.shift)

    def last_piece(self, target: str) -> BlockPiece:
        """Table "y" of the attended rows "s"."""
        if self.residual:
            return by_rows(f"{target} s", "y", self.finish)
        return by_rows("s", "y", lambda s: self.finish(None, s))


@keras.saving.register_keras_serializable(PACKAGE)
class GATv2Conv(AttentionConv):
    """Attention of `heads` heads over in-edges and a self edge (options: `AttentionConv`).

    `head_bias` adds biases to the rows of both ends, as in PyG. `share_weights` uses one matrix for
    both ends.
    """

    OPTIONS = ("head_bias", "share_weights")

    def __init__(
        self,
        units: int,
        heads: int = 1,
        *,
        head_bias: bool = False,
        share_weights: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(units, heads, **options)
        self.head_bias = head_bias
        self.share_weights = share_weights

    def build(self, input_shape: Any) -> None:
        source_width, target_width = widths_of(input_shape)
        width = self.heads * self.head_width
        self.kernel = self.matrix("kernel", source_width, width)
        self.kernel_shift = self.destination = self.destination_shift = None
        if not self.share_weights:
            self.destination = self.matrix("destination", target_width, width)
        self.score = self.matrix("score", self.heads, self.head_width)
        self.shift = self.bias()
        if self.head_bias:
            self.kernel_shift = self.bias(width, "kernel_bias")
            if not self.share_weights:
                self.destination_shift = self.bias(width, "destination_bias")
        if self.residual:
            self.own = self.matrix("own", target_width, self.units)
        if self.edge_dim is not None:
            self.edge_kernel = self.matrix("edge_kernel", self.edge_dim, width)

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        def source_rows(x: Any) -> Any:
            return with_bias(product(x, self.kernel), self.kernel_shift)

        def target_rows(t: Any) -> Any:
            if self.destination is None:
                return source_rows(t)
            return with_bias(product(t, self.destination), self.destination_shift)

        def multiply(*tables: Any) -> Any:
            return source_rows(tables[0]), target_rows(tables[-1])

        def attention(graph: Block, column: Any, l: Any, r: Any) -> Any:
            return self.attended(graph, column, l, r, training)

        return (
            by_rows("x" if target == "x" else f"x {target}", "l r", multiply),
            by_columns("l r", "s", attention, linear=False, grain=self.head_width),
            self.last_piece(target),
        )

    def attended(self, graph: Block, column: Any, l: Any, r: Any, training: bool) -> Any:
        """[rows, columns]: attention of the heads from a column on."""
        heads = l.shape[1] // self.head_width
        score = self.heads_of(self.score, column, heads)
        if self.edge_dim is None and self.negative_slope == 0.2:
            drop = self.attention_dropout.pattern
            out = graph.attention(
                self.by_heads(l),
                self.by_heads(r),
                score,
                self.self_edges,
                partial(drop, heads, column // self.head_width) if self.drops(training) else None,
            )
            return out.reshape(l.shape)

        def scores(sources: Any, targets: Any, edges: Any) -> Any:
            z = self.by_heads(sources) + self.by_heads(targets)
            if edges is not None:
                z = z + self.by_heads(self.edge_rows(edges, column, l.shape[1]))
            return (self.leaky(z) * score).sum(axis=2)

        return edge_attention(self, graph, AttendedRows(l, r, column), scores, training)


@keras.saving.register_keras_serializable(PACKAGE)
class GATConv(AttentionConv):
    """The first graph attention layer, of `heads` heads (options: `AttentionConv`).

    With a pair, both ends have a matrix.
    """

    def build(self, input_shape: Any) -> None:
        pair = isinstance(input_shape[0], (tuple, list))
        source_width, target_width = widths_of(input_shape)
        width = self.heads * self.head_width
        self.kernel = self.matrix("kernel", source_width, width)
        self.destination = self.matrix("destination", target_width, width) if pair else None
        self.source_score = self.matrix("source_score", self.heads, self.head_width)
        self.target_score = self.matrix("target_score", self.heads, self.head_width)
        self.shift = self.bias()
        if self.residual:
            self.own = self.matrix("own", target_width, self.units)
        if self.edge_dim is not None:
            self.edge_kernel = self.matrix("edge_kernel", self.edge_dim, width)
            self.edge_score = self.matrix("edge_score", self.heads, self.head_width)

    def pieces(self, width: int, training: bool = False, target: str = "x") -> Sequence[BlockPiece]:
        def multiply(*tables: Any) -> Any:
            if self.destination is None:
                return product(tables[0], self.kernel)
            return product(tables[0], self.kernel), product(tables[1], self.destination)

        def attention(graph: Block, column: Any, l: Any, r: Any = None) -> Any:
            return self.attended(graph, column, l, l if r is None else r, training)

        names = "l" if self.destination is None else "l r"
        return (
            by_rows("x" if target == "x" else f"x {target}", names, multiply),
            by_columns(names, "s", attention, linear=False, grain=self.head_width),
            self.last_piece(target),
        )

    def attended(self, graph: Block, column: Any, l: Any, r: Any, training: bool) -> Any:
        """[rows, columns]: attention of the heads from a column on."""
        heads = l.shape[1] // self.head_width

        def share(rows: Any, variable: Any) -> Any:
            return (self.by_heads(rows) * self.heads_of(variable, column, heads)).sum(axis=2)

        def scores(sources: Any, targets: Any, edges: Any) -> Any:
            z = share(sources, self.source_score) + targets
            if edges is not None:
                z = z + share(self.edge_rows(edges, column, l.shape[1]), self.edge_score)
            return self.leaky(z)

        target_share = share(r.astype(jnp.float32), self.target_score)
        return edge_attention(self, graph, AttendedRows(l, target_share, column), scores, training)


@dataclass(frozen=True)
class AttendedRows:
    """Rows of attention over edges.

    source      [rows, columns], which are summed
    target      [rows, ...], the share of an edge's end in its score
    column      number of the first of the columns
    """

    source: Any
    target: Any
    column: Any


def edge_attention(
    layer: AttentionConv, graph: Block, rows: AttendedRows, scores: Any, training: bool
) -> Any:
    """[rows, columns]: the sum of source rows by the softmax of scores over in-edges.

    `scores(sources, targets, edge_features)` gives [n, heads] for n edges. One self edge of each
    vertex counts if the layer has self edges, with the mean features of the other in-edges.
    """
    kind = rows.source.dtype
    source, target = (array.astype(jnp.float32) for array in (rows.source, rows.target))
    numbers = halves(graph.vertex_numbers())
    edge_dim = layer.edge_dim
    ends = graph.ends(
        jnp.concatenate([source, numbers], axis=1),
        jnp.concatenate([target, numbers], axis=1),
        "attention" if edge_dim is None else "message",
    )
    columns = source.shape[1]
    source_rows, target_rows = ends.source[:, :columns], ends.target[:, : target.shape[1]]
    features = None if edge_dim is None else checked_edges(layer, ends.features, edge_dim)
    edge_scores = scores(source_rows, target_rows, features)
    heads = edge_scores.shape[1]
    is_edge = (jnp.arange(edge_scores.shape[0]) < ends.by_edge.offsets[-1])[:, None]
    counts = is_edge & ~ends.is_self[:, None] if layer.self_edges else is_edge
    edge_scores = jnp.where(counts, edge_scores, MASKED)
    top = jax.lax.stop_gradient(edge_max(ends.by_edge, edge_scores))
    self_scores = None
    if layer.self_edges:
        mean_features = None if features is None else _mean_of_others(ends, counts, features)
        self_scores = scores(source, target, mean_features)
        has_edges = (_degrees(ends) > 0)[:, None]
        self_top = jax.lax.stop_gradient(self_scores)
        top = jnp.where(has_edges, jnp.maximum(top, self_top), self_top)
    shares = jnp.exp(edge_scores - spread(ends.by_edge, top))
    total = edge_sum(ends.by_edge, shares)
    self_shares = None if self_scores is None else jnp.exp(self_scores - top)
    if self_shares is not None:
        total = total + self_shares
    if layer.drops(training):
        own = graph.vertex_numbers()
        sources = jnp.concatenate([whole(ends.source[:, columns:]), own])
        targets = jnp.concatenate([whole(ends.target[:, target.shape[1] :]), own])
        first_head = rows.column // layer.head_width
        pattern = layer.attention_dropout.pattern(heads, first_head, sources, targets)
        factors = pair_factors(pattern, pattern.source, pattern.target)
        shares = shares * factors[: shares.shape[0]]
        if self_shares is not None:
            self_shares = self_shares * factors[shares.shape[0] :]
    sums = _weighted(ends, shares, source_rows, heads)
    if self_shares is not None:
        sums = sums + self_shares[:, :, None] * source.reshape(-1, heads, columns // heads)
    out = sums / jnp.where(total > 0, total, 1)[:, :, None]
    return out.reshape(-1, columns).astype(kind)


def _degrees(ends: EdgeEnds) -> Any:
    """int32 [rows]: the number of in-edges of each row."""
    return jnp.diff(ends.by_edge.offsets)


def _weighted(ends: EdgeEnds, shares: Any, source_rows: Any, heads: int) -> Any:
    """[rows, heads, features]: source rows, weighted by shares of heads, summed over edges."""
    edges, columns = source_rows.shape
    messages = shares[:, :, None] * source_rows.reshape(edges, heads, columns // heads)
    sums = edge_sum(ends.by_edge, messages.reshape(edges, columns))
    return sums.reshape(-1, heads, columns // heads)


def _mean_of_others(ends: EdgeEnds, counts: Any, features: Any) -> Any:
    """[rows, D]: the mean features of the in-edges that count, 0 without any."""
    ones = counts.astype(jnp.float32)
    sums = edge_sum(ends.by_edge, features.astype(jnp.float32) * ones)
    return sums / jnp.maximum(edge_sum(ends.by_edge, ones), 1)

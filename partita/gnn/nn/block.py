"""A graph on the devices, as layers see it: `Block` is the in-edges of one device's vertices.

A layer asks for a sum, a mean, a maximum or attention over in-edges, and gets one row per vertex of
its device. On several devices, each has a contiguous range of vertices. Rows of other devices
arrive by one or both of two aggregation kinds (`Aggregation`): each row of other devices that edges
begin at is fetched once (`HaloMessage`); or devices share their vertices and each sums a slice of
the features. Gradients return along the transpose and through the same exchanges in reverse. They
are exact for directed graphs, repeated edges and self edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.errors import GraphError
from partita.gnn.data.graph import Graph
from partita.gnn.kernels import stamp
from partita.gnn.kernels.attention import AttentionEdges, AttentionRows, attend
from partita.gnn.kernels.pairs import PairPattern
from partita.gnn.nn.sums import (
    Edges,
    edge_max,
    edge_sum,
    edges_by_position,
    edges_of,
    like_first,
    scaled_sum,
    spread,
    taken,
    weighted_sum,
)

READOUTS = ("sum", "mean", "max")
"""Aggregations over the vertices of a graph."""

IGNORE_WEIGHTS = ("max", "attention")
"""Aggregations that do not read edge weights."""

SMALLEST = -3e38
"""A number below all rows, which stays finite when it is added to zeros."""

AXIS = "parts"
"""The mesh axis over which vertices are split."""

TO_ALL = 0
"""The shift of a message with rows for all devices."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HaloMessage:
    """Rows that each device sends to the device `shift` numbers further on.

    pick        edges that select the rows, one per row of the message
    shift       `TO_ALL`: an equal number of rows goes to every device, in their order
    """

    pick: Edges
    shift: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aggregation:
    """One aggregation kind on one device: the edges that it sums over, and how their rows arrive.

    edges       in-edges; their columns are the device's rows, then the halo's
    weights     float32 [edges], or None
    halo        messages with the rows of devices outside the group
    far         edges from the halo and their weights, if they are separate from `edges`, so that
                the sum over `edges` need not wait for the halo; else None
    features    float32 [edges, D] of `edges`, or None
    columns     neighbouring devices that share their vertices. They exchange their rows for a
                slice of the features of all, sum it over all in-edges of these vertices, and
                exchange it back. With 1, each device has the in-edges of its own vertices.
    near        -1: all edges are present. Otherwise only edges into vertices with at most `near`
                edges between them and a training vertex.
    """

    edges: Edges
    weights: Any = None
    halo: tuple[HaloMessage, ...] = ()
    far: tuple[Edges, Any] | None = None
    features: Any = None
    columns: int = field(default=1, metadata={"static": True})
    near: int = field(default=-1, metadata={"static": True})

    @property
    def edge_table(self) -> Any:
        """float32 [edges, D]: features of `edges`, or their weights with D = 1; or None."""
        if self.features is None and self.weights is not None:
            return self.weights[:, None]
        return self.features


@dataclass(frozen=True)
class EdgeEnds:
    """In-edges of a device with the rows at their ends; padding at the end repeats the first.

    source      [edges, F]: rows that edges begin at
    target      [edges, F]: rows that edges end at
    features    [edges, D]: edge features or weights, or None
    by_edge     edges from positions of edges to rows, which aggregate messages [edges, ...]
    is_self     bool [edges]: whether an edge begins where it ends
    """

    source: Any
    target: Any
    features: Any
    by_edge: Edges
    is_self: Any


class Calls:
    """The aggregations of a model, in the order in which they are traced.

    aggregations    (features, 'sum', 'max', 'attention' or 'message') of each so far
    total           their number, if only results of training vertices are used; else 0
    normalizes      for each division by square roots of degrees: the weight of a missing self edge,
                    0 where none is added
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.aggregations: list[tuple[int, str]] = []
        self.normalizes: set[float] = set()

    @property
    def later(self) -> int:
        """Number of aggregations after the last one that was traced."""
        return self.total - len(self.aggregations)


_calls: ContextVar[Calls | None] = ContextVar("calls", default=None)


@contextmanager
def recorded_calls(total: int = 0) -> Iterator[Calls]:
    """Records the aggregations that are traced in the context."""
    calls = Calls(total)
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """The in-edges of a device's vertices, which are its rows.

    degree          float32 [rows]: number of in-edges
    self_correction float32 [rows]: weight to add to a vertex's self edges so that one counts
    load            float32 [rows]: sum of the weights of the in-edges; `degree` without weights
    first           int32 [1]: number of the first vertex in the whole graph
    count           int32 [1]: number of the device's vertices, its first rows; padding follows
    aggregations    one per aggregation kind, at least one of them over all edges
    parts           number of devices
    vertex          int32 [rows]: the user's vertex numbers if the graph was relabelled, else None
    columns         (features, `Aggregation.columns` for aggregations of that width)
    timed           whether exchanges are timed (`kernels.stamp`)
    member          int32 [rows]: the graph of a batch that each vertex belongs to, else None
    graphs          number of graphs of the batch
    """

    degree: Any
    self_correction: Any
    load: Any
    first: Any
    count: Any
    aggregations: tuple[Aggregation, ...]
    parts: int = field(default=1, metadata={"static": True})
    vertex: Any = None
    columns: tuple[tuple[int, int], ...] = field(default=(), metadata={"static": True})
    timed: bool = field(default=False, metadata={"static": True})
    member: Any = None
    graphs: int = field(default=0, metadata={"static": True})

    @property
    def rows(self) -> int:
        """Number of rows, with padding."""
        return self.degree.shape[0]

    def filled(self, x: Any) -> Any:
        """x [rows, ...] with the first vertex's row in the place of padding, without a gradient.

        So functions of rows are as finite in padding as they are for vertices. A device without
        vertices has positive numbers there.
        """
        if self.parts == 1:
            return x
        shape = (1, *x.shape[1:])
        any_row = 1 + jnp.cos(jnp.arange(math.prod(shape))).reshape(shape)
        row = jnp.where(self.count[0] > 0, x[:1], any_row.astype(x.dtype))
        is_vertex = (jnp.arange(self.rows) < self.count[0]).reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(is_vertex, x, jax.lax.stop_gradient(row))

    # ------------------------------------------------------------------------- all vertices

    def vertex_sum(self, x: Any) -> Any:
        """[...]: the sum of x [rows, ...] over all vertices, those of other devices included.

        Padding does not count. The result and its gradient are those of one device, so that it may
        be part of a layer, or of a penalty by `add_loss`.
        """
        is_vertex = (jnp.arange(self.rows) < self.count[0]).reshape(-1, *[1] * (x.ndim - 1))
        return self.sum_over_devices(jnp.where(is_vertex, x, 0).sum(axis=0))

    def sum_over_devices(self, values: Any) -> Any:
        """The sums of values over the devices of a step."""
        if self.parts == 1:
            return values
        return self.leave(jax.lax.psum(self.enter(values), AXIS))

    def readout(self, x: Any, aggregation: str = "mean") -> Any:
        """[rows, F]: the 'sum', 'mean' or 'max' of x [rows, F] over the graph of each vertex.

        The vertices of all devices count. GraphError for a graph that is no batch.
        """
        if self.member is None:
            raise GraphError(
                "A readout needs a batch of graphs: make one with gnn.batch(graphs), or give "
                "Graph.from_edges(members=...)."
            )
        if aggregation not in READOUTS:
            names = ", ".join(map(repr, READOUTS))
            raise GraphError(f"readout={aggregation!r} is unknown: use {names}.")
        is_vertex = jnp.arange(self.rows) < self.count[0]
        # padding belongs to a graph behind the last one, which is dropped
        member = jnp.where(is_vertex, self.member, self.graphs)
        rows = x.astype(jnp.float32)
        if aggregation == "max":
            of_graphs = self._largest_of_graphs(rows, member)
        else:
            of_graphs = self._sums_of_graphs(rows, member)
        if aggregation == "mean":
            ones = jnp.ones((self.rows, 1), jnp.float32)
            of_graphs = of_graphs / jnp.maximum(self._sums_of_graphs(ones, member), 1)
        return of_graphs[self.member].astype(x.dtype)

    def _sums_of_graphs(self, rows: Any, member: Any) -> Any:
        """float32 [graphs, F]: sums of the rows of all devices."""
        sums = jax.ops.segment_sum(rows, member, self.graphs + 1)[: self.graphs]
        return self.sum_over_devices(sums)

    def _largest_of_graphs(self, rows: Any, member: Any) -> Any:
        """float32 [graphs, F]: maxima of the rows of all devices."""
        largest = jax.ops.segment_max(rows, member, self.graphs + 1)[: self.graphs]
        largest = jnp.maximum(largest, SMALLEST)
        if self.parts == 1:
            return largest
        of_parts = jnp.zeros((self.parts, *largest.shape), jnp.float32)
        of_parts = of_parts.at[jax.lax.axis_index(AXIS)].set(largest)
        return self.sum_over_devices(of_parts).max(axis=0)

    def vertex_mean(self, x: Any) -> Any:
        """[...]: the mean of x [rows, ...] over all vertices, computed in float32 or wider."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = self.vertex_sum(wide) / self.vertex_sum(jnp.ones(self.rows, wide.dtype))
        return mean.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else mean

    def corrected_self_edges(self, missing: float = 1.0) -> Any:
        """float32 [rows]: weight to add to the self edges of each vertex so that one counts.

        It is the last one, as in PyG, or a new one of weight `missing`.
        """
        if missing == 1:
            return self.self_correction
        return jnp.where(self.self_correction == 1, missing, self.self_correction)

    def inverse_root_degrees(self, missing: float = 1.0) -> Any:
        """float32 [rows]: 1 / sqrt(d), 0 where d is 0.

        d is the sum of the weights of the in-edges, with exactly one self edge (`missing`: as in
        `corrected_self_edges`), or as given with missing=0. Training refuses a graph with a
        negative d.
        """
        calls = _calls.get()
        if calls is not None:
            calls.normalizes.add(missing)
        degrees = self.load + self.corrected_self_edges(missing) if missing else self.load
        return jnp.where(degrees > 0, jax.lax.rsqrt(jnp.maximum(degrees, 1e-30)), 0)

    # ------------------------------------------------------------------------- aggregations
    # Kernels compute in float32; rows of other number types are converted and back.

    def sum(
        self,
        x: Any,
        weighted: bool = True,
        before: Any = None,
        share: Any = None,
        after: Any = None,
    ) -> Any:
        """[rows, features]: after[v] * (share[v] * before[v] * x[v] + sum over in-edges).

        An in-edge from u adds before[u] * x[u], times its weight if `weighted` and the graph has
        weights. The factors are float32 [rows]; None stands for 1, 0 and 1. They belong to the
        graph and are not trained: they have no gradient.
        """
        self._check_rows(x)
        kind = x.dtype
        x = x.astype(jnp.float32)
        aggregation = self._next_aggregation(x.shape[1], "sum")
        weighted = weighted and aggregation.weights is not None
        local = aggregation.columns == 1 and not aggregation.halo and aggregation.far is None
        if local and not weighted:
            return scaled_sum(aggregation.edges, before, share, after, x).astype(kind)
        if before is not None:
            x = x * jax.lax.stop_gradient(before)[:, None]
        sums = self._exchanged_sum(aggregation, x, weighted)
        if share is not None:
            sums = sums + x * jax.lax.stop_gradient(share)[:, None]
        if after is not None:
            sums = sums * jax.lax.stop_gradient(after)[:, None]
        return sums.astype(kind)

    def _exchanged_sum(self, aggregation: Aggregation, x: Any, weighted: bool) -> Any:
        """The sum over in-edges from the rows of all devices."""
        weights = aggregation.weights if weighted else None
        if aggregation.far is None:
            sums = _sum(aggregation.edges, weights, self._sources(aggregation, x))
            return self._returned(aggregation, sums)[:, : x.shape[1]]
        # the halo arrives while the device's own rows are summed, and gradients return likewise
        far_edges, far_weights = aggregation.far
        computed, sent = self.fork(x)
        near_sums = _sum(aggregation.edges, weights, computed)
        near_sums, halo_rows = self.meet(near_sums, self._halo_rows(aggregation, sent))
        return near_sums + _sum(far_edges, far_weights if weighted else None, halo_rows)

    def sums_by_feature(self, x: Any) -> Any:
        """[rows, D, features]: for each edge feature, the sum over in-edges of x times it.

        GraphError without edge features, or weights.
        """
        self._check_rows(x)
        aggregation = self._next_aggregation(x.shape[1], "message")
        features = aggregation.edge_table
        if features is None:
            raise GraphError(
                "Sums by edge features need some: give Graph.from_edges(edge_features=...), or use "
                "Graph.from_relations."
            )
        sources = self._sources(aggregation, x.astype(jnp.float32))
        sums = [weighted_sum(aggregation.edges, column, sources) for column in features.T]
        return jnp.stack(sums, axis=1).astype(x.dtype)

    def mean(self, x: Any) -> Any:
        """[rows, features]: the sum over in-edges divided by their number, 0 without any."""
        return self.sum(x, after=1 / jnp.maximum(self.degree, 1))

    def max(self, x: Any) -> Any:
        """[rows, features]: the maximum over in-edges, 0 without any."""
        self._check_rows(x)
        aggregation = self._next_aggregation(x.shape[1], "max")
        sources = self._sources(aggregation, x.astype(jnp.float32))
        maxima = self._returned(aggregation, edge_max(aggregation.edges, sources))
        return maxima[:, : x.shape[1]].astype(x.dtype)

    def attention(
        self,
        l: Any,
        r: Any,
        a: Any,
        self_edges: bool = True,
        pattern: Callable[..., PairPattern] | None = None,
    ) -> Any:
        """[rows, heads, features]: attention over in-edges and a self edge (`kernels.attention`).

        l and r are [rows, heads, features], a is [heads, features]. Without `self_edges` it is over
        the edges as given. `pattern(sources, targets)` gives the pattern of dropout for the numbers
        of the vertices that edges begin and end at.
        """
        self._check_rows(l, dims=3)
        self._check_rows(r, dims=3)
        correction = self.self_correction.astype(jnp.int32)
        correction = correction if self_edges else jnp.zeros_like(correction)
        kind = l.dtype
        l, r, a = (array.astype(jnp.float32) for array in (l, r, a))
        rows, heads, width = l.shape
        aggregation = self._next_aggregation(heads * width, "attention")
        sources = self._sources(aggregation, l.reshape(rows, heads * width))
        edges = aggregation.edges
        by_destination = AttentionEdges(edges.offsets, edges.ids, correction)
        by_source = AttentionEdges(edges.back_offsets, edges.back_ids, correction)
        tables = AttentionRows(sources.reshape(-1, heads, width), r, a)
        dropped = None
        if pattern is not None:
            numbers = self.vertex_numbers()
            dropped = pattern(whole(self._sources(aggregation, halves(numbers))), numbers)
        return attend(by_destination, by_source, tables, dropped).astype(kind)

    def ends(self, x: Any, target: Any = None, kind: str = "message") -> EdgeEnds:
        """The rows at both ends of every in-edge, for messages along edges.

        x [rows, features] where edges begin, `target` [rows, ...] where they end, by default x.
        `kind` is "attention" for a layer that does not read weights and features of edges.
        """
        target = x if target is None else target
        self._check_rows(x)
        self._check_rows(target, dims=target.ndim)
        aggregation = self._next_aggregation(x.shape[1], kind)
        edges = aggregation.edges
        sources = self._sources(aggregation, x.astype(jnp.float32))
        targets = target.astype(jnp.float32)
        by_edge = edges_by_position(edges)
        features = aggregation.edge_table
        if self.parts > 1:
            # a part without edges has padding alone, where messages must be finite too
            has_edges = edges.offsets[-1] > 0
            sources = jnp.where(has_edges, sources, 1 + jnp.cos(jnp.arange(sources.shape[1])))
            targets = jnp.where(has_edges, targets, 1 + jnp.sin(jnp.arange(targets.shape[1])))
        if features is not None:
            features = like_first(edges, features).astype(x.dtype)
        return EdgeEnds(
            taken(edges, sources).astype(x.dtype),
            spread(by_edge, targets).astype(x.dtype),
            features,
            by_edge,
            edges.ids == by_edge.back_ids,
        )

    def vertex_numbers(self) -> Any:
        """int32 [rows]: the user's number of the vertex of each row; padding has any."""
        if self.vertex is not None:
            return self.vertex
        return self.first[0] + jnp.arange(self.rows, dtype=jnp.int32)

    # ----------------------------------------------------------------------------- exchanges

    def _check_rows(self, x: Any, dims: int = 2) -> None:
        """GraphError unless x has a row per vertex and `dims` dims: kernels do not read shapes."""
        if x.ndim != dims or x.shape[0] != self.rows:
            table = "[rows, features]" if dims == 2 else "[rows, heads, features]"
            raise GraphError(
                f"An aggregation is given rows {list(x.shape)} for {self.rows:,} vertices: give "
                f"{table}, a row for every vertex."
            )

    def _next_aggregation(self, width: int, operation: str) -> Aggregation:
        """The aggregation to use for the next call, which is recorded."""
        calls = _calls.get()
        if calls is None:
            # A layer that is called on a graph, outside of training, which checks all layers first.
            if self.aggregations[0].weights is not None:
                refuse_unread_weights("The graph", operation)
        else:
            calls.aggregations.append((width, operation))
            if calls.total:
                enough = [a for a in self.aggregations if a.near >= calls.later]
                if enough:
                    return min(enough, key=lambda a: a.near)
        splits = operation in ("sum", "max")
        columns = dict(self.columns).get(width, 1) if splits else 1
        complete = [a for a in self.aggregations if a.near < 0]
        return next((a for a in complete if a.columns == columns), complete[0])

    def _sources(self, aggregation: Aggregation, x: Any) -> Any:
        """The rows that edges begin at: the device's or a slice of its group's, then the halo's."""
        if aggregation.columns > 1:
            padding = -x.shape[1] % aggregation.columns
            x = self._exchange(aggregation, jnp.pad(x, ((0, 0), (0, padding))), 1, 0)
        if not aggregation.halo:
            return x
        return jnp.concatenate([x, self._halo_rows(aggregation, x)])

    def _halo_rows(self, aggregation: Aggregation, x: Any) -> Any:
        """The rows of the halo, in the order of its messages."""
        sent = self.enter(tuple(edge_sum(message.pick, x) for message in aggregation.halo))
        received = []
        for rows, message in zip(sent, aggregation.halo, strict=True):
            if message.shift == TO_ALL:
                received.append(_sent_to_all(rows, self.parts))
                continue
            shift = message.shift * aggregation.columns
            pairs = [(i, (i + shift) % self.parts) for i in range(self.parts)]
            received.append(jax.lax.ppermute(rows, AXIS, pairs))
        return jnp.concatenate(self.leave(tuple(received)))

    def _returned(self, aggregation: Aggregation, y: Any) -> Any:
        """Results with all features of the device's rows; padding columns of zeros may follow."""
        return y if aggregation.columns == 1 else self._exchange(aggregation, y, 0, 1)

    def _exchange(self, aggregation: Aggregation, x: Any, split_dim: int, join_dim: int) -> Any:
        """x split along one dim and joined along the other, among devices that share vertices."""
        columns = aggregation.columns
        groups = [list(range(i, i + columns)) for i in range(0, self.parts, columns)]
        return self.leave(
            jax.lax.all_to_all(
                self.enter(x), AXIS, split_dim, join_dim, axis_index_groups=groups, tiled=True
            )
        )

    def enter(self, values: Any) -> Any:
        """Values that enter an exchange, stamped if exchanges are timed."""
        return stamp.enter(values, jax.lax.axis_index(AXIS)) if self.timed else values

    def leave(self, values: Any) -> Any:
        """Values that left an exchange, stamped if exchanges are timed."""
        return stamp.leave(values, jax.lax.axis_index(AXIS)) if self.timed else values

    def fork(self, x: Any) -> tuple[Any, Any]:
        """Rows twice, to sum and to send; the backward wait is stamped if exchanges are timed."""
        return stamp.fork(x, jax.lax.axis_index(AXIS)) if self.timed else (x, x)

    def meet(self, local: Any, received: Any) -> tuple[Any, Any]:
        """Both values; the wait for the second is stamped if exchanges are timed."""
        if not self.timed:
            return local, received
        return stamp.meet(local, received, jax.lax.axis_index(AXIS))


def halves(numbers: Any) -> Any:
    """float32 [n, 2] of int32: both halves of each number, which float32 represents exactly."""
    return jnp.stack([numbers >> 16, numbers & 0xFFFF], axis=1).astype(jnp.float32)


def whole(both: Any) -> Any:
    """int32 [n] of both halves."""
    high, low = jax.lax.stop_gradient(both).astype(jnp.int32).T
    return (high << 16) | low


def _sent_to_all(rows: Any, parts: int) -> Any:
    """The rows that all devices sent here, of rows [parts * n, F] for all of them."""
    by_part = rows.reshape(parts, -1, rows.shape[1])
    return jax.lax.all_to_all(by_part, AXIS, 0, 0).reshape(rows.shape)


def _sum(edges: Edges, weights: Any, x: Any) -> Any:
    """The sum over edges, with weights if given."""
    return edge_sum(edges, x) if weights is None else weighted_sum(edges, weights, x)


def refuse_unread_weights(title: str, operation: str) -> None:
    """GraphError if an aggregation does not read the edge weights of a graph."""
    if operation in IGNORE_WEIGHTS:
        raise GraphError(
            f"{title} has edge weights, and the model has an aggregation ({operation}) that does "
            "not read them: use sums or means (GCN, SAGE, GIN, CommNet, GatedGraph), or remove the "
            "weights with dataclasses.replace(graph, weights=None)."
        )


def block_of(graph: Graph) -> Block:
    """The block of a whole graph, for one device."""
    weighted = graph.weights is not None
    ordered = weighted or graph.edge_features is not None
    back = graph.transposed(ordered)
    if not ordered:
        back = replace(back, order=None)
    edges = edges_of(graph.offsets, graph.sources, back)
    degree, self_correction, load = of_vertices(graph, 0, graph.vertices)
    aggregation = Aggregation(edges, graph.weights, features=graph.edge_features)
    first = np.zeros(1, np.int32)
    count = np.array([graph.vertices], np.int32)
    return Block(
        degree,
        self_correction,
        load,
        first,
        count,
        (aggregation,),
        member=graph.members,
        graphs=graph.graphs,
    )


class TakesGraph:
    """Mixin of layers that are called with `graph`, before `keras.layers.Layer` in the bases."""

    def __call__(self, *args: Any, graph: Any = None, **options: Any) -> Any:
        if graph is None and len(args) > 1:
            # Keras takes by position only arrays
            args, graph = (args[0], *args[2:]), args[1]
        if graph is None:
            layer: Any = self
            raise GraphError(
                f"{type(self).__name__} '{layer.name}' is called without a graph: give it after "
                "the rows, layer(x, graph=graph)."
            )
        caller: Any = super()
        return caller.__call__(*args, graph=graph, **options)


def as_block(graph: Any, x: Any) -> Any:
    """The block of a whole graph if a `Graph` is given, so that a layer can be called on one.

    GraphError unless x, one table or a pair, has a row for every vertex of the graph.
    """
    if isinstance(graph, Block):
        return graph
    if not isinstance(graph, Graph):
        raise GraphError(
            f"graph is a {type(graph).__name__}: give a gnn.Graph, as "
            "gnn.Graph.from_edges(source, target) makes it."
        )
    if not isinstance(x, (tuple, list)) and x.shape[0] != graph.vertices:
        raise GraphError(
            f"{x.shape[0]:,} rows were given for the {graph.vertices:,} vertices of "
            f"'{graph.name}': give a row for every vertex."
        )
    if not isinstance(x, (tuple, list)) and len(x.shape) < 2:
        raise GraphError(
            f"The rows are {list(x.shape)}: give a table [vertices, features], such as x[:, None]."
        )
    return jax.tree.map(jnp.asarray, block_of(graph))


def of_vertices(graph: Graph, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(degree, self_correction, load) of a block of the vertices from `first` to before `last`."""
    offsets = graph.offsets[first : last + 1]
    degree = np.diff(offsets).astype(np.float32)
    self_correction = graph.self_edge_corrections(first, last)
    if graph.weights is None:
        return degree, self_correction, degree
    # the zero behind the weights lets the last rows be empty
    weights = np.append(graph.weights[offsets[0] : offsets[-1]], np.float32(0))
    load = np.add.reduceat(weights, offsets[:-1] - offsets[0]).astype(np.float32)
    load[degree == 0] = 0
    return degree, self_correction, load

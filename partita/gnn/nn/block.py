"""A graph on the devices, as layers see it: `Block` is the in-edges of one device's vertices, and what may be asked of them.

A layer asks for a sum, a mean, a maximum or attention over in-edges, and gets a row for each of its device's vertices. Where there are
several devices, each has a contiguous range of vertices, and rows come together in one of two ways, or both (`Aggregation`): the rows of other devices that
edges begin at are fetched, each once (`HaloMessage`); or devices share their vertices and each sums a slice of the features. Gradients go back along the
transpose, and through the same exchanges the other way: they are exact for directed graphs, repeated edges and self edges.

All that is here are arrays, so that a graph is an argument of a compiled step and not a part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.errors import GraphError
from partita.gnn.data.csr import Transposed
from partita.gnn.data.graph import Graph
from partita.gnn.kernels import stamp
from partita.gnn.kernels.attention import attend
from partita.gnn.kernels.largest import largest, largest_back
from partita.gnn.kernels.total import targets, total

AXIS = "parts"
"""The mesh axis over which vertices are split."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Edges:
    """Edges from columns to rows, both ways; all int32.

    `ids[offsets[r]:offsets[r + 1]]` are the columns of row r, `back_ids[back_offsets[c]:back_offsets[c + 1]]` the rows of column c, ascending;
    `back_order[k]` is the position in `ids` of the edge at k in `back_ids`, which only edges with weights need.
    """

    offsets: Any
    ids: Any
    back_offsets: Any
    back_ids: Any
    back_order: Any = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HaloMessage:
    """Rows that go from each device to the one `shift` further on: where from, as edges of which each row has one."""

    pick: Edges
    shift: int = field(metadata={"static": True})


def edge_sum(edges: Edges, x: Any) -> Any:
    """[rows, features]: the sum of x over the edges of each row."""
    return scaled_sum(edges, None, None, None, x)


@jax.custom_vjp
def scaled_sum(edges: Edges, before: Any, share: Any, after: Any, x: Any) -> Any:
    """[rows, features]: after[v] x (share[v] x before[v] x x[v] + the sum of before[u] x x[u] over the edges of row v), in one go.

    With a share, rows are the columns' own. Factors are float32 [rows], 1, 0 and 1 where they are None, and constants: they have no gradient.
    """
    return _scaled(edges.offsets, edges.ids, before, share, after, x)


def _scaled(offsets: Any, ids: Any, before: Any, share: Any, after: Any, x: Any) -> Any:
    own = share if share is None or before is None else share * before
    return total(offsets, ids, x, before, None if before is None else ids, own, after)


def _scaled_forward(edges: Edges, before: Any, share: Any, after: Any, x: Any) -> Any:
    return scaled_sum(edges, before, share, after, x), (edges, before, share, after)


def _scaled_backward(saved: Any, dy: Any) -> Any:
    edges, before, share, after = saved
    return (
        None,
        None,
        None,
        None,
        _scaled(edges.back_offsets, edges.back_ids, after, share, before, dy),
    )


scaled_sum.defvjp(_scaled_forward, _scaled_backward)


@jax.custom_vjp
def weighted_sum(edges: Edges, weights: Any, x: Any) -> Any:
    """[rows, features]: the sum of x times the edge's weight over the edges of each row; weights float32 [edges] as `edges.ids`."""
    return total(edges.offsets, edges.ids, x, weights)


def _weighted_forward(edges: Edges, weights: Any, x: Any) -> Any:
    return weighted_sum(edges, weights, x), (edges, weights, x)


def _weighted_backward(saved: Any, dy: Any) -> Any:
    edges, weights, x = saved
    to = jnp.minimum(targets(edges.offsets, edges.ids.shape[0]), dy.shape[0] - 1)
    used = jnp.arange(edges.ids.shape[0]) < edges.offsets[-1]
    dw = jnp.where(
        used, (x[edges.ids] * dy[to]).sum(axis=1), 0
    )  # XLA leaves it out where nobody asks for it
    return None, dw, total(edges.back_offsets, edges.back_ids, dy, weights, edges.back_order)


weighted_sum.defvjp(_weighted_forward, _weighted_backward)


@jax.custom_vjp
def edge_max(edges: Edges, x: Any) -> Any:
    """[rows, features]: the maximum of x over the edges of each row, 0 where there is none. Of equal ones the first has the gradient."""
    return largest(edges.offsets, edges.ids, x)[0]


def _max_forward(edges: Edges, x: Any) -> Any:
    top, source = largest(edges.offsets, edges.ids, x)
    return top, (edges, source)


def _max_backward(saved: Any, dy: Any) -> Any:
    edges, source = saved
    return None, largest_back(edges.back_offsets, edges.back_ids, source, dy)


edge_max.defvjp(_max_forward, _max_backward)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Aggregation:
    """The edges that a device sums over, and how the rows come together that they begin at.

    `columns` devices, neighbours in number, share their vertices: their rows are exchanged for a slice of the features of all, summed over all in-edges of
    these vertices, and exchanged back. With 1, each has the in-edges of its own vertices. `halo`: rows of devices beyond those. `near`: only edges into
    vertices from which a training vertex is so many edges away at most are there; -1: all are. weights float32 [edges], or None. `far`: the edges from the
    halo, where they lie apart, so that others need not wait for it; their weights.
    """

    edges: Edges
    weights: Any = None
    halo: tuple[HaloMessage, ...] = ()
    far: tuple[Edges, Any] | None = None
    columns: int = field(default=1, metadata={"static": True})
    near: int = field(default=-1, metadata={"static": True})


class Calls:
    """The aggregations of a model in the order in which they are traced: (features, 'sum', 'max' or 'attention') of each.

    `whole`: how many there will be, where nothing is wanted but what the training vertices need; else 0.
    """

    def __init__(self, whole: int) -> None:
        self.whole = whole
        self.seen: list[tuple[int, str]] = []


_calls: ContextVar[Calls | None] = ContextVar("calls", default=None)


@contextmanager
def counted(whole: int = 0) -> Iterator[Calls]:
    """Notes the aggregations that are traced inside."""
    calls = Calls(whole)
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """The in-edges of a device's vertices, which are its rows.

    degree     float32 [rows]: in-edges
    alone      int32 [rows]: 1 where a vertex has no edge to itself
    load       float32 [rows]: the sum of the weights of the in-edges; `degree` without weights
    first      int32 [1]: the number of the first vertex in the whole graph
    aggregations    one for each aggregation kind, at least one of them over all edges
    vertex     int32 [rows]: the user's numbers of the vertices where the graph was relabelled, else None
    columns    (features, `Aggregation.columns` of aggregations of so many)
    timed      whether the times of exchanges are noted (`kernels.stamp`)
    """

    degree: Any
    alone: Any
    load: Any
    first: Any
    aggregations: tuple[Aggregation, ...]
    parts: int = field(default=1, metadata={"static": True})
    vertex: Any = None
    columns: tuple[tuple[int, int], ...] = field(default=(), metadata={"static": True})
    timed: bool = field(default=False, metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.degree.shape[0]

    def sum(
        self,
        x: Any,
        weighted: bool = False,
        before: Any = None,
        share: Any = None,
        after: Any = None,
    ) -> Any:
        """[rows, features]: the sum over in-edges, of rows times the edges' weights if `weighted` and the graph has some.

        Rows count `before` times their own, in the sum and, `share` times, beside it; the result counts `after` times. These are float32 [rows], or
        None where all count once and nothing is beside; the graph's, not trained ones: they have no gradient.
        """
        aggregation = self._aggregation(x.shape[1], "sum")
        weighted = weighted and aggregation.weights is not None
        if (
            not weighted
            and aggregation.columns == 1
            and not aggregation.halo
            and aggregation.far is None
        ):
            return scaled_sum(aggregation.edges, before, share, after, x)
        fixed = jax.lax.stop_gradient
        x = x if before is None else x * fixed(before)[:, None]
        found = self._summed(aggregation, x, weighted)
        found = found if share is None else found + x * fixed(share)[:, None]
        return found if after is None else found * fixed(after)[:, None]

    def _summed(self, aggregation: Aggregation, x: Any, weighted: bool) -> Any:
        """The sum of rows of all devices, by any aggregation."""
        width = x.shape[1]
        over = lambda edges, weights, rows: (
            weighted_sum(edges, weights, rows) if weighted else edge_sum(edges, rows)
        )
        if (
            aggregation.far is not None
        ):  # what comes is waited for when the device's own rows are summed, and gradients come back while its own are
            mine, sent = self.forked(x)
            own, came = self.met(
                over(aggregation.edges, aggregation.weights, mine), self._fetched(aggregation, sent)
            )
            return own + over(*aggregation.far, came)
        return self._returned(
            aggregation,
            over(aggregation.edges, aggregation.weights, _below(*self._gathered(aggregation, x))),
        )[:, :width]

    def mean(self, x: Any) -> Any:
        """[rows, features]: the mean over in-edges; zero where there is none."""
        return self.sum(x, after=1 / jnp.maximum(self.degree, 1))

    def max(self, x: Any) -> Any:
        """[rows, features]: the maximum over in-edges; zero where there is none."""
        aggregation = self._aggregation(x.shape[1], "max")
        return self._returned(
            aggregation, edge_max(aggregation.edges, _below(*self._gathered(aggregation, x)))
        )[:, : x.shape[1]]

    def attention(self, left: Any, right: Any, a: Any) -> Any:
        """[rows, heads, features]: attention over in-edges and an edge to itself, as in `kernels.attention`; a [heads, features]."""
        rows, heads, width = left.shape
        aggregation = self._aggregation(heads * width, "attention")
        left = _below(*self._gathered(aggregation, left.reshape(rows, heads * width))).reshape(
            -1, heads, width
        )
        edges = aggregation.edges
        return attend(
            (edges.offsets, edges.ids),
            (edges.back_offsets, edges.back_ids),
            self.alone,
            left,
            right,
            a,
        )

    # ------------------------------------------------------------------------------------------------------------- exchanges

    def _aggregation(self, width: int, kind: str) -> Aggregation:
        """The way of the next aggregation."""
        calls = _calls.get()
        if calls is not None:
            calls.seen.append((width, kind))
            near = (
                [w for w in self.aggregations if w.near >= calls.whole - len(calls.seen)]
                if calls.whole
                else []
            )
            if near:
                return min(near, key=lambda w: w.near)
        columns = dict(self.columns).get(width, 1) if kind != "attention" else 1
        whole = [w for w in self.aggregations if w.near < 0]
        return next((w for w in whole if w.columns == columns), whole[0])

    def _gathered(self, aggregation: Aggregation, x: Any) -> tuple[Any, Any]:
        """(a slice of the features of all rows where devices share vertices, else the device's rows; the rows of the halo, or None)."""
        if aggregation.columns > 1:
            slices = jnp.pad(x, ((0, 0), (0, -x.shape[1] % aggregation.columns)))
            x = self._exchanged(aggregation, slices, 1, 0)
        return x, self._fetched(aggregation, x) if aggregation.halo else None

    def _fetched(self, aggregation: Aggregation, x: Any) -> Any:
        """The rows of the halo."""
        sent = self.entered(tuple(edge_sum(halo.pick, x) for halo in aggregation.halo))
        there = lambda shift: [
            (i, (i + shift * aggregation.columns) % self.parts) for i in range(self.parts)
        ]
        came = [
            jax.lax.ppermute(rows, AXIS, there(halo.shift))
            for rows, halo in zip(sent, aggregation.halo, strict=True)
        ]
        return jnp.concatenate(self.left(tuple(came)))

    def _returned(self, aggregation: Aggregation, y: Any) -> Any:
        """Rows of all features, some columns of zeros behind them, of what a way has summed."""
        return y if aggregation.columns == 1 else self._exchanged(aggregation, y, 0, 1)

    def _exchanged(self, aggregation: Aggregation, x: Any, cut: int, join: int) -> Any:
        """x cut along a dim and joined along the other, by the devices that share vertices."""
        groups = [
            list(range(i, i + aggregation.columns))
            for i in range(0, self.parts, aggregation.columns)
        ]
        return self.left(
            jax.lax.all_to_all(
                self.entered(x), AXIS, cut, join, axis_index_groups=groups, tiled=True
            )
        )

    def entered(self, values: Any) -> Any:
        """Values that go into an exchange, the time noted if it is wanted."""
        return stamp.enter(values, jax.lax.axis_index(AXIS)) if self.timed else values

    def left(self, values: Any) -> Any:
        """Values that came out of an exchange, the time noted if it is wanted."""
        return stamp.leave(values, jax.lax.axis_index(AXIS)) if self.timed else values

    def forked(self, x: Any) -> tuple[Any, Any]:
        """Rows twice, to sum and to send; the time is noted, if it is wanted, that is waited for the gradient of what was sent."""
        return stamp.fork(x, jax.lax.axis_index(AXIS)) if self.timed else (x, x)

    def met(self, own: Any, came: Any) -> tuple[Any, Any]:
        """What a device has and what came to it, the time noted, if it is wanted, that it waited for that."""
        return stamp.meet(own, came, jax.lax.axis_index(AXIS)) if self.timed else (own, came)


def _below(x: Any, came: Any) -> Any:
    """Rows, and those of the halo below them."""
    return x if came is None else jnp.concatenate([x, came])


def block_of(graph: Graph) -> Block:
    """The block of a whole graph, for one device."""
    back = graph.transposed(graph.weights is not None)
    edges = edges_of(
        graph.offsets,
        graph.sources,
        back if graph.weights is not None else replace(back, order=None),
    )
    return Block(
        *of_vertices(graph, 0, graph.vertices),
        np.zeros(1, np.int32),
        (Aggregation(edges, graph.weights),),
    )


def of_vertices(graph: Graph, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(degree, alone, load) of a block of the vertices from `first` to before `last`."""
    offsets = graph.offsets[first : last + 1]
    degree = np.diff(offsets).astype(np.float32)
    load = degree
    if graph.weights is not None:
        load = np.add.reduceat(
            np.append(graph.weights[offsets[0] : offsets[-1]], np.float32(0)),
            offsets[:-1] - offsets[0],
        ).astype(np.float32)
        load[degree == 0] = 0
    return degree, graph.without_self_edge(first, last).astype(np.int32), load


def edges_of(offsets: np.ndarray, ids: np.ndarray, back: Transposed) -> Edges:
    """Edges in the types that kernels read."""
    if len(ids) >= 2**31:
        raise GraphError(
            f"A device can hold {2**31 - 1:,} edges, and here are {len(ids):,}: split the graph over more devices."
        )
    narrow = lambda a: None if a is None else np.asarray(a).astype(np.int32, copy=False)
    return Edges(*map(narrow, (offsets, ids, back.offsets, back.destinations, back.order)))

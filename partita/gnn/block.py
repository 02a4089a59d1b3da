"""A graph on the devices, as layers see it: `Block` is the in-edges of one device's vertices, and what may be asked of them.

A layer asks for a sum, a mean, a maximum or attention over in-edges, and gets a row for each of its device's vertices. Where there are
several devices, each has a contiguous range of vertices, and the block first fetches the rows of other devices that its edges begin
at (`Halo`), each once. Gradients go back along the transpose, and through the same exchange the other way: they are exact for directed
graphs, repeated edges and self edges.

All that is here are arrays, so that a graph is an argument of a compiled step and not a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.errors import GraphError
from partita.gnn.graph import Graph, Transposed
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

    `ids[offsets[r]:offsets[r + 1]]` are the columns of row r, `back_ids[back_offsets[c]:back_offsets[c + 1]]` the rows of column c;
    `back_order[k]` is the position in `ids` of the edge at k in `back_ids`.
    """

    offsets: Any
    ids: Any
    back_offsets: Any
    back_ids: Any
    back_order: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Halo:
    """Rows that go from each device to the one `shift` further on: where from, as edges of which each row has one."""

    pick: Edges
    shift: int = field(metadata={"static": True})


@jax.custom_vjp
def edge_sum(edges: Edges, x: Any) -> Any:
    """[rows, features]: the sum of x over the edges of each row."""
    return total(edges.offsets, edges.ids, x)


def _sum_forward(edges: Edges, x: Any) -> Any:
    return edge_sum(edges, x), edges


def _sum_backward(edges: Edges, dy: Any) -> Any:
    return None, total(edges.back_offsets, edges.back_ids, dy)


edge_sum.defvjp(_sum_forward, _sum_backward)


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
    dw = jnp.where(used, (x[edges.ids] * dy[to]).sum(axis=1), 0)  # XLA leaves it out where nobody asks for it
    return None, dw, total(edges.back_offsets, edges.back_ids, dy, weights, edges.back_order)


weighted_sum.defvjp(_weighted_forward, _weighted_backward)


@jax.custom_vjp
def edge_max(edges: Edges, x: Any) -> Any:
    """[rows, features]: the maximum of x over the edges of each row, 0 where there is none. Of equal ones the first has the gradient."""
    return largest(edges.offsets, edges.ids, x)[0]


def _max_forward(edges: Edges, x: Any) -> Any:
    top, edge = largest(edges.offsets, edges.ids, x)
    return top, (edges, edge)


def _max_backward(saved: Any, dy: Any) -> Any:
    edges, edge = saved
    return None, largest_back(edges.back_offsets, edges.back_ids, edges.back_order, edge, dy)


edge_max.defvjp(_max_forward, _max_backward)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Block:
    """The in-edges of a device's vertices (its rows), from its own vertices and then those of the halo, in this order.

    degree     float32 [rows]: in-edges
    alone      int32 [rows]: 1 where a vertex has no edge to itself
    first      int32 [1]: the number of the first vertex in the whole graph
    weights    float32 [edges], or None
    load       float32 [rows]: the sum of the weights of the in-edges; `degree` without weights
    vertex     int32 [rows]: the user's numbers of the vertices where the graph was relabelled, else None
    timed      whether the times of exchanges are noted (`kernels.stamp`)
    """

    edges: Edges
    degree: Any
    alone: Any
    load: Any
    first: Any
    weights: Any = None
    halo: tuple[Halo, ...] = ()
    parts: int = field(default=1, metadata={"static": True})
    vertex: Any = None
    timed: bool = field(default=False, metadata={"static": True})

    @property
    def rows(self) -> int:
        return self.degree.shape[0]

    def fetched(self, x: Any) -> Any:
        """The device's rows, and below them those of the halo."""
        if not self.halo:
            return x
        sent = self.entered(tuple(edge_sum(halo.pick, x) for halo in self.halo))
        perms = [[(i, (i + halo.shift) % self.parts) for i in range(self.parts)] for halo in self.halo]
        came = [jax.lax.ppermute(rows, AXIS, perm) for rows, perm in zip(sent, perms, strict=True)]
        return jnp.concatenate([x, *self.left(tuple(came))])

    def entered(self, values: Any) -> Any:
        """Values that go into an exchange, the time noted if it is wanted."""
        return stamp.enter(values, jax.lax.axis_index(AXIS)) if self.timed else values

    def left(self, values: Any) -> Any:
        """Values that came out of an exchange, the time noted if it is wanted."""
        return stamp.leave(values, jax.lax.axis_index(AXIS)) if self.timed else values

    def sum(self, x: Any, weighted: bool = False) -> Any:
        """[rows, features]: the sum over in-edges, of rows times the edges' weights if `weighted` and the graph has some."""
        x = self.fetched(x)
        if weighted and self.weights is not None:
            return weighted_sum(self.edges, self.weights, x)
        return edge_sum(self.edges, x)

    def mean(self, x: Any) -> Any:
        """[rows, features]: the mean over in-edges; zero where there is none."""
        return self.sum(x) / jnp.maximum(self.degree, 1)[:, None]

    def max(self, x: Any) -> Any:
        """[rows, features]: the maximum over in-edges; zero where there is none."""
        return edge_max(self.edges, self.fetched(x))

    def attention(self, left: Any, right: Any, a: Any) -> Any:
        """[rows, heads, features]: attention over in-edges and an edge to itself, as in `kernels.attention`; a [heads, features]."""
        rows, heads, width = left.shape
        left = self.fetched(left.reshape(rows, heads * width)).reshape(-1, heads, width)
        edges = self.edges
        return attend((edges.offsets, edges.ids), (edges.back_offsets, edges.back_ids), self.alone, left, right, a)


def block_of(graph: Graph) -> Block:
    """The block of a whole graph, for one device."""
    edges = edges_of(graph.offsets, graph.sources, graph.transposed())
    degree = graph.in_degrees().astype(np.float32)
    load = degree
    if graph.weights is not None:
        load = np.add.reduceat(np.append(graph.weights, np.float32(0)), graph.offsets[:-1]).astype(np.float32)
        load[degree == 0] = 0
    return Block(edges, degree, alone(graph), load, np.zeros(1, np.int32), graph.weights)


def edges_of(offsets: np.ndarray, ids: np.ndarray, back: Transposed) -> Edges:
    """Edges in the types that kernels read."""
    if len(ids) >= 2**31:
        raise GraphError(
            f"A device can hold {2**31 - 1:,} edges, and here are {len(ids):,}: split the graph over more devices."
        )
    narrow = lambda a: np.asarray(a).astype(np.int32, copy=False)
    return Edges(*map(narrow, (offsets, ids, back.offsets, back.destinations, back.order)))


def alone(graph: Graph) -> np.ndarray:
    """int32 [vertices]: 1 where a vertex has no edge to itself."""
    to = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    found = np.ones(graph.vertices, np.int32)
    found[to[to == graph.sources]] = 0
    return found

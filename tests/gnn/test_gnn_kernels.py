"""Aggregations and their gradients are those of the dense matrix, for any directed graph, compiled or by XLA's own operations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partita.gnn import Graph
from partita.gnn.block import Block, block_of, weighted_sum
from partita.gnn.kernels import bridge
from partita.gnn.kernels.attention import SLOPE

EDGES = (0, 1, 7, 30)
"""Few sizes, so that few programs are compiled."""


@st.composite
def graphs(draw: Any) -> Graph:
    """Graphs with isolated vertices, repeated edges and self edges."""
    vertices, edges = draw(st.sampled_from((1, 6))), draw(st.sampled_from(EDGES))
    ids = st.lists(st.integers(0, vertices - 1), min_size=edges, max_size=edges)
    weights = draw(st.lists(st.sampled_from((-1.0, 0.0, 0.5, 2.0)), min_size=edges, max_size=edges))
    return Graph.from_edges(draw(ids), draw(ids), vertices, weights=weights)


NONE = Graph.from_edges([], [], 6, weights=[])
REPEATED = Graph.from_edges([0, 0, 0, 2, 2, 5, 5], [1, 1, 0, 2, 5, 2, 2], 6, weights=[1, 2, 3, 4, 5, 6, 7])


def matrix(graph: Graph, weighted: bool = False) -> np.ndarray:
    """A[v, u]: how many edges lead from u to v, or the sum of their weights."""
    dense = np.zeros((graph.vertices, graph.vertices), np.float32)
    to = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    np.add.at(dense, (to, graph.sources), graph.weights if weighted else 1)
    return dense


def dense_sum(graph: Graph, x: Any) -> Any:
    return matrix(graph) @ x


def dense_weighted(graph: Graph, x: Any) -> Any:
    return matrix(graph, True) @ x


def dense_mean(graph: Graph, x: Any) -> Any:
    return matrix(graph) @ x / np.maximum(matrix(graph).sum(1, keepdims=True), 1)


def dense_max(graph: Graph, x: Any) -> Any:
    there = matrix(graph) > 0
    top = jnp.where(there[:, :, None], x[None], -jnp.inf).max(axis=1, initial=-jnp.inf)
    return jnp.where(there.any(1)[:, None], top, 0)


HOW: dict[str, tuple[Callable[[Block, Any], Any], Callable[[Graph, Any], Any]]] = {
    "sum": (Block.sum, dense_sum),
    "weighted": (functools.partial(Block.sum, weighted=True), dense_weighted),
    "mean": (Block.mean, dense_mean),
    "max": (Block.max, dense_max),
}


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@jax.jit
def bent(y: Any) -> Any:
    """A loss that is not linear, so that the gradient depends on y."""
    return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape) / (y.size + 1))


@functools.partial(jax.jit, static_argnums=0)
def ours(how: str, block: Block, x: Any) -> Any:
    return HOW[how][0](block, x), jax.grad(lambda x: bent(HOW[how][0](block, x)))(x)


@pytest.fixture(params=["compiled", "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the compiled kernels, and with what takes their place."""
    if request.param == "plain":
        monkeypatch.setattr(bridge, "works", lambda kernel, what: False)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("columns", [1, 5, 12, 37])
def test_an_aggregation_is_that_of_the_dense_matrix(how: str, columns: int, kind: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(graphs())
    @example(NONE)
    @example(REPEATED)
    def holds(graph: Graph) -> None:
        x = values(graph.vertices, columns)
        y, dx = ours(how, block_of(graph), x)
        expected, pull = jax.vjp(lambda x: HOW[how][1](graph, x), x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, pull(jax.grad(bent)(expected))[0], rtol=1e-4, atol=1e-5)

    holds()


def test_of_equal_maxima_the_first_edge_has_the_gradient(kind: str) -> None:
    graph = Graph.from_edges([2, 0, 1], [0, 0, 0], 3)
    y, dx = jax.jit(jax.value_and_grad(lambda x, block: block.max(x).sum()))(np.ones((3, 1), np.float32), block_of(graph))
    assert y == 1 and dx.tolist() == [[0], [0], [1]]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(graphs())
@example(REPEATED)
def test_a_weight_of_an_edge_has_its_gradient_too(graph: Graph) -> None:
    x, block, to = values(graph.vertices, 3), block_of(graph), np.repeat(np.arange(graph.vertices), graph.in_degrees())
    dw = jax.jit(jax.grad(lambda w: bent(weighted_sum(block.edges, w, x))))(graph.weights)
    expected = jax.grad(lambda w: bent(jnp.zeros_like(x).at[to].add(w[:, None] * x[graph.sources])))(graph.weights)
    np.testing.assert_allclose(dw, expected, rtol=1e-4, atol=1e-5)


def dense_attention(graph: Graph, left: Any, right: Any, a: Any) -> Any:
    counts = matrix(graph) + np.diag(np.diag(matrix(graph)) == 0)
    z = left[None] + right[:, None]
    score = (a * jnp.where(z > 0, z, SLOPE * z)).sum(-1)
    top = jnp.where(counts[:, :, None] > 0, score, -jnp.inf).max(axis=1, keepdims=True)
    w = counts[:, :, None] * jnp.exp(score - jax.lax.stop_gradient(top))
    return jnp.einsum("vuh,uhc->vhc", w / w.sum(axis=1, keepdims=True), left)


def test_attention_is_that_of_the_dense_matrix(kind: str) -> None:
    attend = jax.jit(lambda block, *args: (block.attention(*args), jax.grad(lambda args: bent(block.attention(*args)))(args)))

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(graphs())
    @example(REPEATED)
    def holds(graph: Graph) -> None:
        args = values(graph.vertices, 2, 5), 3 * values(graph.vertices, 2, 5, seed=1), values(2, 5, seed=2)
        y, gradients = attend(block_of(graph), *args)
        expected, pull = jax.vjp(lambda *args: dense_attention(graph, *args), *args)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(gradients, pull(jax.grad(bent)(expected)), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)

    holds()


def test_threads_share_the_rows_by_their_edges() -> None:
    graph = Graph.from_edges([0] * 90 + [1] * 10, [3] * 90 + list(range(10)), 10)
    assert [bridge.rows_of(graph.offsets, part, 3) for part in range(3)] == [(0, 1), (1, 1), (1, 10)]


def test_a_kernel_that_does_not_work_is_said_once_and_replaced() -> None:
    def broken() -> None:
        raise OSError("no such code")

    with pytest.warns(UserWarning, match=r"The sum kernel does not work here \(OSError: no such code\); XLA's own operations take its place"):
        assert not bridge.works(broken, "sum")
    assert not bridge.works(broken, "sum")

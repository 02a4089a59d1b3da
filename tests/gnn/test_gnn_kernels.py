"""Aggregations and gradients equal those of the dense matrix, compiled or by XLA's operations."""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from partita.gnn import Graph
from partita.gnn.kernels import bridge, tall, total
from partita.gnn.kernels.attention import SLOPE
from partita.gnn.nn.block import Block, block_of, weighted_sum

VERTICES, EDGES = 6, 20
"""One size, so that few programs are compiled."""


@st.composite
def graphs(draw: Any) -> Graph:
    """Graphs with isolated vertices, repeated edges and self edges."""
    ids = st.lists(st.integers(0, VERTICES - 1), min_size=EDGES, max_size=EDGES)
    weights = draw(st.lists(st.sampled_from((-1.0, 0.0, 0.5, 2.0)), min_size=EDGES, max_size=EDGES))
    return Graph.from_edges(draw(ids), draw(ids), VERTICES, weights=weights)


NONE = Graph.from_edges([], [], 6, weights=[])
REPEATED = Graph.from_edges([0, 0, 0, 2, 2] * 4, [1, 1, 0, 2, 5] * 4, VERTICES, weights=range(20))


def matrix(graph: Graph, weighted: bool = False) -> np.ndarray:
    """A[v, u]: how many edges lead from u to v, or the sum of their weights."""
    dense = np.zeros((graph.vertices, graph.vertices), np.float32)
    to = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    np.add.at(dense, (to, graph.sources), graph.weights if weighted else 1)
    return dense


def dense_max(a: Any, w: Any, x: Any) -> Any:
    top = jnp.where((a > 0)[:, :, None], x[None], -jnp.inf).max(axis=1)
    return jnp.where((a > 0).any(1)[:, None], top, 0)


FACTORS = tuple(np.random.default_rng(3).uniform(-1, 2, (3, VERTICES)).astype(np.float32))
"""Factors of rows before the sum, of the own row, and after it; the second own row counts 0."""
FACTORS[1][1] = 0


def scaled(a: Any, x: Any) -> Any:
    before, share, after = (f[:, None] for f in FACTORS)
    return after * (a @ (before * x) + share * before * x)


HOW: dict[str, tuple[Callable[[Block, Any], Any], Callable[[Any, Any, Any], Any]]] = {
    "sum": (functools.partial(Block.sum, weighted=False), lambda a, w, x: a @ x),
    "weighted": (Block.sum, lambda a, w, x: w @ x),
    "scaled": (lambda block, x: Block.sum(block, x, False, *FACTORS), lambda a, w, x: scaled(a, x)),
    "after": (
        lambda block, x: block.sum(x, weighted=False, after=FACTORS[2]),
        lambda a, w, x: a @ x * FACTORS[2][:, None],
    ),
    "weighted and scaled": (
        lambda block, x: Block.sum(block, x, True, *FACTORS),
        lambda a, w, x: scaled(w, x),
    ),
    "mean": (Block.mean, lambda a, w, x: w @ x / jnp.maximum(a.sum(1, keepdims=True), 1)),
    "max": (Block.max, dense_max),
}
"""Each aggregation of a block, and of the dense matrix a with the weights w."""


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bent(y: Any) -> Any:
    """A loss that is not linear, so that the gradient depends on y."""
    return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape) / (y.size + 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def both(how: str, kind: str, block: Block, a: Any, w: Any, x: Any) -> Any:
    """(value, gradient) of a block's aggregation and of the dense one."""
    return [
        (f(x), jax.grad(lambda x, f=f: bent(f(x)))(x))
        for f in (lambda x: HOW[how][0](block, x), lambda x: HOW[how][1](a, w, x))
    ]


@pytest.fixture(params=["compiled", "plain"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """With the compiled kernels, and with their fallbacks."""
    if request.param == "plain":
        monkeypatch.setattr(bridge, "works", lambda self_test, name: False)
    return request.param


@pytest.mark.parametrize(
    ("how", "columns"),
    [
        ("sum", 3),
        ("sum", 6),
        ("sum", 12),
        ("sum", 213),
        ("weighted", 3),
        ("weighted", 6),
        ("weighted", 12),
        ("weighted", 213),
        ("scaled", 3),
        ("scaled", 90),
        ("after", 6),
        ("weighted and scaled", 6),
        ("mean", 5),
        ("max", 5),
    ],
)
def test_an_aggregation_equals_that_of_the_dense_matrix(how: str, columns: int, kind: str) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(graphs())
    @example(NONE)
    @example(REPEATED)
    def holds(graph: Graph) -> None:
        x = values(graph.vertices, columns)
        # Weights of a maximum would be refused.
        block = block_of(replace(graph, weights=None) if how == "max" else graph)
        (y, dx), (expected, dx_expected) = both(
            how, kind, block, matrix(graph), matrix(graph, True), x
        )
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dx, dx_expected, rtol=1e-3, atol=1e-4)

    holds()


@pytest.mark.parametrize("implementation", ["compiled", *total.FALLBACKS])
def test_padding_behind_the_last_row_counts_nothing(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if implementation != "compiled":
        monkeypatch.setattr(bridge, "works", lambda self_test, name: False)
        monkeypatch.setattr(total, "fastest", lambda: implementation)
    offsets, ids = np.array([0, 1, 3], np.int32), np.array([1, 0, 1, 0, 0, 0], np.int32)
    x, weights = values(2, 5), np.arange(1, 7, dtype=np.float32)
    np.testing.assert_allclose(
        jax.jit(total.total)(offsets, ids, x), [x[1], x[0] + x[1]], rtol=1e-5
    )
    np.testing.assert_allclose(
        jax.jit(total.total)(offsets, ids, x, weights), [x[1], 2 * x[0] + 3 * x[1]], rtol=1e-5
    )


def test_the_fastest_correct_fallback_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(offsets: Any, ids: Any, x: Any, weights: Any) -> Any:
        return jnp.zeros((offsets.shape[0] - 1, x.shape[1]))

    def broken(offsets: Any, ids: Any, x: Any, weights: Any) -> Any:
        raise NotImplementedError("not on this device")

    monkeypatch.setattr(
        total,
        "FALLBACKS",
        {"wrong": wrong, "broken": broken, "segments": total.FALLBACKS["segments"]},
    )
    assert total.fastest.__wrapped__() == "segments"


def test_of_equal_maxima_the_first_edge_has_the_gradient(kind: str) -> None:
    graph = Graph.from_edges([2, 0, 1], [0, 0, 0], 3)
    y, dx = jax.jit(jax.value_and_grad(lambda x, block: block.max(x).sum()))(
        np.ones((3, 1), np.float32), block_of(graph)
    )
    assert y == 1 and dx.tolist() == [[0], [0], [1]]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(graphs())
@example(REPEATED)
def test_a_weight_of_an_edge_has_its_gradient_too(graph: Graph) -> None:
    x, to = values(graph.vertices, 3), np.repeat(np.arange(graph.vertices), graph.in_degrees())
    computed, expected = weight_gradients(block_of(graph), graph.weights, x, graph.sources, to)
    np.testing.assert_allclose(computed, expected, rtol=1e-3, atol=1e-4)


@jax.jit
def weight_gradients(block: Block, w: Any, x: Any, source: Any, target: Any) -> Any:
    computed = lambda w: bent(weighted_sum(block.aggregations[0].edges, w, x))
    return jax.grad(computed)(w), jax.grad(
        lambda w: bent(jnp.zeros_like(x).at[target].add(w[:, None] * x[source]))
    )(w)


def dense_attention(edges: Any, left: Any, right: Any, a: Any) -> Any:
    counts = jnp.fill_diagonal(edges, 1, inplace=False)
    z = left[None] + right[:, None]
    score = (a * jnp.where(z > 0, z, SLOPE * z)).sum(-1)
    top = jnp.where(counts[:, :, None] > 0, score, -jnp.inf).max(axis=1, keepdims=True)
    w = counts[:, :, None] * jnp.exp(score - jax.lax.stop_gradient(top))
    return jnp.einsum("vuh,uhc->vhc", w / w.sum(axis=1, keepdims=True), left)


def test_attention_equals_that_of_the_dense_matrix(kind: str) -> None:
    @jax.jit
    def both(block: Block, edges: Any, args: Any) -> Any:
        implementations = (
            lambda args: block.attention(*args),
            lambda args: dense_attention(edges, *args),
        )
        return [(f(args), jax.grad(lambda args, f=f: bent(f(args)))(args)) for f in implementations]

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(graphs())
    @example(REPEATED)
    def holds(graph: Graph) -> None:
        args = (
            values(graph.vertices, 2, 5),
            3 * values(graph.vertices, 2, 5, seed=1),
            values(2, 5, seed=2),
        )
        unweighted = replace(graph, weights=None)
        computed, dense = both(block_of(unweighted), matrix(graph), args)
        for a, b in zip(jax.tree.leaves(computed), jax.tree.leaves(dense), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

    holds()


@pytest.mark.parametrize(
    ("rows", "a", "b"),
    [(1, 1, 1), (63, 3, 64), (64, 64, 3), (130, 5, 29), (1000, 66, 90), (200, 300, 300)],
)
def test_the_gradient_of_a_matrix_equals_the_product_over_all_rows(
    rows: int, a: int, b: int, kind: str
) -> None:
    x, w, y = values(rows, a), values(a, b, seed=1), values(rows, b, seed=2)
    dx, dw = jax.jit(jax.grad(lambda x, w: jnp.sum(tall.product(x, w) * y), (0, 1)))(x, w)
    np.testing.assert_allclose(dx, y @ w.T, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dw, np.float64(x).T @ y, rtol=1e-4, atol=1e-4)


def test_threads_divide_rows_by_edges() -> None:
    graph = Graph.from_edges([0] * 90 + [1] * 10, [3] * 90 + list(range(10)), 10)
    assert [bridge.rows_of(graph.offsets, part, 3) for part in range(3)] == [
        (0, 4),
        (4, 4),
        (4, 10),
    ]


def test_a_broken_kernel_warns_once_and_is_replaced() -> None:
    def broken() -> None:
        raise OSError("no such code")

    with pytest.warns(
        UserWarning,
        match=r"The sum kernel failed its self-test \(OSError: no such code\): XLA",
    ):
        assert not bridge.works(broken, "sum")
    assert not bridge.works(broken, "sum")


def test_a_long_compilation_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bridge, "ANNOUNCED_AFTER", 0.01)
    assert bridge.works(lambda: time.sleep(0.1), "slow")
    monkeypatch.setattr(bridge, "ANNOUNCED_AFTER", 10.0)
    assert bridge.works(lambda: None, "quick")
    assert capsys.readouterr().err == (
        "partita: compiling the slow kernel for this processor, once\n"
    )

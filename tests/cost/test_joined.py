"""Kernels that XLA:GPU joins: reads that siblings and producers save, on a normalized product."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.cost.backends import compiler_of
from partita.cost.fusion import fusion
from partita.cost.joined import joined_reads
from partita.cost.terms import cost_terms
from partita.machine import load

GPU = load("h100:1")
CPU = replace(GPU.backend, platform="cpu")
ROWS, WIDTH = 256, 128


@pytest.fixture(scope="module")
def graph():
    def step(state, x):
        h = x @ state[0]
        mean, square = h.mean(0), (h * h).mean(0)
        normal = (h - mean) * jax.lax.rsqrt(square - mean * mean)
        return {"loss": jnp.tanh(normal).sum()}, (state[0] + normal.T @ x,)

    shape = jax.ShapeDtypeStruct
    return capture_step(
        step,
        (shape((WIDTH, WIDTH), "float32"),),
        shape((ROWS, WIDTH), "float32"),
        [Leaf("w", "parameter")],
        batch_size=ROWS,
    ).graph


def saved(graph):
    fused = fusion(graph, compiler_of(GPU.backend).fusion_rules)
    names = graph.instructions
    return {(names[root].name, tensor) for root, tensor in joined_reads(graph, fused)}


def test_both_moments_read_the_product_once(graph):
    product = next(x.results[0] for x in graph.instructions if x.name == "dot_general")
    # Of the two sums one reads it; the normalization needs both first, and reads it again.
    assert [name for name, tensor in saved(graph) if tensor == product] == ["reduce"]


def test_a_result_is_not_read_by_its_own_kernel(graph):
    normal = next(t for name, t in saved(graph) if graph.tensors[t].shape == (ROWS, WIDTH))
    assert normal >= 0
    whole = sum(nbytes for nbytes, _ in traffic(graph, CPU))
    joined = sum(nbytes for nbytes, _ in traffic(graph, GPU.backend))
    # The second read of the product by a moment, at least.
    assert joined <= whole - ROWS * WIDTH * 4


def traffic(graph, backend):
    works = [work for operator in cost_terms(graph, backend).operators for work in operator.work]
    return [entry for work in works for entry in work.traffic]

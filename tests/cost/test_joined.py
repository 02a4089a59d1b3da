"""Kernels that XLA:GPU joins: reads that siblings and producers save, on a normalized product."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from partita.capture.jax_functions import Leaf, capture_step
from partita.cost.backends import compiler_of
from partita.cost.fusion import fusion, reads
from partita.cost.joined import _without_light, computed_together, joined_kernels
from partita.cost.laid_out_fusion import fused_under
from partita.cost.lifetimes import lifetimes_under
from partita.cost.terms import cost_terms
from partita.graph.operator_graph import IdentityKey, OperatorGraph, constant_tensors
from partita.graph.rematerialize import rematerialized
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.search.find import mesh_of
from partita.search.rematerialization import groupings

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
    joined = joined_kernels(graph, fused)
    return {(names[root].name, tensor) for root, tensor in joined.saved}


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


@pytest.fixture(scope="module")
def biased():
    """Two products and a convolution with biases, the update of their variables in one kernel."""

    def step(state, x):
        def loss(variables):
            first, second, third, bias = variables
            window = jax.lax.conv_general_dilated(
                x.reshape(4, 8, 8, WIDTH),
                third,
                (1, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
            rows = (window + bias).reshape(ROWS, WIDTH)
            return jnp.einsum("ra,rb->ab", rows @ first + bias, rows @ second + bias).sum()

        value, gradients = jax.value_and_grad(loss)(state)
        return {"loss": value}, tuple(w - g * g for w, g in zip(state, gradients, strict=True))

    shape = jax.ShapeDtypeStruct
    sizes = ((WIDTH, WIDTH), (WIDTH, WIDTH), (3, 3, WIDTH, WIDTH), (WIDTH,))
    names = ("first", "second", "third", "bias")
    return capture_step(
        step,
        tuple(shape(size, "float32") for size in sizes),
        shape((ROWS, WIDTH), "float32"),
        [Leaf(name, "parameter") for name in names],
        batch_size=ROWS,
    ).graph


def test_the_library_of_a_product_adds_its_bias(biased):
    fused = fusion(biased, compiler_of(GPU.backend).fusion_rules)
    roots = joined_kernels(biased, fused).biases
    results = [biased.tensors[biased.instructions[root].results[0]].shape for root in roots]
    # Of the convolution alone, for the products of its rows; these are merged, and share a kernel
    # for their biases.
    assert results == [(ROWS, WIDTH)]
    assert all(biased.instructions[root].name == "reshape" for root in roots)


def test_a_part_of_a_kernel_is_not_launched(graph):
    launches = {backend.platform: count(graph, backend) for backend in (CPU, GPU.backend)}
    # Both moments are one kernel on a GPU.
    assert launches["cuda"] < launches["cpu"]


def count(graph, backend):
    works = [work for operator in cost_terms(graph, backend).operators for work in operator.work]
    return sum(work.launches for work in works)


def test_a_kernel_that_joins_its_producer_reads_their_operand_once():
    """x^3 from a stored x^2: one kernel reads x and writes both."""

    def step(state, x):
        square = (x + state[0]) ** 2
        return {"square": square, "cube": square * x}, (state[0] + 1.0,)

    shape = jax.ShapeDtypeStruct
    state = (shape((WIDTH,), "float32"),)
    leaves = [Leaf("w", "parameter")]
    powers = capture_step(step, state, shape((ROWS, WIDTH), "float32"), leaves, batch_size=ROWS)
    table = ROWS * WIDTH * 4
    whole = [nbytes for nbytes, _ in traffic(powers.graph, GPU.backend) if nbytes >= table]
    assert sum(whole) == 3 * table


def products_of(values):
    """The graph of a step with a product of each value of x, and the lifetimes of its values."""

    def step(state, x):
        w = state[0]
        return {"loss": sum((value @ w).sum() for value in values(x, w))}, (w + 1.0,)

    shape = jax.ShapeDtypeStruct
    state = (shape((WIDTH, WIDTH), "float32"),)
    leaves = [Leaf("w", "parameter")]
    graph = capture_step(
        step, state, shape((ROWS, WIDTH), "float32"), leaves, batch_size=ROWS
    ).graph
    plan = BASELINES["one device"](graph, GPU.name, mesh_of(GPU))
    layout = layout_of(graph, plan)
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    together = [
        tuple(graph.instructions[root].name for root in roots)
        for roots in computed_together(graph, layout, fused)
    ]
    keys = IdentityKey(graph), IdentityKey(layout)
    return graph, together, lifetimes_under(*keys, plan.mesh, GPU.backend)


def roots_named(graph, *names):
    """The instructions of each name, which has one."""
    return [next(i for i, x in enumerate(graph.instructions) if x.name == name) for name in names]


def test_a_kernel_runs_after_the_operands_of_all_its_results():
    def values(x, w):
        yield jnp.tanh(x)
        yield x * (x @ w.T)

    graph, together, lifetimes = products_of(values)
    assert together == [("tanh", "multiply")]
    tanh, multiply = roots_named(graph, "tanh", "multiply")
    (first,) = graph.instructions[tanh].results
    product = next(i for i, x in enumerate(graph.instructions) if first in x.operands)
    assert product < multiply
    assert lifetimes.dies[first] == multiply, "its result is in memory beside the other one"


def test_an_elementwise_kernel_replaces_an_operand_that_nothing_reads_afterwards():
    def values(x, w):
        yield jnp.tanh(x @ w.T)
        product = x @ w
        yield jnp.cos(product)
        yield jnp.sin(product) * jax.nn.softmax(x)

    graph, _, lifetimes = products_of(values)
    tanh, *_ = roots_named(graph, "tanh")
    assert lifetimes.replaced == set(graph.instructions[tanh].operands)


def test_a_kernel_needs_none_of_its_results_through_another():
    def values(x, w):
        other = x @ w.T
        first = jnp.tanh(x)
        yield first
        yield x * other
        # Reads what the second kernel reads, and the first one's product.
        yield jnp.cos(other) * (first @ w.T)

    graph, together, _ = products_of(values)
    assert together == [("tanh", "multiply")]


def test_kernels_that_compute_a_light_value_are_joined_through_its_operand():
    def values(x, w):
        product = x @ w.T
        total = x + product
        yield jnp.cos(total)
        # The softmax, a kernel of rows, is not joined. The multiplication needs it.
        yield product * (jax.nn.softmax(total) @ w)

    _, together, _ = products_of(values)
    assert together == [("cosine", "multiply")]


def test_a_value_that_many_kernels_read_is_written():
    def values(x, w):
        product = x @ w.T
        total = x + product
        yield jnp.cos(total)
        yield product * (jax.nn.softmax(total) @ w)
        # Five kernels would read ten tensors. The sum and its readers move eight.
        for scale in (2.0, 3.0, 4.0):
            yield jax.nn.softmax(total * scale)

    _, together, _ = products_of(values)
    assert together == [("add", "cosine")]


def test_constants_join_no_kernels():
    graph = OperatorGraph.load(Path(__file__).parents[1] / "data/transformer.graph.json")
    runs = groupings(graph, cost_terms(graph, GPU.backend))[0]
    again = rematerialized(graph, runs)
    constants = constant_tensors(again)
    layout = layout_of(again, BASELINES["one device"](again, GPU.name, mesh_of(GPU)))
    fused = fused_under(again, layout, compiler_of(GPU.backend).fusion_rules)
    every = {root: reads(again, kernel) for root, kernel in fused.kernels.items()}
    reads_of = _without_light(again, fused, every, set())
    # A rematerialized run shares constants with its original.
    assert any(tensors & constants for tensors in reads_of.values())
    for roots in computed_together(again, layout, fused):
        for root in roots:
            own = reads_of[root] - constants | set(again.instructions[root].results)
            others = set().union(*(reads_of[other] for other in roots if other != root))
            results = {
                t for other in roots if other != root for t in again.instructions[other].results
            }
            assert own & (others | results)


@pytest.mark.parametrize("runs", [1, 2])
def test_values_of_two_rematerialized_runs_are_not_joined(runs):
    """The second run waits for the products of the gradients of the first one."""

    def values(x, w):
        yield x
        yield jnp.tanh(x)
        yield jnp.cos(x)

    graph, *_ = products_of(values)
    last = max(roots_named(graph, "tanh", "cosine"))
    products = [i for i, x in enumerate(graph.instructions) if x.name == "dot_general"]
    assert products[1] < last
    backward = products if runs == 2 else products[:1]
    phases = ["backward" if i in backward else "forward" for i in range(len(graph.instructions))]
    instructions = [replace(x, phase=p) for x, p in zip(graph.instructions, phases, strict=True)]
    graph = replace(graph, instructions=tuple(instructions))
    layout = layout_of(graph, BASELINES["one device"](graph, GPU.name, mesh_of(GPU)))
    fused = fused_under(graph, layout, compiler_of(GPU.backend).fusion_rules)
    assert len(computed_together(graph, layout, fused)) == 2 - runs

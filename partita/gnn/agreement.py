"""A test before training: a network of one's own gives one device's numbers on several devices.

A step over a small random graph runs as `fit` would run it, and on one device over all edges. Loss,
gradients and changed variables must agree up to rounding, and so must the output without training.
They differ if the network combines vertices outside of the aggregations of `graph`: Keras's
BatchNormalization and Dropout, penalties on features, means over rows. They differ on any number of
devices above one, so that one number is tested. The price: two small compilations, once per model.

An exchange in a branch would wait for devices that take another branch. It is found in the traced
step, before that runs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from partita.errors import GraphError
from partita.execute import process_arrays
from partita.files.reading import short_reason
from partita.gnn.data.graph import Graph
from partita.gnn.nn.rows import is_by_rows, is_ours, penalizes
from partita.gnn.nn.vertices import SeededDropout
from partita.gnn.prepare import Architecture, PreparationKey, PreparedGraph, Split, prepare
from partita.gnn.step import (
    StepState,
    differentiated,
    inner_programs,
    on_all_devices,
    on_each_device,
    state_of,
)

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest relative difference by rounding, by the number type that a model computes in."""

ROUNDING = 1e-5
"""Share of the largest result below which differences are rounding."""


CALLS = ("call", "add_loss", "call without training")
"""Parts of a network that are compared."""

EXCHANGES = ("ppermute", "all_to_all", "psum", "pmax", "pmin", "all_gather")
"""Operations of a program by which devices exchange numbers."""


def check_agreement(model: Any, graph: Graph, split: Split, architecture: Architecture) -> None:
    """GraphError, which names the layer, if a step would not give one device's numbers."""
    layers = model._flatten_layers()
    if split.devices > 1 and any(map(penalizes, layers)):
        # It divides by the rows of each device, padding included: a small error, but never none.
        raise GraphError(_refusal(model, split.devices, architecture))
    alone = replace(architecture, by_vertex=False)
    sample = _sample(graph, split.devices)
    try:
        expected = _step_values(model, sample, Split(), alone)
    except (IndexError, TypeError, ValueError) as error:
        raise GraphError(
            f"{type(model).__name__} fails on {sample.vertices} vertices, and parts have any "
            f"number of them: {short_reason(str(error))}. Write a call that takes any number of "
            "rows, or use devices=1."
        ) from error
    if not all(np.isfinite(array).all() for group in expected for array in group):
        # logarithms and distances may need numbers like those of the graph
        sample = _sample_like(graph, sample)
        expected = _step_values(model, sample, Split(), alone)
    given = _step_values(model, sample, Split(split.devices, columns=1), architecture)
    tolerance = TOLERANCES.get(model.compute_dtype, ROUNDING)
    for call, ones, others in zip(CALLS, expected, given, strict=True):
        if not _agree(ones, others, tolerance):
            raise GraphError(_refusal(model, split.devices, architecture, call))


def _agree(expected: list[np.ndarray], given: list[np.ndarray], tolerance: float) -> bool:
    """Whether arrays are equal up to rounding."""
    largest = max(float(np.abs(array).max(initial=0)) for array in expected)
    for one, several in zip(expected, given, strict=True):
        bound = tolerance * np.linalg.norm(one) + ROUNDING * largest * one.size**0.5
        if not np.linalg.norm(one - several) <= bound:
            return False
    return True


def _sample(graph: Graph, devices: int) -> Graph:
    """A small random graph with tables like those of `graph`.

    Every part has vertices, and few vertices are near those of training.
    """
    random = np.random.default_rng(0)
    vertices = 60 + 4 * devices
    sources, targets = random.integers(0, vertices, (2, vertices))
    tables: dict[str, Any] = {}
    if graph.labels is not None:
        if graph.has_targets:
            labels = random.random((vertices, graph.classes)) > 0.5
            tables["labels"] = labels.astype(np.float32)
        else:
            tables["labels"] = random.integers(0, graph.classes, vertices)
    sample = Graph.from_edges(
        sources,
        targets,
        vertices,
        features=random.standard_normal((vertices, graph.feature_count)),
        train=np.arange(vertices) % 30 == 0,
        weights=None if graph.weights is None else 0.5 + random.random(vertices),
        edge_features=_edge_features(graph, vertices, random),
        members=None if graph.members is None else np.arange(vertices) // 7,
        **tables,
    )
    if sample.has_targets and sample.labels is not None:
        return replace(sample, labels=sample.labels.reshape(vertices, graph.classes))
    return sample


def _sample_like(graph: Graph, sample: Graph) -> Graph:
    """A sample with numbers near those of `graph`, and as it, with or without self edges and
    vertices without in-edges."""
    random = np.random.default_rng(1)
    count = sample.vertices

    def near(table: Any) -> Any:
        if table is None:
            return None
        if not len(table):
            return np.ones((count, *table.shape[1:]))
        chosen = np.asarray(table[np.sort(random.integers(0, len(table), count))])
        return chosen * random.uniform(0.9, 1.1, chosen.shape)

    targets = random.permutation(count)
    if (graph.in_degrees() == 0).any():
        targets = random.integers(0, count, count)
    sources = (targets + random.integers(1, count, count)) % count
    corrections = replace(graph, weights=None).self_edge_corrections(0, graph.vertices)
    if (corrections != 1).any():
        sources[::7] = targets[::7]
    like = Graph.from_edges(
        sources,
        targets,
        count,
        features=near(graph.features),
        train=sample.train,
        weights=near(graph.weights),
        edge_features=near(graph.edge_features),
        members=sample.members,
    )
    return replace(like, labels=sample.labels)


def _edge_features(graph: Graph, edges: int, random: np.random.Generator) -> Any:
    if graph.edge_features is None:
        return None
    return random.standard_normal((edges, graph.edge_features.shape[1]))


def _step_values(
    model: Any, sample: Graph, split: Split, architecture: Architecture
) -> list[list[np.ndarray]]:
    """Numbers of a step on a sample, for each of `CALLS`.

    They are loss, gradients and variables after, those that are no integers; penalties; the output
    without training.
    """
    prepared = prepare(sample, PreparationKey(sample.digest, split, architecture))
    state = on_all_devices(state_of(model)._replace(optimizer=[]), split.devices)
    step = partial(_differentiated_step, model, _aggregations(prepared))
    program = jax.jit(on_each_device(step, split.devices, (False, True), gives_own=True))
    traced = program.trace(state, prepared.data)
    if split.devices > 1 and _has_exchange_in_branch(traced.jaxpr):
        raise GraphError(
            f"{type(model).__name__} aggregates in a branch of cond or in a while_loop, where "
            "devices would wait for those that take another branch: aggregate outside and use "
            "jnp.where, or use devices=1."
        )
    values, penalties, predicted = program(state, prepared.data)
    rows = prepared.in_given_order(process_arrays.whole(predicted))
    return [_floats(values, split), _floats(penalties, split), [rows.astype(np.float64)]]


def _floats(values: Any, split: Split) -> list[np.ndarray]:
    """The arrays of one device that are no integers."""
    arrays = [leaf.addressable_data(0) for leaf in jax.tree.leaves(values)]
    floats = [array for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)]
    own = [array[0] if split.devices > 1 else array for array in floats]
    return [np.asarray(array).astype(np.float64) for array in own]


def _has_exchange_in_branch(jaxpr: Any, in_branch: bool = False) -> bool:
    """Whether devices exchange numbers in a program that a device may run or not."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if in_branch and name in EXCHANGES:
            return True
        branches = in_branch or name in ("cond", "while")
        if any(_has_exchange_in_branch(inner, branches) for inner in inner_programs(equation)):
            return True
    return False


def _aggregations(prepared: PreparedGraph) -> int:
    architecture = prepared.key.architecture
    return len(architecture.aggregations) if architecture.by_vertex else 0


def _differentiated_step(model: Any, aggregations: int, state: StepState, data: Any) -> Any:
    gradients, value, _, others = differentiated(model, aggregations, state, data)
    predicted, _, penalties = model.stateless_call(
        state.trainable, state.others, data.x, graph=data.block, training=False, return_losses=True
    )
    penalty = data.block.sum_over_devices(jnp.asarray(sum(penalties), jnp.float32))
    return (value, gradients, others), penalty / data.block.parts, predicted.astype(jnp.float32)


def is_known_to_agree(model: Any) -> bool:
    """Whether a model is of this package, with no layer that may combine vertices by itself."""
    inner = model._flatten_layers(include_self=False)
    return is_ours(model) and all(map(is_by_rows, inner))


def _refusal(model: Any, devices: int, architecture: Architecture, call: str = "call") -> str:
    name = type(model).__name__
    suspects = [text for text in map(_suspicion, model._flatten_layers()) if text]
    reason = suspects[0] if suspects else f"its {call} combines the rows of vertices. {ADVICE}"
    if devices == 1 and architecture.by_vertex:
        return (
            f"{name} sets by_vertex = True, and not only its aggregations combine vertices: "
            f"{reason}, or remove by_vertex."
        )
    return (
        f"{name} gives other numbers on {devices} devices than on one: {reason}, or use devices=1."
    )


ADVICE = (
    "Use graph.vertex_sum and graph.vertex_mean of its argument graph for sums, means and "
    "penalties of rows, and gnn.VertexDropout for random numbers"
)


def _suspicion(layer: Any) -> str | None:
    """Why a layer's numbers depend on the devices, and its replacement; None if they do not."""
    title = f"{type(layer).__name__} {layer.name!r}"
    if isinstance(layer, keras.layers.BatchNormalization):
        return (
            f"{title} averages over the vertices of each device. Use gnn.VertexBatchNormalization"
        )
    if penalizes(layer):
        return (
            f"{title} penalizes the rows of each device. Use "
            "self.add_loss(graph.vertex_sum(penalties)) in the model's call"
        )
    by_vertex = isinstance(layer, SeededDropout)
    if getattr(layer, "seed_generator", None) is not None and not by_vertex:
        return f"{title} draws random numbers on each device. Use gnn.VertexDropout"
    return None

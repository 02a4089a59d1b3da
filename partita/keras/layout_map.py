"""A plan as a plain `keras.distribution.LayoutMap`, for use without Partita."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from partita.capture.program import capture_program
from partita.errors import PlanError
from partita.planning import check_types
from partita.plans.check import check
from partita.plans.layout import layout_of
from partita.plans.plan import Plan

Axes = tuple[int, ...]
"""Indices of the mesh axes that split a dim."""
ALTERNATIVE = "Use partita.parallelize(model, plan=plan) instead."


def layout_map(plan: Plan, model: Any, batch_size: int | None = None) -> Any:
    """A LayoutMap that lays out the variables of a compiled Keras model as a plan does.

    Keras then partitions the step by its own propagation: the layouts of the variables are the
    plan's, all others are chosen by XLA. PlanError if a Keras layout, which takes one whole axis
    per dim, cannot express the plan.
    """
    check_types(plan=plan)
    dims_of = _parameter_dims(plan, model, batch_size)
    merged = _merged_axes(dims_of)
    used = {axis for axes in merged for axis in axes}
    unused = [(axis,) for axis in range(len(plan.mesh.axes)) if axis not in used]
    grid = sorted([*merged, *unused])
    if [axis for axes in grid for axis in axes] != list(range(len(plan.mesh.axes))):
        raise PlanError(
            "This plan has no LayoutMap: the axes that it combines are not neighbours. "
            f"{ALTERNATIVE}"
        )
    names = {axes: "_".join(plan.mesh.axes[axis].name for axis in axes) for axes in grid}
    shape = [math.prod(plan.mesh.sizes[axis] for axis in axes) for axes in grid]
    device_mesh = keras.distribution.DeviceMesh(
        shape or [1],
        list(names.values()) or ["a"],
        _devices(plan.devices),
    )
    result = keras.distribution.LayoutMap(device_mesh)
    for path, dims in dims_of.items():
        result[path] = tuple(names[axes] if axes else None for axes in dims)
    return result


def _parameter_dims(plan: Plan, model: Any, batch_size: int | None) -> dict[str, list[Axes]]:
    """Per parameter path, the axes that split each of its dims."""
    graph = capture_program(
        model, batch_size or plan.batch_size or None, target=plan.target or None
    ).graph
    resting = layout_of(graph, check(plan, graph)).shardings
    return {
        argument.path: [tuple(axes) for axes in resting[argument.tensor]]
        for argument in graph.arguments
        if argument.role == "parameter"
    }


def _merged_axes(dims_of: Mapping[str, Sequence[Axes]]) -> list[Axes]:
    """The axes that always split a dim together, each group of which becomes one Keras axis."""
    blocks = {axes for dims in dims_of.values() for axes in dims if axes}
    merged: list[Axes] = []
    for block in sorted(blocks, key=lambda axes: (-len(axes), axes)):
        if any(set(block) & set(other) for other in merged):
            path = next(path for path, dims in dims_of.items() if block in dims)
            raise PlanError(
                f"This plan has no LayoutMap: it splits a dim of '{path}' over some of the axes "
                "that split another variable's dim, "
                f"and a Keras layout takes one whole axis per dim. {ALTERNATIVE}"
            )
        merged.append(block)
    return merged


def _devices(count: int) -> list[str]:
    """The first devices that Keras lists."""
    available = keras.distribution.list_devices()
    if len(available) < count:
        raise PlanError(
            f"The plan is for {count} devices, and Keras lists {len(available)}. Plan again for "
            f"{len(available)}."
        )
    return available[:count]

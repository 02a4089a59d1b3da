"""Whether training on a graph fits into the devices, before anything large is allocated.

Most graphs are far below the memory of a device: a lower bound from their sizes tells so at once.
Near the limit the step is captured, and the peak of its simulation counts (`plans`): on CPUs 5 to
12 % above that of the compiler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from partita.errors import GraphError
from partita.execute.devices import at_hand
from partita.gnn.data.graph import Graph
from partita.gnn.prepare import BY_EDGES, PreparationKey
from partita.machine import Machine
from partita.search.find import capacity
from partita.units import format_bytes

CLEARLY = 8
"""Ratio of a device's memory to the lower bound from which a step certainly fits."""

WORK_SPACE = 2**27
"""Bytes that libraries may take beside, of which the lower bound knows nothing."""

VERTEX_ARRAYS = 7
"""Arrays of 4 bytes per vertex beside features: label, masks, degree, self edge, weight sum."""


def check_fits(
    model: Any, graph: Graph, key: PreparationKey, machine: Machine | None = None
) -> None:
    """GraphError unless a training step fits into each device. The model is built.

    `machine`: by default the devices at hand.
    """
    devices = key.split.devices
    machine = machine or at_hand(devices)
    available = capacity(machine)
    needed = least_bytes(model, graph, key)
    products = 4 * key.architecture.matrix_columns * -(-graph.vertices // devices)
    certain = CLEARLY * (needed + products) + _edge_rows_bytes(graph, key) + WORK_SPACE
    if certain <= available:
        return
    if needed <= available:
        from partita.gnn.plans import plan_of  # most trainings start without the simulator

        partition = "edges" if key.split.learns else key.split.partition
        split = replace(key.split, partition=partition, columns=1)
        needed = plan_of(model, graph, replace(key, split=split), machine).needed_bytes
    if needed <= available:
        return
    raise GraphError(
        f"Training '{model.name}' on '{graph.name}' needs {format_bytes(needed)} of each device, "
        f"and a step may use {format_bytes(available)}: {_fix(machine, devices, needed)}"
    )


def least_bytes(model: Any, graph: Graph, key: PreparationKey) -> int:
    """Lower bound of the bytes that the largest part needs: data, variables, aggregated rows."""
    devices = key.split.devices
    rows = -(-graph.vertices // devices)
    edges = -(-graph.edges // devices)
    features = graph.feature_count + VERTEX_ARRAYS
    edge_arrays = 2 if graph.weights is None else 4
    if graph.edge_features is not None:
        edge_arrays += 1 + graph.edge_features.shape[1]
    widths = sum(width for width, _ in key.architecture.aggregations)
    variables = sum(variable.value.nbytes for variable in model.variables)
    return 4 * (rows * (features + widths) + edges * edge_arrays) + variables


def _edge_rows_bytes(graph: Graph, key: PreparationKey) -> int:
    """Bytes of a row for every edge, in layers that may store one."""
    widths = [width for width, kind in key.architecture.aggregations if kind in BY_EDGES]
    return CLEARLY * 4 * sum(widths) * -(-graph.edges // key.split.devices)


def _fix(machine: Machine, devices: int, needed: int) -> str:
    """Ways to train all the same."""
    plan = f'use a memory plan, memory="{format_bytes(capacity(machine))}"'
    if machine.target in ("", "cpu"):
        return f"{plan}, or processes on more hosts."
    parts = devices * 2 ** (-(-needed // capacity(machine)) - 1).bit_length()
    return f"use more parts, such as devices={parts}, or {plan}."

"""Which way each aggregation of a model goes: vertices split, features split, or both, by what the machine says of it.

A sum over in-edges of `width` features, in groups of `columns` devices: bytes read for the fullest group's edges, with `EDGE` more for each, at the
device's memory bandwidth, the rows of the halo turn by turn, and the exchange of features before and after. Splitting vertices alone moves what other parts have and
edges begin at; splitting features moves every row once each way, whatever the edges, and shares out the work evenly; it costs every device the edges
of its whole group.

`edge_seconds` and `row_seconds` say of the same machine what learning of parts begins with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.gnn.data.graph import Graph
from partita.gnn.split.partition import Kind, exchange_of
from partita.machine import Machine
from partita.machine.collectives import Group, collective_seconds

EDGE = 128
"""Bytes that take as long to read as an edge does beside its row: its number, and the wait for a row that is not in the cache. A sum over 10.5 million edges of
an RMAT graph took 43 ms for 16 features, 80 for 64 and 155 for 128 (2 cores, 2026-11)."""

CACHED = 2
"""How many times as fast as the memory rows are read that edges begin at, since caches hold many: of the same sums, 21 GB/s a core."""
PASSES = 16
"""Times that a step reads and writes a row around an aggregation (normalisation, dropout, activation, their gradients), by what epochs of GCN took."""

ROOM = 0.25
"""Share of a device's memory that edges of whole groups may take."""


def columns_of(
    calls: Sequence[tuple[int, str]], graph: Graph, points: np.ndarray, machine: Machine
) -> tuple[tuple[int, int], ...]:
    """(features, columns) for aggregations, `block.Calls.seen`, of a graph split at these points, that are cheaper with more than one."""
    widths = sorted({width for width, kind in calls if kind != "attention"})
    parts, rows = len(points) - 1, int(np.diff(points).max())
    costs: dict[int, list[float]] = {}
    for columns in (c for c in range(1, parts + 1) if parts % c == 0):
        place = exchange_of(graph, points, Kind(columns)).least
        if columns == 1 or 8 * place.edges <= ROOM * machine.memory_bytes:
            turns = [rows for _, rows in place.turns]
            costs[columns] = [
                _seconds(machine, parts, rows, columns, place.edges, turns, width)
                for width in widths
            ]
    best = [min(costs, key=lambda c, i=i: (costs[c][i], c)) for i in range(len(widths))]
    return tuple((width, c) for width, c in zip(widths, best, strict=True) if c > 1)


def edge_seconds(calls: Sequence[tuple[int, str]], features: int, machine: Machine) -> float:
    """What an in-edge takes in a step over vertices of so many features: in every aggregation forward, and backward but where features themselves are summed."""
    backward = calls[1:] if calls and calls[0][0] == features else calls
    return sum(4 * width + EDGE for width, _ in (*calls, *backward)) / (
        CACHED * machine.memory_bandwidth
    )


def row_seconds(calls: Sequence[tuple[int, str]], parameters: int, machine: Machine) -> float:
    """What a vertex takes in a step beside its in-edges: two operations for every parameter forward and four backward, and passes over rows."""
    passes = 8 * PASSES * sum(width for width, _ in calls) / machine.memory_bandwidth
    return 6 * parameters / machine.rate("dot", "float32") + passes


def _seconds(
    machine: Machine,
    parts: int,
    rows: int,
    columns: int,
    edges: int,
    turns: Sequence[int],
    width: int,
) -> float:
    """Of one aggregation, forward."""
    slice_bytes = 4 * -(-width // columns)
    seconds = edges * (slice_bytes + EDGE) / machine.memory_bandwidth
    everyone = neighbours(machine, parts)
    seconds += sum(
        collective_seconds(machine, "collective_permute", came * slice_bytes, everyone)
        for came in turns
    )
    if columns > 1:
        seconds += 2 * collective_seconds(
            machine, "all_to_all", rows * 4 * width, neighbours(machine, columns)
        )
    return seconds


def neighbours(machine: Machine, devices: int) -> Group:
    """So many neighbouring devices, as parts of the machine's levels."""
    found: list[tuple[int, int]] = []
    for index in reversed(range(len(machine.levels))):
        here = min(devices, machine.levels[index].size)
        found.append((index, here))
        devices = -(-devices // here)
    return tuple(reversed(found))

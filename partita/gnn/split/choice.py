"""The devices that share each aggregation of a model, by the machine's speeds.

An aggregation has its vertices split, its features split, or both.

The price of a sum over in-edges of `width` features, in groups of `columns` devices: the bytes of
the largest group's edges, with `EDGE_BYTES` more for each, at memory bandwidth; the rows of the
halo, round by round; the exchange of features before and after. Splitting vertices alone moves the
rows of other parts that edges begin at. Splitting features moves every row once each way, whatever
the edges, and shares the work evenly, but every device stores the edges of its whole group.

`edge_seconds` and `row_seconds` are the prices on the same machine that a learned split begins
with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.gnn.data.graph import Graph
from partita.gnn.split.partition import AggregationCapacity, AggregationKind, exchange_of
from partita.machine import Machine
from partita.machine.collectives import Group, collective_seconds

EDGE_BYTES = 128
"""Price of an edge beside its row, in bytes read: its number, and the wait for a row outside the
cache.

A sum over 10.5 million edges of an RMAT graph took 43 ms for 16 features, 80 for 64 and 155 for 128
(2 cores, 2026-11)."""

CACHED = 2
"""Ratio of the speed of reading rows that edges begin at to that of memory, since caches hold many
of them. Measured in the same sums: 21 GB/s a core."""

PASSES = 16
"""Times that a step reads and writes a row around an aggregation (normalisation, dropout,
activation, their gradients), by the seconds of epochs of GCN."""

EDGE_SHARE = 0.25
"""Share of a device's memory that the edges of whole groups may take."""


def columns_of(
    calls: Sequence[tuple[int, str]], graph: Graph, points: np.ndarray, machine: Machine
) -> tuple[tuple[int, int], ...]:
    """(features, columns) of the aggregations that are faster with more than one column.

    `calls`: (features, kind) of every aggregation; `points`: the split points of the graph.
    """
    widths = sorted({width for width, kind in calls if kind not in ("attention", "message")})
    parts = len(points) - 1
    rows = int(np.diff(points).max())
    seconds: dict[int, list[float]] = {}
    for columns in range(1, parts + 1):
        if parts % columns:
            continue
        capacity = exchange_of(graph, points, AggregationKind(columns)).capacity
        if columns > 1 and 8 * capacity.edges > EDGE_SHARE * machine.memory_bytes:
            continue
        sums = _GroupSums(machine, parts, rows, columns, capacity)
        seconds[columns] = [sums.seconds(width) for width in widths]
    chosen = []
    for i, width in enumerate(widths):
        fastest = min(seconds, key=lambda columns, i=i: (seconds[columns][i], columns))
        if fastest > 1:
            chosen.append((width, fastest))
    return tuple(chosen)


def edge_seconds(calls: Sequence[tuple[int, str]], features: int, machine: Machine) -> float:
    """Seconds of an in-edge in a step over vertices of that many features.

    In every aggregation forward, and backward in all but one that sums the features themselves.
    """
    backward = calls[1:] if calls and calls[0][0] == features else calls
    nbytes = sum(4 * width + EDGE_BYTES for width, _ in (*calls, *backward))
    return nbytes / (CACHED * machine.memory_bandwidth)


def row_seconds(calls: Sequence[tuple[int, str]], parameters: int, machine: Machine) -> float:
    """Seconds of a vertex in a step beside its in-edges.

    Two operations for every parameter forward and four backward, and passes over rows around
    aggregations.
    """
    passes = 8 * PASSES * sum(width for width, _ in calls) / machine.memory_bandwidth
    return 6 * parameters / machine.rate("dot", "float32") + passes


class _GroupSums:
    """Sums over in-edges by groups of `columns` of `parts` devices, with `rows` rows each."""

    def __init__(
        self, machine: Machine, parts: int, rows: int, columns: int, capacity: AggregationCapacity
    ) -> None:
        self.machine = machine
        self.rows = rows
        self.columns = columns
        self.capacity = capacity
        self.everyone = neighbours(machine, parts)
        self.group = neighbours(machine, columns)

    def seconds(self, width: int) -> float:
        """Seconds of one sum of `width` features, forward."""
        machine = self.machine
        slice_bytes = 4 * -(-width // self.columns)
        seconds = self.capacity.edges * (slice_bytes + EDGE_BYTES) / machine.memory_bandwidth
        seconds += sum(
            collective_seconds(machine, "collective_permute", rows * slice_bytes, self.everyone)
            for _, rows in self.capacity.rounds
        )
        if self.columns > 1:
            row_bytes = self.rows * 4 * width
            seconds += 2 * collective_seconds(machine, "all_to_all", row_bytes, self.group)
        return seconds


def neighbours(machine: Machine, devices: int) -> Group:
    """Neighbouring devices as (level, devices of it) of the machine, the outermost level first."""
    shares: list[tuple[int, int]] = []
    for index in reversed(range(len(machine.levels))):
        inside = min(devices, machine.levels[index].size)
        shares.append((index, inside))
        devices = -(-devices // inside)
    return tuple(reversed(shares))

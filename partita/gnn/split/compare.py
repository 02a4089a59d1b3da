"""A comparison of partitioners on a graph: predicted seconds of every device, rows fetched, bytes.

It is a dict for JSON, two tables for people here, and a page in `partita.report.parts`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from partita.gnn.data.graph import Graph
from partita.gnn.split.learned import (
    RANGES,
    Cost,
    best_points,
    calibrated,
    features_of,
    prefix_sums,
)
from partita.gnn.split.partition import arranged, cut
from partita.units import format_bytes, format_seconds

TITLES = {
    "vertices": "equal vertices",
    "edges": "equal edges",
    "metis": "METIS",
    "learned": "learned",
}
"""Partitioners by their titles in tables."""

WITHOUT_METIS = "METIS is not compared: pymetis is not installed. Run `pip install pymetis`."

COLUMNS = ("partitioner", "slowest part", "imbalance", "rows fetched", "bytes per epoch")


def compare(
    graph: Graph, devices: int, width: int, report: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """The partitioners on a graph, as JSON has them.

    Seconds are of one sum over in-edges, of `width` features, on this machine. The bytes of an
    epoch are the rows fetched, forward, and their gradients on the way back, of one layer.
    `report`: as in `calibrated`.
    """
    sums = prefix_sums(graph)
    weights, error = calibrated(graph, sums, width, report)
    cost = Cost(weights, np.ones(devices))
    partitioners = {}
    for name in TITLES:
        if name != "metis" or importlib.util.find_spec("pymetis") is not None:
            partitioners[name] = _facts(graph, name, sums, cost, width)
    return {
        "graph": graph.name,
        "vertices": graph.vertices,
        "edges": graph.edges,
        "devices": devices,
        "features": width,
        "error": error,
        "ranges": RANGES,
        "partitioners": partitioners,
    }


def _facts(graph: Graph, name: str, sums: np.ndarray, cost: Cost, width: int) -> dict[str, Any]:
    """One partitioner on a graph, as JSON has it."""
    order = None
    if name == "learned":
        points = best_points(sums, cost)
    else:
        graph, points, order = arranged(graph, len(cost.slowness), name)
        if order is not None:
            sums = prefix_sums(graph)
    seconds = cost.seconds(sums, points)
    fetched = cut(graph, points).fetched
    parts = []
    rows = zip(features_of(sums, points), fetched, seconds, strict=True)
    for features, fetched_rows, part_seconds in rows:
        parts.append(
            {
                "vertices": int(features[1]),
                "edges": int(features[2]),
                "fetched": int(fetched_rows),
                "seconds": float(part_seconds),
            }
        )
    return {
        "largest_seconds": float(seconds.max()),
        "imbalance": float(seconds.max() / seconds.mean()) if seconds.any() else 1.0,
        "fetched": int(fetched.sum()),
        "bytes": int(fetched.sum()) * width * 4 * 2,
        "points": points.tolist() if order is None else None,
        "parts": parts,
    }


def source_of(comparison: Mapping[str, Any]) -> str:
    """The source of the seconds of a comparison, in words."""
    return (
        "Nothing was measured in training. Seconds are of one sum over in-edges of "
        f"{comparison['features']} features, fitted to {comparison['ranges']} random ranges that "
        f"one core of this machine summed. The fit was {comparison['error']:.1%} off (median) on "
        "ranges that it had not seen."
    )


def row_of(name: str, facts: Mapping[str, Any]) -> list[str]:
    """The row of a partitioner, under `COLUMNS`."""
    return [
        TITLES[name],
        format_seconds(facts["largest_seconds"]),
        f"{facts['imbalance']:.2f}",
        f"{facts['fetched']:,}",
        format_bytes(facts["bytes"]),
    ]


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """A table for people, a row for each partitioner."""
    table = Table(title=f"{comparison['graph']} over {comparison['devices']} devices")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for name, facts in comparison["partitioners"].items():
        table.add_row(*row_of(name, facts))
    return table


def device_table(comparison: Mapping[str, Any]) -> Table:
    """A table for people: the predicted seconds of each device, a column for each partitioner."""
    partitioners = comparison["partitioners"]
    table = Table(title="predicted time of every device")
    table.add_column("device")
    for name in partitioners:
        table.add_column(TITLES[name], justify="right")
    for device in range(comparison["devices"]):
        seconds = [facts["parts"][device]["seconds"] for facts in partitioners.values()]
        table.add_row(str(device), *map(format_seconds, seconds))
    return table

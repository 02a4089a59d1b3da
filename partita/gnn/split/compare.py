"""What each partitioner makes of a graph: predicted seconds of every device, rows fetched, bytes; as JSON and as tables (`partita.report.parts` makes a page)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

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
WITHOUT_METIS = "METIS is not compared: its package is not installed; run `pip install pymetis`."


def compare(
    graph: Graph, devices: int, width: int, report: Callable[..., Any] | None = None
) -> dict[str, Any]:
    """What the partitioners make of a graph, as JSON has it; times are of one sum over in-edges, of `width` features, on this machine.

    bytes of an epoch: the rows fetched, forward, and their gradients on the way back, of one layer.
    """
    sums = prefix_sums(graph)
    weights, error = calibrated(graph, sums, width, report)
    cost = Cost(weights, np.ones(devices))
    found: dict[str, Any] = {}
    for name in TITLES:
        if name == "metis" and importlib.util.find_spec("pymetis") is None:
            continue
        split, points, order = (
            (graph, best_points(sums, cost), None)
            if name == "learned"
            else arranged(graph, devices, name)
        )
        of = sums if order is None else prefix_sums(split)
        seconds, features, fetched = (
            cost.seconds(of, points),
            features_of(of, points),
            cut(split, points).fetched,
        )
        found[name] = {
            "largest_seconds": float(seconds.max()),
            "imbalance": float(seconds.max() / seconds.mean()) if seconds.any() else 1.0,
            "fetched": int(fetched.sum()),
            "bytes": int(fetched.sum()) * width * 4 * 2,
            "points": None if order is not None else points.tolist(),
            "parts": [
                {"vertices": int(f[1]), "edges": int(f[2]), "fetched": int(r), "seconds": float(s)}
                for f, r, s in zip(features, fetched, seconds, strict=True)
            ],
        }
    return {
        "graph": graph.name,
        "vertices": graph.vertices,
        "edges": graph.edges,
        "devices": devices,
        "features": width,
        "error": error,
        "ranges": RANGES,
        "partitioners": found,
    }


def source_of(found: Mapping[str, Any]) -> str:
    """Where the times of a comparison come from."""
    return (
        f"Nothing was measured in training: times are of one sum over in-edges of {found['features']} features, fitted to {found['ranges']} random ranges "
        f"that one core of this machine summed; of ranges that the fit had not seen it was {found['error']:.1%} off (median)."
    )


def row_of(name: str, one: Mapping[str, Any]) -> list[str]:
    return [
        TITLES[name],
        format_seconds(one["largest_seconds"]),
        f"{one['imbalance']:.2f}",
        f"{one['fetched']:,}",
        format_bytes(one["bytes"]),
    ]


COLUMNS = ("partitioner", "slowest part", "imbalance", "rows fetched", "bytes per epoch")


def comparison_table(found: Mapping[str, Any]) -> Any:
    """A table for people, partitioners down."""
    from rich.table import Table

    table = Table(title=f"{found['graph']} over {found['devices']} devices")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if i else "left")
    for name, one in found["partitioners"].items():
        table.add_row(*row_of(name, one))
    return table


def device_table(found: Mapping[str, Any]) -> Any:
    """A table for people: what each device is predicted to take."""
    from rich.table import Table

    table = Table(title="predicted time of every device")
    table.add_column("device")
    for name in found["partitioners"]:
        table.add_column(TITLES[name], justify="right")
    for d in range(found["devices"]):
        table.add_row(
            str(d),
            *(format_seconds(one["parts"][d]["seconds"]) for one in found["partitioners"].values()),
        )
    return table

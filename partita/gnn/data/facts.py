"""Counts of a graph, as JSON and as a table: for `partita gnn info`."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from partita.gnn.data.arrays import ARRAYS, MASKS
from partita.gnn.data.graph import Graph
from partita.units import format_bytes


def graph_facts(graph: Graph) -> dict[str, Any]:
    """Counts of a graph for JSON: vertices, edges, degrees, classes, masks, bytes by array."""
    in_degrees = graph.in_degrees()
    out_degrees = graph.out_degrees()
    isolated = (in_degrees == 0) & (out_degrees == 0)
    labelled = 0 if graph.labels is None else int(np.count_nonzero(graph.labels >= 0))
    arrays = {name: getattr(graph, name) for name in ARRAYS}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    return {
        "name": graph.name,
        "vertices": graph.vertices,
        "edges": graph.edges,
        "in_degrees": _degree_range(in_degrees),
        "out_degrees": _degree_range(out_degrees),
        "isolated": int(np.count_nonzero(isolated)),
        "features": graph.feature_count,
        "classes": graph.classes,
        "labelled": labelled,
        "masks": {name: int(np.count_nonzero(arrays[name])) for name in MASKS if name in arrays},
        "weights": graph.weights is not None,
        "bytes": {name: int(array.nbytes) for name, array in arrays.items()},
    }


def _degree_range(degrees: np.ndarray) -> dict[str, float]:
    return {
        "least": int(degrees.min()),
        "median": float(np.median(degrees)),
        "mean": float(degrees.mean()),
        "most": int(degrees.max()),
    }


def facts_table(facts: dict[str, Any]) -> Table:
    """The facts of a graph, one per line."""
    table = Table("", "", title=facts["name"], show_header=False)
    vertices = f"{facts['vertices']:,}"
    if facts["isolated"]:
        vertices += f", {facts['isolated']:,} of them isolated"
    table.add_row("vertices", vertices)
    table.add_row("edges", f"{facts['edges']:,}" + (", with weights" if facts["weights"] else ""))
    for side in ("in", "out"):
        degrees = facts[f"{side}_degrees"]
        table.add_row(
            f"{side}-degrees",
            f"{degrees['least']:,} to {degrees['most']:,}, median {degrees['median']:,g}, "
            f"mean {degrees['mean']:,.1f}",
        )
    table.add_row("features", f"{facts['features']:,}" if facts["features"] else "none")
    table.add_row("classes", _classes_text(facts))
    masks = [f"{count:,} of {name}" for name, count in facts["masks"].items()]
    table.add_row("masks", ", ".join(masks) or "none")
    arrays = [f"{name} {format_bytes(size)}" for name, size in facts["bytes"].items()]
    total = format_bytes(sum(facts["bytes"].values()))
    table.add_row("bytes", f"{total}: {', '.join(arrays)}")
    return table


def _classes_text(facts: dict[str, Any]) -> str:
    if not facts["classes"]:
        return "none"
    if facts["labelled"] < facts["vertices"]:
        return f"{facts['classes']:,}, of {facts['labelled']:,} vertices"
    return f"{facts['classes']:,}"

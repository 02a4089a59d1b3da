"""What a graph has, counted: for `partita gnn info`."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table

from partita.gnn.data.arrays import TABLES
from partita.gnn.data.graph import Graph
from partita.units import format_bytes


def facts(graph: Graph) -> dict[str, Any]:
    """Counts of a graph, ready for JSON: degrees as least, median, mean and most; bytes by array."""
    arrays = {what: getattr(graph, what) for what in ("offsets", "sources", *TABLES, "weights")}
    return {
        "name": graph.name,
        "vertices": graph.vertices,
        "edges": graph.edges,
        "in_degrees": _spread(graph.in_degrees()),
        "out_degrees": _spread(graph.out_degrees()),
        "isolated": int(np.count_nonzero((graph.in_degrees() == 0) & (graph.out_degrees() == 0))),
        "features": graph.feature_count,
        "classes": graph.classes,
        "labelled": 0 if graph.labels is None else int(np.count_nonzero(graph.labels >= 0)),
        "masks": {
            what: int(np.count_nonzero(arrays[what]))
            for what in ("train", "validation", "test")
            if arrays[what] is not None
        },
        "weights": graph.weights is not None,
        "bytes": {what: int(array.nbytes) for what, array in arrays.items() if array is not None},
    }


def _spread(degrees: np.ndarray) -> dict[str, float]:
    return {
        "least": int(degrees.min()),
        "median": float(np.median(degrees)),
        "mean": float(degrees.mean()),
        "most": int(degrees.max()),
    }


def facts_table(found: dict[str, Any]) -> Table:
    """The facts of a graph, a line each."""
    table = Table("", "", title=found["name"], show_header=False)
    table.add_row(
        "vertices",
        f"{found['vertices']:,}"
        + (f", {found['isolated']:,} of them isolated" if found["isolated"] else ""),
    )
    table.add_row("edges", f"{found['edges']:,}" + (", with weights" if found["weights"] else ""))
    for side in ("in", "out"):
        d = found[f"{side}_degrees"]
        table.add_row(
            f"{side}-degrees",
            f"{d['least']:,} to {d['most']:,}, median {d['median']:,g}, mean {d['mean']:,.1f}",
        )
    table.add_row("features", f"{found['features']:,}" if found["features"] else "none")
    labels = f"{found['classes']:,}" + (
        f", of {found['labelled']:,} vertices" if found["labelled"] < found["vertices"] else ""
    )
    table.add_row("classes", labels if found["classes"] else "none")
    table.add_row(
        "masks", ", ".join(f"{n:,} of {what}" for what, n in found["masks"].items()) or "none"
    )
    parts = ", ".join(f"{what} {format_bytes(n)}" for what, n in found["bytes"].items())
    table.add_row("bytes", f"{format_bytes(sum(found['bytes'].values()))}: {parts}")
    return table

"""The comparison of graph partitioners as one web page: a table, and a bar for every device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partita.report.elements import Html, join, line_of, seconds_text, section_of, table_of, tag
from partita.report.html import document, header


def page(
    comparison: Mapping[str, Any],
    titles: Mapping[str, str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """A self-contained page of a comparison (`partita.gnn.split.compare`).

    `titles` are the names of partitioners; `columns` and `rows` are the table.
    """
    partitioners = comparison["partitioners"]
    best = min(partitioners, key=lambda name: partitioners[name]["largest_seconds"])
    seconds = seconds_text(partitioners[best]["largest_seconds"])
    devices = comparison["devices"]
    title = f"{titles[best]}: the slowest of {devices} parts takes {seconds}"
    facts = {
        "vertices": f"{comparison['vertices']:,}",
        "edges": f"{comparison['edges']:,}",
        "devices": str(devices),
        "features": str(comparison["features"]),
        "error of predictions": f"{100 * comparison['error']:.1f} %",
    }
    whole = max(row["largest_seconds"] for row in partitioners.values())
    bars = [_bars(titles[name], row["parts"], whole) for name, row in partitioners.items()]
    text = tag("p", "Predicted time of each part, and its in-edges.")
    body = [
        header(comparison["graph"], title, facts),
        section_of("Partitioners", table_of("Partitioners", columns, rows)),
        section_of("Time of every device", text, *bars),
        section_of("Where the figures come from", *(tag("p", note) for note in notes)),
    ]
    return document(
        f"{comparison['graph']} over {devices} devices",
        body,
        has_timeline=False,
    )


def _bars(
    title: str,
    parts: Sequence[Mapping[str, Any]],
    whole: float,
) -> Html:
    lines = []
    for device, part in enumerate(parts):
        seconds = part["seconds"]
        figures = (seconds_text(seconds), f"{part['edges']:,}")
        lines.append(line_of(f"device {device}", [("compute", seconds)], whole, *figures))
    return join([tag("h3", title), tag("div", lines, class_="bars")])

"""The ways to split a graph as one web page: a table of them, and a bar for every device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partita.report.elements import join, line_of, seconds_text, section_of, table_of, tag
from partita.report.html import document, listed


def page(
    found: Mapping[str, Any],
    titles: Mapping[str, str],
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
) -> str:
    """The comparison as one web page that asks for nothing else: what `partita.gnn.split.compare` found, its titles, table and notes."""
    partitioners = found["partitioners"]
    best = min(partitioners, key=lambda name: partitioners[name]["largest_seconds"])
    facts = {
        "vertices": f"{found['vertices']:,}",
        "edges": f"{found['edges']:,}",
        "devices": str(found["devices"]),
        "features": str(found["features"]),
        "error of predictions": f"{100 * found['error']:.1f} %",
    }
    header = tag(
        "header",
        tag("p", "Partita · ", found["graph"], class_="kicker"),
        tag(
            "h1",
            f"{titles[best]}: the slowest of {found['devices']} parts takes {seconds_text(partitioners[best]['largest_seconds'])}",
        ),
        listed(facts, "facts"),
    )
    whole = max(one["largest_seconds"] for one in partitioners.values())
    bars = [
        join(
            [
                tag("h3", titles[name]),
                tag(
                    "div",
                    (
                        line_of(
                            f"device {d}",
                            [("compute", part["seconds"])],
                            whole,
                            seconds_text(part["seconds"]),
                            f"{part['edges']:,}",
                        )
                        for d, part in enumerate(one["parts"])
                    ),
                    class_="bars",
                ),
            ]
        )
        for name, one in partitioners.items()
    ]
    body = [
        header,
        section_of("Partitioners", table_of("Partitioners", columns, rows)),
        section_of(
            "Time of every device",
            tag("p", "Predicted time of each part, and its in-edges."),
            *bars,
        ),
        section_of("Where the figures come from", *(tag("p", note) for note in notes)),
    ]
    return document(f"{found['graph']} over {found['devices']} devices", body, False)

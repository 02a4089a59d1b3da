"""Strips of a page: drawings over one axis of time, each beside its name."""

from __future__ import annotations

from collections.abc import Sequence

from partita.report.elements import Html, tag

UNITS = 1000
"""Width of a strip, units."""


def axis_row(seconds: float) -> Html:
    """Four marks of the time and its end, at the top of all strips."""
    marks = []
    for quarter in range(4):
        text = f"{quarter * seconds / 4:.0f} s"
        marks.append(tag("span", text, style=f"left:{25 * quarter}%"))
    end = tag("span", f"{seconds:.0f} s", style="right:0")
    return tag("div", tag("span", "time"), tag("div", marks, end, class_="axis"), class_="row")


def strip_row(name: str, drawing: Sequence[Html], height: int) -> Html:
    """A drawing, UNITS wide and some pixels high, after its name."""
    picture = tag(
        "svg",
        drawing,
        viewBox=f"0 0 {UNITS} {height}",
        preserveAspectRatio="none",
        height=height,
        width="100%",
        role="img",
        aria_label=name,
    )
    return tag("div", tag("span", name), picture, class_="row")

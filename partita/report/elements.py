"""Elements of a page: tags with escaped text, sections, bars, tables, figures with units.

Every text goes through `tag`, which escapes it unless it is `Html` already. A layer may have any
name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from partita.units import format_seconds

VOID = ("br", "meta", "link")
"""Elements without content."""


class Html(str):
    """Text that is HTML already. Every other text is escaped where it enters a tag."""


def tag(name: str, /, *inside: str | Iterable[str], **attributes: Any) -> Html:
    """One element; content that is not `Html` is escaped.

    `class_` is the attribute class, `aria_label` is aria-label. An attribute that is None is left
    out.

    >>> print(tag("p", "a < b", tag("br"), class_="note"))
    <p class="note">a &lt; b<br></p>
    """
    start = name
    for key, value in attributes.items():
        if value is not None:
            start += f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
    if name in VOID:
        return Html(f"<{start}>")
    return Html(f"<{start}>{join(inside)}</{name}>")


def join(inside: Iterable[str | Iterable[str]]) -> Html:
    """Parts in order, plain text escaped."""
    parts = []
    for part in inside:
        if isinstance(part, Html):
            parts.append(part)
        elif isinstance(part, str):
            parts.append(escape(part))
        else:
            parts.append(join(part))
    return Html("".join(parts))


def section_of(title: str, *inside: str | Iterable[str]) -> Html:
    """A section of the page under its heading."""
    name = re.sub("[^a-z]+", "-", title.lower())
    return tag(
        "section",
        tag("h2", title, id=name),
        *inside,
        aria_labelledby=name,
    )


def marked(classes: str, text: str) -> Html:
    """A text after a box of its color, as in a legend."""
    mark = tag(
        "span",
        class_=f"mark {classes}",
        aria_hidden="true",
    )
    return tag("span", mark, text, class_="marked")


def line_of(
    name: str,
    parts: Sequence[tuple[str, float]],
    whole: float,
    *figures: str | None,
    class_: str | None = None,
) -> Html:
    """A bar between its name and its figures. `parts` and `whole` are those of `bar_of`."""
    shown = [figure for figure in figures if figure]
    bar = bar_of(parts, whole, f"{name}: {', '.join(shown)}")
    cells = tag(
        "span",
        (tag("span", figure) for figure in shown),
        class_="figure",
    )
    classes = f"line {class_ or ''}".strip()
    return tag(
        "div",
        tag("span", name, class_="name"),
        bar,
        cells,
        class_=classes,
    )


def table_of(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
) -> Html:
    """A table whose first column names the row. It scrolls in its own box if it is too wide."""
    heads = (tag("th", column, scope="col") for column in columns)
    lines = []
    for row in rows:
        cells = (tag("td", cell) for cell in row[1:])
        lines.append(tag("tr", tag("th", row[0], scope="row"), cells))
    title = tag("caption", caption, class_="unseen")
    table = tag(
        "table",
        title,
        tag("thead", tag("tr", heads)),
        tag("tbody", lines),
    )
    return tag(
        "div",
        table,
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def bar_of(
    parts: Iterable[tuple[str, float]],
    whole: float,
    title: str,
) -> Html:
    """A bar of (class, length) parts. `whole` is the length that fills the line."""
    spans = []
    for name, length in parts:
        if whole and length > 0:
            spans.append(tag("span", class_=name, style=f"width:{100 * length / whole:.3f}%"))
    return tag(
        "div",
        spans,
        class_="bar",
        role="img",
        aria_label=title,
        title=title,
    )


def seconds_text(value: float) -> str:
    """Seconds with a unit, with a real micro sign."""
    return format_seconds(value).replace(" us", " µs")


@cache
def asset(name: str) -> str:
    """The text of a file in `report/assets`: a style sheet or a script."""
    return resources.files("partita.report").joinpath("assets", name).read_text(encoding="utf-8")

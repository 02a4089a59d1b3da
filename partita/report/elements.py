"""The elements that a page is made of: tags with all text escaped, sections, bars, tables, figures with units.

Every text goes through `tag`, which escapes it unless it is `Html` already: a layer may be called anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from partita.units import format_seconds


class Html(str):
    """Text that is HTML already; every other text is escaped where it enters a tag."""


def tag(name: str, /, *inside: str | Iterable[str], **attributes: Any) -> Html:
    """One element, with all that is not `Html` escaped. `class_` is class, `aria_label` is aria-label; None leaves one out.

    >>> print(tag("p", "a < b", tag("br"), class_="note"))
    <p class="note">a &lt; b<br></p>
    """
    given = {
        key.rstrip("_").replace("_", "-"): value
        for key, value in attributes.items()
        if value is not None
    }
    start = name + "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    if name in ("br", "meta", "link"):
        return Html(f"<{start}>")
    return Html(f"<{start}>{join(inside)}</{name}>")


def join(inside: Iterable[str | Iterable[str]]) -> Html:
    """Parts one after the other, escaped where they are plain text."""
    parts = []
    for one in inside:
        if isinstance(one, Html):
            parts.append(one)
        else:
            parts.append(escape(one) if isinstance(one, str) else join(one))
    return Html("".join(parts))


def section_of(title: str, *inside: str | Iterable[str]) -> Html:
    """A section of the page under its heading."""
    name = re.sub("[^a-z]+", "-", title.lower())
    return tag("section", tag("h2", title, id=name), *inside, aria_labelledby=name)


def marked(classes: str, text: str) -> Html:
    """A text after a box of its colour, as in a legend."""
    return tag(
        "span", tag("span", class_=f"mark {classes}", aria_hidden="true"), text, class_="marked"
    )


def line_of(
    name: str,
    parts: Sequence[tuple[str, float]],
    whole: float,
    *figures: str | None,
    class_: str | None = None,
) -> Html:
    """One bar with its name before and its figures after it."""
    said = f"{name}: {', '.join(f for f in figures if f)}"
    shown = tag("span", (tag("span", f) for f in figures if f), class_="figure")
    return tag(
        "div",
        tag("span", name, class_="name"),
        bar_of(parts, whole, said),
        shown,
        class_=f"line {class_ or ''}".strip(),
    )


def table_of(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column names the row; it scrolls in a box of its own where it is too wide."""
    head = tag("thead", tag("tr", (tag("th", c, scope="col") for c in columns)))
    body = tag(
        "tbody",
        (
            tag("tr", tag("th", row[0], scope="row"), (tag("td", cell) for cell in row[1:]))
            for row in rows
        ),
    )
    inside = tag("table", tag("caption", caption, class_="unseen"), head, body)
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)


def bar_of(parts: Iterable[tuple[str, float]], whole: float, title: str) -> Html:
    """A bar of parts, (class, length) each, of which `whole` would fill the line; the title says what it shows."""
    spans = (
        tag("span", class_=name, style=f"width:{100 * part / whole:.3f}%")
        for name, part in parts
        if whole and part > 0
    )
    return tag("div", spans, class_="bar", role="img", aria_label=title, title=title)


def seconds_text(value: float) -> str:
    """Seconds as a page writes them, with a real micro sign."""
    return format_seconds(value).replace(" us", " µs")


@cache
def asset(name: str) -> str:
    """The text of a file in `report/assets`: a style sheet or a script."""
    return resources.files("partita.report").joinpath("assets", name).read_text(encoding="utf-8")

"""Plans, simulated steps and comparisons as tables in a notebook cell, and sentences below one.

`import partita` gives their classes these tables: notebooks call the method `_repr_html_` of a
cell's last value.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from partita.comparison import Comparison
from partita.plans.plan import Plan
from partita.simulation.timeline import Timeline


def plan_html(plan: Plan) -> str:
    """A plan per layer, long plans folded, with its prediction below: an HTML table."""
    from partita.report.elements import tag
    from partita.report.tables import PLAN_COLUMNS, plan_rows, plan_title, summary

    names = ("layer", "split", *(PLAN_COLUMNS if plan.why else ()))
    heads = [tag("th", name, style="text-align: left") for name in names]
    rows = []
    for row in plan_rows(plan):
        figures = []
        if plan.why:
            figures = [
                write(row.figures[column]) if row.figures else ""
                for column, write in PLAN_COLUMNS.items()
            ]
        cells = [tag("td", cell, style="text-align: left") for cell in (row.text, row.split)]
        cells += [tag("td", figure, style="text-align: right") for figure in figures]
        rows.append(tag("tr", cells))
    caption = tag("caption", plan_title(plan), style="text-align: left")
    table = tag("table", caption, tag("thead", tag("tr", heads)), tag("tbody", rows))
    lines = [tag("div", line) for line in summary(plan)]
    return str(tag("div", table, lines))


def timeline_html(timeline: Timeline) -> str:
    """A simulated step as an HTML table, its sums below."""
    from partita.report.tables import timeline_summary, timeline_table

    return table_html(timeline_table(timeline), timeline_summary(timeline))


def comparison_html(comparison: Comparison) -> str:
    """Plans side by side as an HTML table."""
    from partita.report.tables import comparison_table

    title = f"{comparison.graph} on {comparison.machine}"
    return table_html(comparison_table(comparison.to_json()["plans"], title))


def table_html(table: Any, lines: Iterable[str] = ()) -> str:
    """A table for the terminal as HTML, with lines below."""
    from partita.report.elements import tag

    heads = [tag("th", str(column.header), style="text-align: left") for column in table.columns]
    columns = [list(map(str, column.cells)) for column in table.columns]
    rows = []
    for row in zip(*columns, strict=True):
        first, *figures = row
        cells = [tag("td", figure, style="text-align: right") for figure in figures]
        rows.append(tag("tr", tag("td", first, style="text-align: left"), cells))
    caption = tag("caption", str(table.title), style="text-align: left")
    content = tag("table", caption, tag("thead", tag("tr", heads)), tag("tbody", rows))
    return str(tag("div", content, [tag("div", line) for line in lines]))


def notebook_say() -> Callable[[str], None] | None:
    """A function that prints a sentence below the cell; None outside notebooks."""
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    is_kernel = shell is not None and getattr(shell, "kernel", None) is not None
    return _print if is_kernel else None


def _print(sentence: str) -> None:
    print(f"partita: {sentence}")

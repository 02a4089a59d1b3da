"""Tables of `partita bench`: published figures, and measured steps, beside Partita's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from partita.report.gaps import PROVED
from partita.report.tables import add_columns, add_row, new_table, ratio_text
from partita.units import format_seconds

COMPARED = ("data parallel", "expert", "found")
PUBLISHED = (
    ("seconds", "s a step", "seconds", 1.0),
    ("gigabytes", "GB sent", "sent_bytes", 1e-9),
    ("kernel_seconds", "s of kernels", "kernel_seconds", 1.0),
)
"""Figures of papers: key, unit, key of ours, and the factor from ours to the unit."""


def three_digits(value: float) -> str:
    """
    >>> three_digits(0.02341), three_digits(66.51), three_digits(1234.5)
    ('0.0234', '66.5', '1230')
    """
    digits = f"{value:.3g}"
    return f"{float(digits):.0f}" if "e+" in digits else digits


def papers_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """A paper's networks on one machine: a step under each plan, the gain of the searched plan,
    and traffic."""
    table = new_table(title)
    table.caption = (
        "data parallel / expert / found; gain: of found over the first two; "
        "traffic: of all devices; *: does not fit in memory"
    )
    table.add_column("network", no_wrap=True)
    add_columns(
        table,
        "devices",
        "step in ms",
        "gain",
        "traffic in GB",
    )
    for row in rows:
        case = row["case"]
        plans = [row["plans"][name] for name in COMPARED if name in row["plans"]]
        cells = _paper_cells(plans) if plans else ("fits under no plan", "", "")
        add_row(
            table,
            case["network"],
            str(case["devices"]),
            *cells,
        )
    return table


def _paper_cells(plans: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    best_seconds = plans[-1]["seconds"]
    steps = []
    for plan in plans:
        unfit = "" if plan["fits"] else "*"
        steps.append(three_digits(plan["seconds"] * 1e3) + unfit)
    gains = [ratio_text(plan["seconds"] / best_seconds) for plan in plans[:-1]]
    traffic = [three_digits(plan["sent_bytes"] / 1e9) for plan in plans]
    return " / ".join(steps), " / ".join(gains), " / ".join(traffic)


def papers_lines(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Published figures with ours beside them, a line each; without plans, the reason."""
    for row in rows:
        case = row["case"]
        name = f"{case['network']} on {case['devices']} devices of {case['machine']}"
        if row["note"]:
            yield f"{name}: {row['note']}"
        else:
            yield from (f"{name}{line}" for line in _case_lines(row))


def _case_lines(row: Mapping[str, Any]) -> Iterable[str]:
    case, plans, paper = row["case"], row["plans"], row["paper"]
    for key, unit, our_key, factor in PUBLISHED:
        if key in paper:
            published = " / ".join(f"{value:g}" for value in paper[key].values())
            ours = " / ".join(three_digits(plans[name][our_key] * factor) for name in paper[key])
            yield f": published {published} {unit}; here {ours}"
    found = plans.get("found")
    if "found_over_data_parallel" in paper:
        published = ratio_text(paper["found_over_data_parallel"])
        gain = ratio_text(plans["data parallel"]["seconds"] / found["seconds"])
        yield f": published gain over data parallel {published}; here {gain}"
    if "samples_per_second" in paper:
        rate = case["batch"] * case["devices"] / found["seconds"]
        yield f": published {paper['samples_per_second']} samples/s; here {rate:.0f}"
    if "megabytes" in paper:
        published = " / ".join(str(value) for value in paper["megabytes"].values())
        ours = " / ".join(f"{size / 1e6:.0f}" for size in row["layers"].values())
        layers = " / ".join(row["layers"])
        yield f", first dense layer {layers}: published {published} MB sent; here {ours}"
    for name, plan in plans.items():
        if name not in COMPARED:
            yield f": {name} plan takes {_time_and_traffic(plan)}; found {_time_and_traffic(found)}"


def _time_and_traffic(plan: Mapping[str, Any]) -> str:
    milliseconds = three_digits(plan["seconds"] * 1e3)
    return f"{milliseconds} ms, traffic {three_digits(plan['sent_bytes'] / 1e9)} GB"


def searches_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Seconds of capture and search per case, and the gap of its plan to the lower bound."""
    table = new_table("capture and search, on this machine")
    table.add_column("network", no_wrap=True)
    table.add_column("machine", no_wrap=True)
    add_columns(
        table,
        "devices",
        "operators",
        "capture",
        "search",
        "gap",
    )
    for row in rows:
        case = row["case"]
        add_row(
            table,
            case["network"],
            case["machine"],
            str(case["devices"]),
            str(row["operators"]),
            format_seconds(row["capture_seconds"]),
            format_seconds(row["search_seconds"]),
            _gap_text(row["gap"]),
        )
    return table


def _gap_text(gap: float | None) -> str:
    if gap is None:
        return ""
    return "proved" if gap < PROVED else f"{gap:.2%}"


PREDICTORS = ("measured", "fitted", "rates")
"""Predictions of a step: by timed operators, by a fit to other models, by rates and links."""
FIDELITY = (
    "predicted by: measured: operators timed one by one, as --measure-operators does; "
    "fitted: a regression to the other models' operators, with its own error; "
    "rates: the figures of 'partita machine measure' alone.\n"
    "tau: Kendall's, of predicted and measured times: over all steps, then of one model's plans "
    "(median, lowest).\n"
    "chosen/best: the searched plan over the fastest one that was measured (median, highest)."
)
"""The legend of these tables."""


def fidelity_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """The measured steps of a setting, with their predictions and the errors of these."""
    table = new_table(f"steps on {steps[0]['place']}")
    table.caption = (
        "*: the searched plan. timed: share of the predicted compute that was timed, not fitted"
    )
    table.add_column("model", overflow="fold")
    table.add_column("plan", overflow="fold")
    add_columns(
        table,
        "measured",
        "predicted",
        "error",
        "timed",
        "fitted",
        "rates",
    )
    for step in steps:
        errors = [_error_text(step[name], step["seconds"]) for name in PREDICTORS]
        mark = "*" if step["chosen"] else ""
        add_row(
            table,
            step["model"],
            step["plan"] + mark,
            format_seconds(step["seconds"]),
            format_seconds(step["measured"]),
            errors[0],
            f"{step['shares']['measured']:.0%}",
            *errors[1:],
        )
    return table


def _error_text(predicted: float | None, measured: float) -> str:
    return "" if predicted is None else f"{predicted / measured - 1:+.0%}"


def fidelity_summary(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Errors and order of each kind of prediction, on each of the settings and over all."""
    table = new_table("relative errors, and order")
    table.add_column("on", overflow="fold")
    table.add_column("predicted by", no_wrap=True)
    add_columns(
        table,
        "steps",
        "median",
        "95 %",
        "worst",
        "tau",
        "of plans",
        "chosen/best",
    )
    for row in rows:
        predictor = row["way"]
        if row["fit_error"] is not None:
            predictor += f" (±{row['fit_error']:.0%})"
        add_row(
            table,
            row["place"],
            predictor,
            str(row["steps"]),
            f"{row['median']:.1%}",
            f"{row['p95']:.0%}",
            f"{row['worst']:.0%}",
            "" if row["tau"] is None else f"{row['tau']:.2f}",
            _pair_text(row["tau_within"]),
            _pair_text(row["chosen_over_best"]),
        )
    return table


def _pair_text(pair: Sequence[float] | None) -> str:
    return ", ".join(f"{value:.2f}" for value in pair or ())

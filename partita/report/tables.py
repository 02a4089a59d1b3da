"""Plans, comparisons and progress as a person reads them in a terminal: values in, rich tables out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from partita.machine import KINDS
from partita.plans.pipeline import stage_axes
from partita.plans.plan import Plan
from partita.report.gaps import PROVED, gaps_of
from partita.simulation.timeline import Timeline
from partita.units import format_bandwidth, format_bytes, format_flops, format_seconds

CAUSES = ("compute", "activations", "gradients", "moves")


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )


def plan_table(plan: Plan) -> Table:
    """Per layer: what each mesh axis does to it, its time by cause, its memory and traffic per device."""
    axes = ", ".join(f"{a.name}={a.size}" for a in plan.mesh.axes) or "one device"
    table = _table(f"{plan.graph} on {plan.machine} ({axes})")
    table.caption, table.caption_justify = _legend(bool(stage_axes(plan))), "left"
    table.add_column("layer", overflow="fold")
    table.add_column("split", overflow="fold")
    for column in ("compute", "exchange", "memory", "sent"):
        table.add_column(column, justify="right", no_wrap=True)
    text = plan.to_json()["operators"]
    stored = _stored(plan)
    for name, choice in text.items():
        cost = plan.why.get("operators", {}).get(name, {})
        table.add_row(
            name,
            choice + (f"  {stored[name]}" if name in stored else ""),
            format_seconds(cost["compute"]) if cost else "",
            format_seconds(sum(cost[c] for c in CAUSES[1:])) if cost else "",
            format_bytes(cost["bytes"]) if cost else "",
            format_bytes(cost["traffic"]) if cost else "",
        )
    return table


def _legend(placed: bool) -> str:
    return (
        "split: S by sample, A by attribute (height, width, position), P by parameter, R by reduction; replicate: every device does it"
        f"{'; at(i): only slice i of the axis does' if placed else ''}.\n"
        "memory: variables, optimizer slots and activations kept; sent: bytes a device exchanges, both per step."
    )


def _stored(plan: Plan) -> dict[str, str]:
    """Per operator, how its variables are stored, where that is not plainly."""
    found: dict[str, str] = {}
    for path, storage in plan.storage.items():
        owner = max(
            (n for n in plan.choices if path.startswith(n.split(":")[0] + "/")),
            key=len,
            default=None,
        )
        if owner is not None:
            found[owner] = f"ZeRO-{storage.zero}:{','.join(storage.axes)}"
    return found


def comparison_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """Plans side by side: {name, seconds, seconds by cause, peak_bytes, traffic_bytes, fits, measured_seconds}."""
    rows = list(rows)
    base = next((r["seconds"] for r in rows if r["name"] == "data parallel"), None)
    table = _table(title)
    table.add_column("plan", no_wrap=True)
    measured = any(r.get("measured_seconds") for r in rows)
    # Eighty columns hold seven: beside a measured time, its prediction is not taken apart.
    columns = (
        ["step", "memory", "sent", "gain"]
        if measured
        else ["step", "compute", "exchange", "memory", "sent", "gain"]
    )
    for column in columns + (["measured"] if measured else []):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        sent = sum(r["traffic_bytes"].values()) if "traffic_bytes" in r else None
        compute = r.get("seconds_compute")
        cells = {
            "step": format_seconds(r["seconds"]),
            "compute": format_seconds(compute) if compute is not None else "",
            "exchange": format_seconds(r["seconds"] - compute) if compute is not None else "",
            "memory": format_bytes(r["peak_bytes"])
            + ("" if r.get("fits", True) else " (does not fit)"),
            "sent": format_bytes(sent) if sent is not None else "",
            "gain": _ratio(base / r["seconds"]) if base and r["seconds"] else "",
            "measured": format_seconds(r["measured_seconds"]) if r.get("measured_seconds") else "",
        }
        table.add_row(
            r["name"],
            *(cells[c] for c in columns + (["measured"] if measured else [])),
            style="bold" if r["name"] == "found" else None,
        )
    return table


def _ratio(ratio: float) -> str:
    """
    >>> _ratio(1.5), _ratio(13.73), _ratio(214.2)
    ('1.50 x', '13.7 x', '214 x')
    """
    return f"{ratio:.{max(0, 2 - (ratio >= 10) - (ratio >= 100))}f} x"


def offers_table(rows: Sequence[Mapping[str, Any]], graph: str, samples: int) -> Table:
    """What each machine would do for a program, best first: step, throughput, and time, device hours and cost of an epoch."""
    table = _table(f"{graph}: an epoch of {samples:,} samples")
    table.add_column("machine", no_wrap=True)
    priced = any(r["cost"] is not None for r in rows)
    for column in (
        "devices",
        "step",
        "samples/s",
        "epoch",
        "device hours",
        *(["cost"] if priced else []),
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        if r["seconds"] is None:
            table.add_row(r["machine"], str(r["devices"]), "does not fit", *[""] * (3 + priced))
            continue
        cost = [f"{r['cost']:,.2f}" if r["cost"] is not None else ""] if priced else []
        epoch = format_seconds(r["epoch_seconds"]) if math.isfinite(r["epoch_seconds"]) else ""
        table.add_row(
            r["machine"],
            str(r["devices"]),
            format_seconds(r["seconds"]),
            f"{r['samples_per_second']:,.0f}",
            epoch,
            f"{r['device_hours']:.3g}",
            *cost,
        )
    return table


def explain_table(plan: Plan, layer: str) -> Table:
    """One layer: what was chosen and what its alternatives would cost, all else as planned."""
    text, cost = plan.to_json()["operators"][layer], plan.why["operators"][layer]
    table = _table(f"{layer}: {text}")
    table.add_column("choice")
    for column in ("step", "memory a device"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(
        f"{text} (chosen)",
        format_seconds(sum(cost[c] for c in CAUSES)),
        format_bytes(cost["bytes"]),
        style="bold",
    )
    for other in cost["alternatives"]:
        sign = "+" if other["seconds"] >= 0 else "-"
        more = "+" if other["bytes"] >= 0 else "-"
        table.add_row(
            other["choice"],
            f"{sign}{format_seconds(abs(other['seconds']))}",
            f"{more}{format_bytes(abs(other['bytes']))}",
        )
    return table


PARTS = {
    "compute": "kernels",
    "exchange": "collectives inside layers",
    "move": "moves between layers",
    "sum": "sums of gradients",
    "gather": "gathering stored variables",
    "held up": "kernels held up by collectives",
}
"""What the kinds of spans of a timeline are called."""
WAITS = {
    "links": "waiting for a collective",
    "held up": "held up by collectives",
    "end": "waiting for the last collectives",
    "bubble": "waiting for other devices",
}


def timeline_table(timeline: Timeline) -> Table:
    """A simulated step: what takes how much of it, by phase, and how much of each is on the critical path."""
    table = _table(
        f"{timeline.graph} on {timeline.machine}, plan '{timeline.plan}': a step of {format_seconds(timeline.seconds)}"
    )
    table.add_column(
        "what a device does"
        if timeline.groups == 1
        else f"what {timeline.groups} groups of devices do together"
    )
    for column in ("forward", "backward", "update", "in all", "critical"):
        table.add_column(column, justify="right", no_wrap=True)
    for kind, name in PARTS.items():
        spans = [s for s in timeline.spans if s.kind == kind]
        if spans:
            phases = [
                sum(s.seconds for s in spans if s.phase == phase)
                for phase in ("forward", "backward", "update")
            ]
            cells = [*phases, sum(phases), sum(s.seconds for s in spans if s.critical)]
            table.add_row(name, *(format_seconds(c) if c else "" for c in cells))
    return table


def timeline_summary(timeline: Timeline, most: int = 5) -> Iterable[str]:
    """What a simulated step waits for, holds and sends, and the longest tasks on its critical path, a line each."""
    idle = {WAITS[k]: s for k, s in timeline.idle.items() if s > 0}
    waits = ", ".join(f"{format_seconds(s)} {name}" for name, s in idle.items())
    yield f"kernels run {timeline.busy_part():.0%} of the step" + (f"; {waits}" if waits else "")
    held = ", ".join(f"{format_bytes(n)} {kind}" for kind, n in timeline.held.items() if n)
    yield f"memory {format_bytes(timeline.peak_bytes)} a device at the peak, in {timeline.peak_operator or 'the update'}: {held}"
    if timeline.traffic:
        kinds = ", ".join(
            f"{format_bytes(n)} by {kind.replace('_', '-')}" for kind, n in timeline.traffic.items()
        )
        yield f"each device sends {kinds}; all together {format_bytes(timeline.total_traffic)} a step"
    longest = sorted(timeline.critical_path(), key=lambda s: -s.seconds)[:most]
    yield "longest on the critical path: " + ", ".join(
        f"{s.name} {format_seconds(s.seconds)}" for s in longest
    )
    yield f"seconds are {timeline.source}"
    yield from (f"note: {n}" for n in timeline.notes)


def papers_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """The papers' cells on one machine: a step under each plan, how much faster the found one is, and bytes on links."""
    table = _table(title)
    table.caption_justify = "left"
    table.caption = "data parallel / expert / found; gain: of found over the first two; sent: by all devices; *: does not fit in memory"
    table.add_column("network", no_wrap=True)
    for column in ("devices", "step in ms", "gain", "sent in GB"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        three = [r["plans"][n] for n in ("data parallel", "expert", "found") if n in r["plans"]]
        cells = (
            " / ".join(_three(f["seconds"] * 1e3) + ("" if f["fits"] else "*") for f in three),
            " / ".join(_ratio(f["seconds"] / three[-1]["seconds"]) for f in three[:-1]),
            " / ".join(_three(f["sent_bytes"] / 1e9) for f in three),
        )
        table.add_row(
            r["case"]["network"],
            str(r["case"]["devices"]),
            *(cells if three else ("fits under no plan", "", "")),
        )
    return table


def papers_lines(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What the papers report for cells, each with ours, a line each; then what could not be planned, and why."""
    for r in rows:
        case, plans, paper = r["case"], r["plans"], r["paper"]
        where = f"{case['network']} on {case['devices']} devices of {case['machine']}"
        if r["note"]:
            yield f"{where}: {r['note']}"
            continue
        for key, unit, ours, scale in (
            ("seconds", "s a step", "seconds", 1),
            ("gigabytes", "GB sent", "sent_bytes", 1e-9),
            ("kernel_seconds", "s of kernels", "kernel_seconds", 1),
        ):
            if key in paper:
                theirs = " / ".join(f"{v:g}" for v in paper[key].values())
                yield f"{where}: published {theirs} {unit}; here {' / '.join(_three(plans[n][ours] * scale) for n in paper[key])}"
        if "found_over_data_parallel" in paper:
            gain = plans["data parallel"]["seconds"] / plans["found"]["seconds"]
            yield f"{where}: published gain over data parallel {_ratio(paper['found_over_data_parallel'])}; here {_ratio(gain)}"
        if "samples_per_second" in paper:
            yield f"{where}: published {paper['samples_per_second']} samples/s; here {case['batch'] * case['devices'] / plans['found']['seconds']:.0f}"
        if "megabytes" in paper:
            theirs, ours = (
                " / ".join(f"{v}" for v in paper["megabytes"].values()),
                " / ".join(f"{v / 1e6:.0f}" for v in r["layers"].values()),
            )
            yield f"{where}, first dense layer {' / '.join(r['layers'])}: published {theirs} MB sent; here {ours}"
        for name, f in plans.items():
            if name not in ("data parallel", "expert", "found"):
                found = plans["found"]
                yield f"{where}: {name} plan takes {_three(f['seconds'] * 1e3)} ms and sends {_three(f['sent_bytes'] / 1e9)} GB; found {_three(found['seconds'] * 1e3)} ms, {_three(found['sent_bytes'] / 1e9)} GB"


def searches_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """How long capturing and searching took, and how far the plans found may be from the best ones."""
    table = _table("capture and search, on this machine")
    table.add_column("network", no_wrap=True)
    for column in ("machine", "devices", "operators", "capture", "search", "gap"):
        table.add_column(column, justify="left" if column == "machine" else "right", no_wrap=True)
    for r in rows:
        case, gap = r["case"], r["gap"]
        table.add_row(
            case["network"],
            case["machine"],
            str(case["devices"]),
            str(r["operators"]),
            format_seconds(r["capture_seconds"]),
            format_seconds(r["search_seconds"]),
            "" if gap is None else "proved" if gap < 1e-6 else f"{gap:.2%}",
        )
    return table


def fidelity_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """Every step that was measured on a setting, with what was predicted by its operators, and how far off each way to predict is."""
    table = _table(f"steps on {steps[0]['place']}")
    table.caption_justify, table.caption = (
        "left",
        "*: the plan found; predicted by operators, of whose compute so much was timed and not fitted",
    )
    for column in ("model", "plan"):
        table.add_column(column, overflow="fold")
    for column in ("measured", "predicted", "error", "timed", "fitted", "rates"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in steps:
        off = [
            "" if r[way] is None else f"{r[way] / r['seconds'] - 1:+.0%}"
            for way in ("measured", "fitted", "rates")
        ]
        times = (format_seconds(r["seconds"]), format_seconds(r["measured"]))
        table.add_row(
            r["model"],
            r["plan"] + "*" * r["chosen"],
            *times,
            off[0],
            f"{r['shares']['measured']:.0%}",
            *off[1:],
        )
    return table


FIDELITY = (
    "measured: operators timed one by one, as --measure-operators does; fitted: operators by a regression to the other models', none of its own, and what it says to be off; "
    "rates: by what 'partita machine measure' finds alone. tau: Kendall's, of predicted and measured times, over all steps, then of one model's plans (median, lowest). "
    "chosen/best: the plan found over the fastest that was measured (median, highest)."
)
"""What the columns and rows of these tables are."""


def fidelity_summary(rows: Iterable[Mapping[str, Any]]) -> Table:
    """How good each way to predict is, on each of the settings and over all."""
    table = _table("relative errors, and order")
    table.add_column("on", overflow="fold")
    table.add_column("predicted by", no_wrap=True)
    for column in ("steps", "median", "95 %", "worst", "tau", "of plans", "chosen/best"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in rows:
        errors = (f"{r['median']:.1%}", f"{r['p95']:.0%}", f"{r['worst']:.0%}")
        pairs = (
            ", ".join(f"{v:.2f}" for v in r[key] or ())
            for key in ("tau_within", "chosen_over_best")
        )
        way = r["way"] if r["fit_error"] is None else f"{r['way']} (±{r['fit_error']:.0%})"
        table.add_row(
            r["place"],
            way,
            str(r["steps"]),
            *errors,
            "" if r["tau"] is None else f"{r['tau']:.2f}",
            *pairs,
        )
    return table


def _three(value: float) -> str:
    """
    >>> _three(0.02341), _three(66.51), _three(1234.5)
    ('0.0234', '66.5', '1230')
    """
    digits = f"{value:.3g}"
    return f"{float(digits):.0f}" if "e+" in digits else digits


def calibration_table(measured: Iterable[Any]) -> Table:
    """What was measured of a machine: programs, their time, and what a device does in it."""
    table = _table("measured, all devices at once")
    table.add_column("program")
    for column in ("size", "time", "rate of a device"):
        table.add_column(column, justify="right", no_wrap=True)
    for m in measured:
        text = (
            format_bandwidth
            if m.what == "stream" or m.what in KINDS
            else lambda rate: f"{format_flops(rate)}/s"
        )
        table.add_row(m.what, m.size, format_seconds(m.seconds), text(m.rate) if m.rate else "")
    return table


def _proofs(plan: Plan) -> Iterable[str]:
    """The distance of a plan to its lower bounds, one text for each space."""
    gaps = gaps_of(plan)
    if gaps.runnable is not None:
        proved = gaps.runnable < PROVED
        yield "proved best in its space" if proved else f"within {gaps.runnable:.1%} of the bound"
    if gaps.staged is not None and gaps.staged >= PROVED:
        yield f"within {gaps.staged:.1%} of the bound with stages and placement"


def summary(plan: Plan) -> Iterable[str]:
    """The plan's prediction in a few lines, with how sure it is."""
    p = plan.predicted
    if "seconds" in p:
        source = p.get("provenance", {}).get("seconds", "")
        proof = "".join(f"; {text}" for text in _proofs(plan))
        yield f"step {format_seconds(p['seconds'])} predicted ({source}){proof}"
        yield f"memory {format_bytes(p['peak_bytes'])} a device at the peak; {format_bytes(sum(p['traffic_bytes'].values()))} sent"
    yield from (f"note: {n}" for n in plan.notes)

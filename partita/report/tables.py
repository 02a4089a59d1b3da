"""Plans, comparisons and simulated steps as tables for a terminal of 80 columns.

Names of layers, plans and machines are the user's: every cell is plain text, never Rich markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from partita.cost.evaluate import PHASES
from partita.machine import KINDS
from partita.plans.pipeline import stage_axes
from partita.plans.plan import Plan
from partita.report.folding import LayerRow, folded
from partita.report.gaps import PROVED, USELESS_GAP, Gaps, gaps_of
from partita.report.layers import owner_of
from partita.simulation.timeline import Timeline
from partita.units import (
    format_bandwidth,
    format_bytes,
    format_flops,
    format_joules,
    format_seconds,
    three_digits,
)

EXCHANGES = ("activations", "gradients", "moves")
"""Causes of a layer's time besides its kernels."""
OFFLOADED = " slots in host memory"
"""Text of a layer whose optimizer slots are in the memory of the host."""
SAME_SPEED = 0.005
"""Relative difference from which a plan is faster or slower than another, as printed."""


def new_table(title: str) -> Table:
    """An empty table."""
    return Table(
        title=Text(title),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def add_columns(table: Table, *names: str) -> None:
    """Adds columns of figures."""
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """Adds a row of plain text."""
    table.add_row(*(Text(cell) for cell in cells), style=style)


# ----------------------------------------------------------------------------------------- a plan

PLAN_COLUMNS = {
    "compute": format_seconds,
    "exchange": format_seconds,
    "memory": format_bytes,
    "traffic": format_bytes,
}


def plan_table(plan: Plan) -> Table:
    """A plan per layer, long plans folded: split, time by cause, memory and traffic of a device."""
    table = new_table(plan_title(plan))
    table.add_column("layer", overflow="fold")
    table.add_column("split", overflow="fold")
    add_columns(table, *PLAN_COLUMNS)
    for row in plan_rows(plan):
        figures = [
            write(row.figures[column]) if row.figures else ""
            for column, write in PLAN_COLUMNS.items()
        ]
        add_row(table, row.text, row.split, *figures)
    return table


def plan_title(plan: Plan) -> str:
    """Graph, machine and mesh of a plan."""
    axes = ", ".join(f"{axis.name}={axis.size}" for axis in plan.mesh.axes) or "one device"
    return f"{plan.graph} on {plan.machine} ({axes})"


def plan_rows(plan: Plan) -> list[LayerRow]:
    """The rows of a plan's table, folded to about 30."""
    return folded(_layer_rows(plan))


def _layer_rows(plan: Plan) -> list[LayerRow]:
    stored = _storage_texts(plan)
    reasons = plan.why.get("operators", {})
    rows = []
    for name, split in plan.to_json()["operators"].items():
        text = f"{split}  {stored[name]}" if name in stored else split
        cost = reasons.get(name)
        figures = {}
        if cost:
            figures = {
                "compute": cost["compute"],
                "exchange": sum(cost[cause] for cause in EXCHANGES),
                "memory": cost["bytes"],
                "traffic": cost["traffic"],
            }
        rows.append(LayerRow((name,), text, figures))
    return rows


def _storage_texts(plan: Plan) -> dict[str, str]:
    """Per operator with variables stored in parts or slots in host memory, how they are stored."""
    texts: dict[str, str] = {}
    for path, storage in plan.storage.items():
        owner = owner_of(path, plan)
        if owner is not None:
            texts[owner] = f"ZeRO-{storage.zero}:{','.join(storage.axes)}"
    for owner in {owner_of(path, plan) for path in plan.offload}:
        if owner is not None:
            texts[owner] = texts.get(owner, "") + OFFLOADED
    return texts


def legend(plan: Plan) -> str:
    """The legend of a plan's table; printed once, below the first one."""
    placed = "; at(i): only slice i of the axis computes it" if stage_axes(plan) else ""
    return (
        "split: S by sample, A by attribute (height, width, position), P by parameter,\n"
        f"R by reduction; replicate: every device computes it{placed}.\n"
        "memory: variables, optimizer slots and activations of a device; traffic: bytes\n"
        "that a device exchanges in a step. (n): sums of n layers.\n"
    )


def summary(plan: Plan) -> Iterable[str]:
    """A plan's prediction in a few lines: step, proof, memory, traffic, notes."""
    predicted = plan.predicted
    if "seconds" in predicted:
        source = predicted.get("provenance", {}).get("seconds")
        step = f"step {format_seconds(predicted['seconds'])} predicted"
        if source:
            step += f" ({source})"
        yield "; ".join([step, *proofs(gaps_of(plan))])
        figures = []
        if "peak_bytes" in predicted:
            figures.append(f"memory {format_bytes(predicted['peak_bytes'])} a device at the peak")
        if "traffic_bytes" in predicted:
            traffic = sum(predicted["traffic_bytes"].values())
            figures.append(f"traffic {format_bytes(traffic)} a device")
        if figures:
            yield "; ".join(figures)
    if "joules" in predicted:
        source = predicted.get("provenance", {}).get("joules", "")
        yield f"energy {format_joules(predicted['joules'])} a step of all devices ({source})"
    yield from (f"note: {note}" for note in plan.notes)


def proofs(gaps: Gaps) -> Iterable[str]:
    """The proofs that the lower bounds of the two spaces give for a plan.

    >>> list(proofs(Gaps(0.0, 0.25)))
    ['proved optimal', 'within 25.0% of the lower bound with stages']
    >>> list(proofs(Gaps(20.3, None)))
    ['no useful lower bound is known']
    """
    if gaps.runnable is not None:
        yield _proof(gaps.runnable)
    if gaps.staged is not None and PROVED <= gaps.staged <= USELESS_GAP:
        yield f"{_proof(gaps.staged)} with {gaps.space}"


def _proof(gap: float) -> str:
    if gap < PROVED:
        return "proved optimal"
    if gap > USELESS_GAP:
        return "no useful lower bound is known"
    return f"within {gap:.1%} of the lower bound"


def explain_table(plan: Plan, layer: str) -> Table:
    """A layer's choice, and what its alternatives would add, all other layers as planned."""
    text = plan.to_json()["operators"][layer]
    stored = _storage_texts(plan)
    if layer in stored:
        text = f"{text}  {stored[layer]}"
    cost = plan.why["operators"][layer]
    table = new_table(f"{layer}: {text}")
    table.add_column("choice")
    add_columns(table, "step", "memory a device")
    seconds = cost["compute"] + sum(cost[cause] for cause in EXCHANGES)
    add_row(
        table,
        f"{text} (chosen)",
        format_seconds(seconds),
        format_bytes(cost["bytes"]),
        style="bold",
    )
    alternatives = cost["alternatives"]
    for other in alternatives:
        sign = "+" if other["bytes"] >= 0 else "-"
        add_row(
            table,
            other["choice"],
            _signed_seconds(other["seconds"]),
            f"{sign}{format_bytes(abs(other['bytes']))}",
        )
    if any(other["seconds"] < 0 for other in alternatives):
        table.caption = "-: faster within the error of predictions, or too large for the memory."
    return table


def _signed_seconds(seconds: float) -> str:
    sign = "+" if seconds >= 0 else "-"
    return f"{sign}{format_seconds(abs(seconds))}"


# ----------------------------------------------------------------------------- plans side by side


def comparison_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """Plans side by side: {name, seconds, seconds_compute, peak_bytes, traffic_bytes, fits,
    measured_seconds}."""
    rows = list(rows)
    bases = [row["seconds"] for row in rows if row["name"] == "data parallel"]
    table = new_table(title)
    table.add_column("plan", no_wrap=True)
    # Eighty columns hold seven: beside a measured time, the prediction is not taken apart.
    if any(row.get("measured_seconds") for row in rows):
        columns = ["step", "memory", "traffic", "gain", "measured"]
    else:
        columns = ["step", "compute", "exchange", "memory", "traffic", "gain"]
    if any("joules" in row for row in rows):
        columns.insert(1, "energy")
        columns.remove("traffic")
    add_columns(table, *columns)
    for row in rows:
        cells = _comparison_cells(row, bases[0] if bases else None)
        style = "bold" if row["name"] == "found" else None
        add_row(
            table,
            row["name"],
            *(cells[column] for column in columns),
            style=style,
        )
    return table


def _comparison_cells(row: Mapping[str, Any], base_seconds: float | None) -> dict[str, str]:
    seconds = row["seconds"]
    cells = {
        "step": format_seconds(seconds),
        "energy": format_joules(row["joules"]) if "joules" in row else "",
        "compute": "",
        "exchange": "",
        "memory": format_bytes(row["peak_bytes"]),
        "traffic": "",
        "gain": "",
        "measured": "",
    }
    if not row.get("fits", True):
        cells["memory"] += " (does not fit)"
    if row.get("seconds_compute") is not None:
        compute = row["seconds_compute"]
        if math.isclose(compute, seconds):
            compute = seconds
        # Above the step, it adds up device groups that compute at the same time.
        is_of_device = compute <= seconds
        cells["compute"] = format_seconds(compute) if is_of_device else "-"
        cells["exchange"] = format_seconds(seconds - compute) if is_of_device else "-"
    if "traffic_bytes" in row:
        cells["traffic"] = format_bytes(sum(row["traffic_bytes"].values()))
    if base_seconds and seconds:
        cells["gain"] = gain_text(base_seconds / seconds)
    if row.get("measured_seconds"):
        cells["measured"] = format_seconds(row["measured_seconds"])
    return cells


def gain_text(ratio: float) -> str:
    """A speed ratio; "" for the same speed.

    >>> gain_text(1.5), gain_text(13.73), gain_text(1.001)
    ('1.50 x', '13.7 x', '')
    """
    return "" if abs(ratio - 1) < SAME_SPEED else ratio_text(ratio)


def ratio_text(ratio: float) -> str:
    """A ratio with three digits.

    >>> ratio_text(1.5), ratio_text(13.73), ratio_text(214.2)
    ('1.50 x', '13.7 x', '214 x')
    """
    return f"{three_digits(ratio)} x"


def offers_table(
    rows: Sequence[Mapping[str, Any]],
    graph: str,
    samples: int,
) -> Table:
    """Machines for a program, the best first: step, throughput, and time, device hours and cost
    of an epoch."""
    table = new_table(f"{graph}: an epoch of {samples:,} samples")
    table.add_column("machine", no_wrap=True)
    columns = ["devices", "step", "samples/s", "epoch", "device hours"]
    if any(row.get("joules") is not None for row in rows):
        columns.insert(2, "energy")
    if any(row["cost"] is not None for row in rows):
        columns.append("cost")
    add_columns(table, *columns)
    for row in rows:
        cells = _offer_cells(row)
        add_row(
            table,
            row["machine"],
            *(cells.get(column, "") for column in columns),
        )
    return table


def _offer_cells(row: Mapping[str, Any]) -> dict[str, str]:
    cells = {"devices": str(row["devices"])}
    if row["seconds"] is None:
        cells["step"] = "does not fit"
        return cells
    cells["step"] = format_seconds(row["seconds"])
    if row.get("joules") is not None:
        cells["energy"] = format_joules(row["joules"])
    cells["samples/s"] = f"{row['samples_per_second']:,.0f}"
    cells["device hours"] = f"{row['device_hours']:.3g}"
    if math.isfinite(row["epoch_seconds"]):
        cells["epoch"] = format_seconds(row["epoch_seconds"])
    if row["cost"] is not None:
        cells["cost"] = f"{row['cost']:,.2f}"
    return cells


# ------------------------------------------------------------------------------- a simulated step

PARTS = {
    "compute": "kernels",
    "exchange": "collectives inside layers",
    "move": "moves between layers",
    "sum": "sums of gradients",
    "gather": "gathering stored variables",
    "held up": "kernels held up by collectives",
    "host": "copies to and from the host",
}
"""Names of the kinds of spans of a timeline."""
WAITS = {
    "links": "waiting for a collective",
    "held up": "held up by collectives",
    "end": "waiting for the last collectives",
    "bubble": "waiting for other devices",
    "host": "copying to and from the host",
}
"""Names of the causes of idle time."""
COLLECTIVES = ("exchange", "sum", "gather", "move")
"""Kinds of tasks that send between devices."""


def parts_table(plans: Mapping[str, Any]) -> Table:
    """Training on parts of a graph, by their number: {graph, machine, best, plans}, of each plan
    {parts, seconds, needed_bytes, available_bytes, fits, traffic_bytes, host_bytes, host_seconds,
    memory_plan}."""
    title = f"{plans['graph']} on {plans['machine']}: predicted training, one step an epoch"
    table = new_table(title)
    add_columns(table, "parts", "epoch", "memory", "of", "fits", "traffic", "host", "copies")
    for row in plans["plans"]:
        add_row(
            table,
            f"{row['parts']}",
            format_seconds(row["seconds"]),
            format_bytes(row["needed_bytes"]),
            format_bytes(row["available_bytes"]),
            "yes" if row["fits"] else "no",
            format_bytes(row["traffic_bytes"]),
            format_bytes(row["host_bytes"]) if row["memory_plan"] else "-",
            format_seconds(row["host_seconds"]) if row["memory_plan"] else "-",
            style="bold" if row == plans["best"] else None,
        )
    return table


def timeline_table(timeline: Timeline) -> Table:
    """A simulated step: seconds by kind and phase, in total, and on the critical path."""
    table = new_table(
        f"{timeline.graph} on {timeline.machine}, plan '{timeline.plan}': a step of "
        f"{format_seconds(timeline.seconds)}"
    )
    one_group = timeline.groups == 1
    table.add_column("a device" if one_group else f"{timeline.groups} device groups together")
    add_columns(table, *PHASES, "total", "critical")
    for kind, name in PARTS.items():
        spans = [span for span in timeline.spans if span.kind == kind]
        if not spans:
            continue
        phases = [sum(span.seconds for span in spans if span.phase == phase) for phase in PHASES]
        critical = sum(span.seconds for span in spans if span.critical)
        seconds = [*phases, sum(phases), critical]
        add_row(
            table,
            name,
            *(format_seconds(value) if value else "" for value in seconds),
        )
    return table


def timeline_summary(timeline: Timeline, longest: int = 5) -> Iterable[str]:
    """A simulated step in lines: its seconds as a sum, memory at the peak, traffic, and the longest
    tasks of the critical path."""
    yield from _seconds_lines(timeline)
    memory = [f"{format_bytes(size)} {kind}" for kind, size in timeline.held.items() if size]
    peak_layer = timeline.peak_operator or "the update"
    yield (
        f"memory {format_bytes(timeline.peak_bytes)} a device at the peak, in {peak_layer}: "
        f"{', '.join(memory)}"
    )
    if timeline.traffic:
        kinds = [
            f"{format_bytes(size)} by {kind.replace('_', '-')}"
            for kind, size in timeline.traffic.items()
        ]
        yield (
            f"traffic of a device: {', '.join(kinds)}; "
            f"of all devices: {format_bytes(timeline.total_traffic)} a step"
        )
    path = sorted(timeline.critical_path(), key=lambda span: -span.seconds)
    tasks = [f"{span.name} {format_seconds(span.seconds)}" for span in path[:longest]]
    yield f"longest on the critical path: {', '.join(tasks)}"
    if timeline.joules is not None:
        yield f"energy of all devices: {format_joules(timeline.joules)} a step"
    yield f"source of the figures: {timeline.source}"
    yield from (f"note: {note}" for note in timeline.notes)


def _seconds_lines(timeline: Timeline) -> Iterable[str]:
    """The seconds of a device's step as a sum of kernels and idle time, and the hidden part of its
    collectives."""
    busy = timeline.busy_part()
    terms = [f"{format_seconds(busy * timeline.seconds)} kernels ({busy:.0%})"]
    terms += [
        f"{format_seconds(seconds)} {WAITS[kind]}"
        for kind, seconds in timeline.idle.items()
        if seconds > 0
    ]
    yield f"step {format_seconds(timeline.seconds)} = {' + '.join(terms)}"
    sent = sum(timeline.by_kind().get(kind, 0.0) for kind in COLLECTIVES)
    if sent and "bubble" not in timeline.idle:
        exposed = sum(timeline.idle.values())
        hidden = max(0.0, sent - exposed)
        yield (
            f"collectives: {format_seconds(sent)}, of which {format_seconds(hidden)} "
            f"({hidden / sent:.0%}) are hidden behind kernels"
        )


# ----------------------------------------------------------------------------------- measurements


def compiled_table(rows: Iterable[tuple[str, str, str]], machine: str, compiler: str) -> Table:
    """Figures of a plan, planned and compiled, of one device and step."""
    table = new_table(f"planned for {machine}, and compiled by {compiler}; of one device")
    table.add_column("", no_wrap=True)
    add_columns(table, "planned", "compiled")
    for row in rows:
        add_row(table, *row)
    return table


def calibration_table(measured: Iterable[Any]) -> Table:
    """Measurements of a machine: programs, their time, and the rate of a device."""
    table = new_table("measured, all devices at once")
    table.add_column("program")
    add_columns(table, "size", "time", "rate of a device")
    for measurement in measured:
        rate = ""
        if measurement.rate and (measurement.kind == "stream" or measurement.kind in KINDS):
            rate = format_bandwidth(measurement.rate)
        elif measurement.rate:
            rate = f"{format_flops(measurement.rate)}/s"
        add_row(
            table,
            measurement.kind,
            measurement.size,
            format_seconds(measurement.seconds),
            rate,
        )
    return table

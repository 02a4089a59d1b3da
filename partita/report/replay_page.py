"""Replays of a trace as one page: events of the machine and decisions of policies over time.

A strip for each device or level that changes is stronger where it is slower, and full where it is
lost. Below it, a strip for each policy has its steps per second, with gaps where the plan changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from partita.management.replay import Replay
from partita.management.traces import MachineState, Trace
from partita.report.elements import Html, marked, section_of, table_of, tag
from partita.report.html import document, header
from partita.report.policy_tables import replay_columns, replay_note, replay_row
from partita.report.strips import UNITS, axis_row, strip_row
from partita.units import format_seconds

EVENT_HEIGHT = 14
"""Of the strip of a device or level, pixels."""
RATE_HEIGHT = 48
"""Of the strip of a policy, pixels."""
PALEST = 0.2
"""Opacity of a device at full speed, if it had a strip there; a lost one has 1."""


def replay_page(program: str, machine: str, trace: Trace, replays: Sequence[Replay]) -> str:
    """A page that shows a trace and the replays of it; the first replay is the oracle's."""
    oracle, *runs = replays
    best = max(runs, key=lambda run: run.steps, default=oracle)
    facts = {
        "best policy": best.policy,
        "steps": f"{best.steps:,.0f}",
        "behind the oracle": f"{1 - best.steps / oracle.steps:.1%}".replace("%", " %"),
        "events": f"{len(trace.events)}",
    }
    rows = [replay_row(run, oracle) for run in sorted(replays, key=lambda run: -run.steps)]
    strips = [_machine_strips(trace)]
    highest = max((stretch.rate for run in runs for stretch in run.stretches), default=1.0)
    strips += [_policy_strip(run, highest) for run in runs]
    legend = (
        marked("p-throttled", "slower or lost: stronger is slower"),
        marked("p-watts", "steps per second"),
        marked("p-trip", "the plan changes"),
    )
    body = [
        header(program, f"{oracle.seconds:,.0f} s on a simulated {machine} that changes", facts),
        section_of("Policies", table_of("Policies of plan changes", replay_columns(), rows)),
        section_of(
            "Events and decisions over time",
            tag("p", legend, class_="keys"),
            tag("div", axis_row(oracle.seconds), strips, class_="runs"),
        ),
        section_of("What the figures mean", tag("p", replay_note())),
    ]
    return document(f"A changing {machine}", body, styles=("policies.css",))


def _machine_strips(trace: Trace) -> Html:
    """A strip for each device or level that changes, and a list of the events."""
    segments = trace.segments()
    seconds = sum(segment.seconds for segment in segments)
    drawings: dict[str, list[Html]] = {}
    for segment in segments:
        left = UNITS * segment.start / seconds
        width = UNITS * segment.seconds / seconds
        path = f"M{left:.1f} 0h{width:.2f}v{EVENT_HEIGHT}h-{width:.2f}z"
        for name, (factor, text) in _changed(segment.state).items():
            opacity = f"{PALEST + (1 - PALEST) * (1 - min(factor, 1.0)):.2f}"
            title = tag("title", text)
            drawing = tag("path", title, d=path, class_="lost", fill_opacity=opacity)
            drawings.setdefault(name, []).append(drawing)
    rows = [strip_row(name, parts, EVENT_HEIGHT) for name, parts in sorted(drawings.items())]
    events = [(f"{event.second:g} s", str(event)) for event in trace.events]
    table = table_of("Events", ("at", "event"), events)
    summary = tag("summary", f"{len(events)} event{'s' if len(events) != 1 else ''}")
    caption = tag("figcaption", tag("b", "machine"))
    return tag("figure", caption, rows, tag("details", summary, table), class_="run")


def _changed(state: MachineState) -> dict[str, tuple[float, str]]:
    """Device or level -> (factor of its speed, its state in words), for those that differ."""
    factors = {f"device {device}": factor for device, factor in state.slow}
    factors |= dict(state.links)
    changed = {name: (factor, f"{name} at {factor:.0%}") for name, factor in factors.items()}
    for device in state.lost:
        changed[f"device {device}"] = (0.0, f"device {device} is lost")
    return changed


def _policy_strip(run: Replay, highest: float) -> Html:
    """Steps per second over time with a line at each change, and a list of the changes."""
    clock = 0.0
    drawing = []
    for stretch in run.stretches:
        left = UNITS * clock / run.seconds
        width = UNITS * stretch.seconds / run.seconds
        clock += stretch.seconds
        if stretch.rate == 0:
            continue
        top = RATE_HEIGHT * (1 - stretch.rate / highest)
        path = f"M{left:.1f} {RATE_HEIGHT}V{top:.1f}h{width:.2f}V{RATE_HEIGHT}z"
        title = tag("title", f"{stretch.plan}: {stretch.rate:.3g} steps per second")
        drawing.append(tag("path", title, d=path, class_="watts"))
    rows = []
    for change in run.changes:
        x = UNITS * change.second / run.seconds
        title = tag("title", str(change))
        drawing.append(tag("path", title, d=f"M{x:.1f} 0V{RATE_HEIGHT}", class_="trip"))
        price = format_seconds(change.price)
        rows.append((f"{change.second:.0f} s", change.reason, change.plan, price))
    count = len(rows)
    summary = tag("summary", f"{count} decision{'s' if count != 1 else ''}")
    table = table_of(f"Decisions of {run.policy}", ("at", "reason", "plan", "costs"), rows)
    details = tag("details", summary, table) if rows else tag("p", "no decision", class_="note")
    return tag(
        "figure",
        tag("figcaption", tag("b", run.policy), " ", tag("small", f"{run.steps:,.0f} steps")),
        strip_row("steps per second", drawing, RATE_HEIGHT),
        details,
        class_="run",
    )

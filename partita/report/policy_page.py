"""Runs under policies for operating points as one page: temperature, power and decisions over time.

A section for each simulated hardware has the table of the policies and a strip for each of them:
the hottest node with the trips, the power, and a lane per cluster whose color is stronger where
it clocks faster. All strips of a section share their scales, so that heights and lengths compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from partita.management.comparison import PolicyComparison
from partita.management.hardware import Cluster, Hardware
from partita.management.power import Moment, PowerRun
from partita.report.elements import (
    Html,
    join,
    marked,
    seconds_text,
    section_of,
    table_of,
    tag,
)
from partita.report.html import document, header
from partita.report.policy_tables import by_product, policy_columns, policy_row, policy_summary
from partita.report.strips import UNITS, axis_row, strip_row
from partita.units import exact, format_joules

HEIGHTS = {"celsius": 72, "watts": 40, "lane": 14, "gap": 6}
"""In pixels."""
PALEST = 0.25
"""Opacity of the slowest frequency; the fastest one has 1."""
LISTED = 40
"""Decisions of a run that its list shows."""


class Scales(NamedTuple):
    """The ends of the axes of all strips of a section."""

    seconds: float
    coolest: float
    hottest: float
    watts: float


def policy_page(comparisons: Sequence[PolicyComparison]) -> str:
    """A page that shows the runs of a program under policies."""
    first = comparisons[0]
    best = min(
        (run for run in first.runs if run.policy != "oracle"),
        key=lambda run: run.energy_delay,
        default=first.oracle,
    )
    title = f"{first.steps:,} training steps on a simulated {first.machine}"
    facts = {
        "best as described": best.policy,
        "energy": format_joules(best.joules),
        "time": seconds_text(best.seconds),
        "hottest": None if best.peak_celsius is None else f"{best.peak_celsius:.0f} °C",
        "times rest on": f"{first.status} figures",
        "joules rest on": f"{first.power_status} figures",
    }
    body = [header(first.program, title, facts)]
    for comparison in comparisons:
        body.append(_section(comparison))
    notes = [tag("p", line) for line in policy_summary(comparisons)]
    body.append(section_of("What the figures mean", *notes))
    return document(f"Policies on {first.machine}", body, styles=("policies.css",))


def _section(comparison: PolicyComparison) -> Html:
    runs = by_product(comparison)
    rows = [policy_row(comparison, run) for run in runs]
    scales = _scales(comparison)
    strips = [_strip(comparison, run, scales) for run in runs]
    return section_of(
        f"Hardware {comparison.hardware}",
        table_of(f"Policies, hardware {comparison.hardware}", policy_columns(comparison), rows),
        tag("h3", "The runs over time"),
        _legend(comparison),
        tag("div", axis_row(scales.seconds), strips, class_="runs"),
    )


def _legend(comparison: PolicyComparison) -> Html:
    keys = []
    thermal = comparison.simulated.machine.thermal
    if thermal is not None:
        keys.append(marked("p-celsius", "hottest node"))
        temperatures = sorted({f"{trip.temperature:g}" for trip in thermal.trips})
        if temperatures:
            noun = "trip" if len(temperatures) == 1 else "trips"
            keys.append(marked("p-trip", f"{noun} at {', '.join(temperatures)} °C"))
            keys.append(marked("p-throttled", "a trip limits clocks"))
    keys.append(marked("p-watts", "power"))
    keys.append(marked("p-clock", "clock: stronger is faster"))
    return tag("p", keys, class_="keys")


def _scales(comparison: PolicyComparison) -> Scales:
    moments = [moment for run in comparison.runs for moment in run.moments]
    thermal = comparison.simulated.machine.thermal
    trips = [trip.temperature for trip in thermal.trips] if thermal is not None else []
    temperatures = [moment.celsius for moment in moments]
    return Scales(
        seconds=max(run.seconds for run in comparison.runs),
        coolest=min(temperatures) - 2,
        hottest=max(*temperatures, *trips) + 2,
        watts=max(moment.joules / moment.seconds for moment in moments),
    )


# A run


def _strip(comparison: PolicyComparison, run: PowerRun, scales: Scales) -> Html:
    """A run over time: two curves and a lane per cluster, each with its name."""
    hardware = comparison.simulated
    parts: list[Html] = []
    if run.peak_celsius is not None:
        named = f"hottest node, up to {run.peak_celsius:.0f} °C"
        parts.append(strip_row(named, _temperature(hardware, run, scales), HEIGHTS["celsius"]))
    watts = run.joules / run.seconds
    parts.append(
        strip_row(f"power, {watts:.1f} W in the mean", _power(run, scales), HEIGHTS["watts"])
    )
    for number, cluster in enumerate(hardware.clusters):
        lane = _lane(hardware, run, number, scales)
        parts.append(strip_row(cluster.name, lane, HEIGHTS["lane"]))
    regret = f"{comparison.regret(run):+.1%}".replace("%", " %")
    figures = f"{format_joules(run.joules)} in {seconds_text(run.seconds)}, {regret}"
    return tag(
        "figure",
        tag("figcaption", tag("b", run.policy), " ", tag("small", figures)),
        parts,
        _decisions(hardware, run),
        class_="run",
    )


def _temperature(hardware: Hardware, run: PowerRun, scales: Scales) -> list[Html]:
    height = HEIGHTS["celsius"]
    span = scales.hottest - scales.coolest

    def y_of(celsius: float) -> float:
        return height * (scales.hottest - celsius) / span

    drawing = []
    thermal = hardware.machine.thermal
    assert thermal is not None
    for celsius in sorted({trip.temperature for trip in thermal.trips}):
        path = f"M0 {y_of(celsius):.1f}H{UNITS}"
        drawing.append(tag("path", tag("title", f"trip at {celsius:g} °C"), d=path, class_="trip"))
    points = []
    limited = ""
    clock = 0.0
    for moment in run.moments:
        left = UNITS * clock / scales.seconds
        clock += moment.seconds
        right = UNITS * clock / scales.seconds
        points.append(f"{right:.1f} {y_of(moment.celsius):.1f}")
        if moment.setting != moment.asked:
            limited += f"M{left:.1f} {height - 2}H{right:.1f}"
    drawing.append(tag("path", d=f"M{'L'.join(points)}", class_="celsius"))
    if limited:
        drawing.append(tag("path", d=limited, class_="throttled"))
    return drawing


def _power(run: PowerRun, scales: Scales) -> list[Html]:
    height = HEIGHTS["watts"]
    path = f"M0 {height}"
    clock = 0.0
    for moment in run.moments:
        clock += moment.seconds
        top = height * (1 - moment.joules / moment.seconds / scales.watts)
        path += f"V{top:.1f}H{UNITS * clock / scales.seconds:.1f}"
    return [tag("path", d=f"{path}V{height}z", class_="watts")]


def _lane(hardware: Hardware, run: PowerRun, cluster: int, scales: Scales) -> list[Html]:
    """The operating points of a cluster over time, a path for each point."""
    height = HEIGHTS["lane"]
    path_by_point: dict[tuple[int, int], str] = {}
    clock = 0.0
    for point, moments in groupby(run.moments, lambda moment: _point(hardware, moment, cluster)):
        left = UNITS * clock / scales.seconds
        clock += sum(moment.seconds for moment in moments)
        width = UNITS * clock / scales.seconds - left
        path = path_by_point.get(point, "")
        path_by_point[point] = path + f"M{left:.1f} 0h{width:.2f}v{height}h-{width:.2f}z"
    end = UNITS * run.seconds / scales.seconds
    drawing = [tag("rect", width=f"{end:.1f}", height=height, class_="lane")]
    frequencies = hardware.clusters[cluster].frequencies
    for (active, point), path in sorted(path_by_point.items()):
        if not active:
            continue
        share = frequencies[point] / frequencies[-1] * active / hardware.clusters[cluster].devices
        opacity = PALEST + (1 - PALEST) * share
        text = f"{active} × {exact(float(frequencies[point]), 'Hz')}"
        title = tag("title", text)
        drawing.append(tag("path", title, d=path, class_="clock", fill_opacity=f"{opacity:.2f}"))
    return drawing


def _point(hardware: Hardware, moment: Moment, cluster: int) -> tuple[int, int]:
    """Active devices and operating point of a cluster."""
    setting = hardware.settings[moment.setting]
    return setting.active[cluster], setting.points[cluster]


# Decisions in words


def _decisions(hardware: Hardware, run: PowerRun) -> Html:
    """A list of the changes of the setting, folded."""
    rows = []
    before: Moment | None = None
    clock = 0.0
    for moment in run.moments:
        if before is None or moment.setting != before.setting:
            asked = ""
            if moment.asked != moment.setting:
                asked = f"a trip limits {setting_text(hardware, moment.asked)}"
            at = f"{clock:.1f} s"
            text = setting_text(hardware, moment.setting)
            rows.append((at, text, f"{moment.celsius:.0f} °C", asked))
        before = moment
        clock += moment.seconds
    shown = rows[:LISTED]
    summary = "1 setting" if len(rows) == 1 else f"{len(rows)} settings in turn"
    rest: Html | str = ""
    if len(rows) > LISTED:
        rest = tag("p", f"{len(rows) - LISTED} more follow.", class_="note")
    table = table_of(f"Decisions of {run.policy}", ("from", "setting", "then", ""), shown)
    return tag("details", tag("summary", summary), join([table, rest]))


def setting_text(hardware: Hardware, index: int) -> str:
    """A setting in words: "big 4 × 1.40 GHz, little off"."""
    setting = hardware.settings[index]
    choices = zip(hardware.clusters, setting.active, setting.points, strict=True)
    parts = []
    for cluster, active, point in choices:
        parts.append(f"{cluster.name} {_clock_text(cluster, active, point)}")
    return ", ".join(parts)


def _clock_text(cluster: Cluster, active: int, point: int) -> str:
    frequency = exact(float(cluster.frequencies[point]), "Hz")
    return f"{active} × {frequency}" if active else "off"

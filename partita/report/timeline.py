"""A simulated step as a picture in a page: spans per stream, critical path, waiting, memory.

`section` returns the part of a page. Its drawing shows the whole step and needs no script. The
script in `assets/timeline.js` turns it into a picture that zooms, moves and answers to wheel,
fingers, mouse and keys. It draws visible spans only, so that thousands of spans stay fast. The page
adds `style()` and `script()` once, and allows that script alone by `script_hash()`.

A row is a stream of the timeline, kernels first. More streams, or more device groups, are more
rows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from partita.cost.evaluate import PHASES
from partita.report.elements import (
    Html,
    asset,
    bar_of,
    join,
    line_of,
    marked,
    seconds_text,
    section_of,
    table_of,
    tag,
)
from partita.report.tables import PARTS, WAITS
from partita.simulation.timeline import KERNELS, LINKS, Span, Timeline
from partita.units import format_bytes

COLORS = {
    **{phase: f"kernels, {phase}" for phase in PHASES},
    **{kind: text for kind, text in PARTS.items() if kind != "compute"},
}
"""Color -> its name in the legend. Kernels are colored by phase, other tasks by kind."""
ROWS = {KERNELS: "kernels", LINKS: "links: collectives"}
SIZES = {"axis": 22, "label": 22, "bar": 28, "mark": 7, "memory": 80}
"""Heights in pixels: time axis, name of a row, spans, critical path, curve of memory."""
LONGEST = 8
"""Number of listed spans of the critical path."""
UNITS = 1000
"""Width of the drawing, units."""
NAMED = 0.05
"""Fraction of the step from which on a span is named in the drawing."""
BUTTONS = (
    ("+", "in", "zoom in"),
    ("−", "out", "zoom out"),
    ("whole step", "whole", "show the whole step"),
    ("‹", "back", "the task before on the critical path"),
    ("›", "on", "the next task on the critical path"),
)
"""(text, action, label) of the buttons."""
HINT = (
    "Drag to move. To zoom, click the picture and turn the wheel, hold Ctrl and turn it, or spread "
    "two fingers. Keys: + − ← → Home; N and P along the critical path."
)
NO_SCRIPT = "Without JavaScript the picture shows the whole step; with it, it can be zoomed."


class RowPositions(NamedTuple):
    """Vertical positions in pixels: spans of each row, curve of memory, total height."""

    rows: list[int]
    curve: int
    height: int


def section(timeline: Timeline) -> Html:
    """The section of a page that shows a simulated step."""
    title = "One step as a timeline"
    if not timeline.spans or not timeline.seconds:
        text = "The simulated step takes no time: no task of this model runs long enough to show."
        return section_of(title, tag("p", text))
    return section_of(
        title,
        tag("p", _introduction(timeline)),
        _legend(timeline),
        _figure(timeline),
        _memory(timeline),
        _parts(timeline),
        _longest(timeline),
    )


def _introduction(timeline: Timeline) -> str:
    devices = "one device does all of it"
    if timeline.groups > 1:
        devices = f"{timeline.devices} devices in {timeline.groups} groups"
    elif timeline.devices > 1:
        devices = f"each of the {timeline.devices} devices does the same"
    waits = []
    for cause, seconds in timeline.idle.items():
        if seconds > 0:
            waits.append(f"{seconds_text(seconds)} {WAITS.get(cause, cause)}")
    idle = f"the rest is {', '.join(waits)}" if waits else "nothing waits"
    busy = f"{timeline.busy_part():.1%}".replace("%", "\u00a0%")
    count = len(timeline.critical_path())
    return (
        f"A step of {seconds_text(timeline.seconds)} under plan '{timeline.plan}', simulated; "
        f"{devices}. Kernels run {busy} of it; {idle}. The line below the spans marks the critical "
        f"path: a shorter step needs one of its {count} tasks to be shorter."
    )


def _color(span: Span) -> str:
    name = span.phase if span.kind == "compute" else span.kind
    return name if name in COLORS else "other"


def _class(color: str) -> str:
    return f"t-{color.replace(' ', '-')}"


def _legend(timeline: Timeline) -> Html:
    seconds_by_color: dict[str, float] = {}
    for span in timeline.spans:
        color = _color(span)
        seconds_by_color[color] = seconds_by_color.get(color, 0.0) + span.seconds
    keys = []
    for color in (*COLORS, "other"):
        if color in seconds_by_color:
            text = seconds_text(seconds_by_color[color])
            keys.append(_key(_class(color), COLORS.get(color, color), text))
    count = f"{len(timeline.critical_path())} of {len(timeline.spans)} tasks"
    keys.append(_key("t-critical", "critical path", count))
    return tag("p", keys, class_="keys")


def _key(classes: str, name: str, figure: str) -> Html:
    return tag(
        "span",
        marked(classes, name),
        " ",
        tag("small", figure),
    )


# The picture


def _row_names(timeline: Timeline) -> list[str]:
    rows = timeline.rows()
    has_collectives = any(span.kind != "compute" for span in timeline.spans)
    if rows == [("", KERNELS)] and has_collectives:
        return ["kernels and collectives, in turn"]
    return [f"{group}: {stream}" if group else ROWS.get(stream, stream) for group, stream in rows]


def _positions(rows: int) -> RowPositions:
    row_height = SIZES["label"] + SIZES["bar"] + SIZES["mark"]
    first = SIZES["axis"] + SIZES["label"]
    curve = SIZES["axis"] + rows * row_height + SIZES["label"]
    tops = [first + row * row_height for row in range(rows)]
    return RowPositions(tops, curve, curve + SIZES["memory"] + 2)


def _figure(timeline: Timeline) -> Html:
    keys = (
        "plus and minus zoom, left and right move, Home shows the whole step, "
        "N and P follow the critical path"
    )
    label = f"timeline of a step of {seconds_text(timeline.seconds)}; {keys}"
    drawing = _drawing(timeline)
    plot = tag(
        "div",
        drawing,
        class_="plot",
        role="group",
        tabindex="0",
        aria_label=label,
    )
    tip = tag("div", class_="tip", role="status", hidden="")
    return tag(
        "figure",
        _controls(),
        tag("div", plot, tip, class_="frame"),
        tag("p", HINT, class_="note hint", hidden=""),
        tag("noscript", tag("p", NO_SCRIPT, class_="note")),
        _data(timeline),
        class_="timeline",
    )


def _controls() -> Html:
    buttons = []
    for text, action, label in BUTTONS:
        attributes = {"type": "button", "data_do": action, "aria_label": label, "title": label}
        buttons.append(tag("button", text, **attributes))
    return tag(
        "div",
        buttons,
        tag("span", class_="range"),
        class_="controls",
        hidden="",
    )


def _drawing(timeline: Timeline) -> Html:
    """The whole step, stretched to the available width, with the names that fit."""
    rows = {name: row for row, name in enumerate(timeline.rows())}
    positions = _positions(len(rows))
    scale = UNITS / timeline.seconds
    path_by_class = {_class(color): "" for color in (*COLORS, "other")}
    critical = ""
    names = []
    for span in timeline.spans:
        left = span.start * scale
        width = span.seconds * scale
        top = positions.rows[rows[span.group, span.stream]]
        # A gap separates neighbours of one color.
        visible = width - 1 if width > 4 else width
        path = f"M{left:.2f} {top}h{visible:.2f}v{SIZES['bar']}h-{visible:.2f}z"
        path_by_class[_class(_color(span))] += path
        if span.critical:
            middle = top + SIZES["bar"] + SIZES["mark"] // 2
            critical += f"M{left:.2f} {middle}h{width:.2f}"
        if span.seconds > NAMED * timeline.seconds and span.kind != "held up":
            style = f"left:{100 * left / UNITS:.2f}%;width:{100 * width / UNITS:.2f}%;top:{top}px"
            names.append(tag("i", span.operator, style=style))
    lanes = []
    for top in positions.rows:
        lanes.append(tag("rect", width=UNITS, height=SIZES["bar"], y=top, class_="lane"))
    paths = [tag("path", d=path, class_=name) for name, path in path_by_class.items() if path]
    paths.append(tag("path", d=critical, class_="critical"))
    paths.append(tag("path", d=_curve(timeline, scale, positions.curve), class_="curve"))
    picture = tag(
        "svg",
        lanes,
        paths,
        viewBox=f"0 0 {UNITS} {positions.height}",
        preserveAspectRatio="none",
        height=positions.height,
        width="100%",
        aria_hidden="true",
    )
    return join([picture, *_labels(timeline, positions), *names])


def _labels(timeline: Timeline, positions: RowPositions) -> list[Html]:
    """Names of the rows and of the curve, and the ends of the time axis."""
    labels = []
    for name, top in zip(_row_names(timeline), positions.rows, strict=True):
        labels.append(tag("span", name, style=f"top:{top - SIZES['label']}px"))
    memory_top = positions.curve - SIZES["label"]
    labels.append(tag("span", _memory_name(timeline), style=f"top:{memory_top}px"))
    labels.append(tag("span", "0", style="top:0"))
    labels.append(tag("span", seconds_text(timeline.seconds), style="top:0;right:0"))
    return labels


def _curve(timeline: Timeline, scale: float, top: int) -> str:
    bottom = top + SIZES["memory"]
    peak = max(timeline.peak_bytes, 1)
    path = f"M0 {bottom}"
    for seconds, nbytes in timeline.memory:
        y = top + SIZES["memory"] * (1 - nbytes / peak)
        path += f"H{seconds * scale:.2f}V{y:.1f}"
    return path + f"H{UNITS}V{bottom}z"


def _memory_name(timeline: Timeline) -> str:
    return f"memory of a device, {format_bytes(timeline.peak_bytes)} at the peak"


def _data(timeline: Timeline) -> Html:
    """The input of the script as JSON.

    Times are seconds; a span is [start, seconds, row, color, name, layer, critical, phase].
    """
    rows = {name: row for row, name in enumerate(timeline.rows())}
    colors = [*COLORS, "other"]
    positions = _positions(len(rows))
    spans = []
    for span in timeline.spans:
        row = rows[span.group, span.stream]
        color = colors.index(_color(span))
        times = [_rounded(span.start), _rounded(span.seconds)]
        texts = [span.name, span.operator, int(span.critical), span.phase]
        spans.append([*times, row, color, *texts])
    value: dict[str, Any] = {
        "seconds": timeline.seconds,
        "rows": _row_names(timeline),
        "tops": positions.rows,
        "curve": positions.curve,
        "height": positions.height,
        "sizes": SIZES,
        "colours": [[_class(color), COLORS.get(color, color)] for color in colors],
        "spans": spans,
        "peak": timeline.peak_bytes,
        "peakIn": timeline.peak_operator,
        "memory": [[_rounded(seconds), nbytes] for seconds, nbytes in timeline.memory],
        "memoryName": _memory_name(timeline),
    }
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return tag("script", Html(text), type="application/json")


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.9g}")


# Figures in words and tables


def _memory(timeline: Timeline) -> Html:
    """Memory at the peak by kind."""
    bytes_by_kind = {kind: nbytes for kind, nbytes in timeline.held.items() if nbytes}
    whole = max(sum(bytes_by_kind.values()), timeline.peak_bytes)
    if not whole:
        return Html("")
    parts = []
    keys = []
    for i, (kind, nbytes) in enumerate(bytes_by_kind.items()):
        color = f"m{min(i, 7)}"
        parts.append((color, nbytes))
        keys.append(_key(color, kind, format_bytes(nbytes)))
    operator = timeline.peak_operator or "the update"
    title = f"Memory at the peak: {format_bytes(timeline.peak_bytes)}, in {operator}"
    bar = bar_of(parts, whole, title)
    return join([tag("h3", title), bar, tag("p", keys, class_="keys held")])


def _parts(timeline: Timeline) -> Html:
    """Seconds of each kind of task, by phase and on the critical path."""
    rows = []
    for kind in dict.fromkeys((*PARTS, *(span.kind for span in timeline.spans))):
        spans = [span for span in timeline.spans if span.kind == kind]
        if not spans:
            continue
        cells = []
        for phase in PHASES:
            cells.append(sum(span.seconds for span in spans if span.phase == phase))
        cells.append(sum(span.seconds for span in spans))
        cells.append(sum(span.seconds for span in spans if span.critical))
        texts = (seconds_text(seconds) if seconds else "–" for seconds in cells)
        rows.append([PARTS.get(kind, kind), *texts])
    title = "Time of a device"
    columns = ["tasks", *PHASES, "in all", "critical"]
    return join([tag("h3", title), table_of(title, columns, rows)])


def _longest(timeline: Timeline) -> Html:
    by_length = sorted(timeline.critical_path(), key=lambda span: -span.seconds)
    spans: Sequence[Span] = by_length[:LONGEST]
    if not spans:
        return Html("")
    bars = []
    for span in spans:
        share = f"{span.seconds / timeline.seconds:.1%}".replace("%", " %")
        parts = [(_class(_color(span)), span.seconds)]
        figures = (seconds_text(span.seconds), share)
        bars.append(line_of(span.name, parts, spans[0].seconds, *figures))
    return join([tag("h3", "Longest on the critical path"), tag("div", bars, class_="bars")])


def style() -> str:
    """The style sheet of the picture."""
    return asset("timeline.css")


def script() -> str:
    """The script that zooms and moves the picture."""
    return asset("timeline.js")


def script_hash() -> str:
    """The hash by which a content security policy allows the script."""
    digest = hashlib.sha256(script().encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"

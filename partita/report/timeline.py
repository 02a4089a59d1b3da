"""A simulated step as a picture in a page: what runs when on each stream, the critical path, what waits for what, and memory below.

`section` takes a Timeline and gives the part of a page. What it draws is the whole step, and needs no script. `SCRIPT` makes of it a picture
that can be zoomed, moved and asked by wheel, fingers, mouse or keys; it draws only what is visible, so that thousands of spans stay quick.
The page adds `STYLE` and `SCRIPT` once, and allows that script alone by its `HASH`.

A row is a stream of the timeline, kernels first: more streams, or those of more device groups, are more rows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from typing import Any

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

PHASES = ("forward", "backward", "update")
COLOURS = {
    **{phase: f"kernels, {phase}" for phase in PHASES},
    **{kind: words for kind, words in PARTS.items() if kind != "compute"},
}
"""What has a colour of its own: kernels by phase, all else by kind; and what it is called."""
ROWS = {KERNELS: "kernels", LINKS: "links: collectives"}
SIZES = {"axis": 22, "label": 22, "bar": 28, "mark": 7, "memory": 80}
"""Heights in pixels: the axis of time, the line that names a row, its spans, its critical path, the curve of memory."""
LONGEST = 8
"""How many spans of the critical path are listed."""
UNITS = 1000
"""How many units wide the picture without a script is."""
NAMED = 0.05
"""Part of the step from which on a span is named in the picture without a script."""


def section(timeline: Timeline) -> Html:
    """The part of a page that shows a simulated step."""
    title = "One step as a timeline"
    if not timeline.spans or not timeline.seconds:
        return section_of(
            title,
            tag(
                "p",
                "The simulated step takes no time: nothing of this model runs long enough to be seen.",
            ),
        )
    return section_of(
        title,
        tag("p", _reading(timeline)),
        _legend(timeline),
        _figure(timeline),
        _held(timeline),
        _parts(timeline),
        _longest(timeline),
    )


def _reading(timeline: Timeline) -> str:
    who = (
        f"each of the {timeline.devices} devices does the same"
        if timeline.devices > 1
        else "one device does it all"
    )
    if timeline.groups > 1:
        who = f"{timeline.devices} devices in {timeline.groups} groups"
    waits = [
        f"{seconds_text(s)} {WAITS.get(cause, cause)}"
        for cause, s in timeline.idle.items()
        if s > 0
    ]
    idle = f"the rest is {', '.join(waits)}" if waits else "nothing waits"
    run = f"{timeline.busy_part():.1%}".replace("%", "\u00a0%")
    return (
        f"A step of {seconds_text(timeline.seconds)} under plan '{timeline.plan}', simulated; {who}. Kernels run {run} of it; {idle}. "
        f"The line below the spans marks the critical path: were one of its {len(timeline.critical_path())} tasks shorter, the step would be."
    )


def _colour(span: Span) -> str:
    name = span.phase if span.kind == "compute" else span.kind
    return name if name in COLOURS else "other"


def _class(colour: str) -> str:
    return f"t-{colour.replace(' ', '-')}"


def _legend(timeline: Timeline) -> Html:
    seconds: dict[str, float] = {}
    for span in timeline.spans:
        seconds[_colour(span)] = seconds.get(_colour(span), 0.0) + span.seconds
    keys = [
        _key(_class(c), COLOURS.get(c, c), seconds_text(seconds[c]))
        for c in (*COLOURS, "other")
        if c in seconds
    ]
    keys.append(
        _key(
            "t-critical",
            "critical path",
            f"{len(timeline.critical_path())} of {len(timeline.spans)} tasks",
        )
    )
    return tag("p", keys, class_="keys")


def _key(classes: str, words: str, figure: str) -> Html:
    return tag("span", marked(classes, words), " ", tag("small", figure))


# The picture


def _row_names(timeline: Timeline) -> list[str]:
    rows = timeline.rows()
    if rows == [("", KERNELS)] and any(s.kind != "compute" for s in timeline.spans):
        return ["kernels and collectives, in turn"]
    return [f"{group}: {stream}" if group else ROWS.get(stream, stream) for group, stream in rows]


def _tops(rows: int) -> tuple[list[int], int, int]:
    """Where the spans of each row begin, where the curve of memory begins, and the height of it all, in pixels from the top."""
    each = SIZES["label"] + SIZES["bar"] + SIZES["mark"]
    end = SIZES["axis"] + rows * each
    return (
        [SIZES["axis"] + r * each + SIZES["label"] for r in range(rows)],
        end + SIZES["label"],
        end + SIZES["label"] + SIZES["memory"] + 2,
    )


def _figure(timeline: Timeline) -> Html:
    keys = "plus and minus zoom, left and right move, Home shows the whole step, N and P go along the critical path"
    buttons = [
        tag("button", text, type="button", data_do=do, aria_label=label, title=label)
        for text, do, label in (
            ("+", "in", "zoom in"),
            ("−", "out", "zoom out"),
            ("whole step", "whole", "show the whole step"),
            ("‹", "back", "the task before on the critical path"),
            ("›", "on", "the next task on the critical path"),
        )
    ]
    controls = tag("div", buttons, tag("span", class_="range"), class_="controls", hidden="")
    label = f"timeline of a step of {seconds_text(timeline.seconds)}; {keys}"
    plot = tag("div", _still(timeline), class_="plot", role="group", tabindex="0", aria_label=label)
    hint = "Drag to move. To zoom, click the picture and turn the wheel, hold Ctrl and turn it, or spread two fingers. Keys: + − ← → Home; N and P along the critical path."
    without = "Without JavaScript the picture shows the whole step; with it, it can be zoomed."
    return tag(
        "figure",
        controls,
        tag("div", plot, tag("div", class_="tip", role="status", hidden=""), class_="frame"),
        tag("p", hint, class_="note hint", hidden=""),
        tag("noscript", tag("p", without, class_="note")),
        _data(timeline),
        class_="timeline",
    )


def _still(timeline: Timeline) -> Html:
    """The whole step as one drawing that stretches to the width it is given, with the names that surely fit."""
    rows = {name: r for r, name in enumerate(timeline.rows())}
    tops, curve, height = _tops(len(rows))
    scale = UNITS / timeline.seconds
    drawn = {_class(c): "" for c in (*COLOURS, "other")}
    critical, names = "", []
    for s in timeline.spans:
        at, wide, top = s.start * scale, s.seconds * scale, tops[rows[s.group, s.stream]]
        inside = wide - 1 if wide > 4 else wide  # neighbours of one colour are told apart
        drawn[_class(_colour(s))] += f"M{at:.2f} {top}h{inside:.2f}v{SIZES['bar']}h-{inside:.2f}z"
        if s.critical:
            critical += f"M{at:.2f} {top + SIZES['bar'] + SIZES['mark'] // 2}h{wide:.2f}"
        if s.seconds > NAMED * timeline.seconds and s.kind != "held up":
            names.append(
                tag(
                    "i",
                    s.operator,
                    style=f"left:{100 * at / UNITS:.2f}%;width:{100 * wide / UNITS:.2f}%;top:{top}px",
                )
            )
    lanes = [tag("rect", width=UNITS, height=SIZES["bar"], y=top, class_="lane") for top in tops]
    paths = [tag("path", d=d, class_=c) for c, d in drawn.items() if d]
    paths.append(tag("path", d=critical, class_="critical"))
    paths.append(tag("path", d=_curve(timeline, scale, curve), class_="curve"))
    picture = tag(
        "svg",
        lanes,
        paths,
        viewBox=f"0 0 {UNITS} {height}",
        preserveAspectRatio="none",
        height=height,
        width="100%",
        aria_hidden="true",
    )
    said = [
        tag("span", name, style=f"top:{top - SIZES['label']}px")
        for name, top in zip(_row_names(timeline), tops, strict=True)
    ]
    said.append(tag("span", _memory_name(timeline), style=f"top:{curve - SIZES['label']}px"))
    ends = [
        tag("span", "0", style="top:0"),
        tag("span", seconds_text(timeline.seconds), style="top:0;right:0"),
    ]
    return join([picture, *said, *ends, *names])


def _curve(timeline: Timeline, scale: float, top: int) -> str:
    whole = max(timeline.peak_bytes, 1)
    steps = [
        (at * scale, top + SIZES["memory"] * (1 - nbytes / whole)) for at, nbytes in timeline.memory
    ]
    return (
        f"M0 {top + SIZES['memory']}"
        + "".join(f"H{x:.2f}V{y:.1f}" for x, y in steps)
        + f"H{UNITS}V{top + SIZES['memory']}z"
    )


def _memory_name(timeline: Timeline) -> str:
    return f"memory of a device, {format_bytes(timeline.peak_bytes)} at the peak"


def _data(timeline: Timeline) -> Html:
    """What the script draws: times in seconds, spans as [start, seconds, row, colour, name, layer, critical, phase]."""
    rows, colours = {name: r for r, name in enumerate(timeline.rows())}, [*COLOURS, "other"]
    tops, curve, height = _tops(len(rows))
    spans = [
        [
            _short(s.start),
            _short(s.seconds),
            rows[s.group, s.stream],
            colours.index(_colour(s)),
            s.name,
            s.operator,
            int(s.critical),
            s.phase,
        ]
        for s in timeline.spans
    ]
    value: dict[str, Any] = {
        "seconds": timeline.seconds,
        "rows": _row_names(timeline),
        "tops": tops,
        "curve": curve,
        "height": height,
        "sizes": SIZES,
        "colours": [[_class(c), COLOURS.get(c, c)] for c in colours],
        "spans": spans,
        "peak": timeline.peak_bytes,
        "peakIn": timeline.peak_operator,
        "memory": [[_short(at), nbytes] for at, nbytes in timeline.memory],
        "memoryName": _memory_name(timeline),
    }
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return tag("script", Html(text), type="application/json")


def _short(seconds: float) -> float:
    return float(f"{seconds:.9g}")


# Its figures in words and tables


def _held(timeline: Timeline) -> Html:
    """What holds the memory at the peak."""
    held = {kind: count for kind, count in timeline.held.items() if count}
    whole = max(sum(held.values()), timeline.peak_bytes)
    if not whole:
        return Html("")
    parts = [(f"m{min(i, 7)}", count) for i, count in enumerate(held.values())]
    where = f"{format_bytes(timeline.peak_bytes)} of memory at the peak, in {timeline.peak_operator or 'the update'}"
    keys = (
        _key(c, kind, format_bytes(n))
        for (c, _), (kind, n) in zip(parts, held.items(), strict=True)
    )
    return join(
        [
            tag("h3", f"What holds {where}"),
            bar_of(parts, whole, where),
            tag("p", keys, class_="keys held"),
        ]
    )


def _parts(timeline: Timeline) -> Html:
    """What takes how long, by phase, and how much of it is on the critical path."""
    rows = []
    for kind in dict.fromkeys((*PARTS, *(s.kind for s in timeline.spans))):
        spans = [s for s in timeline.spans if s.kind == kind]
        if spans:
            by_phase = [sum(s.seconds for s in spans if s.phase == phase) for phase in PHASES]
            cells = [
                *by_phase,
                sum(s.seconds for s in spans),
                sum(s.seconds for s in spans if s.critical),
            ]
            rows.append([PARTS.get(kind, kind), *(seconds_text(c) if c else "–" for c in cells)])
    title = "What a device does"
    return join([tag("h3", title), table_of(title, ["tasks", *PHASES, "in all", "critical"], rows)])


def _longest(timeline: Timeline) -> Html:
    path: Sequence[Span] = sorted(timeline.critical_path(), key=lambda s: -s.seconds)[:LONGEST]
    if not path:
        return Html("")
    bars = [
        line_of(
            s.name,
            [(_class(_colour(s)), s.seconds)],
            path[0].seconds,
            seconds_text(s.seconds),
            f"{s.seconds / timeline.seconds:.1%}".replace("%", " %"),
        )
        for s in path
    ]
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

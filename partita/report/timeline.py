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


STYLE = """
:root{--t-forward:#2c7bb0;--t-backward:#1c4a73;--t-update:#2f7d72;--t-exchange:#c23b4e;--t-sum:#ad5a0a;--t-gather:#8a479b;--t-move:#a83a7f;--t-held-up:#c3c9ce}
@media(prefers-color-scheme:dark){:root{--t-forward:#74b3ee;--t-backward:#4a86c4;--t-update:#5fc0ae;--t-exchange:#f07182;--t-sum:#eda352;--t-gather:#cf9be0;
 --t-move:#f095cd;--t-held-up:#4a545d}}
.t-forward{fill:var(--t-forward);background:var(--t-forward)}.t-backward{fill:var(--t-backward);background:var(--t-backward)}
.t-update{fill:var(--t-update);background:var(--t-update)}.t-exchange{fill:var(--t-exchange);background:var(--t-exchange)}
.t-sum{fill:var(--t-sum);background:var(--t-sum)}.t-gather{fill:var(--t-gather);background:var(--t-gather)}
.t-move{fill:var(--t-move);background:var(--t-move)}.t-held-up{fill:var(--t-held-up);background:var(--t-held-up)}
.t-other{fill:var(--compute);background:var(--compute)}
.marked .mark.t-critical{background:var(--ink);height:3px;vertical-align:.25em;border-radius:0}
.keys{flex-wrap:wrap;gap:.35rem 1.25rem;max-width:none}
.keys.held{margin-top:.5rem}
.timeline{margin:1.25rem 0 0}
.controls{display:flex;flex-wrap:wrap;gap:.4rem;align-items:center;margin-bottom:.6rem}
.controls[hidden],.hint[hidden],.tip[hidden]{display:none}
.controls button{font:inherit;font-size:.88rem;line-height:1;min-width:2.5rem;min-height:2.5rem;padding:0 .8rem;color:var(--ink);background:var(--wash);
 border:1px solid var(--line);border-radius:6px;cursor:pointer}
.controls button:hover{border-color:var(--soft)}
.controls button:focus-visible,.plot:focus-visible{outline:2px solid var(--S);outline-offset:2px}
.range{margin-left:auto;font-size:.82rem;color:var(--soft)}
.frame{position:relative}
.plot{position:relative;overflow:hidden;touch-action:pan-y;user-select:none;-webkit-user-select:none;cursor:grab}
.plot.moving{cursor:grabbing}
.plot svg{display:block}
.plot text{font-size:11px;fill:var(--soft)}
.plot text.row{paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.plot text.name{fill:var(--on);font-weight:550;pointer-events:none}
.plot text.name.t-held-up{fill:var(--ink);background:none}
.plot>span,.plot>i{position:absolute;font-size:11px;line-height:22px;color:var(--soft);white-space:nowrap}
.plot>i{overflow:hidden;text-overflow:ellipsis;line-height:28px;padding:0 4px;font-style:normal;color:var(--on)}
@media(max-width:44rem){.plot>i{display:none}}
.lane{fill:var(--wash)}
.tick{stroke:var(--line);stroke-width:1}
.critical{fill:none;stroke:var(--ink);stroke-width:3;vector-effect:non-scaling-stroke}
.jump{fill:none;stroke:var(--ink);stroke-width:1}
.curve{fill:var(--m2);fill-opacity:.55}
.edge{fill:none;stroke:var(--m1);stroke-width:1.5;stroke-linejoin:round}
.top-line{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}
.peak{fill:var(--ink)}
.overview{fill:var(--soft)}
.chosen{fill:none;stroke:var(--ink);stroke-width:2}
.cursor{stroke:var(--soft);stroke-width:1}
.tip{position:absolute;z-index:1;max-width:min(22rem,100%);padding:.4rem .6rem;background:var(--ink);color:var(--paper);border-radius:5px;font-size:.8rem;line-height:1.4;
 pointer-events:none}
.tip b{display:block}
.hint{margin:.5rem 0 0}
"""

SCRIPT = r"""
"use strict";
for (const figure of document.querySelectorAll(".timeline")) show(figure);

function show(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const {seconds: whole, rows, tops, curve, height, sizes, colours, memory, peak} = data;
  const spans = data.spans.map(([start, length, row, colour, name, layer, critical, phase]) =>
    ({start, length, end: start + length, row, colour, name, layer, critical, phase}));
  const byRow = rows.map((_, r) => spans.filter(s => s.row === r).sort((a, b) => a.start - b.start));
  const path = spans.filter(s => s.critical).sort((a, b) => a.start - b.start);
  const plot = figure.querySelector(".plot"), tip = figure.querySelector(".tip"), range = figure.querySelector(".range");
  const pen = document.createElement("canvas").getContext("2d"), widths = new Map();
  const picture = element("svg", {width: "100%", height, "aria-hidden": "true"});
  let from = 0, to = whole, chosen = null, asked = false, pointer = null;

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const add = (name, attributes, text) => picture.appendChild(element(name, attributes, text));

  // What is visible

  function view(a, b) {
    const length = Math.min(Math.max(b - a, whole / 5e4), whole);
    from = Math.min(Math.max((a + b - length) / 2, 0), whole - length);
    to = from + length;
    if (!asked) { asked = true; requestAnimationFrame(draw); }
  }
  const move = part => view(from + part * (to - from), to + part * (to - from));
  const zoom = (factor, at = (from + to) / 2) => view(at - (at - from) * factor, at + (to - at) * factor);

  function firstAfter(list, time) {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle].end > time) high = middle; else low = middle + 1;
    }
    return low;
  }

  // Drawing

  function draw() {
    asked = false;
    const width = plot.clientWidth, scale = width / (to - from), x = time => (time - from) * scale;
    picture.replaceChildren();
    drawAxis(width, x);
    const shapes = colours.map(() => []), names = [];
    rows.forEach((_, r) => {
      add("rect", {x: 0, y: tops[r], width, height: sizes.bar, class: "lane"});
      let run = null;
      const end = () => { if (run) shapes[run.colour].push(box(run.a, run.b, tops[r])); };
      for (let i = firstAfter(byRow[r], from); i < byRow[r].length && byRow[r][i].start < to; i++) {
        const s = byRow[r][i], a = Math.max(x(s.start), -4), b = Math.min(x(s.end), width + 4);
        if (run && run.colour === s.colour && b - run.a < 1) { run.b = b; continue; }
        end();
        run = {a, b, colour: s.colour};
        if (b - a > 24) names.push([s, Math.max(a, 0), Math.min(b, width), r]);
      }
      end();
    });
    shapes.forEach((boxes, c) => { if (boxes.length) add("path", {d: boxes.join(""), class: colours[c][0]}); });
    for (const [s, a, b, r] of names) {
      const text = fit(s.layer, b - a - 10);
      if (text) add("text", {x: a + 5, y: tops[r] + sizes.bar / 2 + 4, class: "name " + colours[s.colour][0]}, text);
    }
    drawCritical(x);
    rows.forEach((name, r) => add("text", {x: 0, y: tops[r] - 7, class: "row"}, name));
    drawMemory(width, x);
    if (chosen) {
      const a = Math.max(x(chosen.start), -4), b = Math.min(x(chosen.end), width + 4);
      add("rect", {x: a - 1, y: tops[chosen.row] - 1, width: Math.max(b - a, 1) + 1, height: sizes.bar + 2, rx: 2, class: "chosen"});
    }
    if (pointer !== null) add("path", {d: `M${pointer} ${sizes.axis}V${height}`, class: "cursor"});
    range.textContent = from === 0 && to === whole ? `whole step, ${time(whole)}` : `${time(from, to - from)} – ${time(to, to - from)} of ${time(whole)}`;
  }

  function box(a, b, y) {
    const w = b - a > 3 ? b - a - 1 : Math.max(b - a, 0.2);
    return `M${a.toFixed(2)} ${y}h${w.toFixed(2)}v${sizes.bar}h-${w.toFixed(2)}z`;
  }

  function drawAxis(width, x) {
    const least = (to - from) * 68 / width, ten = 10 ** Math.floor(Math.log10(least));
    const step = [1, 2, 5, 10].map(n => n * ten).find(n => n >= least);
    const [unit, word] = unitOf(Math.max(to, step)), digits = Math.max(0, Math.ceil(-Math.log10(step / unit) - 1e-9));
    for (let n = Math.ceil(from / step - 1e-9); n * step <= to; n++) {
      const at = x(n * step);
      add("path", {d: `M${at.toFixed(1)} ${sizes.axis - 4}V${height}`, class: "tick"});
      const anchor = at < 20 ? "start" : at > width - 40 ? "end" : "middle";
      add("text", {x: anchor === "start" ? Math.max(at, 0) : Math.min(at, width), y: 12, "text-anchor": anchor}, n ? `${(n * step / unit).toFixed(digits)} ${word}` : "0");
    }
    if (to - from < whole) add("rect", {x: width * from / whole, y: sizes.axis - 4, width: Math.max(width * (to - from) / whole, 3), height: 3, class: "overview"});
  }

  function drawCritical(x) {
    const marks = [], jumps = [];
    let jumped = -9;
    const level = s => tops[s.row] + sizes.bar + sizes.mark / 2;
    for (let i = firstAfter(path, from); i < path.length && path[i].start <= to; i++) {
      const s = path[i], a = Math.max(x(s.start), -4), b = Math.min(x(s.end), plot.clientWidth + 4);
      marks.push(`M${a.toFixed(2)} ${level(s)}h${Math.max(b - a, 0.4).toFixed(2)}`);
      if (!i || path[i - 1].row === s.row || x(s.start) < jumped + 3) continue;
      jumped = x(s.start);
      jumps.push(`M${jumped.toFixed(1)} ${level(path[i - 1])}V${level(s)}`);
    }
    add("path", {d: marks.join(""), class: "critical"});
    if (jumps.length) add("path", {d: jumps.join(""), class: "jump"});
  }

  function drawMemory(width, x) {
    const base = curve + sizes.memory, y = bytes => base - sizes.memory * bytes / Math.max(peak, 1);
    add("text", {x: 0, y: curve - 7, class: "row"}, data.memoryName);
    add("path", {d: `M0 ${curve}H${width}`, class: "top-line"});
    let before = memory.length ? memory[0][1] : 0;
    const steps = [];
    for (const [at, bytes] of memory) {
      if (at <= from) before = bytes;
      else if (at <= to) steps.push({x: x(at), bytes});
    }
    let d = `M0 ${y(before).toFixed(1)}`;
    for (let i = 0, j = 0; i < steps.length; i = j) {
      let most = 0;  // within one pixel
      for (; j < steps.length && steps[j].x < steps[i].x + 1; j++) most = Math.max(most, steps[j].bytes);
      d += `H${steps[i].x.toFixed(1)}V${y(most).toFixed(1)}` + (steps[j - 1].bytes < most ? `V${y(steps[j - 1].bytes).toFixed(1)}` : "");
    }
    d += `H${width}`;
    add("path", {d: `${d}V${base}H0z`, class: "curve"});
    add("path", {d, class: "edge"});
    const most = memory.find(([, bytes]) => bytes === peak);
    if (most && most[0] >= from && most[0] <= to) add("circle", {cx: x(most[0]), cy: curve, r: 4, class: "peak"});
  }

  function fit(name, room) {
    const wide = text => {
      if (!widths.has(text)) { pen.font = "550 11px " + getComputedStyle(plot).fontFamily; widths.set(text, pen.measureText(text).width); }
      return widths.get(text);
    };
    const last = name.split("/").pop();
    for (const text of [name, last]) if (wide(text) <= room) return text;
    const kept = Math.floor(last.length * room / wide(last)) - 1;
    return kept >= 3 ? last.slice(0, kept) + "…" : "";
  }

  // Numbers

  function unitOf(seconds) {
    return seconds >= 1 ? [1, "s"] : seconds >= 1e-3 ? [1e-3, "ms"] : seconds >= 1e-6 ? [1e-6, "µs"] : [1e-9, "ns"];
  }
  function time(seconds, length = seconds) {  // as exactly as a length beside it needs
    const [unit, word] = unitOf(seconds), digits = Math.max(2, 1 + Math.ceil(-Math.log10(length / unit)));
    return seconds ? `${(seconds / unit).toFixed(Math.min(digits, 9))} ${word}` : "0";
  }
  function size(bytes) {
    let n = 0;
    while (bytes >= 1024 && n < 5) { bytes /= 1024; n++; }
    return n ? `${bytes.toFixed(1)} ${"KMGTP"[n - 1]}iB` : `${bytes} B`;
  }

  // Asking

  function tell(x, y, title, ...lines) {
    tip.replaceChildren(Object.assign(document.createElement("b"), {textContent: title}),
      ...lines.flatMap((line, n) => n ? [document.createElement("br"), line] : [line]));
    tip.hidden = false;
    tip.style.left = Math.max(0, Math.min(x - tip.offsetWidth / 2, plot.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = y + "px";
  }

  function choose(s) {
    chosen = s;
    if (!s) { tip.hidden = true; return; }
    const scale = plot.clientWidth / (to - from), a = Math.max(s.start, from), b = Math.min(s.end, to);
    tell(((a + b) / 2 - from) * scale, tops[s.row] + sizes.bar + sizes.mark + 4, s.name,
      `${time(s.length)}, from ${time(s.start, s.length)} to ${time(s.end, s.length)}`,
      `${colours[s.colour][1]}${s.colour < 3 ? "" : `, ${s.phase}`}${s.critical ? "; on the critical path" : ""}`);
  }

  function at(event) {
    const edge = plot.getBoundingClientRect(), x = event.clientX - edge.left, y = event.clientY - edge.top;
    return {x, y, seconds: from + x / plot.clientWidth * (to - from)};
  }

  function spanAt({x, y, seconds}) {
    const r = tops.findIndex(top => y >= top - 2 && y <= top + sizes.bar + sizes.mark);
    if (r < 0) return null;
    const near = 4 * (to - from) / plot.clientWidth, i = firstAfter(byRow[r], seconds);
    const close = [byRow[r][i], byRow[r][i - 1]].filter(s => s && s.start - near <= seconds && s.end + near >= seconds);
    return close[0] || null;
  }

  function ask(event) {
    const place = at(event);
    pointer = place.x.toFixed(1);
    choose(spanAt(place));
    if (!chosen && place.y >= curve - 4 && place.seconds >= 0 && place.seconds <= whole) {
      let bytes = memory.length ? memory[0][1] : 0;
      for (const [begins, held] of memory) { if (begins > place.seconds) break; bytes = held; }
      tell(place.x, curve - sizes.label - 26, size(bytes), `at ${time(place.seconds, to - from)}${bytes === peak ? `, the peak: in ${data.peakIn || "the update"}` : ""}`);
    }
    view(from, to);
  }

  function along(direction) {
    if (!path.length) return;
    const known = path.indexOf(chosen);
    const next = known >= 0 ? known + direction : direction > 0 ? firstAfter(path, from) : firstAfter(path, to) - 1;
    const s = path[Math.max(0, Math.min(next, path.length - 1))], middle = (s.start + s.end) / 2;
    if (s.length / (to - from) * plot.clientWidth < 40) view(middle - s.length * 4, middle + s.length * 4);
    else if (s.start < from || s.end > to) view(middle - Math.max(to - from, s.length * 1.2) / 2, middle + Math.max(to - from, s.length * 1.2) / 2);
    pointer = null;
    choose(s);
    view(from, to);
  }

  const doing = {in: () => zoom(0.5), out: () => zoom(2), whole: () => view(0, whole), back: () => along(-1), on: () => along(1)};
  const keys = {"+": "in", "=": "in", "-": "out", Home: "whole", 0: "whole", n: "on", p: "back", N: "on", P: "back"};
  const forget = () => { choose(null); pointer = null; view(from, to); };

  for (const button of figure.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      if (!["back", "on"].includes(button.dataset.do)) forget();
      doing[button.dataset.do]();
    });
  }
  plot.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in keys) doing[keys[event.key]]();
    else if (event.key === "ArrowLeft") move(-0.2);
    else if (event.key === "ArrowRight") move(0.2);
    else if (event.key === "Escape") forget();
    else return;
    if (!"npNP".includes(event.key)) { choose(null); pointer = null; }
    event.preventDefault();
  });
  plot.addEventListener("wheel", event => {
    if (!event.ctrlKey && document.activeElement !== plot) return;
    event.preventDefault();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) move(event.deltaX / plot.clientWidth);
    else zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / (event.ctrlKey ? 60 : 240)))), at(event).seconds);
  }, {passive: false});

  const down = new Map();
  let moved = false;
  plot.addEventListener("pointerdown", event => {
    if (event.button) return;
    plot.setPointerCapture(event.pointerId);
    down.set(event.pointerId, event.clientX);
    if (down.size === 1) moved = false;
  });
  plot.addEventListener("pointermove", event => {
    const before = down.get(event.pointerId);
    if (before === undefined) { if (event.pointerType === "mouse") ask(event); return; }
    if (!moved && down.size === 1 && Math.abs(event.clientX - before) < 4) return;
    if (!moved) { moved = true; plot.classList.add("moving"); choose(null); pointer = null; }
    const left = plot.getBoundingClientRect().left, seconds = x => from + (x - left) / plot.clientWidth * (to - from);
    const other = [...down].find(([id]) => id !== event.pointerId);
    if (other) {
      const apart = Math.abs(before - other[1]), now = Math.abs(event.clientX - other[1]);
      if (apart > 8 && now > 8) zoom(apart / now, seconds(other[1]));
    } else move((before - event.clientX) / plot.clientWidth);
    down.set(event.pointerId, event.clientX);
  });
  const up = event => {
    if (!down.delete(event.pointerId)) return;
    plot.classList.remove("moving");
    if (!moved && event.type === "pointerup") { plot.focus({preventScroll: true}); ask(event); }
  };
  plot.addEventListener("pointerup", up);
  plot.addEventListener("pointercancel", up);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse" && !down.size) forget(); });

  plot.replaceChildren(picture);
  for (const hidden of figure.querySelectorAll(".controls,.hint")) hidden.hidden = false;
  new ResizeObserver(() => view(from, to)).observe(plot);
  draw();
}
"""
HASH = f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}"
"""What a content policy allows this script by."""

"""A plan as one web page: the split of every layer as a picture, where the time, the memory and the traffic go, and what was given up.

`page` takes values and gives text; `timeline_page` shows a simulated step alone. A page is one file that asks for nothing: no font, no
picture from elsewhere, and no script but the one that zooms a timeline; its own content policy forbids all others. Pictures are boxes laid out
by the browser, so that they fit a phone and can be read aloud.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from partita.plans.plan import Plan, Storage, choice_text, placed_slice
from partita.report import timeline as picture
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
from partita.simulation.timeline import Timeline
from partita.units import format_bytes, format_flops

EXCHANGE = ("activations", "gradients", "moves")
KINDS = {
    "S": (
        "sample",
        "The batch is shared out: each part does the layer for its own samples. Splitting only these is data parallelism.",
    ),
    "A": (
        "attribute",
        "A sample is shared out from within: the height of an image, the positions of a text.",
    ),
    "P": (
        "parameter",
        "The weights are shared out: each part computes some of the layer's outputs. This is tensor parallelism.",
    ),
    "R": (
        "reduction",
        "A sum is shared out: each part adds up some of its terms, and the parts are then added together.",
    ),
}
STORED = {
    1: "optimizer slots",
    2: "optimizer slots and gradients",
    3: "optimizer slots, gradients and the variables themselves",
}
FEW = 16
"""Up to so many layers, each is shown for itself."""
ALIKE = 1.5
"""Repeated layers are shown once if none takes longer than another by more than this factor."""
LONGEST = 64
"""Layers that a repeated block may have."""
TOP = 15
"""How many layers a list shows before the rest is summed up or folded."""


@dataclass(frozen=True)
class Layer:
    """A layer of the plan: what each axis does to it, how its variables are stored, what it is predicted to cost."""

    name: str
    text: str
    choice: Mapping[str, str]
    stored: tuple[tuple[int, tuple[str, ...]], ...] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)

    @property
    def compute(self) -> float:
        return self.cost.get("compute", 0.0)

    @property
    def exchange(self) -> float:
        return sum(self.cost.get(cause, 0.0) for cause in EXCHANGE)

    @property
    def seconds(self) -> float:
        return self.compute + self.exchange


def page(
    plan: Plan, measured: Mapping[str, Any] | None = None, timeline: Timeline | None = None
) -> str:
    """One HTML page that shows a plan, whole in itself; what the plan does not hold is left out.

    `measured` may hold "seconds" (median of a step), "peak_bytes" (by the compiler), "traffic_bytes" by collective, and "flops".
    `timeline` is a step of the plan, simulated.
    """
    measured = measured or {}
    layers = _layers(plan)
    body = [
        _header(plan, measured),
        _splits(plan, layers),
        picture.section(timeline) if timeline is not None else Html(""),
        _memory(plan, measured),
        _traffic(plan, measured, layers),
        _compared(plan, measured),
        _checked(plan, measured),
        _given_up(plan, layers),
        _sources(plan),
    ]
    return document(f"{plan.graph} on {plan.machine}", body, timeline is not None)


def timeline_page(timeline: Timeline) -> str:
    """One HTML page that shows a simulated step alone, whole in itself."""
    said = f"{seconds_text(timeline.seconds)} a step simulated on {timeline.machine}"
    facts = {
        "plan": timeline.plan,
        "devices": str(timeline.devices),
        "kernels run": f"{timeline.busy_part():.0%} of the step".replace("%", " %"),
        "memory a device": format_bytes(timeline.peak_bytes),
        "sent by a device": format_bytes(sum(timeline.traffic.values())),
    }
    header = tag(
        "header",
        tag("p", "Partita · ", timeline.graph, class_="kicker"),
        tag("h1", said),
        listed(facts, "facts"),
    )
    notes = (
        tag("ul", (tag("li", note) for note in timeline.notes), class_="notes")
        if timeline.notes
        else Html("")
    )
    sources = {"time": timeline.source, "model": timeline.graph, "machine": timeline.machine}
    body = [
        header,
        notes,
        picture.section(timeline),
        section_of("Where the figures come from", listed(sources, "sources")),
    ]
    return document(f"{timeline.graph} on {timeline.machine}", body, True)


def document(title: str, body: Iterable[Html], zooms: bool) -> str:
    """The whole file: what stands in it, its style, and a policy that allows nothing else."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:" + (
        f"; script-src '{picture.script_hash()}'" if zooms else ""
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} - Partita"),
        tag("style", Html(asset("page.css") + (picture.style() if zooms else ""))),
    )
    script = tag("script", Html(picture.script())) if zooms else ""
    main = tag("main", (Html(b + "\n") for b in body if b))
    return f"<!doctype html>\n{tag('html', head, tag('body', main, script), lang='en')}\n"


def listed(facts: Mapping[str, str | None], class_: str) -> Html:
    return tag(
        "dl", (tag("div", tag("dt", k), tag("dd", v)) for k, v in facts.items() if v), class_=class_
    )


def _layers(plan: Plan) -> list[Layer]:
    costs, stored = plan.why.get("operators", {}), _stored(plan)
    return [
        Layer(
            name, choice_text(choice, plan.mesh), choice, stored.get(name, ()), costs.get(name, {})
        )
        for name, choice in plan.choices.items()
    ]


def _stored(plan: Plan) -> dict[str, tuple[tuple[int, tuple[str, ...]], ...]]:
    """Per layer, the ways in which its variables are stored: (ZeRO stage, axes)."""
    found: dict[str, dict[tuple[int, tuple[str, ...]], None]] = {}
    for path, storage in plan.storage.items():
        owner = _owner(path, plan)
        if owner is not None:
            found.setdefault(owner, {})[storage.zero, storage.axes] = None
    return {name: tuple(ways) for name, ways in found.items()}


def _owner(path: str, plan: Plan) -> str | None:
    return max(
        (n for n in plan.choices if path.startswith(n.split(":")[0] + "/")), key=len, default=None
    )


# Numbers


def _signed(value: float, text: Any) -> str:
    return f"{'+' if value >= 0 else '−'}{text(abs(value))}"


def _times(ratio: float) -> str:
    """
    >>> _times(1.3049), _times(13.73), _times(214.2)
    ('1.30', '13.7', '214')
    """
    return f"{ratio:.{max(0, 2 - (ratio >= 10) - (ratio >= 100))}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.{0 if share >= 0.1 else 1}f} %"


def _off(predicted: float, measured: float) -> str:
    """
    >>> _off(2.0, 2.2), _off(2.0, 1.9), _off(2.0, 2.0)
    ('10.0 % more', '5.0 % less', 'the same')
    """
    if measured == predicted:
        return "the same"
    if not predicted:
        return "not predicted"
    ratio = measured / predicted - 1
    return f"{abs(ratio):.1%} {'more' if ratio > 0 else 'less'}".replace("%", " %")


def _range(values: Sequence[float]) -> str:
    low, high = seconds_text(min(values)), seconds_text(max(values))
    if low == high:
        return low
    return f"{low.split()[0]} – {high}" if low.split()[1] == high.split()[1] else f"{low} – {high}"


# The headline


def _header(plan: Plan, measured: Mapping[str, Any]) -> Html:
    return tag(
        "header",
        tag("p", "Partita · ", plan.graph, class_="kicker"),
        tag("h1", _headline(plan, measured)),
        _facts(plan),
    )


def _headline(plan: Plan, measured: Mapping[str, Any]) -> str:
    seconds, real = plan.predicted.get("seconds"), measured.get("seconds")
    if seconds is None:
        said = f"How {plan.graph} is split"
        return (
            f"{said} on {plan.machine}"
            if real is None
            else f"{seconds_text(real)} a step measured on {plan.machine}"
        )
    base = plan.why.get("baselines", {}).get("data parallel", {}).get("seconds")
    gain = f", {_times(base / seconds)}× as fast as data parallel" if base and seconds else ""
    if real is None:
        return f"{seconds_text(seconds)} a step predicted on {plan.machine}{gain}"
    off = _off(seconds, real)
    return f"{seconds_text(seconds)} a step predicted on {plan.machine}{gain}; {seconds_text(real)} measured, {off}"


def _facts(plan: Plan) -> Html:
    p = plan.predicted
    facts = {
        "devices": str(plan.devices),
        "samples a step": str(plan.batch_size) if plan.batch_size else None,
        "memory a device": format_bytes(p["peak_bytes"]) if "peak_bytes" in p else None,
        "sent by a device": format_bytes(sum(p["traffic_bytes"].values()))
        if "traffic_bytes" in p
        else None,
        "work a device": format_flops(p["flops"]) if "flops" in p else None,
        "how sure": _proof(p),
    }
    return listed(facts, "facts")


def _proof(predicted: Mapping[str, Any]) -> str | None:
    bound, seconds = predicted.get("bound_seconds"), predicted.get("seconds")
    if not bound or not seconds:
        return None
    gap = seconds / bound - 1
    return "proved best in its space" if gap < 1e-6 else f"within {gap:.1%} of the bound"


# The picture: how each layer is split


def _splits(plan: Plan, layers: Sequence[Layer]) -> Html:
    blocks = fold(layers)
    longest = max((layer.seconds for layer in layers), default=0.0)
    rows = (_block(plan, rounds, longest) for rounds in blocks)
    return section_of(
        "How each layer is split",
        tag("p", _reading(plan, layers)),
        _legend(plan, layers),
        tag("div", _axes(plan), tag("ol", rows, class_="layers"), class_="picture"),
        _unowned(plan),
    )


def _reading(plan: Plan, layers: Sequence[Layer]) -> str:
    if not plan.mesh.axes:
        return "One device does every layer: nothing is split."
    costs = (
        " The bar beside it is the layer's own time in a step."
        if any(layer.cost for layer in layers)
        else ""
    )
    return (
        f"Each row is a layer; its box is all {plan.devices} devices, one column for each axis of the mesh, slow links first. "
        "A column's colour says what that axis splits, its cells into how many parts; the parts of a box multiply."
        + costs
    )


def _legend(plan: Plan, layers: Sequence[Layer]) -> Html:
    used = {factor[0] for layer in layers for factor in layer.choice.values()}
    rows = [
        _key(f"seg {k}", k, f"{k} · {word}", text)
        for k, (word, text) in KINDS.items()
        if k in used or not used
    ]
    if any(len(layer.choice) < len(plan.mesh.axes) for layer in layers):
        rows.append(
            _key(
                "seg none",
                "=",
                "replicate",
                "Nothing is split: the devices along this axis all do the same work.",
            )
        )
    if plan.storage:
        text = "Between steps these devices each keep a part of the layer's variables: 1 of the optimizer slots, 2 and of the gradients, "
        rows.append(
            _key(
                "key-zero",
                "",
                "ZeRO storage",
                text + "3 and of the variables themselves, which are gathered for use.",
            )
        )
    if any(layer.cost for layer in layers):
        rows.append(
            _key(
                "compute",
                "",
                "compute",
                "Seconds of the layer's kernels on one device: forward, backward, update.",
            )
        )
        text = "Seconds of its collectives: activations, gradients, and what is moved from the layers it reads."
        rows.append(_key("exchange", "", "exchange", text))
    return tag("dl", rows, class_="legend")


def _key(classes: str, letter: str, word: str, text: str) -> Html:
    mark = tag("span", letter, class_=f"mark {classes}", aria_hidden="true")
    return tag("div", tag("dt", mark, word), tag("dd", text))


def _axes(plan: Plan) -> Html:
    """The line above the boxes: the mesh's axes, with the levels of the machine's links they cross."""
    if not plan.mesh.axes:
        return Html("")
    names = [
        tag("span", a.name, tag("small", f" {a.size}"), title=f"axis {a.name}: {a.size} ways")
        for a in plan.mesh.axes
    ]
    levels: list[Html] = []
    for first, last, level in _runs([a.level for a in plan.mesh.axes]):
        ways = math.prod(a.size for a in plan.mesh.axes[first:last])
        title = f"axes of level {level}: {ways} ways, over the {'slowest links' if level == 0 else 'faster links within level ' + str(level - 1)}"
        levels.append(
            tag(
                "span",
                f"level {level} × {ways}",
                style=f"grid-column:{first + 1}/{last + 1}",
                class_="level",
                title=title,
            )
        )
    several = len({a.level for a in plan.mesh.axes}) > 1
    grid = tag("div", *(levels if several else []), *names, class_="axes", style=_columns(plan))
    return tag(
        "div", tag("span", "layer"), grid, tag("span", "time"), class_="row top", aria_hidden="true"
    )


def _columns(plan: Plan) -> str:
    return "grid-template-columns:" + " ".join(f"{math.log2(a.size):.3g}fr" for a in plan.mesh.axes)


def _runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """
    >>> _runs("aab")
    [(0, 2, 'a'), (2, 3, 'b')]
    """
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return [(i, j, values[i]) for i, j in zip(starts, [*starts[1:], len(values)], strict=True)]


def _block(plan: Plan, rounds: Sequence[Sequence[Layer]], longest: float) -> Html:
    rows = [_row(plan, [r[i] for r in rounds], longest) for i in range(len(rounds[0]))]
    if len(rounds) == 1:
        return join(tag("li", row) for row in rows)
    count = len(rounds[0])
    title = f"× {len(rounds)}"
    what = (
        f"this layer, {len(rounds)} times"
        if count == 1
        else f"these {count} layers, {len(rounds)} times"
    )
    names = (
        tag("li", layer.name, tag("span", seconds_text(layer.seconds)) if layer.cost else "")
        for r in rounds
        for layer in r
    )
    listing = tag(
        "details", tag("summary", tag("b", title), f" {what}"), tag("ol", names, class_="names")
    )
    return tag("li", tag("ol", (tag("li", row) for row in rows)), listing, class_="fold")


def _row(plan: Plan, layers: Sequence[Layer], longest: float) -> Html:
    layer = layers[0]
    zero = " ".join(f"ZeRO-{stage}:{','.join(axes)}" for stage, axes in layer.stored)
    name = tag(
        "div", tag("b", layer.name), tag("small", f"{layer.text} {zero}".strip()), class_="name"
    )
    return tag("div", name, _box(plan, layer), _time(layers, longest), class_="row")


def _box(plan: Plan, layer: Layer) -> Html:
    """The layer's box: a column per axis, neighbours that do the same joined, with as many cells as they make parts."""
    axes, words = plan.mesh.axes, _words(plan, layer)
    if not axes:
        return tag(
            "div",
            tag("span", "1 device", class_="seg none"),
            class_="box",
            role="img",
            aria_label=words,
            title=words,
        )
    segments = []
    for first, last, factor in _runs([layer.choice.get(a.name, "") for a in axes]):
        ways = math.prod(a.size for a in axes[first:last])
        kind = factor[0] if factor and factor[0] in KINDS else "none" if not factor else "other"
        style = f"grid-column:{first + 1}/{last + 1};--n:{ways}"
        segments.append(
            tag("span", tag("i", f"{factor or '='} {ways}"), class_=f"seg {kind}", style=style)
        )
    for stage, over in layer.stored:
        spans = [i + 1 for i, a in enumerate(axes) if a.name in over]
        segments += (
            tag("span", class_="zero", style=f"grid-column:{i}/{i + 1}", title=f"ZeRO-{stage}")
            for i in spans
        )
    return tag(
        "div",
        segments,
        class_="box",
        style=_columns(plan),
        role="img",
        aria_label=words,
        title=words,
    )


def _words(plan: Plan, layer: Layer) -> str:
    """What the box shows, in words."""
    ways: dict[str, int] = {}
    for axis in plan.mesh.axes:
        ways[layer.choice.get(axis.name, "")] = (
            ways.get(layer.choice.get(axis.name, ""), 1) * axis.size
        )
    same = ways.pop("", 1)
    said = [
        f"only on slice {placed_slice(factor)} of {n}"
        if placed_slice(factor) is not None
        else f"{_factor(factor)} split {n} ways"
        for factor, n in ways.items()
    ]
    said += (
        [f"the same on {same} devices" if said else f"not split: the same on all {same} devices"]
        if same > 1
        else []
    )
    said += [
        f"{STORED[stage]} kept in parts over {', '.join(axes)}" for stage, axes in layer.stored
    ]
    return f"{layer.name}: {'; '.join(said) or 'one device'}"


def _factor(factor: str) -> str:
    word = KINDS.get(factor[0], (factor, ""))[0]
    return f"{word} {factor[1:]}".strip()


def _time(layers: Sequence[Layer], longest: float) -> Html:
    """The bar of a layer's time; of layers shown together, that of their mean."""
    if not layers[0].cost:
        return tag("div", class_="time")
    compute, exchange = (
        sum(values) / len(layers)
        for values in ([x.compute for x in layers], [x.exchange for x in layers])
    )
    causes = {c: sum(x.cost.get(c, 0.0) for x in layers) / len(layers) for c in EXCHANGE}
    parts = [
        f"compute {seconds_text(compute)}",
        *(f"{c} {seconds_text(s)}" for c, s in causes.items() if s),
    ]
    title = ("on average: " if len(layers) > 1 else "") + ", ".join(parts)
    bar = bar_of([("compute", compute), ("exchange", exchange)], longest, title)
    return tag(
        "div", bar, tag("span", _range([x.seconds for x in layers]), class_="figure"), class_="time"
    )


def _unowned(plan: Plan) -> Html:
    found: dict[str, list[str]] = {}
    for path, storage in plan.storage.items():
        if _owner(path, plan) is None:
            found.setdefault(_storage(storage), []).append(path)
    return join(
        tag("p", f"Also stored {way}: {', '.join(paths)}.", class_="note")
        for way, paths in found.items()
    )


def _storage(storage: Storage) -> str:
    return f"ZeRO-{storage.zero} over {', '.join(storage.axes)}"


# Folding of repeated blocks


def fold(layers: Sequence[Layer]) -> list[list[Sequence[Layer]]]:
    """The layers in order, as blocks; a block is a list of rounds that are alike, of one layer or several each.

    Rounds are alike if their layers' names differ by a number, their splits not at all, and their times by little.

    >>> names = ["in", *(f"{part}_{i}" for i in range(9) for part in ("up", "down")), "out"]
    >>> [(len(rounds), [x.name for x in rounds[0]]) for rounds in fold([Layer(n, "", {}) for n in names])]
    [(1, ['in']), (9, ['up_0', 'down_0']), (1, ['out'])]
    """
    blocks: list[list[Sequence[Layer]]] = []
    start = 0
    while start < len(layers):
        period, times = _repeats(layers, start) if len(layers) > FEW else (1, 1)
        blocks.append([layers[start + i * period : start + (i + 1) * period] for i in range(times)])
        start += period * times
    return blocks


def _repeats(layers: Sequence[Layer], start: int) -> tuple[int, int]:
    """(period, times) of the repetition that begins at `start` and saves most rows; (1, 1) if none saves three."""
    best = (1, 1)
    for period in range(1, min(LONGEST, (len(layers) - start) // 2) + 1):
        times = 1
        while all(_alike(layers, start + i, start + times * period + i) for i in range(period)):
            times += 1
        if period * (times - 1) > max(2, best[0] * (best[1] - 1)):
            best = (period, times)
    return best


def _alike(layers: Sequence[Layer], one: int, other: int) -> bool:
    if other >= len(layers):
        return False
    a, b = layers[one], layers[other]
    if a.choice != b.choice or a.stored != b.stored or not _near(a.seconds, b.seconds):
        return False
    left, right = a.name.split("/"), b.name.split("/")
    return len(left) == len(right) and all(
        _without_one(x) & _without_one(y) for x, y in zip(left, right, strict=True)
    )


def _near(a: float, b: float) -> bool:
    return max(a, b) <= ALIKE * min(a, b)


@cache
def _without_one(name: str) -> set[str]:
    """The name, and the name less each of its numbers; a number after a colon stays.

    >>> sorted(_without_one("conv2_block10_conv:1"))
    ['conv2_block10_conv:1', 'conv2_block_conv:1', 'conv_block10_conv:1']
    """
    return {
        name,
        *(name[: m.start()] + name[m.end() :] for m in re.finditer(r"(?<![:\d])_?\d+", name)),
    }


# Memory and traffic


def _memory(plan: Plan, measured: Mapping[str, Any]) -> Html:
    p, real = plan.predicted, measured.get("peak_bytes")
    kinds = {kind: count for kind, count in p.get("memory_bytes", {}).items() if count}
    total = p.get("peak_bytes", sum(kinds.values()))
    whole = max(total, real or 0)
    if not whole:
        return Html("")
    if kinds and sum(kinds.values()) < total:
        kinds["other"] = total - sum(kinds.values())
    parts = [
        (f"m{min(i, 7)}", kind, count)
        for i, (kind, count) in enumerate((kinds or {"peak": total}).items())
    ]
    bars = []
    if total:
        bars.append(
            line_of("predicted peak", [(c, n) for c, _, n in parts], whole, format_bytes(total))
        )
    if real is not None:
        bars.append(line_of("by the compiler", [("real", real)], whole, format_bytes(real)))
    rows = (
        [marked(c, kind), format_bytes(count), _percent(count / total)] for c, kind, count in parts
    )
    table = (
        table_of("Memory of one device by kind", ["kind", "at the peak", "share"], rows)
        if kinds
        else ""
    )
    return section_of("Memory per device by kind", tag("div", bars, class_="bars"), table)


def _traffic(plan: Plan, measured: Mapping[str, Any], layers: Sequence[Layer]) -> Html:
    sent, real = plan.predicted.get("traffic_bytes"), measured.get("traffic_bytes")
    per_layer = {layer.name: layer.cost["traffic"] for layer in layers if layer.cost.get("traffic")}
    if sent is None and real is None and not per_layer:
        return Html("")
    if not (sent or real or per_layer):
        return section_of("Traffic", tag("p", "The devices exchange nothing."))
    return section_of(
        "Traffic",
        tag("p", "Bytes that one device exchanges in a step."),
        _by_collective(sent, real),
        _by_layer(per_layer),
    )


def _by_collective(sent: Mapping[str, float] | None, real: Mapping[str, float] | None) -> Html:
    kinds = _collectives(sent, real)
    if not kinds:
        return Html("")
    whole = max(*(sent or {}).values(), *(real or {}).values(), 1)
    bars = []
    for kind in kinds:
        if sent is not None:
            bars.append(
                line_of(
                    kind.replace("_", "-"),
                    [("exchange", sent.get(kind, 0))],
                    whole,
                    format_bytes(sent.get(kind, 0)),
                )
            )
        if real is not None:
            name = "emitted" if sent is not None else kind.replace("_", "-")
            bars.append(
                line_of(name, [("real", real.get(kind, 0))], whole, format_bytes(real.get(kind, 0)))
            )
    return join([tag("h3", "By collective"), tag("div", bars, class_="bars")])


def _collectives(sent: Mapping[str, float] | None, real: Mapping[str, float] | None) -> list[str]:
    names: dict[str, None] = dict.fromkeys(sent or {})
    names.update(dict.fromkeys(real or {}))
    return list(names)


def _by_layer(per_layer: Mapping[str, float]) -> Html:
    if not per_layer:
        return Html("")
    order = sorted(per_layer, key=lambda name: -per_layer[name])
    whole = per_layer[order[0]]
    bars = [
        line_of(name, [("exchange", per_layer[name])], whole, format_bytes(per_layer[name]))
        for name in order[:TOP]
    ]
    rest = sum(per_layer[name] for name in order[TOP:])
    more = f"{len(order) - TOP} more layers exchange {format_bytes(rest)} together." if rest else ""
    return join(
        [
            tag("h3", "By layer"),
            tag("div", bars, class_="bars"),
            tag("p", more, class_="note") if more else "",
        ]
    )


# Other plans, and the real run


def _compared(plan: Plan, measured: Mapping[str, Any]) -> Html:
    rows = {name: row for name, row in plan.why.get("baselines", {}).items() if "seconds" in row}
    if not rows:
        return Html("")
    if "seconds" in plan.predicted:
        rows[plan.name] = plan.predicted
    base = rows.get("data parallel", {}).get("seconds")
    whole = max(*(row["seconds"] for row in rows.values()), measured.get("seconds", 0.0))
    lines = []
    for name in sorted(rows, key=lambda n: (rows[n]["seconds"], n != plan.name)):
        lines.append(_plan_line(name, rows[name], whole, base, name == plan.name))
        if name == plan.name and "seconds" in measured:
            real = measured["seconds"]
            lines.append(
                line_of(
                    f"{name}, measured",
                    [("real", real)],
                    whole,
                    seconds_text(real),
                    "",
                    "",
                    class_="found",
                )
            )
    keys = [marked("compute", "compute"), marked("exchange", "exchange")]
    said = "Predicted seconds of a step, against what an expert would write; then the gain over data parallel and the memory of a device."
    return section_of(
        "Plans compared",
        tag("p", said),
        tag("p", keys, class_="keys"),
        tag("div", lines, class_="bars plans"),
    )


def _plan_line(
    name: str, row: Mapping[str, Any], whole: float, base: float | None, found: bool
) -> Html:
    compute = row.get("seconds_compute", row["seconds"])
    memory = format_bytes(row["peak_bytes"]) if "peak_bytes" in row else ""
    memory += "" if row.get("fits", True) else ", does not fit"
    parts = [("compute", compute), ("exchange", row["seconds"] - compute)]
    return line_of(
        name,
        parts,
        whole,
        seconds_text(row["seconds"]),
        _gain(base, row["seconds"]),
        memory,
        class_="found" if found else None,
    )


def _gain(base: float | None, seconds: float) -> str:
    return f"{_times(base / seconds)}×" if base and seconds else ""


def _checked(plan: Plan, measured: Mapping[str, Any]) -> Html:
    title = "Predicted against measured"
    if not measured:
        return section_of(
            title, tag("p", "Nothing was measured: every figure on this page is a prediction.")
        )
    p = plan.predicted
    rows = [
        _against("time of a step", p.get("seconds"), measured.get("seconds"), seconds_text),
        _against(
            "memory of a device at the peak",
            p.get("peak_bytes"),
            measured.get("peak_bytes"),
            format_bytes,
        ),
        *_traffic_rows(p.get("traffic_bytes"), measured.get("traffic_bytes")),
        _against("work of a device", p.get("flops"), measured.get("flops"), format_flops),
    ]
    table = table_of(
        title, ["", "predicted", "measured", "difference"], [row for row in rows if row]
    )
    said = "Time is the median step; memory, traffic and work are the compiler's count of the program that ran."
    return section_of(title, tag("p", said), table)


def _traffic_rows(
    sent: Mapping[str, float] | None, real: Mapping[str, float] | None
) -> list[list[str]]:
    if sent is None and real is None:
        return []
    kinds = _collectives(sent, real)
    rows = []
    for kind in kinds if len(kinds) > 1 else []:
        one, other = (None if side is None else side.get(kind, 0) for side in (sent, real))
        rows.append(_against(f"sent by {kind.replace('_', '-')}", one, other, format_bytes))
    totals = [None if side is None else sum(side.values()) for side in (sent, real)]
    return [*rows, _against("sent in all", totals[0], totals[1], format_bytes)]


def _against(name: str, predicted: float | None, real: float | None, text: Any) -> list[str]:
    """A row of the table, empty if neither side is known."""
    if predicted is None and real is None:
        return []
    sides = [text(side) if side is not None else "–" for side in (predicted, real)]
    return [
        name,
        *sides,
        _off(predicted, real) if predicted is not None and real is not None else "–",
    ]


# What was given up, and where it all comes from


def _given_up(plan: Plan, layers: Sequence[Layer]) -> Html:
    close = sorted((layer for layer in layers if layer.cost.get("alternatives")), key=_closest)
    notes = (
        tag("ul", (tag("li", note) for note in plan.notes), class_="notes")
        if plan.notes
        else Html("")
    )
    if not close:
        return section_of("What it gave up, and why", notes) if notes else Html("")
    said = (
        "What a step and the memory of a device would change by, if this one layer were split otherwise and all others as planned. "
        "The layers whose second best was closest come first."
    )
    first = [_alternatives(layer) for layer in close[:TOP]]
    rest = [_alternatives(layer) for layer in close[TOP:]]
    more = (
        tag("details", tag("summary", f"{len(rest)} more layers"), rest, class_="more")
        if rest
        else ""
    )
    return section_of(
        "What it gave up, and why", notes, tag("p", said), tag("div", first, more, class_="reasons")
    )


def _closest(layer: Layer) -> float:
    return min(other["seconds"] for other in layer.cost["alternatives"])


def _alternatives(layer: Layer) -> Html:
    others = sorted(layer.cost["alternatives"], key=lambda other: other["seconds"])
    best = others[0]
    short = f"{best['choice']} {_signed(best['seconds'], seconds_text)}"
    summary = tag(
        "summary", tag("b", layer.name), tag("span", f"{layer.text}, next ", short, class_="figure")
    )
    rows = [
        [o["choice"], _signed(o["seconds"], seconds_text), _signed(o["bytes"], format_bytes)]
        for o in others
    ]
    chosen = (
        [f"{layer.text} (chosen)", seconds_text(layer.seconds), format_bytes(layer.cost["bytes"])]
        if "bytes" in layer.cost
        else []
    )
    table = table_of(
        f"Choices for {layer.name}",
        ["choice", "step", "memory a device"],
        [chosen, *rows] if chosen else rows,
    )
    return tag("details", summary, table)


def _sources(plan: Plan) -> Html:
    names = {"seconds": "time", "peak_bytes": "memory", "traffic_bytes": "traffic", "flops": "work"}
    rows = [(str(names.get(k, k)), str(v)) for k, v in plan.predicted.get("provenance", {}).items()]
    bound, proof = plan.predicted.get("bound_seconds"), _proof(plan.predicted)
    if bound and proof:
        rows.append(
            ("bound", f"no plan of the space takes less than {seconds_text(bound)}: {proof}")
        )
    mesh = " × ".join(f"{a.name} = {a.size}" for a in plan.mesh.axes) or "one device"
    rows += [("model", plan.graph), ("machine", plan.machine), ("mesh", mesh)]
    return section_of(
        "Where the figures come from",
        tag("dl", (tag("div", tag("dt", k), tag("dd", v)) for k, v in rows), class_="sources"),
    )

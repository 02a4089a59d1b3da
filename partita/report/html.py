"""A plan, or a simulated step, as one self-contained web page.

`page` shows a plan: splits, time, memory, traffic, alternatives, provenance. `timeline_page` shows
a simulated step. Both take values and return text. A page requests nothing: no font, no picture, no
script except the one that zooms a timeline. Its own content security policy forbids all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from partita.plans.plan import Plan
from partita.report import splits
from partita.report import timeline as picture
from partita.report.elements import (
    Html,
    asset,
    join,
    line_of,
    marked,
    seconds_text,
    section_of,
    table_of,
    tag,
)
from partita.report.gaps import PROVED, USELESS_GAP, gaps_of
from partita.report.layers import Layer, layers_of
from partita.simulation.timeline import Timeline
from partita.units import format_bytes, format_flops, format_joules

SHOWN = 15
"""Number of layers that a list shows before the rest is folded."""

Measured = Mapping[str, Any]
"""Measurements: "seconds" (median step), "peak_bytes", "traffic_bytes" by collective, "flops"."""


def page(
    plan: Plan,
    measured: Measured | None = None,
    timeline: Timeline | None = None,
    decisions: Sequence[Mapping[str, Any]] = (),
) -> str:
    """A page that shows a plan.

    `measured` may hold "seconds" (median of a step), "peak_bytes" (by the compiler),
    "traffic_bytes" by collective, and "flops". `timeline` is a simulated step of the plan.
    `decisions` are those of a managed training, as its log has them. Sections without data are left
    out.
    """
    measured = measured or {}
    layers = layers_of(plan)
    body = [
        _header(plan, measured),
        splits.section(plan, layers),
        picture.section(timeline) if timeline is not None else Html(""),
        _memory(plan, measured),
        _traffic(plan, measured, layers),
        _comparison(plan, measured),
        _check(plan, measured),
        _decisions(decisions),
        _alternatives(plan, layers),
        _sources(plan),
    ]
    return document(
        f"{plan.graph} on {plan.machine}",
        body,
        has_timeline=timeline is not None,
    )


def timeline_page(timeline: Timeline) -> str:
    """A page that shows a simulated step."""
    title = f"{seconds_text(timeline.seconds)} a step simulated on {timeline.machine}"
    facts = {
        "plan": timeline.plan,
        "devices": str(timeline.devices),
        "kernels run": f"{timeline.busy_part():.0%} of the step".replace("%", " %"),
        "memory a device": format_bytes(timeline.peak_bytes),
        "sent by a device": format_bytes(sum(timeline.traffic.values())),
    }
    sources = {"time": timeline.source, "model": timeline.graph, "machine": timeline.machine}
    body = [
        header(timeline.graph, title, facts),
        _notes(timeline.notes),
        picture.section(timeline),
        section_of("Where the figures come from", listed(sources, "sources")),
    ]
    return document(
        f"{timeline.graph} on {timeline.machine}",
        body,
        has_timeline=True,
    )


def document(
    title: str,
    body: Iterable[Html],
    has_timeline: bool = False,
    styles: Iterable[str] = (),
) -> str:
    """The whole file: content, style, and a policy that allows nothing else."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    style = "".join(asset(name) for name in ("page.css", *styles))
    script: Html | str = ""
    if has_timeline:
        policy += f"; script-src '{picture.script_hash()}'"
        style += picture.style()
        script = tag("script", Html(picture.script()))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{title} - Partita"),
        tag("style", Html(style)),
    )
    main = tag("main", (Html(part + "\n") for part in body if part))
    return f"<!doctype html>\n{tag('html', head, tag('body', main, script), lang='en')}\n"


def header(
    graph: str,
    title: str,
    facts: Mapping[str, str | None],
) -> Html:
    """The head of a page: the graph's name, a headline, figures."""
    kicker = tag("p", "Partita · ", graph, class_="kicker")
    return tag(
        "header",
        kicker,
        tag("h1", title),
        listed(facts, "facts"),
    )


def listed(facts: Mapping[str, str | None], class_: str) -> Html:
    """Names with values; a name without a value is left out."""
    rows = (tag("div", tag("dt", name), tag("dd", text)) for name, text in facts.items() if text)
    return tag("dl", rows, class_=class_)


def _notes(notes: Sequence[str]) -> Html:
    if not notes:
        return Html("")
    return tag(
        "ul",
        (tag("li", note) for note in notes),
        class_="notes",
    )


# Numbers


def _signed(value: float, text: Callable[[float], str]) -> str:
    return f"{'+' if value >= 0 else '−'}{text(abs(value))}"


def _times(ratio: float) -> str:
    """A ratio with three digits.

    >>> _times(1.3049), _times(13.73), _times(214.2)
    ('1.30', '13.7', '214')
    """
    digits = 2 - (ratio >= 10) - (ratio >= 100)
    return f"{ratio:.{digits}f}"


def _percent(share: float) -> str:
    digits = 0 if share >= 0.1 else 1
    return f"{100 * share:.{digits}f} %"


def _difference(predicted: float, measured: float) -> str:
    """A measurement relative to its prediction.

    >>> _difference(2.0, 2.2), _difference(2.0, 1.9), _difference(2.0, 2.0)
    ('10.0 % more', '5.0 % less', 'the same')
    """
    if measured == predicted:
        return "the same"
    if not predicted:
        return "not predicted"
    ratio = measured / predicted - 1
    text = f"{abs(ratio):.1%}".replace("%", " %")
    return f"{text} {'more' if ratio > 0 else 'less'}"


def _gain(baseline: float | None, seconds: float) -> str:
    """Speed relative to data parallelism; empty if they are equal or one is unknown."""
    if not baseline or not seconds:
        return ""
    ratio = _times(baseline / seconds)
    return "" if ratio == "1.00" else f"{ratio}×"


# The headline


def _decisions(decisions: Sequence[Mapping[str, Any]]) -> Html:
    """What a managed training changed, and why."""
    if not decisions:
        return Html("")
    rows = [(str(each["step"]), str(each["action"]), str(each["sentence"])) for each in decisions]
    return section_of(
        "Decisions during the training",
        table_of("Decisions", ("before step", "action", "reason and effect"), rows),
    )


def _header(plan: Plan, measured: Measured) -> Html:
    return header(
        plan.graph,
        _headline(plan, measured),
        _facts(plan),
    )


def _headline(plan: Plan, measured: Measured) -> str:
    predicted_seconds = plan.predicted.get("seconds")
    measured_seconds = measured.get("seconds")
    if predicted_seconds is None:
        if measured_seconds is None:
            return f"How {plan.graph} is split on {plan.machine}"
        return f"{seconds_text(measured_seconds)} a step measured on {plan.machine}"
    title = f"{seconds_text(predicted_seconds)} a step predicted on {plan.machine}"
    baseline = plan.why.get("baselines", {}).get("data parallel", {})
    gain = _gain(baseline.get("seconds"), predicted_seconds)
    if gain and baseline.get("fits", True):
        title += f", {gain} as fast as data parallel"
    if measured_seconds is not None:
        difference = _difference(predicted_seconds, measured_seconds)
        title += f"; {seconds_text(measured_seconds)} measured, {difference}"
    return title


def _facts(plan: Plan) -> dict[str, str | None]:
    predicted = plan.predicted
    facts: dict[str, str | None] = {"devices": str(plan.devices)}
    if plan.batch_size:
        facts["samples a step"] = str(plan.batch_size)
    if "peak_bytes" in predicted:
        facts["memory a device"] = format_bytes(predicted["peak_bytes"])
    if "traffic_bytes" in predicted:
        facts["sent by a device"] = format_bytes(sum(predicted["traffic_bytes"].values()))
    if "flops" in predicted:
        facts["work a device"] = format_flops(predicted["flops"])
    if "joules" in predicted:
        facts["energy a step"] = format_joules(predicted["joules"])
    facts["proof"] = _proof(plan)
    return facts


def _proof(plan: Plan) -> str | None:
    """The distance to the lower bound of plans that can run, in words; None if nothing useful is
    proved.
    """
    gap = gaps_of(plan).runnable
    if gap is None:
        return None
    if gap < PROVED:
        return "proved fastest in its space"
    return f"within {gap:.1%} of the lower bound" if gap < USELESS_GAP else None


# Memory and traffic


def _memory(plan: Plan, measured: Measured) -> Html:
    compiled_bytes = measured.get("peak_bytes")
    memory = plan.predicted.get("memory_bytes", {})
    bytes_by_kind = {kind: nbytes for kind, nbytes in memory.items() if nbytes}
    known_bytes = sum(bytes_by_kind.values())
    total = plan.predicted.get("peak_bytes", known_bytes)
    whole = max(total, compiled_bytes or 0)
    if not whole:
        return Html("")
    if bytes_by_kind and known_bytes < total:
        bytes_by_kind["other"] = total - known_bytes
    colors = [f"m{min(i, 7)}" for i in range(max(1, len(bytes_by_kind)))]
    bars = []
    if total:
        parts = list(zip(colors, bytes_by_kind.values() or [total], strict=True))
        bars.append(line_of("predicted peak", parts, whole, format_bytes(total)))
    if compiled_bytes is not None:
        text = format_bytes(compiled_bytes)
        bars.append(line_of("by the compiler", [("real", compiled_bytes)], whole, text))
    title = "Memory per device by kind"
    body = [tag("div", bars, class_="bars")]
    if bytes_by_kind:
        rows = []
        for color, (kind, nbytes) in zip(colors, bytes_by_kind.items(), strict=True):
            rows.append([marked(color, kind), format_bytes(nbytes), _percent(nbytes / total)])
        columns = ["kind", "at the peak", "share"]
        body.append(table_of("Memory of one device by kind", columns, rows))
    return section_of(title, *body)


def _traffic(
    plan: Plan,
    measured: Measured,
    layers: Sequence[Layer],
) -> Html:
    planned = plan.predicted.get("traffic_bytes")
    emitted = measured.get("traffic_bytes")
    by_layer = {layer.name: layer.cost["traffic"] for layer in layers if layer.cost.get("traffic")}
    if planned is None and emitted is None and not by_layer:
        return Html("")
    if not (planned or emitted or by_layer):
        return section_of("Traffic", tag("p", "The devices exchange nothing."))
    return section_of(
        "Traffic",
        tag("p", "Bytes that one device sends in a step."),
        _traffic_by_collective(planned, emitted),
        _traffic_by_layer(by_layer),
    )


def _traffic_by_collective(
    planned: Mapping[str, float] | None, emitted: Mapping[str, float] | None
) -> Html:
    kinds = _collectives(planned, emitted)
    if not kinds:
        return Html("")
    whole = max(*(planned or {}).values(), *(emitted or {}).values(), 1)
    bars = []
    for kind in kinds:
        name = kind.replace("_", "-")
        if planned is not None:
            nbytes = planned.get(kind, 0)
            bars.append(line_of(name, [("exchange", nbytes)], whole, format_bytes(int(nbytes))))
            name = "emitted"
        if emitted is not None:
            nbytes = emitted.get(kind, 0)
            bars.append(line_of(name, [("real", nbytes)], whole, format_bytes(int(nbytes))))
    return join([tag("h3", "By collective"), tag("div", bars, class_="bars")])


def _collectives(
    planned: Mapping[str, float] | None, emitted: Mapping[str, float] | None
) -> list[str]:
    names: dict[str, None] = dict.fromkeys(planned or {})
    names.update(dict.fromkeys(emitted or {}))
    return list(names)


def _traffic_by_layer(bytes_by_layer: Mapping[str, int]) -> Html:
    if not bytes_by_layer:
        return Html("")
    names = sorted(bytes_by_layer, key=lambda name: -bytes_by_layer[name])
    whole = bytes_by_layer[names[0]]
    bars = []
    for name in names[:SHOWN]:
        nbytes = bytes_by_layer[name]
        bars.append(line_of(name, [("exchange", nbytes)], whole, format_bytes(nbytes)))
    parts = [tag("h3", "By layer"), tag("div", bars, class_="bars")]
    folded_bytes = sum(bytes_by_layer[name] for name in names[SHOWN:])
    if folded_bytes:
        text = f"{len(names) - SHOWN} more layers send {format_bytes(folded_bytes)} together."
        parts.append(tag("p", text, class_="note"))
    return join(parts)


# Other plans and the measured run


def _comparison(plan: Plan, measured: Measured) -> Html:
    baselines = plan.why.get("baselines", {})
    plans = {name: row for name, row in baselines.items() if "seconds" in row}
    if not plans:
        return Html("")
    if "seconds" in plan.predicted:
        plans[plan.name] = plan.predicted
    baseline_seconds = plans.get("data parallel", {}).get("seconds")
    longest = max(row["seconds"] for row in plans.values())
    whole = max(longest, measured.get("seconds", 0.0))
    lines = []
    for name in sorted(plans, key=lambda n: (plans[n]["seconds"], n != plan.name)):
        gain = _gain(baseline_seconds, plans[name]["seconds"])
        is_chosen = name == plan.name
        lines.append(_plan_line(name, plans[name], whole, gain, is_chosen))
        if is_chosen and "seconds" in measured:
            lines.append(_measured_line(name, measured["seconds"], whole))
    keys = [marked("compute", "compute"), marked("exchange", "exchange")]
    text = (
        "Predicted seconds of a step under this plan and under the baselines, with the speed "
        "relative to data parallel and the memory of a device."
    )
    return section_of(
        "Plans compared",
        tag("p", text),
        tag("p", keys, class_="keys"),
        tag("div", lines, class_="bars plans"),
    )


def _plan_line(
    name: str,
    row: Mapping[str, Any],
    whole: float,
    gain: str,
    is_chosen: bool,
) -> Html:
    seconds = row["seconds"]
    compute = row.get("seconds_compute", seconds)
    memory = format_bytes(row["peak_bytes"]) if "peak_bytes" in row else ""
    if not row.get("fits", True):
        memory += ", does not fit"
    parts = [("compute", compute), ("exchange", seconds - compute)]
    figures = (seconds_text(seconds), gain, memory)
    return line_of(
        name,
        parts,
        whole,
        *figures,
        class_="found" if is_chosen else None,
    )


def _measured_line(
    name: str,
    seconds: float,
    whole: float,
) -> Html:
    figures = (seconds_text(seconds), "", "")
    parts = [("real", seconds)]
    return line_of(
        f"{name}, measured",
        parts,
        whole,
        *figures,
        class_="found",
    )


def _check(plan: Plan, measured: Measured) -> Html:
    title = "Predicted against measured"
    if not measured:
        text = "Nothing was measured: every figure on this page is a prediction."
        return section_of(title, tag("p", text))
    predicted = plan.predicted
    step = (predicted.get("seconds"), measured.get("seconds"))
    peak = (predicted.get("peak_bytes"), measured.get("peak_bytes"))
    work = (predicted.get("flops"), measured.get("flops"))
    rows = [
        _check_row("time of a step", *step, seconds_text),
        _check_row("memory of a device at the peak", *peak, format_bytes),
        *_traffic_rows(predicted.get("traffic_bytes"), measured.get("traffic_bytes")),
        _check_row("work of a device", *work, format_flops),
    ]
    columns = ["", "predicted", "measured", "difference"]
    text = (
        "Time is the median step. Memory, traffic and work are the compiler's counts of the "
        "program that ran."
    )
    return section_of(
        title,
        tag("p", text),
        table_of(title, columns, [row for row in rows if row]),
    )


def _traffic_rows(
    planned: Mapping[str, float] | None, emitted: Mapping[str, float] | None
) -> list[list[str]]:
    if planned is None and emitted is None:
        return []
    rows = []
    kinds = _collectives(planned, emitted)
    for kind in kinds if len(kinds) > 1 else []:
        planned_bytes = None if planned is None else planned.get(kind, 0)
        emitted_bytes = None if emitted is None else emitted.get(kind, 0)
        name = f"sent by {kind.replace('_', '-')}"
        rows.append(_check_row(name, planned_bytes, emitted_bytes, format_bytes))
    planned_total = None if planned is None else sum(planned.values())
    emitted_total = None if emitted is None else sum(emitted.values())
    rows.append(_check_row("sent in all", planned_total, emitted_total, format_bytes))
    return rows


def _check_row(
    name: str, predicted: float | None, measured: float | None, text: Callable[[Any], str]
) -> list[str]:
    """A row of the table; empty if neither value is known."""
    if predicted is None and measured is None:
        return []
    predicted_text = "–" if predicted is None else text(predicted)
    measured_text = "–" if measured is None else text(measured)
    if predicted is None or measured is None:
        return [name, predicted_text, measured_text, "–"]
    return [name, predicted_text, measured_text, _difference(predicted, measured)]


# Alternatives and provenance


def _alternatives(plan: Plan, layers: Sequence[Layer]) -> Html:
    title = "Alternatives"
    notes = _notes(plan.notes)
    candidates = [layer for layer in layers if layer.cost.get("alternatives")]
    candidates.sort(key=_smallest_loss)
    if not candidates:
        return section_of(title, notes) if notes else Html("")
    text = (
        "Change of a step and of a device's memory if one layer were split otherwise, with all "
        "other layers as planned. Layers with the closest alternative come first."
    )
    shown = [_alternatives_of(layer) for layer in candidates[:SHOWN]]
    folded = [_alternatives_of(layer) for layer in candidates[SHOWN:]]
    details: Html | str = ""
    if folded:
        summary = tag("summary", f"{len(folded)} more layers")
        details = tag("details", summary, folded, class_="more")
    return section_of(
        title,
        notes,
        tag("p", text),
        tag("div", shown, details, class_="reasons"),
    )


def _smallest_loss(layer: Layer) -> float:
    return min(alternative["seconds"] for alternative in layer.cost["alternatives"])


def _alternatives_of(layer: Layer) -> Html:
    alternatives = sorted(layer.cost["alternatives"], key=lambda row: row["seconds"])
    closest = alternatives[0]
    loss = _signed(closest["seconds"], seconds_text)
    text = f"{layer.text}, next {closest['choice']} {loss}"
    summary = tag(
        "summary",
        tag("b", layer.name),
        tag("span", text, class_="figure"),
    )
    rows = []
    if "bytes" in layer.cost:
        chosen = f"{layer.text} (chosen)"
        rows.append([chosen, seconds_text(layer.seconds), format_bytes(layer.cost["bytes"])])
    for row in alternatives:
        seconds = _signed(row["seconds"], seconds_text)
        nbytes = _signed(row["bytes"], format_bytes)
        rows.append([row["choice"], seconds, nbytes])
    columns = ["choice", "step", "memory a device"]
    return tag(
        "details",
        summary,
        table_of(f"Choices for {layer.name}", columns, rows),
    )


def _sources(plan: Plan) -> Html:
    names = {"seconds": "time", "peak_bytes": "memory", "traffic_bytes": "traffic", "flops": "work"}
    rows: dict[str, str | None] = {}
    for figure, source in plan.predicted.get("provenance", {}).items():
        rows[str(names.get(figure, figure))] = str(source)
    bound = plan.predicted.get("bound_seconds")
    proof = _proof(plan)
    if bound and proof:
        seconds = seconds_text(bound)
        rows["lower bound"] = f"no plan of the searched space takes less than {seconds}: {proof}"
    staged_bound = plan.predicted.get("staged_bound_seconds")
    if staged_bound:
        seconds = seconds_text(staged_bound)
        rows["lower bound with stages"] = (
            f"no plan with {gaps_of(plan).space} takes less than {seconds}"
        )
    rows["model"] = plan.graph
    rows["machine"] = plan.machine
    axes = " × ".join(f"{axis.name} = {axis.size}" for axis in plan.mesh.axes)
    rows["mesh"] = axes or "one device"
    return section_of("Where the figures come from", listed(rows, "sources"))

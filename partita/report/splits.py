"""The section of a page that shows how each layer is split: a box per layer, a column per mesh
axis.

Boxes are laid out by the browser, so that they fit a phone and can be read aloud.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from partita.plans.plan import Plan, Storage, placed_slice
from partita.report.elements import Html, bar_of, join, seconds_text, section_of, tag
from partita.report.layers import EXCHANGE, Block, Layer, fold, owner_of

KINDS = {
    "S": (
        "sample",
        "Each part computes the layer for its samples. Splitting only samples is data parallelism.",
    ),
    "A": (
        "attribute",
        "Each part computes some positions of every sample: rows of an image, words of a text.",
    ),
    "P": (
        "parameter",
        "Each part computes some of the layer's outputs with its weights: tensor parallelism.",
    ),
    "R": (
        "reduction",
        "Each part computes some terms of a sum; the partial sums are then added.",
    ),
}
STORED = {
    1: "optimizer slots",
    2: "optimizer slots and gradients",
    3: "optimizer slots, gradients and variables",
}


def section(plan: Plan, layers: Sequence[Layer]) -> Html:
    """The section that shows how each layer is split."""
    longest = max((layer.seconds for layer in layers), default=0.0)
    rows = (_block(plan, rounds, longest) for rounds in fold(layers))
    return section_of(
        "How each layer is split",
        tag("p", _introduction(plan, layers)),
        _legend(plan, layers),
        tag("div", _axes(plan), tag("ol", rows, class_="layers"), class_="picture"),
        _variables_without_layer(plan),
    )


def _introduction(plan: Plan, layers: Sequence[Layer]) -> str:
    if not plan.mesh.axes:
        return "One device computes every layer. Nothing is split."
    text = (
        f"Each row is a layer. Its box stands for all {plan.devices} devices, with one column per "
        "mesh axis, slow links first. The colour of a column is the kind of split, its cells are "
        "the parts. The parts of a box multiply."
    )
    if any(layer.cost for layer in layers):
        text += " The bar beside it is the layer's own time in a step."
    return text


# Legend


def _legend(plan: Plan, layers: Sequence[Layer]) -> Html:
    kinds = {factor[0] for layer in layers for factor in layer.choice.values()}
    rows = []
    for kind, (word, text) in KINDS.items():
        if kind in kinds or not kinds:
            rows.append(_key(f"seg {kind}", kind, f"{kind} · {word}", text))
    if any(len(layer.choice) < len(plan.mesh.axes) for layer in layers):
        text = "The devices along this axis all do the same work."
        rows.append(_key("seg none", "=", "replicate", text))
    if plan.storage:
        text = (
            "Between steps each of these devices stores a part: 1 of the optimizer slots, 2 also "
            "of the gradients, 3 also of the variables, which are gathered for use."
        )
        rows.append(_key("key-zero", "", "ZeRO storage", text))
    if any(layer.cost for layer in layers):
        text = "Seconds of the layer's kernels on one device: forward, backward, update."
        rows.append(_key("compute", "", "compute", text))
        text = (
            "Seconds of its collectives: activations, gradients, and moves from the layers that "
            "it reads."
        )
        rows.append(_key("exchange", "", "exchange", text))
    return tag("dl", rows, class_="legend")


def _key(classes: str, letter: str, word: str, text: str) -> Html:
    mark = tag(
        "span",
        letter,
        class_=f"mark {classes}",
        aria_hidden="true",
    )
    return tag("div", tag("dt", mark, word), tag("dd", text))


# The line above the boxes


def _axes(plan: Plan) -> Html:
    """The names of the mesh axes, with the levels of the machine's links that they cross."""
    axes = plan.mesh.axes
    if not axes:
        return Html("")
    names = []
    for axis in axes:
        title = f"axis {axis.name}: {axis.size} ways"
        names.append(tag("span", axis.name, tag("small", f" {axis.size}"), title=title))
    has_levels = len({axis.level for axis in axes}) > 1
    levels = list(_levels(plan)) if has_levels else []
    grid = tag(
        "div",
        *levels,
        *names,
        class_="axes",
        style=_columns(plan),
    )
    cells = (tag("span", "layer"), grid, tag("span", "time"))
    return tag("div", *cells, class_="row top", aria_hidden="true")


def _levels(plan: Plan) -> Iterator[Html]:
    for first, end, level in _runs([axis.level for axis in plan.mesh.axes]):
        ways = math.prod(axis.size for axis in plan.mesh.axes[first:end])
        links = "slowest links" if level == 0 else f"faster links within level {level - 1}"
        yield tag(
            "span",
            f"level {level} × {ways}",
            style=f"grid-column:{first + 1}/{end + 1}",
            class_="level",
            title=f"axes of level {level}: {ways} ways, over the {links}",
        )


def _columns(plan: Plan) -> str:
    widths = (f"{math.log2(axis.size):.3g}fr" for axis in plan.mesh.axes)
    return "grid-template-columns:" + " ".join(widths)


def _runs(values: Sequence[Any]) -> list[tuple[int, int, Any]]:
    """(first, end, value) of each run of equal values.

    >>> _runs("aab")
    [(0, 2, 'a'), (2, 3, 'b')]
    """
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    ends = [*starts[1:], len(values)]
    return [(first, end, values[first]) for first, end in zip(starts, ends, strict=True)]


# Rows


def _block(plan: Plan, rounds: Block, longest: float) -> Html:
    """The rows of one round; for several rounds also the names of all."""
    count = len(rounds[0])
    rows = []
    for i in range(count):
        rows.append(_row(plan, [layers[i] for layers in rounds], longest))
    if len(rounds) == 1:
        return join(tag("li", row) for row in rows)
    names = []
    for layers in rounds:
        for layer in layers:
            seconds = tag("span", seconds_text(layer.seconds)) if layer.cost else ""
            names.append(tag("li", layer.name, seconds))
    repeated = "this layer" if count == 1 else f"these {count} layers"
    summary = tag(
        "summary",
        tag("b", f"× {len(rounds)}"),
        f" {repeated}, {len(rounds)} times",
    )
    listing = tag(
        "details",
        summary,
        tag("ol", names, class_="names"),
    )
    return tag(
        "li",
        tag("ol", (tag("li", row) for row in rows)),
        listing,
        class_="fold",
    )


def _row(
    plan: Plan,
    layers: Sequence[Layer],
    longest: float,
) -> Html:
    layer = layers[0]
    zero = " ".join(f"ZeRO-{stage}:{','.join(axes)}" for stage, axes in layer.stored)
    text = tag("small", f"{layer.text} {zero}".strip())
    name = tag("div", tag("b", layer.name), text, class_="name")
    return tag(
        "div",
        name,
        _box(plan, layer),
        _time(layers, longest),
        class_="row",
    )


def _box(plan: Plan, layer: Layer) -> Html:
    """A layer's box: a column per axis; neighbours with the same split are joined."""
    axes = plan.mesh.axes
    description = _description(plan, layer)
    attributes = {"class_": "box", "role": "img", "title": description}
    attributes["aria_label"] = description
    if not axes:
        return tag(
            "div",
            tag("span", "1 device", class_="seg none"),
            **attributes,
        )
    segments = []
    for first, end, factor in _runs([layer.choice.get(axis.name, "") for axis in axes]):
        ways = math.prod(axis.size for axis in axes[first:end])
        style = f"grid-column:{first + 1}/{end + 1};--n:{ways}"
        label = tag("i", f"{factor or '='} {ways}")
        segments.append(tag("span", label, class_=f"seg {_color(factor)}", style=style))
    for stage, names in layer.stored:
        for column, axis in enumerate(axes, start=1):
            if axis.name in names:
                style = f"grid-column:{column}/{column + 1}"
                segments.append(tag("span", class_="zero", style=style, title=f"ZeRO-{stage}"))
    return tag("div", segments, style=_columns(plan), **attributes)


def _color(factor: str) -> str:
    if not factor:
        return "none"
    return factor[0] if factor[0] in KINDS else "other"


def _description(plan: Plan, layer: Layer) -> str:
    """The content of a layer's box in words."""
    ways_by_factor: dict[str, int] = {}
    for axis in plan.mesh.axes:
        factor = layer.choice.get(axis.name, "")
        ways_by_factor[factor] = ways_by_factor.get(factor, 1) * axis.size
    replicas = ways_by_factor.pop("", 1)
    phrases = []
    for factor, ways in ways_by_factor.items():
        position = placed_slice(factor)
        if position is None:
            phrases.append(f"{_factor_name(factor)} split {ways} ways")
        else:
            phrases.append(f"only on slice {position} of {ways}")
    if replicas > 1 and phrases:
        phrases.append(f"the same on {replicas} devices")
    elif replicas > 1:
        phrases.append(f"not split: the same on all {replicas} devices")
    for stage, axes in layer.stored:
        phrases.append(f"{STORED[stage]} stored in parts over {', '.join(axes)}")
    return f"{layer.name}: {'; '.join(phrases) or 'one device'}"


def _factor_name(factor: str) -> str:
    word, _ = KINDS.get(factor[0], (factor, ""))
    return f"{word} {factor[1:]}".strip()


def _time(layers: Sequence[Layer], longest: float) -> Html:
    """The bar of a layer's time; for several layers their mean, with the range."""
    if not layers[0].cost:
        return tag("div", class_="time")
    count = len(layers)
    compute = sum(layer.compute for layer in layers) / count
    exchange = sum(layer.exchange for layer in layers) / count
    phrases = [f"compute {seconds_text(compute)}"]
    for cause in EXCHANGE:
        seconds = sum(layer.cost.get(cause, 0.0) for layer in layers) / count
        if seconds:
            phrases.append(f"{cause} {seconds_text(seconds)}")
    title = ("on average: " if count > 1 else "") + ", ".join(phrases)
    bar = bar_of(
        [("compute", compute), ("exchange", exchange)],
        longest,
        title,
    )
    figure = tag(
        "span",
        _range([layer.seconds for layer in layers]),
        class_="figure",
    )
    return tag("div", bar, figure, class_="time")


def _range(values: Sequence[float]) -> str:
    low = seconds_text(min(values))
    high = seconds_text(max(values))
    if low == high:
        return low
    number, unit = low.split()
    return f"{number} – {high}" if high.split()[1] == unit else f"{low} – {high}"


def _variables_without_layer(plan: Plan) -> Html:
    paths_by_storage: dict[str, list[str]] = {}
    for path, storage in plan.storage.items():
        if owner_of(path, plan) is None:
            paths_by_storage.setdefault(_storage_text(storage), []).append(path)
    notes = []
    for storage_text, paths in paths_by_storage.items():
        notes.append(tag("p", f"Also stored {storage_text}: {', '.join(paths)}.", class_="note"))
    return join(notes)


def _storage_text(storage: Storage) -> str:
    return f"ZeRO-{storage.zero} over {', '.join(storage.axes)}"

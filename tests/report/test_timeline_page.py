"""A timeline in a page, as a real browser shows it: what is drawn is the timeline; it zooms,
moves, answers, and fits a phone.
"""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from test_html import _luminance

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.report.html import timeline_page
from partita.report.tables import timeline_summary
from partita.report.timeline import COLORS
from partita.search.find import mesh_of
from partita.simulation.simulate import simulate
from partita.simulation.timeline import Span, Timeline
from partita.units import format_bytes

DATA = Path(__file__).parents[1] / "data"
SCREENS = [(1200, "light"), (360, "dark")]


def timeline(
    name: str = "transformer", plan: str = "data parallel", machine: str = "h100:4"
) -> Timeline:
    graph, where = OperatorGraph.load(DATA / f"{name}.graph.json"), load(machine)
    return simulate(graph, where, BASELINES[plan](graph, where.name, mesh_of(where)))


def by_hand(
    *spans: Span, memory: tuple[tuple[float, int], ...] = ((0.0, 1),), **more: Any
) -> Timeline:
    end = max((s.end for s in spans), default=0.0)
    peak = max(n for _, n in memory)
    return Timeline(
        "a plan",
        "a graph",
        "a machine",
        2,
        end,
        spans,
        {},
        memory,
        peak,
        {"parameters": peak},
        "a",
        {},
        "made by hand",
        **more,
    )


def odd() -> Timeline:
    name = "</script><img src=y onerror=alert(1)>"
    return by_hand(
        *(
            Span(name, name, kind, "forward", "a <b> stream", i * 1.0, 1.0, True)
            for i, kind in enumerate(("compute", "a kind not known"))
        )
    )


def long(tasks: int) -> Timeline:
    kernels = [
        Span(
            f"block_{i} forward",
            f"block_{i}",
            "compute",
            "forward",
            "kernels",
            i * 1e-6,
            0.9e-6,
            True,
        )
        for i in range(tasks)
    ]
    links = [
        Span(f"block_{i} sum", f"block_{i}", "sum", "backward", "links", i * 1e-6, 0.5e-6)
        for i in range(0, tasks, 2)
    ]
    return by_hand(*kernels, *links, memory=tuple((i * 1e-6, 1000 + i % 7) for i in range(tasks)))


TIMELINES = {
    "overlap": timeline,
    "gathers": lambda: timeline(plan="ZeRO-3", machine="k80-cluster:2"),
    "in turn": lambda: timeline("cnn", machine="host:4"),
    "one device": lambda: timeline("mlp", "one device", "dgx-h100:1"),
    "odd": odd,
    "empty": by_hand,
}


def boxes(tab: Any, kinds: str = "[class^=t-]") -> int:
    """How many spans are drawn."""
    return sum(
        d.count("z")
        for d in tab.eval_on_selector_all(
            f".plot path{kinds}", "all => all.map(x => x.getAttribute('d'))"
        )
    )


def critical(tab: Any) -> int:
    return tab.get_attribute(".plot .critical", "d").count("M")


def visible(tab: Any) -> str:
    """The range of time that is shown, in words."""
    tab.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    return tab.text_content(".range")


def places(tab: Any, selector: str) -> list[dict[str, float]]:
    """Where elements of the picture are, once it is drawn; at once, since it is drawn anew
    whenever the mouse moves.
    """
    visible(tab)
    return tab.eval_on_selector_all(
        selector, "all => all.map(x => x.getBoundingClientRect().toJSON())"
    )


def microseconds(shown: str) -> tuple[float, float]:
    """
    >>> microseconds("0 – 895.36 µs of 1.00 ms")
    (0.0, 895.36)
    """
    if shown.startswith("whole step, "):
        return 0.0, microseconds(f"0 – {shown.removeprefix('whole step, ')} of it")[1]
    found = re.fullmatch(r"(\S+)( \S+)? – (\S+)( \S+)? of .*", shown)
    assert found, shown
    scale = {" s": 1e6, " ms": 1e3, " µs": 1.0, " ns": 1e-3, None: 0.0}
    return float(found[1]) * scale[found[2]], float(found[3]) * scale[found[4]]


@pytest.mark.parametrize("name", TIMELINES)
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_timeline_is_drawn_whole_without_errors_or_requests(
    name: str, width: int, scheme: str, opened: Any
) -> None:
    made = TIMELINES[name]()
    shown = opened(timeline_page(made), width, scheme)
    tab = shown.tab
    if made.spans:
        assert visible(tab).startswith("whole step")
        assert critical(tab) == len(made.critical_path())
        assert 0 < boxes(tab) <= len(made.spans)
        assert len(places(tab, ".lane")) == len({s.stream for s in made.spans})
        for press in ("+", "n", "-", "ArrowRight", "Home"):
            tab.locator(".plot").press(press)
        visible(tab)
    assert shown.fails() == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "wider than the window"
    assert (
        tab.evaluate(
            "Math.min(...[...document.querySelectorAll('p,td,th,dd,text,button')].map(x => parseFloat(getComputedStyle(x).fontSize)))"
        )
        >= 11
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_on_spans_can_be_read_in_every_colour(scheme: str, opened: Any) -> None:
    kinds = [("compute", phase) for phase in ("forward", "backward", "update")] + [
        (c, "forward") for c in COLORS if c not in ("forward", "backward", "update")
    ]
    spans = [
        Span("a", "a", kind, phase, "kernels", float(i), 1.0)
        for i, (kind, phase) in enumerate([*kinds, ("else", "forward")])
    ]
    tab = opened(timeline_page(by_hand(*spans)), scheme=scheme).tab
    # One call for each: the plot may be drawn anew in between, and has other elements then.
    names = tab.evaluate(
        "[...document.querySelectorAll('.plot text.name')]"
        ".map(x => [x.classList[1], getComputedStyle(x).fill])"
    )
    fills = dict(
        tab.evaluate(
            "[...document.querySelectorAll('.plot path[class^=t-]')]"
            ".map(x => [x.classList[0], getComputedStyle(x).fill])"
        )
    )
    assert len(names) == len(spans) == len(set(fills.values())), (
        "a name on each, and each of a colour of its own"
    )
    for kind, ink in names:
        two = sorted((_luminance(ink), _luminance(fills[kind])))
        assert (two[1] + 0.05) / (two[0] + 0.05) >= 4.5, f"contrast of {kind} on {scheme}, WCAG AA"


def test_buttons_keys_wheel_and_drag_change_what_is_shown(opened: Any) -> None:
    made = timeline()
    tab = opened(timeline_page(made)).tab
    whole = microseconds(visible(tab))
    assert whole == pytest.approx((0.0, made.seconds * 1e6), abs=0.01)
    before = boxes(tab)

    tab.click("[data-do=in]")
    half = microseconds(visible(tab))
    assert half == pytest.approx((whole[1] / 4, whole[1] * 3 / 4), abs=0.01)
    inside = [s for s in made.critical_path() if s.end * 1e6 > half[0] and s.start * 1e6 < half[1]]
    assert abs(critical(tab) - len(inside)) <= 2, "only what is visible is drawn"
    assert boxes(tab) < before
    tab.click("[data-do=whole]")
    assert microseconds(visible(tab)) == whole and boxes(tab) == before

    plot = tab.locator(".plot")
    plot.press("+")
    plot.press("ArrowRight")
    assert microseconds(visible(tab)) == pytest.approx((whole[1] * 0.35, whole[1] * 0.85), abs=0.01)
    plot.press("-")
    assert microseconds(visible(tab)) == whole
    plot.press("+")
    plot.press("Home")
    assert microseconds(visible(tab)) == whole

    edge = plot.bounding_box()
    y = edge["y"] + edge["height"] - 20
    tab.mouse.move(edge["x"] + edge["width"] / 4, y)
    tab.evaluate("document.activeElement.blur()")
    tab.mouse.wheel(0, -240)
    assert microseconds(visible(tab)) == whole, "a page is scrolled over it"
    tab.evaluate("scrollTo(0, 0)")
    tab.mouse.click(edge["x"] + edge["width"] / 4, y)
    tab.mouse.wheel(0, -120)
    tab.wait_for_function("!document.querySelector('.range').textContent.startsWith('whole')")
    near = microseconds(visible(tab))
    assert near[1] - near[0] < whole[1] * 0.7
    assert near[0] + (near[1] - near[0]) / 4 == pytest.approx(whole[1] / 4, rel=0.01), (
        "what is under the mouse stays there"
    )

    tab.mouse.down()
    tab.mouse.move(edge["x"] + edge["width"] / 4 - 100, y, steps=4)
    tab.mouse.up()
    moved = microseconds(visible(tab))
    assert moved[0] - near[0] == pytest.approx((near[1] - near[0]) * 100 / edge["width"], rel=0.02)
    for _ in range(60):
        plot.press("+")
    deep = microseconds(visible(tab))
    assert 0 <= deep[0] <= deep[1] <= whole[1], "there is an end to it"


def test_two_fingers_zoom_and_one_taps(opened: Any) -> None:
    made = timeline()
    tab = opened(timeline_page(made), 360, "dark", has_touch=True, is_mobile=True).tab
    whole = microseconds(visible(tab))
    tab.locator(".plot").scroll_into_view_if_needed()
    edge = tab.locator(".plot").bounding_box()
    y = edge["y"] + 60
    hand = tab.context.new_cdp_session(tab)

    def touch(kind: str, *xs: float) -> None:
        hand.send(
            "Input.dispatchTouchEvent",
            {
                "type": kind,
                "touchPoints": [{"x": edge["x"] + x, "y": y, "id": i} for i, x in enumerate(xs)],
            },
        )

    touch("touchStart", 150.0)
    touch("touchStart", 150.0, 180.0)
    for apart in range(30, 121, 10):
        touch("touchMove", 150.0, 150.0 + apart)
    touch("touchEnd")
    near = microseconds(visible(tab))
    assert near[1] - near[0] == pytest.approx(whole[1] / 4, rel=0.05)
    assert tab.evaluate("visualViewport.scale") == 1, "the picture zooms, not the page"
    kernel = next(s for s in made.spans if s.stream == "kernels" and s.start * 1e6 > near[0])
    x = ((kernel.start + kernel.seconds / 2) * 1e6 - near[0]) / (near[1] - near[0]) * edge["width"]
    tab.touchscreen.tap(edge["x"] + x, edge["y"] + 58)
    assert tab.inner_text(".tip").startswith(kernel.name)


def test_what_is_under_the_mouse_is_named_with_its_time(opened: Any) -> None:
    made = by_hand(
        Span("dense forward", "dense", "compute", "forward", "kernels", 0.0, 3e-3, True),
        Span(
            "dense backward, sum gradients", "dense", "sum", "backward", "links", 3e-3, 1e-3, True
        ),
        memory=((0.0, 2048), (1e-3, 4096), (3e-3, 1024)),
    )
    tab = opened(timeline_page(made)).tab
    lanes = places(tab, ".lane")
    wide = lanes[0]["width"]
    tab.mouse.move(lanes[0]["x"] + wide / 2, lanes[0]["y"] + 10)
    assert tab.inner_text(".tip").split("\n") == [
        "dense forward",
        "3.00 ms, from 0 to 3.00 ms",
        "kernels, forward; on the critical path",
    ]
    tab.mouse.move(lanes[1]["x"] + wide * 0.9, lanes[1]["y"] + 10)
    assert tab.inner_text(".tip").split("\n") == [
        "dense backward, sum gradients",
        "1.00 ms, from 3.00 ms to 4.00 ms",
        "sums of gradients, backward; on the critical path",
    ]
    peak = places(tab, ".peak")[0]
    assert peak["x"] + peak["width"] / 2 == pytest.approx(lanes[0]["x"] + wide / 4, abs=1)
    tab.mouse.move(lanes[0]["x"] + wide * 0.3, peak["y"] + 40)
    assert tab.inner_text(".tip").split("\n") == ["4.0 KiB", "at 1.20 ms, the peak: in a"]
    tab.mouse.move(lanes[0]["x"] + wide * 0.1, peak["y"] + 40)
    assert tab.inner_text(".tip").split("\n") == ["2.0 KiB", "at 400.00 µs"]
    tab.mouse.move(5, 5)
    assert tab.is_hidden(".tip")


def test_the_critical_path_is_gone_along_by_button_and_key(opened: Any) -> None:
    made = timeline(plan="ZeRO-3", machine="k80-cluster:2")
    path = sorted(made.critical_path(), key=lambda s: s.start)
    tab = opened(timeline_page(made)).tab
    for span in path[:5]:
        tab.click("[data-do=on]")
        assert tab.text_content(".tip b") == span.name
        start, end = microseconds(visible(tab))
        assert start - 0.01 <= span.start * 1e6 and span.end * 1e6 <= end + 0.01, (
            "it is brought into view"
        )
    tab.locator(".plot").press("p")
    assert tab.text_content(".tip b") == path[3].name
    assert places(tab, ".chosen")[0]["width"] >= 38, "and is wide enough to be seen"


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_without_a_script_the_whole_step_is_shown(width: int, scheme: str, opened: Any) -> None:
    made = timeline("cnn", machine="host:4")
    shown = opened(timeline_page(made), width, scheme, java_script_enabled=False)
    tab = shown.tab
    text = tab.content()
    drawn = re.findall(r'<path d="([^"]*)" class="(t-[\w-]+|critical)"', text)
    assert sum(d.count("z") for d, kind in drawn if kind != "critical") == len(made.spans)
    assert sum(d.count("M") for d, kind in drawn if kind == "critical") == len(made.critical_path())
    assert tab.is_visible("noscript p") and tab.is_hidden(".controls") and tab.is_hidden(".hint")
    assert tab.locator(".plot i").first.is_visible() == (width > 1000)
    assert tab.locator(".plot svg").bounding_box()["width"] > width - 130
    assert shown.fails() == []


def test_thousands_of_spans_are_few_elements_and_every_one_is_found(opened: Any) -> None:
    made = long(4000)
    tab = opened(timeline_page(made)).tab
    assert critical(tab) == 4000
    assert tab.evaluate("document.querySelectorAll('.plot *').length") < 60
    width = tab.locator(".plot").bounding_box()["width"]
    assert boxes(tab, ".t-forward") <= 2 * width < 4000, "spans that share a pixel are drawn as one"
    for _ in range(9):
        tab.click("[data-do=in]")
    start, end = microseconds(visible(tab))
    assert boxes(tab, ".t-forward") == pytest.approx(end - start, abs=2)


def test_the_page_says_in_words_what_waits_and_what_holds_memory() -> None:
    made = timeline(plan="ZeRO-3", machine="k80-cluster:2")
    text = unescape(" ".join(re.sub("<[^>]+>", " ", timeline_page(made)).split()))
    for said in (
        "each of the 8 devices does the same",
        "held up by collectives",
        "waiting for a collective",
        f"one of its {len(made.critical_path())} tasks",
        f"Memory at the peak: {format_bytes(made.peak_bytes)}, in {made.peak_operator}",
        "activations",
        "gathering stored variables",
        "Longest on the critical path",
        made.source,
    ):
        assert said in text, said


def test_a_step_that_takes_no_time_is_said_to() -> None:
    assert "takes no time" in timeline_page(by_hand())


def test_every_stream_is_a_row_kernels_first(opened: Any) -> None:
    made = timeline()
    more = replace(
        made,
        spans=(
            *(replace(s, stream=f"stage 1, {s.stream}", critical=False) for s in made.spans),
            *made.spans,
        ),
    )
    tab = opened(timeline_page(more)).tab
    names = tab.eval_on_selector_all(".plot text.row", "all => all.map(x => x.textContent)")
    assert names[:4] == ["kernels", "stage 1, kernels", "stage 1, links", "links: collectives"]
    assert critical(tab) == len(made.critical_path())


def test_the_seconds_of_a_step_are_a_sum():
    shown = timeline(plan="ZeRO-3")
    kernels = shown.busy_part() * shown.seconds
    assert kernels + sum(shown.idle.values()) == pytest.approx(shown.seconds)
    step, collectives = list(timeline_summary(shown))[:2]
    assert re.fullmatch(r"step \S+ \S+ = \S+ \S+ kernels \(\d+%\)( \+ \S+ \S+ [a-z ]+)+", step)
    assert re.fullmatch(
        r"collectives: .*, of which .* \(\d+%\) are hidden behind kernels", collectives
    )

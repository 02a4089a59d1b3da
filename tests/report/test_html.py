"""The page of a plan, as a real browser shows it: no errors, no requests, readable on a phone
and in the dark.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.management.decisions import Decision
from partita.planning import best_plan
from partita.plans.plan import Mesh, Plan
from partita.report.html import page
from partita.simulation.simulate import simulate
from partita.units import format_joules

DATA = Path(__file__).parents[1] / "data"
MEASURED = {
    "seconds": 2e-4,
    "peak_bytes": 1 << 20,
    "traffic_bytes": {"all_reduce": 4096, "all_gather": 10},
    "flops": 1e6,
}


def plan(name: str = "transformer", machine: str = "k80-cluster:2") -> Plan:
    return best_plan(OperatorGraph.load(DATA / f"{name}.graph.json"), load(machine))


def timed() -> str:
    graph, machine = OperatorGraph.load(DATA / "transformer.graph.json"), load("k80-cluster:2")
    made = best_plan(graph, machine)
    return page(made, timeline=simulate(graph, machine, made))


def odd() -> Plan:
    """A plan without a prediction or reasons, of layers whose names are markup."""
    return Plan(
        "<script>alert(1)</script>",
        "a & b",
        Mesh.of((2, 2)),
        {'x"><img src=y onerror=alert(2)>': {"a": "S"}, "b": {}},
    )


PAGES = {
    "searched": lambda: page(plan()),
    "measured": lambda: page(plan("cnn"), MEASURED),
    "one device": lambda: page(plan("mlp", "dgx-h100:1")),
    "with its timeline": timed,
    "bare": lambda: page(odd()),
}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (360, "dark")])
def test_a_page_renders_without_errors_or_requests(
    name: str, width: int, scheme: str, opened: Any
) -> None:
    shown = opened(PAGES[name](), width, scheme)
    tab = shown.tab
    for summary in tab.query_selector_all("summary"):
        if summary.is_visible():
            summary.click()
    assert shown.fails() == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "wider than the window"
    back, ink = (
        _luminance(tab.evaluate(f"getComputedStyle(document.body).{what}"))
        for what in ("backgroundColor", "color")
    )
    assert (back < 0.1) == (scheme == "dark")
    assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) >= 7, "contrast of text, WCAG AAA"
    assert (
        tab.evaluate(
            "Math.min(...[...document.querySelectorAll('p,td,th,dd')].map(x => parseFloat(getComputedStyle(x).fontSize)))"
        )
        >= 11
    )


def _luminance(colour: str) -> float:
    """Relative luminance of rgb(...) (WCAG 2, definition of relative luminance)."""
    parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_layer_has_a_box_that_shows_its_split(opened: Any) -> None:
    made = plan("cnn")
    tab = opened(page(made)).tab
    boxes = tab.eval_on_selector_all(
        ".box",
        "all => all.map(x => [x.getAttribute('aria-label'), x.getBoundingClientRect().width])",
    )
    for name, choice in made.choices.items():
        words, width = next((w, n) for w, n in boxes if w.startswith(f"{name}:"))
        assert width > 100
        assert ("split" in words) and (not choice or "ways" in words or "not split" in words)


def test_the_page_says_what_was_measured_and_what_was_given_up() -> None:
    text = re.sub("<[^>]+>", " ", page(plan("cnn"), MEASURED))
    for said in (
        "200 µs measured",
        "Plans compared",
        "data parallel",
        "Alternatives",
        "sent by all-gather",
    ):
        assert said in text, said
    assert "Nothing was measured" in page(plan("cnn"))


def test_the_page_lists_decisions_and_energy() -> None:
    decision = Decision(51, "shares", "process 1 is 4.4 x slower; shares even -> 13:3 & more")
    made = plan("cnn")
    made = replace(made, predicted={**made.predicted, "joules": 12.5})
    shown = page(made, MEASURED, decisions=[decision.to_json()])
    assert (
        "<td>shares</td><td>process 1 is 4.4 x slower; shares even -&gt; 13:3 &amp; more" in shown
    )
    assert "energy a step" in shown and format_joules(12.5) in shown
    assert "Decisions" not in page(made, MEASURED)

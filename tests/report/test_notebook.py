"""A plan is a table in a notebook cell; sentences of Partita are printed below one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import partita
from partita.comparison import ComparedPlan, Comparison
from partita.graph.operator_graph import OperatorGraph
from partita.planning import resolve_plan
from partita.report.notebook import comparison_html, notebook_say, timeline_html
from partita.simulation.simulate import predicted, simulate

GRAPH = OperatorGraph.load(Path(__file__).parents[1] / "data" / "transformer.graph.json")


def test_a_cell_shows_a_plan_as_a_table_with_its_prediction() -> None:
    plan = partita.best_plan(GRAPH, partita.load_machine("h100:4"))
    html = plan._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    assert html.startswith("<div><table>")
    assert f"{plan.graph} on h100:4" in html
    assert html.count("<tr>") > 5
    assert "predicted" in html.split("</table>")[1]


def test_a_cell_shows_a_simulated_step_and_a_comparison_as_tables() -> None:
    plan = resolve_plan("tp", GRAPH, partita.load_machine("h100:4"))
    step = simulate(GRAPH, partita.load_machine("h100:4"), plan)
    html = timeline_html(step)
    assert step._repr_html_() == html  # pyright: ignore[reportAttributeAccessIssue]
    assert "a step of" in html and "source of the figures" in html.split("</table>")[1]
    prediction = predicted(GRAPH, partita.load_machine("h100:4"), plan)
    rows = (ComparedPlan("<tp>", plan, prediction, True),)
    html = comparison_html(Comparison("net", "h100:4", rows))
    assert "net on h100:4" in html and "&lt;tp&gt;" in html and html.count("<tr>") == 2


def test_names_of_layers_are_escaped() -> None:
    plan = partita.Plan(
        "<b>", "host:1", partita.best_plan(GRAPH, partita.load_machine("h100:1")).mesh, {"<i>": {}}
    )
    html = plan._repr_html_()  # pyright: ignore[reportAttributeAccessIssue]
    assert "<b>" not in html
    assert "&lt;i&gt;" in html


@pytest.mark.parametrize(
    ("shell", "prints"),
    [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)],
)
def test_sentences_are_printed_in_a_kernel_only(
    shell: object, prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    say = notebook_say()
    assert (say is not None) == prints
    if say is not None:
        say("one device")
        assert capsys.readouterr().out == "partita: one device\n"

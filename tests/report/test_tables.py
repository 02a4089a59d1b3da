"""Tables for the terminal: short, in 80 columns, and true to names that look like markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.planning import best_plan
from partita.plans.plan import Plan, Storage
from partita.report.folding import LayerRow, folded, layers_label
from partita.report.tables import (
    comparison_table,
    explain_table,
    legend,
    plan_table,
    summary,
)

DATA = Path(__file__).parents[1] / "data"
ODD_NAMES = ("attn[q]", "out[/b]", "norm:smile:", "[red]x")


def printed(table: Table) -> str:
    """A table as a console with Rich's defaults prints it."""
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def rows_of(*layers: tuple[str, str], compute: Sequence[float] = ()) -> list[LayerRow]:
    seconds = compute or [1.0] * len(layers)
    return [
        LayerRow((name,), split, {"compute": value})
        for (name, split), value in zip(layers, seconds, strict=True)
    ]


def plan_of(names: Sequence[str]) -> Plan:
    cost = {
        "compute": 1e-3,
        "activations": 0.0,
        "gradients": 0.0,
        "moves": 0.0,
        "bytes": 8,
        "traffic": 0,
        "alternatives": [{"choice": "S:a", "seconds": -86e-6, "bytes": -8}],
    }
    value = {
        "schema": 1,
        "graph": "odd[/b]",
        "machine": "h100:2",
        "mesh": {"a": {"size": 2, "level": 0}},
        "operators": dict.fromkeys(names, "P:a"),
    }
    plan = Plan.from_json(value)
    return Plan.from_json(
        plan.to_json() | {"why": {"operators": dict.fromkeys(names, cost), "baselines": {}}}
    )


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_printed_as_they_are(name: str) -> None:
    plan = plan_of([name])
    assert name in printed(plan_table(plan)) and "odd[/b]" in printed(plan_table(plan))
    assert name in printed(explain_table(plan, name))
    row = {"name": name, "seconds": 1.0, "peak_bytes": 1}
    assert name in printed(comparison_table([row], name))


def test_equal_blocks_are_one_block_and_sums_stay() -> None:
    layers = [("embedding", "S:a")]
    for i in range(12):
        layers += [(f"block_{i}/query", "P:a"), (f"block_{i}/output", "R:a"), (f"up_{i}", "S:a")]
    layers.append(("logits", "P:a"))
    rows = rows_of(*layers)
    short = folded(rows)
    assert [row.text for row in short] == [
        "embedding",
        "block_0 ... block_11 (12): query",
        "block_0 ... block_11 (12): output",
        "up_0 ... up_11 (12)",
        "logits",
    ]
    assert sum(row.figures["compute"] for row in short) == len(rows)


def test_blocks_that_are_split_otherwise_stay_apart() -> None:
    layers = [(f"up_{i}", "S:a" if i < 20 else "P:a") for i in range(40)]
    assert [row.text for row in folded(rows_of(*layers))] == [
        "up_0 ... up_19 (20)",
        "up_20 ... up_39 (20)",
    ]


def test_the_smallest_layers_of_a_long_table_are_one_row() -> None:
    layers = [(f"{chr(97 + i % 26)}{'x' * (i // 26)}", "S:a") for i in range(60)]
    rows = rows_of(*layers, compute=[float(i) for i in range(60)])
    short = folded(rows, 30)
    assert len(short) == 30 and short[-1].text == "31 smaller layers"
    assert short[-1].figures["compute"] == sum(range(31))
    assert [row.figures["compute"] for row in short[:-1]] == list(range(31, 60))


def test_a_short_table_is_not_folded() -> None:
    rows = rows_of(*((f"dense_{i}", "S:a") for i in range(20)))
    assert folded(rows) == rows


def test_blocks_with_keras_own_names_are_folded() -> None:
    """Keras numbers from the second layer on, and counts each kind of layer by itself."""

    def name(kind: str, number: int) -> str:
        return f"{kind}_{number}" if number else kind

    layers = []
    for block in range(4):
        attention = name("attention", block)
        layers += [(f"{attention}/{part}", "S:a") for part in ("query", "key", "value", "output")]
        layers += [(name("dense", 2 * block + 1), "S:a"), (name("dense", 2 * block), "P:a")]
    assert [row.text for row in folded(rows_of(*layers))] == [
        "attention ... attention_3 (4): query",
        "attention ... attention_3 (4): key",
        "attention ... attention_3 (4): value",
        "attention ... attention_3 (4): output",
        "dense_1 ... dense_7 (4)",
        "dense ... dense_6 (4)",
    ]
    assert layers_label(["a/b", "c/d"]) == "a/b ... c/d (2)"


def test_a_transformer_fits_a_screen() -> None:
    graph = OperatorGraph.load(DATA / "transformer.graph.json")
    plan = best_plan(graph, load("h100:8"))
    lines = printed(plan_table(plan)).splitlines()
    assert max(map(len, lines)) <= 80
    assert max(len(line) for line in legend(plan).splitlines()) <= 80


def test_an_alternative_shows_what_it_adds_to_the_step() -> None:
    plan = plan_of(["dense"])
    text = " ".join(printed(explain_table(plan, "dense")).split())
    assert "-86.0 us" in text and "error of predictions" in text
    plan.why["operators"]["dense"]["alternatives"][0]["seconds"] = 86e-6
    text = " ".join(printed(explain_table(plan, "dense")).split())
    assert "+86.0 us" in text and "error of predictions" not in text


def test_the_chosen_row_says_how_variables_are_stored() -> None:
    """An alternative may have the same split and another storage."""
    plan = plan_of(["dense"])
    stored = replace(plan, storage={"dense/kernel": Storage(0, ("a",), 1)})
    assert "ZeRO-1:a (chosen)" in printed(explain_table(stored, "dense"))
    assert "ZeRO" not in printed(explain_table(plan, "dense"))


def test_a_step_of_kernels_alone_has_no_exchange() -> None:
    for compute in (1.0, 1 - 1e-15, 1 + 1e-15):
        row = {"name": "found", "seconds": 1.0, "seconds_compute": compute, "peak_bytes": 1}
        assert re.search(r"found +1.00 s +1.00 s +0 s", printed(comparison_table([row], "one")))


def test_no_difference_is_printed_as_negative_and_no_equal_speed_as_gain() -> None:
    rows = [
        {"name": "data parallel", "seconds": 1.0, "seconds_compute": 1.2, "peak_bytes": 1},
        {"name": "found", "seconds": 0.5, "seconds_compute": 0.4, "peak_bytes": 1},
    ]
    text = printed(comparison_table(rows, "two"))
    assert "2.00 x" in text and "1.00 x" not in text and not re.search(r"-\d", text)


def test_a_bound_that_proves_nothing_is_not_a_percentage() -> None:
    plan = plan_of(["dense"])
    predicted = {"seconds": 21.0, "bound_seconds": 1.0, "peak_bytes": 8, "traffic_bytes": {}}
    value = plan.to_json() | {"predicted": predicted}
    (step, _) = summary(Plan.from_json(value))
    assert step.endswith("no useful lower bound is known") and "%" not in step

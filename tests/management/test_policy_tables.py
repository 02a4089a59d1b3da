"""The printed tables of policies, and the command's sentences."""

import io
import json
import re
from dataclasses import replace

from rich.console import Console
from typer.testing import CliRunner

from partita.cli.main import app
from partita.machine import load
from partita.management.comparison import PolicyComparison
from partita.management.hardware import hardware_of
from partita.management.power import Moment, PowerRun
from partita.report.policy_page import policy_page
from partita.report.policy_tables import policy_summary, policy_table


def run(policy: str, joules: float, seconds: float) -> PowerRun:
    return PowerRun(
        policy=policy,
        joules=joules,
        seconds=seconds,
        peak_celsius=85.4,
        throttled=0.25,
        decision_seconds=1e-6,
        moments=(Moment(0, 0, seconds, joules, 85.4),),
    )


ORACLE = run("oracle", 10.0, 2.0)
COMPARISON = PolicyComparison(
    program="mlp",
    machine="phone",
    hardware="as described",
    steps=1200,
    flops=5e9,
    runs=(run("ondemand", 20.0, 1.5), ORACLE),
    oracle=ORACLE,
    status="recalled",
    power_status="verified",
    simulated=hardware_of(load("odroid-xu3")),
)


def test_the_best_policy_comes_first() -> None:
    console = Console(width=90, record=True, file=io.StringIO())
    console.print(policy_table(COMPARISON))
    lines = [line.strip() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == "mlp on phone, hardware as described: 1,200 steps"
    assert lines[3].split() == [
        "oracle", "10.0", "J", "2.00", "s", "20", "500", "MFLOP", "85", "25%", "+0.0%",
    ]  # fmt: skip
    assert lines[4].endswith("+50.0%")


def test_recalled_figures_are_pointed_out() -> None:
    lines = policy_summary([COMPARISON])
    assert lines[-1] == "Times rest on recalled figures: run 'partita machine show phone'."


def test_json_has_the_figures_of_the_table() -> None:
    value = json.loads(json.dumps(COMPARISON.to_json()))
    assert value["policies"][0]["regret"] == 0.5
    assert value["policies"][0]["flops_per_joule"] == 2.5e8


def test_a_machine_must_be_named() -> None:
    done = CliRunner().invoke(app, ["manage", "simulate", "train.py"])
    assert done.exit_code == 2
    assert "Policies act on simulated machines, and none is named" in done.stderr


def test_the_page_shows_temperature_limits_and_decisions() -> None:
    """0.5 s on the fastest setting, then 1.5 s on the one that a trip leaves."""
    hardware = COMPARISON.simulated
    fastest = hardware.all_active([1.0, 1.0])
    limited = hardware.limited(fastest, {"big": 1e9})
    moments = (
        Moment(fastest.index, fastest.index, 0.5, 4.0, 91.0),
        Moment(limited.index, fastest.index, 1.5, 6.0, 88.0),
    )
    hot = replace(ORACLE, policy="performance <b>", moments=moments)
    html = policy_page([replace(COMPARISON, runs=(hot,), oracle=hot)])
    assert "performance &lt;b&gt;" in html and "performance <b>" not in html
    # x: a quarter of the time is over at 250 of 1000.
    assert re.search(r'd="M250\.0 [0-9]+H1000\.0" class="throttled"', html)
    assert html.count('class="trip"') == 3
    rows = re.findall(r'<th scope="row">([0-9.]+ s)</th><td>(.*?)</td><td>(.*?)</td>', html)
    assert rows == [
        ("0.0 s", "big 4 × 2 GHz, little 4 × 1.4 GHz", "91 °C"),
        ("0.5 s", "big 4 × 1 GHz, little 4 × 1.4 GHz", "88 °C"),
    ]
    assert "a trip limits big 4 × 2 GHz, little 4 × 1.4 GHz" in html


def test_a_report_shows_clocks_and_not_changes_of_plans() -> None:
    arguments = ["train.py", "--machine", "h100:4", "--trace", "t", "--report", "r.html"]
    done = CliRunner().invoke(app, ["manage", "simulate", *arguments])
    assert done.exit_code == 2
    assert "remove --report or --trace" in " ".join(done.stderr.split())

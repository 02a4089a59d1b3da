"""The printed tables of policies, and the command's sentences."""

import io
import json

from rich.console import Console
from typer.testing import CliRunner

from partita.cli.main import app
from partita.management.comparison import PolicyComparison
from partita.management.power import PowerRun
from partita.report.policy_tables import policy_summary, policy_table


def run(policy: str, joules: float, seconds: float) -> PowerRun:
    return PowerRun(
        policy=policy,
        joules=joules,
        seconds=seconds,
        peak_celsius=85.4,
        throttled=0.25,
        decision_seconds=1e-6,
        settings=(0,),
        celsius=(85.4,),
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

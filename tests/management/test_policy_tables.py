"""The printed tables of policies, and the command's sentences."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from partita.cli.main import app
from partita.machine import load
from partita.management.comparison import PolicyComparison
from partita.management.hardware import hardware_of
from partita.management.power import Moment, PowerRun
from partita.management.replay import Change, Replay, Stretch
from partita.management.school import LearnedPolicy
from partita.management.traces import Event, Trace
from partita.management.tree import LEAF, DecisionTree
from partita.report.policy_page import policy_page
from partita.report.policy_tables import policy_summary, policy_table
from partita.report.replay_page import replay_page

STUMP = DecisionTree((LEAF,), (0.0,), (LEAF,), (LEAF,), (3,), (1.0,))


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


def test_rounded_steps_are_said() -> None:
    assert policy_summary([COMPARISON], COMPARISON.steps) == policy_summary([COMPARISON])
    said = "\n".join(policy_summary([COMPARISON], COMPARISON.steps + 1))
    assert f"{COMPARISON.steps + 1:,} steps are rounded to {COMPARISON.steps:,}: a run is" in said


def test_json_has_the_figures_of_the_table() -> None:
    value = json.loads(json.dumps(COMPARISON.to_json()))
    assert value["policies"][0]["regret"] == 0.5
    assert value["policies"][0]["flops_per_joule"] == 2.5e8


def test_a_machine_must_be_named() -> None:
    done = CliRunner().invoke(app, ["manage", "simulate", "train.py"])
    assert done.exit_code == 2
    assert "Policies act on simulated machines, and none is named" in done.stderr


def test_wrong_options_are_said_before_the_script_is_captured(tmp_path: Path) -> None:
    policy = LearnedPolicy("rk3588", 197, ("mlp",), tree=STUMP, ranges=((0.0, 1.0),) * 12)
    path = tmp_path / "policy.json"
    path.write_text(policy.to_text())
    arguments = ["manage", "simulate", "absent.py", "--learned", str(path), "--machine"]
    done = CliRunner().invoke(app, [*arguments, "odroid-xu3"])
    assert "The policy was trained for 'rk3588', not for 'odroid-xu3': train" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "h100:4", "--trace", "events.jsonl"])
    assert "--learned and --steps are for operating points, and a trace is" in done.stderr


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


def test_a_page_shows_the_events_of_a_trace_and_the_decisions_of_policies() -> None:
    """100 s as described, 50 s at half speed, 50 s of which 10 are a change, then the end."""
    trace = Trace((Event(100.0, "slow", 3, factor=0.5), Event(200.0, "end")))
    reason = "device 3 at 50%: 1.60 x faster"
    run = Replay(
        policy="rule <b>",
        steps=160.0,
        seconds=200.0,
        changes=(Change(150.0, "fewer", 10.0, reason),),
        stretches=(
            Stretch(100.0, "all", 1.0),
            Stretch(50.0, "all", 0.5),
            Stretch(10.0, "fewer", 0.0),
            Stretch(40.0, "fewer", 0.8),
        ),
    )
    oracle = Replay(policy="oracle", steps=170.0, seconds=200.0, changes=())
    html = replay_page("mlp", "h100:4", trace, [oracle, run])
    assert "rule &lt;b&gt;" in html and "rule <b>" not in html
    assert "<dt>behind the oracle</dt><dd>5.9 %</dd>" in html
    # The device is slow from 500 to 1000 of 1000 units, by half: 0.2 + 0.8 x 0.5.
    assert 'd="M500.0 0h500.00v14h-500.00z" class="lost" fill-opacity="0.60"' in html
    # Rates of 1, 0.5 and 0.8 of 48 pixels; none during the change.
    heights = re.findall(r'd="M([0-9.]+) 48V([0-9.]+)h', html)
    assert heights == [("0.0", "0.0"), ("500.0", "24.0"), ("800.0", "9.6")]
    assert '<th scope="row">100 s</th><td>device 3 at 50%</td>' in html
    assert f'<th scope="row">150 s</th><td>{reason}</td><td>fewer</td><td>10.0 s</td>' in html

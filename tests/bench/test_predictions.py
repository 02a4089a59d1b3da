"""`partita bench fidelity`: its figures by hand, its plans, and the command from a model to
tables.
"""

import json
from dataclasses import replace
from pathlib import Path

import keras
import pytest
import typer.testing
from keras import layers

from partita.bench import fidelity
from partita.bench.fidelity import (
    MIN_PLANS,
    MODELS,
    Effort,
    Step,
    chosen_models,
    chosen_over_best,
    plans_of,
    program,
    random_plan,
    settings,
    summaries,
    summary,
)
from partita.cli.main import app
from partita.errors import PartitaError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import host
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.search.find import mesh_of

GRAPH = OperatorGraph.load(Path(__file__).parent.parent / "data" / "transformer.graph.json")


def step(
    model: str,
    plan: str,
    seconds: float,
    predicted: float,
    chosen: bool = False,
    place: str = "2 devices",
) -> Step:
    return Step(
        place,
        model,
        plan,
        chosen,
        seconds,
        2 * predicted,
        None,
        predicted,
        None,
        {"measured": 1.0, "fitted": 0.0},
    )


STEPS = [
    step("a", "data parallel", 1.0, 1.1),
    step("a", "ZeRO-3", 2.0, 1.5, chosen=True),
    step("a", "spatial", 3.0, 1.4),
    step("b", "data parallel", 10.0, 10.0, chosen=True),
    step("b", "ZeRO-3", 12.0, 12.12),
]


def test_figures_are_those_that_one_adds_up_by_hand() -> None:
    found = summary(STEPS, "measured")
    assert found is not None
    assert (found.steps, found.median) == (5, pytest.approx(0.1))  # 0, 1, 10, 25 and 53 % off
    assert found.worst == found.p95 == pytest.approx(1 - 1.4 / 3)
    assert found.tau == pytest.approx(0.8)  # 9 pairs of 10 in order, one in disorder
    assert found.tau_within == (pytest.approx((1 / 3 + 1) / 2), pytest.approx(1 / 3))
    assert summary(STEPS, "fitted") is None
    assert chosen_over_best(STEPS) == {("2 devices", "a"): 2.0, ("2 devices", "b"): 1.0}


def test_plans_are_compared_on_one_setting_and_figures_are_of_each_and_of_all() -> None:
    slow = [
        replace(s, place="2 processes", seconds=100 * s.seconds, measured=100 * s.measured)
        for s in STEPS
    ]
    rows = summaries([*STEPS, *slow])
    assert [(r["place"], r["way"], r["steps"]) for r in rows] == [
        (place, way, n)
        for place, n in (("2 devices", 5), ("2 processes", 5), ("all", 10))
        for way in ("rates", "measured")
    ]
    measured = {r["place"]: r for r in rows if r["way"] == "measured"}
    assert measured["2 devices"]["median"] == pytest.approx(measured["all"]["median"])
    assert measured["all"]["tau_within"] == measured["2 devices"]["tau_within"], (
        "plans of one setting only are compared"
    )
    assert measured["all"]["chosen_over_best"] == (1.5, 2.0)


def test_ninety_five_in_a_hundred_are_no_more_off_than_said() -> None:
    hundred = [step("a", str(n), 1.0, 1.0 + n / 100) for n in range(1, 101)]
    found = summary(hundred, "measured")
    assert (
        found is not None and found.p95 == pytest.approx(0.95) and found.worst == pytest.approx(1.0)
    )


# ---------------------------------------------------------------------------------------------------------------
# plans


def test_plans_are_programs_of_their_own_and_at_least_as_many_as_asked_for() -> None:
    machine, mesh = host(2, 8 << 30), mesh_of(host(2, 8 << 30))
    known = {name: make(GRAPH, machine.name, mesh) for name, make in BASELINES.items()}
    plans, chosen = plans_of(
        GRAPH, machine, known, replace(known["tensor parallel"], name="found"), known["ZeRO-3"]
    )
    assert chosen == "tensor parallel", (
        "the plan found is that of an expert: measured once, under the expert's name"
    )
    assert len(plans) >= MIN_PLANS and len({program(p) for p in plans.values()}) == len(plans)
    assert "ZeRO-2" not in plans and any(name.startswith("random") for name in plans)
    few, chosen = plans_of(
        GRAPH,
        machine,
        {n: known[n] for n in ("one device", "data parallel")},
        known["data parallel"],
        known["one device"],
    )
    assert len(few) == MIN_PLANS and chosen == "data parallel"
    three, chosen = plans_of(
        GRAPH, machine, known, known["tensor parallel"], known["ZeRO-3"], most=3
    )
    assert list(three)[:2] == ["tensor parallel", "data parallel"] and chosen == "tensor parallel"
    assert len(three) == 3 and list(three)[2].startswith("random")
    assert plans_of(GRAPH, host(1, 8 << 30), known, known["ZeRO-3"], known["ZeRO-3"]) == (
        {"one device": known["one device"]},
        "one device",
    )


def test_a_plan_at_random_is_legal_the_same_each_time_and_alike_for_equal_layers() -> None:
    machine = host(4, 8 << 30)
    plans = [random_plan(GRAPH, machine, mesh_of(machine), seed) for seed in range(4)]
    for seed, plan in enumerate(plans):
        assert check(plan, GRAPH) == plan == random_plan(GRAPH, machine, mesh_of(machine), seed)
        assert (
            plan.choices["multi_head_attention/query"]
            == plan.choices["multi_head_attention_1/query"]
        )
    assert len({program(p) for p in plans}) == len(plans)


# -------------------------------------------------------------------------------------------------------------
# command


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (
            lambda: chosen_models("mlp, gpt"),
            "'gpt' is not a model of this benchmark: use one of mlp, cnn",
        ),
        (lambda: settings("1,two", ""), "--devices has 'two': write whole numbers of at least 1"),
        (lambda: settings("", "1"), "--processes has '1': write whole numbers of at least 2"),
        (
            lambda: settings("", " "),
            "No setting is left to measure: give --devices, --processes or both",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(ask, says: str) -> None:
    with pytest.raises(PartitaError, match=says):
        ask()


def test_all_models_are_meant_where_none_is_named() -> None:
    assert chosen_models("") == list(MODELS) and len(MODELS) >= 8
    assert chosen_models("lstm, mlp") == ["lstm", "mlp"]


def tiny(width: int):
    def make():
        model = keras.Sequential(
            [keras.Input((8,)), layers.Dense(width, activation="relu"), layers.Dense(4)]
        )
        model.compile("sgd", "mse")
        return model, 16

    return make


def test_the_command_shows_every_step_with_three_predictions_and_how_good_they_are(
    monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    monkeypatch.setattr(fidelity, "MODELS", {"small": tiny(8), "large": tiny(32)})

    measured: dict[tuple[int, str], fidelity.MeasuredModel] = {}
    launched = []

    def here(processes: int, arguments: list[str], devices: int, say) -> int:
        """What the launched processes do, but for measuring rates, in this one."""
        bench, command, folder, *rest = arguments
        assert (bench, processes) == ("bench", 1)
        launched.append((devices, command, *rest))
        machine = host(devices, 8 << 30)
        if command == "fidelity-measure":
            said = dict(zip(rest[::2], rest[1::2], strict=False))
            key = devices, said["--model"]
            if key not in measured:
                effort = Effort(int(said["--rounds"]), int(said["--plans"]))
                measured[key] = fidelity.measure(said["--model"], machine, effort)
            measured[key].save(Path(folder))
            return 0
        loaded = [fidelity.MeasuredModel.load(name, Path(folder)) for name in rest]
        assert loaded == [measured[devices, name] for name in rest]
        steps = [vars(step) for step in fidelity.predictions(loaded, machine)]
        (Path(folder) / "steps.json").write_text(json.dumps(steps))
        return 0

    monkeypatch.setattr("partita.cli.bench.launch", here)
    runner, arguments = (
        typer.testing.CliRunner(),
        ["bench", "fidelity", "--devices", "1,2", "--processes", "", "--rounds", "1"],
    )
    given = runner.invoke(app, [*arguments, "--json"])
    assert given.exit_code == 0, given.output
    effort = ("--rounds", "1", "--plans", "1000", "--quiet")
    assert launched[:3] == [
        (1, "fidelity-measure", "--model", "small", *effort),
        (1, "fidelity-measure", "--model", "large", *effort),
        (1, "fidelity-predict", "small", "large"),
    ], "every model has processes of its own"
    found = json.loads(given.stdout)
    steps = [Step(**s) for s in found["steps"]]
    assert {s.place for s in steps} == {"1 device", "2 devices"} and {s.model for s in steps} == {
        "small",
        "large",
    }
    for model in ("small", "large"):
        mine = [s for s in steps if (s.place, s.model) == ("2 devices", model)]
        assert len(mine) >= MIN_PLANS and sum(s.chosen for s in mine) == 1
        assert all(
            s.seconds > 0 and s.measured > 0 and s.rates > 0 and s.fitted and s.fit_error
            for s in mine
        )
        assert all(s.shares["measured"] == 1.0 for s in mine)
    assert [r for r in found["summaries"] if r["place"] == "all" and r["way"] == "measured"][0][
        "steps"
    ] == len(steps)
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0 and all(
        word in shown.stdout
        for word in (
            "steps on 2 devices",
            "data parallel",
            "relative errors, and order",
            "chosen/best",
            "fitted (±",
        )
    )


def test_a_setting_that_fails_ends_the_command_with_its_code(monkeypatch) -> None:
    monkeypatch.setattr("partita.cli.bench.launch", lambda *given: 7)
    assert (
        typer.testing.CliRunner().invoke(app, ["bench", "fidelity", "--models", "mlp"]).exit_code
        == 7
    )

"""The command line: slips are said at once, in one sentence, before anything long begins."""

from __future__ import annotations

import gc
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from partita.__main__ import keep_interrupts
from partita.cli.main import app
from partita.cli.options import PlanFiles
from partita.cli.run import Record
from partita.cli.terminal import errors
from partita.errors import LostProcessError
from partita.execute import members
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.planning import SearchOptions, best_plan
from partita.plans.plan import Plan
from partita.search.find import find

NEVER = "raise SystemExit('this script must not have been started')"
GRAPH = OperatorGraph.load(Path(__file__).parent / "data" / "mlp.graph.json")


@pytest.fixture
def script(tmp_path: Path) -> str:
    (tmp_path / "train.py").write_text(NEVER)
    return str(tmp_path / "train.py")


def partita(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_each_program_of_a_script_has_a_plan_file_of_its_own(tmp_path: Path) -> None:
    plan = find(GRAPH, load("h100:2")).plan
    record = Record(PlanFiles(save_plan=tmp_path / "plan.json"), prints=False)
    for name, batch_size in (("critic", 8), ("generator", 8), ("critic", 16)):
        record.planned(None, None, replace(plan, graph=name, batch_size=batch_size))  # type: ignore[arg-type]
    written = [Plan.load(path) for path in sorted(tmp_path.iterdir())]
    assert [(plan.graph, plan.batch_size) for plan in written] == [("generator", 8), ("critic", 16)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan-2.json", "plan.json"]


@pytest.mark.parametrize("command", ["run", "plan", "compare", "simulate"])
def test_an_option_that_there_is_not_is_not_taken_for_the_script(command: str, script: str) -> None:
    done = partita(command, "--devcies", "2", script)
    said = " ".join(done.output.split())
    assert (
        done.exit_code == 2 and "there is no option '--devcies'. Did you mean '--devices'?" in said
    ), said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("plan --devices 0 train.py", "--devices is 0: give a number of at least 1."),
        ("bench fidelity --plans x", "--plans is x: give a whole number."),
        ("manage simulate --steps 1.5", "--steps is 1.5: give a whole number."),
        ("plan --seconds soon train.py", "--seconds is soon: give a number."),
        (
            "plan train.py --machine ,",
            "--machine is ',', which names no machine: write for example --machine h100:8,h100:64.",
        ),
        (
            "plan train.py --machine h100:2 --objective cost-per-epoch --price h100=1,h100=2",
            "--price is 'h100=1,h100=2', with two prices for one name: give one.",
        ),
        ("gnn train --dropout 2", "--dropout is 2: give a number of at most 0.99."),
    ],
)
def test_a_wrong_number_is_one_sentence(words: str, sentence: str) -> None:
    done = partita(*words.split())
    assert (done.exit_code, done.output) == (2, f"error: {sentence}\n")


def test_an_option_of_the_script_that_is_nearly_one_of_the_commands_is_pointed_at(
    tmp_path: Path,
) -> None:
    (tmp_path / "train.py").write_text(
        "import sys; sys.exit(0 if sys.argv[1:] == ['--devcies', '2', '--epochs', '3'] else 9)"
    )
    done = partita("run", str(tmp_path / "train.py"), "--devcies", "2", "--epochs", "3")
    assert done.exit_code == 0
    assert (
        "'--devcies' is passed to the script. If you mean '--devices', write that." in done.stderr
        and "--epochs" not in done.stderr
    )


def test_options_after_dashes_are_the_scripts_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import sys; sys.exit(0 if sys.argv[1:] == ['--devices', '2', '--manage'] else 9)"
    )
    done = partita("run", str(tmp_path / "train.py"), "--", "--devices", "2", "--manage")
    assert done.exit_code == 0
    assert "is passed to the script" not in done.stderr


def test_m_before_the_script_names_a_module_and_later_is_the_scripts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trainer.py").write_text(
        "import sys; sys.exit(0 if sys.argv[1:] == ['-m', '5'] else 9)"
    )
    for before in ([], ["--devices", "2"]):
        assert partita("run", *before, "-m", "trainer", "-m", "5").exit_code == 0
    assert partita("run", "trainer.py", "-m", "5").exit_code == 0
    assert "There is no module 'nothing' to run" in partita("run", "-m", "nothing").stderr
    assert "Missing argument" in partita("run", "-m").stderr


@pytest.mark.parametrize(
    ("command", "option", "what"),
    [
        ("run", "--report", "report"),
        ("run", "--save-plan", "plan"),
        ("plan", "--report", "report"),
        ("plan", "--save-plan", "plan"),
        ("simulate", "--trace", "trace"),
        ("simulate", "--report", "report"),
    ],
)
def test_a_file_that_cannot_be_written_is_said_before_the_script_is_started(
    command: str, option: str, what: str, script: str, tmp_path: Path
) -> None:
    done = partita(command, script, option, str(tmp_path / "nowhere" / "file"))
    assert done.exit_code == 2
    assert (
        f"error: The {what} cannot be written to " in done.stderr
        and "No such file or directory" in done.stderr
    )


def test_a_file_that_would_replace_another_one_or_the_script_is_refused(
    script: str, tmp_path: Path
) -> None:
    same = str(tmp_path / "same")
    done = partita("run", script, "--report", same, "--save-plan", f"{tmp_path}/./same")
    assert (done.exit_code, "The plan would replace the report in" in done.stderr) == (2, True)
    (tmp_path / "link.html").symlink_to(script)
    done = partita("plan", script, "--report", str(tmp_path / "link.html"))
    assert (done.exit_code, "The report would replace the script in" in done.stderr) == (2, True)
    assert Path(script).read_text() == NEVER


def test_looking_whether_a_file_can_be_written_leaves_it_as_it_was(
    script: str, tmp_path: Path
) -> None:
    there, new = tmp_path / "there.html", tmp_path / "new.html"
    there.write_text("kept")
    for path in (there, new):
        partita("run", script, "--report", str(path))
    assert there.read_text() == "kept" and not new.exists()


def damaged(tmp_path: Path, why: object) -> str:
    plan = find(GRAPH, load("h100:4")).plan
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json() | {"why": why}))
    return str(path)


@pytest.mark.parametrize(
    "why",
    [
        {"operators": 3},
        {"operators": {GRAPH.operators[0].name: {"compute": "x"}}},
        {"baselines": {"one device": {}}},
        {"operators": {"x": None}},
    ],
)
def test_reasons_that_are_damaged_are_one_sentence(why: object, tmp_path: Path) -> None:
    done = partita("explain", damaged(tmp_path, why), GRAPH.operators[0].name)
    assert (
        done.exit_code == 2
        and "plan.json: why." in done.stderr
        and ": give " in done.stderr
        and "Traceback" not in done.output
    )


def test_explain_drops_predictions_for_other_numbers_of_a_machine(tmp_path: Path) -> None:
    machine = replace(load("h100:2"), name="mine")
    description, plan = tmp_path / "mine.toml", tmp_path / "plan.json"
    best_plan(GRAPH, machine).save(plan)
    layer = GRAPH.operators[0].name
    explain = ("explain", str(plan), "--machine", str(description))
    description.write_text(machine.to_toml())
    same = partita(*explain)
    assert "predicted (" in same.output and "other numbers" not in same.output
    assert partita("explain", str(plan), layer, "--machine", str(description)).exit_code == 0
    edited = machine.revised({"device.overhead": 1.0}, "an edit", "assumed")
    description.write_text(edited.to_toml())
    other = partita(*explain)
    assert "predicted (" not in other.output
    assert "note: the saved predictions are for other numbers of 'mine'" in other.output
    refused = partita("explain", str(plan), layer, "--machine", str(description))
    assert (
        refused.exit_code == 2 and "are for other numbers of 'mine': plan again" in refused.stderr
    )
    others = partita("explain", str(plan), "--machine", "a100:2")
    assert others.exit_code == 2 and "is for 'mine', and 'a100:2' is another" in others.stderr


def test_run_trains_by_a_plan_in_stages(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import keras, numpy as np\n"
        "model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8, name='a'), keras.layers.Dense(8, name='b')])\n"
        "model.compile('sgd', 'mse')\nx = np.ones((32, 64), 'float32')\nmodel.fit(x, x[:, :8], batch_size=32, verbose=0)\n"
    )
    value = {
        "schema": 1,
        "graph": "sequential",
        "machine": "host:2",
        "mesh": {"a": {"size": 2, "level": 0}},
        "operators": {"a": "at(0):a", "b": "at(1):a"},
    }
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value | {"batch_size": 32, "microbatches": 4}))
    assert Plan.load(path).microbatches == 4
    done = partita("run", str(tmp_path / "train.py"), "--plan", str(path))
    assert done.exit_code == 0, done.output
    assert "between device groups:" in done.output and "Traceback" not in done.output


def test_json_stands_alone_where_the_script_prints(training: str, tmp_path: Path) -> None:
    script = tmp_path / "loud.py"
    script.write_text("print('loud')\n" + Path(training).read_text())
    done = partita("simulate", str(script), "--machine", "h100:2", "--plan", "dp", "--json")
    assert json.loads(done.stdout)["seconds"] > 0 and "loud" in done.stderr


def test_machines_are_compared_by_what_an_epoch_costs(training: str) -> None:
    done = partita(
        "plan",
        training,
        "--machine",
        "h100:1,h100:4,a100:1",
        "--objective",
        "cost-per-epoch",
        "--price",
        "h100=2.5,a100=1",
        "--samples",
        "3200",
        "--json",
        "--seconds",
        "1",
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [r["cost"] for r in rows] == sorted(r["cost"] for r in rows) and len(rows) == 3
    for r in rows:
        assert r["epoch_seconds"] == pytest.approx(r["seconds"] * 100) and r[
            "device_hours"
        ] == pytest.approx(r["epoch_seconds"] * r["devices"] / 3600)
        assert r["cost"] == pytest.approx(
            r["device_hours"] * (1 if r["machine"].startswith("a100") else 2.5)
        )
    shown = partita(
        "plan",
        training,
        "--machine",
        "h100:1,h100:4",
        "--objective",
        "cost-per-epoch",
        "--seconds",
        "1",
    )
    assert "device hours" in shown.stdout and "cost" not in shown.stdout.splitlines()[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--objective", "fame", "--machine", "h100:1,h100:2"],
            "There is no objective 'fame': use 'step', 'cost-per-epoch', 'joules'.",
        ),
        (
            ["--objective", "cost-per-epoch"],
            "--objective compares machines, and none are named. Name them",
        ),
        (
            ["--machine", "h100:1,h100:2", "--price", "h100=free"],
            "'h100=free' is no price: write a number above 0",
        ),
        (
            ["--machine", "h100:1,a100:2", "--price", "h100=2", "--objective", "cost-per-epoch"],
            "There is no price for a100:2",
        ),
        (
            ["--machine", "h100:1,h100:2", "--devices", "2"],
            "Give the devices of each, as in --machine",
        ),
        (
            ["--machine", "h100:2", "--price", "3"],
            "--price is for the cost of an epoch",
        ),
        (
            ["--objective", "joules", "--machine", "h100:1,h100:2"],
            "The joules of 'h100:1' are unknown",
        ),
        (
            ["--machine", "h100:2", "--search", "best"],
            "There is no search 'best': use 'portfolio'",
        ),
    ],
)
def test_wrong_options_of_plan_are_one_sentence_before_the_script_starts(
    arguments: list[str], said: str, script: str
) -> None:
    done = partita("plan", script, "--seconds", "0", *arguments)
    assert done.exit_code == 2 and said in done.stderr and "Traceback" not in done.output, (
        done.output
    )


def test_a_plan_that_is_none_is_refused_before_the_script_starts(script: str) -> None:
    done = partita("simulate", script, "--machine", "h100:2", "--plan", "nope")
    assert done.exit_code == 2 and "no plan named 'nope'" in done.stderr, done.output


LAB = """name = "lab"
source = "a test"
status = "assumed"
[device]
name = "Device"
overhead = "4 us"
memory.main = { capacity = "40 GiB", bandwidth = "1555 GB/s", efficiency = 0.8, shared_by = 1 }
engine."*"."*" = { peak = "20 TFLOP/s", efficiency = 0.5 }
[level.node]
size = 2
fabric = "switch"
latency = "1 us"
bandwidth = "300 GB/s"
shared_by = 1
"""


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ('bandwidth = "300 GB/s"\n', "", "level.node lacks bandwidth"),
        ('"300 GB/s"', '"0 GB/s"', "level.node.bandwidth is 0 B/s: it must be more than zero."),
        ('"300 GB/s"', '"-1 GB/s"', "level.node.bandwidth is"),
    ],
)
def test_a_link_that_is_none_is_said_before_the_script_is_started(
    before: str, after: str, says: str, script: str, tmp_path: Path
) -> None:
    (tmp_path / "lab.toml").write_text(LAB.replace(before, after))
    done = partita("simulate", script, "--machine", str(tmp_path / "lab.toml"))
    assert (
        done.exit_code != 0
        and says in " ".join(done.stderr.split())
        and "lab.toml, line" in done.stderr
        and "Traceback" not in done.output
    )


def test_an_operator_that_a_machine_has_no_engine_for_is_named_with_what_it_has(
    training: str, tmp_path: Path
) -> None:
    (tmp_path / "lab.toml").write_text(LAB.replace('engine."*"."*"', "engine.elementwise.float32"))
    done = partita("simulate", training, "--machine", str(tmp_path / "lab.toml"), "--plan", "dp")
    said = " ".join(done.stderr.split())
    assert done.exit_code != 0 and "Traceback" not in done.output
    assert (
        "Cannot time operator 'wide'. Machine 'lab' has no engine for 'dot' in float32: its engines are elementwise/float32. Add float32 = { peak"
        in said
    )


def test_a_plan_that_places_operators_is_simulated_traced_compared_and_run(
    training: str, tmp_path: Path
) -> None:
    (tmp_path / "lab.toml").write_text(LAB)
    plan, trace = tmp_path / "plan.json", tmp_path / "trace.json"
    value = {
        "schema": 1,
        "graph": "sequential",
        "machine": "lab",
        "mesh": {"a": {"size": 2, "level": 0}},
        "operators": {"wide": "at(0):a", "out": "at(1):a"},
    }
    plan.write_text(json.dumps(value))
    asked = ("simulate", training, "--machine", str(tmp_path / "lab.toml"), "--plan", str(plan))
    said = " ".join(partita(*asked).output.split())
    assert "2 device groups together" in said and "memory is that of a=0" in said
    assert partita(*asked, "--trace", str(trace)).exit_code == 0
    rows = {
        e["args"]["name"]
        for e in json.loads(trace.read_text())["traceEvents"]
        if e["name"] == "thread_name"
    }
    assert {"a=0: kernels", "a=1: kernels", "a=0: links"} <= rows
    trained = partita("run", training, "--plan", str(plan), "--devices", "2")
    assert trained.exit_code == 0, trained.output


def commands(group: object, path: str = "partita") -> Iterator[tuple[str, object]]:
    """All commands with their paths."""
    for name, command in getattr(group, "commands", {}).items():
        yield f"{path} {name}", command
        yield from commands(command, f"{path} {name}")


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS)
def test_the_help_of_a_command_is_short_and_has_an_example_a_paragraph(path: str) -> None:
    command = COMMANDS[path]
    text = getattr(command, "help", None) or ""
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    if not getattr(command, "hidden", False):
        assert len(paragraphs[0]) <= 60, paragraphs[0]
    assert all(paragraph.count("Example:") <= 1 for paragraph in paragraphs)
    examples = [paragraph for paragraph in paragraphs if "Example:" in paragraph]
    assert all(example.startswith("Example: partita ") for example in examples)


def test_the_version_is_the_packages() -> None:
    import partita as package

    done = partita("--version")
    assert (done.exit_code, done.stdout) == (0, f"partita {package.__version__}\n")


def test_names_that_look_like_markup_are_printed(training: str, tmp_path: Path) -> None:
    (tmp_path / "odd[").mkdir()
    script = tmp_path / "odd[/b].py"
    script.write_text(Path(training).read_text().replace('"wide"', '"attn[q]"'))
    plan = tmp_path / "odd[/b].json"
    done = partita("plan", str(script), "--machine", "h100:2", "--save-plan", str(plan))
    assert done.exit_code == 0, done.output
    assert "attn[q]" in done.stdout
    shown = partita("explain", str(plan), "attn[q]")
    assert shown.exit_code == 0 and "attn[q]: " in shown.stdout
    missing = partita("explain", str(plan), "[/b]")
    assert missing.exit_code == 2 and "has no layer '[/b]'" in missing.stderr
    assert "..." not in missing.stderr  # all layers are listed


def test_the_legend_is_printed_once_however_many_plans_a_run_has() -> None:
    from partita.cli.options import PlanFiles
    from partita.cli.run import Record
    from partita.cli.terminal import err, err_table
    from partita.planning import with_reasons

    plan = with_reasons(find(GRAPH, load("h100:4")))
    record = Record(PlanFiles(), prints=True)
    with err.capture() as capture, err_table.capture() as tables:
        for _ in range(2):
            record.planned(None, load("h100:4"), plan)  # pyright: ignore
    assert capture.get().count("S by sample") == 1
    assert tables.get().count("on h100:4") == 2


def test_a_closed_output_is_no_error() -> None:
    command = f"{shlex.quote(sys.executable)} -m partita machine list >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_managed_process_says_why_it_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARTITA_LAUNCHED", "1")
    for board, said in ((None, ""), (object(), "error: lost for good\n")):
        monkeypatch.setattr(members._group, "board", board)
        with pytest.raises(typer.Exit), errors():
            raise LostProcessError("lost for good")
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("JAX_PLATFORMS=nope", "JAX cannot start with JAX_PLATFORMS=nope: "),
        ("JAX_NUM_CPU_DEVICES=x", 'JAX cannot be imported: Invalid value "x"'),
    ],
)
def test_an_environment_without_jax_is_one_sentence(
    variable: str, sentence: str, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import jax; jax.devices()")
    command = [sys.executable, "-m", "partita", "run", "--devices", "2", str(script)]
    name, value = variable.split("=")
    environment = {**os.environ, name: value}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"error: {sentence}"), done.stderr


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(phase: str, info: dict[str, int]) -> None:
        gc.callbacks.remove(interrupt)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    keep_interrupts()
    # A shell has it ignored where tests run in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.callbacks.append(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            gc.collect()
            for _ in range(500):
                time.sleep(0.01)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupted_command_leaves_without_the_teardown_of_python() -> None:
    program = """
import atexit, os, sys
import partita.__main__, partita.cli.main

class Crash:
    def __del__(self, abort=os.abort):
        abort()

def interrupted():
    sys.crash = Crash()
    atexit.register(print, "exit functions have run")
    raise KeyboardInterrupt

partita.cli.main.main = interrupted
partita.__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "exit functions have run\n"), done.stderr


def test_a_plan_outlives_a_stopped_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    from partita.cli import plan as command

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "plan_that_compiles", stop)
    captured: Any = None
    machine = load("h100:4")
    chosen = best_plan(GRAPH, machine)
    kept, compiled = command._compiled(captured, machine, chosen, print, SearchOptions())
    assert kept == chosen
    assert "stopped" in str(compiled)

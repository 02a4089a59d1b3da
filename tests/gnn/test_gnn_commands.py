"""`partita gnn`: generate, convert, info, train and partition; mistakes are one sentence."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner, Result

from partita.cli.main import app

RMAT = ["generate", "rmat", "--scale", "8", "--edges", "3k", "--features", "5", "--classes", "3"]


@pytest.fixture(autouse=True)
def started() -> None:
    """Starts JAX with the devices of all tests: a command's devices would hold for later tests."""
    jax.devices()


def gnn(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["gnn", *map(str, arguments)])


def info(path: Path) -> dict:
    done = gnn("info", path, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_a_graph_is_generated_converted_and_described(tmp_path: Path) -> None:
    done = gnn(*RMAT, "-o", tmp_path / "g.lux", "--transpose")
    assert done.exit_code == 0, done.output
    assert (
        "g: 256 vertices, 3,000 edges, 5 features, 3 classes; " in done.stderr
        and f"written to {tmp_path / 'g.lux'}" in done.stderr
    )
    assert (tmp_path / "g.transposed.order.bin").stat().st_size == 4 * 3000
    facts = info(tmp_path / "g.lux")
    assert (
        facts["vertices"],
        facts["edges"],
        facts["features"],
        facts["classes"],
        facts["labelled"],
    ) == (256, 3000, 5, 3, 256)
    assert (
        sum(facts["masks"].values()) == 256
        and facts["bytes"]["features"] == 4 * 5 * 256
        and not facts["weights"]
    )
    assert facts["in_degrees"]["mean"] == facts["out_degrees"]["mean"] == 3000 / 256
    assert gnn("convert", tmp_path / "g.lux", tmp_path / "h.npz").exit_code == 0
    assert {**info(tmp_path / "h.npz"), "name": "g"} == facts
    assert (
        gnn(
            "convert", tmp_path / "h.npz", tmp_path / "both.lux", "--undirected", "--transpose"
        ).exit_code
        == 0
    )
    both = info(tmp_path / "both.lux")
    assert both["edges"] == 6000 and both["in_degrees"] == both["out_degrees"]


def test_info_prints_a_table(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("0 1\n0 2\n4 0\n")
    output = " ".join(gnn("info", tmp_path / "few.txt").stdout.replace("│", " ").split())
    for line in (
        "few",
        "vertices 5, 1 of them isolated",
        "edges 3",
        "in-degrees 0 to 1, median 1, mean 0.6",
        "out-degrees 0 to 2, median 0, mean 0.6",
        "features none",
        "classes none",
        "masks none",
        "bytes 60 B: offsets 48 B, sources 12 B",
    ):
        assert line in output, output


@pytest.mark.parametrize("kind", ["erdos-renyi", "blocks"])
def test_the_other_generators_take_a_number_of_vertices(kind: str, tmp_path: Path) -> None:
    done = gnn(
        "generate",
        kind,
        "--vertices",
        "1k",
        "--edges",
        "2e3",
        "--features",
        "2",
        "--undirected",
        "-o",
        tmp_path / "g.npz",
    )
    assert done.exit_code == 0, done.output
    facts = info(tmp_path / "g.npz")
    assert (facts["vertices"], facts["edges"], facts["features"]) == (1000, 4000, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "rmat", "--edges", "3", "-o", "g.lux"],
            "An rmat graph has 2^scale vertices: give --scale, such as 20 for a million, and "
            "remove --vertices.",
        ),
        (
            ["generate", "blocks", "--edges", "3", "-o", "g.lux"],
            "A graph of kind blocks has any number of vertices: give --vertices, such as 10000, "
            "and remove --scale.",
        ),
        (
            ["generate", "ring", "--edges", "3", "-o", "g.lux"],
            "'ring' is no generator: use rmat, erdos-renyi or blocks.",
        ),
        (
            ["generate", "rmat", "--scale", "3", "--edges", "1.5", "-o", "g.lux"],
            "'1.5' is not a whole number: write for example \"16M\"",
        ),
        (
            ["generate", "rmat", "--scale", "3", "--edges", "16Q", "-o", "g.lux"],
            "'16Q' is not a whole number",
        ),
        (
            ["generate", "rmat", "--scale", "3", "--edges", "9", "-o", "g.txt"],
            "'g.txt' does not end in .lux or .npz: call it 'g.lux'",
        ),
        (
            ["generate", "rmat", "--scale", "3", "--edges", "9", "-o", "g.npz", "--transpose"],
            "--transpose needs a .lux file and 'g.npz' is none: call it 'g.lux', or remove "
            "--transpose.",
        ),
        (
            ["generate", "rmat", "--scale", "3", "--edges", "9", "-o", "none/g.lux"],
            "cannot be written: there is no folder 'none'.",
        ),
        (["convert", "nothing.lux", "g.lux"], "There is no file 'nothing.lux'."),
        (["info", "nothing.lux"], "There is no file 'nothing.lux'."),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = gnn(*arguments)
    assert (
        done.exit_code == 2
        and done.stderr.startswith("error: ")
        and message in done.stderr
        and "Traceback" not in done.output
    ), done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["generate", "convert", "info", "train", "partition"])
def test_help_is_short_and_has_an_example(command: str) -> None:
    output = gnn(command, "--help").stdout
    assert f"Example: partita gnn {command} " in " ".join(output.split())
    summary = next(line for line in output.splitlines() if line.startswith("  ")).strip()
    assert len(summary) <= 60, summary
    assert all(len(line) <= 80 for line in output.splitlines())


def in_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process without KERAS_BACKEND, unless it is given."""
    inherited = {name: value for name, value in os.environ.items() if name != "KERAS_BACKEND"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=inherited | environment,
    )


def test_keras_starts_on_jax_after_the_import(tmp_path: Path) -> None:
    done = in_python(
        "import partita.gnn, keras; print(keras.backend.backend())", KERAS_HOME=str(tmp_path)
    )
    assert done.stdout.strip() == "jax", done.stderr


def test_another_backend_of_keras_is_one_sentence(tmp_path: Path) -> None:
    done = in_python(
        "import partita.gnn; partita.gnn.GCN", KERAS_BACKEND="torch", KERAS_HOME=str(tmp_path)
    )
    assert "GraphError: Keras's backend is 'torch' and graph networks need 'jax'" in done.stderr


def test_the_command_line_starts_without_jax_and_keras() -> None:
    code = "import sys, partita.cli.gnn; print([m for m in ('jax', 'keras') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "[]"
    )


def test_train_reports_accuracy_time_parts_and_traffic(tmp_path: Path) -> None:
    gnn(*RMAT, "-o", tmp_path / "g.lux")
    model = tmp_path / "model.keras"
    done = gnn(
        "train",
        tmp_path / "g.lux",
        "--model",
        "sage",
        "--epochs",
        "3",
        "--devices",
        "2",
        "--json",
        "--save",
        model,
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert (
        facts["epochs"] == 3
        and set(facts["accuracy"]) == {"train", "validation", "test"}
        and facts["traffic"] > 0
    )
    assert (
        sum(part["edges"] for part in facts["parts"]) == 3000
        and facts["epoch_seconds"] > 0
        and model.exists()
    )
    plain = gnn("train", tmp_path / "g.lux", "--model", "sage", "--epochs", "3", "--devices", "2")
    assert (
        f"loss {facts['loss']:.4f}" in plain.stdout
        and "part 1: " in plain.stdout
        and "traffic: " in plain.stdout
    )


def test_partitioners_are_compared_in_a_table_a_page_and_json(tmp_path: Path) -> None:
    gnn(*RMAT, "-o", tmp_path / "g.lux")
    done = gnn(
        "partition",
        tmp_path / "g.lux",
        "--devices",
        "3",
        "--json",
        "--report",
        tmp_path / "parts.html",
    )
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    slowest = {name: one["largest_seconds"] for name, one in facts["partitioners"].items()}
    assert {"vertices", "edges", "learned"} <= set(slowest) and slowest["learned"] <= min(
        slowest["vertices"], slowest["edges"]
    ) * 1.001
    for one in facts["partitioners"].values():
        assert (
            sum(part["edges"] for part in one["parts"]) == 3000
            and one["bytes"] == one["fetched"] * 64 * 4 * 2
        )
    page = (tmp_path / "parts.html").read_text()
    assert (
        page.count("device 2: ") >= 3
        and "http" not in page.replace("http-equiv", "")
        and f"{facts['error']:.1%} off" in page
    )
    output = gnn("partition", tmp_path / "g.lux", "--devices", "3").stdout
    assert "equal edges" in output and "Nothing was measured in training" in output
    done = gnn("partition", tmp_path / "g.lux", "--report", "parts.pdf")
    assert (
        done.exit_code == 2
        and "'parts.pdf' does not end in .html: call it 'parts.html'." in done.stderr
    )


def test_a_mistake_in_training_is_one_sentence(tmp_path: Path) -> None:
    gnn("generate", "rmat", "--scale", "5", "--edges", "100", "-o", tmp_path / "bare.lux")
    for arguments, sentence in (
        ([], "'bare' has no features: give Graph.from_edges(features=...) a row for every vertex."),
        (
            ["--model", "transformer"],
            "'transformer' is no model: use gcn, sage, gin, gat, gatv2, commnet, gatedgraph.",
        ),
        (
            ["--save", "model.h5"],
            "'model.h5' does not end in .keras: call it 'model.keras'.",
        ),
        (["--save", "/nowhere/m.keras"], "The model cannot be written to '/nowhere/m.keras'"),
    ):
        done = gnn("train", tmp_path / "bare.lux", *arguments)
        assert done.exit_code == 2 and sentence in done.stderr and "Traceback" not in done.output


def test_a_small_memory_names_the_option(tmp_path: Path) -> None:
    gnn(*RMAT, "-o", tmp_path / "g.lux")
    for command in (["train"], ["plan", "--machine", "h100:1"]):
        done = gnn(*command, tmp_path / "g.lux", "--memory", "1kB")
        assert done.exit_code == 2
        assert re.search(r'Use --memory "\d+ B" or more', done.stderr), done.stderr

"""Commands that write a report or a trace: what is in the file, and what is said where it cannot
be written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from partita.cli.main import app


def partita(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_simulate_writes_a_trace_and_the_page_of_the_timeline(
    training: str, tmp_path: Path
) -> None:
    files = tmp_path / "t.json", tmp_path / "t.html"
    done = partita(
        "simulate",
        training,
        "--machine",
        "h100:4",
        "--plan",
        "dp",
        "--trace",
        str(files[0]),
        "--report",
        str(files[1]),
    )
    assert done.exit_code == 0, done.output
    assert any(e["name"] == "wide forward" for e in json.loads(files[0].read_text())["traceEvents"])
    page = files[1].read_text()
    assert "One step as a timeline" in page and "under plan &#x27;data parallel&#x27;" in page
    assert "How each layer is split" not in page, "an expert's plan has no reasons to show"


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_the_page_of_a_plan_that_was_searched_for_has_its_timeline(
    command: str, training: str, tmp_path: Path
) -> None:
    done = partita(command, training, "--machine", "h100:4", "--report", str(tmp_path / "r.html"))
    assert done.exit_code == 0, done.output
    page = (tmp_path / "r.html").read_text()
    assert (
        "How each layer is split" in page
        and "One step as a timeline" in page
        and "under plan &#x27;found&#x27;" in page
    )


def test_the_page_of_a_run_has_the_timeline_of_its_plan_beside_what_was_measured(
    training: str, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "partita",
        "run",
        training,
        "--devices",
        "2",
        "--report",
        str(tmp_path / "r.html"),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "NPROC")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "r.html").read_text()
    assert "One step as a timeline" in page and "Predicted against measured" in page


@pytest.mark.parametrize("what", ["trace", "report"])
def test_a_file_that_cannot_be_written_is_one_sentence(
    what: str, training: str, tmp_path: Path
) -> None:
    where = tmp_path / "no such folder" / "file"
    done = partita(
        "simulate", training, "--machine", "h100:4", "--plan", "dp", f"--{what}", str(where)
    )
    assert done.exit_code == 2
    said = f"error: The {what} cannot be written to {str(where)!r}: No such file or directory. Name a file in a folder that exists and can be written."
    assert done.stderr.strip().splitlines()[-1] == said

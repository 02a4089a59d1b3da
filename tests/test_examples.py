"""The examples print what is stored beside them, numbers aside: examples/output/*.txt, each the
command and its output.

`python tests/test_examples.py` runs them and stores what they print now.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTPUTS = sorted((ROOT / "examples" / "output").glob("*.txt"))
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NUMBER = re.compile(
    r"(?<![\w.:/])[-+]?\d[\d,.]*(e[-+]?\d+)?(/\d+)?( ?(ns|us|ms|s|[KMGT]?i?B|[kMGT]?FLOPs?|%|x)(?![\w:]))?(/step)?"
)
COMPILING = re.compile("partita: compiling the .* kernel for this processor, once")
"""What is said only where a compilation takes long."""


def words(text: str) -> list[str]:
    """A text without its numbers, units and line breaks, all of which depend on the machine that it
    was printed on.

    >>> words("conv2d_1  S:a,b  4.21 ms  72.2 KiB\\n24/24 - 6s - 271ms/step: host:4")
    ['conv2d_1', 'S:a,b', '#', '#', '#', '-', '#', '-', '#:', 'host:4']
    """
    return re.sub("─+", "─", NUMBER.sub("#", text)).split()


def printed(command: str, folder: Path) -> str:
    """What a command prints in a folder that holds nothing but the examples."""
    (folder / "examples").symlink_to(ROOT / "examples")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    unset = (
        "XLA_FLAGS",
        "JAX_NUM_CPU_DEVICES",
        "NPROC",
        "KERAS_BACKEND",
        "TF_CPP_MIN_LOG_LEVEL",
        "PYTHONPATH",
    )
    kept = {k: v for k, v in os.environ.items() if k not in unset}
    environment = {
        **kept,
        "PATH": path,
        "COLUMNS": "100",
        "TERM": "dumb",
        "PYTHONUNBUFFERED": "1",
    }
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout
    lines = [line.rstrip() for line in done.stdout.splitlines() if not COMPILING.match(line)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", OUTPUTS, ids=lambda p: p.stem)
def test_an_example_prints_what_is_stored(path: Path, tmp_path: Path) -> None:
    command, stored = path.read_text().split("\n", 1)
    assert words(printed(command.removeprefix("$ "), tmp_path)) == words(stored)


def test_every_example_is_short_and_has_stored_output() -> None:
    assert {p.stem for p in SCRIPTS} == {p.stem for p in OUTPUTS}
    assert all(len(p.read_text().splitlines()) <= 80 for p in SCRIPTS)


if __name__ == "__main__":
    import argparse
    import tempfile

    description = "Store what the examples print in examples/output."
    argparse.ArgumentParser(description=description).parse_args()
    for output in OUTPUTS:
        first = output.read_text().split("\n", 1)[0]
        with tempfile.TemporaryDirectory() as empty:
            output.write_text(f"{first}\n{printed(first.removeprefix('$ '), Path(empty))}")
        print(f"stored {output.relative_to(ROOT)}")

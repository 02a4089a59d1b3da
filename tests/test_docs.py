"""What the documentation shows works: marked Python examples run and print what stands below them,
commands exist, links lead.

A block ```python run is run in an empty folder; a block ```text right after it is its output,
numbers aside, `...` for anything.
"""

import re
import subprocess
from pathlib import Path

import pytest
import typer
from test_examples import words

from partita.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```python run\n(.*?)```\n(?:\n?```text\n(.*?)```)?", re.S)
EXAMPLES = [
    pytest.param(blocks, id=page.name)
    for page in PAGES
    if (blocks := BLOCK.findall(page.read_text()))
]
RUN_ALL = """
import sys

for code in sys.argv[2:]:
    exec(code, {"__name__": "__main__"})
    print(sys.argv[1])
"""
"""Runs programs one after another, each with names of its own, and prints a mark after each."""
MARK = "-- end of the example --"
COMMANDS = [
    pytest.param(line, id=line)
    for line in sorted(
        {
            c
            for page in PAGES
            for c in re.findall(r"^(?:\$ )?(partita [^#`\n]*[^#`\s])", page.read_text(), re.M)
        }
    )
]
OF_THE_SCRIPT = {"--epochs", "--batch"}


def agree(printed: str, shown: str) -> bool:
    """Whether a text is what a page shows, numbers and line breaks aside.

    >>> agree("a 1 ms b", "a 2 ms ..."), agree("a 1 ms", "b 1 ms")
    (True, False)
    """
    pattern = re.escape(" ".join(words(shown))).replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, " ".join(words(printed)), re.S) is not None


@pytest.mark.parametrize("blocks", EXAMPLES)
def test_examples_run_as_installed_without_environment_variables(
    blocks: list[tuple[str, str]], installed: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(installed), "-c", RUN_ALL, MARK, *(code for code, _ in blocks)],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    for (code, output), printed in zip(blocks, done.stdout.split(MARK), strict=False):
        assert not output or agree(printed, output), (
            f"{code}\nprints\n{printed}\nand the page shows\n{output}"
        )


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_and_its_options_exist(line: str) -> None:
    command = typer.main.get_command(app)
    for word in line.split()[1:]:
        command = getattr(command, "commands", {}).get(word, command)
    assert command.name != "partita" and not hasattr(command, "commands"), (
        f"there is no such command: {line}"
    )
    known = {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    assert set(re.findall(r"--[\w-]+", line)) - OF_THE_SCRIPT <= known


def test_every_command_is_in_the_page_of_commands() -> None:
    shown = set(re.findall(r"^partita (\w+)", (ROOT / "docs/commands.md").read_text(), re.M))
    assert shown == set(typer.main.get_command(app).commands)  # pyright: ignore


def test_the_readme_shows_what_the_demo_prints() -> None:
    command, *shown = re.findall(
        r"```console\n\$ (.*?)```", (ROOT / "README.md").read_text(), re.S
    )[0].splitlines()
    first, *stored = (ROOT / "examples/output/train_digits.txt").read_text().splitlines()
    assert first == f"$ {command.split('#')[0].rstrip()}"
    printed = [line.split() for line in stored if "─" not in line]
    excerpt = [line.split() for line in shown if line != "..." and "─" not in line]
    assert [line for line in excerpt if line not in printed] == []


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#:]+)\)", prose):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"

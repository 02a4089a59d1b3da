"""The benchmarks of search and simulator run, and print their figures."""

import re
import runpy
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "lines"),
    [
        (
            "search",
            ["transformer: built in .* operators", " +8 devices: .* gap to the bound 0.00%"],
        ),
        ("simulator", ["lenet on +8 devices .* full simulations a second, .* incremental"]),
        (
            "proof",
            ["lenet on 4 of p100-cluster: .* proved in .*", "lenet: cost network .* gap 0.0%"],
        ),
        ("within", ["lenet +within 1 % after .* bound .* ms"]),
    ],
)
def test_a_benchmark_runs_on_a_small_case(
    script: str, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(BENCHMARKS / f"{script}.py"))["main"]
    main(["--small"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(lines)
    for pattern, line in zip(lines, printed, strict=True):
        assert re.match(pattern, line), line

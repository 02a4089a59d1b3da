"""Every program of the zoo (tests/zoo) on one to four devices against plain Keras or JAX.

    python benchmarks/zoo.py              # all, two at a time: about half an hour on two cores
    python benchmarks/zoo.py --devices 2 4 --only lstm
    python benchmarks/zoo.py --list             # the table of docs/programs.md

Plans are for a machine whose links cost next to nothing, so that even the smallest layers are
split. `benchmarks/stages.py` plans the same programs with pipeline stages.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ["NPROC"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo.compare import PROGRAMS, difference

KINDS = {
    "keras_models": "Keras models",
    "keras_training": "Training, data and saving in Keras",
    "jax_steps": "JAX steps",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--only", default="", help="programs whose name has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument(
        "--list", action="store_true", help="print what the programs show, as a Markdown table"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.list:
        print(table())
        return 0
    if given.one:
        return one(given.one, given.devices)
    names = [n for n in sorted(PROGRAMS) if given.only in n]
    failed = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        command = [sys.executable, __file__, "--devices", *map(str, given.devices), "--one"]
        for name, done in zip(
            names,
            pool.map(
                lambda n: subprocess.run([*command, n], capture_output=True, text=True), names
            ),
            strict=True,
        ):
            failed += done.returncode != 0
            print(
                done.stdout.strip() or f"{name}: {done.stderr.strip().splitlines()[-1:]}",
                flush=True,
            )
    print(f"{len(names)} programs on {given.devices} devices, {failed} differ")
    return int(failed > 0)


def one(name: str, devices: list[int]) -> int:
    """Compares one program; a line with the largest relative difference per device count."""
    program, cells, bad = PROGRAMS[name], [], 0
    for count in devices:
        result = difference(program, count)
        wrong = not result.worst <= program.tolerance
        differs = f" DIFFERS at {result.where}" if wrong else ""
        bad += wrong
        cells.append(f"{count}: {result.worst:.1e}{differs} ({result.split} split)")
    print(f"{name:32s} {'   '.join(cells)}")
    return int(bad > 0)


def table() -> str:
    """The programs by kind, with what each shows."""
    lines: list[str] = []
    for module, title in KINDS.items():
        lines += [f"### {title}", "", "| program | shows |", "|---|---|"]
        lines += [
            f"| `{p.name}` | {p.shows} |"
            for p in PROGRAMS.values()
            if p.run.__module__ == f"zoo.{module}"
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(main())

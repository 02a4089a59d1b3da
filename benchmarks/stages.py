"""Searches with stages: random models, the zoo and keras.applications, on three machines.

    python benchmarks/stages.py                          # all: about two hours on two cores
    python benchmarks/stages.py --kind random --count 100
    python benchmarks/stages.py --kind zoo --only lstm --seconds 10

Only the programs of the zoo are trained, on one device, to capture their steps. A search fails if
it ends in an exception that is no `PartitaError`, or if an optional part of it failed. The last
lines are a table: searches, failures, seconds by kind and machine.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tests come first: both folders have a module named "zoo".
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MACHINES = ("h100:8", "k80-cluster:2", "tpu-v5e:16")
BATCH_SIZE = 16
Captures = Callable[[], list[Any]]
"""Captures the training steps of one case."""


@dataclass(frozen=True)
class Search:
    """One search: its case, machine, seconds, and the plan or the failure in words."""

    kind: str
    case: str
    machine: str
    seconds: float
    outcome: str
    failed: bool = False

    def __str__(self) -> str:
        mark = "FAILED " if self.failed else ""
        columns = f"{self.kind:12} {self.case:28} {self.machine:14} {self.seconds:6.1f} s"
        return f"{columns}  {mark}{self.outcome}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=[*KINDS])
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--count", type=int, default=100, help="random models")
    parser.add_argument("--first", type=int, default=0, help="seed of the first random model")
    parser.add_argument("--machines", nargs="+", default=[*MACHINES])
    parser.add_argument("--seconds", type=float, help="time limit of one search")
    options = parser.parse_args()
    searches = []
    for kind in options.kind:
        for case, captures in KINDS[kind](options):
            if options.only.lower() in case.lower():
                for search in searched(kind, case, captures, options.machines, options.seconds):
                    print(search, flush=True)
                    searches.append(search)
    print(table(searches))
    return int(any(search.failed for search in searches))


def searched(
    kind: str,
    case: str,
    captures: Captures,
    machines: list[str],
    seconds: float | None = None,
) -> Iterator[Search]:
    """Captures one case and searches plans for it, with stages."""
    import keras

    from partita.errors import PartitaError

    keras.backend.clear_session()
    try:
        steps = captures()
    except PartitaError as error:
        yield Search(kind, case, "capture", 0.0, f"refused: {error}")
        return
    except Exception as error:
        yield Search(kind, case, "capture", 0.0, _text(error), failed=True)
        return
    for step in steps:
        for machine in machines:
            yield _search(kind, case, step, machine, seconds)


def _search(kind: str, case: str, step: Any, machine: str, seconds: float | None) -> Search:
    from partita.errors import PartitaError
    from partita.machine import load
    from partita.search.find import find

    start = time.perf_counter()
    try:
        result = find(step.graph, load(machine), seconds=seconds, stages=True)
    except PartitaError as error:
        return Search(kind, case, machine, time.perf_counter() - start, f"refused: {error}")
    except Exception as error:
        elapsed = time.perf_counter() - start
        return Search(kind, case, machine, elapsed, _text(error), failed=True)
    elapsed = time.perf_counter() - start
    plan = result.plan
    outcome = f"{plan.devices} devices, {plan.microbatches} microbatches"
    if result.failures:
        outcome = "; ".join(result.failures)
    return Search(kind, case, machine, elapsed, outcome, failed=bool(result.failures))


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def table(searches: list[Search]) -> str:
    """Searches, failures and seconds by kind and machine."""
    groups: dict[tuple[str, str], list[Search]] = defaultdict(list)
    for search in searches:
        groups[search.kind, search.machine].append(search)
    lines = ["kind          machine         searches  failed  seconds each"]
    for (kind, machine), group in groups.items():
        failed = sum(search.failed for search in group)
        mean = sum(search.seconds for search in group) / len(group)
        lines.append(f"{kind:12}  {machine:14}  {len(group):8}  {failed:6}  {mean:12.1f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------- cases


def random_cases(options: argparse.Namespace) -> Iterator[tuple[str, Captures]]:
    """Random models by seed."""
    for seed in range(options.first, options.first + options.count):
        yield f"seed {seed}", partial(captured_random, seed)


def captured_random(seed: int) -> list[Any]:
    from zoo.random_models import random_model

    from partita.capture.program import capture_program

    model, batch = random_model(seed)
    return [capture_program(model, batch=batch)]


def zoo_cases(options: argparse.Namespace) -> Iterator[tuple[str, Captures]]:
    """All programs of the zoo."""
    from zoo.compare import PROGRAMS

    for name in sorted(PROGRAMS):
        yield name, partial(captured_program, name)


def captured_program(name: str) -> list[Any]:
    """The training steps of a program of the zoo: all that it plans while it runs on one device."""
    import keras
    from zoo.compare import PROGRAMS, slow

    import partita
    from partita.execute.function import Session, running
    from partita.planning import make_planner

    steps: list[Any] = []

    def keep(captured: Any, machine: Any, plan: Any) -> None:
        if all(captured.graph != step.graph for step in steps):
            steps.append(captured)

    planner = make_planner(machine=slow(1), on_plan=keep)

    def par(target: Any, args: Any = None, **how: Any) -> Any:
        return partita.parallelize(target, args, **how)

    keras.utils.set_random_seed(1)
    with running(Session(planner, say=lambda line: None)):
        PROGRAMS[name].run(par)
    return steps


def application_cases(options: argparse.Namespace) -> Iterator[tuple[str, Captures]]:
    """All models of keras.applications."""
    from applications import names

    for name in names():
        yield name, partial(captured_application, name)


def captured_application(name: str) -> list[Any]:
    from applications import compiled, made

    from partita.capture.keras_models import abstract
    from partita.capture.program import capture_program

    with abstract():
        model, _ = made(name)
    compiled(model)
    return [capture_program(model, BATCH_SIZE)]


KINDS = {"random": random_cases, "zoo": zoo_cases, "applications": application_cases}

if __name__ == "__main__":
    sys.exit(main())

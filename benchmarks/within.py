"""Seconds until a search is within 1 % of the best known plan: FlexFlow's networks on 64 GPUs.

The default search is timed by its own reports. The best known plan is the best of this search and
of four longer ones with different seeds, which run afterwards. The time starts at the captured
graph: cost network, exact search, Markov chains.

Example: python benchmarks/within.py --machine k80-cluster --seconds 60
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from partita.bench.networks import NETWORKS, model
from partita.bench.papers import FLEXFLOW
from partita.capture.program import capture_program
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.search.base import Progress
from partita.search.find import find

NEAR = 1.01
"""Step of a plan that counts as near the best known one, as a multiple of its step."""


def measure(graph: OperatorGraph, machine: Machine, seconds: float, seeds: int) -> str:
    """Seconds until the default search is near the best known plan of a graph."""
    begin = time.perf_counter()
    reports: list[tuple[float, float]] = []

    def add(progress: Progress) -> None:
        reports.append((time.perf_counter() - begin, progress.best))

    result = find(graph, machine, report=add)
    step_seconds = result.prediction.seconds
    search_seconds = time.perf_counter() - begin
    reports.append((search_seconds, step_seconds))
    best = step_seconds
    for seed in range(seeds):
        longer = find(graph, machine, seconds=seconds, seed=seed)
        best = min(best, longer.prediction.seconds)
    near = [elapsed for elapsed, reported in reports if reported <= NEAR * best]
    duration = f"{near[0]:.2f} s" if near else "never"
    return (
        f"within 1 % after {duration} of {search_seconds:.2f} s; "
        f"result {step_seconds * 1e3:.3f} ms, "
        f"best known {best * 1e3:.3f} ms ({step_seconds / best - 1:+.2%}), "
        f"bound {result.bound_seconds * 1e3:.3f} ms"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", default="k80-cluster")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each longer search")
    parser.add_argument("--seeds", type=int, default=4, help="number of longer searches")
    parser.add_argument("--only", choices=FLEXFLOW)
    parser.add_argument("--small", action="store_true", help="LeNet on 4 devices, 1 second")
    options = parser.parse_args(arguments)
    names = FLEXFLOW if options.only is None else (options.only,)
    if options.small:
        names = ("lenet",)
        options.devices, options.seconds, options.seeds = 4, 1.0, 1
    machine = load(options.machine).with_devices(options.devices)
    for name in names:
        graph = capture_program(model(name), NETWORKS[name].batch * options.devices).graph
        line = measure(graph, machine, options.seconds, options.seeds)
        print(f"{name:13} {line}", flush=True)


if __name__ == "__main__":
    main()

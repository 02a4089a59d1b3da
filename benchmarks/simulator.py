"""How many plans a second the simulator looks at, on one core: from nothing, and with one operator's choice changed at a time.

    python benchmarks/simulator.py                                     # Inception-v3 on 8, 64 and 1024 GPUs
    python benchmarks/simulator.py --model ResNet50 --machines dgx-h100:8
    python benchmarks/simulator.py --model nmt --machines k80-cluster

A simulation from nothing reads all tasks' seconds off the cost tables and runs every task; an incremental one gives a random operator a
random choice, or takes it back, and replays the tasks from the first that changed. What compiling takes is said apart. FlexFlow's
public simulator, on the same network: 808 a second at 8 GPUs, 25 at 64, from nothing (measured in C++ on one core, 2026-11).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from numba import njit

import partita
from partita.bench.networks import NETWORKS
from partita.bench.networks import model as published
from partita.capture.program import capture_program
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.search.find import mesh_of
from partita.search.network import build
from partita.search.simulated import Simulated, change, fill, simulated
from partita.simulation.engine import sweep

ROUNDS = 5


@njit
def whole(count, seed, stream, streams, first, before, *where):  # noqa: ANN001, ANN201
    """Seconds of the last of `count` plans, each random and simulated from nothing."""
    np.random.seed(seed)
    states, n = where[2], len(stream)
    chosen, seconds, start, end = (
        np.zeros(len(states), np.int64),
        np.zeros(n),
        np.zeros(n),
        np.zeros(n),
    )
    total = 0.0
    for _ in range(count):
        o = np.random.randint(len(states))
        chosen[o] = np.random.randint(states[o])
        fill(chosen, seconds, *where)
        sweep(0, seconds, stream, streams, first, before, start, end)
        total += end.max()
    return total


@njit
def incremental(count, seed, near_first, near, stream, streams, first, before, *where):  # noqa: ANN001, ANN201
    """The same walk, replayed."""
    np.random.seed(seed)
    states, n = where[2], len(stream)
    chosen, seconds, start, end = (
        np.zeros(len(states), np.int64),
        np.zeros(n),
        np.zeros(n),
        np.zeros(n),
    )
    touched, was = np.empty(n, np.int64), np.empty(n)
    fill(chosen, seconds, *where)
    sweep(0, seconds, stream, streams, first, before, start, end)
    total = 0.0
    for _ in range(count):
        o = np.random.randint(len(states))
        chosen[o] = np.random.randint(states[o])
        _, begin = change(o, chosen, seconds, touched, was, 0, n, near_first, near, *where)
        sweep(begin, seconds, stream, streams, first, before, start, end)
        total += end.max()
    return total


def rate(function, count: int, *arguments) -> tuple[float, float, float]:  # noqa: ANN001
    """(simulations a second, in the median; seconds of the first call less the others'; what it computes)."""
    begun = time.perf_counter()
    result = function(count, 0, *arguments)
    first, times = time.perf_counter() - begun, []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        function(count, 0, *arguments)
        times.append(time.perf_counter() - begun)
    return count / statistics.median(times), first - statistics.median(times), result


def measure(problem: Simulated, count: int) -> str:
    full, compiled, one = rate(whole, count, *problem.order, *problem.where)
    few, more, other = rate(
        incremental, count, problem.near_first, problem.near, *problem.order, *problem.where
    )
    assert one == other, "the two ways differ"
    return f"{full:9,.0f} simulations a second from nothing, {few:9,.0f} incremental (compiled in {compiled + more:.1f} s; {problem.tasks.count} tasks)"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="InceptionV3",
        help="a model of keras.applications, or a network of partita.bench.networks, as nmt",
    )
    parser.add_argument(
        "--machines", nargs="+", default=["p100-cluster:2", "k80-cluster:16", "dgx-a100:128"]
    )
    parser.add_argument("--batch", type=int, default=64, help="samples of a device")
    parser.add_argument("--count", type=int, default=20_000)
    given = parser.parse_args()
    if given.model in NETWORKS:
        model = published(given.model)
    else:
        with partita.abstract():
            model = getattr(keras.applications, given.model)(weights=None)
        model.compile("sgd", "sparse_categorical_crossentropy")
    for name in given.machines:
        machine = load(name)
        graph = capture_program(model, given.batch * machine.devices).graph
        mesh = mesh_of(machine)
        problem = simulated(
            build(
                graph,
                machine,
                mesh,
                [make(graph, machine.name, mesh) for make in BASELINES.values()],
            )
        )
        print(
            f"{model.name} on {machine.devices:4} devices ({name}): {measure(problem, given.count)}",
            flush=True,
        )


if __name__ == "__main__":
    main()

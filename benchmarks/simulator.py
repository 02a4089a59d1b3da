"""Simulated plans per second on one core: full simulations, and incremental ones.

A full simulation reads the seconds of all tasks off the cost tables and runs every task. An
incremental one gives a random operator a random state and replays the tasks from the first changed
one on. The seconds of compilation are listed separately. FlexFlow's public simulator, on the same
network: 808 full simulations a second for 8 GPUs, 25 for 64 (in C++ on one core, 2026-11).

Examples:
    python benchmarks/simulator.py
    python benchmarks/simulator.py --model ResNet50 --machines dgx-h100:8
    python benchmarks/simulator.py --model nmt --machines k80-cluster
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from numba import njit

import partita
from partita.bench.networks import NETWORKS
from partita.bench.networks import model as published_model
from partita.capture.program import capture_program
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.search.find import mesh_of
from partita.search.network import build
from partita.search.simulated import Simulated, Undo, change, fill, simulated
from partita.simulation.engine import sweep

ROUNDS = 5


@njit
def full(count, order, tables):
    """Sum of the seconds of `count` random plans, each fully simulated."""
    np.random.seed(0)
    chosen = np.zeros(len(tables.states), np.int64)
    seconds = np.zeros(len(order.stream))
    start = np.zeros(len(order.stream))
    end = np.zeros(len(order.stream))
    total = 0.0
    for _ in range(count):
        o = np.random.randint(len(chosen))
        chosen[o] = np.random.randint(tables.states[o])
        fill(chosen, seconds, tables)
        sweep(0, seconds, order.stream, order.streams, order.first, order.before, start, end)
        total += end.max()
    return total


@njit
def incremental(count, order, tables):
    """The same plans, replayed from the first changed task on."""
    np.random.seed(0)
    chosen = np.zeros(len(tables.states), np.int64)
    seconds = np.zeros(len(order.stream))
    start = np.zeros(len(order.stream))
    end = np.zeros(len(order.stream))
    undo = Undo(np.empty(len(order.stream), np.int64), np.empty(len(order.stream)))
    fill(chosen, seconds, tables)
    sweep(0, seconds, order.stream, order.streams, order.first, order.before, start, end)
    total = 0.0
    for _ in range(count):
        o = np.random.randint(len(chosen))
        chosen[o] = np.random.randint(tables.states[o])
        _, begin = change(o, chosen, seconds, undo, 0, len(seconds), tables)
        sweep(begin, seconds, order.stream, order.streams, order.first, order.before, start, end)
        total += end.max()
    return total


class Rate(NamedTuple):
    per_second: float
    """Simulations per second, median of all rounds."""
    compile_seconds: float
    total: float
    """Sum of all simulated seconds."""


def measure(function: Callable[..., float], count: int, problem: Simulated) -> Rate:
    begin = time.perf_counter()
    total = function(count, problem.order, problem.tables)
    first = time.perf_counter() - begin
    rounds = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        function(count, problem.order, problem.tables)
        rounds.append(time.perf_counter() - begin)
    seconds = statistics.median(rounds)
    return Rate(count / seconds, first - seconds, total)


def report(problem: Simulated, count: int) -> str:
    """Both rates of a network."""
    whole = measure(full, count, problem)
    replayed = measure(incremental, count, problem)
    assert whole.total == replayed.total, "full and incremental simulations differ"
    return (
        f"{whole.per_second:9,.0f} full simulations a second, "
        f"{replayed.per_second:9,.0f} incremental "
        f"(compiled in {whole.compile_seconds + replayed.compile_seconds:.1f} s; "
        f"{problem.tasks.count} tasks)"
    )


def compiled_model(name: str) -> keras.Model:
    """A network of partita.bench.networks or of keras.applications, without values."""
    if name in NETWORKS:
        return published_model(name)
    with partita.abstract():
        model = getattr(keras.applications, name)(weights=None)
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def simulated_problem(model: keras.Model, machine_name: str, batch: int) -> Simulated:
    machine = load(machine_name)
    graph = capture_program(model, batch * machine.devices).graph
    mesh = mesh_of(machine)
    plans = [make(graph, machine.name, mesh) for make in BASELINES.values()]
    return simulated(build(graph, machine, mesh, plans))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="InceptionV3",
        help="of keras.applications or partita.bench.networks",
    )
    parser.add_argument(
        "--machines", nargs="+", default=["p100-cluster:2", "k80-cluster:16", "dgx-a100:128"]
    )
    parser.add_argument("--batch", type=int, default=64, help="samples per device")
    parser.add_argument("--count", type=int, default=20_000, help="plans per round")
    parser.add_argument("--small", action="store_true", help="LeNet on 8 GPUs, 500 plans")
    options = parser.parse_args(arguments)
    if options.small:
        options.model = "lenet"
        options.machines = ["p100-cluster:2"]
        options.count = 500
    model = compiled_model(options.model)
    for name in options.machines:
        problem = simulated_problem(model, name, options.batch)
        devices = load(name).devices
        rates = report(problem, options.count)
        print(f"{model.name} on {devices:4} devices ({name}): {rates}", flush=True)


if __name__ == "__main__":
    main()

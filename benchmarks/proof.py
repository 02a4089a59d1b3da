"""How soon the fastest plan of a small network is proved, and found by walks that begin at data parallelism; and what exact search alone takes.

    python benchmarks/proof.py

LeNet and an RNNLM of two steps on 4 GPUs of both of FlexFlow's clusters: FlexFlow proves them in 0.8 and 18 hours (MLSys 2019, section 8.4). Then OptCNN's
four networks on 4 GPUs: elimination from a made cost network, and the making of it (published: 0.01, 0.02, 0.1, 0.4 s in C++, ICML 2018, table 3).
"""

from __future__ import annotations

import os
import statistics
import time

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from partita.bench.networks import NETWORKS, model
from partita.bench.papers import OPTCNN, OPTCNN_BATCH
from partita.capture.program import capture_program
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.search.elimination import eliminate
from partita.search.find import capacity, mesh_of
from partita.search.mcmc import run_chains
from partita.search.network import CostNetwork, build
from partita.search.portfolio import SEARCHES, Limits, SearchSpace
from partita.search.reduce import reduce

SEEDS = 10
ROUNDS = 5


def network_of(graph: OperatorGraph, machine: Machine) -> CostNetwork:
    mesh = mesh_of(machine)
    return build(
        graph, machine, mesh, [make(graph, machine.name, mesh) for make in BASELINES.values()]
    )


def proof(name: str, cluster: str) -> str:
    machine = load(cluster).with_devices(4)
    graph = capture_program(model(name), 4 * NETWORKS[name].batch).graph
    network = network_of(graph, machine)
    start = network.states_of(
        BASELINES["data parallel"](graph, machine.name, network.placement.mesh)
    )
    assert start is not None
    limits = Limits(float(capacity(machine)))
    SEARCHES["exhaustive"](SearchSpace(network, [start]), limits)  # compiles
    begun = time.perf_counter()
    proved = SEARCHES["exhaustive"](SearchSpace(network, [start]), limits)
    taken, simulated, soon = (
        time.perf_counter() - begun,
        SearchSpace(network, [start]).simulated,
        [],
    )
    for seed in range(SEEDS):
        begun = time.perf_counter()
        for most in (20_000, 100_000, 400_000):
            found, _ = run_chains(
                simulated, [start], limits.budget, seconds=np.inf, seed=seed, most=most
            )
            if found.seconds <= proved.seconds * (1 + 1e-9):
                soon.append(time.perf_counter() - begun)
                break
    plans = float(np.prod([float(len(s)) for s in network.states]))
    said = "proved" if proved.gap == 0 and not proved.stopped else "NOT proved"
    return (
        f"{name} on 4 of {cluster}: {len(network.states)} operators, {plans:.1e} plans, {proved.seconds * 1e3:.3f} ms {said} in {taken:.2f} s, data parallel "
        f"{simulated.seconds(start) * 1e3:.3f} ms; walks found it with {len(soon)} of {SEEDS} seeds, in {max(soon, default=np.nan):.2f} s at most"
    )


def exact(name: str) -> str:
    machine = load("p100-cluster").with_devices(4)
    graph = capture_program(model(name), 4 * OPTCNN_BATCH).graph
    made, solved = [], []
    for _ in range(ROUNDS + 1):
        begun = time.perf_counter()
        network = network_of(graph, machine)
        made.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        result = eliminate(reduce(network.problem).problem, float(capacity(machine)))
        solved.append(time.perf_counter() - begun)
    middle = lambda times: statistics.median(times[1:]) * 1e3
    return f"{name}: cost network {middle(made):.1f} ms, exact search {middle(solved):.1f} ms, gap {result.gap:.1%}"


def main() -> None:
    for name in ("lenet", "rnnlm-2"):
        for cluster in ("p100-cluster", "k80-cluster"):
            print(proof(name, cluster), flush=True)
    for name in OPTCNN:
        print(exact(name), flush=True)


if __name__ == "__main__":
    main()

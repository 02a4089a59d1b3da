"""Seconds until the fastest plan of a small network is proved, and until Markov chains reach it.

LeNet and an RNNLM of two steps on 4 GPUs of both of FlexFlow's clusters; chains start from data
parallelism. FlexFlow proves them in 0.8 and 18 hours (MLSys 2019, section 8.4). Then OptCNN's four
networks on 4 GPUs: construction of the cost network, and exact search in it (published: 0.01, 0.02,
0.1, 0.4 s in C++, ICML 2018, table 3).

Example: python benchmarks/proof.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

from partita.bench.networks import NETWORKS, model
from partita.bench.papers import OPTCNN, OPTCNN_BATCH
from partita.capture.program import capture_program
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.search.base import SearchResult
from partita.search.elimination import eliminate
from partita.search.find import capacity, mesh_of
from partita.search.mcmc import run_chains
from partita.search.network import CostNetwork, build
from partita.search.portfolio import SEARCHES, Limits, SearchSpace
from partita.search.reduce import reduce

DEVICES = 4
PROPOSALS = (20_000, 100_000, 400_000)


def cost_network(graph: OperatorGraph, machine: Machine) -> CostNetwork:
    mesh = mesh_of(machine)
    plans = [make(graph, machine.name, mesh) for make in BASELINES.values()]
    return build(graph, machine, mesh, plans)


def proof(name: str, cluster: str, seeds: int) -> str:
    """Seconds of the proof, and of chains that end at the proved step."""
    machine = load(cluster).with_devices(DEVICES)
    graph = capture_program(model(name), DEVICES * NETWORKS[name].batch).graph
    network = cost_network(graph, machine)
    plan = BASELINES["data parallel"](graph, machine.name, network.placement.mesh)
    start = network.states_of(plan)
    assert start is not None
    limits = Limits(float(capacity(machine)))
    SEARCHES["exhaustive"](SearchSpace(network, [start]), limits)  # compiles
    begin = time.perf_counter()
    space = SearchSpace(network, [start])
    result = SEARCHES["exhaustive"](space, limits)
    proof_seconds = time.perf_counter() - begin
    times = [chain_seconds(space, result, limits, seed) for seed in range(seeds)]
    reached = [seconds for seconds in times if seconds is not None]
    plans = float(np.prod([float(len(states)) for states in network.states]))
    verdict = "proved" if result.gap == 0 and not result.stopped else "NOT proved"
    data_parallel_ms = space.simulated.seconds(start) * 1e3
    return (
        f"{name} on {DEVICES} of {cluster}: {len(network.states)} operators, {plans:.1e} plans, "
        f"{result.seconds * 1e3:.3f} ms {verdict} in {proof_seconds:.2f} s, "
        f"data parallel {data_parallel_ms:.3f} ms; chains reached it with {len(reached)} of "
        f"{seeds} seeds, in {max(reached, default=np.nan):.2f} s at most"
    )


def chain_seconds(
    space: SearchSpace, result: SearchResult, limits: Limits, seed: int
) -> float | None:
    """Seconds until chains reach the step of a result; None if they do not."""
    begin = time.perf_counter()
    for proposals in PROPOSALS:
        sampled, _ = run_chains(
            space.simulated,
            space.baselines,
            limits.budget,
            seconds=np.inf,
            seed=seed,
            proposals=proposals,
        )
        if sampled.seconds <= result.seconds * (1 + 1e-9):
            return time.perf_counter() - begin
    return None


def exact(name: str, rounds: int) -> str:
    """Milliseconds of the construction of a cost network, and of exact search."""
    machine = load("p100-cluster").with_devices(DEVICES)
    graph = capture_program(model(name), DEVICES * OPTCNN_BATCH).graph
    build_seconds = []
    search_seconds = []
    gap = np.nan
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        network = cost_network(graph, machine)
        build_seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        gap = eliminate(reduce(network.problem).problem, float(capacity(machine))).gap
        search_seconds.append(time.perf_counter() - begin)
    return (
        f"{name}: cost network {median_ms(build_seconds):.1f} ms, "
        f"exact search {median_ms(search_seconds):.1f} ms, gap {gap:.1%}"
    )


def median_ms(seconds: Sequence[float]) -> float:
    """Median in milliseconds, without the first round."""
    return statistics.median(seconds[1:]) * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="chains per network")
    parser.add_argument("--rounds", type=int, default=5, help="exact searches per network")
    parser.add_argument("--small", action="store_true", help="LeNet on one cluster")
    options = parser.parse_args(arguments)
    networks = ("lenet", "rnnlm-2")
    clusters = ("p100-cluster", "k80-cluster")
    exact_networks = OPTCNN
    if options.small:
        networks, clusters, exact_networks = networks[:1], clusters[:1], OPTCNN[:1]
    for name in networks:
        for cluster in clusters:
            print(proof(name, cluster, options.seeds), flush=True)
    for name in exact_networks:
        print(exact(name, options.rounds), flush=True)


if __name__ == "__main__":
    main()

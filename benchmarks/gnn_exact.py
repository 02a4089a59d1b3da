"""Split training against one device: the number of runs whose losses or predictions differ.

    pip install pymetis && python benchmarks/gnn_exact.py

Six models, four partitioners, one to seven parts, directed and undirected graphs. Graphs have
isolated vertices, self edges and repeated edges. One cut in two has empty parts too. A run is three
epochs with dropout from the same weights. Its losses are compared to 2e-4, its predictions to a
hundredth of their spread.
"""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
from partita.execute.devices import request_cpu_devices

request_cpu_devices(7)

import keras
import numpy as np

import partita.gnn as gnn
from partita.gnn.nn.models import MODELS


class Trained(NamedTuple):
    """The losses of the epochs, and the predictions after them."""

    losses: np.ndarray
    predictions: np.ndarray


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3, 4, 7])
    parser.add_argument(
        "--partitioners", nargs="+", default=["vertices", "edges", "metis", "learned"]
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    return parser.parse_args()


arguments = arguments_of()


def random_graph(directed: bool) -> gnn.Graph:
    """60 vertices, the last ten without an edge."""
    random = np.random.default_rng(0)
    source, target = random.integers(0, 50, (2, 160)) ** 2 // 50
    source = np.append(source, [3, 3, 7])
    target = np.append(target, [3, 3, 7])
    if not directed:
        source, target = np.append(source, target), np.append(target, source)
    mask = random.permutation(60)
    return gnn.Graph.from_edges(
        np.append(source, source[:9]),
        np.append(target, target[:9]),
        60,
        features=random.standard_normal((60, 9)),
        labels=random.integers(0, 3, 60),
        train=mask[:20],
        validation=mask[20:40],
        test=mask[40:],
    )


def trained(name: str, graph: gnn.Graph, **split: Any) -> Trained:
    keras.utils.set_random_seed(0)
    model = MODELS[name](hidden=8, classes=3)
    model.compile(keras.optimizers.Adam(0.02))
    history = model.fit(graph, epochs=3, verbose=0, **split).history
    return Trained(np.array(history["loss"]), model.predict(graph))


def partition_of(partitioner: str, parts: int, directed: bool) -> str | list[int]:
    """A partitioner, or split points with empty parts in its place."""
    if partitioner != "vertices" or parts <= 2 or not directed:
        return partitioner
    return [0, 0, 30] + [60] * (parts - 2)


class Count:
    """Runs, those that differ, and the largest relative difference of a loss."""

    def __init__(self) -> None:
        self.runs = 0
        self.differ = 0
        self.worst = 0.0

    def add(self, run: Trained, alone: Trained, name: str) -> None:
        """Compares a run with that on one device."""
        difference = float(np.abs(run.losses / alone.losses - 1).max())
        spread = np.ptp(alone.predictions)
        predictions_differ = np.abs(run.predictions - alone.predictions).max() > 1e-2 * spread
        self.runs += 1
        self.worst = max(self.worst, difference)
        if difference > 2e-4 or predictions_differ:
            self.differ += 1
            print(f"{name}: loss {difference:.1e} off", flush=True)


count = Count()
for directed in (True, False):
    graph = random_graph(directed)
    edges = "directed" if directed else "undirected"
    for name in arguments.models:
        alone = trained(name, graph)
        for partitioner in arguments.partitioners:
            for parts in arguments.parts:
                partition = partition_of(partitioner, parts, directed)
                run = trained(name, graph, devices=parts, partition=partition)
                count.add(run, alone, f"{name}, {partition}, {parts} parts, {edges}")
        print(
            f"{name}: {count.runs} runs so far, {count.differ} differ, "
            f"largest relative difference of a loss {count.worst:.1e}",
            flush=True,
        )
print(
    f"{count.differ} of {count.runs} differ; "
    f"largest relative difference of a loss {count.worst:.1e}"
)

"""Split training against one device: six models, four partitioners, one to seven parts, directed and undirected graphs; how many differ.

    pip install pymetis && python benchmarks/gnn_exact.py

Graphs have isolated vertices, self edges and repeated edges; one cut in two has empty parts too. Three epochs with dropout from the same weights: losses to 2e-4,
predictions to a hundredth of their spread.
"""

from __future__ import annotations

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"
from partita.execute.devices import request_cpu_devices

request_cpu_devices(7)

import keras
import numpy as np

import partita.gnn as gnn
from partita.gnn.nn.models import MODELS

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3, 4, 7])
parser.add_argument("--partitioners", nargs="+", default=["vertices", "edges", "metis", "learned"])
arguments = parser.parse_args()


def drawn(directed: bool) -> gnn.Graph:
    """60 vertices, the last ten without an edge."""
    random = np.random.default_rng(0)
    source, target = random.integers(0, 50, (2, 160)) ** 2 // 50
    source, target = np.append(source, [3, 3, 7]), np.append(target, [3, 3, 7])
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


def trained(name: str, graph: gnn.Graph, **how: object) -> tuple[np.ndarray, np.ndarray]:
    keras.utils.set_random_seed(0)
    model = MODELS[name](hidden=8, classes=3)
    model.compile(keras.optimizers.Adam(0.02))
    losses = model.fit(graph, epochs=3, verbose=0, **how).history["loss"]
    return np.array(losses), model.predict(graph)


count, differ, worst = 0, 0, 0.0
for directed in (True, False):
    graph = drawn(directed)
    for name in MODELS:
        losses, predicted = trained(name, graph)
        for partition in arguments.partitioners:
            for parts in arguments.parts:
                cut = (
                    [0, 0, 30, 60][:3] + [60] * (parts - 2)
                    if partition == "vertices" and parts > 2 and directed
                    else partition
                )
                found, values = trained(name, graph, devices=parts, partition=cut)
                off = float(np.abs(found / losses - 1).max())
                wrong = off > 2e-4 or np.abs(values - predicted).max() > 1e-2 * np.ptp(predicted)
                count, differ, worst = count + 1, differ + wrong, max(worst, off)
                if wrong:
                    print(
                        f"{name}, {partition}, {parts} parts, {'directed' if directed else 'undirected'}: loss {off:.1e} off",
                        flush=True,
                    )
        print(
            f"{name}: {count} so far, {differ} differ, largest relative difference of a loss {worst:.1e}",
            flush=True,
        )
print(f"{differ} of {count} differ; largest relative difference of a loss {worst:.1e}")

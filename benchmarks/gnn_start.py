"""Seconds before training begins: the first epoch of a fresh process, and a second `fit`.

    python benchmarks/gnn_start.py cora.npz --rounds 5 --peer FOLDER

FOLDER has torch and torch_geometric (`pip install --target FOLDER torch torch_geometric`). A fresh
process imports the library, reads the graph, makes a GCN of two layers with 16 units, and trains it
for one epoch. Partita and PyG run by turns, after one turn each that compiles kernels for this
processor. The figures are medians of elapsed time and of the time of the processor, start and end
of the process included. The times of a second `fit` on the same graph are those from the call to the
begin of its first epoch.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "jax")
UNITS = 16


def train_partita(path: str) -> None:
    """Trains Partita's network twice, and prints the milliseconds before the second one begins."""
    import keras

    from partita import gnn

    clocks = (time.perf_counter, time.process_time)
    began = [0.0, 0.0]

    class Begin(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: object = None) -> None:
            print(*(1e3 * (clock() - start) for clock, start in zip(clocks, began, strict=True)))

    graph = gnn.open(path)
    model = gnn.GCN(UNITS, graph.classes)
    model.compile("adam")
    model.fit(graph, epochs=1, verbose=0)
    began[:] = [clock() for clock in clocks]
    model.fit(graph, epochs=1, verbose=0, callbacks=[Begin()])


def start_partita(path: str) -> None:
    """Trains Partita's network for one epoch."""
    from partita import gnn

    graph = gnn.open(path)
    model = gnn.GCN(UNITS, graph.classes)
    model.compile("adam")
    model.fit(graph, epochs=1, verbose=0)


def start_peer(path: str) -> None:
    """Trains PyG's network for one epoch."""
    import torch
    from torch_geometric.nn import GCN

    arrays = np.load(path)
    edges, x = torch.tensor(arrays["edges"]), torch.tensor(arrays["x"])
    labels, train = torch.tensor(arrays["labels"]).long(), torch.tensor(arrays["train"])
    module = GCN(x.shape[1], UNITS, 2, int(labels.max()) + 1, dropout=0.5)
    optimizer = torch.optim.Adam(module.parameters())
    loss = torch.nn.functional.cross_entropy(module(x, edges)[train], labels[train])
    loss.backward()
    optimizer.step()
    print(float(loss.detach()))


CHILDREN = {"second": train_partita, "Partita": start_partita, "PyG": start_peer}
"""What a process of this script does, by its name."""


def child(name: str, path: str) -> tuple[float, float, str]:
    """Elapsed seconds, processor seconds and output of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    command = [sys.executable, __file__, path, "--child", name]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    elapsed = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return elapsed, used, output


def arrays_of(path: str, folder: str) -> str:
    """A file with the graph's arrays as PyG takes them."""
    from partita import gnn

    graph = gnn.open(path)
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    edges = np.stack([graph.sources.astype(np.int64), targets])
    file = Path(folder) / "graph.npz"
    np.savez(file, edges=edges, x=graph.features, labels=graph.labels, train=graph.train)
    return str(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("graph", help="a graph with classes and a training mask")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", help="folders with torch and torch_geometric", default="")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        CHILDREN[arguments.child](arguments.graph)
        return
    os.environ["PYTHONPATH"] = f"{arguments.peer}:{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory() as folder:
        paths = {"Partita": arguments.graph}
        if arguments.peer:
            paths["PyG"] = arrays_of(arguments.graph, folder)
        for name, path in paths.items():
            child(name, path)
        rounds = [
            {name: child(name, path)[:2] for name, path in paths.items()}
            for _ in range(arguments.rounds)
        ]
    for number, title in enumerate(("elapsed", "processor")):
        seconds = {name: statistics.median(row[name][number] for row in rounds) for name in paths}
        text = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
        ratio = f": {seconds['Partita'] / seconds['PyG']:.2f} x" if "PyG" in seconds else ""
        print(f"first epoch of a fresh process, {title}: {text}{ratio}")
    outputs = [child("second", arguments.graph)[2] for _ in range(arguments.rounds)]
    times = [[float(word) for word in output.split()] for output in outputs]
    elapsed, processor = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"second fit, before its first epoch: {elapsed:.1f} ms, processor {processor:.1f} ms")


if __name__ == "__main__":
    main()

"""Traffic between host and device of a memory plan against a least-recently-used cache, within a quarter of what training needs.

    python benchmarks/gnn_memory.py --scale 18 --degree 16 --features 64 --hidden 64

A quarter of the need may be less than the largest layer alone: then the budget is the least possible, and the table says which share that is.
"""

import argparse
import os
import re
import statistics

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn.models import MODELS

parser = argparse.ArgumentParser(description="A memory plan against a least-recently-used cache.")
parser.add_argument("--scale", type=int, default=14)
parser.add_argument("--degree", type=int, default=8)
parser.add_argument("--features", type=int, default=64)
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--epochs", type=int, default=6)
arguments = parser.parse_args()

random = np.random.default_rng(0)
vertices = 2**arguments.scale
sources, targets = random.integers(0, vertices, (2, vertices * arguments.degree))
graph = gnn.Graph.from_edges(
    sources, targets, vertices,
    features=random.standard_normal((vertices, arguments.features), np.float32), labels=random.integers(0, 8, vertices),
    train=np.arange(vertices // 2),
)  # fmt: skip


def trained(name: str, memory: int | None, epochs: int) -> tuple:
    """(model, losses), of the same seed."""
    keras.utils.set_random_seed(0)
    model = MODELS[name](hidden=arguments.hidden, classes=8, layers=arguments.layers)
    model.compile(keras.optimizers.Adam(0.01))
    return model, np.array(model.fit(graph, epochs, verbose=0, memory=memory).history["loss"])


for name in ("gcn", "sage"):
    alone, losses = trained(name, None, arguments.epochs)
    need = trained(name, 2**50, 1)[0].memory.facts()["need"]
    try:
        model, found = trained(name, need // 4, arguments.epochs)
    except GraphError as error:
        least = re.search(r'memory="(\d+) B"', str(error))
        assert least is not None, error
        model, found = trained(name, int(least[1]), arguments.epochs)
    facts = model.memory.facts()
    seconds = [statistics.median(m.epoch_seconds[2:]) for m in (alone, model)]
    print(
        f"{name}: need {need:,} B, budget {facts['budget']:,} B ({facts['budget'] / need:.0%}), plan {facts['traffic']:,} B (exact: {facts['exact']}, "
        f"{facts['again']} run again, moved {facts['moved']:,} B), cache {facts['lru_traffic']:,} B, ratio {facts['lru_traffic'] / max(1, facts['traffic']):.2f}; "
        f"largest difference of loss {np.abs(losses - found).max():.1e}; epoch {seconds[0]:.3f} s without, {seconds[1]:.3f} s within",
        flush=True,
    )

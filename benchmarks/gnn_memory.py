"""Traffic between host and device of a memory plan against a least-recently-used cache, within a quarter of what training needs.

    python benchmarks/gnn_memory.py --scale 18 --degree 16 --features 64 --hidden 64

The need is the smaller of two numbers: what the compiler says of the ordinary step, arguments and temporaries; and what the plan's operators need with all
on the device, uncut. Where a share of it is less than the least possible, the budget is that, and the table says which share it is. The cache runs
the same operators on the same tiles in the same order.
"""

import argparse
import os
import re
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn.nn.models import MODELS
from partita.gnn.spill.plan import bound, planned

parser = argparse.ArgumentParser(description="A memory plan against a least-recently-used cache.")
parser.add_argument("--models", nargs="+", default=["gcn", "sage"])
parser.add_argument("--scale", type=int, default=14)
parser.add_argument("--degree", type=int, default=8)
parser.add_argument("--features", type=int, default=64)
parser.add_argument("--hidden", type=int, default=64)
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--share", type=float, default=0.25, help="The budget as a share of the need.")
arguments = parser.parse_args()

random = np.random.default_rng(0)
vertices = 2**arguments.scale
sources, targets = random.integers(0, vertices, (2, vertices * arguments.degree))
graph = gnn.Graph.from_edges(
    sources,
    targets,
    vertices,
    features=random.standard_normal((vertices, arguments.features), np.float32),
    labels=random.integers(0, 8, vertices),
    train=np.arange(vertices // 2),
)


def trained(name: str, memory: int | None, epochs: int) -> tuple:
    """(model, losses), of the same seed."""
    keras.utils.set_random_seed(0)
    model = MODELS[name](hidden=arguments.hidden, classes=8, layers=arguments.layers)
    model.compile(keras.optimizers.Adam(0.01))
    return model, np.array(model.fit(graph, epochs, verbose=0, memory=memory).history["loss"])


def ordinary(model: gnn.GraphModel) -> int:
    """Bytes of the ordinary step, as its compiler has them."""
    step = model._step("train", model._train_step, donate=True)
    found = step.lower(model._state(), model._prepared(graph, "train")).compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.temp_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )


for name in arguments.models:
    alone, losses = trained(name, None, arguments.epochs)
    step, uncut = ordinary(alone), trained(name, 2**50, 1)[0].memory.facts()["need"]
    need = min(step, uncut)
    try:
        model, found = trained(name, int(need * arguments.share), arguments.epochs)
    except GraphError as error:
        least = re.search(r'memory="(\d+) B"', str(error))
        assert least is not None, error
        model, found = trained(name, int(least[1]), arguments.epochs)
    facts, within = model.memory.facts(), model.memory
    seconds = [statistics.median(m.epoch_seconds[2:]) for m in (alone, model)]
    began = time.perf_counter()
    planned(within.work, facts["budget"], 1e9)
    planning = time.perf_counter() - began
    print(
        f"{name}: ordinary step {step:,} B, need uncut {uncut:,} B; always there {within.work.fixed:,} B, least {facts['least']:,} B ({facts['least'] / need:.0%}); "
        f"budget {facts['budget']:,} B ({facts['budget'] / need:.0%}); {facts['operators']} operators on {len(within.work.bytes)} tiles, planned in {planning:.1f} s\n"
        f"    plan {facts['traffic']:,} B (exact: {facts['exact']}, {facts['again']} run again, moved {facts['moved']:,} B), cache {facts['lru_traffic']:,} B, "
        f"ratio {facts['lru_traffic'] / max(1, facts['traffic']):.2f}, at most {facts['lru_traffic'] / bound(within.work, facts['budget']):.2f} if nothing runs again; largest difference of loss {np.abs(losses - found).max():.1e}; "
        f"epoch {seconds[0]:.3f} s without, {seconds[1]:.3f} s within",
        flush=True,
    )

"""Traffic of a memory plan against that of an LRU cache, within a quarter of the need.

    python benchmarks/gnn_memory.py --scale 18 --degree 16 --features 64 --hidden 64

The need is the smaller of two numbers: the compiler's bytes of the ordinary step, arguments and
temporaries; and those of the plan's operators with all tensors on the device, uncut. Where the
share of it is less than the smallest possible budget, the budget is that one, and the output tells
its share. The cache runs the same operators on the same tiles in the same order.
"""

import argparse
import os
import re
import statistics
import time
from typing import NamedTuple

os.environ.setdefault("KERAS_BACKEND", "jax")
import keras
import numpy as np

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn.nn.models import MODELS
from partita.gnn.spill.plan import plan_memory, traffic_bound


class Trained(NamedTuple):
    """A model, and the losses of its epochs."""

    model: gnn.GraphModel
    losses: np.ndarray


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A memory plan against an LRU cache.")
    parser.add_argument("--models", nargs="+", default=["gcn", "sage"])
    parser.add_argument("--scale", type=int, default=14)
    parser.add_argument("--degree", type=int, default=8)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--share", type=float, default=0.25, help="Share of the need.")
    return parser.parse_args()


arguments = arguments_of()


def random_graph() -> gnn.Graph:
    random = np.random.default_rng(0)
    vertices = 2**arguments.scale
    sources, targets = random.integers(0, vertices, (2, vertices * arguments.degree))
    return gnn.Graph.from_edges(
        sources,
        targets,
        vertices,
        features=random.standard_normal((vertices, arguments.features), np.float32),
        labels=random.integers(0, 8, vertices),
        train=np.arange(vertices // 2),
    )


graph = random_graph()


def trained(name: str, memory: int | None, epochs: int) -> Trained:
    """A model trained from the same seed."""
    keras.utils.set_random_seed(0)
    model = MODELS[name](hidden=arguments.hidden, classes=8, layers=arguments.layers)
    model.compile(keras.optimizers.Adam(0.01))
    history = model.fit(graph, epochs, verbose=0, memory=memory).history
    return Trained(model, np.array(history["loss"]))


def ordinary_bytes(model: gnn.GraphModel) -> int:
    """Bytes of the ordinary step, by its compiler."""
    run = model._graph_trainer.on_devices(graph, "train")
    program = run.steps.train(run.prepared).lower(run.state(), run.prepared.data).compile()
    analysis = program.memory_analysis()
    arguments_and_results = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    return arguments_and_results + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes


def within(name: str, budget: int) -> Trained:
    """A model trained within a budget, or within the smallest possible one."""
    try:
        return trained(name, budget, arguments.epochs)
    except GraphError as error:
        smallest = re.search(r'memory="(\d+) B"', str(error))
        assert smallest is not None, error
        return trained(name, int(smallest[1]), arguments.epochs)


def compare(name: str) -> None:
    """Prints the traffic of a model's plan and of the cache."""
    alone = trained(name, None, arguments.epochs)
    step_bytes = ordinary_bytes(alone.model)
    uncut_bytes = trained(name, 2**50, 1).model.memory.facts()["need"]
    need = min(step_bytes, uncut_bytes)
    planned = within(name, int(need * arguments.share))
    run = planned.model.memory
    facts = run.facts()
    budget = facts["budget"]
    seconds_alone, seconds_within = (
        statistics.median(model.epoch_seconds[2:]) for model in (alone.model, planned.model)
    )
    began = time.perf_counter()
    plan_memory(run.work, budget, 1e9)
    planning_seconds = time.perf_counter() - began
    ratio = facts["lru_traffic"] / max(1, facts["traffic"])
    most = facts["lru_traffic"] / traffic_bound(run.work, budget)
    difference = np.abs(alone.losses - planned.losses).max()
    print(
        f"{name}: ordinary step {step_bytes:,} B, need uncut {uncut_bytes:,} B; "
        f"always allocated {run.work.fixed:,} B, "
        f"smallest budget {facts['least']:,} B ({facts['least'] / need:.0%}); "
        f"budget {budget:,} B ({budget / need:.0%}); "
        f"{facts['operators']} operators on {len(run.work.bytes)} tiles, "
        f"planned in {planning_seconds:.1f} s\n"
        f"    plan {facts['traffic']:,} B (exact: {facts['exact']}, "
        f"{facts['again']} rematerializations, moved {facts['moved']:,} B), "
        f"cache {facts['lru_traffic']:,} B, ratio {ratio:.2f}, "
        f"at most {most:.2f} without rematerialization; "
        f"largest difference of loss {difference:.1e}; "
        f"epoch {seconds_alone:.3f} s without, {seconds_within:.3f} s within",
        flush=True,
    )


for name in arguments.models:
    compare(name)

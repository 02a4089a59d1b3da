"""A GATv2 layer, forward and backward, against PyG's with the same weights, by turns.

Run: python benchmarks/gnn_attention.py --peer FOLDER, where FOLDER has torch and torch_geometric
(`pip install --target FOLDER torch torch_geometric`). Both compute the result and the gradients of
its inputs and weights in one process with all cores. The figures are medians of elapsed time and of
the time of the processor, and the largest difference of the results.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np


def partita_turn(layer: Any, edges: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray]:
    """A function that runs Partita's layer in both directions and returns its result."""
    import jax
    import jax.numpy as jnp

    from partita import gnn
    from partita.gnn.kernels.bridge import step_options
    from partita.gnn.nn.block import block_of

    block = jax.device_put(block_of(gnn.Graph.from_edges(edges[0], edges[1], len(x))))
    weights = [variable.value for variable in layer.trainable_variables]

    def loss(weights: Any, x: Any, block: Any) -> Any:
        y = layer.stateless_call(weights, [], x, graph=block)[0]
        return jnp.sum(y**2), y

    differentiated = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    step = jax.jit(differentiated, compiler_options=step_options())
    device_x = jax.device_put(x)

    def turn() -> np.ndarray:
        (_, y), _ = jax.block_until_ready(step(weights, device_x, block))
        return np.asarray(y)

    return turn


def peer_turn(module: Any, edges: np.ndarray, x: np.ndarray) -> Callable[[], np.ndarray]:
    """The same of PyG's layer."""
    import torch

    device_edges = torch.tensor(edges)
    device_x = torch.tensor(x).requires_grad_()

    def turn() -> np.ndarray:
        device_x.grad = None
        module.zero_grad()
        y = module(device_x, device_edges)
        (y**2).sum().backward()
        return y.detach().numpy()

    return turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="folders with torch and torch_geometric", default="")
    parser.add_argument("--vertices", type=int, default=100_000)
    parser.add_argument("--edges", type=int, default=1_000_000)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--features", type=int, default=64, help="of all heads, and of the input")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    sys.path += [folder for folder in arguments.peer.split(":") if folder]
    from torch_geometric.nn import GATv2Conv

    from partita import gnn

    random = np.random.default_rng(0)
    features, heads = arguments.features, arguments.heads
    edges = random.integers(0, arguments.vertices, (2, arguments.edges))
    x = random.standard_normal((arguments.vertices, features)).astype(np.float32)
    layer = gnn.GATv2Conv(features, heads, head_bias=True)
    layer.build((None, features))
    module = GATv2Conv(features, features // heads, heads)
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    gnn.load_pyg_state(layer, state)
    turns = {"Partita": partita_turn(layer, edges, x), "PyG": peer_turn(module, edges, x)}
    results = {name: turn() for name, turn in turns.items()}
    elapsed: dict[str, list[float]] = {name: [] for name in turns}
    processor: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(arguments.turns):
        for name, turn in turns.items():
            began, processor_began = time.perf_counter(), time.process_time()
            turn()
            elapsed[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - processor_began)
    for title, seconds in (("elapsed", elapsed), ("processor", processor)):
        ours, theirs = (statistics.median(seconds[name]) for name in ("Partita", "PyG"))
        print(f"{title:10} Partita {ours:.3f} s, PyG {theirs:.3f} s: {theirs / ours:.2f} x")
    largest = np.abs(results["Partita"] - results["PyG"]).max()
    print(f"largest difference {largest / np.abs(results['PyG']).max():.1e}")


if __name__ == "__main__":
    main()

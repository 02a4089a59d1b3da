"""Layers against PyG's with its weights: outputs and gradients, alone, on devices, within memory.

Run: python benchmarks/gnn_parity.py --peer FOLDER, where FOLDER has torch and torch_geometric
(`pip install --target FOLDER torch torch_geometric`). Random directed graphs have repeated edges,
repeated self edges and isolated vertices. The table gives the largest difference, relative to the
largest number of the result.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

from partita.execute.devices import request_cpu_devices

VERTICES, EDGES, FEATURES, UNITS = 60, 400, 12, 8
PARTS = (1, 2, 3, 4)


def random_edges(seed: int) -> np.ndarray:
    """[2, edges]: some vertices are isolated, some edges and self edges repeat."""
    random = np.random.default_rng(seed)
    edges = random.integers(0, VERTICES - 5, (2, EDGES))
    repeated = edges[:, :20]
    self_edges = np.array([[3, 3, 7], [3, 3, 7]])
    return np.concatenate([edges, repeated, self_edges], axis=1)


def pairs() -> Iterator[tuple[str, Any, Any, bool]]:
    """(name, layer, PyG's module, whether edges have weights) of every layer and option."""
    import torch
    from torch_geometric import nn

    from partita import gnn

    for weighted in (False, True):
        for ours, theirs in (
            ({}, {}),
            ({"self_edges": False}, {"add_self_loops": False}),
            ({"normalize": False}, {"normalize": False}),
        ):
            layer = gnn.GCNConv(UNITS, **ours)
            yield f"GCNConv {ours}", layer, nn.GCNConv(FEATURES, UNITS, **theirs), weighted
    for aggregation in ("mean", "max", "sum"):
        for options in ({}, {"normalize": True}, {"project": True}):
            layer = gnn.SAGEConv(UNITS, aggregation, **options)
            module = nn.SAGEConv(FEATURES, UNITS, aggr=aggregation, **options)
            yield f"SAGEConv {aggregation} {options}", layer, module, False
    inner = torch.nn.Sequential(
        torch.nn.Linear(FEATURES, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, UNITS)
    )
    yield "GINConv", gnn.GINConv(UNITS), nn.GINConv(inner, train_eps=True), False
    for ours, theirs in (
        ({}, {}),
        ({"self_edges": False}, {"add_self_loops": False}),
        ({"residual": True}, {"residual": True}),
    ):
        for concat in (True, False):
            layer = gnn.GATv2Conv(UNITS, 2, concat=concat, head_bias=True, **ours)
            width = UNITS // 2 if concat else UNITS
            module = nn.GATv2Conv(FEATURES, width, heads=2, concat=concat, **theirs)
            yield f"GATv2Conv {ours} concat={concat}", layer, module, False
    for weighted in (False, True):
        layer = gnn.GatedGraphConv(16, 2)
        yield "GatedGraphConv", layer, nn.GatedGraphConv(16, 2), weighted


def peer_results(module: Any, x: np.ndarray, edges: np.ndarray, weights: Any, factor: Any) -> Any:
    """(output, gradients by name) of a module for the loss sum(sin(output) * factor)."""
    import torch

    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    arguments = [torch.tensor(x), torch.tensor(edges)]
    if weights is not None:
        arguments.append(torch.tensor(weights))
    output = module(*arguments)
    (torch.sin(output) * torch.tensor(factor)).sum().backward()
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters()}
    return output.detach().numpy(), gradients


def network_of(layer: Any, units: int) -> Any:
    """A model of one layer."""
    from partita import gnn
    from partita.gnn.nn.models import LayerStage

    class Network(gnn.GraphModel):
        def __init__(self) -> None:
            super().__init__(classes=units, layers=0)
            self.layer = layer

        def build(self, input_shape: Any) -> None:
            self.layer.build(input_shape)
            self.built = True

        def stages(self) -> list[Any]:
            return [LayerStage(None, self.layer)]

    return Network()


def largest_difference(layer: Any, module: Any, weighted: bool, seed: int) -> float:
    """Largest relative difference of outputs and gradients over parts and a memory plan."""
    import jax.numpy as jnp
    import keras

    from partita import gnn

    random = np.random.default_rng(seed)
    edges = random_edges(seed)
    x = random.standard_normal((VERTICES, FEATURES)).astype(np.float32)
    weights = (0.5 + random.random(edges.shape[1])).astype(np.float32) if weighted else None
    units = layer.units
    factor = random.standard_normal((VERTICES, units)).astype(np.float32)
    expected, gradients = peer_results(module, x, edges, weights, factor)
    everything = np.ones(VERTICES, bool)
    graph = gnn.Graph.from_edges(
        *edges, VERTICES, features=x, labels=factor, train=everything, weights=weights
    )

    def loss(labels: Any, rows: Any) -> Any:
        return (jnp.sin(rows) * labels).sum(axis=1) * VERTICES

    largest = 0.0
    model = network_of(layer, units)
    model.build((None, FEATURES))
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    ways = [{"devices": parts} for parts in PARTS] + [{"memory": "56KiB"}]
    for way in ways:
        gnn.load_pyg_state(layer, state)
        model.compile(keras.optimizers.SGD(1.0), loss)
        model.fit(graph, epochs=0, verbose=0, **way)
        largest = max(largest, difference(model.predict(graph), expected))
        model.fit(graph, epochs=1, verbose=0, **way)
        for name, after in gnn.pyg_state(layer).items():
            step = state[name] - after
            largest = max(largest, difference(step, gradients[name]))
    return largest


def difference(given: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest expected number."""
    return float(np.abs(given - expected).max() / max(np.abs(expected).max(), 1e-6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="folders with torch and torch_geometric", default="")
    parser.add_argument("--seeds", type=int, default=1, help="random graphs per layer")
    arguments = parser.parse_args()
    sys.path += [folder for folder in arguments.peer.split(":") if folder]
    if importlib.util.find_spec("torch_geometric") is None:
        sys.exit("torch_geometric is not installed: give --peer a folder that has it.")
    request_cpu_devices(max(PARTS))
    for seed in range(arguments.seeds):
        for name, layer, module, weighted in pairs():
            value = largest_difference(layer, module, weighted, seed)
            print(f"{name:45} {'weights' if weighted else '':8} {value:.1e}", flush=True)


if __name__ == "__main__":
    main()

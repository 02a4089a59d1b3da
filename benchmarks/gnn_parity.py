"""Layers against PyG's with its weights: outputs and gradients, alone, on devices, within memory.

Run: python benchmarks/gnn_parity.py --peer FOLDER, where FOLDER has torch and torch_geometric
(`pip install --target FOLDER torch torch_geometric`). Random directed graphs have repeated edges,
repeated self edges and isolated vertices. PyG computes in float64. The table gives the largest
difference, relative to the largest number of the result, of Partita on 1, 2, 3 and 4 parts and
within memory plans on 1 and 2 parts, and of PyG itself in float32. Gradients of all weights of a
layer count as one result: the gradient of a single number, such as GIN's e, may be a sum that
cancels. The exit code is 1 if a difference of Partita exceeds LIMIT, or is no number.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import numpy as np

from partita.execute.devices import request_cpu_devices

VERTICES, EDGES, FEATURES, UNITS, EDGE_FEATURES = 60, 400, 12, 8, 3
PARTS = (1, 2, 3, 4)
LIMIT = 1e-5
"""Largest relative difference that is rounding."""


@dataclass(frozen=True)
class Case:
    """A layer or model and PyG's counterpart.

    edges       'none', 'weights', 'features' or 'relations' of the edges; 'ones': PyG takes weights
                of 1
    pair        whether PyG takes a pair of rows, and ours too
    """

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    edges: str = "none"
    pair: bool = False


@dataclass(frozen=True)
class Inputs:
    """A random graph, and a factor of each number of the result in the loss."""

    edges: np.ndarray
    x: np.ndarray
    factor: np.ndarray
    edge_values: dict[str, np.ndarray] = field(default_factory=dict)


def random_inputs(case: Case, units: int, seed: int) -> Inputs:
    """Some vertices are isolated, some edges and self edges repeat."""
    random = np.random.default_rng(seed)
    edges = random.integers(0, VERTICES - 5, (2, EDGES))
    self_edges = np.array([[3, 3, 7], [3, 3, 7]])
    edges = np.concatenate([edges, edges[:, :20], self_edges], axis=1)
    x = random.standard_normal((VERTICES, FEATURES)).astype(np.float32)
    factor = random.standard_normal((VERTICES, units)).astype(np.float32)
    count = edges.shape[1]
    values: dict[str, np.ndarray] = {}
    if case.edges == "weights":
        values["weights"] = (0.5 + random.random(count)).astype(np.float32)
    if case.edges == "features":
        features = random.standard_normal((count, EDGE_FEATURES))
        values["edge_features"] = features.astype(np.float32)
    if case.edges == "relations":
        kinds = random.integers(0, EDGE_FEATURES, count)
        values["edge_features"] = np.eye(EDGE_FEATURES, dtype=np.float32)[kinds]
    return Inputs(edges, x, factor, values)


def layer_cases() -> Iterator[Case]:
    """Every layer and option."""
    from torch_geometric import nn

    from partita import gnn

    for edges in ("none", "weights"):
        for ours, theirs in (
            ({}, {}),
            ({"self_edges": False}, {"add_self_loops": False}),
            ({"normalize": False}, {"normalize": False}),
            ({"improved": True}, {"improved": True}),
            ({"use_bias": False}, {"bias": False}),
        ):
            # PyG 2.8 ignores `improved` for edges without weights
            ones = "improved" in theirs and edges == "none"
            yield Case(
                f"GCNConv {theirs}",
                lambda ours=ours: gnn.GCNConv(UNITS, **ours),
                lambda theirs=theirs: nn.GCNConv(FEATURES, UNITS, **theirs),
                "ones" if ones else edges,
            )
    for aggregation in ("mean", "max", "sum"):
        for options in ({}, {"normalize": True}, {"project": True}, {"root_weight": False}):
            for pair in (False, True):
                yield Case(
                    f"SAGEConv {aggregation} {options}",
                    lambda a=aggregation, o=options: gnn.SAGEConv(UNITS, a, **o),
                    lambda a=aggregation, o=options, p=pair: nn.SAGEConv(
                        _inputs(p), UNITS, aggr=a, **o
                    ),
                    pair=pair,
                )
    yield from isomorphism_cases()
    yield from attention_cases()
    yield from relational_cases()
    for edges in ("none", "weights"):
        yield Case(
            "GatedGraphConv",
            lambda: gnn.GatedGraphConv(16, 2),
            lambda: nn.GatedGraphConv(16, 2),
            edges,
        )


def relational_cases() -> Iterator[Case]:
    from torch_geometric import nn

    from partita import gnn

    kinds = EDGE_FEATURES
    for aggregation in ("mean", "sum"):
        for bases, root in ((None, True), (2, True), (None, False)):
            yield Case(
                f"RGCNConv {aggregation} bases={bases} root_weight={root}",
                lambda a=aggregation, b=bases, r=root: gnn.RelationalConv(
                    UNITS, kinds, aggregation=a, bases=b, root_weight=r
                ),
                lambda a=aggregation, b=bases, r=root: nn.RGCNConv(
                    FEATURES, UNITS, kinds, num_bases=b, aggr=a, root_weight=r
                ),
                "relations",
            )


def _inputs(pair: bool) -> Any:
    return (FEATURES, FEATURES) if pair else FEATURES


def torch_network(width: int, norm: bool = False) -> Any:
    """Two dense layers with a ReLU between, as GIN takes them."""
    import torch

    layers: list[Any] = [torch.nn.Linear(FEATURES, width)]
    if norm:
        layers.append(torch.nn.BatchNorm1d(width, momentum=0.1))
    return torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(width, UNITS))


def own_network(width: int, norm: bool = False) -> list[Any]:
    """The same of Keras layers."""
    import keras

    from partita import gnn

    layers: list[Any] = [keras.layers.Dense(width)]
    if norm:
        layers.append(gnn.VertexBatchNormalization())
    return [*layers, keras.layers.ReLU(), keras.layers.Dense(UNITS)]


def isomorphism_cases() -> Iterator[Case]:
    from torch_geometric import nn

    from partita import gnn

    for pair in (False, True):
        yield Case(
            "GINConv {'train_eps': True}",
            lambda: gnn.GINConv(UNITS),
            lambda: nn.GINConv(torch_network(UNITS), train_eps=True),
            pair=pair,
        )
    for norm in (False, True):
        yield Case(
            f"GINConv own network, eps=0.3, norm={norm}",
            lambda norm=norm: gnn.GINConv(
                UNITS, mlp=own_network(20, norm), epsilon=0.3, train_epsilon=False
            ),
            lambda norm=norm: nn.GINConv(torch_network(20, norm), eps=0.3),
        )
    for pair in (False, True):
        yield Case(
            "GINEConv {'edge_dim': 3}",
            lambda: gnn.GINEConv(UNITS, edge_dim=EDGE_FEATURES),
            lambda: nn.GINEConv(torch_network(UNITS), train_eps=True, edge_dim=EDGE_FEATURES),
            "features",
            pair,
        )


def attention_cases() -> Iterator[Case]:
    from torch_geometric import nn

    from partita import gnn

    options: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
        ({}, {}, "none"),
        ({"self_edges": False}, {"add_self_loops": False}, "none"),
        ({"residual": True}, {"residual": True}, "none"),
        ({"negative_slope": 0.1}, {"negative_slope": 0.1}, "none"),
        ({"edge_dim": EDGE_FEATURES}, {"edge_dim": EDGE_FEATURES}, "features"),
        (
            {"edge_dim": EDGE_FEATURES, "self_edges": False},
            {"edge_dim": EDGE_FEATURES, "add_self_loops": False},
            "features",
        ),
    )
    for layer, module, own in (
        (gnn.GATv2Conv, nn.GATv2Conv, {"head_bias": True}),
        (gnn.GATConv, nn.GATConv, {}),
    ):
        for ours, theirs, edges in options:
            for concat, pair in ((True, False), (False, False), (True, True)):
                width = UNITS // 2 if concat else UNITS
                yield Case(
                    f"{layer.__name__} {theirs} concat={concat}",
                    lambda layer=layer, c=concat, o={**own, **ours}: layer(UNITS, 2, concat=c, **o),
                    lambda module=module, w=width, c=concat, o=theirs, p=pair: module(
                        _inputs(p), w, heads=2, concat=c, **o
                    ),
                    edges,
                    pair,
                )
    yield Case(
        "GATv2Conv {'share_weights': True}",
        lambda: gnn.GATv2Conv(UNITS, 2, head_bias=True, share_weights=True),
        lambda: nn.GATv2Conv(FEATURES, UNITS // 2, heads=2, share_weights=True),
    )


def model_cases() -> Iterator[Case]:
    """Models with normalization, jumping knowledge and one width per layer."""
    from torch_geometric.nn import models

    from partita import gnn

    for norm in (None, "batch"):
        for jk in (None, "cat", "max"):
            yield Case(
                f"GCN 3 layers norm={norm} jk={jk}",
                lambda norm=norm, jk=jk: gnn.GCN(16, UNITS, 3, 0.0, output=None, jk=jk, norm=norm),
                lambda norm=norm, jk=jk: models.GCN(FEATURES, 16, 3, UNITS, jk=jk, norm=norm),
            )
    yield Case(
        "SAGE 2 layers jk=cat",
        lambda: gnn.SAGE(16, UNITS, layers=2, dropout=0.0, output=None, jk="cat"),
        lambda: models.GraphSAGE(FEATURES, 16, 2, UNITS, jk="cat"),
    )


def torch_results(module: Any, case: Case, inputs: Inputs, number: Any) -> Any:
    """(output, gradients by name) of a module for the loss sum(sin(output) * factor)."""
    import torch

    module = copy.deepcopy(module).to(number)
    module.train()
    x = torch.tensor(inputs.x).to(number)
    arguments = [(x, 2 * x) if case.pair else x, torch.tensor(inputs.edges)]
    edge_values = list(inputs.edge_values.values())
    if case.edges == "relations":
        arguments.append(torch.tensor(edge_values.pop().argmax(axis=1)))
    if case.edges == "ones":
        edge_values.append(np.ones(inputs.edges.shape[1], np.float32))
    arguments += [torch.tensor(values).to(number) for values in edge_values]
    output = module(*arguments)
    (torch.sin(output) * torch.tensor(inputs.factor).to(number)).sum().backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        gradients[name] = parameter.grad.numpy()
    return output.detach().numpy(), gradients


def network_of(layer: Any, case: Case, units: int) -> Any:
    """A model of one layer."""
    from partita import gnn
    from partita.gnn.nn.stages import LayerStage

    class Network(gnn.GraphModel):
        def __init__(self) -> None:
            super().__init__(classes=units, layers=0)
            self.layer = layer

        def build(self, input_shape: Any) -> None:
            self.layer.build((input_shape, input_shape) if case.pair else input_shape)
            self.built = True

        def stages(self) -> list[Any]:
            if case.pair:
                return [lambda x, graph, training: self.layer((x, 2 * x), graph=graph)]
            return [LayerStage(None, self.layer)]

    return Network()


def randomized(module: Any, seed: int) -> Any:
    """A module with normally distributed weights."""
    import torch

    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    return module


def largest_differences(case: Case, seed: int) -> tuple[float, float]:
    """Largest relative differences over outputs and gradients: Partita in all ways, and PyG."""
    import jax.numpy as jnp
    import keras
    import torch

    from partita import gnn

    layer: Any = case.ours()
    is_model = isinstance(layer, gnn.GraphModel)
    units = UNITS if is_model else layer.units
    inputs = random_inputs(case, units, seed)
    module = randomized(case.theirs(), seed)
    model: Any = layer if is_model else network_of(layer, case, units)
    model.build((None, FEATURES))
    expected = torch_results(module, case, inputs, torch.float64)
    peer = difference(torch_results(module, case, inputs, torch.float32), expected)
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    graph = gnn.Graph.from_edges(
        inputs.edges[0],
        inputs.edges[1],
        VERTICES,
        features=inputs.x,
        labels=inputs.factor,
        train=np.ones(VERTICES, bool),
        **inputs.edge_values,
    )

    def loss(labels: Any, rows: Any) -> Any:
        return (jnp.sin(rows) * labels).sum(axis=1) * VERTICES

    largest = 0.0
    ways: list[dict[str, Any]] = [{"devices": parts} for parts in PARTS]
    ways += [{"memory": "4MiB"}, {"memory": "4MiB", "devices": 2}]
    model.compile(keras.optimizers.SGD(1.0), loss)
    for way in ways:
        gnn.load_pyg_state(layer, state)
        model.fit(graph, epochs=1, verbose=0, **way)
        after = gnn.pyg_state(layer)
        gradients = {name: state[name] - after[name] for name in expected[1]}
        output = None if has_statistics(state) else predicted(model, layer, state, graph)
        largest = max(largest, difference((output, gradients), expected))
    return largest, peer


def has_statistics(state: dict[str, Any]) -> bool:
    """Whether outputs in training differ from those in evaluation."""
    return any("running" in name for name in state)


def predicted(model: Any, layer: Any, state: Any, graph: Any) -> np.ndarray:
    """The output with the weights of a state."""
    from partita import gnn

    gnn.load_pyg_state(layer, state)
    return model.predict(graph)


def difference(given: Any, expected: Any) -> float:
    """Largest difference of outputs, and of all gradients, as a share of the largest number."""
    output, gradients = given
    expected_output, expected_gradients = expected
    flat = np.concatenate([gradients[name].ravel() for name in expected_gradients])
    expected_flat = np.concatenate([array.ravel() for array in expected_gradients.values()])
    largest = np.abs(flat - expected_flat).max() / np.abs(expected_flat).max()
    if output is None:
        return float(largest)
    of_output = np.abs(output - expected_output).max() / np.abs(expected_output).max()
    return float(max(largest, of_output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="folders with torch and torch_geometric", default="")
    parser.add_argument("--seeds", type=int, default=1, help="random graphs per layer")
    parser.add_argument("--only", default="", help="cases whose name has this text")
    arguments = parser.parse_args()
    sys.path += [folder for folder in arguments.peer.split(":") if folder]
    if importlib.util.find_spec("torch_geometric") is None:
        sys.exit("torch_geometric is not installed: give --peer a folder that has it.")
    request_cpu_devices(max(PARTS))
    print(f"{'case':66} {'Partita':>8} {'PyG':>8}")
    beyond = []
    for case in [*layer_cases(), *model_cases()]:
        if arguments.only not in case.name:
            continue
        results = [largest_differences(case, seed) for seed in range(arguments.seeds)]
        ours, peer = np.max(results, axis=0)
        name = f"{case.name}{' pair' if case.pair else ''}"
        edges = "" if case.edges == "none" else f"edge {case.edges}"
        print(f"{name:52} {edges:13} {ours:8.1e} {peer:8.1e}", flush=True)
        if not ours <= LIMIT:
            beyond.append(f"{name} {edges}".strip())
    if beyond:
        sys.exit(f"Beyond {LIMIT:.0e} of PyG: {', '.join(beyond)}.")


if __name__ == "__main__":
    main()

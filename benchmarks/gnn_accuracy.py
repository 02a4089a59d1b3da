"""Accuracy of graph networks over seeds, Partita's and, with --peer, PyG's of equal options.

    python benchmarks/gnn_accuracy.py cora.npz --seeds 20
    python benchmarks/gnn_accuracy.py cora.npz --task gat --seeds 10 --peer FOLDER
    python benchmarks/gnn_accuracy.py --task ppi --seeds 3 --peer FOLDER
    python benchmarks/gnn_accuracy.py cora.npz --task deep --seeds 5 --peer FOLDER

FOLDER has torch and torch_geometric (`pip install --target FOLDER torch torch_geometric`). Figures
are the mean and the deviation on the test mask after the last epoch, %.

| task | network |
|---|---|
| gcn | 2 layers of 16, dropout 0.5, Adam 0.01, 200 epochs (Kipf and Welling 2017, section 5.2) |
| gat | 8 heads of 8, dropout 0.6 of rows and attention, Adam 0.005, 200 epochs (Velickovic et al. 2018) |
| ppi | 3 layers of 64 GATv2, 4 heads, 12 labels per vertex of a generated graph, micro-F1 |
| deep | 8 layers of 32 with residuals, dropout 0.5, Adam 0.01, 200 epochs |

Features are divided by their sum. The weight decay of 5e-4 is on the first layer, for `gat` on all.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import partita.gnn as gnn

EPOCHS = 200
DECAY = 5e-4


def generated_ppi(seed: int = 0) -> gnn.Graph:
    """A graph of 3,000 vertices with 12 labels each, which depend on features of neighbours."""
    random = np.random.default_rng(seed)
    vertices, labels = 3000, 12
    source, target = random.integers(0, vertices, (2, 20 * vertices))
    features = random.standard_normal((vertices, 30)).astype(np.float32)
    sums = features.copy()
    np.add.at(sums, target, features[source] / np.sqrt(20))
    scores = sums @ random.standard_normal((30, labels)) + random.standard_normal(
        (vertices, labels)
    )
    part = random.integers(0, 10, vertices)
    return gnn.Graph.from_edges(
        source,
        target,
        vertices,
        features=features,
        labels=(scores > 2).astype(np.float32),
        train=part < 6,
        validation=(part >= 6) & (part < 8),
        test=part >= 8,
        name="ppi",
    )


def percent(graph: Any, rows: np.ndarray) -> float:
    """Accuracy, or micro-F1 of several labels, on the test mask, of logits."""
    labels, rows = graph.labels[graph.test], rows[graph.test]
    if labels.ndim == 1:
        return 100 * float((rows.argmax(axis=1) == labels).mean())
    given, expected = rows > 0, labels > 0
    hits = (given & expected).sum()
    return 100 * float(2 * hits / (given.sum() + expected.sum()))


# ------------------------------------------------------------------------------------- Partita


def own_network(task: str, classes: int) -> gnn.GraphModel:
    """The network of a task, with logits as its output."""
    if task == "gcn":
        return gnn.GCN(16, classes, dropout=0.5, l2=DECAY, output=None)
    if task == "gat":
        options = {"dropout": 0.6, "kernel_regularizer": keras.regularizers.L2(DECAY / 2)}
        return gnn.GAT(64, classes, heads=8, dropout=0.6, output=None, layer_options=options)
    if task == "ppi":
        return gnn.GATv2(
            64, classes, heads=4, layers=3, dropout=0.0, output=None, layer_options=HEAD_BIAS
        )
    return gnn.GCN(32, classes, layers=8, dropout=0.5, l2=DECAY, output=None, residual=True)


HEAD_BIAS = {"head_bias": True}
RATES = {"gcn": 0.01, "gat": 0.005, "ppi": 0.01, "deep": 0.01}
"""Learning rates of Adam."""


def own_result(task: str, graph: gnn.Graph, seed: int) -> float:
    """Percent after training Partita's network from a seed."""
    keras.utils.set_random_seed(seed)
    model = own_network(task, graph.classes)
    loss: Any = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if graph.has_targets:
        loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(RATES[task], epsilon=1e-8), loss)
    model.fit(graph, EPOCHS, validation_freq=EPOCHS, verbose=0)
    return percent(graph, model.predict(graph))


# ----------------------------------------------------------------------------------------- PyG


def peer_network(task: str, features: int, classes: int) -> Any:
    """PyG's network of a task: (module, layers that decay)."""
    import torch
    from torch.nn import functional
    from torch_geometric import nn

    rate = {"gcn": 0.5, "gat": 0.6, "ppi": 0.0, "deep": 0.5}[task]
    activation: Callable[[Any], Any] = (
        functional.relu if task in ("gcn", "deep") else functional.elu
    )

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = torch.nn.ModuleList(peer_layers(nn, task, features, classes))

        def forward(self, x: Any, edges: Any) -> Any:
            for i, conv in enumerate(self.convs):
                y = conv(functional.dropout(x, rate, self.training), edges)
                if i == len(self.convs) - 1:
                    return y
                y = activation(y)
                x = x + y if task == "deep" and x.shape == y.shape else y

    return Network()


def peer_layers(nn: Any, task: str, features: int, classes: int) -> list[Any]:
    if task == "gat":
        first = nn.GATConv(features, 8, heads=8, dropout=0.6)
        return [first, nn.GATConv(64, classes, heads=1, dropout=0.6)]
    if task == "ppi":
        middle = [nn.GATv2Conv(width, 16, heads=4) for width in (features, 64)]
        return [*middle, nn.GATv2Conv(64, classes, heads=1)]
    hidden = [16] if task == "gcn" else [32] * 7
    widths = [features, *hidden, classes]
    return [nn.GCNConv(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]


def peer_result(task: str, graph: gnn.Graph, seed: int) -> float:
    """Percent after training PyG's network from a seed."""
    import torch
    from torch.nn import functional

    torch.manual_seed(seed)
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    edges = torch.tensor(np.stack([graph.sources.astype(np.int64), targets]))
    x = torch.tensor(graph.features)
    train = torch.tensor(graph.train)
    labels = torch.tensor(graph.labels)
    module = peer_network(task, graph.feature_count, graph.classes)
    decayed = module.parameters() if task == "gat" else module.convs[0].parameters()
    others = [] if task == "gat" else module.convs[1:].parameters()
    decay = 0.0 if task == "ppi" else DECAY
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others}]
    optimizer = torch.optim.Adam([g for g in groups if g["params"] != []], lr=RATES[task])
    for _ in range(EPOCHS):
        module.train()
        optimizer.zero_grad()
        rows = module(x, edges)[train]
        if graph.has_targets:
            loss = functional.binary_cross_entropy_with_logits(rows, labels[train])
        else:
            loss = functional.cross_entropy(rows, labels[train].long())
        loss.backward()
        optimizer.step()
    module.eval()
    with torch.no_grad():
        return percent(graph, module(x, edges).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of graph networks over seeds.")
    parser.add_argument("graph", nargs="?", help="a graph with a public split; none for ppi")
    parser.add_argument("--task", choices=list(RATES), default="gcn")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--peer", help="folders with torch and torch_geometric", default="")
    arguments = parser.parse_args()
    sys.path += [folder for folder in arguments.peer.split(":") if folder]
    task = arguments.task
    graph = generated_ppi() if task == "ppi" else gnn.normalised(gnn.open(arguments.graph))
    results = {"Partita": own_result, **({"PyG": peer_result} if arguments.peer else {})}
    for name, result in results.items():
        values = []
        for seed in range(arguments.seeds):
            values.append(result(task, graph, seed))
            print(f"{name}, seed {seed}: {values[-1]:.1f}", flush=True)
        mean, deviation = np.mean(values), np.std(values)
        title = f"{graph.name}, {task}, {name}"
        print(f"{title}: {mean:.2f} +- {deviation:.2f} % over {len(values)} seeds", flush=True)


if __name__ == "__main__":
    main()

"""Link prediction against PyG: the same split, pairs and seeds, test AUC.

    python benchmarks/gnn_links.py cora.npz --seeds 3

A GCN of 128 and 64 features, 100 epochs of Adam (0.01), features divided by their sum, and other
pairs without an edge in every epoch. Without PyG, Partita alone is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np

from partita import gnn

import keras  # isort: skip  (after partita, which starts it on JAX)

HIDDEN, EMBEDDED, RATE = 128, 64, 0.01


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs in the right order (Mann and Whitney 1947)."""
    order = np.argsort(scores, kind="stable")
    ranks = np.empty(len(scores))
    _, first, counts = np.unique(scores[order], return_index=True, return_counts=True)
    ranks[order] = np.repeat(first + (counts + 1) / 2, counts)
    positive = labels == 1
    n_positive, n_negative = positive.sum(), (~positive).sum()
    wins = ranks[positive].sum() - n_positive * (n_positive + 1) / 2
    return float(wins / (n_positive * n_negative))


def ours(links: gnn.LinkSplit, seed: int, epochs: int) -> float:
    """Test AUC of Partita."""
    keras.utils.set_random_seed(seed)
    samples = links.samples(seed)
    model = gnn.GCN(HIDDEN, EMBEDDED, dropout=0.0, links=True, output=None)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(RATE, epsilon=1e-8), loss)
    for epoch in range(epochs):
        model.fit(links.samples(epoch), verbose=0)
    assert samples.test is not None and samples.labels is not None
    return auc(samples.labels[samples.test], model.predict(samples)[samples.test, 0])


def theirs(links: gnn.LinkSplit, seed: int, epochs: int) -> float:
    """Test AUC of PyG, on the same pairs."""
    import torch  # type: ignore[reportMissingImports]
    from torch_geometric.nn import GCNConv  # type: ignore[reportMissingImports]

    torch.manual_seed(seed)
    samples = links.samples(seed)
    graph = links.graph
    assert graph.features is not None and samples.labels is not None
    x = torch.tensor(np.asarray(graph.features))
    target = np.repeat(np.arange(graph.vertices), np.diff(graph.offsets))
    edges = torch.tensor(np.stack([graph.sources, target]), dtype=torch.long)
    first, last = GCNConv(x.shape[1], HIDDEN), GCNConv(HIDDEN, EMBEDDED)
    labels = torch.tensor(samples.labels[graph.vertices :], dtype=torch.float32)
    optimizer = torch.optim.Adam([*first.parameters(), *last.parameters()], RATE)

    def scores(samples: gnn.Graph) -> torch.Tensor:
        ends = samples.sources[graph.edges :].reshape(-1, 2)
        pairs = torch.tensor(ends.T, dtype=torch.long)
        embedded = last(first(x, edges).relu(), edges)
        return (embedded[pairs[0]] * embedded[pairs[1]]).sum(dim=1)

    assert samples.train is not None and samples.test is not None
    train = torch.tensor(samples.train[graph.vertices :])
    for epoch in range(epochs):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            scores(links.samples(epoch))[train], labels[train]
        )
        loss.backward()
        optimizer.step()
    test = samples.test[graph.vertices :]
    with torch.no_grad():
        return auc(labels.numpy()[test], scores(samples).numpy()[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=100)
    arguments = parser.parse_args()
    graph = gnn.normalised(gnn.open(arguments.graph))
    rows = []
    with_pyg = importlib.util.find_spec("torch_geometric") is not None
    for seed in range(arguments.seeds):
        links = gnn.split_links(graph, seed=seed)
        row = {"seed": seed, "partita": ours(links, seed, arguments.epochs)}
        if with_pyg:
            row["pyg"] = theirs(links, seed, arguments.epochs)
        rows.append(row)
        print(json.dumps(row), flush=True)
    for name in rows[0].keys() - {"seed"}:
        values = np.array([row[name] for row in rows])
        print(f"{name}: test AUC {values.mean():.4f} +- {values.std():.4f}")


if __name__ == "__main__":
    main()

"""Accuracy of a 2-layer GCN on a graph with a public split, mean and deviation over seeds.

    python benchmarks/gnn_accuracy.py cora.npz --seeds 20

As published (Kipf and Welling 2017, section 5.2): 16 hidden units, dropout 0.5, Adam 0.01, weight
decay 5e-4 on the first layer, features divided by their sum, 200 epochs, weights of the last epoch,
accuracy on the test mask. Published: Cora 81.5, Citeseer 70.3.
"""

import argparse
import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

import partita.gnn as gnn


def test_accuracy(graph: gnn.Graph, seed: int) -> float:
    """Accuracy on the test mask after training from a seed, %."""
    keras.utils.set_random_seed(seed)
    model = gnn.GCN(16, graph.classes, dropout=0.5, l2=5e-4)
    model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    model.fit(graph, 200, validation_freq=200, verbose=0)
    return 100 * model.evaluate(graph, return_dict=True)["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy of a 2-layer GCN over seeds.")
    parser.add_argument("graph")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    graph = gnn.normalised(gnn.open(arguments.graph))
    accuracies = []
    for seed in range(arguments.seeds):
        accuracies.append(test_accuracy(graph, seed))
        print(f"seed {seed}: {accuracies[-1]:.1f}", flush=True)
    mean, deviation = np.mean(accuracies), np.std(accuracies)
    print(f"{graph.name}: {mean:.2f} +- {deviation:.2f} % over {arguments.seeds} seeds")


if __name__ == "__main__":
    main()

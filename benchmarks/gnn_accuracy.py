"""Accuracy of a 2-layer GCN on a graph with a public split, over seeds: mean and standard deviation on the test mask.

    python benchmarks/gnn_accuracy.py cora.npz --seeds 20

As published (Kipf and Welling 2017, section 5.2): 16 hidden units, dropout 0.5, Adam 0.01, weight decay 5e-4 on the first layer,
features divided by their sum, 200 epochs, weights of the last epoch. Published: Cora 81.5, Citeseer 70.3.
"""

import argparse
import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np

import partita.gnn as gnn

parser = argparse.ArgumentParser(description="Accuracy of a 2-layer GCN over seeds.")
parser.add_argument("graph")
parser.add_argument("--seeds", type=int, default=20)
arguments = parser.parse_args()

graph = gnn.normalised(gnn.open(arguments.graph))
accuracies = []
for seed in range(arguments.seeds):
    keras.utils.set_random_seed(seed)
    model = gnn.GCN(16, graph.classes, dropout=0.5, l2=5e-4)
    model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    model.fit(graph, 200, validation_freq=200, verbose=0)
    accuracies.append(100 * model.evaluate(graph, return_dict=True)["accuracy"])
    print(f"seed {seed}: {accuracies[-1]:.1f}", flush=True)
print(
    f"{graph.name}: {np.mean(accuracies):.2f} +- {np.std(accuracies):.2f} % over {arguments.seeds} seeds"
)

"""Semi-supervised training on a whole graph: handwritten digits, each linked to those that look most like it, a few of them labelled.

python examples/train_digits_graph.py
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import kneighbors_graph

import partita.gnn as gnn
from partita.execute.devices import request_cpu_devices

PER_CLASS, NEIGHBOURS = 5, 8


def digits() -> gnn.Graph:
    """1,797 images, an edge to each from the 8 nearest; 5 of every digit are labelled, 20 validate, the rest is for the test."""
    found = load_digits()
    images, labels = found.data / 16, found.target
    nearest = kneighbors_graph(images, NEIGHBOURS).tocoo()
    turn = np.random.default_rng(0).permutation(len(labels))
    of_class = [turn[labels[turn] == digit] for digit in range(10)]
    train, rest = (
        np.concatenate([c[piece] for c in of_class])
        for piece in (slice(PER_CLASS), slice(PER_CLASS, None))
    )
    return gnn.Graph.from_edges(
        nearest.col,
        nearest.row,
        features=images,
        labels=labels,
        train=train,
        validation=rest[::8],
        test=np.delete(rest, np.s_[::8]),
        name="digits",
    )


def main() -> None:
    request_cpu_devices(2)  # on a CPU: two virtual devices; changes nothing about accelerators
    graph = digits()
    print(graph)
    alone = LogisticRegression(max_iter=1000).fit(
        graph.features[graph.train], graph.labels[graph.train]
    )
    print(
        f"without edges, a linear classifier: {alone.score(graph.features[graph.test], graph.labels[graph.test]):.1%}"
    )
    for devices in (1, 2):
        keras.utils.set_random_seed(0)
        model = gnn.SAGE(hidden=64, classes=10)
        model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
        history = model.fit(graph, epochs=100, devices=devices, verbose=0).history
        accuracy = model.evaluate(graph, return_dict=True)["accuracy"]
        print(
            f"on {devices} device{'s' if devices > 1 else ''}: loss {history['loss'][-1]:.3f}, accuracy {accuracy:.1%}"
        )
    parts = model.parts
    print(
        f"each part fetches {parts.fetched.tolist()} rows of the other; {model.traffic(graph):,} bytes a step go between them"
    )


if __name__ == "__main__":
    main()

"""Semi-supervised training on a whole graph: handwritten digits, linked to similar ones.

python examples/train_digits_graph.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import kneighbors_graph

import partita.gnn as gnn
from partita.execute.devices import request_cpu_devices

LABELLED_PER_DIGIT = 5
NEIGHBOURS = 8


def digits_graph() -> gnn.Graph:
    """1,797 images, each with edges from its 8 nearest.

    5 images of every digit train, an eighth of the rest validates, the others test.
    """
    digits = load_digits()
    images = digits.data / 16
    nearest = kneighbors_graph(images, NEIGHBOURS).tocoo()
    shuffled = np.random.default_rng(0).permutation(len(images))
    by_digit = [shuffled[digits.target[shuffled] == digit] for digit in range(10)]
    train = np.concatenate([vertices[:LABELLED_PER_DIGIT] for vertices in by_digit])
    rest = np.concatenate([vertices[LABELLED_PER_DIGIT:] for vertices in by_digit])
    return gnn.Graph.from_edges(
        nearest.col,
        nearest.row,
        features=images,
        labels=digits.target,
        train=train,
        validation=rest[::8],
        test=np.delete(rest, np.s_[::8]),
        name="digits",
    )


def linear_accuracy(graph: gnn.Graph) -> float:
    """Test accuracy of a linear classifier, which ignores the edges."""
    classifier = LogisticRegression(max_iter=1000)
    classifier.fit(graph.features[graph.train], graph.labels[graph.train])
    return classifier.score(graph.features[graph.test], graph.labels[graph.test])


def train(graph: gnn.Graph, devices: int) -> gnn.GraphModel:
    """A model trained on some devices; prints its loss and test accuracy."""
    keras.utils.set_random_seed(0)
    model = gnn.SAGE(hidden=64, classes=10)
    model.compile(keras.optimizers.Adam(0.01), metrics=["accuracy"])
    loss = model.fit(graph, epochs=100, devices=devices, verbose=0).history["loss"][-1]
    accuracy = model.evaluate(graph, return_dict=True)["accuracy"]
    print(f"{devices} device{'s' if devices > 1 else ''}: loss {loss:.3f}, accuracy {accuracy:.1%}")
    return model


def main() -> None:
    request_cpu_devices(2)  # on a CPU: two virtual devices
    graph = digits_graph()
    print(graph)
    print(f"linear classifier without edges: accuracy {linear_accuracy(graph):.1%}")
    train(graph, devices=1)
    model = train(graph, devices=2)
    print(f"rows that each part fetches: {model.parts.fetched.tolist()}")
    print(f"traffic per step: {model.traffic(graph):,} bytes")


if __name__ == "__main__":
    main()

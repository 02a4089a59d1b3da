"""Decision trees as lists of numbers: walked in Python, written as readable JSON.

scikit-learn fits them (the extra `partita[manage]`); a fitted tree needs NumPy only. A walk costs a
few microseconds, less than a call of scikit-learn for one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.errors import PartitaError

LEAF = -1


@dataclass(frozen=True)
class DecisionTree:
    """A binary tree over features; node 0 is the root."""

    features: tuple[int, ...]
    """[node]: the feature that it compares; LEAF for a leaf."""
    thresholds: tuple[float, ...]
    """[node]: a feature of at most this goes left."""
    left: tuple[int, ...]
    right: tuple[int, ...]
    labels: tuple[int, ...]
    """[node]: the most frequent label of its examples."""
    shares: tuple[float, ...]
    """[node]: the share of that label."""

    def leaf(self, row: Sequence[float]) -> int:
        """The leaf that a row of features comes to."""
        node = 0
        while self.features[node] != LEAF:
            goes_left = row[self.features[node]] <= self.thresholds[node]
            node = self.left[node] if goes_left else self.right[node]
        return node


def fit_tree(rows: np.ndarray, labels: np.ndarray, least: int = 2) -> DecisionTree:
    """The classification tree of examples.

    Args:
        rows: [example, feature].
        labels: [example].
        least: Examples of the smallest leaf.

    Raises:
        PartitaError: scikit-learn is not installed.
    """
    try:
        from sklearn.tree import DecisionTreeClassifier
    except ImportError:
        raise PartitaError(
            "Imitation learning needs scikit-learn, which is not installed: run pip install "
            "'partita[manage]', or name other policies."
        ) from None
    classifier = DecisionTreeClassifier(min_samples_leaf=least, random_state=0)
    classifier.fit(rows, labels)
    tree = classifier.tree_
    counts = tree.value[:, 0, :]
    return DecisionTree(
        features=tuple(int(f) if f >= 0 else LEAF for f in tree.feature),
        thresholds=tuple(float(threshold) for threshold in tree.threshold),
        left=tuple(int(node) for node in tree.children_left),
        right=tuple(int(node) for node in tree.children_right),
        labels=tuple(int(classifier.classes_[label]) for label in counts.argmax(1)),
        shares=tuple(float(share) for share in counts.max(1) / counts.sum(1)),
    )

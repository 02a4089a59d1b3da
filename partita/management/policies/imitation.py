"""Imitation of the oracle by a decision tree (`learning`).

Near the oracle on programs that it was trained on; several percent off on others. Where the program
is known, `schedule` is better and needs no training.
"""

from __future__ import annotations

from partita.management.action import Setting
from partita.management.features import features_of
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.tree import DecisionTree
from partita.management.workload import Workload


class Imitation(Policy):
    """The setting that a tree predicts the oracle to choose."""

    name = "imitation"

    def __init__(self, tree: DecisionTree, workload: Workload) -> None:
        self.tree = tree
        self.workload = workload

    def decide(self, observation: Observation) -> Setting:
        row = features_of(observation, self.workload)
        label = self.tree.labels[self.tree.leaf(row)]
        return self.workload.hardware.settings[label]

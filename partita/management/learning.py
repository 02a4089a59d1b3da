"""Imitation learning by DAgger (Ross, Gordon, Bagnell, AISTATS 2011).

The first examples are the states of the oracle's own runs. In later rounds the tree runs, the
oracle labels the states that the tree got into, and a new tree is fitted to all examples. The
oracle is that of the simulated hardware as described: training needs no measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.management.action import Setting
from partita.management.features import features_of
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.policies.imitation import Imitation
from partita.management.power import run_policy
from partita.management.schedule import FixedSchedule, best_schedule
from partita.management.tree import DecisionTree, fit_tree
from partita.management.workload import Workload

ROUNDS = 6


class _Recorded(Policy):
    """A policy whose states are written down with the oracle's decisions."""

    name = "recorded"

    def __init__(self, policy: Policy, oracle: FixedSchedule, workload: Workload) -> None:
        self.policy = policy
        self.oracle = oracle
        self.workload = workload
        self.rows: list[list[float]] = []
        self.labels: list[int] = []

    def decide(self, observation: Observation) -> Setting:
        self.rows.append(features_of(observation, self.workload))
        self.labels.append(self.oracle.decide(observation).index)
        return self.policy.decide(observation)


@dataclass(frozen=True)
class Imitated:
    """A tree, and the ranges of the features of its examples."""

    tree: DecisionTree
    ranges: tuple[tuple[float, float], ...]


def dagger(workloads: Sequence[Workload]) -> Imitated:
    """The tree that imitates the oracles of some workloads of one machine.

    PartitaError if scikit-learn is not installed.
    """
    oracles = [FixedSchedule(best_schedule(workload)) for workload in workloads]
    rows: list[list[float]] = []
    labels: list[int] = []
    tree: DecisionTree | None = None
    for _ in range(ROUNDS):
        for workload, oracle in zip(workloads, oracles, strict=True):
            policy: Policy = oracle
            if tree is not None:
                policy = Imitation(tree, workload)
            recorded = _Recorded(policy, oracle, workload)
            run_policy(workload, recorded)
            rows += recorded.rows
            labels += recorded.labels
        tree = fit_tree(np.array(rows), np.array(labels))
    assert tree is not None
    examples = np.array(rows)
    limits = zip(examples.min(0), examples.max(0), strict=True)
    return Imitated(tree, tuple((float(low), float(high)) for low, high in limits))

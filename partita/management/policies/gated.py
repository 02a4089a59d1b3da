"""Imitation that asks the simulator when it is unsure.

It is unsure outside the range of its examples, and in leaves of mixed labels. This is no statement
of probability: a new program is not drawn from those of the training.
"""

from __future__ import annotations

from collections.abc import Sequence

from partita.management.action import Setting
from partita.management.features import features_of
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.policies.imitation import Imitation
from partita.management.schedule import Schedule

SURE = 0.9
"""Share of a leaf's most frequent label from which it is followed."""


class Gated(Policy):
    """Imitation where it is sure, else the simulator's schedule."""

    name = "gated"

    def __init__(
        self, imitation: Imitation, schedule: Schedule, ranges: Sequence[tuple[float, float]]
    ) -> None:
        """`ranges`: [feature], least and greatest value of the examples."""
        self.imitation = imitation
        self.schedule = schedule
        self.ranges = ranges

    def decide(self, observation: Observation) -> Setting:
        imitation = self.imitation
        row = features_of(observation, imitation.workload)
        known = all(
            low <= value <= high for value, (low, high) in zip(row, self.ranges, strict=True)
        )
        if known and imitation.tree.shares[imitation.tree.leaf(row)] >= SURE:
            return imitation.decide(observation)
        return self.schedule.settings[observation.coming]

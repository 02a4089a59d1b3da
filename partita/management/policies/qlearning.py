"""Tabular Q-learning, a baseline (Watkins 1989): it learns from rewards, without an oracle.

State: arithmetic intensity and utilization in bins. Actions: 24 settings. Reward: minus E + w T of
the snippet, over the time of its work at fixed rates.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from partita.management.action import Setting
from partita.management.features import intensity
from partita.management.hardware import Hardware
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.workload import Workload

DISCOUNT = 0.1
LEAST_RATE = 0.05
"""Of learning; the rate of a pair seen n times is 1 / n, but at least this."""
State = tuple[int, bool]


class QLearning(Policy):
    """Q-learning over a coarse table. One policy learns over all runs that it is used in."""

    name = "qlearning"

    def __init__(self, hardware: Hardware, seed: int = 0) -> None:
        self.hardware = hardware
        self.actions = _actions(hardware)
        self.table: dict[State, np.ndarray] = {}
        self.visits: dict[tuple[State, int], int] = {}
        self.explore = 0.3
        self.generator = np.random.default_rng(seed)
        self.last: tuple[State, int] | None = None
        self.workload: Workload | None = None

    def starting(self, workload: Workload, explore: float) -> QLearning:
        """This policy at the start of a run."""
        self.workload = workload
        self.explore = explore
        self.last = None
        return self

    def decide(self, observation: Observation) -> Setting:
        assert self.workload is not None
        coming = self.workload.snippets[observation.coming]
        state = int(intensity(coming.flops, coming.nbytes) * 4), coming.works
        values = self.table.setdefault(state, np.zeros(len(self.actions)))
        if self.last is not None and not observation.is_first:
            self._reward(observation, float(values.max()))
        action = int(values.argmax())
        if self.generator.random() < self.explore:
            action = int(self.generator.integers(len(self.actions)))
        self.last = state, action
        return self.actions[action]

    def _reward(self, observation: Observation, best_next: float) -> None:
        assert self.last is not None
        state, action = self.last
        cost = (observation.watts + observation.mean_watts) * observation.seconds
        # Seconds of the work at rates of a middling setting make snippets comparable.
        work_seconds = max(0.02, observation.flops / 1.5e10 + observation.nbytes / 5e9)
        visits = self.visits[self.last] = self.visits.get(self.last, 0) + 1
        rate = max(LEAST_RATE, 1 / visits)
        target = -cost / work_seconds + DISCOUNT * best_next
        self.table[state][action] += rate * (target - self.table[state][action])


def _actions(hardware: Hardware) -> list[Setting]:
    """Coarse settings: 1, half or all devices of the fastest cluster at four points, the others
    off or all at their highest."""
    fastest = hardware.fastest
    cluster = hardware.clusters[fastest]
    counts = sorted({1, max(1, cluster.devices // 2), cluster.devices})
    points = sorted({round(k * (len(cluster.frequencies) - 1) / 3) for k in range(4)})
    settings: dict[int, Setting] = {}
    for count, point, others in product(counts, points, (False, True)):
        active = []
        chosen = []
        for number, one in enumerate(hardware.clusters):
            is_fastest = number == fastest
            active.append(count if is_fastest else one.devices * others)
            chosen.append(point if is_fastest else len(one.frequencies) - 1)
        try:
            setting = hardware.find(active, chosen)
        except KeyError:
            continue  # large clusters have no single devices
        settings[setting.index] = setting
    return list(settings.values())

"""Settings per snippet with the least energy-delay product: by the description, or clairvoyant.

For given watts w, the product E x T of a run is least where every snippet minimizes E + w T with
w = E / T of the run (the gradient of E x T is T dE + E dT). Heat adds leakage and throttling, which
this ignores, so runs with lower highest frequencies and other weights w are simulated too, and the
best run counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.management.action import Setting
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.power import run_policy
from partita.management.workload import Workload

WEIGHTS = (0.35, 0.5, 0.7, 1.0, 1.4)
"""Tried factors on w."""
STARTS = (0.1, 1.0, 10.0, 100.0)
"""Watts that the search for w starts from, relative to the mean power of all settings."""
ROUNDS = 20
MUCH_WORSE = 1.25
"""Times the least product without heat from which a single setting is not simulated."""


@dataclass(frozen=True)
class Schedule:
    """Settings per snippet of the pass, and the rule that they follow."""

    settings: tuple[Setting, ...]
    weight: float = 1.0
    """Factor on the watts w that a second costs."""
    highest: int | None = None
    """The highest operating point of the fastest cluster that the rule uses."""


class FixedSchedule(Policy):
    """A setting per snippet of the pass."""

    name = "fixed"

    def __init__(self, schedule: Schedule) -> None:
        self.settings = schedule.settings

    def decide(self, observation: Observation) -> Setting:
        return self.settings[observation.coming]


def best_schedule(workload: Workload, candidates: Sequence[Schedule] = ()) -> Schedule:
    """The schedule with the least E x T of the run with heat.

    candidates: Other schedules to choose among.
    """
    joules, seconds = workload.energy()
    watts = least_product(joules, seconds)
    hardware = workload.hardware
    points = hardware.points[:, hardware.fastest]
    tried = list(candidates)
    seen = {schedule.settings for schedule in candidates}
    for highest in range(1, int(points.max()) + 1):
        for weight in WEIGHTS:
            penalty = np.where(points > highest, np.inf, 0.0)
            chosen = (joules + weight * watts * seconds + penalty).argmin(1)
            settings = tuple(hardware.settings[index] for index in chosen)
            if settings not in seen:
                seen.add(settings)
                tried.append(Schedule(settings, weight, highest))
    return min(tried, key=lambda schedule: _product(workload, schedule))


def best_setting(workload: Workload) -> Setting:
    """The single setting with the least E x T of the run with heat."""
    joules, seconds = workload.energy()
    products = joules.sum(0) * seconds.sum(0)
    settings = workload.hardware.settings
    close = [s for s in settings if products[s.index] < MUCH_WORSE * products.min()]
    count = len(workload.snippets)
    return min(close, key=lambda setting: _product(workload, Schedule((setting,) * count)))


def least_product(joules: np.ndarray, seconds: np.ndarray) -> float:
    """Watts w for which argmin(E + w T) per snippet has the least E x T, the best of some starts.

    joules, seconds: [snippet, setting].
    """
    rows = np.arange(len(joules))
    best_product = np.inf
    best_watts = 0.0
    for start in STARTS:
        watts = start * float(joules.mean() / seconds.mean())
        for _ in range(ROUNDS):
            chosen = (joules + watts * seconds).argmin(1)
            energy = float(joules[rows, chosen].sum())
            time = float(seconds[rows, chosen].sum())
            if energy * time < best_product:
                best_product = energy * time
                best_watts = watts
            if watts == energy / time:
                break
            watts = energy / time
    return best_watts


def _product(workload: Workload, schedule: Schedule) -> float:
    return run_policy(workload, FixedSchedule(schedule)).energy_delay

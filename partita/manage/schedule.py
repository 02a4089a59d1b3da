"""Settings per snippet with the least energy-delay product: by the description, or clairvoyant.

For given watts w, the product E x T of a run is least where every snippet minimizes E + w T with
w = E / T of the run (the gradient of E x T is T dE + E dT). Heat adds leakage and throttling, which
this ignores, so runs with lower highest frequencies and other weights w are simulated too, and the
best run counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.manage.action import Setting
from partita.manage.observation import Observation
from partita.manage.policies.base import Policy
from partita.manage.power import run_policy
from partita.manage.workload import Workload

WEIGHTS = (0.35, 0.5, 0.7, 1.0, 1.4)
"""Tried factors on w."""
START_WATTS = 3.0
ROUNDS = 50
MUCH_WORSE = 1.25
"""Times the least product without heat from which a single setting is not simulated."""


class FixedSchedule(Policy):
    """A setting per snippet of the pass."""

    name = "fixed"

    def __init__(self, settings: list[Setting]) -> None:
        self.settings = settings

    def decide(self, observation: Observation) -> Setting:
        return self.settings[observation.coming]


def best_schedule(workload: Workload, candidates: Sequence[list[Setting]] = ()) -> list[Setting]:
    """The setting of each snippet, for the least E x T of the run with heat.

    candidates: Other schedules to choose among.
    """
    joules, seconds = workload.energy()
    watts = least_product(joules, seconds)
    hardware = workload.hardware
    tried = list(candidates)
    highest = hardware.points[:, hardware.fastest]
    for limit in range(1, int(highest.max()) + 1):
        for weight in WEIGHTS:
            penalty = np.where(highest > limit, np.inf, 0.0)
            chosen = (joules + weight * watts * seconds + penalty).argmin(1)
            settings = [hardware.settings[index] for index in chosen]
            if settings not in tried:
                tried.append(settings)
    return min(tried, key=lambda settings: _product(workload, settings))


def best_setting(workload: Workload) -> Setting:
    """The single setting with the least E x T of the run with heat."""
    joules, seconds = workload.energy()
    products = joules.sum(0) * seconds.sum(0)
    settings = workload.hardware.settings
    close = [s for s in settings if products[s.index] < MUCH_WORSE * products.min()]
    count = len(workload.snippets)
    return min(close, key=lambda setting: _product(workload, [setting] * count))


def least_product(joules: np.ndarray, seconds: np.ndarray) -> float:
    """Watts w for which argmin(E + w T) per snippet has the least E x T.

    joules, seconds: [snippet, setting].
    """
    watts = START_WATTS
    rows = np.arange(len(joules))
    for _ in range(ROUNDS):
        chosen = (joules + watts * seconds).argmin(1)
        before = watts
        watts = float(joules[rows, chosen].sum() / seconds[rows, chosen].sum())
        if watts == before:
            break
    return watts


def _product(workload: Workload, settings: list[Setting]) -> float:
    return run_policy(workload, FixedSchedule(settings)).energy_delay

"""The schedule of a model that measurements correct: recursive least squares on log ratios.

Before a snippet, every setting gets its seconds and watts by the description, times correction
factors exp(w . x). The least E + w T wins, with the w of the least corrected E x T, found anew in
every pass. After a snippet, the logs
of measured over described seconds and watts update the weights. x: one, the logarithm of the
fastest cluster's clock, the fractions of active devices, and whether the clock is in the upper
half. Each snippet of the pass has an offset of its own besides, the smoothed rest of its residuals.
"""

from __future__ import annotations

import numpy as np

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.least_squares import RecursiveLeastSquares
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.schedule import best_schedule, least_product
from partita.management.workload import Workload, memory_joules

PROBED_PASS = 1
"""The pass that runs the schedule at lower clocks, to see how time and power depend on them."""
SMOOTHING = 0.3
"""Part of a residual that goes into the offset of its snippet."""


class Corrected(Policy):
    """The schedule of the description, corrected by the measurements of the run."""

    name = "corrected"

    def __init__(self, described: Workload) -> None:
        self.hardware = described.hardware
        self.schedule = best_schedule(described)
        self.works = [snippet.works for snippet in described.snippets]
        self.features = setting_features(self.hardware)
        self.log_seconds, self.log_watts = described_logs(described)
        self.seconds = RecursiveLeastSquares(self.features.shape[1])
        self.watts = RecursiveLeastSquares(self.features.shape[1])
        self.offsets = np.zeros((2, len(self.works)))
        self.passes = 0
        self.cost_watts = 0.0
        """w, of the corrected model; 0 before its first use."""
        points = self.hardware.points[:, self.hardware.fastest]
        highest = self.schedule.highest
        self.excluded = np.where(points > (points.max() if highest is None else highest), np.inf, 0)

    def decide(self, observation: Observation) -> Setting:
        if observation.is_first:
            return self.schedule.settings[observation.coming]
        self.learn(observation)
        if observation.coming == 0:
            self.passes += 1
        if self.passes == PROBED_PASS:
            return self._slower(self.schedule.settings[observation.coming])
        return self.best(observation.coming)

    def _slower(self, setting: Setting) -> Setting:
        """A setting with the fastest domain at a third less of its points."""
        fastest = self.hardware.clusters[self.hardware.fastest]
        points = []
        for cluster, point in zip(self.hardware.clusters, setting.points, strict=True):
            drop = len(cluster.frequencies) // 3 if cluster.domain == fastest.domain else 0
            points.append(max(point - drop, 0))
        return self.hardware.find(setting.active, points)

    def learn(self, observation: Observation) -> None:
        """Corrects the model by the last snippet."""
        number = observation.last
        if not self.works[number]:
            return
        x = self.features[observation.setting]
        measured = (np.log(observation.seconds), np.log(observation.watts))
        models = (self.seconds, self.watts)
        described = (self.log_seconds, self.log_watts)
        for k, (model, logs, value) in enumerate(zip(models, described, measured, strict=True)):
            ratio = value - logs[number, observation.setting]
            model.update(x, ratio - self.offsets[k, number] - x @ model.weights)
            rest = ratio - x @ model.weights
            self.offsets[k, number] += SMOOTHING * (rest - self.offsets[k, number])

    def best(self, number: int) -> Setting:
        """The setting of a snippet with the least corrected E + w T."""
        if number == 0 or self.cost_watts == 0:
            seconds, watts = self._corrected(slice(None))
            self.cost_watts = least_product(seconds * watts, seconds)
        seconds, watts = self._corrected(slice(number, number + 1))
        costs = seconds[0] * (watts[0] + self.schedule.weight * self.cost_watts)
        return self.hardware.settings[int((costs + self.excluded).argmin())]

    def _corrected(self, numbers: slice) -> tuple[np.ndarray, np.ndarray]:
        """Corrected seconds and watts of some snippets, [snippet, setting]."""
        corrected = []
        works = np.array(self.works[numbers])[:, None]
        models = (self.seconds, self.watts)
        logs = (self.log_seconds, self.log_watts)
        for k, (model, described) in enumerate(zip(models, logs, strict=True)):
            correction = self.features @ model.weights + self.offsets[k, numbers, None]
            corrected.append(np.exp(described[numbers] + np.where(works, correction, 0.0)))
        return corrected[0], corrected[1]


def setting_features(hardware: Hardware) -> np.ndarray:
    """[setting, feature]: the features of the correction."""
    fastest = hardware.fastest
    cluster = hardware.clusters[fastest]
    frequency = cluster.frequencies[hardware.points[:, fastest]]
    relative = frequency / cluster.frequencies[-1]
    runs = hardware.active[:, fastest] > 0
    devices = np.array([one.devices for one in hardware.clusters])
    columns = [
        np.ones(len(runs)),
        np.where(runs, np.log(2 * relative), 0.0),
        hardware.active[:, fastest] / devices[fastest],
        hardware.active.sum(1) / devices.sum(),
        np.where(runs & (relative > 0.5), 1.0, 0.0),
    ]
    return np.stack(columns, 1)


def described_logs(described: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the described seconds and watts, [snippet, setting]."""
    hardware = described.hardware
    constant = sum(hardware.constant_watts.values())
    seconds = np.stack([snippet.seconds for snippet in described.snippets])
    watts = []
    for snippet in described.snippets:
        memory_watts = memory_joules(snippet, hardware) / snippet.seconds
        watts.append(snippet.watts.sum(1) + constant + memory_watts)
    return np.log(seconds), np.log(np.stack(watts))

"""The schedule of a description that the run's own measurements correct.

Seconds and watts of every setting are those of the description times correction factors
exp(w . x). After a snippet, the logs of measured over described seconds and watts update w by
recursive least squares; watts are compared at one temperature. x: one, the logarithm of the fastest
cluster's clock, the fractions of active devices, and an indicator of each snippet of the pass.

The first pass runs the schedule of the description. In the second one a few snippets run at lower
clocks, to see how time and power depend on them. Before the third pass, and twice later, the
simulator finds the best schedule of the corrected description, with heat.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.least_squares import RecursiveLeastSquares
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.schedule import Schedule, best_schedule
from partita.management.workload import Workload

PROBED_PASS = 1
"""The pass that runs some snippets at lower clocks."""
PROBE_STRIDE = 6
"""Of this number of snippets in the probed pass, one runs at lower clocks."""
SEARCHED_PASSES = (2, 4, 12)
"""Passes before which the schedule is found anew."""
DEVIATIONS = (0.3, 0.5, 0.3, 0.3)
"""Standard deviations of the weights of `setting_features` before any measurement."""
SNIPPET_DEVIATION = 0.2
"""Of the weight of a snippet: its kernels are more or less efficient than described."""
NOISE = 0.03
"""Standard deviation of a log ratio that the features do not explain."""


class Corrected(Policy):
    """The schedule of the description, corrected by the measurements of the run."""

    name = "corrected"

    def __init__(self, described: Workload, schedule: Schedule) -> None:
        self.described = described
        self.hardware = described.hardware
        self.settings = schedule.settings
        self.features = setting_features(self.hardware)
        self.log_seconds, self.log_watts = described_logs(described)
        deviations = [*DEVIATIONS, *[SNIPPET_DEVIATION] * len(described.snippets)]
        prior = (np.array(deviations) / NOISE) ** 2
        self.seconds = RecursiveLeastSquares(len(prior), forgetting=1.0, prior=prior)
        self.watts = RecursiveLeastSquares(len(prior), forgetting=1.0, prior=prior)
        self.passes = 0

    def decide(self, observation: Observation) -> Setting:
        if not observation.is_first:
            self.learn(observation)
        setting = self.settings[observation.coming]
        is_probe = self.passes == PROBED_PASS and observation.coming % PROBE_STRIDE == 0
        return self._slower(setting) if is_probe else setting

    def learn(self, observation: Observation) -> None:
        """Corrects the description by the last snippet; finds the schedule anew at some passes."""
        number = observation.last
        if self.described.snippets[number].works:
            self._update(number, observation)
        if observation.coming == 0:
            self.passes += 1
            if self.passes in SEARCHED_PASSES:
                self.settings = best_schedule(self.corrected()).settings

    def _update(self, number: int, observation: Observation) -> None:
        setting = self.hardware.settings[observation.setting]
        x = np.zeros(len(self.seconds.weights))
        x[: self.features.shape[1]] = self.features[setting.index]
        x[self.features.shape[1] + number] = 1.0
        watts = observation.watts
        if observation.celsius:
            watts -= self.hardware.extra_leakage(setting, observation.celsius)
        seconds_ratio = np.log(observation.seconds) - self.log_seconds[number, setting.index]
        watts_ratio = np.log(watts) - self.log_watts[number, setting.index]
        self.seconds.update(x, seconds_ratio - x @ self.seconds.weights)
        self.watts.update(x, watts_ratio - x @ self.watts.weights)

    def _slower(self, setting: Setting) -> Setting:
        """A setting with the fastest domain at a third less of its points."""
        fastest = self.hardware.clusters[self.hardware.fastest]
        points = []
        for cluster, point in zip(self.hardware.clusters, setting.points, strict=True):
            drop = len(cluster.frequencies) // 3 if cluster.domain == fastest.domain else 0
            points.append(max(point - drop, 0))
        return self.hardware.find(setting.active, points)

    def corrected(self) -> Workload:
        """The workload as the corrected description predicts it."""
        snippets = []
        for number, snippet in enumerate(self.described.snippets):
            if snippet.works:
                seconds, watts = self._factors(number)
                snippet = replace(
                    snippet,
                    seconds=snippet.seconds * seconds,
                    watts=snippet.watts * watts[:, None],
                )
            snippets.append(snippet)
        return replace(self.described, snippets=tuple(snippets), _figures={})

    def _factors(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Correction factors on the seconds and the watts of a snippet, each [setting]."""
        count = self.features.shape[1]
        factors = []
        for model in (self.seconds, self.watts):
            common = self.features @ model.weights[:count]
            factors.append(np.exp(common + model.weights[count + number]))
        return factors[0], factors[1]


def setting_features(hardware: Hardware) -> np.ndarray:
    """[setting, feature]: the features of the correction.

    The clock is the mean of log(2 x relative clock) over the clusters of the fastest domain, each
    weighted by its share of the power: the slope of the log of watts if power grows with another
    exponent of the clock than described.
    """
    domain = hardware.clusters[hardware.fastest].domain
    devices = np.array([cluster.devices for cluster in hardware.clusters])
    watts = hardware.cluster_watts(np.ones(len(hardware.settings)))
    shares = watts / watts.sum(1, keepdims=True)
    in_domain = np.array([cluster.domain == domain for cluster in hardware.clusters])
    clock = np.zeros(len(hardware.settings))
    for c, cluster in enumerate(hardware.clusters):
        if in_domain[c]:
            relative = cluster.frequencies[hardware.points[:, c]] / cluster.frequencies[-1]
            clock += np.where(hardware.active[:, c], shares[:, c] * np.log(2 * relative), 0.0)
    columns = [
        np.ones(len(clock)),
        clock,
        (hardware.active * in_domain).sum(1) / devices[in_domain].sum(),
        hardware.active.sum(1) / devices.sum(),
    ]
    return np.stack(columns, 1)


def described_logs(described: Workload) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the described seconds and watts at 60 °C, [snippet, setting]."""
    hardware = described.hardware
    constant = sum(hardware.constant_watts.values())
    seconds = np.stack([snippet.seconds for snippet in described.snippets])
    watts = []
    for snippet in described.snippets:
        transfer_watts = snippet.transfer_joules / snippet.seconds
        watts.append(snippet.watts.sum(1) + constant + transfer_watts)
    return np.log(seconds), np.log(np.stack(watts))

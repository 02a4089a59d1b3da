"""A run of a workload under a policy: joules, seconds, temperatures, throttling.

Power depends on the setting, on the activity of the devices, and on temperature by leakage; every
cluster leaks at the temperature of the hottest node. Trips limit clocks of domains, whatever the
policy asks for. A change of operating points costs the switch time of its domain.

Traffic of main memory costs joules and heats no node: thermal models have inputs for domains only.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from partita.machine.parts import LEAKAGE_CELSIUS
from partita.management.action import Setting
from partita.management.heat import active_trips
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.workload import Workload

START_CELSIUS = 50.0
"""Temperature of all nodes at the start of a run."""


class Moment(NamedTuple):
    """A snippet of a run."""

    setting: int
    """Index of the setting that ran."""
    asked: int
    """Index of the setting that the policy asked for; another one if trips limit clocks."""
    seconds: float
    joules: float
    celsius: float
    """The hottest node after it."""


@dataclass(frozen=True, kw_only=True)
class PowerRun:
    """The figures of a run."""

    policy: str
    joules: float
    seconds: float
    peak_celsius: float | None
    """Of the hottest node; None without a thermal model."""
    throttled: float
    """Fraction of the snippets with a setting slower than the policy asked for."""
    decision_seconds: float
    """Processor time of a decision on this computer, the mean."""
    moments: tuple[Moment, ...] = field(repr=False)
    """[snippet of the run]."""

    @property
    def energy_delay(self) -> float:
        """Energy-delay product, J s."""
        return self.joules * self.seconds

    def to_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "joules": self.joules,
            "seconds": self.seconds,
            "energy_delay": self.energy_delay,
            "peak_celsius": self.peak_celsius,
            "throttled": self.throttled,
            "decision_seconds": self.decision_seconds,
        }


class _SimulatedMachine:
    """Temperature, throttling and power of a machine in a run."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.hardware = workload.hardware
        self.setting: Setting | None = None
        thermal = self.hardware.machine.thermal
        self.model = self.hardware.thermal_model
        self.ambient = thermal.ambient if thermal is not None else 0.0
        nodes = len(thermal.transition) if thermal is not None else 0
        self.rise = np.full(nodes, START_CELSIUS - self.ambient)
        self.trips: frozenset[str] = frozenset()
        self._celsius = START_CELSIUS if thermal is not None else LEAKAGE_CELSIUS
        self._limited: dict[tuple[int, frozenset[str]], Setting] = {}

    @property
    def celsius(self) -> float:
        """Temperature of the hottest node; LEAKAGE_CELSIUS without a thermal model."""
        return self._celsius

    def throttled(self, setting: Setting) -> Setting:
        """The setting that trips allow at the present temperature."""
        thermal = self.hardware.machine.thermal
        if thermal is None or not thermal.trips:
            return setting
        self.trips = active_trips(thermal.trips, self.trips, self.celsius)
        if not self.trips:
            return setting
        key = setting.index, self.trips
        if key not in self._limited:
            limits: dict[str, float] = {}
            for trip in thermal.trips:
                if trip.name in self.trips:
                    limit = min(trip.frequency, limits.get(trip.domain, trip.frequency))
                    limits[trip.domain] = limit
            self._limited[key] = self.hardware.limited(setting, limits)
        return self._limited[key]

    def run(self, number: int, setting: Setting) -> tuple[float, float]:
        """Joules and seconds of snippet `number` of the pass under a setting; heats the machine."""
        figures = self.workload.figures(number, setting)
        seconds = figures.seconds
        switch_seconds = self._switch_seconds(setting)
        self.setting = setting
        total = figures.transfer_watts + self._constant_watts
        inputs = self._constant_inputs.copy()
        for c, cluster in enumerate(self.hardware.clusters):
            cluster_watts = figures.watts[c]
            if setting.active[c]:
                cluster_watts += cluster.extra_leakage(setting.points[c], self._celsius)
            total += cluster_watts
            if self.model is not None:
                inputs[self._cluster_inputs[c]] += cluster_watts
        if self.model is not None:
            self.rise = figures.transition @ self.rise + figures.gain @ inputs
            self._celsius = self.ambient + float(self.rise.max())
        seconds += switch_seconds
        return total * seconds, seconds

    def _switch_seconds(self, setting: Setting) -> float:
        if self.setting is None or setting is self.setting:
            return 0.0
        seconds = 0.0
        for c, cluster in enumerate(self.hardware.clusters):
            if setting.points[c] != self.setting.points[c]:
                seconds = max(seconds, cluster.switch_seconds)
        return seconds

    @cached_property
    def _constant_watts(self) -> float:
        return sum(self.hardware.constant_watts.values())

    @cached_property
    def _inputs(self) -> list[str]:
        """Names of the domains whose power heats the nodes, in the order of the thermal model."""
        domains = self.hardware.machine.domains
        return [domain.name for domain in domains if domain.kind in ("clock", "power")]

    @cached_property
    def _constant_inputs(self) -> np.ndarray:
        """[input]: watts that domains always draw."""
        return np.array([self.hardware.constant_watts.get(name, 0.0) for name in self._inputs])

    @cached_property
    def _cluster_inputs(self) -> list[int]:
        """[cluster]: its input."""
        return [self._inputs.index(cluster.domain) for cluster in self.hardware.clusters]


def run_policy(workload: Workload, policy: Policy) -> PowerRun:
    """A simulated run of a workload under a policy."""
    machine = _SimulatedMachine(workload)
    has_heat = machine.model is not None
    observation = Observation(coming=0, celsius=machine.celsius if has_heat else 0.0)
    moments: list[Moment] = []
    joules = 0.0
    clock = 0.0
    decision_seconds = 0.0
    count = len(workload.snippets)
    for position in range(workload.passes * count):
        number = position % count
        started = time.thread_time()
        asked = policy.decide(observation)
        decision_seconds += time.thread_time() - started
        setting = machine.throttled(asked)
        snippet = workload.snippets[number]
        snippet_joules, seconds = machine.run(number, setting)
        joules += snippet_joules
        clock += seconds
        moment = Moment(setting.index, asked.index, seconds, snippet_joules, machine.celsius)
        moments.append(moment)
        observation = Observation(
            coming=(number + 1) % count,
            setting=setting.index,
            last=number,
            seconds=seconds,
            flops=snippet.flops,
            nbytes=snippet.nbytes,
            compute_seconds=float(snippet.compute_seconds[setting.index]),
            utilization=1.0 if snippet.works else 0.0,
            watts=snippet_joules / seconds,
            mean_watts=joules / clock,
            celsius=machine.celsius if has_heat else 0.0,
        )
    throttled = sum(moment.setting != moment.asked for moment in moments)
    return PowerRun(
        policy=policy.name,
        joules=joules,
        seconds=clock,
        peak_celsius=max(moment.celsius for moment in moments) if has_heat else None,
        throttled=throttled / len(moments),
        decision_seconds=decision_seconds / len(moments),
        moments=tuple(moments),
    )

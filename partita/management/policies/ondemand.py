"""The governor `ondemand` of Linux: the highest frequency under load, else in proportion to it."""

from __future__ import annotations

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.observation import Observation
from partita.management.policies.base import Policy

UP_THRESHOLD = 0.8
"""Utilization above which the highest frequency is set (Linux's default)."""


class Ondemand(Policy):
    """All devices; frequency by the utilization of the last snippet."""

    name = "ondemand"

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def decide(self, observation: Observation) -> Setting:
        load = observation.utilization
        fraction = 1.0 if load > UP_THRESHOLD else load
        return self.hardware.all_active([fraction] * len(self.hardware.clusters))

"""The governor `schedutil` of Linux: a quarter more than the frequency that the load needs."""

from __future__ import annotations

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.observation import Observation
from partita.management.policies.base import Policy

MARGIN = 1.25


class Schedutil(Policy):
    """All devices; frequency 1.25 x utilization x the highest."""

    name = "schedutil"

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def decide(self, observation: Observation) -> Setting:
        fraction = min(1.0, MARGIN * observation.utilization)
        return self.hardware.all_active([fraction] * len(self.hardware.clusters))

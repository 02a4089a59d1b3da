"""The governor `performance`: all devices at their highest frequency."""

from __future__ import annotations

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.observation import Observation
from partita.management.policies.base import Policy


class Performance(Policy):
    """All devices at their highest frequency."""

    name = "performance"

    def __init__(self, hardware: Hardware) -> None:
        self.setting = hardware.all_active([1.0] * len(hardware.clusters))

    def decide(self, observation: Observation) -> Setting:
        return self.setting

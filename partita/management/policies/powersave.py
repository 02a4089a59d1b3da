"""The governor `powersave`: all devices at their lowest frequency."""

from __future__ import annotations

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.observation import Observation
from partita.management.policies.base import Policy


class Powersave(Policy):
    """All devices at their lowest frequency."""

    name = "powersave"

    def __init__(self, hardware: Hardware) -> None:
        self.setting = hardware.all_active([0.0] * len(hardware.clusters))

    def decide(self, observation: Observation) -> Setting:
        return self.setting

"""The governor `powersave`: all devices at their lowest frequency."""

from __future__ import annotations

from partita.manage.action import Setting
from partita.manage.hardware import Hardware
from partita.manage.observation import Observation
from partita.manage.policies.base import Policy


class Powersave(Policy):
    """All devices at their lowest frequency."""

    name = "powersave"

    def __init__(self, hardware: Hardware) -> None:
        self.setting = hardware.all_active([0.0] * len(hardware.clusters))

    def decide(self, observation: Observation) -> Setting:
        return self.setting

"""One setting for the whole run, the best one by the simulator."""

from __future__ import annotations

from partita.management.action import Setting
from partita.management.observation import Observation
from partita.management.policies.base import Policy
from partita.management.schedule import best_setting
from partita.management.workload import Workload


class Static(Policy):
    """The single setting with the least simulated E x T on the hardware as described."""

    name = "static"

    def __init__(self, described: Workload) -> None:
        self.setting = best_setting(described)

    def decide(self, observation: Observation) -> Setting:
        return self.setting

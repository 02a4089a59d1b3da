"""The contracts of policies that set operating points, and of governors among them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from partita.management.action import Setting
from partita.management.hardware import Hardware
from partita.management.observation import Observation


class Policy(ABC):
    """Decides before every snippet. A policy is made for one run and may learn in it."""

    name: str
    """As users write it."""

    @abstractmethod
    def decide(self, observation: Observation) -> Setting:
        """The setting of the coming snippet."""


class Governor(Policy):
    """All devices active; the frequency follows the load of the last snippet."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware

    def decide(self, observation: Observation) -> Setting:
        fraction = self.fraction(observation.utilization)
        return self.hardware.all_active([fraction] * len(self.hardware.clusters))

    @abstractmethod
    def fraction(self, utilization: float) -> float:
        """The least frequency, relative to the highest one."""

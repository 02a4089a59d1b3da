"""The contract of policies that set operating points."""

from __future__ import annotations

from abc import ABC, abstractmethod

from partita.management.action import Setting
from partita.management.observation import Observation


class Policy(ABC):
    """Decides before every snippet. A policy is made for one run and may learn in it."""

    name: str
    """As users write it."""

    @abstractmethod
    def decide(self, observation: Observation) -> Setting:
        """The setting of the coming snippet."""

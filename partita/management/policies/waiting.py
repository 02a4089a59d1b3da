"""The contract of policies that change plans, and the times that they see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Slowdown:
    """A time in which another plan is faster than the present one."""

    seconds: float
    """Of a step of the present plan."""
    best_seconds: float
    """Of a step of the fastest plan."""
    change_seconds: float
    """Price of the change."""
    lengths: tuple[float, ...]
    """Seconds of earlier times like this one, the oldest first."""

    @property
    def loss(self) -> float:
        """Part of the time that is lost by staying, 0 to 1."""
        return 1 - self.best_seconds / self.seconds


class WaitingPolicy(ABC):
    """Decides how long to stay with a plan when another one has become faster."""

    name: str
    """As users write it."""

    @abstractmethod
    def wait(self, slowdown: Slowdown) -> float:
        """Seconds until the change, infinite for none."""

"""The fastest plan at once."""

from __future__ import annotations

from partita.management.policies.waiting import Slowdown, WaitingPolicy


class AtOnce(WaitingPolicy):
    """Changes as soon as another plan is faster."""

    name = "at-once"

    def wait(self, slowdown: Slowdown) -> float:
        return 0.0

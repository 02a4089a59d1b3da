"""No change of plan, unless its devices are lost."""

from __future__ import annotations

import math

from partita.management.policies.waiting import Slowdown, WaitingPolicy


class Never(WaitingPolicy):
    """Stays with the plan."""

    name = "never"

    def wait(self, slowdown: Slowdown) -> float:
        return math.inf

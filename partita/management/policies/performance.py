"""The governor `performance`: all devices at their highest frequency."""

from __future__ import annotations

from partita.management.policies.base import Governor


class Performance(Governor):
    """All devices at their highest frequency."""

    name = "performance"

    def fraction(self, utilization: float) -> float:
        return 1.0

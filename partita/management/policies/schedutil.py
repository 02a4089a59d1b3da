"""The governor `schedutil` of Linux: a quarter more than the frequency that the load needs."""

from __future__ import annotations

from partita.management.policies.base import Governor

MARGIN = 1.25


class Schedutil(Governor):
    """All devices; frequency 1.25 x utilization x the highest."""

    name = "schedutil"

    def fraction(self, utilization: float) -> float:
        return min(1.0, MARGIN * utilization)

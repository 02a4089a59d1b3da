"""The governor `ondemand` of Linux: the highest frequency under load, else in proportion to it."""

from __future__ import annotations

from partita.management.policies.base import Governor

UP_THRESHOLD = 0.8
"""Utilization above which the highest frequency is set (Linux's default)."""


class Ondemand(Governor):
    """All devices; frequency by the utilization of the last snippet."""

    name = "ondemand"

    def fraction(self, utilization: float) -> float:
        return 1.0 if utilization > UP_THRESHOLD else utilization

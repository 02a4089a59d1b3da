"""The governor `powersave`: all devices at their lowest frequency."""

from __future__ import annotations

from partita.management.policies.base import Governor


class Powersave(Governor):
    """All devices at their lowest frequency."""

    name = "powersave"

    def fraction(self, utilization: float) -> float:
        return 0.0

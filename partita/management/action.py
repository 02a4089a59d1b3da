"""The action of policies for operating points."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setting:
    """Active devices and operating point of every cluster of a simulated machine."""

    index: int
    """Its number in `Hardware.settings`."""
    active: tuple[int, ...]
    """[cluster]: active devices; 0 for a gated cluster."""
    points: tuple[int, ...]
    """[cluster]: operating point, slowest first."""

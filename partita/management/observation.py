"""Observations of a run, as a policy sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The last snippet of a simulated run, and the number of the coming one.

    A snippet is about 0.1 s of a training step. Before the first one, all figures are 0.
    """

    coming: int
    """Number of the coming snippet in the pass over the step."""
    setting: int = -1
    """Index of the setting of the last snippet, after throttling; -1 before the first one."""
    last: int = -1
    """Number of the last snippet in the pass."""
    seconds: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0
    """Bytes read and written in main memory."""
    compute_seconds: float = 0.0
    """Seconds in which cores compute without waiting for memory."""
    utilization: float = 1.0
    """Fraction of the time with runnable work; waiting for memory counts as work."""
    watts: float = 0.0
    mean_watts: float = 0.0
    """Of the run so far."""
    celsius: float = 0.0
    """Of the hottest node; 0 without a thermal model."""

    @property
    def is_first(self) -> bool:
        """Whether nothing was observed yet."""
        return self.setting < 0

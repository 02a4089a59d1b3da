"""The features of an observation that learned policies see."""

from __future__ import annotations

import math

from partita.management.observation import Observation
from partita.management.workload import Workload

NAMES = (
    "GFLOP/s",
    "GB/s",
    "computing",
    "utilization",
    "log10 FLOP/B",
    "mean W",
    "W",
    "active of the fastest cluster",
    "point of the fastest cluster",
    "active devices",
    "log10 FLOP/B of the coming snippet",
    "the coming snippet works",
)
COMING = 2
"""Features about the coming snippet, the last ones: known to who runs the program, not to counters
of the last 100 ms."""


def features_of(observation: Observation, workload: Workload, with_coming: bool) -> list[float]:
    """The features before a decision, in the order of NAMES.

    Args:
        workload: The program, for the FLOPs and bytes of the coming snippet.
        with_coming: Whether the last features are given.
    """
    hardware = workload.hardware
    seconds = observation.seconds or 1.0
    active = points = total = 0
    if not observation.is_first:
        setting = hardware.settings[observation.setting]
        active = setting.active[hardware.fastest]
        points = setting.points[hardware.fastest]
        total = sum(setting.active)
    row = [
        observation.flops / seconds / 1e9,
        observation.nbytes / seconds / 1e9,
        observation.compute_seconds / seconds,
        observation.utilization,
        intensity(observation.flops, observation.nbytes),
        observation.mean_watts,
        observation.watts,
        float(active),
        float(points),
        float(total),
    ]
    if with_coming:
        coming = workload.snippets[observation.coming]
        row += [intensity(coming.flops, coming.nbytes), float(coming.works)]
    return row


def intensity(flops: float, nbytes: float) -> float:
    """Logarithm of FLOPs per byte; small numbers stand for none."""
    return math.log10((flops + 1e3) / (nbytes + 1e3))

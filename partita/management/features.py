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


def features_of(observation: Observation, workload: Workload) -> list[float]:
    """The features before a decision, in the order of NAMES.

    The last ones, about the coming snippet, are known to who runs the program (`workload`), not to
    counters of the last 100 ms.
    """
    hardware = workload.hardware
    seconds = observation.seconds or 1.0
    active = points = total = 0
    if not observation.is_first:
        setting = hardware.settings[observation.setting]
        active = setting.active[hardware.fastest]
        points = setting.points[hardware.fastest]
        total = sum(setting.active)
    coming = workload.snippets[observation.coming]
    return [
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
        intensity(coming.flops, coming.nbytes),
        float(coming.works),
    ]


def intensity(flops: float, nbytes: float) -> float:
    """Logarithm of FLOPs per byte; small numbers stand for none."""
    return math.log10((flops + 1e3) / (nbytes + 1e3))

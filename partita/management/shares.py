"""Shares: numbers of microbatches per device, for devices of unequal speed."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from partita.errors import PlanError

MICROBATCHES = 16
"""Microbatches of a batch on up to 4 devices: shares in steps of 6 %."""
PER_DEVICE = 4
"""Microbatches of a device on more devices."""


def microbatch_count(batch_size: int, devices: int) -> int:
    """Number of microbatches for shares: 16, or 4 per device, as far as the batch divides.

    At least 2 samples are in a microbatch. A number that divides among the devices is preferred.
    PlanError if there are fewer than 2 microbatches per device.

    >>> microbatch_count(128, 2), microbatch_count(96, 4), microbatch_count(60, 2)
    (16, 16, 12)
    """
    most = min(max(MICROBATCHES, PER_DEVICE * devices), batch_size // 2)
    counts = [n for n in range(2 * devices, most + 1) if batch_size % n == 0]
    if not counts:
        raise PlanError(
            f"A batch of {batch_size} samples has no {2 * devices} equal microbatches of 2 or more "
            f"samples for {devices} devices, so it has no shares. Use a larger batch."
        )
    even = [n for n in counts if n % devices == 0]
    return max(even or counts)


def shares_of(speeds: Sequence[float], microbatches: int) -> tuple[int, ...]:
    """Microbatches per device that end soonest, for devices of these relative speeds.

    Each microbatch goes to the device that would end it first, the earlier device of two. A device
    of speed 0 gets none.

    >>> shares_of([1, 1], 16), shares_of([1, 0.3], 16), shares_of([1, 0], 4)
    ((8, 8), (13, 3), (4, 0))
    """
    if not any(speed > 0 for speed in speeds):
        raise PlanError("No device has a speed above 0: give one of them some.")
    shares = [0] * len(speeds)
    queue = [(1 / speed, n) for n, speed in enumerate(speeds) if speed > 0]
    heapq.heapify(queue)
    for _ in range(microbatches):
        _, n = queue[0]
        shares[n] += 1
        heapq.heapreplace(queue, ((shares[n] + 1) / speeds[n], n))
    return tuple(shares)


def relative_seconds(shares: Sequence[float], speeds: Sequence[float]) -> float:
    """Time until the last device ends its share, relative to even shares at full speed.

    >>> relative_seconds([8, 8], [1, 0.25]), relative_seconds([12, 4], [1, 0.25])
    (4.0, 2.0)
    """
    even = sum(shares) / len(shares)
    return max(share / speed for share, speed in zip(shares, speeds, strict=True)) / even

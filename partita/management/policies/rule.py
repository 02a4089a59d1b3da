"""When to change: at once if it is free, else after the shorter of a learned wait and ski rental's.

Ski rental (Karlin et al., Algorithmica 1988) changes when the time lost equals the price: at most
twice the loss of a clairvoyant. The learned wait has the least mean loss over earlier times; it is
better where these are typical, and alone it has no bound.
"""

from __future__ import annotations

import numpy as np

from partita.management.policies.waiting import Slowdown, WaitingPolicy

FEWEST = 5
"""Earlier times that the learned wait needs."""


class Rule(WaitingPolicy):
    """At once if free, else min(learned wait, ski rental)."""

    name = "rule"

    def wait(self, slowdown: Slowdown) -> float:
        if slowdown.change_seconds <= 0:
            return 0.0
        ski_rental = slowdown.change_seconds / slowdown.loss
        if len(slowdown.lengths) < FEWEST:
            return ski_rental
        return min(learned_wait(slowdown), ski_rental)


def learned_wait(slowdown: Slowdown) -> float:
    """The wait with the least mean loss over earlier times, one of 0, their lengths, and never."""
    lengths = np.array(slowdown.lengths)
    waits = np.array([0.0, *sorted(lengths), np.inf])
    ends_before = lengths[None, :] <= waits[:, None]
    lost = np.where(ends_before, lengths, waits[:, None]) * slowdown.loss
    lost = lost + np.where(ends_before, 0.0, slowdown.change_seconds)
    return float(waits[lost.mean(1).argmin()])

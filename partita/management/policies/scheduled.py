"""The simulator's schedule: the best setting of every snippet of the step, known before the run.

Partita knows the program, so nothing is learned or measured.
"""

from __future__ import annotations

from partita.management.schedule import FixedSchedule


class Scheduled(FixedSchedule):
    """The schedule with the least simulated E x T on the hardware as described."""

    name = "schedule"

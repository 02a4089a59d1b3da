"""The clairvoyant oracle: the best schedule on the hardware as it really is.

Every regret is measured against it. No policy can have its knowledge before the run.
"""

from __future__ import annotations

from partita.management.schedule import FixedSchedule, Schedule, best_schedule, best_setting
from partita.management.workload import Workload


class Oracle(FixedSchedule):
    """The settings with the least E x T, by the seconds and watts of the real hardware."""

    name = "oracle"

    def __init__(self, described: Schedule, real: Workload) -> None:
        """`described`: the best schedule of the hardware as described, a candidate."""
        count = len(real.snippets)
        candidates = [described, Schedule((best_setting(real),) * count)]
        super().__init__(best_schedule(real, candidates))

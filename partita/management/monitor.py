"""Times of a running training: whether its steps have changed, and which process is slow.

All processes of a step wait for the slowest one, so the seconds of a step are equal in all and say
*that* something is slow. Its processor time is equal too. *Who* is slow shows in the time in which
its threads could run and had no processor (Linux: `/proc/self/task/*/schedstat`): a quota, another
program on the same cores. The *stretch* of a process is its time with or without a processor over
the time with one.

Both use cumulative sums (Page, Biometrika 1954): a deviation counts by its excess over an allowance
and at most up to a limit, so one outlier changes nothing; a sum above a threshold is a change.

Values in, values out; `ThreadClock` alone reads files. Not for GPUs, whose waiting no such file
shows: there all stretches are 1 and nobody is named.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

TASKS = Path("/proc/self/task")
LISTED = 10
"""Readings after which a clock looks for new threads."""
WARM_UP = 20
"""Steps that give the reference of a step's seconds."""
LEAST_SPREAD = 0.03
"""Smallest spread of the logarithm of a step's seconds."""
LIMIT = 1.1
"""Largest deviation that one step of a process counts, a logarithm: 3 times slower."""
MIDWAY = 0.75
"""Deviation between those of a process of full speed and of one that is slow, a logarithm."""
RECENT = 8
"""Steps whose median is the speed of a process."""


class ThreadTimes(NamedTuple):
    """Time of the threads of a process, seconds."""

    running: float
    """On a processor."""
    queued: float
    """Able to run, without a processor."""

    @property
    def stretch(self) -> float:
        """Factor by which waiting for a processor slows the threads down: 1 if they never wait.

        >>> ThreadTimes(0.06, 0.22).stretch > 4, ThreadTimes(0.0, 0.0).stretch
        (True, 1.0)
        """
        return 1.0 + self.queued / self.running if self.running > 0 else 1.0


class ThreadClock:
    """Reads the times of this process's threads."""

    def __init__(self, tasks: Path = TASKS) -> None:
        self.tasks = tasks
        self._files: dict[str, int] = {}
        self._last: dict[str, ThreadTimes] = {}
        self._readings = 0
        self.seconds = 0.0
        """Time of the shortest reading so far."""

    def lap(self) -> ThreadTimes:
        """The time since the last call: 0 where the system does not tell."""
        start = time.perf_counter()
        if self._readings % LISTED == 0:
            self._open_new()
        self._readings += 1
        running = queued = 0.0
        for name, file in list(self._files.items()):
            times = _times(file)
            if times is None:
                self._close(name)
                continue
            before = self._last.get(name, times)
            running += times.running - before.running
            queued += times.queued - before.queued
            self._last[name] = times
        duration = time.perf_counter() - start
        self.seconds = min(duration, self.seconds or duration)
        return ThreadTimes(running, queued)

    def close(self) -> None:
        """Closes all files."""
        for name in list(self._files):
            self._close(name)

    def _open_new(self) -> None:
        if not self.tasks.is_dir():
            return
        for folder in self.tasks.iterdir():
            if folder.name not in self._files:
                try:
                    file = os.open(folder / "schedstat", os.O_RDONLY)
                except OSError:
                    continue
                self._files[folder.name] = file

    def _close(self, name: str) -> None:
        os.close(self._files.pop(name))
        self._last.pop(name, None)


def _times(file: int) -> ThreadTimes | None:
    """The times of a thread by its open file; None if it has ended."""
    try:
        fields = os.pread(file, 80, 0).split()
    except OSError:
        return None
    if len(fields) < 2:
        return None
    return ThreadTimes(int(fields[0]) / 1e9, int(fields[1]) / 1e9)


@dataclass(frozen=True)
class Cusum:
    """Two cumulative sums of deviations: of those above, and of those below 0."""

    allowance: float
    """Deviation that counts as none."""
    limit: float
    """Largest deviation that counts."""
    threshold: float
    """Sum that is a change."""
    above: float = 0.0
    below: float = 0.0

    def after(self, deviation: float) -> Cusum:
        """The sums with one more deviation."""
        counted = max(-self.limit, min(self.limit, deviation))
        above = max(0.0, self.above + counted - self.allowance)
        below = max(0.0, self.below - counted - self.allowance)
        return Cusum(self.allowance, self.limit, self.threshold, above, below)

    @property
    def has_risen(self) -> bool:
        """Whether deviations above 0 add up to a change."""
        return self.above > self.threshold

    @property
    def has_fallen(self) -> bool:
        """Whether deviations below 0 add up to a change."""
        return self.below > self.threshold


class StepChanges:
    """Finds changes in the seconds of steps."""

    def __init__(self) -> None:
        self.usual: float | None = None
        """Median seconds of a step in the warm-up; None during it."""
        self.reference = 0.0
        """Median seconds of a step since the last change."""
        self._seconds: list[float] = []
        self._spread = 0.0
        self._sums = _CHANGED

    def add(self, seconds: float) -> float | None:
        """Seconds of a step over the usual ones, if this step makes a change sure; else None."""
        if self.usual is None:
            self._seconds.append(seconds)
            if len(self._seconds) == WARM_UP:
                self.usual = self.reference = median(self._seconds)
                logs = [abs(math.log(s / self.reference)) for s in self._seconds]
                self._spread = max(LEAST_SPREAD, 1.5 * median(logs))
                self._seconds = []
            return None
        self._seconds = [*self._seconds, seconds][-RECENT:]
        self._sums = self._sums.after(math.log(seconds / self.reference) / self._spread)
        if not (self._sums.has_risen or self._sums.has_fallen):
            return None
        self.reference = median(self._seconds[-3:])
        self._sums = _CHANGED
        return self.reference / self.usual

    def restart(self) -> None:
        """Begins to warm up: another plan runs."""
        self.usual = None
        self._seconds = []
        self._sums = _CHANGED


class SlowProcesses:
    """Names the processes that are slow, and estimates their speeds, from stretches."""

    def __init__(self) -> None:
        self._sums: dict[int, Cusum] = {}
        self._deviations: dict[int, list[float]] = {}
        self.named: frozenset[int] = frozenset()
        """The processes that are slow now."""

    def add(self, stretches: Mapping[int, float]) -> None:
        """Takes in one step: process -> its stretch."""
        logs = {process: math.log(stretch) for process, stretch in stretches.items()}
        for process, log in logs.items():
            others = [value for other, value in logs.items() if other != process]
            deviation = log - median(others) if others else 0.0
            self._add(process, deviation)
        self._sums = {p: sums for p, sums in self._sums.items() if p in stretches}
        self.named = frozenset(self.named & stretches.keys())

    def _add(self, process: int, deviation: float) -> None:
        recent = [*self._deviations.get(process, []), deviation][-RECENT:]
        if process not in self.named:
            sums = self._sums.get(process, _SLOW).after(deviation)
            if sums.has_risen:
                self.named = self.named | {process}
                recent = recent[-3:]
                sums = _RECOVERED
        else:
            sums = self._sums[process].after(deviation - MIDWAY)
            if sums.has_fallen:
                self.named = self.named - {process}
                sums = _SLOW
        self._sums[process] = sums
        self._deviations[process] = recent

    def speed(self, process: int) -> float:
        """Speed of a process relative to the others: 1 unless it is named."""
        if process not in self.named:
            return 1.0
        return min(1.0, math.exp(-median(self._deviations[process])))

    def speeds(self, processes: Sequence[int]) -> tuple[float, ...]:
        """Speeds of some processes, in their order."""
        return tuple(self.speed(process) for process in processes)


_CHANGED = Cusum(allowance=1.0, limit=4.0, threshold=8.0)
"""In spreads of a step's seconds: sure after 3 steps."""
_SLOW = Cusum(allowance=0.45, limit=LIMIT, threshold=2.5)
"""Named after 4 steps at a third of the speed; at random noise of 30 %, in 10,000 steps never."""
_RECOVERED = Cusum(allowance=0.35, limit=LIMIT, threshold=2.0)
"""Forgotten after 5 steps of full speed."""

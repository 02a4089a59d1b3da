"""The division of operators into pipeline stages, and the runs that are rematerialized.

Operators come in runs, from one cut to the next. Stages are sequences of runs. A run is
rematerialized as a whole: as few as memory needs, those first that free most bytes in a second.
Stages near the first hold more microbatches at once, so they rematerialize more runs, or have
fewer.

Under "1f1b" equal stages are fastest. Under "eager-1f1b" a stage that starts later ends with the
first one if it has less work: stage s takes y(s) for all of its m microbatches with
y(1) + ... + y(s - 1) = m (T - y(s)), as in the lower bound (`search.staged_bound`).
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partita.plans.pipeline import most_in_flight
from partita.plans.schema import SCHEDULES

CAPACITY = 0.95
"""Share of a device's memory that runs are dealt into: their working memory comes on top."""
SLACK = 1.001
"""Relative slowdown of the slowest stage that is accepted for stages that need less memory."""
HALVINGS = 16
"""Halvings of an interval in a bisection."""


def most_work(stages: int, microbatches: int) -> float:
    """Seconds of work that stages in a row do in a step of one second, at most.

    Each one starts after the first microbatch has passed all earlier ones, and these take the last
    one back after it.
    """
    return microbatches * (1 - (1 - 1 / microbatches) ** stages)


@dataclass(frozen=True, kw_only=True)
class PipelineShape:
    """The shape of a pipeline. The first `axes` of the mesh number the stages."""

    axes: int
    stages: int
    microbatches: int
    rematerialize: bool

    @property
    def forward_passes(self) -> int:
        """Forward passes of one microbatch."""
        return 2 if self.rematerialize else 1

    @property
    def in_flight(self) -> float:
        """Microbatches in flight in a stage under "1f1b", on the average of all stages."""
        return min(self.microbatches, (self.stages + 1) / 2)

    @property
    def passes(self) -> int:
        """Length of a step of equal stages, in passes of one microbatch through a stage."""
        return self.microbatches + self.stages - 1

    @property
    def capacity(self) -> float:
        """Seconds of work that all stages together do in a step of one second, at most."""
        return most_work(self.stages, self.microbatches)


@dataclass(frozen=True, eq=False)
class OperatorFigures:
    """Seconds and bytes of operators: by state of one operator, by operator, or by run.

    "Exposed" seconds are those that no overlap of kernels and collectives can hide.
    """

    microbatch: np.ndarray
    """Seconds of one microbatch, forward and backward."""
    forward: np.ndarray
    """Of these, seconds of the forward pass."""
    exposed: np.ndarray
    """Exposed seconds of one microbatch."""
    exposed_forward: np.ndarray
    """Of these, seconds of the forward pass."""
    repeated: np.ndarray
    """Seconds of a forward pass that is computed again. Its copies read the parameters that are
    gathered for the backward pass."""
    exposed_repeated: np.ndarray
    """Of these, exposed seconds."""
    once: np.ndarray
    """Seconds once a step: the update, sums of gradients, gathering of parameters."""
    fixed: np.ndarray
    """Bytes that do not depend on the microbatches in flight."""
    activations: np.ndarray
    """Bytes of one microbatch's forward values that the backward pass reads."""

    def by_run(self, begins: np.ndarray) -> OperatorFigures:
        """Sums over runs of operators; `begins` are the first operators of runs."""
        columns = {name: getattr(self, name) for name in OperatorFigures.__annotations__}
        sums = {name: np.add.reduceat(values, begins) for name, values in columns.items()}
        return OperatorFigures(**sums)


@dataclass(frozen=True)
class Division:
    """A division into stages: the last run of each, and the runs that are rematerialized."""

    ends: Sequence[int]
    rematerialized: Sequence[int]
    schedule: str


@dataclass(frozen=True)
class _RunKind:
    """Runs that free the same bytes at the same price if they are rematerialized."""

    freed_bytes: float
    seconds: float
    runs: Sequence[int]


@dataclass(frozen=True)
class _Rematerialized:
    """The rematerialization that one stage needs."""

    missing_bytes: float
    """Bytes above the capacity after it; 0 or less if the stage fits."""
    stage_seconds: float
    chosen: Sequence[tuple[int, int, int]]
    """(kind, first run of the kind, number of runs)."""


class Runs:
    """The runs of a shape, with prefix sums of their seconds and bytes."""

    def __init__(
        self,
        shape: PipelineShape,
        figures: OperatorFigures,
        entering: Sequence[float],
        hop_seconds: Sequence[float],
        schedule: str = SCHEDULES[0],
    ) -> None:
        """Runs with their figures.

        Args:
            entering: Bytes of a microbatch that enter each run.
            hop_seconds: Seconds of a microbatch to each run and back, for which a stage waits.
            schedule: "1f1b" or "eager-1f1b".
        """
        self.shape = shape
        self.entering = entering
        self.schedule = schedule
        self.count = len(entering)
        self.hops = [*(shape.microbatches * seconds for seconds in hop_seconds), 0.0]
        self.delay = 0.0 if schedule == SCHEDULES[0] else 1 / shape.microbatches
        """Seconds that a stage has less than the first one, per second of the stages before it."""
        # The backward pass of a run needs its gradients, and its values if they are rematerialized.
        largest = float(figures.activations[:-1].max(initial=0.0))
        self.working_bytes = shape.forward_passes * largest
        self.seconds = _prefix_sums(figures.microbatch * shape.microbatches + figures.once)
        self.fixed = _prefix_sums(figures.fixed)
        self.activations = _prefix_sums(figures.activations)
        self.kinds = self._kinds(figures)

    def _kinds(self, figures: OperatorFigures) -> list[_RunKind]:
        """Runs by their gain, the best first. The last run is left out: it is needed at once."""
        freed = (figures.activations - np.array(self.entering)).tolist()
        seconds = (figures.repeated * self.shape.microbatches).tolist()
        groups: dict[tuple[str, str], list[int]] = {}
        for run in range(self.count - 1):
            if freed[run] > 0:
                key = (f"{freed[run]:.6g}", f"{seconds[run]:.6g}")
                groups.setdefault(key, []).append(run)
        kinds = [_RunKind(float(key[0]), float(key[1]), runs) for key, runs in groups.items()]
        return sorted(kinds, key=lambda kind: kind.seconds / kind.freed_bytes)

    def divide(self, limit_bytes: float) -> Division | None:
        """The division whose last stage ends first, None if none fits in `limit_bytes`.

        Of equally fast divisions, it is the one whose fullest stage is smallest.
        """
        capacity = limit_bytes * CAPACITY - self.working_bytes
        rematerialization = sum(kind.seconds * len(kind.runs) for kind in self.kinds)
        slowest = self.seconds[-1] + max(self.hops) + rematerialization
        ends = self._fill(slowest, capacity)
        if ends is None:
            return None
        lower = self.seconds[-1] / self.shape.stages
        for _ in range(HALVINGS):
            middle = (lower + slowest) / 2
            attempt = self._fill(middle, capacity)
            if attempt is None:
                lower = middle
            else:
                slowest = middle
                ends = attempt
        lower_bytes = 0.0
        for _ in range(HALVINGS):
            middle = (lower_bytes + capacity) / 2
            attempt = self._fill(slowest * SLACK, middle)
            if attempt is None:
                lower_bytes = middle
            else:
                capacity = middle
                ends = attempt
        return Division(ends, self._rematerialized_runs(ends, capacity), self.schedule)

    def stored_bytes(self, division: Division, stage: int) -> float | None:
        """Activations of a microbatch in a stage, None if some are rematerialized."""
        begin, end = list(_bounds(division.ends))[stage]
        if any(begin <= run < end for run in division.rematerialized):
            return None
        return self.activations[end] - self.activations[begin] + self.entering[begin]

    def _fill(
        self,
        slowest: float,
        capacity: float,
    ) -> list[int] | None:
        """The last runs of stages, each as full as possible; None if runs remain."""
        ends: list[int] = []
        begin = 0
        earlier = 0.0
        """Seconds of the stages before."""
        for stage in range(self.shape.stages):
            # Each later stage gets one run at least.
            latest = self.count - self.shape.stages + stage + 1
            most_seconds = slowest - self.delay * earlier
            by_seconds = bisect_right(self.seconds, self.seconds[begin] + most_seconds, begin) - 1
            low = begin
            stage_seconds = 0.0
            high = min(latest, by_seconds)
            while low < high:
                middle = (low + high + 1) // 2
                need = self._stage(
                    begin,
                    middle,
                    stage,
                    capacity,
                )
                if need.missing_bytes <= 0 and need.stage_seconds <= most_seconds:
                    low = middle
                    stage_seconds = need.stage_seconds
                else:
                    high = middle - 1
            if low == begin:
                return None
            ends.append(low - 1)
            begin = low
            earlier += stage_seconds
        return ends if begin == self.count else None

    def _stage(
        self,
        begin: int,
        end: int,
        stage: int,
        capacity: float,
    ) -> _Rematerialized:
        """The stage of runs `begin` to `end` (exclusive), rematerialized as memory needs."""
        later_stages = self.shape.stages - stage - 1
        in_flight = most_in_flight(self.schedule, self.shape.microbatches, later_stages)
        activations = self.activations[end] - self.activations[begin] + self.entering[begin]
        fixed = self.fixed[end] - self.fixed[begin]
        missing = fixed + activations * in_flight - capacity
        seconds = self.seconds[end] - self.seconds[begin] + self.hops[end]
        chosen = []
        for number, kind in enumerate(self.kinds):
            if missing <= 0:
                break
            first = bisect_left(kind.runs, begin)
            available = bisect_left(kind.runs, end) - first
            count = min(available, math.ceil(missing / (kind.freed_bytes * in_flight)))
            missing -= count * kind.freed_bytes * in_flight
            seconds += count * kind.seconds
            chosen.append((number, first, count))
        return _Rematerialized(missing, seconds, chosen)

    def _rematerialized_runs(
        self,
        ends: Sequence[int],
        capacity: float,
    ) -> list[int]:
        runs: list[int] = []
        for stage, (begin, end) in enumerate(_bounds(ends)):
            for number, first, count in self._stage(
                begin,
                end,
                stage,
                capacity,
            ).chosen:
                runs += self.kinds[number].runs[first : first + count]
        return sorted(runs)


def _prefix_sums(values: np.ndarray) -> list[float]:
    return [0.0, *np.cumsum(values).tolist()]


def _bounds(ends: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first run, run after the last) of each stage."""
    return itertools.pairwise([0, *(end + 1 for end in ends)])

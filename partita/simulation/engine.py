"""When tasks run: a discrete-event simulation that knows time, order and resources, not networks.

A task starts when all tasks before it have ended, its stream has come to it, and every resource that it uses is free.

- A **stream** runs its tasks one after the other in the order of their numbers: a device's kernels, the collectives that it issues.
- A **resource** serves tasks in the order in which they become ready, and where two do at once, by their numbers: a link that several
  streams share. A task may hold it for a part of its time: a transfer that a slow link holds up leaves the fast one to others.

What takes no time takes no turn. Tasks are numbered so that what comes before a task has a smaller number. Then the order of service is
unique, and there are two ways to the same times, to the bit:

- `run` from nothing: without resources one sweep over the tasks, else events from a heap;
- `Replay`, when the durations of some tasks change: the tasks from the first changed one on, in the order of the last run, and for every
  resource a check that this still is the order in which they become ready. Where it is not, events again.

The idea of re-simulating only what a change touches is FlexFlow's (Jia, Zaharia, Aiken, MLSys 2019, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numba import njit


@dataclass(frozen=True, eq=False)
class Tasks:
    """What is simulated. `before[first[k]:first[k+1]]` come before task k; `resource[held[k]:held[k+1]]` it holds for `share` of its time.

    `stream` is the one that runs a task, -1 for none.
    """

    seconds: np.ndarray
    stream: np.ndarray
    first: np.ndarray
    before: np.ndarray
    held: np.ndarray
    resource: np.ndarray
    share: np.ndarray
    streams: int
    resources: int

    @staticmethod
    def of(
        seconds: Sequence[float],
        before: Sequence[Sequence[int]],
        stream: Sequence[int] = (),
        uses: Sequence[Sequence[tuple[int, float]]] = (),
    ) -> Tasks:
        """Tasks from lists: per task its seconds, the tasks before it, its stream, and (resource, share) pairs that it uses.

        >>> run(Tasks.of([2.0, 1.0, 4.0], [[], [0], [0]])).end.tolist()
        [2.0, 3.0, 6.0]
        >>> run(Tasks.of([2.0, 1.0, 4.0], [[], [0], [0]], [0, 0, 0])).end.tolist()
        [2.0, 3.0, 7.0]
        """
        stream = stream or [-1] * len(seconds)
        uses = uses or [()] * len(seconds)
        flat = [use for mine in uses for use in mine]
        return Tasks(
            np.array(seconds, float),
            np.array(stream, np.int32),
            _starts(before),
            np.array([b for mine in before for b in mine], np.int32),
            _starts(uses),
            np.array([r for r, _ in flat], np.int32),
            np.array([share for _, share in flat], float),
            1 + max(stream, default=-1),
            1 + max((r for r, _ in flat), default=-1),
        )

    @property
    def count(self) -> int:
        return len(self.seconds)


def _starts(rows: Sequence[Sequence[object]]) -> np.ndarray:
    """Where each row starts when all stand in one array, and where the last ends."""
    return np.cumsum([0, *map(len, rows)]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Times:
    """When each task could have started but for resources, when it started and ended, in seconds; `order` is the order of service."""

    ready: np.ndarray
    start: np.ndarray
    end: np.ndarray
    order: np.ndarray

    @property
    def seconds(self) -> float:
        return float(self.end.max(initial=0.0))


def check(tasks: Tasks) -> Tasks:
    """The tasks themselves if the engine may rely on them; AssertionError otherwise."""
    numbers = np.repeat(np.arange(tasks.count), np.diff(tasks.first))
    assert len(tasks.first) == len(tasks.held) == tasks.count + 1, (
        "a row of tasks before, and of uses, per task"
    )
    assert len(tasks.stream) == tasks.count and np.all(tasks.stream < tasks.streams), (
        "streams are numbered"
    )
    assert np.all(tasks.before >= 0) and np.all(tasks.before < numbers), (
        "what comes before a task has a smaller number"
    )
    assert np.all(tasks.seconds >= 0) and np.all(np.isfinite(tasks.seconds)), (
        "seconds are finite and not negative"
    )
    assert np.all((tasks.resource >= 0) & (tasks.resource < tasks.resources)), (
        "resources are numbered"
    )
    assert np.all((tasks.share >= 0) & (tasks.share <= 1)), (
        "no task holds a resource longer than it runs"
    )
    return tasks


def critical(tasks: Tasks, times: Times) -> np.ndarray:
    """Per task whether it is on the critical path: one way back from the last end to the start, over what each task had to wait for."""
    found, ahead = np.zeros(tasks.count, bool), _ahead(tasks.seconds, tasks.stream, tasks.streams)
    last = _served_before(times.order, tasks.seconds, tasks.held, tasks.resource, tasks.resources)
    owner = np.repeat(np.arange(tasks.count), np.diff(tasks.held))
    k = int(np.argmax(times.end)) if tasks.count else -1
    while k >= 0:
        found[k] = True
        waited = [*tasks.before[tasks.first[k] : tasks.first[k + 1]], ahead[k]]
        binding = [int(b) for b in waited if b >= 0 and times.end[b] == times.start[k]]
        if not binding and times.start[k] > times.ready[k]:
            binding = [
                int(owner[use]) for use in last[tasks.held[k] : tasks.held[k + 1]] if use >= 0
            ]
            binding = [max(binding, key=lambda b: times.end[b])]
        k = max(binding, default=-1)
    return found


def run(tasks: Tasks) -> Times:
    """Simulates all tasks from nothing."""
    n = tasks.count
    times = Times(np.zeros(n), np.zeros(n), np.zeros(n), np.arange(n, dtype=np.int32))
    _run(tasks, times)
    return times


def _run(tasks: Tasks, times: Times) -> None:
    if tasks.resources:
        _events(
            tasks.seconds,
            _ahead(tasks.seconds, tasks.stream, tasks.streams),
            tasks.first,
            tasks.before,
            tasks.held,
            tasks.resource,
            tasks.share,
            tasks.resources,
            times.ready,
            times.start,
            times.end,
            times.order,
        )
    else:
        sweep(
            0,
            tasks.seconds,
            tasks.stream,
            tasks.streams,
            tasks.first,
            tasks.before,
            times.start,
            times.end,
        )
        times.ready[:] = times.start


@dataclass(eq=False)
class Replay:
    """A simulation that is kept up to date while durations change; its times are those of `run`, to the bit.

    >>> replay = Replay(Tasks.of([2.0, 1.0, 4.0], [[], [0], [0]]))
    >>> replay.change([1], [7.0]), run(replay.tasks).seconds
    (9.0, 9.0)
    """

    tasks: Tasks
    times: Times = field(init=False)
    again: int = 0
    """How often the order of service changed, and events were simulated again."""

    def __post_init__(self) -> None:
        self.tasks = replace(self.tasks, seconds=self.tasks.seconds.copy())
        self.times = run(self.tasks)
        self._link()

    def _link(self) -> None:
        tasks, n = self.tasks, self.tasks.count
        self._place = np.empty(n, np.int32)
        self._place[self.times.order] = np.arange(n, dtype=np.int32)
        self._ahead = _ahead(tasks.seconds, tasks.stream, tasks.streams)
        self._last = _served_before(
            self.times.order, tasks.seconds, tasks.held, tasks.resource, tasks.resources
        )
        self._owner = np.repeat(np.arange(n, dtype=np.int32), np.diff(tasks.held))

    def change(
        self, which: Sequence[int] | np.ndarray, seconds: Sequence[float] | np.ndarray
    ) -> float:
        """Gives some tasks other durations; the seconds of the whole."""
        tasks, times = self.tasks, self.times
        which, seconds = np.asarray(which, np.int64), np.asarray(seconds, float)
        if not len(which):
            return times.seconds
        turns = bool(np.any((tasks.seconds[which] > 0) != (seconds > 0)))
        tasks.seconds[which] = seconds
        if not tasks.resources:
            begin = int(which.min())
            sweep(
                begin,
                tasks.seconds,
                tasks.stream,
                tasks.streams,
                tasks.first,
                tasks.before,
                times.start,
                times.end,
            )
            times.ready[begin:] = times.start[begin:]
        elif turns or not _replay(
            int(self._place[which].min()),
            tasks.seconds,
            self._ahead,
            tasks.first,
            tasks.before,
            tasks.held,
            tasks.share,
            self._last,
            self._owner,
            times.order,
            times.ready,
            times.start,
            times.end,
        ):
            self.again += 1
            _run(tasks, times)
            self._link()
        return times.seconds


@njit(cache=True)
def sweep(begin, seconds, stream, streams, first, before, start, end):  # noqa: ANN001, ANN201
    """Times of the tasks from `begin` on, where nothing is shared between streams."""
    free, missing = np.full(streams, -1.0), streams
    k = begin - 1
    while k >= 0 and missing:
        s = stream[k]
        if s >= 0 and seconds[k] > 0 and free[s] < 0:
            free[s] = end[k]
            missing -= 1
        k -= 1
    for k in range(begin, len(seconds)):
        at = 0.0
        for j in range(first[k], first[k + 1]):
            at = max(at, end[before[j]])
        s = stream[k]
        if s >= 0 and seconds[k] > 0:
            at = max(at, free[s])
            free[s] = at + seconds[k]
        start[k] = at
        end[k] = at + seconds[k]


@njit(cache=True)
def _ahead(seconds, stream, streams):  # noqa: ANN001, ANN202
    """Per task, the one that its stream runs before it; -1 for none."""
    last, found = np.full(streams, -1, np.int32), np.full(len(seconds), -1, np.int32)
    for k in range(len(seconds)):
        if stream[k] >= 0 and seconds[k] > 0:
            found[k] = last[stream[k]]
            last[stream[k]] = k
    return found


@njit(cache=True)
def _events(
    seconds, ahead, first, before, held, resource, share, resources, ready, start, end, order
):  # noqa: ANN001, ANN202
    """Serves tasks by (ready, number) from a heap."""
    n = len(seconds)
    waits = np.zeros(n, np.int32)
    later = np.zeros(n + 1, np.int32)
    for k in range(n):
        waits[k] = first[k + 1] - first[k] + (ahead[k] >= 0)
        for j in range(first[k], first[k + 1]):
            later[before[j] + 1] += 1
        if ahead[k] >= 0:
            later[ahead[k] + 1] += 1
    for k in range(n):
        later[k + 1] += later[k]
    after, fill = np.empty(later[n], np.int32), later[:-1].copy()
    for k in range(n):
        for j in range(first[k], first[k + 1]):
            after[fill[before[j]]] = k
            fill[before[j]] += 1
        if ahead[k] >= 0:
            after[fill[ahead[k]]] = k
            fill[ahead[k]] += 1
    free = np.zeros(resources)
    heap, size = np.empty(n, np.int32), 0
    for k in range(n):
        ready[k] = 0.0
        if waits[k] == 0:
            size = _push(heap, size, k, ready)
    done = 0
    while size:
        k, size = _pop(heap, size, ready)
        order[done] = k
        done += 1
        at = ready[k]
        if seconds[k] > 0:
            for j in range(held[k], held[k + 1]):
                at = max(at, free[resource[j]])
            for j in range(held[k], held[k + 1]):
                free[resource[j]] = at + share[j] * seconds[k]
        start[k], end[k] = at, at + seconds[k]
        for j in range(later[k], later[k + 1]):
            m = after[j]
            ready[m] = max(ready[m], end[k])
            waits[m] -= 1
            if waits[m] == 0:
                size = _push(heap, size, m, ready)


@njit(cache=True)
def _sooner(a, b, ready):  # noqa: ANN001, ANN202
    return ready[a] < ready[b] or ready[a] == ready[b] and a < b


@njit(cache=True)
def _push(heap, size, k, ready):  # noqa: ANN001, ANN202
    i = size
    while i > 0 and _sooner(k, heap[(i - 1) // 2], ready):
        heap[i] = heap[(i - 1) // 2]
        i = (i - 1) // 2
    heap[i] = k
    return size + 1


@njit(cache=True)
def _pop(heap, size, ready):  # noqa: ANN001, ANN202
    top, size = heap[0], size - 1
    k, i = heap[size], 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and _sooner(heap[child + 1], heap[child], ready):
            child += 1
        if not _sooner(heap[child], k, ready):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = k
    return top, size


@njit(cache=True)
def _served_before(order, seconds, held, resource, resources):  # noqa: ANN001, ANN202
    """Per use of a resource, the use that it served before; -1 for the first."""
    last, found = np.full(resources, -1, np.int32), np.full(len(resource), -1, np.int32)
    for k in order:
        if seconds[k] > 0:
            for j in range(held[k], held[k + 1]):
                found[j] = last[resource[j]]
            for j in range(held[k], held[k + 1]):
                last[resource[j]] = j
    return found


@njit(cache=True)
def _replay(
    begin, seconds, ahead, first, before, held, share, last, owner, order, ready, start, end
):  # noqa: ANN001, ANN202
    """Times from place `begin` of the order on; False if some resource would now serve in another order."""
    for place in range(begin, len(order)):
        k = order[place]
        at = 0.0
        for j in range(first[k], first[k + 1]):
            at = max(at, end[before[j]])
        if ahead[k] >= 0:
            at = max(at, end[ahead[k]])
        ready[k] = at
        if seconds[k] > 0:
            for j in range(held[k], held[k + 1]):
                use = last[j]
                if use >= 0:
                    other = owner[use]
                    if ready[other] > ready[k] or ready[other] == ready[k] and other > k:
                        return False
                    at = max(at, start[other] + share[use] * seconds[other])
        start[k] = at
        end[k] = at + seconds[k]
    return True

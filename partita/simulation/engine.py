"""Discrete-event simulation of tasks. The engine knows time, order and resources, not networks.

A task starts when all tasks before it have ended, its stream has reached it, and every resource
that it uses is free.

- A **stream** runs its tasks one after the other, in the order of their numbers: the kernels of a
  device, the collectives that it issues.
- A **resource** serves tasks in the order in which they become ready, ties by number: a link that
  several streams share. A task may use
  a resource for a fraction of its time: a transfer that a slow link delays leaves the fast one to
  others.

A task that takes no time occupies no stream and no resource. A task has a larger number than the
tasks before it, so the order of service is unique. `run` simulates all tasks: without resources one
sweep over them (`sweep`), else events from a heap.

An incremental simulation calls `sweep` from the first changed task on. FlexFlow introduced the idea
of simulating again only the affected tasks (Jia, Zaharia, Aiken, MLSys 2019, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numba import njit


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks to simulate, as arrays. `before[first[k] : first[k + 1]]` are the tasks before task k.

    Task k uses resource `resource[first_use[k] : first_use[k + 1]]` for the fractions `share` of
    its seconds, in the same positions.
    """

    seconds: np.ndarray
    stream: np.ndarray
    """[task]: its stream, -1 for none."""
    first: np.ndarray
    before: np.ndarray
    first_use: np.ndarray
    resource: np.ndarray
    share: np.ndarray
    streams: int
    """Number of streams."""
    resources: int
    """Number of resources."""

    @staticmethod
    def of(
        seconds: Sequence[float],
        before: Sequence[Sequence[int]],
        stream: Sequence[int] = (),
        uses: Sequence[Sequence[tuple[int, float]]] = (),
    ) -> Tasks:
        """Tasks from lists: of every task its seconds, the tasks before it, its stream, and
        (resource, share) of its uses.

        >>> run(Tasks.of([2.0, 1.0, 4.0], [[], [0], [0]])).end.tolist()
        [2.0, 3.0, 6.0]
        >>> run(Tasks.of([2.0, 1.0, 4.0], [[], [0], [0]], [0, 0, 0])).end.tolist()
        [2.0, 3.0, 7.0]
        """
        stream = stream or [-1] * len(seconds)
        uses = uses or [()] * len(seconds)
        all_uses = list(chain.from_iterable(uses))
        all_before = list(chain.from_iterable(before))
        resources = [resource for resource, _ in all_uses]
        return Tasks(
            seconds=np.array(seconds, float),
            stream=np.array(stream, np.int32),
            first=_row_starts(before),
            before=np.array(all_before, np.int32),
            first_use=_row_starts(uses),
            resource=np.array(resources, np.int32),
            share=np.array([share for _, share in all_uses], float),
            streams=1 + max(stream, default=-1),
            resources=1 + max(resources, default=-1),
        )

    @property
    def count(self) -> int:
        return len(self.seconds)


def _row_starts(rows: Sequence[Sequence[object]]) -> np.ndarray:
    """[row + 1]: the start of every row in the concatenation of all rows, and its end."""
    return np.cumsum([0, *map(len, rows)]).astype(np.int32)


class Times(NamedTuple):
    """Simulated times of tasks, seconds."""

    ready: np.ndarray
    """[task]: end of the tasks before it and of its predecessor in the stream."""
    start: np.ndarray
    end: np.ndarray
    order: np.ndarray
    """The tasks in the order of service."""

    @property
    def seconds(self) -> float:
        """End of the last task."""
        return float(self.end.max(initial=0.0))


def check(tasks: Tasks) -> Tasks:
    """The same tasks. AssertionError if they break an assumption of the engine."""
    numbers = np.repeat(np.arange(tasks.count), np.diff(tasks.first))
    rows = (len(tasks.first), len(tasks.first_use))
    earlier = (tasks.before >= 0) & (tasks.before < numbers)
    valid_seconds = (tasks.seconds >= 0) & np.isfinite(tasks.seconds)
    numbered = (tasks.resource >= 0) & (tasks.resource < tasks.resources)
    fractions = (tasks.share >= 0) & (tasks.share <= 1)
    assert rows == (tasks.count + 1, tasks.count + 1), (
        "every task has a row of `before` and of uses"
    )
    assert len(tasks.stream) == tasks.count, "every task has a stream, or -1"
    assert np.all(tasks.stream < tasks.streams), "streams are numbered from 0"
    assert np.all(earlier), "tasks before a task have smaller numbers"
    assert np.all(valid_seconds), "seconds are finite and not negative"
    assert np.all(numbered), "resources are numbered from 0"
    assert np.all(fractions), "a task uses a resource for a fraction of its time"
    return tasks


def run(tasks: Tasks) -> Times:
    """The times of all tasks."""
    n = tasks.count
    times = Times(
        np.zeros(n),
        np.zeros(n),
        np.zeros(n),
        np.arange(n, dtype=np.int32),
    )
    if tasks.resources:
        _serve(_precedence(tasks), _uses(tasks), times)
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
    return times


def critical(tasks: Tasks, times: Times) -> np.ndarray:
    """[task]: whether it is on the critical path, one path from the last end back to the start.

    The predecessor of a task on the path is the task whose end let it start.
    """
    on_path = np.zeros(tasks.count, bool)
    precedence = _precedence(tasks)
    previous_use = _previous_use(times.order, tasks.seconds, _uses(tasks))
    task_of_use = np.repeat(np.arange(tasks.count), np.diff(tasks.first_use))
    k = int(np.argmax(times.end)) if tasks.count else -1
    while k >= 0:
        on_path[k] = True
        before = tasks.before[tasks.first[k] : tasks.first[k + 1]]
        waited_for = [int(b) for b in (*before, precedence.ahead[k]) if b >= 0]
        binding = [b for b in waited_for if times.end[b] == times.start[k]]
        if not binding and times.start[k] > times.ready[k]:
            uses = previous_use[tasks.first_use[k] : tasks.first_use[k + 1]]
            users = [int(task_of_use[use]) for use in uses if use >= 0]
            binding = [max(users, key=times.end.__getitem__)]
        k = max(binding, default=-1)
    return on_path


class _Precedence(NamedTuple):
    """Seconds of tasks, and the order among them.

    `ahead[k]` is the task before k in its stream, -1 for none.
    """

    seconds: np.ndarray
    ahead: np.ndarray
    first: np.ndarray
    before: np.ndarray


class _Uses(NamedTuple):
    """Uses of resources: task k has the uses `first[k]` to `first[k + 1]`."""

    first: np.ndarray
    resource: np.ndarray
    share: np.ndarray
    resources: int


def _precedence(tasks: Tasks) -> _Precedence:
    ahead = _ahead(tasks.seconds, tasks.stream, tasks.streams)
    return _Precedence(
        tasks.seconds,
        ahead,
        tasks.first,
        tasks.before,
    )


def _uses(tasks: Tasks) -> _Uses:
    return _Uses(
        tasks.first_use,
        tasks.resource,
        tasks.share,
        tasks.resources,
    )


@njit(cache=True)
def sweep(begin, seconds, stream, streams, first, before, start, end):
    """Writes `start` and `end` of the tasks from `begin` on, where streams share no resource.

    Those before `begin` are given.
    """
    free = np.full(streams, -1.0)
    missing = streams
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
def _ahead(seconds, stream, streams):
    """[task]: the task before it in its stream, -1 for none."""
    last = np.full(streams, -1, np.int32)
    ahead = np.full(
        len(seconds),
        -1,
        np.int32,
    )
    for k in range(len(seconds)):
        if stream[k] >= 0 and seconds[k] > 0:
            ahead[k] = last[stream[k]]
            last[stream[k]] = k
    return ahead


@njit(cache=True)
def _successors(precedence):
    """(first, after): `after[first[k] : first[k + 1]]` are the tasks that wait for task k, by
    `before` or by stream.
    """
    n = len(precedence.seconds)
    first = np.zeros(n + 1, np.int32)
    for k in range(n):
        for j in range(precedence.first[k], precedence.first[k + 1]):
            first[precedence.before[j] + 1] += 1
        if precedence.ahead[k] >= 0:
            first[precedence.ahead[k] + 1] += 1
    for k in range(n):
        first[k + 1] += first[k]
    after = np.empty(first[n], np.int32)
    fill = first[:-1].copy()
    for k in range(n):
        for j in range(precedence.first[k], precedence.first[k + 1]):
            b = precedence.before[j]
            after[fill[b]] = k
            fill[b] += 1
        b = precedence.ahead[k]
        if b >= 0:
            after[fill[b]] = k
            fill[b] += 1
    return first, after


@njit(cache=True)
def _serve(precedence, uses, times):
    """Writes the times of all tasks, served by (ready, number) from a heap."""
    seconds = precedence.seconds
    n = len(seconds)
    first_after, after = _successors(precedence)
    free = np.zeros(uses.resources)
    waits = np.empty(n, np.int32)
    heap = np.empty(n, np.int32)
    size = np.int64(0)
    for k in range(n):
        waits[k] = precedence.first[k + 1] - precedence.first[k] + (precedence.ahead[k] >= 0)
        times.ready[k] = 0.0
        if waits[k] == 0:
            size = _push(heap, size, np.int32(k), times.ready)
    done = 0
    while size:
        k, size = _pop(heap, size, times.ready)
        times.order[done] = k
        done += 1
        at = times.ready[k]
        if seconds[k] > 0:
            for j in range(uses.first[k], uses.first[k + 1]):
                at = max(at, free[uses.resource[j]])
            for j in range(uses.first[k], uses.first[k + 1]):
                free[uses.resource[j]] = at + uses.share[j] * seconds[k]
        times.start[k] = at
        times.end[k] = at + seconds[k]
        for j in range(first_after[k], first_after[k + 1]):
            m = after[j]
            times.ready[m] = max(times.ready[m], times.end[k])
            waits[m] -= 1
            if waits[m] == 0:
                size = _push(heap, size, m, times.ready)


@njit(cache=True)
def _sooner(a, b, ready):
    return ready[a] < ready[b] or (ready[a] == ready[b] and a < b)


@njit(cache=True)
def _push(heap, size, k, ready):
    """The size of the heap with task k."""
    i = size
    while i > 0 and _sooner(
        k,
        heap[(i - 1) // 2],
        ready,
    ):
        heap[i] = heap[(i - 1) // 2]
        i = (i - 1) // 2
    heap[i] = k
    return size + 1


@njit(cache=True)
def _pop(heap, size, ready):
    """(first task of the heap, size of the heap without it)."""
    top = heap[0]
    size = size - 1
    k = heap[size]
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and _sooner(
            heap[child + 1],
            heap[child],
            ready,
        ):
            child += 1
        if not _sooner(heap[child], k, ready):
            break
        heap[i] = heap[child]
        i = child
    heap[i] = k
    return top, size


@njit(cache=True)
def _previous_use(order, seconds, uses):
    """[use]: the use that its resource served before, -1 for the first."""
    last = np.full(uses.resources, -1, np.int32)
    previous = np.full(
        len(uses.resource),
        -1,
        np.int32,
    )
    for k in order:
        if seconds[k] > 0:
            for j in range(uses.first[k], uses.first[k + 1]):
                previous[j] = last[uses.resource[j]]
            for j in range(uses.first[k], uses.first[k + 1]):
                last[uses.resource[j]] = j
    return previous

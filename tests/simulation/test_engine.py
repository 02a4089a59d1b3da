"""The engine: examples by hand, a plain simulation, incremental sweeps."""

import heapq
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.simulation.engine import Tasks, check, run, sweep


def test_a_diamond_by_hand() -> None:
    times = run(Tasks.of([1.0, 2.0, 4.0, 1.0], [[], [0], [0], [1, 2]]))
    assert times.start.tolist() == [0, 1, 1, 5] and times.seconds == 6


def test_a_resource_serves_by_readiness_then_by_number() -> None:
    # Tasks 1, 2 and 3 use resource 0. Tasks 1 and 3 are ready at 0; task 2 waits for task 0, which
    # takes 3 seconds.
    times = run(
        Tasks.of(
            [3.0, 2.0, 2.0, 1.0], [[], [], [0], []], uses=[[], [(0, 1.0)], [(0, 1.0)], [(0, 1.0)]]
        )
    )
    assert times.start.tolist() == [0, 0, 3, 2]


def test_a_resource_used_for_a_fraction_is_free_before_the_task_ends() -> None:
    times = run(Tasks.of([4.0, 1.0], [[], []], uses=[[(0, 0.25)], [(0, 1.0)]]))
    assert times.start.tolist() == [0, 1] and times.seconds == 4


def test_a_stream_runs_by_number_and_tasks_without_time_occupy_nothing() -> None:
    tasks = Tasks.of([4.0, 1.0, 0.0, 2.0], [[], [], [], []], [0, 0, 0, 0])
    assert run(tasks).start.tolist() == [0, 4, 0, 5]


def test_a_chain_takes_the_sum_and_no_tasks_take_no_time() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.random(50)
    assert run(
        Tasks.of(seconds.tolist(), [[k - 1] if k else [] for k in range(50)])
    ).seconds == pytest.approx(seconds.sum())
    assert run(Tasks.of([], [])).seconds == 0


def plain(tasks: Tasks) -> list[float]:
    """The end of every task by the same rules, written plainly."""
    n = tasks.count
    before = [tasks.before[tasks.first[k] : tasks.first[k + 1]].tolist() for k in range(n)]
    uses = [
        [
            (int(tasks.resource[j]), float(tasks.share[j]))
            for j in range(tasks.first_use[k], tasks.first_use[k + 1])
        ]
        for k in range(n)
    ]
    for s in range(tasks.streams):
        turns = [k for k in range(n) if tasks.stream[k] == s and tasks.seconds[k] > 0]
        for a, b in zip(turns, turns[1:], strict=False):
            before[b].append(a)
    uses = [mine if tasks.seconds[k] > 0 else [] for k, mine in enumerate(uses)]
    end: dict[int, float] = {}
    free = dict.fromkeys(range(tasks.resources), 0.0)
    waiting = [(0.0, k) for k in range(n) if not before[k]]
    heapq.heapify(waiting)
    while waiting:
        ready, k = heapq.heappop(waiting)
        start = max([ready, *(free[r] for r, _ in uses[k])])
        end[k] = start + float(tasks.seconds[k])
        for r, share in uses[k]:
            free[r] = start + share * float(tasks.seconds[k])
        for m in range(k + 1, n):
            if k in before[m] and all(b in end for b in before[m]):
                heapq.heappush(waiting, (max(end[b] for b in before[m]), m))
    return [end[k] for k in range(n)]


@st.composite
def programs(draw: st.DrawFn, resources: int = 3) -> Tasks:
    n = draw(st.integers(1, 24))
    number = st.integers(0, 6).map(
        lambda i: i / 8
    )  # few different durations: ties are what is hard
    before = [
        draw(st.lists(st.integers(0, k - 1), max_size=3, unique=True)) if k else []
        for k in range(n)
    ]
    shares = st.sampled_from([0.0, 0.25, 1.0])
    uses = [
        [
            (r, draw(shares))
            for r in draw(st.lists(st.integers(0, resources - 1), max_size=2, unique=True))
        ]
        if resources
        else []
        for _ in range(n)
    ]
    streams = [draw(st.integers(-1, 1)) for _ in range(n)]
    return check(Tasks.of([draw(number) for _ in range(n)], before, streams, uses))


@settings(max_examples=200, deadline=None)
@given(programs())
def test_run_equals_the_plain_simulation(tasks: Tasks) -> None:
    assert run(tasks).end.tolist() == plain(tasks)


@settings(max_examples=200, deadline=None)
@given(
    programs(resources=0),
    st.lists(st.tuples(st.integers(0, 23), st.integers(0, 9)), min_size=1, max_size=12),
    st.integers(1, 3),
)
def test_a_sweep_from_the_first_changed_task_equals_a_whole_run_to_the_bit(
    tasks: Tasks, changes: list[tuple[int, int]], changes_at_once: int
) -> None:
    times = run(tasks)
    for i in range(0, len(changes), changes_at_once):
        numbers = []
        for number, eighths in changes[i : i + changes_at_once]:
            numbers.append(number % tasks.count)
            tasks.seconds[numbers[-1]] = eighths / 3
        sweep(
            min(numbers),
            tasks.seconds,
            tasks.stream,
            tasks.streams,
            tasks.first,
            tasks.before,
            times.start,
            times.end,
        )
        whole = run(tasks)
        assert times.start.tobytes() == whole.start.tobytes()
        assert times.end.tobytes() == whole.end.tobytes()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (Tasks.of([1.0, 1.0], [[1], []]), "smaller numbers"),
        (Tasks.of([-1.0], [[]]), "not negative"),
        (Tasks.of([float("inf")], [[]]), "finite"),
        (Tasks.of([1.0], [[]], uses=[[(0, 2.0)]]), "a fraction of its time"),
    ],
)
def test_assumptions_of_the_engine_are_checked(tasks: Tasks, message: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(tasks)

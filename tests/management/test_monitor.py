"""Changes of steps and names of slow processes, from synthetic and recorded times."""

from pathlib import Path

import numpy as np
import pytest

from partita.management.monitor import (
    Cusum,
    SlowProcesses,
    StepChanges,
    ThreadClock,
    ThreadTimes,
)

NOISE = 0.3
"""Spread of the logarithm of a stretch by other programs on the cores."""


def test_thread_times_are_those_between_two_readings(tmp_path: Path):
    threads = {"7": (1_000_000_000, 0), "8": (500_000_000, 250_000_000)}

    def write() -> None:
        for name, (running, queued) in threads.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "schedstat").write_text(f"{running} {queued} 12\n")

    write()
    clock = ThreadClock(tmp_path)
    assert clock.lap() == (0.0, 0.0)
    threads["7"] = (1_500_000_000, 100_000_000)
    threads["8"] = (600_000_000, 450_000_000)
    write()
    times = clock.lap()
    assert times == pytest.approx((0.6, 0.3))
    assert times.stretch == pytest.approx(1.5)
    clock.close()


def test_without_schedstat_nobody_waits(tmp_path: Path):
    clock = ThreadClock(tmp_path / "absent")
    clock.lap()
    assert clock.lap() == ThreadTimes(0.0, 0.0)


def test_a_cumulative_sum_by_hand():
    sums = Cusum(allowance=0.5, limit=2.0, threshold=2.5)
    for deviation, above in [(1.0, 0.5), (9.0, 2.0), (-1.0, 0.5), (2.0, 2.0), (1.5, 3.0)]:
        sums = sums.after(deviation)
        assert sums.above == pytest.approx(above)
    assert sums.has_risen and not sums.has_fallen


def named(stretches: np.ndarray) -> list[frozenset[int]]:
    """The names after each step; `stretches` is [step, process]."""
    slow = SlowProcesses()
    names = []
    for row in stretches:
        slow.add(dict(enumerate(row)))
        names.append(slow.named)
    return names


@pytest.mark.parametrize("processes", [2, 4])
def test_noise_names_nobody_in_ten_thousand_steps(processes: int):
    stretches = np.exp(np.random.default_rng(3).normal(0.3, NOISE, (10_000, processes)))
    assert not any(named(stretches))


def test_a_process_at_30_percent_is_named_within_10_steps_and_forgotten_within_15():
    for seed in range(40):
        rng = np.random.default_rng(seed)
        stretches = np.exp(rng.normal(0.3, NOISE, (120, 3)))
        stretches[40:80, 1] /= 0.3
        names = named(stretches)
        assert not any(names[:40])
        assert all(name == {1} for name in names[50:80])
        assert not any(names[95:])


def test_the_speed_of_a_slow_process_is_its_part_of_the_time():
    slow = SlowProcesses()
    # Seconds on a processor and in the queue, measured at a quota of 30 % of one core.
    fast, throttled = ThreadTimes(0.058, 0.012), ThreadTimes(0.058, 0.221)
    for _ in range(6):
        slow.add({0: fast.stretch, 1: throttled.stretch})
    assert slow.named == {1}
    assert slow.speeds((0, 1)) == pytest.approx((1.0, 0.25), abs=0.01)
    slow.add({0: fast.stretch})
    assert not slow.named


def test_a_lasting_change_of_a_steps_seconds_is_found_and_an_outlier_is_not():
    rng = np.random.default_rng(0)
    seconds = 0.05 * np.exp(rng.normal(0, 0.1, 4000))
    seconds[500] *= 20
    seconds[3000:] *= 2
    changes = StepChanges()
    found = {}
    for step, value in enumerate(seconds):
        factor = changes.add(value)
        if factor is not None:
            found[step] = factor
    assert min(found) >= 3000 and max(found) < 3020
    assert found[max(found)] == pytest.approx(2, rel=0.15)
    assert changes.reference == pytest.approx(2 * (changes.usual or 0), rel=0.15)

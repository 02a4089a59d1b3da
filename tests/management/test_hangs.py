"""When the launcher counts a process as hung, and how it starts lost ones again."""

import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from partita.cli import launch
from partita.cli.survivors import FROZEN_SECONDS, IDLE_SECONDS, Hang, Survivors
from partita.errors import ProcessError
from partita.execute.board import Board, Event, Progress, living
from partita.execute.members import device_order

MEDIANS = 0.5
LOOK = 0.01


def seconds_until_killed(
    all_of_it: float, main: float, in_step: bool, most: float = 200.0
) -> tuple[float, str]:
    """(seconds of waiting until a process is killed, the cause); `all_of_it` and `main` are seconds
    between two changes of the processor time of all threads and of the main one."""
    clock = [0.0]
    hang = Hang(lambda: (int(clock[0] / all_of_it), int(clock[0] / main)))
    while clock[0] < most:
        cause = hang.cause(clock[0], MEDIANS, in_step, 1000 + clock[0])
        if cause:
            return clock[0], cause
        clock[0] += LOOK
    return most, ""


def test_a_frozen_process_is_killed_within_the_limit_and_a_slow_one_never() -> None:
    seconds, cause = seconds_until_killed(1e9, 1e9, in_step=True)
    assert MEDIANS + FROZEN_SECONDS < seconds < MEDIANS + FROZEN_SECONDS + 0.1
    assert cause == "hung: it had no processor time for 2.5 s while another one waited"
    for change in (0.1, 0.5, 2.0):
        assert seconds_until_killed(change, 1e9, in_step=True) == (200.0, "")
        assert seconds_until_killed(change, change, in_step=False) == (200.0, "")


def test_a_process_that_sleeps_outside_of_a_step_is_killed_after_a_minute() -> None:
    seconds, cause = seconds_until_killed(0.02, 1e9, in_step=False)
    assert MEDIANS + IDLE_SECONDS < seconds < MEDIANS + IDLE_SECONDS + 0.1
    assert "slept" in cause


def test_a_launcher_that_was_stopped_itself_suspects_nobody() -> None:
    hang = Hang(lambda: (7, 7))
    assert hang.cause(0.3, MEDIANS, True, 1000.0) == ""
    assert hang.cause(60.3, MEDIANS, True, 1060.0) == "", "all were stopped, by Ctrl-Z"
    assert hang.cause(60.8, MEDIANS, True, 1060.4) == ""


def test_a_board_gives_what_was_written(tmp_path: Path) -> None:
    board = Board(tmp_path, 3)
    other = Board(tmp_path, 3)
    assert other.events() == () and other.progress(2) == Progress()
    progress = Progress(step=random.Random(0).randrange(10**9), in_step=True, since=2.5)
    board.write_progress(2, progress)
    assert other.progress(2) == progress and other.progress(1) == Progress()
    events = (Event(1, "was killed (SIGKILL)"), Event(0, "hung"))
    board.write_events(events[:1])
    assert other.events() == events[:1]
    board.write_events(events)
    assert other.events() == events


def test_the_launcher_tells_who_is_killed_and_when_nobody_is_left(tmp_path: Path) -> None:
    processes = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    said: list[str] = []
    board = Board(tmp_path, 3)
    survivors = Survivors(processes, board, (1, 2), said.append)
    assert board.start().process_ids == tuple(process.pid for process in processes)
    for number in (1, 0, 2):
        processes[number].kill()
        processes[number].wait()
        survivors.look()
    survivors.look()
    assert [event.process for event in board.events()] == [1, 0, 2]
    assert said == [
        "process 1 of 3 was killed (SIGKILL); 2 others go on.",
        "process 0 of 3 was killed (SIGKILL); the other one goes on.",
        "process 2 of 3 was killed (SIGKILL); no process is left to go on.",
    ]


def test_a_process_that_is_started_again_comes_back_once_it_waits(tmp_path: Path) -> None:
    def sleeper(number: int = 0) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sleep", "60"])

    processes = [sleeper() for _ in range(3)]
    board = Board(tmp_path, 3)
    survivors = Survivors(processes, board, (1, 2), [].append, sleeper, returns=3)

    def kill(number: int) -> None:
        processes[number].kill()
        processes[number].wait()
        survivors.look()

    kill(1)
    assert survivors.lost == {1} and board.start().process_ids[1] == processes[1].pid
    board.write_progress(1, Progress(waits=True, is_coming=True))
    survivors.look()
    assert living(3, board.events()) == (0, 2, 1) and survivors.lost == {1}, "not taken in yet"
    second = processes[1]
    kill(2)
    assert second.poll() is not None and living(3, board.events()) == (0,), "it begins again"
    for number in (1, 2):
        board.write_progress(number, Progress(waits=True, is_coming=True))
    survivors.look()
    assert living(3, board.events()) == (0, 1, 2) and survivors.lost == {1, 2}
    for number in (1, 2):
        board.write_progress(number, Progress())
    survivors.look()
    assert survivors.lost == set()
    kill(0)
    assert survivors.lost == {0} and processes[0].poll() is not None, "three were started again"
    for process in processes:
        process.kill()


@pytest.mark.parametrize("seed", range(5))
def test_devices_never_meet_twice_in_one_order(seed: int) -> None:
    draw = random.Random(seed)
    events: list[Event] = []
    orders: list[tuple[int, ...]] = []
    with pytest.raises(ProcessError, match="have met in all orders after losses of others"):
        while True:
            there = [list(living(4, events[:length])) for length in range(len(events) + 1)]
            orders.append(device_order([sorted(each) for each in there]))
            assert sorted(orders[-1]) == sorted(there[-1])
            gone = set(range(4)) - set(there[-1])
            if gone and (len(gone) == 2 or draw.random() < 0.5):
                events.append(Event(draw.choice(sorted(gone))))
            else:
                events.append(Event(draw.choice(there[-1]), "was killed"))
    assert len(set(orders)) == len(orders) > 12


def watched(processes: list[Any], lost: set[int]) -> tuple[launch.Outcome, str]:
    """The end of a managed group, and the sentence about it."""
    said: list[str] = []
    survivors: Any = SimpleNamespace(look=lambda: None, lost=lost)
    try:
        return launch._watch(processes, [None, None], said.append, survivors), " ".join(said)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def started(program: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", program])


def test_a_suspended_process_that_nobody_waits_for_ends_the_group(monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "STOPPED", 0.2)
    monkeypatch.setattr(launch, "GRACE", 0.2)
    ended, suspended = started(""), started("import time; time.sleep(60)")
    suspended.send_signal(signal.SIGSTOP)
    outcome, sentence = watched([ended, suspended], set())
    assert outcome.is_loss
    assert "process 1 of 2" in sentence and "does not answer" in sentence


def test_a_process_that_gives_up_after_a_loss_may_be_started_again(monkeypatch: Any) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.2)
    killed, gave_up = started("import time; time.sleep(60)"), started("raise SystemExit(75)")
    killed.kill()
    killed.wait()
    outcome, sentence = watched([killed, gave_up], {0})
    assert outcome == launch.Outcome(75, is_loss=True)
    assert "process 1 of 2 stopped with code 75" in sentence

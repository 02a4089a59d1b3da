"""When the launcher counts a process as hung."""

import random
import subprocess
from pathlib import Path

from partita.cli.survivors import FROZEN_SECONDS, IDLE_SECONDS, Hang, Survivors
from partita.execute.board import Board, Loss, Progress

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
    assert other.lost() == () and other.progress(2) == Progress()
    progress = Progress(step=random.Random(0).randrange(10**9), in_step=True, since=2.5)
    board.write_progress(2, progress)
    assert other.progress(2) == progress and other.progress(1) == Progress()
    losses = (Loss(1, "was killed (SIGKILL)"), Loss(0, "hung"))
    board.write_lost(losses[:1])
    assert other.lost() == losses[:1]
    board.write_lost(losses)
    assert other.lost() == losses


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
    assert [loss.process for loss in board.lost()] == [1, 0, 2]
    assert said == [
        "process 1 of 3 was killed (SIGKILL); 2 others go on.",
        "process 0 of 3 was killed (SIGKILL); the other one goes on.",
        "process 2 of 3 was killed (SIGKILL): no process is left to go on. The last save is "
        "complete: start again from it.",
    ]

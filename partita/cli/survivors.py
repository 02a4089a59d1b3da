"""The launcher's part in survival: it coordinates processes, tells who is lost, kills who hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from partita.execute.board import Board, Loss, Progress, Start

MEDIANS = 10
"""Median steps that the others wait for a process, before it counts as hung."""
FROZEN_SECONDS = 2.0
"""Seconds in addition to these, for a process that has no processor time at all."""
IDLE_SECONDS = 60.0
"""The same, for one whose main thread sleeps outside of a step."""
LOOK_SECONDS = 0.2
"""Seconds of waiting from which the processor time is looked at."""
GAP = 0.5
"""Time between two looks from which the launcher itself was stopped, seconds."""
HEARTBEAT = 28
"""Silence after which the coordination service counts a process as dead, seconds."""
MEMORY_FOLDER = Path("/dev/shm")


@contextmanager
def coordination(address: str, count: int) -> Iterator[None]:
    """Inside, this process coordinates `count` others, any of which may end."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    library: Any = import_module("jaxlib._jax")
    service = library.get_distributed_runtime_service(
        address, count, heartbeat_timeout=HEARTBEAT, shutdown_timeout=5, recoverable=True
    )
    try:
        yield
    finally:
        service.shutdown()


@contextmanager
def new_board(count: int) -> Iterator[Board]:
    """A notice board, in memory if the system has a folder there."""
    place = str(MEMORY_FOLDER) if os.access(MEMORY_FOLDER, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="partita-board-", dir=place) as folder:
        yield Board(Path(folder), count)


class Survivors:
    """Watches processes of which some may be lost.

    Args:
        processes: Process number i is that of the i-th one.
        board: Where losses are reported.
        outputs: File descriptors of the launcher's standard output and error, which all processes
            have inherited.
    """

    def __init__(
        self,
        processes: Sequence[subprocess.Popen[bytes]],
        board: Board,
        outputs: Sequence[int],
        say: Callable[[str], None],
    ) -> None:
        self.processes = processes
        self.board = board
        self.losses: list[Loss] = []
        self._say = say
        self._hangs = [Hang(partial(processor_time, process.pid)) for process in processes]
        ids = tuple(process.pid for process in processes)
        output, errors = outputs
        board.write_start(Start(ids, output, errors))

    @property
    def lost(self) -> set[int]:
        """The numbers of the lost processes."""
        return {loss.process for loss in self.losses}

    def look(self) -> None:
        """Reports processes that were killed since the last look; kills one that hangs."""
        running = [n for n, process in enumerate(self.processes) if process.poll() is None]
        for number, process in enumerate(self.processes):
            code = process.returncode
            if number not in self.lost and code is not None and is_killed(code):
                self._report(Loss(number, f"was killed ({signal.Signals(-code).name})"))
        if len(running) < 2:
            return
        progress = {number: self.board.progress(number) for number in running}
        now = time.monotonic()
        for number in running:
            waited = waited_seconds(number, progress, now)
            medians = MEDIANS * max(each.step_seconds for each in progress.values())
            cause = self._hangs[number].cause(waited, medians, progress[number].in_step, now)
            if cause:
                self.processes[number].kill()
                self.processes[number].wait()
                self._report(Loss(number, cause))
                return

    def _report(self, loss: Loss) -> None:
        self.losses.append(loss)
        count = len(self.processes)
        left = count - len(self.losses)
        if left == 0:
            self._say(
                f"process {loss.process} of {count} {loss.cause}: no process is left to go on. The "
                "last save is complete: start again from it."
            )
        else:
            others = "the other one goes" if left == 1 else f"{left} others go"
            self._say(f"process {loss.process} of {count} {loss.cause}; {others} on.")
        self.board.write_lost(self.losses)


def is_killed(code: int | None) -> bool:
    """Whether an exit code is that of a process that was killed, other than by Ctrl-C.

    >>> is_killed(-9), is_killed(-2), is_killed(1), is_killed(None)
    (True, False, False, False)
    """
    return code is not None and code < 0 and code != -signal.SIGINT


def waited_seconds(number: int, progress: Mapping[int, Progress], now: float) -> float:
    """Seconds for which some other process has been in a step; 0 if none is in one.

    >>> at = {0: Progress(7, True, since=3.0), 1: Progress(7, False, since=2.0)}
    >>> waited_seconds(1, at, now=5.0), waited_seconds(0, at, now=5.0)
    (2.0, 0.0)
    """
    others = [each for index, each in progress.items() if index != number]
    return max((now - other.since for other in others if other.in_step), default=0.0)


class Hang:
    """Finds out whether one process hangs: it uses no processor time while another one waits.

    A process that waits for others does use some: the threads of gloo and of the notice board look
    around some 20 times a second. A slow one does, and one that computes outside of a step.

    Args:
        clock: Gives the processor time of the process and of its main thread, nanoseconds.
    """

    def __init__(self, clock: Callable[[], tuple[int, int]]) -> None:
        self._clock = clock
        self._times = (-1, -1)
        self._changes = [0.0, 0.0]
        """When each of them changed last."""
        self._last_look = 0.0

    def cause(self, waited: float, median_steps: float, in_step: bool, now: float) -> str:
        """A phrase for the loss once the process hangs; else empty.

        Args:
            waited: Seconds for which another process has been in a step.
            median_steps: The time of MEDIANS steps, seconds.
            in_step: Whether the process waits for others itself.
            now: Seconds of a monotonic clock.
        """
        gap = now - self._last_look
        self._last_look = now
        if waited < LOOK_SECONDS:
            return ""
        times = self._clock()
        for number in range(2):
            if gap > GAP or times[number] != self._times[number]:
                self._changes[number] = now
        self._times = times
        frozen, idle = (now - changed + LOOK_SECONDS for changed in self._changes)
        if min(frozen, waited) > median_steps + FROZEN_SECONDS:
            return f"hung: it had no processor time for {frozen:.1f} s while another one waited"
        if not in_step and min(idle, waited) > median_steps + IDLE_SECONDS:
            return f"hung: it slept for {idle:.0f} s outside of a step while another one waited"
        return ""


def processor_time(process_id: int) -> tuple[int, int]:
    """Processor time of all threads of a process and of its main thread, nanoseconds, by Linux's
    /proc; the present time where it is not known, which changes as that of a live process does."""
    total = main = 0
    folder = f"/proc/{process_id}/task"
    try:
        for thread in os.listdir(folder):
            with open(f"{folder}/{thread}/schedstat", encoding="ascii") as file:
                nanoseconds = int(file.read().split()[0])
            total += nanoseconds
            if int(thread) == process_id:
                main = nanoseconds
    except (OSError, ValueError, IndexError):
        return time.monotonic_ns(), time.monotonic_ns()
    return total, main

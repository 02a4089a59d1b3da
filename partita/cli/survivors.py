"""The launcher's part in survival: it coordinates processes, tells who is lost, kills who hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from partita.execute.board import Board, Event, Progress, Start, living
from partita.files.folders import temporary_folder

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
    place = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK) else None
    with temporary_folder("partita-board-", place) as folder:
        yield Board(folder, count)


class Survivors:
    """Watches processes of which some may be lost.

    Args:
        processes: Process number i is that of the i-th one.
        board: Where losses are reported.
        outputs: File descriptors of the launcher's standard output and error, which all processes
            have inherited.
        start_again: Starts a lost process again; None if none is.
        returns: Lost processes that are started again, at most.
    """

    def __init__(
        self,
        processes: list[subprocess.Popen[bytes]],
        board: Board,
        outputs: Sequence[int],
        say: Callable[[str], None],
        start_again: Callable[[int], subprocess.Popen[bytes]] | None = None,
        returns: int = 0,
    ) -> None:
        self.processes = processes
        self.board = board
        self.events: list[Event] = []
        self._say = say
        self._outputs = outputs
        self._start_again = start_again
        self._returns = returns
        self._coming: set[int] = set()
        """Processes that were started again, and that the others have not taken in."""
        self._write_start()

    def _write_start(self) -> None:
        self._hangs = [Hang(partial(processor_time, process.pid)) for process in self.processes]
        ids = tuple(process.pid for process in self.processes)
        output, errors = self._outputs
        self.board.write_start(Start(ids, output, errors, self._start_again is not None))

    @property
    def lost(self) -> set[int]:
        """The numbers of the processes that are lost, or not taken in again yet."""
        live = living(len(self.processes), self.events)
        return set(range(len(self.processes))) - set(live) | self._coming

    def look(self) -> None:
        """Reports processes that were killed since the last look, kills one that hangs, and starts
        lost ones again."""
        self._look_at_coming()
        for number, process in enumerate(self.processes):
            code = process.poll()
            if number not in self.lost and code is not None and is_killed(code):
                self._report(number, f"was killed ({signal.Signals(-code).name})")
        running = [n for n, process in enumerate(self.processes) if process.poll() is None]
        running = [number for number in running if number not in self.lost]
        if running:
            self._start_lost()
        if len(running) > 1:
            self._kill_hung(running)

    def _kill_hung(self, running: Sequence[int]) -> None:
        progress = {number: self.board.progress(number) for number in running}
        now = time.monotonic()
        for number in running:
            waited = waited_seconds(number, progress, now)
            medians = MEDIANS * max(each.step_seconds for each in progress.values())
            cause = self._hangs[number].cause(waited, medians, progress[number].in_step, now)
            if cause:
                self._kill(number)
                self._report(number, cause)
                return

    def _kill(self, number: int) -> None:
        self.processes[number].kill()
        self.processes[number].wait()

    # ---------------------------------------------------------------------------------- returns

    def _start_lost(self) -> None:
        """Starts lost processes again, as often as allowed."""
        for number in sorted(self.lost - self._coming):
            if self._start_again is None or self._returns == 0:
                return
            self._returns -= 1
            self.board.write_progress(number, Progress(is_coming=True))
            self.processes[number] = self._start_again(number)
            self._coming.add(number)
            self._write_start()

    def _look_at_coming(self) -> None:
        """Announces processes that wait to be taken in, and forgets those that were or that have
        ended."""
        announced = living(len(self.processes), self.events)
        for number in sorted(self._coming):
            progress = self.board.progress(number)
            if self.processes[number].poll() is not None:
                self._coming.discard(number)
                self._say(f"process {number}, which was started again, has ended.")
                if number in announced:
                    self.events.append(Event(number, "ended before it was taken in"))
                    self.board.write_events(self.events)
            elif number not in announced and progress.waits:
                self.events.append(Event(number))
                self.board.write_events(self.events)
            elif number in announced and not progress.is_coming:
                self._coming.discard(number)

    def _report(self, number: int, cause: str) -> None:
        for other in sorted(self._coming):
            # It may be about to meet the lost one: it begins again.
            self._coming.discard(other)
            self._kill(other)
            if other in living(len(self.processes), self.events):
                self.events.append(Event(other, "was not taken in yet"))
        self.events.append(Event(number, cause))
        count = len(self.processes)
        left = count - len(self.lost)
        if left == 0:
            self._say(f"process {number} of {count} {cause}; no process is left to go on.")
        else:
            others = "the other one goes" if left == 1 else f"{left} others go"
            self._say(f"process {number} of {count} {cause}; {others} on.")
        self.board.write_events(self.events)


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

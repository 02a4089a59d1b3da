"""The live processes of a group. Ask here, not `jax.process_count()`, which counts the dead.

JAX's client keeps the devices and the numbers of processes that are gone. Under `--manage` the
launcher says on a notice board who is lost. A thread of each process reads it, frees a step that
waits for the dead, and takes the terminal over if this process is now the first. The training
itself then calls `leave`, at a point where it can go on without them; from there on the functions
here count the live processes alone.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import jax

from partita.execute.board import Board, Loss, Progress
from partita.execute.connections import close_connections

PERIOD = 0.05
"""Time between two looks at the notice board, seconds."""
TIMED = 25
"""Steps whose median time the launcher gets."""
NOTICE = 0.06
"""Time for a step to fail by itself after a loss, before its connections are closed, seconds."""


class _Group:
    """What this process knows of its group."""

    def __init__(self) -> None:
        self.board: Board | None = None
        self.lost: frozenset[int] = frozenset()
        """Processes that this one goes on without."""
        self.lock = threading.Lock()
        self.progress = Progress()
        self.step_seconds: deque[float] = deque(maxlen=TIMED)

    def note(self, progress: Progress) -> None:
        """Writes this process's progress on the board."""
        assert self.board is not None
        self.progress = progress
        self.board.write_progress(index(), progress)


_group = _Group()


def index() -> int:
    """The number of this process: that of its start."""
    return jax.process_index()


def alive() -> tuple[int, ...]:
    """The numbers of the processes that train together, ascending."""
    return tuple(i for i in range(jax.process_count()) if i not in _group.lost)


def count() -> int:
    """Number of processes that train together."""
    return jax.process_count() - len(_group.lost)


def first() -> int:
    """The number of the process that prints and writes files: the lowest one."""
    return alive()[0]


def generation() -> int:
    """Number of processes that were lost: it names meetings, which differ before and after."""
    return len(_group.lost)


def devices(without: int | None = None) -> list[Any]:
    """The devices of the live processes, in an order for a new mesh; after the loss of one more.

    The order is reversed after every other loss. Gloo keeps a connection per ordered list of
    devices for good, also a broken one: two devices that go on together must not meet in the order
    in which they were connected when another one died (jaxlib 0.10.2).
    """
    lost = _group.lost if without is None else _group.lost | {without}
    live = [device for device in jax.devices() if device.process_index not in lost]
    return live[::-1] if len(lost) % 2 else live


def lost() -> frozenset[int]:
    """The processes that this one goes on without."""
    return _group.lost


def board() -> Board | None:
    """The notice board, if a launcher manages this group."""
    return _group.board


def news() -> tuple[Loss, ...]:
    """Losses that the launcher has reported, and that this process has not yet left."""
    if _group.board is None:
        return ()
    return tuple(loss for loss in _group.board.lost() if loss.process not in _group.lost)


def leave(losses: tuple[Loss, ...]) -> None:
    """Goes on without some processes. All others do the same, before they next meet."""
    with _group.lock:
        _group.lost = _group.lost | {loss.process for loss in losses}


@contextmanager
def meeting() -> Iterator[None]:
    """Inside, this process computes or waits with others: the launcher sees on the board who keeps
    whom waiting."""
    if _group.board is None:
        yield
        return
    progress = _group.progress
    outer = progress.in_step
    _group.note(replace(progress, in_step=True, since=time.monotonic()))
    try:
        yield
    finally:
        _group.note(replace(_group.progress, in_step=outer, since=time.monotonic()))


def finish_step(seconds: float) -> None:
    """Notes a finished step for the launcher."""
    if _group.board is None:
        return
    _group.step_seconds.append(seconds)
    progress = replace(_group.progress, step=_group.progress.step + 1)
    if progress.step < TIMED or progress.step % TIMED == 0:
        progress = replace(progress, step_seconds=median(_group.step_seconds))
    _group.note(progress)


def watch(board: Board) -> None:
    """Follows a launcher's notice board from now on, in a thread."""
    _group.board = board
    threading.Thread(target=_follow, args=(board,), daemon=True).start()


def _follow(board: Board) -> None:
    """Frees steps that wait for lost processes, and takes the terminal over."""
    closed: frozenset[int] = frozenset()
    is_silent = index() > 0
    while True:
        time.sleep(PERIOD)
        lost = frozenset(loss.process for loss in board.lost())
        if lost <= closed:
            continue
        live = [i for i in range(board.count) if i not in lost]
        if is_silent and live and live[0] == index():
            _show_output(board)
            is_silent = False
        time.sleep(NOTICE)
        with _group.lock:
            # A process that has left the lost ones may be meeting the others by new connections.
            if not lost <= _group.lost:
                ids = board.start().process_ids
                close_connections([ids[i] for i in live if i != index()])
        closed = lost


def _show_output(board: Board) -> None:
    """Gives this process the launcher's output, which the first one had."""
    start = board.start()
    os.dup2(start.output, 1)
    os.dup2(start.errors, 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)

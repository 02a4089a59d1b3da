"""The live processes of a group. Ask here, not `jax.process_count()`, which counts the dead.

JAX's client keeps the devices and the numbers of processes that are gone. Under `--manage` the
launcher says on a notice board who is lost. A thread of each process reads it, frees a step that
waits for the dead, and takes the terminal over if this process is now the first. The training
itself then calls `leave`, at a point where it can go on without them; from there on the functions
here count the live processes alone.

A lost process that is started again waits at its first step until the others take it in
(`execute.rejoining`). Until then it counts as alone, and as not the first.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import jax

from partita.errors import ProcessError
from partita.execute.board import Board, Event, Progress, living
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
        self.events: tuple[Event, ...] = ()
        """Losses and returns that this process has followed."""
        self.is_returning = False
        """Whether this process was started again, and does not train with the others yet."""
        self.has_returns: bool | None = None
        """Whether the launcher starts lost processes again; None before it is known."""
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
    """The numbers of the processes that train together, the longest there first."""
    if _group.is_returning:
        return (index(),)
    return living(jax.process_count(), _group.events)


def count() -> int:
    """Number of processes that train together."""
    return len(alive())


def first() -> int:
    """The number of the process that prints and writes files: the one that is longest there."""
    if _group.is_returning:
        return living(jax.process_count(), _group.events)[0]
    return alive()[0]


def generation() -> int:
    """Number of losses and returns: it names meetings, which differ before and after."""
    return 0 if _group.is_returning else len(_group.events)


def devices(without: int | None = None) -> list[Any]:
    """The devices of the live processes, in an order for a new mesh; after the loss of one more.

    Gloo keeps a connection per ordered list of devices for good, also a broken one (jaxlib
    0.10.2), so every set of devices that meets again does in another order.
    """
    if _group.is_returning:
        return jax.local_devices()
    events = _group.events
    if without is not None:
        events = (*events, Event(without, "may be lost"))
    if not events:
        return jax.devices()
    by_id = {device.id: device for device in jax.devices()}
    return [by_id[number] for number in device_order(_meetings(events))]


def _meetings(events: Sequence[Event]) -> list[list[int]]:
    """The devices that were there before and after each event, by their numbers."""
    meetings = []
    for length in range(len(events) + 1):
        there = living(jax.process_count(), events[:length])
        meetings.append([d.id for d in jax.devices() if d.process_index in there])
    return meetings


def device_order(history: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """An order of the last set of devices that no earlier set was in.

    Every other one is reversed: two devices that go on together must not meet in the order in
    which they were connected when another one died. ProcessError once all orders were used.

    >>> device_order([[0, 1, 2]]), device_order([[0, 1, 2], [0, 1]])
    ((0, 1, 2), (1, 0))
    >>> device_order([[0, 1, 2], [0, 1], [0, 1, 2]])
    (1, 2, 0)
    """
    used: set[tuple[int, ...]] = set()
    order: tuple[int, ...] = ()
    for number, there in enumerate(history):
        fresh = (each for each in _orders(there, number % 2 == 1) if each not in used)
        order = next(fresh, ())
        if not order:
            listed = ", ".join(map(str, there))
            raise ProcessError(
                f"Devices {listed} have met in all orders after losses of others, and cannot meet "
                "again. Start again from the last save."
            )
        if len(order) > 1:
            used.add(order)
    return order


def _orders(devices: Sequence[int], is_reversed: bool) -> Iterator[tuple[int, ...]]:
    """Orders of devices: rotations first, then all."""
    ahead = tuple(devices)
    for start in (ahead[::-1], ahead) if is_reversed else (ahead, ahead[::-1]):
        for turn in range(len(start)):
            yield (*start[turn:], *start[:turn])
    yield from itertools.permutations(ahead)


def lost() -> frozenset[int]:
    """The processes that this one goes on without."""
    return frozenset(range(jax.process_count())) - frozenset(alive())


def is_returning() -> bool:
    """Whether this process was started again, and does not train with the others yet."""
    return _group.is_returning


def board() -> Board | None:
    """The notice board, if a launcher manages this group."""
    return _group.board


def news() -> tuple[Event, ...]:
    """Losses that the launcher has reported, and that this process has not yet left."""
    return tuple(event for event in _unfollowed() if event.cause)


def _unfollowed() -> tuple[Event, ...]:
    if _group.board is None or _group.is_returning:
        return ()
    return _group.board.events()[len(_group.events) :]


def leave() -> tuple[Event, ...]:
    """Goes on without the processes that are newly lost, and gives their losses. All others do the
    same, before they next meet."""
    unfollowed = _unfollowed()
    losses = [number for number, event in enumerate(unfollowed, start=1) if event.cause]
    if not losses:
        return ()
    follow(len(_group.events) + losses[-1])
    return tuple(event for event in unfollowed if event.cause)


def has_returns() -> bool:
    """Whether the launcher starts lost processes again."""
    if _group.board is None:
        return False
    if _group.has_returns is None:
        _group.has_returns = _group.board.start().returns
    return _group.has_returns


def returned() -> int:
    """Number of all events so far, if the last ones are returns that this process has not
    followed; else 0. Also 0 where the devices have met in all orders: they cannot again."""
    unfollowed = _unfollowed()
    if not unfollowed or any(event.cause for event in unfollowed):
        return 0
    try:
        device_order(_meetings((*_group.events, *unfollowed)))
    except ProcessError:
        return 0
    return len(_group.events) + len(unfollowed)


def alive_after(number: int) -> tuple[int, ...]:
    """The live processes once a number of events is followed."""
    assert _group.board is not None
    return living(jax.process_count(), _group.board.events()[:number])


def follow(number: int) -> None:
    """Goes on with the processes that are there after a number of events."""
    assert _group.board is not None
    with _group.lock:
        _group.events = _group.board.events()[:number]
        _group.is_returning = False


def note_waiting() -> None:
    """Tells the launcher that this process waits for the others to take it in."""
    _group.note(replace(_group.progress, waits=True))


def note_taken_in() -> None:
    """Tells the launcher that this process trains with the others."""
    _group.note(replace(_group.progress, waits=False, is_coming=False))


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
    if index() not in living(board.count, board.events()):
        _group.events = board.events()
        _group.is_returning = True
        _group.progress = Progress(is_coming=True)
    threading.Thread(target=_follow, args=(board, len(board.events())), daemon=True).start()


def _follow(board: Board, known: int) -> None:
    """Frees steps that wait for lost processes, and takes the terminal over."""
    is_silent = index() > 0 or known > 0
    while True:
        time.sleep(PERIOD)
        events = board.events()
        if len(events) == known:
            continue
        live = living(board.count, events)
        if is_silent and live and live[0] == index():
            _show_output(board)
            is_silent = False
        losses = [number for number, event in enumerate(events, start=1) if event.cause]
        if losses[-1] > known:
            time.sleep(NOTICE)
            with _group.lock:
                # A process that has left the lost ones may be meeting the others by new
                # connections.
                if losses[-1] > len(_group.events):
                    ids = board.start().process_ids
                    close_connections([ids[i] for i in live if i != index()])
        known = len(events)


def _show_output(board: Board) -> None:
    """Gives this process the launcher's output, which the first one had."""
    start = board.start()
    os.dup2(start.output, 1)
    os.dup2(start.errors, 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)

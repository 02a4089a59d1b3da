"""The notice board between a launcher and its processes: a folder of the host's own.

The launcher writes which processes it has started and which are lost; each process writes its
steps. Nothing here needs JAX: the launcher reads a board without it.
"""

from __future__ import annotations

import json
import mmap
import struct
import time
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from partita.files.reading import FileKind, read_json
from partita.files.schema import items, record
from partita.files.writing import write_text

STARTED = "started.json"
EVENTS = "events.json"
PROGRESS = "progress"
RECORD = struct.Struct("<qqddqq")
"""A process's record in the file of progress."""
KIND = FileKind("the notice board of a run", "start the run again", by_hand=False)


@dataclass(frozen=True)
class Event:
    """A process is gone, or back."""

    process: int
    cause: str = ""
    """Of a loss: "was killed (SIGKILL)", "made no step for 3.1 s while the others waited". Empty
    for a process that was started again, and waits to train with the others."""


@dataclass(frozen=True)
class Start:
    """The processes of a run, and the launcher's own output for the one that prints."""

    process_ids: tuple[int, ...]
    """[process]: its number in the operating system."""
    output: int
    """File descriptor of the launcher's standard output."""
    errors: int
    """File descriptor of its standard error."""
    returns: bool = False
    """Whether a lost process is started again."""


@dataclass(frozen=True)
class Progress:
    """How far a process is."""

    step: int = 0
    """Steps that it has finished."""
    in_step: bool = False
    """Whether it computes or waits in a step, and does not run Python's code around it."""
    since: float = 0.0
    """The moment of its last step's begin or end, seconds of the monotonic clock."""
    step_seconds: float = 0.0
    """Median time of a step; 0 before two of them."""
    waits: bool = False
    """Whether it was started again, and stands at its first step."""
    is_coming: bool = False
    """Whether it was started again, and does not train with the others yet."""


EVENT_LIST = items(record(Event))


class Board:
    """The board of `count` processes in a folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self._events_time = 0
        self._events: tuple[Event, ...] = ()
        path = folder / PROGRESS
        size = RECORD.size * count
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._progress = mmap.mmap(file.fileno(), size)

    def write_start(self, start: Start) -> None:
        """Written by the launcher, once all processes are started, and whenever one is again."""
        write_text(self.folder / STARTED, json.dumps(astuple(start)))

    def start(self) -> Start:
        """The started processes; waits for the launcher to write them."""
        path = self.folder / STARTED
        while not path.exists():
            time.sleep(0.005)
        return read_json(path, KIND, record(Start))

    def write_events(self, events: Iterable[Event]) -> None:
        """Written by the launcher: all losses and returns so far."""
        write_text(self.folder / EVENTS, json.dumps([astuple(event) for event in events]))

    def events(self) -> tuple[Event, ...]:
        """All losses and returns so far; costs one `stat` while nothing is new."""
        path = self.folder / EVENTS
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return ()
        if changed != self._events_time:
            self._events = tuple(read_json(path, KIND, EVENT_LIST))
            self._events_time = changed
        return self._events

    def write_progress(self, process: int, progress: Progress) -> None:
        """Written by each process, twice a step: about 2 us."""
        RECORD.pack_into(self._progress, process * RECORD.size, *astuple(progress))

    def progress(self, process: int) -> Progress:
        """The last words of a process on its steps."""
        values = RECORD.unpack_from(self._progress, process * RECORD.size)
        step, in_step, since, seconds, waits, is_coming = values
        return Progress(step, bool(in_step), since, seconds, bool(waits), bool(is_coming))


def living(count: int, events: Iterable[Event]) -> tuple[int, ...]:
    """The processes that are there after some events, the longest there first.

    >>> living(3, [Event(0, "was killed"), Event(0)])
    (1, 2, 0)
    """
    there = list(range(count))
    for event in events:
        if event.process in there:
            there.remove(event.process)
        if not event.cause:
            there.append(event.process)
    return tuple(there)

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
LOST = "lost.json"
PROGRESS = "progress"
RECORD = struct.Struct("<qqdd")
"""A process's record in the file of progress."""
KIND = FileKind("the notice board of a run", "start the run again", by_hand=False)


@dataclass(frozen=True)
class Loss:
    """A process that is gone."""

    process: int
    cause: str
    """"was killed (SIGKILL)", "made no step for 3.1 s while the others waited"."""


@dataclass(frozen=True)
class Start:
    """The processes of a run, and the launcher's own output for the one that prints."""

    process_ids: tuple[int, ...]
    """[process]: its number in the operating system."""
    output: int
    """File descriptor of the launcher's standard output."""
    errors: int
    """File descriptor of its standard error."""


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


LOSSES = items(record(Loss))


class Board:
    """The board of `count` processes in a folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        self._lost_time = 0
        self._lost: tuple[Loss, ...] = ()
        path = folder / PROGRESS
        size = RECORD.size * count
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._progress = mmap.mmap(file.fileno(), size)

    def write_start(self, start: Start) -> None:
        """Written by the launcher, once all processes are started."""
        write_text(self.folder / STARTED, json.dumps(astuple(start)))

    def start(self) -> Start:
        """The started processes; waits for the launcher to write them."""
        path = self.folder / STARTED
        while not path.exists():
            time.sleep(0.005)
        return read_json(path, KIND, record(Start))

    def write_lost(self, losses: Iterable[Loss]) -> None:
        """Written by the launcher: all losses so far."""
        write_text(self.folder / LOST, json.dumps([astuple(loss) for loss in losses]))

    def lost(self) -> tuple[Loss, ...]:
        """All losses so far; costs one `stat` while nothing is new."""
        path = self.folder / LOST
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return ()
        if changed != self._lost_time:
            self._lost = tuple(read_json(path, KIND, LOSSES))
            self._lost_time = changed
        return self._lost

    def write_progress(self, process: int, progress: Progress) -> None:
        """Written by each process, twice a step: about 2 us."""
        values = (progress.step, progress.in_step, progress.since, progress.step_seconds)
        RECORD.pack_into(self._progress, process * RECORD.size, *values)

    def progress(self, process: int) -> Progress:
        """The last words of a process on its steps."""
        step, in_step, since, seconds = RECORD.unpack_from(self._progress, process * RECORD.size)
        return Progress(step, bool(in_step), since, seconds)

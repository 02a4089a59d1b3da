"""Snapshots of a run that its launcher starts again after a process is lost.

Each call of `fit` gets a `Snapshots` callback. A script that is started again runs from its top:
calls of `fit` that were complete return at once with their history, the interrupted one goes on
after its last snapshot. Callbacks of the script start anew.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
from keras.src.backend.jax.trainer import JAXTrainer

from partita.execute.processes import from_first, is_first
from partita.files.reading import FileKind, read_json
from partita.files.schema import flag, items, mapping, table, text, whole_number
from partita.files.writing import write_text
from partita.keras.checkpoint import Checkpoint
from partita.keras.hooks import trainer_methods
from partita.units import format_bytes

PACE = 50.0
"""Least time between two snapshots, in durations of a snapshot: they cost at most 2 % of a run."""
KEPT = 2
"""Number of snapshots that are kept: the last one may be incomplete."""
RECORD = "run.json"
NUMBER_LENGTH = 40
"""Length of the longest number, characters."""


@dataclass(frozen=True)
class Record:
    """The history of a call of `fit`, as far as it has run."""

    epochs: tuple[int, ...] = ()
    history: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of each metric, one per epoch, as text: JSON has no NaN."""
    is_complete: bool = False

    def until(self, epoch: int) -> Record:
        """The record up to an epoch."""
        count = sum(number <= epoch for number in self.epochs)
        history = {name: values[:count] for name, values in self.history.items()}
        return replace(self, epochs=self.epochs[:count], history=history)

    def with_epoch(self, epoch: int, logs: Mapping[str, Any]) -> Record:
        """The record with one more epoch."""
        history = dict(self.history)
        for name, value in logs.items():
            history[name] = (*history.get(name, ()), repr(float(value)))
        return replace(self, epochs=(*self.epochs, epoch), history=history)


SCHEMA = table(
    {
        "epochs": items(whole_number()),
        "history": mapping(items(text(NUMBER_LENGTH))),
        "is_complete": flag,
    }
)
"""The schema of a record in a file."""
KIND = FileKind("the record of a run", "start the run without --restarts", by_hand=False)


class Snapshots(Checkpoint):
    """Saves a call of `fit` so that the same call in a new process goes on with it.

    Args:
        folder: A folder of this call alone.
        report: Called with sentences.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        super().__init__(folder, keep=KEPT)
        self._report = report
        self._record = Record()
        self._is_pending = False
        self._has_space = True
        self._last_end = 0.0
        self._last_seconds = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._has_space = from_first("space for snapshots", self._space_text) == ""
        epoch = self._resumed_epoch
        if epoch is None:
            return
        record = Record(**read_json(self.folder / RECORD, KIND, SCHEMA))
        self._record = record.until(epoch)
        self._is_pending = True
        model: Any = self.model
        if self._record.is_complete:
            model._initial_epoch = sys.maxsize
        elif is_first():
            self._report(f"'{model.name}' goes on after epoch {epoch + 1}")

    def _space_text(self) -> str:
        """A sentence if the folder has no space for snapshots; else empty."""
        arrays = [variable.value for variable in self._variables().values()]
        needed = (KEPT + 1) * sum(array.nbytes for array in arrays)
        free = shutil.disk_usage(self.folder).free
        if needed <= free:
            return ""
        sentence = (
            f"no snapshots: they need {format_bytes(needed)} in {str(self.folder.parent)!r}, which "
            f"has {format_bytes(free)} free. Set TMPDIR to another folder. A restart begins anew."
        )
        self._report(sentence)
        return sentence

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._resume_history()
        super().on_epoch_begin(epoch, logs)

    def _resume_history(self) -> None:
        """Puts the epochs before the snapshot into Keras's history, once."""
        if not self._is_pending:
            return
        self._is_pending = False
        model: Any = self.model
        history: keras.callbacks.History = model.history
        history.epoch = [*self._record.epochs, *history.epoch]
        for name, values in self._record.history.items():
            history.history[name] = [float(value) for value in values]

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._record = self._record.with_epoch(epoch, logs or {})
        if not self._has_space:
            return
        is_due = from_first(f"snapshot of epoch {epoch}", lambda: str(self._is_due()))
        if is_due == str(True):
            self._unsaved_epoch = None
            self._save(epoch)
        else:
            self._unsaved_epoch = epoch

    def _is_due(self) -> bool:
        return time.monotonic() - self._last_end >= PACE * self._last_seconds

    def _save(self, epoch: int) -> None:
        start = time.monotonic()
        self._write_record()
        super()._save(epoch)
        self._last_end = time.monotonic()
        self._last_seconds = self._last_end - start

    def _write_record(self) -> None:
        if is_first():
            write_text(self.folder / RECORD, json.dumps(asdict(self._record)))

    def on_train_end(self, logs: Any = None) -> None:
        self._resume_history()
        super().on_train_end(logs)
        if self._has_space:
            self._record = replace(self._record, is_complete=True)
            self._write_record()


@contextmanager
def saving_snapshots(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Inside, every call of `fit` is saved in a folder of its own, and goes on from there.

    Calls are numbered in their order, so a script that runs again must make the same calls. A
    call with a `Checkpoint` of the script is left alone.
    """
    original = JAXTrainer.fit
    signature = inspect.signature(original)
    count = 0

    @functools.wraps(original)
    def fit(model: Any, *positional: Any, **keywords: Any) -> Any:
        nonlocal count
        arguments = signature.bind(model, *positional, **keywords)
        given = arguments.arguments.get("callbacks")
        callbacks = given if isinstance(given, (list, tuple)) else [given] if given else []
        is_list = isinstance(given, keras.callbacks.CallbackList)
        if not is_list and not any(isinstance(each, Checkpoint) for each in callbacks):
            snapshots = Snapshots(folder / f"fit-{count}", report)
            arguments.arguments["callbacks"] = [*callbacks, snapshots]
            count += 1
        return original(*arguments.args, **arguments.kwargs)

    with trainer_methods(fit=fit):
        yield

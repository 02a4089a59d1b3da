"""Checkpoints between epochs by Orbax: every process writes its own part, once; any plan and any number of processes resumes."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np

from partita.errors import PartitaError
from partita.execute.processes import together, whole


class Checkpoint(keras.callbacks.Callback):
    """A Keras callback that saves weights, optimizer and epoch after every epoch, or `every` so many and at the end, and resumes where the last save ended.

    >>> model.fit(x, y, epochs=10, callbacks=[partita.Checkpoint("checkpoints")])     # doctest: +SKIP

    Run again after an interruption, the same line goes on with the epoch that was not finished. `keep`: how many are kept. Split
    variables are written from where they are, so that nothing is gathered; they are read under whatever plan comes next. Needs
    orbax-checkpoint (pip install "partita[checkpoint]").
    """

    def __init__(self, folder: str | Path, keep: int = 2, every: int = 1) -> None:
        super().__init__()
        if every < 1:
            raise PartitaError(
                f"A checkpoint every {every} epochs cannot be made: give every=1 or more."
            )
        self.every, self._unsaved = every, None
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise PartitaError(
                'Checkpoints need Orbax. Install it with: pip install "partita[checkpoint]"'
            ) from None
        self.folder, self._ocp = Path(folder).absolute(), ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except (OSError, ValueError) as error:
            raise PartitaError(
                f"Checkpoints cannot be kept in {str(folder)!r}: {_reason(error)}. Name a folder that can be written."
            ) from None

    def on_train_begin(self, logs: Any = None) -> None:
        epoch = self._manager.latest_step()
        if epoch is None:
            return
        model: Any = self.model
        variables = self._variables()
        here = {name: (tuple(v.shape), str(v.dtype)) for name, v in variables.items()}
        with self._readable(epoch):
            kept = self._described(epoch)
        if here != kept:
            names = sorted(n for n in {*here, *kept} if here.get(n) != kept.get(n))
            raise PartitaError(
                f"The checkpoints in {str(self.folder)!r} are of another model: {names[0]!r} is {_shape(kept.get(names[0]))} there and "
                f"{_shape(here.get(names[0]))} in '{model.name}'. Name another folder, or give the model that they were made of."
            )
        target = {name: np.empty(v.shape, v.dtype) for name, v in variables.items()}
        with self._readable(epoch):
            restored: Any = self._manager.restore(
                epoch, args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(target))
            )
        for name, variable in variables.items():
            variable.assign(restored["state"][name])
        model._initial_epoch = epoch + 1  # as Keras's own BackupAndRestore does

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._unsaved = epoch if (epoch + 1) % self.every else None
        if self._unsaved is None:
            self._save(epoch)

    def _save(self, epoch: int) -> None:
        values, described = {}, {}
        for name, variable in self._variables().items():
            value = variable.value
            split = isinstance(value, jax.Array) and not value.is_fully_addressable
            values[name] = value if split else np.asarray(whole(value))
            described[name] = [list(variable.shape), str(variable.dtype)]
        ocp = self._ocp
        try:
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(values), model=ocp.args.JsonSave(described)
            )
            with _quietly(), together("saving a checkpoint"):
                self._manager.save(epoch, args=args)
        except (OSError, ValueError) as error:
            last = self._manager.latest_step()
            whole_one = (
                f"The last whole one is that of epoch {last + 1}"
                if last is not None
                else "There is no whole one yet"
            )
            raise PartitaError(
                f"The checkpoint of epoch {epoch + 1} cannot be written to {str(self.folder)!r}: {_reason(error)}. {whole_one}; the "
                "model keeps its weights."
            ) from None

    def on_train_end(self, logs: Any = None) -> None:
        if self._unsaved is not None:
            self._save(self._unsaved)
        self._manager.wait_until_finished()

    @contextmanager
    def _readable(self, epoch: int) -> Iterator[None]:
        """Inside, whatever Orbax raises of files that are not whole is one sentence."""
        try:
            yield
        except Exception as error:
            raise PartitaError(
                f"The checkpoint of epoch {epoch + 1} in {str(self.folder)!r} cannot be read: {_reason(error)}. Delete the folder "
                f"{str(self.folder / str(epoch))!r} to go on from the one before, or name another folder."
            ) from None

    def _variables(self) -> dict[str, Any]:
        """Every variable of the training state by its place and path; places tell two of one path apart."""
        model: Any = self.model
        model.jax_state_sync()
        found = [
            *model.variables,
            *(model.optimizer.variables if model.optimizer is not None else []),
        ]
        return {f"{i:05d} {v.path}": v for i, v in enumerate(found)}

    def _described(self, epoch: int) -> dict[str, tuple[tuple[int, ...], str]]:
        ocp = self._ocp
        read: Any = self._manager.restore(
            epoch, args=ocp.args.Composite(model=ocp.args.JsonRestore())
        )["model"]
        read = json.loads(read) if isinstance(read, str) else read
        return {name: (tuple(shape), dtype) for name, (shape, dtype) in read.items()}


def _shape(described: tuple[tuple[int, ...], str] | None) -> str:
    return f"{described[1]}{list(described[0])}" if described is not None else "missing"


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, nothing is logged: Orbax and TensorStore show what goes wrong in their threads, and raise it again in this one."""
    before, hook = logging.root.manager.disable, sys.excepthook
    logging.disable(logging.CRITICAL)
    sys.excepthook = lambda *_: None
    try:
        yield
    finally:
        gc.collect()  # what is never asked for a result complains when it goes
        logging.disable(before)
        sys.excepthook = hook


def _reason(error: Exception) -> str:
    """Why, in a few words.

    >>> _reason(ValueError("RESOURCE_EXHAUSTED: Error writing: Failed to write 8 bytes to file 14 [os_error_code='28']"))
    'No space left on device'
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
    return said.splitlines()[0].rstrip(".") if said else type(error).__name__

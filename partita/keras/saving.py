"""Files of models that several processes train: process 0 alone writes them, whole."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
from keras.src import backend

from partita.execute.process_arrays import whole
from partita.execute.processes import from_first, is_first
from partita.files.writing import open_drafts


@functools.cache
def save_once() -> None:
    """Makes Keras's variables readable where they are split over processes, and its files written
    once.

    Reading a split variable is something that all processes do together. So all save, each into a
    folder of its own; then process 0 moves its files to their place. If it cannot, all raise the
    same error.
    """
    keras.Variable.__array__ = _array
    backend.convert_to_numpy = _gathering(backend.convert_to_numpy)
    for name in ("save", "save_weights", "export"):
        setattr(keras.Model, name, _written_once(name, getattr(keras.Model, name)))
    if not is_first():
        for name in ("on_train_begin", "on_epoch_end", "on_train_end"):
            setattr(keras.callbacks.CSVLogger, name, _do_nothing)
        log_aside(keras.callbacks.TensorBoard)


def log_aside(callback_class: Any) -> None:
    """Makes a callback class with `log_dir`, Keras's TensorBoard, log into a folder that is removed
    after training.

    It must not write nothing: reading a variable for a histogram is something that all processes do
    together.
    """
    set_model, on_train_end = callback_class.set_model, callback_class.on_train_end

    @functools.wraps(set_model)
    def set_model_aside(callback: Any, model: Any) -> None:
        callback.log_dir = tempfile.mkdtemp(prefix="partita-")
        set_model(callback, model)

    @functools.wraps(on_train_end)
    def end_and_remove(callback: Any, logs: Any = None) -> None:
        on_train_end(callback, logs)
        shutil.rmtree(callback.log_dir, ignore_errors=True)

    callback_class.set_model, callback_class.on_train_end = set_model_aside, end_and_remove


def _do_nothing(*arguments: Any, **keywords: Any) -> None:
    pass


def _array(variable: Any, dtype: Any = None, copy: bool | None = None) -> Any:
    """`Variable.__array__`, gathering from all processes."""
    value = variable.value
    if not isinstance(value, jax.Array):
        return np.array(value, dtype)
    return np.asarray(whole(value), dtype)


def _gathering(convert_to_numpy: Any) -> Any:
    """Keras's function from an array to NumPy's, gathering from all processes."""

    @functools.wraps(convert_to_numpy)
    def convert(value: Any) -> Any:
        return convert_to_numpy(whole(value) if isinstance(value, jax.Array) else value)

    return convert


def _written_once(name: str, method: Any) -> Any:
    """A method of Keras that writes files, for a group of processes."""

    @functools.wraps(method)
    def write(model: Any, filepath: Any, *positional: Any, **keywords: Any) -> Any:
        folder, file = os.path.split(os.path.abspath(str(filepath)))
        with tempfile.TemporaryDirectory(prefix="partita-") as aside:
            result = method(model, os.path.join(aside, file), *positional, **keywords)
            report = from_first(name, lambda: json.dumps(_move_files(aside, folder)))
        number, reason, path = json.loads(report)
        if number:
            raise OSError(number, reason, path)
        return result

    return write


def _move_files(source: str, target: str) -> tuple[int, str, str]:
    """Moves the files and folders of a folder into another, replacing those of the same name.

    Gives (errno, reason, file); errno is 0 for success. Files that could not be moved leave the
    old ones untouched.
    """
    try:
        for name in os.listdir(source):
            old, new = Path(target, name), Path(source, name)
            if new.is_dir():
                _replace_folder(old, new)
            else:
                with open_drafts(old) as drafts:
                    shutil.move(new, drafts.path(old))
    except OSError as error:
        reason = error.strerror or str(error)
        return error.errno or errno.EIO, reason, str(error.filename or target)
    return 0, "", ""


def _replace_folder(old: Path, new: Path) -> None:
    """Moves a folder to the place of another, which comes back if that fails."""
    with tempfile.TemporaryDirectory(dir=old.parent, prefix=".partita-") as beside:
        moved = shutil.move(new, beside)
        aside = Path(f"{moved}.old")
        if old.is_dir():
            os.replace(old, aside)
        try:
            os.replace(moved, old)
        except OSError:
            if aside.is_dir():
                os.replace(aside, old)
            raise

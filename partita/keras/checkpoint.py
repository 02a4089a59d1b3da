"""Checkpoints between epochs by Orbax: each process writes its own shards.

Training resumes under any plan, and with any number of processes.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import keras
import numpy as np

from partita.errors import PartitaError
from partita.execute import members
from partita.execute.process_arrays import is_local, is_of_group, whole
from partita.execute.processes import alone, from_first, is_first, together
from partita.execute.steps import uninterrupted
from partita.files.checksums import (
    MODULUS,
    array_checksum,
    sealed,
    with_checksum,
)
from partita.files.folders import FolderInUseError, lock
from partita.files.reading import short_reason
from partita.files.schema import FieldError, items, mapping, row, table, text, whole_number
from partita.units import is_whole_number

SETTLING = 0.3
"""Time in which threads of a failed read report their errors, seconds."""

Description = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype of each variable, by its name."""


DESCRIPTION = mapping(row(items(whole_number()), text(80)))
"""The schema of a description in a file."""
ORDER = sealed(table({"seed": whole_number(0, 2**31)}))
"""The schema of the seed of the order of samples in a file."""
CHECKSUMS = mapping(whole_number(0, MODULUS - 1))
"""The schema of checksums by name of a variable."""


class Checkpoint(keras.callbacks.Callback):
    """A Keras callback that saves the training after epochs, and resumes after the last save.

    >>> model.fit(x, y, epochs=10, callbacks=[partita.Checkpoint("run1")])     # doctest: +SKIP

    The same line, run again after an interruption, continues with the unfinished epoch. If all
    epochs are in the checkpoint, nothing is trained, and one sentence says so. Weights,
    optimizer and epoch are saved. Models match by structure: numbers that Keras adds to the names
    of layers made again ("dense_1") make no difference. NumPy's global seed, by which `fit`
    shuffles, is set at every epoch from the number of the epoch, so a resumed run sees the samples
    in the order of an uninterrupted one. Split variables are written from their devices, so that
    nothing is gathered. Needs orbax-checkpoint (pip install "partita[checkpoint]").

    Args:
        folder: A folder for the checkpoints; "~" is your home folder.
        keep: Number of checkpoints to keep.
        every: Epochs from one save to the next; the last epoch is saved too.
    """

    def __init__(self, folder: str | Path, keep: int = 2, every: int = 1) -> None:
        super().__init__()
        for name, count in {"keep": keep, "every": every}.items():
            if not is_whole_number(count, 1):
                raise PartitaError(
                    f"{name}={count!r} is no whole number above 0: give {name}=1 or more."
                )
        if not isinstance(folder, (str, os.PathLike)):
            raise PartitaError(f"folder={folder!r} is no path: give the path of a folder.")
        self.every = every
        self._unsaved_epoch: int | None = None
        self._resumed_epoch: int | None = None
        self._order_seed = 0
        self._lock: BinaryIO | None = None
        try:
            import orbax.checkpoint as ocp
        except ImportError:
            raise PartitaError(
                'Checkpoints need Orbax. Install it with: pip install "partita[checkpoint]"'
            ) from None
        self.folder = Path(os.path.expanduser(folder)).absolute()
        self._ocp = ocp
        self._keep = keep
        self._follow_generation()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = self._new_manager()
        except (OSError, ValueError) as error:
            raise PartitaError(
                f"Checkpoints cannot be saved in {str(folder)!r}: {_reason(error)}. "
                "Name a folder that can be written."
            ) from None

    def __reduce__(self) -> Any:
        raise PartitaError(
            "A partita.Checkpoint cannot be copied (a tuner copies its callbacks): a copy would "
            "resume from the other training. Give each training a Checkpoint and a folder of its "
            "own."
        )

    def _new_manager(self) -> Any:
        """Orbax's manager of the folder.

        After a loss it is one for this process alone, and the first one writes: Orbax would wait
        for all processes that JAX counts, the lost ones too.
        """
        ocp = self._ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=False
        )
        if self._is_own:
            options.create = False
            options.multiprocessing_options = ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}
            )
        with self._as_counted():
            return ocp.CheckpointManager(self.folder, options=options)

    @contextmanager
    def _as_counted(self) -> Iterator[None]:
        """Inside, after a loss, Orbax takes this process for process 0, which alone writes arrays
        of NumPy."""
        if not self._is_own:
            yield
            return
        library: Any = import_module("orbax.checkpoint._src.multihost.multihost")
        process_index = library.process_index
        library.process_index = lambda: 0
        try:
            yield
        finally:
            library.process_index = process_index

    def _follow_members(self) -> None:
        """Has a manager for the live processes, which knows their last save."""
        if self._generation != members.generation():
            self._follow_generation()
            self._manager = self._new_manager()
        elif self._is_own:
            with self._as_counted():
                self._manager.reload()

    def _follow_generation(self) -> None:
        self._generation = members.generation()
        """The generation of the group that `_manager` is for."""
        self._is_own = self._generation > 0 or members.is_returning()
        """Whether the manager is for this process alone."""

    def on_train_begin(self, logs: Any = None) -> None:
        self._follow_members()
        if not members.is_returning():
            from_first("checkpoint folder", self._locked)
        last = from_first("last epoch saved", lambda: json.dumps(self._manager.latest_step()))
        self._resumed_epoch = json.loads(last)
        self._order_seed = int(np.random.randint(2**31))
        if self._resumed_epoch is None:
            return
        # A process that was started again gets the weights from the others.
        if not members.is_returning():
            self._restore(self._resumed_epoch)
        self._order_seed = int(from_first("order of samples", lambda: str(self._order_seed)))
        model: Any = self.model
        # Keras's own BackupAndRestore sets the first epoch like this.
        model._initial_epoch = self._resumed_epoch + 1
        self._say_if_complete(self._resumed_epoch + 1)

    def _say_if_complete(self, trained: int) -> None:
        """Says why a training whose epochs are all in the checkpoint ends at once."""
        epochs = (self.params or {}).get("epochs")
        if epochs is None or trained < epochs or not is_first():
            return
        print(
            f"partita: Nothing is left to train: the checkpoint in {str(self.folder)!r} has "
            f"{trained} epochs, and epochs={epochs}. The model has the weights of the checkpoint. "
            "Give more epochs to go on, or another folder to train anew.",
            file=sys.stderr,
        )

    def _locked(self) -> str:
        """Locks the folder until training ends; PartitaError while another run has it."""
        self._unlock()
        try:
            self._lock = lock(self.folder)
        except FolderInUseError:
            raise PartitaError(
                f"Another run saves its checkpoints in {str(self.folder)!r}. "
                "Name another folder, or start after the end of that run."
            ) from None
        return ""

    def _restore(self, epoch: int) -> None:
        """Sets the variables, and the order of samples, as they were after an epoch."""
        variables = self._variables()
        self._check_same_model(epoch, variables)
        target = {}
        for name, variable in variables.items():
            target[name] = np.empty(variable.shape, variable.dtype)
        with self._readable(epoch):
            restored: Any = self._manager.restore(
                epoch,
                args=self._ocp.args.Composite(state=self._ocp.args.StandardRestore(target)),
            )
        state = restored["state"]
        with self._readable(epoch):
            _compare_checksums(CHECKSUMS(self._saved_json(epoch, "checksums")), state)
            self._order_seed = ORDER(self._saved_json(epoch, "order"))["seed"]
        for name, variable in variables.items():
            variable.assign(state[name])

    def _check_same_model(self, epoch: int, variables: dict[str, Any]) -> None:
        """PartitaError if a checkpoint has other variables."""
        model: Any = self.model
        with self._readable(epoch):
            saved = self._saved_description(epoch)
        current = {name: (tuple(v.shape), str(v.dtype)) for name, v in variables.items()}
        for name in sorted({*current, *saved}):
            if current.get(name) != saved.get(name):
                raise PartitaError(
                    f"The checkpoints in {str(self.folder)!r} are of another model: {name!r} is "
                    f"{_shape_text(saved.get(name))} there and {_shape_text(current.get(name))} in "
                    f"'{model.name}'. Name another folder, or give the model of the "
                    "checkpoints."
                )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._forget_first_epoch()
        np.random.seed([self._order_seed, epoch])

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if (epoch + 1) % self.every == 0:
            self._unsaved_epoch = None
            self._save(epoch)
        else:
            self._unsaved_epoch = epoch

    def _save(self, epoch: int) -> None:
        if members.is_returning():
            return
        self._follow_members()
        variables = self._variables()
        values = {name: self._saved_value(variable.value) for name, variable in variables.items()}
        description = {name: [list(v.shape), str(v.dtype)] for name, v in variables.items()}
        checksums = _checksums(values)
        ocp = self._ocp
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(values),
            model=ocp.args.JsonSave(description),
            order=ocp.args.JsonSave(with_checksum({"seed": self._order_seed})),
            checksums=ocp.args.JsonSave(checksums),
        )
        if self._is_own:
            from_first(f"checkpoint of epoch {epoch}", lambda: self._write(epoch, args))
        else:
            self._write(epoch, args)

    def _saved_value(self, value: Any) -> Any:
        """The array that Orbax gets: of all processes if it is split, else of NumPy."""
        is_split = not is_local(value) and not is_of_group(value)
        return value if is_split and not self._is_own else whole(value)

    def _write(self, epoch: int, args: Any) -> str:
        """Writes a checkpoint; PartitaError where that fails."""
        try:
            # Orbax writes in other threads, which must not meet the end of the process.
            with (
                uninterrupted(),
                _quietly(),
                self._as_counted(),
                together("saving a checkpoint"),
            ):
                self._manager.save(epoch, args=args)
        except (OSError, ValueError) as error:
            last = self._manager.latest_step()
            complete = (
                f"The last complete one is of epoch {last + 1}"
                if last is not None
                else "No checkpoint is complete yet"
            )
            raise PartitaError(
                f"The checkpoint of epoch {epoch + 1} cannot be written to {str(self.folder)!r}: "
                f"{_reason(error)}. {complete}; the model keeps its weights."
            ) from None
        return ""

    def _forget_first_epoch(self) -> None:
        """Keras has read it by now; another call of `fit` begins with an epoch of its own."""
        model: Any = self.model
        model._initial_epoch = None

    def on_train_end(self, logs: Any = None) -> None:
        self._forget_first_epoch()
        if self._unsaved_epoch is not None:
            self._save(self._unsaved_epoch)
        self._manager.wait_until_finished()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @contextmanager
    def _readable(self, epoch: int) -> Iterator[None]:
        """Inside, an error that Orbax raises for incomplete files is a PartitaError."""
        try:
            with _quietly(), self._as_counted():
                yield
        except Exception as error:
            raise PartitaError(
                f"The checkpoint of epoch {epoch + 1} in {str(self.folder)!r} cannot be read: "
                f"{_reason(error)}. Delete the folder {str(self.folder / str(epoch))!r} to resume "
                "from the one before, or name another folder."
            ) from None

    def _variables(self) -> dict[str, Any]:
        """The variables of the training state by position and structural path."""
        model: Any = self.model
        model.jax_state_sync()
        variables = [*model.variables]
        if model.optimizer is not None:
            variables += model.optimizer.variables
        named = {}
        for position, variable in enumerate(variables):
            named[_structural(f"{position:05d} {variable.path}")] = variable
        return named

    def _saved_description(self, epoch: int) -> Description:
        return DESCRIPTION(self._saved_json(epoch, "model"))

    def _saved_json(self, epoch: int, item: str) -> Any:
        """The value of a JSON item of a checkpoint."""
        args = self._ocp.args.Composite(**{item: self._ocp.args.JsonRestore()})
        saved: Any = self._manager.restore(epoch, args=args)[item]
        return json.loads(saved) if isinstance(saved, str) else saved


def _checksums(values: dict[str, Any]) -> dict[str, int]:
    """The checksum of every variable; each process adds those of its own parts."""
    sums = {}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            sums[name] = array_checksum(value, (0,) * value.ndim, value.shape)
            continue
        parts = [shard for shard in value.addressable_shards if shard.replica_id == 0]
        total = 0
        for part in parts:
            start = [0 if piece.start is None else piece.start for piece in part.index]
            total += array_checksum(np.asarray(part.data), start, value.shape)
        sums[name] = total
    split = [name for name, value in values.items() if not isinstance(value, np.ndarray)]
    if split and not alone():
        own = np.array([sums[name] % MODULUS for name in split], np.uint64)
        for name, halves in zip(split, _gathered(own), strict=True):
            sums[name] = sum(int(low) + (int(high) << 32) for low, high in halves)
    return {name: total % MODULUS for name, total in sums.items()}


def _gathered(own: np.ndarray) -> np.ndarray:
    """Numbers [n] of this and all other processes as halves of 32 bits, [n, processes, 2]."""
    from jax.experimental.multihost_utils import process_allgather

    # JAX has no numbers of 64 bits unless they are switched on.
    halves = own.view(np.uint32).reshape(-1, 2)
    return np.moveaxis(np.asarray(process_allgather(halves)), 0, 1)


def _compare_checksums(saved: dict[str, int], state: dict[str, np.ndarray]) -> None:
    """FieldError unless every array has its saved checksum."""
    for name, value in state.items():
        array = np.asarray(value)
        if saved.get(name) != array_checksum(array, (0,) * array.ndim, array.shape):
            raise FieldError("damaged (its checksum differs)", "use another checkpoint").inside(
                name
            )


def _structural(name: str) -> str:
    """A variable's name without the numbers that Keras gives to layers made again.

    >>> _structural("00003 adam/sequential_1_dense_4_kernel_momentum")
    '00003 adam/sequential_dense_kernel_momentum'
    """
    return re.sub(r"_\d+(?=[_/]|$)", "", name)


def _shape_text(description: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if description is None else f"{description[1]}{list(description[0])}"


def _without_closed_loops(hook: Any, unraisable: Any) -> None:
    """A `sys.unraisablehook` without TensorStore's results that come after a failed read."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, nothing is logged.

    Orbax and TensorStore print the errors of their threads, and raise them again in this one.
    TensorStore's late ones are not printed after a failure either.
    """
    level, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = functools.partial(_without_closed_loops, hook)
    try:
        yield
    except Exception:
        # Other threads of TensorStore complain a little later.
        time.sleep(SETTLING)
        raise
    else:
        sys.unraisablehook = hook
    finally:
        # A future whose result nobody asks for complains when it is freed.
        gc.collect()
        logging.disable(level)


def _reason(error: Exception) -> str:
    """The reason of an error in a few words.

    >>> _reason(ValueError("RESOURCE_EXHAUSTED: Failed to write to file 14 [os_error_code='28']"))
    'No space left on device'
    """
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    is_key = isinstance(error, KeyError) and error.args
    text = str(error.args[0] if is_key else error).strip()
    # TensorStore adds its whole configuration.
    return short_reason(text.partition(" [")[0]) or type(error).__name__

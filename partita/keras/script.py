"""Runs a user's script as Python itself would, with every Keras model in it attached at its first training call.

Keras is told to use JAX before it is first imported, so nothing here imports it at the top. While a script runs, and only
then, the class method by which Keras makes train functions is wrapped; it is put back when the script ends.
"""

from __future__ import annotations

import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.errors import CaptureError, PartitaError
from partita.keras import use_jax
from partita.units import format_seconds

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured
    from partita.execute.function import Planner
    from partita.plans.plan import Plan

PACKAGE = str(Path(__file__).parents[1]) + os.sep
TENSORFLOW_OPERATIONS = (
    "Keras runs on JAX here. TensorFlow's own operations (tf.GradientTape, tf.nn in a layer) cannot work on what it computes: write "
    "keras.ops and train_step instead. Tensors for train_on_batch, test_on_batch and predict_on_batch: give x.numpy()."
)


def run_script(
    path: str | Path,
    arguments: Sequence[str],
    planner: Planner,
    *,
    report: Callable[[str], None] | None = None,
    verify: bool = False,
    trained: Callable[[Trained], None] | None = None,
) -> int:
    """The exit code of a script that ran with the training of all its models planned by `planner`, and its JAX steps that
    `partita.parallelize` is given. `trained` is told of each that ran, in the end.

    An error of the script prints its traceback without frames of ours and gives 1; Ctrl-C gives 130; `sys.exit` its code.
    A PartitaError is raised. `verify` also runs one step of each model on one device and reports the differences.
    """
    use_jax()
    from partita.execute.function import Session, running
    from partita.execute.verify import check_and_compare, check_compiled
    from partita.keras.aliases import tensorflow_spelling
    from partita.keras.fit import attached, attaching

    say = report or (lambda sentence: None)
    source = _read(path)
    try:
        checks = check_and_compare if verify else check_compiled
        with running(Session(planner, say)) as session, attaching(planner, say, checks) as models:
            try:
                with _as_main(path, arguments) as main, tensorflow_spelling(say):
                    exec(compile(source, str(path), "exec", dont_inherit=True), vars(main))
            finally:
                for job in [*filter(None, map(attached, models)), *session.started]:
                    _tell(job, say, trained)
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        say(f"{path} was interrupted; its models keep what they had learned by then.")
        return 130
    except PartitaError:
        raise
    except BaseException as error:  # whatever the script raises is shown as Python would show it
        _show(error)
        if _of_tensorflow(error):
            say(TENSORFLOW_OPERATIONS)
        return 1
    return 0


@dataclass(frozen=True)
class Trained:
    """What a script trained: the plan, and what was measured of it as a report takes it."""

    plan: Plan
    measured: Mapping[str, Any]


def _tell(job: Any, say: Callable[[str], None], trained: Callable[[Trained], None] | None) -> None:
    """Says how long a step took against what was predicted, once enough steps have run."""
    if job.plan is None:
        return
    measured = dict(job.verified.measured) if job.verified is not None else {}
    if job.step_seconds is not None:
        measured["seconds"] = job.step_seconds
        if "seconds" in job.plan.predicted:
            predicted = format_seconds(job.plan.predicted["seconds"])
            say(
                f"'{job.name}': {format_seconds(job.step_seconds)} a step measured (median), {predicted} predicted"
            )
    if trained is not None:
        trained(Trained(job.plan, measured))


def plan_script(path: str | Path, arguments: Sequence[str]) -> Captured:
    """The training step of a script's first `fit`, `train_on_batch` or `partita.parallelize(step, ...)`, captured there.

    The script is stopped there; nothing is trained.
    """
    use_jax()
    from partita.execute.function import Session, running
    from partita.keras.aliases import tensorflow_spelling
    from partita.keras.fit import first_step

    source = _read(path)
    found: list[Captured] = []

    def stop(captured: Captured, refused: Any = None) -> Any:
        found.append(captured)
        raise _Stop

    try:
        silent = lambda sentence: None
        with (
            first_step(stop),
            running(Session(stop, silent)),
            _as_main(path, arguments) as main,
            tensorflow_spelling(silent),
        ):
            exec(compile(source, str(path), "exec", dont_inherit=True), vars(main))
    except _Stop:
        pass
    except SystemExit as ended:
        if not found:
            code = _exit_code(ended)
            raise CaptureError(
                f"{path} called sys.exit({code}) before it trained anything, so there is nothing to plan."
            ) from None
    except (KeyboardInterrupt, PartitaError):
        raise
    except BaseException as error:  # whatever the script raises is shown as Python would show it
        if not found:
            _show(error)
            what = type(error).__name__
            raise CaptureError(
                f"{path} raised {what} before it trained anything, so there is nothing to plan."
            ) from None
    if not found:
        raise CaptureError(
            f"{path} ended without calling fit or train_on_batch of a Keras model or partita.parallelize(step, ...), so there is "
            "nothing to plan. Give the script that trains."
        )
    return found[0]


class _Stop(BaseException):
    """Ends a script at its first training call. Not an Exception, so that the script does not catch it as one."""


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PartitaError(
            f"There is no script {str(path)!r}. Give the path of a Python file."
        ) from None
    except OSError as error:
        raise PartitaError(
            f"The script {str(path)!r} cannot be read: {error.strerror}. Give the path of a Python file."
        ) from None


@contextmanager
def _as_main(path: str | Path, arguments: Sequence[str]) -> Iterator[types.ModuleType]:
    """A `__main__` module, `sys.argv` and `sys.path` for a script, as Python itself makes them; all put back afterwards."""
    main = types.ModuleType("__main__")
    vars(main).update(__file__=str(path), __builtins__=__builtins__, __spec__=None, __cached__=None)
    before = sys.modules["__main__"], sys.argv, sys.path[:]
    sys.modules["__main__"] = main
    sys.argv = [str(path), *arguments]
    sys.path[0:1] = [str(Path(path).resolve().parent)]
    try:
        yield main
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before


def _exit_code(stop: SystemExit) -> int:
    """The exit code that Python gives for a `sys.exit`; a text goes to stderr."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all that it came of."""
    seen: set[int] = set()
    chain: list[BaseException | None] = [error]
    while chain:
        link = chain.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            yield link
            chain += [link.__cause__, link.__context__]


def _of_tensorflow(error: BaseException) -> bool:
    """Whether TensorFlow itself was given what it cannot use, or gave what JAX cannot use; errors of its own, as of a file, are not."""
    if "tensorflow" not in sys.modules or type(error).__module__.partition(".")[0] == "tensorflow":
        return False
    inside = (
        frame.f_globals.get("__name__", "")
        for e in _chain(error)
        for frame, _ in traceback.walk_tb(e.__traceback__)
    )
    return "'tf." in str(error) or any(name.startswith("tensorflow.python") for name in inside)


def _show(error: BaseException) -> None:
    """Shows an error of the script as Python does, with the script's `sys.excepthook`, without the frames of this package."""
    for link in _chain(error):
        link.__traceback__ = _without_ours(link.__traceback__)
    sys.stdout.flush()
    sys.excepthook(type(error), error, error.__traceback__)


def _without_ours(trace: types.TracebackType | None) -> types.TracebackType | None:
    if trace is None:
        return None
    rest = _without_ours(trace.tb_next)
    if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
        return rest
    return types.TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)

"""Runs a user's script as Python itself would, its training planned.

Keras models are attached when they first train; JAX steps are planned that the script gives to
`partita.parallelize`. Keras is told to use JAX before it is imported, so nothing here imports it
at the top. Everything that is replaced while a script runs is put back when it ends.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.errors import INTERRUPTED, CaptureError, PartitaError
from partita.keras_backend import note_backend, select_jax
from partita.units import format_seconds

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured
    from partita.execute.function import Planner
    from partita.keras.fit import Activity
    from partita.management.managers import ManagerFactory
    from partita.plans.plan import Plan

PACKAGE = str(Path(__file__).parents[1]) + os.sep
NOTEBOOK = ".ipynb"
"""Ending of the names of notebooks."""
TENSORFLOW_OPERATIONS = (
    "Keras runs on JAX here. TensorFlow's own operations (tf.GradientTape, tf.nn in a layer) "
    "cannot use its values: write keras.ops and train_step instead. Tensors for train_on_batch, "
    "test_on_batch and predict_on_batch: give x.numpy()."
)
NOTHING_PARALLEL = (
    "Nothing was parallel: no Keras model trained by fit or train_on_batch, and nothing was given "
    "to partita.parallelize. One line makes a loop of your own parallel: "
    "step = partita.parallelize(step, arguments_of_a_call), or for a PyTorch module "
    "step = partita.torch.parallelize(module, loss, optimizer). A graph network takes the number "
    "of devices itself: model.fit(graph, devices=4)."
)


@dataclass(frozen=True)
class Script:
    """A user's program, and the arguments that it gets."""

    path: str | Path
    """A file, or the dotted name of a module."""
    arguments: Sequence[str] = ()
    as_module: bool = False
    """Whether it runs as by `python -m`."""

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Trained:
    """A program that a script trained: its plan, and its measurements as a report takes them."""

    plan: Plan
    measured: Mapping[str, Any]


def _say_nothing(sentence: str) -> None:
    pass


# ------------------------------------------------------------------------------ running a script


def run_script(
    script: Script,
    planner: Planner,
    *,
    report: Callable[[str], None] = _say_nothing,
    verify: bool = False,
    trained: Callable[[Trained], None] | None = None,
    activity: Activity | None = None,
    manage: ManagerFactory | None = None,
) -> int:
    """The exit code of a script whose training is planned by `planner`.

    An error of the script prints its traceback, without frames of Partita, and gives 1; Ctrl-C
    gives 130; `sys.exit` its code. A PartitaError is raised.

    Args:
        report: Called with sentences about plans and steps.
        verify: Whether to run one step of each program on one device too, and compare.
        trained: Called in the end with each program that was trained.
        activity: Shows a text during long activities.
        manage: Gives the manager of a training; by default none has one.
    """
    select_jax(report)
    from partita.execute.function import Session, no_manager, running
    from partita.execute.verify import check_and_compare, check_compiled
    from partita.keras.fit import attached, no_activity
    from partita.keras.hooks import attaching

    verifier = check_and_compare if verify else check_compiled

    def plan_step(captured: Captured, refused: Any = None) -> Plan:
        note_backend(report)
        return planner(captured) if refused is None else planner(captured, refused)

    told: list[str] = []

    def report_model(sentence: str) -> None:
        told.append(sentence)
        report(sentence)

    session = Session(plan_step, report, manage=manage or no_manager, verifier=verifier)
    models = attaching(plan_step, report_model, verifier, activity or no_activity)
    try:
        with running(session), models as attached_models:
            try:
                _execute(script, report)
            finally:
                jobs = [attached(model) for model in attached_models]
                started = [*filter(None, jobs), *session.started]
                for job in started:
                    _report_job(job, report, trained)
                if not started and not told and _is_ending_well():
                    report(NOTHING_PARALLEL)
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        report(f"{script} was interrupted; its models keep the training up to then.")
        return INTERRUPTED
    except PartitaError:
        raise
    except BaseException as error:  # any error of the script is shown as Python shows it
        _check_platform()
        _show(error)
        if _is_of_tensorflow(error):
            report(TENSORFLOW_OPERATIONS)
        return 1
    return 0


def _check_platform() -> None:
    """PartitaError if JAX cannot start on the platforms that it was told to use."""
    from partita.execute.devices import absent_platform_sentence

    sentence = absent_platform_sentence()
    if sentence:
        raise PartitaError(sentence) from None


def _is_ending_well() -> bool:
    """Whether no error but `sys.exit(0)` is under way."""
    error = sys.exc_info()[1]
    return error is None or (isinstance(error, SystemExit) and not error.code)


def _execute(script: Script, say: Callable[[str], None]) -> None:
    """Runs a script's source, or a module's, as `__main__`."""
    from partita.keras.aliases import tensorflow_names

    with _as_main(script) as main, tensorflow_names(say):
        if script.as_module:
            code = _code_of_module(str(script), main)
        else:
            code = compile(_read(script.path), str(main.__file__), "exec", dont_inherit=True)
        try:
            exec(code, vars(main))
        finally:
            note_backend(say)


def _report_job(
    job: Any, report: Callable[[str], None], trained: Callable[[Trained], None] | None
) -> None:
    """Reports measured and predicted seconds of a step, once enough steps have run."""
    if job.plan is None:
        return
    measured = dict(job.verified.measured) if job.verified is not None else {}
    if job.step_seconds is not None:
        measured["seconds"] = job.step_seconds
        if "seconds" in job.plan.predicted:
            predicted = format_seconds(job.plan.predicted["seconds"])
            report(
                f"'{job.name}': {format_seconds(job.step_seconds)} a step measured (median), "
                f"{predicted} predicted"
            )
    if trained is not None:
        trained(Trained(job.plan, measured))


# ---------------------------------------------------------------------------- planning a script


class _Stop(BaseException):
    """Ends a script at its first training call; no Exception, so that scripts do not catch it."""


def plan_script(script: Script, target: str = "") -> Captured:
    """The captured step of a script's first training call: `fit`, `train_on_batch` or
    `parallelize`.

    The script is stopped there; nothing is trained. `target` is the platform that will run the
    step, "" for that of the local devices.
    """
    select_jax(_say_nothing)
    from partita.capture.targets import CaptureTarget
    from partita.execute.function import Session, running
    from partita.keras.hooks import first_step

    steps: list[Captured] = []
    capture_target = CaptureTarget.of(target) if target else None

    def stop(captured: Captured, refused: Any = None) -> Any:
        steps.append(captured)
        raise _Stop

    end = "ended"
    try:
        session = Session(stop, _say_nothing, target=capture_target)
        with first_step(stop, capture_target), running(session):
            _execute(script, _say_nothing)
    except _Stop:
        pass
    except SystemExit as error:
        if not steps:
            end = f"called sys.exit({_exit_code(error)})"
    except (KeyboardInterrupt, PartitaError):
        raise
    except BaseException as error:  # any error of the script is shown as Python shows it
        if not steps:
            _check_platform()
            _show(error)
            end = f"raised {type(error).__name__}"
    if steps:
        return steps[0]
    if end != "ended":
        raise CaptureError(
            f"{script} {end} before it trained anything, so there is nothing to plan."
        )
    raise CaptureError(
        f"{script} ended without calling fit or train_on_batch of a Keras model or "
        "partita.parallelize(step, ...), so there is nothing to plan. Give the script that trains."
    )


# --------------------------------------------------------------------------- as Python does it


def _read(path: str | Path) -> bytes:
    """The source of a script. It is read once: a script may be a pipe (`<(...)`, /dev/stdin)."""
    if Path(path).suffix == NOTEBOOK:
        raise PartitaError(
            f"{str(path)!r} is a notebook. Call partita.parallelize(model) in it, or run its code: "
            "jupyter nbconvert --to script writes it as a Python file."
        )
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise PartitaError(
            f"There is no script {str(path)!r}. Give the path of a Python file."
        ) from None
    except OSError as error:
        raise PartitaError(
            f"The script {str(path)!r} cannot be read: {error.strerror}. "
            "Give the path of a Python file."
        ) from None
    if b"\0" in content:
        raise PartitaError(
            f"{str(path)!r} is no Python source: it has null bytes. Give the path of a .py file."
        )
    return content


@contextmanager
def _as_main(script: Script) -> Iterator[types.ModuleType]:
    """A `__main__` module, `sys.argv` and `sys.path` for a script; all are put back afterwards."""
    main = types.ModuleType("__main__")
    # Python gives the script's absolute path, by which it finds its data after a change of folder.
    file = os.path.abspath(str(script))
    vars(main).update(__file__=file, __builtins__=__builtins__, __spec__=None, __cached__=None)
    before = sys.modules["__main__"], sys.argv, sys.path[:]
    sys.modules["__main__"] = main
    sys.argv = [str(script), *script.arguments]
    folder = os.getcwd() if script.as_module else str(Path(script.path).resolve().parent)
    if not sys.flags.safe_path:
        sys.path[0:1] = [folder]
    try:
        yield main
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before


def _code_of_module(name: str, main: types.ModuleType) -> types.CodeType:
    """The code of a module, for `main` to run, which gets the module's file and package.

    PartitaError if there is no such module.
    """
    spec = _spec_of(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _spec_of(f"{name}.__main__")
        if spec is None:
            raise PartitaError(
                f"The package {name!r} has no __main__.py to run. Name a module of it, such as "
                f"{name}.train."
            )
    code = spec.loader.get_code(spec.name) if spec is not None and spec.loader else None
    if spec is None or code is None:
        raise PartitaError(
            f"There is no module {name!r} to run. Give its dotted name, as after python -m, and "
            "start in the folder that holds its package."
        )
    vars(main).update(__file__=spec.origin, __spec__=spec, __package__=spec.parent)
    sys.argv[0] = str(spec.origin)
    return code


def _spec_of(name: str) -> Any:
    """Where a module is; None if there is none. Its packages are imported."""
    if name.startswith("."):
        return None
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # A package of the name is missing; any other missing module is an error of the package.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
    except ValueError:
        return None


def _exit_code(stop: SystemExit) -> int:
    """The exit code that Python gives for a `sys.exit`; a text goes to stderr."""
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    sys.stderr.write(f"{stop.code}\n")
    return 1


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and all its causes and contexts."""
    visited: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop()
        if link is not None and id(link) not in visited:
            visited.add(id(link))
            yield link
            pending += [link.__cause__, link.__context__]


def _is_of_tensorflow(error: BaseException) -> bool:
    """Whether an error comes of mixing TensorFlow's values with JAX's.

    Errors that TensorFlow defines itself, as of a file, do not.
    """
    if "tensorflow" not in sys.modules or type(error).__module__.partition(".")[0] == "tensorflow":
        return False
    if "'tf." in str(error):
        return True
    for link in _chain(error):
        for frame, _ in traceback.walk_tb(link.__traceback__):
            if frame.f_globals.get("__name__", "").startswith("tensorflow.python"):
                return True
    return False


def _show(error: BaseException) -> None:
    """Shows an error as Python does, by `sys.excepthook`, without the frames of this package."""
    for link in _chain(error):
        link.__traceback__ = _without_own_frames(link.__traceback__)
    sys.stdout.flush()
    sys.excepthook(type(error), error, error.__traceback__)


def _without_own_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    if trace is None:
        return None
    rest = _without_own_frames(trace.tb_next)
    if trace.tb_frame.f_code.co_filename.startswith(PACKAGE):
        return rest
    return types.TracebackType(rest, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)

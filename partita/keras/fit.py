"""Keras's own `fit`, training as planned. All that touches Keras' insides for running is in this file.

`attach(model, planner)` gives one model its own `make_train_function`. The first training batch shows all shapes: the step
is captured, planned, compiled, and the model's variables are moved onto the mesh. From then on `fit` and `train_on_batch`
run the planned step; `evaluate` and `predict` run Keras's own functions on the mesh, their batches split over it.
Every other shape of batch (the last one of an epoch) gets a step of its own under the same plan, as far as it divides.

Batches are not read ahead here: where there is an accelerator, Keras's iterator already keeps one batch ahead, and since
steps are dispatched before they are done, its way onto the mesh overlaps with the step before. The price of an unusual
shape is a capture and a compilation.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from keras.src.backend.jax.trainer import JAXTrainer
from keras.src.trainers.trainer import model_supports_jit

from partita.capture.jax_functions import Captured
from partita.capture.keras_models import capture_model
from partita.errors import CaptureError, PartitaError, PlanError
from partita.execute.function import Planner, compiled_in_turn, same_everywhere, settled
from partita.execute.processes import alone, from_first, is_first, put, together, whole
from partita.execute.program import PlannedStep
from partita.execute.verify import Verification, check_compiled
from partita.plans.adapt import fit_plan
from partita.plans.check import check
from partita.plans.plan import Plan

Verifier = Callable[[PlannedStep, Any, Any, Any], Verification]
"""Called with a planned step, its compiled program, and the state and batch (not yet placed) that it is about to run on,
which it must leave as they are. What it returns is reported; it raises to refuse the step before anything has run."""

_make_keras_train_function = JAXTrainer.make_train_function
_GROUPS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
_KEY = "_partita"


def attach(
    model: keras.Model,
    planner: Planner,
    *,
    report: Callable[[str], None] | None = None,
    verifier: Verifier = check_compiled,
) -> keras.Model:
    """The model itself; its `fit` and `train_on_batch` now run the step that `planner` plans for its first training batch.

    `report` gets what `verifier` has to say of that step. What cannot be planned (a step that runs eagerly, or cannot be
    captured) trains as Keras trains it, and `report` (without one: a warning) gets one sentence that says why.
    """
    if not isinstance(model, JAXTrainer):
        raise PartitaError(
            f"Only a Keras model on the JAX backend can be attached, and this is a '{type(model).__name__}'. Build the model with "
            "keras (KERAS_BACKEND=jax)."
        )
    owner = next(c for c in type(model).__mro__ if "make_train_function" in vars(c))
    if not issubclass(JAXTrainer, owner):
        raise PartitaError(
            f"'{owner.__name__}' makes its own train function, which cannot be planned. Override train_step instead of "
            "make_train_function."
        )
    if not alone():
        _keep_together()
    fit = PlannedFit(model, planner, report, verifier)
    model.__dict__.update(
        {
            _KEY: fit,
            "make_train_function": fit.make_train_function,
            "make_test_function": fit.make_test_function,
            "make_predict_function": fit.make_predict_function,
        }
    )
    model.train_function = model.test_function = model.predict_function = None
    return model


def _bring(source: str, target: str) -> tuple[int, str, str]:
    """Puts all that is in a folder into another, in the place of what is there; what fails leaves that. (errno, why, file), or zero."""
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=".partita-") as beside:
            for name in os.listdir(source):
                new, old = (
                    shutil.move(os.path.join(source, name), beside),
                    os.path.join(target, name),
                )
                if os.path.isdir(new) and os.path.isdir(old):
                    shutil.rmtree(old)
                os.replace(new, old)
    except OSError as error:
        return error.errno or 5, error.strerror or str(error), str(error.filename or target)
    return 0, "", ""


@functools.cache
def _keep_together() -> None:
    """Makes Keras's variables readable where they are split over processes, and its files written by process 0 alone.

    All go through the same motions in a folder of their own, since reading a variable is something that all do together; then process 0
    brings what it has written to its place. Where it cannot, all have the same error.
    """

    def array(variable: Any, dtype: Any = None, copy: bool | None = None) -> Any:
        value = variable.value
        if not isinstance(value, jax.Array):
            return np.array(value, dtype)
        return np.asarray(whole(value), dtype)

    def once(name: str, method: Any) -> Any:
        @functools.wraps(method)
        def write(model: Any, filepath: Any, *positional: Any, **named: Any) -> Any:
            folder, file = os.path.split(os.path.abspath(str(filepath)))
            with tempfile.TemporaryDirectory(prefix="partita-") as aside:
                result = method(model, os.path.join(aside, file), *positional, **named)
                errno, why, path = json.loads(
                    from_first(name, lambda: json.dumps(_bring(aside, folder)))
                )
            if errno:
                raise OSError(errno, why, path)
            return result

        return write

    keras.Variable.__array__ = array
    for name in ("save", "save_weights", "export"):
        setattr(keras.Model, name, once(name, getattr(keras.Model, name)))
    if not is_first():
        for name in ("on_train_begin", "on_epoch_end", "on_train_end"):
            setattr(keras.callbacks.CSVLogger, name, lambda *arguments, **named: None)


def attached(model: keras.Model) -> PlannedFit | None:
    """How an attached model trains: its plan, its compiled steps, their time. None for a model that is not attached."""
    return vars(model).get(_KEY)


@contextmanager
def attaching(
    planner: Planner, report: Callable[[str], None], verifier: Verifier
) -> Iterator[list[keras.Model]]:
    """Inside, every model that is not attached yet is, when Keras first makes its train function; gives those that were."""
    models: list[keras.Model] = []

    def make_train_function(model: Any, force: bool = False) -> None:
        if attached(model) is not None:
            return _make_keras_train_function(model, force)
        try:
            attach(model, planner, report=report, verifier=verifier)
        except PartitaError as error:
            report(str(error))
            return _make_keras_train_function(model, force)
        models.append(model)
        model.make_train_function(force)

    with _instead(make_train_function=make_train_function):
        yield models


@contextmanager
def first_step(stop: Callable[[Captured], None]) -> Iterator[None]:
    """Inside, the first training step of any model is captured and given to `stop`, which is to raise; nothing is trained."""

    def make_train_function(model: Any, force: bool = False) -> None:
        def train_function(state: Any, iterator: Iterator[Any]) -> None:
            try:
                stop(capture_model(model, next(iterator)))
            finally:
                _give_back(model, state)

        model.train_function = train_function

    def instead_of(method: Any) -> Any:
        signature = inspect.signature(method)

        @functools.wraps(method)
        def quietly(model: Any, *positional: Any, **named: Any) -> Any:
            given = signature.bind(model, *positional, **named)
            if "verbose" in signature.parameters:
                given.arguments["verbose"] = 0
            vars(model).pop("make_train_function", None)
            model.train_function = None
            return method(*given.args, **given.kwargs)

        return quietly

    with _instead(
        make_train_function=make_train_function,
        fit=instead_of(JAXTrainer.fit),
        train_on_batch=instead_of(JAXTrainer.train_on_batch),
    ):
        yield


@contextmanager
def _instead(**methods: Any) -> Iterator[None]:
    """Inside, Keras's trainer has these methods instead of its own."""
    own = {name: getattr(JAXTrainer, name) for name in methods}
    try:
        for name, method in methods.items():
            setattr(JAXTrainer, name, method)
        yield
    finally:
        for name, method in own.items():
            setattr(JAXTrainer, name, method)


def _give_back(model: Any, state: Any) -> None:
    """Puts a state into the variables, which Keras has emptied: an error or Ctrl-C must not lose them."""
    if not any(x.is_deleted() for x in jax.tree.leaves(state)):
        vars(model)["_jax_state"] = dict(zip(_GROUPS, state, strict=True))
        model._jax_state_synced = False
        model.jax_state_sync()


@dataclass(frozen=True)
class Compiled:
    """A planned step and its compiled program, for one shape of state and batch."""

    planned: PlannedStep
    program: Any


class PlannedFit:
    """What `attach` keeps with a model. `plan` is None until the first training batch, and where Keras trains alone."""

    def __init__(
        self,
        model: keras.Model,
        planner: Planner,
        report: Callable[[str], None] | None,
        verifier: Verifier,
    ) -> None:
        self.model, self.planner, self.report, self.verifier = model, planner, report, verifier
        self.plan: Plan | None = None
        self.verified: Verification | None = None
        """What the compiler said of the first planned step."""
        self.steps: dict[Any, Compiled | None] = {}
        """By shapes of state and batch; None where Keras's own step runs."""
        self.running: Compiled | None = None
        """The step that ran last: its mesh is where the variables are."""
        self._new = True
        self._why = ""
        """Why the step being compiled is left to Keras."""
        self._placed: Any = None
        """The state that the last planned step returned: it is where it belongs."""
        self._valid: Any = None
        """The state that has not been donated yet."""
        self._state_key: Any = None
        self._keras_function: Callable[[Any, Any], Any] | None = None
        self._began: float | None = None
        self._took: deque[float] = deque(maxlen=1000)

    @property
    def name(self) -> str:
        return str(self.model.name)

    @property
    def step_seconds(self) -> float | None:
        """Measured seconds per step: the median time from one step's start to the next one's; None before the third step."""
        return median(self._took) if self._took else None

    def make_train_function(self, force: bool = False) -> None:
        """Keras calls this at every `fit`; `compile` has set the train function to None."""
        model: Any = self.model
        if model.train_function is not None and not force:
            return
        self.steps, self._new, self._keras_function = {}, True, None
        why = (
            "run_eagerly=True"
            if model.run_eagerly
            else "jit_compile=False"
            if _unjitted(model)
            else ""
        )
        if why:
            self._warn(
                f"The model '{model.name}' is compiled with {why}, so it trains on one device, as Keras runs it."
            )
        elif keras.distribution.distribution() is not None:
            why = "a distribution"
            self._warn(
                f"A keras.distribution is set, so it distributes '{model.name}'. Set it to None to train as planned."
            )
        if why:
            _make_keras_train_function(model, force=True)
            return
        function = model._make_function(self._step)

        def train_function(state: Any, iterator: Iterator[Any]) -> tuple[Any, Any]:
            self._valid = state
            try:
                return function(state, iterator)
            except BaseException:
                _give_back(model, self._valid)
                raise
            finally:
                self._valid = None

        model.train_function = train_function

    def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """One training step: Keras's step function, `(state, batch) -> (logs, state)`."""
        if state is not self._placed:
            self._state_key = _key(state)
        key = (self._state_key, _key(batch))
        if key not in self.steps:
            self.steps[key], self._began = self._compile(state, batch), None
        step = self.steps[key]
        if step is None:
            return self._by_keras(key, state, batch)
        before, self._began = self._began, time.perf_counter()
        if before is not None:
            self._took.append(self._began - before)
        batch = step.planned.place_batch(batch)
        with together("a step"), _uninterrupted():
            if state is not self._placed or step is not self.running:
                state = self._valid = _move(state, step.planned.state_shardings)
            logs, state = step.program(state, batch)
            self.running, self._placed, self._valid = step, state, state
            self.model.__dict__["_jax_state"] = dict(zip(_GROUPS, state, strict=True))
        with together("a step"):
            return settled((logs, state))

    def _compile(self, state: Any, batch: Any) -> Compiled | None:
        """The planned step for these shapes, checked and ready to run; None where Keras has to run it."""
        model: Any = self.model
        try:
            captured = capture_model(model, batch)
        except Exception as error:  # whatever it is, Keras can still train, and says better what the user did wrong
            if isinstance(error, CaptureError):
                return self._alone(str(error))
            return self._alone(
                f"The training step of '{model.name}' cannot be captured: {type(error).__name__}: {error}"
            )
        plan = self._plan(captured)
        same_everywhere(captured, plan, (state, batch))
        if plan.devices > len(jax.devices()):
            raise PlanError(
                f"The plan '{plan.name}' is for {plan.devices} devices, and JAX has {len(jax.devices())}. "
                f"Plan for {len(jax.devices())}, or start with {plan.devices}."
            )
        check_it = lambda planned, program: self.verifier(planned, program, state, batch)
        try:
            planned, program, plan, verified = compiled_in_turn(
                captured, plan, self.planner, check_it, self._warn
            )
        except jax.errors.JaxRuntimeError as error:
            return self._alone(f"The planned step of '{model.name}' cannot be compiled: {error}")
        if len(self.steps) == 0:
            self.plan, self.verified = plan, verified
        if planned is None:
            return self._alone()
        if self.report is not None and self.running is None:
            for line in str(verified).splitlines():
                self.report(line)
        return Compiled(planned, program)

    def _warn(self, sentence: str) -> None:
        if self.report is not None:
            self.report(sentence)
        else:
            warnings.warn(sentence, stacklevel=2)

    def _plan(self, captured: Captured) -> Plan:
        """The model's plan for these shapes: made once, kept over compilations as long as it fits."""
        new, self._new = self._new, False
        if self.plan is not None and not new:
            return fit_plan(self.plan, captured.graph)
        if self.plan is not None:
            try:
                return check(self.plan, captured.graph)
            except PlanError:
                pass
        self.plan = self.planner(captured)
        return self.plan

    def _alone(self, why: str = "") -> None:
        """Leaves this shape to Keras, which `_by_keras` says once it has run."""
        self._why = why

    def _by_keras(self, key: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        """The step as Keras runs it; where it is the first, so are all, at no cost per step.

        What Keras cannot run either is the user's to mend: nothing is said, and the next batch is planned as if this one had not been.
        """
        try:
            logs, self._valid = self._keras()(state, iter((batch,)))
        except Exception:
            del self.steps[key]
            raise
        if self._why:
            self._warn(
                f"{self._why.splitlines()[0].rstrip('.')}. It trains on one device, as Keras runs it."
            )
            self._why = ""
        if len(self.steps) == 1:
            model: Any = self.model
            model.train_function = self._keras()
        return logs, self._valid

    def _keras(self) -> Callable[[Any, Any], Any]:
        """Keras's own train function, made by Keras."""
        if self._keras_function is None:
            model: Any = self.model
            ours = model.train_function
            _make_keras_train_function(model, force=True)
            self._keras_function, model.train_function = model.train_function, ours
        assert self._keras_function is not None
        return self._keras_function

    def make_test_function(self, force: bool = False) -> None:
        with self._steps_on_mesh():
            type(self.model).make_test_function(self.model, force)

    def make_predict_function(self, force: bool = False) -> Any:
        with self._steps_on_mesh():
            return type(self.model).make_predict_function(self.model, force)

    @contextmanager
    def _steps_on_mesh(self) -> Iterator[None]:
        """Inside, the steps of which Keras makes test and predict functions run on the mesh once the variables are there."""
        model: Any = self.model
        make = model._make_function

        def make_on_mesh(step: Any, **how: Any) -> Any:
            on_mesh = step if model.jit_compile else jax.jit(step)

            def step_on_mesh(state: Any, batch: Any) -> tuple[Any, Any]:
                if self.running is None:
                    return step(state, batch)
                mesh = self.running.planned.mesh
                self._placed = None
                with together("an evaluation"):
                    results, state = settled(
                        on_mesh(jax.tree.map(lambda x: _onto(x, mesh), state), _split(batch, mesh))
                    )
                    return results if alone() else jax.tree.map(whole, results), state

            return make(step_on_mesh, **how)

        model.__dict__["_make_function"] = make_on_mesh
        try:
            yield
        finally:
            del model.__dict__["_make_function"]


def _unjitted(model: Any) -> bool:
    """Whether the user wants steps that are not compiled.

    Where a layer is one that TensorFlow cannot compile (RandomRotation and its like), Keras itself decides so; JAX can.
    """
    return not model.jit_compile and model_supports_jit(model)


def _key(values: Any) -> Any:
    leaves, tree = jax.tree.flatten(values)
    return tree, tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)


def _move(state: Any, shardings: Any) -> Any:
    """The state under other shardings. What was whole on one device and is now split is freed there at once."""
    moved = put(state, shardings)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        if len(old.sharding.device_set) == 1 and new.sharding.shard_shape(new.shape) != new.shape:
            old.delete()
    return moved


def _onto(value: Any, mesh: jax.sharding.Mesh) -> Any:
    """A value of the state on the mesh: where it is, or on every device if it is not on the mesh yet."""
    on_it = value.sharding.device_set == set(mesh.devices.flat)
    return value if on_it else put(value, NamedSharding(mesh, PartitionSpec()))


def _split(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """A batch split by sample over as many axes of the mesh as divide it."""

    def place(x: Any) -> Any:
        axes, left = [], np.shape(x)[0] if np.ndim(x) else 1
        for name, size in mesh.shape.items():
            if left % size == 0:
                axes.append(name)
                left //= size
        return put(x, NamedSharding(mesh, PartitionSpec(tuple(axes)) if axes else PartitionSpec()))

    return jax.tree.map(place, batch)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the block is done: inside it, the state is donated and its successor not yet known."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if caught:
        handler(*caught[0])

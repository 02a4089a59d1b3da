"""Keras's own `fit`, its training step run as planned.

`attach(model, planner)` gives one model its own `make_train_function`. The first training batch
shows all shapes: the step is captured, planned and compiled, and the model's variables are moved
onto the mesh. From then on `fit` and `train_on_batch` run the planned step; `evaluate` and
`predict` run Keras's own functions on the mesh. Every other shape of batch (the last one of an
epoch) gets a step of its own under the same plan, as far as it divides; it costs a capture and a
compilation.

Batches are not read ahead here. With an accelerator Keras's iterator keeps one batch ahead, and
steps are dispatched before they are done, so a batch moves onto the mesh during the step before.

This file holds all that touches Keras's private parts for training.
"""

from __future__ import annotations

import functools
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import keras
import numpy as np
from keras.src.backend.jax.trainer import JAXTrainer
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.trainer import model_supports_jit

from partita.capture.jax_functions import Captured
from partita.capture.keras_models import capture_model
from partita.errors import CaptureError, PartitaError, PlanError
from partita.execute import members
from partita.execute.function import (
    Planner,
    compiled_in_turn,
    same_everywhere,
    session_manager,
    shapes_sentence,
)
from partita.execute.process_arrays import is_of_group, whole
from partita.execute.processes import agreed_failure, alone, together
from partita.execute.program import RunnableStep
from partita.execute.steps import StepRunner, settled
from partita.execute.verify import Verification, Verifier, check_compiled
from partita.keras.evaluation import batch_axes, split_batch, state_on_mesh
from partita.keras.saving import save_once
from partita.plans.adapt import fit_plan, microbatches_note
from partita.plans.check import check
from partita.plans.plan import Plan

Activity = Callable[[str], AbstractContextManager[None]]
"""A context manager that shows a text while something takes long."""

keras_train_function = JAXTrainer.make_train_function
"""Keras's own method that makes a train function."""
_STATE_GROUPS = (
    "trainable_variables",
    "non_trainable_variables",
    "optimizer_variables",
    "metrics_variables",
)
"""Keras's names of the parts of a training state, in order."""
_ATTRIBUTE = "_partita"
_STEPS_TIMED = 1000


def no_activity(text: str) -> AbstractContextManager[None]:
    """Shows nothing."""
    return nullcontext()


def attach(
    model: keras.Model,
    planner: Planner,
    *,
    report: Callable[[str], None] | None = None,
    verifier: Verifier = check_compiled,
    activity: Activity = no_activity,
) -> keras.Model:
    """The model itself, which trains by the step that `planner` plans for its first batch.

    A step that cannot be planned (it runs eagerly, or cannot be captured) trains as Keras trains
    it, and one sentence says why.

    Args:
        report: Called with the sentences of `verifier`, and why a step is not planned; without
            one, the latter is a warning.
        verifier: Checks the compiled step before it runs.
        activity: Shows a text during long activities.
    """
    if not isinstance(model, JAXTrainer):
        raise PartitaError(
            "Only a Keras model on the JAX backend can be attached, and this is a "
            f"'{type(model).__name__}'. Build the model with keras (KERAS_BACKEND=jax)."
        )
    owner = next(c for c in type(model).__mro__ if "make_train_function" in vars(c))
    if not issubclass(JAXTrainer, owner):
        raise PartitaError(
            f"'{owner.__name__}' makes its own train function, which cannot be planned. Override "
            "train_step instead of make_train_function."
        )
    if members.is_returning() or not alone():
        save_once()
        model.__dict__["jax_state_sync"] = functools.partial(_sync, model)
    fit = PlannedFit(model, planner, report, verifier, activity)
    # Keras's own `__setattr__` would track the values as state of the model.
    model.__dict__[_ATTRIBUTE] = fit
    model.__dict__["make_train_function"] = fit.make_train_function
    model.__dict__["make_test_function"] = fit.make_test_function
    model.__dict__["make_predict_function"] = fit.make_predict_function
    model.train_function = None
    model.test_function = None
    model.predict_function = None
    return model


def attached(model: keras.Model) -> PlannedFit | None:
    """How an attached model trains: its plan, compiled steps, step time; None for other models."""
    return vars(model).get(_ATTRIBUTE)


def _sync(model: Any) -> None:
    """Keras's `jax_state_sync`, after which every process has all metrics.

    Keras computes with them in every process at the end of an epoch, by operations of JAX that
    compile anew for other devices: after a loss too, so they get arrays of one device. Their
    values may be on the devices of a stage. All processes call this at the same points.
    """
    type(model).jax_state_sync(model)
    for variable in model.metrics_variables:
        value = variable.value
        if is_of_group(value):
            variable.assign(whole(value))
        elif isinstance(value, jax.Array) and value.is_fully_replicated:
            variable.assign(value.addressable_data(0))


def is_of_arrays(iterator: Any) -> bool:
    """Whether an iterator gives batches of arrays: rows in a random order are new arrays, slices in
    order are views of the arrays that `fit` was given."""
    return getattr(iterator, "gi_code", None) is ArrayDataAdapter._get_iterator.__code__


def restore_state(model: Any, state: Any) -> None:
    """Puts a state into the variables, which Keras empties for a step: an error must lose none."""
    if not any(x.is_deleted() for x in jax.tree.leaves(state)):
        vars(model)["_jax_state"] = dict(zip(_STATE_GROUPS, state, strict=True))
        model._jax_state_synced = False
        model.jax_state_sync()


@dataclass(frozen=True)
class Compiled:
    """A planned step and its compiled program, for one shape of state and batch."""

    planned: RunnableStep
    program: Any


class PlannedFit:
    """How an attached model trains."""

    def __init__(
        self,
        model: keras.Model,
        planner: Planner,
        report: Callable[[str], None] | None,
        verifier: Verifier,
        activity: Activity,
    ) -> None:
        self.model = model
        self.planner = planner
        self.report = report
        self.verifier = verifier
        self.activity = activity
        self.runner = StepRunner(str(model.name), owns_state=True, on_state=self._keep)
        self.runner.manager = session_manager()
        self.runner.metrics_group = _STATE_GROUPS.index("metrics_variables")
        self.planned_microbatches = 1
        """Of the first plan."""
        self.verified: Verification | None = None
        """The check of the first planned step."""
        self._recompiled = True
        """Whether `compile` was called since the last plan."""
        self._why_alone = ""
        """Why the step being compiled is left to Keras."""
        self._undonated_state: Any = None
        """The last state that has not been donated."""
        self._state_key: Any = None
        self._keras_function: Callable[[Any, Any], Any] | None = None
        self._keras_shapes: set[Any] = set()
        """Shapes of batches for which Keras's own step is compiled."""
        self._step_start: float | None = None
        self._step_times: deque[float] = deque(maxlen=_STEPS_TIMED)

    @property
    def name(self) -> str:
        return str(self.model.name)

    @property
    def plan(self) -> Plan | None:
        """None until the first training batch, and where Keras trains alone."""
        return self.runner.plan

    @property
    def steps(self) -> dict[Any, Compiled | None]:
        """By shapes of state and batch; None where Keras's own step runs."""
        return self.runner.steps

    @property
    def running(self) -> Compiled | None:
        """The step that ran last: the variables are on its mesh."""
        return self.runner.running

    @property
    def step_seconds(self) -> float | None:
        """Measured seconds of a step: the median from one start to the next; None before two."""
        return median(self._step_times) if self._step_times else None

    # ------------------------------------------------------------------------------------ training

    def make_train_function(self, force: bool = False) -> None:
        """Keras calls this at every `fit`; `compile` has set the train function to None."""
        model: Any = self.model
        if model.train_function is not None and not force:
            return
        self.steps.clear()
        self._recompiled = True
        self._keras_function = None
        self._keras_shapes.clear()
        reason = self._reason_for_keras()
        if reason:
            self._warn(reason)
            keras_train_function(model, force=True)
            return
        function = model._make_function(self._step)

        def train_function(state: Any, iterator: Iterator[Any]) -> tuple[Any, Any]:
            self._undonated_state = state
            self.runner.keeps_batches = is_of_arrays(iterator)
            try:
                return function(state, iterator)
            except BaseException:
                restore_state(model, self._undonated_state)
                raise
            finally:
                self._undonated_state = None

        model.train_function = train_function

    def _reason_for_keras(self) -> str:
        """Why the model is compiled for Keras's own training; "" if it is not."""
        model: Any = self.model
        if model.run_eagerly:
            setting = "run_eagerly=True"
        elif _is_unjitted(model):
            setting = "jit_compile=False"
        elif keras.distribution.distribution() is not None:
            return (
                f"A keras.distribution is set, so it distributes '{model.name}'. Set it to None to "
                "train as planned."
            )
        else:
            return ""
        return (
            f"The model '{model.name}' is compiled with {setting}, so it trains on one device, as "
            "Keras runs it."
        )

    def _step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """One training step: Keras's step function, `(state, batch) -> (logs, state)`."""
        return self.runner.attempt(state, lambda state: self._attempt(state, batch))

    def _attempt(self, state: Any, batch: Any) -> tuple[Any, Any]:
        joins = members.is_returning()
        if joins:
            repeated = self.runner.repeated(state)
            if repeated is not None:
                return repeated
            self._recompiled = False
            state = self.runner.join(state)
        if not self.runner.is_placed(state):
            self._state_key = _shapes_key(state)
        key = (self._state_key, _shapes_key(batch))
        if key not in self.steps:
            with together("the first step"), self.runner.compiling():
                self.steps[key] = self._compile(state, batch)
            sentence = shapes_sentence(self.name, len(self.steps))
            if sentence:
                self._warn(sentence)
            self._step_start = None
        if joins:
            self.runner.meet_others()
        if self.steps[key] is None:
            return self._step_by_keras(key, state, batch)
        self._time_step()
        return self.runner.run(key, state, batch)

    def _keep(self, state: Any) -> None:
        """Notes the state that is to be restored after an error, and that callbacks see."""
        self._undonated_state = state
        self.model.__dict__["_jax_state"] = dict(zip(_STATE_GROUPS, state, strict=True))

    def _time_step(self) -> None:
        now = time.perf_counter()
        if self._step_start is not None:
            self._step_times.append(now - self._step_start)
        self._step_start = now

    def _compile(self, state: Any, batch: Any) -> Compiled | None:
        """The planned step for these shapes, checked; None where Keras has to run it."""
        model: Any = self.model
        captured, reason = self._captured(batch)
        reason = agreed_failure("captured steps", reason)
        if reason or captured is None:
            return self._leave_to_keras(reason)
        plan = self._plan(captured)
        self._tell_microbatches(plan, captured.graph.batch_size)
        if not members.generation():
            same_everywhere(captured, plan, (state, batch))
        if plan.devices > len(members.devices()):
            raise PlanError(
                f"The plan '{plan.name}' is for {plan.devices} devices, and JAX has "
                f"{len(members.devices())}. Plan for {len(members.devices())}, or start with "
                f"{plan.devices}."
            )

        def verify(planned: RunnableStep, program: Any) -> Verification:
            return self.verifier(planned, program, state, batch)

        planned = program = verified = None
        try:
            with self.activity("compiling the planned step"):
                planned, program, plan, verified = compiled_in_turn(
                    captured, plan, self.planner, verify, self._warn
                )
        except jax.errors.JaxRuntimeError as error:
            reason = f"The planned step of '{model.name}' cannot be compiled: {error}"
        reason = agreed_failure("compiled steps", reason)
        if reason:
            return self._leave_to_keras(reason)
        if not self.steps:
            self.runner.plan = plan
            self.verified = verified
        if planned is None:
            return self._leave_to_keras()
        if self.report is not None and self.running is None:
            for line in str(verified).splitlines():
                self.report(line)
        return Compiled(planned, program)

    def _captured(self, batch: Any) -> tuple[Captured | None, str]:
        """(the step for a batch, ""), or (None, why it cannot be captured)."""
        try:
            return capture_model(self.model, batch), ""
        except CaptureError as error:
            return None, str(error)
        except Exception as error:  # Keras can still train, or explains the error better
            problem = f"The training step of '{self.model.name}' cannot be captured"
            return None, f"{problem}: {type(error).__name__}: {error}"

    def _plan(self, captured: Captured) -> Plan:
        """The model's plan for these shapes: made once, and again after `compile` if it must be."""
        recompiled = self._recompiled
        self._recompiled = False
        if self.plan is not None and not recompiled:
            return fit_plan(self.plan, captured.graph)
        if self.plan is not None:
            try:
                return check(self.plan, captured.graph)
            except PlanError:
                pass
        self.runner.plan = plan = self.planner(captured)
        return plan

    def _tell_microbatches(self, plan: Plan, batch_size: int) -> None:
        """Reports a batch that does not divide into the planned microbatches."""
        assert self.plan is not None
        planned = self.planned_microbatches = max(self.planned_microbatches, plan.microbatches)
        if plan.microbatches < planned and self.report is not None:
            self.report(microbatches_note(planned, batch_size, plan.microbatches))

    def _warn(self, sentence: str) -> None:
        if self.report is not None:
            self.report(sentence)
        else:
            warnings.warn(sentence, stacklevel=2)

    # ------------------------------------------------------------------------------- Keras's own

    def _leave_to_keras(self, reason: str = "") -> None:
        """Leaves this shape to Keras; the reason is reported once the step has run."""
        self._why_alone = reason

    def _step_by_keras(self, key: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        """The step as Keras runs it; if it is the first one, all are, at no cost per step.

        A step that fails in Keras too is the user's to mend: nothing is reported, and the next
        batch is planned as if this one had not been.
        """
        try:
            logs, self._undonated_state = self._keras()(state, iter((batch,)))
        except Exception:
            del self.steps[key]
            raise
        if self._why_alone:
            reason = self._why_alone.splitlines()[0].rstrip(".")
            self._warn(f"{reason}. It trains on one device, as Keras runs it.")
            self._why_alone = ""
        if len(self.steps) == 1:
            model: Any = self.model
            model.train_function = self._keras()
        return logs, self._undonated_state

    def _keras(self) -> Callable[[Any, Any], Any]:
        """Keras's own train function, made by Keras."""
        if self._keras_function is None:
            model: Any = self.model
            planned_function = model.train_function
            with self._shapes_counted():
                keras_train_function(model, force=True)
            self._keras_function = model.train_function
            model.train_function = planned_function
        assert self._keras_function is not None
        return self._keras_function

    @contextmanager
    def _shapes_counted(self) -> Iterator[None]:
        """Inside, Keras compiles a training step that counts the shapes of its batches, at no cost
        per step: it is traced once for each."""
        model: Any = self.model
        train_step = model.train_step
        before = vars(model).get("train_step")

        @functools.wraps(train_step)
        def counted(state: Any, batch: Any) -> Any:
            key = _shapes_key(batch)
            if key not in self._keras_shapes:
                self._keras_shapes.add(key)
                sentence = shapes_sentence(self.name, len(self._keras_shapes))
                if sentence:
                    self._warn(sentence)
            return train_step(state, batch)

        if model.jit_compile:
            vars(model)["train_step"] = counted
        try:
            yield
        finally:
            if before is not None:
                vars(model)["train_step"] = before
            elif model.jit_compile:
                del vars(model)["train_step"]

    # ---------------------------------------------------------------------- evaluate and predict

    def make_test_function(self, force: bool = False) -> None:
        with self._functions_on_mesh():
            type(self.model).make_test_function(self.model, force)

    def make_predict_function(self, force: bool = False) -> Any:
        with self._functions_on_mesh():
            return type(self.model).make_predict_function(self.model, force)

    @contextmanager
    def _functions_on_mesh(self) -> Iterator[None]:
        """Inside, functions that Keras makes of steps run on the mesh, once the state is there."""
        model: Any = self.model
        make_function = model._make_function

        def make_on_mesh(step: Any, **options: Any) -> Any:
            # Within another jit, Keras's own one donates nothing: a manager may need the state.
            is_plain = model.jit_compile and self.runner.manager is None
            on_mesh = step if is_plain else jax.jit(step)

            def evaluate(state: Any, batch: Any) -> tuple[Any, Any]:
                assert self.running is not None
                mesh = self.running.planned.mesh
                self.runner.forget_state()
                with together("an evaluation"):
                    state = state_on_mesh(state, mesh)
                    batch = split_batch(batch, mesh, batch_axes(state, mesh))
                    results, state = settled(on_mesh(state, batch))
                    return results if alone() else jax.tree.map(whole, results), state

            def step_on_mesh(state: Any, batch: Any) -> tuple[Any, Any]:
                catches_up = members.is_returning() and self.runner.step > 0
                if self.running is None and not catches_up:
                    return step(state, batch)
                if self.runner.manager is None:
                    return evaluate(state, batch)
                return self._managed_evaluation(evaluate, state, batch)

            return make_function(step_on_mesh, **options)

        vars(model)["_make_function"] = make_on_mesh
        try:
            yield
        finally:
            del vars(model)["_make_function"]

    def _managed_evaluation(
        self, evaluate: Callable[[Any, Any], tuple[Any, Any]], state: Any, batch: Any
    ) -> tuple[Any, Any]:
        """An evaluation as a step of the managed training, whose state it reads.

        `state` has Keras's groups without those of the optimizer, in predictions without metrics.
        """
        model: Any = self.model
        count = len(state)

        def as_step(training_state: Any, batch: Any) -> tuple[Any, Any]:
            weights, others, optimizer, metrics = training_state
            parts = (weights, others, metrics)[:count]
            outputs, (_, others, *rest) = evaluate(parts, batch)
            # The weights are as they were: the same arrays, so that nobody copies them.
            weights = state_on_mesh(weights, _mesh_of(self.running))
            return outputs, (weights, others, optimizer, *(rest or [metrics]))

        key = f"evaluation of {count} groups"
        self.runner.others[key] = as_step
        metrics = state[2] if count > 2 else [v.value for v in model.metrics_variables]
        optimizer = [variable.value for variable in model.optimizer.variables]
        whole_state = (state[0], state[1], optimizer, metrics)
        repeated = self.runner.repeated(whole_state) if members.is_returning() else None
        outputs, after = repeated or self.runner.attempt(
            whole_state, lambda before: self.runner.run(key, before, batch)
        )
        for variable, value in zip(model.optimizer.variables, after[2], strict=True):
            if variable.value is not value:
                variable.assign(value)
        return outputs, (after[0], after[1], after[3])[:count]


def _mesh_of(step: Compiled | None) -> Any:
    assert step is not None
    return step.planned.mesh


def _is_unjitted(model: Any) -> bool:
    """Whether the user asks for steps that are not compiled.

    Keras itself decides so for a layer that TensorFlow cannot compile (RandomRotation and its
    like); JAX can.
    """
    return not model.jit_compile and model_supports_jit(model)


def _shapes_key(values: Any) -> Any:
    """Equal for values of the same structure, shapes and dtypes."""
    leaves, tree = jax.tree.flatten(values)
    return tree, tuple((np.shape(x), str(getattr(x, "dtype", type(x)))) for x in leaves)

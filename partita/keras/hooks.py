"""Keras's trainer with methods of ours, while a script runs: models are attached, or captured.

The class methods by which Keras trains are replaced inside these contexts, and put back after.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras.src.backend.jax.trainer import JAXTrainer

from partita.capture.jax_functions import Captured
from partita.capture.keras_models import capture_model
from partita.capture.targets import CaptureTarget
from partita.errors import PartitaError
from partita.execute.function import Planner
from partita.execute.processes import alone
from partita.keras.fit import (
    Activity,
    Verifier,
    attach,
    attached,
    keras_train_function,
    no_activity,
    restore_state,
)
from partita.keras.saving import save_once


@contextmanager
def attaching(
    planner: Planner,
    report: Callable[[str], None],
    verifier: Verifier,
    activity: Activity = no_activity,
) -> Iterator[list[keras.Model]]:
    """Inside, every model is attached when it is first trained; gives the attached models."""
    models: list[keras.Model] = []
    if not alone():
        save_once()  # before the first `fit`, which opens the files of its callbacks

    def make_train_function(model: Any, force: bool = False) -> None:
        if attached(model) is not None:
            return keras_train_function(model, force)
        try:
            attach(model, planner, report=report, verifier=verifier, activity=activity)
        except PartitaError as error:
            report(f"{error} It trains on one device, as Keras runs it.")
            return keras_train_function(model, force)
        models.append(model)
        model.make_train_function(force)

    with trainer_methods(make_train_function=make_train_function):
        yield models


@contextmanager
def first_step(
    stop: Callable[[Captured], None], target: CaptureTarget | None = None
) -> Iterator[None]:
    """Inside, the first training step of any model is captured and given to `stop`, which raises.

    Nothing is trained. `target` is the platform that will run the step, by default that of the
    local devices.
    """

    def make_train_function(model: Any, force: bool = False) -> None:
        def train_function(state: Any, iterator: Iterator[Any]) -> None:
            try:
                stop(capture_model(model, next(iterator), target))
            finally:
                restore_state(model, state)

        model.train_function = train_function

    with trainer_methods(
        make_train_function=make_train_function,
        fit=_quiet_and_fresh(JAXTrainer.fit),
        train_on_batch=_quiet_and_fresh(JAXTrainer.train_on_batch),
    ):
        yield


def _quiet_and_fresh(method: Any) -> Any:
    """A training method that prints nothing and makes its train function anew."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def train(model: Any, *positional: Any, **keywords: Any) -> Any:
        arguments = signature.bind(model, *positional, **keywords)
        if "verbose" in signature.parameters:
            arguments.arguments["verbose"] = 0
        vars(model).pop("make_train_function", None)
        model.train_function = None
        return method(*arguments.args, **arguments.kwargs)

    return train


@contextmanager
def trainer_methods(**methods: Any) -> Iterator[None]:
    """Inside, Keras's trainer has these methods in the place of its own."""
    originals = {name: getattr(JAXTrainer, name) for name in methods}
    try:
        for name, method in methods.items():
            setattr(JAXTrainer, name, method)
        yield
    finally:
        for name, method in originals.items():
            setattr(JAXTrainer, name, method)

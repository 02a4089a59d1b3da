"""Captures a Keras model's training step. All that touches Keras' insides for capturing is in this file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import keras
import numpy as np
from keras.src.backend.common.stateless_scope import StatelessScope

from partita.capture.jax_functions import Captured, Leaf, capture_step
from partita.errors import CaptureError


@contextmanager
def abstract() -> Iterator[None]:
    """Models built inside have shapes and no values: nothing is allocated, so a model of any size can be planned.

    >>> with abstract():
    ...     model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.count_params()
    36
    """
    with StatelessScope(initialize_variables=False):
        yield


def shape_of(value: Any) -> Any:
    """The shape and dtype of an array-like leaf, as the step sees it after Keras and JAX have converted it."""
    if value is None:
        return None
    dtype = jax.dtypes.canonicalize_dtype(getattr(value, "dtype", None) or np.asarray(value).dtype)
    return jax.ShapeDtypeStruct(
        tuple(value.shape) if hasattr(value, "shape") else np.shape(value), dtype
    )


def build(model: keras.Model, batch: Any) -> None:
    """Builds what is not built yet (layers, losses, metrics, optimizer) for a batch of this shape, allocating nothing new
    for models that were made under `abstract()`."""
    symbolic = jax.tree.map(shape_of, batch)
    abstractly = any(v._value is None for v in model.variables)
    if not getattr(model, "compiled", False):
        raise CaptureError(
            f"The model '{model.name}' is not compiled, so it has no loss and no optimizer. Call model.compile(...) before planning."
        )
    if any(v._value is None and v._initializer is None for v in model.variables):
        return  # in the middle of a fit, which has built all that is called and holds the values itself
    if abstractly:
        with StatelessScope(initialize_variables=False):
            model._symbolic_build(data_batch=symbolic)
    else:
        model._symbolic_build(data_batch=symbolic)


@dataclass(frozen=True)
class ModelVariables:
    """The variables of a model in the order of its step: trainable, non-trainable, optimizer, metrics."""

    trainable: list[Any]
    non_trainable: list[Any]
    optimizer: list[Any]
    metrics: list[Any]

    @staticmethod
    def of(model: keras.Model) -> ModelVariables:
        return ModelVariables(
            model.trainable_variables,
            model.non_trainable_variables,
            list(model.optimizer.variables),
            model.metrics_variables,
        )

    def groups(self) -> tuple[list[Any], ...]:
        return (self.trainable, self.non_trainable, self.optimizer, self.metrics)


def capture_model(model: keras.Model, batch: Any) -> Captured:
    """The training step of a compiled Keras model on batches like `batch` (x, y[, sample_weight]; arrays or shapes)."""
    build(model, batch)
    state = ModelVariables.of(model)
    if not state.trainable:
        raise CaptureError(
            f"The model '{model.name}' has no trainable variables, so there is no training step to plan."
        )
    data = jax.tree.map(shape_of, batch)
    abstract_state = tuple(
        [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in group] for group in state.groups()
    )
    slots = _slots(model, state)
    leaves = (
        [Leaf(v.path, "parameter") for v in state.trainable]
        + [Leaf(v.path, "state") for v in state.non_trainable]
        + [Leaf(v.path, "optimizer", slots.get(v.path)) for v in state.optimizer]
        + [Leaf(v.path, "state") for v in state.metrics]
    )
    size = next((leaf.shape[0] for leaf in jax.tree.leaves(data) if leaf.shape), 0)
    return capture_step(
        model.train_step, abstract_state, data, leaves, name=model.name, batch_size=size
    )


def _slots(model: keras.Model, state: ModelVariables) -> dict[str, str]:
    """Optimizer variable -> the parameter it belongs to: Keras names a slot `<optimizer>/<parameter path with _>_<slot>`."""
    found = {}
    names = sorted(
        ((v.path.replace("/", "_"), v.path, tuple(v.shape)) for v in state.trainable),
        key=lambda n: -len(n[0]),
    )
    for slot in state.optimizer:
        last = slot.path.split("/")[-1]
        for name, path, shape in names:
            if last.startswith(name) and tuple(slot.shape) == shape:
                found[slot.path] = path
                break
    return found


def batch_like(model: keras.Model, batch_size: int) -> Any:
    """(x, y) shapes of a training batch of a compiled model with known inputs: y as its loss wants it.

    A loss on sparse labels takes integers without the last dim; any other takes what the model puts out.
    """
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise CaptureError(
            f"The model '{model.name}' has not been called yet, so its input shapes are unknown. Give a batch: "
            f"partita.plan(model, batch=(x, y)), or build the model first."
        )
    for tensor in inputs:
        unknown = [d for d, n in enumerate(tensor.shape) if n is None and d > 0]
        if unknown:
            raise CaptureError(
                f"Input '{tensor.name}' of '{model.name}' has shape {tuple(tensor.shape)}: dim {unknown[0]} is not fixed. "
                f"Give a batch of the shapes you train on: partita.plan(model, batch=(x, y))."
            )
    shaped = lambda t: jax.ShapeDtypeStruct(
        (batch_size, *t.shape[1:]), jax.dtypes.canonicalize_dtype(t.dtype)
    )  # noqa: E731
    x = jax.tree.map(shaped, model._inputs_struct if hasattr(model, "_inputs_struct") else inputs)
    if isinstance(x, list) and len(x) == 1:
        x = x[0]
    outputs = model._outputs_struct if hasattr(model, "_outputs_struct") else model.outputs
    losses = model._compile_loss._user_loss if model._compile_loss is not None else None

    def target(tensor: Any, loss: Any) -> Any:
        name = (
            loss
            if isinstance(loss, str)
            else type(loss).__name__
            if not hasattr(loss, "__name__")
            else loss.__name__
        )
        if "sparse" in str(name).lower():
            return jax.ShapeDtypeStruct((batch_size, *tensor.shape[1:-1]), np.dtype("int32"))
        return jax.ShapeDtypeStruct(
            (batch_size, *tensor.shape[1:]), jax.dtypes.canonicalize_dtype(tensor.dtype)
        )

    if isinstance(outputs, dict):
        y = {
            k: target(t, losses.get(k) if isinstance(losses, dict) else losses)
            for k, t in outputs.items()
        }
    elif isinstance(outputs, (list, tuple)):
        each = losses if isinstance(losses, (list, tuple)) else [losses] * len(outputs)
        y = [target(t, loss) for t, loss in zip(outputs, each, strict=True)]
        y = y[0] if len(y) == 1 else y
    else:
        y = target(outputs, losses)
    return (x, y)

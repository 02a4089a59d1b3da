"""Captures a Keras model's training step. Only this file touches Keras' insides for capturing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from keras.src.backend.common.stateless_scope import StatelessScope

from partita.capture.jax_functions import Captured, Leaf, capture_step, reason
from partita.capture.targets import CaptureTarget
from partita.errors import CaptureError


@contextmanager
def abstract() -> Iterator[None]:
    """A context in which models get shapes and no values.

    Nothing is allocated, so a model of any size can be planned.

    >>> with abstract():
    ...     model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.count_params()
    36
    """
    with StatelessScope(initialize_variables=False):
        yield


def shape_of(value: Any) -> Any:
    """The shape and dtype of an array-like leaf after Keras and JAX have converted it."""
    if value is None:
        return None
    dtype = getattr(value, "dtype", None) or np.asarray(value).dtype
    shape = tuple(value.shape) if hasattr(value, "shape") else np.shape(value)
    return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))


def build(model: keras.Model, batch: Any) -> None:
    """Builds the layers, losses, metrics and optimizer that are not built yet.

    `batch` has arrays or shapes. Nothing is allocated for models that were made under `abstract()`.
    CaptureError if the model is not compiled.
    """
    if not getattr(model, "compiled", False):
        raise CaptureError(
            f"The model '{model.name}' is not compiled, so it has no loss and no optimizer. "
            "Call model.compile(...) before planning."
        )
    without_value = [variable for variable in model.variables if variable._value is None]
    if any(variable._initializer is None for variable in without_value):
        # In the middle of a fit, which has built all that is called and holds the values itself.
        return
    shapes = jax.tree.map(shape_of, batch)
    if without_value:
        with StatelessScope(initialize_variables=False):
            model._symbolic_build(data_batch=shapes)
    else:
        model._symbolic_build(data_batch=shapes)


def build_for(model: keras.Model, batch: Any) -> None:
    """`build` for a batch that was given by hand; CaptureError for one that the model cannot
    take."""
    leaves = jax.tree.leaves(batch)
    problem = "no arrays" if not leaves else next(filter(None, map(_problem, leaves)), "")
    if problem:
        raise CaptureError(
            f"batch has {problem}: give batch=(x, y) of arrays, or of jax.ShapeDtypeStruct."
        )
    try:
        build(model, batch)
    except CaptureError:
        raise
    except Exception as error:
        raise CaptureError(
            f"The model '{model.name}' cannot be built for the batch: {reason(error).rstrip('.')}. "
            "Give batch=(x, y) of arrays as in training."
        ) from error


def _problem(leaf: Any) -> str:
    """The reason for which a leaf of a batch is no array of samples; "" if it is one."""
    dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
    shape = tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)
    if any(jnp.issubdtype(dtype, kind) for kind in (np.object_, np.character)):
        return f"a value of type '{type(leaf).__name__}' that is no array of numbers"
    if not shape:
        return f"the number {leaf} for an array"
    return "" if shape[0] else "no samples"


@dataclass(frozen=True)
class ModelVariables:
    """The variables of a model, in the order of its step."""

    trainable: list[Any]
    non_trainable: list[Any]
    optimizer: list[Any]
    metrics: list[Any]

    @staticmethod
    def of(model: keras.Model) -> ModelVariables:
        """The variables of a built model."""
        return ModelVariables(
            model.trainable_variables,
            model.non_trainable_variables,
            list(model.optimizer.variables),
            model.metrics_variables,
        )

    def groups(self) -> tuple[list[Any], ...]:
        """The four lists, in order."""
        return (self.trainable, self.non_trainable, self.optimizer, self.metrics)


def capture_model(model: keras.Model, batch: Any, target: CaptureTarget | None = None) -> Captured:
    """The training step of a compiled Keras model on batches like `batch`.

    `batch` is (x, y[, sample_weight]), of arrays or shapes. `target` is the platform that will run
    the step, by default that of the local devices.
    """
    build(model, batch)
    variables = ModelVariables.of(model)
    if not variables.trainable:
        raise CaptureError(
            f"The model '{model.name}' has no trainable variables, so it has no training step. "
            "Make a layer trainable."
        )
    batch_shapes = jax.tree.map(shape_of, batch)
    state_shapes = tuple(
        [jax.ShapeDtypeStruct(variable.shape, variable.dtype) for variable in group]
        for group in variables.groups()
    )
    parameter_of = _slot_parameters(variables)
    leaves = [
        *(Leaf(variable.path, "parameter") for variable in variables.trainable),
        *(Leaf(variable.path, "state") for variable in variables.non_trainable),
        *(
            Leaf(variable.path, "optimizer", parameter_of.get(variable.path))
            for variable in variables.optimizer
        ),
        *(Leaf(variable.path, "state") for variable in variables.metrics),
    ]
    arrays = [shape for shape in jax.tree.leaves(batch_shapes) if shape.shape]
    batch_size = arrays[0].shape[0] if arrays else 0
    return capture_step(
        model.train_step,
        state_shapes,
        batch_shapes,
        leaves,
        name=model.name,
        batch_size=batch_size,
        target=target,
    )


def _slot_parameters(variables: ModelVariables) -> dict[str, str]:
    """Path of an optimizer slot -> path of its parameter.

    Keras names a slot `<optimizer>/<parameter path with _>_<slot>`.
    """
    parameters = sorted(
        ((variable.path.replace("/", "_"), variable) for variable in variables.trainable),
        key=lambda pair: -len(pair[0]),
    )
    parameter_of = {}
    for slot in variables.optimizer:
        slot_name = slot.path.split("/")[-1]
        for name, parameter in parameters:
            if slot_name.startswith(name) and tuple(slot.shape) == tuple(parameter.shape):
                parameter_of[slot.path] = parameter.path
                break
    return parameter_of


def batch_like(model: keras.Model, batch_size: int) -> Any:
    """(x, y) shapes of a training batch of a compiled model with fixed input shapes.

    y is an array of integers without the last dim for a loss on sparse labels, else like the
    model's output. CaptureError if the model does not determine the shapes.
    """
    _check_inputs(model)
    inputs = model._inputs_struct if hasattr(model, "_inputs_struct") else model.inputs
    outputs = model._outputs_struct if hasattr(model, "_outputs_struct") else model.outputs
    losses = model._compile_loss._user_loss if model._compile_loss is not None else None
    x = jax.tree.map(lambda tensor: _batch_shape(tensor, batch_size), inputs)
    if isinstance(x, list) and len(x) == 1:
        x = x[0]
    y: Any
    if isinstance(outputs, dict):
        y = {}
        for name, tensor in outputs.items():
            loss = losses.get(name) if isinstance(losses, dict) else losses
            y[name] = _target_shape(tensor, loss, batch_size)
    elif isinstance(outputs, (list, tuple)):
        each_loss: Any = losses
        if not isinstance(losses, (list, tuple)):
            each_loss = [losses] * len(outputs)
        y = _target_shapes(outputs, each_loss, batch_size)
        y = y[0] if len(y) == 1 else y
    else:
        y = _target_shape(outputs, losses, batch_size)
    return (x, y)


def _check_inputs(model: keras.Model) -> None:
    """CaptureError unless a model has inputs, and only dim 0 of them is open."""
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise CaptureError(
            f"The model '{model.name}' has not been called yet, so its input shapes are unknown. "
            "Give a batch: partita.plan(model, batch=(x, y)), or build the model first."
        )
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if dim > 0 and size is None:
                raise CaptureError(
                    f"Input '{tensor.name}' of '{model.name}' has shape {tuple(tensor.shape)}: "
                    f"dim {dim} is not fixed. Give a batch of the shapes you train on: "
                    "partita.plan(model, batch=(x, y))."
                )


def _batch_shape(tensor: Any, batch_size: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a symbolic tensor with a batch size."""
    dtype = jax.dtypes.canonicalize_dtype(tensor.dtype)
    return jax.ShapeDtypeStruct((batch_size, *tensor.shape[1:]), dtype)


def _target_shapes(
    outputs: Sequence[Any],
    losses: Sequence[Any],
    batch_size: int,
) -> list[jax.ShapeDtypeStruct]:
    return [
        _target_shape(tensor, loss, batch_size)
        for tensor, loss in zip(outputs, losses, strict=True)
    ]


def _target_shape(tensor: Any, loss: Any, batch_size: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the target of an output under a loss (an object, a function or a name)."""
    name = loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
    if "sparse" in str(name).lower():
        return jax.ShapeDtypeStruct((batch_size, *tensor.shape[1:-1]), np.dtype("int32"))
    return _batch_shape(tensor, batch_size)

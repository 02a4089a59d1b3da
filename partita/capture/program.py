"""A program -> its captured training step: a compiled Keras model, or a JAX function with the
arguments of a call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from partita.errors import CaptureError
from partita.keras_backend import require_jax
from partita.units import is_whole_number

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured
    from partita.capture.targets import CaptureTarget

DEFAULT_BATCH_SIZE = 32


def capture_program(
    program: Any,
    batch_size: int | None = None,
    batch: Any = None,
    args: Sequence[Any] | None = None,
    target: str | None = None,
) -> Captured:
    """The captured training step of a program; its `.graph` prints, saves and is planned.

    Args:
        program: A compiled Keras model, or a jittable training step.
        batch_size: Samples of a batch, for a model that knows its input shapes; 32 by default.
        batch: (x, y) of arrays or shapes, for a model that does not know its input shapes.
        args: The arguments of a call of a training step, arrays or shapes.
        target: The platform that will run the step, with its own kernels: "cpu", "cuda" or "tpu",
            or "cuda:8.0" for GPUs of that compute capability; by default that of the local devices.

    Raises:
        CaptureError: The program is neither, cannot be captured, or contradicts the arguments.
    """
    if is_keras_model(program):
        from partita.capture.keras_models import batch_like, build_for, capture_model

        if args is not None:
            raise CaptureError("args are for a step. Give a Keras model its batch_size or batch.")
        if batch is None:
            batch = batch_like(program, _checked_size(batch_size))
        else:
            build_for(program, batch)
        captured = capture_model(program, batch, _target(target))
        size = captured.graph.batch_size
        if batch_size not in (None, size):
            raise CaptureError(
                f"batch_size is {batch_size!r}, and the batch has {size} samples. Give one of them."
            )
        return captured
    if batch is not None or batch_size is not None:
        raise CaptureError(
            "batch and batch_size are for Keras models. Give a step args, the arguments of a call."
        )
    from partita.capture.functions import call_of, capture_call

    step, step_args = checked_call(program, args)
    return capture_call(step, call_of(step, step_args, {}), _target(target)).captured


def _checked_size(batch_size: Any) -> int:
    """A batch size, the default one for None; CaptureError if it is something else."""
    if batch_size is None:
        return DEFAULT_BATCH_SIZE
    if not is_whole_number(batch_size, 1):
        given = batch_size if isinstance(batch_size, Real) else f"a {type(batch_size).__name__}"
        raise CaptureError(
            f"batch_size is {given}, and must be a whole number from 1 on. Give arrays or shapes "
            "as batch=(x, y)."
        )
    return int(batch_size)


def _target(text: str | None) -> CaptureTarget | None:
    """The target of a text, None for that of the local devices."""
    from partita.capture.targets import CaptureTarget

    return CaptureTarget.of(text) if text else None


def is_keras_model(program: Any) -> bool:
    """Whether a program is a Keras model; any other program is taken for a training step.

    PartitaError if it is a model on another backend than JAX.
    """
    keras: Any = sys.modules.get("keras")
    if keras is None or not isinstance(program, keras.Model):
        return False
    require_jax()
    return True


def checked_call(
    program: Any, args: Sequence[Any] | None
) -> tuple[Callable[..., Any], Sequence[Any]]:
    """A training step and the arguments of a call; CaptureError if either is something else."""
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(program, torch.nn.Module):
        raise CaptureError(
            "A PyTorch module needs its loss and its optimizer: "
            "step = partita.torch.parallelize(module, loss, optimizer)."
        )
    if not callable(program):
        raise CaptureError(
            f"A {type(program).__name__} cannot be parallelized. Give a Keras model, or a "
            "function: "
            "partita.parallelize(train_step, (params, opt_state, batch))."
        )
    is_sequence = isinstance(args, Sequence) and not isinstance(args, (str, dict))
    if args is None or not is_sequence:
        name = getattr(program, "__name__", program)
        raise CaptureError(
            f"The step '{name}' needs the arguments of a call, arrays or shapes, as a tuple: "
            "partita.parallelize(train_step, (params, opt_state, batch))."
        )
    return program, args

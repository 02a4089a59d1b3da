"""Optimizers of torch.optim as Optax's, with PyTorch's own defaults and formulas.

The learning rate of every parameter group is an argument of the step, read before each call. So
all learning rate schedulers work as in PyTorch: they change the optimizer, and the next step uses
the new rate. Every other setting is compiled in.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from partita.errors import CaptureError
from partita.torch.environment import HOOK_IGNORED
from partita.torch.extra import Package

if TYPE_CHECKING:
    import optax
    import torch
    from optax import GradientTransformation as Transformation
else:
    optax = Package("optax")
    torch = Package("torch")

_IGNORED = {"params", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}
"""Settings without influence on the result, and the learning rate."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of a module's trained arrays."""

    transformation: Transformation
    """Gradients -> updates; before the learning rate if `source` is given."""
    source: torch.optim.Optimizer | None = None
    """PyTorch's optimizer, whose learning rates are read before each step."""
    group_of: Mapping[str, int] | None = None
    """Name of a trained array -> its parameter group."""
    settings: tuple[tuple[Any, ...], ...] = ()
    """Per group, the settings that are compiled in."""

    def rates(self) -> tuple[np.floating, ...]:
        """The learning rate of each parameter group; CaptureError if another setting changed."""
        if self.source is None:
            return ()
        if _settings_of(self.source) != self.settings:
            raise CaptureError(
                "A setting of the optimizer other than its learning rate changed after the step "
                "was made. Use a scheduler that changes the learning rate alone: OneCycleLR needs "
                "cycle_momentum=False."
            )
        for group in self.source.param_groups:
            rate = group["lr"]
            if not isinstance(rate, (numbers.Real, torch.Tensor)) or not math.isfinite(rate):
                raise CaptureError(f"The learning rate is {rate!r}: give a finite number.")
        # PyTorch's schedulers warn unless their optimizer has been called.
        self.source._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(np.float32(float(group["lr"])) for group in self.source.param_groups)

    def updated(
        self, grads: Any, state: Any, arrays: dict[str, Any], rates: Sequence[Any]
    ) -> tuple[Any, Any]:
        """(new arrays, new optimizer state); an array whose gradient is None stays."""
        absent = [name for name, gradient in grads.items() if gradient is None]
        grads = grads | {name: jnp.zeros_like(arrays[name]) for name in absent}
        directions: Any
        before = state
        directions, state = self.transformation.update(grads, state, arrays)
        if absent:
            state = _with_slots_of(before, state, set(absent))
        if self.group_of is None:
            return optax.apply_updates(arrays, directions), state
        updates = {}
        for name, array in arrays.items():
            rate = 0.0 if name in absent else rates[self.group_of[name]]
            updates[name] = (-rate * directions[name]).astype(array.dtype)
        return optax.apply_updates(arrays, updates), state


def _with_slots_of(before: Any, after: Any, names: set[str]) -> Any:
    """The optimizer state `after` a step, with the slots of some arrays as they were `before`."""

    def chosen(path: Any, old: Any, new: Any) -> Any:
        stays = any(getattr(key, "key", None) in names for key in path)
        return old if stays else new

    return jax.tree_util.tree_map_with_path(chosen, before, after)


def optimizer_of(given: Any, module: torch.nn.Module, trained: Sequence[str]) -> Optimizer:
    """The optimizer for a module's trained arrays: one of Optax, or one of torch.optim.

    CaptureError for an optimizer or a setting that Optax computes differently.
    """
    if isinstance(given, torch.optim.Optimizer):
        return _from_torch(given, module, trained)
    if isinstance(given, optax.GradientTransformation):
        return Optimizer(given)
    raise CaptureError(
        f"A {type(given).__name__} is no optimizer. Give one of Optax, as optax.adamw(1e-3), or "
        "of torch.optim, as torch.optim.AdamW(module.parameters())."
    )


def _from_torch(
    given: torch.optim.Optimizer, module: torch.nn.Module, trained: Sequence[str]
) -> Optimizer:
    make = _FORMULAS.get(type(given).__name__) if _is_of_torch(given) else None
    if make is None:
        known = ", ".join(_FORMULAS)
        raise CaptureError(
            f"'{type(given).__name__}' has no counterpart in Optax with the same formula. Use "
            f"one of {known}, or an optimizer of Optax."
        )
    if given.state:
        raise CaptureError(
            "The optimizer has taken steps already, and its moments cannot be carried over. Give "
            "a new one."
        )
    if given._optimizer_step_pre_hooks or given._optimizer_step_post_hooks:
        warnings.warn(HOOK_IGNORED.format("A hook of the optimizer"), stacklevel=3)
    tensors = dict(module.named_parameters())
    _check_parameters(given, tensors)
    name_of = {id(tensors[name]): name for name in trained}
    group_of: dict[str, int] = {}
    for number, group in enumerate(given.param_groups):
        for parameter in group["params"]:
            if id(parameter) in name_of:
                group_of[name_of[id(parameter)]] = number
    is_complex = any(tensors[name].is_complex() for name in trained)
    if is_complex and not isinstance(given, torch.optim.SGD):
        raise CaptureError(
            f"'{type(given).__name__}' takes the parts of complex weights for weights of their "
            "own, and Optax does not. Use SGD, or hold both parts in real parameters."
        )
    forgotten = [name for name in trained if name not in group_of]
    if forgotten:
        raise CaptureError(
            f"The optimizer lacks the parameter '{forgotten[0]}'. Give it all parameters, and call "
            "requires_grad_(False) on those that stay as they are."
        )
    formulas: dict[Any, Transformation] = {}
    for number, group in enumerate(given.param_groups):
        formulas[number] = make(group)
    formula = formulas[0] if len(formulas) == 1 else optax.multi_transform(formulas, group_of)
    return Optimizer(formula, given, group_of, _settings_of(given))


def _check_parameters(given: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """CaptureError if the optimizer trains a parameter that the module does not have."""
    of_module = {id(tensor) for tensor in tensors.values()}
    for group in given.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad and id(parameter) not in of_module:
                raise CaptureError(
                    f"The optimizer has a parameter {list(parameter.shape)} that is not of the "
                    "module, so the step would leave it as it is. Register it in the module; for a "
                    "loss with parameters, compute the loss in forward, and give loss=None."
                )


def _is_of_torch(optimizer: Any) -> bool:
    """Whether an optimizer is one of torch.optim's own classes."""
    return type(optimizer).__module__.startswith("torch.optim.")


def _settings_of(optimizer: torch.optim.Optimizer) -> tuple[tuple[Any, ...], ...]:
    groups = []
    for group in optimizer.param_groups:
        names = sorted(set(group) - _IGNORED)
        groups.append(tuple((name, group[name]) for name in names))
    return tuple(groups)


# -------------------------------------------------------------------------------------- formulas


def _refuse(group: Mapping[str, Any], *settings: str) -> None:
    """CaptureError if one of these settings is in use."""
    for setting in settings:
        if group.get(setting):
            raise CaptureError(
                f"Optax has no counterpart with the formula of '{setting}'. Remove it, or give an "
                "optimizer of Optax."
            )


def _chain(group: Mapping[str, Any], *parts: Transformation | None) -> Transformation:
    """Transformations in turn, of gradients whose sign `maximize` turns."""
    negated = optax.scale(-1.0) if group.get("maximize") else None
    present = [part for part in (negated, *parts) if part is not None]
    return optax.chain(*present) if present else optax.identity()


def _decay(group: Mapping[str, Any]) -> Transformation | None:
    """Adds `weight_decay` times the weights."""
    decay = float(group["weight_decay"])
    return optax.add_decayed_weights(decay) if decay else None


def _momentum(group: Mapping[str, Any]) -> Transformation | None:
    momentum = float(group["momentum"])
    return optax.trace(momentum, nesterov=bool(group.get("nesterov"))) if momentum else None


def _moments(group: Mapping[str, Any]) -> Transformation:
    _refuse(group, "amsgrad")
    first, second = group["betas"]
    return optax.scale_by_adam(float(first), float(second), float(group["eps"]))


def _sgd(group: Mapping[str, Any]) -> Transformation:
    _refuse(group, "dampening")
    return _chain(group, _decay(group), _momentum(group))


def _adam(group: Mapping[str, Any]) -> Transformation:
    if group.get("decoupled_weight_decay"):
        return _adamw(group)
    return _chain(group, _decay(group), _moments(group))


def _adamw(group: Mapping[str, Any]) -> Transformation:
    return _chain(group, _moments(group), _decay(group))


def _rmsprop(group: Mapping[str, Any]) -> Transformation:
    scale = optax.scale_by_stddev if group["centered"] else optax.scale_by_rms
    scaled = scale(float(group["alpha"]), float(group["eps"]), eps_in_sqrt=False)
    return _chain(group, _decay(group), scaled, _momentum(group))


_FORMULAS: dict[str, Callable[[Mapping[str, Any]], Transformation]] = {
    "SGD": _sgd,
    "Adam": _adam,
    "AdamW": _adamw,
    "RMSprop": _rmsprop,
}
"""By name of the class in torch.optim."""


# -------------------------------------------------------------------------------------- clipping


def clipped(grads: Any, limit: float) -> Any:
    """Gradients of at most a total norm, as `torch.nn.utils.clip_grad_norm_` clips them."""
    squares = [jnp.sum(jnp.square(jnp.abs(grad))) for grad in jax.tree.leaves(grads)]
    factor = jnp.minimum(1.0, limit / (jnp.sqrt(sum(squares)) + 1e-6))
    return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)


def check_clip_norm(limit: float | None) -> None:
    """CaptureError for a limit that is not a positive number."""
    if limit is None:
        return
    if not isinstance(limit, numbers.Real) or not (limit > 0 and math.isfinite(limit)):
        raise CaptureError(f"clip_norm is {limit!r}: give a positive number, or None.")

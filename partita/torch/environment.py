"""PyTorch's operations as JAX's: torchax, its gaps closed, and operators named by module.

torchax 0.0.13 never updates the running statistics of a batch normalization, and lets gradients
through `torch.detach` and `torch.no_grad`. Here both do as in PyTorch. Custom backward functions
and `tensor.data`, which torchax would ignore, are refused.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from partita.capture.names import MODULE_SCOPE
from partita.errors import CaptureError
from partita.torch.extra import Package

if TYPE_CHECKING:
    import torch
    import torch.utils._pytree as torch_tree
    import torchax.tensor as torchax
    from torch.nn.modules import module as torch_modules
    from torchax.tensor import Environment, Tensor
else:
    torch = Package("torch")
    torch_modules = Package("torch.nn.modules.module")
    torch_tree = Package("torch.utils._pytree")
    torchax = Package("torchax.tensor")


@functools.cache
def environment() -> Environment:
    """torchax's environment, in which modules are traced, with its gaps closed."""

    class GradientsAsInTorch(torchax.Environment):
        """An environment where results inside `torch.no_grad` have no gradient."""

        def dispatch(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return super().dispatch(func, types, args, kwargs)
            leaves = torch_tree.tree_leaves((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torchax.Tensor)]
            before = [tensor.jax() for tensor in tensors]
            result = super().dispatch(func, types, args, kwargs)
            _stop_gradients(result, tensors, before)
            return result

    traced = GradientsAsInTorch()
    traced.override_op_definition(torch.ops.aten.detach, _detach)
    traced.override_op_definition(torch.ops.aten.detach.default, _detach)
    traced.override_op_definition(torch.nn.functional.batch_norm, _batch_norm)
    return traced


def _stop_gradients(result: Any, tensors: Sequence[Tensor], before: Sequence[jax.Array]) -> None:
    """Takes the gradient from the results of an operation; arguments that it changed in place keep
    the gradient that they had `before`."""
    for tensor, old in zip(tensors, before, strict=True):
        new = tensor.jax()
        is_alike = (new.shape, new.dtype) == (old.shape, old.dtype)
        if new is not old and is_alike:
            tensor._elem = _with_gradient_of(new, old)
    arguments = {id(tensor) for tensor in tensors}
    for leaf in torch_tree.tree_leaves(result):
        if isinstance(leaf, torchax.Tensor) and id(leaf) not in arguments:
            leaf._elem = jax.lax.stop_gradient(leaf._elem)


@jax.custom_jvp
def _with_gradient_of(values: jax.Array, other: jax.Array) -> jax.Array:
    """The values, with the gradient that another array of their shape has."""
    return values


@_with_gradient_of.defjvp
def _jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
    values, _ = primals
    return values, tangents[1]


def _tensor(values: jax.Array) -> Tensor:
    return torchax.Tensor(values, environment())


def wrapped(tree: Any) -> Any:
    """A tree of JAX arrays as a tree of torchax tensors."""
    return environment().j2t_iso(tree)


def unwrapped(tree: Any) -> Any:
    """A tree of torchax tensors as a tree of JAX arrays."""
    return torch_tree.tree_map_only(torch.Tensor, lambda tensor: tensor.jax(), tree)


@contextmanager
def tracing(module: torch.nn.Module, key: Any) -> Iterator[None]:
    """Inside, operations on torchax tensors are JAX's, named by the submodule that calls them.

    Args:
        key: The random key of dropout and other noise.
    """
    with ExitStack() as stack:
        stack.enter_context(_refused_extensions())
        stack.enter_context(named_scopes(module))
        stack.enter_context(environment())
        stack.enter_context(environment().override_property(prng=key))
        yield


# ------------------------------------------------------------------------------ names of modules


class _Scopes:
    """One open `jax.named_scope`: that of the innermost module that is running."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.running: list[str] = []
        self.open = ExitStack()

    def enter(self, child: torch.nn.Module, inputs: Any) -> None:
        outer = self.running[-1] if self.running else ""
        self.running.append(self.names.get(id(child), outer))
        self._switch()

    def leave(self, child: torch.nn.Module, inputs: Any, outputs: Any) -> None:
        self.running.pop()
        self._switch()

    def _switch(self) -> None:
        self.open.close()
        if self.running:
            self.open.enter_context(jax.named_scope(MODULE_SCOPE + self.running[-1]))


@contextmanager
def named_scopes(module: torch.nn.Module) -> Iterator[None]:
    """Inside, each submodule of a module runs in a scope of its own path, `blocks.0.mlp.up`.

    A submodule with several paths is named by the first one.
    """
    names: dict[int, str] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        names.setdefault(id(child), name)
    scopes = _Scopes(names)
    before = torch_modules.register_module_forward_pre_hook(scopes.enter)
    after = torch_modules.register_module_forward_hook(scopes.leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
        scopes.open.close()


# ------------------------------------------------------------------------------------ operations


def _detach(tensor: Tensor) -> Tensor:
    """`torch.detach`: the same values without a gradient."""
    return _tensor(jax.lax.stop_gradient(tensor.jax()))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`, which updates the running statistics in place."""
    values = input.jax()
    others = [0, *range(2, values.ndim)]
    """All dims but the channels."""
    if training or running_mean is None or running_var is None:
        mean = jnp.mean(values, axis=others)
        variance = jnp.var(values, axis=others)
    else:
        mean = running_mean.jax()
        variance = running_var.jax()
    if training and running_mean is not None and running_var is not None:
        count = values.size // values.shape[1]
        unbiased = variance * count / max(1, count - 1)
        _move_average(running_mean, mean, momentum)
        _move_average(running_var, unbiased, momentum)
    shape = [1, -1, *[1] * (values.ndim - 2)]
    scale = jax.lax.rsqrt(variance + eps)
    result = (values - mean.reshape(shape)) * scale.reshape(shape)
    if weight is not None:
        result = result * weight.jax().reshape(shape)
    if bias is not None:
        result = result + bias.jax().reshape(shape)
    return _tensor(result.astype(values.dtype))


def _move_average(average: Tensor, value: jax.Array, momentum: float) -> None:
    old = average.jax()
    new = (1 - momentum) * old + momentum * jax.lax.stop_gradient(value)
    average._elem = new.astype(old.dtype)


@contextmanager
def _refused_extensions() -> Iterator[None]:
    """Inside, custom backward functions and `tensor.data` raise a CaptureError."""

    def apply(function: type, *args: Any, **kwargs: Any) -> Any:
        raise CaptureError(
            f"The custom backward of {function.__name__} (torch.autograd.Function) cannot be used "
            "in JAX. Write its forward pass with PyTorch's operations, which are differentiated."
        )

    def read_data(tensor: Any) -> Any:
        raise CaptureError(
            "tensor.data inside a forward pass has no counterpart in JAX. Write tensor.detach()."
        )

    replaced: Sequence[tuple[type, str, Any]] = (
        (torch.autograd.Function, "apply", classmethod(apply)),
        (torchax.Tensor, "data", property(read_data)),
    )
    originals = [vars(owner).get(name) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(replaced, originals, strict=True):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

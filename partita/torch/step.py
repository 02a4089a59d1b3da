"""The training step of a PyTorch module: forward, loss, backward and update in one function."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, Unpack

import jax
import jax.numpy as jnp

from partita import api
from partita.errors import CaptureError
from partita.execute.process_arrays import whole
from partita.execute.processes import alone
from partita.execute.steps import settled
from partita.machine import Machine
from partita.plans.plan import Plan
from partita.torch.environment import environment
from partita.torch.extra import Package
from partita.torch.module import (
    Arrays,
    ModuleNetwork,
    Settings,
    Versions,
    arrays_of,
    as_batch,
    explained,
    leaks_explained,
    modes_of,
    names_of,
    saved_dtype,
    to_torch,
)
from partita.torch.optimizers import Optimizer, check_clip_norm, clipped, optimizer_of
from partita.units import is_whole_number

if TYPE_CHECKING:
    import torch
else:
    torch = Package("torch")

Loss: TypeAlias = "Callable[[Any, Any], torch.Tensor]"
"""(outputs, targets) -> the loss, a scalar tensor."""
_STATIC = (3,)
"""Position of the module's settings among the arguments of the step's function."""


class State(NamedTuple):
    """What a step changes."""

    params: Arrays
    optimizer: Any
    buffers: Arrays
    """Buffers, and parameters that require no gradient."""
    key: Any
    """Random key of dropout and other noise: uint32[2]."""


class TrainingStep:
    """A training step of a PyTorch module: `loss = step(batch)`.

    `state` is the training state, a tree of JAX arrays. `function(state, rates, batch, settings)`
    gives (new state, loss) and is jittable; `arguments(batch)` are its arguments.
    """

    def __init__(
        self, network: ModuleNetwork, optimizer: Optimizer, state: State, clip_norm: float | None
    ) -> None:
        self.network = network
        self.optimizer = optimizer
        self.state = state
        self.clip_norm = clip_norm
        self._settings = Settings(network.module, network.loss)
        self._versions = Versions(network.module)
        self._has_given_state = False
        """Whether the module may have taken over the state of the step."""
        self._reached: set[str] | None = None
        """Parameters with a gradient in the program that was traced last."""
        self._run: Callable[..., Any] | None = None
        self._options: dict[str, Any] | None = None
        self._outputs = jax.jit(network.outputs_of, static_argnums=4)

    @property
    def name(self) -> str:
        """Class name of the module."""
        return type(self.network.module).__name__

    @property
    def plan(self) -> Plan | None:
        """The plan by which the step runs; None before the first batch, and without a plan."""
        return getattr(self._run, "plan", None)

    def function(self, state: State, rates: Any, batch: Any, settings: Any) -> tuple[State, Any]:
        """(new state, loss) of a step; `rates` are the learning rates of PyTorch's optimizer.

        `settings` are those of the module, by which programs are told apart.
        """
        next_key, key = jax.random.split(state.key)
        reached: set[str] = set()

        def loss_of(params: Arrays) -> tuple[Any, Arrays]:
            noted = {name: _noted(array, name, reached) for name, array in params.items()}
            return self.network.loss_of(noted, state.buffers, key, batch)

        with explained(self.network.module):
            (loss, after), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        if not reached:
            if any(0 in leaf.shape for leaf in jax.tree.leaves(batch) if hasattr(leaf, "shape")):
                raise CaptureError("The batch is empty: give at least one sample.")
            raise CaptureError(
                f"The loss of '{self.name}' depends on no parameter that requires a gradient: "
                "remove detach() and torch.no_grad() from its computation."
            )
        self._note_reached(reached)
        # PyTorch's gradients of complex numbers are the conjugates of JAX's.
        grads = jax.tree.map(jnp.conj, grads)
        if self.clip_norm is not None:
            grads = clipped(grads, self.clip_norm)
        if self.optimizer.source is not None:
            # PyTorch's optimizers leave parameters without a gradient as they are.
            grads = {name: grad if name in reached else None for name, grad in grads.items()}
        params = {name: after.get(name, array) for name, array in state.params.items()}
        buffers = {name: after[name] for name in self.network.names.fixed}
        params, optimizer = self.optimizer.updated(grads, state.optimizer, params, rates)
        return State(params, optimizer, buffers, next_key), loss

    def _note_reached(self, reached: set[str]) -> None:
        """Warns if Adam counts the steps of parameters that are not in all of them."""
        counts = "Adam" in type(self.optimizer.source).__name__
        if counts and self._reached not in (None, reached):
            warnings.warn(
                f"Other parameters of '{self.name}' have a gradient than in earlier steps. Adam's "
                "bias correction counts all steps here, and those of each parameter in PyTorch.",
                stacklevel=2,
            )
        self._reached = reached

    def arguments(self, batch: Any) -> tuple[State, Any, Any, Any]:
        """The arguments of `function` for a batch of tensors, arrays or shapes."""
        return self.state, self.optimizer.rates(), as_batch(batch), self._settings.key()

    def __call__(self, *batch: Any) -> Any:
        """Trains on a batch and gives its loss, a scalar JAX array: `float(loss)`.

        The batch is (inputs, targets), as one argument or two, where inputs are a tensor, a tuple
        or a dict; without a loss function it is the inputs alone. Tensors of PyTorch and arrays of
        NumPy are taken.
        """
        self._check_weights()
        arguments = self.arguments(batch[0] if len(batch) == 1 else batch)
        if self._run is None:
            self._run = self._prepared(arguments)
        if self._is_on_meta():
            raise CaptureError(
                f"'{self.name}' is on the meta device, so it can be planned, and has no weights "
                "to train. Make it without torch.device('meta')."
            )
        with leaks_explained(self.name):
            self.state, loss = self._run(*arguments)
        changed = self._settings.keep_changed(arguments[-1])
        if changed:
            warnings.warn(
                f"The forward pass changes {', '.join(changed)}, which happens only when the step "
                "is compiled. Hold values that change in buffers.",
                stacklevel=2,
            )
        return loss

    def _check_weights(self) -> None:
        """Warns of changed parameters, of which the step has copies.

        CaptureError if others require a gradient.
        """
        if not self._versions.changed():
            return
        if names_of(self.network.module).trained != self.network.names.trained:
            raise CaptureError(
                f"Other parameters of '{self.name}' require a gradient than when its step was "
                "made. Make a new step."
            )
        if not self._has_given_state:
            warnings.warn(
                f"Weights or buffers of '{self.name}' changed after its step was made, which has "
                "copies. "
                "Call step.load_state_dict(module.state_dict()) to train the changed ones.",
                stacklevel=3,
            )
        self._has_given_state = False

    def _is_on_meta(self) -> bool:
        return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(self.state))

    def _prepared(self, arguments: Any) -> Callable[..., Any]:
        """The function that runs the step: planned if the step was made by `parallelize`."""
        if self._options is None:
            return jax.jit(self.function, static_argnums=_STATIC, donate_argnums=0)
        options = {"static_argnums": _STATIC, "donate": True, **self._options}
        return api.parallelize(self._named_function(), arguments, **options)

    def _named_function(self) -> Callable[..., Any]:
        """`function` under the name of the module, as plans show it."""

        def function(state: State, rates: Any, batch: Any, settings: Any) -> tuple[State, Any]:
            return self.function(state, rates, batch, settings)

        function.__name__ = self.name
        return function

    def plan_for(self, batch: Any, **options: Any) -> Plan:
        """The fastest plan for batches like this one; options of `partita.plan`, as `machine`."""
        arguments = self.arguments(batch)
        plan = api.plan(self._named_function(), args=arguments, **options)
        self._settings.keep_changed(arguments[-1])
        return plan

    def predict(self, inputs: Any) -> Any:
        """The module's outputs in eval mode, as tensors on the CPU; nothing is trained."""
        module = self.network.module
        modes = modes_of(module)
        module.eval()
        settings = self._settings.key()
        try:
            with leaks_explained(self.name):
                outputs = settled(
                    self._outputs(
                        self.state.params,
                        self.state.buffers,
                        self.state.key,
                        as_batch(inputs),
                        settings,
                    )
                )
            self._settings.keep_changed(settings)
        finally:
            for child, mode in zip(module.modules(), modes, strict=True):
                child.training = mode
        return outputs.with_tensors(_as_tensor)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights and buffers for `module.load_state_dict`, on the CPU."""
        self._has_given_state = True
        arrays = {**self.state.params, **self.state.buffers}
        first = self.network.names.first
        result = {}
        for name, tensor in self.network.module.state_dict().items():
            array = arrays[first[name]]
            dtype = saved_dtype(array, tensor)
            result[name] = to_torch(array if alone() else whole(array), dtype)
        return result

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the weights and buffers; the optimizer's state stays as it is."""
        module = self.network.module
        try:
            module.load_state_dict(tensors)
        except (RuntimeError, TypeError) as error:
            raise CaptureError(
                f"The state does not fit '{self.name}': {' '.join(str(error).split())}"
            ) from error
        self._versions.changed()
        names = self.network.names
        self.state = self.state._replace(
            params=arrays_of(module, names.trained), buffers=arrays_of(module, names.fixed)
        )


def _noted(array: Any, name: str, reached: set[str]) -> Any:
    """The array itself; its name is noted when a gradient reaches it."""

    @jax.custom_vjp
    def same(values: Any) -> Any:
        return values

    def backward(_: None, gradient: Any) -> tuple[Any]:
        reached.add(name)
        return (gradient,)

    same.defvjp(lambda values: (values, None), backward)
    return same(array)


def _as_tensor(array: Any) -> torch.Tensor:
    return to_torch(jax.device_get(array), getattr(torch, str(array.dtype)))


def training_step(
    module: torch.nn.Module,
    loss: Loss | None,
    optimizer: Any,
    *,
    clip_norm: float | None = None,
    seed: int = 0,
) -> TrainingStep:
    """The training step of a module, run on one device: `loss = step(batch)`.

    Its weights are copied: `module.load_state_dict(step.state_dict())` brings them back.

    Args:
        loss: (outputs, targets) -> scalar tensor; None for a module that returns its loss, or an
            output with a `loss`, as those of transformers.
        optimizer: One of Optax, or SGD, Adam, AdamW or RMSprop of torch.optim; its learning rate
            is read before each step, so that schedulers work.
        clip_norm: Maximum norm of all gradients together, as `clip_grad_norm_` takes it.
        seed: Of dropout and other noise.

    Raises:
        CaptureError: The module or its optimizer cannot be a JAX program.
    """
    if not isinstance(module, torch.nn.Module):
        raise CaptureError(
            f"A {type(module).__name__} is no PyTorch module. Give a torch.nn.Module."
        )
    if loss is not None and not callable(loss):
        raise CaptureError(
            f"The loss is {loss!r}: give a function of (outputs, targets), such as "
            "torch.nn.functional.cross_entropy, or None."
        )
    _check_module(module)
    check_clip_norm(clip_norm)
    if not is_whole_number(seed):
        raise CaptureError(f"seed is {seed!r}: give a whole number.")
    names = names_of(module)
    if not names.trained:
        raise CaptureError(
            f"'{type(module).__name__}' has no parameter that requires a gradient, so there is "
            "nothing to train. Call module.requires_grad_(True)."
        )
    environment()
    made = optimizer_of(optimizer, module, names.trained)
    params = arrays_of(module, names.trained)
    is_on_meta = any(isinstance(x, jax.ShapeDtypeStruct) for x in params.values())
    initialize = made.transformation.init
    slots = jax.eval_shape(initialize, params) if is_on_meta else initialize(params)
    state = State(params, slots, arrays_of(module, names.fixed), jax.random.PRNGKey(int(seed)))
    return TrainingStep(ModuleNetwork(module, loss, names), made, state, clip_norm)


def parallelize(
    module: torch.nn.Module,
    loss: Loss | None,
    optimizer: Any,
    *,
    clip_norm: float | None = None,
    seed: int = 0,
    devices: int | None = None,
    machine: str | Machine | None = None,
    plan: Plan | str | Path | None = None,
    **options: Unpack[api.StepOptions],
) -> TrainingStep:
    """The training step of a module over several devices: planned, compiled and checked at its
    first batch.

    Arguments as for `training_step` and `partita.parallelize`. The batch is that of all devices.
    Under `partita run` and `partita plan` the command's devices and plan hold unless given here.
    """
    step = training_step(module, loss, optimizer, clip_norm=clip_norm, seed=seed)
    step._options = {"devices": devices, "machine": machine, "plan": plan, **options}
    return step


def _check_module(module: torch.nn.Module) -> None:
    """CaptureError for modules that do not compute what they do in PyTorch."""
    for name, child in module.named_modules():
        where = f"'{name}'" if name else "The module"
        kind = type(child).__name__
        if kind in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            raise CaptureError(
                f"{where} is wrapped in {kind}. Give the module inside it: Partita splits it."
            )
        if hasattr(child, "_orig_mod"):
            raise CaptureError(
                f"{where} is compiled by torch.compile. Give the module before: Partita compiles "
                "its step."
            )
        if ".quantized" in type(child).__module__:
            raise CaptureError(
                f"{where} is quantized, and its weights have no gradient. Give the module before."
            )
        if isinstance(child, torch.jit.ScriptModule):
            raise CaptureError(f"{where} is a TorchScript module. Give the module before it.")
        if "InstanceNorm" in kind and getattr(child, "track_running_stats", False):
            raise CaptureError(
                f"{where} tracks the running statistics of an instance normalization, which "
                "Partita does not update. Make it with track_running_stats=False."
            )
        if isinstance(child, torch.nn.modules.lazy.LazyModuleMixin):
            raise CaptureError(f"{where} is lazy. Call the module once on a batch first.")

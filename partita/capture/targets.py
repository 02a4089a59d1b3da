"""The platform for which a step is captured, with the kernels that Keras and JAX choose there.

A step is lowered for any platform on any host. Keras and JAX look at the local devices for some of
their choices: cuDNN's fused attention and its recurrent layers, TPU attention. `choices_for` makes
them look at the target instead, and puts everything back. Their own rules on head sizes, dtypes and
masks decide as they would there.

This is the only file that changes JAX or Keras from inside.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.experimental.rnn as jax_rnn
from jax._src.cudnn import fused_attention_stablehlo as cudnn_attention
from jax._src.interpreters import mlir

from partita.capture.custom_calls import RECURRENT_DESCRIPTOR
from partita.errors import CaptureError
from partita.machine import PLATFORMS

JAX_NAMES = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}
"""Platform -> the name that JAX has for its backend."""
HOPPER = (9, 0)
CUDNN_VERSION = 91100
"""The version of an absent cuDNN, as JAX writes it. It decides on rare cases only."""
SCRATCH_BYTES = 8 << 20
"""Fixed part of the scratch memory of a recurrent layer, per direction."""


@dataclass(frozen=True)
class CaptureTarget:
    """A platform to capture a step for.

    >>> CaptureTarget.of("cuda:8.0").compute_capability, str(CaptureTarget.of("cuda:9.0"))
    ((8, 0), 'cuda')
    """

    platform: str
    compute_capability: tuple[int, int] = HOPPER
    """Of an NVIDIA GPU; newer generations than Hopper choose like it."""

    @staticmethod
    def of(text: str) -> CaptureTarget:
        """The target of a text: a platform, and for CUDA a compute capability behind a colon."""
        match = re.fullmatch(r"(\w+)(?::(\d+)\.(\d+))?", text)
        if match is None or match[1] not in PLATFORMS or (match[2] and match[1] != "cuda"):
            raise CaptureError(
                f"Cannot capture for the target {text!r}: it is no platform. Use one of "
                f"{', '.join(PLATFORMS)}, or 'cuda:8.0' for GPUs of compute capability 8.0."
            )
        capability = (int(match[2]), int(match[3])) if match[2] else HOPPER
        return CaptureTarget(match[1], min(capability, HOPPER))

    @staticmethod
    def local() -> CaptureTarget:
        """The target that the local devices are."""
        device = jax.devices()[0]
        if device.platform == "cpu":
            return CaptureTarget("cpu")
        if device.platform == "tpu":
            return CaptureTarget("tpu")
        return CaptureTarget.of(f"cuda:{getattr(device, 'compute_capability', '9.0')}")

    def __str__(self) -> str:
        if self.compute_capability == HOPPER:
            return self.platform
        return f"{self.platform}:{self.compute_capability[0]}.{self.compute_capability[1]}"


@contextlib.contextmanager
def choices_for(target: CaptureTarget) -> Iterator[None]:
    """A context in which Keras and JAX choose kernels as on a target."""
    is_local = target == CaptureTarget.local()
    with contextlib.ExitStack() as stack:
        if not is_local:
            # Functions that were traced before have the choices of the local devices.
            jax.clear_caches()
            stack.callback(jax.clear_caches)
            for holder, name, value in _choices(target):
                stack.enter_context(_replaced(holder, name, value))
        if target.platform == "cuda":
            stack.enter_context(_recurrent_kernels(is_local))
        yield


def _choices(target: CaptureTarget) -> Iterator[tuple[Any, str, Any]]:
    """The functions by which Keras and JAX look at the devices: module, name, answer."""
    backend_name = JAX_NAMES[target.platform]
    device = _DeviceOf(backend_name, jax.devices()[0])
    yield jax, "default_backend", lambda: backend_name
    yield jax, "devices", lambda backend=None: [device]
    yield jax, "local_devices", lambda *arguments, **named: [device]
    if target.platform == "cuda":
        yield cudnn_attention, "check_cudnn_version", lambda: CUDNN_VERSION
    yield cudnn_attention, "check_compute_capability", partial(_has_capability, target)
    yield cudnn_attention, "is_cuda_compute_capability_equal", lambda capability: False
    keras_rnn = sys.modules.get("keras.src.backend.jax.rnn")
    if keras_rnn is not None:
        yield keras_rnn, "_is_gpu_available", lambda: target.platform == "cuda"


def _has_capability(target: CaptureTarget, capability: str) -> bool:
    """Whether a target has at least a compute capability like "8.0"."""
    if target.platform != "cuda":
        return False
    return target.compute_capability >= tuple(int(part) for part in capability.split("."))


class _DeviceOf:
    """A local device that says that it is of another platform."""

    def __init__(self, platform: str, device: Any) -> None:
        self.platform = platform
        self._device = device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


@contextlib.contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    """A context in which an attribute has another value, or has one at all."""
    missing = object()
    before = getattr(holder, name, missing)
    setattr(holder, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(holder, name)
        else:
            setattr(holder, name, before)


# ---- recurrent layers


@contextlib.contextmanager
def _recurrent_kernels(is_local: bool) -> Iterator[None]:
    """A context in which recurrent layers of cuDNN can be lowered, with a memory that the batch
    divides.

    cuDNN tells the sizes of its memories only beside a GPU; elsewhere they are estimated. jaxlib
    registers the lowering only beside its plugin.
    """
    library: Any = getattr(jax_rnn, "gpu_rnn", None)
    if library is None:
        yield
        return
    sizes = library.compute_rnn_workspace_reserve_space_sizes if is_local else recurrent_sizes
    name = "compute_rnn_workspace_reserve_space_sizes"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(library, name, partial(_divisible_sizes, sizes)))
        stack.enter_context(_replaced(jax_rnn, "lstm", _typed_lstm(jax_rnn.lstm)))
        if not getattr(library, "_cuda_rnn", None):
            builder = SimpleNamespace(build_rnn_descriptor=RECURRENT_DESCRIPTOR.pack)
            forward = partial(library._rnn_fwd_lowering, builder, "cu")
            backward = partial(library._rnn_bwd_lowering, builder, "cu")
            stack.enter_context(_lowered(jax_rnn.rnn_fwd_p, forward))
            stack.enter_context(_lowered(jax_rnn.rnn_bwd_p, backward))
        yield


def _typed_lstm(lstm: Callable[..., Any]) -> Callable[..., Any]:
    """JAX's LSTM by cuDNN, refused for dtypes that it cannot lower.

    Keras then takes its own loop. It does not ask: with bfloat16 its step cannot be compiled.
    """

    def typed(inputs: Any, *arguments: Any, **named: Any) -> Any:
        if inputs.dtype not in ("float32", "float64"):
            raise TypeError(f"no LSTM by cuDNN in {inputs.dtype}")
        return lstm(inputs, *arguments, **named)

    return typed


@contextlib.contextmanager
def _lowered(primitive: Any, lowering: Callable[..., Any]) -> Iterator[None]:
    """A context in which a primitive has a lowering for CUDA."""
    rules: Any = mlir._platform_specific_lowerings["cuda"]
    before = rules.get(primitive)
    mlir.register_lowering(primitive, lowering, platform="cuda")
    try:
        yield
    finally:
        if before is None:
            del rules[primitive]
        else:
            rules[primitive] = before


def _divisible_sizes(
    sizes: Callable[..., tuple[int, int]],
    inputs: int,
    hidden: int,
    layers: int,
    batch: int,
    *others: Any,
) -> tuple[int, int]:
    """The sizes of a layer's memories, the one for the backward pass a multiple of the batch."""
    workspace, reserve = sizes(inputs, hidden, layers, batch, *others)
    return workspace, -(-reserve // batch) * batch


def recurrent_sizes(
    inputs: int,
    hidden: int,
    layers: int,
    batch: int,
    steps: int,
    dropout: float,
    bidirectional: bool,
    allows_tf32: bool,
) -> tuple[int, int]:
    """Bytes of scratch memory and of the memory for the backward pass of an LSTM of cuDNN.

    The second is exact, the first slightly above the size that cuDNN 9 asked for in three cases on
    an H100 (8,978,816, 9,056,640 and 17,506,688).

    >>> recurrent_sizes(32, 64, 1, 16, 20, 0.0, False, True)
    (9185280, 409856)
    """
    del dropout, allows_tf32
    directions = 2 if bidirectional else 1
    state = directions * hidden
    weights = 4 * state * (inputs + hidden + 2)
    weights += 4 * state * (state + hidden + 2) * (layers - 1)
    sequence = batch * steps
    reserve = 4 * 5 * sequence * state * layers + 256
    scratch = 4 * (weights + sequence * (inputs + 8 * state))
    return directions * SCRATCH_BYTES + scratch, reserve

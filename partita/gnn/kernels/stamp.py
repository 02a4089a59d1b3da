"""Time stamps of exchanges between devices: which seconds a device computes, and which it waits.

`enter(values)` and `leave(values)` return the values and record when they were ready; in the
backward pass leaving is entering. A stamp depends on the data: it reads the first number of each
value, and its result, a zero that XLA cannot know, is added to them, so XLA moves nothing past it.
The price is one addition per exchanged number. Times are this process's own, by device.
"""

from __future__ import annotations

import ctypes
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import cfunc, types

from partita.errors import MachineError
from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import (
    answers_metadata,
    argument,
    carray,
    floats,
    ints,
    result,
    words_at,
)

MAX_STAMPS = 4096
"""Stamps of a step that a device can record."""

MAX_DEVICES = 1024
"""Devices that can record stamps."""

ENTER = 1
LEAVE = 0

_records = np.zeros((MAX_DEVICES, 2 * MAX_STAMPS + 2), np.int64)
"""Records of each device, in nanoseconds: the number of stamps, the process's CPU time at `clear`,
and for every stamp the time, whose last bit is ENTER or LEAVE, and the process's CPU time."""


@functools.cache
def ready() -> None:
    """Registers the stamp; MachineError where it does not work."""
    if not bridge.works(_register, "time stamp"):
        raise MachineError(
            "This machine cannot time parts, which partition='learned' needs: use "
            "partition='edges'."
        )


def _register() -> None:
    clock = ctypes.CDLL(None).clock_gettime
    clock.argtypes = [ctypes.c_int, ctypes.c_void_p]
    clock.restype = ctypes.c_int
    # addresses of this process: the handler must not be cached on disk
    address = _records.ctypes.data
    words = _records.shape[1]
    version = bridge.version()
    wall_clock, cpu_clock = time.CLOCK_MONOTONIC, time.CLOCK_PROCESS_CPUTIME_ID

    def stamp(frame):  # type: ignore[no-untyped-def]
        if answers_metadata(frame, version):
            return 0
        floats(result(frame, 0))[0] = np.float32(0)
        device_and_kind = ints(argument(frame, 0))
        records = carray(words_at(address), (MAX_DEVICES * words,))
        now = np.empty(4, np.int64)
        clock(wall_clock, now.ctypes.data)
        clock(cpu_clock, now.ctypes.data + 16)
        start = device_and_kind[0] * words
        if records[start] < MAX_STAMPS:
            records[start] += 1
            place = start + 2 * records[start]
            even_nanoseconds = (now[0] * 1_000_000_000 + now[1]) // 2 * 2
            records[place] = even_nanoseconds + device_and_kind[1]
            records[place + 1] = now[2] * 1_000_000_000 + now[3]
        return 0

    bridge.register_handler("partita_gnn_stamp", cfunc(types.int64(types.int64))(stamp))


def _stamped(values: Any, device: Any, kind: int) -> Any:
    """The values, recorded when all are ready."""
    leaves = [x for x in jax.tree.leaves(values) if x.size]
    if not leaves:
        return values
    first_numbers = jnp.stack([x[(0,) * x.ndim].astype(jnp.float32) for x in leaves])
    device_and_kind = jnp.stack([jnp.asarray(device, jnp.int32), jnp.int32(kind)])
    stamp = jax.ffi.ffi_call("partita_gnn_stamp", jax.ShapeDtypeStruct((1,), jnp.float32))
    zero = stamp(device_and_kind, first_numbers)[0]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _recorded(values: Any, device: Any, kind: int) -> Any:
    return _stamped(values, device, kind)


def _recorded_forward(values: Any, device: Any, kind: int) -> Any:
    return _stamped(values, device, kind), device


def _recorded_backward(kind: int, device: Any, dy: Any) -> Any:
    return _stamped(dy, device, 1 - kind), None


_recorded.defvjp(_recorded_forward, _recorded_backward)


def enter(values: Any, device: Any) -> Any:
    """Arrays, recorded when all are ready to be sent; `device` is its number, int32."""
    return _recorded(values, device, ENTER)


def leave(values: Any, device: Any) -> Any:
    """Arrays, recorded when all have arrived."""
    return _recorded(values, device, LEAVE)


def _wait_for_second(first: Any, second: Any, device: Any) -> tuple[Any, Any]:
    """Records as a wait the time from when the first is ready until the second is ready too."""
    first = _stamped(first, device, ENTER)
    return _stamped((first, second), device, LEAVE)


@jax.custom_vjp
def meet(local: Any, received: Any, device: Any) -> tuple[Any, Any]:
    """Both arrays, when both are ready.

    Records how long `local` waits for `received`, forward only.
    """
    return _wait_for_second(local, received, device)


def _meet_forward(local: Any, received: Any, device: Any) -> Any:
    return _wait_for_second(local, received, device), None


def _meet_backward(_: Any, dy: Any) -> Any:
    return *dy, None


meet.defvjp(_meet_forward, _meet_backward)


@jax.custom_vjp
def fork(x: Any, device: Any) -> tuple[Any, Any]:
    """An array twice, to compute with and to send.

    Backward, records how long the gradient of the first waits for that of the second.
    """
    return x, x


def _fork_forward(x: Any, device: Any) -> Any:
    return (x, x), device


def _fork_backward(device: Any, dy: Any) -> Any:
    return sum(_wait_for_second(dy[0], dy[1], device)), None


fork.defvjp(_fork_forward, _fork_backward)


def clear() -> None:
    """Forgets all stamps, before a step."""
    _records[:, 0] = 0
    _records[:, 1] = time.process_time_ns()


def busy(began: float, ended: float, devices: int) -> np.ndarray:
    """float64 [devices]: seconds of a step in which each device does not wait; 0 without stamps.

    `began` and `ended` are `time.perf_counter` before and after the step. Where this process has
    one device, the CPU time that the process uses during exchanges is the device's cost of sending
    and receiving. It counts as busy, at the pace at which the device computes.
    """
    alone = jax.local_device_count() == 1
    shift = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - time.perf_counter_ns()
    start = int(began * 1e9) + shift
    last = (int(ended * 1e9) + shift, time.process_time_ns())
    seconds = []
    for device in range(devices):
        count, cpu_at_clear = _records[device, :2]
        events = _records[device, 2 : 2 * count + 2].reshape(-1, 2)
        seconds.append(_busy(events, (start, int(cpu_at_clear)), last, alone))
    return np.array(seconds)


def _busy(events: np.ndarray, first: tuple[int, int], last: tuple[int, int], alone: bool) -> float:
    """Seconds between first and last outside waits.

    These two and the events are (time, CPU time so far), in nanoseconds.

    A device waits while it is in an exchange until it leaves one. From there to the next exchange
    that it enters it computes, whatever it has entered before: XLA may enter an exchange long
    before anything needs its result.

    >>> events = np.array([(100 + 1, 100), (300, 150), (400 + 1, 250), (900, 250)])
    >>> _busy(events, (0, 0), (1000, 350), False) * 1e9
    300.0
    >>> early = np.array([(100 + 1, 0), (400 + 1, 0), (500, 0), (900, 0)])
    >>> _busy(early, (0, 0), (1000, 0), False) * 1e9
    500.0

    Here a process uses 50 in exchanges, and computes for 300 with a CPU time of 300:

    >>> _busy(events, (0, 0), (1000, 350), True) * 1e9
    350.0
    """
    if not len(events):
        return 0.0
    events = events[np.argsort(events[:, 0], kind="stable")]
    entering = (events[:, 0] & 1).astype(bool)
    depth = np.cumsum(np.where(entering, 1, -1))
    waits = np.concatenate([[False], ~entering[1:] & (depth[:-1] > 0), [False]])
    times = np.vstack([first, events - (events & (1, 0)), last])
    wall, cpu = np.diff(times, axis=0).T
    computing = wall[~waits].sum()
    pace = max(1.0, computing / max(cpu[~waits].sum(), 1)) if alone else 0.0
    return float(computing + np.minimum(wall[waits], pace * cpu[waits]).sum()) / 1e9

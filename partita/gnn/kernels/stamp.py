"""When devices enter and leave their exchanges, so that the seconds that each is busy for can be told from those that it waits.

`enter(values)` and `leave(values)` give the values back, and note the time at which they were there; backward, leaving is entering. What
is noted hangs on the data: the first numbers of the values go into the stamp, and its result, a zero that XLA cannot know, is added to
them, so that nothing moves past it. The price is one addition an exchanged number. Times are this process's own, by device.
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
from partita.gnn.kernels.bridge import ARGUMENTS, RESULTS, asked, buffer, carray, floats, ints

MOST, DEVICES = 4096, 1024
"""Stamps of a step that a device can keep, and devices."""
_noted = np.zeros((DEVICES, 2 * MOST + 2), np.int64)
"""Of each device: how many stamps, what the process had used of its processors when they were cleared, and for every stamp the time, the last bit telling
entering (1) from leaving (0), and what the process has used. Nanoseconds."""


@functools.cache
def ready() -> None:
    """Registers the stamp: MachineError where there is none."""

    def register() -> None:
        clock = ctypes.CDLL(None).clock_gettime
        clock.argtypes, clock.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_int
        # addresses of this process: never kept on disk
        address, version, words = _noted.ctypes.data, bridge.version(), _noted.shape[1]
        wall, used = time.CLOCK_MONOTONIC, time.CLOCK_PROCESS_CPUTIME_ID

        def stamp(frame):  # type: ignore[no-untyped-def]
            if asked(frame, version):
                return 0
            floats(buffer(frame, RESULTS, 0))[0] = np.float32(0)
            about = ints(buffer(frame, ARGUMENTS, 0))
            mine = carray(bridge._words(address), (DEVICES * words,))
            now = np.empty(4, np.int64)
            clock(wall, now.ctypes.data)
            clock(used, now.ctypes.data + 16)
            at = about[0] * words
            if mine[at] < MOST:
                mine[at] += 1
                place = at + 2 * mine[at]
                mine[place] = (now[0] * 1_000_000_000 + now[1]) // 2 * 2 + about[1]
                mine[place + 1] = now[2] * 1_000_000_000 + now[3]
            return 0

        handler = cfunc(types.int64(types.int64))(stamp)
        bridge._kept.append(handler)
        jax.ffi.register_ffi_target(
            "partita_gnn_stamp", bridge._new_capsule(handler.address, None, None), platform="cpu"
        )

    if not bridge.works(register, "time stamp"):
        raise MachineError(
            "Times of parts cannot be measured on this machine, which the partitioner 'learned' needs: use partition='edges'."
        )


def _stamped(values: Any, device: Any, kind: int) -> Any:
    leaves = [x for x in jax.tree.leaves(values) if x.size]
    if not leaves:
        return values
    first = jnp.stack([x[(0,) * x.ndim].astype(jnp.float32) for x in leaves])
    about = jnp.stack([jnp.asarray(device, jnp.int32), jnp.int32(kind)])
    zero = jax.ffi.ffi_call("partita_gnn_stamp", jax.ShapeDtypeStruct((1,), jnp.float32))(
        about, first
    )[0]
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tied(values: Any, device: Any, kind: int) -> Any:
    return _stamped(values, device, kind)


_tied.defvjp(
    lambda values, device, kind: (_stamped(values, device, kind), device),
    lambda kind, device, dy: (_stamped(dy, device, 1 - kind), None),
)


def enter(values: Any, device: Any) -> Any:
    """Arrays, when they are all ready to be sent; `device`: its number, int32."""
    return _tied(values, device, 1)


def leave(values: Any, device: Any) -> Any:
    """Arrays, when they have all come."""
    return _tied(values, device, 0)


def _both(first: Any, second: Any, device: Any) -> tuple[Any, Any]:
    """Notes as a wait the time from when the first is there until the second is too."""
    first = _stamped(first, device, 1)
    return _stamped((first, second), device, 0)


@jax.custom_vjp
def meet(mine: Any, came: Any, device: Any) -> tuple[Any, Any]:
    """Both arrays, when both are there: a device that has `mine` waits for what came. Backward nothing is noted."""
    return _both(mine, came, device)


meet.defvjp(lambda mine, came, device: (_both(mine, came, device), None), lambda _, dy: (*dy, None))


@jax.custom_vjp
def fork(x: Any, device: Any) -> tuple[Any, Any]:
    """An array twice, to compute with and to send. Backward a device that has the gradient of the first waits for that of the second."""
    return x, x


fork.defvjp(
    lambda x, device: ((x, x), device), lambda device, dy: (sum(_both(dy[0], dy[1], device)), None)
)


def clear() -> None:
    """Forgets what was noted, before a step."""
    _noted[:, :2] = 0, time.process_time_ns()


def busy(began: float, ended: float, devices: int) -> np.ndarray:
    """float64 [devices]: seconds of a step (its `time.perf_counter` before and after) that each device does not wait for others; 0 where nothing is noted.

    Where this process has one device, what it uses of its processors in exchanges is what sending and receiving cost the device. It counts, at
    the pace at which the device computes.
    """
    alone = jax.local_device_count() == 1
    shift = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - time.perf_counter_ns()
    first, last, used = int(began * 1e9) + shift, int(ended * 1e9) + shift, time.process_time_ns()
    events = [_noted[d, 2 : 2 * _noted[d, 0] + 2].reshape(-1, 2) for d in range(devices)]
    return np.array(
        [_busy(e, (first, int(_noted[d, 1])), (last, used), alone) for d, e in enumerate(events)]
    )


def _busy(events: np.ndarray, first: tuple[int, int], last: tuple[int, int], alone: bool) -> float:
    """Seconds between first and last that were not spent waiting; these and the events are (time, used so far).

    A device waits while it is in an exchange until it leaves one. Up to the next that it enters it computes what goes into that, whatever it has
    entered before: XLA may enter an exchange long before anything needs what comes out of it.

    >>> _busy(np.array([(100 + 1, 100), (300, 150), (400 + 1, 250), (900, 250)]), (0, 0), (1000, 350), False) * 1e9
    300.0
    >>> _busy(np.array([(100 + 1, 0), (400 + 1, 0), (500, 0), (900, 0)]), (0, 0), (1000, 0), False) * 1e9
    500.0

    Here a process uses 50 in exchanges, and computes for 300 where it uses 300:

    >>> _busy(np.array([(100 + 1, 100), (300, 150), (400 + 1, 250), (900, 250)]), (0, 0), (1000, 350), True) * 1e9
    350.0
    """
    if not len(events):
        return 0.0
    events = events[np.argsort(events[:, 0], kind="stable")]
    entering = (events[:, 0] & 1).astype(bool)
    depth = np.cumsum(np.where(entering, 1, -1))
    waits = np.concatenate([[False], ~entering[1:] & (depth[:-1] > 0), [False]])
    took, used = np.diff(np.vstack([first, events - (events & (1, 0)), last]), axis=0).T
    computing = took[~waits].sum()
    pace = max(1.0, computing / max(used[~waits].sum(), 1)) if alone else 0.0
    return float(computing + np.minimum(took[waits], pace * used[waits]).sum()) / 1e9

"""Arrays that processes have together: placed on devices, gathered, and sent to each other.

Every process puts only its part of a value on its devices.
"""

from __future__ import annotations

import functools
import hashlib
import zlib
from typing import Any

import jax
import numpy as np

from partita.execute import members
from partita.execute.channel import Channel
from partita.execute.processes import alone, exchanged, meet_in_store, together

WAIT_SECONDS = 3600
"""Time limit for an array of another process, which may be saving files, seconds."""


def is_local(value: Any) -> bool:
    """Whether a value is this process's own: not an array that processes have together, nor one of
    a device group. All processes find the same answer.
    """
    if not isinstance(value, jax.Array):
        return True
    return value.is_fully_addressable and not is_of_group(value)


def is_of_group(value: Any) -> bool:
    """Whether an array is on devices of some processes only, for all processes to know of."""
    if alone() or not isinstance(value, jax.Array):
        return False
    if not isinstance(value.sharding, jax.sharding.NamedSharding):
        return False
    return len(_members(value)) < members.count()


def _members(value: jax.Array) -> list[int]:
    """The processes that have a part of an array."""
    return sorted({device.process_index for device in value.sharding.device_set})


def digest(values: Any) -> str:
    """A digest of a text, or of the arrays of a tree that are this process's own."""
    if isinstance(values, str):
        return hashlib.sha256(values.encode()).hexdigest()
    checksum = 0
    for x in jax.tree.leaves(values):
        if is_local(x):
            data = np.ascontiguousarray(np.asarray(x))
            checksum = zlib.crc32(data.tobytes(), checksum)
    return f"{checksum:08x}"


def put(values: Any, shardings: Any) -> Any:
    """Values with the given shardings. Both are trees; one sharding serves all values.

    Every process puts its part of a value that all processes have.
    """
    if alone():
        return jax.device_put(values, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _put(x, shardings), values)
    return jax.tree.map(_put, values, shardings)


def _put(value: Any, sharding: Any) -> Any:
    if not is_local(value):
        if value.sharding.is_equivalent_to(sharding, value.ndim):
            return value
        if value.sharding.device_set == sharding.device_set and not is_of_group(value):
            return _resharded(sharding)(value)
        value = whole(value)
    array = np.asarray(value)
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False)
    return jax.make_array_from_callback(
        array.shape,
        sharding,
        lambda index: array[index],
        dtype=array.dtype,
    )


_reshards: dict[Any, Any] = {}
"""Compiled copies, by sharding of the result."""


def _resharded(sharding: Any) -> Any:
    if sharding not in _reshards:
        _reshards[sharding] = jax.jit(lambda x: x, out_shardings=sharding)
    return _reshards[sharding]


def whole(value: Any) -> np.ndarray:
    """All values of an array.

    For an array that is split over processes, or that some of them have, all processes must call
    this at the same point.
    """
    if is_of_group(value):
        return _from_group(value)
    if is_local(value) or value.is_fully_replicated:
        return np.asarray(value)
    with together("reading the weights"):
        return np.asarray(replicated(value))


def replicated(value: jax.Array) -> jax.Array:
    """An array on all devices of its mesh."""
    mesh = value.sharding.mesh  # type: ignore[union-attr]
    return _resharded(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(value)


def _from_group(value: jax.Array) -> np.ndarray:
    """All values of an array of a device group, given to every process by the first one of it."""
    link = channel()
    first = link.reserve(jax.process_count())
    index = members.index()
    owners = _members(value)
    with together("reading the weights"):
        if index not in owners:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shape = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=here)
            return np.asarray(link.ask(owners[0], first + index, [shape], "a variable")[0])
        array = value if value.is_fully_replicated else replicated(value)
        own = array.addressable_data(0)
        if index == owners[0]:
            for other in sorted(set(members.alive()) - set(owners)):
                link.offer(first + other, [own], copies=True)
        return np.asarray(own)


@functools.cache
def channel() -> Channel:
    """The channel of this process to the others, opened at the first use, which all reach."""
    from jax._src import distributed

    address = str(distributed.global_state.coordinator_address)
    return Channel(address, lambda own: exchanged("channel", own), WAIT_SECONDS)


def settle() -> None:
    """Returns when every process has received all arrays that it has asked for.

    Before a collective: on a CPU it may take all threads, and arrays would not be sent.
    """
    channel().settle()
    meet_in_store("settle", WAIT_SECONDS)

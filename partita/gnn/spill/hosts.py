"""Stores of the host for the tensors of a plan: a file, or pinned memory."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import jax
import numpy as np


class FileHost:
    """Arrays by name in a temporary file ($TMPDIR)."""

    def __init__(self) -> None:
        # The file is open as long as the run lives.
        self.file: Any = tempfile.TemporaryFile(prefix="partita-", buffering=0)  # noqa: SIM115
        self.positions: dict[str, int] = {}
        self.layouts: dict[str, Any] = {}
        self.end = 0

    def save(self, name: str, array: jax.Array) -> None:
        """Writes an array, over an earlier one of the same name and shape."""
        if name not in self.positions:
            self.positions[name] = self.end
            self.end += array.nbytes
        self.layouts[name] = (array.shape, array.dtype, array.sharding)
        self.file.seek(self.positions[name])
        np.asarray(array).tofile(self.file)

    def load(self, name: str) -> jax.Array:
        """An array where it was."""
        shape, dtype, sharding = self.layouts[name]
        self.file.seek(self.positions[name])
        values = np.fromfile(self.file, dtype, math.prod(shape))
        return jax.device_put(values.reshape(shape), sharding, may_alias=False)


class PinnedHost:
    """Arrays by name in pinned memory of the host."""

    KIND = "pinned_host"
    """JAX's name of this kind of memory."""

    def __init__(self) -> None:
        self.arrays: dict[str, jax.Array] = {}

    def save(self, name: str, array: jax.Array) -> None:
        """Copies an array to the host, over an earlier one of the same name."""
        pinned = array.sharding.with_memory_kind(self.KIND)
        self.arrays[name] = jax.block_until_ready(jax.device_put(array, pinned))

    def load(self, name: str) -> jax.Array:
        """An array where it was."""
        array = self.arrays[name]
        return jax.device_put(array, array.sharding.with_memory_kind("device"))


def host_of(device: Any) -> FileHost | PinnedHost:
    """The store for a device's tensors.

    A CPU's memory is the host's own, so that beyond it is the disk.
    """
    if device.platform == "cpu":
        return FileHost()
    kinds = [memory.kind for memory in device.addressable_memories()]
    return PinnedHost() if PinnedHost.KIND in kinds else FileHost()

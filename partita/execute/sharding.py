"""Meshes and shardings of a plan as JAX's."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from partita.execute import members
from partita.plans.layout import Sharding
from partita.plans.plan import Mesh


def device_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A plan's mesh over devices (default: those of live processes), in their order."""
    if devices is None:
        devices = members.devices()
    shape = mesh.sizes or (1,)
    names = tuple(axis.name for axis in mesh.axes) or ("a",)
    return jax.sharding.Mesh(
        np.array(list(devices)[: mesh.size], dtype=object).reshape(shape),
        names,
        axis_types=(AxisType.Auto,) * len(names),
    )


PINNED_HOST = "pinned_host"
"""JAX's memory kind for arrays in the memory of the host, which devices read over their link."""


def moved(leaves: Sequence[Any], chosen: Collection[int], space: Any) -> list[Any]:
    """Inside a traced step: arrays, the chosen ones (positions) in another `jax.memory.Space`."""
    return [jax.device_put(x, space) if n in chosen else x for n, x in enumerate(leaves)]


def named_sharding(
    sharding: Sharding,
    mesh: Mesh,
    devices: jax.sharding.Mesh,
) -> NamedSharding:
    """A sharding over axes of `mesh`, as JAX's over the same mesh of devices."""
    dims = []
    for axes in sharding:
        names = tuple(mesh.axes[axis].name for axis in axes)
        dims.append(names or None)
    return NamedSharding(devices, PartitionSpec(*dims))

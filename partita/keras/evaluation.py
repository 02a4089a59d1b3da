"""Where `evaluate` and `predict` put state and batches on the mesh of a planned step.

Keras's own test and predict functions run there. XLA chooses the shardings between layers, from
those of the variables, which are the plan's, and of the batch, which is split by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partita.execute.process_arrays import is_of_group, put, settle


def state_on_mesh(state: Any, mesh: Mesh) -> Any:
    """The state with each value where it is, or on all devices if it is not on the mesh yet."""
    devices = set(mesh.devices.flat)
    replicated = NamedSharding(mesh, PartitionSpec())

    def onto(value: Any) -> Any:
        if isinstance(value, jax.Array) and value.sharding.device_set == devices:
            return value
        return put(value, replicated)

    is_grouped = any(is_of_group(value) for value in jax.tree.leaves(state))
    moved = jax.tree.map(onto, state)
    if is_grouped:
        settle()
    return moved


def split_batch(batch: Any, mesh: Mesh, axes: Sequence[str]) -> Any:
    """A batch split by sample over the axes, in this order, that divide its samples."""

    def split(values: Any) -> Any:
        samples = np.shape(values)[0] if np.ndim(values) else 1
        dividing = []
        for axis in axes:
            if samples % mesh.shape[axis] == 0:
                dividing.append(axis)
                samples //= mesh.shape[axis]
        spec = PartitionSpec(tuple(dividing)) if dividing else PartitionSpec()
        return put(values, NamedSharding(mesh, spec))

    return jax.tree.map(split, batch)


def batch_axes(state: Any, mesh: Mesh) -> list[str]:
    """The axes of a mesh in the order in which they split a batch: those of contractions first.

    An activation that is split by sample has to become one that is split by feature where it meets
    a matrix that is split by row. XLA's partitioner can do that for the major axes of the samples.
    For the minor ones it replicates the whole activation, with a warning ("involuntary full
    rematerialization"). So the axes that split rows of matrices, by bytes, are the major ones.
    """
    nbytes = dict.fromkeys(mesh.axis_names, 0)
    for value in jax.tree.leaves(state):
        spec = getattr(value.sharding, "spec", ())
        for entry in spec[: np.ndim(value) - 1]:
            for axis in _axes_of(entry):
                nbytes[axis] += value.nbytes
    return sorted(mesh.axis_names, key=lambda axis: -nbytes[axis])


def _axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of an entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)

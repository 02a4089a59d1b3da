"""A piece of a step as a compiled function, with the sums over microbatches around it.

A gradient over data axes can stay a sum of each device until the update reads it: then devices
exchange it once per step, not per microbatch. JAX has such values (`unreduced` in a PartitionSpec)
on meshes of explicit axes only. So pieces with such sums are lowered on an explicit mesh of the
same devices, and their own program runs inside `jax.sharding.auto_axes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from partita.execute.dispatch import PieceRole

Array = jax.ShapeDtypeStruct
"""An array by shape, dtype and sharding on the mesh of its place."""
Names = tuple[str, ...]
"""Mesh axes."""


def piece_function(
    call: Callable[..., Any],
    count: int,
    role: PieceRole,
    scale: float,
) -> Callable[..., Any]:
    """A piece as a function (donated arguments, other arguments, sums) -> (values, new sums).

    `call` takes the list of all `count` arguments. Sums over microbatches among them are multiplied
    by `scale`.
    """
    averaged = set(role.averaged)
    others = [n for n in range(count) if n not in role.donated]

    def run(donated: Any, other: Any, sums: Any) -> tuple[list[Any], list[Any]]:
        arguments: list[Any] = [None] * count
        for position, x in zip((*role.donated, *others), (*donated, *other), strict=True):
            is_sum = position in averaged
            arguments[position] = x * jnp.asarray(scale, x.dtype) if is_sum else x
        results = call(arguments)
        totals = [total + results[n] for n, total in zip(role.sums, sums, strict=True)]
        return [results[n] for n in role.raw], totals

    return run


def lower_piece(
    call: Callable[..., Any],
    name: str,
    role: PieceRole,
    scale: float,
    reads: Sequence[Array],
    gives: Sequence[Array],
    partial: Mapping[int, Names],
) -> Any:
    """A piece, lowered. `partial`: position in `gives` -> the axes over which the sum of a device
    stays partial.
    """
    context: Any = nullcontext()
    if partial:
        mesh = _explicit(gives[0].sharding)
        context = jax.set_mesh(mesh)
        reads = [_explicit_array(array) for array in reads]
        gives = [_explicit_array(x, partial.get(n, ())) for n, x in enumerate(gives)]
        call = jax.sharding.auto_axes(call, out_sharding=[x.sharding.spec for x in gives])
    function = piece_function(call, len(reads), role, scale)
    function.__name__ = name
    given = [gives[n].sharding for n in role.raw]
    totals = [gives[n].sharding for n in role.sums]
    others = [n for n in range(len(reads)) if n not in role.donated]
    step = jax.jit(function, out_shardings=(given, totals), donate_argnums=(0, 2))
    with context:
        return step.lower(
            [reads[n] for n in role.donated],
            [reads[n] for n in others],
            [gives[n] for n in role.sums],
        )


def lower_device_sums(arrays: Sequence[Array], partial: Sequence[Names]) -> Any:
    """The sums over devices of partial sums, lowered: a list of arrays to a list of arrays."""
    mesh = _explicit(arrays[0].sharding)
    summands = [_explicit_array(x, axes) for x, axes in zip(arrays, partial, strict=True)]
    sums = [_explicit_array(x).sharding for x in arrays]

    def device_sums(values: Sequence[Any]) -> list[Any]:
        return [jax.sharding.reshard(x, s.spec) for x, s in zip(values, sums, strict=True)]

    with jax.set_mesh(mesh):
        return jax.jit(device_sums, out_shardings=sums, donate_argnums=0).lower(summands)


def partial_sharding(sharding: NamedSharding, rank: int, axes: Names) -> NamedSharding:
    """The sharding of a partial sum over axes, on an explicit mesh."""
    dims = [*sharding.spec, *[None] * (rank - len(sharding.spec))]
    return NamedSharding(_explicit(sharding), PartitionSpec(*dims, unreduced=frozenset(axes)))


def _explicit(sharding: NamedSharding) -> Mesh:
    """The mesh of a sharding, with explicit axes."""
    mesh = sharding.mesh
    assert isinstance(mesh, Mesh), "a mesh of devices"
    types = (AxisType.Explicit,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=types)


def _explicit_array(array: Array, partial: Names = ()) -> Array:
    """An array on an explicit mesh, as a partial sum over axes."""
    assert isinstance(array.sharding, NamedSharding), "an array of a place"
    sharding = partial_sharding(array.sharding, len(array.shape), partial)
    return Array(array.shape, array.dtype, sharding=sharding)

"""Device groups: devices that do the same at the same time, with one representative device each.

Two devices differ by the slices of the mesh axes on which operators are placed, and by their kind
where a machine's devices differ. A step is simulated once per group, whatever the number of
devices. A plan without placed operators on equal devices has one group.

Devices of one kind may also wait for different devices. So `folded` refines the groups until all
devices of a group share every collective with the same groups (color refinement, which gives the
coarsest such partition). `unfolded` makes a group of every device: the same times for more tasks,
as a test checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain

import numpy as np

from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import Mesh, Plan, placed_slice

Slices = Mapping[int, int]
"""Mesh axis -> the slice of it on which an operator is placed.

An operator uses all slices of other axes.
"""


@dataclass(frozen=True, eq=False)
class DeviceGroups:
    """The device groups of a mesh. Groups are numbered from 0."""

    mesh: Mesh
    axes: tuple[int, ...]
    """The mesh axes whose slices differ in their groups."""
    number: np.ndarray
    """[slice of each of `axes`]: the group of the devices there."""
    kinds: tuple[int, ...] = (0,)
    """[group]: the kind of its devices."""

    @property
    def count(self) -> int:
        return len(self.kinds)

    @property
    def devices_per_entry(self) -> int:
        """Devices of the mesh for one entry of `number`."""
        return self.mesh.size // self.number.size

    @property
    def device_counts(self) -> list[int]:
        """[group]: number of its devices."""
        entries = np.bincount(self.number.reshape(-1), minlength=self.count)
        return (entries * self.devices_per_entry).tolist()

    def groups_on(self, slices: Slices) -> tuple[int, ...]:
        """The groups with devices on these slices."""
        return tuple(np.unique(self.number[self._index(slices)]).tolist())

    def collective_groups(self, axes: Iterable[int], slices: Slices) -> list[tuple[int, ...]]:
        """The groups that take part together in a collective over `axes`, by an operator on these
        slices.
        """
        rows = self.rows([a for a in axes if a not in slices], slices)
        members = rows.reshape(len(rows), -1).tolist()
        return sorted({tuple(sorted(set(row))) for row in members})

    def rows(self, axes: Iterable[int], slices: Slices) -> np.ndarray:
        """[row, slice of each of `axes` that is in `self.axes`]: a row has the groups of devices
        that differ only along `axes`.
        """
        chosen_axes = set(axes)
        along = [n for n, axis in enumerate(self.axes) if axis in chosen_axes]
        number = self.number[self._index(slices)]
        last_dims = tuple(range(number.ndim - len(along), number.ndim))
        row_shape = [number.shape[n] for n in along]
        return np.moveaxis(number, along, last_dims).reshape(-1, *row_shape)

    def _index(self, slices: Slices) -> tuple[slice, ...]:
        return index_of(self.axes, slices)

    def name(self, group: int) -> str:
        """The slices that all devices of a group are on, for people; "" if there are none."""
        entries = np.argwhere(self.number == group)
        words = []
        for axis, slices in zip(self.axes, entries.T.tolist(), strict=True):
            if len(set(slices)) == 1:
                words.append(f"{self.mesh.axes[axis].name}={slices[0]}")
        return " ".join(words)


def index_of(axes: Iterable[int], slices: Slices) -> tuple[slice, ...]:
    """An index into an array with one dim per axis: the given slice of an axis, or all slices.

    Dims stay.
    """
    index = []
    for axis in axes:
        if axis in slices:
            index.append(slice(slices[axis], slices[axis] + 1))
        else:
            index.append(slice(None))
    return tuple(index)


def slices_of(graph: OperatorGraph, plan: Plan) -> list[dict[int, int]]:
    """[operator]: the slices on which a plan places it."""
    slices = []
    for operator in graph.operators:
        choice = plan.choices[operator.name]
        positions: dict[int, int] = {}
        for number, axis in enumerate(plan.mesh.axes):
            position = placed_slice(choice.get(axis.name, ""))
            if position is not None:
                positions[number] = position
        slices.append(positions)
    return slices


def unfolded(mesh: Mesh, kinds: Sequence[int]) -> DeviceGroups:
    """A group for every device. `kinds` are those of the machine's devices, in their order."""
    return DeviceGroups(
        mesh=mesh,
        axes=tuple(range(len(mesh.axes))),
        number=np.arange(mesh.size).reshape(mesh.sizes),
        kinds=tuple(kinds[: mesh.size]),
    )


def folded(
    mesh: Mesh,
    kinds: Sequence[int],
    slices: Iterable[Slices],
    collective_axes: Iterable[Set[int]],
) -> DeviceGroups:
    """The fewest groups for operators on these slices. `collective_axes` are the axes of every
    collective.

    `kinds` are those of the machine's devices, in their order; empty if all are equal.
    """
    placed_axes = set(chain.from_iterable(slices))
    device_kinds = np.array(kinds[: mesh.size], np.int64)
    if not device_kinds.any():
        return _groups_of_slices(mesh, sorted(placed_axes))
    device_kinds = device_kinds.reshape(mesh.sizes)
    dims = range(device_kinds.ndim)
    kind_axes = {axis for axis in dims if np.diff(device_kinds, axis=axis).any()}
    axes = tuple(sorted(placed_axes | kind_axes))
    device_kinds = device_kinds[tuple(slice(None) if axis in axes else 0 for axis in dims)]
    place_number = _numbers_of_slices(mesh, axes, placed_axes, device_kinds.shape)
    place_and_kind = np.stack([place_number.reshape(-1), device_kinds.reshape(-1)], 1)
    number = _row_numbers(place_and_kind).reshape(device_kinds.shape)
    relevant_axes = {frozenset(together & set(axes)) for together in collective_axes} - {
        frozenset()
    }
    groups = _refined(DeviceGroups(mesh, axes, number), relevant_axes)
    _, first_device = np.unique(groups.number, return_index=True)
    group_kinds = device_kinds.reshape(-1)[first_device]
    return DeviceGroups(
        mesh,
        axes,
        groups.number,
        tuple(group_kinds.tolist()),
    )


def _groups_of_slices(mesh: Mesh, axes: Sequence[int]) -> DeviceGroups:
    """A group for every combination of slices of `axes`, on equal devices."""
    sizes = [mesh.sizes[axis] for axis in axes]
    count = math.prod(sizes)
    return DeviceGroups(
        mesh=mesh,
        axes=tuple(axes),
        number=np.arange(count).reshape(sizes),
        kinds=(0,) * count,
    )


def _numbers_of_slices(
    mesh: Mesh,
    axes: Sequence[int],
    placed_axes: Set[int],
    shape: tuple[int, ...],
) -> np.ndarray:
    """[slice of each of `axes`]: a number for every combination of slices of the placed axes."""
    number = np.zeros(shape, np.int64)
    for dim, axis in enumerate(axes):
        if axis in placed_axes:
            broadcast = [1] * len(shape)
            broadcast[dim] = -1
            size = mesh.sizes[axis]
            number = number * size + np.arange(size).reshape(broadcast)
    return number


def _refined(groups: DeviceGroups, collective_axes: Iterable[Set[int]]) -> DeviceGroups:
    """The coarsest refinement in which all devices of a group share every collective with the same
    groups.
    """
    shape = groups.number.shape
    positions = DeviceGroups(
        groups.mesh,
        groups.axes,
        np.arange(groups.number.size).reshape(shape),
    )
    collective_axes = list(collective_axes)
    while True:
        columns = [groups.number.reshape(-1)]
        for axes in collective_axes:
            members = _members(groups.rows(axes, {}))
            column = np.empty(groups.number.size, np.int64)
            row_numbers = np.repeat(_row_numbers(members), members.shape[1])
            column[positions.rows(axes, {}).reshape(-1)] = row_numbers
            columns.append(column)
        number = _row_numbers(np.stack(columns, 1))
        if number.max() == groups.number.max():
            return groups
        groups = DeviceGroups(
            groups.mesh,
            groups.axes,
            number.reshape(shape),
        )


def _members(rows: np.ndarray) -> np.ndarray:
    """[row, n]: the groups of a row in order, each once, padded with -1 in front."""
    members = np.sort(rows.reshape(len(rows), -1), axis=1)
    repeated = members[:, 1:] == members[:, :-1]
    members[:, 1:][repeated] = -1
    return np.sort(members, axis=1)


def _row_numbers(rows: np.ndarray) -> np.ndarray:
    """[row]: a number, the same for equal rows, in the order of their first occurrence."""
    _, first, number = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number.reshape(-1)]

"""Seconds of reshards on a placed mesh: of one, or a table over all shardings of two operators.

A search asks for some hundred thousand reshards, and few of them differ. Axes of one level and size
are interchangeable, so a reshard is determined by the number of axes that go from each position to
each other. Dims that keep their split only divide the bytes. A table is computed in three steps:
number the pairs that differ (array operations), run Shardy's algorithm (`cost.reshard`) once for
each number, and time each different collective once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from partita.cost.operator_terms import Move
from partita.cost.reshard import Axes, emitted_steps
from partita.machine import Machine, collective_seconds
from partita.machine.collectives import Group
from partita.plans.layout import Layout, Sharding, label_sharding, over_devices, time_axes
from partita.plans.plan import Mesh

ProfileStep = tuple[str, Group, float]
"""(kind, group, share of the whole tensor that a device sends or receives)."""
Profile = tuple[ProfileStep, ...]
"""The collectives of a reshard."""


@dataclass(frozen=True)
class Placement:
    """A mesh on a machine."""

    machine: Machine
    mesh: Mesh
    times: dict[tuple[str, Group, float], float] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Cache: seconds of collectives by (kind, group, bytes)."""

    def group(self, axes: Sequence[int]) -> Group:
        """The participants of a collective over axes, for `collective_seconds`."""
        return group_of(tuple(sorted(axes)), self.mesh)

    def shard_count(self, axes: Sequence[int]) -> int:
        """Shards of a tensor that is split over axes."""
        return math.prod(self.mesh.sizes[axis] for axis in axes)

    def seconds(
        self,
        kind: str,
        nbytes: float,
        group: Group,
    ) -> float:
        """Seconds of a collective, cached: a search asks for few different ones, many times."""
        key = (kind, group, nbytes)
        if key not in self.times:
            self.times[key] = collective_seconds(self.machine, kind, nbytes, group)
        return self.times[key]


@lru_cache(maxsize=1 << 14)
def group_of(axes: Axes, mesh: Mesh) -> Group:
    """The participants of a collective over axes of a mesh."""
    parts: dict[int, int] = {}
    for number in axes:
        axis = mesh.axes[number]
        if axis.level >= 0:
            parts[axis.level] = parts.get(axis.level, 1) * axis.size
    return tuple(sorted(parts.items()))


def move_seconds(
    move: Move,
    placement: Placement,
    source: Sharding,
    target: Sharding,
) -> float:
    """Seconds of a move between two shardings of its tensor."""
    if source == target:
        return 0.0
    if move.sums:
        source_dims, axes = _without_sums(move, source)
        target_dims, _ = _without_sums(move, target)
        summed = _sum_seconds(move, placement, source_dims, axes)
        if move.scatters and _is_slice(source_dims, target_dims, axes):
            summed = _sum_seconds(move, placement, source_dims, axes, "reduce_scatter")
        elif source_dims == target_dims:
            summed /= move.share
        plain_move = replace(move, sums=0, share=1)
        return summed + move_seconds(plain_move, placement, source_dims, target_dims)
    mesh = placement.mesh
    nbytes = move.nbytes / max(_microbatches(source, mesh), _microbatches(target, mesh))
    profile = _profile(over_devices(source, mesh), over_devices(target, mesh), mesh)
    seconds = sum(placement.seconds(kind, share * nbytes, group) for kind, group, share in profile)
    return move.trips / move.share * seconds


def _microbatches(sharding: Sharding, mesh: Mesh) -> int:
    """Number of microbatches into which a sharding splits its tensor."""
    time = time_axes(mesh)
    return math.prod(mesh.sizes[axis] for axes in sharding for axis in axes if axis in time)


def _without_sums(move: Move, sharding: Sharding) -> tuple[Sharding, Axes]:
    """The sharding of the dims, and the axes over which the tensor is a partial sum."""
    count = len(sharding) - move.sums
    axes = sorted(axis for entry in sharding[count:] for axis in entry)
    return sharding[:count], tuple(axes)


def _sum_seconds(
    move: Move,
    placement: Placement,
    source: Sharding,
    axes: Axes,
    kind: str = "all_reduce",
) -> float:
    """Seconds of the sum of a partial sum, split as its home splits it.

    A reduce-scatter is charged its share of the one that joins several.
    """
    if not axes:
        return 0.0
    local_bytes = move.nbytes / placement.shard_count([axis for dim in source for axis in dim])
    seconds = move.trips * placement.seconds(kind, local_bytes, placement.group(axes))
    return seconds / move.share if kind == "reduce_scatter" else seconds


def _is_slice(source: Sharding, target: Sharding, axes: Axes) -> bool:
    """Whether a target is the source, sliced over exactly these axes."""
    sliced: list[int] = []
    for before, after in zip(source, target, strict=True):
        if after[: len(before)] != before:
            return False
        sliced += after[len(before) :]
    return bool(sliced) and tuple(sorted(sliced)) == axes


def home_sum_seconds(move: Move, placement: Placement, source: Sharding) -> float:
    """Seconds in which a partial sum is summed where it is computed, before it is sent away."""
    if not move.sums:
        return 0.0
    return _sum_seconds(move, placement, *_without_sums(move, source))


def planned_moves(moves: Iterable[Move], layout: Layout) -> list[Move]:
    """The moves of a layout, each with the number of moves that are one collective with it.

    Equal reads of a tensor are one. Partial sums are one if all that meet are alike.
    """
    moves = list(moves)
    keys = {}
    groups: dict[tuple[int, bool], list[object]] = defaultdict(list)
    for number, move in enumerate(moves):
        if move.joined >= 0:
            source = label_sharding(move.source, layout.assignments[move.home])
            target = label_sharding(move.target, layout.assignments[move.reader])
            keys[number] = (source, target)
            groups[move.joined, move.sums > 0].append((source, target))
    for number, key in keys.items():
        move = moves[number]
        alike = groups[move.joined, move.sums > 0].count(key)
        if move.sums and alike < move.share:
            alike = 1
        if alike != move.share:
            moves[number] = replace(move, share=alike)
    return moves


def move_table(
    move: Move,
    placement: Placement,
    sources: Sequence[Sharding],
    targets: Sequence[Sharding],
) -> np.ndarray:
    """Seconds of a move for every pair of shardings, [source, target]."""
    if move.sums:
        return _sum_table(move, placement, sources, targets)
    mesh = placement.mesh
    microbatches = np.maximum.outer(
        [_microbatches(sharding, mesh) for sharding in sources],
        [_microbatches(sharding, mesh) for sharding in targets],
    )
    # Without the axis of microbatches, any number of them asks for the same table.
    table = _table(
        _over_devices(sources, targets, mesh),
        _over_devices(targets, sources, mesh),
        _device_mesh(mesh),
    )
    seconds = np.zeros(microbatches.shape)
    for count in np.unique(microbatches):
        microbatch_seconds = _table_seconds(table, placement, move.nbytes / int(count))
        seconds = np.where(microbatches == count, microbatch_seconds, seconds)
    return move.trips / move.share * seconds


def _table_seconds(
    table: _Table,
    placement: Placement,
    nbytes: float,
) -> np.ndarray:
    """Seconds of the reshards of a table for a tensor of `nbytes`, [source, target]."""
    # A last column of zeros is the padding of profiles.
    step_seconds = np.zeros((len(table.idle_shards), len(table.steps) + 1))
    for i, shards in enumerate(table.idle_shards):
        for n, (kind, group, share) in enumerate(table.steps):
            step_seconds[i, n] = placement.seconds(kind, share / shards * nbytes, group)
    profile_seconds = step_seconds[:, table.profiles].sum(axis=2)
    return profile_seconds[table.idle_index, table.profile_index]


def _sum_table(
    move: Move,
    placement: Placement,
    sources: Sequence[Sharding],
    targets: Sequence[Sharding],
) -> np.ndarray:
    """The table of a partial sum.

    It is summed before the move, unless both shardings are equal.
    """
    source_parts = [_without_sums(move, sharding) for sharding in sources]
    source_dims = [dims for dims, _ in source_parts]
    target_dims = [_without_sums(move, sharding)[0] for sharding in targets]
    moved = move_table(replace(move, sums=0, share=1), placement, source_dims, target_dims)
    summed = np.array([_sum_seconds(move, placement, dims, axes) for dims, axes in source_parts])
    sums = np.tile(summed[:, None], len(targets))
    dims_stay = _are_equal(source_dims, target_dims)
    sums = np.where(dims_stay, sums / move.share, sums)
    if move.scatters:
        target_axes = np.array([_axes_bits(dims) for dims in target_dims])
        for row, (dims, axes) in enumerate(source_parts):
            if not axes:
                continue
            alike = np.flatnonzero(target_axes == _axes_bits((*dims, axes)))
            columns = [n for n in alike.tolist() if _is_slice(dims, target_dims[n], axes)]
            sums[row, columns] = _sum_seconds(move, placement, dims, axes, "reduce_scatter")
    return np.where(_are_equal(sources, targets), 0.0, moved + sums)


def _are_equal(sources: Sequence[Sharding], targets: Sequence[Sharding]) -> np.ndarray:
    """[source, target]: whether two shardings are equal."""
    number: dict[Sharding, int] = {}
    before = [number.setdefault(sharding, len(number)) for sharding in sources]
    after = [number.setdefault(sharding, len(number)) for sharding in targets]
    return np.equal.outer(before, after)


def _axes_bits(sharding: Sharding) -> int:
    """The axes of a sharding as bits of a number."""
    return sum(1 << axis for axes in sharding for axis in axes)


@lru_cache(maxsize=64)
def _device_mesh(mesh: Mesh) -> Mesh:
    """The mesh without axes of microbatches."""
    time = time_axes(mesh)
    return Mesh(tuple(axis for number, axis in enumerate(mesh.axes) if number not in time))


def _over_devices(
    shardings: Sequence[Sharding],
    others: Sequence[Sharding],
    mesh: Mesh,
) -> tuple[Sharding, ...]:
    """Shardings on `_device_mesh`, without the dims that neither they nor `others` split.

    Without these dims, tensors of different ranks ask for the same table.
    """
    time = time_axes(mesh)
    device_axes = [axis for axis in range(len(mesh.axes)) if axis not in time]
    number = {axis: n for n, axis in enumerate(device_axes)}
    split_dims: set[int] = set()
    for sharding in (*shardings, *others):
        split_dims.update(dim for dim, axes in enumerate(sharding) if not time.issuperset(axes))
    result = []
    for sharding in shardings:
        dims = [sharding[dim] for dim in sorted(split_dims)]
        result.append(tuple(tuple(number[a] for a in axes if a in number) for axes in dims))
    return tuple(result)


@dataclass(frozen=True)
class _Table:
    """Reshards between all pairs of shardings."""

    profile_index: np.ndarray
    """[source, target]: row of `profiles`."""
    idle_index: np.ndarray
    """[source, target]: index of `idle_shards`."""
    profiles: np.ndarray
    """[profile, step]: index of `steps`, -1 after the last step."""
    idle_shards: tuple[int, ...]
    """Numbers of shards into which dims that keep their split are split."""
    steps: tuple[ProfileStep, ...]


@lru_cache(maxsize=1 << 10)
def _table(
    sources: tuple[Sharding, ...],
    targets: tuple[Sharding, ...],
    mesh: Mesh,
) -> _Table:
    numbers, idle = _numbers(sources, targets, mesh)
    profiles = _profiles()
    distinct, first, index = np.unique(numbers.reshape(-1), return_index=True, return_inverse=True)
    step_number: dict[ProfileStep, int] = {}
    rows = []
    for number, pair in zip(distinct.tolist(), first.tolist(), strict=True):
        if number not in profiles:
            source = sources[pair // len(targets)]
            target = targets[pair % len(targets)]
            before, after, _ = _canonical(source, target, mesh)
            profiles[number] = _steps(before, after, mesh)
        rows.append([step_number.setdefault(s, len(step_number)) for s in profiles[number]])
    width = max(map(len, rows))
    padded = [row + [-1] * (width - len(row)) for row in rows]
    idle_shards, idle_index = np.unique(idle.reshape(-1), return_inverse=True)
    return _Table(
        index.reshape(numbers.shape),
        idle_index.reshape(numbers.shape),
        np.array(padded, np.int64).reshape(len(rows), width),
        tuple(idle_shards.tolist()),
        tuple(step_number),
    )


@lru_cache(maxsize=1)
def _profiles() -> dict[int, Profile]:
    """Cache: number of a reshard -> its collectives, on any mesh.

    Most reshards on a part of a mesh have been asked for on the whole.
    """
    return {}


MOST_DIMS = 8
"""Split dims of a tensor, at most."""
MOST_AXES = 32
"""Axes of a mesh, at most: 2 to that power of devices."""


def _numbers(
    sources: Sequence[Sharding],
    targets: Sequence[Sharding],
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """(number of the reshard, shards of idle dims), both [source, target].

    Pairs with the same number need the same reshard. Idle dims keep their split. An axis is
    described by its level and size and by its position (dim and digit) before and after. The cost
    of a reshard depends on the number of axes of each description, so a random number for each is
    added up; 64 bits make a chance agreement unlikely.
    """
    dims = len(sources[0])
    axes = len(mesh.axes)
    assert dims <= MOST_DIMS, f"a tensor split in more than {MOST_DIMS} dims"
    assert axes <= MOST_AXES, f"a mesh of more than {MOST_AXES} axes"
    source_positions = _positions(sources, axes)
    target_positions = _positions(targets, axes)
    changes = _changed_dims(sources, targets)
    # Idle dims have no position of their own: changed dims are counted without them.
    rank = np.cumsum(changes, axis=2)
    rows = np.arange(len(sources))[:, None]
    columns = np.arange(len(targets))[None, :]

    def position_among_changed(position: np.ndarray, dim: np.ndarray) -> np.ndarray:
        digit = (position - 1) % MOST_AXES
        changed_dim = rank[rows, columns, dim] - 1
        return np.where(position, changed_dim * MOST_AXES + digit + 1, 0)

    numbers = np.zeros((len(sources), len(targets)), np.uint64)
    idle_shards = np.ones((len(sources), len(targets)), np.int64)
    for a, axis in enumerate(mesh.axes):
        before = source_positions[:, a][:, None]
        after = target_positions[:, a][None, :]
        dim_before = np.where(before, (before - 1) // MOST_AXES, dims)
        dim_after = np.where(after, (after - 1) // MOST_AXES, dims)
        random = _random_numbers(axis.level, axis.size)[
            position_among_changed(before, dim_before), position_among_changed(after, dim_after)
        ]
        is_idle = (before > 0) & ~changes[rows, columns, dim_before]
        numbers += np.where(is_idle, np.uint64(0), random)
        idle_shards *= np.where(is_idle, axis.size, 1)
    return numbers, idle_shards


def _changed_dims(sources: Sequence[Sharding], targets: Sequence[Sharding]) -> np.ndarray:
    """[source, target, dim]: whether a dim is split otherwise after than before.

    A last dim, which stands for none, never is.
    """
    dims = len(sources[0])
    changes = np.zeros((len(sources), len(targets), dims + 1), bool)
    for dim in range(dims):
        number: dict[Axes, int] = {}
        before = np.array([number.setdefault(s[dim], len(number)) for s in sources])
        after = np.array([number.setdefault(s[dim], len(number)) for s in targets])
        changes[:, :, dim] = before[:, None] != after[None, :]
    return changes


@lru_cache(maxsize=64)
def _random_numbers(level: int, size: int) -> np.ndarray:
    """[position before, position after] of an axis of a level and size."""
    positions = MOST_DIMS * MOST_AXES + 1
    generator = np.random.default_rng((level + 1, size))
    numbers = generator.integers(0, 1 << 63, (positions, positions), dtype=np.uint64)
    numbers[0, 0] = 0
    return numbers


def _positions(shardings: Sequence[Sharding], axes: int) -> np.ndarray:
    """[sharding, axis]: 1 + dim x MOST_AXES + digit of the axis, 0 where it splits nothing."""
    positions = np.zeros((len(shardings), axes), np.int64)
    for i, sharding in enumerate(shardings):
        for dim, dim_axes in enumerate(sharding):
            for digit, axis in enumerate(dim_axes):
                positions[i, axis] = 1 + dim * MOST_AXES + digit
    return positions


def _profile(
    source: Sharding,
    target: Sharding,
    mesh: Mesh,
) -> Profile:
    """The collectives of a reshard."""
    if source == target:
        return ()
    before, after, idle_shards = _canonical(source, target, mesh)
    steps = _steps(before, after, mesh)
    return tuple((kind, group, share / idle_shards) for kind, group, share in steps)


@lru_cache(maxsize=1 << 18)
def _steps(
    source: Sharding,
    target: Sharding,
    mesh: Mesh,
) -> Profile:
    """The collectives of a reshard without idle dims."""
    steps = []
    before = source
    for step in emitted_steps(source, target, mesh.sizes):
        if step.kind != "all_slice":
            sharding = step.result if step.kind == "all_gather" else before
            shards = math.prod(mesh.sizes[axis] for dim in sharding for axis in dim)
            steps.append((step.kind, group_of(step.axes, mesh), 1.0 / shards))
        before = step.result
    return tuple(steps)


def _canonical(
    source: Sharding,
    target: Sharding,
    mesh: Mesh,
) -> tuple[Sharding, Sharding, int]:
    """One reshard for all of the same cost: (source, target, shards of idle dims).

    Idle dims, which keep their split, are left out. Of interchangeable axes the first are used
    first.
    """
    interchangeable = _interchangeable_axes(mesh)
    name: dict[int, int] = {}
    used: dict[int, int] = {}

    def renamed(axes: Axes) -> Axes:
        for axis in axes:
            if axis not in name:
                first = interchangeable[axis][0]
                count = used.get(first, 0)
                name[axis] = interchangeable[axis][count]
                used[first] = count + 1
        return tuple(name[axis] for axis in axes)

    before = []
    after = []
    idle_shards = 1
    for source_axes, target_axes in zip(source, target, strict=True):
        if source_axes == target_axes:
            idle_shards *= math.prod(mesh.sizes[axis] for axis in source_axes)
        else:
            before.append(renamed(source_axes))
            after.append(renamed(target_axes))
    return tuple(before), tuple(after), idle_shards


@lru_cache(maxsize=64)
def _interchangeable_axes(mesh: Mesh) -> tuple[Axes, ...]:
    """Per axis, all axes of its level and size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, axis in enumerate(mesh.axes):
        groups.setdefault((axis.level, axis.size), []).append(number)
    return tuple(tuple(groups[axis.level, axis.size]) for axis in mesh.axes)

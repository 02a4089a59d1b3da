"""Seconds of reshards on a placed mesh: one, or a table over all shardings of two operators at
once.

A search asks for some hundred thousand reshards, and few of them differ: axes of one level and size
are alike, so a reshard is known by how many axes go from which place to which; dims that stay as
they are only share the bytes. Tables are computed by numbering the pairs that differ (array
operations), running Shardy's algorithm (`cost.reshard`) once for each, and timing each different
collective once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from partita.cost.reshard import emitted_steps
from partita.cost.terms import Move
from partita.machine import Machine, collective_seconds
from partita.plans.layout import Sharding, over_devices, time_axes
from partita.plans.plan import Mesh

Group = tuple[tuple[int, int], ...]
Profile = tuple[tuple[str, Group, float], ...]
"""The steps of a reshard as (kind, group, part of the whole tensor that a device sends or
receives)."""


@dataclass(frozen=True)
class Placement:
    """A mesh on a machine: what a cost needs to know of where a plan runs."""

    machine: Machine
    mesh: Mesh
    times: dict[Any, float] = field(default_factory=dict, compare=False, repr=False)
    """Seconds of collectives already asked for."""

    def group(self, axes: Sequence[int]) -> Group:
        """The participants of a collective over axes, as (level, parts) pairs for
        `collective_seconds`."""
        return group_of(tuple(sorted(axes)), self.mesh)

    def shard_count(self, axes: Sequence[int]) -> int:
        return math.prod(self.mesh.sizes[a] for a in axes)

    def seconds(self, kind: str, nbytes: float, group: Group) -> float:
        """Seconds of a collective; kept, since a search asks for few different ones, many times."""
        key = (kind, group, nbytes)
        if key not in self.times:
            self.times[key] = collective_seconds(self.machine, kind, nbytes, group)
        return self.times[key]


@lru_cache(maxsize=1 << 14)
def group_of(axes: tuple[int, ...], mesh: Mesh) -> Group:
    parts: dict[int, int] = {}
    for a in axes:
        level = mesh.axes[a].level
        if level >= 0:
            parts[level] = parts.get(level, 1) * mesh.axes[a].size
    return tuple(sorted(parts.items()))


def move_seconds(move: Move, placement: Placement, source: Sharding, target: Sharding) -> float:
    """Seconds of a move between two shardings of its tensor."""
    if source == target:
        return 0.0
    if move.sums:
        (source, sums), (target, _) = (_parted(move, s) for s in (source, target))
        return _summed(move, placement, source, sums) + move_seconds(
            replace(move, sums=0), placement, source, target
        )
    mesh = placement.mesh
    nbytes = move.nbytes / max(_microbatches(source, mesh), _microbatches(target, mesh))
    profile = _profile(over_devices(source, mesh), over_devices(target, mesh), mesh)
    return move.trips * sum(
        placement.seconds(kind, part * nbytes, group) for kind, group, part in profile
    )


def _microbatches(sharding: Sharding, mesh: Mesh) -> int:
    """Number of microbatches into which a sharding splits its tensor."""
    time = time_axes(mesh)
    return math.prod(mesh.sizes[a] for axes in sharding for a in axes if a in time)


def _parted(move: Move, sharding: Sharding) -> tuple[Sharding, tuple[int, ...]]:
    """How the dims are split, and the axes over which the tensor is still to be summed."""
    count = len(sharding) - move.sums
    return sharding[:count], tuple(sorted(a for axes in sharding[count:] for a in axes))


def _summed(move: Move, placement: Placement, source: Sharding, axes: tuple[int, ...]) -> float:
    """Seconds of summing a tensor that is still to be summed, as its home has it split."""
    part = move.nbytes / placement.shard_count([a for dim in source for a in dim])
    return (
        move.trips * placement.seconds("all_reduce", part, placement.group(axes)) if axes else 0.0
    )


def move_table(
    move: Move, placement: Placement, sources: Sequence[Sharding], targets: Sequence[Sharding]
) -> np.ndarray:
    """Seconds of a move for every pair of shardings, [source, target]."""
    if move.sums:
        left, right = [_parted(move, s) for s in sources], [_parted(move, t)[0] for t in targets]
        moved = move_table(replace(move, sums=0), placement, [s for s, _ in left], right)
        summed = np.array([_summed(move, placement, *s) for s in left])
        alike = np.array([[s == t for t in targets] for s in sources])
        return np.where(alike, 0.0, moved + summed[:, None])
    mesh = placement.mesh
    counts = np.maximum.outer(
        [_microbatches(s, mesh) for s in sources],
        [_microbatches(t, mesh) for t in targets],
    )
    # Without the axis of microbatches, any number of them asks for the same table.
    table = _table(
        _over_devices(sources, targets, mesh),
        _over_devices(targets, sources, mesh),
        _device_mesh(mesh),
    )
    seconds = np.zeros(counts.shape)
    for count in np.unique(counts):
        once = _table_seconds(table, placement, move.nbytes / int(count))
        seconds = np.where(counts == count, once, seconds)
    return move.trips * seconds


def _table_seconds(table: _Table, placement: Placement, nbytes: float) -> np.ndarray:
    """Seconds of the reshards of a table for a tensor of `nbytes`, [source, target]."""
    once = np.zeros((len(table.ways), len(table.steps) + 1))
    for i, ways in enumerate(table.ways):
        once[i, :-1] = [
            placement.seconds(kind, part / ways * nbytes, group)
            for kind, group, part in table.steps
        ]
    return once[:, table.rows].sum(axis=2)[table.idle, table.ids]


@lru_cache(maxsize=64)
def _device_mesh(mesh: Mesh) -> Mesh:
    """The mesh without axes of microbatches."""
    time = time_axes(mesh)
    return Mesh(tuple(axis for number, axis in enumerate(mesh.axes) if number not in time))


def _over_devices(
    shardings: Sequence[Sharding], others: Sequence[Sharding], mesh: Mesh
) -> tuple[Sharding, ...]:
    """Shardings on `_device_mesh`, without the dims that neither they nor `others` split.

    Without these dims, tensors of different ranks ask for the same table.
    """
    time = time_axes(mesh)
    device_axes = [a for a in range(len(mesh.axes)) if a not in time]
    number = {a: n for n, a in enumerate(device_axes)}
    split = set()
    for sharding in (*shardings, *others):
        split |= {d for d, axes in enumerate(sharding) if not time.issuperset(axes)}
    dims = sorted(split)
    return tuple(
        tuple(tuple(number[a] for a in sharding[d] if a in number) for d in dims)
        for sharding in shardings
    )


@dataclass(frozen=True)
class _Table:
    """Reshards between all pairs of shardings [source, target]: `ids` are rows of `rows`, which
    list steps (-1 for none), and `idle` are indices of `ways`, into how many parts dims that stay
    as they are are split."""

    ids: np.ndarray
    idle: np.ndarray
    rows: np.ndarray
    ways: tuple[int, ...]
    steps: tuple[tuple[str, Group, float], ...]


@lru_cache(maxsize=1 << 10)
def _table(sources: tuple[Sharding, ...], targets: tuple[Sharding, ...], mesh: Mesh) -> _Table:
    keys, idle = _keys(sources, targets, mesh)
    known = _known()
    names, first, ids = np.unique(keys.reshape(-1), return_index=True, return_inverse=True)
    number: dict[tuple[str, Group, float], int] = {}
    rows = []
    for key, pair in zip(names.tolist(), first.tolist(), strict=True):
        if key not in known:
            before, after, _ = _simplest(
                sources[pair // len(targets)], targets[pair % len(targets)], mesh
            )
            known[key] = _steps(before, after, mesh)
        rows.append([number.setdefault(step, len(number)) for step in known[key]])
    width = max(map(len, rows))
    padded = np.array([row + [-1] * (width - len(row)) for row in rows], np.int64).reshape(
        len(rows), width
    )
    ways, which = np.unique(idle.reshape(-1), return_inverse=True)
    return _Table(
        ids.reshape(keys.shape),
        which.reshape(keys.shape),
        padded,
        tuple(ways.tolist()),
        tuple(number),
    )


@lru_cache(maxsize=1)
def _known() -> dict[int, Profile]:
    """The steps of reshards by their number, on whatever mesh: what is asked for on a part of one
    has mostly been asked for on the whole."""
    return {}


RANK = 8
"""Dims of a tensor that reshards are told apart by."""
MOST_AXES = 32
"""Axes of a mesh, at most: 2 to that power of devices."""


def _keys(
    sources: Sequence[Sharding], targets: Sequence[Sharding], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Per pair of shardings [source, target]: a number, equal where the same reshard is to be done,
    and the ways of dims that stay.

    An axis is known by its level and size and by its place (dim and digit) before and after. What a
    reshard costs depends on how many axes of each description there are, so a random number for
    each is added up; 64 bits make a chance agreement unlikely.
    """
    dims, axes = len(sources[0]), len(mesh.axes)
    assert dims <= RANK, f"a tensor split in more than {RANK} dims"
    assert axes <= MOST_AXES, f"a mesh of more than {MOST_AXES} axes"
    before, after = _places(sources, axes), _places(targets, axes)
    moves = np.zeros(
        (len(sources), len(targets), dims + 1), bool
    )  # whether a dim is split otherwise after than before
    for d in range(dims):
        number: dict[tuple[int, ...], int] = {}
        one, other = (
            np.array([number.setdefault(s[d], len(number)) for s in side])
            for side in (sources, targets)
        )
        moves[:, :, d] = one[:, None] != other[None, :]
    rank = np.cumsum(moves, axis=2)  # of dims that stay, only that they are there matters
    rows, columns = np.arange(len(sources))[:, None], np.arange(len(targets))[None, :]
    found = np.zeros((len(sources), len(targets)), np.uint64)
    ways = np.ones((len(sources), len(targets)), np.int64)
    for a in range(axes):
        here, there = before[:, a][:, None], after[:, a][None, :]
        d, e = (
            np.where(here, (here - 1) // MOST_AXES, dims),
            np.where(there, (there - 1) // MOST_AXES, dims),
        )
        one = np.where(
            here, (rank[rows, columns, d] - 1) * MOST_AXES + (here - 1) % MOST_AXES + 1, 0
        )
        other = np.where(
            there, (rank[rows, columns, e] - 1) * MOST_AXES + (there - 1) % MOST_AXES + 1, 0
        )
        idle = (here > 0) & ~moves[rows, columns, d]
        found += np.where(
            idle, np.uint64(0), _random_numbers(mesh.axes[a].level, mesh.axes[a].size)[one, other]
        )
        ways *= np.where(idle, mesh.sizes[a], 1)
    return found, ways


@lru_cache(maxsize=64)
def _random_numbers(level: int, size: int) -> np.ndarray:
    """[place before, place after] of an axis of a level and size."""
    places = RANK * MOST_AXES + 1
    found = np.random.default_rng((level + 1, size)).integers(
        0, 1 << 63, (places, places), dtype=np.uint64
    )
    found[0, 0] = 0
    return found


def _places(shardings: Sequence[Sharding], axes: int) -> np.ndarray:
    """[sharding, axis]: 1 + dim x MOST_AXES + digit of the axis, 0 where it splits nothing."""
    found = np.zeros((len(shardings), axes), np.int64)
    for i, sharding in enumerate(shardings):
        for d, dim in enumerate(sharding):
            for digit, a in enumerate(dim):
                found[i, a] = 1 + d * MOST_AXES + digit
    return found


def _profile(source: Sharding, target: Sharding, mesh: Mesh) -> Profile:
    if source == target:
        return ()
    before, after, idle = _simplest(source, target, mesh)
    return tuple((kind, group, part / idle) for kind, group, part in _steps(before, after, mesh))


@lru_cache(maxsize=1 << 18)
def _steps(source: Sharding, target: Sharding, mesh: Mesh) -> Profile:
    found, before = [], source
    for step in emitted_steps(source, target, mesh.sizes):
        if step.kind != "all_slice":
            held = step.result if step.kind == "all_gather" else before
            part = 1.0 / math.prod(mesh.sizes[a] for dim in held for a in dim)
            found.append((step.kind, group_of(step.axes, mesh), part))
        before = step.result
    return tuple(found)


def _simplest(source: Sharding, target: Sharding, mesh: Mesh) -> tuple[Sharding, Sharding, int]:
    """One reshard for all that cost the same: (source, target, ways in which dims that stay as they
    are are split).

    Dims that stay are left out, and of axes that are alike the first are used first.
    """
    alike = _alike_axes(mesh)
    name: dict[int, int] = {}
    used: dict[int, int] = {}
    before, after, idle = [], [], 1
    for dims in zip(source, target, strict=True):
        if dims[0] == dims[1]:
            for a in dims[0]:
                idle *= mesh.axes[a].size
            continue
        for axes, found in ((dims[0], before), (dims[1], after)):
            for a in axes:
                if a not in name:
                    first = alike[a][0]
                    name[a] = alike[a][used.get(first, 0)]
                    used[first] = used.get(first, 0) + 1
            found.append(tuple(name[a] for a in axes))
    return tuple(before), tuple(after), idle


@lru_cache(maxsize=64)
def _alike_axes(mesh: Mesh) -> tuple[tuple[int, ...], ...]:
    """Per axis, all axes of its level and size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for a, axis in enumerate(mesh.axes):
        groups.setdefault((axis.level, axis.size), []).append(a)
    return tuple(tuple(groups[x.level, x.size]) for x in mesh.axes)

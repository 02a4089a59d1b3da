"""Seconds of reshards on a placed mesh: one, or a table over all shardings of two operators at once.

A search asks for some hundred thousand reshards, and few of them differ: axes of one level and size are alike, so a reshard
is known by how many axes go from which place to which; dims that stay as they are only share the bytes. Tables are computed by
numbering the pairs that differ (array operations), running Shardy's algorithm (`cost.reshard`) once for each, and timing each
different collective once.
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
from partita.plans.layout import Sharding
from partita.plans.plan import Mesh

Group = tuple[tuple[int, int], ...]
Profile = tuple[tuple[str, Group, float], ...]
"""The steps of a reshard as (kind, group, part of the whole tensor that a device sends or receives)."""


@dataclass(frozen=True)
class Placement:
    """A mesh on a machine: what a cost needs to know of where a plan runs."""

    machine: Machine
    mesh: Mesh
    times: dict[Any, float] = field(default_factory=dict, compare=False, repr=False)
    """Seconds of collectives already asked for."""

    def group(self, axes: Sequence[int]) -> Group:
        """The participants of a collective over axes, as (level, parts) pairs for `collective_seconds`."""
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
    profile = _profile(source, target, placement.mesh)
    return move.trips * sum(
        placement.seconds(kind, part * move.nbytes, group) for kind, group, part in profile
    )


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
    mesh, nbytes = placement.mesh, move.nbytes
    if _timed(
        mesh, (*sources, *targets)
    ):  # all are cut alike in time: however many parts there are, they ask for the same table
        nbytes /= mesh.sizes[0]
        sources, targets, mesh = _untimed(sources), _untimed(targets), Mesh(mesh.axes[1:])
    # Dims that nobody splits are left out: tensors of other ranks then ask for the same table.
    split = [d for d in range(len(sources[0])) if any(s[d] for s in (*sources, *targets))]
    without = lambda shardings: tuple(tuple(s[d] for d in split) for s in shardings)  # noqa: E731
    table = _table(without(sources), without(targets), mesh)
    once = np.zeros((len(table.ways), len(table.steps) + 1))
    for i, ways in enumerate(table.ways):
        once[i, :-1] = [
            placement.seconds(kind, part / ways * nbytes, group)
            for kind, group, part in table.steps
        ]
    return move.trips * once[:, table.rows].sum(axis=2)[table.idle, table.ids]


def _timed(mesh: Mesh, shardings: Sequence[Sharding]) -> bool:
    """Whether the first axis is that of microbatches, and splits the same dim first everywhere."""
    if not mesh.axes or mesh.axes[0].level >= 0:
        return False
    return any(all(s[d][:1] == (0,) for s in shardings) for d in range(len(shardings[0])))


def _untimed(shardings: Sequence[Sharding]) -> list[Sharding]:
    """The same on the mesh without its first axis."""
    return [tuple(tuple(a - 1 for a in axes if a) for axes in s) for s in shardings]


@dataclass(frozen=True)
class _Table:
    """Reshards between all pairs of shardings [source, target]: `ids` are rows of `rows`, which list steps (-1 for none), and
    `idle` are indices of `ways`, into how many parts dims that stay as they are are split."""

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
    """The steps of reshards by their number, on whatever mesh: what is asked for on a part of one has mostly been asked for on the whole."""
    return {}


RANK = 8
"""Dims of a tensor that reshards are told apart by."""
MOST_AXES = 32
"""Axes of a mesh, at most: 2 to that power of devices."""


def _keys(
    sources: Sequence[Sharding], targets: Sequence[Sharding], mesh: Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """Per pair of shardings [source, target]: a number, equal where the same reshard is to be done, and the ways of dims that stay.

    An axis is known by its level and size and by its place (dim and digit) before and after. What a reshard costs depends on how
    many axes of each description there are, so a random number for each is added up; 64 bits make a chance agreement unlikely.
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
    """One reshard for all that cost the same: (source, target, ways in which dims that stay as they are are split).

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

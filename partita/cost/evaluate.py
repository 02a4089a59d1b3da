"""Seconds and bytes of operators under choices: the terms of `cost.terms`, divided, timed by a machine, summed.

One formula serves the search (an array of choices at once) and the prediction of one plan (an array of one), so that what is
reported is what was minimised. All of it is additive: operators, plus moves between two operators. Each operator that reads
a value under another sharding pays for its own reshard.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from partita.cost.reshard import emitted_steps
from partita.cost.terms import Move, OperatorTerms, Stored
from partita.machine import Machine, collective_seconds
from partita.plan.layout import Sharding, resolve
from partita.plan.plan import Mesh

Assignment = Mapping[int, tuple[int, ...]]
"""Factor -> the mesh axes that split it."""

COMBINED = 32 << 20
"""Gradient all-reduces are combined by the compiler: each is charged what it adds to one of this many bytes."""


@dataclass(frozen=True)
class Placement:
    """A mesh on a machine: what a cost needs to know of where a plan runs."""

    machine: Machine
    mesh: Mesh
    times: dict[Any, float] = field(default_factory=dict, compare=False, repr=False)
    """Seconds of reshards already asked for."""

    def group(self, axes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The participants of a collective over axes, as (level, parts) pairs for `collective_seconds`."""
        return _group(tuple(sorted(axes)), self.mesh)

    def ways(self, axes: Sequence[int]) -> int:
        return math.prod(self.mesh.sizes[a] for a in axes)


@lru_cache(maxsize=1 << 14)
def _group(axes: tuple[int, ...], mesh: Mesh) -> tuple[tuple[int, int], ...]:
    parts: dict[int, int] = {}
    for a in axes:
        level = mesh.axes[a].level
        parts[level] = parts.get(level, 1) * mesh.axes[a].size
    return tuple(sorted(parts.items()))


@dataclass
class OperatorCost:
    """Per choice (arrays of one length): seconds by cause, and bytes held."""

    compute: np.ndarray
    activations: np.ndarray
    """Seconds of collectives on activations: reductions, halos, reshards inside the operator."""
    gradients: np.ndarray
    """Seconds of gradient reductions and of gathering stored parameters, after overlap."""
    state: np.ndarray
    """Bytes of parameters, optimizer slots and other state."""
    kept: np.ndarray
    """Bytes of activations kept for the backward pass."""

    @property
    def seconds(self) -> np.ndarray:
        return self.compute + self.activations + self.gradients

    @property
    def nbytes(self) -> np.ndarray:
        return self.state + self.kept


def operator_cost(terms: OperatorTerms, place: Placement, assignments: Sequence[Assignment], zero: int = 0) -> OperatorCost:
    """The cost of an operator under each assignment, its parameters stored by ZeRO level `zero` over the axes left over."""
    machine, count = place.machine, len(assignments)
    ways = _Ways(place, assignments)
    compute = np.zeros(count)
    for w in terms.work:
        flops = w.flops / ways.of(w.factors)
        if w.groups > 1 and machine.backend.dense_grouped_gradients:
            flops = flops * w.groups / ways.of(w.group_factors)
        nbytes = sum((b / ways.of(f) for b, f in w.traffic), np.zeros(count))
        rate = machine.rate(w.op_class, _float(w.dtype))
        seconds = np.maximum(flops / rate, nbytes / machine.memory_bandwidth) + machine.overhead
        compute += seconds * w.trips
    activations, gradients = np.zeros(count), np.zeros(count)
    for r in terms.reductions:
        payload = r.nbytes / ways.of(r.factors)
        grows = r.kind == "all_gather"
        for axes, chosen in (pair for f in r.reduced for pair in ways.axes_of(f)):
            nbytes = payload[chosen] * (place.ways(axes) if grows else 1)
            if r.parameter >= 0 and r.trips == 1:
                gradients[chosen] += _joined(place, r.kind, nbytes, axes) * (1 - machine.backend.overlap)
            else:
                activations[chosen] += _seconds(place, r.kind, nbytes, axes) * r.trips
    for h in terms.halos:
        for axes, chosen in ways.axes_of(h.split):
            row = h.nbytes / ways.of(h.factors)[chosen]
            for need in h.window.rows(place.ways(axes)):
                if need:
                    activations[chosen] += _seconds(place, "collective_permute", row * need, axes) * h.trips
    for m in terms.moves:
        activations += np.array([move_seconds(m, place, resolve(m.source, a), resolve(m.target, a)) for a in assignments])
    state = sum((b / ways.of(f) for b, f in terms.resident), np.zeros(count))
    for s in terms.stored:
        split = ways.of(tuple(f for f in s.label if f >= 0))
        extra = np.ones(count)
        if zero:
            for i, a in enumerate(assignments):
                found = storage_axes(s, place.mesh, a)
                if found:
                    extra[i] = place.ways(found[1])
                    nbytes = np.array([s.nbytes / split[i]])
                    gradients[i] += _seconds(place, "all_gather", nbytes, found[1])[0] * (1 - machine.backend.overlap)
            # The update itself is split as the slots are.
            compute -= s.traffic / split * (1 - 1 / extra) / machine.memory_bandwidth
        state = state + s.nbytes / split / (extra if zero == 3 else 1) + s.slots / split / extra
    kept = sum((b / ways.of(f) for b, f in terms.kept), np.zeros(count))
    return OperatorCost(np.maximum(compute, 0), activations, gradients, state, kept)


class _Ways:
    """Into how many parts factors are split, per assignment."""

    def __init__(self, place: Placement, assignments: Sequence[Assignment]) -> None:
        self.place, self.assignments = place, assignments
        self.one: dict[int, np.ndarray] = {}

    def of(self, factors: Sequence[int]) -> np.ndarray:
        found = np.ones(len(self.assignments))
        for f in factors:
            if f not in self.one:
                self.one[f] = np.array([float(self.place.ways(a.get(f, ()))) for a in self.assignments])
            found = found * self.one[f]
        return found

    def axes_of(self, factor: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """(axes over which the factor is split, indices of the assignments that split it so)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, a in enumerate(self.assignments):
            if a.get(factor):
                groups.setdefault(a[factor], []).append(i)
        return [(axes, np.array(chosen)) for axes, chosen in groups.items()]


def _seconds(place: Placement, kind: str, nbytes: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    return collective_seconds(place.machine, kind, nbytes, place.group(axes))


def _joined(place: Placement, kind: str, nbytes: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """What `nbytes` add to a combined collective."""
    group = place.group(axes)
    whole = np.array([float(COMBINED)])
    return collective_seconds(place.machine, kind, nbytes + COMBINED, group) - collective_seconds(
        place.machine, kind, whole, group
    )


def _float(dtype: str) -> str:
    """The dtype whose engine computes this one."""
    return dtype if dtype in ("float64", "float32", "bfloat16", "float16", "int8") else "float32"


def storage_axes(stored: Stored, mesh: Mesh, assignment: Assignment) -> tuple[int, tuple[int, ...]] | None:
    """(dim, axes) over which a parameter can be kept split beyond its operator's choice; None if no dim divides."""
    return spare_axes(stored.shape, resolve(stored.label, assignment), mesh)


@lru_cache(maxsize=1 << 16)
def spare_axes(shape: tuple[int, ...], sharding: Sharding, mesh: Mesh) -> tuple[int, tuple[int, ...]] | None:
    """The dim of a tensor that can be split furthest over the axes that its sharding leaves free, and those axes."""
    taken = {a for dim in sharding for a in dim}
    best: tuple[int, int, tuple[int, ...]] = (0, 0, ())
    for d, (n, axes) in enumerate(zip(shape, sharding, strict=True)):
        left, found = n // math.prod(mesh.sizes[a] for a in axes), []
        whole = left
        for a, size in enumerate(mesh.sizes):
            if a not in taken and left % size == 0:
                found.append(a)
                left //= size
        best = max(best, (whole // left, d, tuple(found)))
    return (best[1], best[2]) if best[2] else None


Profile = tuple[tuple[str, tuple[tuple[int, int], ...], float], ...]


@lru_cache(maxsize=1 << 18)
def move_profile(source: Sharding, target: Sharding, mesh: Mesh) -> Profile:
    """The steps of a reshard as (kind, group, part of the whole tensor that a device sends or receives)."""
    found, before = [], source
    for step in emitted_steps(source, target, mesh.sizes):
        if step.kind != "all_slice":
            held = step.result if step.kind == "all_gather" else before
            part = 1.0 / math.prod(mesh.sizes[a] for dim in held for a in dim)
            found.append((step.kind, _group(step.axes, mesh), part))
        before = step.result
    return tuple(found)


def profile_seconds(profile: Profile, nbytes: int, place: Placement) -> float:
    """Seconds of the steps of a reshard for a tensor of `nbytes`."""
    key = (profile, nbytes)
    if key not in place.times:
        place.times[key] = sum(collective_seconds(place.machine, kind, part * nbytes, group) for kind, group, part in profile)
    return place.times[key]


def move_seconds(move: Move, place: Placement, source: Sharding, target: Sharding) -> float:
    """Seconds of a move between two shardings of its tensor."""
    if source == target:
        return 0.0
    return move.trips * profile_seconds(move_profile(source, target, place.mesh), move.nbytes, place)


def move_table(move: Move, place: Placement, sources: Sequence[Sharding], targets: Sequence[Sharding]) -> np.ndarray:
    """Seconds of a move for every pair of shardings, [source, target]."""
    ids, profiles = _profile_table(tuple(sources), tuple(targets), place.mesh)
    return (np.array([profile_seconds(p, move.nbytes, place) for p in profiles]) * move.trips)[ids]


@lru_cache(maxsize=1 << 12)
def _profile_table(
    sources: tuple[Sharding, ...], targets: tuple[Sharding, ...], mesh: Mesh
) -> tuple[np.ndarray, tuple[Profile, ...]]:
    number: dict[Profile, int] = {}
    ids = np.empty((len(sources), len(targets)), np.int64)
    for i, s in enumerate(sources):
        for j, t in enumerate(targets):
            profile = () if s == t else move_profile(s, t, mesh)
            ids[i, j] = number.setdefault(profile, len(number))
    return ids, tuple(number)

"""Seconds and bytes of operators under choices: the terms of `cost.terms`, divided, timed by a machine, summed.

One formula serves the search (an array of choices at once) and the prediction of one plan (an array of one), so that what is
reported is what was minimised. All of it is additive: operators, plus moves between two operators. Each operator that reads
a value under another sharding pays for its own reshard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partita.cost.moves import Placement, move_seconds
from partita.cost.terms import Factors, OperatorTerms, Stored, Terms, Work
from partita.errors import MachineError
from partita.graph.operator_graph import Phase
from partita.machine import Machine, collective_seconds
from partita.machine.times import CAUSES, START, OperatorKey, feature
from partita.plans.layout import Layout, label_sharding, spare_axes
from partita.plans.plan import Mesh, Plan

Assignment = Mapping[int, tuple[int, ...]]
"""Factor -> the mesh axes that split it."""

COMBINED = 32 << 20
"""Gradient all-reduces are combined by the compiler: each is charged what it adds to one of this many bytes."""


PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
PARTS = (
    *(("compute", p) for p in PHASES),
    *(("exchange", p) for p in PHASES),
    ("sum", "backward"),
    ("gather", "forward"),
)
"""What a step may do for an operator, as (kind, phase): the rows of `OperatorCost.parts`."""


@dataclass
class OperatorCost:
    """Per choice (the last dim of every array): seconds by cause, and bytes held."""

    computed: np.ndarray
    """[phase, choice]: seconds of kernels, in the order of PHASES."""
    exchanged: np.ndarray
    """[phase, choice]: seconds of collectives on activations: reductions, halos, reshards inside the operator."""
    summed: np.ndarray
    """Seconds of gradient reductions, as if nothing hid them."""
    gathered: np.ndarray
    """Seconds of gathering stored parameters, as if nothing hid them."""
    state: np.ndarray
    """Bytes of parameters, optimizer slots and other state."""
    activation_bytes: np.ndarray
    """Bytes of activations kept for the backward pass."""
    overlap: float
    """The part of `summed` and `gathered` that hides behind compute."""

    @property
    def compute(self) -> np.ndarray:
        return self.computed.sum(axis=0)

    @property
    def activations(self) -> np.ndarray:
        return self.exchanged.sum(axis=0)

    @property
    def gradients(self) -> np.ndarray:
        """Seconds of gradient reductions and of gathering stored parameters, after overlap."""
        return (self.summed + self.gathered) * (1 - self.overlap)

    @property
    def seconds(self) -> np.ndarray:
        return self.compute + self.activations + self.gradients

    @property
    def nbytes(self) -> np.ndarray:
        return self.state + self.activation_bytes

    def parts(self) -> np.ndarray:
        """[PARTS, choice]: the seconds of everything that a step may do for the operator, hidden or not."""
        return np.concatenate(
            [self.computed, self.exchanged, self.summed[None], self.gathered[None]]
        )


def operator_cost(
    terms: OperatorTerms, placement: Placement, assignments: Sequence[Assignment], zero: int = 0
) -> OperatorCost:
    """The cost of an operator under each assignment, its parameters stored by ZeRO level `zero` over the axes left over."""
    machine, count = placement.machine, len(assignments)
    ways = _Ways(placement, assignments)
    computed, exchanged = _compute(terms, machine, ways), np.zeros((len(PHASES), count))
    summed, gathered = np.zeros(count), np.zeros(count)
    for r in terms.reductions:
        payload = r.nbytes / ways.of(r.factors)
        grows = r.kind == "all_gather"
        for axes, chosen in (
            pair
            for fs in ([r.reduced] if r.together else [(f,) for f in r.reduced])
            for pair in ways.axes_of(*fs)
        ):
            nbytes = payload[chosen] * (placement.shard_count(axes) if grows else 1)
            if r.parameter >= 0 and r.trips == 1:
                summed[chosen] += _joined(placement, r.kind, nbytes, axes)
            else:
                exchanged[PHASES.index(r.phase), chosen] += (
                    _seconds(placement, r.kind, nbytes, axes) * r.trips
                )
    for h in terms.halos:
        for axes, chosen in ways.axes_of(h.split):
            row = h.nbytes / ways.of(h.factors)[chosen]
            needs = [need for need in h.window.halo_elements(placement.shard_count(axes)) if need]
            if needs:  # a kernel puts what came and the device's own part together: both are read, and written
                copied = row * (2 * h.rows / placement.shard_count(axes) + 2 * sum(needs))
                computed[PHASES.index(h.phase), chosen] += (
                    copied / machine.bandwidth_for(copied) + machine.overhead
                ) * h.trips
            for need in needs:
                exchanged[PHASES.index(h.phase), chosen] += (
                    _seconds(placement, "collective_permute", row * need, axes) * h.trips
                )
    for m in terms.moves:
        exchanged[PHASES.index(m.phase)] += [
            move_seconds(m, placement, label_sharding(m.source, a), label_sharding(m.target, a))
            for a in assignments
        ]
    state = ways.shared(terms.resident)
    for s in terms.stored:
        split = ways.of(tuple(f for f in s.label if f >= 0))
        extra = np.ones(count)
        if zero:
            for i, a in enumerate(assignments):
                found = storage_axes(s, placement.mesh, a)
                if found:
                    extra[i] = placement.shard_count(found[1])
                    gathered[i] += placement.seconds(
                        "all_gather", float(s.nbytes / split[i]), placement.group(found[1])
                    )
            # The update itself is split as the slots are.
            computed[-1] -= s.traffic / split * (1 - 1 / extra) / machine.memory_bandwidth
        state = state + s.nbytes / split / (extra if zero == 3 else 1) + s.slots / split / extra
    computed[-1] = np.maximum(computed[-1], 0)
    return OperatorCost(
        computed,
        exchanged,
        summed,
        gathered,
        state,
        ways.shared(terms.activations),
        machine.backend.overlap,
    )


def operator_costs(
    terms: Terms, placement: Placement, layout: Layout, plan: Plan
) -> list[OperatorCost]:
    """The cost of every operator under the one choice and storage that a plan gives it. Equal operators that are split alike share theirs."""
    zero = {path: 1 if s.zero == 2 else s.zero for path, s in plan.storage.items()}
    known: dict[tuple[object, ...], OperatorCost] = {}
    costs = []
    for own, assignment in zip(terms.operators, layout.assignments, strict=True):
        level = max((zero.get(s.path, 0) for s in own.stored), default=0)
        number = {f: n for n, f in enumerate(own.factors)}
        key = (own.digest, level, *sorted((number[f], axes) for f, axes in assignment.items()))
        if key not in known:
            known[key] = operator_cost(own, placement, [assignment], level)
        costs.append(known[key])
    return costs


def _roofline(
    terms: OperatorTerms, machine: Machine, ways: _Ways
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Seconds that an operator's kernels compute and that they move bytes, [kernel, assignment], and how often each runs, [kernel]."""
    kinds: dict[Factors, int] = {}
    flops, bound, rates = [], [], []
    moved: list[tuple[int, int, float]] = []
    for n, w in enumerate(terms.work):
        dense = w.groups > 1 and machine.backend.dense_grouped_gradients
        space = (*w.factors, *w.group_factors) if dense else w.factors
        flops.append(w.flops * w.groups if dense else w.flops)
        bound.append(kinds.setdefault(space, len(kinds)))
        rates.append(_rate(terms.name, w, machine))
        moved += [(n, kinds.setdefault(f, len(kinds)), b) for b, f in w.traffic]
    share = np.stack([1.0 / ways.of(f) for f in kinds])
    traffic = np.zeros((len(terms.work), len(kinds)))
    for n, kind, nbytes in moved:
        traffic[n, kind] += nbytes
    busy = (np.array(flops) / np.array(rates))[:, None] * share[bound]
    touched = traffic @ share
    return (
        busy,
        touched / machine.bandwidth_for(touched),
        np.array([float(w.trips) for w in terms.work]),
    )


def _rate(name: str, work: Work, machine: Machine) -> float:
    try:
        return machine.rate(work.op_class, engine_dtype(work.dtype))
    except MachineError as error:
        raise MachineError(f"'{name}' cannot be computed. {error}") from None


def _compute(terms: OperatorTerms, machine: Machine, ways: _Ways) -> np.ndarray:
    """Seconds of an operator's kernels, [phase, assignment]: measured, else by the fit to what was measured, else by the roofline."""
    if not terms.work:
        return np.zeros((len(PHASES), len(ways.assignments)))
    busy, moving, trips = _roofline(terms, machine, ways)
    times = machine.times
    phases = np.array([[float(w.phase == phase) for w in terms.work] for phase in PHASES]) * trips
    if times is None:
        return phases @ (np.maximum(busy, moving) + machine.overhead)
    work, traffic = (
        np.array([times.factor(feature(w.kind, what)) for w in terms.work])[:, None]
        for what in CAUSES
    )
    seconds = (
        phases
        @ (work * busy + traffic * moving + times.factor(START) * machine.overhead)
        * times.corrections.get(terms.digest, 1.0)
    )
    for i, assignment in enumerate(ways.assignments):
        measured = times.seconds.get(local_key(terms, ways.placement, assignment))
        if (
            measured is not None
        ):  # of the whole operator: its phases share it as the fit would have it
            seconds[:, i] *= measured / seconds[:, i].sum()
    return seconds


def local_key(terms: OperatorTerms, placement: Placement, assignment: Assignment) -> OperatorKey:
    """What an operator at its local shape is known by in `OperatorTimes`."""
    return (
        terms.digest,
        placement.mesh.size,
        tuple(placement.shard_count(assignment.get(f, ())) for f in terms.factors),
    )


def compute_source(terms: OperatorTerms, placement: Placement, assignment: Assignment) -> str:
    """Where the seconds of an operator's kernels come from: "measured", "fitted" or "roofline"."""
    times = placement.machine.times
    if times is None:
        return "roofline"
    return "measured" if local_key(terms, placement, assignment) in times.seconds else "fitted"


def roofline_features(
    terms: OperatorTerms, placement: Placement, assignment: Assignment
) -> dict[str, float]:
    """Both sides of the roofline, in seconds by kind of kernel, and the seconds of starting them: what a fit scales."""
    busy, moving, trips = _roofline(terms, placement.machine, _Ways(placement, [assignment]))
    found = {START: float(sum(trips)) * placement.machine.overhead}
    for what, kernels in zip(CAUSES, (busy, moving), strict=True):
        for w, seconds, n in zip(terms.work, kernels[:, 0], trips, strict=True):
            name = feature(w.kind, what)
            found[name] = found.get(name, 0.0) + float(seconds * n)
    return {name: seconds for name, seconds in found.items() if seconds}


class _Ways:
    """Into how many parts factors are split, per assignment."""

    def __init__(self, placement: Placement, assignments: Sequence[Assignment]) -> None:
        self.placement, self.assignments = placement, assignments
        self.one: dict[int, np.ndarray] = {}
        self.many: dict[Factors, np.ndarray] = {}

    def of(self, factors: Factors) -> np.ndarray:
        if factors not in self.many:
            found = np.ones(len(self.assignments))
            for f in factors:
                if f not in self.one:
                    self.one[f] = np.array(
                        [float(self.placement.shard_count(a.get(f, ()))) for a in self.assignments]
                    )
                found = found * self.one[f]
            self.many[factors] = found
        return self.many[factors]

    def shared(self, pieces: Sequence[tuple[int, Factors]]) -> np.ndarray:
        """Bytes of a device of pieces (bytes, factors that split them), per assignment."""
        together: dict[Factors, int] = {}
        for nbytes, factors in pieces:
            together[factors] = together.get(factors, 0) + nbytes
        return sum((b / self.of(f) for f, b in together.items()), np.zeros(len(self.assignments)))

    def axes_of(self, *factors: int) -> list[tuple[tuple[int, ...], np.ndarray]]:
        """(axes over which the factors are split, indices of the assignments that split them so)."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, assignment in enumerate(self.assignments):
            axes = tuple(a for f in factors for a in assignment.get(f, ()))
            if axes:
                groups.setdefault(axes, []).append(i)
        return [(axes, np.array(chosen)) for axes, chosen in groups.items()]


def _seconds(
    placement: Placement, kind: str, nbytes: np.ndarray, axes: Sequence[int]
) -> np.ndarray:
    return collective_seconds(placement.machine, kind, nbytes, placement.group(axes))


def _joined(placement: Placement, kind: str, nbytes: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """What `nbytes` add to a combined collective; all that they take where none is combined."""
    if not placement.machine.backend.combines:
        return _seconds(placement, kind, nbytes, axes)
    group = placement.group(axes)
    whole = np.array([float(COMBINED)])
    return collective_seconds(
        placement.machine, kind, nbytes + COMBINED, group
    ) - collective_seconds(placement.machine, kind, whole, group)


def engine_dtype(dtype: str) -> str:
    """The dtype whose engine computes this one."""
    return dtype if dtype in ("float64", "float32", "bfloat16", "float16", "int8") else "float32"


def storage_axes(
    stored: Stored, mesh: Mesh, assignment: Assignment
) -> tuple[int, tuple[int, ...]] | None:
    """(dim, axes) over which a parameter can be kept split beyond its operator's choice; None if no dim divides."""
    return spare_axes(stored.shape, label_sharding(stored.label, assignment), mesh)

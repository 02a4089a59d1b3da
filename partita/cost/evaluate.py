"""Seconds and bytes of operators under choices, summed over the terms of `cost.terms`.

One formula serves the search (an array of choices at once) and the prediction of one plan (an array
of one), so the reported seconds are the seconds that were minimized. The cost is additive:
operators, plus moves between two operators. Each operator that reads a value under another sharding
pays for its own reshard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partita.cost.attached import AttachedUse, kernels_by_part
from partita.cost.backends import compiler_of
from partita.cost.moves import Placement, move_seconds
from partita.cost.operator_terms import (
    HOST,
    Halo,
    OperatorTerms,
    Reduction,
    StoredVariable,
    Work,
)
from partita.cost.partial import Factors
from partita.cost.reshard import Axes
from partita.cost.storage import PLAIN, StorageRule, planned_rule
from partita.cost.terms import Terms
from partita.errors import MachineError
from partita.graph.operator_graph import Phase
from partita.machine import FULL_FLOAT32, Machine, collective_seconds
from partita.machine.collectives import Group
from partita.machine.times import CAUSES, START, OperatorKey, feature
from partita.plans.layout import Layout, label_sharding
from partita.plans.plan import Plan

Assignment = Mapping[int, Axes]
"""Factor -> the mesh axes that split it."""

COMBINED = 32 << 20
"""Bytes of a combined all-reduce. A gradient that joins one is charged the seconds that it adds."""


PHASES: tuple[Phase, ...] = ("forward", "backward", "update")
PARTS = (
    *(("compute", phase) for phase in PHASES),
    *(("exchange", phase) for phase in PHASES),
    ("sum", "backward"),
    *(("gather", phase) for phase in PHASES),
)
"""The activities of a step for an operator, as (kind, phase): the rows of `OperatorCost.parts`."""


@dataclass
class OperatorCost:
    """The cost of an operator per choice (the last dim of every array)."""

    kernel_seconds: np.ndarray
    """[phase, choice], phases in the order of PHASES."""
    exchange_seconds: np.ndarray
    """[phase, choice]: reductions and halos of activations, reshards inside the operator."""
    gradient_sum_seconds: np.ndarray
    """[choice]: reductions of gradients, before overlap."""
    microbatch_sum_seconds: np.ndarray
    """[choice]: those of them that every one of several microbatches has."""
    waiting_sum_seconds: np.ndarray
    """[choice]: the others, as sums of what several microbatches have added up."""
    gather_seconds: np.ndarray
    """[phase, choice]: all-gathers of stored parameters, before overlap. Those of the update return
    parameters of which only the slots are stored in slices."""
    state_bytes: np.ndarray
    """[choice]: parameters, optimizer slots and other state."""
    activation_bytes: np.ndarray
    """[choice]: activations in memory until the backward pass."""
    overlap: float
    """Share of the gradient sums and gathers that hides behind compute."""

    @property
    def compute(self) -> np.ndarray:
        """[choice]: seconds of kernels."""
        return self.kernel_seconds.sum(axis=0)

    @property
    def activations(self) -> np.ndarray:
        """[choice]: seconds of collectives on activations."""
        return self.exchange_seconds.sum(axis=0)

    @property
    def gradients(self) -> np.ndarray:
        """[choice]: seconds of gradient sums and gathers, after overlap."""
        exchanged = self.gradient_sum_seconds + self.gather_seconds.sum(axis=0)
        return exchanged * (1 - self.overlap)

    @property
    def seconds(self) -> np.ndarray:
        """[choice]: all seconds."""
        return self.compute + self.activations + self.gradients

    @property
    def nbytes(self) -> np.ndarray:
        """[choice]: all bytes."""
        return self.state_bytes + self.activation_bytes

    def parts(self) -> np.ndarray:
        """[PARTS, choice]: the seconds of every activity, before overlap."""
        return np.concatenate(
            [
                self.kernel_seconds,
                self.exchange_seconds,
                self.gradient_sum_seconds[None],
                self.gather_seconds,
            ]
        )


def operator_cost(
    terms: OperatorTerms,
    placement: Placement,
    assignments: Sequence[Assignment],
    storage: StorageRule = PLAIN,
) -> OperatorCost:
    """The cost of an operator under each assignment, with its parameters stored by a rule."""
    (cost,) = costs_by_rule(terms, placement, assignments, [storage])
    return cost


def costs_by_rule(
    terms: OperatorTerms,
    placement: Placement,
    assignments: Sequence[Assignment],
    rules: Sequence[StorageRule],
) -> list[OperatorCost]:
    """[rule]: the cost of an operator under each assignment, with its parameters stored by it."""
    split = ShardCounts(placement, assignments)
    kernel_seconds = _kernel_seconds(terms, placement.machine, split)
    move_seconds_by_phase = _inner_move_seconds(terms, placement, assignments)
    costs = []
    for rule in rules:
        evaluation = _Evaluation(terms, split, kernel_seconds)
        for reduction in terms.reductions:
            evaluation.add_reduction(reduction, rule)
        for halo in terms.halos:
            evaluation.add_halo(halo)
        evaluation.exchange_seconds += move_seconds_by_phase
        for variable in terms.stored:
            evaluation.add_variable(variable, rule)
        costs.append(evaluation.cost())
    return costs


def _inner_move_seconds(
    terms: OperatorTerms,
    placement: Placement,
    assignments: Sequence[Assignment],
) -> np.ndarray:
    """[PHASES, choice]: seconds of the reshards inside an operator."""
    total = np.zeros((len(PHASES), len(assignments)))
    for move in terms.moves:
        seconds = []
        for assignment in assignments:
            source = label_sharding(move.source, assignment)
            target = label_sharding(move.target, assignment)
            seconds.append(move_seconds(move, placement, source, target))
        total[PHASES.index(move.phase)] += seconds
    return total


def stateless_cost(
    terms: OperatorTerms,
    split: ShardCounts,
    reductions: Iterable[Reduction],
) -> OperatorCost:
    """The cost of an operator's kernels, halos and some of its reductions."""
    kernel_seconds = _kernel_seconds(terms, split.placement.machine, split)
    evaluation = _Evaluation(terms, split, kernel_seconds)
    for reduction in reductions:
        evaluation.add_reduction(reduction, PLAIN)
    for halo in terms.halos:
        evaluation.add_halo(halo)
    return evaluation.cost()


class _Evaluation:
    """The cost of an operator under assignments, added up term by term."""

    def __init__(
        self, terms: OperatorTerms, split: ShardCounts, kernel_seconds: np.ndarray
    ) -> None:
        self.terms = terms
        self.placement = split.placement
        self.machine = split.placement.machine
        self.assignments = split.assignments
        self.compiler = compiler_of(self.machine.backend)
        self.variables = {variable.tensor: variable for variable in terms.stored}
        self.split = split
        count = split.count
        self.kernel_seconds = kernel_seconds.copy()
        self.exchange_seconds = np.zeros((len(PHASES), count))
        self.gradient_sum_seconds = np.zeros(count)
        self.microbatch_sum_seconds = np.zeros(count)
        self.waiting_sum_seconds = np.zeros(count)
        self.gather_seconds = np.zeros((len(PHASES), count))
        self.state_bytes = self.split.local_bytes(terms.resident)

    def cost(self) -> OperatorCost:
        """The sum of all terms added."""
        self.kernel_seconds[-1] = np.maximum(self.kernel_seconds[-1], 0)
        return OperatorCost(
            self.kernel_seconds,
            self.exchange_seconds,
            self.gradient_sum_seconds,
            self.microbatch_sum_seconds,
            self.waiting_sum_seconds,
            self.gather_seconds,
            self.state_bytes,
            self.split.local_bytes(self.terms.activations),
            self.machine.backend.overlap,
        )

    def add_reduction(self, reduction: Reduction, storage: StorageRule) -> None:
        """Adds an all-reduce, or an all-gather, over the axes that split the reduced factors.

        ZeRO reads slices of a gradient, which many compilers sum by a reduce-scatter.
        """
        split = self.split
        phase = PHASES.index(reduction.phase)
        is_gradient = reduction.parameter >= 0 and reduction.trips == 1
        groups = [reduction.reduced]
        if not reduction.together:
            groups = [(factor,) for factor in reduction.reduced]
        for factors in groups:
            seconds = split.reduction_seconds(reduction, factors, is_gradient)
            if not is_gradient:
                self.exchange_seconds[phase] += seconds * reduction.trips
                continue
            sliced = self._sliced(reduction.parameter, factors, storage)
            if sliced is not None and reduction.kind == "all_reduce":
                scatter = replace(reduction, kind="reduce_scatter")
                scattered = split.reduction_seconds(scatter, factors, is_gradient)
                seconds = np.where(sliced, scattered, seconds)
            self.gradient_sum_seconds += seconds
            if not reduction.waiting_nbytes:
                self.microbatch_sum_seconds += seconds
                continue
            share = reduction.waiting_nbytes / reduction.nbytes
            waiting = split.reduction_seconds(reduction, factors, is_gradient, share)
            if sliced is not None and share != 1:
                # A gradient in another dtype is converted in slices, for each microbatch.
                self.microbatch_sum_seconds += np.where(sliced, seconds, 0.0)
                waiting = np.where(sliced, 0.0, waiting)
            self.waiting_sum_seconds += waiting

    def _sliced(
        self,
        parameter: int,
        factors: Factors,
        storage: StorageRule,
    ) -> np.ndarray | None:
        """[choice]: whether a parameter is stored in slices over exactly the axes of factors.

        None if its sums are no reduce-scatters.
        """
        variable = self.variables.get(parameter)
        scatters = self.compiler.scatters and not storage.in_pieces
        if variable is None or not storage.zero or not scatters:
            return None
        sliced = np.zeros(self.split.count, bool)
        for axes, choices in self.split.by_axes(*factors):
            summed = sorted(axes)
            for choice in choices:
                stored = storage.axes(variable, self.placement.mesh, self.assignments[choice])
                sliced[choice] = sorted(stored) == summed
        return sliced

    def add_halo(self, halo: Halo) -> None:
        """Adds the permutes of a halo, and the kernel that joins it with the device's own rows.

        The kernel reads both, and writes them.
        """
        phase = PHASES.index(halo.phase)
        for axes, choices in self.split.by_axes(halo.split):
            shards = self.placement.shard_count(axes)
            row_bytes = halo.nbytes / self.split.shards(halo.factors)[choices]
            halo_rows = [rows for rows in halo.window.halo_elements(shards) if rows]
            if halo_rows:
                copied = row_bytes * (2 * halo.rows / shards + 2 * sum(halo_rows))
                seconds = copied / self.machine.bandwidth_for(copied) + self.machine.overhead
                self.kernel_seconds[phase, choices] += seconds * halo.trips
            for rows in halo_rows:
                group = self.placement.group(axes)
                nbytes = row_bytes * rows
                seconds = _group_seconds(self.placement, "collective_permute", nbytes, group)
                self.exchange_seconds[phase, choices] += seconds * halo.trips

    def add_variable(self, variable: StoredVariable, storage: StorageRule) -> None:
        """Adds the bytes of a parameter and its slots.

        Slices add gathers and shorten the update.
        """
        factors = tuple(factor for factor in variable.label if factor >= 0)
        shards = self.split.shards(factors)
        extra_shards = np.ones(len(self.assignments))
        if storage.zero:
            for i, assignment in enumerate(self.assignments):
                axes = storage.axes(variable, self.placement.mesh, assignment)
                if axes:
                    extra_shards[i] = self.placement.shard_count(axes)
                    self._add_gathers(variable, storage, i, axes, float(shards[i]))
            # The update is split as the slots are.
            saved_bytes = variable.traffic / shards * (1 - 1 / extra_shards)
            self.kernel_seconds[-1] -= saved_bytes / self.machine.memory_bandwidth
        parameter_shards = extra_shards if storage.zero == 3 else 1
        parameter_bytes = variable.nbytes / shards / parameter_shards
        slot_bytes = variable.slots / shards / extra_shards
        host = self.machine.host_memory
        if storage.offloads(variable) and host is not None:
            # The update reads slots over the link to the host, while the last new ones go back.
            self.kernel_seconds[-1] += slot_bytes / host.device_bandwidth
            slot_bytes = 0.0
        self.state_bytes = self.state_bytes + parameter_bytes + slot_bytes

    def _add_gathers(
        self,
        variable: StoredVariable,
        storage: StorageRule,
        choice: int,
        axes: Axes,
        shards: float,
    ) -> None:
        """Adds the gathers of a parameter in slices: for its passes, or once after the update."""
        group = self.placement.group(axes)
        if storage.zero == 3:
            seconds = self.placement.seconds("all_gather", variable.gathered / shards, group)
            self.gather_seconds[: variable.passes, choice] += seconds
        else:
            seconds = self.placement.seconds("all_gather", variable.nbytes / shards, group)
            self.gather_seconds[-1, choice] += seconds


def operator_costs(
    terms: Terms,
    placement: Placement,
    layout: Layout,
    plan: Plan,
    in_pieces: bool = False,
) -> list[OperatorCost]:
    """The cost of every operator under a plan.

    Equal operators that are split alike share theirs. In pieces, the update is a program of its
    own: gradients are summed in front of it by all-reduces, whatever slices it reads.
    """
    cache: dict[tuple[object, ...], OperatorCost] = {}
    costs = []
    for operator, assignment in zip(terms.operators, layout.assignments, strict=True):
        storage = replace(planned_rule(operator, plan), in_pieces=in_pieces)
        position = {factor: n for n, factor in enumerate(operator.factors)}
        splits = sorted((position[factor], axes) for factor, axes in assignment.items())
        stored = dict(storage.planned)
        axes = [stored.get(variable.path) for variable in operator.stored]
        offload = [storage.offloads(variable) for variable in operator.stored]
        key = (operator.digest, storage.zero, tuple(axes), tuple(offload), *splits)
        if key not in cache:
            cache[key] = operator_cost(operator, placement, [assignment], storage)
        costs.append(cache[key])
    return costs


# ---- kernels


@dataclass(frozen=True)
class _Roofline:
    """Seconds of an operator's kernels by the roofline."""

    compute: np.ndarray
    """[kernel, assignment]: seconds of its FLOPs."""
    memory: np.ndarray
    """[kernel, assignment]: seconds of its traffic."""
    overhead: np.ndarray
    """[kernel, 1]: seconds of its launch."""
    trips: np.ndarray
    """[kernel]."""
    flops: np.ndarray
    """[kernel, assignment]: FLOPs of a device."""
    nbytes: np.ndarray
    """[kernel, assignment]: bytes that a device reads and writes."""


def _roofline(
    terms: OperatorTerms,
    machine: Machine,
    split: ShardCounts,
) -> _Roofline:
    column: dict[Factors, int] = {}
    """Factors -> their column in the matrices below."""
    flops = []
    columns = []
    rates = []
    traffic_entries: list[tuple[int, int, float]] = []
    for kernel, work in enumerate(terms.work):
        factors = work.factors
        kernel_flops = work.flops
        if work.groups > 1 and machine.backend.dense_grouped_gradients:
            factors = (*work.factors, *work.group_factors)
            kernel_flops = work.flops * work.groups
        flops.append(kernel_flops)
        columns.append(column.setdefault(factors, len(column)))
        rates.append(_rate(terms.name, work, machine))
        for nbytes, traffic_factors in work.traffic:
            position = column.setdefault(traffic_factors, len(column))
            traffic_entries.append((kernel, position, nbytes))
    share = np.stack([1.0 / split.shards(factors) for factors in column])
    traffic = np.zeros((len(terms.work), len(column)))
    for kernel, position, nbytes in traffic_entries:
        traffic[kernel, position] += nbytes
    local_traffic = traffic @ share
    bandwidth = machine.bandwidth_for(local_traffic)
    copies = [kernel for kernel, work in enumerate(terms.work) if work.op_class == HOST]
    if copies:
        bandwidth[copies] = machine.host_bandwidth()
    local_flops = np.array(flops)[:, None] * share[columns]
    full_seconds = np.array(flops) / np.array(rates)
    return _Roofline(
        full_seconds[:, None] * share[columns],
        local_traffic / bandwidth,
        machine.overhead * np.array([[float(work.launches)] for work in terms.work]),
        np.array([float(work.trips) for work in terms.work]),
        local_flops,
        local_traffic,
    )


def _rate(
    operator: str,
    work: Work,
    machine: Machine,
) -> float:
    """FLOP/s of the machine for a kernel."""
    try:
        return machine.rate(work.op_class, engine_dtype(work.dtype))
    except MachineError as error:
        raise MachineError(f"Cannot time operator '{operator}'. {error}") from None


def engine_dtype(dtype: str) -> str:
    """The dtype whose engine computes this one."""
    engines = ("float64", FULL_FLOAT32, "bfloat16", "float16", "int8")
    return dtype if dtype in engines else "float32"


def _kernel_seconds(
    terms: OperatorTerms,
    machine: Machine,
    split: ShardCounts,
) -> np.ndarray:
    """Seconds of kernels, [phase, assignment]: measured, fitted or by the roofline."""
    if not terms.work:
        return np.zeros((len(PHASES), split.count))
    roofline = _roofline(terms, machine, split)
    in_phase = [[float(work.phase == phase) for work in terms.work] for phase in PHASES]
    trips_by_phase = np.array(in_phase) * roofline.trips
    times = machine.times
    if times is None:
        seconds = np.maximum(roofline.compute, roofline.memory) + roofline.overhead
        if machine.attached:
            seconds, _ = kernels_by_part(
                machine,
                terms.work,
                seconds,
                roofline.flops,
                roofline.nbytes,
            )
        return trips_by_phase @ seconds
    compute_factors, memory_factors = (
        np.array([times.factor(feature(work.kind, cause)) for work in terms.work])[:, None]
        for cause in CAUSES
    )
    fitted = (
        compute_factors * roofline.compute
        + memory_factors * roofline.memory
        + times.factor(START) * roofline.overhead
    )
    seconds = trips_by_phase @ fitted * times.corrections.get(terms.digest, 1.0)
    for i, assignment in enumerate(split.assignments):
        measured = times.seconds.get(local_key(terms, split.placement, assignment))
        if measured is not None:
            # Measured is the whole operator. Its phases share the seconds as the fit divides them.
            seconds[:, i] *= measured / seconds[:, i].sum()
    return seconds


def attached_uses(
    terms: Terms,
    placement: Placement,
    assignments: Sequence[Assignment],
) -> list[AttachedUse]:
    """The use of each attached part of a machine in a step."""
    machine = placement.machine
    if not machine.attached or machine.times is not None:
        return []
    kernels = [0] * len(machine.attached)
    seconds_of_part = [0.0] * len(machine.attached)
    for operator, assignment in zip(terms.operators, assignments, strict=True):
        if not operator.work:
            continue
        sides = _roofline(operator, machine, ShardCounts(placement, [assignment]))
        on_device = np.maximum(sides.compute, sides.memory) + sides.overhead
        fastest, places = kernels_by_part(
            machine,
            operator.work,
            on_device,
            sides.flops,
            sides.nbytes,
        )
        for k, work in enumerate(operator.work):
            number = int(places[k, 0])
            if number >= 0:
                kernels[number] += work.trips
                seconds_of_part[number] += work.trips * float(fastest[k, 0])
    uses = zip(machine.attached, kernels, seconds_of_part, strict=True)
    return [AttachedUse(*use) for use in uses]


def local_key(
    terms: OperatorTerms,
    placement: Placement,
    assignment: Assignment,
) -> OperatorKey:
    """The key in `OperatorTimes` of an operator at its local shape."""
    return (
        terms.digest,
        placement.mesh.size,
        tuple(placement.shard_count(assignment.get(factor, ())) for factor in terms.factors),
    )


def compute_source(
    terms: OperatorTerms,
    placement: Placement,
    assignment: Assignment,
) -> str:
    """The source of the seconds of an operator's kernels: "measured", "fitted" or "roofline"."""
    times = placement.machine.times
    if times is None:
        return "roofline"
    return "measured" if local_key(terms, placement, assignment) in times.seconds else "fitted"


def roofline_features(
    terms: OperatorTerms,
    placement: Placement,
    assignment: Assignment,
) -> dict[str, float]:
    """The features that a fit scales, in seconds.

    Both sides of the roofline by kind of kernel, and the fixed cost of all kernels.
    """
    split = ShardCounts(placement, [assignment])
    roofline = _roofline(terms, placement.machine, split)
    features = {START: float(roofline.trips @ roofline.overhead[:, 0])}
    for cause, sides in zip(CAUSES, (roofline.compute, roofline.memory), strict=True):
        for work, seconds, trips in zip(terms.work, sides[:, 0], roofline.trips, strict=True):
            name = feature(work.kind, cause)
            features[name] = features.get(name, 0.0) + float(seconds * trips)
    return {name: seconds for name, seconds in features.items() if seconds}


# ---- splits and collectives


class ShardCounts:
    """The numbers of shards into which assignments split factors."""

    def __init__(self, placement: Placement, assignments: Sequence[Assignment]) -> None:
        self.placement = placement
        self.assignments = assignments
        self.by_factor: dict[int, np.ndarray] = {}
        self.by_factors: dict[Factors, np.ndarray] = {}
        self._groups: dict[Factors, list[tuple[Group, int, np.ndarray]]] = {}
        self._reduction_seconds: dict[tuple[object, ...], np.ndarray] = {}

    @property
    def count(self) -> int:
        """Number of assignments."""
        return len(self.assignments)

    def shards(self, factors: Factors) -> np.ndarray:
        """[assignment]: shards of a tensor with these factors."""
        if factors not in self.by_factors:
            shards = np.ones(self.count)
            for factor in factors:
                shards = shards * self._shards_of_one(factor)
            self.by_factors[factors] = shards
        return self.by_factors[factors]

    def _shards_of_one(self, factor: int) -> np.ndarray:
        if factor not in self.by_factor:
            shards = []
            for assignment in self.assignments:
                axes = assignment.get(factor, ())
                shards.append(float(self.placement.shard_count(axes)))
            self.by_factor[factor] = np.array(shards)
        return self.by_factor[factor]

    def local_bytes(self, tensors: Sequence[tuple[int, Factors]]) -> np.ndarray:
        """[assignment]: bytes of a device's shards of tensors, given as (bytes, factors)."""
        bytes_by_factors: dict[Factors, int] = {}
        for nbytes, factors in tensors:
            bytes_by_factors[factors] = bytes_by_factors.get(factors, 0) + nbytes
        total = np.zeros(self.count)
        for factors, nbytes in bytes_by_factors.items():
            total = total + nbytes / self.shards(factors)
        return total

    def by_axes(self, *factors: int) -> list[tuple[Axes, np.ndarray]]:
        """The axes that split the factors, with the assignments (indices) that split over them."""
        groups: dict[Axes, list[int]] = {}
        for i, assignment in enumerate(self.assignments):
            axes = tuple(axis for factor in factors for axis in assignment.get(factor, ()))
            if axes:
                groups.setdefault(axes, []).append(i)
        return [(axes, np.array(choices)) for axes, choices in groups.items()]

    def by_group(self, factors: Factors) -> list[tuple[Group, int, np.ndarray]]:
        """The collectives over the axes that split the factors: (participants, shards of these
        axes, assignments (indices)).
        """
        if factors not in self._groups:
            together: dict[tuple[Group, int], list[np.ndarray]] = {}
            for axes, choices in self.by_axes(*factors):
                key = self.placement.group(axes), self.placement.shard_count(axes)
                together.setdefault(key, []).append(choices)
            groups = [(*key, np.concatenate(choices)) for key, choices in together.items()]
            self._groups[factors] = groups
        return self._groups[factors]

    def reduction_seconds(
        self,
        reduction: Reduction,
        factors: Factors,
        is_combined: bool,
        share: float = 1.0,
    ) -> np.ndarray:
        """[assignment]: seconds of a share of a reduction over the axes that split `factors`."""
        kind = reduction.kind
        key = (kind, reduction.nbytes, reduction.factors, factors, is_combined, share)
        if key not in self._reduction_seconds:
            total = np.zeros(self.count)
            local_bytes = reduction.nbytes / self.shards(reduction.factors)
            for group, parts, choices in self.by_group(factors):
                nbytes = local_bytes[choices]
                if kind == "all_gather":
                    nbytes = nbytes * parts
                nbytes = nbytes * share
                seconds = _combined_seconds if is_combined else _group_seconds
                total[choices] = seconds(self.placement, kind, nbytes, group)
            self._reduction_seconds[key] = total
        return self._reduction_seconds[key]


def _group_seconds(placement: Placement, kind: str, nbytes: np.ndarray, group: Group) -> np.ndarray:
    return collective_seconds(placement.machine, kind, nbytes, group)


def _combined_seconds(
    placement: Placement, kind: str, nbytes: np.ndarray, group: Group
) -> np.ndarray:
    """Seconds that bytes add to a combined collective, or their own if a backend combines none."""
    if not placement.machine.backend.combines:
        return _group_seconds(placement, kind, nbytes, group)
    with_bytes = _group_seconds(placement, kind, nbytes + COMBINED, group)
    return with_bytes - placement.seconds(kind, float(COMBINED), group)


def added_seconds(
    placement: Placement,
    kind: str,
    nbytes: np.ndarray,
    axes: Sequence[int],
) -> np.ndarray:
    """Seconds that bytes add to a combined collective.

    Where a backend combines none, these are their own seconds.
    """
    return _combined_seconds(placement, kind, nbytes, placement.group(axes))

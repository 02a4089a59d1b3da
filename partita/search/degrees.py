"""Choices by numbers of axes: all choices of an operator, with a lower bound on the cost of each.

Axes of one level and size are interchangeable (a *kind* of axes). The *degrees* of a choice are
the numbers of axes of each kind that split each factor. An operator costs the same under all
choices of equal degrees, so all its choices are a few thousand rows of an array, where axes by name
are millions. Storage is bounded per variable, over any number of axes that do not split it.

Reshards depend on the names of axes. Their least seconds follow from the bytes that must cross a
level of the machine: a device, or all devices of a node together, needs a part of the tensor, and
holds at most the overlap of both parts before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from partita.cost.backends import compiler_of
from partita.cost.evaluate import (
    PARTS,
    PHASES,
    ShardCounts,
    added_seconds,
    stateless_cost,
)
from partita.cost.moves import Placement
from partita.cost.operator_terms import Move, OperatorTerms, Reduction, StoredVariable
from partita.cost.partial import Factors
from partita.cost.reshard import Axes
from partita.machine.collectives import collective_lines
from partita.search.base import Array

SUM = PARTS.index(("sum", "backward"))
UPDATE = PARTS.index(("compute", "update"))
GATHERS = [PARTS.index(("gather", phase)) for phase in PHASES]


@dataclass(frozen=True, eq=False)
class AxisKinds:
    """The axes of a mesh by level and size. `levels`, `sizes` and `counts` are arrays, [kind].

    Microbatches are an axis of level -1. No choice may deal it, so its kind counts no axes.
    """

    placement: Placement
    axes: tuple[Axes, ...]
    levels: Array
    sizes: Array
    counts: Array

    @staticmethod
    def of(placement: Placement) -> AxisKinds:
        """The kinds of the axes of a mesh."""
        kinds: dict[tuple[int, int], list[int]] = {}
        for number, axis in enumerate(placement.mesh.axes):
            kinds.setdefault((axis.level, axis.size), []).append(number)
        return AxisKinds(
            placement=placement,
            axes=tuple(map(tuple, kinds.values())),
            levels=np.array([level for level, _ in kinds]),
            sizes=np.array([size for _, size in kinds]),
            counts=np.array([len(axes) if level >= 0 else 0 for (level, _), axes in kinds.items()]),
        )

    @property
    def are_devices(self) -> Array:
        """[kind]: whether its axes are devices, not microbatches."""
        return self.levels >= 0

    def first(self, numbers: Sequence[int] | Array) -> Axes:
        """The first axes of each kind, `numbers` of them."""
        pairs = zip(self.axes, numbers, strict=True)
        return tuple(itertools.chain(*(axes[:number] for axes, number in pairs)))

    def shards(self, degrees: Array) -> Array:
        """Shards by degrees, whose last dim is that of kinds."""
        return np.prod(self.sizes.astype(float) ** degrees, axis=-1)

    def all_degrees(self, sizes: Sequence[int], samples: Sequence[int] = ()) -> Array:
        """The degrees of all choices for factors of some sizes, [choice, factor, kind].

        Microbatches split the first of the factors `samples` that they divide, as in
        `plans.pipeline.stage_plan`.
        """
        degrees = np.zeros((1, len(sizes), 0), np.int64)
        for size, count in zip(self.sizes, self.counts, strict=True):
            tuples = list(_at_most(int(count), len(sizes)))
            dealt = np.array(tuples, np.int64).reshape(len(tuples), len(sizes))
            before = np.prod(self.sizes[: degrees.shape[2]] ** degrees, axis=2)
            shards = before[:, None, :] * size ** dealt[None]
            rows, columns = np.nonzero((np.array(sizes) % shards == 0).all(axis=2))
            degrees = np.concatenate([degrees[rows], dealt[columns][:, :, None]], axis=2)
        for kind in np.flatnonzero(~self.are_devices):
            is_split = np.zeros(len(degrees), bool)
            for factor in samples:
                shards = self.shards(degrees[:, factor]) * self.sizes[kind]
                splits = (sizes[factor] % shards == 0) & ~is_split
                degrees[splits, factor, kind] = 1
                is_split |= splits
        return degrees


def _at_most(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All tuples of `parts` numbers whose sum is at most `total`.

    >>> list(_at_most(1, 2))
    [(0, 0), (0, 1), (1, 0)]
    """
    if parts == 0:
        yield ()
        return
    for first in range(total + 1):
        for rest in _at_most(total - first, parts - 1):
            yield (first, *rest)


def distinct_rows(rows: Array) -> tuple[Array, Array]:
    """Distinct rows of whole numbers from 0 up, and the number of the one that each row equals.

    Rows are numbered by their digits: sorting numbers takes a fifth of the time of sorting rows.
    """
    flat = rows.reshape(len(rows), -1)
    bases = flat.max(axis=0, initial=0) + 1
    if float(np.prod(bases.astype(float))) < 2**62:
        places = np.cumprod(np.array([1, *bases[:-1]], np.int64)[: len(bases)])
        keys = flat @ places
    else:
        keys = np.unique(flat, axis=0, return_inverse=True)[1].reshape(-1)
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    return rows[first], number.reshape(-1)


class DegreeCounts(ShardCounts):
    """Numbers of shards by degrees instead of assignments."""

    def __init__(self, kinds: AxisKinds, factors: Factors, degrees: Array) -> None:
        super().__init__(kinds.placement, ())
        self.kinds = kinds
        self.factors = factors
        self.degrees = degrees
        self._position = {factor: number for number, factor in enumerate(factors)}
        shards = kinds.shards(degrees)
        self.by_factor = {factor: shards[:, n] for factor, n in self._position.items()}

    @property
    def count(self) -> int:
        return len(self.degrees)

    def _shards_of_one(self, factor: int) -> Array:
        """A factor of another operator, as of a mask that several read, is not split."""
        return self.by_factor.get(factor, np.ones(self.count))

    def chosen(self, choices: Array) -> DegreeCounts:
        """The counts of some choices alone."""
        return DegreeCounts(self.kinds, self.factors, self.degrees[choices])

    def numbers(self, factors: Factors) -> Array:
        """Numbers of axes that split any of the factors, [choice, kind]."""
        positions = [self._position[factor] for factor in factors if factor in self._position]
        return self.degrees[:, positions].sum(axis=1)

    def by_axes(self, *factors: int) -> list[tuple[Axes, Array]]:
        """Axes as many as split the factors, with the choices that split over as many."""
        rows, index = distinct_rows(self.numbers(factors))
        groups = []
        for n, row in enumerate(rows):
            if row.any():
                groups.append((self.kinds.first(row), np.flatnonzero(index == n)))
        return groups


def least_operator_seconds(terms: OperatorTerms, split: DegreeCounts, weights: Array) -> Array:
    """[choice]: least sum of an operator's seconds, its PARTS weighted, over all storages.

    Reshards inside the operator are left out.
    """
    stored = {variable.tensor: variable for variable in terms.stored}
    sums: dict[int, list[Reduction]] = {tensor: [] for tensor in stored}
    others = []
    for reduction in terms.reductions:
        if reduction.parameter in stored and reduction.trips == 1:
            sums[reduction.parameter].append(reduction)
        else:
            others.append(reduction)
    seconds = weights @ stateless_cost(terms, split, others).parts()
    for variable in terms.stored:
        reductions = sums[variable.tensor]
        different, number = _different_for(variable, reductions, split)
        storage = _Storage(variable, different, reductions, weights)
        seconds = seconds + storage.least_seconds()[number]
    return seconds


def _different_for(
    variable: StoredVariable, reductions: Sequence[Reduction], split: DegreeCounts
) -> tuple[DegreeCounts, Array]:
    """(choices that differ for a variable and the sums of its gradient, [choice]: its number).

    They are some hundred of a hundred thousand.
    """
    labels = [_factors_of(variable)]
    for reduction in reductions:
        labels += [reduction.factors, *_groups(reduction)]
    numbers = np.stack([split.numbers(factors) for factors in labels], axis=1)
    _, number = distinct_rows(numbers)
    first = np.zeros(int(number.max(initial=-1)) + 1, np.int64)
    first[number[::-1]] = np.arange(len(number))[::-1]
    return split.chosen(first), number


def least_addition_seconds(terms: OperatorTerms, split: DegreeCounts) -> Array:
    """[choice]: least seconds in which a microbatch adds its gradients to their sums."""
    bandwidth = split.placement.machine.bandwidth_for(np.zeros(1))
    local_bytes = np.zeros(split.count)
    for variable in terms.stored:
        local_bytes += variable.added / split.shards(_factors_of(variable))
    return local_bytes / bandwidth


def _factors_of(variable: StoredVariable) -> Factors:
    """The factors that split a variable."""
    return tuple(factor for factor in variable.label if factor >= 0)


class _Storage:
    """The storage of a variable by degrees, with the sums of its gradient."""

    def __init__(
        self,
        variable: StoredVariable,
        split: DegreeCounts,
        reductions: Sequence[Reduction],
        weights: Array,
    ) -> None:
        self.variable = variable
        self.split = split
        self.weights = weights
        self.factors = _factors_of(variable)
        self.shards = split.shards(self.factors)
        self._distinct_shards, self._shards_number = np.unique(self.shards, return_inverse=True)
        self.sums = [_Sum.of(one, factors, split) for one in reductions for factors in _groups(one)]

    def least_seconds(self) -> Array:
        """[choice]: least weighted seconds of sums, gathers and the shortened update."""
        kinds = self.split.kinds
        spare = np.maximum(kinds.counts - self.split.numbers(self.factors), 0)
        whole = np.zeros(self.split.count)
        for each in self.sums:
            whole += self.weights[SUM] * each.whole
        least = whole
        for numbers in itertools.product(*(range(count + 1) for count in kinds.counts)):
            if any(numbers):
                seconds = self._seconds(np.array(numbers))
                is_spare = (spare >= numbers).all(axis=1)
                least = np.where(is_spare, np.minimum(least, seconds), least)
        return least

    def _seconds(self, numbers: Array) -> Array:
        """[choice]: weighted seconds where the variable is stored over this many axes."""
        variable, weights = self.variable, self.weights
        placement = self.split.placement
        axes = self.split.kinds.first(numbers)
        for_passes = weights[GATHERS[: variable.passes]].sum()
        gathers = np.minimum(
            for_passes * self._gather_seconds(variable.gathered, axes),
            weights[GATHERS[-1]] * self._gather_seconds(variable.nbytes, axes),
        )
        parts = placement.shard_count(axes)
        saved_bytes = variable.traffic / self.shards * (1 - 1 / parts)
        saved_seconds = saved_bytes / placement.machine.memory_bandwidth
        seconds = gathers - weights[UPDATE] * saved_seconds
        for each in self.sums:
            is_slice = (each.numbers == numbers).all(axis=1)
            seconds += weights[SUM] * np.where(is_slice, each.scattered, each.whole)
        return seconds

    def _gather_seconds(self, nbytes: int, axes: Axes) -> Array:
        """[choice]: seconds of a gather of the variable's shards."""
        placement = self.split.placement
        group = placement.group(axes)
        seconds = []
        for shards in self._distinct_shards.tolist():
            seconds.append(placement.seconds("all_gather", nbytes / shards, group))
        return np.array(seconds)[self._shards_number]


def _groups(reduction: Reduction) -> list[Factors]:
    """The factors of each collective of a reduction."""
    if reduction.together:
        return [reduction.reduced]
    return [(factor,) for factor in reduction.reduced]


@dataclass(frozen=True, eq=False)
class _Sum:
    """A sum of a gradient, as a whole or in slices."""

    numbers: Array
    """[choice, kind]: axes of devices over which it sums."""
    whole: Array
    """[choice]: seconds of the sum."""
    scattered: Array
    """[choice]: seconds of the reduce-scatter, where the compiler has one."""

    @staticmethod
    def of(reduction: Reduction, factors: Factors, split: DegreeCounts) -> _Sum:
        placement = split.placement
        scatters = compiler_of(placement.machine.backend).scatters
        whole = np.zeros(split.count)
        scattered = np.zeros(split.count)
        local_bytes = reduction.nbytes / split.shards(reduction.factors)
        for axes, choices in split.by_axes(*factors):
            nbytes = local_bytes[choices]
            if reduction.kind == "all_gather":
                nbytes = nbytes * placement.shard_count(axes)
            whole[choices] = added_seconds(placement, reduction.kind, nbytes, axes)
            scattered[choices] = whole[choices]
            if scatters and reduction.kind == "all_reduce":
                scattered[choices] = added_seconds(placement, "reduce_scatter", nbytes, axes)
        numbers = split.numbers(factors) * split.kinds.are_devices
        return _Sum(numbers, whole, scattered)


# ---------------------------------------------------------------- moves


@dataclass(frozen=True, eq=False)
class Shardings:
    """Shardings of a tensor by degrees, in classes.

    A class has one sharding, or several that differ in a few axes where all would be too many.
    """

    degrees: Array
    """[sharding, entry of the label, kind]."""
    classes: Array
    """[sharding]: its class."""
    least: Array
    """[class, entry of the label, kind]: least degrees of its shardings."""
    most: Array
    """[class, entry of the label, kind]: most degrees."""

    @staticmethod
    def of(degrees: Array, kinds: AxisKinds, apart: int | None = None) -> Shardings:
        """Classes of shardings with equal degrees.

        Of each kind of axes the `apart` largest degrees and 0 are apart, all of them without a
        number, and the degrees between are one class.
        """
        if apart is None:
            return Shardings(degrees, np.arange(len(degrees)), degrees, degrees)
        first_apart = kinds.counts - apart + 1
        is_between = (degrees > 0) & (degrees < first_apart)
        least, classes = distinct_rows(np.where(is_between, 1, degrees))
        is_class = (least > 0) & (least < first_apart)
        return Shardings(degrees, classes, least, np.where(is_class, first_apart - 1, least))

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.least)

    def least_of_classes(self, seconds: Array) -> Array:
        """[class]: the least of the seconds of its shardings."""
        least = np.full(self.count, np.inf)
        np.minimum.at(least, self.classes, seconds)
        return least


def least_move_table(move: Move, kinds: AxisKinds, sources: Shardings, targets: Shardings) -> Array:
    """Least seconds of a move between classes of shardings, [source, target].

    At each level, the devices of a part of the machine need their shards of the target. Of these
    they hold at most the overlap with their shards of the source, dim by dim. The rest crosses
    links of this level or outside it: least where the source is split least, the target most.
    """
    count = sources.least.shape[1] - move.sums
    source_dims, target_dims = sources.least[:, :count], targets.most[:, :count]
    before = []
    after = []
    seconds = []
    nbytes = move.nbytes / _most_microbatches(kinds, sources, targets)
    for level, seconds_per_byte in _least_seconds_per_byte(kinds).items():
        is_outside = (kinds.levels <= level) & kinds.are_devices
        inside = kinds.shards(np.where(kinds.levels <= level, 0, kinds.counts))
        before.append(1 / kinds.shards(np.where(is_outside, source_dims, 0)))
        after.append(1 / kinds.shards(np.where(is_outside, target_dims, 0)))
        seconds.append(move.trips * nbytes / inside * seconds_per_byte)
    if not seconds:
        return np.zeros((sources.count, targets.count), np.float32)
    after_by_dim = np.ascontiguousarray(np.array(after).transpose(0, 2, 1))
    moved = _reshard_table(np.array(before), after_by_dim, np.array(seconds))
    if move.sums:
        _add_sums(moved, move, kinds, sources, targets)
    else:
        moved /= move.share
    return moved


def _most_microbatches(kinds: AxisKinds, sources: Shardings, targets: Shardings) -> float:
    """The most microbatches into which a sharding splits its tensor."""
    most = [1.0]
    for shardings in (sources, targets):
        over_time = np.where(kinds.are_devices, 0, shardings.degrees)
        most.append(float(kinds.shards(over_time).prod(axis=1).max(initial=1.0)))
    return max(most)


@njit(cache=True, fastmath={"nnan", "nsz"})
def _reshard_table(before, after, seconds):
    """Least seconds of a reshard, [source, target].

    `before` and `after` are shares of a dim, [level, sharding, dim] and [level, dim, sharding];
    `seconds` are those in which the whole tensor crosses a level. Loops over targets have no
    branches, so that they are vectorized.
    """
    levels, sources, dims = before.shape
    targets = after.shape[2]
    table = np.zeros((sources, targets), np.float32)
    needed = np.ones((levels, targets))
    held = np.empty(targets)
    for level in range(levels):
        for dim in range(dims):
            for t in range(targets):
                needed[level, t] *= after[level, dim, t]
    for s in range(sources):
        row = table[s]
        for level in range(levels):
            held[:] = 1.0
            for dim in range(dims):
                share = before[level, s, dim]
                for t in range(targets):
                    held[t] *= min(share, after[level, dim, t])
            whole = seconds[level]
            for t in range(targets):
                least = np.float32(whole * (needed[level, t] - held[t]))
                row[t] = max(row[t], least)
    return table


def _add_sums(
    table: Array, move: Move, kinds: AxisKinds, sources: Shardings, targets: Shardings
) -> None:
    """Adds the least seconds of partial sums to a table; none where they may stay partial."""
    count = sources.least.shape[1] - move.sums
    dims = sources.degrees[:, :count]
    summed = sources.degrees[:, count:].sum(axis=1)
    sum_seconds = _sum_seconds(move, kinds, dims, summed, "all_reduce")
    whole = sources.least_of_classes(sum_seconds).astype(np.float32)
    saved = np.zeros(sources.count, np.float32)
    source_kind = np.zeros(sources.count, np.int64)
    may_be_slice = np.zeros((1, targets.count), np.float32)
    if move.scatters:
        scattered = _sum_seconds(move, kinds, dims, summed, "reduce_scatter") / move.share
        scattered = np.minimum(sources.least_of_classes(scattered), whole).astype(np.float32)
        is_partial = (sources.most[:, count:].sum(axis=(1, 2)) > 0).astype(np.int64)
        devices = kinds.are_devices
        source_sums = [each.sum(axis=1) * devices for each in (sources.least, sources.most)]
        target_sums = [
            each[:, :count].sum(axis=1) * devices for each in (targets.least, targets.most)
        ]
        left, source_kind = distinct_rows(np.column_stack([*source_sums, is_partial]))
        right, target_kind = distinct_rows(np.column_stack(target_sums))
        may_overlap = _overlap(left[:, :-1], right) & (left[:, -1] > 0)[:, None]
        may_be_slice = may_overlap[:, target_kind].astype(np.float32)
        saved = whole - scattered
    _sum_entries(
        table,
        (whole, whole / move.share, saved),
        _numbers(sources.least[:, :count], targets.least[:, :count]),
        _numbers(sources.least, targets.least),
        source_kind,
        may_be_slice,
    )


@njit(cache=True, fastmath={"nnan", "nsz"})
def _sum_entries(table, seconds, dims, entries, source_kind, may_be_slice):
    """Adds the seconds of partial sums to a table, [source, target].

    `seconds`: by source of the sum, of the sum where the dims stay, and saved by a reduce-scatter.
    `dims`, `entries`: numbers of sources and targets, equal for equal dims, or for equal entries.
    `may_be_slice`: [kind of source, target], 1 or 0. All entries have 32 bits, for vectors.
    """
    whole, shared, saved = seconds
    source_dims, target_dims = dims
    source_entries, target_entries = entries
    nothing = np.float32(0.0)
    for s in range(len(table)):
        row = table[s]
        is_slice = may_be_slice[source_kind[s]]
        source_dim = source_dims[s]
        source_entry = source_entries[s]
        for t in range(len(row)):
            entry = shared[s] if source_dim == target_dims[t] else row[t] + whole[s]
            entry = max(entry - saved[s] * is_slice[t], nothing)
            row[t] = nothing if source_entry == target_entries[t] else entry


def _overlap(left: Array, right: Array) -> Array:
    """[left, right]: whether degrees of every kind may be equal, given the least and the most of
    all kinds in a row."""
    result = np.ones((len(left), len(right)), bool)
    kinds = left.shape[1] // 2
    for kind in range(kinds):
        result &= np.less_equal.outer(left[:, kind], right[:, kinds + kind])
        result &= np.greater_equal.outer(left[:, kinds + kind], right[:, kind])
    return result


def _numbers(left: Array, right: Array) -> tuple[Array, Array]:
    """Numbers of rows, equal for equal rows of both arrays."""
    number = distinct_rows(np.concatenate([left, right]))[1].astype(np.int32)
    return number[: len(left)], number[len(left) :]


def _sum_seconds(
    move: Move, kinds: AxisKinds, source_dims: Array, summed: Array, collective: str
) -> Array:
    """[source]: seconds of the sum of a partial sum."""
    placement = kinds.placement
    shards = kinds.shards(source_dims).prod(axis=1)
    rows, index = distinct_rows(np.column_stack([shards.astype(np.int64), summed]))
    seconds = []
    for parts, *numbers in rows.tolist():
        group = placement.group(kinds.first(list(map(int, numbers))))
        seconds.append(placement.seconds(collective, move.nbytes / parts, group) if group else 0.0)
    return move.trips * np.array(seconds)[index]


def _least_seconds_per_byte(kinds: AxisKinds) -> dict[int, float]:
    """Level -> least seconds in which a device receives a byte over it or a level outside.

    The levels of a torus or mesh work at once.
    """
    machine = kinds.placement.machine
    of_level: dict[int, float] = {}
    for level, size, count in zip(kinds.levels, kinds.sizes, kinds.counts, strict=True):
        for number in range(1, int(count) + 1):
            members = int(size) ** number
            lines = collective_lines(machine.levels, "all_gather", ((int(level), members),))
            least = min(line.per_byte for line in lines) * members / (members - 1)
            of_level[int(level)] = min(of_level.get(int(level), np.inf), least)
    reaches_all = [level.fabric in ("switch", "tree", "bus") for level in machine.levels]
    result = {}
    for level in of_level:
        outside = [seconds for other, seconds in of_level.items() if other <= level]
        if all(reaches_all):
            result[level] = min(outside)
        else:
            result[level] = 1 / sum(1 / seconds for seconds in outside)
    return result

"""The collectives of one reshard, in the sequence that Shardy inserts, and the bytes of each.

Shardy's `sdy-reshard-to-collectives` turns every reshard into slices, permutes, all-to-alls and
all-gathers. This is its algorithm in plain Python, so that a search can ask for millions of
reshards without a compiler:

1. all_slice: bring in the axes that only the target has, wherever it splits the tensor further;
2. collective_permute: swap axes in place, where axes stand in the wrong order or one axis can
   replace another;
3. all_to_all: carry axes from the end of one dim to the end of another;
4. all_gather: drop the axes that remain.

A second round finishes reshards of unequal axes. Every step looks at the *difference* of two
shardings: per dim, the `leaving` axes of the current sharding and the `coming` axes of the target,
both without their common prefix, which never moves.

Axis sizes must be prime: then Shardy never cuts an axis into sub-axes, and full axes describe every
intermediate step. Two departures, both only on meshes with unequal axes: a permute that changes
nothing is left out, and where Shardy stops short of the target after its two rounds, more steps
follow. Source: the `sdy-reshard-to-collectives` pass of openxla/shardy, as shipped in jaxlib
0.10.2; the tests compare with it.

Not in this module: seconds (`machine.collectives`), and the collectives that XLA's partitioner
emits when values are not pinned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal

from partita.plans.layout import Sharding

Axes = tuple[int, ...]
"""Axes of a mesh, by index."""
CollectiveKind = Literal["all_slice", "collective_permute", "all_to_all", "all_gather"]


@dataclass(frozen=True, slots=True)
class ReshardStep:
    """One collective of a reshard."""

    kind: CollectiveKind
    axes: Axes
    """Of the groups that exchange data."""
    result: Sharding


@lru_cache(maxsize=1 << 18)
def reshard_steps(
    source: Sharding,
    target: Sharding,
    sizes: tuple[int, ...],
    shape: tuple[int, ...] | None = None,
) -> tuple[ReshardStep, ...]:
    """The collectives, in order, by which Shardy turns `source` into `target`.

    `sizes` are the sizes of the mesh's axes, all prime. `shape` is the tensor's global shape; by
    default every dim is divisible by any product of axes. It matters rarely: Shardy slices a dim
    ahead of an all-to-all only where that leaves no remainder. Raises ValueError where a composite
    axis would have to be cut.

    >>> for step in reshard_steps(((0,), ()), ((), (0, 1)), (2, 2)):
    ...     print(step.kind, step.axes, step.result)
    all_slice () ((0, 1), ())
    all_to_all (0, 1) ((), (0, 1))
    """
    assert len(source) == len(target), f"a reshard keeps the rank, got {source} -> {target}"
    difference = _Difference(source, target, sizes, shape)
    for attempt in range(4):
        if difference.done:
            break
        if attempt == 2:
            # Shardy stops here, sometimes short of the target. The next two rounds reach it.
            difference.ghosts = set()
        difference.slice()
        difference.permute()
        difference.exchange(in_order=True)
        difference.exchange(in_order=False)
        difference.gather(everything=attempt == 2)
    assert difference.done, f"{source} -> {target} on {sizes} ends at {difference.current}"
    return tuple(difference.steps)


@lru_cache(maxsize=1 << 18)
def emitted_steps(
    source: Sharding,
    target: Sharding,
    sizes: tuple[int, ...],
    shape: tuple[int, ...] | None = None,
) -> tuple[ReshardStep, ...]:
    """`reshard_steps` as XLA's partitioner emits them when a constraint pins each result.

    They differ in one point: an all-gather along several dims becomes one per dim, last dim first
    (XLA:CPU, jax 0.10.2).

    >>> [step.result for step in emitted_steps(((0,), (1,)), ((), ()), (2, 2))]
    [((0,), ()), ((), ())]
    """
    steps: list[ReshardStep] = []
    before = source
    for step in reshard_steps(source, target, sizes, shape):
        if step.kind != "all_gather":
            steps.append(step)
            before = step.result
            continue
        for dim in reversed(range(len(before))):
            dropped = before[dim][len(step.result[dim]) :]
            if dropped:
                before = (*before[:dim], step.result[dim], *before[dim + 1 :])
                steps.append(ReshardStep("all_gather", tuple(sorted(dropped)), before))
    return tuple(steps)


def step_bytes(
    step: ReshardStep,
    before: Sharding,
    shape: Sequence[int],
    itemsize: int,
    sizes: Sequence[int],
) -> int:
    """Bytes per device of a step that starts from the sharding `before`.

    These are the bytes of the result of an all_gather and of the operand of a permute or an
    all_to_all. An all_slice has none. A dim that does not divide evenly is padded (rounded up), as
    in XLA.
    """
    if step.kind == "all_slice":
        return 0
    sharding = step.result if step.kind == "all_gather" else before
    nbytes = itemsize
    for size, axes in zip(shape, sharding, strict=True):
        shards = math.prod(sizes[axis] for axis in axes)
        nbytes *= -(-size // shards)
    return nbytes


class _Difference:
    """The difference between `current` and `target`.

    A method emits at most the steps of one kind.
    """

    def __init__(
        self,
        source: Sharding,
        target: Sharding,
        sizes: tuple[int, ...],
        shape: tuple[int, ...] | None,
    ) -> None:
        self.current = [list(axes) for axes in source]
        self.target = target
        self.sizes = sizes
        self.shape = shape
        self.dims = range(len(source))
        self.home: dict[int, tuple[int, int]] = {}
        """Axis of the target -> its dim and its position in it."""
        for dim, axes in enumerate(target):
            for position, axis in enumerate(axes):
                self.home[axis] = (dim, position)
        self.steps: list[ReshardStep] = []
        self.ghosts: set[int] = set()
        """Axes that were gathered and that Shardy still counts as used."""

    @property
    def done(self) -> bool:
        """Whether the target is reached."""
        return self.frozen() == self.target

    def frozen(self) -> Sharding:
        """The current sharding."""
        return tuple(tuple(axes) for axes in self.current)

    def emit(self, kind: CollectiveKind, axes: Iterable[int]) -> None:
        """Records a step that led to the current sharding."""
        self.steps.append(ReshardStep(kind, tuple(sorted(axes)), self.frozen()))

    def used_axes(self) -> set[int]:
        """The axes that Shardy takes to split some dim."""
        return self.ghosts.union(*self.current)

    def prefix(self, dim: int) -> int:
        """Number of leading axes of a dim that are final."""
        count = 0
        for axis, target_axis in zip(self.current[dim], self.target[dim], strict=False):
            if axis != target_axis:
                break
            count += 1
        return count

    def leaving(self, dim: int) -> list[int]:
        """Axes that a dim has and that the target does not have in their place."""
        return self.current[dim][self.prefix(dim) :]

    def coming(self, dim: int) -> list[int]:
        """Axes that the target has and that a dim does not have in their place."""
        return list(self.target[dim][self.prefix(dim) :])

    def product(self, axes: Iterable[int]) -> int:
        """Shards that axes make."""
        return math.prod(self.sizes[axis] for axis in axes)

    def fits(self, axis: int, capacity: int) -> bool:
        """Whether an axis divides a capacity: the shards that a dim may be split into."""
        size = self.sizes[axis]
        if 1 < capacity < size and size % capacity == 0:
            raise ValueError(
                f"The reshard cuts mesh axis {axis} ({size}) into sub-axes. Use axes of prime size."
            )
        return capacity > 1 and capacity % size == 0

    def fill(
        self,
        capacity: list[int],
        dim: int,
        axes: list[int],
    ) -> list[int]:
        """Moves the axes that fit from `axes` into the capacity of a dim, and returns them."""
        taken = []
        for axis in list(axes):
            if self.fits(axis, capacity[dim]):
                capacity[dim] //= self.sizes[axis]
                axes.remove(axis)
                taken.append(axis)
        return taken

    # ---- 1. all_slice

    def slice(self) -> None:
        """Splits dims along axes that only the target has."""
        before = self.frozen()
        used = self.used_axes()
        capacity = []
        for dim in self.dims:
            shards = self.product(self.leaving(dim))
            target_shards = self.product(self.coming(dim))
            capacity.append(target_shards // math.gcd(shards, target_shards))
        for dim in self.dims:
            self._slice_ahead(dim, used, capacity)
        unplaced: list[int] = []
        for dim in self.dims:
            new_axes = [axis for axis in self.coming(dim) if axis not in used]
            self.current[dim] += self.fill(capacity, dim, new_axes)
            unplaced += new_axes
        for dim in self.dims:
            self.current[dim] += self.fill(capacity, dim, unplaced)
        if self.frozen() != before:
            self.emit("all_slice", ())

    def _slice_ahead(
        self,
        dim: int,
        used: set[int],
        capacity: list[int],
    ) -> None:
        """Slices `dim` along axes bound for another dim, if its suffix goes there before them.

        One all-to-all then carries them all to their place. Slicing the other dim would need a
        permute as well.
        """
        leaving = self.leaving(dim)
        if not leaving or self.coming(dim) or leaving[-1] not in self.home:
            return
        other, position = self.home[leaving[-1]]
        if self.leaving(other):
            return
        new_axes = []
        for axis in self.target[other][position + 1 :]:
            if axis in used:
                break
            new_axes.append(axis)
        if not new_axes:
            return
        ahead = self.target[other][self.prefix(other) : position + 1]
        suffix = _common_suffix(ahead, leaving)
        remaining = leaving[: len(leaving) - suffix]
        if any(self.home.get(axis, (dim, 0))[0] == other for axis in remaining):
            return
        if self.shape is not None:
            shards = self.product(self.current[dim] + new_axes)
            if self.shape[dim] % shards:
                return
        capacity[other] //= self.product(leaving[len(leaving) - suffix :] + new_axes)
        self.current[dim] += new_axes
        used.update(new_axes)

    # ---- 2. collective_permute

    def permute(self) -> None:
        """Exchanges axes in place.

        Axes bound for another dim then stand last, ready for an all-to-all.
        """
        if not self.out_of_place():
            return
        before = self.frozen()
        capacity: list[int] = []
        """Per dim, the shards that are left after the axes placed so far."""
        first: list[list[int]] = []
        """Per dim, its coming axes that fit at once."""
        onward: list[int] = []
        """Coming axes that do not fit their dim."""
        dropped: list[list[int]] = []
        """Per dim, its leaving axes that the target lacks, in the order of their placement."""
        for dim in self.dims:
            leaving = self.leaving(dim)
            coming = self.coming(dim)
            shards = self.product(leaving)
            left_over = shards
            placed: list[int] = []
            while coming and self.fits(coming[0], left_over):
                left_over //= self.sizes[coming[0]]
                placed.append(coming.pop(0))
            capacity.append(left_over)
            first.append(placed)
            onward += coming
            unused = [axis for axis in leaving if axis not in self.home]
            dropped.append(self._replaced_last(unused, shards // left_over))
        onward_axes = [self.fill(capacity, dim, onward) for dim in self.dims]
        same_dim = [self.fill(capacity, dim, dropped[dim]) for dim in self.dims]
        remaining = list(chain.from_iterable(dropped))
        any_dim = [self.fill(capacity, dim, remaining) for dim in self.dims]
        for dim in self.dims:
            self.current[dim][self.prefix(dim) :] = (
                first[dim] + any_dim[dim] + same_dim[dim] + onward_axes[dim]
            )
        moved = self.digits(before).items() ^ self.digits(self.frozen()).items()
        # Sometimes the best arrangement is the present one.
        if moved:
            self.emit("collective_permute", {axis for axis, _ in moved})

    def _replaced_last(self, axes: list[int], taken: int) -> list[int]:
        """Axes in the order of their placement.

        Last are those whose place others have taken, with `taken` shards.
        """
        count = 0
        while count < len(axes) and self.fits(axes[count], taken):
            taken //= self.sizes[axes[count]]
            count += 1
        return axes[count:] + axes[:count]

    def digits(self, sharding: Sharding) -> dict[int, tuple[int, int]]:
        """Axis -> (dim, stride): the digit that it is in the block number of the dim."""
        result = {}
        for dim, axes in enumerate(sharding):
            stride = 1
            for axis in reversed(axes):
                result[axis] = (dim, stride)
                stride *= self.sizes[axis]
        return result

    def out_of_place(self) -> bool:
        """Whether exchanging axes in place brings the shardings nearer."""
        used = self.used_axes()
        entering = None
        exiting = None
        for dim in self.dims:
            leaving = self.leaving(dim)
            coming = self.coming(dim)
            if leaving and coming and self.exchangeable(leaving[0], coming[0]):
                return True
            for axis in coming:
                if axis not in used:
                    entering = axis
            if self._is_disordered(dim, leaving) or self._hides_dropped(leaving, coming):
                return True
            for axis in leaving:
                if axis not in self.home:
                    exiting = axis
        if entering is None or exiting is None:
            return False
        return self.exchangeable(entering, exiting)

    def _is_disordered(self, dim: int, leaving: list[int]) -> bool:
        """Whether axes bound for one dim stand apart or in another order."""
        dims: set[int] = set()
        previous: tuple[int, int] | None = None
        for axis in leaving:
            home = self.home.get(axis)
            if home is not None:
                target_dim, position = home
                follows = previous == (target_dim, position - 1)
                if (target_dim == dim or target_dim in dims) and not follows:
                    return True
                dims.add(target_dim)
            previous = home
        return False

    def _hides_dropped(self, leaving: list[int], coming: list[int]) -> bool:
        """Whether an axis to be gathered stands after an axis that an all-to-all will take."""
        if coming:
            return False
        for axis, following in pairwise(leaving):
            if axis in self.home and following not in self.home:
                return True
        return False

    def exchangeable(self, one: int, other: int) -> bool:
        """Whether the size of one axis divides that of the other."""
        size = self.sizes[one]
        other_size = self.sizes[other]
        return size % other_size == 0 or other_size % size == 0

    # ---- 3. all_to_all

    def exchange(self, in_order: bool) -> None:
        """Carries the end of each dim to its home.

        With `in_order`, only ends that land in their final place move.
        """
        for dim in self.dims:
            while suffix := self._suffix_of_one_home(dim):
                other = self.home[suffix[0]][0]
                if in_order and self.coming(other)[: len(suffix)] != suffix:
                    break
                del self.current[dim][-len(suffix) :]
                self.current[other] += suffix
                self.emit("all_to_all", suffix)

    def _suffix_of_one_home(self, dim: int) -> list[int]:
        """The longest end of a dim whose axes all belong to one other dim."""
        suffix: list[int] = []
        for axis in reversed(self.leaving(dim)):
            home = self.home.get(axis, (dim, 0))[0]
            if home == dim:
                break
            if suffix and home != self.home[suffix[0]][0]:
                break
            suffix.insert(0, axis)
        return suffix

    # ---- 4. all_gather

    def gather(self, everything: bool) -> None:
        """Drops the leaving axes of each dim that ends with one to be gathered.

        With `everything`, those of all dims.

        Shardy drops the whole difference of a dim, even axes that the target has elsewhere, and in
        its second round still counts those as used: it will not slice by these ghosts.
        """
        gathered: list[int] = []
        for dim in self.dims:
            leaving = self.leaving(dim)
            if leaving and (everything or leaving[-1] not in self.home):
                del self.current[dim][self.prefix(dim) :]
                gathered += leaving
        if gathered:
            self.ghosts = set()
            if not everything:
                self.ghosts = {axis for axis in gathered if axis in self.home}
            self.emit("all_gather", gathered)


def _common_suffix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common end of two lists."""
    length = 0
    for axis, other_axis in zip(reversed(one), reversed(other), strict=False):
        if axis != other_axis:
            break
        length += 1
    return length

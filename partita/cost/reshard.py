"""The collectives that one reshard costs: the very sequence that Shardy inserts, and the bytes of
each.

Shardy's `sdy-reshard-to-collectives` turns every reshard into slices, permutes, all-to-alls and
all-gathers. This is its algorithm again in plain Python, so that a search can ask for millions of
reshards without a compiler:

1. all_slice: bring in the axes that only the target has, wherever the tensor is to be split further anyway;
2. collective_permute: swap axes in place, when axes stand in the wrong order or one axis can take another's room;
3. all_to_all: carry axes from the end of one dim to the end of another;
4. all_gather: drop what is left.

A second round catches what unequal axis sizes left over. Everything below looks at the *difference*
of two shardings: per dim, the `leaving` axes of the current sharding and the `coming` axes of the
target, both without their common prefix, which never moves.

Axis sizes must be prime: then Shardy never cuts an axis into sub-axes, and full axes describe every
intermediate step. Two departures, both only on meshes with unequal axes: a permute that changes
nothing is left out, and where Shardy stops short of the target after its two rounds, more steps
follow until it is reached. Source: the `sdy-reshard-to-collectives` pass of openxla/shardy, as
shipped in jaxlib 0.10.2; the tests compare with it.

Not here: seconds (a collective's time is the machine's), and what XLA's partitioner emits when
values are not pinned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Literal

Sharding = tuple[tuple[int, ...], ...]
"""Per dim of a tensor, the mesh axes (indices into the mesh's axes) that split it, major to
minor."""

Kind = Literal["all_slice", "collective_permute", "all_to_all", "all_gather"]


@dataclass(frozen=True, slots=True)
class ReshardStep:
    """One collective of a reshard: `axes` spans the groups that exchange data, `result` is the
    sharding it leaves."""

    kind: Kind
    axes: tuple[int, ...]
    result: Sharding


@lru_cache(maxsize=1 << 18)
def reshard_steps(
    source: Sharding, target: Sharding, sizes: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> tuple[ReshardStep, ...]:
    """The collectives, in order, by which Shardy turns `source` into `target` on a mesh with axes
    of `sizes` (primes).

    `shape` is the tensor's global shape; without it every dim is taken to be divisible by any
    product of axes. It matters rarely: Shardy slices a dim ahead of an all-to-all only where that
    leaves no remainder. Raises ValueError where a composite axis would have to be cut.

    >>> for step in reshard_steps(((0,), ()), ((), (0, 1)), (2, 2)):
    ...     print(step.kind, step.axes, step.result)
    all_slice () ((0, 1), ())
    all_to_all (0, 1) ((), (0, 1))
    """
    assert len(source) == len(target), f"a reshard keeps the rank, got {source} -> {target}"
    diff = _Difference(source, target, sizes, shape)
    for attempt in range(4):
        if diff.done:
            break
        if (
            attempt == 2
        ):  # Shardy stops here, sometimes short of the target; what follows finishes what it leaves
            diff.ghosts = set()
        diff.slice()
        diff.permute()
        diff.exchange(in_order=True)
        diff.exchange(in_order=False)
        diff.gather(everything=attempt == 2)
    assert diff.done, f"{source} -> {target} on {sizes} ends at {diff.current}"
    return tuple(diff.steps)


@lru_cache(maxsize=1 << 18)
def emitted_steps(
    source: Sharding, target: Sharding, sizes: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> tuple[ReshardStep, ...]:
    """`reshard_steps` as XLA's partitioner emits them when each result is pinned by a sharding
    constraint.

    It differs in one thing: an all-gather along several dims becomes one per dim, last dim first
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
    step: ReshardStep, before: Sharding, shape: Sequence[int], itemsize: int, sizes: Sequence[int]
) -> int:
    """Bytes per device of a step that starts from `before`: the result of an all_gather, the
    operand of a permute or an all_to_all, nothing for an all_slice. A dim that does not divide
    evenly is padded (rounded up), as XLA does."""
    if step.kind == "all_slice":
        return 0
    held = step.result if step.kind == "all_gather" else before
    return itemsize * math.prod(
        -(-dim // math.prod(sizes[axis] for axis in axes))
        for dim, axes in zip(shape, held, strict=True)
    )


class _Difference:
    """What still separates `current` from `target`; each method emits at most the steps of one
    kind."""

    def __init__(
        self,
        source: Sharding,
        target: Sharding,
        sizes: tuple[int, ...],
        shape: tuple[int, ...] | None,
    ):
        self.current = [list(axes) for axes in source]
        self.target = target
        self.sizes = sizes
        self.shape = shape
        self.dims = range(len(source))
        self.home = {
            axis: (dim, place) for dim, axes in enumerate(target) for place, axis in enumerate(axes)
        }
        self.steps: list[ReshardStep] = []
        self.ghosts: set[int] = set()

    @property
    def done(self) -> bool:
        return self.frozen() == self.target

    def frozen(self) -> Sharding:
        return tuple(tuple(axes) for axes in self.current)

    def emit(self, kind: Kind, axes: Iterable[int]) -> None:
        self.steps.append(ReshardStep(kind, tuple(sorted(axes)), self.frozen()))

    def kept(self, dim: int) -> int:
        """How many leading axes of a dim are already right."""
        count = 0
        for mine, wanted in zip(self.current[dim], self.target[dim], strict=False):
            if mine != wanted:
                break
            count += 1
        return count

    def leaving(self, dim: int) -> list[int]:
        return self.current[dim][self.kept(dim) :]

    def coming(self, dim: int) -> list[int]:
        return list(self.target[dim][self.kept(dim) :])

    def product(self, axes: Iterable[int]) -> int:
        return math.prod(self.sizes[axis] for axis in axes)

    def fill(self, room: list[int], dim: int, spare: list[int]) -> list[int]:
        """Move the axes that fit from `spare` into the room of a dim; returns them."""
        taken = []
        for axis in list(spare):
            if self.fits(axis, room[dim]):
                room[dim] //= self.sizes[axis]
                spare.remove(axis)
                taken.append(axis)
        return taken

    def fits(self, axis: int, room: int) -> bool:
        size = self.sizes[axis]
        if 1 < room < size and size % room == 0:
            raise ValueError(
                f"this reshard would cut mesh axis {axis} ({size}) into sub-axes; use axes of prime size"
            )
        return room > 1 and room % size == 0

    # ---- 1. all_slice

    def slice(self) -> None:
        before = self.frozen()
        held = self.ghosts.union(*self.current)
        room = []  # per dim, how many times further the target splits it
        for dim in self.dims:
            inside, outside = self.product(self.leaving(dim)), self.product(self.coming(dim))
            room.append(outside // math.gcd(inside, outside))
        for dim in self.dims:
            self.slice_ahead(dim, held, room)
        spare: list[int] = []
        for dim in self.dims:
            fresh = [axis for axis in self.coming(dim) if axis not in held]
            self.current[dim] += self.fill(room, dim, fresh)
            spare += fresh
        for dim in self.dims:
            self.current[dim] += self.fill(room, dim, spare)
        if self.frozen() != before:
            self.emit("all_slice", ())

    def slice_ahead(self, dim: int, held: set[int], room: list[int]) -> None:
        """Slice `dim` along axes bound for another dim, if a suffix of `dim` goes there just before
        them anyway: one all-to-all then carries them all to their place, where slicing the other
        dim would need a permute as well."""
        leaving = self.leaving(dim)
        if not leaving or self.coming(dim) or leaving[-1] not in self.home:
            return
        other, place = self.home[leaving[-1]]
        if self.leaving(other):
            return
        fresh = []
        for axis in self.target[other][place + 1 :]:
            if axis in held:
                break
            fresh.append(axis)
        if not fresh:
            return
        ahead = self.target[other][self.kept(other) : place + 1]
        common = 0
        while common < min(len(ahead), len(leaving)) and ahead[-1 - common] == leaving[-1 - common]:
            common += 1
        if any(
            self.home.get(axis, (dim, 0))[0] == other for axis in leaving[: len(leaving) - common]
        ):
            return
        if self.shape is not None and self.shape[dim] % self.product(self.current[dim] + fresh):
            return
        room[other] //= self.product(leaving[len(leaving) - common :] + fresh)
        self.current[dim] += fresh
        held.update(fresh)

    # ---- 2. collective_permute

    def permute(self) -> None:
        if not self.out_of_place():
            return
        before = self.frozen()
        room, placed, spare, leavers = [], [], [], []
        for dim in self.dims:
            leaving, coming = self.leaving(dim), self.coming(dim)
            left = whole = self.product(leaving)
            first: list[int] = []
            while coming and self.fits(coming[0], left):
                left //= self.sizes[coming[0]]
                first.append(coming.pop(0))
            room.append(left)
            placed.append(first)
            spare += coming
            gone = [axis for axis in leaving if axis not in self.home]
            replaced, used = 0, whole // left  # those whose room is taken try other dims last
            while replaced < len(gone) and self.fits(gone[replaced], used):
                used //= self.sizes[gone[replaced]]
                replaced += 1
            leavers.append(gone[replaced:] + gone[:replaced])
        onward = [self.fill(room, dim, spare) for dim in self.dims]
        same_dim = [self.fill(room, dim, leavers[dim]) for dim in self.dims]
        rest = list(chain.from_iterable(leavers))
        any_dim = [self.fill(room, dim, rest) for dim in self.dims]
        for dim in self.dims:  # axes bound for another dim stand last, ready for an all-to-all
            self.current[dim][self.kept(dim) :] = (
                placed[dim] + any_dim[dim] + same_dim[dim] + onward[dim]
            )
        moved = self.places(before).items() ^ self.places(self.frozen()).items()
        if moved:  # now and then the best arrangement is the one we had
            self.emit("collective_permute", {axis for axis, _ in moved})

    def places(self, sharding: Sharding) -> dict[int, tuple[int, int]]:
        """Per axis its dim and stride: which digit of the block number of that dim is the device's
        place on the axis."""
        found = {}
        for dim, axes in enumerate(sharding):
            stride = 1
            for axis in reversed(axes):
                found[axis] = dim, stride
                stride *= self.sizes[axis]
        return found

    def out_of_place(self) -> bool:
        """Whether exchanging axes in place brings the shardings nearer."""
        held = self.ghosts.union(*self.current)
        entering = exiting = None
        for dim in self.dims:
            leaving, coming = self.leaving(dim), self.coming(dim)
            if leaving and coming and self.alike(leaving[0], coming[0]):
                return True
            for axis in coming:
                if axis not in held:
                    entering = axis
            seen: set[int] = set()
            last: tuple[int, int] | None = None
            for axis in leaving:
                home = self.home.get(axis)
                if home is not None:
                    follows = last == (home[0], home[1] - 1)
                    if (home[0] == dim or home[0] in seen) and not follows:
                        return True  # bound for one dim, but apart or in another order
                    seen.add(home[0])
                elif last is not None and not coming:
                    return True  # to be gathered, but stands after an axis that an all-to-all will take
                else:
                    exiting = axis
                last = home
        return entering is not None and exiting is not None and self.alike(entering, exiting)

    def alike(self, one: int, other: int) -> bool:
        return self.sizes[one] % self.sizes[other] == 0 or self.sizes[other] % self.sizes[one] == 0

    # ---- 3. all_to_all

    def exchange(self, in_order: bool) -> None:
        """Carry the end of each dim to where it belongs; `in_order` only where it lands in its
        final place."""
        for dim in self.dims:
            while suffix := self.suffix_of_one_home(dim):
                other = self.home[suffix[0]][0]
                if in_order and self.coming(other)[: len(suffix)] != suffix:
                    break
                del self.current[dim][-len(suffix) :]
                self.current[other] += suffix
                self.emit("all_to_all", suffix)

    def suffix_of_one_home(self, dim: int) -> list[int]:
        """The longest end of a dim whose axes all belong to one other dim."""
        suffix: list[int] = []
        for axis in reversed(self.leaving(dim)):
            home = self.home.get(axis, (dim, 0))[0]
            if home == dim or (suffix and home != self.home[suffix[0]][0]):
                break
            suffix.insert(0, axis)
        return suffix

    # ---- 4. all_gather

    def gather(self, everything: bool) -> None:
        """Drop the leaving axes of each dim that ends with one to be gathered, or of all dims that
        have any.

        Shardy drops the whole difference there, even axes that the target has elsewhere, and in its
        second round believes to hold those still: it will not slice by these ghosts.
        """
        gathered: list[int] = []
        for dim in self.dims:
            leaving = self.leaving(dim)
            if leaving and (everything or leaving[-1] not in self.home):
                del self.current[dim][self.kept(dim) :]
                gathered += leaving
        if gathered:
            self.ghosts = set() if everything else {axis for axis in gathered if axis in self.home}
            self.emit("all_gather", gathered)

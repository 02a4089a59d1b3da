"""Values that a compiler computes again because a step exceeds the memory of a device.

XLA:GPU has a limit for the buffers of a program (`Compiler.temporary_limit_bytes`). Its pass
HloRematerialization goes through the instructions in their order. At each one beyond the limit it
takes kernels other than products and calls whose results this instruction does not read, drops
them, and runs the kernels once more before their next readers. The values that such a kernel reads
stay in memory until then. Those that are gone at this instruction are stored longer if they are
smaller than its result, as the bfloat16 input of a normalization in float32.

A joined kernel (`cost.joined`) runs again for all its results: none is dropped while the
instruction reads one of them, and all are back before the next reader of any.

To move a kernel to its first reader costs nothing, so kernels whose results nothing has read go
first. As bytes count at this instruction only, the sum of a large gradient waits for the collective
that reads it, and the gradient stays in memory with it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Reads = tuple[int, ...]
"""The instructions that read a value from memory, sorted."""


class Lifetime(NamedTuple):
    """An allocation of a value, in memory while instructions `start` to `stop` run."""

    tensor: int
    nbytes: int
    start: int
    stop: int


@dataclass(frozen=True)
class Recomputable:
    """A kernel that can run again, for all its results at once."""

    results: Mapping[int, Reads]
    """Tensors that it writes -> their readers."""
    sources: tuple[int, ...]
    """The computed tensors that it reads."""


class Drop(NamedTuple):
    """A value that is not in memory between two of its readers."""

    allocation: int
    """Index of the value's lifetime."""
    last: int
    """The instruction that reads it before."""
    next: int
    """The instruction for which it is computed again."""


@dataclass(frozen=True)
class Recomputation:
    """The values that are computed again, and those that stay in memory longer for it."""

    drops: tuple[Drop, ...]
    stops: Mapping[int, int]
    """Index of an allocation -> its later last instruction."""


def drops(
    lifetimes: Mapping[int, Lifetime],
    kernels: Sequence[Recomputable],
    live_bytes: np.ndarray,
    limit_bytes: float,
) -> Recomputation:
    """The values to drop so that no instruction has more than `limit_bytes` in memory.

    `lifetimes` maps the index of an allocation to its value, each value has one. `live_bytes` are
    the bytes of all allocations at each instruction. At each instruction beyond the limit, kernels
    whose results nothing has read go first, then those with the most bytes, until it is within the
    limit or nothing is left.
    """
    chosen = _Dropper(lifetimes, kernels, live_bytes.copy())
    for time in range(len(live_bytes)):
        if chosen.live_bytes[time] > limit_bytes:
            chosen.drop_at(time, limit_bytes)
    return Recomputation(tuple(chosen.by_tensor.values()), chosen.stops)


class _Dropper:
    """Chooses values to drop, with the bytes that stay."""

    def __init__(
        self,
        lifetimes: Mapping[int, Lifetime],
        kernels: Sequence[Recomputable],
        live_bytes: np.ndarray,
    ) -> None:
        self.lifetimes = {lifetime.tensor: lifetime for lifetime in lifetimes.values()}
        """Tensor -> its lifetime."""
        self.index = {lifetime.tensor: index for index, lifetime in lifetimes.items()}
        """Tensor -> its allocation."""
        self.kernels = kernels
        self.kernel_of = {
            tensor: number for number, kernel in enumerate(kernels) for tensor in kernel.results
        }
        self.live_bytes = live_bytes
        self.reads = {
            tensor: list(reads) for kernel in kernels for tensor, reads in kernel.results.items()
        }
        """Tensor -> instructions that read it, also to compute another value again; sorted."""
        self.by_tensor: dict[int, Drop] = {}
        """Dropped tensor -> its drop."""
        self.stops: dict[int, int] = {}
        """Index of an allocation that is stored longer -> its last instruction."""
        starts = {number: self._start(kernel) for number, kernel in enumerate(kernels)}
        self.later = sorted(
            (number for number in starts if starts[number] >= 0),
            key=lambda number: -starts[number],
        )
        """Kernels that run at a later instruction, the next one last."""
        self.starts = starts
        self.candidates: list[int] = []
        """Kernels whose results may be dropped at this instruction or a later one."""

    def _start(self, kernel: Recomputable) -> int:
        """The instruction at which all results of a kernel are in memory, -1 for no results."""
        starts = [self.lifetimes[t].start for t in kernel.results if t in self.lifetimes]
        return max(starts, default=-1)

    def drop_at(self, time: int, limit_bytes: float) -> None:
        """Drops values at an instruction until it is within the limit or nothing is left."""
        while self.later and self.starts[self.later[-1]] < time:
            self.candidates.append(self.later.pop())
        remaining = []
        for number in sorted(self.candidates, key=lambda number: self._rank(number, time)):
            is_beyond = self.live_bytes[time] > limit_bytes
            if not (is_beyond and self._is_settled(number, time)):
                remaining.append(number)
        self.candidates = remaining

    def _rank(self, number: int, time: int) -> tuple[bool, int, int]:
        """The order of candidates: those whose results nothing has read, then by size."""
        results = self.kernels[number].results
        is_read = any(self.reads[t] and self.reads[t][0] <= time for t in results)
        return is_read, -self._bytes(self._needed(number, time)), self.starts[number]

    def _needed(self, number: int, time: int) -> list[int]:
        """The results of a kernel that are in memory beyond an instruction."""
        results = self.kernels[number].results
        return [t for t in results if t in self.lifetimes and self.lifetimes[t].stop > time]

    def _bytes(self, tensors: Iterable[int]) -> int:
        return sum(self.lifetimes[tensor].nbytes for tensor in tensors)

    def _is_settled(self, number: int, time: int) -> bool:
        """Drops the results of a kernel at an instruction if it can run again afterwards.

        Whether they are dropped now, or never: False if the instruction itself reads one.
        """
        kernel = self.kernels[number]
        if not self.by_tensor.keys().isdisjoint(kernel.results):
            return True
        needed = self._needed(number, time)
        last: dict[int, int] = {}
        following = []
        for tensor in needed:
            reads = self.reads[tensor]
            position = bisect.bisect_left(reads, time)
            lifetime = self.lifetimes[tensor]
            last[tensor] = reads[position - 1] if position else lifetime.start
            if position < len(reads):
                following.append(min(reads[position], lifetime.stop))
        if time in following:
            return False
        if not following:
            return True
        again = min(following)
        ended = [t for t in kernel.sources if t not in self.lifetimes or self._stop(t) < again]
        if any(source not in self.lifetimes for source in ended):
            return True
        gone = [source for source in ended if self._stop(source) < time]
        if self._bytes(gone) >= self._bytes(needed):
            return True
        for source in ended:
            self._store_longer(source, again)
        for tensor in needed:
            drop = Drop(self.index[tensor], last[tensor], again)
            self.by_tensor[tensor] = drop
            self.live_bytes[drop.last + 1 : again] -= self.lifetimes[tensor].nbytes
        self._read_sources(kernel, again)
        return True

    def _stop(self, tensor: int) -> int:
        return self.lifetimes[tensor].stop

    def _store_longer(self, tensor: int, stop: int) -> None:
        """Stores a value until an instruction that computes another one from it again."""
        lifetime = self.lifetimes[tensor]
        self.live_bytes[lifetime.stop + 1 : stop + 1] += lifetime.nbytes
        self.lifetimes[tensor] = lifetime._replace(stop=stop)
        self.stops[self.index[tensor]] = stop

    def _read_sources(self, kernel: Recomputable, time: int) -> None:
        """Keeps the sources of a kernel in memory at a time at which it runs again."""
        for source in kernel.sources:
            if source not in self.reads:
                continue
            bisect.insort(self.reads[source], time)
            drop = self.by_tensor.get(source)
            if drop is None or not drop.last < time < drop.next:
                continue
            again = self.kernels[self.kernel_of[source]]
            for tensor in again.results:
                if tensor in self.by_tensor:
                    self._restore(tensor, time)
            self._read_sources(again, time)

    def _restore(self, tensor: int, time: int) -> None:
        """Computes a dropped value again at an earlier instruction."""
        drop = self.by_tensor[tensor]
        self.by_tensor[tensor] = drop._replace(next=time)
        self.live_bytes[time : drop.next] += self.lifetimes[tensor].nbytes

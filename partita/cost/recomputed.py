"""Values that a compiler computes again because a step exceeds the memory of a device.

XLA:GPU has a limit for the buffers of a program (`Compiler.temporary_limit_bytes`). Its pass
HloRematerialization goes through the instructions in their order. At each one beyond the limit it
takes kernels other than products and calls whose results this instruction does not read, drops
them, and runs the kernels once more before their next readers. The values that such a kernel reads
stay in memory until then. Those that are gone at this instruction are stored longer if they are
smaller than its result, as the bfloat16 input of a normalization in float32.

To move a kernel to its first reader costs nothing, so kernels whose results nothing has read go
first. As bytes count at this instruction only, the sum of a large gradient waits for the collective
that reads it, and the gradient stays in memory with it.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Mapping
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
    """A value whose kernel can run again."""

    sources: tuple[int, ...]
    """The computed tensors that its kernel reads."""
    reads: Reads


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
    recomputable: Mapping[int, Recomputable],
    live_bytes: np.ndarray,
    limit_bytes: float,
) -> Recomputation:
    """The values to drop so that no instruction has more than `limit_bytes` in memory.

    `lifetimes` maps the index of an allocation to its value, `live_bytes` are the bytes of all
    allocations at each instruction. At each instruction beyond the limit, values that nothing has
    read go first, then the largest ones, until it is within the limit or nothing is left.
    """
    chosen = _Dropper(lifetimes, recomputable, live_bytes.copy())
    for time in range(len(live_bytes)):
        if chosen.live_bytes[time] > limit_bytes:
            chosen.drop_at(time, limit_bytes)
    return Recomputation(tuple(chosen.by_tensor.values()), chosen.stops)


class _Dropper:
    """Chooses values to drop, with the bytes that stay."""

    def __init__(
        self,
        lifetimes: Mapping[int, Lifetime],
        recomputable: Mapping[int, Recomputable],
        live_bytes: np.ndarray,
    ) -> None:
        self.lifetimes = dict(lifetimes)
        self.recomputable = recomputable
        self.live_bytes = live_bytes
        self.reads = {tensor: list(value.reads) for tensor, value in recomputable.items()}
        """Tensor -> instructions that read it, also to compute another value again; sorted."""
        self.by_tensor: dict[int, Drop] = {}
        """Dropped tensor -> its drop."""
        self.stop: dict[int, int] = defaultdict(int)
        """Tensor -> the last instruction at which it is in memory."""
        self.stops: dict[int, int] = {}
        """Index of an allocation that is stored longer -> its last instruction."""
        self.last: dict[int, int] = {}
        """Tensor -> its allocation with the latest end."""
        for index, lifetime in lifetimes.items():
            if lifetime.stop >= self.stop[lifetime.tensor]:
                self.stop[lifetime.tensor] = lifetime.stop
                self.last[lifetime.tensor] = index
        self.later = sorted(
            (index for index, value in lifetimes.items() if value.tensor in recomputable),
            key=lambda index: -lifetimes[index].start,
        )
        """Allocations that start at a later instruction, the next one last."""
        self.candidates: list[int] = []
        """Allocations that may be dropped at this instruction or a later one."""

    def drop_at(self, time: int, limit_bytes: float) -> None:
        """Drops values at an instruction until it is within the limit or nothing is left."""
        while self.later and self.lifetimes[self.later[-1]].start < time:
            self.candidates.append(self.later.pop())
        remaining = []
        for index in sorted(self.candidates, key=lambda index: self._rank(index, time)):
            is_beyond = self.live_bytes[time] > limit_bytes
            if not (is_beyond and self._is_settled(index, time)):
                remaining.append(index)
        self.candidates = remaining

    def _rank(self, index: int, time: int) -> tuple[bool, int, int]:
        """The order of candidates: those that nothing has read, then by size."""
        lifetime = self.lifetimes[index]
        reads = self.reads[lifetime.tensor]
        return bool(reads and reads[0] <= time), -lifetime.nbytes, lifetime.start

    def _is_settled(self, index: int, time: int) -> bool:
        """Drops a value at an instruction if its kernel can run again afterwards.

        Whether it is dropped now, or never: False if the instruction itself reads it.
        """
        lifetime = self.lifetimes[index]
        tensor = lifetime.tensor
        reads = self.reads[tensor]
        position = bisect.bisect_left(reads, time)
        if position == len(reads) or lifetime.stop <= time or tensor in self.by_tensor:
            return True
        if reads[position] == time:
            return False
        last = reads[position - 1] if position else lifetime.start
        drop = Drop(index, last, min(reads[position], lifetime.stop))
        sources = self.recomputable[tensor].sources
        ended = [source for source in sources if self.stop[source] < drop.next]
        if any(source not in self.last for source in ended):
            return True
        gone = [self.last[source] for source in ended if self.stop[source] < time]
        if sum(self.lifetimes[source].nbytes for source in gone) >= lifetime.nbytes:
            return True
        for source in ended:
            self._store_longer(source, drop.next)
        self.by_tensor[tensor] = drop
        self.live_bytes[drop.last + 1 : drop.next] -= lifetime.nbytes
        self._read_sources(tensor, drop.next)
        return True

    def _store_longer(self, tensor: int, stop: int) -> None:
        """Stores a value until an instruction that computes another one from it again."""
        index = self.last[tensor]
        lifetime = self.lifetimes[index]
        self.live_bytes[lifetime.stop + 1 : stop + 1] += lifetime.nbytes
        self.lifetimes[index] = lifetime._replace(stop=stop)
        self.stop[tensor] = stop
        self.stops[index] = stop

    def _read_sources(self, tensor: int, time: int) -> None:
        """Keeps the sources of a value in memory at a time at which it is computed again."""
        for source in self.recomputable[tensor].sources:
            if source not in self.reads:
                continue
            bisect.insort(self.reads[source], time)
            drop = self.by_tensor.get(source)
            if drop is None or not drop.last < time < drop.next:
                continue
            self.by_tensor[source] = drop._replace(next=time)
            self.live_bytes[time : drop.next] += self.lifetimes[drop.allocation].nbytes
            self._read_sources(source, time)

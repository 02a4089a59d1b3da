"""The contract of a backend: a compiler, as far as cost and memory depend on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from partita.cost.sums import LaidOutProgram, Sum
from partita.graph.operator_graph import ITEMSIZE
from partita.machine import Backend


@dataclass(frozen=True)
class Compiler(ABC):
    """A compiler. Callers ask it for a program's properties, never for its name."""

    backend: Backend
    """The machine's settings."""

    @abstractmethod
    def sums(self, program: LaidOutProgram, sums: Sequence[Sum]) -> list[Sum]:
        """The sums over devices that it emits, given those of the partitioner."""

    @property
    @abstractmethod
    def folds(self) -> bool:
        """Whether sums of a tensor over several factors are one sum (`sums.fold`)."""

    @property
    @abstractmethod
    def leaves_loops(self) -> bool:
        """Whether a sum that a loop adds up happens once, after the loop (`sums.leave_loops`)."""

    @property
    @abstractmethod
    def scatters(self) -> bool:
        """Whether a sum of which devices read slices is a reduce-scatter (`sums.scatter`)."""

    def sum_itemsize(self, dtype: str) -> int:
        """Bytes of an element of a dtype while it is summed over devices."""
        if dtype in ("bfloat16", "float16") and self.backend.promotes_16_bit_all_reduce:
            return 4
        return ITEMSIZE.get(dtype, 4)

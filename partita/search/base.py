"""What a search is given and returns: a Problem in numbers, and a SearchResult.

A Problem is a cost network: per operator a list of states with seconds and bytes, per pair of operators that exchange values a
table of seconds. Seconds and bytes of a plan are sums. It knows nothing of tensors and is solved by any algorithm of this
folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Problem:
    """`seconds[v][i]` and `nbytes[v][i]` of state i of variable v; `tables[u, v][i, j]` seconds between two, u < v."""

    seconds: list[np.ndarray]
    nbytes: list[np.ndarray]
    tables: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.seconds)

    def add_table(self, u: int, v: int, table: np.ndarray) -> None:
        """Adds seconds between u and v, whose states are the rows and columns of the table."""
        if u > v:
            u, v, table = v, u, table.T
        self.tables[u, v] = self.tables[u, v] + table if (u, v) in self.tables else table

    def cost(self, states: Sequence[int]) -> float:
        """Seconds of a full assignment of states."""
        return float(
            sum(s[i] for s, i in zip(self.seconds, states, strict=True))
            + sum(t[states[u], states[v]] for (u, v), t in self.tables.items())
        )

    def memory_bytes(self, states: Sequence[int]) -> float:
        """Bytes of a full assignment of states."""
        return float(sum(b[i] for b, i in zip(self.nbytes, states, strict=True)))


@dataclass(frozen=True)
class Progress:
    """A word from a running search: seconds of the best plan so far and a lower bound on every plan's."""

    step: str
    best: float
    bound: float


@dataclass(frozen=True)
class SearchResult:
    """The best states found, their seconds and bytes, and a lower bound on the seconds of any states within the budget.

    `stopped` says that the search was interrupted; its result is then the best so far and its bound what was proved.
    """

    states: tuple[int, ...]
    seconds: float
    nbytes: float
    bound: float
    feasible: bool
    history: tuple[Progress, ...] = ()
    stopped: bool = False
    failures: tuple[str, ...] = ()
    """Sentences about optional parts that failed."""

    @property
    def gap(self) -> float:
        """How far the plan may be from the best one, as a part of its bound; 0 where it is proved best."""
        return max(0.0, self.seconds / self.bound - 1) if self.bound > 0 else 0.0


Report = Callable[[Progress], None]

"""The problem that a search solves, and its result.

A `Problem` is a cost network in numbers: per variable (an operator) the seconds and bytes of each
state, and per pair of variables that exchange values a table of seconds. Seconds and bytes of a
plan are sums of entries. A problem knows nothing of tensors; every algorithm of this folder
solves it.

Equal variables carry equal kinds, and so do equal tables: an algorithm computes once per kind.
Kinds are numbers inside the value, so a copy of a problem takes the same work as the original.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass

import numpy as np

Array = np.ndarray
States = Sequence[int]
"""A state of every variable."""
Ends = tuple[int, int]
"""The two variables of a table, the smaller number first."""
Tables = dict[Ends, Array]
"""Seconds between states of two variables, [state of the first, state of the second]."""


class EqualByContent:
    """Equality for dataclasses that hold arrays: field by field, arrays by their entries.

    Fields with `compare=False` do not count. Dataclasses without an equality of their own inside
    a field are compared the same way.
    """

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _equal_fields(self, other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


def _equal_fields(left: object, right: object) -> bool:
    for each in fields(left):  # pyright: ignore[reportArgumentType]
        name = each.name
        if each.compare and not _equal(getattr(left, name), getattr(right, name)):
            return False
    return True


def _equal(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and np.array_equal(left, right)
    if is_dataclass(left) and type(left).__eq__ is object.__eq__:
        return type(left) is type(right) and _equal_fields(left, right)
    if isinstance(left, Mapping):
        if not isinstance(right, Mapping) or left.keys() != right.keys():
            return False
        return all(_equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list | tuple):
        if not isinstance(right, list | tuple) or len(left) != len(right):
            return False
        return all(map(_equal, left, right))
    return left == right


@dataclass(frozen=True, eq=False)
class Problem(EqualByContent):
    """A cost network in numbers. `Problem.of` makes one from seconds, bytes and tables."""

    seconds: Sequence[Array]
    """Per variable, seconds by state."""
    nbytes: Sequence[Array]
    """Per variable, bytes by state."""
    tables: Mapping[Ends, Array]
    """`tables[u, v][i, j]`: seconds between state i of u and state j of v, u < v."""
    kinds: Sequence[int] = field(compare=False)
    """Number per variable: variables of one kind have equal seconds and bytes."""
    table_kinds: Mapping[Ends, int] = field(compare=False)
    """Number per table: tables of one kind are equal."""

    @staticmethod
    def of(
        seconds: Sequence[Array],
        nbytes: Sequence[Array],
        tables: Mapping[Ends, Array] | None = None,
    ) -> Problem:
        """The problem of these arrays; its kinds are read off their content.

        A table between u and v may be given either way round, and twice: then both add up.
        """
        joined: Tables = {}
        for (u, v), table in (tables or {}).items():
            add_table(joined, u, v, table)
        seconds_kinds = numbered(map(_content, seconds))
        nbytes_kinds = numbered(map(_content, nbytes))
        table_kinds = numbered(map(_content, joined.values()))
        return Problem(
            seconds=tuple(seconds),
            nbytes=tuple(nbytes),
            tables=joined,
            kinds=numbered(zip(seconds_kinds, nbytes_kinds, strict=True)),
            table_kinds=dict(zip(joined, table_kinds, strict=True)),
        )

    @staticmethod
    def distinct(
        seconds: Sequence[Array],
        nbytes: Sequence[Array],
        tables: Mapping[Ends, Array],
    ) -> Problem:
        """The problem of these arrays with every variable and every table a kind of its own."""
        table_kinds = {ends: kind for kind, ends in enumerate(tables)}
        return Problem(seconds, nbytes, tables, range(len(seconds)), table_kinds)

    @property
    def size(self) -> int:
        """Number of variables."""
        return len(self.seconds)

    def cost(self, states: States) -> float:
        """Seconds of a full assignment of states."""
        between = 0.0
        for (u, v), table in self.tables.items():
            between += table[states[u], states[v]]
        return float(_total(self.seconds, states) + between)

    def memory_bytes(self, states: States) -> float:
        """Bytes of a full assignment of states."""
        return float(_total(self.nbytes, states))


@dataclass(frozen=True)
class RecomputedProblem:
    """A problem with second copies of states, and their meaning."""

    problem: Problem
    origin: Sequence[Array]
    """Per operator, [state]: the state of the network."""
    again: Sequence[Array]
    """Per operator, [state]: whether the operator is computed again."""

    def lift(self, states: States) -> tuple[int, ...]:
        """States of the network."""
        pairs = zip(self.origin, states, strict=True)
        return tuple(int(origin[i]) for origin, i in pairs)

    def recomputed(self, states: States) -> tuple[int, ...]:
        """The operators that are computed again."""
        pairs = zip(self.again, states, strict=True)
        return tuple(o for o, (again, i) in enumerate(pairs) if again[i])

    def with_origin(self, states: States, origin: States) -> tuple[int, ...] | None:
        """The states of other ones of the network in which the same operators are computed again.

        None if an operator has no such state, because another one makes it needless.
        """
        changed = []
        for o, state in enumerate(states):
            is_equal = (self.origin[o] == origin[o]) & (self.again[o] == self.again[o][state])
            if not is_equal.any():
                return None
            changed.append(int(is_equal.argmax()))
        return tuple(changed)


def _total(arrays: Sequence[Array], states: States) -> float:
    """Sum of the entries of these states."""
    return sum(array[i] for array, i in zip(arrays, states, strict=True))


def _content(array: Array) -> tuple[object, ...]:
    """Key of an array, equal for equal arrays."""
    return array.shape, array.dtype.str, array.tobytes()


def numbered(keys: Iterable[Hashable]) -> tuple[int, ...]:
    """Number per key, equal for equal keys, in order of first appearance.

    >>> numbered("abca")
    (0, 1, 2, 0)
    """
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(key, len(numbers)) for key in keys)


def add_table(tables: Tables, u: int, v: int, table: Array) -> None:
    """Adds seconds between u and v, whose states are the rows and columns of `table`."""
    if u > v:
        u, v, table = v, u, table.T
    if (u, v) in tables:
        table = tables[u, v] + table
    tables[u, v] = table


Neighbour = tuple[int, Array]
"""(other variable, table with the variable's own states as rows)."""


def neighbour_tables(problem: Problem) -> list[list[Neighbour]]:
    """The neighbours of every variable."""
    neighbours: list[list[Neighbour]] = [[] for _ in range(problem.size)]
    for (u, v), table in problem.tables.items():
        neighbours[u].append((v, table))
        neighbours[v].append((u, table.T))
    return neighbours


def neighbour_sets(problem: Problem) -> list[set[int]]:
    """Per variable, the variables that share a table with it."""
    neighbours: list[set[int]] = [set() for _ in range(problem.size)]
    for u, v in problem.tables:
        neighbours[u].add(v)
        neighbours[v].add(u)
    return neighbours


@dataclass(frozen=True)
class Progress:
    """State of a running search: seconds of the best plan so far, lower bound on all plans."""

    step: str
    best: float
    bound: float


@dataclass(frozen=True)
class SearchResult:
    """The best states, their seconds and bytes, and a lower bound on all states within the budget.

    `stopped`: the search was interrupted. Its states are then the best so far, and its bound the
    one proved so far.
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
        """Distance to the best plan at most, as a part of the bound; 0 if proved best."""
        if self.bound <= 0:
            return 0.0
        return max(0.0, self.seconds / self.bound - 1)


Report = Callable[[Progress], None]

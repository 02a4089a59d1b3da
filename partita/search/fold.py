"""A cost network with equal operators as one variable: the blocks of a network that repeats itself take the same state.

Operators are equal if they have the same states and costs, and stand in the same tables beside equal operators (colours that are refined round by round, as
Weisfeiler and Leman do): so the first and the last blocks, whose neighbours are others, stay by themselves. Seconds and bytes of a plan are what they are in
the whole problem; what is given up is that equal blocks might be split otherwise, so the least sum is no bound on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.search.base import Problem

ROUNDS = 2
"""How far operators see: those that differ only further away are equal."""


@dataclass(frozen=True, eq=False)
class Folded:
    """The smaller problem, and per variable of the whole one the variable that stands for it."""

    problem: Problem
    of: Sequence[int]

    def lift(self, states: Sequence[int]) -> tuple[int, ...]:
        return tuple(states[v] for v in self.of)


def fold(problem: Problem) -> Folded:
    """The problem in which equal variables have equal states."""
    of = _colours(problem)
    count = Counter(of)
    first = {colour: v for v, colour in reversed([*enumerate(of)])}
    seconds = [count[c] * problem.seconds[first[c]] for c in range(len(count))]
    nbytes = [count[c] * problem.nbytes[first[c]] for c in range(len(count))]
    found = Problem(seconds, nbytes)
    tables = {id(table): table for table in problem.tables.values()}
    alike = Counter((of[u], of[v], id(table)) for (u, v), table in problem.tables.items())
    for (u, v, name), times in alike.items():
        if u == v:
            seconds[u] = seconds[u] + times * np.diagonal(tables[name])
        else:
            found.add_table(u, v, times * tables[name])
    return Folded(found, of)


def _colours(problem: Problem) -> list[int]:
    """A number per variable that equal ones share. What is shared is known by being the same array (`search.network`)."""
    near: list[list[tuple[int, int, bool]]] = [[] for _ in problem.seconds]
    for (u, v), table in problem.tables.items():
        near[u].append((v, id(table), False))
        near[v].append((u, id(table), True))
    colours = _numbered(
        [(id(s), id(b)) for s, b in zip(problem.seconds, problem.nbytes, strict=True)]
    )
    for _ in range(ROUNDS):
        colours = _numbered(
            [
                (colours[v], *sorted((colours[n], table, turned) for n, table, turned in mine))
                for v, mine in enumerate(near)
            ]
        )
    return colours


def _numbered(keys: Sequence[object]) -> list[int]:
    number: dict[object, int] = {}
    return [number.setdefault(key, len(number)) for key in keys]

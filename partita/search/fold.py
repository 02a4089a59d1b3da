"""A cost network with equal operators as one variable: repeated blocks take the same state.

Operators are equal if they have the same states and costs, and stand in the same tables beside
equal operators. Colours are refined round by round (Weisfeiler and Leman), so the first and the
last blocks, which have other neighbours, stay variables of their own.

Seconds and bytes of a plan are those of the whole problem. The price: equal blocks cannot be split
differently, so the least sum of the folded problem is no bound on the whole one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.search.base import Ends, Problem, add_table, numbered

ROUNDS = 2
"""Rounds of refinement: operators that differ only further away than this are equal."""


@dataclass(frozen=True)
class Folded:
    """The smaller problem, and per variable of the whole one the folded variable for it."""

    problem: Problem
    representative: tuple[int, ...]

    def lift(self, states: Sequence[int]) -> tuple[int, ...]:
        """States of the whole problem."""
        return tuple(states[v] for v in self.representative)


def fold(problem: Problem) -> Folded:
    """The problem in which equal variables have equal states."""
    colours = _colours(problem)
    counts = Counter(colours)
    first = {colour: v for v, colour in reversed([*enumerate(colours)])}
    seconds = [counts[colour] * problem.seconds[first[colour]] for colour in range(len(counts))]
    nbytes = [counts[colour] * problem.nbytes[first[colour]] for colour in range(len(counts))]
    tables: dict[Ends, np.ndarray] = {}
    table_of_kind = {problem.table_kinds[ends]: table for ends, table in problem.tables.items()}
    occurrences = Counter(
        (colours[u], colours[v], kind) for (u, v), kind in problem.table_kinds.items()
    )
    for (u, v, kind), times in occurrences.items():
        table = table_of_kind[kind]
        if u == v:
            seconds[u] = seconds[u] + times * np.diagonal(table)
        else:
            add_table(tables, u, v, times * table)
    return Folded(Problem.distinct(seconds, nbytes, tables), colours)


def _colours(problem: Problem) -> tuple[int, ...]:
    """Number per variable, the same for equal variables."""
    around: list[list[tuple[int, int, bool]]] = [[] for _ in range(problem.size)]
    for (u, v), kind in problem.table_kinds.items():
        around[u].append((v, kind, False))
        around[v].append((u, kind, True))
    colours = numbered(problem.kinds)
    for _ in range(ROUNDS):
        keys = []
        for v, tables in enumerate(around):
            seen_colours = sorted((colours[n], kind, turned) for n, kind, turned in tables)
            keys.append((colours[v], *seen_colours))
        colours = numbered(keys)
    return colours

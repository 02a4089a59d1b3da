"""A cost network with equal operators as one variable: repeated blocks take the same state.

Operators are equal if they have the same states and costs, and stand in the same tables beside
equal operators. Colours are refined round by round (Weisfeiler and Leman), so the first and the
last blocks, which have other neighbours, stay variables of their own.

Seconds and bytes of a plan are those of the whole problem. The price: equal blocks cannot be split
differently, so the least sum of the folded problem is no bound on the whole one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from partita.search.base import Problem, States, Tables, add_table, numbered

ROUNDS = 2
"""Rounds of refinement: operators that differ only further away than this are equal."""


@dataclass(frozen=True)
class Folded:
    """The smaller problem, and per variable of the whole one the folded variable for it."""

    problem: Problem
    representative: tuple[int, ...]

    def lift(self, states: States) -> tuple[int, ...]:
        """States of the whole problem."""
        return tuple(states[v] for v in self.representative)


def fold(problem: Problem) -> Folded:
    """The problem in which equal variables have equal states."""
    colours = _colours(problem)
    seconds = []
    nbytes = []
    for colour, count in Counter(colours).items():
        first = colours.index(colour)
        seconds.append(count * problem.seconds[first])
        nbytes.append(count * problem.nbytes[first])
    table_of_kind = {}
    folded_tables = []
    for (u, v), table in problem.tables.items():
        kind = problem.table_kinds[u, v]
        table_of_kind[kind] = table
        folded_tables.append((colours[u], colours[v], kind))
    tables: Tables = {}
    for (u, v, kind), times in Counter(folded_tables).items():
        table = table_of_kind[kind]
        if u == v:
            seconds[u] = seconds[u] + times * np.diagonal(table)
        else:
            add_table(tables, u, v, times * table)
    return Folded(Problem.distinct(seconds, nbytes, tables), colours)


def _colours(problem: Problem) -> tuple[int, ...]:
    """Number per variable, the same for equal variables."""
    colours = numbered(problem.kinds)
    for _ in range(ROUNDS):
        around: list[list[tuple[int, int, bool]]] = [[] for _ in colours]
        for (u, v), kind in problem.table_kinds.items():
            around[u].append((colours[v], kind, False))
            around[v].append((colours[u], kind, True))
        keys = []
        for colour, tables in zip(colours, around, strict=True):
            tables.sort()
            keys.append((colour, *tables))
        colours = numbered(keys)
    return colours

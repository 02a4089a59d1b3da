"""A smaller problem with the same optimum.

1. States that no neighbour can tell apart are merged: equal rows in every table.
2. States that another state beats under all states of the neighbours are dropped. This is dead-end
   elimination (Goldstein, Biophysical Journal 1994): state j beats i if it takes no more bytes and
   i costs more even where the neighbours suit i best. It holds for every price of memory.

Equal variables between equal tables are reduced once: the work grows with the number of kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from partita.search.base import Array, Ends, Problem, States, numbered

RIVALS = 10
"""States of a variable that all others are compared with: the best ones beside ideal neighbours."""


@dataclass(frozen=True)
class Reduced:
    """A smaller problem, and per variable the original number of each of its states."""

    problem: Problem
    origin: tuple[tuple[int, ...], ...]

    def lift(self, states: States) -> tuple[int, ...]:
        """States of the original problem."""
        pairs = zip(self.origin, states, strict=True)
        return tuple(origin[i] for origin, i in pairs)


def reduce(problem: Problem) -> Reduced:
    """The problem without states that cannot be better than the remaining ones."""
    merged = _merge(problem)
    smaller = _restrict(problem, merged)
    surviving = _drop_beaten(smaller)
    origin = []
    for first, second in zip(merged.states, surviving.states, strict=True):
        original = first[second]
        origin.append(tuple(original.tolist()))
    return Reduced(_restrict(smaller, surviving), tuple(origin))


class _Selection(NamedTuple):
    """Per variable the selected states, and a kind: equal kinds select equal states."""

    states: Sequence[Array]
    kinds: Sequence[int]


def _restrict(problem: Problem, selection: _Selection) -> Problem:
    """The problem of the selected states."""
    states, kinds = selection
    seconds: dict[int, Array] = {}
    nbytes: dict[int, Array] = {}
    for v, kind in enumerate(kinds):
        if kind not in seconds:
            seconds[kind] = problem.seconds[v][states[v]]
            nbytes[kind] = problem.nbytes[v][states[v]]
    keys = {}
    for (u, v), kind in problem.table_kinds.items():
        keys[u, v] = (kind, kinds[u], kinds[v])
    table_kinds = dict(zip(keys, numbered(keys.values()), strict=True))
    tables: dict[int, Array] = {}
    for (u, v), kind in table_kinds.items():
        if kind not in tables:
            rows_and_columns = np.ix_(states[u], states[v])
            tables[kind] = problem.tables[u, v][rows_and_columns]
    return Problem(
        seconds=[seconds[kind] for kind in kinds],
        nbytes=[nbytes[kind] for kind in kinds],
        tables={ends: tables[kind] for ends, kind in table_kinds.items()},
        kinds=kinds,
        table_kinds=table_kinds,
    )


class _Side(NamedTuple):
    """A table as one of its variables sees it; that variable's states are columns if `turned`."""

    kind: int
    ends: Ends
    turned: bool

    def table(self, problem: Problem) -> Array:
        """The table with the variable's states as rows."""
        table = problem.tables[self.ends]
        return table.T if self.turned else table

    @property
    def key(self) -> tuple[int, bool]:
        """Equal for equal tables that are seen from the same side."""
        return self.kind, self.turned


def _sides(problem: Problem) -> list[list[_Side]]:
    """Per variable, its tables."""
    sides: list[list[_Side]] = [[] for _ in range(problem.size)]
    for (u, v), kind in problem.table_kinds.items():
        sides[u].append(_Side(kind, (u, v), False))
        sides[v].append(_Side(kind, (u, v), True))
    return sides


def _kinds_with_tables(problem: Problem, sides: Sequence[Sequence[_Side]]) -> tuple[int, ...]:
    """Number per variable, equal for equal variables with equal tables in the same order."""
    keys = []
    for kind, around in zip(problem.kinds, sides, strict=True):
        table_keys = [side.key for side in around]
        keys.append((kind, *table_keys))
    return numbered(keys)


def _merge(problem: Problem) -> _Selection:
    """The states that remain when states with equal rows in every table are merged."""
    sides = _sides(problem)
    kinds = _kinds_with_tables(problem, sides)
    classes: dict[tuple[int, bool], Array] = {}
    states: dict[int, Array] = {}
    for v, kind in enumerate(kinds):
        if kind in states:
            continue
        row_classes = []
        for side in sides[v]:
            if side.key not in classes:
                classes[side.key] = _row_classes(side.table(problem))
            row_classes.append(classes[side.key])
        seconds = problem.seconds[v]
        nbytes = problem.nbytes[v]
        states[kind] = pareto_states(seconds, nbytes, row_classes)
    return _Selection([states[kind] for kind in kinds], kinds)


def _row_classes(table: Array) -> Array:
    """Number per row, equal for equal rows."""
    rows = np.ascontiguousarray(table)
    return np.array(numbered(row.tobytes() for row in rows))


def pareto_states(seconds: Array, nbytes: Array, row_classes: Sequence[Array]) -> Array:
    """Of all states with equal rows in every table, the Pareto front of seconds and bytes."""
    label = np.zeros(len(seconds), np.int64)
    for classes in row_classes:
        pairs = label * len(seconds) + classes
        _, label = np.unique(pairs, return_inverse=True)
    front = []
    last_label = -1
    lightest = np.inf
    for i in np.lexsort((nbytes, seconds, label)):
        if label[i] != last_label:
            lightest = np.inf
        if nbytes[i] < lightest:
            lightest = nbytes[i]
            front.append(i)
        last_label = label[i]
    return np.array(sorted(front))


def _drop_beaten(problem: Problem) -> _Selection:
    """The states that no rival beats."""
    sides = _sides(problem)
    kinds = _kinds_with_tables(problem, sides)
    states: dict[int, Array] = {}
    for v, kind in enumerate(kinds):
        if kind in states:
            continue
        tables = [side.table(problem) for side in sides[v]]
        seconds = problem.seconds[v]
        nbytes = problem.nbytes[v]
        states[kind] = _unbeaten(seconds, nbytes, tables)
    return _Selection([states[kind] for kind in kinds], kinds)


def _least_differences(table: Array, rows: Array, rival: int) -> Array:
    """Per row of a table the least difference from the row of a rival."""
    chosen = table[rows]
    chosen -= table[rival]
    return chosen.min(axis=1)


def _unbeaten(seconds: Array, nbytes: Array, tables: Sequence[Array]) -> Array:
    """The states of one variable that no rival beats; `tables` have its states as rows."""
    zero = np.zeros(len(seconds))
    least_moves = [table.min(axis=1) for table in tables]
    suited = seconds + sum(least_moves, zero)
    alive = np.ones(len(seconds), bool)
    best_first = np.argsort(suited, kind="stable")
    for j in best_first[:RIVALS]:
        if not alive[j]:
            continue
        rows = np.flatnonzero(alive & (nbytes >= nbytes[j]))
        margin = seconds[rows] - seconds[j]
        for table in tables:
            margin += _least_differences(table, rows, j)
        alive[rows[margin > 1e-9 * abs(suited[j])]] = False
    return np.flatnonzero(alive)

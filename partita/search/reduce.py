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

import numpy as np

from partita.search.base import Ends, Problem, numbered

RIVALS = 10
"""States of a variable that all others are compared with: the best ones beside ideal neighbours."""


@dataclass(frozen=True)
class Reduced:
    """A smaller problem, and per variable the original number of each of its states."""

    problem: Problem
    origin: tuple[tuple[int, ...], ...]

    def lift(self, states: Sequence[int]) -> tuple[int, ...]:
        """States of the original problem."""
        return tuple(origin[i] for origin, i in zip(self.origin, states, strict=True))


def reduce(problem: Problem) -> Reduced:
    """The problem without states that cannot be better than the remaining ones."""
    merged = _merge(problem)
    smaller = _restrict(problem, merged)
    surviving = _drop_beaten(smaller)
    origin = tuple(
        tuple(first[second].tolist())
        for first, second in zip(merged.states, surviving.states, strict=True)
    )
    return Reduced(_restrict(smaller, surviving), origin)


@dataclass(frozen=True, eq=False)
class _Selection:
    """Per variable the selected states, and a kind: equal kinds select equal states."""

    states: Sequence[np.ndarray]
    kinds: Sequence[int]


def _restrict(problem: Problem, selection: _Selection) -> Problem:
    """The problem of the selected states."""
    states, kinds = selection.states, selection.kinds
    seconds: dict[int, np.ndarray] = {}
    nbytes: dict[int, np.ndarray] = {}
    for v, kind in enumerate(kinds):
        if kind not in seconds:
            seconds[kind] = problem.seconds[v][states[v]]
            nbytes[kind] = problem.nbytes[v][states[v]]
    keys = [(problem.table_kinds[u, v], kinds[u], kinds[v]) for u, v in problem.tables]
    table_kinds: dict[Ends, int] = dict(zip(problem.tables, numbered(keys), strict=True))
    cut: dict[int, np.ndarray] = {}
    for (u, v), kind in table_kinds.items():
        if kind not in cut:
            cut[kind] = problem.tables[u, v][np.ix_(states[u], states[v])]
    return Problem(
        seconds=[seconds[kind] for kind in kinds],
        nbytes=[nbytes[kind] for kind in kinds],
        tables={ends: cut[kind] for ends, kind in table_kinds.items()},
        kinds=kinds,
        table_kinds=table_kinds,
    )


def _neighbourhoods(problem: Problem) -> list[list[tuple[Ends, bool]]]:
    """Per variable, (ends of a table, whether the variable's states are its columns)."""
    around: list[list[tuple[Ends, bool]]] = [[] for _ in range(problem.size)]
    for u, v in problem.tables:
        around[u].append(((u, v), False))
        around[v].append(((u, v), True))
    return around


def _kinds_with_tables(
    problem: Problem, around: Sequence[Sequence[tuple[Ends, bool]]]
) -> tuple[int, ...]:
    """Number per variable, equal for equal variables with equal tables in the same order."""
    keys = []
    for kind, tables in zip(problem.kinds, around, strict=True):
        keys.append((kind, *((problem.table_kinds[ends], turned) for ends, turned in tables)))
    return numbered(keys)


def _oriented(problem: Problem, ends: Ends, turned: bool) -> np.ndarray:
    return problem.tables[ends].T if turned else problem.tables[ends]


def _merge(problem: Problem) -> _Selection:
    """The states that remain when states with equal rows in every table are merged."""
    around = _neighbourhoods(problem)
    row_classes: dict[tuple[int, bool], np.ndarray] = {}
    for ends, kind in problem.table_kinds.items():
        for turned in (False, True):
            if (kind, turned) not in row_classes:
                row_classes[kind, turned] = _row_classes(_oriented(problem, ends, turned))
    kinds = _kinds_with_tables(problem, around)
    states: dict[int, np.ndarray] = {}
    for v, kind in enumerate(kinds):
        if kind not in states:
            classes = [row_classes[problem.table_kinds[ends], turned] for ends, turned in around[v]]
            states[kind] = _pareto_states(problem.seconds[v], problem.nbytes[v], classes)
    return _Selection([states[kind] for kind in kinds], kinds)


def _row_classes(table: np.ndarray) -> np.ndarray:
    """Number per row, equal for equal rows."""
    return np.array(numbered(row.tobytes() for row in np.ascontiguousarray(table)))


def _pareto_states(
    seconds: np.ndarray, nbytes: np.ndarray, row_classes: Sequence[np.ndarray]
) -> np.ndarray:
    """Of all states with equal rows in every table, the Pareto front of seconds and bytes."""
    label = np.zeros(len(seconds), np.int64)
    for classes in row_classes:
        pairs = np.stack([label, classes])
        label = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
    front = []
    last_label = -1
    lightest = np.inf
    for i in np.lexsort((nbytes, seconds, label)):
        if label[i] != last_label:
            last_label = label[i]
            lightest = np.inf
        if nbytes[i] < lightest:
            front.append(i)
            lightest = nbytes[i]
    return np.array(sorted(front))


def _drop_beaten(problem: Problem) -> _Selection:
    """The states that no rival beats."""
    around = _neighbourhoods(problem)
    kinds = _kinds_with_tables(problem, around)
    states: dict[int, np.ndarray] = {}
    for v, kind in enumerate(kinds):
        if kind not in states:
            tables = [_oriented(problem, ends, turned) for ends, turned in around[v]]
            states[kind] = _unbeaten(problem.seconds[v], problem.nbytes[v], tables)
    return _Selection([states[kind] for kind in kinds], kinds)


def _unbeaten(seconds: np.ndarray, nbytes: np.ndarray, tables: Sequence[np.ndarray]) -> np.ndarray:
    """The states of one variable that no rival beats; `tables` have its states as rows."""
    zero = np.zeros(len(seconds))
    suited = seconds + sum((table.min(axis=1) for table in tables), zero)
    alive = np.ones(len(seconds), bool)
    for j in np.argsort(suited, kind="stable")[:RIVALS]:
        if not alive[j]:
            continue
        differences = sum(((table - table[j]).min(axis=1) for table in tables), zero)
        margin = seconds - seconds[j] + differences
        slower = margin > 1e-9 * abs(suited[j])
        alive &= ~(slower & (nbytes >= nbytes[j]))
    return np.flatnonzero(alive)

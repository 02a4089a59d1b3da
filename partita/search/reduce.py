"""A smaller problem with the same optimum: states that no neighbour can tell apart are merged, and states that another beats
whatever the neighbours do are dropped.

The second is dead-end elimination (Goldstein, Biophysical Journal 1994): state j beats i if it takes no more bytes and even where the
neighbours suit i best, i costs more. It holds for every price of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partita.search.base import Problem


@dataclass
class Reduced:
    """A smaller problem, and per variable the state of the whole problem that each of its states stands for."""

    problem: Problem
    origin: list[np.ndarray]

    def lift(self, states: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(o[i]) for o, i in zip(self.origin, states, strict=True))


def reduce(problem: Problem) -> Reduced:
    """The problem without states that cannot be better than those that are left.

    Equal operators share their arrays, and what is computed from the same arrays is computed once.
    """
    keys = _seen_alike(problem)
    found: dict[tuple[int, ...], np.ndarray] = {}
    origin = []
    for v, own in enumerate(keys):
        key = (id(problem.seconds[v]), id(problem.nbytes[v]), *map(id, own))
        if key not in found:
            found[key] = _merged(problem, v, own)
        origin.append(found[key])
    once = _restricted(problem, origin)
    kept = _undominated(once)
    return Reduced(_restricted(once, kept), [o[k] for o, k in zip(origin, kept, strict=True)])


def _restricted(problem: Problem, kept: list[np.ndarray]) -> Problem:
    made: dict[tuple[int, ...], np.ndarray] = {}

    def part(whole: np.ndarray, *states: np.ndarray) -> np.ndarray:
        key = (id(whole), *map(id, states))
        if key not in made:
            made[key] = whole[np.ix_(*states)]
        return made[key]

    return Problem(
        [part(s, k) for s, k in zip(problem.seconds, kept, strict=True)],
        [part(b, k) for b, k in zip(problem.nbytes, kept, strict=True)],
        {(u, v): part(t, kept[u], kept[v]) for (u, v), t in problem.tables.items()},
    )


def _seen_alike(problem: Problem) -> list[list[np.ndarray]]:
    """Per variable and table, a number per state that states with equal rows share."""
    keys: list[list[np.ndarray]] = [[] for _ in range(problem.size)]
    numbered: dict[tuple[int, bool], np.ndarray] = {}
    for (u, v), table in problem.tables.items():
        for at, turned in ((u, False), (v, True)):
            if (id(table), turned) not in numbered:
                numbered[id(table), turned] = _classes(table.T if turned else table)
            keys[at].append(numbered[id(table), turned])
    return keys


def _merged(problem: Problem, v: int, keys: list[np.ndarray]) -> np.ndarray:
    """Of all states with equal rows in every table, those that are best in seconds or bytes (the Pareto front)."""
    label = np.zeros(len(problem.seconds[v]), np.int64)
    for k in keys:
        label = np.unique(np.stack([label, k]), axis=1, return_inverse=True)[1].reshape(-1)
    keep, last, least = [], -1, np.inf
    for i in np.lexsort((problem.nbytes[v], problem.seconds[v], label)):
        if label[i] != last:
            last, least = label[i], np.inf
        if problem.nbytes[v][i] < least:
            keep.append(i)
            least = problem.nbytes[v][i]
    return np.array(sorted(keep))


RIVALS = 10
"""States of a variable that all others are held against: those that look best when every neighbour suits them."""


def _undominated(problem: Problem) -> list[np.ndarray]:
    near: list[list[tuple[np.ndarray, bool]]] = [[] for _ in range(problem.size)]
    for (u, v), t in problem.tables.items():
        near[u].append((t, False))
        near[v].append((t, True))
    found: dict[tuple[int, ...], np.ndarray] = {}
    kept = []
    for seconds, nbytes, tables in zip(problem.seconds, problem.nbytes, near, strict=True):
        key = (id(seconds), id(nbytes), *(2 * id(t) + turned for t, turned in tables))
        if key not in found:
            found[key] = _best(seconds, nbytes, [t.T if turned else t for t, turned in tables])
        kept.append(found[key])
    return kept


def _best(seconds: np.ndarray, nbytes: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    """The states of one variable that no rival beats; `tables` have its states as rows."""
    zero = np.zeros(len(seconds))
    suited = seconds + sum((t.min(axis=1) for t in tables), zero)
    alive = np.ones(len(seconds), bool)
    for j in np.argsort(suited, kind="stable")[:RIVALS]:
        if alive[j]:
            margin = seconds - seconds[j] + sum(((t - t[j]).min(axis=1) for t in tables), zero)
            alive &= ~((margin > 1e-9 * abs(suited[j])) & (nbytes >= nbytes[j]))
    return np.flatnonzero(alive)


def _classes(table: np.ndarray) -> np.ndarray:
    """Per row, a number that equal rows share."""
    seen: dict[bytes, int] = {}
    return np.array(
        [seen.setdefault(row.tobytes(), len(seen)) for row in np.ascontiguousarray(table)]
    )

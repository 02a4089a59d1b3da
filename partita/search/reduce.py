"""Merges states that no neighbour can tell apart, keeping the cheapest: the same optimum, far smaller tables."""

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
    """Keeps, of all states with equal rows in every table, those that are best in seconds or bytes (the Pareto front)."""
    keys: list[list[np.ndarray]] = [[] for _ in range(problem.size)]
    for (u, v), table in problem.tables.items():
        keys[u].append(_classes(table))
        keys[v].append(_classes(table.T))
    origin = []
    for v in range(problem.size):
        count = len(problem.seconds[v])
        label = np.zeros(count, np.int64)
        for k in keys[v]:
            label = np.unique(np.stack([label, k]), axis=1, return_inverse=True)[1].reshape(-1)
        order = np.lexsort((problem.nbytes[v], problem.seconds[v], label))
        keep, last, least = [], -1, np.inf
        for i in order:
            if label[i] != last:
                last, least = label[i], np.inf
            if problem.nbytes[v][i] < least:
                keep.append(i)
                least = problem.nbytes[v][i]
        origin.append(np.array(sorted(keep)))
    tables = {(u, v): t[np.ix_(origin[u], origin[v])] for (u, v), t in problem.tables.items()}
    return Reduced(
        Problem([s[o] for s, o in zip(problem.seconds, origin, strict=True)],
                [b[o] for b, o in zip(problem.nbytes, origin, strict=True)], tables), origin,
    )  # fmt: skip


def _classes(table: np.ndarray) -> np.ndarray:
    """Per row, a number that equal rows share."""
    seen: dict[bytes, int] = {}
    return np.array([seen.setdefault(row.tobytes(), len(seen)) for row in np.ascontiguousarray(table)])

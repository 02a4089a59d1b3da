"""A bound on every plan of a cost network, good states, and which states no best plan has: sequential tree-reweighted message passing.

Kolmogorov, "Convergent Tree-Reweighted Message Passing for Energy Minimization" (PAMI 2006). Messages move cost between variables and tables
without changing the sum of any assignment. The sum of all least entries is then a lower bound, which rises from sweep to sweep towards that of
the linear relaxation; on a cost network of a few hundred operators with a hundred states each a sweep takes some ten milliseconds. An entry that lies
further above the least than the bound lies below a known plan is in no better plan, and is dropped (reduced-cost fixing): what is
left is small enough to be solved exactly (`search.elimination`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numba import njit

from partita.search.base import Problem


@dataclass(eq=False)
class Messages:
    """The messages of a problem's tables. They stay good where only the variables' own costs change: another price of memory starts from them."""

    problem: Problem
    first: np.ndarray = field(init=False)
    """Where each variable's states begin, in one array of all."""

    def __post_init__(self) -> None:
        tables, sizes = self.problem.tables, np.array([len(s) for s in self.problem.seconds])
        self.first = np.concatenate([[0], np.cumsum(sizes)])
        self._ends = np.array([*tables], np.int64).reshape(-1, 2)
        at: dict[int, int] = {}
        data, size = [], 0
        for table in tables.values():
            if id(table) not in at:
                at[id(table)] = size
                data.append(np.ascontiguousarray(table, float).reshape(-1))
                size += table.size
        self._data = np.concatenate([*data, np.zeros(1)])
        self._table = np.array([at[id(t)] for t in tables.values()], np.int64)
        near: list[list[int]] = [[] for _ in sizes]
        for e, (u, v) in enumerate(self._ends):
            near[u].append(e)
            near[v].append(e)
        self._near_first = np.concatenate([[0], np.cumsum([len(mine) for mine in near])])
        self._near = np.array([e for mine in near for e in mine], np.int64)
        lengths = sizes[self._ends] if len(self._ends) else np.zeros((0, 2), np.int64)
        self._to = (np.cumsum(lengths.reshape(-1)) - lengths.reshape(-1)).reshape(
            -1, 2
        )  # [e, 0]: the message to u begins here; [e, 1]: that to v
        self._messages = np.zeros(int(lengths.sum()))

    @property
    def _where(self) -> tuple[np.ndarray, ...]:
        return (
            self.first,
            self._ends,
            self._data,
            self._table,
            self._near_first,
            self._near,
            self._to,
        )

    def sweep(self, own: np.ndarray, times: int = 1) -> float:
        """Passes over all variables forth and back, `times` over; the bound that holds for costs `own` of all states and the tables."""
        bound = -np.inf
        for _ in range(times):
            _pass(False, own, self._messages, *self._where)
            bound = _pass(True, own, self._messages, *self._where)
        return bound

    def states(self, own: np.ndarray) -> tuple[int, ...]:
        """States chosen one after the other, with what the messages say of those to come."""
        return tuple(_decoded(own, self._messages, *self._where).tolist())

    def kept(self, own: np.ndarray, margin: float) -> list[np.ndarray]:
        """Per variable the states that a plan may have that is no more than `margin` above the bound of the last sweep."""
        over = _over(own, self._messages, *self._where)
        return [np.flatnonzero(over[a:b] <= margin) for a, b in itertools.pairwise(self.first)]

    def moved(self, own: np.ndarray, kept: Sequence[np.ndarray]) -> Problem:
        """The problem of the kept states, its costs moved by the messages: no assignment's sum is another, and its least entries sum to the bound."""
        hat, share = _hats(own, self._messages, *self._where)
        seconds, tables = [], {}
        for v, states in enumerate(kept):
            mine = hat[self.first[v] : self.first[v + 1]]
            later = np.count_nonzero(self._ends[:, 1] == v)
            seconds.append((mine * (1 - later * share[v]))[states])
        for e, ((u, v), table) in enumerate(self.problem.tables.items()):
            to_u = self._messages[self._to[e, 0] : self._to[e, 0] + table.shape[0]][kept[u]]
            to_v = self._messages[self._to[e, 1] : self._to[e, 1] + table.shape[1]][kept[v]]
            given = share[v] * hat[self.first[v] : self.first[v + 1]][kept[v]]
            tables[u, v] = table[np.ix_(kept[u], kept[v])] - to_u[:, None] - (to_v - given)[None, :]
        return Problem(
            seconds,
            [b[states] for b, states in zip(self.problem.nbytes, kept, strict=True)],
            tables,
        )


@njit(cache=True)
def _hat(v, own, messages, first, ends, near_first, near, to, hat):  # noqa: ANN001, ANN202
    """Writes a variable's cost with all messages to it; (tables to earlier variables, tables to later ones)."""
    a, n = first[v], first[v + 1] - first[v]
    for x in range(n):
        hat[x] = own[a + x]
    earlier = later = 0
    for j in range(near_first[v], near_first[v + 1]):
        e = near[j]
        side = 1 if ends[e, 1] == v else 0
        if side:
            earlier += 1
        else:
            later += 1
        m = to[e, side]
        for x in range(n):
            hat[x] += messages[m + x]
    return earlier, later


@njit(cache=True, fastmath={"nnan", "nsz"})
def _pass(back, own, messages, first, ends, data, table, near_first, near, to):  # noqa: ANN001, ANN202
    """One pass over all variables: the messages on (to later ones, or `back` to earlier ones), and the bound that they give."""
    count = len(first) - 1
    widest = 0
    for v in range(count):
        widest = max(widest, first[v + 1] - first[v])
    hat, give, out = np.empty(widest), np.empty(widest), np.empty(widest)
    bound = 0.0
    for step in range(count):
        v = count - 1 - step if back else step
        n = first[v + 1] - first[v]
        earlier, later = _hat(v, own, messages, first, ends, near_first, near, to, hat)
        share = 1.0 / max(earlier, later, 1)
        least = np.inf
        for x in range(n):
            least = min(least, hat[x])
        bound += (1 - share * (earlier if back else later)) * least
        for j in range(near_first[v], near_first[v + 1]):
            e = near[j]
            if (ends[e, 1] == v) != back:
                continue
            mine, theirs = (1, 0) if back else (0, 1)
            m, w = to[e, mine], ends[e, theirs]
            k, at, r = first[w + 1] - first[w], table[e], to[e, theirs]
            for x in range(n):
                give[x] = share * hat[x] - messages[m + x]
            low = np.inf
            if back:  # rows are the other's states
                for y in range(k):
                    best = np.inf
                    row = at + y * n
                    for x in range(n):
                        best = min(best, give[x] + data[row + x])
                    out[y] = best
                    low = min(low, best)
            else:
                for y in range(k):
                    out[y] = give[0] + data[at + y]
                for x in range(1, n):
                    g, row = give[x], at + x * k
                    for y in range(k):
                        out[y] = min(out[y], g + data[row + y])
                for y in range(k):
                    low = min(low, out[y])
            for y in range(k):
                messages[r + y] = out[y] - low
            bound += low
    return bound


@njit(cache=True)
def _hats(own, messages, first, ends, data, table, near_first, near, to):  # noqa: ANN001, ANN202
    """Every variable's cost with all messages to it, and the part of it that each of its tables to earlier ones takes."""
    count = len(first) - 1
    hat, share = np.empty(first[count]), np.empty(count)
    for v in range(count):
        earlier, later = _hat(
            v, own, messages, first, ends, near_first, near, to, hat[first[v] : first[v + 1]]
        )
        share[v] = 1.0 / max(earlier, later, 1)
    return hat, share


@njit(cache=True)
def _over(own, messages, first, ends, data, table, near_first, near, to):  # noqa: ANN001, ANN202
    """How far the least sum with each state lies above the bound, at least; after a pass back."""
    count = len(first) - 1
    hat, share = _hats(own, messages, first, ends, data, table, near_first, near, to)
    over = np.zeros(first[count])
    for v in range(count):
        earlier = 0
        for j in range(near_first[v], near_first[v + 1]):
            earlier += ends[near[j], 1] == v
        least = hat[first[v] : first[v + 1]].min()
        for x in range(first[v], first[v + 1]):
            over[x] = (1 - earlier * share[v]) * (hat[x] - least)
    for e in range(len(ends)):
        u, v = ends[e]
        n, k, at = first[u + 1] - first[u], first[v + 1] - first[v], table[e]
        rows, columns = np.full(n, np.inf), np.full(k, np.inf)
        for x in range(n):
            to_u = messages[to[e, 0] + x]
            for y in range(k):
                cost = (
                    data[at + x * k + y]
                    - to_u
                    - messages[to[e, 1] + y]
                    + share[v] * hat[first[v] + y]
                )
                rows[x] = min(rows[x], cost)
                columns[y] = min(columns[y], cost)
        least = rows.min()
        for x in range(n):
            over[first[u] + x] += rows[x] - least
        for y in range(k):
            over[first[v] + y] += columns[y] - least
    return over


@njit(cache=True)
def _decoded(own, messages, first, ends, data, table, near_first, near, to):  # noqa: ANN001, ANN202
    count = len(first) - 1
    chosen = np.zeros(count, np.int64)
    for v in range(count):
        n = first[v + 1] - first[v]
        cost = own[first[v] : first[v + 1]].copy()
        for j in range(near_first[v], near_first[v + 1]):
            e = near[j]
            if ends[e, 1] == v:
                row = table[e] + chosen[ends[e, 0]] * n
                for x in range(n):
                    cost[x] += data[row + x]
            else:
                for x in range(n):
                    cost[x] += messages[to[e, 0] + x]
        chosen[v] = np.argmin(cost)
    return chosen

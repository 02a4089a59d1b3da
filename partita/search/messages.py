"""Sequential tree-reweighted message passing on a cost network.

Kolmogorov, "Convergent Tree-Reweighted Message Passing for Energy Minimization" (PAMI 2006).
It gives three things: a lower bound on every plan, good states, and the states that no best plan
has.

Messages move cost between variables and tables without changing the sum of any assignment. The sum
of all least entries is then a lower bound, which rises from sweep to sweep towards that of the
linear relaxation. On a cost network of a few hundred operators with a hundred states each, a sweep
takes some ten milliseconds.

Reduced-cost fixing: a state is dropped if its entry lies further above the least one than a known
plan lies above the bound. The remaining problem is small enough for an exact solution
(`search.elimination`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from partita.search.base import Ends, Problem


class Network(NamedTuple):
    """The tables of a problem for compiled code; tables of one kind are stored once.

    Tables of variable v are `near[near_first[v]:near_first[v + 1]]`.
    """

    first: np.ndarray
    """Per variable, the start of its states in one array of all; and the end of the last."""
    ends: np.ndarray
    """[table, 2]: its variables, the smaller number first."""
    data: np.ndarray
    """Tables, end to end."""
    table: np.ndarray
    """Start of each table in `data`."""
    near_first: np.ndarray
    near: np.ndarray
    to: np.ndarray
    """[table, 2]: start of the messages to its first and to its second variable."""


class Messages:
    """The messages of a problem's tables.

    They stay valid if only the variables' costs change: another price of memory starts from them.
    The methods take `costs`, the costs of all states of all variables in one array.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.network = _network(problem)
        sizes = np.diff(self.network.first)
        self._messages = np.zeros(int(sizes[self.network.ends].sum()))

    @property
    def first(self) -> np.ndarray:
        """Per variable, the start of its states in one array of all."""
        return self.network.first

    def sweep(self, costs: np.ndarray, times: int = 1) -> float:
        """Passes over all variables forth and back; the lower bound for these costs."""
        bound = -np.inf
        for _ in range(times):
            _pass(False, costs, self._messages, self.network)
            bound = _pass(True, costs, self._messages, self.network)
        return bound

    def states(self, costs: np.ndarray) -> tuple[int, ...]:
        """States chosen one after the other, with the messages of variables not chosen yet."""
        return tuple(_decoded(costs, self._messages, self.network).tolist())

    def possible(self, costs: np.ndarray, margin: float) -> list[np.ndarray]:
        """Per variable, the states of all plans at most `margin` above the last sweep's bound."""
        excess = _excess(costs, self._messages, self.network)
        return [np.flatnonzero(excess[a:b] <= margin) for a, b in itertools.pairwise(self.first)]

    def reparametrized(self, costs: np.ndarray, states: Sequence[np.ndarray]) -> Problem:
        """The problem of some states of each variable, its costs moved by the messages.

        Every assignment has the same sum as before, and the least entries sum to the bound.
        """
        network, messages = self.network, self._messages
        hats, share = _hats(costs, messages, network)
        hat = [hats[a:b][chosen] for (a, b), chosen in zip(self._slices(), states, strict=True)]
        seconds = []
        for v, values in enumerate(hat):
            tables_to_earlier = np.count_nonzero(network.ends[:, 1] == v)
            seconds.append(values * (1 - tables_to_earlier * share[v]))
        tables: dict[Ends, np.ndarray] = {}
        for e, ((u, v), table) in enumerate(self.problem.tables.items()):
            rows, columns = table.shape
            to_u = messages[network.to[e, 0] :][:rows][states[u]]
            to_v = messages[network.to[e, 1] :][:columns][states[v]]
            given = share[v] * hat[v]
            chosen = table[np.ix_(states[u], states[v])]
            tables[u, v] = chosen - to_u[:, None] - (to_v - given)[None, :]
        nbytes = [b[chosen] for b, chosen in zip(self.problem.nbytes, states, strict=True)]
        return Problem.distinct(seconds, nbytes, tables)

    def _slices(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise(self.first.tolist()))


def _network(problem: Problem) -> Network:
    sizes = np.array([len(seconds) for seconds in problem.seconds], np.int64)
    ends = np.array([*problem.tables], np.int64).reshape(-1, 2)
    begin: dict[int, int] = {}
    data: list[np.ndarray] = []
    size = 0
    for pair, table in problem.tables.items():
        kind = problem.table_kinds[pair]
        if kind not in begin:
            begin[kind] = size
            data.append(np.ascontiguousarray(table, float).reshape(-1))
            size += table.size
    near: list[list[int]] = [[] for _ in sizes]
    for e, (u, v) in enumerate(ends):
        near[u].append(e)
        near[v].append(e)
    lengths = sizes[ends].reshape(-1)
    return Network(
        first=np.concatenate([[0], np.cumsum(sizes)]),
        ends=ends,
        data=np.concatenate([*data, np.zeros(1)]),
        table=np.array([begin[problem.table_kinds[pair]] for pair in problem.tables], np.int64),
        near_first=np.concatenate([[0], np.cumsum([len(tables) for tables in near])]),
        near=np.array([e for tables in near for e in tables], np.int64),
        to=(np.cumsum(lengths) - lengths).reshape(-1, 2),
    )


@njit(cache=True)
def _hat(v, costs, messages, network, hat):
    """Writes the costs of a variable with all messages to it into `hat` (the paper's symbol).

    Returns:
        (number of tables to earlier variables, number of tables to later ones).
    """
    begin = network.first[v]
    size = network.first[v + 1] - begin
    for x in range(size):
        hat[x] = costs[begin + x]
    earlier = 0
    later = 0
    for j in range(network.near_first[v], network.near_first[v + 1]):
        e = network.near[j]
        side = 1 if network.ends[e, 1] == v else 0
        if side:
            earlier += 1
        else:
            later += 1
        message = network.to[e, side]
        for x in range(size):
            hat[x] += messages[message + x]
    return earlier, later


@njit(cache=True, fastmath={"nnan", "nsz"})
def _pass(back, costs, messages, network):
    """One pass over all variables, which updates messages; the lower bound.

    It updates the messages to later variables, or to earlier ones if `back`.
    """
    count = len(network.first) - 1
    widest = 0
    for v in range(count):
        widest = max(widest, network.first[v + 1] - network.first[v])
    hat = np.empty(widest)
    give = np.empty(widest)
    out = np.empty(widest)
    near_side = 1 if back else 0
    far_side = 0 if back else 1
    bound = 0.0
    for step in range(count):
        v = count - 1 - step if back else step
        size = network.first[v + 1] - network.first[v]
        earlier, later = _hat(v, costs, messages, network, hat)
        share = 1.0 / max(earlier, later, 1)
        minimum = np.inf
        for x in range(size):
            minimum = min(minimum, hat[x])
        bound += (1 - share * (earlier if back else later)) * minimum
        for j in range(network.near_first[v], network.near_first[v + 1]):
            e = network.near[j]
            if (network.ends[e, 1] == v) != back:
                continue
            incoming = network.to[e, near_side]
            for x in range(size):
                give[x] = share * hat[x] - messages[incoming + x]
            other = network.ends[e, far_side]
            other_size = network.first[other + 1] - network.first[other]
            begin = network.table[e]
            if back:
                minimum = _row_minima(network.data, begin, give, size, out, other_size)
            else:
                minimum = _column_minima(network.data, begin, give, size, out, other_size)
            outgoing = network.to[e, far_side]
            for y in range(other_size):
                messages[outgoing + y] = out[y] - minimum
            bound += minimum
    return bound


@njit(cache=True, fastmath={"nnan", "nsz"})
def _row_minima(data, begin, give, size, out, other_size):
    """out[y] = least give[x] + table[y, x] over x; the least of all."""
    minimum = np.inf
    for y in range(other_size):
        best = np.inf
        row = begin + y * size
        for x in range(size):
            best = min(best, give[x] + data[row + x])
        out[y] = best
        minimum = min(minimum, best)
    return minimum


@njit(cache=True, fastmath={"nnan", "nsz"})
def _column_minima(data, begin, give, size, out, other_size):
    """out[y] = least give[x] + table[x, y] over x; the least of all."""
    for y in range(other_size):
        out[y] = give[0] + data[begin + y]
    for x in range(1, size):
        given = give[x]
        row = begin + x * other_size
        for y in range(other_size):
            out[y] = min(out[y], given + data[row + y])
    minimum = np.inf
    for y in range(other_size):
        minimum = min(minimum, out[y])
    return minimum


@njit(cache=True)
def _hats(costs, messages, network):
    """Costs of all variables with all messages to them, and each variable's share per table."""
    first = network.first
    count = len(first) - 1
    hats = np.empty(first[count])
    share = np.empty(count)
    for v in range(count):
        hat = hats[first[v] : first[v + 1]]
        earlier, later = _hat(v, costs, messages, network, hat)
        share[v] = 1.0 / max(earlier, later, 1)
    return hats, share


@njit(cache=True)
def _excess(costs, messages, network):
    """Per state, a lower bound on its least sum above the bound; to be called after a pass back."""
    first = network.first
    count = len(first) - 1
    hats, share = _hats(costs, messages, network)
    excess = np.zeros(first[count])
    for v in range(count):
        earlier = 0
        for j in range(network.near_first[v], network.near_first[v + 1]):
            earlier += network.ends[network.near[j], 1] == v
        minimum = hats[first[v] : first[v + 1]].min()
        for x in range(first[v], first[v + 1]):
            excess[x] = (1 - earlier * share[v]) * (hats[x] - minimum)
    for e in range(len(network.ends)):
        u, v = network.ends[e]
        rows, columns = _table_minima(e, share[v], hats, messages, network)
        minimum = rows.min()
        for x in range(len(rows)):
            excess[first[u] + x] += rows[x] - minimum
        for y in range(len(columns)):
            excess[first[v] + y] += columns[y] - minimum
    return excess


@njit(cache=True)
def _table_minima(e, share, hats, messages, network):
    """Least entry per row and per column of a table, its costs moved by the messages."""
    u, v = network.ends[e]
    first = network.first
    height = first[u + 1] - first[u]
    width = first[v + 1] - first[v]
    rows = np.full(height, np.inf)
    columns = np.full(width, np.inf)
    for x in range(height):
        row = network.table[e] + x * width
        to_u = messages[network.to[e, 0] + x]
        for y in range(width):
            to_v = messages[network.to[e, 1] + y]
            cost = network.data[row + y] - to_u - to_v + share * hats[first[v] + y]
            rows[x] = min(rows[x], cost)
            columns[y] = min(columns[y], cost)
    return rows, columns


@njit(cache=True)
def _decoded(costs, messages, network):
    """States chosen one after the other."""
    first = network.first
    count = len(first) - 1
    chosen = np.zeros(count, np.int64)
    for v in range(count):
        size = first[v + 1] - first[v]
        cost = costs[first[v] : first[v + 1]].copy()
        for j in range(network.near_first[v], network.near_first[v + 1]):
            e = network.near[j]
            if network.ends[e, 1] == v:
                row = network.table[e] + chosen[network.ends[e, 0]] * size
                for x in range(size):
                    cost[x] += network.data[row + x]
            else:
                for x in range(size):
                    cost[x] += messages[network.to[e, 0] + x]
        chosen[v] = np.argmin(cost)
    return chosen

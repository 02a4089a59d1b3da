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

from partita.search.base import Array, Problem, Tables
from partita.search.minima import least_of


class Network(NamedTuple):
    """The tables of a problem for compiled code; tables of one kind are stored once.

    Tables of variable v are `near[near_first[v]:near_first[v + 1]]`.
    """

    first: Array
    """Per variable, the start of its states in one array of all; and the end of the last."""
    ends: Array
    """[table, 2]: its variables, the smaller number first."""
    data: Array
    """Tables, end to end."""
    table: Array
    """Start of each table in `data`."""
    near_first: Array
    near: Array
    to: Array
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
    def first(self) -> Array:
        """Per variable, the start of its states in one array of all."""
        return self.network.first

    def sweep(self, costs: Array, times: int = 1) -> float:
        """Passes over all variables forth and back; the lower bound for these costs."""
        bound = -np.inf
        for _ in range(times):
            _pass(False, costs, self._messages, self.network)
            bound = _pass(True, costs, self._messages, self.network)
        return bound

    def states(self, costs: Array) -> tuple[int, ...]:
        """States chosen one after the other, with the messages of variables not chosen yet."""
        return tuple(_decoded(costs, self._messages, self.network).tolist())

    def possible(self, costs: Array, margin: float) -> list[Array]:
        """Per variable, the states of all plans at most `margin` above the last sweep's bound."""
        excess = _excess(costs, self._messages, self.network)
        return [np.flatnonzero(values <= margin) for values in self._by_variable(excess)]

    def reparametrized(self, costs: Array, states: Sequence[Array]) -> Problem:
        """The problem of some states of each variable, its costs moved by the messages.

        Every assignment has the same sum as before, and the least entries sum to the bound.
        """
        problem = self.problem
        second_variables = self.network.ends[:, 1]
        hats, shares = _hats(costs, self._messages, self.network)
        hats = _select(self._by_variable(hats), states)
        seconds = []
        for v, hat in enumerate(hats):
            earlier = np.count_nonzero(second_variables == v)
            seconds.append(hat * (1 - earlier * shares[v]))
        tables: Tables = {}
        for e, (u, v) in enumerate(problem.tables):
            to_u, to_v = self._messages_of(e)
            from_u = to_u[states[u]]
            from_v = to_v[states[v]] - shares[v] * hats[v]
            rows_and_columns = np.ix_(states[u], states[v])
            chosen = problem.tables[u, v][rows_and_columns]
            tables[u, v] = chosen - from_u[:, None] - from_v[None, :]
        nbytes = _select(problem.nbytes, states)
        return Problem.distinct(seconds, nbytes, tables)

    def _by_variable(self, values: Array) -> list[Array]:
        """Values of all states, as one array per variable."""
        return np.split(values, self.first[1:-1])

    def _messages_of(self, table: int) -> tuple[Array, Array]:
        """The messages of a table to its first and its second variable."""
        sizes = np.diff(self.first)
        u, v = self.network.ends[table]
        to_u, to_v = self.network.to[table]
        return self._messages[to_u : to_u + sizes[u]], self._messages[to_v : to_v + sizes[v]]


def _select(values: Sequence[Array], states: Sequence[Array]) -> list[Array]:
    """Per variable, the values of some of its states."""
    return [array[chosen] for array, chosen in zip(values, states, strict=True)]


def _network(problem: Problem) -> Network:
    sizes = np.array(list(map(len, problem.seconds)), np.int64)
    ends = np.array([*problem.tables], np.int64).reshape(-1, 2)
    begin: dict[int, int] = {}
    begins: list[int] = []
    data: list[Array] = []
    size = 0
    for pair, table in problem.tables.items():
        kind = problem.table_kinds[pair]
        if kind not in begin:
            begin[kind] = size
            flat = np.ascontiguousarray(table, float)
            data.append(flat.reshape(-1))
            size += table.size
        begins.append(begin[kind])
    near: list[list[int]] = [[] for _ in sizes]
    for e, (u, v) in enumerate(ends):
        near[u].append(e)
        near[v].append(e)
    near_sizes = list(map(len, near))
    lengths = sizes[ends].reshape(-1)
    message_ends = np.cumsum(lengths)
    return Network(
        first=np.cumsum([0, *sizes]),
        ends=ends,
        data=np.concatenate([*data, np.zeros(1)]),
        table=np.array(begins, np.int64),
        near_first=np.cumsum([0, *near_sizes]),
        near=np.array(list(itertools.chain(*near)), np.int64),
        to=(message_ends - lengths).reshape(-1, 2),
    )


@njit(cache=True)
def _hat(v, costs, messages, network, hat):
    """Writes the costs of a variable with all messages to it into `hat` (the paper's symbol).

    Returns:
        (number of tables to earlier variables, number of tables to later ones).
    """
    near_first = network.near_first
    near = network.near
    ends = network.ends
    to = network.to
    begin = network.first[v]
    size = network.first[v + 1] - begin
    for x in range(size):
        hat[x] = costs[begin + x]
    earlier = 0
    later = 0
    for j in range(near_first[v], near_first[v + 1]):
        e = near[j]
        side = 1 if ends[e, 1] == v else 0
        if side:
            earlier += 1
        else:
            later += 1
        message = to[e, side]
        for x in range(size):
            hat[x] += messages[message + x]
    return earlier, later


@njit(cache=True, fastmath={"nnan", "nsz"})
def _pass(back, costs, messages, network):
    """One pass over all variables, which updates messages; the lower bound.

    It updates the messages to later variables, or to earlier ones if `back`.
    """
    first = network.first
    ends = network.ends
    to = network.to
    count = len(first) - 1
    widest = _widest(first)
    hat = np.empty(widest)
    give = np.empty(widest)
    out = np.empty(widest)
    near_side = 1 if back else 0
    far_side = 0 if back else 1
    bound = 0.0
    for step in range(count):
        v = count - 1 - step if back else step
        size = first[v + 1] - first[v]
        earlier, later = _hat(v, costs, messages, network, hat)
        share = 1.0 / max(earlier, later, 1)
        passed = earlier if back else later
        minimum = np.inf
        for x in range(size):
            minimum = min(minimum, hat[x])
        bound += (1 - share * passed) * minimum
        for j in range(network.near_first[v], network.near_first[v + 1]):
            e = network.near[j]
            if (ends[e, 1] == v) != back:
                continue
            incoming = to[e, near_side]
            for x in range(size):
                message = messages[incoming + x]
                give[x] = share * hat[x] - message
            other = ends[e, far_side]
            other_size = first[other + 1] - first[other]
            begin = network.table[e]
            if back:
                minimum = _row_minima(network.data, begin, give, size, out, other_size)
            else:
                minimum = _column_minima(network.data, begin, give, size, out, other_size)
            outgoing = to[e, far_side]
            for y in range(other_size):
                messages[outgoing + y] = out[y] - minimum
            bound += minimum
    return bound


@njit(cache=True)
def _widest(first):
    """Largest number of states of a variable."""
    widest = 0
    for v in range(len(first) - 1):
        size = first[v + 1] - first[v]
        widest = max(widest, size)
    return widest


@njit(cache=True, fastmath={"nnan", "nsz"})
def _row_minima(data, begin, give, size, out, other_size):
    """out[y] = least give[x] + table[y, x] over x; the least of all."""
    minimum = np.inf
    for y in range(other_size):
        best = np.inf
        row = begin + y * size
        for x in range(size):
            cost = give[x] + data[row + x]
            best = min(best, cost)
        out[y] = best
        minimum = min(minimum, best)
    return minimum


@njit(cache=True, fastmath={"nnan", "nsz"})
def _column_minima(data, begin, give, size, out, other_size):
    """out[y] = least give[x] + table[x, y] over x; the least of all."""
    least = np.full(other_size, np.inf)
    lowered = np.empty(other_size)
    for x in range(size):
        given = give[x]
        row = begin + x * other_size
        for y in range(other_size):
            lowered[y] = min(least[y], given + data[row + y])
        least, lowered = lowered, least
    out[:other_size] = least
    return least_of(least)


@njit(cache=True)
def _hats(costs, messages, network):
    """Costs of all variables with all messages to them, and each variable's share per table."""
    first = network.first
    count = len(first) - 1
    hats = np.empty(first[count])
    shares = np.empty(count)
    for v in range(count):
        hat = hats[first[v] : first[v + 1]]
        earlier, later = _hat(v, costs, messages, network, hat)
        shares[v] = 1.0 / max(earlier, later, 1)
    return hats, shares


@njit(cache=True)
def _excess(costs, messages, network):
    """Per state, a lower bound on its least sum above the bound; to be called after a pass back."""
    first = network.first
    ends = network.ends
    count = len(first) - 1
    hats, shares = _hats(costs, messages, network)
    excess = np.zeros(first[count])
    for v in range(count):
        earlier = 0
        for j in range(network.near_first[v], network.near_first[v + 1]):
            e = network.near[j]
            earlier += ends[e, 1] == v
        hat = hats[first[v] : first[v + 1]]
        minimum = hat.min()
        remaining = 1 - earlier * shares[v]
        for x in range(len(hat)):
            excess[first[v] + x] = remaining * (hat[x] - minimum)
    for e in range(len(ends)):
        u, v = ends[e]
        given = shares[v] * hats[first[v] : first[v + 1]]
        rows, columns = _table_minima(e, given, messages, network)
        minimum = rows.min()
        for x in range(len(rows)):
            excess[first[u] + x] += rows[x] - minimum
        for y in range(len(columns)):
            excess[first[v] + y] += columns[y] - minimum
    return excess


@njit(cache=True)
def _table_minima(e, given, messages, network):
    """Least entry per row and per column of a table, its costs moved by the messages.

    `given`: by state of the second variable, the cost that it gives to the table.
    """
    u, v = network.ends[e]
    height = network.first[u + 1] - network.first[u]
    width = network.first[v + 1] - network.first[v]
    begin = network.table[e]
    data = network.data
    begin_u, begin_v = network.to[e]
    rows = np.full(height, np.inf)
    columns = np.full(width, np.inf)
    for x in range(height):
        row = begin + x * width
        to_u = messages[begin_u + x]
        for y in range(width):
            to_v = messages[begin_v + y]
            cost = data[row + y] - to_u - to_v + given[y]
            rows[x] = min(rows[x], cost)
            columns[y] = min(columns[y], cost)
    return rows, columns


@njit(cache=True)
def _decoded(costs, messages, network):
    """States chosen one after the other."""
    first = network.first
    ends = network.ends
    data = network.data
    count = len(first) - 1
    chosen = np.zeros(count, np.int64)
    for v in range(count):
        size = first[v + 1] - first[v]
        cost = costs[first[v] : first[v + 1]].copy()
        for j in range(network.near_first[v], network.near_first[v + 1]):
            e = network.near[j]
            if ends[e, 1] == v:
                earlier = ends[e, 0]
                row = network.table[e] + chosen[earlier] * size
                for x in range(size):
                    cost[x] += data[row + x]
            else:
                message = network.to[e, 0]
                for x in range(size):
                    cost[x] += messages[message + x]
        chosen[v] = np.argmin(cost)
    return chosen

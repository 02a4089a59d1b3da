"""The best states of a cost network, exactly.

1. Messages (`search.messages`) give a bound and states. On most networks the two meet: done.
2. Otherwise states that no better plan has are dropped, and variables are eliminated with min-plus
   products (bucket elimination): take a variable, write down the best that it can add for every
   combination of its neighbours' states, drop it. This is node and edge elimination of OptCNN (Jia
   et al., ICML 2018, section 5) for any graph. The states of eliminated variables are then read
   backwards. The time follows the largest table, so variables with few neighbours go first.
3. A bucket whose joint table would be too large is cut into mini-buckets (Dechter and Rish, JACM
   2003), each minimised by itself. The result is still a lower bound, with a plan above it.

Memory is priced (Lagrangian relaxation): seconds + price x bytes is minimised for a rising price
until the bytes fit. For every price, the minimum minus price x budget is a lower bound on all plans
that fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numba import njit
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from partita.search.base import (
    Array,
    Problem,
    Progress,
    Report,
    SearchResult,
    States,
    Tables,
    neighbour_sets,
    neighbour_tables,
)
from partita.search.fold import fold
from partita.search.messages import Messages

MAX_ENTRIES = 120_000_000
"""Entries of a joint table above which a bucket is cut: plan and bound may then lie apart."""
MAX_RISES = 24
"""Times that the price of a byte is raised until a plan fits, at most."""
LAST_PRICE = 1e6
"""Highest price of a byte, over one at which bytes cost as much as choices differ."""
SMALLEST_PRICE = 64
"""Price of a budget of bytes over the least seconds of a step, where no plan fits."""
SMALL = 1e-3
"""Share of the differences between choices that counts as the least seconds, at least."""
ROUNDS = 24
"""Refinements of the price at which plans fit, at most."""

SWEEPS = 5
"""Sweeps of messages between two comparisons of bound and states."""
FIRST_SWEEPS = (1, 1, 3)
"""The same for the first of them: two sweeps are enough for most networks of repeated blocks."""
MAX_SWEEPS = 100
CLOSE = 1e-9
"""Relative distance from a bound at which states count as the best."""
CLOSE_BOUND = 1e-3
"""The same where only a bound at one price is needed."""
PASSES = 20
"""Passes of `_polish` over all variables, at most."""

Chosen = tuple[int, ...]
"""A state of every variable."""
Scope = tuple[int, ...]
"""Variables of a table, or dims."""
Factor = tuple[Scope, Array]
"""Variables and a table over their states."""


class _History:
    """The progress of a search, passed on to its caller."""

    def __init__(self, report: Report | None) -> None:
        self.progress: list[Progress] = []
        self._report = report

    def add(self, step: str, best: float, bound: float) -> None:
        self.progress.append(Progress(step, best, bound))
        if self._report is not None:
            self._report(self.progress[-1])


def eliminate(
    problem: Problem,
    budget: float = np.inf,
    report: Report | None = None,
    rounds: int = ROUNDS,
) -> SearchResult:
    """The states of least seconds within a budget of bytes, with a lower bound.

    `rounds` limits the refinements of the price of memory. If no plan fits, the states are the
    smallest in bytes that the search came across, and the result is not `feasible`.
    """
    priced = PricedProblem(problem)
    history = _History(report)
    answer = _Answer(None, None, 0.0)
    stopped = False
    priced_answer = None
    try:
        if least_bytes(problem) > budget:
            priced_answer = _smallest(priced, budget)
        elif math.isfinite(budget):
            priced_answer = _price_folded(priced, budget, history, rounds)
        if priced_answer is not None:
            answer = priced_answer
        else:
            answer = _fastest(priced)
            fastest = answer.smallest
            assert fastest is not None
            seconds = problem.cost(fastest)
            if problem.memory_bytes(fastest) > budget:
                history.add("without a limit on memory", seconds, answer.bound)
                search = _PriceSearch(priced, budget, fastest, answer.bound)
                answer = search.run(history, rounds)
            else:
                exact = seconds <= answer.bound * (1 + CLOSE)
                history.add("exact" if exact else "bounded", seconds, answer.bound)
    except KeyboardInterrupt:
        stopped = True
    states = answer.best or answer.smallest
    if states is None:
        states = _least(problem.seconds)
    nbytes = problem.memory_bytes(states)
    return SearchResult(
        states=states,
        seconds=problem.cost(states),
        nbytes=nbytes,
        bound=answer.bound,
        feasible=nbytes <= budget,
        history=tuple(history.progress),
        stopped=stopped,
    )


@dataclass(frozen=True)
class _Answer:
    """The best states that fit, the smallest states in bytes, and a lower bound."""

    best: Chosen | None
    smallest: Chosen | None
    bound: float


def _least(values: Sequence[Array]) -> Chosen:
    """Per variable, the state of the least value."""
    return tuple(int(np.argmin(array)) for array in values)


def _fastest(priced: PricedProblem) -> _Answer:
    """The answer without a limit on memory."""
    states, bound = priced.solve(0.0)
    return _Answer(states, states, min(bound, priced.problem.cost(states)))


def least_bytes(problem: Problem) -> float:
    """Bytes below which there is no plan."""
    return sum(float(nbytes.min()) for nbytes in problem.nbytes)


def _smallest(priced: PricedProblem, budget: float) -> _Answer:
    """The answer where no plan fits: a plan of about the fewest bytes, at a price that decides.

    A higher price would take the last bytes off at any expense.
    """
    problem = priced.problem
    fastest = sum(float(seconds.min()) for seconds in problem.seconds)
    price = SMALLEST_PRICE * max(fastest / max(budget, 1.0), SMALL * _price_scale(problem, budget))
    states, minimum = priced.solve(price)
    return _Answer(None, states, minimum - price * budget)


def _price_scale(problem: Problem, budget: float, bound: float = 0.0) -> float:
    """Seconds of a byte with which the bytes of a budget cost as much as choices differ."""
    spread = sum(float(np.ptp(seconds)) for seconds in problem.seconds)
    return max(bound, spread, 1e-12) / max(budget, 1.0)


def _price_folded(
    priced: PricedProblem,
    budget: float,
    history: _History,
    rounds: int,
) -> _Answer | None:
    """The answer by way of the folded problem, for networks of repeated blocks.

    The price of a byte is searched with equal variables as one, and the whole problem is solved
    once, at that price. None where fewer than half of the variables are equal to others, where no
    folded plan fits, or where no price is needed.
    """
    problem = priced.problem
    folded = fold(problem)
    if 2 * folded.problem.size > problem.size:
        return None
    small = PricedProblem(folded.problem)
    fastest, bound = small.solve(0.0)
    if folded.problem.memory_bytes(fastest) <= budget:
        return None
    search = _PriceSearch(small, budget, fastest, bound)
    answer = search.run(_History(None), rounds)
    if answer.best is None or answer.smallest is None:
        return None
    price = search.price_of_bound
    states, minimum = priced.solve(price, CLOSE_BOUND)
    candidates = [folded.lift(answer.best), states]
    candidates.append(folded.lift(search.too_large.states))
    fitting = [one for one in candidates if problem.memory_bytes(one) <= budget]
    for small_states, large_states in itertools.permutations(candidates, 2):
        if small_states in fitting:
            fitting.append(_filled(problem, budget, small_states, large_states))
    best = min((_polish(problem, budget, one) for one in fitting), key=problem.cost)
    seconds = problem.cost(best)
    bound = min(minimum - price * budget, seconds)
    history.add("pricing memory", seconds, bound)
    return _Answer(best, folded.lift(answer.smallest), bound)


@dataclass(frozen=True)
class _Priced:
    """States that are best at a price of a byte."""

    price: float
    states: Chosen


class _PriceSearch:
    """The search for the price of a byte at which plans fit the budget.

    A plan's seconds + price x bytes is a line over the price, and the least of all plans a concave
    curve of such lines. The next price is where two lines meet: that of the last plan that does not
    fit and that of the last one that does. Where neither is beaten there, no price gives more.
    """

    def __init__(
        self,
        priced: PricedProblem,
        budget: float,
        fastest: Chosen,
        bound: float,
    ) -> None:
        self.priced = priced
        self.problem = priced.problem
        self.budget = budget
        self.bound = bound
        self.price_of_bound = 0.0
        self.best: Chosen | None = None
        self.smallest = fastest
        self.too_large = _Priced(0.0, fastest)

    def run(self, history: _History, rounds: int) -> _Answer:
        """Raises the price until a plan fits, then refines it."""
        fitting = self._raise_price()
        if fitting is not None:
            self.best = fitting.states
            self._refine(fitting, history, rounds)
        if self.best is not None:
            filled = _filled(self.problem, self.budget, self.best, self.too_large.states)
            self.best = _polish(self.problem, self.budget, filled)
            self.bound = min(self.bound, self.problem.cost(self.best))
        return _Answer(self.best, self.smallest, self.bound)

    def _solve(self, price: float) -> Chosen:
        """The best states at a price; updates the bound."""
        states, minimum = self.priced.solve(price)
        bound = minimum - price * self.budget
        if bound > self.bound:
            self.bound = bound
            self.price_of_bound = price
        return states

    def _raise_price(self) -> _Priced | None:
        """The first plan that fits at a rising price. None if the price does not decide."""
        problem = self.problem
        scale = _price_scale(problem, self.budget, self.bound)
        price = scale / 16
        for _ in range(MAX_RISES):
            states = self._solve(price)
            nbytes = problem.memory_bytes(states)
            if nbytes < problem.memory_bytes(self.smallest):
                self.smallest = states
            if nbytes <= self.budget:
                return _Priced(price, states)
            self.too_large = _Priced(price, states)
            price *= 4
            if price > LAST_PRICE * scale:
                self._use_lightest()
                break
        return None

    def _use_lightest(self) -> None:
        """Falls back to the lightest state of each variable."""
        lightest = _least(self.problem.nbytes)
        self.smallest = min(self.smallest, lightest, key=self.problem.memory_bytes)
        if self.problem.memory_bytes(self.smallest) <= self.budget:
            self.best = self.smallest

    def _refine(self, fitting: _Priced, history: _History, rounds: int) -> None:
        """Searches between the last price that does not fit and the last one that does."""
        problem = self.problem
        assert self.best is not None
        for _ in range(rounds):
            price = self._meeting_price(fitting)
            if not self.too_large.price < price < fitting.price:
                break
            states = self._solve(price)
            meeting_cost = self._priced_cost(fitting.states, price)
            if problem.memory_bytes(states) <= self.budget:
                fitting = _Priced(price, states)
                if problem.cost(states) < problem.cost(self.best):
                    self.best = states
            else:
                self.too_large = _Priced(price, states)
            seconds = problem.cost(self.best)
            history.add("pricing memory", seconds, self.bound)
            if seconds <= self.bound * (1 + CLOSE):
                break
            if self._priced_cost(states, price) >= meeting_cost * (1 - 1e-12):
                break

    def _meeting_price(self, fitting: _Priced) -> float:
        """The price at which the plan that fits and the one that does not cost the same."""
        problem = self.problem
        over = fitting.states
        under = self.too_large.states
        saved_bytes = problem.memory_bytes(under) - problem.memory_bytes(over)
        if saved_bytes <= 0:
            return self.too_large.price
        extra_seconds = problem.cost(over) - problem.cost(under)
        return extra_seconds / saved_bytes

    def _priced_cost(self, states: Chosen, price: float) -> float:
        nbytes = self.problem.memory_bytes(states)
        return self.problem.cost(states) + price * nbytes


def _filled(problem: Problem, budget: float, fitting: States, faster: States) -> Chosen:
    """States that fit, with parts of faster ones for the bytes that are left.

    A part is a connected set of variables whose states differ: its seconds and bytes do not depend
    on other parts. Those that gain most seconds per byte come first (the greedy rule of a
    knapsack).
    """
    differs = [one != other for one, other in zip(fitting, faster, strict=True)]
    inside = [ends for ends in problem.tables if differs[ends[0]] and differs[ends[1]]]
    rows, columns = np.array(inside, np.int64).reshape(-1, 2).T
    edges = csr_array((np.ones(len(rows)), (rows, columns)), shape=(problem.size, problem.size))
    count, part = connected_components(edges, directed=False)
    seconds = np.zeros(count)
    nbytes = np.zeros(count)
    for v in itertools.compress(range(problem.size), differs):
        seconds[part[v]] += problem.seconds[v][faster[v]] - problem.seconds[v][fitting[v]]
        nbytes[part[v]] += problem.nbytes[v][faster[v]] - problem.nbytes[v][fitting[v]]
    for (u, v), table in problem.tables.items():
        if differs[u] or differs[v]:
            change = table[faster[u], faster[v]] - table[fitting[u], fitting[v]]
            seconds[part[u if differs[u] else v]] += change
    left = budget - problem.memory_bytes(fitting)
    chosen = np.zeros(count, bool)
    gains = np.where(nbytes > 0, -seconds / np.maximum(nbytes, 1), np.inf)
    for one in np.argsort(-gains, kind="stable"):
        if seconds[one] < 0 and nbytes[one] <= left:
            chosen[one] = True
            left -= nbytes[one]
    pairs = zip(fitting, faster, part, strict=True)
    return tuple(other if chosen[one_part] else one for one, other, one_part in pairs)


def _polish(problem: Problem, budget: float, states: States) -> Chosen:
    """Changes one variable at a time to its best state that still fits, until nothing gains."""
    current = list(states)
    total_bytes = problem.memory_bytes(current)
    neighbours = neighbour_tables(problem)
    for _ in range(PASSES):
        changed = False
        for v in range(problem.size):
            total = problem.seconds[v].copy()
            for other, table in neighbours[v]:
                total += table[:, current[other]]
            nbytes = problem.nbytes[v]
            state = current[v]
            fits = total_bytes - nbytes[state] + nbytes <= budget
            total[~fits] = np.inf
            best = int(np.argmin(total))
            if total[best] < total[state] * (1 - 1e-12) - 1e-15:
                total_bytes += nbytes[best] - nbytes[state]
                current[v] = best
                changed = True
        if not changed:
            break
    return tuple(current)


class PricedProblem:
    """A problem whose bytes have a price. Each solution starts from the messages of the last."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.messages = Messages(problem)
        self.seconds = np.concatenate(problem.seconds)
        self.nbytes = np.concatenate(problem.nbytes)

    def solve(self, price: float, close: float = CLOSE) -> tuple[Chosen, float]:
        """(states, lower bound) for seconds + price x bytes.

        The states attain the bound, up to its part `close`, wherever no bucket had to be cut.
        """
        costs = self.seconds + price * self.nbytes
        by_variable = np.split(costs, self.messages.first[1:-1])
        priced = replace(self.problem, seconds=by_variable)
        best = None
        best_cost = np.inf
        bound = -np.inf
        previous = -np.inf
        for number, sweeps in enumerate(_sweeps()):
            bound = max(bound, self.messages.sweep(costs, sweeps))
            states = _polish(priced, np.inf, self.messages.states(costs))
            cost = priced.cost(states)
            if cost < best_cost:
                best = states
                best_cost = cost
            if best_cost - bound <= close * abs(best_cost):
                break
            if number + 1 < len(FIRST_SWEEPS):
                continue
            if bound - previous < 0.02 * (best_cost - bound):
                break
            previous = bound
        assert best is not None
        if best_cost - bound > close * abs(best_cost):
            states, eliminated_bound = self._eliminate(costs, best_cost)
            states = _polish(priced, np.inf, states)
            bound = max(bound, min(eliminated_bound, best_cost))
            cost = priced.cost(states)
            if cost < best_cost:
                best = states
                best_cost = cost
        return best, min(bound, best_cost)

    def _eliminate(self, costs: Array, best_cost: float) -> tuple[Chosen, float]:
        """(states, lower bound) by elimination, without states of no plan below `best_cost`."""
        bound = self.messages.sweep(costs)
        margin = (best_cost - bound) * (1 + CLOSE) + CLOSE * abs(best_cost)
        possible = self.messages.possible(costs, margin)
        smaller = self.messages.reparametrized(costs, possible)
        positions, bound = _eliminated(smaller)
        pairs = zip(possible, positions, strict=True)
        return tuple(int(states[i]) for states, i in pairs), bound


def _sweeps() -> Iterator[int]:
    """The sweeps before each comparison of bound and states."""
    yield from FIRST_SWEEPS
    for _ in range(sum(FIRST_SWEEPS), MAX_SWEEPS, SWEEPS):
        yield SWEEPS


def _eliminated(problem: Problem) -> tuple[list[int], float]:
    """(states, lower bound) of a problem by bucket elimination, without a price of memory."""
    problem = _without_fixed(problem)
    order = _elimination_order(problem)
    rank = {v: i for i, v in enumerate(order)}
    sizes = list(map(len, problem.seconds))
    buckets: list[list[Factor]] = [[] for _ in order]

    def put(scope: Scope, table: Array) -> None:
        """Adds a factor to the bucket of its first variable in the order."""
        first = min(rank[n] for n in scope)
        buckets[first].append((scope, table))

    for v, seconds in enumerate(problem.seconds):
        put((v,), seconds)
    for ends, table in problem.tables.items():
        put(ends, table)
    bound = 0.0
    for v, bucket in zip(order, buckets, strict=True):
        for factors in _mini_buckets(v, bucket, sizes):
            others, minimum = _minimised(v, factors, sizes)
            if others:
                put(others, minimum)
            else:
                bound += float(minimum)
    return _states_backwards(order, buckets, sizes), bound


def _states_backwards(
    order: list[int],
    buckets: list[list[Factor]],
    sizes: list[int],
) -> list[int]:
    """The best states, read off the buckets from the last eliminated variable to the first."""
    states: list[int] = [-1] * len(order)
    for v, bucket in zip(reversed(order), reversed(buckets), strict=True):
        total = np.zeros(sizes[v])
        for scope, table in bucket:
            index: list[int | slice] = [states[n] for n in scope]
            index[scope.index(v)] = slice(None)
            total = total + table[tuple(index)]
        states[v] = int(np.argmin(total))
    return states


def _without_fixed(problem: Problem) -> Problem:
    """The problem with the tables of one-state variables as costs of their neighbours."""
    seconds = [costs.copy() for costs in problem.seconds]
    tables: Tables = {}
    for (u, v), table in problem.tables.items():
        if len(seconds[v]) == 1:
            seconds[u] += table[:, 0]
        elif len(seconds[u]) == 1:
            seconds[v] += table[0]
        else:
            tables[u, v] = table
    return Problem.distinct(seconds, problem.nbytes, tables)


def _elimination_order(problem: Problem) -> list[int]:
    """Variables in the order of elimination: smallest joint table first, then the earliest."""
    neighbours = neighbour_sets(problem)
    logs = np.log(list(map(len, problem.seconds)))

    def joint_log(v: int) -> float:
        """Logarithm of the number of states of a variable's neighbours together."""
        return sum(logs[n] for n in neighbours[v])

    joint_logs = np.array(list(map(joint_log, range(problem.size))), float)
    order = []
    for _ in range(problem.size):
        v = int(np.argmin(joint_logs))
        for n in neighbours[v]:
            neighbours[n] |= neighbours[v] - {n}
            neighbours[n].discard(v)
            joint_logs[n] = joint_log(n)
        joint_logs[v] = np.inf
        order.append(v)
    return order


def _mini_buckets(v: int, bucket: list[Factor], sizes: list[int]) -> list[list[Factor]]:
    """A bucket, whole if its joint table is small enough, otherwise in parts that are."""
    parts: list[tuple[set[int], list[Factor]]] = []
    for factor in sorted(bucket, key=lambda factor: -factor[1].size):
        scope = set(factor[0])
        for joint, members in parts:
            entries = math.prod(float(sizes[n]) for n in joint | scope)
            if entries <= MAX_ENTRIES:
                joint |= scope
                members.append(factor)
                break
        else:
            parts.append((scope | {v}, [factor]))
    return [members for _, members in parts]


def _minimised(v: int, factors: list[Factor], sizes: list[int]) -> Factor:
    """The other variables, and the least sum of the factors over the states of v."""
    scope_sets = [set(scope) for scope, _ in factors]
    others = tuple(sorted(set().union(*scope_sets) - {v}))
    dim_of = {n: i for i, n in enumerate((*others, v))}
    tables: dict[Scope, Array] = {}
    for scope, table in factors:
        dims = [dim_of[n] for n in scope]
        ordered = np.transpose(table, np.argsort(dims))
        key = tuple(sorted(dims))
        if key in tables:
            ordered = tables[key] + ordered
        tables[key] = ordered
    _join_nested(tables)
    if len(tables) == 1:
        (table,) = tables.values()
        return others, table.min(axis=-1)
    shape = tuple(sizes[n] for n in others)
    return others, _swept(tables, shape)


def _join_nested(tables: dict[Scope, Array]) -> None:
    """Adds tables of fewer dims to tables that have all of these: the loops then add few tables."""
    for dims in sorted(tables, key=len):
        wider = []
        for other in tables:
            if len(other) > len(dims) and set(dims) <= set(other):
                wider.append(other)
        if not wider:
            continue
        target = min(wider, key=lambda other: tables[other].size)
        table = tables.pop(dims)
        shape = []
        for dim, size in zip(target, tables[target].shape, strict=True):
            shape.append(size if dim in dims else 1)
        tables[target] = tables[target] + table.reshape(shape)


def _swept(tables: dict[Scope, Array], shape: Scope) -> Array:
    """Least sum of tables over their last dim; keys are the dims of `shape` and the last one."""
    steps = np.zeros((len(tables), len(shape)), np.int64)
    """Per table and dim, rows between two neighbouring entries."""
    first = []
    flat = []
    size = 0
    width = 0
    for n, (dims, table) in enumerate(tables.items()):
        *lengths, width = table.shape
        step = 1
        for dim, length in zip(reversed(dims[:-1]), reversed(lengths), strict=True):
            steps[n, dim] = step
            step *= length
        first.append(size)
        flat.append(np.ascontiguousarray(table).reshape(-1))
        size += table.size
    minima = np.empty(math.prod(shape))
    _sweep(
        np.concatenate(flat),
        np.array(first, np.int64),
        steps,
        np.array(shape, np.int64),
        width,
        minima,
    )
    return minima.reshape(shape)


@njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _sweep(data, first, steps, shape, width, minima):
    """Writes the least sum over the last dim for every combination c of the other dims.

    minima[c] = least sum over tables n of data[first[n] + width * row(n, c) + k], over k < width.
    """
    count, dims = steps.shape
    at = first.copy()
    index = np.zeros(dims, np.int64)
    for c in range(len(minima)):
        minimum = np.inf
        if count == 2:
            a, b = at[0], at[1]
            for k in range(width):
                minimum = min(minimum, data[a + k] + data[b + k])
        elif count == 3:
            a, b, e = at[0], at[1], at[2]
            for k in range(width):
                minimum = min(minimum, data[a + k] + data[b + k] + data[e + k])
        else:
            for k in range(width):
                total = 0.0
                for n in range(count):
                    total += data[at[n] + k]
                minimum = min(minimum, total)
        minima[c] = minimum
        d = dims - 1
        while d >= 0:
            index[d] += 1
            if index[d] < shape[d]:
                for n in range(count):
                    at[n] += steps[n, d] * width
                break
            for n in range(count):
                at[n] -= steps[n, d] * width * (shape[d] - 1)
            index[d] = 0
            d -= 1

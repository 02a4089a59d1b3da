"""The best states of a cost network, exactly: messages, then variable elimination with min-plus products (bucket elimination).

Messages (`search.messages`) give a bound and states; on most networks the two meet and all is said. Else what no better plan has is dropped, and
variables are eliminated: take one, write down for every combination of its neighbours' states the best it can add, and drop it: OptCNN's
node and edge elimination (Jia et al., ICML 2018, section 5) for any graph. What is dropped is found again backwards. The time follows the
largest table, so variables with few neighbours go first. A bucket whose joint table would be too large is cut into mini-buckets (Dechter
and Rish, JACM 2003), each minimised by itself: still a lower bound, and a plan that may be above it.

Memory is priced: seconds + price x bytes is minimised for a rising price until the bytes fit (Lagrangian relaxation). For
every price, the minimum less price x budget is a lower bound on any plan that fits, so the search returns a bound with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numba import njit

from partita.search.base import Problem, Progress, Report, SearchResult
from partita.search.fold import fold
from partita.search.messages import Messages

MOST_ENTRIES = 120_000_000
"""Entries of a joint table above which a bucket is cut: the result is then a plan and a bound that may lie apart."""
RISES = 24
"""How often a byte's price is raised until a plan fits."""
ROUNDS = 24
"""How often the price at which plans fit is refined, at most."""

SWEEPS = 5
"""Sweeps of messages between two looks at what they say."""
MOST_SWEEPS = 100
CLOSE = 1e-9
"""States whose cost is above a bound by no more than this part of it are the best."""
ENOUGH = 1e-3
"""The same where all that is wanted is a bound at one price."""

Factor = tuple[tuple[int, ...], np.ndarray]
"""Variables and a table over their states."""


def eliminate(
    problem: Problem, budget: float = np.inf, report: Report | None = None, rounds: int = ROUNDS
) -> SearchResult:
    """The states of least seconds whose bytes are within `budget`, with a lower bound. A price at which they fit is refined `rounds` times.

    If nothing fits, the result is the smallest in bytes that was found, and `feasible` is False.
    """
    priced, history = PricedProblem(problem), []

    def say(step: str, best: float, bound: float) -> None:
        history.append(Progress(step, best, bound))
        if report is not None:
            report(history[-1])

    bound, best, smallest, stopped = 0.0, None, None, False
    try:
        found = _price_folded(priced, budget, say, rounds) if math.isfinite(budget) else None
        if found is not None:
            best, smallest, bound = found
        else:
            states, bound = priced.solve(0.0)
            bound = min(bound, problem.cost(states))
            smallest = best = states
            if problem.memory_bytes(states) > budget:
                say("without a limit on memory", problem.cost(states), bound)
                best, smallest, bound, _ = _price_memory(priced, budget, states, bound, say, rounds)
            else:
                say(
                    "exact" if problem.cost(states) <= bound * (1 + CLOSE) else "bounded",
                    problem.cost(states),
                    bound,
                )
    except KeyboardInterrupt:
        stopped = True
        if best is None and smallest is None:
            smallest = tuple(int(np.argmin(s)) for s in problem.seconds)
    chosen = best if best is not None else smallest
    assert chosen is not None
    fits = problem.memory_bytes(chosen) <= budget
    return SearchResult(
        tuple(chosen),
        problem.cost(chosen),
        problem.memory_bytes(chosen),
        bound,
        fits,
        tuple(history),
        stopped,
    )


def _price_folded(
    priced: PricedProblem, budget: float, say: Callable[[str, float, float], None], rounds: int
) -> tuple[tuple[int, ...], tuple[int, ...], float] | None:
    """Where half of the variables are equal to others: the price of a byte found with equal ones as one, and the whole problem solved at it once.

    (best that fits, smallest, bound); None where little is equal, where nothing fits so, or where no price is needed.
    """
    problem, folded = priced.problem, fold(priced.problem)
    if 2 * folded.problem.size > problem.size:
        return None
    small = PricedProblem(folded.problem)
    fastest, least = small.solve(0.0)
    if folded.problem.memory_bytes(fastest) <= budget:
        return None
    best, smallest, _, price = _price_memory(small, budget, fastest, least, lambda *_: None, rounds)
    if best is None:
        return None
    states, least = priced.solve(price, ENOUGH)
    found = min(
        (
            _polish(problem, budget, s)
            for s in (folded.lift(best), states)
            if problem.memory_bytes(s) <= budget
        ),
        key=problem.cost,
    )
    bound = min(least - price * budget, problem.cost(found))
    say("pricing memory", problem.cost(found), bound)
    return found, folded.lift(smallest), bound


def _price_memory(
    priced: PricedProblem,
    budget: float,
    fastest: tuple[int, ...],
    bound: float,
    say: Callable[[str, float, float], None],
    rounds: int,
) -> tuple[tuple[int, ...] | None, tuple[int, ...], float, float]:
    """Raises the price of a byte until a plan fits, then searches between: (best that fits, smallest, bound, the price that gives the bound).

    A plan's seconds + price x bytes is a line over the price, and the least of all plans a concave curve of such lines: the next price is where
    the lines of the last plan that does not fit and the last that does meet. Where neither is beaten there, no price tells more.
    """
    problem, smallest, best = priced.problem, fastest, None
    scale = max(bound, sum(float(np.ptp(s)) for s in problem.seconds), 1e-12) / max(budget, 1.0)
    low, high, under, over, dual = 0.0, scale / 16, fastest, fastest, 0.0
    for _ in range(RISES):
        states, least = priced.solve(high)
        if least - high * budget > bound:
            bound, dual = least - high * budget, high
        if problem.memory_bytes(states) < problem.memory_bytes(smallest):
            smallest = states
        if problem.memory_bytes(states) <= budget:
            best = over = states
            break
        low, high, under = high, high * 4, states
        if high > 1e6 * scale:
            smallest = min(
                smallest, tuple(int(np.argmin(b)) for b in problem.nbytes), key=problem.memory_bytes
            )
            best = smallest if problem.memory_bytes(smallest) <= budget else None
            break
    if best is not None and over is best:
        for _ in range(rounds):
            more, less = (
                problem.cost(over) - problem.cost(under),
                problem.memory_bytes(under) - problem.memory_bytes(over),
            )
            price = more / less if less > 0 else low
            if not low < price < high:
                break
            states, least = priced.solve(price)
            if least - price * budget > bound:
                bound, dual = least - price * budget, price
            meets = problem.cost(over) + price * problem.memory_bytes(over)
            if problem.memory_bytes(states) <= budget:
                high, over = price, states
                if problem.cost(states) < problem.cost(best):
                    best = states
            else:
                low, under = price, states
            say("pricing memory", problem.cost(best), bound)
            if problem.cost(best) <= bound * (1 + CLOSE) or problem.cost(
                states
            ) + price * problem.memory_bytes(states) >= meets * (1 - 1e-12):
                break
    if best is not None:
        best = _polish(problem, budget, best)
        bound = min(bound, problem.cost(best))
    return best, smallest, bound, dual


def _polish(problem: Problem, budget: float, states: Sequence[int]) -> tuple[int, ...]:
    """Changes one variable at a time to its best state that still fits, until nothing gains."""
    current = list(states)
    held = problem.memory_bytes(current)
    near: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(problem.size)]
    for (u, v), t in problem.tables.items():
        near[u].append((v, t))
        near[v].append((u, t.T))
    for _ in range(20):
        changed = False
        for v in range(problem.size):
            total = problem.seconds[v].copy()
            for other, t in near[v]:
                total += t[:, current[other]]
            fits = held - problem.nbytes[v][current[v]] + problem.nbytes[v] <= budget
            total[~fits] = np.inf
            i = int(np.argmin(total))
            if total[i] < total[current[v]] * (1 - 1e-12) - 1e-15:
                held += problem.nbytes[v][i] - problem.nbytes[v][current[v]]
                current[v], changed = i, True
        if not changed:
            break
    return tuple(current)


def _order(problem: Problem) -> list[int]:
    """Variables in the order of elimination: smallest table first, then the earliest."""
    near: list[set[int]] = [set() for _ in range(problem.size)]
    for u, v in problem.tables:
        near[u].add(v)
        near[v].add(u)
    logs = np.log([len(s) for s in problem.seconds])
    table, order = np.array([sum(logs[n] for n in mine) for mine in near], float), []
    for _ in range(problem.size):
        v = int(np.argmin(table))
        for n in near[v]:
            near[n] |= near[v] - {n}
            near[n].discard(v)
            table[n] = sum(logs[m] for m in near[n])
        table[v] = np.inf
        order.append(v)
    return order


class PricedProblem:
    """A problem whose bytes have a price. Each solution starts from the messages of the last."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.messages = Messages(problem)
        self.seconds, self.nbytes = np.concatenate(problem.seconds), np.concatenate(problem.nbytes)

    def solve(self, price: float, close: float = CLOSE) -> tuple[tuple[int, ...], float]:
        """(states, lower bound) for seconds + price x bytes; the states attain the bound, to `close` of it, wherever no bucket had to be cut."""
        own = self.seconds + price * self.nbytes
        alone = replace(
            self.problem, seconds=[own[a:b] for a, b in itertools.pairwise(self.messages.first)]
        )
        best, least, bound = None, np.inf, -np.inf
        for _ in range(0, MOST_SWEEPS, SWEEPS):
            before, bound = bound, max(bound, self.messages.sweep(own, SWEEPS))
            states = _polish(alone, np.inf, self.messages.states(own))
            if alone.cost(states) < least:
                best, least = states, alone.cost(states)
            if least - bound <= close * abs(least) or bound - before < 0.02 * (least - bound):
                break
        assert best is not None
        if least - bound > close * abs(least):
            reached = self.messages.sweep(own)
            kept = self.messages.kept(own, (least - reached) * (1 + CLOSE) + CLOSE * abs(least))
            states, more = _eliminated(self.messages.moved(own, kept))
            states = _polish(alone, np.inf, [int(k[i]) for k, i in zip(kept, states, strict=True)])
            bound = max(bound, min(more, least))
            if alone.cost(states) < least:
                best, least = states, alone.cost(states)
        return best, min(bound, least)


def _eliminated(problem: Problem) -> tuple[list[int], float]:
    """(states, lower bound) of a problem without a price."""
    problem = _settled(problem)
    order = _order(problem)
    buckets: list[list[Factor]] = [[] for _ in order]
    rank = {v: i for i, v in enumerate(order)}
    sizes = [len(s) for s in problem.seconds]
    bound = 0.0

    def put(scope: tuple[int, ...], table: np.ndarray) -> None:
        buckets[min(rank[v] for v in scope)].append((scope, table))

    for v, seconds in enumerate(problem.seconds):
        put((v,), seconds)
    for scope, table in problem.tables.items():
        put(scope, table)
    for v in order:
        for part in _parts(v, buckets[rank[v]], sizes):
            others = tuple(sorted({n for scope, _ in part for n in scope} - {v}))
            place = {n: i for i, n in enumerate((*others, v))}
            best = _least(
                [(tuple(place[n] for n in scope), table) for scope, table in part],
                tuple(sizes[n] for n in others),
            )
            if others:
                put(others, best)
            else:
                bound += float(best)
    states = [-1] * problem.size
    for v in reversed(order):
        total = np.zeros(sizes[v])
        for scope, table in buckets[rank[v]]:
            total = total + table[tuple(slice(None) if n == v else states[n] for n in scope)]
        states[v] = int(np.argmin(total))
    return states, bound


def _settled(problem: Problem) -> Problem:
    """The problem with the tables of variables of one state as costs of the others: they tie nobody together."""
    seconds, tables = [s.copy() for s in problem.seconds], {}
    for (u, v), table in problem.tables.items():
        if len(seconds[v]) == 1:
            seconds[u] += table[:, 0]
        elif len(seconds[u]) == 1:
            seconds[v] += table[0]
        else:
            tables[u, v] = table
    return Problem(seconds, problem.nbytes, tables)


def _parts(v: int, factors: list[Factor], sizes: Sequence[int]) -> list[list[Factor]]:
    """A bucket, whole if its joint table is small enough, else cut into parts that are (mini-buckets)."""
    parts: list[tuple[set[int], list[Factor]]] = []
    for factor in sorted(factors, key=lambda f: -f[1].size):
        scope = set(factor[0])
        for held, members in parts:
            if math.prod(float(sizes[n]) for n in held | scope) <= MOST_ENTRIES:
                held |= scope
                members.append(factor)
                break
        else:
            parts.append((scope | {v}, [factor]))
    return [members for _, members in parts]


def _least(factors: Sequence[Factor], shape: tuple[int, ...]) -> np.ndarray:
    """The least over the last dim of a sum of tables: `factors` say which dims of `shape` (and the last, as its length) each has."""
    last, together = len(shape), {}
    for at, table in factors:
        turned = np.transpose(table, np.argsort(at))
        at = tuple(sorted(at))
        together[at] = together[at] + turned if at in together else turned
    # What has fewer dims is added to what has them all: then the loops add few tables.
    for at in sorted(together, key=len):
        wider = min(
            (b for b in together if len(b) > len(at) and set(at) <= set(b)),
            key=lambda b: together[b].size,
            default=None,
        )
        if wider is not None:
            spread = together.pop(at)
            together[wider] = together[wider] + spread.reshape(
                [n if d in at else 1 for d, n in zip(wider, together[wider].shape, strict=True)]
            )
    if len(together) == 1:
        return next(iter(together.values())).min(axis=-1)
    count = len(together)
    steps = np.zeros((count, last), np.int64)
    first, flat, size = np.zeros(count, np.int64), [], 0
    for n, (at, table) in enumerate(together.items()):
        step = 1  # in rows
        for d, length in zip(reversed(at[:-1]), reversed(table.shape[:-1]), strict=True):
            steps[n, d] = step
            step *= length
        first[n] = size
        flat.append(np.ascontiguousarray(table).reshape(-1))
        size += table.size
    found = np.empty(math.prod(shape))
    width = next(iter(together.values())).shape[-1]
    _sweep(np.concatenate(flat), first, steps, np.array(shape, np.int64), width, found)
    return found.reshape(shape)


@njit(cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _sweep(data, first, steps, shape, width, found):  # noqa: ANN001, ANN202
    """found[c] = least over k < width of the sum of data[first[n] + width * (rows that combination c stands for) + k] over tables n."""
    count, dims = steps.shape
    at, index = first.copy(), np.zeros(dims, np.int64)
    for c in range(len(found)):
        least = np.inf
        if count == 2:
            a, b = at[0], at[1]
            for k in range(width):
                least = min(least, data[a + k] + data[b + k])
        elif count == 3:
            a, b, e = at[0], at[1], at[2]
            for k in range(width):
                least = min(least, data[a + k] + data[b + k] + data[e + k])
        else:
            for k in range(width):
                total = 0.0
                for n in range(count):
                    total += data[at[n] + k]
                least = min(least, total)
        found[c] = least
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

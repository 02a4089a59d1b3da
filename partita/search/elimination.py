"""The best states of a cost network, exactly: variable elimination with min-plus products (bucket elimination).

Take a variable, write down for every combination of its neighbours' states the best it can add, and drop it: OptCNN's node
and edge elimination (Jia et al., ICML 2018, section 5) for any graph. What is dropped is found again backwards. The
time follows the largest table, so variables with few neighbours go first; on chains and nested branches no table has more
than two dims.

Memory is priced: seconds + price x bytes is minimised for a rising price until the bytes fit (Lagrangian relaxation). For
every price, the minimum less price x budget is a lower bound on any plan that fits, so the search returns a bound with it.

Equal buckets are reduced once (the blocks of a transformer). A bucket whose joint table would be too large is cut into
mini-buckets (Dechter and Rish, JACM 2003), each minimised by itself: still a lower bound, and a plan that may be above it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from partita.search.base import Problem, Progress, Report, SearchResult

MOST_ENTRIES = 120_000_000
"""Entries of a joint table above which a bucket is cut: the result is then a plan and a bound that may lie apart."""
ROUNDS = 24
"""How often a byte's price is raised until a plan fits, and then how often it is refined."""

Factor = tuple[tuple[int, ...], np.ndarray]
"""Variables and a table over their states."""
Memo = dict[bytes, np.ndarray]


def eliminate(problem: Problem, budget: float = np.inf, report: Report | None = None, rounds: int = ROUNDS) -> SearchResult:
    """The states of least seconds whose bytes are within `budget`, with a lower bound. A price at which they fit is refined `rounds` times.

    If nothing fits, the result is the smallest in bytes that was found, and `feasible` is False.
    """
    order, history = _order(problem), []
    memo: Memo = {}

    def say(step: str, best: float, bound: float) -> None:
        history.append(Progress(step, best, bound))
        if report is not None:
            report(history[-1])

    bound, best, smallest, stopped = 0.0, None, None, False
    try:
        states, bound = _solve(problem, order, 0.0, memo)
        states = _polish(problem, np.inf, states)
        bound = min(bound, problem.cost(states))
        smallest = best = states
        if problem.held(states) > budget:
            say("without a limit on memory", problem.cost(states), bound)
            best, smallest, bound = _price_memory(problem, order, budget, memo, states, bound, say, rounds)
        else:
            say("exact" if problem.cost(states) <= bound * (1 + 1e-9) else "bounded", problem.cost(states), bound)
    except KeyboardInterrupt:
        stopped = True
        if best is None and smallest is None:
            smallest = tuple(int(np.argmin(s)) for s in problem.seconds)
    chosen = best if best is not None else smallest
    assert chosen is not None
    fits = problem.held(chosen) <= budget
    return SearchResult(tuple(chosen), problem.cost(chosen), problem.held(chosen), bound, fits, tuple(history), stopped)


def _price_memory(
    problem: Problem, order: Sequence[int], budget: float, memo: Memo, fastest: tuple[int, ...], bound: float,
    say: Callable[[str, float, float], None], rounds: int,
) -> tuple[tuple[int, ...] | None, tuple[int, ...], float]:  # fmt: skip
    """Raises the price of a byte until the plan fits, then searches between: (best that fits, smallest, bound)."""
    smallest, best = fastest, None
    scale = max(bound, sum(float(np.ptp(s)) for s in problem.seconds), 1e-12) / max(budget, 1.0)
    low, high = 0.0, scale / 16
    for _ in range(ROUNDS):
        states, least = _solve(problem, order, high, memo)
        bound = max(bound, least - high * budget)
        if problem.held(states) < problem.held(smallest):
            smallest = states
        if problem.held(states) <= budget:
            best = states
            break
        low, high = high, high * 4
        if high > 1e6 * scale:
            smallest = min(smallest, tuple(int(np.argmin(b)) for b in problem.nbytes), key=problem.held)
            best = smallest if problem.held(smallest) <= budget else None
            break
    if best is not None:
        for _ in range(rounds):
            price = (low + high) / 2
            states, least = _solve(problem, order, price, memo)
            bound = max(bound, least - price * budget)
            if problem.held(states) <= budget:
                high = price
                if problem.cost(states) < problem.cost(best):
                    best = states
            else:
                low = price
            say("pricing memory", problem.cost(best), bound)
            if problem.cost(best) <= bound * (1 + 1e-9) or high - low <= 1e-6 * high:
                break
        best = _polish(problem, budget, best)
        bound = min(bound, problem.cost(best))
    return best, smallest, bound


def _polish(problem: Problem, budget: float, states: Sequence[int]) -> tuple[int, ...]:
    """Changes one variable at a time to its best state that still fits, until nothing gains."""
    current = list(states)
    held = problem.held(current)
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
    sizes = [float(len(s)) for s in problem.seconds]
    left, order = set(range(problem.size)), []
    while left:
        v = min(left, key=lambda x: (math.prod(sizes[n] for n in near[x]), x))
        for n in near[v]:
            near[n] |= near[v] - {n}
            near[n].discard(v)
        left.remove(v)
        order.append(v)
    return order


def _solve(problem: Problem, order: Sequence[int], price: float, memo: Memo) -> tuple[tuple[int, ...], float]:
    """(states, lower bound) for seconds + price x bytes; the states attain the bound wherever no bucket had to be cut."""
    buckets: list[list[Factor]] = [[] for _ in order]
    rank = {v: i for i, v in enumerate(order)}
    bound = 0.0

    def put(factor: Factor) -> None:
        buckets[min(rank[v] for v in factor[0])].append(factor)

    for v in range(problem.size):
        put(((v,), problem.seconds[v] + price * problem.nbytes[v]))
    for scope, table in problem.tables.items():
        put((scope, table))
    sizes = [len(s) for s in problem.seconds]
    for v in order:
        for part in _parts(v, buckets[rank[v]], sizes):
            scope, best = _minimum(v, part, sizes, memo)
            if scope:
                put((scope, best))
            else:
                bound += float(best)
    states = [-1] * problem.size
    for v in reversed(order):
        total = np.zeros(sizes[v])
        for scope, table in buckets[rank[v]]:
            total = total + table[tuple(slice(None) if n == v else states[n] for n in scope)]
        states[v] = int(np.argmin(total))
    return tuple(states), bound


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


def _minimum(v: int, factors: list[Factor], sizes: Sequence[int], memo: Memo) -> Factor:
    """The least sum of factors over v, for every combination of the other variables' states."""
    others = tuple(sorted({n for scope, _ in factors for n in scope} - {v}))
    place = {n: i for i, n in enumerate((*others, v))}
    aligned = []
    for scope, table in factors:
        wanted = sorted(scope, key=lambda n: place[n])
        turned = np.transpose(table, [scope.index(n) for n in wanted])
        shape = [sizes[n] if n in scope else 1 for n in (*others, v)]
        aligned.append(np.ascontiguousarray(turned).reshape(shape))
    digest = hashlib.blake2b(digest_size=16)
    for table in sorted(aligned, key=lambda t: (t.shape, t.flat[0])):
        digest.update(repr(table.shape).encode())
        digest.update(table.tobytes())
    key = digest.digest()
    if key not in memo:
        if not others:
            memo[key] = np.asarray(sum(aligned)).min(axis=-1)
        else:
            best = np.empty([sizes[n] for n in others])
            for i in range(sizes[others[0]]):  # a row at a time: the sum over v is never held whole
                best[i] = np.asarray(sum(t[i if t.shape[0] > 1 else 0] for t in aligned)).min(axis=-1)
            memo[key] = best
    return others, memo[key]

"""The best states of a cost network, exactly: variable elimination with min-plus products (bucket elimination).

Take a variable, write down for every combination of its neighbours' states the best it can add, and drop it: OptCNN's node
and edge elimination (Jia et al., ICML 2018, section 5) for any graph. What is dropped is found again backwards. The
time follows the largest table, so variables with few neighbours go first; on chains and nested branches no table has more
than two dims.

Memory is priced: seconds + price x bytes is minimised for a rising price until the bytes fit (Lagrangian relaxation). For
every price, the minimum less price x budget is a lower bound on any plan that fits, so the search returns a bound with it.

Two reductions come first, both exact: of states that look the same to all neighbours only the cheapest is kept, and equal
tables are reduced once (the blocks of a transformer).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from partita.search.base import Problem, Progress, Report, SearchResult

MOST_ENTRIES = 30_000_000
"""Entries of a table above which a problem is refused; networks of layers stay far below."""
ROUNDS = 24


class TooWide(ValueError):
    """The network is too entangled to be eliminated within `MOST_ENTRIES`."""


def eliminate(problem: Problem, budget: float = np.inf, report: Report | None = None) -> SearchResult:
    """The states of least seconds whose bytes are within `budget`, with a lower bound.

    If nothing fits, the result is the smallest in bytes that was found, and `feasible` is False.
    """
    order, history, memo = _order(problem), [], {}

    def say(step: str, best: float, bound: float) -> None:
        history.append(Progress(step, best, bound))
        if report is not None:
            report(history[-1])

    bound, best, smallest, stopped = 0.0, None, None, False
    try:
        states = _solve(problem, order, 0.0, memo)
        bound = problem.cost(states)
        smallest = best = states
        if problem.held(states) > budget:
            say("without a limit on memory", problem.cost(states), bound)
            best, smallest, bound = _price_memory(problem, order, budget, memo, states, bound, say)
        else:
            say("exact", bound, bound)
    except KeyboardInterrupt:
        stopped = True
        if best is None and smallest is None:
            smallest = tuple(int(np.argmin(s)) for s in problem.seconds)
    chosen = best if best is not None else smallest
    assert chosen is not None
    fits = problem.held(chosen) <= budget
    return SearchResult(
        tuple(chosen), problem.cost(chosen), problem.held(chosen), bound, fits, tuple(history), stopped
    )


def _price_memory(
    problem: Problem, order: Sequence[int], budget: float, memo: dict, fastest: tuple[int, ...], bound: float,
    say: Callable[[str, float, float], None],
) -> tuple[tuple[int, ...] | None, tuple[int, ...], float]:  # fmt: skip
    """Raises the price of a byte until the plan fits, then searches between: (best that fits, smallest, bound)."""
    smallest, best = fastest, None
    low, high = 0.0, bound / max(budget, 1.0)
    for _ in range(ROUNDS):
        states = _solve(problem, order, high, memo)
        bound = max(bound, problem.cost(states) + high * (problem.held(states) - budget))
        if problem.held(states) < problem.held(smallest):
            smallest = states
        if problem.held(states) <= budget:
            best = states
            break
        low, high = high, high * 4
        if high > 1e6 * (bound / max(budget, 1.0) + 1e-300):
            least = tuple(int(np.argmin(b)) for b in problem.nbytes)
            smallest = min(smallest, least, key=problem.held)
            best = smallest if problem.held(smallest) <= budget else None
            break
    if best is not None:
        for _ in range(ROUNDS):
            price = (low + high) / 2
            states = _solve(problem, order, price, memo)
            bound = max(bound, problem.cost(states) + price * (problem.held(states) - budget))
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
    """Variables in the order of elimination: fewest table entries first, then the earliest."""
    near: list[set[int]] = [set() for _ in range(problem.size)]
    for u, v in problem.tables:
        near[u].add(v)
        near[v].add(u)
    sizes = [len(s) for s in problem.seconds]
    left, order = set(range(problem.size)), []
    while left:
        v = min(left, key=lambda x: (len(near[x]), float(np.prod([sizes[n] for n in near[x]], dtype=float)), x))
        if np.prod([sizes[n] for n in near[v]], dtype=float) * sizes[v] > MOST_ENTRIES * 60:
            raise TooWide(f"variable {v} has {len(near[v])} neighbours left")
        for n in near[v]:
            near[n] |= near[v] - {n}
            near[n].discard(v)
        left.remove(v)
        order.append(v)
    return order


def _solve(problem: Problem, order: Sequence[int], price: float, memo: dict) -> tuple[int, ...]:
    """The states that minimise seconds + price x bytes, exactly."""
    buckets: list[list[tuple[tuple[int, ...], np.ndarray]]] = [[] for _ in order]
    rank = {v: i for i, v in enumerate(order)}

    def put(scope: tuple[int, ...], table: np.ndarray) -> None:
        if scope:
            buckets[min(rank[v] for v in scope)].append((scope, table))

    for v in range(problem.size):
        put((v,), problem.seconds[v] + price * problem.nbytes[v])
    for scope, table in problem.tables.items():
        put(scope, table)
    choices: list[tuple[int, tuple[int, ...], np.ndarray]] = []
    for v in order:
        scope, best, argument = _minimum(v, buckets[rank[v]], memo)
        choices.append((v, scope, argument))
        put(scope, best)
    states = [0] * problem.size
    for v, scope, argument in reversed(choices):
        states[v] = int(argument[tuple(states[n] for n in scope)])
    return tuple(states)


def _minimum(
    v: int, tables: list[tuple[tuple[int, ...], np.ndarray]], memo: dict
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """(remaining scope, least sum over v, the v that attains it) of a bucket of tables that all hold v."""
    others = tuple(sorted({n for scope, _ in tables for n in scope} - {v}))
    place = {n: i for i, n in enumerate(others)}
    shaped = []
    for scope, table in tables:
        axes = [place[n] if n != v else -1 for n in scope]
        shaped.append((tuple(axes), table))
    key = tuple((axes, table.shape, table.tobytes()) for axes, table in shaped) if sum(t.size for _, t in shaped) < 400_000 else None
    if key is not None and key in memo:
        return others, *memo[key]
    count = next(t.shape[0] for axes, t in shaped if axes == (-1,))
    full = [
        np.transpose(t, sorted(range(t.ndim), key=lambda d, a=axes: a[d] if a[d] >= 0 else len(others))) for axes, t in shaped
    ]
    kept = [sorted(a for a in axes if a >= 0) for axes, _ in shaped]
    if not others:
        total = sum(full)
        i = int(np.argmin(total))
        result = (np.array(total[i]), np.array(i))
    else:
        sizes = {}
        for held, t in zip(kept, full, strict=True):
            for d, a in enumerate(held):
                sizes[a] = t.shape[d]
        shape = tuple(sizes[a] for a in range(len(others)))
        best, argument = np.empty(shape), np.empty(shape, np.int32)
        for i in range(shape[0]):  # one row at a time: the sum over v is never held whole
            row = np.zeros((*shape[1:], count))
            for held, t in zip(kept, full, strict=True):
                part = t[i] if held and held[0] == 0 else t
                rest = [a for a in held if a != 0]
                row = row + part.reshape([sizes[a] if a in rest else 1 for a in range(1, len(others))] + [count])
            argument[i] = np.argmin(row, axis=-1)
            best[i] = np.take_along_axis(row, argument[i][..., None], -1)[..., 0]
        result = (best, argument)
    if key is not None:
        memo[key] = result
    return others, *result

"""The best states proved by looking at all that could be best: of a simulated step by branch and bound, of a small sum by plain enumeration.

A simulated step is never below the sum of what its stream has to do (`simulated.relaxed`). Messages (`search.messages`) give that sum a bound and
move its costs so that every entry says by how much it lies above it. States are then chosen operator by operator, first the ones that
many tables tie to those chosen; a branch whose entries add up to more than lies between the bound and the best step seen has
nothing better and is left. What remains is simulated. FlexFlow proves LeNet and a small RNNLM so (MLSys 2019, section 8.4: 0.8 and 18 hours).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import product

import numpy as np
from numba import njit

from partita.search.base import Problem, Progress, Report, SearchResult
from partita.search.messages import Messages
from partita.search.simulated import Simulated, fill
from partita.simulation.engine import sweep

SWEEPS = 200
"""Sweeps of messages before states are chosen, at most."""
MARGIN = 1e-9
"""What lies above a step by no more than this part of it is no better than it."""
CHUNK = 1_000_000
"""Choices between two looks at the clock."""


def prove(
    problem: Simulated,
    below: Problem,
    start: Sequence[int],
    budget: float = np.inf,
    seconds: float = np.inf,
    nodes: int = sys.maxsize,
    report: Report | None = None,
) -> SearchResult:
    """The states of the shortest simulated step within a budget of bytes; `start` fits it, and no step is shorter than `below`.

    Where `seconds` or `nodes` (choices of a state) run out, or on Ctrl-C, the result is the best so far, `stopped`, and its bound that of `below`.
    """
    until = time.perf_counter() + seconds
    best, least = np.array(start, np.int64), problem.seconds(start)
    messages, own = Messages(below), np.concatenate(below.seconds)
    bound = messages.sweep(own, 10)
    for _ in range(10, SWEEPS, 10):
        before, bound = bound, messages.sweep(own, 10)
        if bound - before <= 0.001 * (least - bound):
            break
    kept = messages.kept(own, least * (1 + MARGIN) - bound)
    tree, history, stopped, done = (
        _Tree(messages.moved(own, kept), kept, problem, bound, budget),
        [],
        False,
        False,
    )
    try:
        while not done:
            history.append(Progress("proving", least, min(bound, least)))
            if report is not None:
                report(history[-1])
            stopped = nodes <= 0 or time.perf_counter() > until
            if stopped:
                break
            least, done = tree.search(best, least, min(CHUNK, nodes))
            nodes -= CHUNK
    except KeyboardInterrupt:
        stopped = True
    least = problem.seconds(best)
    bound = min(bound, least) if stopped else least
    return SearchResult(
        tuple(map(int, best)),
        least,
        problem.memory_bytes(best),
        bound,
        True,
        (*history, Progress("proving", least, bound)),
        stopped,
    )


class _Tree:
    """A search, depth first, that goes on where it was left. `moved` is the sum of the `kept` states, its costs above `bound`."""

    def __init__(
        self,
        moved: Problem,
        kept: list[np.ndarray],
        problem: Simulated,
        bound: float,
        budget: float,
    ) -> None:
        self.problem, self.bound, self.budget = problem, bound, budget
        order = _order(moved)
        rank, sizes = np.argsort(order), [len(kept[v]) for v in order]
        back: list[list[tuple[int, int]]] = [[] for _ in order]
        data, size = [], 0
        for (u, v), table in moved.tables.items():
            early, late, table = (u, v, table) if rank[u] < rank[v] else (v, u, table.T)
            back[rank[late]].append((int(rank[early]), size))
            data.append(np.ascontiguousarray(table - table.min()).reshape(-1))
            size += table.size
        nbytes = [moved.nbytes[v] for v in order]
        lightest = np.cumsum([0.0, *(b.min() for b in reversed(nbytes))])[::-1].copy()
        self.data = (
            np.array(order, np.int64),
            np.concatenate([[0], np.cumsum(sizes)]),
            np.concatenate([moved.seconds[v] - moved.seconds[v].min() for v in order]),
            np.concatenate([kept[v] for v in order]).astype(np.int64),
            np.concatenate(nbytes),
            lightest,
            np.cumsum([0, *map(len, back)]),
            np.array([pair for mine in back for pair in mine], np.int64).reshape(-1, 2),
            np.concatenate([*data, np.zeros(1)]),
        )
        n = len(order)
        self.at, self.depth = np.full(n + 1, -1, np.int64), 0
        self.over, self.held, self.chosen = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n, np.int64)

    def search(self, best: np.ndarray, least: float, nodes: int) -> tuple[float, bool]:
        """(seconds of the best step so far, its states in `best`; whether all was looked at), after so many more choices."""
        self.depth, least = _search(
            self.depth,
            nodes,
            self.at,
            self.over,
            self.held,
            self.chosen,
            *self.data,
            best,
            least,
            self.bound,
            self.budget,
            *self.problem.order,
            *self.problem.where,
        )
        return least, self.depth < 0


def _order(problem: Problem) -> list[int]:
    """Operators, each the one with most tables to those before it; the one with fewest states of them."""
    near: list[set[int]] = [set() for _ in range(problem.size)]
    for u, v in problem.tables:
        near[u].add(v)
        near[v].add(u)
    order: list[int] = []
    left = set(range(problem.size))
    while left:
        order.append(
            min(left, key=lambda v: (-len(near[v] & set(order)), len(problem.seconds[v]), v))
        )
        left.remove(order[-1])
    return order


@njit(cache=True)
def _search(  # noqa: ANN202, PLR0913
    d,
    nodes,
    at,
    over,
    held,
    chosen,
    order,
    first,
    own,
    state,
    nbytes,
    lightest,
    back_first,
    back,
    data,
    best,
    least,
    bound,
    budget,  # noqa: ANN001
    stream,
    streams,
    task_first,
    before,
    *where,  # noqa: ANN001, ANN002
):
    """`nodes` more choices from depth d on: (depth, -1 if nothing is left; seconds of the best step). Its states are written into `best`."""
    n, tasks = len(order), len(stream)
    seconds, start, end = np.zeros(tasks), np.zeros(tasks), np.zeros(tasks)
    while d >= 0 and nodes > 0:
        if d == n:
            fill(chosen, seconds, *where)
            sweep(0, seconds, stream, streams, task_first, before, start, end)
            if end.max() < least * (1 - 1e-12):
                least = end.max()
                best[:] = chosen
            d -= 1
            continue
        nodes -= 1
        at[d] += 1
        count = first[d + 1] - first[d]
        if at[d] == count:
            at[d] = -1
            d -= 1
            continue
        k = first[d] + at[d]
        over[d + 1] = over[d] + own[k]
        for j in range(back_first[d], back_first[d + 1]):
            over[d + 1] += data[back[j, 1] + at[back[j, 0]] * count + at[d]]
        held[d + 1] = held[d] + nbytes[k]
        if bound + over[d + 1] <= least * (1 + 1e-9) and held[d + 1] + lightest[d + 1] <= budget:
            chosen[order[d]] = state[k]
            d += 1
    return d, least


def exhaust(problem: Problem, budget: float = np.inf) -> SearchResult:
    """The states of least seconds within the budget, proved by enumeration; the smallest in bytes if none fits."""
    best: tuple[float, tuple[int, ...]] | None = None
    smallest: tuple[float, tuple[int, ...]] | None = None
    for states in product(*(range(len(s)) for s in problem.seconds)):
        seconds, held = problem.cost(states), problem.memory_bytes(states)
        if held <= budget and (best is None or seconds < best[0]):
            best = (seconds, states)
        if smallest is None or held < smallest[0]:
            smallest = (held, states)
    assert smallest is not None
    states = best[1] if best is not None else smallest[1]
    seconds = problem.cost(states)
    return SearchResult(states, seconds, problem.memory_bytes(states), seconds, best is not None)

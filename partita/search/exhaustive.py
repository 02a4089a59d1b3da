"""The shortest simulated step, proved by branch and bound over all plans that could be shorter.

A simulated step is never below the sum of the work of its stream (`simulated.relaxed`). Messages
(`search.messages`) give that sum a bound and move its costs, so that every entry states its
distance to the bound. States are then chosen operator by operator, first those that many tables tie
to the chosen ones. A branch is abandoned if its entries add up to more than the distance between
the bound and the best known step. The remaining plans are simulated.

FlexFlow proves LeNet and a small RNNLM this way (MLSys 2019, section 8.4: 0.8 and 18 hours).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from partita.search.base import Array, Problem, Progress, Report, SearchResult, neighbour_sets
from partita.search.messages import Messages
from partita.search.simulated import Simulated, fill
from partita.simulation.engine import sweep

SWEEPS = 200
"""Sweeps of messages before states are chosen, at most."""
SWEEPS_AT_ONCE = 10
"""Sweeps between two looks at the bound."""
MARGIN = 1e-9
"""Relative distance above the best step within which a branch is still searched."""
CHUNK = 1_000_000
"""Choices between two looks at the clock."""


def prove(
    problem: Simulated,
    relaxed: Problem,
    start: Sequence[int],
    budget: float = np.inf,
    seconds: float = np.inf,
    nodes: int = sys.maxsize,
    report: Report | None = None,
) -> SearchResult:
    """The states of the shortest simulated step within a budget of bytes.

    If `seconds` or `nodes` run out, or on Ctrl-C, the result is the best so far, `stopped`, with
    the bound of `relaxed`.

    Args:
        relaxed: an additive lower bound of the simulation.
        start: states that fit the budget.
        seconds: time limit of the search.
        nodes: choices of a state, at most.
    """
    deadline = time.perf_counter() + seconds
    best = np.array(start, np.int64)
    best_seconds = problem.seconds(start)
    messages = Messages(relaxed)
    costs = np.concatenate(relaxed.seconds)
    bound = _message_bound(messages, costs, best_seconds)
    possible = messages.possible(costs, best_seconds * (1 + MARGIN) - bound)
    moved = messages.reparametrized(costs, possible)
    tree = _Tree(moved, possible, problem, _Limits(bound, budget))
    history: list[Progress] = []
    stopped = False
    done = False
    try:
        while not done:
            history.append(Progress("proving", best_seconds, min(bound, best_seconds)))
            if report is not None:
                report(history[-1])
            stopped = nodes <= 0 or time.perf_counter() > deadline
            if stopped:
                break
            best_seconds, done = tree.search(best, best_seconds, min(CHUNK, nodes))
            nodes -= CHUNK
    except KeyboardInterrupt:
        stopped = True
    best_seconds = problem.seconds(best)
    bound = min(bound, best_seconds) if stopped else best_seconds
    history.append(Progress("proving", best_seconds, bound))
    return SearchResult(
        states=tuple(map(int, best)),
        seconds=best_seconds,
        nbytes=problem.memory_bytes(best),
        bound=bound,
        feasible=True,
        history=tuple(history),
        stopped=stopped,
    )


def _message_bound(messages: Messages, costs: Array, best_seconds: float) -> float:
    """The bound of sweeps of messages, until it hardly rises."""
    bound = messages.sweep(costs, SWEEPS_AT_ONCE)
    for _ in range(SWEEPS_AT_ONCE, SWEEPS, SWEEPS_AT_ONCE):
        previous = bound
        bound = messages.sweep(costs, SWEEPS_AT_ONCE)
        if bound - previous <= 0.001 * (best_seconds - bound):
            break
    return bound


class _Limits(NamedTuple):
    """The bound that a tree's costs are distances from, and the budget of bytes."""

    bound: float
    budget: float


class _Levels(NamedTuple):
    """The variables of a tree in the order of choice, one per depth, for compiled code.

    States of depth d are `first[d]` to `first[d + 1]`; its tables to earlier depths are rows
    `back_first[d]` to `back_first[d + 1]` of `back`.
    """

    order: Array
    """Variable of each depth."""
    first: Array
    costs: Array
    """Per state, seconds above the least ones."""
    state: Array
    """Per state, its number in the simulated problem."""
    nbytes: Array
    lightest: Array
    """Per depth, least bytes of it and of all depths below it."""
    back_first: Array
    back: Array
    """[table, 2]: the earlier depth, and the start of the table in `data`."""
    data: Array
    """Tables, end to end, [state of the earlier depth, state of this depth]."""


class _Path(NamedTuple):
    """The current branch: per depth the number of the state, seconds above the bound, bytes."""

    at: Array
    excess: Array
    nbytes: Array
    chosen: Array
    """States of the simulated problem, by variable."""


class _Tree:
    """A depth-first search that can be continued.

    `moved` is the problem of the `possible` states, its costs moved so that they sum to distances
    from the bound.
    """

    def __init__(
        self,
        moved: Problem,
        possible: list[Array],
        problem: Simulated,
        limits: _Limits,
    ) -> None:
        self.problem = problem
        self.limits = limits
        self.levels = _levels(moved, possible)
        depths = moved.size
        self.depth = 0
        self.path = _Path(
            at=np.full(depths + 1, -1, np.int64),
            excess=np.zeros(depths + 1),
            nbytes=np.zeros(depths + 1),
            chosen=np.zeros(depths, np.int64),
        )

    def search(self, best: Array, best_seconds: float, nodes: int) -> tuple[float, bool]:
        """(seconds of the best step so far, whether the tree is exhausted) after `nodes` choices.

        The states of the best step are written into `best`.
        """
        self.depth, best_seconds = _search(
            (self.depth, nodes, best_seconds),
            best,
            self.path,
            self.levels,
            self.limits,
            self.problem.order,
            self.problem.tables,
        )
        return best_seconds, self.depth < 0


def _levels(moved: Problem, possible: list[Array]) -> _Levels:
    order = _choice_order(moved)
    rank = np.argsort(order)
    back: list[list[tuple[int, int]]] = [[] for _ in order]
    data: list[Array] = []
    size = 0
    for (u, v), table in moved.tables.items():
        if rank[u] < rank[v]:
            early, late = u, v
        else:
            early, late, table = v, u, table.T
        back[rank[late]].append((int(rank[early]), size))
        data.append(np.ascontiguousarray(table - table.min()).reshape(-1))
        size += table.size
    nbytes = [moved.nbytes[v] for v in order]
    least_bytes = [each.min() for each in reversed(nbytes)]
    pairs = [pair for tables in back for pair in tables]
    return _Levels(
        order=np.array(order, np.int64),
        first=np.concatenate([[0], np.cumsum([len(possible[v]) for v in order])]),
        costs=np.concatenate([moved.seconds[v] - moved.seconds[v].min() for v in order]),
        state=np.concatenate([possible[v] for v in order]).astype(np.int64),
        nbytes=np.concatenate(nbytes),
        lightest=np.cumsum([0.0, *least_bytes])[::-1].copy(),
        back_first=np.cumsum([0, *map(len, back)]),
        back=np.array(pairs, np.int64).reshape(-1, 2),
        data=np.concatenate([*data, np.zeros(1)]),
    )


def _choice_order(problem: Problem) -> list[int]:
    """Variables by most tables to those before them, then by fewest states."""
    neighbours = neighbour_sets(problem)
    order: list[int] = []
    open_variables = set(range(problem.size))
    while open_variables:
        chosen = set(order)
        keys = []
        for v in open_variables:
            ties = len(neighbours[v] & chosen)
            keys.append((-ties, len(problem.seconds[v]), v))
        *_, first = min(keys)
        order.append(first)
        open_variables.remove(first)
    return order


@njit(cache=True)
def _search(progress, best, path, levels, limits, order, tables):
    """Continues a search for some choices of a state.

    Args:
        progress: (depth, number of choices, seconds of the best step so far).
        best: receives the states of the best step.

    Returns:
        (depth, -1 if the tree is exhausted; seconds of the best step).
    """
    d, nodes, best_seconds = progress
    depths = len(levels.order)
    tasks = len(order.stream)
    seconds = np.zeros(tasks)
    start = np.zeros(tasks)
    end = np.zeros(tasks)
    while d >= 0 and nodes > 0:
        if d == depths:
            fill(path.chosen, seconds, tables)
            sweep(
                np.int64(0),
                seconds,
                order.stream,
                order.streams,
                order.first,
                order.before,
                start,
                end,
            )
            if end.max() < best_seconds * (1 - 1e-12):
                best_seconds = end.max()
                for v in range(len(best)):
                    best[v] = path.chosen[v]
            d -= 1
            continue
        nodes -= 1
        path.at[d] += 1
        if path.at[d] == levels.first[d + 1] - levels.first[d]:
            path.at[d] = -1
            d -= 1
            continue
        k = levels.first[d] + path.at[d]
        _descend(d, path, levels)
        fits = path.nbytes[d + 1] + levels.lightest[d + 1] <= limits.budget
        if limits.bound + path.excess[d + 1] <= best_seconds * (1 + MARGIN) and fits:
            path.chosen[levels.order[d]] = levels.state[k]
            d += 1
    return d, best_seconds


@njit(cache=True)
def _descend(d, path, levels):
    """Writes seconds above the bound, and bytes, of the branch with the state chosen at depth d."""
    count = levels.first[d + 1] - levels.first[d]
    k = levels.first[d] + path.at[d]
    excess = path.excess[d] + levels.costs[k]
    for j in range(levels.back_first[d], levels.back_first[d + 1]):
        row = levels.back[j, 1] + path.at[levels.back[j, 0]] * count
        excess += levels.data[row + path.at[d]]
    path.excess[d + 1] = excess
    path.nbytes[d + 1] = path.nbytes[d] + levels.nbytes[k]

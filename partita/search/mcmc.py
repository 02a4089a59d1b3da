"""Plans by Metropolis-Hastings on the simulator (FlexFlow, MLSys 2019, section 6), with what the paper leaves open settled.

A chain changes the states of one or a few operators, replays what that touches, and accepts with probability min(1, exp(-more / (T x
seconds))): T is a part of the step's own time, so that nothing depends on how long a step is; it falls over a chain. Chains start from
given plans, best first, and are seeded: the same seed finds the same plan after the same number of proposals. Bytes are a constraint:
a proposal that does not fit is not made.

Proposals: another state of an operator, any or one that is cheap by itself; the state that suits a neighbour best, which carries a way of
splitting along the edges; and the same new state for all equal operators that agree with it, the blocks of a network at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from partita.search.base import Progress, Report, SearchResult
from partita.search.simulated import Simulated, change, fill
from partita.simulate.engine import sweep

HOT, COLD = 0.02, 0.0005
"""T at the beginning and at the end of a chain."""
CHEAP = 12
"""States of an operator that are cheap by themselves."""
CHUNK = 20_000
"""Proposals between two looks at the clock."""
LENGTH = 40
"""Proposals of a chain, per operator and state that it may change (at least one chunk)."""


@dataclass(frozen=True)
class Effort:
    """How much a search has done: simulations, of them full ones, and chains."""

    proposals: int
    chains: int
    seconds: float


def walk(
    problem: Simulated, alike: np.ndarray, starts: Sequence[Sequence[int]], budget: float = np.inf, bound: float = 0.0, seconds: float = 2.0,
    seed: int = 0, report: Report | None = None, most: int | None = None,
) -> tuple[SearchResult, Effort]:  # fmt: skip
    """The best states found within `seconds` (or `most` proposals), from starts of which at least one fits the budget of bytes.

    `alike[o]` is a number that operators with equal states share. `bound` is what is known of all plans.
    """
    begun = time.perf_counter()
    fitting = [np.asarray(s, np.int64) for s in starts if problem.held(s) <= budget]
    fitting.sort(key=problem.seconds)
    best = fitting[0].copy()
    history = [Progress("simulated", problem.seconds(best), bound)]
    cheap, cheap_first = _cheap(problem)
    length = max(CHUNK, LENGTH * int(problem.states.sum()))
    proposals, chains, stopped = 0, 0, False
    rng = np.random.default_rng(seed)
    free = np.flatnonzero(problem.states > 1)
    try:
        while len(free) and best_seconds(history) > bound * (1 + 1e-9):
            state = (fitting[chains % len(fitting)] if chains < 2 * len(fitting) else best).copy()
            done = 0
            while done < length:
                take = min(CHUNK, length - done, (most or 1 << 62) - proposals)
                hot, cold = (HOT * (COLD / HOT) ** ((done + n) / length) for n in (0, take))
                top = best.copy()
                found = _chain(
                    take, int(rng.integers(1 << 31)), hot, cold, free, state, top, best_seconds(history), budget, cheap, cheap_first, alike,
                    problem.near_first, problem.near, problem.nbytes_first, problem.nbytes, *problem.order, *problem.where,
                )  # fmt: skip
                done, proposals = done + take, proposals + take
                if found < best_seconds(history):
                    best = top
                    history.append(Progress("simulated", problem.seconds(best), bound))
                if report is not None:
                    report(history[-1])
                if time.perf_counter() - begun > seconds or most is not None and proposals >= most:
                    raise StopIteration
            chains += 1
    except StopIteration:
        chains += 1
    except KeyboardInterrupt:
        stopped = True
    least = min(bound, best_seconds(history))
    result = SearchResult(tuple(map(int, best)), best_seconds(history), problem.held(best), least, True, tuple(history), stopped)
    return result, Effort(proposals, chains, time.perf_counter() - begun)


def best_seconds(history: Sequence[Progress]) -> float:
    return history[-1].best


def _cheap(problem: Simulated) -> tuple[np.ndarray, np.ndarray]:
    """Per operator the states that take least by themselves, one after the other, and where each operator's begin."""
    rows = []
    for o, count in enumerate(problem.states):
        slots = range(problem.own_first[o], problem.own_first[o + 1])
        whole = sum((problem.data[problem.own_row[s] : problem.own_row[s] + count] * problem.own_share[s] for s in slots), np.zeros(count))
        rows.append(np.argsort(whole, kind="stable")[:CHEAP])
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


@njit(cache=True)
def _chain(  # noqa: ANN202, PLR0913
    count, seed, hot, cold, free, chosen, top, best, budget, cheap, cheap_first, alike, near_first, near, nbytes_first, nbytes,  # noqa: ANN001
    stream, streams, first, before, overlap, data, states, own_first, own_task, own_hold, own_row, own_share, move_task, move_hold,  # noqa: ANN001
    move_ends, move_table,  # noqa: ANN001
):  # fmt: skip
    """Makes proposals from `chosen`, which it changes; the best seconds seen, with their states in `top`."""
    np.random.seed(seed)
    n, operators = len(stream), len(states)
    seconds, start, end = np.zeros(n), np.zeros(n), np.zeros(n)
    fill(chosen, seconds, overlap, data, states, own_first, own_task, own_hold, own_row, own_share, move_task, move_hold, move_ends, move_table)
    sweep(0, seconds, stream, streams, first, before, start, end)
    now, held = end.max(), 0.0
    for o in range(operators):
        held += nbytes[nbytes_first[o] + chosen[o]]
    before_end, touched, was = np.empty(n), np.empty(4 * n, np.int64), np.empty(4 * n)
    busy, last = np.zeros(streams), np.full(n, -1.0)
    for k in range(n):
        if stream[k] >= 0:
            busy[stream[k]] += seconds[k]
    work, new = busy.copy(), now
    changed, previous = np.empty(operators, np.int64), np.empty(operators, np.int64)
    for step in range(count):
        heat = hot * (cold / hot) ** (step / count)
        o = free[np.random.randint(len(free))]
        kind = np.random.random()
        if kind < 0.35:
            to = np.random.randint(states[o])
        elif kind < 0.7 or near_first[o] == near_first[o + 1]:
            to = cheap[cheap_first[o] + np.random.randint(cheap_first[o + 1] - cheap_first[o])]
        else:
            m = near[near_first[o] + np.random.randint(near_first[o + 1] - near_first[o])]
            to = _suited(o, m, chosen, cheap, cheap_first, data, states, own_first, own_row, own_share, move_ends, move_table)
        if to == chosen[o]:
            continue
        size, from_state = 0, chosen[o]
        whole_run = np.random.random() < 0.3
        more = 0.0
        for p in range(operators):
            if p == o or whole_run and alike[p] == alike[o] and chosen[p] == from_state:
                changed[size], previous[size] = p, chosen[p]
                more += nbytes[nbytes_first[p] + to] - nbytes[nbytes_first[p] + chosen[p]]
                size += 1
        if held + more > budget and more > 0:
            continue
        for i in range(size):
            chosen[changed[i]] = to
        count_touched, begin = 0, n
        for i in range(size):
            count_touched, begin = change(
                changed[i], chosen, seconds, touched, was, count_touched, begin, near_first, near, overlap, data, states, own_first, own_task,
                own_hold, own_row, own_share, move_task, move_hold, move_ends, move_table,
            )  # fmt: skip
        most = now - heat * now * np.log(np.random.random())
        work[:] = busy
        for i in range(count_touched - 1, -1, -1):  # the first of a task's entries has what it took before
            last[touched[i]] = was[i]
        for i in range(count_touched):
            k = touched[i]
            if last[k] >= 0:
                if stream[k] >= 0:
                    work[stream[k]] += seconds[k] - last[k]
                last[k] = -1.0
        accepted = work.max() <= most * (1 + 1e-9)  # what a stream has to do is below the step: most proposals end here
        if accepted:
            before_end[begin:] = end[begin:]
            sweep(begin, seconds, stream, streams, first, before, start, end)
            new = end.max()
            accepted = new <= most
            if not accepted:
                end[begin:] = before_end[begin:]
        if accepted:
            now, held = new, held + more
            busy[:] = work
            if now < best * (1 - 1e-12):
                best = now
                top[:] = chosen
        else:
            for i in range(size):
                chosen[changed[i]] = previous[i]
            for i in range(count_touched - 1, -1, -1):
                seconds[touched[i]] = was[i]
    return best


@njit(cache=True)
def _suited(o, m, chosen, cheap, cheap_first, data, states, own_first, own_row, own_share, move_ends, move_table):  # noqa: ANN001, ANN202
    """Of all states of an operator the one that takes least together with one move."""
    least, found = np.inf, chosen[o]
    for state in range(states[o]):
        home, reader = move_ends[m, 0], move_ends[m, 1]
        a = state if home == o else chosen[home]
        b = state if reader == o else chosen[reader]
        total = data[move_table[m] + a * states[reader] + b]
        for s in range(own_first[o], own_first[o + 1]):
            total += data[own_row[s] + state] * own_share[s]
        if total < least:
            least, found = total, state
    return found

"""Plans by Metropolis-Hastings on the simulator (FlexFlow, MLSys 2019, section 6), with what the paper leaves open settled.

A chain changes the states of one or a few operators, replays what that touches, and accepts with probability min(1, exp(-more / (T x
seconds))): T is a part of the step's own time, so that nothing depends on how long a step is; it falls over a chain. Chains start from
given plans, best first, and are seeded: the same seed finds the same plan after the same number of proposals. Bytes are a constraint:
a proposal that does not fit is not made.

Proposals: another state of an operator, any or one that is cheap by itself; the state that suits a neighbour best, which carries a way of
splitting along the edges; and the same new state for all equal operators that agree with it, the blocks of a network at once.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np
from numba import njit

from partita.search.base import Progress, Report, SearchResult
from partita.search.simulated import Simulated, change, fill
from partita.simulation.engine import sweep

HOT, COLD = 0.02, 0.0005
"""T at the beginning and at the end of a chain."""
CHEAP = 12
"""States of an operator that are cheap by themselves."""
CHUNK = 20_000
"""Proposals between two looks at the clock."""
LENGTH = 40
"""Proposals of a chain, per operator and state that it may change (at least one chunk)."""


def run_chains(
    problem: Simulated,
    starts: Sequence[Sequence[int]],
    budget: float = np.inf,
    bound: float = 0.0,
    seconds: float = 2.0,
    seed: int = 0,
    report: Report | None = None,
    most: int | None = None,
) -> tuple[SearchResult, int]:
    """The best states found within `seconds` (or `most` proposals), and the proposals made, from starts of which one fits the budget of bytes.

    `bound` is what is known of all plans.
    """
    until = time.perf_counter() + seconds
    fitting = [np.asarray(s, np.int64) for s in starts if problem.memory_bytes(s) <= budget]
    fitting.sort(key=problem.seconds)
    best, least = fitting[0].copy(), problem.seconds(fitting[0])
    state, history, proposals, stopped = best, [Progress("simulated", least, bound)], 0, False
    cheap, free, rng = (
        _cheap(problem),
        np.flatnonzero(problem.states > 1),
        np.random.default_rng(seed),
    )
    length = max(CHUNK, LENGTH * int(problem.states.sum()))
    try:
        for chain, done, take in _schedule(length, most) if len(free) else ():
            if done == 0 and least <= bound * (1 + 1e-9):
                break
            if done == 0:
                state = (fitting[chain % len(fitting)] if chain < 2 * len(fitting) else best).copy()
            hot, cold = (HOT * (COLD / HOT) ** ((done + n) / length) for n in (0, take))
            top = best.copy()
            found = _chain(
                take,
                int(rng.integers(1 << 31)),
                hot,
                cold,
                free,
                state,
                top,
                least,
                budget,
                *cheap,
                problem.alike,
                problem.near_first,
                problem.near,
                problem.nbytes_first,
                problem.nbytes,
                *problem.order,
                *problem.where,
            )
            proposals += take
            if found < least:
                best, least = top, problem.seconds(top)
                history.append(Progress("simulated", least, bound))
            if report is not None:
                report(history[-1])
            if time.perf_counter() > until:
                break
    except KeyboardInterrupt:
        stopped = True
    result = SearchResult(
        tuple(map(int, best)),
        least,
        problem.memory_bytes(best),
        min(bound, least),
        True,
        tuple(history),
        stopped,
    )
    return result, proposals


def _schedule(length: int, most: int | None) -> Iterator[tuple[int, int, int]]:
    """(chain, proposals that it has made, how many come next), chain after chain, until `most` are made."""
    left = most if most is not None else sys.maxsize
    for chain in itertools.count():
        for done in range(0, length, CHUNK):
            take = min(CHUNK, length - done, left)
            yield chain, done, take
            left -= take
            if left == 0:
                return


def _cheap(problem: Simulated) -> tuple[np.ndarray, np.ndarray]:
    """Per operator the states that take least by themselves, one after the other, and where each operator's begin."""
    rows = []
    for o, count in enumerate(problem.states):
        slots = range(problem.own_first[o], problem.own_first[o + 1])
        whole = sum(
            (
                problem.data[problem.own_row[s] : problem.own_row[s] + count] * problem.own_share[s]
                for s in slots
            ),
            np.zeros(count),
        )
        rows.append(np.argsort(whole, kind="stable")[:CHEAP])
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)])


@njit(cache=True)
def _chain(  # noqa: ANN202, PLR0913
    proposals,
    seed,
    hot,
    cold,
    free,
    chosen,
    top,
    best,
    budget,
    cheap,
    cheap_first,
    alike,
    near_first,
    near,
    nbytes_first,
    nbytes,  # noqa: ANN001
    stream,
    streams,
    first,
    before,
    overlap,
    data,
    states,
    own_first,
    own_task,
    own_hold,
    own_row,
    own_share,
    move_task,
    move_hold,  # noqa: ANN001
    move_ends,
    move_table,  # noqa: ANN001
):
    """Makes proposals from `chosen`, which it changes; the best seconds seen, with their states in `top`."""
    np.random.seed(seed)
    n, operators = len(stream), len(states)
    seconds, start, end, kept_end = np.zeros(n), np.zeros(n), np.zeros(n), np.empty(n)
    fill(
        chosen,
        seconds,
        overlap,
        data,
        states,
        own_first,
        own_task,
        own_hold,
        own_row,
        own_share,
        move_task,
        move_hold,
        move_ends,
        move_table,
    )
    sweep(0, seconds, stream, streams, first, before, start, end)
    now, held, busy = end.max(), 0.0, np.zeros(streams)
    for o in range(operators):
        held += nbytes[nbytes_first[o] + chosen[o]]
    for k in range(n):
        if stream[k] >= 0:
            busy[stream[k]] += seconds[k]
    touched, was, last, work, new = (
        np.empty(4 * n, np.int64),
        np.empty(4 * n),
        np.full(n, -1.0),
        busy.copy(),
        now,
    )
    changed, previous = np.empty(operators, np.int64), np.empty(operators, np.int64)
    for step in range(proposals):
        heat = hot * (cold / hot) ** (step / proposals)
        o = free[np.random.randint(len(free))]
        to = _proposed(
            o,
            chosen,
            cheap,
            cheap_first,
            near_first,
            near,
            data,
            states,
            own_first,
            own_row,
            own_share,
            move_ends,
            move_table,
        )
        if to == chosen[o]:
            continue
        size, more = _alike(o, to, chosen, alike, nbytes_first, nbytes, changed, previous)
        if held + more > budget and more > 0:
            continue
        count_touched, begin = 0, n
        for i in range(size):
            chosen[changed[i]] = to
        for i in range(size):
            count_touched, begin = change(
                changed[i],
                chosen,
                seconds,
                touched,
                was,
                count_touched,
                begin,
                near_first,
                near,
                overlap,
                data,
                states,
                own_first,
                own_task,
                own_hold,
                own_row,
                own_share,
                move_task,
                move_hold,
                move_ends,
                move_table,
            )
        most = now - heat * now * np.log(np.random.random())
        _add_work(seconds, stream, touched, was, count_touched, last, busy, work)
        accepted = work.max() <= most * (
            1 + 1e-9
        )  # what a stream has to do is below the step: most proposals end here
        if accepted:
            kept_end[begin:] = end[begin:]
            sweep(begin, seconds, stream, streams, first, before, start, end)
            new = end.max()
            accepted = new <= most
            if not accepted:
                end[begin:] = kept_end[begin:]
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
def _proposed(
    o,
    chosen,
    cheap,
    cheap_first,
    near_first,
    near,
    data,
    states,
    own_first,
    own_row,
    own_share,
    move_ends,
    move_table,
):  # noqa: ANN001, ANN202
    """A state for an operator: any, a cheap one, or the one that suits a neighbour."""
    kind = np.random.random()
    if kind < 0.35:
        return np.random.randint(states[o])
    if kind < 0.7 or near_first[o] == near_first[o + 1]:
        return cheap[cheap_first[o] + np.random.randint(cheap_first[o + 1] - cheap_first[o])]
    m = near[near_first[o] + np.random.randint(near_first[o + 1] - near_first[o])]
    return _suited(o, m, chosen, data, states, own_first, own_row, own_share, move_ends, move_table)


@njit(cache=True)
def _alike(o, to, chosen, alike, nbytes_first, nbytes, changed, previous):  # noqa: ANN001, ANN202
    """Who changes: the operator, or at times all equal ones that agree with it. (How many, bytes more); `changed`, `previous` say who had what."""
    size, more, together = 0, 0.0, np.random.random() < 0.3
    for p in range(len(alike)):
        if p == o or together and alike[p] == alike[o] and chosen[p] == chosen[o]:
            changed[size], previous[size] = p, chosen[p]
            more += nbytes[nbytes_first[p] + to] - nbytes[nbytes_first[p] + chosen[p]]
            size += 1
    return size, more


@njit(cache=True)
def _add_work(seconds, stream, touched, was, count, last, busy, work):  # noqa: ANN001, ANN202
    """Writes what each stream has to do after a change into `work`; `busy` is before it. A task may be touched twice: its first entry counts."""
    work[:] = busy
    for i in range(count - 1, -1, -1):
        last[touched[i]] = was[i]
    for i in range(count):
        k = touched[i]
        if last[k] >= 0:
            if stream[k] >= 0:
                work[stream[k]] += seconds[k] - last[k]
            last[k] = -1.0


@njit(cache=True)
def _suited(o, m, chosen, data, states, own_first, own_row, own_share, move_ends, move_table):  # noqa: ANN001, ANN202
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

"""Plans by Markov chain Monte Carlo (Metropolis-Hastings) on the simulator.

FlexFlow (MLSys 2019, section 6), with the settings that the paper leaves open. A chain changes the
states of one or a few operators, replays the tasks that this touches, and accepts with probability
min(1, exp(-increase / (T x seconds))). T is a part of the step's own time, so nothing depends on
how long a step is; it falls over a chain. Chains start from given plans, best first, and are
seeded: the same seed gives the same plan after the same number of proposals. The budget of bytes is
a constraint: a proposal that exceeds it is rejected at once.

Proposals:
- another state of an operator, any or one that is cheap by itself;
- the state that suits a neighbour best, which carries a split along the edges;
- the same new state for all equal operators that agree with it: all blocks of a network at once.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

from partita.search.base import Array, Progress, Report, SearchResult
from partita.search.simulated import Simulated, Undo, change, fill
from partita.simulation.engine import sweep

HOT, COLD = 0.02, 0.0005
"""T at the beginning and at the end of a chain."""
CHEAP = 12
"""States of an operator that count as cheap by themselves."""
CHUNK = 20_000
"""Proposals between two looks at the clock."""
LENGTH = 40
"""Proposals of a chain per operator and state that it may change (at least one chunk)."""


def run_chains(
    problem: Simulated,
    starts: Sequence[Sequence[int]],
    budget: float = np.inf,
    bound: float = 0.0,
    seconds: float = 2.0,
    seed: int = 0,
    report: Report | None = None,
    proposals: int | None = None,
) -> tuple[SearchResult, int]:
    """The best states of chains from `starts`, and the number of proposals.

    Args:
        starts: states, of which at least one fits the budget of bytes.
        bound: lower bound on all plans.
        seconds: time limit.
        proposals: number of proposals at which the chains end; None for no limit.
    """
    deadline = time.perf_counter() + seconds
    fitting = [np.asarray(s, np.int64) for s in starts if problem.memory_bytes(s) <= budget]
    fitting.sort(key=problem.seconds)
    best = fitting[0].copy()
    best_seconds = problem.seconds(fitting[0])
    chosen = best
    history = [Progress("simulated", best_seconds, bound)]
    made = 0
    stopped = False
    options = _options(problem)
    rng = np.random.default_rng(seed)
    length = chain_length(problem)
    schedule = _schedule(length, proposals) if len(options.free) else iter(())
    try:
        for chain, done, count in schedule:
            if done == 0 and best_seconds <= bound * (1 + 1e-9):
                break
            if done == 0:
                chosen = best if chain >= 2 * len(fitting) else fitting[chain % len(fitting)]
                chosen = chosen.copy()
            settings = _Settings(
                proposals=count,
                seed=int(rng.integers(1 << 31)),
                hot=_temperature(done / length),
                cold=_temperature((done + count) / length),
                best=best_seconds,
                budget=budget,
            )
            top = best.copy()
            top_seconds = _chain(settings, chosen, top, options, problem.order, problem.tables)
            made += count
            if top_seconds < best_seconds:
                best = top
                best_seconds = problem.seconds(top)
                history.append(Progress("simulated", best_seconds, bound))
            if report is not None:
                report(history[-1])
            if time.perf_counter() > deadline:
                break
    except KeyboardInterrupt:
        stopped = True
    result = SearchResult(
        states=tuple(map(int, best)),
        seconds=best_seconds,
        nbytes=problem.memory_bytes(best),
        bound=min(bound, best_seconds),
        feasible=True,
        history=tuple(history),
        stopped=stopped,
    )
    return result, made


def chain_length(problem: Simulated) -> int:
    """Proposals of one chain."""
    return max(CHUNK, LENGTH * int(problem.states.sum()))


def _temperature(progress: float) -> float:
    """T after a part of a chain."""
    return HOT * (COLD / HOT) ** progress


def _schedule(length: int, proposals: int | None) -> Iterator[tuple[int, int, int]]:
    """(chain, number of its proposals so far, number of the next ones), chain after chain."""
    remaining = proposals if proposals is not None else sys.maxsize
    for chain in itertools.count():
        for done in range(0, length, CHUNK):
            count = min(CHUNK, length - done, remaining)
            yield chain, done, count
            remaining -= count
            if remaining == 0:
                return


class _Settings(NamedTuple):
    """A piece of a chain: proposals, seed, T from `hot` to `cold`, best seconds so far, budget."""

    proposals: int
    seed: int
    hot: float
    cold: float
    best: float
    budget: float


class _Options(NamedTuple):
    """The states that a chain may propose, for compiled code.

    Cheap states of operator o are `cheap[cheap_first[o]:cheap_first[o + 1]]`.
    """

    free: Array
    """Operators with more than one state."""
    cheap_first: Array
    cheap: Array
    kinds: Array
    """Number per operator, the same for equal operators."""
    nbytes_first: Array
    nbytes: Array


def _options(problem: Simulated) -> _Options:
    cheap = _cheap_states(problem)
    return _Options(
        free=np.flatnonzero(problem.states > 1),
        cheap_first=np.cumsum([0, *map(len, cheap)]),
        cheap=np.concatenate(cheap),
        kinds=problem.kinds,
        nbytes_first=problem.nbytes_first,
        nbytes=problem.nbytes,
    )


def _cheap_states(problem: Simulated) -> list[Array]:
    """Per operator, the states of least seconds by themselves."""
    tables = problem.tables
    cheap = []
    for o, count in enumerate(problem.states):
        total = np.zeros(count)
        for slot in range(tables.slot_first[o], tables.slot_first[o + 1]):
            row = tables.slot_row[slot]
            total = total + tables.data[row : row + count] * tables.slot_share[slot]
        cheap.append(np.argsort(total, kind="stable")[:CHEAP])
    return cheap


class _Step(NamedTuple):
    """The simulated step of a chain: seconds and times of its tasks, and work of its streams."""

    seconds: Array
    start: Array
    end: Array
    previous_end: Array
    busy: Array
    """Per stream, seconds of its tasks."""
    work: Array
    """The same with the current proposal."""
    undo: Undo
    before: Array
    """Scratch of `_add_work`: per task its seconds before a proposal, -1 if untouched."""


@njit(cache=True)
def _simulate(chosen, order, tables):
    """The step of the chosen states."""
    tasks = len(order.stream)
    step = _Step(
        np.zeros(tasks),
        np.zeros(tasks),
        np.zeros(tasks),
        np.empty(tasks),
        np.zeros(order.streams),
        np.zeros(order.streams),
        Undo(np.empty(4 * tasks, np.int64), np.empty(4 * tasks)),
        np.full(tasks, -1.0),
    )
    fill(chosen, step.seconds, tables)
    _replay(np.int64(0), step, order)
    for k in range(tasks):
        if order.stream[k] >= 0:
            step.busy[order.stream[k]] += step.seconds[k]
    return step


@njit(cache=True)
def _replay(begin, step, order):
    """Simulates the tasks from `begin` on."""
    sweep(
        begin,
        step.seconds,
        order.stream,
        order.streams,
        order.first,
        order.before,
        step.start,
        step.end,
    )


@njit(cache=True)
def _chain(settings, chosen, top, options, order, tables):
    """Makes proposals from `chosen`, which it changes; the best seconds, with states in `top`."""
    np.random.seed(settings.seed)
    operators = len(tables.states)
    step = _simulate(chosen, order, tables)
    seconds = step.seconds
    end = step.end
    undo = step.undo
    undo_task = undo.task
    undo_seconds = undo.seconds
    free = options.free
    now = end.max()
    best = settings.best
    nbytes = 0.0
    for o in range(operators):
        nbytes += options.nbytes[options.nbytes_first[o] + chosen[o]]
    changed = np.empty(operators, np.int64)
    previous = np.empty(operators, np.int64)
    for n in range(settings.proposals):
        cooling = n / settings.proposals
        heat = settings.hot * (settings.cold / settings.hot) ** cooling
        o = free[np.random.randint(len(free))]
        state = _proposed(o, chosen, options, tables)
        if state == chosen[o]:
            continue
        size, extra = _changed_operators(o, state, chosen, options, changed, previous)
        if nbytes + extra > settings.budget and extra > 0:
            continue
        for i in range(size):
            chosen[changed[i]] = state
        touched = np.int64(0)
        begin = len(order.stream)
        for i in range(size):
            touched, begin = change(changed[i], chosen, seconds, undo, touched, begin, tables)
        limit = now - heat * now * np.log(np.random.random())
        if _accept(limit, touched, begin, step, order):
            now = end.max()
            nbytes += extra
            for s in range(len(step.work)):
                step.busy[s] = step.work[s]
            if now < best * (1 - 1e-12):
                best = now
                for p in range(operators):
                    top[p] = chosen[p]
        else:
            for i in range(size):
                chosen[changed[i]] = previous[i]
            for i in range(touched - 1, -1, -1):
                seconds[undo_task[i]] = undo_seconds[i]
    return best


@njit(cache=True)
def _accept(limit, touched, begin, step, order):
    """Whether the step with a proposal takes at most `limit` seconds; if so, its times are kept.

    The work of a stream is a lower bound of the step: most proposals end there, without a replay.
    """
    _add_work(touched, step, order.stream)
    if step.work.max() > limit * (1 + 1e-9):
        return False
    end = step.end
    previous_end = step.previous_end
    for k in range(begin, len(end)):
        previous_end[k] = end[k]
    _replay(begin, step, order)
    if end.max() <= limit:
        return True
    for k in range(begin, len(end)):
        end[k] = previous_end[k]
    return False


@njit(cache=True)
def _proposed(o, chosen, options, tables):
    """A state for an operator: any, a cheap one, or the one that suits a neighbour."""
    lottery = np.random.random()
    if lottery < 0.35:
        return np.random.randint(tables.states[o])
    near_count = tables.near_first[o + 1] - tables.near_first[o]
    if lottery < 0.7 or near_count == 0:
        cheap_count = options.cheap_first[o + 1] - options.cheap_first[o]
        return options.cheap[options.cheap_first[o] + np.random.randint(cheap_count)]
    m = tables.near[tables.near_first[o] + np.random.randint(near_count)]
    return _suited(o, m, chosen, tables)


@njit(cache=True)
def _changed_operators(o, state, chosen, options, changed, previous):
    """Writes the operators of a proposal into `changed`, and their states into `previous`.

    It is the operator alone, or sometimes all equal operators that agree with it.

    Returns:
        (number of operators, additional bytes).
    """
    size = 0
    extra = 0.0
    together = np.random.random() < 0.3
    kinds = options.kinds
    nbytes = options.nbytes
    begin = 0 if together else o
    end = len(kinds) if together else o + 1
    for p in range(begin, end):
        if p == o or kinds[p] == kinds[o] and chosen[p] == chosen[o]:
            first = options.nbytes_first[p]
            changed[size] = p
            previous[size] = chosen[p]
            extra += nbytes[first + state] - nbytes[first + chosen[p]]
            size += 1
    return size, extra


@njit(cache=True)
def _add_work(touched, step, stream):
    """Writes the seconds of each stream's tasks after a change into `step.work`.

    A task may be touched twice: its first entry counts.
    """
    seconds = step.seconds
    before = step.before
    work = step.work
    task = step.undo.task
    previous = step.undo.seconds
    for s in range(len(work)):
        work[s] = step.busy[s]
    for i in range(touched - 1, -1, -1):
        before[task[i]] = previous[i]
    for i in range(touched):
        k = task[i]
        if before[k] >= 0:
            if stream[k] >= 0:
                work[stream[k]] += seconds[k] - before[k]
            before[k] = -1.0


@njit(cache=True)
def _suited(o, m, chosen, tables):
    """The state of an operator that takes least seconds together with one of its moves."""
    minimum = np.inf
    best = chosen[o]
    home = tables.move_ends[m, 0]
    reader = tables.move_ends[m, 1]
    columns = tables.states[reader]
    begin = tables.move_table[m]
    slots = range(tables.slot_first[o], tables.slot_first[o + 1])
    data = tables.data
    slot_row = tables.slot_row
    slot_share = tables.slot_share
    for state in range(tables.states[o]):
        a = state if home == o else chosen[home]
        b = state if reader == o else chosen[reader]
        total = data[begin + a * columns + b]
        for s in slots:
            total += data[slot_row[s] + state] * slot_share[s]
        if total < minimum:
            minimum = total
            best = state
    return best

"""Which tensors stay on a device of too little memory: a plan of little traffic between host and device.

`planned` gives the cheapest way through the states COST(S, T) of Roc (Jia et al., MLSys 2020, section 5) where there are few tensors: S, the
operators done, always the first ones of the order given; T, the tensors on the device and on the host. Beside loading and saving, a tensor
may be made again by running its operator again. The time is exponential in the tensors alive at once: beyond `SMALL` tensors or `LIMIT`
states the plan is the best of several caches that know the future, and says so by `exact`. They drop what is used furthest ahead (Belady 1966),
rather what the host has already, and may run families of operators again. `lru` is the ordinary cache to compare with, and
`bound` says what nothing can fall below. No jax here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import scipy.optimize
import scipy.sparse

from partita.errors import GraphError
from partita.units import format_bytes

SMALL = 24
"""Tensors up to which the least is searched for."""

LIMIT = 20_000
"""States after which a search ends."""

WEIGHTS = (1.0, 1.5, 2.0, 3.0)
"""How much rather a cache drops a tensor that the host has than one that would have to be saved first."""


@dataclass(frozen=True)
class Operator:
    """What an operator reads and writes; `scratch` bytes while it runs; `seconds` to run it again, None where it must not be; `family`, those that are
    run again alike."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch: int = 0
    seconds: float | None = None
    family: str = ""

    @cached_property
    def tensors(self) -> frozenset[str]:
        return frozenset(self.reads + self.writes)


@dataclass(frozen=True)
class Work:
    """Operators in their order, the bytes of tensors, and `fixed` bytes always held. A tensor that nobody writes begins on the host."""

    operators: tuple[Operator, ...]
    bytes: dict[str, int]
    fixed: int = 0

    @cached_property
    def uses(self) -> dict[str, list[int]]:
        """The positions of the operators that read each tensor."""
        found: dict[str, list[int]] = {t: [] for t in self.bytes}
        for i, operator in enumerate(self.operators):
            for tensor in dict.fromkeys(operator.reads):
                found[tensor].append(i)
        return found

    def alive(self, done: int) -> frozenset[str]:
        """Tensors that operators still read after the first `done`."""
        return frozenset(t for t, uses in self.uses.items() if uses and uses[-1] >= done)

    def given(self) -> frozenset[str]:
        """Tensors that begin on the host."""
        return frozenset(self.bytes) - {t for o in self.operators for t in o.writes}

    def compulsory(self) -> int:
        """Bytes that have to come from the host, whatever the budget."""
        return self.size(t for t in self.given() if self.uses[t])

    def size(self, tensors: Iterable[str]) -> int:
        return sum(self.bytes[t] for t in tensors)

    def least(self) -> int:
        """The smallest possible budget in bytes: the largest operator with what it reads and writes."""
        return self.fixed + max(self.size(o.tensors) + o.scratch for o in self.operators)

    def need(self) -> int:
        """Bytes of the fullest moment where all stays on the device from when it is made, or given, to its last use."""
        held = self.size(self.given() & self.alive(0))
        most = 0
        for i, o in enumerate(self.operators):
            held += self.size(dict.fromkeys(o.writes))
            most = max(most, held + o.scratch)
            held -= self.size(t for t in o.tensors if not self.uses[t] or self.uses[t][-1] <= i)
        return self.fixed + most


@dataclass(frozen=True)
class Action:
    """One thing to do: 'load' or 'save' (copy) or 'drop' a tensor, 'run' an operator, or run it 'again'."""

    what: str
    name: str


@dataclass(frozen=True)
class MemoryPlan:
    """Actions in order; bytes between host and device; the cost, which counts seconds of running again as bytes; whether it is the least."""

    actions: tuple[Action, ...]
    traffic: int
    cost: float
    exact: bool


def planned(work: Work, budget: int, bandwidth: float) -> MemoryPlan:
    """A plan of little cost within a budget in bytes; `bandwidth` in bytes a second makes bytes of seconds. GraphError below `work.least()`."""
    best = lru(work, budget)
    compulsory = work.compulsory()
    if best.cost == compulsory:
        return MemoryPlan(best.actions, best.traffic, best.cost, True)
    weights = {weight: _Cache(work, budget, bandwidth, weight).plan() for weight in WEIGHTS}
    weight = min(weights, key=lambda w: weights[w].cost)
    best = min(best, weights[weight], key=lambda plan: plan.cost)
    again: frozenset[str] = frozenset()
    for family in dict.fromkeys(
        o.family for o in work.operators if o.family and o.seconds is not None
    ):
        try:
            other = _Cache(work, budget, bandwidth, weight, again | {family}).plan()
        except _NoRoom:
            continue
        if other.cost < best.cost:
            best, again = other, again | {family}
    if best.cost == compulsory:
        return MemoryPlan(best.actions, best.traffic, best.cost, True)
    return (
        _searched(work, budget, bandwidth, best.cost) if len(work.bytes) <= SMALL else None
    ) or best


def lru(work: Work, budget: int) -> MemoryPlan:
    """What a cache does that loads on demand and drops what was used longest ago, saved first where the host has no copy."""
    if budget < work.least():
        raise GraphError(
            f'A memory of {format_bytes(budget)} is too little: the largest operator alone needs {work.least():,} bytes; give memory="{work.least()} B" or more.'
        )
    return _Cache(work, budget).plan()


def bound(work: Work, budget: int) -> float:
    """Bytes that every plan within a budget moves at least if it runs no operator again: the least of a linear programme.

    A tensor stays on the device between two of its uses, in part, or is loaded for the second; where it did not begin on the host it is saved as far as it
    ever went. During every operator what stays has place beside what that reads, writes and needs inside. Plans are the solutions in whole numbers.
    """
    free = np.array(
        [budget - work.fixed - work.size(o.tensors) - o.scratch for o in work.operators], float
    )
    used: dict[str, list[int]] = {t: [] for t in work.bytes}
    for i, operator in enumerate(work.operators):
        for tensor in operator.tensors:
            used[tensor].append(i)
    given, always = work.given(), float(work.compulsory())
    gaps = [(t, a, b) for t, uses in used.items() for a, b in pairwise(uses) if b > a + 1]
    saved = {
        t: len(gaps) + k
        for k, t in enumerate(dict.fromkeys(t for t, _, _ in gaps if t not in given))
    }
    sizes = np.array([work.bytes[t] for t, _, _ in gaps] + [work.bytes[t] for t in saved], float)
    if not gaps:
        return always
    price = np.where(np.arange(len(sizes)) < len(gaps), -sizes, sizes)
    lengths = np.array([b - a - 1 for _, a, b in gaps])
    between = np.concatenate([np.arange(a + 1, b) for _, a, b in gaps])
    which = np.repeat(np.arange(len(gaps)), lengths)
    held = scipy.sparse.csr_array(
        (sizes[which], (between, which)), shape=(len(work.operators), len(sizes))
    )
    went = [(k, saved[t]) for k, (t, _, _) in enumerate(gaps) if t in saved]  # stays or was saved
    pairs = np.array(went, int).reshape(-1, 2)
    row = np.repeat(np.arange(len(pairs)), 2)
    either = scipy.sparse.csr_array(
        (-np.ones(pairs.size), (row, pairs.ravel())), shape=(len(pairs), len(sizes))
    )
    found = scipy.optimize.linprog(
        price,
        scipy.sparse.vstack([held, either]),
        np.append(free, -np.ones(len(pairs))),
        bounds=(0, 1),
    )
    return always + float(sizes[: len(gaps)].sum()) + found.fun


class _NoRoom(Exception):
    """What is wanted at once does not fit."""


class _Cache:
    """A device's memory while operators run in their order. With a `weight` it drops what is used furthest ahead, the distance times the weight where the
    host has a copy, or can have it made again by an operator of the families `again`; without, what was used longest ago."""

    def __init__(
        self,
        work: Work,
        budget: int,
        bandwidth: float = 0.0,
        weight: float | None = None,
        again: frozenset[str] = frozenset(),
    ) -> None:
        self.work, self.room, self.bandwidth, self.weight = (
            work,
            budget - work.fixed,
            bandwidth,
            weight,
        )
        self.makers = {
            t: o
            for o in work.operators
            if o.family in again and o.seconds is not None
            for t in o.writes
        }
        self.uses = work.uses
        if self.makers:  # what another tensor is made from is used whenever that one is
            self.uses = {t: list(uses) for t, uses in work.uses.items()}
            for operator in reversed(work.operators):
                later = sorted(
                    {u for t in operator.writes if t in self.makers for u in self.uses[t]}
                )
                for tensor in operator.reads if later else ():
                    self.uses[tensor] = sorted({*self.uses[tensor], *later})
        self.held: dict[str, None] = {}  # used longest ago first
        self.host = set(work.given())
        self.actions: list[Action] = []
        self.bytes, self.moved, self.cost, self.now = 0, 0, 0.0, 0

    def plan(self) -> MemoryPlan:
        for i, operator in enumerate(self.work.operators):
            self.now = i
            self._have(operator.reads, operator.tensors)
            self._run("run", operator, operator.tensors)
            for tensor in [
                t for t in dict.fromkeys(operator.reads + operator.writes) if t in self.held
            ]:
                self._touch(tensor)
                if self._next(tensor, self.now + 1) is None:
                    self._drop(tensor)
        return MemoryPlan(tuple(self.actions), self.moved, self.moved + self.cost, False)

    def _have(self, tensors: tuple[str, ...], wanted: frozenset[str]) -> None:
        """Makes or loads what is not there, and drops nothing of `wanted`."""
        for tensor in tensors:
            if tensor not in self.held and tensor not in self.host:
                self._make_again(self.makers[tensor], wanted)
        missing = [t for t in dict.fromkeys(tensors) if t not in self.held]
        self._make_room(self.work.size(missing), wanted)
        for tensor in missing:
            self._copy("load", tensor)
            self._hold(tensor)

    def _make_again(self, maker: Operator, wanted: frozenset[str]) -> None:
        for held in [t for t in maker.writes if t in self.held]:
            self._drop(held)
        wanted |= maker.tensors
        self._have(maker.reads, wanted)
        self._run("again", maker, wanted)
        self.cost += (maker.seconds or 0.0) * self.bandwidth
        for unused in [
            t for t in maker.tensors if t in self.held and self._next(t, self.now) is None
        ]:
            self._drop(unused)

    def _run(self, what: str, operator: Operator, wanted: frozenset[str]) -> None:
        new = [t for t in dict.fromkeys(operator.writes) if t not in self.held]
        self._make_room(self.work.size(new) + operator.scratch, wanted)
        self.actions.append(Action(what, operator.name))
        for tensor in new:
            self._hold(tensor)

    def _next(self, tensor: str, after: int) -> int | None:
        uses = self.uses[tensor]
        at = bisect_left(uses, after)
        return uses[at] if at < len(uses) else None

    def _make_room(self, size: int, wanted: frozenset[str]) -> None:
        if self.bytes + size <= self.room:
            return
        others = [t for t in self.held if t not in wanted]
        if self.weight is not None:
            others.sort(key=self._distance)
            others.reverse()
        for tensor in others:
            if (
                tensor not in self.host
                and tensor not in self.makers
                and self._next(tensor, self.now) is not None
            ):
                self._copy("save", tensor)
                self.host.add(tensor)
            self._drop(tensor)
            if self.bytes + size <= self.room:
                return
        raise _NoRoom

    def _distance(self, tensor: str) -> float:
        ahead = self._next(tensor, self.now)
        if ahead is None or self.weight is None:  # kept for what was not made again after all
            return float("inf")
        return (ahead - self.now) * (
            self.weight if tensor in self.host or tensor in self.makers else 1.0
        )

    def _copy(self, what: str, tensor: str) -> None:
        self.actions.append(Action(what, tensor))
        self.moved += self.work.bytes[tensor]

    def _hold(self, tensor: str) -> None:
        self.held[tensor] = None
        self.bytes += self.work.bytes[tensor]

    def _touch(self, tensor: str) -> None:
        del self.held[tensor]
        self.held[tensor] = None

    def _drop(self, tensor: str) -> None:
        self.actions.append(Action("drop", tensor))
        del self.held[tensor]
        self.bytes -= self.work.bytes[tensor]


State = tuple[int, frozenset[str], frozenset[str]]
"""(operators done, tensors on the device, tensors on the host)"""


def _searched(work: Work, budget: int, bandwidth: float, most: float) -> MemoryPlan | None:
    """The plan of least cost, which is `most` or less; None where the search is too long."""
    room = budget - work.fixed
    alive = [_needed(work, i) for i in range(len(work.operators) + 1)]
    start: State = (0, frozenset(), work.given() & alive[0])
    best: dict[State, float] = {start: 0.0}
    came: dict[State, tuple[State, tuple[Action, ...], int]] = {}
    queue: list[tuple[float, int, int, State]] = [(0.0, 0, 0, start)]
    count = 0
    while queue:
        cost, _, _, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        if state[0] == len(work.operators):
            return _traced(state, came, cost)
        if len(best) > LIMIT:
            break
        for after, actions, moved, price in _next(work, state, room, bandwidth, alive):
            total = cost + price
            if total <= most and total < best.get(after, float("inf")):
                best[after], came[after] = total, (state, actions, moved)
                count += 1
                heapq.heappush(queue, (total, -after[0], count, after))
    return None


def _needed(work: Work, done: int) -> frozenset[str]:
    """Tensors alive, and those from which they can be made again."""
    found = set(work.alive(done))
    for operator in reversed(work.operators[:done]):
        if operator.seconds is not None and found & set(operator.writes):
            found |= set(operator.reads)
    return frozenset(found)


def _next(
    work: Work, state: State, room: int, bandwidth: float, alive: list[frozenset[str]]
) -> Iterator[tuple[State, tuple[Action, ...], int, float]]:
    """(state after, actions, bytes moved, cost) of all that may be done. What nobody can use any more goes at once."""
    done, device, host = state
    free = room - work.size(device)
    for i in range(done + 1):
        operator = work.operators[i]
        new = frozenset(operator.writes) - device
        again = i < done
        if again and (
            operator.seconds is None
            or len(new) < len(set(operator.writes))
            or not new & alive[done]
        ):
            continue
        if not device.issuperset(operator.reads) or work.size(new) + operator.scratch > free:
            continue
        after = done if again else done + 1
        dead = (device | new) - alive[after]
        actions = (
            Action("again" if again else "run", operator.name),
            *(Action("drop", t) for t in sorted(dead)),
        )
        price = (operator.seconds or 0.0) * bandwidth if again else 0.0
        yield (after, (device | new) - dead, host & alive[after]), actions, 0, price
    for tensor in sorted(host - device):
        if work.bytes[tensor] <= free:
            yield (
                (done, device | {tensor}, host),
                (Action("load", tensor),),
                work.bytes[tensor],
                float(work.bytes[tensor]),
            )
    for tensor in sorted(device):
        drop = Action("drop", tensor)
        yield (done, device - {tensor}, host), (drop,), 0, 0.0
        if tensor not in host:
            size = work.bytes[tensor]
            yield (
                (done, device - {tensor}, host | {tensor}),
                (Action("save", tensor), drop),
                size,
                float(size),
            )


def _traced(
    state: State, came: dict[State, tuple[State, tuple[Action, ...], int]], cost: float
) -> MemoryPlan:
    steps, traffic = [], 0
    while state in came:
        state, actions, moved = came[state]
        steps.append(actions)
        traffic += moved
    return MemoryPlan(tuple(a for actions in reversed(steps) for a in actions), traffic, cost, True)

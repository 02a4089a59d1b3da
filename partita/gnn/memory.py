"""Which tensors stay on a device of too little memory: the plan of least traffic between host and device, by dynamic programming.

`planned` gives the cheapest way through the states COST(S, T) of Roc (Jia et al., MLSys 2020, section 5): S, the operators done, always
the first ones of the order given; T, the tensors on the device and on the host. Beside loading and saving, a tensor may be made again by
running its operator again. `lru` is the ordinary cache to compare with. The time is exponential in the tensors alive at once: beyond
`LIMIT` states the plan is that of `lru`, and says so by `exact`. No jax here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from partita.errors import GraphError
from partita.units import format_bytes

LIMIT = 200_000
"""States after which a search ends."""


@dataclass(frozen=True)
class Operator:
    """What an operator reads and writes; `scratch` bytes while it runs; `seconds` to run it again, None where it must not be."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    scratch: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Work:
    """Operators in their order, the bytes of tensors, and `fixed` bytes always held. A tensor that nobody writes begins on the host."""

    operators: tuple[Operator, ...]
    bytes: dict[str, int]
    fixed: int = 0

    def alive(self, done: int) -> frozenset[str]:
        """Tensors that operators still read after the first `done`."""
        return frozenset(t for o in self.operators[done:] for t in o.reads)

    def given(self) -> frozenset[str]:
        """Tensors that begin on the host."""
        return frozenset(self.bytes) - {t for o in self.operators for t in o.writes}

    def size(self, tensors: frozenset[str]) -> int:
        return sum(self.bytes[t] for t in tensors)

    def least(self) -> int:
        """The smallest possible budget in bytes: the largest operator with what it reads and writes."""
        return self.fixed + max(self.size(frozenset(o.reads + o.writes)) + o.scratch for o in self.operators)

    def need(self) -> int:
        """Bytes of the fullest moment where all stays on the device from when it is made, or given, to its last use."""
        held, most = self.given() & self.alive(0), 0
        for i, o in enumerate(self.operators):
            held |= frozenset(o.writes)
            most = max(most, self.size(held) + o.scratch)
            held &= self.alive(i + 1)
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


State = tuple[int, frozenset[str], frozenset[str]]
"""(operators done, tensors on the device, tensors on the host)"""


def planned(work: Work, budget: int, bandwidth: float) -> MemoryPlan:
    """The plan of least cost within a budget in bytes; `bandwidth` in bytes a second makes bytes of seconds. GraphError below `work.least()`."""
    fallback = lru(work, budget)
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
            if total <= fallback.cost and total < best.get(after, float("inf")):
                best[after], came[after] = total, (state, actions, moved)
                count += 1
                heapq.heappush(queue, (total, -after[0], count, after))
    return fallback


def lru(work: Work, budget: int) -> MemoryPlan:
    """What a cache does that loads on demand and drops what was used longest ago, saved first where the host has no copy."""
    if budget < work.least():
        raise GraphError(
            f'A memory of {format_bytes(budget)} is too little: the largest operator alone needs {work.least():,} bytes; give memory="{work.least()} B" or more.'
        )
    room, actions, moved = budget - work.fixed, [], 0
    held: list[str] = []  # used longest ago first
    host = set(work.given())
    for i, operator in enumerate(work.operators):
        wanted = frozenset(operator.reads + operator.writes)
        for tensor in [t for t in dict.fromkeys(operator.reads) if t not in held]:
            moved += _make_room(work, held, host, wanted, room - work.bytes[tensor], actions)
            actions.append(Action("load", tensor))
            moved += work.bytes[tensor]
            held.append(tensor)
        more = work.size(frozenset(operator.writes) - set(held)) + operator.scratch
        moved += _make_room(work, held, host, wanted, room - more, actions)
        actions.append(Action("run", operator.name))
        held = [t for t in held if t not in wanted] + [t for t in dict.fromkeys(operator.reads + operator.writes)]
        actions += [Action("drop", t) for t in held if t not in work.alive(i + 1)]
        held = [t for t in held if t in work.alive(i + 1)]
    return MemoryPlan(tuple(actions), moved, float(moved), False)


def _make_room(work: Work, held: list[str], host: set[str], wanted: frozenset[str], room: int, actions: list[Action]) -> int:
    moved = 0
    while work.size(frozenset(held)) > room:
        tensor = next(t for t in held if t not in wanted)
        if tensor not in host:
            actions.append(Action("save", tensor))
            host.add(tensor)
            moved += work.bytes[tensor]
        actions.append(Action("drop", tensor))
        held.remove(tensor)
    return moved


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
        if again and (operator.seconds is None or not new & alive[done]):
            continue
        if not device.issuperset(operator.reads) or work.size(new) + operator.scratch > free:
            continue
        after = done if again else done + 1
        dead = (device | new) - alive[after]
        actions = (Action("again" if again else "run", operator.name), *(Action("drop", t) for t in sorted(dead)))
        price = (operator.seconds or 0.0) * bandwidth if again else 0.0
        yield (after, (device | new) - dead, host & alive[after]), actions, 0, price
    for tensor in sorted(host - device):
        if work.bytes[tensor] <= free:
            yield (done, device | {tensor}, host), (Action("load", tensor),), work.bytes[tensor], float(work.bytes[tensor])
    for tensor in sorted(device):
        drop = Action("drop", tensor)
        yield (done, device - {tensor}, host), (drop,), 0, 0.0
        if tensor not in host:
            size = work.bytes[tensor]
            yield (done, device - {tensor}, host | {tensor}), (Action("save", tensor), drop), size, float(size)


def _traced(state: State, came: dict[State, tuple[State, tuple[Action, ...], int]], cost: float) -> MemoryPlan:
    steps, traffic = [], 0
    while state in came:
        state, actions, moved = came[state]
        steps.append(actions)
        traffic += moved
    return MemoryPlan(tuple(a for actions in reversed(steps) for a in actions), traffic, cost, True)

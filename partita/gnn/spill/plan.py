"""Memory plans: which tensors stay on a device of too little memory, and which are copied.

`plan_memory` gives the cheapest way through the states COST(S, T) of Roc (Jia et al., MLSys 2020,
section 5) where there are few tensors. S are the operators done, always the first ones of the given
order. T are the tensors on the device and on the host. Beside loading and saving, a tensor may be
rematerialized by running its operator again. The time is exponential in the tensors alive at once.
Beyond `SMALL` tensors or `LIMIT` states the plan is the best of several caches that know the
future, and its field `exact` is false. Those caches drop the tensor that is used furthest ahead
(Belady 1966), prefer one that the host has a copy of, and may rematerialize families of operators.

`lru_plan` is the ordinary cache to compare with, `traffic_bound` a lower bound of the traffic.
There is no JAX in here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse

from partita.errors import GraphError
from partita.units import format_bytes

SMALL = 24
"""Tensors up to which the cheapest plan is searched for."""

LIMIT = 20_000
"""States after which a search ends."""

FIRST_BANDWIDTH = 1e10
"""Bytes per second between host and device before any were measured."""

WEIGHTS = (1.0, 1.5, 2.0, 3.0)
"""Preferences of a cache for dropping a tensor with a copy on the host over one that would have to
be saved first."""


# -------------------------------------------------------------------------------------- the work


@dataclass(frozen=True)
class LayerOperator:
    """An operator of a step.

    reads, writes   names of tensors
    scratch         bytes while it runs
    seconds         seconds to run it again; None if it must not be rematerialized
    family          operators that are rematerialized alike
    """

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
class StepWork:
    """The operators of a step in their order, and the bytes of tensors.

    A tensor that no operator writes begins on the host.

    `fixed`: bytes that are always allocated on the device.
    """

    operators: tuple[LayerOperator, ...]
    bytes: dict[str, int]
    fixed: int = 0

    @cached_property
    def uses(self) -> dict[str, list[int]]:
        """The positions of the operators that read each tensor."""
        uses: dict[str, list[int]] = {tensor: [] for tensor in self.bytes}
        for i, operator in enumerate(self.operators):
            for tensor in dict.fromkeys(operator.reads):
                uses[tensor].append(i)
        return uses

    def alive(self, done: int) -> frozenset[str]:
        """Tensors that operators read after the first `done`."""
        return frozenset(t for t, uses in self.uses.items() if uses and uses[-1] >= done)

    def inputs(self) -> frozenset[str]:
        """Tensors that begin on the host."""
        written = {tensor for operator in self.operators for tensor in operator.writes}
        return frozenset(self.bytes) - written

    def compulsory(self) -> int:
        """Bytes that are loaded from the host in every plan."""
        return self.size(tensor for tensor in self.inputs() if self.uses[tensor])

    def size(self, tensors: Iterable[str]) -> int:
        """Bytes of tensors together."""
        return sum(self.bytes[tensor] for tensor in tensors)

    def smallest_budget(self) -> int:
        """Bytes of the largest operator with its tensors: no plan does with less."""
        operators = [self.size(o.tensors) + o.scratch for o in self.operators]
        return self.fixed + max(operators)

    def need(self) -> int:
        """Peak bytes if every tensor stays on the device from its begin to its last use."""
        allocated = self.size(self.inputs() & self.alive(0))
        peak = 0
        for i, operator in enumerate(self.operators):
            allocated += self.size(dict.fromkeys(operator.writes))
            peak = max(peak, allocated + operator.scratch)
            dead = [t for t in operator.tensors if not self.uses[t] or self.uses[t][-1] <= i]
            allocated -= self.size(dead)
        return self.fixed + peak


@dataclass(frozen=True)
class Action:
    """One action: 'load', 'save' or 'drop' a tensor, 'run' or 'rematerialize' an operator."""

    kind: str
    name: str


@dataclass(frozen=True)
class MemoryPlan:
    """Actions in order.

    traffic     bytes between host and device
    cost        traffic, and the seconds of rematerialization as bytes
    exact       whether no plan costs less
    """

    actions: tuple[Action, ...]
    traffic: int
    cost: float
    exact: bool


@dataclass(frozen=True)
class OperatorMemory:
    """The memory of a device around one operator of a plan.

    copied_bytes    bytes between host and device before the operator runs
    allocated_bytes bytes while it runs, scratch included
    """

    operator: LayerOperator
    copied_bytes: int
    allocated_bytes: int


def followed(work: StepWork, plan: MemoryPlan) -> Iterator[OperatorMemory]:
    """The operators of a plan as they run, with the copies before each."""
    operators = {operator.name: operator for operator in work.operators}
    device: set[str] = set()
    copied_bytes = 0
    for action in plan.actions:
        if action.kind == "drop":
            device.remove(action.name)
        elif action.kind in ("load", "save"):
            device.add(action.name)
            copied_bytes += work.bytes[action.name]
        else:
            operator = operators[action.name]
            device.update(operator.writes)
            allocated_bytes = work.fixed + work.size(device) + operator.scratch
            yield OperatorMemory(operator, copied_bytes, allocated_bytes)
            copied_bytes = 0


def plan_memory(work: StepWork, budget: int, bandwidth: float) -> MemoryPlan:
    """A plan of little cost within a budget in bytes.

    GraphError for less than `work.smallest_budget()`.

    `bandwidth`, in bytes per second, converts the seconds of rematerialization to bytes.
    """
    best = lru_plan(work, budget)
    compulsory = work.compulsory()
    if best.cost > compulsory:
        best = _best_cache(work, budget, bandwidth, best)
    if best.cost == compulsory:
        return replace(best, exact=True)
    if len(work.bytes) > SMALL:
        return best
    return _searched(work, budget, bandwidth, best.cost) or best


def _best_cache(work: StepWork, budget: int, bandwidth: float, best: MemoryPlan) -> MemoryPlan:
    """The best of a plan and of caches that know the future.

    Families are rematerialized one after the other, while the cost falls.
    """
    plans = {}
    for weight in WEIGHTS:
        plans[weight] = _Cache(work, budget, bandwidth, weight).plan()
    weight = min(plans, key=lambda weight: plans[weight].cost)
    best = min(best, plans[weight], key=lambda plan: plan.cost)
    families = [o.family for o in work.operators if o.family and o.seconds is not None]
    rematerialized: frozenset[str] = frozenset()
    for family in dict.fromkeys(families):
        try:
            cache = _Cache(work, budget, bandwidth, weight, rematerialized | {family})
            plan = cache.plan()
        except _OverBudgetError:
            continue
        if plan.cost < best.cost:
            best = plan
            rematerialized |= {family}
    return best


def lru_plan(work: StepWork, budget: int) -> MemoryPlan:
    """The plan of a cache that loads on demand and drops the least recently used tensor.

    It saves a tensor first if the host has no copy.
    """
    smallest = work.smallest_budget()
    if budget < smallest:
        raise GraphError(
            f"A memory of {format_bytes(budget)} is too small: the largest operator alone needs "
            f'{smallest:,} bytes. Use memory="{smallest} B" or more.'
        )
    return _Cache(work, budget).plan()


# ----------------------------------------------------------------------------------- lower bound


def traffic_bound(work: StepWork, budget: int) -> float:
    """Lower bound of the traffic of plans without rematerialization, bytes: a linear programme.

    A tensor stays on the device between two of its uses, in part, or is loaded for the second. One
    that did not begin on the host is saved to the extent that it ever left. During every operator,
    the tensors that stay fit beside those that it reads, writes and needs inside. Plans are the
    solutions in whole numbers.
    """
    gaps = _gaps(work)
    inputs = work.inputs()
    compulsory = float(work.compulsory())
    if not gaps:
        return compulsory
    saves = list(dict.fromkeys(gap.tensor for gap in gaps if gap.tensor not in inputs))
    save_variable = {tensor: len(gaps) + k for k, tensor in enumerate(saves)}
    gap_bytes = [work.bytes[gap.tensor] for gap in gaps]
    sizes = np.array(gap_bytes + [work.bytes[tensor] for tensor in saves], float)
    prices = np.where(np.arange(len(sizes)) < len(gaps), -sizes, sizes)

    lengths = np.array([gap.end - gap.begin - 1 for gap in gaps])
    between = np.concatenate([np.arange(gap.begin + 1, gap.end) for gap in gaps])
    gap_index = np.repeat(np.arange(len(gaps)), lengths)
    shape = (len(work.operators), len(sizes))
    allocated = scipy.sparse.csr_array((sizes[gap_index], (between, gap_index)), shape=shape)
    free = [budget - work.fixed - work.size(o.tensors) - o.scratch for o in work.operators]

    # A tensor that did not begin on the host stays through a gap, or was saved.
    pairs = [
        (k, save_variable[gap.tensor]) for k, gap in enumerate(gaps) if gap.tensor in save_variable
    ]
    pair_variables = np.array(pairs, int).reshape(-1, 2)
    rows = np.repeat(np.arange(len(pairs)), 2)
    ones = -np.ones(pair_variables.size)
    shape = (len(pairs), len(sizes))
    either = scipy.sparse.csr_array((ones, (rows, pair_variables.ravel())), shape=shape)
    solution = scipy.optimize.linprog(
        prices,
        scipy.sparse.vstack([allocated, either]),
        np.append(np.array(free, float), -np.ones(len(pairs))),
        bounds=(0, 1),
    )
    return compulsory + float(sizes[: len(gaps)].sum()) + solution.fun


class _Gap(NamedTuple):
    """A tensor between two operators, by position, that use it, with others in between."""

    tensor: str
    begin: int
    end: int


def _gaps(work: StepWork) -> list[_Gap]:
    """All gaps, by tensor."""
    used: dict[str, list[int]] = {tensor: [] for tensor in work.bytes}
    for i, operator in enumerate(work.operators):
        for tensor in operator.tensors:
            used[tensor].append(i)
    gaps = []
    for tensor, uses in used.items():
        for begin, end in pairwise(uses):
            if end > begin + 1:
                gaps.append(_Gap(tensor, begin, end))
    return gaps


# ---------------------------------------------------------------------------------------- caches


class _OverBudgetError(Exception):
    """The tensors that are needed at once do not fit."""


class _Cache:
    """The memory of a device while operators run in their order.

    With a `weight` it drops the tensor that is used furthest ahead. The distance of a tensor counts
    that many times if the host has a copy, or if an operator of the `rematerialized` families makes
    it. Without a weight it drops the least recently used tensor.
    """

    def __init__(
        self,
        work: StepWork,
        budget: int,
        bandwidth: float = 0.0,
        weight: float | None = None,
        rematerialized: frozenset[str] = frozenset(),
    ) -> None:
        self.work = work
        self.capacity = budget - work.fixed
        self.bandwidth = bandwidth
        self.weight = weight
        self.makers: dict[str, LayerOperator] = {}
        for operator in work.operators:
            if operator.family in rematerialized and operator.seconds is not None:
                self.makers |= dict.fromkeys(operator.writes, operator)
        self.uses = self._all_uses() if self.makers else work.uses
        # The least recently used tensor comes first.
        self.device: dict[str, None] = {}
        self.host = set(work.inputs())
        self.actions: list[Action] = []
        self.bytes = 0
        self.traffic = 0
        self.extra_cost = 0.0
        self.position = 0

    def _all_uses(self) -> dict[str, list[int]]:
        """Uses of tensors, with those of the tensors that are rematerialized from them."""
        all_uses = {tensor: list(uses) for tensor, uses in self.work.uses.items()}
        for operator in reversed(self.work.operators):
            later: set[int] = set()
            for tensor in operator.writes:
                if tensor in self.makers:
                    later |= set(all_uses[tensor])
            for tensor in operator.reads if later else ():
                all_uses[tensor] = sorted({*all_uses[tensor], *later})
        return all_uses

    def plan(self) -> MemoryPlan:
        """The actions of this cache. _OverBudgetError if too much is needed at once."""
        for i, operator in enumerate(self.work.operators):
            self.position = i
            self._provide(operator.reads, operator.tensors)
            self._run("run", operator, operator.tensors)
            for tensor in dict.fromkeys(operator.reads + operator.writes):
                if tensor not in self.device:
                    continue
                self._touch(tensor)
                if self._next_use(tensor, i + 1) is None:
                    self._drop(tensor)
        cost = self.traffic + self.extra_cost
        return MemoryPlan(tuple(self.actions), self.traffic, cost, False)

    def _provide(self, tensors: tuple[str, ...], needed: frozenset[str]) -> None:
        """Rematerializes or loads missing tensors, and drops none that is `needed`."""
        for tensor in tensors:
            if tensor not in self.device and tensor not in self.host:
                self._rematerialize(self.makers[tensor], needed)
        missing = [t for t in dict.fromkeys(tensors) if t not in self.device]
        self._make_room(self.work.size(missing), needed)
        for tensor in missing:
            self._copy("load", tensor)
            self._allocate(tensor)

    def _rematerialize(self, maker: LayerOperator, needed: frozenset[str]) -> None:
        for tensor in [t for t in maker.writes if t in self.device]:
            self._drop(tensor)
        needed |= maker.tensors
        self._provide(maker.reads, needed)
        self._run("rematerialize", maker, needed)
        self.extra_cost += (maker.seconds or 0.0) * self.bandwidth
        for tensor in maker.tensors:
            if tensor in self.device and self._next_use(tensor, self.position) is None:
                self._drop(tensor)

    def _run(self, kind: str, operator: LayerOperator, needed: frozenset[str]) -> None:
        new = [t for t in dict.fromkeys(operator.writes) if t not in self.device]
        self._make_room(self.work.size(new) + operator.scratch, needed)
        self.actions.append(Action(kind, operator.name))
        for tensor in new:
            self._allocate(tensor)

    def _next_use(self, tensor: str, position: int) -> int | None:
        """The first use of a tensor at a position or later."""
        uses = self.uses[tensor]
        index = bisect_left(uses, position)
        return uses[index] if index < len(uses) else None

    def _make_room(self, size: int, needed: frozenset[str]) -> None:
        """Drops tensors until `size` bytes are free."""
        if self.bytes + size <= self.capacity:
            return
        others = [t for t in self.device if t not in needed]
        if self.weight is not None:
            others.sort(key=self._distance)
            others.reverse()
        for tensor in others:
            if self._must_be_saved(tensor):
                self._copy("save", tensor)
                self.host.add(tensor)
            self._drop(tensor)
            if self.bytes + size <= self.capacity:
                return
        raise _OverBudgetError

    def _must_be_saved(self, tensor: str) -> bool:
        """Whether a tensor is used again and can come from nowhere else."""
        elsewhere = tensor in self.host or tensor in self.makers
        return not elsewhere and self._next_use(tensor, self.position) is not None

    def _distance(self, tensor: str) -> float:
        """Operators up to the next use, times the weight where the tensor need not be saved."""
        ahead = self._next_use(tensor, self.position)
        if ahead is None or self.weight is None:
            return float("inf")
        elsewhere = tensor in self.host or tensor in self.makers
        return (ahead - self.position) * (self.weight if elsewhere else 1.0)

    def _copy(self, kind: str, tensor: str) -> None:
        self.actions.append(Action(kind, tensor))
        self.traffic += self.work.bytes[tensor]

    def _allocate(self, tensor: str) -> None:
        self.device[tensor] = None
        self.bytes += self.work.bytes[tensor]

    def _touch(self, tensor: str) -> None:
        """Makes a tensor the most recently used one."""
        del self.device[tensor]
        self.device[tensor] = None

    def _drop(self, tensor: str) -> None:
        self.actions.append(Action("drop", tensor))
        del self.device[tensor]
        self.bytes -= self.work.bytes[tensor]


# ---------------------------------------------------------------------------------------- search


class _State(NamedTuple):
    """The number of operators done, the tensors on the device, the tensors on the host."""

    done: int
    device: frozenset[str]
    host: frozenset[str]


class _Move(NamedTuple):
    """A state after actions, the bytes that these copy, and their cost."""

    after: _State
    actions: tuple[Action, ...]
    traffic: int
    cost: float


def _searched(work: StepWork, budget: int, bandwidth: float, most: float) -> MemoryPlan | None:
    """The cheapest plan (Dijkstra's algorithm), if it costs `most` or less.

    None where the search is too long.
    """
    moves = _Moves(work, budget, bandwidth)
    start = _State(0, frozenset(), work.inputs() & moves.needed[0])
    costs: dict[_State, float] = {start: 0.0}
    before: dict[_State, tuple[_State, _Move]] = {}
    queue: list[tuple[float, int, int, _State]] = [(0.0, 0, 0, start)]
    count = 0
    while queue:
        cost, _, _, state = heapq.heappop(queue)
        if cost > costs[state]:
            continue
        if state.done == len(work.operators):
            return _traced(state, before, cost)
        if len(costs) > LIMIT:
            break
        for move in moves.of(state):
            total = cost + move.cost
            if total <= most and total < costs.get(move.after, float("inf")):
                costs[move.after] = total
                before[move.after] = (state, move)
                count += 1
                heapq.heappush(queue, (total, -move.after.done, count, move.after))
    return None


class _Moves:
    """The moves from a state. Tensors that no operator can use any more are dropped at once.

    `needed[i]`: tensors that are alive after i operators, and those that they can be rematerialized
    from.
    """

    def __init__(self, work: StepWork, budget: int, bandwidth: float) -> None:
        self.work = work
        self.capacity = budget - work.fixed
        self.bandwidth = bandwidth
        self.needed = [_needed(work, i) for i in range(len(work.operators) + 1)]

    def of(self, state: _State) -> Iterator[_Move]:
        """All moves from a state."""
        free = self.capacity - self.work.size(state.device)
        for i in range(state.done + 1):
            move = self._run(state, i, free)
            if move is not None:
                yield move
        for tensor in sorted(state.host - state.device):
            size = self.work.bytes[tensor]
            if size <= free:
                after = state._replace(device=state.device | {tensor})
                yield _Move(after, (Action("load", tensor),), size, float(size))
        for tensor in sorted(state.device):
            drop = Action("drop", tensor)
            after = state._replace(device=state.device - {tensor})
            yield _Move(after, (drop,), 0, 0.0)
            if tensor not in state.host:
                size = self.work.bytes[tensor]
                saved = after._replace(host=state.host | {tensor})
                yield _Move(saved, (Action("save", tensor), drop), size, float(size))

    def _run(self, state: _State, i: int, free: int) -> _Move | None:
        """The move of running operator i, the next one or an earlier one; None if it is no use."""
        operator = self.work.operators[i]
        new = frozenset(operator.writes) - state.device
        again = i < state.done
        if again and not self._may_rematerialize(state, operator, new):
            return None
        reads_present = state.device.issuperset(operator.reads)
        if not reads_present or self.work.size(new) + operator.scratch > free:
            return None
        done = state.done if again else state.done + 1
        device = state.device | new
        dead = device - self.needed[done]
        run = Action("rematerialize" if again else "run", operator.name)
        drops = [Action("drop", tensor) for tensor in sorted(dead)]
        after = _State(done, device - dead, state.host & self.needed[done])
        cost = (operator.seconds or 0.0) * self.bandwidth if again else 0.0
        return _Move(after, (run, *drops), 0, cost)

    def _may_rematerialize(
        self, state: _State, operator: LayerOperator, new: frozenset[str]
    ) -> bool:
        """Whether none of the operator's tensors is on the device, and one is needed."""
        all_missing = len(new) == len(set(operator.writes))
        useful = bool(new & self.needed[state.done])
        return operator.seconds is not None and all_missing and useful


def _needed(work: StepWork, done: int) -> frozenset[str]:
    """Tensors alive after `done` operators, and those that they can be rematerialized from."""
    needed = set(work.alive(done))
    for operator in reversed(work.operators[:done]):
        if operator.seconds is not None and needed & set(operator.writes):
            needed |= set(operator.reads)
    return frozenset(needed)


def _traced(state: _State, before: dict[_State, tuple[_State, _Move]], cost: float) -> MemoryPlan:
    """The plan that leads to a state."""
    moves = []
    while state in before:
        state, move = before[state]
        moves.append(move)
    actions = [action for move in reversed(moves) for action in move.actions]
    return MemoryPlan(tuple(actions), sum(move.traffic for move in moves), cost, True)

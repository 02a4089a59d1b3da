"""A cost network whose cost is a simulated step: overlapping seconds are not added up.

The tasks of a step are the same under every plan (`simulation.step`). A state gives its operator's
tasks their seconds; a pair of states gives those of the moves between them. All tables are laid
end to end in one array, so a change of one operator's state is a few reads and one replay of the
tasks from the first changed one on: microseconds, compiled by numba.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numba import njit

from partita.cost.evaluate import PARTS
from partita.search.base import Array, EqualByContent, Problem, RecomputedProblem
from partita.search.network import CostNetwork, MoveKey
from partita.search.pipeline_cuts import Cuts
from partita.simulation.engine import Tasks, sweep
from partita.simulation.structure import (
    Slot,
    step_structure,
    with_repeated_slots,
    without_idle_slots,
)
from partita.simulation.tasks import step_tasks


class TaskTables(NamedTuple):
    """Seconds of all tasks by state, for compiled code.

    A slot is a part of an operator's work that one task does. Slots of operator o are
    `slot_first[o]` to `slot_first[o + 1]`; its moves are `near[near_first[o]:near_first[o + 1]]`.
    """

    overlap: float
    data: Array
    """All tables, end to end."""
    states: Array
    """Number of states of each operator."""
    slot_first: Array
    slot_task: Array
    slot_hold: Array
    """Task that a slot delays by the part of its time that does not overlap, -1 for none."""
    slot_row: Array
    """Start of a slot's seconds in `data`, one per state."""
    slot_share: Array
    """Part of these seconds that the slot takes."""
    move_task: Array
    move_hold: Array
    move_ends: Array
    """[move, 2]: the operators whose states are the rows and columns of its table."""
    move_table: Array
    """Start of a move's table in `data`."""
    near_first: Array
    near: Array


class TaskOrder(NamedTuple):
    """Streams and dependences of tasks, for `engine.sweep` in compiled code."""

    stream: Array
    streams: int
    first: Array
    before: Array


class Undo(NamedTuple):
    """Changed tasks and their previous seconds, in order of change."""

    task: Array
    seconds: Array


@dataclass(frozen=True, eq=False)
class Simulated(EqualByContent):
    """The tasks of a step, and their seconds and bytes by state."""

    tasks: Tasks
    tables: TaskTables
    kinds: Array = field(compare=False)
    """Number per operator, the same for operators with equal states and costs."""
    nbytes_first: Array
    """Per operator, the start of its states in `nbytes`."""
    nbytes: Array
    """Bytes by state, operator after operator."""

    @property
    def states(self) -> Array:
        """Number of states of each operator."""
        return self.tables.states

    @property
    def order(self) -> TaskOrder:
        tasks = self.tasks
        return TaskOrder(tasks.stream, tasks.streams, tasks.first, tasks.before)

    def seconds(self, states: Sequence[int] | Array) -> float:
        """Simulated seconds of a step under these states."""
        seconds = np.zeros(self.tasks.count)
        start = np.empty(self.tasks.count)
        end = np.empty(self.tasks.count)
        fill(np.asarray(states, np.int64), seconds, self.tables)
        sweep(0, seconds, *self.order, start, end)
        return float(end.max(initial=0.0))

    def memory_bytes(self, states: Sequence[int] | Array) -> float:
        """Bytes of a device under these states, as the search adds them up."""
        entries = self.nbytes_first[:-1] + np.asarray(states, np.int64)
        return float(self.nbytes[entries].sum())


def simulated(network: CostNetwork, space: RecomputedProblem | None = None) -> Simulated:
    """The simulation of a cost network.

    `space`: the states of the simulation, in which operators may be computed again; None for those
    of the network.
    """
    overlap = network.placement.machine.backend.overlap
    step = step_structure(network.graph, network.terms)
    if space is not None:
        step = with_repeated_slots(step, _runs(network, space))
    is_timed = _Timed(network)
    step = without_idle_slots(step, [is_timed(slot) for slot in step.slots])
    laid = step_tasks(step, np.zeros(len(step.slots)), overlap)
    problem = network.problem if space is None else space.problem
    joined = _Joined(network, space)
    slots: list[list[_OwnSlot]] = [[] for _ in network.states]
    moves: list[_MoveSlot] = []
    near: list[list[int]] = [[] for _ in network.states]
    for n, slot in enumerate(step.slots):
        if not is_timed(slot):
            continue
        task = int(laid.first_task[n])
        hold = int(laid.blocking_task[n])
        if slot.kind == "move":
            begin = joined.put_move(slot)
            near[slot.operator].append(len(moves))
            near[slot.reader].append(len(moves))
            moves.append(_MoveSlot(task, hold, slot.operator, slot.reader, begin))
        else:
            row = joined.put_part(slot)
            slots[slot.operator].append(_OwnSlot(task, hold, row, slot.share))
    flat = list(itertools.chain(*slots))
    tables = TaskTables(
        overlap=overlap,
        data=joined.data(),
        states=_integers(map(len, problem.seconds)),
        slot_first=_starts(slots),
        slot_task=_integers(slot.task for slot in flat),
        slot_hold=_integers(slot.hold for slot in flat),
        slot_row=_integers(slot.row for slot in flat),
        slot_share=np.array([slot.share for slot in flat], float),
        move_task=_integers(move.task for move in moves),
        move_hold=_integers(move.hold for move in moves),
        move_ends=_integers((move.home, move.reader) for move in moves).reshape(-1, 2),
        move_table=_integers(move.table for move in moves),
        near_first=_starts(near),
        near=_integers(itertools.chain(*near)),
    )
    return Simulated(
        tasks=laid.tasks,
        tables=tables,
        kinds=np.array(problem.kinds),
        nbytes_first=_starts(problem.nbytes),
        nbytes=np.concatenate(problem.nbytes),
    )


class _OwnSlot(NamedTuple):
    """A slot of an operator; attributes of `TaskTables`."""

    task: int
    hold: int
    row: int
    share: float


class _MoveSlot(NamedTuple):
    """A move between two operators; attributes of `TaskTables`."""

    task: int
    hold: int
    home: int
    reader: int
    table: int


def _runs(network: CostNetwork, space: RecomputedProblem) -> list[list[int]]:
    """The operators between narrow cuts that may be computed again, a list per pair of cuts."""
    ends = Cuts(network.graph, network.terms).ends
    runs: list[list[int]] = [[] for _ in range(len(ends) + 1)]
    for operator, again in enumerate(space.again):
        if again.any():
            runs[bisect_left(ends, operator)].append(operator)
    return runs


class _Joined:
    """Tables end to end in one array, each key once."""

    def __init__(self, network: CostNetwork, space: RecomputedProblem | None) -> None:
        self._network = network
        self._space = space
        self._arrays: list[Array] = []
        self._begin: dict[Hashable, int] = {}
        self._size = 0

    def _put(self, key: Hashable, table: Array) -> int:
        """Start of a table in the array."""
        if key not in self._begin:
            self._begin[key] = self._size
            self._arrays.append(np.ascontiguousarray(table, float).reshape(-1))
            self._size += table.size
        return self._begin[key]

    def put_move(self, slot: Slot) -> int:
        """Start of the table of a move."""
        key = _move_key(slot)
        kind = self._network.move_kinds[key]
        table = self._network.moves[key]
        space = self._space
        if space is None:
            return self._put(("move", kind), table)
        kinds = space.problem.kinds
        name = ("move", kind, kinds[slot.operator], kinds[slot.reader], slot.again)
        if name in self._begin:
            return self._begin[name]
        table = table[np.ix_(space.origin[slot.operator], space.origin[slot.reader])]
        return self._put(name, table * space.again[slot.reader] if slot.again else table)

    def put_part(self, slot: Slot) -> int:
        """Start of the seconds of a part of an operator's work, by state."""
        operator = slot.operator
        parts = self._network.parts[operator]
        kind = self._network.problem.kinds[operator]
        if self._space is not None:
            kind = self._space.problem.kinds[operator]
            parts = parts[:, self._space.origin[operator]]
            if slot.again:
                parts = parts * self._space.again[operator]
        return self._put(("parts", kind, slot.again), parts) + _part(slot) * parts.shape[1]

    def data(self) -> Array:
        return np.concatenate([*self._arrays, np.zeros(1)])


def _starts(rows: Sequence[Sized]) -> Array:
    """Start of each row if all stand in one array, and the end of the last."""
    return np.cumsum([0, *map(len, rows)])


def _integers(values: Iterable[object]) -> Array:
    return np.array(list(values), np.int64)


def _part(slot: Slot) -> int:
    """Row of an operator's work in `CostNetwork.parts`."""
    return PARTS.index((slot.kind, slot.phase))


def _move_key(slot: Slot) -> MoveKey:
    return slot.operator, slot.reader, slot.phase, slot.read_phase


class _Timed:
    """Whether tasks take time under any states; equal tables are read once."""

    def __init__(self, network: CostNetwork) -> None:
        self.network = network
        self._known: dict[Hashable, bool] = {}

    def __call__(self, slot: Slot) -> bool:
        network = self.network
        if slot.kind == "join":
            return False
        if slot.kind == "move":
            move = _move_key(slot)
            return move in network.moves and self._any(network.move_kinds[move], move)
        part = _part(slot)
        kind = network.problem.kinds[slot.operator]
        return self._any((kind, part), (slot.operator, part))

    def _any(self, kind: Hashable, place: MoveKey | tuple[int, int]) -> bool:
        """Whether an array of a kind has an entry other than 0."""
        if kind not in self._known:
            network = self.network
            if len(place) == 4:
                array = network.moves[place]
            else:
                operator, part = place
                array = network.parts[operator][part]
            self._known[kind] = bool(array.any())
        return self._known[kind]


def relaxed(network: CostNetwork) -> Problem:
    """An additive lower bound of the simulation: kernels, and the time that collectives delay them.

    One stream runs all of that, task after task, so no plan's step is shorter. The optimum of this
    problem is a lower bound on every plan.
    """
    return weighted(network, 1 - network.placement.machine.backend.overlap)


def weighted(network: CostNetwork, awaited: float) -> Problem:
    """The additive problem of kernels and of shares of collectives.

    Sums and gathers count for the time that they delay kernels. Exchanges and moves, for which
    kernels wait, count for the share `awaited`.
    """
    problem = network.problem
    visible = 1 - network.placement.machine.backend.overlap
    shares = {"compute": 1.0, "exchange": awaited, "sum": visible, "gather": visible}
    weights = [shares[kind] for kind, _ in PARTS]
    seconds: dict[int, Array] = {}
    for kind, parts in zip(problem.kinds, network.parts, strict=True):
        if kind not in seconds:
            seconds[kind] = np.array(weights) @ parts
    tables: dict[int, Array] = {}
    for ends, kind in problem.table_kinds.items():
        if kind not in tables:
            tables[kind] = problem.tables[ends] * awaited
    return replace(
        problem,
        seconds=[seconds[kind] for kind in problem.kinds],
        tables={ends: tables[kind] for ends, kind in problem.table_kinds.items()},
    )


@njit(cache=True)
def fill(chosen, seconds, tables):
    """Writes the seconds of every task under the chosen states."""
    visible = 1 - tables.overlap
    data = tables.data
    states = tables.states
    slot_first = tables.slot_first
    for o in range(len(states)):
        state = chosen[o]
        for s in range(slot_first[o], slot_first[o + 1]):
            row = tables.slot_row[s]
            value = data[row + state] * tables.slot_share[s]
            seconds[tables.slot_task[s]] = value
            hold = tables.slot_hold[s]
            if hold >= 0:
                seconds[hold] = value * visible
    for m in range(len(tables.move_task)):
        home = tables.move_ends[m, 0]
        reader = tables.move_ends[m, 1]
        row = tables.move_table[m] + chosen[home] * states[reader]
        value = data[row + chosen[reader]]
        seconds[tables.move_task[m]] = value
        hold = tables.move_hold[m]
        if hold >= 0:
            seconds[hold] = value * visible


@njit(cache=True)
def change(o, chosen, seconds, undo, count, begin, tables):
    """Writes the seconds that a new state of operator o changes.

    Returns:
        (number of entries of `undo` from now on, the first changed task or `begin` if smaller).
    """
    visible = 1 - tables.overlap
    data = tables.data
    states = tables.states
    slot_first = tables.slot_first
    near_first = tables.near_first
    undo_task = undo.task
    undo_seconds = undo.seconds
    state = chosen[o]
    for s in range(slot_first[o], slot_first[o + 1]):
        task = tables.slot_task[s]
        row = tables.slot_row[s]
        value = data[row + state] * tables.slot_share[s]
        if seconds[task] != value:
            hold = tables.slot_hold[s]
            count = _set(task, value, seconds, undo_task, undo_seconds, count)
            if hold >= 0:
                count = _set(hold, value * visible, seconds, undo_task, undo_seconds, count)
            begin = min(begin, task)
    for j in range(near_first[o], near_first[o + 1]):
        m = tables.near[j]
        home = tables.move_ends[m, 0]
        reader = tables.move_ends[m, 1]
        row = tables.move_table[m] + chosen[home] * states[reader]
        value = data[row + chosen[reader]]
        task = tables.move_task[m]
        if seconds[task] != value:
            hold = tables.move_hold[m]
            count = _set(task, value, seconds, undo_task, undo_seconds, count)
            if hold >= 0:
                count = _set(hold, value * visible, seconds, undo_task, undo_seconds, count)
            begin = min(begin, task)
    return count, begin


@njit(cache=True)
def _set(task, value, seconds, undo_task, undo_seconds, count):
    """Gives a task other seconds; the new number of undo entries."""
    undo_task[count] = task
    undo_seconds[count] = seconds[task]
    seconds[task] = value
    return count + 1

"""A cost network whose cost is a simulated step: overlapping seconds are not added up.

The tasks of a step are the same under every plan (`simulation.step`). A state gives its operator's
tasks their seconds; a pair of states gives those of the moves between them. All tables are laid
end to end in one array, so a change of one operator's state is a few reads and one replay of the
tasks from the first changed one on: microseconds, compiled by numba.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numba import njit

from partita.cost.evaluate import PARTS
from partita.search.base import EqualByContent, Problem
from partita.search.network import CostNetwork, MoveKey
from partita.simulation.engine import Tasks, sweep
from partita.simulation.structure import Slot, step_structure, without_idle_slots
from partita.simulation.tasks import step_tasks


class TaskTables(NamedTuple):
    """Seconds of all tasks by state, for compiled code.

    A slot is a part of an operator's work that one task does. Slots of operator o are
    `slot_first[o]` to `slot_first[o + 1]`; its moves are `near[near_first[o]:near_first[o + 1]]`.
    """

    overlap: float
    data: np.ndarray
    """All tables, end to end."""
    states: np.ndarray
    """Number of states of each operator."""
    slot_first: np.ndarray
    slot_task: np.ndarray
    slot_hold: np.ndarray
    """Task that a slot delays by the part of its time that does not overlap, -1 for none."""
    slot_row: np.ndarray
    """Start of a slot's seconds in `data`, one per state."""
    slot_share: np.ndarray
    """Part of these seconds that the slot takes."""
    move_task: np.ndarray
    move_hold: np.ndarray
    move_ends: np.ndarray
    """[move, 2]: the operators whose states are the rows and columns of its table."""
    move_table: np.ndarray
    """Start of a move's table in `data`."""
    near_first: np.ndarray
    near: np.ndarray


class TaskOrder(NamedTuple):
    """Streams and dependences of tasks, for `engine.sweep` in compiled code."""

    stream: np.ndarray
    streams: int
    first: np.ndarray
    before: np.ndarray


class Undo(NamedTuple):
    """Changed tasks and their previous seconds, in order of change."""

    task: np.ndarray
    seconds: np.ndarray


@dataclass(frozen=True, eq=False)
class Simulated(EqualByContent):
    """The tasks of a step, and their seconds and bytes by state."""

    tasks: Tasks
    tables: TaskTables
    kinds: np.ndarray = field(compare=False)
    """Number per operator, the same for operators with equal states and costs."""
    nbytes_first: np.ndarray
    """Per operator, the start of its states in `nbytes`."""
    nbytes: np.ndarray
    """Bytes by state, operator after operator."""

    @property
    def states(self) -> np.ndarray:
        """Number of states of each operator."""
        return self.tables.states

    @property
    def order(self) -> TaskOrder:
        tasks = self.tasks
        return TaskOrder(tasks.stream, tasks.streams, tasks.first, tasks.before)

    def seconds(self, states: Sequence[int] | np.ndarray) -> float:
        """Simulated seconds of a step under these states."""
        seconds = np.zeros(self.tasks.count)
        start = np.empty(self.tasks.count)
        end = np.empty(self.tasks.count)
        fill(np.asarray(states, np.int64), seconds, self.tables)
        sweep(0, seconds, *self.order, start, end)
        return float(end.max(initial=0.0))

    def memory_bytes(self, states: Sequence[int] | np.ndarray) -> float:
        """Bytes of a device under these states, as the search adds them up."""
        return float(self.nbytes[self.nbytes_first[:-1] + np.asarray(states, np.int64)].sum())


def simulated(network: CostNetwork) -> Simulated:
    """The simulation of a cost network."""
    overlap = network.placement.machine.backend.overlap
    step = step_structure(network.graph, network.terms)
    step = without_idle_slots(step, [_takes_time(network, slot) for slot in step.slots])
    laid = step_tasks(step, np.zeros(len(step.slots)), overlap)
    joined = _Joined()
    slots: list[list[tuple[int, int, int]]] = [[] for _ in network.graph.operators]
    shares: list[list[float]] = [[] for _ in network.graph.operators]
    moves: list[tuple[int, int, int, int, int]] = []
    for n, slot in enumerate(step.slots):
        if not _takes_time(network, slot):
            continue
        task = int(laid.first_task[n])
        hold = int(laid.blocking_task[n])
        operator = slot.operator
        if slot.kind == "move":
            key = _move_key(slot)
            begin = joined.put(("move", network.move_kinds[key]), network.moves[key])
            moves.append((task, hold, operator, slot.reader, begin))
        else:
            parts = network.parts[operator]
            begin = joined.put(("parts", network.problem.kinds[operator]), parts)
            row = begin + PARTS.index((slot.kind, slot.phase)) * parts.shape[1]
            slots[operator].append((task, hold, row))
            shares[operator].append(slot.share)
    near: list[list[int]] = [[] for _ in network.graph.operators]
    for m, (_, _, home, reader, _) in enumerate(moves):
        near[home].append(m)
        near[reader].append(m)
    slot_task, slot_hold, slot_row = np.array(_flat(slots), np.int64).reshape(-1, 3).T.copy()
    move_columns = np.array(moves, np.int64).reshape(-1, 5)
    tables = TaskTables(
        overlap=overlap,
        data=joined.data(),
        states=np.array([len(states) for states in network.states]),
        slot_first=_starts(slots),
        slot_task=slot_task,
        slot_hold=slot_hold,
        slot_row=slot_row,
        slot_share=np.array(_flat(shares), float),
        move_task=move_columns[:, 0].copy(),
        move_hold=move_columns[:, 1].copy(),
        move_ends=move_columns[:, 2:4].copy(),
        move_table=move_columns[:, 4].copy(),
        near_first=_starts(near),
        near=np.array(_flat(near), np.int64),
    )
    return Simulated(
        tasks=laid.tasks,
        tables=tables,
        kinds=np.array(network.problem.kinds),
        nbytes_first=_starts(network.states),
        nbytes=np.concatenate(network.problem.nbytes),
    )


class _Joined:
    """Tables end to end in one array, each key once."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._begin: dict[Hashable, int] = {}
        self._size = 0

    def put(self, key: Hashable, table: np.ndarray) -> int:
        """Start of a table in the array."""
        if key not in self._begin:
            self._begin[key] = self._size
            self._arrays.append(np.ascontiguousarray(table, float).reshape(-1))
            self._size += table.size
        return self._begin[key]

    def data(self) -> np.ndarray:
        return np.concatenate([*self._arrays, np.zeros(1)])


def _starts(rows: Sequence[Sequence[object]]) -> np.ndarray:
    """Start of each row if all stand in one array, and the end of the last."""
    return np.cumsum([0, *map(len, rows)])


def _flat(rows: Sequence[Sequence]) -> list:
    return [entry for row in rows for entry in row]


def _move_key(slot: Slot) -> MoveKey:
    return slot.operator, slot.reader, slot.phase, slot.read_phase


def _takes_time(network: CostNetwork, slot: Slot) -> bool:
    """Whether a task takes time under any states."""
    if slot.kind == "move":
        table = network.moves.get(_move_key(slot))
        return table is not None and bool(table.any())
    if slot.kind == "join":
        return False
    row = PARTS.index((slot.kind, slot.phase))
    return bool(network.parts[slot.operator][row].any())


def relaxed(network: CostNetwork) -> Problem:
    """An additive lower bound of the simulation: kernels, and the time that collectives delay them.

    One stream runs all of that, task after task, so no plan's step is shorter. The optimum of this
    problem is a lower bound on every plan.
    """
    problem = network.problem
    visible = 1 - network.placement.machine.backend.overlap
    weight = np.array([1.0 if kind == "compute" else visible for kind, _ in PARTS])
    seconds: dict[int, np.ndarray] = {}
    for kind, parts in zip(problem.kinds, network.parts, strict=True):
        if kind not in seconds:
            seconds[kind] = weight @ parts
    tables: dict[int, np.ndarray] = {}
    for ends, kind in problem.table_kinds.items():
        if kind not in tables:
            tables[kind] = problem.tables[ends] * visible
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
    for o in range(len(tables.states)):
        for s in range(tables.slot_first[o], tables.slot_first[o + 1]):
            value = data[tables.slot_row[s] + chosen[o]] * tables.slot_share[s]
            seconds[tables.slot_task[s]] = value
            if tables.slot_hold[s] >= 0:
                seconds[tables.slot_hold[s]] = value * visible
    for m in range(len(tables.move_task)):
        home = tables.move_ends[m, 0]
        reader = tables.move_ends[m, 1]
        row = tables.move_table[m] + chosen[home] * tables.states[reader]
        value = data[row + chosen[reader]]
        seconds[tables.move_task[m]] = value
        if tables.move_hold[m] >= 0:
            seconds[tables.move_hold[m]] = value * visible


@njit(cache=True)
def change(o, chosen, seconds, undo, count, begin, tables):
    """Writes the seconds that a new state of operator o changes.

    Returns:
        (number of entries of `undo` from now on, the first changed task or `begin` if smaller).
    """
    visible = 1 - tables.overlap
    data = tables.data
    undo_task = undo.task
    undo_seconds = undo.seconds
    for s in range(tables.slot_first[o], tables.slot_first[o + 1]):
        task = tables.slot_task[s]
        value = data[tables.slot_row[s] + chosen[o]] * tables.slot_share[s]
        if seconds[task] != value:
            hold = tables.slot_hold[s]
            count = _set(task, value, seconds, undo_task, undo_seconds, count)
            if hold >= 0:
                count = _set(hold, value * visible, seconds, undo_task, undo_seconds, count)
            begin = min(begin, task)
    for j in range(tables.near_first[o], tables.near_first[o + 1]):
        m = tables.near[j]
        home = tables.move_ends[m, 0]
        reader = tables.move_ends[m, 1]
        row = tables.move_table[m] + chosen[home] * tables.states[reader]
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

"""A cost network whose cost is a simulated step: what overlaps is not added up.

The tasks of a step are the same under every plan (`simulate.step`); a state gives its operator's tasks their seconds, and two states those of
the moves between them. All tables are laid end to end in one array, so that changing an operator's state is a few reads
and one replay of the tasks from the first changed one on: microseconds, compiled by numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from partita.cost.evaluate import PARTS
from partita.search.base import Problem
from partita.search.network import CostNetwork
from partita.simulation.engine import Tasks, sweep
from partita.simulation.structure import Slot, step_structure, without_idle_slots
from partita.simulation.tasks import step_tasks


@dataclass(frozen=True, eq=False)
class Simulated:
    """Tasks, and where their seconds stand in `data`: row `own_row[s]` of the operator's table for slot s of it, by state.

    Slots of operator o: `own_first[o]` to `own_first[o + 1]`. Moves that it takes part in: `near[near_first[o]:near_first[o + 1]]`.
    """

    tasks: Tasks
    overlap: float
    data: np.ndarray
    states: np.ndarray
    """How many states each operator has."""
    alike: np.ndarray
    """A number per operator, the same for those with equal states and costs."""
    own_first: np.ndarray
    own_task: np.ndarray
    own_hold: np.ndarray
    own_row: np.ndarray
    """Where in `data` the seconds of the slot begin, one per state."""
    own_share: np.ndarray
    move_task: np.ndarray
    move_hold: np.ndarray
    move_ends: np.ndarray
    """[move, 2]: the operators whose states are the rows and columns of its table."""
    move_table: np.ndarray
    near_first: np.ndarray
    near: np.ndarray
    nbytes_first: np.ndarray
    nbytes: np.ndarray
    """Bytes by state, operator after operator."""

    def seconds(self, states: Sequence[int] | np.ndarray) -> float:
        """The simulated seconds of a step under these states."""
        into = np.zeros(self.tasks.count)
        fill(np.asarray(states, np.int64), into, *self.where)
        start, end = np.empty(self.tasks.count), np.empty(self.tasks.count)
        sweep(0, into, *self.order, start, end)
        return float(end.max(initial=0.0))

    def memory_bytes(self, states: Sequence[int] | np.ndarray) -> float:
        """Bytes of a device under these states, as the search adds them up."""
        return float(self.nbytes[self.nbytes_first[:-1] + np.asarray(states, np.int64)].sum())

    @property
    def order(self) -> tuple[np.ndarray, int, np.ndarray, np.ndarray]:
        t = self.tasks
        return t.stream, t.streams, t.first, t.before

    @property
    def where(self) -> tuple[object, ...]:
        """What `fill` needs besides the states."""
        return (
            self.overlap,
            self.data,
            self.states,
            self.own_first,
            self.own_task,
            self.own_hold,
            self.own_row,
            self.own_share,
            self.move_task,
            self.move_hold,
            self.move_ends,
            self.move_table,
        )


def simulated(network: CostNetwork) -> Simulated:
    """The simulation of a cost network."""
    step, overlap = (
        step_structure(network.graph, network.terms),
        network.placement.machine.backend.overlap,
    )
    step = without_idle_slots(step, [_takes_time(network, slot) for slot in step.slots])
    laid = step_tasks(step, np.zeros(len(step.slots)), overlap)
    data: list[np.ndarray] = []
    at: dict[int, int] = {}
    size = 0

    def put(table: np.ndarray) -> int:
        """Where a table begins; of the same one the same place."""
        nonlocal size
        if id(table) not in at:
            at[id(table)] = size
            data.append(np.ascontiguousarray(table, float).reshape(-1))
            size += table.size
        return at[id(table)]

    own: list[list[tuple[int, int, int, float]]] = [[] for _ in network.graph.operators]
    moves: list[tuple[int, int, int, int, int]] = []
    for n, slot in enumerate(step.slots):
        task, hold = int(laid.first_task[n]), int(laid.blocking_task[n])
        if not _takes_time(network, slot):
            continue
        if slot.kind == "move":
            table = network.moves[slot.operator, slot.reader, slot.phase, slot.read_phase]
            moves.append((task, hold, slot.operator, slot.reader, put(table)))
        else:
            parts = network.parts[slot.operator]
            own[slot.operator].append(
                (
                    task,
                    hold,
                    put(parts) + PARTS.index((slot.kind, slot.phase)) * parts.shape[1],
                    slot.share,
                )
            )
    near: list[list[int]] = [[] for _ in network.graph.operators]
    for m, (_, _, home, reader, _) in enumerate(moves):
        near[home].append(m)
        near[reader].append(m)
    flat = [slot for mine in own for slot in mine]
    task, hold, row = np.array([slot[:3] for slot in flat], np.int64).reshape(-1, 3).T.copy()
    moved = np.array(moves, np.int64).reshape(-1, 5)
    starts = lambda rows: np.cumsum([0, *map(len, rows)])  # noqa: E731
    number: dict[int, int] = {}
    return Simulated(
        laid.tasks,
        overlap,
        np.concatenate([*data, np.zeros(1)]),
        np.array([len(s) for s in network.states]),
        np.array([number.setdefault(id(p), len(number)) for p in network.parts]),
        starts(own),
        task,
        hold,
        row,
        np.array([share for *_, share in flat], float),
        moved[:, 0].copy(),
        moved[:, 1].copy(),
        moved[:, 2:4].copy(),
        moved[:, 4].copy(),
        starts(near),
        np.array([m for mine in near for m in mine], np.int64),
        starts(network.states),
        np.concatenate(network.problem.nbytes),
    )


def _takes_time(network: CostNetwork, slot: Slot) -> bool:
    """Whether a task takes time under any states."""
    if slot.kind == "move":
        table = network.moves.get((slot.operator, slot.reader, slot.phase, slot.read_phase))
        return table is not None and bool(table.any())
    return slot.kind != "join" and bool(
        network.parts[slot.operator][PARTS.index((slot.kind, slot.phase))].any()
    )


def relaxed(network: CostNetwork) -> Problem:
    """An additive problem below the simulation: what a device's kernels take, and what collectives hold them up for.

    One stream runs all of that, task after task, so no plan's step is shorter. Its optimum is a bound on every plan's.
    """
    part = 1 - network.placement.machine.backend.overlap
    weight = np.array([1.0 if kind == "compute" else part for kind, _ in PARTS])
    made: dict[int, np.ndarray] = {}

    def once(array: np.ndarray, value: np.ndarray) -> np.ndarray:
        return made.setdefault(id(array), value)

    problem = Problem([once(p, weight @ p) for p in network.parts], network.problem.nbytes)
    for ends, table in network.problem.tables.items():
        problem.tables[ends] = once(table, table * part)
    return problem


@njit(cache=True)
def fill(
    chosen,
    into,
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
):  # noqa: ANN001, ANN201
    """Writes the seconds of every task under the chosen states."""
    for o in range(len(states)):
        for s in range(own_first[o], own_first[o + 1]):
            seconds = data[own_row[s] + chosen[o]] * own_share[s]
            into[own_task[s]] = seconds
            if own_hold[s] >= 0:
                into[own_hold[s]] = seconds * (1 - overlap)
    for m in range(len(move_task)):
        reader = move_ends[m, 1]
        seconds = data[move_table[m] + chosen[move_ends[m, 0]] * states[reader] + chosen[reader]]
        into[move_task[m]] = seconds
        if move_hold[m] >= 0:
            into[move_hold[m]] = seconds * (1 - overlap)


@njit(cache=True)
def change(  # noqa: ANN201, PLR0913
    o,
    chosen,
    into,
    touched,
    was,
    count,
    begin,
    near_first,
    near,  # noqa: ANN001
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
    move_table,  # noqa: ANN001
):
    """Writes the seconds that operator o changes: (how many tasks are `touched` by now, the first of them); `was` is what they took."""
    for s in range(own_first[o], own_first[o + 1]):
        seconds = data[own_row[s] + chosen[o]] * own_share[s]
        count, begin = _set(
            own_task[s], own_hold[s], seconds, overlap, into, touched, was, count, begin
        )
    for j in range(near_first[o], near_first[o + 1]):
        m = near[j]
        reader = move_ends[m, 1]
        seconds = data[move_table[m] + chosen[move_ends[m, 0]] * states[reader] + chosen[reader]]
        count, begin = _set(
            move_task[m], move_hold[m], seconds, overlap, into, touched, was, count, begin
        )
    return count, begin


@njit(cache=True)
def _set(task, hold, seconds, overlap, into, touched, was, count, begin):  # noqa: ANN001, ANN202
    """Gives a task, and what it holds up, other seconds."""
    if into[task] == seconds:
        return count, begin
    touched[count], was[count] = task, into[task]
    into[task] = seconds
    count += 1
    if hold >= 0:
        touched[count], was[count] = hold, into[hold]
        into[hold] = seconds * (1 - overlap)
        count += 1
    return count, min(begin, task)

"""From the slots of a step to tasks for the engine: seconds of every slot under a plan, streams and
links of device groups.

Devices that do the same at the same time are a *device group* (`groups`) with one representative
device, so the number of devices changes seconds and not the number of tasks. A group has two
streams: its kernels in program order, and its collectives in the order in which their operands are
computed, as XLA issues them. The machine's backend decides what overlaps:

- `overlap` 0 (XLA:CPU): kernels and collectives share one stream, and a step takes the sum of its
  parts.
- otherwise collectives run in the second stream, and block the kernels beside them for the fraction
  `1 - overlap` of their time.

Seconds are those of `cost.evaluate` and `cost.moves`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain

import numpy as np

from partita.cost.evaluate import PARTS, OperatorCost
from partita.cost.moves import Placement, move_seconds, planned_moves
from partita.cost.operator_terms import Move
from partita.graph.operator_graph import IdentityKey, Phase
from partita.plans.layout import Layout, label_sharding
from partita.simulation.engine import Tasks
from partita.simulation.structure import Structure

KERNELS, LINKS = 0, 1
"""The two streams of a device group."""
BETWEEN = -1
"""In place of a stream: a transfer between groups, which occupies links and no stream."""


def slot_seconds(
    structure: Structure,
    costs: Sequence[OperatorCost],
    edges: Iterable[Move],
    placement: Placement,
    layout: Layout,
) -> np.ndarray:
    """[slot]: seconds of every slot under one plan.

    `costs` are those of every operator under its only choice.
    """
    moves: dict[tuple[int, int, Phase, Phase], float] = defaultdict(float)
    for move in planned_moves(edges, layout):
        source = label_sharding(move.source, layout.assignments[move.home])
        target = label_sharding(move.target, layout.assignments[move.reader])
        key = (move.home, move.reader, move.phase, move.read_phase)
        moves[key] += move_seconds(move, placement, source, target)
    parts = [cost.parts()[:, 0] for cost in costs]
    seconds = np.zeros(len(structure.slots))
    for n, slot in enumerate(structure.slots):
        if slot.kind == "move":
            seconds[n] = moves[slot.operator, slot.reader, slot.phase, slot.read_phase]
        elif slot.kind != "join":
            part = PARTS.index((slot.kind, slot.phase))
            seconds[n] = parts[slot.operator][part] * slot.share
    return seconds


@dataclass(frozen=True, slots=True)
class GroupTask:
    """The part of a slot that some device groups do together, in `seconds`.

    It waits until all `groups` are ready. Afterwards its result is in the groups `reached`; none
    for the first half of a move in two tasks. On `KERNELS` or `LINKS` it takes its turn in that
    stream of all its groups. On `BETWEEN` it occupies the links out of the groups `links_out` and
    those into the groups `links_in`.
    """

    groups: tuple[int, ...]
    seconds: float
    stream: int
    reached: tuple[int, ...] = ()
    links_out: tuple[int, ...] = ()
    links_in: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """The origin of a task: its slot, the groups whose stream runs it, and whether it only blocks
    kernels.
    """

    slot: int
    group_task: GroupTask
    groups: tuple[int, ...]
    blocks_kernels: bool = False

    @property
    def shown_groups(self) -> tuple[int, ...]:
        """The groups with a span of this task: a transfer between groups belongs to the senders."""
        return self.group_task.links_out if self.group_task.stream == BETWEEN else self.groups


@dataclass(frozen=True, eq=False)
class StepTasks:
    """A step as tasks for the engine. `infos[k]` is the origin of task k."""

    tasks: Tasks
    first_task: np.ndarray
    """[slot]: the first task of a slot."""
    blocking_task: np.ndarray
    """[slot]: the first task that blocks kernels for a slot, -1 for none."""
    overlap: float
    infos: Sequence[TaskInfo]

    def in_kernel_stream(self, task: int) -> bool:
        """Whether a task runs in a kernel stream."""
        info = self.infos[task]
        stream = info.group_task.stream
        return info.blocks_kernels or stream == KERNELS or (stream == LINKS and self.overlap == 0)


def step_tasks(
    structure: Structure,
    seconds: np.ndarray,
    overlap: float,
) -> StepTasks:
    """The tasks of one representative device. `seconds` are those of the slots."""
    seconds = np.asarray(seconds)
    step = _untimed_tasks(IdentityKey(structure), overlap)
    blocking = step.blocking_task >= 0
    task_seconds = np.zeros(step.tasks.count)
    task_seconds[step.first_task] = seconds
    task_seconds[step.blocking_task[blocking]] = seconds[blocking] * (1 - overlap)
    return replace(step, tasks=replace(step.tasks, seconds=task_seconds))


@lru_cache(maxsize=8)
def _untimed_tasks(key: IdentityKey[Structure], overlap: float) -> StepTasks:
    """`step_tasks` without seconds: one group waits for no other, so its tasks do not depend on
    their seconds.
    """
    stream = {"join": BETWEEN, "compute": KERNELS}
    group_tasks = [
        [
            GroupTask(
                (0,),
                0.0,
                stream.get(slot.kind, LINKS),
                reached=(0,),
            )
        ]
        for slot in key.value.slots
    ]
    return group_step_tasks(key.value, group_tasks, overlap)


def group_step_tasks(
    structure: Structure,
    group_tasks: Sequence[Sequence[GroupTask]],
    overlap: float,
) -> StepTasks:
    """The tasks of several device groups. `group_tasks[n]` are those of slot n.

    A task of several groups begins when the last of their streams has reached it.
    """
    builder = _TaskBuilder(overlap)
    slots = len(structure.slots)
    first_task = np.zeros(slots, np.int64)
    blocking_task = np.full(slots, -1)
    results: list[_Results] = []
    for n, slot_tasks in enumerate(group_tasks):
        first_task[n] = builder.count
        slot_results = _Results()
        first_halves = _Results()
        for group_task in slot_tasks:
            waits = _waits(
                group_task,
                [results[b] for b in structure.before[n]],
                first_halves,
            )
            task = builder.add_group_task(n, group_task, waits)
            slot_results.add(task, group_task.reached)
            if not group_task.reached:
                first_halves.add(task, group_task.groups)
            first_blocking = builder.add_blocking_tasks(n, group_task, waits)
            if blocking_task[n] < 0:
                blocking_task[n] = first_blocking
        results.append(slot_results)
    return StepTasks(
        builder.tasks(),
        first_task,
        blocking_task,
        overlap,
        builder.infos,
    )


class _Results:
    """The tasks that bring the result of a slot, by device group."""

    def __init__(self) -> None:
        self.by_group: dict[int, list[int]] = {}

    def add(self, task: int, groups: Iterable[int]) -> None:
        for group in groups:
            self.by_group.setdefault(group, []).append(task)

    def tasks_for(self, group: int) -> Iterable[int]:
        """The tasks that a reader in this group waits for: those of all groups where none brings
        the result here.
        """
        if group in self.by_group:
            return self.by_group[group]
        return list(chain.from_iterable(self.by_group.values()))


def _waits(
    group_task: GroupTask,
    sources: Sequence[_Results],
    first_halves: _Results,
) -> set[int]:
    """The tasks before a group task: the first half of its move if there is one, else the slots
    that it reads.
    """
    waits: set[int] = set()
    for group in group_task.groups:
        if group in first_halves.by_group:
            waits.update(first_halves.by_group[group])
        else:
            for source in sources:
                waits.update(source.tasks_for(group))
    return waits


class _TaskBuilder:
    """Tasks in the order of issue, with the order that streams of several groups impose.

    Stream `2 * group + stream` is one of the engine's. It orders tasks of one stream by itself; a
    task of several streams is in none of them, and is ordered by explicit dependencies.
    """

    def __init__(self, overlap: float) -> None:
        self.overlap = overlap
        self.infos: list[TaskInfo] = []
        self._seconds: list[float] = []
        self._before: list[list[int]] = []
        self._stream: list[int] = []
        self._uses: list[list[tuple[int, float]]] = []
        self._last: dict[int, int] = {}
        """Stream -> its last task that takes time."""
        self._last_joint: dict[int, int] = {}
        """Stream -> its last task that takes time and runs in several streams."""

    @property
    def count(self) -> int:
        return len(self._seconds)

    def add_group_task(self, slot: int, group_task: GroupTask, waits: set[int]) -> int:
        """The number of a new task for a slot.

        Without overlap collectives run in the kernel stream.
        """
        stream = group_task.stream
        if stream == LINKS and self.overlap == 0:
            stream = KERNELS
        info = TaskInfo(slot, group_task, group_task.groups)
        return self._add(info, stream, group_task.seconds, waits)

    def add_blocking_tasks(self, slot: int, group_task: GroupTask, waits: set[int]) -> int:
        """The first of the tasks that block kernels beside a collective, one per group; -1 for
        none.
        """
        if group_task.stream != LINKS or not 0 < self.overlap < 1:
            return -1
        seconds = group_task.seconds * (1 - self.overlap)
        first = self.count
        for group in group_task.groups:
            info = TaskInfo(slot, group_task, (group,), blocks_kernels=True)
            self._add(info, KERNELS, seconds, waits)
        return first

    def _add(
        self,
        info: TaskInfo,
        stream: int,
        seconds: float,
        waits: set[int],
    ) -> int:
        """The number of a new task."""
        number = self.count
        streams: list[int] = []
        if stream != BETWEEN:
            streams = [2 * group + stream for group in info.groups]
        if seconds > 0:
            waits = waits | self._turn(streams, number)
        links_out = [(2 * group, 1.0) for group in info.group_task.links_out]
        links_in = [(2 * group + 1, 1.0) for group in info.group_task.links_in]
        self.infos.append(info)
        self._seconds.append(seconds)
        self._before.append(sorted(waits))
        self._stream.append(streams[0] if len(streams) == 1 else -1)
        self._uses.append(links_out + links_in)
        return number

    def _turn(self, streams: Sequence[int], task: int) -> set[int]:
        """The tasks before this one in its streams that the engine does not order; the task is then
        the streams' last.
        """
        joint = len(streams) > 1
        previous = self._last if joint else self._last_joint
        before = {previous[s] for s in streams if s in previous}
        for s in streams:
            self._last[s] = task
            if joint:
                self._last_joint[s] = task
        return before

    def tasks(self) -> Tasks:
        return Tasks.of(
            self._seconds,
            self._before,
            self._stream,
            self._uses,
        )

"""From simulated tasks to a Timeline: spans, waiting time by cause, and the memory curve.

Shared by the members whose tasks are those of device groups (`uniform`, `placed`); a pipeline's
tasks are passes of stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from partita.cost.memory import KINDS
from partita.cost.predict import Prediction
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.plan import Plan
from partita.simulation.engine import Times, critical
from partita.simulation.structure import Slot, Structure
from partita.simulation.tasks import StepTasks
from partita.simulation.timeline import Span, Timeline

ACTIONS = {
    "exchange": "exchange",
    "sum": "sum gradients",
    "gather": "gather variables",
    "move": "move",
}
"""Kind of a task that sends -> its action, for people."""


@dataclass(frozen=True, eq=False)
class GroupTimes:
    """The tasks of device groups with their times.

    `fullest` is the group closest to its memory capacity.
    """

    structure: Structure
    tasks: StepTasks
    times: Times
    names: Sequence[str] = ("",)
    """Name of every group."""
    fullest: int = 0

    @property
    def groups(self) -> int:
        return len(self.names)


def timeline_of(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    prediction: Prediction,
    group_times: GroupTimes,
) -> Timeline:
    """The timeline of tasks that device groups run."""
    spans = list(_spans(graph, group_times))
    notes = plan.notes
    if group_times.groups > 1:
        names = group_times.names
        spans.sort(key=lambda span: names.index(span.group))
        notes = (*notes, f"memory is that of {names[group_times.fullest]}, the fullest devices")
    memory = prediction.memory
    return Timeline(
        plan=plan.name,
        graph=graph.name,
        machine=machine.name,
        devices=plan.devices,
        seconds=group_times.times.seconds,
        spans=tuple(spans),
        idle=_idle(group_times),
        memory=_memory_curve(group_times, memory.course),
        peak_bytes=memory.peak,
        held={kind: getattr(memory, kind) for kind in KINDS},
        peak_operator=memory.operator,
        traffic=dict(prediction.traffic),
        source=prediction.source(),
        notes=notes,
        groups=group_times.groups,
        joules=prediction.joules,
    )


def _spans(graph: OperatorGraph, group_times: GroupTimes) -> Iterator[Span]:
    """A span per task that takes time and group that runs it."""
    tasks = group_times.tasks
    times = group_times.times
    on_path = critical(tasks.tasks, times)
    for k, info in enumerate(tasks.infos):
        seconds = float(tasks.tasks.seconds[k])
        if seconds <= 0:
            continue
        slot = group_times.structure.slots[info.slot]
        name = _task_name(graph, slot)
        if info.blocks_kernels:
            name += ", blocking kernels"
        for group in info.shown_groups:
            yield Span(
                name=name,
                operator=graph.operators[slot.operator].name,
                kind="held up" if info.blocks_kernels else slot.kind,
                phase=slot.phase,
                stream="kernels" if tasks.in_kernel_stream(k) else "links",
                start=float(times.start[k]),
                seconds=seconds,
                critical=bool(on_path[k]),
                group=group_times.names[group],
            )


def _task_name(graph: OperatorGraph, slot: Slot) -> str:
    """Name of a task for people: operator and phase, and its action unless it computes.

    A move names both ends.
    """
    operator = graph.operators[slot.operator].name
    if slot.kind == "compute":
        return f"{operator} {slot.phase}"
    if slot.kind == "move":
        reader = graph.operators[slot.reader].name
        return f"{operator} {slot.phase}, move to {reader}"
    return f"{operator} {slot.phase}, {ACTIONS[slot.kind]}"


def _idle(group_times: GroupTimes) -> dict[str, float]:
    """Seconds in which a device runs no kernels, by cause; the mean over groups."""
    if group_times.groups > 1:
        return _idle_of_groups(group_times)
    step_tasks = group_times.tasks
    times = group_times.times
    seconds = step_tasks.tasks.seconds
    computes = np.array([slot.kind == "compute" for slot in group_times.structure.slots])
    if step_tasks.overlap == 0:
        return {"links": float(seconds[step_tasks.first_task[~computes]].sum())}
    blocking = step_tasks.blocking_task[step_tasks.blocking_task >= 0]
    kernel_stream = sorted((*step_tasks.first_task[computes], *blocking))
    previous_end = 0.0
    waiting = 0.0
    for k in kernel_stream:
        if seconds[k] > 0:
            waiting += max(0.0, float(times.start[k]) - previous_end)
            previous_end = float(times.end[k])
    return {
        "links": waiting,
        "held up": float(seconds[blocking].sum()),
        "end": max(0.0, times.seconds - previous_end),
    }


def _idle_of_groups(group_times: GroupTimes) -> dict[str, float]:
    """Mean over device groups of the seconds without kernels, by cause."""
    step_tasks = group_times.tasks
    slots = group_times.structure.slots
    spent = {"compute": 0.0, "held up": 0.0, "links": 0.0}
    for k, info in enumerate(step_tasks.infos):
        if not step_tasks.in_kernel_stream(k):
            continue
        if info.blocks_kernels:
            cause = "held up"
        elif slots[info.slot].kind == "compute":
            cause = "compute"
        else:
            cause = "links"
        seconds = float(step_tasks.tasks.seconds[k])
        spent[cause] += seconds * len(info.groups) / group_times.groups
    bubble = group_times.times.seconds - sum(spent.values())
    return {
        "links": spent["links"],
        "held up": spent["held up"],
        "bubble": max(0.0, bubble),
    }


def _memory_curve(group_times: GroupTimes, held_bytes: np.ndarray) -> tuple[tuple[float, int], ...]:
    """(seconds, bytes) of the fullest group: from each time on a device has this many bytes in
    memory.

    `held_bytes` are by instruction; a task has the largest number of its instructions.
    """
    starts: dict[int, float] = {}
    for k, info in enumerate(group_times.tasks.infos):
        if group_times.fullest in info.groups:
            starts.setdefault(info.slot, float(group_times.times.start[k]))
    slot_of = group_times.structure.slot_of
    peak_of_slot: dict[int, int] = {}
    current = next((slot for slot in slot_of if slot in starts), -1)
    for i, slot in enumerate(slot_of):
        if slot in starts:  # an instruction that takes no time counts for the task before it
            current = slot
        peak_of_slot[current] = max(peak_of_slot.get(current, 0), int(held_bytes[i]))
    points = sorted((starts.get(slot, 0.0), peak) for slot, peak in peak_of_slot.items())
    curve: dict[float, int] = {}
    for start, nbytes in points:
        curve[start] = max(curve.get(start, 0), nbytes)
    return (*curve.items(), (group_times.times.seconds, int(held_bytes[-1])))

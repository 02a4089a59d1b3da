"""One step of a graph under a plan on a machine, simulated: a Timeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from partita.cost.evaluate import operator_costs
from partita.cost.memory import KINDS
from partita.cost.moves import Placement
from partita.cost.predict import Prediction, predict
from partita.cost.terms import Terms, terms
from partita.graph.graph import Graph
from partita.machine import Machine
from partita.plan.layout import layout
from partita.plan.plan import Plan
from partita.plan.stages import is_staged
from partita.simulate import stages
from partita.simulate.engine import Times, critical, run
from partita.simulate.step import Laid, Slot, Structure, durations, lay_out, structure
from partita.simulate.timeline import KERNELS, LINKS, Span, Timeline


def predicted(graph: Graph, machine: Machine, plan: Plan, found: Terms | None = None) -> Prediction:
    """The prediction of a plan, its step simulated: where collectives hide behind kernels, a step takes less than the sum of its parts."""
    if is_staged(plan):
        return stages.predicted(stages.Staged.of(graph, machine, plan, found))
    if machine.backend.overlap == 0:
        return predict(graph, machine, plan, found)
    prediction, _, _, times = _simulated(graph, machine, plan, found)
    return replace(prediction, seconds=times.seconds)


def _simulated(graph: Graph, machine: Machine, plan: Plan, found: Terms | None) -> tuple[Prediction, Structure, Laid, Times]:
    found, where, place = found or terms(graph, machine.backend), layout(graph, plan), Placement(machine, plan.mesh)
    costs, step = operator_costs(found, place, where, plan), structure(graph, found)
    laid = lay_out(step, durations(step, costs, found.edges, place, where), machine.backend.overlap)
    return predict(graph, machine, plan, found, where, costs), step, laid, run(laid.tasks)


def simulate(graph: Graph, machine: Machine, plan: Plan, found: Terms | None = None) -> Timeline:
    """The timeline of one step: seconds, what runs when, what waits for what, memory and traffic of a device.

    The machine needs not be at hand. `found` are the graph's terms, if they are known already.
    """
    if is_staged(plan):
        return stages.timeline(stages.Staged.of(graph, machine, plan, found))
    return _timeline(graph, plan, machine, *_simulated(graph, machine, plan, found))


def _timeline(
    graph: Graph, plan: Plan, machine: Machine, prediction: Prediction, step: Structure, laid: Laid, times: Times
) -> Timeline:  # fmt: skip
    on_path = critical(laid.tasks, times)
    spans = []
    for n, slot in enumerate(step.slots):
        for task, stream in ((laid.task[n], KERNELS if slot.kind == "compute" or laid.overlap == 0 else LINKS), (laid.hold[n], KERNELS)):
            if task >= 0 and laid.tasks.seconds[task] > 0:
                kind = slot.kind if task == laid.task[n] else "held up"
                operator = graph.operators[slot.operator].name
                name = f"{_name(graph, slot)}{', holding up kernels' if kind == 'held up' else ''}"
                start, length = float(times.start[task]), float(laid.tasks.seconds[task])
                spans.append(Span(name, operator, kind, slot.phase, stream, start, length, bool(on_path[task])))
    m = prediction.memory
    return Timeline(
        plan.name, graph.name, machine.name, plan.devices, times.seconds, tuple(spans), _idle(step, laid, times),
        _course(step, laid, times, m.course), m.peak, {k: getattr(m, k) for k in KINDS}, m.operator, dict(prediction.traffic),
        prediction.source(), plan.notes,
    )  # fmt: skip


VERBS = {"exchange": "exchange", "sum": "sum gradients", "gather": "gather variables", "move": "move"}


def _name(graph: Graph, slot: Slot) -> str:
    """What a person calls a task: the layer, the phase, and what is done where it is no computing.

    A move is named by both of its ends.
    """
    operator = graph.operators[slot.operator].name
    if slot.kind == "compute":
        return f"{operator} {slot.phase}"
    if slot.kind == "move":
        return f"{operator} {slot.phase}, move to {graph.operators[slot.reader].name}"
    return f"{operator} {slot.phase}, {VERBS[slot.kind]}"


def _idle(step: Structure, laid: Laid, times: Times) -> dict[str, float]:
    """Seconds in which a device runs no kernels, by what it waits for."""
    kernel = np.array([slot.kind == "compute" for slot in step.slots])
    if laid.overlap == 0:
        return {"links": float(laid.tasks.seconds[laid.task[~kernel]].sum())}
    held = laid.hold[laid.hold >= 0]
    stream = [k for k in sorted((*laid.task[kernel], *held)) if laid.tasks.seconds[k] > 0]
    ends = [0.0, *(float(times.end[k]) for k in stream)]
    waits = sum(max(0.0, float(times.start[k]) - end) for k, end in zip(stream, ends, strict=False))
    return {"links": waits, "held up": float(laid.tasks.seconds[held].sum()), "end": max(0.0, times.seconds - ends[-1])}


def _course(step: Structure, laid: Laid, times: Times, held: np.ndarray) -> tuple[tuple[float, int], ...]:
    """(seconds, bytes) from which on a device holds so much: per task the most that its instructions hold."""
    most: dict[int, int] = {}
    slot = next((s for s in step.of if s >= 0), 0)
    for i, own in enumerate(step.of):
        slot = own if own >= 0 else slot  # what takes no time belongs to what ran before it
        most[slot] = max(most.get(slot, 0), int(held[i]))
    course: list[tuple[float, int]] = []
    for slot in sorted(most):
        at = float(times.start[laid.task[slot]])
        if course and course[-1][0] == at:
            course[-1] = (at, max(course[-1][1], most[slot]))
        else:
            course.append((at, most[slot]))
    return (*course, (times.seconds, int(held[-1])))

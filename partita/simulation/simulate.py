"""One step of a graph under a plan on a machine, simulated: a Timeline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from partita.cost.evaluate import operator_costs
from partita.cost.memory import KINDS
from partita.cost.moves import Placement
from partita.cost.predict import Prediction, predict
from partita.cost.terms import Terms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.layout import layout_of
from partita.plans.pipeline import is_pipeline, is_staged
from partita.plans.plan import Plan
from partita.simulation import pipelined as stages
from partita.simulation.engine import Times, critical, run
from partita.simulation.placed import Placed
from partita.simulation.step import (
    BETWEEN,
    KERNELS,
    LINKS,
    Laid,
    Slot,
    Structure,
    durations,
    lay_out,
    structure,
)
from partita.simulation.timeline import Span, Timeline


def predicted(
    graph: OperatorGraph, machine: Machine, plan: Plan, terms: Terms | None = None
) -> Prediction:
    """The prediction of a plan, its step simulated: where collectives hide behind kernels, a step takes less than the sum of its parts."""
    if is_pipeline(plan):
        return stages.predicted(stages.Staged.of(graph, machine, plan, terms))
    if is_staged(plan) or machine.kinds:
        return Placed.of(graph, machine, plan, terms).prediction()
    if machine.backend.overlap == 0:
        return predict(graph, machine, plan, terms)
    prediction, _, _, times = _simulated(graph, machine, plan, terms)
    return replace(prediction, seconds=times.seconds)


def _simulated(
    graph: OperatorGraph, machine: Machine, plan: Plan, terms: Terms | None
) -> tuple[Prediction, Structure, Laid, Times]:
    terms, layout, placement = (
        terms or cost_terms(graph, machine.backend),
        layout_of(graph, plan),
        Placement(machine, plan.mesh),
    )
    costs, step = operator_costs(terms, placement, layout, plan), structure(graph, terms)
    laid = lay_out(
        step, durations(step, costs, terms.edges, placement, layout), machine.backend.overlap
    )
    return predict(graph, machine, plan, terms, layout, costs), step, laid, run(laid.tasks)


def simulate(
    graph: OperatorGraph, machine: Machine, plan: Plan, terms: Terms | None = None
) -> Timeline:
    """The timeline of one step: seconds, what runs when, what waits for what, memory and traffic of a device.

    The machine does not have to be present. `terms` are computed unless given.
    """
    if is_pipeline(plan):
        return stages.timeline(stages.Staged.of(graph, machine, plan, terms))
    if is_staged(plan) or machine.kinds:
        placed = Placed.of(graph, machine, plan, terms)
        return _timeline(
            graph,
            plan,
            machine,
            placed.prediction(),
            placed.step,
            placed.laid,
            placed.times,
            placed,
        )
    return _timeline(graph, plan, machine, *_simulated(graph, machine, plan, terms))


def _timeline(
    graph: OperatorGraph,
    plan: Plan,
    machine: Machine,
    prediction: Prediction,
    step: Structure,
    laid: Laid,
    times: Times,
    placed: Placed | None = None,
) -> Timeline:
    on_path, spans = critical(laid.tasks, times), []
    names = (
        [placed.name(c) for c in range(placed.cells.count)]
        if placed and placed.cells.count > 1
        else [""]
    )
    for k, (n, share, holds) in enumerate(zip(laid.slot, laid.share, laid.holds, strict=True)):
        slot, length = step.slots[n], float(laid.tasks.seconds[k])
        if length <= 0:
            continue
        kernels = holds or share.stream == KERNELS or share.stream != BETWEEN and laid.overlap == 0
        kind = "held up" if holds else slot.kind
        name = _name(graph, slot) + (", holding up kernels" if holds else "")
        for cell in laid.cells[k] if share.stream != BETWEEN else share.out:
            spans.append(
                Span(
                    name,
                    graph.operators[slot.operator].name,
                    kind,
                    slot.phase,
                    "kernels" if kernels else "links",
                    float(times.start[k]),
                    length,
                    bool(on_path[k]),
                    names[cell],
                )
            )
    m, notes = prediction.memory, plan.notes
    if len(names) > 1:
        spans.sort(key=lambda s: names.index(s.group))
        notes = (
            *notes,
            f"memory is that of {names[placed.fullest]}, which holds most of what it may"
            if placed
            else "",
        )
    return Timeline(
        plan.name,
        graph.name,
        machine.name,
        plan.devices,
        times.seconds,
        tuple(spans),
        _idle(step, laid, times, len(names)),
        _course(step, laid, times, m.course, placed.fullest if placed else 0),
        m.peak,
        {k: getattr(m, k) for k in KINDS},
        m.operator,
        dict(prediction.traffic),
        prediction.source(),
        notes,
        len(names),
    )


VERBS = {
    "exchange": "exchange",
    "sum": "sum gradients",
    "gather": "gather variables",
    "move": "move",
}


def _name(graph: OperatorGraph, slot: Slot) -> str:
    """What a person calls a task: the layer, the phase, and what is done where it is no computing.

    A move is named by both of its ends.
    """
    operator = graph.operators[slot.operator].name
    if slot.kind == "compute":
        return f"{operator} {slot.phase}"
    if slot.kind == "move":
        return f"{operator} {slot.phase}, move to {graph.operators[slot.reader].name}"
    return f"{operator} {slot.phase}, {VERBS[slot.kind]}"


def _idle(step: Structure, laid: Laid, times: Times, cells: int) -> dict[str, float]:
    """Seconds in which a device runs no kernels, by what it waits for; of several cells the mean."""
    kernel = np.array([slot.kind == "compute" for slot in step.slots])
    if cells > 1:
        spent = {"compute": 0.0, "held up": 0.0, "links": 0.0}
        for n, share, holds, mine, seconds in zip(
            laid.slot, laid.share, laid.holds, laid.cells, laid.tasks.seconds, strict=True
        ):
            if share.stream == KERNELS or holds or share.stream == LINKS and laid.overlap == 0:
                spent["held up" if holds else "compute" if kernel[n] else "links"] += (
                    float(seconds) * len(mine) / cells
                )
        idle = times.seconds - sum(spent.values())
        return {"links": spent["links"], "held up": spent["held up"], "bubble": max(0.0, idle)}
    if laid.overlap == 0:
        return {"links": float(laid.tasks.seconds[laid.task[~kernel]].sum())}
    held = laid.hold[laid.hold >= 0]
    stream = [k for k in sorted((*laid.task[kernel], *held)) if laid.tasks.seconds[k] > 0]
    ends = [0.0, *(float(times.end[k]) for k in stream)]
    waits = sum(max(0.0, float(times.start[k]) - end) for k, end in zip(stream, ends, strict=False))
    return {
        "links": waits,
        "held up": float(laid.tasks.seconds[held].sum()),
        "end": max(0.0, times.seconds - ends[-1]),
    }


def _course(
    step: Structure, laid: Laid, times: Times, held: np.ndarray, cell: int
) -> tuple[tuple[float, int], ...]:
    """(seconds, bytes) from which on a device of a cell holds so much: per task the most that its instructions hold."""
    starts: dict[int, float] = {}
    for k, (n, mine) in enumerate(zip(laid.slot, laid.cells, strict=True)):
        if cell in mine:
            starts.setdefault(n, float(times.start[k]))
    most: dict[int, int] = {}
    slot = next((s for s in step.of if s in starts), -1)
    for i, own in enumerate(step.of):
        slot = own if own in starts else slot  # what takes no time belongs to what ran before it
        most[slot] = max(most.get(slot, 0), int(held[i]))
    course: list[tuple[float, int]] = []
    for at, nbytes in sorted((starts.get(slot, 0.0), nbytes) for slot, nbytes in most.items()):
        if course and course[-1][0] == at:
            course[-1] = (at, max(course[-1][1], nbytes))
        else:
            course.append((at, nbytes))
    return (*course, (times.seconds, int(held[-1])))

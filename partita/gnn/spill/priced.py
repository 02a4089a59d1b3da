"""A training step within a memory limit, priced on a machine that is not here.

The memory plan is that of training (`plan`), with one difference: nothing is compiled, so the
scratch of an operator is the larger of its inputs and outputs and of the values inside it. The plan
becomes cost terms of the ordinary step. The operators of a layer copy its tiles to and from the
host, in the pass in which the plan does, and compute again what the plan's backward operators do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from partita.cost.operator_terms import HOST, OperatorTerms, Work
from partita.cost.terms import Terms, cost_terms
from partita.gnn.data.graph import Graph
from partita.gnn.kernels import bridge
from partita.gnn.prepare import PreparationKey, first_part
from partita.gnn.spill.groups import GroupedModel, PieceGroup, grouped_model, stages_of
from partita.gnn.spill.operators import ModelShapes, fitted_step
from partita.gnn.spill.plan import (
    FIRST_BANDWIDTH,
    MemoryPlan,
    OperatorMemory,
    StepWork,
    followed,
    plan_memory,
)
from partita.gnn.step import state_of
from partita.graph.operator_graph import Operator, OperatorGraph, Phase
from partita.machine import Machine
from partita.plans.check import check
from partita.plans.plan import Plan
from partita.simulation.simulate import simulate
from partita.simulation.timeline import Span, Timeline

PHASES: dict[str, Phase] = {"forward": "forward", "turn": "backward", "backward": "backward"}
"""Kind of a job -> the phase of a step that it belongs to."""


@dataclass(frozen=True)
class PlannedMemory:
    """The memory plan of a training step.

    layers  the layer of each group: begin of the paths of its operators
    """

    grouped: GroupedModel
    layers: tuple[str, ...]
    work: StepWork
    plan: MemoryPlan

    def timeline(self, graph: OperatorGraph, machine: Machine, plan: Plan) -> Timeline:
        """The simulated step, with copies as spans and idle time "host", and this plan's memory."""
        jobs = list(self._jobs(graph))
        terms = self._terms(graph, cost_terms(graph, machine.backend), jobs)
        timeline = simulate(graph, machine, check(plan, graph), terms)
        copy_seconds: dict[tuple[str, str], float] = defaultdict(float)
        for job in jobs:
            if job.copied_bytes:
                seconds = job.copied_bytes / machine.host_bandwidth() + machine.overhead
                copy_seconds[graph.operators[job.operators[0]].name, job.phase] += seconds
        spans = _with_copies(timeline.spans, copy_seconds)
        starts: dict[tuple[str, str], float] = {}
        for span in spans:
            starts.setdefault((span.operator, span.phase), span.start)
        curve = {0.0: self.work.fixed, timeline.seconds: self.work.fixed}
        for job in jobs:
            start = starts.get((graph.operators[job.operators[0]].name, job.phase), 0.0)
            curve[start] = max(curve.get(start, 0), job.allocated_bytes)
        fullest = max(jobs, key=lambda job: job.allocated_bytes)
        peak = fullest.allocated_bytes
        copied = sum(span.seconds for span in spans if span.kind == HOST)
        return replace(
            timeline,
            spans=spans,
            idle={**timeline.idle, HOST: copied},
            memory=tuple(sorted(curve.items())),
            peak_bytes=peak,
            held={"always": self.work.fixed, "tables and scratch": peak - self.work.fixed},
            peak_operator=graph.operators[fullest.operators[0]].name,
        )

    def _terms(self, graph: OperatorGraph, terms: Terms, jobs: Sequence[_Job]) -> Terms:
        """The terms of the ordinary step, with copies and with forward work that is done again."""
        operators = list(terms.operators)
        for job in jobs:
            if job.copied_bytes:
                first = job.operators[0]
                operators[first] = _with_work(operators[first], [_copy(job)])
        for job in jobs:
            group = job.group
            is_again = job.kind == "backward" and not (group.linear and not group.used)
            for k in job.operators if is_again else ():
                if _is_of(graph.operators[k], group):
                    operators[k] = _repeated(operators[k])
        return Terms(operators, terms.edges)

    def _jobs(self, graph: OperatorGraph) -> Iterator[_Job]:
        """The jobs of the plan, in order."""
        families: dict[str, list[OperatorMemory]] = defaultdict(list)
        for run in followed(self.work, self.plan):
            families[run.operator.family].append(run)
        for family, runs in families.items():
            kind, _, number = family.partition(" ")
            if kind in PHASES:
                yield _Job(
                    kind,
                    self.grouped.groups[int(number)],
                    self._operators(graph, int(number), PHASES[kind]),
                    sum(run.copied_bytes for run in runs),
                    max(run.allocated_bytes for run in runs),
                )

    def _operators(self, graph: OperatorGraph, number: int, phase: Phase) -> Sequence[int]:
        """The operators of a group's layer in a phase, in its order.

        A layer without any counts with the nearest one before it, else with all.
        """
        in_phase = []
        for k, operator in enumerate(graph.operators):
            if any(graph.instructions[i].phase == phase for i in operator.instructions):
                in_phase.append(k)
        if phase == "backward":
            in_phase.reverse()
        for layer in reversed(self.layers[: number + 1]):
            members = [k for k in in_phase if layer in graph.operators[k].path.split("/")]
            if members:
                return members
        return in_phase


@dataclass(frozen=True)
class _Job:
    """A job of a memory plan on all of its ranges.

    operators       the operators of its layer, by number, the first one first
    copied_bytes    bytes between host and device before its ranges
    allocated_bytes bytes of a device at its peak
    """

    kind: str
    group: PieceGroup
    operators: Sequence[int]
    copied_bytes: int
    allocated_bytes: int

    @property
    def phase(self) -> Phase:
        return PHASES[self.kind]


def _with_copies(
    spans: Sequence[Span], copy_seconds: Mapping[tuple[str, str], float]
) -> tuple[Span, ...]:
    """The spans of kernels, with the part that is copies as spans of their own."""
    whole: dict[tuple[str, str], float] = defaultdict(float)
    for span in spans:
        if span.kind == "compute":
            whole[span.operator, span.phase] += span.seconds
    parted = []
    for span in spans:
        key = (span.operator, span.phase)
        if span.kind != "compute" or key not in copy_seconds:
            parted.append(span)
            continue
        copied = span.seconds * min(1.0, copy_seconds[key] / whole[key])
        name = f"{span.name}, host copies"
        parted.append(replace(span, name=name, kind=HOST, seconds=copied))
        rest = span.seconds - copied
        if rest > 0:
            parted.append(replace(span, start=span.start + copied, seconds=rest))
    return tuple(parted)


def planned_memory(model: Any, graph: Graph, key: PreparationKey, budget: int) -> PlannedMemory:
    """The memory plan of a compiled, built model within `budget` bytes of each device.

    GraphError if the budget is too small, or the model cannot be cut.
    """
    stages = stages_of(model)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    arrays = (first_part(replace(graph, features=None), key), state_of(model))
    data, state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    shapes = ModelShapes(model, state, data, compiles=False)
    features = (data.block.rows, graph.feature_count)
    with bridge.symbolic():
        grouped = grouped_model(model, features, data, state, training=True)
        _, step = fitted_step(shapes, grouped, budget)
    layers = [_layer_name(stages[group.stage]) for group in grouped.groups]
    plan = plan_memory(step.work, budget, FIRST_BANDWIDTH)
    return PlannedMemory(grouped, tuple(layers), step.work, plan)


def _layer_name(stage: Any) -> str:
    """The name of the layer of a stage, "" without one."""
    while hasattr(stage, "stage") or hasattr(stage, "layer_stage"):
        stage = getattr(stage, "stage", None) or stage.layer_stage
    return getattr(getattr(stage, "layer", None), "name", "")


def _copy(job: _Job) -> Work:
    """The copies of a job."""
    return Work(HOST, "uint8", 0.0, (), ((job.copied_bytes, ()),), 1, job.phase, HOST)


def _is_of(operator: Operator, group: PieceGroup) -> bool:
    """Whether an operator of a group's layer belongs to the group, by its kind."""
    return group.by == "whole" or (group.by == "columns") == (operator.kind == "aggregation")


def _repeated(terms: OperatorTerms) -> OperatorTerms:
    """The terms with the forward work and exchanges in the backward pass too."""
    forward = [work for work in terms.work if work.phase == "forward" and work.op_class != HOST]
    work = [replace(one, phase="backward") for one in forward]
    moves = [replace(move, phase="backward") for move in terms.moves if move.phase == "forward"]
    return replace(_with_work(terms, work), moves=[*terms.moves, *moves])


def _with_work(terms: OperatorTerms, work: Sequence[Work]) -> OperatorTerms:
    """The terms with more work, under a digest of their own."""
    digest = f"{terms.digest} {[(w.op_class, w.phase, w.traffic) for w in work]}"
    return replace(terms, work=[*terms.work, *work], digest=digest)

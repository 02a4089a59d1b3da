"""A step in stages and microbatches, simulated: what each stage does when, what it waits for, and what it holds.

Inside a stage all devices do the same, so that what a stage does with one microbatch is a simulation like any other (`simulate.step`), of the
stage's own tasks under the plan `plan.stages.inside`. Its length is then one task of the pipeline: forward and backward by microbatch, and
the update. Between stages, values go over the links of the axes that tell stages apart; the links into and out of a stage are resources that
transfers take in turn. A stage takes its microbatches in the order of the plan's schedule.

What is rematerialized_runs takes its forward time once more in the backward pass, and of its forward values only those that enter the run are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partita.cost.collectives import collectives
from partita.cost.evaluate import PARTS, OperatorCost, compute_source, operator_costs
from partita.cost.memory import KINDS, PeakMemory, memory
from partita.cost.moves import Group, Placement, group_of, move_seconds
from partita.cost.predict import OperatorPrediction, Prediction, build_prediction
from partita.cost.terms import Terms, cost_terms
from partita.cost.work import local_flops
from partita.errors import PlanError
from partita.graph.operator_graph import Label, OperatorGraph, Phase
from partita.machine import Machine
from partita.plans.layout import Layout, label_sharding, layout_of
from partita.plans.pipeline import (
    in_flight,
    operator_stages,
    rematerialized_runs,
    stage_axes,
    stage_count,
    stage_plan,
    stage_schedule,
)
from partita.plans.plan import TIME, Plan
from partita.simulation.base import SimulatedStep
from partita.simulation.engine import Tasks, Times, critical, run
from partita.simulation.structure import Structure, structure
from partita.simulation.tasks import slot_seconds, step_tasks
from partita.simulation.timeline import KERNELS, LINKS, Span, Timeline

Edge = tuple[int, int, Phase, Phase]
"""(stage, other stage, phase in which a value is made, phase in which it is wanted)."""


@dataclass(frozen=True)
class PipelinedStep(SimulatedStep):
    """A plan in stages on a machine, with what its parts take: seconds by stage, of one microbatch but for the update."""

    graph: OperatorGraph
    machine: Machine
    plan: Plan
    terms: Terms
    inner: Plan
    layout: Layout
    stage: tuple[int, ...]
    run_of: tuple[int, ...]
    costs: Sequence[OperatorCost]

    @staticmethod
    def of(
        graph: OperatorGraph, machine: Machine, plan: Plan, terms: Terms | None = None
    ) -> PipelinedStep:
        """A checked plan with its costs. PlanError where the machine's devices differ."""
        if machine.kinds:
            raise PlanError(
                f"The plan '{plan.name}' has microbatches or recomputes, and the devices of {machine.name} differ, where that cannot be simulated yet: give a plan "
                "without them, which may place operators."
            )
        terms, inner = terms or cost_terms(graph, machine.backend), stage_plan(graph, plan)
        layout = layout_of(graph, inner)
        costs = operator_costs(terms, Placement(machine, inner.mesh), layout, inner)
        return PipelinedStep(
            graph,
            machine,
            plan,
            terms,
            inner,
            layout,
            operator_stages(graph, plan),
            rematerialized_runs(graph, plan),
            costs,
        )

    @cached_property
    def stages(self) -> int:
        return stage_count(self.plan)

    @cached_property
    def placement(self) -> Placement:
        return Placement(self.machine, self.inner.mesh)

    @cached_property
    def between(self) -> Group:
        """The links that tell stages apart, for transfers."""
        return group_of(stage_axes(self.plan), self.plan.mesh)

    def _part(self, nbytes: int, label: Label, operator: int) -> float:
        """Bytes of a device's part of a tensor that is labelled in an operator's factors."""
        return nbytes / self.placement.shard_count(
            [a for axes in label_sharding(label, self.layout.assignments[operator]) for a in axes]
        )

    @cached_property
    def transfers(self) -> Mapping[Edge, tuple[float, float]]:
        """(seconds, bytes of a device) that go from one stage to another with every microbatch: each value once, as its first reader wants it."""
        sent: dict[tuple[Edge, int], float] = {}
        for m in self.terms.edges:
            a, b = self.stage[m.home], self.stage[m.reader]
            if a != b:
                nbytes = m.trips * self._part(m.nbytes, m.dims[1], m.reader)
                edge: Edge = (a, b, m.phase, m.read_phase)
                sent[edge, m.tensor] = max(sent.get((edge, m.tensor), 0.0), nbytes)
        total: dict[Edge, float] = defaultdict(float)
        for (edge, _), nbytes in sent.items():
            total[edge] += nbytes
        return {
            edge: (self.placement.seconds("collective_permute", nbytes, self.between), nbytes)
            for edge, nbytes in total.items()
        }

    @cached_property
    def passes(self) -> list[tuple[float, float, float]]:
        """Per stage: seconds of a microbatch forward and backward, and of the last one backward with the sums of gradients and the update.

        Variables that are stored in parts are gathered for every microbatch; those of which only the slots are, once, when they are updated.
        """
        step = structure(self.graph, self.terms)
        seconds = slot_seconds(
            step,
            self.costs,
            [m for m in self.terms.edges if self.stage[m.home] == self.stage[m.reader]],
            self.placement,
            self.layout,
        )
        apart = {path for path, storage in self.plan.storage.items() if storage.zero == 3}
        whole = [apart.isdisjoint(s.path for s in own.stored) for own in self.terms.operators]
        once = np.array(
            [
                slot.phase == "update"
                or slot.kind == "sum"
                or slot.kind == "gather"
                and whole[slot.operator]
                for slot in step.slots
            ]
        )
        mine = np.array(
            [self.stage[slot.operator] if slot.operator >= 0 else -1 for slot in step.slots]
        )
        forward = np.array([slot.phase == "forward" for slot in step.slots]) & ~once
        again = np.array(
            [slot.operator >= 0 and self.run_of[slot.operator] >= 0 for slot in step.slots]
        )
        known: dict[bytes, tuple[float, float, float]] = {}
        found = []
        for stage in range(self.stages):
            own = np.where(mine == stage, seconds, 0.0)
            key = own[mine == stage].tobytes()
            if key not in known:
                length = lambda chosen, own=own: _length(
                    step, np.where(chosen, own, 0.0), self.machine
                )  # noqa: E731
                first = length(forward)
                redo = length(forward & again) if again.any() else 0.0
                known[key] = (first, redo + length(~forward & ~once), redo + length(~forward))
            found.append(known[key])
        return found

    @cached_property
    def kept(self) -> list[float]:
        """Per operator, bytes of forward values of one microbatch that its backward pass reads."""
        return [float(cost.activation_bytes[0]) for cost in self.costs]

    @cached_property
    def entering(self) -> dict[tuple[int, int], float]:
        """(stage, run) -> bytes that enter a rematerialized_runs run in the forward pass, a microbatch's."""
        sent: dict[tuple[int, int, int], float] = {}
        for m in self.terms.edges:
            run_ = self.run_of[m.reader]
            if (
                run_ >= 0
                and (self.run_of[m.home], self.stage[m.home]) != (run_, self.stage[m.reader])
                and (m.phase, m.read_phase) == ("forward", "forward")
            ):
                key = (self.stage[m.reader], run_, m.tensor)
                sent[key] = max(sent.get(key, 0.0), self._part(m.nbytes, m.dims[0], m.home))
        total: dict[tuple[int, int], float] = defaultdict(float)
        for (stage, run_, _), nbytes in sent.items():
            total[stage, run_] += nbytes
        return total

    @cached_property
    def pipeline(self) -> _Pipeline:
        """The tasks of the step."""
        return _pipeline(self)

    @cached_property
    def times(self) -> Times:
        """When they run."""
        return run(self.pipeline.tasks)

    @property
    def seconds(self) -> float:
        """Of a whole step."""
        return self.times.seconds

    @cached_property
    def _runs(self) -> dict[tuple[object, ...], PeakMemory]:
        """What a device holds that computes one rematerialized_runs run, of equal ones once."""
        return {}

    def _held(self, members: Sequence[int]) -> PeakMemory:
        """What a device holds at its peak that does one microbatch of these operators alone."""
        return memory(
            self.graph,
            self.inner.mesh,
            self.layout,
            self.machine.backend,
            None if len(members) == len(self.stage) else frozenset(members),
        )

    def memory(self, stage: int) -> tuple[PeakMemory, float]:
        """What a device of a stage holds at its peak, and of that the bytes per microbatch in flight.

        Without recomputation: the peak of one microbatch, and what is kept for each other one. With it: variables and gradients, what enters every
        run for each microbatch, and the values of the run that needs most while it is computed again and goes backward.
        """
        members = [o for o, s in enumerate(self.stage) if s == stage]
        flying = in_flight(self.plan, stage)
        if all(self.run_of[o] < 0 for o in members):
            one = self._held(members)
            received = sum(
                nbytes
                for (_, to, made, _), (_, nbytes) in self.transfers.items()
                if to == stage and made == "forward"
            )
            each = sum(self.kept[o] for o in members) + received
            return replace(
                one,
                peak=int(one.peak + received + (flying - 1) * each),
                activations=int(one.activations + received + (flying - 1) * each),
            ), each
        runs: dict[int, list[int]] = defaultdict(list)
        for o in members:
            runs[self.run_of[o]].append(o)
        parts = []
        for own in runs.values():
            key = tuple((self.terms.operators[o].digest, id(self.costs[o])) for o in own)
            if key not in self._runs:
                self._runs[key] = self._held(own)
            parts.append(self._runs[key])
        fixed = {
            kind: sum(getattr(p, kind) for p in parts)
            for kind in ("parameters", "optimizer", "state", "batch")
        }
        gradients = int(
            sum(
                self._part(s.nbytes, s.label, o)
                for o in members
                for s in self.terms.operators[o].stored
            )
        )
        kept = [
            sum(self.kept[o] for o in own) if run_ < 0 else 0.0 for run_, own in runs.items()
        ]  # of what is not rematerialized_runs, a part of `each`
        working = [
            p.peak - sum(getattr(p, kind) for kind in fixed) - min(k, p.activations)
            for p, k in zip(parts, kept, strict=True)
        ]
        most = max(range(len(parts)), key=lambda n: working[n])
        each = sum(nbytes for (s, _), nbytes in self.entering.items() if s == stage) + sum(
            self.kept[o] for o in runs.get(-1, ())
        )
        peak = int(sum(fixed.values()) + gradients + flying * each + working[most])
        rest = parts[most].temporaries + parts[most].gradients
        return PeakMemory(
            peak,
            **fixed,
            activations=int(flying * each) + parts[most].activations,
            gradients=gradients,
            temporaries=rest,
            operator=parts[most].operator,
            course=parts[most].course,
        ), each

    @property
    def peak_bytes(self) -> int:
        """Bytes of a device of the stage that holds most."""
        return max(held.peak for held, _ in self.memories)

    def with_plan(self, plan: Plan) -> PipelinedStep:
        """The step of a plan that differs in stages, microbatch order or rematerialized runs only, with the same costs."""
        return replace(
            self,
            plan=plan,
            stage=operator_stages(self.graph, plan),
            run_of=rematerialized_runs(self.graph, plan),
        )

    def prediction(self) -> Prediction:
        return _prediction(self)

    def timeline(self) -> Timeline:
        return _timeline(self)

    @cached_property
    def memories(self) -> list[tuple[PeakMemory, float]]:
        """`memory` of every stage; stages of equal operators hold the same."""
        known: dict[tuple[object, ...], tuple[PeakMemory, float]] = {}
        found = []
        for stage in range(self.stages):
            members = [o for o, s in enumerate(self.stage) if s == stage]
            key = (
                in_flight(self.plan, stage),
                *(
                    (
                        self.terms.operators[o].digest,
                        id(self.costs[o]),
                        self.run_of[o] - self.run_of[members[0]],
                    )
                    for o in members
                ),
            )
            if key not in known:
                known[key] = self.memory(stage)
            found.append(known[key])
        return found


def _length(step: Structure, seconds: np.ndarray, machine: Machine) -> float:
    """How long a device is at a part of its tasks: those that are to take time."""
    return run(step_tasks(step, seconds, machine.backend.overlap).tasks).seconds


@dataclass(frozen=True)
class _Pipeline:
    """The tasks of a pipeline for the engine; `names[k]` is (stage, phase, microbatch, stage it is sent to or -1)."""

    tasks: Tasks
    names: list[tuple[int, Phase, int, int]]


def _pipeline(staged: PipelinedStep) -> _Pipeline:
    """All tasks, numbered so that what comes before one has a smaller number. PlanError where stages wait for each other in a circle."""
    plan, stages, last = staged.plan, staged.stages, staged.plan.microbatches - 1
    orders = [stage_schedule(plan, stage) for stage in range(stages)]
    reads: dict[tuple[int, Phase], list[Edge]] = defaultdict(list)
    sent: dict[tuple[int, int, Phase], float] = defaultdict(float)
    for edge, (length, _) in staged.transfers.items():
        a, b, made, wanted = edge
        if wanted != "update":
            reads[b, wanted].append(edge)
            sent[a, b, made] += length
        if (made, wanted) == ("forward", "forward") and a > b:
            raise PlanError(
                f"Stage {b} needs what stage {a} computes in the forward pass, and comes before it: number the stages in the order of the model."
            )
    number: dict[tuple[int, Phase, int, int], int] = {}
    seconds, before, stream, uses = [], [], [], []

    def put(
        name: tuple[int, Phase, int, int],
        length: float,
        wait: list[int],
        on: int,
        holds: Sequence[tuple[int, float]] = (),
    ) -> None:
        number[name] = len(seconds)
        seconds.append(length)
        before.append(wait)
        stream.append(on)
        uses.append(holds)

    def sources(stage: int, phase: Phase, i: int) -> list[tuple[Edge, int]] | None:
        """What a pass waits for, None while something of it is not there yet."""
        found = []
        for edge in reads[stage, phase]:
            made = number.get((edge[0], edge[2], i, -1))
            if made is None:
                return None
            found.append((edge, made))
        return found

    at = [0] * stages
    while any(at[s] < len(orders[s]) for s in range(stages)):
        moved = False
        for s in range(stages):
            while at[s] < len(orders[s]):
                phase, i = orders[s][at[s]]
                needs = sources(s, phase, i)
                if needs is None or (phase == "backward" and (s, "forward", i, -1) not in number):
                    break
                wait = [number[s, "forward", i, -1]] if phase == "backward" else []
                for edge, made in needs:
                    name = (edge[0], edge[2], i, s)
                    if name not in number:
                        put(
                            name, sent[edge[:3]], [made], -1, [(2 * edge[0], 1.0), (2 * s + 1, 1.0)]
                        )
                    wait.append(number[name])
                forward, backward, end = staged.passes[s]
                put(
                    (s, phase, i, -1),
                    forward if phase == "forward" else end if i == last else backward,
                    sorted(set(wait)),
                    s,
                )
                at[s] += 1
                moved = True
        if not moved:
            raise PlanError(
                "The stages of the plan wait for each other in a circle: number them in the order of the model."
            )
    for (a, b, made, wanted), (length, _) in staged.transfers.items():
        if wanted == "update" and (a, made, last, b) not in number:
            put(
                (a, made, last, b),
                length,
                [number[a, made, last, -1]],
                -1,
                [(2 * a, 1.0), (2 * b + 1, 1.0)],
            )
    return _Pipeline(Tasks.of(seconds, before, stream, uses), list(number))


def _prediction(staged: PipelinedStep) -> Prediction:
    """The prediction of a staged plan. Of its memory, the stage that holds most is given; seconds of operators are those of their own stage."""
    graph, plan, m = staged.graph, staged.plan, staged.plan.microbatches
    weights = np.array([1.0 if kind == "sum" or phase == "update" else m for kind, phase in PARTS])
    moves = np.zeros(len(graph.operators))
    for e in staged.terms.edges:
        if staged.stage[e.home] == staged.stage[e.reader]:
            a, b = (staged.layout.assignments[o] for o in (e.home, e.reader))
            moves[e.reader] += m * move_seconds(
                e, staged.placement, label_sharding(e.source, a), label_sharding(e.target, b)
            )
    traffic: dict[str, float] = defaultdict(float)
    by_operator = np.zeros(len(graph.operators))
    time = staged.inner.mesh.index.get(TIME, -1)
    every = collectives(graph, staged.inner.mesh, staged.layout, staged.machine.backend)
    for c in every:
        if any(a != time for a in c.axes):
            sent = c.total * (
                1 if time in c.axes else m
            )  # what sums over microbatches is sent when all are done
            traffic[c.kind] += (
                sent / staged.stages
            )  # a device is in one stage: on the average of all
            by_operator[c.operator] += sent
    crossing = m * sum(nbytes for _, nbytes in staged.transfers.values())
    if crossing:
        traffic["collective_permute"] += crossing / staged.stages
    operators = []
    for o, (own, cost) in enumerate(zip(staged.terms.operators, staged.costs, strict=True)):
        parts = {
            part: float(s) for part, s in zip(PARTS, cost.parts()[:, 0] * weights, strict=True)
        }
        of = lambda *kinds, parts=parts: sum(s for (kind, _), s in parts.items() if kind in kinds)  # noqa: E731
        again = (
            sum(parts[kind, "forward"] for kind in ("compute", "exchange"))
            if staged.run_of[o] >= 0
            else 0.0
        )
        sums = of("sum", "gather") * (1 - cost.overlap)
        source = compute_source(own, staged.placement, staged.layout.assignments[o])
        operators.append(
            OperatorPrediction(
                name=graph.operators[o].name,
                compute=of("compute") + again,
                activations=of("exchange"),
                gradients=sums,
                moves=float(moves[o]),
                nbytes=float(cost.nbytes[0]),
                traffic=int(by_operator[o]),
                source=source,
            )
        )
    fullest = max((held for held, _ in staged.memories), key=lambda held: held.peak)
    flops = (
        m
        * local_flops(
            graph, staged.inner.mesh, staged.layout, staged.machine.backend, traffic=every
        )
        / staged.stages
    )
    return build_prediction(
        plan,
        staged.machine,
        operators=operators,
        memory=fullest,
        traffic={kind: int(nbytes) for kind, nbytes in traffic.items()},
        flops=flops,
        seconds=staged.seconds,
    )


def _timeline(staged: PipelinedStep) -> Timeline:
    """The timeline of a staged plan: a row of kernels and one of links per stage; memory is that of the fullest stage."""
    pipeline, times = staged.pipeline, staged.times
    prediction, on_path = _prediction(staged), critical(pipeline.tasks, times)
    count, spans = staged.plan.microbatches, []
    for k, (stage, phase, i, to) in enumerate(pipeline.names):
        length = float(pipeline.tasks.seconds[k])
        if length <= 0:
            continue
        what = f"stage {stage} {phase}, microbatch {i + 1} of {count}" + (
            f", sent to stage {to}" if to >= 0 else ""
        )
        kind, stream = ("compute", KERNELS) if to < 0 else ("move", LINKS)
        spans.append(
            Span(
                what,
                f"stage {stage}",
                kind,
                phase,
                stream,
                float(times.start[k]),
                length,
                bool(on_path[k]),
                f"stage {stage}",
            )
        )
    busy = sum(s.seconds for s in spans if s.kind == "compute") / staged.stages
    fullest = max(range(staged.stages), key=lambda s: staged.memories[s][0].peak)
    held, each = staged.memories[fullest]
    m = prediction.memory
    notes = (
        *staged.plan.notes,
        f"memory is that of stage {fullest}, which holds most; what a stage computes has its collectives in it",
    )
    return Timeline(
        staged.plan.name,
        staged.graph.name,
        staged.machine.name,
        staged.plan.devices,
        times.seconds,
        tuple(spans),
        {"bubble": max(0.0, times.seconds - busy)},
        _course(pipeline, times, fullest, held.peak, each),
        m.peak,
        {k: getattr(m, k) for k in KINDS},
        m.operator,
        dict(prediction.traffic),
        prediction.source(),
        notes,
        staged.stages,
    )


def _course(
    pipeline: _Pipeline, times: Times, stage: int, peak: int, each: float
) -> tuple[tuple[float, int], ...]:
    """(seconds, bytes) from which on a device of a stage holds so much: a microbatch's forward values from its forward to its backward pass."""
    steps: list[tuple[float, int]] = []
    for k, (s, phase, _, to) in enumerate(pipeline.names):
        if s == stage and to < 0:
            steps.append(
                (float(times.start[k]), 1) if phase == "forward" else (float(times.end[k]), -1)
            )
    held, most, course = 0, 0, []
    for _, more in sorted(steps):
        held += more
        most = max(most, held)
    held = 0
    for at, more in sorted(steps):
        held += more
        course.append((at, int(peak - (most - held) * each)))
    return ((0.0, course[0][1]), *course) if course else ((0.0, peak),)

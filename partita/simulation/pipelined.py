"""A step in pipeline stages and microbatches: passes, transfers and memory of every stage.

All devices of a stage do the same, so the work of a stage on one microbatch is a simulation of its
tasks under the plan `plans.pipeline.stage_plan`. Its seconds are those of one task of the pipeline
(`pipeline_tasks`): forward and backward per microbatch, and the update once. Values go from stage
to stage over the links of the axes whose slices are the stages.

A rematerialized run takes its forward time once more in the backward pass. Of its forward values
only those that enter the run stay in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise

import numpy as np

from partita.cost.collectives import Collective, collectives, over_microbatches
from partita.cost.evaluate import PARTS, PHASES, OperatorCost, compute_source, operator_costs
from partita.cost.memory import KINDS, memory
from partita.cost.moves import (
    Placement,
    group_of,
    home_sum_seconds,
    move_seconds,
    planned_moves,
)
from partita.cost.operator_terms import Move
from partita.cost.partial import unsummed, waiting_sums
from partita.cost.predict import OperatorPrediction, Prediction, build_prediction, with_energy
from partita.cost.terms import Terms, cost_terms
from partita.cost.work import local_flops
from partita.errors import PlanError
from partita.graph.operator_graph import Label, OperatorGraph
from partita.machine import Machine
from partita.plans.layout import Layout, label_sharding, layout_of, shard_bytes
from partita.plans.phases import DataFlow
from partita.plans.pieces import Cut, cut
from partita.plans.pipeline import (
    is_one_program,
    operator_stages,
    rematerialized_runs,
    stage_axes,
    stage_count,
    stage_plan,
)
from partita.plans.plan import TIME, Plan
from partita.simulation.base import DISPATCH_SECONDS, SimulatedStep
from partita.simulation.engine import Times, critical, run
from partita.simulation.pipeline_tasks import (
    PipelineTasks,
    StageEdge,
    StagePasses,
    Transfer,
    pipeline_tasks,
)
from partita.simulation.stage_memory import PieceMemories, StageMemory
from partita.simulation.structure import Slot, step_structure
from partita.simulation.tasks import slot_seconds, step_tasks
from partita.simulation.timeline import KERNELS, LINKS, Span, Timeline


@dataclass(frozen=True, eq=False)
class PipelinedStep(SimulatedStep):
    """A step of a plan with microbatches, stages or rematerialization, on equal devices."""

    graph: OperatorGraph
    machine: Machine
    plan: Plan
    terms: Terms
    stage_plan: Plan
    """The plan of one microbatch inside a stage."""
    layout: Layout
    """Sharding of every tensor under `stage_plan`."""
    stage_of: tuple[int, ...]
    """[operator]: its stage."""
    run_of: tuple[int, ...]
    """[operator]: the number of its rematerialized run, -1 for none."""
    costs: Sequence[OperatorCost]
    """[operator]: its cost under `stage_plan`."""

    @staticmethod
    def of(
        graph: OperatorGraph,
        machine: Machine,
        plan: Plan,
        terms: Terms | None = None,
    ) -> PipelinedStep:
        """The step of a checked plan. PlanError if the machine's devices differ."""
        if machine.kinds:
            raise PlanError(
                f"The plan '{plan.name}' has microbatches or rematerialization, which cannot be "
                f"simulated on {machine.name}, whose devices differ. "
                "Use a plan without them; it may place operators."
            )
        terms = terms or cost_terms(graph, machine.backend)
        inner_plan = stage_plan(graph, plan)
        layout = layout_of(graph, inner_plan)
        placement = Placement(machine, inner_plan.mesh)
        return PipelinedStep(
            graph=graph,
            machine=machine,
            plan=plan,
            terms=terms,
            stage_plan=inner_plan,
            layout=layout,
            stage_of=operator_stages(graph, plan),
            run_of=rematerialized_runs(graph, plan),
            costs=operator_costs(
                terms, placement, layout, inner_plan, in_pieces=not is_one_program(plan)
            ),
        )

    def with_plan(self, plan: Plan) -> PipelinedStep:
        """The step of a plan that differs only in stages, schedule or rematerialized runs, with the
        same costs.
        """
        return replace(
            self,
            plan=plan,
            stage_of=operator_stages(self.graph, plan),
            run_of=rematerialized_runs(self.graph, plan),
        )

    @cached_property
    def stages(self) -> int:
        """Number of stages."""
        return stage_count(self.plan)

    @cached_property
    def placement(self) -> Placement:
        """The mesh of a stage on the machine's links."""
        return Placement(self.machine, self.stage_plan.mesh)

    def _local_bytes(
        self,
        nbytes: int,
        label: Label,
        operator: int,
    ) -> float:
        """Bytes of a device for a tensor that is labelled with an operator's factors."""
        sharding = label_sharding(label, self.layout.assignments[operator])
        return nbytes / self.placement.shard_count(list(chain.from_iterable(sharding)))

    def _same_stage(self, edge: Move) -> bool:
        return self.stage_of[edge.home] == self.stage_of[edge.reader]

    def _members(self, stage: int) -> list[int]:
        """The operators of a stage."""
        return [o for o, own_stage in enumerate(self.stage_of) if own_stage == stage]

    @cached_property
    def transfers(self) -> Mapping[StageEdge, Transfer]:
        """Transfers from stage to stage for every microbatch, each value once."""
        total = self._crossing_bytes
        sums: dict[StageEdge, float] = defaultdict(float)
        """Seconds in which partial sums are summed before they are sent."""
        for move in self.terms.edges:
            if self._same_stage(move):
                continue
            source = self.stage_of[move.home]
            target = self.stage_of[move.reader]
            edge = StageEdge(source, target, move.phase, move.read_phase)
            home = label_sharding(move.source, self.layout.assignments[move.home])
            sums[edge] += home_sum_seconds(move, self.placement, home)
        links = group_of(stage_axes(self.plan), self.plan.mesh)
        transfers = {}
        for edge, nbytes in total.items():
            seconds = self.placement.seconds("collective_permute", nbytes, links)
            transfers[edge] = Transfer(sums[edge] + seconds, nbytes)
        return transfers

    @cached_property
    def _crossing_bytes(self) -> dict[StageEdge, float]:
        """Bytes of a device that go from piece to piece of different stages.

        A value that both passes of a stage read is sent once, for the forward pass.
        """
        total: dict[StageEdge, float] = defaultdict(float)
        sent: set[tuple[int, int]] = set()
        """(stage, tensor)."""
        maker = self.cut.maker()
        for phase in PHASES:
            for piece in self.cut.pieces:
                for t in piece.reads if piece.phase == phase else ():
                    source = self.cut.pieces[maker[t]] if t in maker else piece
                    if source.place != piece.place and (piece.place, t) not in sent:
                        sent.add((piece.place, t))
                        edge = StageEdge(source.place, piece.place, source.phase, phase)
                        total[edge] += self._piece_bytes[t]
        return dict(total)

    @cached_property
    def _piece_bytes(self) -> list[int]:
        """[tensor]: bytes of a device for one microbatch."""
        return shard_bytes(self.graph, self.stage_plan.mesh, self.layout)

    @cached_property
    def passes(self) -> list[StagePasses]:
        """[stage]: seconds of its passes."""
        step = step_structure(self.graph, self.terms)
        local_edges = [edge for edge in self.terms.edges if self._same_stage(edge)]
        seconds = slot_seconds(
            step,
            self.costs,
            local_edges,
            self.placement,
            self.layout,
        )
        once = np.array([self._once_per_step(slot) for slot in step.slots])
        forward = np.array([slot.phase == "forward" for slot in step.slots]) & ~once
        gathered_again = {
            slot.operator
            for slot in step.slots
            if slot.kind == "gather" and slot.phase == "backward"
        }
        repeated = np.zeros(len(step.slots), bool)
        for n, slot in enumerate(step.slots):
            # Copies and gradients read one gather.
            is_gathered_later = slot.kind == "gather" and slot.operator in gathered_again
            repeated[n] = forward[n] and self._rematerialized(slot) and not is_gathered_later
        stage_of_slot = np.array([self._stage_of_slot(slot) for slot in step.slots])
        update_sums = np.zeros(len(seconds))
        """Sums over devices in front of the update, by a program of their own."""
        for n, slot in enumerate(step.slots):
            if slot.kind == "sum":
                seconds[n], update_sums[n] = self._sum_seconds(self.costs[slot.operator])

        def length(stage_seconds: np.ndarray, chosen: np.ndarray) -> float:
            """Seconds of a device for the chosen slots."""
            tasks = step_tasks(
                step, np.where(chosen, stage_seconds, 0.0), self.machine.backend.overlap
            )
            return run(tasks.tasks).seconds

        by_seconds: dict[bytes, StagePasses] = {}
        passes = []
        for stage in range(self.stages):
            own = stage_of_slot == stage
            key = seconds[own].tobytes() + repeated[own].tobytes()
            if key not in by_seconds:
                stage_seconds = np.where(own, seconds - update_sums, 0.0)
                repeated_seconds = length(stage_seconds, repeated) if repeated.any() else 0.0
                backward = length(stage_seconds, ~forward & ~once)
                if is_one_program(self.plan):
                    update = length(stage_seconds, ~forward) - backward
                else:
                    update = float(update_sums[own].sum()) + length(stage_seconds, once)
                by_seconds[key] = StagePasses(
                    forward=length(stage_seconds, forward),
                    backward=repeated_seconds + backward,
                    update=update,
                )
            passes.append(self._as_executed(by_seconds[key], stage))
        return passes

    def _sum_seconds(self, cost: OperatorCost) -> tuple[float, float]:
        """Seconds of an operator's sums of gradients: in a backward pass, in front of the update.

        Devices add up the gradients of several microbatches before they sum them, where they can.
        """
        if self.plan.microbatches == 1:
            return float(cost.gradient_sum_seconds[0]), 0.0
        return float(cost.microbatch_sum_seconds[0]), float(cost.waiting_sum_seconds[0])

    def _as_executed(self, passes: StagePasses, stage: int) -> StagePasses:
        """The passes of a stage with the costs of microbatches: each backward pass adds its
        gradients to their sum, and Python starts each pass.
        """
        if self.plan.microbatches == 1:
            return passes
        nbytes = self._added_bytes(self._members(stage))
        adding = nbytes / float(self.machine.bandwidth_for(np.array(nbytes)))
        return StagePasses(
            forward=max(passes.forward, DISPATCH_SECONDS),
            backward=max(passes.backward + adding, DISPATCH_SECONDS),
            update=passes.update,
        )

    def _stage_of_slot(self, slot: Slot) -> int:
        return self.stage_of[slot.operator] if slot.operator >= 0 else -1

    def _rematerialized(self, slot: Slot) -> bool:
        return slot.operator >= 0 and self.run_of[slot.operator] >= 0

    def _once_per_step(self, slot: Slot) -> bool:
        """Whether a slot runs once in a step: the update, and gathers of whole variables.

        Variables that are stored in shards are gathered for every microbatch. If only their
        optimizer slots are, they are gathered once, after the update.
        """
        if slot.kind == "gather":
            return not self._stores_shards(slot.operator)
        return slot.phase == "update"

    def _stores_shards(self, operator: int) -> bool:
        """Whether an operator has a variable that is stored in shards (ZeRO level 3)."""
        for variable in self.terms.operators[operator].stored:
            storage = self.plan.storage.get(variable.path)
            if storage is not None and storage.zero == 3:
                return True
        return False

    @cached_property
    def pipeline(self) -> PipelineTasks:
        """The tasks of the step."""
        return pipeline_tasks(self.plan, self.passes, self.transfers)

    @cached_property
    def times(self) -> Times:
        """Start and end of every task."""
        return run(self.pipeline.tasks)

    def least_seconds(self, row: Sequence[int]) -> float:
        """Seconds of the step without transfers, no more than it takes; needs no pieces.

        `row`: operators of which each pass of one waits for that of its neighbour.
        """
        nothing = Transfer(0.0, 0.0)
        transfers: dict[StageEdge, Transfer] = {}
        for one, other in pairwise(self.stage_of[operator] for operator in row):
            if one != other:
                transfers[StageEdge(one, other, "forward", "forward")] = nothing
                transfers[StageEdge(other, one, "backward", "backward")] = nothing
        return run(pipeline_tasks(self.plan, self.passes, transfers).tasks).seconds

    @property
    def seconds(self) -> float:
        return self.times.seconds

    @cached_property
    def cut(self) -> Cut:
        """The pieces of the step."""
        return cut(DataFlow.of(self.graph), self.plan, self._piece_bytes)

    @cached_property
    def memories(self) -> list[StageMemory]:
        """[stage]: peak memory of a device."""
        if is_one_program(self.plan):
            mesh = self.stage_plan.mesh
            machine = self.machine
            peak = memory(
                self.graph, mesh, self.layout, machine.backend, None, machine.memory_bytes
            )
            return [StageMemory(peak, float(peak.activations))]
        return PieceMemories(
            cut=self.cut,
            plan=self.plan,
            mesh=self.stage_plan.mesh,
            layout=self.layout,
            backend=self.machine.backend,
            device_bytes=self.machine.memory_bytes,
            content=self._stage_content,
        ).stages()

    def _stage_content(self, stage: int) -> tuple[object, ...]:
        """A key of a stage's operators and rematerialized runs."""
        members = self._members(stage)
        relative_runs = tuple(self.run_of[o] - self.run_of[members[0]] for o in members)
        return self._content(members), relative_runs

    @property
    def fullest(self) -> int:
        """The stage with the largest peak memory."""
        return max(range(self.stages), key=lambda stage: self.memories[stage].peak.peak)

    @property
    def peak_bytes(self) -> int:
        return self.memories[self.fullest].peak.peak

    def _added_bytes(self, operators: Sequence[int]) -> float:
        """Bytes that operators read and write to add their gradients to the sums."""
        nbytes = 0.0
        for o in operators:
            for variable in self.terms.operators[o].stored:
                nbytes += self._local_bytes(variable.added, variable.label, o)
        return nbytes

    def _content(self, operators: Sequence[int]) -> tuple[object, ...]:
        """A key of operators, the same for equal ones that are split and stored alike."""
        return tuple(self._contents[o] for o in operators)

    @cached_property
    def _contents(self) -> list[tuple[object, ...]]:
        """[operator]: its digest, splits and storage."""
        contents = []
        for operator_terms, assignment in zip(
            self.terms.operators,
            self.layout.assignments,
            strict=True,
        ):
            position = {factor: n for n, factor in enumerate(operator_terms.factors)}
            splits = sorted((position[factor], axes) for factor, axes in assignment.items())
            storage = [self.plan.storage.get(variable.path) for variable in operator_terms.stored]
            stored = [(v.zero, v.axes) if v is not None else (0, ()) for v in storage]
            contents.append((operator_terms.digest, tuple(splits), tuple(stored)))
        return contents

    def prediction(self) -> Prediction:
        """The prediction of the step.

        Memory is that of the fullest stage; an operator's seconds are those in its stage.
        """
        traffic, operator_bytes = self._traffic()
        flops = local_flops(
            self.graph,
            self.stage_plan.mesh,
            self.layout,
            self.machine.backend,
            traffic=self._collectives,
        )
        prediction = build_prediction(
            self.plan,
            self.machine,
            operators=self._operator_predictions(operator_bytes),
            memory=self.memories[self.fullest].peak,
            traffic={kind: int(nbytes) for kind, nbytes in traffic.items()},
            flops=self.plan.microbatches * flops / self.stages,
            seconds=self.seconds,
        )
        return with_energy(
            prediction,
            self.machine,
            self.terms,
            self.placement,
            self.layout.assignments,
            [1 / self.stages] * len(self.costs),
            self.plan,
        )

    @cached_property
    def _collectives(self) -> Sequence[Collective]:
        """The collectives of all stages for one microbatch."""
        return collectives(
            self.graph,
            self.stage_plan.mesh,
            self.layout,
            self.machine.backend,
            in_pieces=not is_one_program(self.plan),
        )

    def _traffic(self) -> tuple[dict[str, float], np.ndarray]:
        """(kind of collective -> bytes of a device, the mean over stages; [operator]: bytes sent
        for it).
        """
        microbatches = self.plan.microbatches
        time_axis = self.stage_plan.mesh.index.get(TIME, -1)
        waiting = waiting_sums(self.graph) if microbatches > 1 else {}
        once = unsummed(self.graph, self.layout, dict.fromkeys(waiting.values()))
        waiting = {t: gradient for t, gradient in waiting.items() if gradient in once}
        traffic: dict[str, float] = defaultdict(float)
        operator_bytes = np.zeros(len(self.graph.operators))
        for collective in over_microbatches(
            (one for one in self._collectives if any(axis != time_axis for axis in one.axes)),
            waiting,
            self._piece_bytes,
            lambda one: 1 if one.phase == "update" else microbatches,
        ):
            traffic[collective.kind] += collective.total / self.stages
            operator_bytes[collective.operator] += collective.total
        transfer_bytes = microbatches * sum(t.nbytes for t in self.transfers.values())
        if transfer_bytes:
            traffic["collective_permute"] += transfer_bytes / self.stages
        return traffic, operator_bytes

    def _operator_predictions(self, operator_bytes: np.ndarray) -> list[OperatorPrediction]:
        moves = self._move_seconds()
        times = [self._times_per_step(kind, phase) for kind, phase in PARTS]
        operators = []
        for o, cost in enumerate(self.costs):
            part_seconds = cost.parts()[:, 0] * times
            seconds: dict[str, float] = defaultdict(float)
            repeated_seconds = 0.0
            for (kind, phase), own_seconds in zip(PARTS, part_seconds.tolist(), strict=True):
                seconds[kind] += own_seconds
                if phase == "forward" and kind in ("compute", "exchange"):
                    repeated_seconds += own_seconds
            compute_seconds = seconds["compute"]
            if self.run_of[o] >= 0:
                compute_seconds += repeated_seconds
            in_pass, in_update = self._sum_seconds(cost)
            overlapping = self.plan.microbatches * in_pass + seconds["gather"]
            gradient_seconds = in_update + overlapping * (1 - cost.overlap)
            operators.append(
                OperatorPrediction(
                    name=self.graph.operators[o].name,
                    compute=compute_seconds,
                    activations=seconds["exchange"],
                    gradients=gradient_seconds,
                    moves=float(moves[o]),
                    nbytes=float(cost.nbytes[0]),
                    traffic=int(operator_bytes[o]),
                    source=compute_source(
                        self.terms.operators[o], self.placement, self.layout.assignments[o]
                    ),
                )
            )
        return operators

    def _times_per_step(self, kind: str, phase: str) -> float:
        """Repetitions of a part of an operator's work in one step."""
        if kind == "sum" or phase == "update":
            return 1.0
        return float(self.plan.microbatches)

    def _move_seconds(self) -> np.ndarray:
        """[operator]: seconds of moves inside its stage, of all microbatches."""
        moves = np.zeros(len(self.graph.operators))
        for edge in planned_moves(self.terms.edges, self.layout):
            if self._same_stage(edge):
                source = label_sharding(edge.source, self.layout.assignments[edge.home])
                target = label_sharding(edge.target, self.layout.assignments[edge.reader])
                seconds = move_seconds(edge, self.placement, source, target)
                moves[edge.reader] += self.plan.microbatches * seconds
        return moves

    def timeline(self) -> Timeline:
        """The timeline of the step: per stage a row of kernels and one of links.

        Memory is that of the fullest stage.
        """
        spans = tuple(self._spans())
        busy_seconds = sum(span.seconds for span in spans if span.kind == "compute") / self.stages
        prediction = self.prediction()
        peak = prediction.memory
        note = (
            f"memory is that of stage {self.fullest}, the fullest; "
            "collectives inside a stage are part of its passes"
        )
        return Timeline(
            plan=self.plan.name,
            graph=self.graph.name,
            machine=self.machine.name,
            devices=self.plan.devices,
            seconds=self.seconds,
            spans=spans,
            idle={"bubble": max(0.0, self.seconds - busy_seconds)},
            memory=self._memory_curve(self.fullest),
            peak_bytes=peak.peak,
            held={kind: getattr(peak, kind) for kind in KINDS},
            joules=prediction.joules,
            peak_operator=peak.operator,
            traffic=dict(prediction.traffic),
            source=prediction.source(),
            notes=(*self.plan.notes, note),
            groups=self.stages,
        )

    def _spans(self) -> Iterator[Span]:
        on_path = critical(self.pipeline.tasks, self.times)
        count = self.plan.microbatches
        for k, task in enumerate(self.pipeline.names):
            seconds = float(self.pipeline.tasks.seconds[k])
            if seconds <= 0:
                continue
            stage = f"stage {task.stage}"
            name = f"{stage} {task.phase}"
            if task.phase != "update":
                name += f", microbatch {task.microbatch + 1} of {count}"
            if not task.is_pass:
                name += f", sent to stage {task.target}"
            yield Span(
                name=name,
                operator=stage,
                kind="compute" if task.is_pass else "move",
                phase=task.phase,
                stream=KERNELS if task.is_pass else LINKS,
                start=float(self.times.start[k]),
                seconds=seconds,
                critical=bool(on_path[k]),
                group=stage,
            )

    def _memory_curve(self, stage: int) -> tuple[tuple[float, int], ...]:
        """(seconds, bytes) of a device of a stage: a microbatch has its forward values in memory
        from its forward to its backward pass.
        """
        changes: list[tuple[float, int]] = []
        for k, task in enumerate(self.pipeline.names):
            if task.stage != stage or not task.is_pass:
                continue
            if task.phase == "forward":
                changes.append((float(self.times.start[k]), 1))
            elif task.phase == "backward":
                changes.append((float(self.times.end[k]), -1))
        changes.sort()
        stage_memory = self.memories[stage]
        peak_bytes = stage_memory.peak.peak
        flying = np.cumsum([change for _, change in changes]).tolist()
        most_flying = max(flying, default=0)
        curve = []
        for (seconds, _), count in zip(changes, flying, strict=True):
            free_bytes = (most_flying - count) * stage_memory.microbatch_bytes
            curve.append((seconds, int(peak_bytes - free_bytes)))
        if not curve:
            return ((0.0, peak_bytes),)
        return ((0.0, curve[0][1]), *curve)

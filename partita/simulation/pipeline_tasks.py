"""The tasks of a pipeline for the engine: passes of stages over microbatches, and transfers between
stages.

A stage runs its passes in the order of the plan's schedule, so it is one stream. The links out of a
stage and those into it are resources, on which transfers take turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from partita.errors import PlanError
from partita.graph.operator_graph import Phase
from partita.plans.pipeline import order
from partita.plans.plan import Plan
from partita.simulation.engine import Tasks


class StageEdge(NamedTuple):
    """Values that one stage computes and another reads, by the phases of both."""

    source: int
    target: int
    phase: Phase
    read_phase: Phase


class Transfer(NamedTuple):
    """A transfer between two stages, of one microbatch."""

    seconds: float
    nbytes: float
    """Bytes of one device."""


class StagePasses(NamedTuple):
    """Seconds of a stage for one microbatch, and once per step."""

    forward: float
    backward: float
    update: float
    """Gradient sums and update, after the last backward pass. Earlier stages do not wait for them.
    """


class PipelineTask(NamedTuple):
    """A pass of a stage over a microbatch, its update after the last one, or the transfer of the
    results to the stage `target` (-1 for a pass or update).
    """

    stage: int
    phase: Phase
    microbatch: int
    target: int = -1

    @property
    def is_pass(self) -> bool:
        return self.target < 0


@dataclass(frozen=True, eq=False)
class PipelineTasks:
    """The tasks of a pipeline. `names[k]` identifies task k."""

    tasks: Tasks
    names: list[PipelineTask]


def pipeline_tasks(
    plan: Plan,
    passes: Sequence[StagePasses],
    transfers: Mapping[StageEdge, Transfer],
) -> PipelineTasks:
    """The tasks of a plan's step. PlanError if stages wait for each other in a circle."""
    builder = _PipelineTasksBuilder(plan, passes, transfers)
    builder.add_passes()
    builder.add_update_transfers()
    tasks = Tasks.of(
        builder.seconds,
        builder.before,
        builder.stream,
        builder.uses,
    )
    return PipelineTasks(tasks, list(builder.numbers))


class _PipelineTasksBuilder:
    """Tasks in an order in which those before a task have smaller numbers."""

    def __init__(
        self,
        plan: Plan,
        passes: Sequence[StagePasses],
        transfers: Mapping[StageEdge, Transfer],
    ) -> None:
        self.passes = passes
        self.transfers = transfers
        self.plan = plan
        self.last_microbatch = plan.microbatches - 1
        self.edges_into: dict[tuple[int, Phase], list[StageEdge]] = defaultdict(list)
        """(stage, phase) -> the values that its pass reads."""
        self.transfer_seconds: dict[tuple[int, int, Phase], float] = defaultdict(float)
        """(source, target, phase) -> seconds of the transfer with all values of that phase."""
        for edge, transfer in transfers.items():
            self._check_order(edge)
            if edge.read_phase != "update":
                self.edges_into[edge.target, edge.read_phase].append(edge)
                self.transfer_seconds[edge.source, edge.target, edge.phase] += transfer.seconds
        self.numbers: dict[PipelineTask, int] = {}
        self.seconds: list[float] = []
        self.before: list[list[int]] = []
        self.stream: list[int] = []
        self.uses: list[list[tuple[int, float]]] = []

    def _check_order(self, edge: StageEdge) -> None:
        forward = edge.phase == edge.read_phase == "forward"
        if forward and edge.source > edge.target:
            raise PlanError(
                f"Stage {edge.target} needs a forward value of stage {edge.source}, which comes "
                "after it. Number the stages in the order of the model."
            )

    def add_passes(self) -> None:
        """Adds all passes with the transfers that they wait for, in the order of execution."""
        waits: dict[tuple[int, Phase], list[tuple[int, Phase]]] = {}
        for reader, edges in self.edges_into.items():
            waits[reader] = [(edge.source, edge.phase) for edge in edges]
        for stage, phase, microbatch in order(self.plan, waits):
            self._add_pass(stage, phase, microbatch)

    def _add_pass(
        self,
        stage: int,
        phase: Phase,
        microbatch: int,
    ) -> None:
        """Adds a pass after the transfers into it."""
        waits = set()
        for edge in self.edges_into[stage, phase]:
            transfer_seconds = self.transfer_seconds[edge.source, edge.target, edge.phase]
            waits.add(self._add_transfer(edge, microbatch, transfer_seconds))
        if phase == "backward":
            waits.add(self.numbers[PipelineTask(stage, "forward", microbatch)])
        stage_passes = self.passes[stage]
        seconds = stage_passes.forward if phase == "forward" else stage_passes.backward
        self._add(
            PipelineTask(stage, phase, microbatch),
            seconds,
            sorted(waits),
            stage,
            [],
        )
        if phase == "backward" and microbatch == self.last_microbatch:
            name = PipelineTask(stage, phase, microbatch)
            update = PipelineTask(stage, "update", microbatch)
            self._add(update, stage_passes.update, [self.numbers[name]], stage, [])

    def _source(self, edge: StageEdge, microbatch: int) -> PipelineTask:
        """The pass that computes the values of an edge."""
        return PipelineTask(edge.source, edge.phase, microbatch)

    def add_update_transfers(self) -> None:
        """Adds transfers of values that the update reads, after the last microbatch."""
        for edge, transfer in self.transfers.items():
            if edge.read_phase == "update":
                self._add_transfer(edge, self.last_microbatch, transfer.seconds)

    def _add_transfer(
        self,
        edge: StageEdge,
        microbatch: int,
        seconds: float,
    ) -> int:
        """The number of the transfer for an edge, which is added if it is new."""
        name = PipelineTask(
            edge.source,
            edge.phase,
            microbatch,
            edge.target,
        )
        if name not in self.numbers:
            links = [(2 * edge.source, 1.0), (2 * edge.target + 1, 1.0)]
            source = self.numbers[self._source(edge, microbatch)]
            self._add(
                name,
                seconds,
                [source],
                -1,
                links,
            )
        return self.numbers[name]

    def _add(
        self,
        name: PipelineTask,
        seconds: float,
        before: list[int],
        stream: int,
        uses: list[tuple[int, float]],
    ) -> None:
        self.numbers[name] = len(self.seconds)
        self.seconds.append(seconds)
        self.before.append(before)
        self.stream.append(stream)
        self.uses.append(uses)

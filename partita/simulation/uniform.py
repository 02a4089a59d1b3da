"""A step in which all devices do the same: one representative device is simulated, whatever their
number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from partita.cost.evaluate import OperatorCost, operator_costs
from partita.cost.memory import PeakMemory, memory
from partita.cost.moves import Placement
from partita.cost.predict import Prediction, predict, with_energy
from partita.cost.terms import Terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.layout import Layout, layout_of
from partita.plans.plan import Plan
from partita.simulation.base import SimulatedStep
from partita.simulation.engine import Times, run
from partita.simulation.spans import GroupTimes, timeline_of
from partita.simulation.structure import Structure, step_structure
from partita.simulation.tasks import StepTasks, slot_seconds, step_tasks
from partita.simulation.timeline import Timeline


@dataclass(frozen=True, eq=False)
class UniformStep(SimulatedStep):
    """A step of a plan without placed operators, microbatches and rematerialization, on equal
    devices.
    """

    graph: OperatorGraph
    machine: Machine
    plan: Plan
    terms: Terms

    @cached_property
    def layout(self) -> Layout:
        """Sharding of every tensor."""
        return layout_of(self.graph, self.plan)

    @cached_property
    def placement(self) -> Placement:
        """The mesh on the machine's links."""
        return Placement(self.machine, self.plan.mesh)

    @cached_property
    def costs(self) -> Sequence[OperatorCost]:
        """Cost of every operator under its choice."""
        return operator_costs(
            self.terms,
            self.placement,
            self.layout,
            self.plan,
        )

    @cached_property
    def structure(self) -> Structure:
        """The slots of the step, in the order of issue."""
        return step_structure(self.graph, self.terms)

    @cached_property
    def tasks(self) -> StepTasks:
        """The tasks of the representative device."""
        seconds = slot_seconds(
            self.structure, self.costs, self.terms.edges, self.placement, self.layout
        )
        return step_tasks(
            self.structure,
            seconds,
            self.machine.backend.overlap,
        )

    @cached_property
    def times(self) -> Times:
        """Start and end of every task."""
        return run(self.tasks.tasks)

    @property
    def seconds(self) -> float:
        return self.times.seconds

    @property
    def peak_bytes(self) -> int:
        return self._memory.peak

    @cached_property
    def _memory(self) -> PeakMemory:
        """Peak memory of a device."""
        return memory(
            self.graph,
            self.plan.mesh,
            self.layout,
            self.machine.backend,
            device_bytes=self.machine.memory_bytes,
        )

    @cached_property
    def _sum(self) -> Prediction:
        """The prediction in which nothing overlaps: the sum of all operators' seconds."""
        return predict(
            self.graph,
            self.machine,
            self.plan,
            self.terms,
            self.layout,
            self.costs,
            self._memory,
        )

    def prediction(self) -> Prediction:
        if self.machine.backend.overlap == 0:
            return self._sum
        return with_energy(
            replace(self._sum, seconds=self.seconds),
            self.machine,
            self.terms,
            self.placement,
            self.layout.assignments,
            [1.0] * len(self.costs),
            self.plan,
        )

    def timeline(self) -> Timeline:
        group_times = GroupTimes(self.structure, self.tasks, self.times)
        return timeline_of(
            self.graph,
            self.machine,
            self.plan,
            self.prediction(),
            group_times,
        )

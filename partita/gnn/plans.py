"""Full-graph training on a machine that need not be here: seconds, memory and traffic by parts.

`plan(model, graph, machine)` prices the step for each number of parts that the machine allows. The
parts are those of training with vertices split: every device computes the largest one. Kernels over
edges read a row for every edge at the speed of memory, as if no cache held any. An epoch is one
step. Memory was compared with compilers, seconds with epochs on CPUs (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from partita.capture.jax_functions import Captured
from partita.capture.targets import CaptureTarget
from partita.errors import GraphError, MachineError
from partita.gnn.capture import capture_training
from partita.gnn.data.graph import Graph
from partita.gnn.prepare import PreparationKey, Split, within_memory
from partita.gnn.spill.priced import PlannedMemory, planned_memory
from partita.gnn.spill.run import budget_of
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.planning import resolve_machine, simulate_plan
from partita.plans.plan import Plan
from partita.search.find import capacity, mesh_of
from partita.simulation.timeline import Timeline
from partita.units import format_bytes


@dataclass(frozen=True)
class GraphPlan:
    """The training step over parts of a graph on a machine.

    parts           number of devices
    plan            the split of every operator
    available_bytes bytes of a device that a step may use
    memory          the memory plan of the step, None without one
    """

    parts: int
    plan: Plan
    available_bytes: int
    captured: Captured = field(repr=False, compare=False)
    machine: Machine = field(repr=False, compare=False)
    memory: PlannedMemory | None = field(default=None, repr=False, compare=False)

    @cached_property
    def timeline(self) -> Timeline:
        """The simulated step."""
        if self.memory is not None:
            return self.memory.timeline(self.captured.graph, self.machine, self.plan)
        return simulate_plan(self.captured, self.machine, self.plan)

    @property
    def seconds(self) -> float:
        """Seconds of an epoch, which is one step."""
        return self.timeline.seconds

    @property
    def needed_bytes(self) -> int:
        """Bytes of each device at the peak of the step."""
        return self.timeline.peak_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes between each device and the host in a step."""
        return 0 if self.memory is None else self.memory.plan.traffic

    @property
    def host_seconds(self) -> float:
        """Seconds of these copies."""
        return self.timeline.idle.get("host", 0.0)

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes

    def _repr_html_(self) -> str:
        """The simulated step as a table in a notebook cell."""
        from partita.report.notebook import timeline_html

        return timeline_html(self.timeline)

    def to_json(self) -> dict[str, Any]:
        """The figures as a JSON value."""
        return {
            "parts": self.parts,
            "seconds": self.seconds,
            "needed_bytes": self.needed_bytes,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "traffic_bytes": self.timeline.total_traffic,
            "memory_plan": self.memory is not None,
            "host_bytes": self.host_bytes,
            "host_seconds": self.host_seconds,
            "joules": self.timeline.joules,
        }


@dataclass(frozen=True)
class GraphPlans:
    """Plans for a graph on a machine, by number of parts."""

    graph: str
    machine: str
    plans: tuple[GraphPlan, ...]

    @property
    def best(self) -> GraphPlan | None:
        """The fastest plan that fits; of equal ones, that of the fewest parts. None: none fits."""
        fitting = [plan for plan in self.plans if plan.fits]
        return min(fitting, key=lambda plan: plan.seconds, default=None)

    @property
    def sentence(self) -> str:
        """The best number of parts, or the bytes that are missing and the fix."""
        best = self.best
        if best is not None:
            return f"fastest that fits: {best.parts} {'parts' if best.parts > 1 else 'part'}"
        least = min(self.plans, key=lambda plan: plan.needed_bytes)
        parts = f"{least.parts} parts need" if least.parts > 1 else "1 part needs"
        return (
            f"'{self.graph}' does not fit on {self.machine}: {parts} "
            f"{format_bytes(least.needed_bytes)} of each device, and a step may use "
            f"{format_bytes(least.available_bytes)}. Use more devices, or devices with more memory."
        )

    def _repr_html_(self) -> str:
        """The plans as a table in a notebook cell."""
        from partita.report.notebook import table_html
        from partita.report.tables import parts_table

        return table_html(parts_table(self.to_json()), [self.sentence])

    def to_json(self) -> dict[str, Any]:
        """The figures of all plans as a JSON value."""
        return {
            "graph": self.graph,
            "machine": self.machine,
            "best": None if self.best is None else self.best.to_json(),
            "plans": [plan.to_json() for plan in self.plans],
        }


def plan(
    model: Any,
    graph: Graph,
    machine: str | Machine,
    *,
    devices: int | None = None,
    partition: Any = "edges",
    order: Any = None,
    memory: str | int | None = None,
) -> GraphPlans:
    """The step of a compiled graph model on a machine, for each number of parts.

    Nothing is trained and no device is used. With `devices`, for that number of parts alone. The
    other options are those of `fit`; a learned split is priced as "edges". Without `memory`, a step
    that does not fit has a memory plan for the memory that a step may use, where that is possible.
    GraphError for a graph that does not suit the model; MachineError for a machine that has no such
    number of devices.
    """
    model._assert_compile_called("plan")
    if isinstance(partition, str) and partition == "learned":
        partition = "edges"
    whole = resolve_machine(machine)
    counts = [devices] if devices is not None else list(_counts(whole, graph))
    plans = []
    for count in counts:
        split = Split(count, partition, 1, order)
        key = model._graph_trainer.checked_key(graph, split)
        part = whole.with_devices(count)
        if memory is not None:
            plans.append(_limited_plan(model, graph, key, part, budget_of(memory)))
            continue
        planned = plan_of(model, graph, key, part)
        if not planned.fits:
            # The limit may be too small, the model in one piece, the link to the host unknown.
            with suppress(GraphError, MachineError):
                planned = _limited_plan(model, graph, key, part, planned.available_bytes)
        plans.append(planned)
    return GraphPlans(graph.name, whole.name, tuple(plans))


def plan_of(model: Any, graph: Graph, key: PreparationKey, machine: Machine) -> GraphPlan:
    """The plan of a prepared split, on a machine with as many devices."""
    target = CaptureTarget.of(machine.target) if machine.target else None
    captured = capture_training(model, graph, key, target)
    return GraphPlan(
        key.split.devices,
        _parts_plan(captured.graph, machine),
        capacity(machine),
        captured,
        machine,
    )


def _limited_plan(
    model: Any, graph: Graph, key: PreparationKey, machine: Machine, budget: int
) -> GraphPlan:
    """The plan of a prepared split within `budget` bytes of each device."""
    key = within_memory(key)
    machine.host_bandwidth()  # before the memory plan, which takes longer
    memory = planned_memory(model, graph, key, budget)
    return replace(plan_of(model, graph, key, machine), memory=memory)


def _counts(machine: Machine, graph: Graph) -> Iterator[int]:
    """Numbers of parts: powers of two that the machine divides into, and all of its devices."""
    counts = {2**power for power in range(machine.devices.bit_length())} | {machine.devices}
    for count in sorted(counts):
        if count > max(1, graph.vertices):
            continue
        try:
            machine.with_devices(count)
        except MachineError:
            continue
        yield count


def _parts_plan(graph: OperatorGraph, machine: Machine) -> Plan:
    """The plan that gives each device one part, which the first factor of that size counts."""
    mesh = mesh_of(machine)
    choices = {}
    for operator in graph.operators:
        factors = [graph.factors[factor] for factor in operator.factors]
        parts = [factor.name for factor in factors if factor.size == machine.devices]
        choices[operator.name] = {axis.name: parts[0] for axis in mesh.axes if parts}
    return Plan(
        graph.name,
        machine.name,
        mesh,
        choices,
        name="parts of the graph",
        batch_size=graph.batch_size,
        target=graph.target,
    )

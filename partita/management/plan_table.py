"""Plans for the states of a machine, and the seconds of each plan in each state.

A plan for k devices uses the k fastest ones that are there. Every split is even, so a step is as
slow as its slowest device: one factor slows all engines and memories. A link factor holds for a
whole level.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from partita.errors import MachineError, MemoryBudgetError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.management.traces import MachineState
from partita.plans.plan import Plan
from partita.search.find import find
from partita.simulation.simulate import predicted

SLOWED = (".peak", ".bandwidth")
"""Figures of devices that a slow device has less of."""


@dataclass(frozen=True)
class PlanTable:
    """Plans by key, and their seconds per step."""

    plans: Mapping[str, Plan]
    """"32 devices", "31 devices, network at 20%", ..."""
    seconds: Mapping[MachineState, Mapping[str, float]]
    """State -> key of a plan that can run in it -> seconds of a step."""

    def best(self, state: MachineState) -> str:
        """The fastest plan in a state."""
        row = self.seconds[state]
        return min(row, key=lambda key: row[key])


def plan_table(graph: OperatorGraph, machine: Machine, states: Iterable[MachineState]) -> PlanTable:
    """The best plans for each state and number of devices, timed in all states.

    Raises:
        MemoryBudgetError: No plan fits on the devices that some state leaves.
    """
    states = list(dict.fromkeys([MachineState(), *states]))
    plans: dict[str, Plan] = {}
    searched: set[tuple[int, tuple[tuple[str, float], ...]]] = set()
    for state in states:
        for count in _device_counts(machine, state):
            only_links = replace(state, slow=())
            if (count, state.links) not in searched:
                searched.add((count, state.links))
                _add_plan(plans, only_links, graph, in_state(machine, only_links, count))
    seconds: dict[MachineState, dict[str, float]] = {}
    for state in states:
        row = {}
        for key, plan in plans.items():
            if plan.devices <= machine.devices - len(state.lost):
                there = in_state(machine, state, plan.devices)
                row[key] = predicted(graph, there, plan).seconds
        if not row:
            raise MemoryBudgetError(
                f"No plan fits in the memory of the devices that are left ({state}): use a larger "
                "machine or another trace."
            )
        seconds[state] = row
    return PlanTable(plans, seconds)


def _add_plan(
    plans: dict[str, Plan], state: MachineState, graph: OperatorGraph, machine: Machine
) -> None:
    """Adds the fastest plan of a machine in a state; none if none fits."""
    try:
        result = find(graph, machine)
    except MemoryBudgetError:
        return
    if not result.fits:
        return
    links = ", ".join(f"{level} at {factor:.0%}" for level, factor in state.links)
    count = result.plan.devices
    key = "1 device" if count == 1 else f"{count} devices"
    key += f", {links}" if links else ""
    plans.setdefault(key, result.plan)


def _device_counts(machine: Machine, state: MachineState) -> list[int]:
    """Numbers of devices for plans: all that are there, all of full speed, and for both the
    greatest divisor of the machine's devices, which batches are more likely to divide into."""
    there = machine.devices - len(state.lost)
    slow = [device for device, _ in state.slow if device not in state.lost]
    counts: set[int] = set()
    for most in {there, there - len(slow)} - {0}:
        counts.add(_possible(machine, most))
        divisors = [n for n in range(1, most + 1) if machine.devices % n == 0]
        counts.add(_possible(machine, divisors[-1]))
    return sorted(counts, reverse=True)


def _possible(machine: Machine, most: int) -> int:
    """The greatest possible number of devices of a machine, at most `most`."""
    for count in range(most, 0, -1):
        try:
            machine.with_devices(count)
        except MachineError:
            continue
        return count
    raise MachineError(
        f"'{machine.name}' cannot lose devices: they differ. Leave 'lost' events away."
    )


def in_state(machine: Machine, state: MachineState, count: int) -> Machine:
    """The machine of `count` devices in a state, the fastest that are there."""
    factors = dict(state.slow)
    there = [device for device in range(machine.devices) if device not in state.lost]
    speeds = sorted((factors.get(device, 1.0) for device in there), reverse=True)
    slowest = speeds[count - 1]
    part = machine.with_devices(count)
    values: dict[str, float] = {}
    for path, (value, _, _) in part.provenance().items():
        if not isinstance(value, float | int):
            continue
        section = path.split(".")[0]
        if section in ("device", "kind") and path.endswith(SLOWED) and slowest != 1.0:
            values[path] = value * slowest
        for level, factor in state.links:
            if path == f"level.{level}.bandwidth":
                values[path] = value * factor
    return part.revised(values, "a trace of events", "derived") if values else part

"""A plan for the devices that a loss leaves: searched as the first one was, checked to fit."""

from __future__ import annotations

from partita.errors import MemoryBudgetError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.search.find import capacity, find, fits, mesh_of
from partita.simulation.simulate import predicted
from partita.units import format_bytes

SEARCH_SECONDS = 5.0
"""Time limit of a search: the others wait for it."""


def survivor_plan(graph: OperatorGraph, plan: Plan, machine: Machine) -> Plan:
    """A plan for all devices of the machine that is left, which fits in their memory.

    An expert plan stays what it was, as far as it fits. Else the plan of a search, or, if that
    leaves devices idle or takes too long, the first expert plan that fits: data parallel first.

    Raises:
        MemoryBudgetError: Nothing fits. The message gives bytes needed and free.
    """
    if plan.name in BASELINES and plan.devices > 1:
        same = _fitting_baseline(plan.name, graph, machine)
        if same is not None:
            return same
    try:
        result = find(graph, machine, seconds=SEARCH_SECONDS)
    except PlanError:
        pass
    else:
        if result.plan.devices == machine.devices and is_one_program(result.plan):
            return result.plan
    for name in sorted(BASELINES, key=lambda name: name != "data parallel"):
        expert = _fitting_baseline(name, graph, machine)
        if expert is not None:
            return expert
    raise MemoryBudgetError(
        f"'{graph.name}' fits {machine.name} under no plan for all of its devices: each may use "
        f"{format_bytes(capacity(machine))}. Use a smaller batch."
    )


def _fitting_baseline(name: str, graph: OperatorGraph, machine: Machine) -> Plan | None:
    """An expert plan for all devices; None if it does not split, or exceeds their memory."""
    try:
        plan = check(BASELINES[name](graph, machine.name, mesh_of(machine)), graph)
    except PlanError:
        return None
    if plan.devices != machine.devices:
        return None
    return plan if fits(machine, predicted(graph, machine, plan)) else None

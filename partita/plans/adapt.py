"""A plan for another shape of the same step, or for another machine: what still divides is kept, the rest is done without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.check import illegal_reason
from partita.plans.plan import Mesh, Plan, Storage


def fit_plan(plan: Plan, graph: OperatorGraph) -> Plan:
    """The plan with every split that the graph's sizes allow; its notes say which operators and variables lost one.

    Meant for the same model on batches of another size: the weights keep their shardings, so the variables need not move.
    An operator that the plan does not know is not split.
    """
    choices: dict[str, Mapping[str, str]] = {}
    fewer = []
    for index, operator in enumerate(graph.operators):
        wanted = plan.choices.get(operator.name, {})
        choices[operator.name] = _dividing(plan, graph, index, wanted)
        if choices[operator.name] != wanted:
            fewer.append(operator.name)
    tensors = {a.path: graph.tensors[a.tensor].shape for a in graph.arguments}
    storage = {
        path: s
        for path, s in plan.storage.items()
        if path in tensors and _stores(plan, s, tensors[path])
    }
    notes = list(plan.notes)
    if fewer:
        notes.append(
            f"at batch size {graph.batch_size} split fewer ways, because sizes do not divide: {_some(fewer)}"
        )
    if len(storage) < len(plan.storage):
        notes.append(f"not stored apart: {_some([p for p in plan.storage if p not in storage])}")
    return replace(
        plan,
        choices=choices,
        storage=storage,
        batch_size=graph.batch_size,
        predicted={},
        notes=tuple(notes),
    )


def _dividing(
    plan: Plan, graph: OperatorGraph, operator: int, wanted: Mapping[str, str]
) -> dict[str, str]:
    kept: dict[str, str] = {}
    left: dict[str, int] = {}
    for axis in plan.mesh.axes:
        name = wanted.get(axis.name)
        factor = None if name is None else graph.factor(operator, name)
        if name is None or factor is None:
            continue
        size = left.setdefault(name, graph.factors[factor].size)
        if size % axis.size == 0:
            left[name] = size // axis.size
            kept[axis.name] = name
    return {} if illegal_reason(graph, operator, kept, plan.mesh) else kept


def _stores(plan: Plan, storage: Storage, shape: tuple[int, ...]) -> bool:
    ways = 1
    for axis in storage.axes:
        ways *= plan.mesh.axes[plan.mesh.index[axis]].size
    return storage.dim < len(shape) and shape[storage.dim] % ways == 0


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def fit_mesh(plan: Plan, machine: Machine) -> Plan:
    """The plan with its axes on levels that the machine has: as they are where they fit, else from the fastest links outwards."""
    ways: dict[int, int] = {}
    for axis in plan.mesh.axes:
        ways[axis.level] = ways.get(axis.level, 1) * axis.size
    if all(
        level < len(machine.levels) and n <= machine.levels[level].size for level, n in ways.items()
    ):
        return plan
    level, left, placed = len(machine.levels) - 1, machine.levels[-1].size, []
    for axis in reversed(plan.mesh.axes):
        while level >= 0 and left % axis.size:
            level -= 1
            left = machine.levels[level].size
        if level < 0:
            parts = " x ".join(f"{x.size} ({x.name})" for x in machine.levels)
            raise PlanError(
                f"The plan '{plan.name}' splits {' x '.join(str(a.size) for a in plan.mesh.axes)} ways, into which {machine.name}, of {parts}, cannot be divided. "
                "Plan again for it."
            )
        placed.append(replace(axis, level=level))
        left //= axis.size
    return replace(plan, mesh=Mesh(tuple(reversed(placed))))

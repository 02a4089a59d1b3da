"""A plan for another batch size of the same step, or for another machine.

Splits that no longer divide are dropped; all others stay. Plans of versions in which normalizations
were parts of products get choices for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from partita.errors import PlanError
from partita.graph.normalizations import NORMALIZATION
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.check import first_names, illegal_reason
from partita.plans.plan import Axis, Mesh, Plan, Storage, placed_slice


def fit_plan(plan: Plan, graph: OperatorGraph) -> Plan:
    """The plan with all splits that the graph's sizes allow.

    For the same model on batches of another size: weights keep their shardings, so variables need
    not move. Operators that the plan does not name are not split. The notes of the result list the
    operators and variables that lost a split.
    """
    choices: dict[str, Mapping[str, str]] = {}
    reduced = []
    for index, operator in enumerate(graph.operators):
        planned = plan.choices.get(operator.name, {})
        choice = _divisible_choice(
            plan,
            graph,
            index,
            planned,
        )
        choices[operator.name] = choice
        if choice != planned:
            reduced.append(operator.name)
    shapes = {a.path: graph.tensors[a.tensor].shape for a in graph.arguments}
    storage = {}
    dropped = []
    for path, stored in plan.storage.items():
        if path in shapes and _divides(plan, stored, shapes[path]):
            storage[path] = stored
        else:
            dropped.append(path)
    notes = list(plan.notes)
    if reduced:
        notes.append(
            f"at batch size {graph.batch_size} split fewer ways, because sizes do not divide: "
            f"{first_names(reduced)}"
        )
    if dropped:
        notes.append(f"storage not split: {first_names(dropped)}")
    microbatches = plan.microbatches
    while graph.batch_size % microbatches:
        microbatches -= 1
    if microbatches != plan.microbatches:
        notes.append(microbatches_note(plan.microbatches, graph.batch_size, microbatches))
    return replace(
        plan,
        choices=choices,
        storage=storage,
        offload=tuple(path for path in plan.offload if path in shapes),
        microbatches=microbatches,
        batch_size=graph.batch_size,
        predicted={},
        notes=tuple(notes),
    )


def with_normalizations(
    choices: Mapping[str, Mapping[str, str]], graph: OperatorGraph
) -> dict[str, Mapping[str, str]]:
    """Choices with those of normalizations that are missing: as the products before them are split.

    A sum over devices (R) leaves them whole.
    """
    products: dict[int, int] = {}
    for use in graph.uses:
        home = graph.home[use.tensor]
        is_product = home >= 0 and graph.operators[home].kind in ("dot", "gather")
        if is_product and home < use.operator:
            products[use.operator] = max(home, products.get(use.operator, -1))
    completed = dict(choices)
    for number, operator in enumerate(graph.operators):
        if operator.name in choices or operator.kind != NORMALIZATION or number not in products:
            continue
        names = {graph.factors[f].kind: graph.factors[f].name for f in operator.factors}
        product = choices.get(graph.operators[products[number]].name, {})
        choice = {}
        for axis, use in product.items():
            if placed_slice(use) is not None:
                choice[axis] = use
            elif use[0] in names:
                choice[axis] = names[use[0]]
        completed[operator.name] = choice
    return completed


def microbatches_note(planned: int, batch_size: int, microbatches: int) -> str:
    """A sentence about a batch that the planned number of microbatches does not divide."""
    return (
        f"a batch of {batch_size} is not a multiple of {planned} microbatches, so it runs in "
        f"{microbatches}; use batches of a multiple of {planned}"
    )


def _divisible_choice(
    plan: Plan,
    graph: OperatorGraph,
    operator: int,
    planned: Mapping[str, str],
) -> dict[str, str]:
    choice: dict[str, str] = {}
    local_sizes: dict[str, int] = {}
    for axis in plan.mesh.axes:
        if axis.name not in planned:
            continue
        name = planned[axis.name]
        if placed_slice(name) is not None:
            choice[axis.name] = name
            continue
        factor = graph.factor(operator, name)
        if factor is None:
            continue
        size = local_sizes.get(name, graph.factors[factor].size)
        if size % axis.size == 0:
            local_sizes[name] = size // axis.size
            choice[axis.name] = name
    return (
        {}
        if illegal_reason(
            graph,
            operator,
            choice,
            plan.mesh,
        )
        else choice
    )


def _divides(
    plan: Plan,
    storage: Storage,
    shape: tuple[int, ...],
) -> bool:
    """Whether the storage's axes divide its dim of a variable of this shape."""
    ways = 1
    for name in storage.axes:
        ways *= plan.mesh.axes[plan.mesh.index[name]].size
    return storage.dim < len(shape) and shape[storage.dim] % ways == 0


def with_claims_for(plan: Plan, machine: Machine) -> Plan:
    """The plan without predictions, notes and reasons that were made for another machine.

    A machine of the same name with other numbers is another one; a note says so.
    """
    if plan.machine != machine.name:
        notes = ()
    elif plan.machine_digest and plan.machine_digest != machine.digest:
        numbers = f"other numbers of '{machine.name}'"
        notes = (f"the saved predictions are for {numbers} and are dropped",)
    else:
        return plan
    return replace(plan, machine=machine.name, machine_digest="", predicted={}, notes=notes, why={})


def fit_mesh(plan: Plan, machine: Machine) -> Plan:
    """The plan with its axes on levels of the machine.

    Axes that fit stay on their levels. Otherwise they are placed anew, from the fastest links
    outwards.
    """
    if _fits(plan.mesh, machine):
        return plan
    level = len(machine.levels) - 1
    free_parts = machine.levels[-1].size
    axes: list[Axis] = []
    for axis in reversed(plan.mesh.axes):
        while level >= 0 and free_parts % axis.size:
            level -= 1
            free_parts = machine.levels[level].size
        if level < 0:
            raise _mesh_error(plan, machine)
        axes.append(replace(axis, level=level))
        free_parts //= axis.size
    return replace(plan, mesh=Mesh(tuple(reversed(axes))))


def _fits(mesh: Mesh, machine: Machine) -> bool:
    ways: dict[int, int] = {}
    for axis in mesh.axes:
        ways[axis.level] = ways.get(axis.level, 1) * axis.size
    for level, count in ways.items():
        if level >= len(machine.levels) or count > machine.levels[level].size:
            return False
    return True


def _mesh_error(plan: Plan, machine: Machine) -> PlanError:
    ways = " x ".join(str(axis.size) for axis in plan.mesh.axes)
    parts = " x ".join(f"{level.size} ({level.name})" for level in machine.levels)
    return PlanError(
        f"The plan '{plan.name}' splits {ways} ways, which does not divide {machine.name} with "
        f"{parts}. Plan again for it."
    )

"""Plans with places: operators on slices of mesh axes, pipeline stages, microbatches,
rematerialization.

`at(i)` in a choice places an operator on slice i of a mesh axis (the O of SOAP). On an axis without
`at`, an operator uses all slices. Any operators may be placed, in any order of slices
(`simulation.placed`).

A plan with microbatches or rematerialization is a *pipeline*: on each axis either all operators are
placed or none, and the slices are its *stages*. The work of a stage on one microbatch is a plan
over the remaining axes (`stage_plan`), so costs, layouts and memory apply to it unchanged.

A microbatch is an equal part of the samples. In `stage_plan` the microbatches are one more axis, in
front of the others. It splits samples over time, not over devices, and has no traffic.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

from partita.errors import PlanError
from partita.graph.operator_graph import IdentityKey, OperatorGraph, Phase
from partita.plans.plan import TIME, Axis, Mesh, Plan, is_accelerator, placed_slice

Task = tuple[Literal["forward", "backward"], int]
"""One pass of a stage over a microbatch."""
PER_LATER_STAGE = {"1f1b": 1, "eager-1f1b": 3}
"""Schedule -> microbatches that a stage stores for each later stage, beside its own.

Three passes of a stage over a microbatch, forward and twice as long backward, pass before its
gradient comes back from the next stage.
"""


class Pass(NamedTuple):
    """One pass of one stage over one microbatch."""

    stage: int
    phase: Phase
    microbatch: int


def stage_axes(plan: Plan) -> tuple[int, ...]:
    """The mesh axes on which operators are placed, by number."""
    return _stage_axes(IdentityKey(plan))


@lru_cache(maxsize=8)
def _stage_axes(key: IdentityKey[Plan]) -> tuple[int, ...]:
    plan = key.value
    names = set()
    for choice in plan.choices.values():
        for axis, use in choice.items():
            if placed_slice(use) is not None:
                names.add(axis)
    return tuple(number for number, axis in enumerate(plan.mesh.axes) if axis.name in names)


def operator_stages(graph: OperatorGraph, plan: Plan) -> tuple[int, ...]:
    """Per operator of a pipeline its stage; 0 for all in a plan without places.

    PlanError if some operators are placed on an axis and others are not.
    """
    axes = [plan.mesh.axes[number] for number in stage_axes(plan)]
    stages = []
    for operator in graph.operators:
        stage = 0
        choice = plan.choices[operator.name]
        for axis in axes:
            place = placed_slice(choice.get(axis.name, ""))
            if place is None:
                raise PlanError(
                    f"'{operator.name}' has no slice of axis {axis.name!r}, and other operators "
                    "have one. With microbatches or rematerialization place all operators, as in "
                    f'"at(0):{axis.name}", or none.'
                )
            stage = stage * axis.size + place
        stages.append(stage)
    return tuple(stages)


def stage_count(plan: Plan) -> int:
    """Number of stages of a plan."""
    return math.prod(plan.mesh.axes[number].size for number in stage_axes(plan))


Place = tuple[tuple[str, int], ...]
"""Pairs of a mesh axis and the slice of it that an operator is on; none for all slices."""


def operator_places(graph: OperatorGraph, plan: Plan) -> tuple[list[Place], tuple[int, ...]]:
    """(all places of a plan, per operator the number of its place).

    The places of a pipeline are its stages, in order.
    """
    axes = [plan.mesh.axes[number] for number in stage_axes(plan)]
    of_operator: list[Place] = []
    for operator in graph.operators:
        choice = plan.choices[operator.name]
        slices = [(axis.name, placed_slice(choice.get(axis.name, ""))) for axis in axes]
        of_operator.append(tuple((name, at) for name, at in slices if at is not None))
    if is_pipeline(plan):
        names = [axis.name for axis in axes]
        grid = itertools.product(*(range(axis.size) for axis in axes))
        places = [tuple(zip(names, slices, strict=True)) for slices in grid]
    else:
        places = sorted(set(of_operator))
    number = {place: n for n, place in enumerate(places)}
    return places, tuple(number[place] for place in of_operator)


def sample_factor(
    graph: OperatorGraph,
    operator: int,
    ways: Mapping[int, int],
    microbatches: int,
) -> int:
    """The sample factor of an operator that microbatches split further, -1 if none divides.

    `ways`: factor -> number of parts into which mesh axes split it.
    """
    for number in graph.operators[operator].factors:
        factor = graph.factors[number]
        if factor.kind == "S" and factor.size % (ways.get(number, 1) * microbatches) == 0:
            return number
    return -1


def stage_plan(graph: OperatorGraph, plan: Plan) -> Plan:
    """The plan of every stage for one microbatch, over the axes without places."""
    staged = set(stage_axes(plan))
    axes = [axis for number, axis in enumerate(plan.mesh.axes) if number not in staged]
    sizes = {axis.name: axis.size for axis in axes}
    choices: dict[str, Mapping[str, str]] = {}
    for number, operator in enumerate(graph.operators):
        choice = {a: use for a, use in plan.choices[operator.name].items() if a in sizes}
        if plan.microbatches > 1:
            factor_of = {graph.factors[f].name: f for f in operator.factors}
            ways: dict[int, int] = {}
            for axis, use in choice.items():
                factor = factor_of[use]
                ways[factor] = ways.get(factor, 1) * sizes[axis]
            samples = sample_factor(
                graph,
                number,
                ways,
                plan.microbatches,
            )
            if samples >= 0:
                choice[TIME] = graph.factors[samples].name
        choices[operator.name] = choice
    if plan.microbatches > 1:
        axes.insert(0, Axis(TIME, plan.microbatches, -1))
    return replace(
        plan,
        mesh=Mesh(tuple(axes)),
        choices=choices,
        microbatches=1,
        recompute=(),
        predicted={},
        why={},
    )


def stage_schedule(plan: Plan, stage: int) -> list[Task]:
    """The order of a stage's forward and backward passes over the microbatches.

    "gpipe": all forward passes, then all backward passes (Huang et al., NeurIPS 2019).
    "1f1b": each backward pass as early as possible, so that a stage stores at most one microbatch
    per later stage, and its own (Narayanan et al., SOSP 2019).
    "eager-1f1b": the same, with more forward passes first, for the time until the first gradient
    comes back (Zhuang et al., MLSys 2023, have fewer of them, to hide transfers).
    """
    count = plan.microbatches
    ahead = in_flight(plan, stage)
    order: list[Task] = [("forward", number) for number in range(ahead)]
    for number in range(count):
        order.append(("backward", number))
        if ahead + number < count:
            order.append(("forward", ahead + number))
    return order


def order(
    plan: Plan,
    waits: Mapping[tuple[int, Phase], Collection[tuple[int, Phase]]],
) -> list[Pass]:
    """All passes of a step, each after the passes that it waits for.

    `waits`: (stage, phase) -> the (stage, phase) pairs whose pass over the same microbatch comes
    before; a backward pass waits for its stage's forward pass anyway. Stages take turns. Each one
    follows its schedule until it has to wait for another stage. The simulator and the execution
    take this order, so the step that runs is the step that was simulated.

    PlanError if stages wait for each other in a circle.
    """
    schedules = [stage_schedule(plan, stage) for stage in range(stage_count(plan))]
    positions = [0] * len(schedules)
    passes: dict[Pass, None] = {}

    def is_ready(stage: int, phase: Phase, microbatch: int) -> bool:
        before = [Pass(*source, microbatch) for source in waits.get((stage, phase), ())]
        if phase == "backward":
            before.append(Pass(stage, "forward", microbatch))
        return all(each in passes for each in before)

    while any(position < len(s) for position, s in zip(positions, schedules, strict=True)):
        count_before = len(passes)
        for stage, schedule in enumerate(schedules):
            while positions[stage] < len(schedule):
                phase, microbatch = schedule[positions[stage]]
                if not is_ready(stage, phase, microbatch):
                    break
                passes[Pass(stage, phase, microbatch)] = None
                positions[stage] += 1
        if len(passes) == count_before:
            raise PlanError(
                "The stages of the plan wait for each other in a circle. "
                "Number them in the order of the model."
            )
    return list(passes)


def in_flight(plan: Plan, stage: int) -> int:
    """The largest number of microbatches whose forward values a stage stores at once."""
    return most_in_flight(plan.schedule, plan.microbatches, stage_count(plan) - stage - 1)


def most_in_flight(schedule: str, microbatches: int, later_stages: int) -> int:
    """The same for a stage with a number of later ones."""
    if schedule == "gpipe":
        return microbatches
    return min(microbatches, 1 + PER_LATER_STAGE[schedule] * later_stages)


def rematerialized_runs(graph: OperatorGraph, plan: Plan) -> tuple[int, ...]:
    """Per operator the number of its rematerialized run, -1 where forward values are stored.

    A run ends with its stage.
    """
    numbers = _operator_numbers(graph)
    runs = [-1] * len(numbers)
    for run, (first, last) in enumerate(plan.recompute):
        for operator in range(numbers[first], numbers[last] + 1):
            runs[operator] = run
    return tuple(runs)


def is_one_program(plan: Plan) -> bool:
    """Whether a plan runs as one program on all devices.

    Plans with placed operators or microbatches run in pieces; for a CPU, plans with
    rematerialization too, because XLA:CPU would merge the copies with the originals. The only slice
    of an axis is all of it.
    """
    return not is_pipeline(plan) and stage_count(plan) == 1


def is_placed(plan: Plan) -> bool:
    """Whether operators are on slices of axes, and no stages of microbatches."""
    return not is_one_program(plan) and not is_pipeline(plan)


def is_whole_pass(plan: Plan) -> bool:
    """Whether forward and backward pass of a microbatch run as one program: on a GPU or TPU,
    without stages and rematerialized runs, whose copies XLA would merge with the originals.

    Values between the passes are then temporaries, which a compiler may compute again.
    """
    is_single = is_accelerator(plan.target) and stage_count(plan) == 1
    return is_single and is_pipeline(plan) and not plan.recompute


def is_pipeline(plan: Plan) -> bool:
    """Whether a plan has microbatches, or rematerialized operators that one program cannot have."""
    if plan.microbatches > 1:
        return True
    return bool(plan.recompute) and not (is_accelerator(plan.target) and not stage_axes(plan))


def check_stages(plan: Plan, graph: OperatorGraph) -> None:
    """Raise PlanError if places, microbatches or rematerialized runs do not fit the graph."""
    if is_pipeline(plan):
        _check_used(operator_stages(graph, plan), plan, graph)
    _check_stored_places(plan, graph)
    if graph.batch_size and graph.batch_size % plan.microbatches:
        divisors = [m for m in range(1, graph.batch_size + 1) if graph.batch_size % m == 0]
        nearest = min(divisors, key=lambda m: (abs(m - plan.microbatches), m))
        raise PlanError(
            f"A batch of {graph.batch_size} cannot be cut into {plan.microbatches} microbatches. "
            f"Use a number that divides it, such as {nearest}."
        )
    _check_runs(plan, graph)


def _check_used(stage_of: Sequence[int], plan: Plan, graph: OperatorGraph) -> None:
    """PlanError for a stage without operators."""
    empty = sorted(set(range(stage_count(plan))) - set(stage_of))
    if empty:
        raise PlanError(
            f"Stage {empty[0]} of the plan has no operators. Place at least one on every stage, "
            f"or use fewer stages.{loop_hint(graph)}"
        )


def loop_hint(graph: OperatorGraph) -> str:
    """A sentence on the operator that computes several layers in one loop, "" if there is none.

    Such a loop reads a slice of a variable in each turn (`jax.lax.scan` over stacked weights).
    """
    variables = {a.tensor for a in graph.arguments if a.role == "parameter"}
    for loop in graph.loops:
        instruction = graph.instructions[loop.instruction]
        operator = graph.owner[loop.instruction]
        stacked = [
            t
            for t in variables.intersection(instruction.operands)
            if graph.tensors[t].shape[:1] == (loop.trips,)
        ]
        if operator >= 0 and instruction.phase == "forward" and stacked:
            return (
                f" '{graph.operators[operator].name}' computes {loop.trips} layers in one loop "
                "(lax.scan), which is one operator and has no stages: call the layers one after "
                "another to divide them."
            )
    return ""


def _check_stored_places(plan: Plan, graph: OperatorGraph) -> None:
    for argument in graph.arguments:
        storage = plan.storage.get(argument.path)
        home = graph.home[argument.tensor]
        if storage is None or home < 0:
            continue
        operator = graph.operators[home].name
        for axis in storage.axes:
            place = placed_slice(plan.choices[operator].get(axis, ""))
            if place is not None:
                raise PlanError(
                    f"The plan stores {argument.path!r} over axis {axis!r}, but its operator "
                    f"'{operator}' is only on slice {place} of it. Store it over other axes."
                )


def _check_runs(plan: Plan, graph: OperatorGraph) -> None:
    numbers = _operator_numbers(graph)
    end = -1
    for run in plan.recompute:
        for name in run:
            if name not in numbers:
                raise PlanError(
                    f"The plan rematerializes {name!r}, which the model does not have. Plan again."
                )
        first, last = (numbers[name] for name in run)
        if last < first or first <= end:
            raise PlanError(
                f"The rematerialized run from {run[0]!r} to {run[1]!r} overlaps with another run "
                "or ends before it begins. List runs in the order of the model."
            )
        end = last


def _operator_numbers(graph: OperatorGraph) -> dict[str, int]:
    return {operator.name: number for number, operator in enumerate(graph.operators)}

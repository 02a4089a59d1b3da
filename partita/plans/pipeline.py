"""Plans that place operators on parts of the machine: at slices of axes, in stages, with microbatches and recomputation.

`at(i)` in a choice pins an operator to slice i of a mesh axis (the O of SOAP); one that is not pinned on an axis uses all of its slices. Any operator may
be, in any order of slices (`simulate.placed`). With microbatches or recomputation a plan is a *pipeline*: all operators are pinned on the same axes or none
is, and the slices are its *stages*. What happens inside a stage is a plan like any other, over the axes that are left (`inside`): it is
what all stages do with one microbatch, and everything that is known of plans (costs, layouts, memory) holds for it.

A microbatch is an even part of the samples. In `inside` it is one more axis, in front of all others, that splits samples over time
and not over devices: nothing is sent along it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.plans.plan import TIME, Axis, Mesh, Plan, placed_slice

Task = tuple[Literal["forward", "backward"], int]
"""One pass of a stage over a microbatch."""


def stage_axes(plan: Plan) -> tuple[int, ...]:
    """The mesh axes on which operators are pinned, by number."""
    pinned = {
        a
        for choice in plan.choices.values()
        for a, use in choice.items()
        if placed_slice(use) is not None
    }
    return tuple(n for n, axis in enumerate(plan.mesh.axes) if axis.name in pinned)


def operator_stages(graph: OperatorGraph, plan: Plan) -> tuple[int, ...]:
    """Per operator of a pipeline the stage that it is in: 0 for all where none is pinned. PlanError where some are pinned and others not."""
    axes = [plan.mesh.axes[n] for n in stage_axes(plan)]
    found = []
    for o in graph.operators:
        stage, choice = 0, plan.choices[o.name]
        for axis in axes:
            at = placed_slice(choice.get(axis.name, ""))
            if at is None:
                raise PlanError(
                    f"'{o.name}' is not pinned on axis {axis.name!r}, and other operators are: with microbatches or recomputation pin all of them, as in "
                    f'"at(0):{axis.name}", or none.'
                )
            stage = stage * axis.size + at
        found.append(stage)
    return tuple(found)


def stage_count(plan: Plan) -> int:
    """How many stages a plan has."""
    return math.prod(plan.mesh.axes[n].size for n in stage_axes(plan))


def sample_factor(graph: OperatorGraph, operator: int, ways: Mapping[int, int], parts: int) -> int:
    """The sample factor of an operator that `parts` microbatches split further than `ways` do; -1 if none divides."""
    for f in graph.operators[operator].factors:
        factor = graph.factors[f]
        if factor.kind == "S" and factor.size % (ways.get(f, 1) * parts) == 0:
            return f
    return -1


def stage_plan(graph: OperatorGraph, plan: Plan) -> Plan:
    """What each stage does with one microbatch, as a plan over the axes on which nothing is pinned."""
    pinned = set(stage_axes(plan))
    left = [axis for n, axis in enumerate(plan.mesh.axes) if n not in pinned]
    names = {axis.name for axis in left}
    size = {axis.name: axis.size for axis in left}
    choices: dict[str, Mapping[str, str]] = {}
    for number, o in enumerate(graph.operators):
        choice = {a: use for a, use in plan.choices[o.name].items() if a in names}
        if plan.microbatches > 1:
            by_name = {graph.factors[f].name: f for f in o.factors}
            ways: dict[int, int] = {}
            for a, use in choice.items():
                ways[by_name[use]] = ways.get(by_name[use], 1) * size[a]
            f = sample_factor(graph, number, ways, plan.microbatches)
            if f >= 0:
                choice[TIME] = graph.factors[f].name
        choices[o.name] = choice
    time = [Axis(TIME, plan.microbatches, -1)] if plan.microbatches > 1 else []
    return replace(
        plan,
        mesh=Mesh((*time, *left)),
        choices=choices,
        microbatches=1,
        recompute=(),
        predicted={},
        why={},
    )


def stage_schedule(plan: Plan, stage: int) -> list[Task]:
    """The order in which a stage takes microbatches forward and backward.

    "gpipe" takes all forward, then all backward (Huang et al., NeurIPS 2019). "1f1b" goes backward as soon as it can, so that a stage holds
    no more microbatches than there are stages after it (Narayanan et al., SOSP 2019).
    """
    count, stages = plan.microbatches, stage_count(plan)
    ahead = count if plan.schedule == "gpipe" else min(count, stages - stage)
    order: list[Task] = [("forward", i) for i in range(ahead)]
    for i in range(count):
        order.append(("backward", i))
        if ahead + i < count:
            order.append(("forward", ahead + i))
    return order


def in_flight(plan: Plan, stage: int) -> int:
    """The most microbatches whose forward values a stage holds at once."""
    return (
        plan.microbatches
        if plan.schedule == "gpipe"
        else min(plan.microbatches, stage_count(plan) - stage)
    )


def rematerialized_runs(graph: OperatorGraph, plan: Plan) -> tuple[int, ...]:
    """Per operator the run of recomputed operators that it is in, -1 for one whose forward values are kept. A run ends with its stage."""
    number = {o.name: n for n, o in enumerate(graph.operators)}
    found = [-1] * len(number)
    for run, (first, last) in enumerate(plan.recompute):
        for o in range(number[first], number[last] + 1):
            found[o] = run
    return tuple(found)


def check_stages(plan: Plan, graph: OperatorGraph) -> None:
    """PlanError if places, stages, microbatches or recomputed runs of a plan do not fit the graph."""
    if is_pipeline(plan):
        operator_stages(graph, plan)
    for a in graph.arguments:
        storage, home = plan.storage.get(a.path), graph.home[a.tensor]
        for axis in storage.axes if storage is not None and home >= 0 else ():
            at = placed_slice(plan.choices[graph.operators[home].name].get(axis, ""))
            if at is not None:
                raise PlanError(
                    f"The plan stores {a.path!r} over axis {axis!r}, and '{graph.operators[home].name}', which it is of, is only on slice {at} of it: store it over "
                    "other axes."
                )
    if graph.batch_size and graph.batch_size % plan.microbatches:
        raise PlanError(
            f"A batch of {graph.batch_size} cannot be cut into {plan.microbatches} microbatches: give a number that divides it."
        )
    number = {o.name: n for n, o in enumerate(graph.operators)}
    before = -1
    for run in plan.recompute:
        for name in run:
            if name not in number:
                raise PlanError(
                    f"The plan recomputes {name!r}, which the model does not have. Plan again."
                )
        first, last = (number[name] for name in run)
        if last < first or first <= before:
            raise PlanError(
                f"The plan recomputes the operators from {run[0]!r} to {run[1]!r}, which overlap with others or end before they begin: give "
                "runs in the order of the model."
            )
        before = last


def runnable(plan: Plan) -> bool:
    """Whether `execute` can run a plan: all devices run one program, without placed operators, microbatches and rematerialization."""
    return not is_pipeline(plan) and not stage_axes(plan)


def is_pipeline(plan: Plan) -> bool:
    """Whether a plan has microbatches or rematerialization."""
    return plan.microbatches > 1 or bool(plan.recompute)

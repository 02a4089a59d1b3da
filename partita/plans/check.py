"""Whether a plan fits its graph: names, sizes, splits that cannot run, stages."""

from __future__ import annotations

from collections.abc import Mapping

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.plans.pipeline import check_stages
from partita.plans.plan import Mesh, Plan, placed_slice


def illegal_reason(
    graph: OperatorGraph, operator: int, used: Mapping[str, str], mesh: Mesh
) -> str | None:
    """Why a choice cannot be run although its sizes divide, None if it can.

    XLA's partitioner sums the weight gradient of some convolutions over all devices instead of over those that share the sum
    (seen on jax 0.10.2, CPU: it comes out too large by the number of devices left over). That is so for a convolution split
    in space and for a grouped one; it is right when every device takes part. On some splits of a grouped convolution by its
    channels it is wrong too, or aborts the process.
    """
    if graph.operators[operator].kind != "conv" or not mesh.axes:
        return None
    by_name = {
        graph.factors[f].name: graph.factors[f].kind for f in graph.operators[operator].factors
    }
    kinds = {by_name[name] for name in used.values() if name in by_name}
    whole = len(used) == len(mesh.axes)
    if "A" in kinds and not (whole and kinds <= {"S", "A"}):
        return "a convolution that is split in space (A) must split every other axis by S or A too"
    if kinds and _grouped(graph, operator) and not (whole and kinds == {"S"}):
        return "a grouped convolution can only be split by S, over every axis"
    return None


def _grouped(graph: OperatorGraph, operator: int) -> bool:
    """Whether a convolution has groups: a factor that indexes its input, its kernel and its result."""
    rule = graph.instructions[graph.operators[operator].heavy].rule
    if rule is None or len(rule.operands) < 2:
        return False
    sides = [
        {f for dim in side for f in dim if rule.sizes[f] > 1}
        for side in (*rule.operands[:2], rule.results[0])
    ]
    return bool(set.intersection(*sides))


def check(plan: Plan, graph: OperatorGraph) -> Plan:
    """The plan itself if it fits the graph; PlanError says which operators, factors or sizes do not match."""
    names = {o.name: i for i, o in enumerate(graph.operators)}
    missing = [n for n in names if n not in plan.choices]
    unknown = [n for n in plan.choices if n not in names]
    if missing or unknown:
        parts = []
        if unknown:
            parts.append(f"the model has no {_some(unknown)}")
        if missing:
            parts.append(f"the plan says nothing about {_some(missing)}")
        other = f" ('{plan.graph}', not '{graph.name}')" if plan.graph != graph.name else ""
        raise PlanError(
            f"The plan was made for another model{other}: {'; '.join(parts)}. Plan again."
        )
    for name, choice in plan.choices.items():
        operator = graph.operators[names[name]]
        split: dict[str, int] = {}
        for axis, factor in choice.items():
            at, size = placed_slice(factor), plan.mesh.axes[plan.mesh.index[axis]].size
            if at is not None and at >= size:
                raise PlanError(
                    f"'{name}' is pinned at slice {at} of axis {axis!r}, which has slices 0 to {size - 1}."
                )
            if at is not None:
                continue
            if graph.factor(names[name], factor) is None:
                has = ", ".join(
                    f"{graph.factors[f].name} ({graph.factors[f].size})" for f in operator.factors
                )
                raise PlanError(
                    f"'{name}' has no factor {factor!r} to split over axis {axis!r}. It has: {has or 'none'}."
                )
            split[factor] = split.get(factor, 1) * size
        for factor, count in split.items():
            f = graph.factor(names[name], factor)
            assert f is not None
            whole = graph.factors[f].size
            if whole % count:
                divisors = [d for d in range(2, whole + 1) if whole % d == 0][:6]
                raise PlanError(
                    f"Cannot split factor {factor} of '{name}' ({whole}) {count} ways: {whole} is not a multiple of {count}. "
                    f"It can be split {', '.join(map(str, divisors)) or 'no'} ways."
                )
        splits = {a: use for a, use in choice.items() if placed_slice(use) is None}
        why = illegal_reason(
            graph,
            names[name],
            splits,
            Mesh(tuple(a for a in plan.mesh.axes if placed_slice(choice.get(a.name, "")) is None)),
        )
        if why:
            raise PlanError(f"'{name}' cannot run as planned: {why}.")
    paths = {a.path: a for a in graph.arguments}
    for path, storage in plan.storage.items():
        if path not in paths:
            raise PlanError(
                f"The plan stores a variable {path!r} that the model does not have. Plan again."
            )
        rank = len(graph.tensors[paths[path].tensor].shape)
        if not 0 <= storage.dim < rank:
            raise PlanError(
                f"The plan splits dim {storage.dim} of {path!r}, which has {rank} dims."
            )
    check_stages(plan, graph)
    return plan


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(n) for n in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""Checks that a plan fits a graph: names, factors, sizes, storage, stages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from partita.errors import PlanError
from partita.files.schema import SHOWN_NAME, shown
from partita.graph.operator_graph import Argument, OperatorGraph, operand_labels, per_graph
from partita.graph.rematerialize import copies_of
from partita.plans.pipeline import check_stages, is_pipeline, loop_hint, stage_axes
from partita.plans.plan import Mesh, Plan, Storage, placed_slice


def check(plan: Plan, graph: OperatorGraph) -> Plan:
    """The plan, if it fits the graph.

    PlanError names the operators, factors or sizes that do not fit.
    """
    _check_names(plan, graph)
    for number, operator in enumerate(graph.operators):
        _check_choice(
            plan,
            graph,
            number,
            plan.choices[operator.name],
        )
    _check_storage(plan, graph)
    _check_offload(plan, graph)
    check_stages(plan, graph)
    if plan.recompute and not is_pipeline(plan):
        copies_of(graph, plan.recompute)
    return plan


def _check_names(plan: Plan, graph: OperatorGraph) -> None:
    names = {operator.name for operator in graph.operators}
    missing = [o.name for o in graph.operators if o.name not in plan.choices]
    unknown = [name for name in plan.choices if name not in names]
    reasons = []
    if unknown:
        reasons.append(f"the model has no {first_names(unknown)}")
    if missing:
        reasons.append(f"the plan has no choice for {first_names(missing)}")
    if reasons:
        hint = loop_hint(graph) if stage_axes(plan) else ""
        raise PlanError(
            f"The plan was made for {_other(plan, graph)}: {'; '.join(reasons)}. Plan again.{hint}"
        )


def _other(plan: Plan, graph: OperatorGraph) -> str:
    """The difference of a plan's graph from another one: its platform, or else its model."""
    if plan.graph != graph.name:
        planned, present = shown(plan.graph, SHOWN_NAME), shown(graph.name, SHOWN_NAME)
        return f"another model ({planned}, not {present})"
    if plan.target != graph.target and plan.target and graph.target:
        return f"another platform ({plan.target}, not {graph.target})"
    return "another model"


def _check_choice(
    plan: Plan,
    graph: OperatorGraph,
    operator: int,
    choice: Mapping[str, str],
) -> None:
    name = graph.operators[operator].name
    ways: dict[str, int] = {}
    splits: dict[str, str] = {}
    for axis_name, factor in choice.items():
        axis = plan.mesh.axes[plan.mesh.index[axis_name]]
        place = placed_slice(factor)
        if place is None:
            _check_factor(
                graph,
                operator,
                factor,
                axis_name,
            )
            ways[factor] = ways.get(factor, 1) * axis.size
            splits[axis_name] = factor
        elif place >= axis.size:
            raise PlanError(
                f"'{name}' is placed on slice {place} of axis {axis_name!r}, "
                f"which has slices 0 to {axis.size - 1}."
            )
    for factor, count in ways.items():
        _check_divides(
            graph,
            operator,
            factor,
            count,
        )
    free_axes = tuple(a for a in plan.mesh.axes if a.name not in choice or a.name in splits)
    reason = illegal_reason(
        graph,
        operator,
        splits,
        Mesh(free_axes),
    )
    if reason:
        raise PlanError(f"'{name}' cannot run as planned: {reason}.")


def _check_factor(
    graph: OperatorGraph,
    operator: int,
    factor: str,
    axis: str,
) -> None:
    if graph.factor(operator, factor) is not None:
        return
    name = graph.operators[operator].name
    factors = [graph.factors[f] for f in graph.operators[operator].factors]
    existing = ", ".join(f"{f.name} ({f.size})" for f in factors)
    raise PlanError(
        f"'{name}' has no factor {factor!r} to split over axis {axis!r}. It has: "
        f"{existing or 'none'}."
    )


def _check_divides(
    graph: OperatorGraph,
    operator: int,
    name: str,
    ways: int,
) -> None:
    factor = graph.factor(operator, name)
    assert factor is not None
    size = graph.factors[factor].size
    if size % ways == 0:
        return
    divisors = [d for d in range(2, size + 1) if size % d == 0][:6]
    possible = ", ".join(map(str, divisors)) or "no"
    raise PlanError(
        f"Cannot split factor {name} of '{graph.operators[operator].name}' ({size}) {ways} ways: "
        f"{size} is not a multiple of {ways}. It can be split {possible} ways."
    )


def _check_storage(plan: Plan, graph: OperatorGraph) -> None:
    arguments = {argument.path: argument for argument in graph.arguments}
    for path, storage in plan.storage.items():
        if path not in arguments:
            raise PlanError(
                f"The plan stores a variable {shown(path, SHOWN_NAME)} that the model does not "
                f"have. {_similar_variable(path, arguments)}"
            )
        _check_stored(plan, graph, arguments[path], storage)


def _check_offload(plan: Plan, graph: OperatorGraph) -> None:
    with_slots = {argument.parameter for argument in graph.arguments if argument.parameter}
    for path in plan.offload:
        if path not in with_slots:
            raise PlanError(
                f"The plan offloads the optimizer slots of {shown(path, SHOWN_NAME)}, which has "
                f"none. {_similar_variable(path, with_slots)}"
            )
    if plan.offload and (is_pipeline(plan) or stage_axes(plan)):
        raise PlanError(
            f"The plan '{plan.name}' runs in pieces, and pieces have no optimizer slots in host "
            "memory. Plan with --no-stages."
        )


def _similar_variable(path: str, paths: Iterable[str]) -> str:
    """The fix for the path of a variable that does not exist.

    >>> _similar_variable("dense/kernel", ["net/dense/bias", "net/dense/kernel"])
    "Did you mean 'net/dense/kernel'?"
    """
    names = list(paths)
    longer = [name for name in names if name.endswith(f"/{path}")]
    near = longer or difflib.get_close_matches(path, names, 1)
    return f"Did you mean {shown(near[0], SHOWN_NAME)}?" if near else "Plan again."


def _check_stored(plan: Plan, graph: OperatorGraph, argument: Argument, storage: Storage) -> None:
    """PlanError unless a variable can be stored over these axes."""
    path = argument.path
    shape = graph.tensors[argument.tensor].shape
    home = graph.home[argument.tensor]
    if argument.role != "parameter" or home < 0:
        raise PlanError(
            f"The plan stores {path!r}, which is no parameter of an operator. Name its parameter: "
            "slots are stored with it."
        )
    if not 0 <= storage.dim < len(shape):
        raise PlanError(
            f"The plan splits dim {storage.dim} of {path!r}, which has {len(shape)} dims."
        )
    if storage.zero not in (1, 2, 3):
        raise PlanError(f"The plan stores {path!r} with ZeRO stage {storage.zero}: give 1, 2 or 3.")
    operator = graph.operators[home].name
    choice = plan.choices[operator]
    label = graph.labels[argument.tensor]
    splitting = {graph.factors[factor].name: dim for dim, factor in enumerate(label) if factor >= 0}
    used = [axis for axis in storage.axes if choice.get(axis) in splitting]
    if used or len(set(storage.axes)) < len(storage.axes):
        reason = f"'{operator}' splits it over {used[0]!r} already" if used else "an axis is twice"
        raise PlanError(
            f"The plan stores {path!r} over {', '.join(storage.axes)}, but {reason}. Store it over "
            "other axes."
        )
    ways = 1
    for axis in plan.mesh.axes:
        factor = choice.get(axis.name)
        splits = factor is not None and splitting.get(factor) == storage.dim
        if splits or axis.name in storage.axes:
            ways *= axis.size
    if shape[storage.dim] % ways:
        raise PlanError(
            f"The plan splits dim {storage.dim} of {path!r} ({shape[storage.dim]}) {ways} ways: "
            f"{shape[storage.dim]} is not a multiple of {ways}. Store it over fewer axes."
        )


def illegal_reason(
    graph: OperatorGraph,
    operator: int,
    choice: Mapping[str, str],
    mesh: Mesh,
) -> str | None:
    """The reason why a choice cannot run although its sizes divide, None if it can.

    XLA's partitioner sums the weight gradient of some convolutions over all devices instead of
    those that share the sum (observed with jax 0.10.2 on CPU: the gradient is too large by the
    number of remaining devices). This affects convolutions split in space, those of loops too, and
    grouped convolutions.
    The gradient is correct when every device takes part. The gradient of an image that is smaller
    than the window is wrong under more splits, so such dims are not split. Some splits of a grouped
    convolution by its channels also give wrong results or abort the process. Only axes of devices
    count, because microbatches split samples over time.
    """
    device_axes = [axis.name for axis in mesh.axes if axis.level >= 0]
    windowed = _window_factors(graph).get(operator, frozenset())
    is_convolution = graph.operators[operator].kind == "conv"
    if not (is_convolution or windowed) or not device_axes:
        return None
    choice = {axis: use for axis, use in choice.items() if axis in device_axes}
    indices = graph.operators[operator].factors
    names = set(choice.values())
    split = {f for f in indices if graph.factors[f].name in names}
    samples = {f for f in split if graph.factors[f].kind == "S"}
    if split & _covered_factors(graph).get(operator, frozenset()):
        return "a convolution cannot split a dim that is shorter than its window"
    space = split & windowed
    if is_convolution:
        space |= {f for f in split if graph.factors[f].kind == "A"}
    uses_all_axes = len(choice) == len(device_axes)
    if space and not (uses_all_axes and split == samples | space):
        return (
            "a convolution that is split in space must split every other axis by samples (S) or "
            "in space too"
        )
    splits_samples_only = uses_all_axes and split == samples
    heaviest = graph.instructions[graph.operators[operator].heavy]
    if is_convolution and split and heaviest.is_grouped and not splits_samples_only:
        return "a grouped convolution can only be split by S, over every axis"
    return None


@per_graph
def _window_factors(graph: OperatorGraph) -> dict[int, frozenset[int]]:
    """Convolution, or loop with convolutions -> the factors of their results' positions.

    Their kind is P where a later weight of the operator has height and width, too (a normalization
    over images).
    """
    factors: dict[int, frozenset[int]] = {}
    for index, instruction in enumerate(graph.instructions):
        number = graph.owner[index]
        rule = instruction.rule
        if instruction.name != "convolution" or instruction.phase != "forward" or rule is None:
            continue
        is_heavy = number >= 0 and index == graph.operators[number].heavy
        if number < 0 or not (is_heavy or graph.operators[number].kind == "loop"):
            continue
        windowed = {factor for factor, _ in instruction.windows}
        label = graph.labels[instruction.results[0]]
        dims = zip(label, rule.results[0], strict=True)
        positions = frozenset(f for f, dim in dims if not windowed.isdisjoint(dim) and f >= 0)
        factors[number] = factors.get(number, frozenset()) | positions
    return factors


@per_graph
def _covered_factors(graph: OperatorGraph) -> dict[int, frozenset[int]]:
    """Operator -> the factors of image dims shorter than their window (2 pixels, a kernel of 3)."""
    factors: dict[int, frozenset[int]] = {}
    for index, instruction in enumerate(graph.instructions):
        number = graph.owner[index]
        rule = instruction.rule
        is_forward = instruction.name == "convolution" and instruction.phase == "forward"
        if not is_forward or rule is None or number < 0:
            continue
        covered = {f for f, window in instruction.windows if window.count > window.size}
        label = operand_labels(graph, index)[0]
        dims = zip(label, rule.operands[0], strict=True)
        summed = covered.intersection(rule.reduction)
        found = frozenset(f for f, dim in dims if not summed.isdisjoint(dim) and f >= 0)
        factors[number] = factors.get(number, frozenset()) | found
    return factors


def first_names(names: Iterable[str]) -> str:
    """The first five names, in quotes, and the number of the others."""
    quoted = [shown(name, SHOWN_NAME) for name in names]
    text = ", ".join(quoted[:5])
    return text if len(quoted) <= 5 else f"{text} and {len(quoted) - 5} more"

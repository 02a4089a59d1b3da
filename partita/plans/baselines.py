"""Expert plans by name (`BASELINES`), which a searched plan has to beat.

Each baseline takes a graph, the machine's name and a mesh, and splits operators by kinds of factors
as far as sizes divide.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from partita.graph.normalizations import NORMALIZATION
from partita.graph.operator_graph import (
    Factor,
    FactorKind,
    Operator,
    OperatorGraph,
    Use,
    per_graph,
    producers,
)
from partita.graph.weight_slices import WEIGHT_SLICES
from partita.plans.check import illegal_reason
from partita.plans.layout import label_sharding, operator_assignments, spare_axes
from partita.plans.plan import Axis, Mesh, Plan, Storage

Choice = Mapping[str, str]
Baseline = Callable[[OperatorGraph, str, Mesh], Plan]


def _factors(
    graph: OperatorGraph,
    operator: Operator,
    kind: str,
    heads_first: bool = False,
    followed: Collection[int] = (),
) -> list[Factor]:
    """An operator's factors of a kind, largest first; of a product in their order if
    `heads_first`, those that are `followed` before others."""
    numbers = [f for f in operator.factors if graph.factors[f].kind == kind]
    factors = [graph.factors[f] for f in sorted(numbers, key=lambda f: f not in followed)]
    if heads_first and operator.kind in ("dot", "attention"):
        return factors
    return sorted(factors, key=lambda factor: -factor.size)


def choice_by_kinds(
    graph: OperatorGraph,
    operator: Operator,
    mesh: Mesh,
    preferences: Iterable[tuple[str, Iterable[int]]],
    heads_first: bool = False,
    followed: Collection[int] = (),
) -> dict[str, str]:
    """A choice that gives axes to factors of preferred kinds, as far as sizes divide.

    `preferences`: pairs of kinds (one letter each, best first) and axis numbers, in order. Of one
    kind the largest factor is first, or in a product the `followed` ones, then the heads. An
    illegal choice becomes the empty one.
    """
    choice: dict[str, str] = {}
    local_sizes = {graph.factors[f].name: graph.factors[f].size for f in operator.factors}
    for kinds, axes in preferences:
        for number in axes:
            axis = mesh.axes[number]
            if axis.name in choice:
                continue
            name = _divisible_factor(
                kinds,
                axis,
                local_sizes,
                lambda kind: _factors(graph, operator, kind, heads_first, followed),
            )
            if name is not None:
                choice[axis.name] = name
                local_sizes[name] //= axis.size
    if not choice:
        return choice
    index = graph.factors[operator.factors[0]].operator
    return (
        choice
        if illegal_reason(
            graph,
            index,
            choice,
            mesh,
        )
        is None
        else {}
    )


def _divisible_factor(
    kinds: str,
    axis: Axis,
    local_sizes: Mapping[str, int],
    factors: Callable[[str], list[Factor]],
) -> str | None:
    """The first factor of the preferred kinds that an axis divides. `factors`: those of a kind."""
    for kind in kinds:
        for factor in factors(kind):
            size = local_sizes[factor.name]
            if size > 1 and size % axis.size == 0:
                return factor.name
    return None


def _plan(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
    name: str,
    choices: Mapping[str, Choice],
) -> Plan:
    return Plan(
        graph.name,
        machine,
        mesh,
        choices,
        name=name,
        batch_size=graph.batch_size,
        target=graph.target,
    )


def one_device(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Full replication: every device does all the work of one."""
    choices: dict[str, Choice] = {operator.name: {} for operator in graph.operators}
    return _plan(
        graph,
        machine,
        mesh,
        "one device",
        choices,
    )


def data_parallel(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """All operators split by sample over all axes."""
    axes = range(len(mesh.axes))
    choices = {}
    for operator in graph.operators:
        choices[operator.name] = choice_by_kinds(
            graph,
            operator,
            mesh,
            [("S", axes)],
        )
    return _plan(
        graph,
        machine,
        mesh,
        "data parallel",
        choices,
    )


def zero(stage: int) -> Baseline:
    """Data parallelism with ZeRO (Rajbhandari et al. 2020) over all axes.

    Stage 1 splits optimizer slots, 2 also gradients, 3 also variables.
    """

    def zero_plan(
        graph: OperatorGraph,
        machine: str,
        mesh: Mesh,
    ) -> Plan:
        plan = data_parallel(graph, machine, mesh)
        if stage == 3:
            plan = replace(plan, choices={**plan.choices, **_slices_by_row(graph, mesh)})
        return replace(plan, name=f"ZeRO-{stage}", storage=storage_for(graph, plan, stage))

    return zero_plan


def _slices_by_row(graph: OperatorGraph, mesh: Mesh) -> dict[str, Choice]:
    """Operator -> its choice, for slices of weights: their rows split over all axes.

    Devices gather the slices that they use, and never the whole weight.
    """
    axes = range(len(mesh.axes))
    choices = {}
    for operator in graph.operators:
        if operator.kind == WEIGHT_SLICES:
            choices[operator.name] = choice_by_kinds(graph, operator, mesh, [("P", axes)])
    return choices


def storage_for(
    graph: OperatorGraph,
    plan: Plan,
    stage: int,
) -> dict[str, Storage]:
    """Storage of every parameter over the axes on which its operator's choice replicates it."""
    assignments = operator_assignments(graph, plan)
    storage = {}
    for argument in graph.arguments:
        home = graph.home[argument.tensor]
        if argument.role != "parameter" or home < 0:
            continue
        sharding = label_sharding(graph.labels[argument.tensor], assignments[home])
        spare = spare_axes(graph.tensors[argument.tensor].shape, sharding, plan.mesh)
        if spare is not None:
            dim, axes = spare
            names = tuple(plan.mesh.axes[axis].name for axis in axes)
            storage[argument.path] = Storage(dim, names, stage)
    return storage


def tensor_parallel(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Megatron's pattern over all axes.

    Weights are split by output where the input is whole, by input where the input is split.
    """
    return megatron(
        graph,
        machine,
        mesh,
        "tensor parallel",
        sample_axes=0,
    )


def tensor_parallel_with_sequence(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Tensor and sequence parallelism over all axes (Korthikanti et al. 2022, section 4.2.2).

    Megatron's pattern, with normalizations, residual sums and dropout split by position.
    """
    plan = tensor_parallel(graph, machine, mesh)
    axes = range(len(mesh.axes))
    choices = dict(plan.choices)
    for operator in graph.operators:
        if operator.kind == NORMALIZATION:
            choices[operator.name] = choice_by_kinds(graph, operator, mesh, [("A", axes)])
    return replace(plan, name="tensor parallel with sequence", choices=choices)


def data_and_tensor(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Samples over the outer half of the axes, Megatron's pattern over the inner half."""
    outer_half = (len(mesh.axes) + 1) // 2
    return megatron(
        graph,
        machine,
        mesh,
        "data x tensor",
        sample_axes=outer_half,
    )


def megatron(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
    name: str,
    sample_axes: int,
) -> Plan:
    """Megatron's tensor parallelism (Shoeybi et al. 2019, section 3; Narayanan et al. 2021).

    Column then row: a product with a whole input is split by P, by heads where it has several P,
    and one with a split input by R. Attention is split by heads, a table of words by R. So a block
    of a transformer sums activations over devices twice in each pass.

    `sample_axes`: number of outer axes that split samples instead.
    """
    outer = range(sample_axes)
    inner = range(sample_axes, len(mesh.axes))
    choices: dict[str, Choice] = {}
    is_split: list[bool] = []
    producers = _forward_producers(graph)
    for index, operator in enumerate(graph.operators):
        input_split = any(is_split[p] for p in producers.get(index, ()) if p < index)
        kind = _megatron_kind(graph, operator, input_split)
        preferences: list[tuple[str, Iterable[int]]] = [("S", outer), (kind, inner)]
        followed = _split_by_producers(graph, index, choices)
        choice = choice_by_kinds(graph, operator, mesh, preferences, True, followed)
        if not kind:
            choice = {**_as_table(graph, index, choices, mesh), **choice}
        choices[operator.name] = choice
        splits = any(mesh.axes[number].name in choice for number in inner)
        is_product = operator.kind != WEIGHT_SLICES
        is_split.append(splits and kind in ("P", "A") and is_product)
    return _plan(graph, machine, mesh, name, choices)


def _split_by_producers(
    graph: OperatorGraph, operator: int, choices: Mapping[str, Choice]
) -> set[int]:
    """The factors of an operator that index a dim which the choice of its producer splits.

    The heads, where attention is before a product that sums heads and channels of a head.
    """
    factors = set()
    for use in _reads_of_earlier(graph).get(operator, ()):
        home = graph.home[use.tensor]
        split_names = set(choices[graph.operators[home].name].values())
        for own, factor in zip(graph.labels[use.tensor], use.label, strict=True):
            if own >= 0 and factor >= 0 and graph.factors[own].name in split_names:
                factors.add(factor)
    return factors


def _megatron_kind(graph: OperatorGraph, operator: Operator, input_split: bool) -> str:
    """The kind of factor that the inner axes split, "" for none."""
    if operator.kind == NORMALIZATION:
        return ""
    reduces = bool(_factors(graph, operator, "R"))
    if operator.kind == "gather" and reduces:
        return "R"
    if not _factors(graph, operator, "P"):
        return "A" if input_split else ""
    return "R" if input_split and reduces else "P"


def _as_table(
    graph: OperatorGraph,
    index: int,
    choices: Mapping[str, Choice],
    mesh: Mesh,
) -> dict[str, str]:
    """The choice of an operator that reads another's variable as that one splits it.

    The logits of a model whose words and logits share a table are split by word.
    """
    for use in _reads_of_earlier(graph).get(index, ()):
        home = graph.home[use.tensor]
        choice = {}
        factor_at = dict(zip(graph.labels[use.tensor], use.label, strict=True))
        names = {graph.factors[f].name: f for f in graph.operators[home].factors}
        for axis, name in choices[graph.operators[home].name].items():
            factor = factor_at.get(names[name], -1)
            if factor >= 0:
                choice[axis] = graph.factors[factor].name
        if choice and illegal_reason(graph, index, choice, mesh) is None:
            return choice
    return {}


@per_graph
def _reads_of_earlier(graph: OperatorGraph) -> dict[int, list[Use]]:
    """Operator -> its uses of tensors of earlier operators."""
    uses: dict[int, list[Use]] = {}
    for use in graph.uses:
        if 0 <= graph.home[use.tensor] < use.operator:
            uses.setdefault(use.operator, []).append(use)
    return uses


@per_graph
def _forward_producers(graph: OperatorGraph) -> dict[int, list[int]]:
    """Operator -> the other operators whose values its heavy instruction needs.

    A gated layer reads its gate after its product, which does not split the product's input.
    """
    producer = producers(graph)
    needed: dict[int, list[int]] = {}
    for number, operator in enumerate(graph.operators):
        pending = [operator.heavy]
        visited: set[int] = set()
        while pending:
            index = pending.pop()
            if index in visited:
                continue
            visited.add(index)
            for tensor in graph.instructions[index].operands:
                home = graph.home[tensor]
                if home >= 0 and home != number:
                    needed.setdefault(number, []).append(home)
                elif tensor in producer and graph.owner[producer[tensor]] == number:
                    pending.append(producer[tensor])
    return needed


def one_weird_trick(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Dense layers by parameter, all others by sample (Krizhevsky 2014)."""
    axes = range(len(mesh.axes))
    choices = {}
    for operator in graph.operators:
        is_dense = (
            operator.kind == "dot"
            and _factors(graph, operator, "P")
            and _factors(graph, operator, "R")
        )
        kind: FactorKind = "P" if is_dense else "S"
        choices[operator.name] = choice_by_kinds(
            graph,
            operator,
            mesh,
            [(kind, axes)],
        )
    return _plan(
        graph,
        machine,
        mesh,
        "one weird trick",
        choices,
    )


def spatial(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Images by height, sequences by position, as far as sizes divide; the rest by sample."""
    axes = range(len(mesh.axes))
    choices = {}
    for index, operator in enumerate(graph.operators):
        choice = _split_in_space(graph, operator, mesh)
        other_axes = [number for number in axes if mesh.axes[number].name not in choice]
        choice |= choice_by_kinds(
            graph,
            operator,
            mesh,
            [("S", other_axes)],
        )
        if (
            illegal_reason(
                graph,
                index,
                choice,
                mesh,
            )
            is not None
        ):
            choice = choice_by_kinds(
                graph,
                operator,
                mesh,
                [("S", axes)],
            )
        choices[operator.name] = choice
    return _plan(
        graph,
        machine,
        mesh,
        "spatial",
        choices,
    )


def _split_in_space(
    graph: OperatorGraph,
    operator: Operator,
    mesh: Mesh,
) -> dict[str, str]:
    """A choice of the first attribute factor on the axes that leave two elements or more."""
    attributes = [graph.factors[f] for f in operator.factors if graph.factors[f].kind == "A"]
    choice: dict[str, str] = {}
    if not attributes:
        return choice
    local_size = attributes[0].size
    for axis in mesh.axes:
        if local_size % axis.size == 0 and local_size // axis.size >= 2:
            choice[axis.name] = attributes[0].name
            local_size //= axis.size
    return choice


BASELINES: dict[str, Baseline] = {
    "one device": one_device,
    "data parallel": data_parallel,
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "tensor parallel": tensor_parallel,
    "tensor parallel with sequence": tensor_parallel_with_sequence,
    "data x tensor": data_and_tensor,
    "one weird trick": one_weird_trick,
    "spatial": spatial,
}


def baselines_of(graph: OperatorGraph) -> dict[str, Baseline]:
    """The baselines that differ on a graph.

    Sequence parallelism needs normalizations that are operators of their own, as on GPUs and TPUs.
    """
    baselines = dict(BASELINES)
    if all(operator.kind != NORMALIZATION for operator in graph.operators):
        del baselines["tensor parallel with sequence"]
    return baselines

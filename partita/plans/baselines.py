"""The plans an expert would write, by name: what the found plan has to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from partita.graph.operator_graph import Operator, OperatorGraph
from partita.plans.check import illegal_reason
from partita.plans.layout import label_sharding, operator_assignments, spare_axes
from partita.plans.plan import Mesh, Plan, Storage

Choice = Mapping[str, str]


def _factors(graph: OperatorGraph, operator: Operator, kind: str) -> list[tuple[str, int]]:
    """(name, size) of an operator's factors of a kind, largest first."""
    found = [
        (graph.factors[f].name, graph.factors[f].size)
        for f in operator.factors
        if graph.factors[f].kind == kind
    ]
    return sorted(found, key=lambda x: -x[1])


def choice_by_kinds(
    graph: OperatorGraph,
    operator: Operator,
    mesh: Mesh,
    wishes: Iterable[tuple[str, Iterable[int]]],
) -> dict[str, str]:
    """A choice that gives axes to factors of the wished kinds, in order, as far as sizes divide."""
    choice: dict[str, str] = {}
    left = {graph.factors[f].name: graph.factors[f].size for f in operator.factors}
    for kinds, axes in wishes:
        for number in axes:
            axis = mesh.axes[number]
            for kind in kinds:
                name = next(
                    (
                        n
                        for n, _ in _factors(graph, operator, kind)
                        if left[n] % axis.size == 0 and left[n] > 1
                    ),
                    None,
                )
                if name is not None and axis.name not in choice:
                    choice[axis.name] = name
                    left[name] //= axis.size
                    break
    return (
        choice
        if not choice
        or illegal_reason(graph, graph.factors[operator.factors[0]].operator, choice, mesh) is None
        else {}
    )


def one_device(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Everything replicated: every device does all the work of one."""
    return Plan(
        graph.name,
        machine,
        mesh,
        {o.name: {} for o in graph.operators},
        name="one device",
        batch_size=graph.batch_size,
    )


def data_parallel(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Every operator split by sample over all axes."""
    everything = range(len(mesh.axes))
    choices = {
        o.name: choice_by_kinds(graph, o, mesh, [("S", everything)]) for o in graph.operators
    }
    return Plan(
        graph.name, machine, mesh, choices, name="data parallel", batch_size=graph.batch_size
    )


def zero(level: int) -> Callable[[OperatorGraph, str, Mesh], Plan]:
    """Data parallel with optimizer slots (1), gradients (2) and variables (3) kept split over all axes (Rajbhandari 2020)."""

    def make(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
        plan = data_parallel(graph, machine, mesh)
        return replace(plan, name=f"ZeRO-{level}", storage=storage_for(graph, plan, level))

    return make


def storage_for(graph: OperatorGraph, plan: Plan, level: int) -> dict[str, Storage]:
    """Storage of every parameter over the axes that its operator's choice leaves it replicated on."""
    found, assignments = {}, operator_assignments(graph, plan)
    for a in graph.arguments:
        home = graph.home[a.tensor]
        if a.role == "parameter" and home >= 0:
            spare = spare_axes(
                graph.tensors[a.tensor].shape,
                label_sharding(graph.labels[a.tensor], assignments[home]),
                plan.mesh,
            )
            if spare is not None:
                found[a.path] = Storage(
                    spare[0], tuple(plan.mesh.axes[x].name for x in spare[1]), level
                )
    return found


def tensor_parallel(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Weights split over all axes, Megatron's pattern: by output where the input is whole, by input where it is split."""
    return replace(_megatron(graph, machine, mesh, 0), name="tensor parallel")


def data_and_tensor(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Sample over the outer half of the axes, Megatron's pattern over the inner half."""
    return replace(_megatron(graph, machine, mesh, (len(mesh.axes) + 1) // 2), name="data x tensor")


def _megatron(graph: OperatorGraph, machine: str, mesh: Mesh, outer: int) -> Plan:
    """Column then row: an operator that reads a value split by P is split by R, otherwise by P."""
    inner = range(outer, len(mesh.axes))
    choices: dict[str, dict[str, str]] = {}
    split: dict[int, bool] = {}
    feeds: dict[int, list[int]] = {}
    for use in graph.uses:
        home = graph.home[use.tensor]
        producer_forward = any(
            graph.instructions[i].phase == "forward" for i, _ in use.instructions
        )
        if home >= 0 and home != use.operator and producer_forward:
            feeds.setdefault(use.operator, []).append(home)
    for index, operator in enumerate(graph.operators):
        fed = any(split.get(h, False) for h in feeds.get(index, ()) if h < index)
        has_parameter = bool(_factors(graph, operator, "P"))
        if not has_parameter:
            kinds = "A"
            choice = choice_by_kinds(
                graph, operator, mesh, [("S", range(outer)), (kinds, inner if fed else ())]
            )
            split[index] = fed
        elif fed and _factors(graph, operator, "R"):
            choice = choice_by_kinds(graph, operator, mesh, [("S", range(outer)), ("R", inner)])
            split[index] = False
        else:
            choice = choice_by_kinds(graph, operator, mesh, [("S", range(outer)), ("P", inner)])
            split[index] = len(choice) > outer
        choices[operator.name] = choice
    return Plan(
        graph.name, machine, mesh, choices, name="tensor parallel", batch_size=graph.batch_size
    )


def one_weird_trick(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Convolutions (and all without weights) by sample, dense layers by parameter (Krizhevsky 2014)."""
    everything = range(len(mesh.axes))
    choices = {}
    for o in graph.operators:
        dense = o.kind == "dot" and _factors(graph, o, "P") and _factors(graph, o, "R")
        choices[o.name] = choice_by_kinds(graph, o, mesh, [("P" if dense else "S", everything)])
    return Plan(
        graph.name, machine, mesh, choices, name="one weird trick", batch_size=graph.batch_size
    )


def spatial(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Images by height, sequences by position, as far as sizes divide; the rest by sample."""
    everything = range(len(mesh.axes))
    choices = {}
    for index, o in enumerate(graph.operators):
        first = [graph.factors[f] for f in o.factors if graph.factors[f].kind == "A"][:1]
        left, choice = (first[0].size if first else 1), {}
        for number in everything:
            axis = mesh.axes[number]
            if first and left % axis.size == 0 and left // axis.size >= 2:
                choice[axis.name] = first[0].name
                left //= axis.size
        rest = [n for n in everything if mesh.axes[n].name not in choice]
        both = {**choice, **choice_by_kinds(graph, o, mesh, [("S", rest)])}
        legal = illegal_reason(graph, index, both, mesh) is None
        choices[o.name] = both if legal else choice_by_kinds(graph, o, mesh, [("S", everything)])
    return Plan(graph.name, machine, mesh, choices, name="spatial", batch_size=graph.batch_size)


BASELINES: dict[str, Callable[[OperatorGraph, str, Mesh], Plan]] = {
    "one device": one_device,
    "data parallel": data_parallel,
    "ZeRO-1": zero(1),
    "ZeRO-2": zero(2),
    "ZeRO-3": zero(3),
    "tensor parallel": tensor_parallel,
    "data x tensor": data_and_tensor,
    "one weird trick": one_weird_trick,
    "spatial": spatial,
}

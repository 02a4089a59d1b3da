"""Checks of a graph: the properties on which later stages rely."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from partita.graph.operator_graph import Label, OperatorGraph


def check(graph: OperatorGraph) -> OperatorGraph:
    """The graph, if it is sound. AssertionError states the broken property.

    - Every instruction has one owner or none.
    - Instructions come in the order of their data, and every tensor has one producer.
    - Labels have the tensor's rank. They use only factors of the tensor's home, none twice, and the
      factor's size divides the dim.
    - Every read of another operator's tensor is a Use.
    """
    count = len(graph.tensors)
    assert len(graph.labels) == len(graph.home) == count, "a label and a home per tensor"
    assert len(graph.owner) == len(graph.instructions), "an owner per instruction"
    _check_operators(graph)
    for tensor, label in enumerate(graph.labels):
        _check_label(
            graph,
            tensor,
            label,
            graph.home[tensor],
        )
    for use in graph.uses:
        _check_label(
            graph,
            use.tensor,
            use.label,
            use.operator,
        )
    for index, instruction in enumerate(graph.instructions):
        for tensor in instruction.operands + instruction.results:
            assert 0 <= tensor < count, f"instruction {index} names tensors"
    _check_order(graph)
    _check_reads(graph)
    return graph


def _check_order(graph: OperatorGraph) -> None:
    producer: dict[int, int] = {}
    for index, instruction in enumerate(graph.instructions):
        for tensor in instruction.results:
            assert tensor not in producer, f"tensor {tensor} is computed twice"
            producer[tensor] = index
    for argument in graph.arguments:
        assert argument.tensor not in producer, f"argument {argument.path} is computed"
    for index, instruction in enumerate(graph.instructions):
        for tensor in instruction.operands:
            assert producer.get(tensor, -1) < index, (
                f"instruction {index} ({instruction.name}) reads tensor {tensor}, which is "
                "computed later"
            )


def _check_operators(graph: OperatorGraph) -> None:
    splittable: set[int] = set()
    for operator in graph.operators:
        splittable.update(operator.factors)
    all_factors = set(range(len(graph.factors)))
    assert splittable == all_factors, "every factor may be split by its operator"
    names = {operator.name for operator in graph.operators}
    assert len(names) == len(graph.operators), "operator names are unique"
    for index, operator in enumerate(graph.operators):
        name = operator.name
        assert graph.owner[operator.heavy] == index, f"{name} owns its heavy instruction"
        for instruction in operator.instructions:
            assert graph.owner[instruction] == index, f"{name} owns its instructions"
        for factor in operator.factors:
            assert graph.factors[factor].operator == index, f"{name} owns its factors"


def _check_reads(graph: OperatorGraph) -> None:
    used: set[tuple[int, int]] = set()
    for use in graph.uses:
        used.update(use.instructions)
    for index, instruction in enumerate(graph.instructions):
        operator = graph.owner[index]
        if operator < 0:
            continue
        for position, tensor in enumerate(instruction.operands):
            is_labelled = any(factor >= 0 for factor in graph.labels[tensor])
            if is_labelled and graph.home[tensor] != operator:
                assert (index, position) in used, (
                    f"instruction {index} ({instruction.name}) reads tensor {tensor} of another "
                    "operator without a Use"
                )


def _check_label(
    graph: OperatorGraph,
    tensor: int,
    label: Label,
    operator: int,
) -> None:
    shape = graph.tensors[tensor].shape
    assert len(label) == len(shape), (
        f"tensor {tensor} has {len(shape)} dims, its label has {len(label)}"
    )
    factors = [factor for factor in label if factor >= 0]
    assert len(set(factors)) == len(factors), f"tensor {tensor} uses a factor twice: {label}"
    for index, size in zip(label, shape, strict=True):
        if index < 0:
            continue
        factor = graph.factors[index]
        assert factor.operator == operator, (
            f"tensor {tensor} is labelled with a factor of another operator"
        )
        assert size % factor.size == 0, (
            f"tensor {tensor} {shape} has factor {factor} in label {label}"
        )

"""Branches of a graph: operators that need not wait for each other in the forward pass.

Where all paths of the graph meet, branches fork or join. The operator there is in no branch.
"""

from __future__ import annotations

from collections.abc import Sequence

from partita.graph.operator_graph import OperatorGraph

Fork = list[list[int]]
"""The branches of one fork, each a list of operators."""


def branches(graph: OperatorGraph) -> list[Fork]:
    """Fork by fork, the branches up to their join. Operators of a branch are connected."""
    before = _predecessors(graph)
    after = _successors(before)
    everyone = (1 << len(before)) - 1
    forks: list[Fork] = []
    members: list[int] = []
    for operator in range(len(before)):
        ordered = before[operator] | after[operator] | 1 << operator
        if ordered != everyone:
            members.append(operator)
            continue
        forks += _forks(members, before, after)
        members = []
    return [*forks, *_forks(members, before, after)]


def _predecessors(graph: OperatorGraph) -> list[int]:
    """Per operator, a bit set of the operators that its heavy instruction waits for.

    An instruction that joins branches is light, so the heavy instruction of its operator waits for
    none of them.
    """
    before = [0] * len(graph.operators)
    operator_of = {}
    for number, operator in enumerate(graph.operators):
        operator_of[operator.heavy] = number
    upstream: dict[int, int] = {}
    for number, instruction in enumerate(graph.instructions):
        waits = 0
        for tensor in instruction.operands:
            waits |= upstream.get(tensor, 0)
        if number in operator_of:
            heavy_operator = operator_of[number]
            before[heavy_operator] = waits
            waits |= 1 << heavy_operator
        for tensor in instruction.results:
            upstream[tensor] = waits
    return before


def _successors(before: Sequence[int]) -> list[int]:
    """Per operator, a bit set of the operators that wait for it."""
    after = [0] * len(before)
    for operator, waits in enumerate(before):
        if not waits:
            continue
        for other in range(len(after)):
            if _contains(waits, other):
                after[other] |= 1 << operator
    return after


def _contains(operators: int, operator: int) -> bool:
    """Whether a bit set has an operator."""
    return bool(operators >> operator & 1)


def _forks(
    members: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> list[Fork]:
    """The fork of operators between two meeting points, none if they are a chain."""
    connected: list[list[int]] = []
    for member in members:
        merged = [member]
        others = []
        for part in connected:
            if any(_contains(before[member], operator) for operator in part):
                merged += part
            else:
                others.append(part)
        connected = [*others, sorted(merged)]
    if len(connected) > 1:
        return [sorted(connected)]
    if any(_is_parallel(part, before, after) for part in connected):
        return [connected]
    return []


def _is_parallel(
    operators: Sequence[int],
    before: Sequence[int],
    after: Sequence[int],
) -> bool:
    """Whether two of some operators need not wait for each other."""
    for one in operators:
        ordered = before[one] | after[one]
        for other in operators:
            if one != other and not _contains(ordered, other):
                return True
    return False

"""Branches of a graph: operators that need not wait for each other in the forward pass.

Where all paths of the graph meet, branches fork or join. The operator there is in no branch.
"""

from __future__ import annotations

from collections.abc import Sequence

from partita.graph.operator_graph import OperatorGraph

Fork = list[list[int]]
"""The branches of one fork, each a list of operators."""


def branches(graph: OperatorGraph) -> list[Fork]:
    """Fork by fork, the branches up to their join. Operators of a branch are connected with each other."""
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

    An instruction that joins branches is light, so the heavy instruction of its operator waits for none of them.
    """
    before = [0] * len(graph.operators)
    heavy = {operator.heavy: number for number, operator in enumerate(graph.operators)}
    upstream: dict[int, int] = {}
    for number, instruction in enumerate(graph.instructions):
        waits = 0
        for tensor in instruction.operands:
            waits |= upstream.get(tensor, 0)
        if number in heavy:
            before[heavy[number]] = waits
            waits |= 1 << heavy[number]
        upstream |= dict.fromkeys(instruction.results, waits)
    return before


def _successors(before: Sequence[int]) -> list[int]:
    """Per operator, a bit set of the operators that wait for it."""
    after = [0] * len(before)
    for operator, waits in enumerate(before):
        if waits:
            for other in range(len(after)):
                after[other] |= (waits >> other & 1) << operator
    return after


def _forks(members: Sequence[int], before: Sequence[int], after: Sequence[int]) -> list[Fork]:
    """The fork of operators between two meeting points, none if they are a chain."""
    connected: list[list[int]] = []
    for member in members:
        joined = [part for part in connected if any(before[member] >> o & 1 for o in part)]
        merged = sorted([*(operator for part in joined for operator in part), member])
        connected = [*(part for part in connected if part not in joined), merged]
    if len(connected) > 1 or any(_is_parallel(part, before, after) for part in connected):
        return [sorted(connected)]
    return []


def _is_parallel(operators: Sequence[int], before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether two of some operators need not wait for each other."""
    for one in operators:
        for other in operators:
            ordered = before[one] >> other & 1 or after[one] >> other & 1
            if one != other and not ordered:
                return True
    return False

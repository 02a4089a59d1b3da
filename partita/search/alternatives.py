"""The alternatives of a plan: per operator, other choices and their price.

All other operators stay as planned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.search.candidates import names_of
from partita.search.network import OperatorState, storage_of
from partita.search.portfolio import SearchSpace

Alternative = tuple[dict[str, str], str, float, float]
"""(choice, storage of variables in words, extra seconds of a step, extra bytes)."""


def alternatives(
    space: SearchSpace,
    plan: Plan,
    limit: int = 8,
) -> list[list[Alternative]]:
    """Per operator, at most `limit` other choices, fastest first: those that cost least alone.

    There are none for a plan with stages or placement.
    """
    network = space.network
    states = network.states_of(plan) if is_one_program(plan) else None
    if states is None:
        return [[] for _ in network.states]
    step_seconds = space.simulated.seconds(states) if space.overlaps else 0.0
    return [
        _alternatives(
            space,
            states,
            o,
            step_seconds,
            limit,
        )
        for o in range(len(network.states))
    ]


def _alternatives(
    space: SearchSpace,
    states: Sequence[int],
    operator: int,
    step_seconds: float,
    limit: int,
) -> list[Alternative]:
    """`step_seconds`: the simulated step of the plan, where collectives overlap."""
    network = space.network
    problem = network.problem
    nbytes = problem.nbytes[operator]
    seconds = problem.seconds[operator]
    for neighbour, table in network.neighbours[operator]:
        moves = table[:, states[neighbour]]
        seconds = seconds + moves
    planned = states[operator]

    def added_seconds(state: int) -> float:
        """Where collectives overlap, a step is no sum of its parts."""
        if not space.overlaps:
            return float(seconds[state] - seconds[planned])
        changed = [*states]
        changed[operator] = state
        return space.simulated.seconds(changed) - step_seconds

    listed: list[Alternative] = []
    for i in np.argsort(seconds, kind="stable"):
        if len(listed) == limit:
            break
        state = network.states[operator][i]
        # Variables that cannot be split further are stored the same at any ZeRO level.
        same_storage = state.zero and not storage_of(network, operator, i)
        if i == planned or same_storage:
            continue
        choice = network.choice(operator, i)
        alternative = (
            names_of(network.graph, network.placement.mesh, choice),
            _storage_text(state),
            added_seconds(i),
            float(nbytes[i] - nbytes[planned]),
        )
        listed.append(alternative)
    return sorted(listed, key=lambda alternative: alternative[2])


def _storage_text(state: OperatorState) -> str:
    """The storage of variables in a state, "" for the plain one."""
    texts = [f"ZeRO-{state.zero}"] if state.zero else []
    if state.offload:
        texts.append("slots in host memory")
    return ", ".join(texts)

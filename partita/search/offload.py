"""Offloaded optimizer slots: the operators of a plan that need theirs in the memory of the host.

Offload is a state of an operator in the exact search (`search.network`), whose budget of bytes is
a sum. The peak of a step is none, so a plan may offload more than its peak needs: slots return to
the devices, the largest first, while the plan fits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from partita.cost.predict import Prediction
from partita.graph.operator_graph import ITEMSIZE, OperatorGraph
from partita.machine import Machine
from partita.plans.layout import layout_of, local_shape
from partita.plans.plan import Plan
from partita.simulation.simulate import predicted

ATTEMPTS = 4
"""Plans with fewer offloaded slots that are predicted at most."""


def fewest_offloaded(
    graph: OperatorGraph, machine: Machine, plan: Plan, prediction: Prediction, limit_bytes: int
) -> tuple[Plan, Prediction]:
    """A plan that fits in `limit_bytes`, with as few offloaded slots as its peak allows."""
    slots = _offloaded_bytes(graph, plan)
    home = _home(graph)
    room = limit_bytes - prediction.peak_bytes
    for _ in range(ATTEMPTS):
        returned: set[int] = set()
        left = room
        for operator, nbytes in sorted(slots.items(), key=lambda slot: -slot[1]):
            if nbytes <= left:
                returned.add(operator)
                left -= nbytes
        if not returned:
            break
        kept = tuple(path for path in plan.offload if home[path] not in returned)
        attempt = replace(plan, offload=kept)
        attempt_prediction = predicted(graph, machine, attempt)
        if attempt_prediction.peak_bytes <= limit_bytes:
            return attempt, attempt_prediction
        room //= 2
    return plan, prediction


def _home(graph: OperatorGraph) -> Mapping[str, int]:
    """Path of a variable -> its operator."""
    return {argument.path: graph.home[argument.tensor] for argument in graph.arguments}


def _offloaded_bytes(graph: OperatorGraph, plan: Plan) -> dict[int, int]:
    """Operator -> bytes of its offloaded slots on one device."""
    layout = layout_of(graph, plan)
    home = _home(graph)
    nbytes: dict[int, int] = defaultdict(int)
    for argument in graph.arguments:
        if argument.tensor in layout.host and argument.parameter is not None:
            value = graph.tensors[argument.tensor]
            shape = local_shape(value.shape, layout.shardings[argument.tensor], plan.mesh.sizes)
            operator = home[argument.parameter]
            nbytes[operator] += math.prod(shape) * ITEMSIZE.get(value.dtype, 4)
    return nbytes

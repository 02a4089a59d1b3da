"""Notes on a plan's means against a lack of memory: ZeRO, rematerialization, slots on the host.

Each is compared with the same plan without it, simulated alike. ZeRO can also save time: a device
updates its part of a variable only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from partita.cost.predict import Prediction
from partita.cost.terms import Terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.plan import Plan, offload_text, storage_texts
from partita.simulation.base import SimulatedStep
from partita.simulation.simulate import simulated_step
from partita.units import format_bytes, format_seconds


def memory_notes(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    prediction: Prediction,
    terms: Terms | None = None,
) -> list[str]:
    """A note per means that a plan uses: the seconds that it costs, the bytes that it frees.

    `terms`: the graph's cost terms.
    """
    return [
        f"{means}: {_difference(simulated_step(graph, machine, plain, terms), prediction)}"
        for means, plain in _means(plan)
    ]


def _difference(plain: SimulatedStep, prediction: Prediction) -> str:
    """The seconds that a prediction adds to a plain step, and the bytes that it frees, as text."""
    added = prediction.seconds - plain.seconds
    if added >= 0:
        change = f"adds {format_seconds(added)} to"
    else:
        change = f"takes {format_seconds(-added)} off"
    freed_bytes = max(0, plain.peak_bytes - prediction.peak_bytes)
    return (
        f"{change} a step of {format_seconds(plain.seconds)} and frees "
        f"{format_bytes(freed_bytes)} of {format_bytes(plain.peak_bytes)} a device"
    )


def _means(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Per means its name and the plan without it."""
    if plan.storage:
        yield "; ".join(storage_texts(plan)), replace(plan, storage={})
    if plan.recompute:
        runs = "1 run" if len(plan.recompute) == 1 else f"{len(plan.recompute)} runs"
        yield f"rematerialization of {runs} of operators", replace(plan, recompute=())
    if plan.offload:
        yield offload_text(plan.offload), replace(plan, offload=())

"""The prediction of a step: seconds by operator and cause, memory, traffic, FLOPs, and the source
of the figures.

`build_prediction` makes every Prediction. `predict` adds up the costs of a plan under which all
devices do the same, and nothing overlaps; simulated steps (`simulation/`) give their own parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from partita.cost.collectives import collectives
from partita.cost.energy import DeviceActivity, Energy, memory_bytes, missing_power, step_energy
from partita.cost.evaluate import (
    Assignment,
    OperatorCost,
    attached_uses,
    compute_source,
    operator_costs,
)
from partita.cost.memory import KINDS, PeakMemory, memory
from partita.cost.moves import Placement, move_seconds, planned_moves
from partita.cost.terms import Terms, cost_terms
from partita.cost.work import local_flops
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.layout import Layout, label_sharding, layout_of
from partita.plans.plan import Plan


@dataclass(frozen=True, kw_only=True)
class OperatorPrediction:
    """The part of one operator in a step, per device: seconds by cause, bytes in memory, bytes
    sent.
    """

    name: str
    compute: float
    activations: float
    gradients: float
    moves: float
    nbytes: float
    traffic: int
    source: str
    """Source of `compute`: "measured", "fitted" or "roofline"."""

    @property
    def seconds(self) -> float:
        return self.compute + self.activations + self.gradients + self.moves


CAUSES = ("compute", "activations", "gradients", "moves")
"""Causes of an operator's seconds: kernels, collectives on activations and on gradients, and moves
from other operators.
"""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted step under a plan. Memory, traffic and FLOPs are those of one device."""

    plan: str
    machine: str
    seconds: float
    operators: tuple[OperatorPrediction, ...]
    memory: PeakMemory
    traffic: Mapping[str, int]
    """Kind of collective -> bytes sent."""
    flops: float
    status: str
    """Status of the least certain figure of the machine, for instance "assumed"."""
    fit_error: float = 0.0
    """Expected relative error of the seconds whose source is "fitted"."""
    kind: int = 0
    """Kind of the device with this memory, where a machine's devices differ."""
    energy: Energy | None = None
    """Joules of all devices; None where the machine lacks power figures."""
    power_status: str = ""
    """Status of the least certain power figure, for instance "recalled"."""

    def source(self) -> str:
        """Source of the seconds, for people: shares of the compute time that are measured and
        fitted, and the machine's figures.
        """
        compute_seconds = self.by_cause()["compute"] or 1.0
        measured = self._compute_seconds("measured") / compute_seconds
        fitted = self._compute_seconds("fitted") / compute_seconds
        figures = f"{self.machine}'s figures ({self.status} at worst)"
        if not measured and not fitted:
            return f"roofline over {figures}"
        return (
            f"of the compute, {measured:.0%} measured operator by operator and {fitted:.0%} fitted "
            f"to such measurements (±{self.fit_error:.0%}); the rest from {figures}"
        )

    def _compute_seconds(self, source: str) -> float:
        return sum(o.compute for o in self.operators if o.source == source)

    @property
    def joules(self) -> float | None:
        """Joules of all devices; None where the machine lacks power figures."""
        return None if self.energy is None else self.energy.joules

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak

    def by_cause(self) -> dict[str, float]:
        """Seconds of all operators, by cause."""
        return {cause: sum(getattr(o, cause) for o in self.operators) for cause in CAUSES}

    def to_json(self) -> dict[str, Any]:
        """The prediction as a plan file stores it."""
        value: dict[str, Any] = {
            "seconds": self.seconds,
            **{f"seconds_{cause}": seconds for cause, seconds in self.by_cause().items()},
            "peak_bytes": self.peak_bytes,
            "memory_bytes": {kind: getattr(self.memory, kind) for kind in KINDS},
            "traffic_bytes": dict(self.traffic),
            "flops": self.flops,
            "provenance": {
                "seconds": self.source(),
                "peak_bytes": "liveness over the program",
                "traffic_bytes": "the collectives of the laid-out program",
                "flops": "counted from the program",
            },
        }
        if self.energy is not None:
            value["joules"] = self.joules
            value["joules_by_cause"] = asdict(self.energy)
            value["provenance"]["joules"] = self.energy_source()
        return value

    def energy_source(self) -> str:
        """Source of the joules, for people."""
        return (
            f"{self.machine}'s power figures ({self.power_status} at worst), at its first "
            "operating points"
        )


def build_prediction(
    plan: Plan,
    machine: Machine,
    *,
    operators: Iterable[OperatorPrediction],
    memory: PeakMemory,
    traffic: Mapping[str, int],
    flops: float,
    seconds: float | None = None,
    kind: int = 0,
) -> Prediction:
    """The prediction of a step from its parts.

    `seconds` are the sum of the operators' unless given.
    """
    operators = tuple(operators)
    if seconds is None:
        seconds = sum(o.seconds for o in operators)
    return Prediction(
        plan=plan.name,
        machine=machine.name,
        seconds=seconds,
        operators=operators,
        memory=memory,
        traffic=dict(sorted(traffic.items())),
        flops=flops,
        status=machine.weakest_status(),
        fit_error=machine.times.error if machine.times else 0.0,
        kind=kind,
    )


def with_energy(
    prediction: Prediction,
    machine: Machine,
    terms: Terms,
    placement: Placement,
    assignments: Sequence[Assignment],
    fractions: Sequence[float],
    plan: Plan,
) -> Prediction:
    """A prediction with its energy, unchanged where the machine lacks power figures.

    Args:
        fractions: [operator], fraction of the devices that run it.
        plan: Its devices count; its microbatches repeat the kernels' bytes.
    """
    if missing_power(machine):
        return prediction
    pairs = zip(prediction.operators, fractions, strict=True)
    moved = plan.microbatches * memory_bytes(terms, placement, assignments, fractions)
    activity = DeviceActivity(
        devices=plan.devices,
        seconds=prediction.seconds,
        busy=sum(operator.compute * fraction for operator, fraction in pairs),
        memory_bytes=moved,
        link_bytes=float(sum(prediction.traffic.values())),
        attached_seconds=tuple(
            plan.microbatches * use.seconds for use in attached_uses(terms, placement, assignments)
        ),
    )
    energy = step_energy(machine, activity)
    return replace(prediction, energy=energy, power_status=machine.weakest_power_status())


def predict(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    terms: Terms | None = None,
    layout: Layout | None = None,
    costs: Sequence[OperatorCost] | None = None,
    peak: PeakMemory | None = None,
) -> Prediction:
    """The prediction of a plan whose operators run one after the other on all devices, nothing
    overlapping.

    `terms`, `layout`, the operators' `costs` and `peak` are computed unless given.
    """
    terms = terms or cost_terms(graph, machine.backend)
    layout = layout or layout_of(graph, plan)
    placement = Placement(machine, plan.mesh)
    costs = costs or operator_costs(terms, placement, layout, plan)
    moves = [0.0] * len(costs)
    for move in planned_moves(terms.edges, layout):
        source = label_sharding(move.source, layout.assignments[move.home])
        target = label_sharding(move.target, layout.assignments[move.reader])
        moves[move.reader] += move_seconds(move, placement, source, target)
    operator_bytes: dict[int, int] = defaultdict(int)
    traffic: dict[str, int] = defaultdict(int)
    planned = collectives(graph, plan.mesh, layout, machine.backend)
    for collective in planned:
        operator_bytes[collective.operator] += collective.total
        traffic[collective.kind] += collective.total
    operators = [
        OperatorPrediction(
            name=graph.operators[o].name,
            compute=float(cost.compute[0]),
            activations=float(cost.activations[0]),
            gradients=float(cost.gradients[0]),
            moves=moves[o],
            nbytes=float(cost.nbytes[0]),
            traffic=operator_bytes[o],
            source=compute_source(terms.operators[o], placement, layout.assignments[o]),
        )
        for o, cost in enumerate(costs)
    ]
    prediction = build_prediction(
        plan,
        machine,
        operators=operators,
        memory=peak
        or memory(graph, plan.mesh, layout, machine.backend, device_bytes=machine.memory_bytes),
        traffic=traffic,
        flops=local_flops(graph, plan.mesh, layout, machine.backend, traffic=planned),
    )
    return with_energy(
        prediction,
        machine,
        terms,
        placement,
        layout.assignments,
        [1.0] * len(operators),
        plan,
    )

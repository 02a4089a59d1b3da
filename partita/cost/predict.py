"""What one plan is predicted to cost: seconds by cause and operator, bytes held, bytes moved, FLOPs; and how sure that is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partita.cost.collectives import collectives
from partita.cost.evaluate import OperatorCost, compute_source, operator_costs
from partita.cost.memory import KINDS, PeakMemory, memory
from partita.cost.moves import Placement, move_seconds
from partita.cost.terms import Terms, cost_terms
from partita.cost.work import local_flops
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.layout import Layout, label_sharding, layout_of
from partita.plans.plan import Plan


@dataclass(frozen=True)
class OperatorPrediction:
    """One operator's part of a step: seconds by cause, bytes held per device, bytes sent per device."""

    name: str
    compute: float
    activations: float
    gradients: float
    moves: float
    nbytes: float
    traffic: int
    source: str
    """Where `compute` comes from: "measured", "fitted" or "roofline"."""

    @property
    def seconds(self) -> float:
        return self.compute + self.activations + self.gradients + self.moves


@dataclass(frozen=True)
class Prediction:
    """A step under a plan, predicted. `status` is that of the least sure number of the machine it rests on."""

    plan: str
    machine: str
    seconds: float
    operators: tuple[OperatorPrediction, ...]
    memory: PeakMemory
    traffic: Mapping[str, int]
    flops: float
    status: str
    fit_error: float = 0.0
    """Relative error to expect of the seconds that are "fitted"."""
    kind: int = 0
    """Of the device whose memory it is, where a machine's devices differ."""

    def source(self) -> str:
        """Where the seconds come from, in words: the part of the compute time that was measured, fitted, read off a roofline."""
        whole = self.by_cause()["compute"] or 1.0
        parts = {
            s: sum(o.compute for o in self.operators if o.source == s) / whole
            for s in ("measured", "fitted")
        }
        figures = f"{self.machine}'s figures ({self.status} at worst)"
        if not any(parts.values()):
            return f"roofline over {figures}"
        return (
            f"of the compute, {parts['measured']:.0%} measured operator by operator and {parts['fitted']:.0%} fitted to such "
            f"measurements (±{self.fit_error:.0%}); the rest from {figures}"
        )

    @property
    def peak_bytes(self) -> int:
        return self.memory.peak

    def by_cause(self) -> dict[str, float]:
        """Seconds of compute, of collectives on activations and on gradients, and of moves between operators."""
        causes = ("compute", "activations", "gradients", "moves")
        return {c: sum(getattr(o, c) for o in self.operators) for c in causes}

    def to_json(self) -> dict[str, Any]:
        """What a plan file keeps of its prediction."""
        return {
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


def predict(
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    terms: Terms | None = None,
    layout: Layout | None = None,
    costs: Sequence[OperatorCost] | None = None,
) -> Prediction:
    """The cost of a plan on a machine. `terms`, `layout` and the operators' `costs` are computed unless given."""
    terms = terms or cost_terms(graph, machine.backend)
    layout = layout or layout_of(graph, plan)
    placement = Placement(machine, plan.mesh)
    costs = costs or operator_costs(terms, placement, layout, plan)
    moves = [0.0] * len(costs)
    for move in terms.edges:
        a, b = layout.assignments[move.home], layout.assignments[move.reader]
        moves[move.reader] += move_seconds(
            move, placement, label_sharding(move.source, a), label_sharding(move.target, b)
        )
    sent: Counter[int] = Counter()
    traffic: Counter[str] = Counter()
    every = collectives(graph, plan.mesh, layout, machine.backend)
    for c in every:
        sent[c.operator] += c.total
        traffic[c.kind] += c.total
    operators = tuple(
        OperatorPrediction(
            graph.operators[o].name,
            float(c.compute[0]),
            float(c.activations[0]),
            float(c.gradients[0]),
            moves[o],
            float(c.nbytes[0]),
            sent[o],
            compute_source(terms.operators[o], placement, layout.assignments[o]),
        )
        for o, c in enumerate(costs)
    )
    return Prediction(
        plan.name,
        machine.name,
        sum(o.seconds for o in operators),
        operators,
        memory(graph, plan.mesh, layout, machine.backend),
        dict(sorted(traffic.items())),
        local_flops(graph, plan.mesh, layout, machine.backend, traffic=every),
        machine.weakest_status(),
        machine.times.error if machine.times else 0.0,
    )

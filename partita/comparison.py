"""Plans side by side: all baselines and the searched plan, predicted, and measured on the local
devices on request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partita.cost.predict import Prediction
from partita.machine import Machine
from partita.planning import DEFAULTS, SearchOptions, search_plan
from partita.plans.plan import Plan
from partita.search.find import fits

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured


@dataclass(frozen=True)
class ComparedPlan:
    """A plan of a comparison with its prediction."""

    name: str
    plan: Plan
    prediction: Prediction
    fits: bool
    """Whether it fits in the memory of a device."""
    measured: float | None = None
    """Measured seconds of a step."""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "fits": self.fits,
            "measured_seconds": self.measured,
            **self.prediction.to_json(),
        }


@dataclass(frozen=True)
class Comparison:
    """All baselines and the searched plan ("found"), the fastest prediction first."""

    graph: str
    machine: str
    rows: tuple[ComparedPlan, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "machine": self.machine,
            "plans": [row.to_json() for row in self.rows],
        }


def compare_plans(
    captured: Captured,
    machine: Machine,
    options: SearchOptions = DEFAULTS,
    measure: bool = False,
) -> Comparison:
    """The comparison for a captured step on a machine; with `measure`, every plan is compiled
    and timed on the local devices."""
    result = search_plan(captured, machine, options)
    plans = {name: plan for name, (plan, _) in result.baselines.items()}
    predictions = {name: prediction for name, (_, prediction) in result.baselines.items()}
    plans["found"] = result.plan
    predictions["found"] = result.prediction
    seconds = _measured_seconds(captured, plans) if measure else {}
    rows = [
        ComparedPlan(
            name,
            plan,
            predictions[name],
            fits(machine, predictions[name]),
            seconds.get(name),
        )
        for name, plan in plans.items()
    ]
    rows.sort(key=lambda row: row.prediction.seconds)
    return Comparison(captured.graph.name, machine.name, tuple(rows))


def _measured_seconds(captured: Captured, plans: Mapping[str, Plan]) -> Mapping[str, float | None]:
    from partita.execute.measure import step_seconds

    return step_seconds(captured, plans)

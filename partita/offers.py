"""Machines side by side for one program: the best plan on each, its throughput, and the cost of
an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partita.cost.energy import require_power
from partita.errors import MemoryBudgetError, PlanError
from partita.machine import Machine
from partita.planning import DEFAULTS, SearchOptions, check_types, search_plan
from partita.search.find import PlanResult

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured

OBJECTIVES = ("step", "cost-per-epoch", "joules")
SAMPLES = 1_000_000
"""Default samples of an epoch."""
FIGURES = ("seconds", "samples_per_second", "epoch_seconds", "device_hours", "cost")
"""Figures of an offer."""


@dataclass(frozen=True)
class Objective:
    """The order of offers, and the epoch and the prices that their costs are of."""

    name: str = "step"
    """"step": the fastest step first; "cost-per-epoch": the cheapest epoch first; "joules": the
    step with the least energy first."""
    prices: Mapping[str, float] = field(default_factory=dict)
    """Price of a device for an hour, in any currency, by name of device, machine or preset; ""
    for all others."""
    samples: int = SAMPLES
    """Samples of an epoch."""

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            names = ", ".join(map(repr, OBJECTIVES))
            raise PlanError(f"There is no objective {self.name!r}: use {names}.")

    def check_machines(self, machines: Sequence[Machine]) -> None:
        """An error if a machine lacks the price or the power that the order needs."""
        for machine in machines:
            if self.name == "joules":
                require_power(machine)
            self.price_of(machine)

    def check(self, batch_size: int) -> None:
        """PlanError if the step has no batch to count samples by."""
        if self.name == "cost-per-epoch" and not batch_size:
            raise PlanError(
                "The cost of an epoch is undefined: the step has no batch of samples to count. "
                "Use the objective 'step'."
            )

    def price_of(self, machine: Machine) -> float | None:
        """Price of a device of a machine for an hour; None if no prices are given. PlanError if
        only this one is missing."""
        if not self.prices:
            return None
        preset = machine.name.partition(":")[0]
        for name in (machine.name, preset, machine.device.name, ""):
            if name in self.prices:
                return self.prices[name]
        raise PlanError(
            f"There is no price for {machine.name}. Give the price of a device for an hour for "
            "all machines or for none, "
            "as in --price h100=2.5,a100=1.5."
        )


@dataclass(frozen=True)
class Offer:
    """A machine for a program. Its figures are infinite, and `note` says why, if no plan fits."""

    machine: Machine
    result: PlanResult | None
    """The search with the best plan; None if no plan fits."""
    seconds: float = math.inf
    """Seconds of a step."""
    samples_per_second: float = 0.0
    epoch_seconds: float = math.inf
    device_hours: float = math.inf
    """Device hours of an epoch."""
    cost: float | None = None
    """Cost of an epoch, in the currency of the prices."""
    note: str = ""
    joules: float | None = None
    """Energy of a step on all devices; None where the machine lacks power figures."""

    def to_json(self) -> dict[str, Any]:
        fits = self.result is not None
        figures = {name: getattr(self, name) if fits else None for name in FIGURES}
        return {
            "machine": self.machine.name,
            "devices": self.machine.devices,
            **figures,
            **({} if self.joules is None else {"joules": self.joules}),
            "note": self.note,
        }


def compare_machines(
    captured: Captured,
    machines: Sequence[Machine],
    objective: Objective | None = None,
    options: SearchOptions = DEFAULTS,
) -> list[Offer]:
    """An offer of each machine for a captured step, the best one first; machines that no plan fits
    come last.

    Without prices, the cheapest epoch is the one with the fewest device hours.
    """
    from partita.capture.jax_functions import Captured

    if not isinstance(captured, Captured):
        raise PlanError(
            f"captured is of type '{type(captured).__name__}', not Captured: give the step that "
            "partita.capture_program returns."
        )
    for machine in machines:
        check_types(machine=machine)
    objective = objective or Objective()
    objective.check(captured.graph.batch_size)
    objective.check_machines(machines)
    offers = []
    for machine in machines:
        try:
            result = search_plan(captured, machine, options)
        except MemoryBudgetError as error:
            offers.append(Offer(machine, None, note=str(error)))
        else:
            offers.append(_offer(result, machine, captured.graph.batch_size, objective))
    return sorted(offers, key=_ORDERS[objective.name])


def _offer(result: PlanResult, machine: Machine, batch_size: int, objective: Objective) -> Offer:
    step_seconds = result.prediction.seconds
    epoch_seconds = step_seconds * objective.samples / batch_size if batch_size else math.inf
    device_hours = epoch_seconds * machine.devices / 3600
    price = objective.price_of(machine)
    return Offer(
        machine,
        result,
        seconds=step_seconds,
        samples_per_second=batch_size / step_seconds,
        epoch_seconds=epoch_seconds,
        device_hours=device_hours,
        cost=None if price is None else device_hours * price,
        note="; ".join(result.plan.notes),
        joules=result.prediction.joules,
    )


def _step_seconds(offer: Offer) -> float:
    return offer.seconds


def _epoch_cost(offer: Offer) -> float:
    return offer.device_hours if offer.cost is None else offer.cost


def _step_joules(offer: Offer) -> float:
    return math.inf if offer.joules is None else offer.joules


_ORDERS = {"step": _step_seconds, "cost-per-epoch": _epoch_cost, "joules": _step_joules}
"""Objective -> the figure that its best offer has the least of."""

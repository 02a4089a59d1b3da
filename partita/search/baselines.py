"""The baselines of a search, predicted on demand.

Most are known to be slower than the plan without a prediction. A baseline whose choices are states
of the cost network has its seconds from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from partita.cost.memory import argument_bytes, memory
from partita.cost.predict import Prediction
from partita.plans.layout import layout_of
from partita.plans.plan import Plan
from partita.search.network import CostNetwork
from partita.search.portfolio import SearchSpace
from partita.simulation.simulate import predicted

HOPELESS = 2.0
"""Multiple of a device's memory beyond which a plan is not examined further.

It is compared with an additive count of variables and activation memory alone.
"""


class Baselines(Mapping[str, tuple[Plan, Prediction]]):
    """Name -> (plan, prediction) of every baseline."""

    def __init__(
        self,
        network: CostNetwork,
        plans: Mapping[str, Plan],
    ) -> None:
        self.network = network
        self.plans = plans
        self.states = {name: network.states_of(plan) for name, plan in plans.items()}
        starts = [states for states in self.states.values() if states is not None]
        self.space = SearchSpace(network, starts)
        self._predictions: dict[str, Prediction] = {}
        self._peaks: dict[str, int] = {}

    def __getitem__(self, name: str) -> tuple[Plan, Prediction]:
        return self.plans[name], self.prediction(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def prediction(self, name: str) -> Prediction:
        """Prediction of one baseline. Baselines that are the same plan share theirs."""
        if name not in self._predictions:
            twin = self._twin(name, self._predictions)
            if twin is None:
                network = self.network
                machine = network.placement.machine
                prediction = predicted(
                    network.graph,
                    machine,
                    self.plans[name],
                    network.terms,
                )
            else:
                prediction = replace(self._predictions[twin], plan=name)
            self._predictions[name] = prediction
        return self._predictions[name]

    def seconds(self, name: str) -> float:
        """Predicted seconds of one baseline."""
        states = self.states[name]
        if states is None or name in self._predictions:
            return self.prediction(name).seconds
        if self.space.overlaps:
            return self.space.simulated.seconds(states)
        return self.network.problem.cost(states)

    def peak_bytes(self, name: str) -> int:
        """Peak memory of one baseline, bytes of a device."""
        if name not in self._peaks:
            twin = self._twin(name, self._peaks)
            if twin is None:
                self._peaks[name] = peak_bytes(self.network, self.plans[name])
            else:
                self._peaks[name] = self._peaks[twin]
        return self._peaks[name]

    def fits(
        self,
        name: str,
        limit_bytes: int,
        hopeless: float = HOPELESS,
    ) -> bool:
        """Whether one baseline fits in memory.

        Its peak is not computed if variables and batch alone are beyond the limit, or the additive
        count is `hopeless` times the limit.
        """
        states = self.states[name]
        if (
            states is not None
            and self.network.problem.memory_bytes(states) > hopeless * limit_bytes
        ):
            return False
        if name not in self._peaks:
            plan = self.plans[name]
            layout = layout_of(self.network.graph, plan)
            if argument_bytes(self.network.graph, plan.mesh, layout) > limit_bytes:
                return False
        return self.peak_bytes(name) <= limit_bytes

    def fastest(
        self,
        limit_bytes: int,
        limit_seconds: float = np.inf,
        hopeless: float = HOPELESS,
    ) -> str | None:
        """Name of the fastest baseline that fits and is faster than a limit, None without one."""
        by_seconds = sorted((self.seconds(name), name) for name in self.plans)
        for seconds, name in by_seconds:
            if seconds < limit_seconds and self.fits(name, limit_bytes, hopeless):
                return name
        return None

    def _twin(
        self,
        name: str,
        names: Mapping[str, object],
    ) -> str | None:
        """The first of some baselines that is the same plan as `name`."""
        plan = self.plans[name]
        for other in names:
            twin = self.plans[other]
            if (
                twin.mesh == plan.mesh
                and twin.choices == plan.choices
                and twin.storage == plan.storage
            ):
                return other
        return None


def peak_bytes(network: CostNetwork, plan: Plan) -> int:
    """Peak memory of a plan that all devices run at once, bytes of a device."""
    layout = layout_of(network.graph, plan)
    machine = network.placement.machine
    return memory(
        network.graph,
        plan.mesh,
        layout,
        machine.backend,
        device_bytes=machine.memory_bytes,
    ).peak

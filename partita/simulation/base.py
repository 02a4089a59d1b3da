"""The contract of a simulated step: one training step of a graph under a plan on a machine.

Members, one file each: `uniform` (all devices do the same), `placed` (operators on slices of axes,
or devices that differ) and `pipelined` (microbatches or rematerialization).
`simulate.simulated_step` picks the member; its callers use only this contract.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from partita.cost.predict import Prediction
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.plan import Plan
from partita.simulation.timeline import Timeline

DISPATCH_SECONDS = 1e-4
"""Python's time to run a piece of some twenty arrays, seconds (`benchmarks/staged_overhead.py`)."""


class SimulatedStep(ABC):
    """One step of a graph under a plan on a machine. Values are computed on first use."""

    graph: OperatorGraph
    machine: Machine
    plan: Plan

    @property
    @abstractmethod
    def seconds(self) -> float:
        """Seconds of the simulated step."""

    @property
    @abstractmethod
    def peak_bytes(self) -> int:
        """Peak memory of the device closest to its capacity, bytes. Needs no simulation."""

    @abstractmethod
    def prediction(self) -> Prediction:
        """Seconds, memory, traffic and FLOPs of the step, by operator and cause."""

    @abstractmethod
    def timeline(self) -> Timeline:
        """All tasks with start and length, the critical path and the memory curve."""

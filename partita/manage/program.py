"""A training step as kernels: the program that policies manage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from partita.cost.terms import OperatorTerms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Backend

PHASES = ("forward", "backward", "update")


@dataclass(frozen=True, slots=True)
class Kernel:
    """The work of an operator in a phase of the step, of one class in one dtype."""

    name: str
    phase: str
    op_class: str
    dtype: str
    flops: float
    nbytes: float
    """Bytes read and written in main memory."""


@dataclass(frozen=True)
class Program:
    """The kernels of one training step, in order."""

    name: str
    kernels: tuple[Kernel, ...]

    @property
    def flops(self) -> float:
        """FLOPs of a step."""
        return sum(kernel.flops for kernel in self.kernels)


def step_program(graph: OperatorGraph, backend: Backend) -> Program:
    """The kernels of a captured step on one device, forward to update."""
    operators = cost_terms(graph, backend).operators
    kernels: list[Kernel] = []
    for phase in PHASES:
        ordered: Sequence[OperatorTerms] = operators[::-1] if phase == "backward" else operators
        for operator in ordered:
            work_by_engine: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
            for work in operator.work:
                if work.phase == phase:
                    sums = work_by_engine[work.op_class, work.dtype]
                    sums[0] += work.trips * work.flops
                    sums[1] += work.trips * sum(nbytes for nbytes, _ in work.traffic)
            for (op_class, dtype), (flops, nbytes) in work_by_engine.items():
                if flops or nbytes:
                    kernel = Kernel(operator.name, phase, op_class, dtype, flops, nbytes)
                    kernels.append(kernel)
    return Program(graph.name, tuple(kernels))

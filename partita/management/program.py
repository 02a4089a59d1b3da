"""A training step as kernels: the program that policies manage."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import resources

import numpy as np

from partita.cost.evaluate import PHASES
from partita.cost.operator_terms import OperatorTerms
from partita.cost.terms import cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Backend


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
    result_bytes: float = 0.0
    """Of `nbytes`: bytes of results, which later kernels read."""


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
            work_by_engine: dict[tuple[str, str], list[float]] = defaultdict(
                lambda: [0.0, 0.0, 0.0]
            )
            for work in operator.work:
                if work.phase == phase:
                    sums = work_by_engine[work.op_class, work.dtype]
                    sums[0] += work.trips * work.flops
                    sums[1] += work.trips * sum(nbytes for nbytes, _ in work.traffic)
                    sums[2] += work.trips * work.written_bytes
            for (op_class, dtype), (flops, nbytes, results) in work_by_engine.items():
                if flops or nbytes:
                    kernel = Kernel(operator.name, phase, op_class, dtype, flops, nbytes, results)
                    kernels.append(kernel)
    return Program(graph.name, tuple(kernels))


SMALL = 1e-3
"""Fraction of a step's FLOPs and of its bytes below which a kernel is merged."""


def merged(program: Program, name: str) -> Program:
    """A program with small kernels merged into the one before them, under another name."""
    least_flops = SMALL * program.flops
    least_bytes = SMALL * sum(kernel.nbytes for kernel in program.kernels)
    kernels: list[Kernel] = []
    for kernel in program.kernels:
        is_small = kernel.flops < least_flops and kernel.nbytes < least_bytes
        if kernels and is_small:
            last = kernels[-1]
            kernels[-1] = replace(
                last,
                flops=last.flops + kernel.flops,
                nbytes=last.nbytes + kernel.nbytes,
                result_bytes=last.result_bytes + kernel.result_bytes,
            )
        else:
            kernels.append(kernel)
    return Program(name, tuple(kernels))


def program_rows(program: Program) -> list[list[object]]:
    """A program as JSON: a row per kernel, its name left out."""
    rows: list[list[object]] = []
    for kernel in program.kernels:
        engine = [kernel.phase, kernel.op_class, kernel.dtype]
        figures = kernel.flops, kernel.nbytes, kernel.result_bytes
        rows.append([*engine, *(round(figure) for figure in figures)])
    return rows


@lru_cache
def captured_programs() -> dict[str, Program]:
    """Seven Keras training steps by name, captured by `benchmarks/manage_programs.py`."""
    file = resources.files("partita.management").joinpath("programs.json")
    programs = {}
    for name, rows in json.loads(file.read_text(encoding="utf-8")).items():
        kernels = [Kernel(f"{name}-{number}", *row) for number, row in enumerate(rows)]
        programs[name] = Program(name, tuple(kernels))
    return programs


SYNTHETIC = 6
SYNTHETIC_KERNELS = 12
INTENSITIES = (0.1, 200.0)
"""FLOPs per byte of synthetic kernels, at least and at most."""


def synthetic_programs(seed: int = 0) -> tuple[Program, ...]:
    """Programs of random kernels whose FLOPs per byte cover the range of training steps.

    Policies that are trained on a few networks only meet gaps between them in others.
    """
    generator = np.random.default_rng(seed)
    low, high = np.log(INTENSITIES)
    programs = []
    for number in range(SYNTHETIC):
        kernels = []
        for k in range(SYNTHETIC_KERNELS):
            intensity = float(np.exp(generator.uniform(low, high)))
            # A time like that of a kernel of the captured steps, at 15 GFLOP/s and 5 GB/s.
            seconds = float(generator.uniform(0.02, 0.3))
            flops = seconds * min(1.5e10, 5e9 * intensity)
            nbytes = flops / intensity
            name = f"kernel-{k}"
            kernels.append(Kernel(name, "forward", "dot", "float32", flops, nbytes, nbytes / 3))
        programs.append(Program(f"synthetic-{number}", tuple(kernels)))
    return tuple(programs)


def school_programs(without: str = "") -> tuple[Program, ...]:
    """The programs that policies are trained on: captured steps but one, and synthetic ones."""
    captured = [program for name, program in captured_programs().items() if name != without]
    return (*captured, *synthetic_programs())

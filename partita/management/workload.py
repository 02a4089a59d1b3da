"""A program on the settings of a machine: snippets with their seconds and watts per setting.

A *snippet* is about 0.1 s at a medium setting: a part of a training step, or several short steps. A
*pass* is about a second: one or more steps as snippets, with a wait for data in front. A run
repeats the pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from partita.management.action import Setting
from partita.management.hardware import Deviation, Hardware
from partita.management.program import Kernel, Program

RUN_SECONDS = 30.0
"""Length of a run at a medium setting: several time constants of a phone's package."""
FEWEST_PASSES = 12
PASS_SECONDS = 1.0
"""Of work, at a medium setting."""


@dataclass(frozen=True, eq=False)
class Snippet:
    """A part of a pass. Arrays over settings are those of the hardware, with its deviation."""

    flops: float
    nbytes: float
    seconds: np.ndarray
    """[setting]."""
    compute_seconds: np.ndarray
    """[setting]: seconds in which cores compute, not waiting for memory."""
    watts: np.ndarray
    """[setting, cluster]: at 60 °C."""
    transfer_joules: np.ndarray
    """[setting]: energy of the bytes in main memory and on the grid."""

    @property
    def works(self) -> bool:
        """Whether it computes; the wait for a batch does not."""
        return self.nbytes > 0 or self.flops > 0


class SnippetFigures(NamedTuple):
    """A snippet under one setting, without the parts that depend on temperature."""

    seconds: float
    watts: tuple[float, ...]
    """[cluster]: at 60 °C."""
    transfer_watts: float
    transition: np.ndarray
    gain: np.ndarray
    """Matrices of `ThermalModel.propagator`; empty without a thermal model."""


@dataclass(frozen=True, eq=False)
class Workload:
    """A program on a machine."""

    name: str
    hardware: Hardware
    snippets: tuple[Snippet, ...]
    """One pass."""
    passes: int
    steps_per_pass: int
    _figures: dict[tuple[int, int], SnippetFigures] = field(default_factory=dict, repr=False)

    def figures(self, number: int, setting: Setting) -> SnippetFigures:
        """The figures of snippet `number` of the pass under a setting."""
        key = number, setting.index
        if key not in self._figures:
            snippet = self.snippets[number]
            model = self.hardware.thermal_model
            seconds = float(snippet.seconds[setting.index])
            empty = np.zeros((0, 0))
            self._figures[key] = SnippetFigures(
                seconds,
                tuple(float(watts) for watts in snippet.watts[setting.index]),
                float(snippet.transfer_joules[setting.index]) / seconds,
                *((empty, empty) if model is None else model.propagator(seconds)),
            )
        return self._figures[key]

    @property
    def steps(self) -> int:
        """Training steps of the run."""
        return self.passes * self.steps_per_pass

    def energy(self) -> tuple[np.ndarray, np.ndarray]:
        """Joules and seconds of every snippet under every setting, [snippet, setting], at 60 °C."""
        seconds = np.stack([snippet.seconds for snippet in self.snippets])
        hardware = self.hardware
        constant = sum(hardware.constant_watts.values())
        joules = []
        for snippet in self.snippets:
            watts = snippet.watts.sum(1) + constant
            joules.append(snippet.seconds * watts + snippet.transfer_joules)
        return np.stack(joules), seconds


def workload_of(
    program: Program, hardware: Hardware, passes: int | None = None, seed: int = 0
) -> Workload:
    """A program on a machine.

    Args:
        passes: Default: enough for half a minute at a medium setting.
        seed: Of the efficiencies of kernels, where the hardware hides them.
    """
    plain = hardware.deviating(Deviation())
    step_seconds = sum(_medium_seconds(kernel, plain) for kernel in program.kernels)
    length = hardware.assumptions.snippet_seconds
    merged = max(1, math.ceil(0.8 * length / step_seconds))
    repeats = max(1, round(PASS_SECONDS / (merged * step_seconds)))
    kernels = []
    for kernel in program.kernels:
        kernels.append(_times(kernel, merged))
    factors = np.ones(len(kernels))
    spread = hardware.deviation.efficiency_spread
    if spread:
        factors = np.random.default_rng(seed).uniform(1 - spread, 1 + spread, len(kernels))
    step = [_snippet(part, hardware) for part in _parts(kernels, factors, plain, length)]
    snippets = [_wait(hardware), *(step * repeats)]
    if passes is None:
        pass_seconds = merged * repeats * step_seconds + hardware.assumptions.batch_seconds
        passes = max(FEWEST_PASSES, math.ceil(RUN_SECONDS / pass_seconds))
    return Workload(program.name, hardware, tuple(snippets), passes, merged * repeats)


Part = list[tuple[Kernel, float]]
"""Kernels of a snippet, each with the factor on its efficiency."""


def _parts(
    kernels: Sequence[Kernel], factors: np.ndarray, hardware: Hardware, length: float
) -> list[Part]:
    """Kernels grouped into snippets of a length, long ones cut, by the description's times."""
    parts: list[Part] = []
    current: Part = []
    elapsed = 0.0
    for kernel, factor in zip(kernels, factors, strict=True):
        seconds = _medium_seconds(kernel, hardware)
        pieces = max(1, round(seconds / length))
        piece = _times(kernel, 1 / pieces)
        for _ in range(pieces):
            current.append((piece, float(factor)))
            elapsed += seconds / pieces
            if elapsed >= 0.8 * length:
                parts.append(current)
                current = []
                elapsed = 0.0
    if current:
        parts.append(current)
    return parts


def _times(kernel: Kernel, factor: float) -> Kernel:
    """A kernel with a multiple of the work."""
    return replace(
        kernel,
        flops=kernel.flops * factor,
        nbytes=kernel.nbytes * factor,
        result_bytes=kernel.result_bytes * factor,
    )


def _kernel_seconds(
    kernel: Kernel, hardware: Hardware, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a kernel, and those in which cores compute, both [setting]."""
    compute = kernel.flops * hardware.seconds_per_flop(kernel.op_class, kernel.dtype) / factor
    memory = kernel.nbytes / hardware.bandwidth + kernel.result_bytes * hardware.grid_costs[0]
    return hardware.kernel_seconds(compute, memory), compute


def _medium_seconds(kernel: Kernel, hardware: Hardware) -> float:
    """Seconds of a kernel at a medium setting."""
    return float(_kernel_seconds(kernel, hardware)[0][hardware.medium.index])


def _snippet(part: Part, hardware: Hardware) -> Snippet:
    count = len(hardware.settings)
    seconds = np.zeros(count)
    compute_seconds = np.zeros(count)
    for kernel, factor in part:
        kernel_seconds, compute = _kernel_seconds(kernel, hardware, factor)
        seconds += kernel_seconds
        compute_seconds += compute
    activity = hardware.activity(seconds, compute_seconds)
    nbytes = sum(kernel.nbytes for kernel, _ in part)
    results = sum(kernel.result_bytes for kernel, _ in part)
    return Snippet(
        flops=sum(kernel.flops for kernel, _ in part),
        nbytes=nbytes,
        seconds=seconds,
        compute_seconds=compute_seconds,
        watts=hardware.cluster_watts(activity),
        transfer_joules=nbytes * hardware.memory_joules_per_byte + results * hardware.grid_costs[1],
    )


def _wait(hardware: Hardware) -> Snippet:
    """The wait for the next batch."""
    count = len(hardware.settings)
    return Snippet(
        flops=0.0,
        nbytes=0.0,
        seconds=np.full(count, hardware.assumptions.batch_seconds),
        compute_seconds=np.zeros(count),
        watts=hardware.cluster_watts(np.zeros(count)),
        transfer_joules=np.zeros(count),
    )

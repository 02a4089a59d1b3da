"""Kernels on compute attached to memory (UPMEM, HBM-PIM, ReRAM): their seconds beside the devices'.

A kernel runs on the units if they have an engine for its class and dtype, and if that is faster:

    launch + max(FLOPs / rate, resident bytes / bandwidth inside)
           + moved bytes / (broadcast or down) + result bytes / up + new weights / write bandwidth

*Resident* are operands that stay in the units' memories between steps: variables that no step
changes, and all variables where the units compute in the devices' main memory. Each unit holds rows
of the resident matrix and needs the whole other operand of a product, so that one is broadcast;
operands of other kernels are scattered. Units do not exchange data: the host gathers the results.
A variable that the step changes is written to the units again in every step.

Units in a lockstep group run the same instruction: a group works if any of its units has a result
to compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from partita.cost.operator_terms import Work
from partita.machine import Attached, Machine
from partita.machine.parts import DTYPES, FULL_FLOAT32
from partita.units import format_seconds

SECONDS_OF_A_YEAR = 365.25 * 86400
PRODUCTS = ("dot", "conv", "attention")


@dataclass(frozen=True)
class KernelBytes:
    """Bytes of a kernel by their use, [assignment]."""

    total: np.ndarray
    stored: np.ndarray
    """Of variables."""
    frozen: np.ndarray
    """Of variables that the step does not change."""
    written: np.ndarray
    """Of results."""


def attached_rate(part: Attached, op_class: str, dtype: str) -> float | None:
    """FLOP/s of a unit on operators of a class in a dtype; None without an engine for them."""
    engines = {(engine.op_class, engine.dtype): engine for engine in part.engines}
    dtype = "float32" if dtype == FULL_FLOAT32 else dtype
    dtype = dtype if dtype in DTYPES else "*"
    for key in ((op_class, dtype), (op_class, "*"), ("*", dtype), ("*", "*")):
        if key in engines:
            return engines[key].rate
    return None


def attached_seconds(
    machine: Machine,
    part: Attached,
    work: Work,
    flops: np.ndarray,
    nbytes: KernelBytes,
) -> np.ndarray:
    """[assignment]: seconds of a kernel on a device's part of the units; infinite without engine.

    Args:
        flops: [assignment], of a device.
    """
    rate = attached_rate(part, work.op_class, work.dtype)
    if rate is None:
        return np.full(np.shape(flops), math.inf)
    share = 1.0 / machine.devices
    resident = nbytes.stored if part.in_main_memory else nbytes.frozen
    rewritten = np.zeros_like(resident) if part.in_main_memory else nbytes.stored - nbytes.frozen
    moved = np.maximum(nbytes.total - nbytes.stored - nbytes.written, 0.0)
    held = resident + rewritten
    units = _working_units(part, nbytes.written, work.dtype) * share
    inside = np.maximum(flops / (units * rate), held / (units * part.bandwidth))
    if work.op_class in PRODUCTS:
        transfer = moved * part.units / part.broadcast
    else:
        transfer = moved / part.down
    write_rate = part.write_bandwidth or part.down
    too_large = held > part.units * part.capacity * share
    seconds = (
        part.launch
        + inside
        + transfer
        + nbytes.written / (part.up * share)
        + rewritten / (write_rate * share)
    )
    return np.where(too_large, math.inf, seconds)


def _working_units(part: Attached, written: np.ndarray, dtype: str) -> np.ndarray:
    """Units with results to compute, in whole lockstep groups."""
    size = {"float64": 8, "float32": 4, FULL_FLOAT32: 4, "int8": 1}.get(dtype, 2)
    results = np.maximum(written / size, 1.0)
    groups = np.ceil(results / part.lockstep)
    return np.minimum(groups * part.lockstep, part.units)


def endurance_years(part: Attached, step_seconds: float) -> float | None:
    """Years until the cells of a memory that is written in every step wear out; None if they do
    not."""
    if part.endurance_writes is None:
        return None
    return part.endurance_writes * step_seconds / SECONDS_OF_A_YEAR


def kernel_bytes(work: Work, total: np.ndarray) -> KernelBytes:
    """The bytes of a kernel, by the shares that its whole has.

    total: [assignment], bytes of a device.
    """
    whole = sum(nbytes for nbytes, _ in work.traffic) or 1
    scale = total / whole
    return KernelBytes(
        total,
        work.stored_bytes * scale,
        work.frozen_bytes * scale,
        work.written_bytes * scale,
    )


def kernels_by_part(
    machine: Machine,
    kernels: Sequence[Work],
    device_seconds: np.ndarray,
    flops: np.ndarray,
    total_bytes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of kernels where they are fastest, and the place: -1 on the devices, else the number
    of the attached part. Both are [kernel, assignment].

    Args:
        device_seconds: [kernel, assignment].
        flops, total_bytes: [kernel, assignment], of a device.
    """
    fastest = device_seconds.copy()
    places = np.full(device_seconds.shape, -1)
    for number, part in enumerate(machine.attached):
        for k, work in enumerate(kernels):
            nbytes = kernel_bytes(work, total_bytes[k])
            seconds = attached_seconds(machine, part, work, flops[k], nbytes)
            places[k] = np.where(seconds < fastest[k], number, places[k])
            fastest[k] = np.minimum(fastest[k], seconds)
    return fastest, places


@dataclass(frozen=True)
class AttachedUse:
    """The use of an attached part in a step of a plan."""

    part: Attached
    kernels: int
    seconds: float
    """Of a device's kernels on it."""

    def note(self, step_seconds: float, trained_bytes: float) -> str:
        """The use in a sentence; for a memory that wears out, with the effect of training.

        Args:
            trained_bytes: Of the variables that the step changes.
        """
        name = self.part.name
        text = f"{name} runs no kernel: the devices are faster"
        if self.kernels:
            share = self.seconds / step_seconds
            text = f"{name} runs {self.kernels} kernels, {share:.0%} of the step"
        years = endurance_years(self.part, step_seconds)
        if years is None or not trained_bytes:
            return text
        writing = format_seconds(trained_bytes / (self.part.write_bandwidth or self.part.down))
        return (
            f"{text}; training is limited by writes: new weights take {writing} a step, and cells "
            f"that are written in every step last {years:.2g} years"
        )

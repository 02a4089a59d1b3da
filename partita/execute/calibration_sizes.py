"""The sizes of the programs that measure a machine.

A CPU runs fixed sizes, each operation once. An accelerator needs microseconds for these, less than
the host needs to start a program. So its sizes follow from its description: one operation takes a
fifth of a millisecond at the described rate, and a program repeats it for 20 ms. A description that
is off by a factor of ten still gives usable programs.
"""

from __future__ import annotations

from dataclasses import dataclass

from partita.machine import Machine

OPERATION_SECONDS = 2e-4
"""Time of one operation of an accelerator, by its description."""
PROGRAM_SECONDS = 2e-2
"""Time for which a program of an accelerator repeats its operation."""
STREAM_SECONDS = 5e-4
"""Time of the largest memory stream of an accelerator, by its description."""
MOST_REPEATS = 1000
VALUE_BYTES = 4
STREAM_ARRAYS = 3
"""Arrays that a stream reads or writes."""


@dataclass(frozen=True)
class CalibrationSizes:
    """Sizes of the programs that measure a machine. Those of a CPU are the defaults."""

    dots: tuple[tuple[int, int, int], ...] = (
        (64, 1024, 1024),
        (256, 512, 512),
        (512, 512, 512),
        (32, 4096, 1024),
        (1024, 1024, 256),
    )
    """Matrix products: rows, inner width, columns."""
    convs: tuple[tuple[int, int, int, int, int], ...] = (
        (8, 32, 32, 3, 5),
        (8, 16, 64, 64, 3),
        (8, 28, 32, 64, 3),
        (4, 56, 16, 32, 3),
    )
    """Convolutions with gradients: samples, height and width, channels in, channels out, kernel."""
    streams: tuple[int, ...] = (1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
    """Sizes of a device's arrays for its memories, float32 values. The last ones are in main
    memory."""
    chain: int = 200
    """Number of dependent small products that give the time to start one."""
    reduced: tuple[int, ...] = (1 << 10, 1 << 14, 1 << 18, 1 << 21, 1 << 23)
    """Sizes of collectives, float32 values of a device."""
    program_seconds: float = 0.0
    """Time for which a program repeats a product, a convolution or a collective; 0: once."""

    def repeats(self, seconds: float) -> int:
        """The number of operations of `seconds` in one program.

        >>> CalibrationSizes().repeats(1e-4), CalibrationSizes(program_seconds=0.02).repeats(1e-4)
        (1, 200)
        """
        if not self.program_seconds:
            return 1
        return max(2, min(MOST_REPEATS, round(self.program_seconds / seconds)))


def sizes_of(machine: Machine) -> CalibrationSizes:
    """The sizes that suit the devices of a machine."""
    if machine.backend.platform == "cpu":
        return CalibrationSizes()
    return accelerator_sizes(machine)


def accelerator_sizes(machine: Machine) -> CalibrationSizes:
    """Sizes for an accelerator, by its described rates.

    >>> from partita.machine import load
    >>> accelerator_sizes(load("h100")).dots
    ((4096, 4096, 4096), (4096, 2048, 8192))
    """
    flops = machine.rate("dot", "bfloat16") * OPERATION_SECONDS
    side = _multiple((flops / 2) ** (1 / 3), 128)
    channels = max(8, side // 16)
    conv_flops = machine.rate("conv", "bfloat16") * OPERATION_SECONDS
    # Forward and two gradients of a 3 x 3 convolution; both shapes below have the same FLOPs.
    sample_flops = 3 * 2 * 14 * 14 * channels * channels * 9
    samples = min(256, max(1, round(conv_flops / sample_flops)))
    values = machine.memory_bandwidth * STREAM_SECONDS / (STREAM_ARRAYS * VALUE_BYTES)
    largest_stream = _multiple(values, 1024)
    return CalibrationSizes(
        dots=((side, side, side), (side, side // 2, 2 * side)),
        convs=(
            (samples, 14, channels, channels, 3),
            (samples, 56, channels // 4, channels // 4, 3),
        ),
        streams=(max(1024, largest_stream // 4), largest_stream),
        chain=64,
        reduced=(1 << 12, 1 << 18, 1 << 23),
        program_seconds=PROGRAM_SECONDS,
    )


def _multiple(number: float, of: int) -> int:
    """The nearest positive multiple."""
    return max(1, round(number / of)) * of

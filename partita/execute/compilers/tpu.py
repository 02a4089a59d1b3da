"""XLA:TPU, a part of libtpu: slices of TPU v5e, v5p and v6e.

libtpu locks itself to one process, because two processes cannot use the same chips. A compilation
uses none, so the child process switches the lock off.

A chip reads its instructions from main memory, part by part. libtpu reports them apart from the
temporaries.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, NamedTuple

from partita.errors import CompilerError
from partita.execute.compilers.base import CompileTarget, ProgramCompiler
from partita.machine import Machine
from partita.units import parse


class Generation(NamedTuple):
    """A generation of TPUs."""

    name: str
    """Its name in libtpu's topologies."""
    slices: tuple[str, ...]
    """Arrangements of chips that can be rented."""
    clock_hertz: float
    """Clock of the TensorCore, cycles per second."""


# Slices: Google Cloud TPU documentation, "TPU v5e", "TPU v5p", "TPU v6e".
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "1x1x1",
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)
# The clock follows from the peak of bfloat16 products: a v5e has 4 matrix units of 128 x 128 cells,
# a v5p 8, and a v6e 4 times the cells of a v5e. A cell multiplies and adds once per cycle.
GENERATIONS = (
    (r"v5 ?(e|lite)", Generation("v5e", PLANES, 197e12 / (4 * 2 * 128 * 128))),
    (r"v5 ?p", Generation("v5p", CUBES, 459e12 / (8 * 2 * 128 * 128))),
    (r"v6 ?(e|lite)|trillium", Generation("v6e", PLANES, 918e12 / (16 * 2 * 128 * 128))),
)
"""(pattern of the name of a machine's device, generation)."""
_SHORT = re.compile(
    r"(?:Used |memory required for HLO temporaries \()([\d.]+)([KMGT]?)"
    r"(?: of |\) exceeds available HBM \()[\d.]+"
)
"""The message about a program that exceeds a chip's memory, in two wordings of libtpu. The second
also counts arguments and results."""

_TEMPORARIES = re.compile(r"^allocation \d+: size (\d+), preallocated-temp:", re.MULTILINE)
"""The size of temporaries in main memory in a buffer assignment."""


class TpuCompiler(ProgramCompiler):
    """XLA:TPU."""

    platform = "tpu"
    name = "XLA:TPU"
    extra = "compile-tpu"
    module = "libtpu"
    packages = ("libtpu",)
    stores_program = True
    # libtpu 0.0.42.1 reports the allocation and the gaps between values of all memories, or 0 if
    # every value is on the chip. Its own limit counts the allocation alone.
    dump_options = {"xla_dump_hlo_as_text": True}

    def target(self, machine: Machine) -> CompileTarget:
        """The slice with as many chips as the machine has. CompilerError without one."""
        generation = generation_of(machine)
        by_count = {
            math.prod(int(length) for length in slice_.split("x")): slice_
            for slice_ in generation.slices
        }
        if machine.devices not in by_count:
            counts = ", ".join(str(count) for count in by_count)
            raise CompilerError(
                f"There is no slice of {machine.devices} TPU {generation.name} chips to compile "
                f"for. Use one of {counts} devices."
            )
        topology = f"{generation.name}:{by_count[machine.devices]}"
        return CompileTarget(self.platform, machine.devices, f"TPU {generation.name}", topology)

    def environment(self, target: CompileTarget) -> dict[str, str]:
        """No look at the network and at chips of this host, no log, no lock."""
        return {
            **super().environment(target),
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_STDERR_LOG_LEVEL": "3",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def devices(self, target: CompileTarget) -> Sequence[Any]:
        """The chips of a slice."""
        from jax.experimental import topologies

        return topologies.get_topology_desc(target.topology, "tpu").devices

    def allocated_bytes(self, folder: Path) -> int | None:
        """The temporaries in main memory, which has no color in a buffer assignment."""
        files = list(folder.glob("*buffer-assignment.txt"))
        if not files:
            return None
        return sum(int(size) for size in _TEMPORARIES.findall(files[0].read_text()))

    def needed_bytes(self, error: str) -> int | None:
        """XLA:TPU refuses a program that exceeds a chip's memory, and says by how much."""
        match = _SHORT.search(error)
        if match is None:
            return None
        unit = f" {match[2]}iB" if match[2] else " B"
        return int(parse(match[1] + unit, "B"))

    def version_problem(self) -> str:
        """Names the version of libtpu that JAX asks for, if another one is installed.

        Newer ones usually work, so this is no reason to refuse a compilation.
        """
        try:
            installed = version("libtpu")
        except PackageNotFoundError:
            return f" The installed libtpu states no version: pip install 'partita[{self.extra}]'."
        for requirement in requires("jax") or []:
            match = re.match(r"libtpu==([\d.*]+)", requirement)
            if match and not fnmatch(installed, match[1]):
                return (
                    f" libtpu is {installed} and JAX {version('jax')} asks for {match[1]}: "
                    f"pip install 'libtpu=={match[1]}'."
                )
        return ""

    def seconds_of(self, cycles: float, machine: Machine) -> float | None:
        """The estimated cycles at the clock of the chip."""
        return cycles / generation_of(machine).clock_hertz


def generation_of(machine: Machine) -> Generation:
    """The generation of a machine's chips. CompilerError for one that is not known."""
    for pattern, generation in GENERATIONS:
        if re.search(pattern, machine.device.name, re.IGNORECASE):
            return generation
    names = ", ".join(generation.name for _, generation in GENERATIONS)
    raise CompilerError(
        f"XLA:TPU has no figures for '{machine.device.name}'. Partita compiles for TPU {names}."
    )

"""The contract of a compiler for a machine that need not be here.

A compiler turns a machine into a target: the platform, the topology and the figures of the device
that XLA needs, as text. A child process (`child.py`) makes the target's devices, which can be
compiled for and not run on. Both halves of a member stand in one file; only the half of the child
imports JAX.
"""

from __future__ import annotations

import abc
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from partita.errors import CompilerError
from partita.machine import Machine


@dataclass(frozen=True)
class CompileTarget:
    """The devices of a machine, as a compiler takes them."""

    platform: str
    """"cpu", "cuda" or "tpu"."""
    devices: int
    device: str
    """Name of a device."""
    topology: str = ""
    """Arrangement of the devices, as JAX's topologies take it."""
    config: str = ""
    """Figures of a device, as the compiler reads them."""

    def to_json(self) -> dict[str, Any]:
        """The target for a JSON file."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.devices} x {self.device}"


class ProgramCompiler(abc.ABC):
    """One compiler. Members have no state."""

    platform: str
    """The platform whose programs it makes."""
    name: str
    """Its name for people."""
    extra: str
    """The extra of Partita that installs it, "" if JAX brings it."""
    module: str
    """The module without which it is not installed."""
    packages: tuple[str, ...]
    """The packages that may hold it; their versions are part of the cache's key."""
    flags: str = ""
    """XLA_FLAGS of the child process."""
    stores_program: bool = False
    """Whether a compiled program takes main memory of a device beside its temporaries."""
    dump_options: Mapping[str, Any] = {}
    """Options with which a compilation writes the files of `allocated_bytes`, {} for none."""

    @abc.abstractmethod
    def target(self, machine: Machine) -> CompileTarget:
        """The devices of a machine. CompilerError if this compiler does not know them."""

    @abc.abstractmethod
    def devices(self, target: CompileTarget) -> Sequence[Any]:
        """JAX's devices of a target. Called in the child process."""

    def environment(self, target: CompileTarget) -> dict[str, str]:
        """Environment variables of the child process."""
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": self.flags}

    def allocated_bytes(self, folder: Path) -> int | None:
        """Main memory of a program's temporaries by the files of its compilation, None without."""
        return None

    def needed_bytes(self, error: str) -> int | None:
        """Memory of a device that a program needs, from the compiler's message that it has less;
        None for other messages."""
        return None

    def seconds_of(self, cycles: float, machine: Machine) -> float | None:
        """Seconds of the cycles that the compiler estimates for a step, None without estimate."""
        return None

    def version(self) -> str:
        """The versions of the compiler and of JAX."""
        found = [f"jax {version('jax')}"]
        for package in self.packages:
            try:
                found.append(f"{package} {version(package)}")
            except PackageNotFoundError:
                continue
        return ", ".join(found)

    def version_problem(self) -> str:
        """A sentence if the compiler may not fit the installed JAX, for the message of a failed
        compilation; "" otherwise."""
        return ""

    def check(self) -> None:
        """CompilerError unless the compiler is installed and fits the installed JAX."""
        if importlib.util.find_spec(self.module) is None:
            raise CompilerError(
                f"{self.name} is not installed: pip install 'partita[{self.extra}]'."
            )


def base_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a child process, without settings of the parent's own devices."""
    ours = ("JAX_", "XLA_", "NPROC", "PARTITA_")
    return {name: value for name, value in environment.items() if not name.startswith(ours)}

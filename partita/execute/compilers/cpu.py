"""XLA:CPU, which is a part of JAX: a host's cores as virtual devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from partita.execute.compilers.base import CompileTarget, ProgramCompiler
from partita.machine import Machine


class CpuCompiler(ProgramCompiler):
    """XLA:CPU for any number of virtual devices."""

    platform = "cpu"
    name = "XLA:CPU"
    extra = ""
    module = "jaxlib"
    packages = ("jaxlib",)

    def target(self, machine: Machine) -> CompileTarget:
        """Virtual devices of this host's processor."""
        return CompileTarget(self.platform, machine.devices, machine.device.name)

    def environment(self, target: CompileTarget) -> dict[str, str]:
        """Makes the processor the target's number of devices."""
        flags = f"--xla_force_host_platform_device_count={target.devices}"
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def devices(self, target: CompileTarget) -> Sequence[Any]:
        """The virtual devices."""
        import jax

        return jax.devices()

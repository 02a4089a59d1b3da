"""XLA:CPU, which is a part of JAX: a host's cores as virtual devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from partita.execute.compilers.base import Compiler, Target
from partita.machine import Machine


class CpuCompiler(Compiler):
    """XLA:CPU for any number of virtual devices."""

    platform = "cpu"
    name = "XLA:CPU"
    extra = ""
    module = "jaxlib"
    packages = ("jaxlib",)

    def target(self, machine: Machine) -> Target:
        """Virtual devices of this host's processor."""
        return Target(self.platform, machine.devices, machine.device.name)

    def environment(self, target: Target) -> dict[str, str]:
        """Makes the processor the target's number of devices."""
        flags = f"--xla_force_host_platform_device_count={target.devices}"
        return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def devices(self, target: Target) -> Sequence[Any]:
        """The virtual devices."""
        import jax

        return jax.devices()

"""All compilers, and the one of a machine."""

from __future__ import annotations

from partita.errors import CompilerError
from partita.execute.compilers.base import Compiler
from partita.execute.compilers.cpu import CpuCompiler
from partita.execute.compilers.cuda import CudaCompiler
from partita.execute.compilers.tpu import TpuCompiler
from partita.machine import Machine

COMPILERS: dict[str, Compiler] = {
    compiler.platform: compiler for compiler in (CpuCompiler(), CudaCompiler(), TpuCompiler())
}


def platform_of(machine: Machine) -> str:
    """The platform of a machine's devices, "" if it is not known."""
    name = machine.device.name
    if "TPU" in name:
        return "tpu"
    if "NVIDIA" in name or "Tesla" in name:
        return "cuda"
    return "cpu" if machine.name.startswith("host") else ""


def compiler_of(machine: Machine) -> Compiler:
    """The compiler of a machine. CompilerError if there is none."""
    platform = platform_of(machine)
    if platform not in COMPILERS:
        raise CompilerError(
            f"There is no compiler for '{machine.device.name}' of the machine '{machine.name}'. "
            "Partita compiles for NVIDIA GPUs from the V100 on, for TPUs from the v5e on, and for "
            "CPUs."
        )
    return COMPILERS[platform]

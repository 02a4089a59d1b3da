"""All compilers, and the one of a machine."""

from __future__ import annotations

from partita.errors import CompilerError
from partita.execute.compilers.base import ProgramCompiler
from partita.execute.compilers.cpu import CpuCompiler
from partita.execute.compilers.cuda import CudaCompiler
from partita.execute.compilers.tpu import TpuCompiler
from partita.machine import Machine

COMPILERS: dict[str, ProgramCompiler] = {
    compiler.platform: compiler for compiler in (CpuCompiler(), CudaCompiler(), TpuCompiler())
}


def program_compiler(machine: Machine) -> ProgramCompiler:
    """The compiler of a machine. CompilerError if there is none."""
    platform = machine.backend.platform
    if platform not in COMPILERS:
        raise CompilerError(
            f"There is no compiler for '{machine.device.name}' of the machine '{machine.name}'. "
            "Partita compiles for NVIDIA GPUs from the V100 on, for TPUs from the v5e on, and for "
            "CPUs."
        )
    return COMPILERS[platform]

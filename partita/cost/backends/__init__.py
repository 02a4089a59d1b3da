"""The compilers of machines, one file each, behind one contract (`base.Compiler`)."""

from __future__ import annotations

from functools import lru_cache

from partita.cost.backends.base import Compiler
from partita.cost.backends.cpu import CpuCompiler
from partita.cost.backends.gpu import GpuCompiler
from partita.cost.backends.tpu import TpuCompiler
from partita.machine import Backend

COMPILERS: dict[str, type[Compiler]] = {
    "": CpuCompiler,
    "cpu": CpuCompiler,
    "cuda": GpuCompiler,
    "tpu": TpuCompiler,
}
"""Platform in a machine's description -> the compiler."""


@lru_cache(maxsize=64)
def compiler_of(backend: Backend) -> Compiler:
    """The compiler of a machine's backend."""
    return COMPILERS[backend.platform](backend)

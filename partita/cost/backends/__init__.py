"""The compilers of machines, one file each, behind one contract (`base.Compiler`)."""

from __future__ import annotations

from functools import lru_cache

from partita.cost.backends.base import Compiler
from partita.cost.backends.cpu import XlaCpu
from partita.cost.backends.gpu import XlaGpu
from partita.cost.backends.tpu import XlaTpu
from partita.machine import Backend

COMPILERS: dict[str, type[Compiler]] = {
    "": XlaCpu,
    "cpu": XlaCpu,
    "cuda": XlaGpu,
    "tpu": XlaTpu,
}
"""Platform in a machine's description -> the compiler."""


@lru_cache(maxsize=64)
def compiler_of(backend: Backend) -> Compiler:
    """The compiler of a machine's backend."""
    return COMPILERS[backend.platform](backend)

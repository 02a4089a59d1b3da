"""Numba functions that XLA calls on a CPU: the frame of a typed FFI call as arrays, registration, and whether it all works.

XLA hands a handler one pointer, to an `XLA_FFI_CallFrame`; its layout is that of `jax.ffi.include_dir()/xla/ffi/api/c_api.h`, read here
by words of 8 bytes. A handler is a `numba.cfunc` of that pointer. Before its first call XLA asks it for its metadata, that is for the
version of the interface that it was made for: `asked` answers.

Attributes are not read: what a kernel must know beside its arrays is an array too, such as the number of threads. Threads are
numba's, by OpenMP or TBB: its own layer of last resort aborts when several devices call in at once, so without those a kernel has one thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic

carray: Any = vars(numba)["carray"]  # its types are for pure Python


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def cast(typing, address):  # type: ignore[no-untyped-def]
        pointer = types.CPointer(kind)
        return pointer(
            types.int64
        ), lambda context, builder, signature, arguments: builder.inttoptr(
            arguments[0], context.get_value_type(pointer)
        )

    return cast


_words, _ints, _floats = (
    _pointer_to(types.int64),
    _pointer_to(types.int32),
    _pointer_to(types.float32),
)

ARGUMENTS, RESULTS = 9, 14
"""Words of the frame that point to the buffers of the arguments and of the results."""


@njit(nogil=True, inline="always")
def word(address, k):
    """The k-th word of 8 bytes at an address."""
    return carray(_words(address), (k + 1,))[k]


@njit(nogil=True, inline="always")
def buffer(frame, side, k):
    """The address of the k-th buffer: of ARGUMENTS or RESULTS."""
    return word(word(frame, side), k)


@njit(nogil=True, inline="always")
def size(buffer, dim):
    """A buffer's size in one dim. Its words: size of the struct, extension, type, data, rank, dims."""
    return word(word(buffer, 5), dim)


@njit(nogil=True, inline="always")
def ints(buffer):
    """A buffer of int32 with one dim."""
    return carray(_ints(word(buffer, 3)), (size(buffer, 0),))


@njit(nogil=True, inline="always")
def floats(buffer):
    """A buffer of float32 with one dim."""
    return carray(_floats(word(buffer, 3)), (size(buffer, 0),))


@njit(nogil=True, inline="always")
def matrix(buffer):
    """A buffer of float32 with two dims."""
    return carray(_floats(word(buffer, 3)), (size(buffer, 0), size(buffer, 1)))


@njit(nogil=True, inline="always")
def int_matrix(buffer):
    """A buffer of int32 with two dims."""
    return carray(_ints(word(buffer, 3)), (size(buffer, 0), size(buffer, 1)))


@njit(nogil=True, inline="always")
def cube(buffer):
    """A buffer of float32 with three dims."""
    return carray(_floats(word(buffer, 3)), (size(buffer, 0), size(buffer, 1), size(buffer, 2)))


LONG, FLOAT = ir.IntType(64), ir.FloatType()
"""Types of LLVM's."""


def spread(b: Any, value: Any, width: int) -> Any:
    """A vector that has a number everywhere, in code that is being generated."""
    none = ir.Constant(ir.VectorType(FLOAT, width), ir.Undefined)
    first = b.insert_element(none, value, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(
        first, none, ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    )


def switch(b: Any, key: Any, cases: dict[int, Callable[[], None]]) -> None:
    """Generates the code of each case for a value of `key`, of which one has to be it, and goes on behind them."""
    end = b.append_basic_block("end")
    choice = b.switch(key, end)
    for value, generate in cases.items():
        case = b.append_basic_block("case")
        choice.add_case(ir.Constant(LONG, value), case)
        b.position_at_end(case)
        generate()
        b.branch(end)
    b.position_at_end(end)


@functools.cache
def version() -> int:
    """The version of the interface, as a word: minor above major.

    Handlers have it as a variable of their closure, since numba's cache on disk knows their text and such variables, but not globals.
    """
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()

    def number(part: str) -> int:
        match = re.search(rf"#define XLA_FFI_API_{part}\s+(\d+)", header)
        assert match is not None, f"{header[:40]!r} has no XLA_FFI_API_{part}"
        return int(match[1])

    return number("MINOR") << 32 | number("MAJOR")


@njit(nogil=True, inline="always")
def asked(frame, version):
    """Answers a call that asks for metadata, and says whether it was one."""
    extension = word(frame, 1)
    if extension == 0 or (word(extension, 1) & 0xFFFFFFFF) != 1:
        return False
    carray(_words(word(extension, 3)), (4,))[3] = version
    return True


@njit(nogil=True, inline="always")
def row_of(offsets, work):
    """The first row before which there are `work` units, of one an edge and one a row."""
    low, high = 0, len(offsets) - 1
    while low < high:
        middle = (low + high) // 2
        if np.int64(offsets[middle]) + middle < work:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, inline="always")
def rows_of(offsets, part, parts):
    """(first row, row after the last) of a part, of parts with equal numbers of edges and rows together."""
    rows = len(offsets) - 1
    work = np.int64(offsets[rows]) + rows
    first = row_of(offsets, work * part // parts) if part else 0
    return first, row_of(offsets, work * (part + 1) // parts) if part + 1 < parts else rows


@functools.cache
def threads() -> int:
    """Threads that one device's kernels may use: its share of the cores; 1 where numba has no layer that several devices can call."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    share = max(1, cores // max(1, jax.local_device_count()))
    return min(share, numba.config.NUMBA_NUM_THREADS) if share > 1 and _threadsafe() else 1  # type: ignore[attr-defined]


def _threadsafe() -> bool:
    """Makes numba choose a threading layer that can be entered by several threads, if there is one and none was chosen yet."""
    numba.config.THREADING_LAYER = "threadsafe"  # type: ignore[attr-defined]
    try:
        _start()
        return numba.threading_layer() in ("omp", "tbb")  # type: ignore[attr-defined]
    except ValueError:
        return False


@njit(parallel=True)
def _start():
    total = 0
    for i in numba.prange(2):
        total += i
    return total


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype, _new_capsule.argtypes = (
    ctypes.py_object,
    [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
)


def register(handlers: dict[str, Any]) -> None:
    """Makes `jax.ffi.ffi_call(name, ...)` call a function of the frame's address that returns 0, compiled here or read from numba's cache.

    Only those with `prange` in them may be threaded code: reading such code ends the process where numba has no threads to run it.
    """
    for name, function in handlers.items():
        handler = cfunc(types.int64(types.int64), cache=True)(function)
        _kept.append(handler)
        jax.ffi.register_ffi_target(name, _new_capsule(handler.address, None, None), platform="cpu")


_kept: list[Any] = []
"""Handlers that XLA may call: as long as the process lives."""


@functools.cache
def works(kernel: Callable[[], None], what: str) -> bool:
    """Whether a kernel can be used here: `kernel` registers and tries it. Where it fails, a warning says so, once."""
    if jax.default_backend() != "cpu":
        return False
    try:
        kernel()
        return True
    except Exception as error:  # whatever it is, the result can be had in another way
        warnings.warn(
            f"The {what} kernel does not work here ({type(error).__name__}: {error}); XLA's own operations take its place, which are slower.",
            stacklevel=2,
        )
        return False


@functools.cache
def step_options() -> dict[str, Any]:
    """How a step is compiled. On a CPU, XLA may give a product and all that is around it to a library as one, and then makes every number that is spread over
    rows a table of its own: twice the memory of a step, and half as long again (jaxlib 0.10.2, two layers of 16 features)."""
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # another backend, or another version
        return {}
    return options

"""Numba functions that XLA calls on a CPU: reading the call's frame, registration, self-tests.

XLA gives a handler one pointer, to an `XLA_FFI_CallFrame`
(`jax.ffi.include_dir()/xla/ffi/api/c_api.h`), read here in words of 8 bytes. A handler is a
`numba.cfunc` of that pointer. Before the first call XLA asks each handler for metadata, the version
of the interface it was written for: `answers_metadata` answers.

Attributes are not read: everything a kernel needs is an array, the number of threads included.
Threads are numba's, by OpenMP or TBB. Numba's own threading layer aborts when several devices call
in at once, so without OpenMP and TBB a kernel has one thread.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numba
import numpy as np
from numba import cfunc, njit, types
from numba.extending import intrinsic

carray: Any = vars(numba)["carray"]
"""Array at a pointer; its published type is for pure Python."""


def _pointer_to(kind: Any) -> Any:
    """A numba function that turns an address, int64, into a pointer to `kind`."""

    @intrinsic
    def cast(typing, address):  # type: ignore[no-untyped-def]
        pointer = types.CPointer(kind)

        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return cast


words_at = _pointer_to(types.int64)
_ints_at = _pointer_to(types.int32)
_floats_at = _pointer_to(types.float32)

ARGUMENTS = 9
"""Word of the frame that points to the buffers of the arguments."""

RESULTS = 14
"""Word of the frame that points to the buffers of the results."""


@njit(nogil=True, inline="always")
def word(address, k):
    """Word k, 8 bytes each, at an address."""
    return carray(words_at(address), (k + 1,))[k]


@njit(nogil=True, inline="always")
def argument(frame, k):
    """Address of the buffer of argument k."""
    return word(word(frame, ARGUMENTS), k)


@njit(nogil=True, inline="always")
def result(frame, k):
    """Address of the buffer of result k."""
    return word(word(frame, RESULTS), k)


@njit(nogil=True, inline="always")
def size(buffer, dim):
    """Size of a buffer in one dim.

    The words of a buffer: struct size, extension, type, data, rank, dims.
    """
    return word(word(buffer, 5), dim)


@njit(nogil=True, inline="always")
def ints(buffer):
    """A buffer of int32 [n]."""
    return carray(_ints_at(word(buffer, 3)), (size(buffer, 0),))


@njit(nogil=True, inline="always")
def floats(buffer):
    """A buffer of float32 [n]."""
    return carray(_floats_at(word(buffer, 3)), (size(buffer, 0),))


@njit(nogil=True, inline="always")
def matrix(buffer):
    """A buffer of float32 with two dims."""
    return carray(_floats_at(word(buffer, 3)), (size(buffer, 0), size(buffer, 1)))


@njit(nogil=True, inline="always")
def int_matrix(buffer):
    """A buffer of int32 with two dims."""
    return carray(_ints_at(word(buffer, 3)), (size(buffer, 0), size(buffer, 1)))


@njit(nogil=True, inline="always")
def cube(buffer):
    """A buffer of float32 with three dims."""
    return carray(_floats_at(word(buffer, 3)), (size(buffer, 0), size(buffer, 1), size(buffer, 2)))


@functools.cache
def version() -> int:
    """Version of the interface as one word: minor in the upper half, major in the lower.

    Handlers have it, and whether they are threaded, as variables of their closure: numba's cache on
    disk knows a function's text and its closure's variables, but not its globals.
    """
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()

    def part(name: str) -> int:
        match = re.search(rf"#define XLA_FFI_API_{name}\s+(\d+)", header)
        assert match is not None, f"{header[:40]!r} has no XLA_FFI_API_{name}"
        return int(match[1])

    return part("MINOR") << 32 | part("MAJOR")


@njit(nogil=True, inline="always")
def answers_metadata(frame, version):
    """Answers a call that asks for metadata; whether it was one."""
    extension = word(frame, 1)
    if extension == 0 or (word(extension, 1) & 0xFFFFFFFF) != 1:
        return False
    carray(words_at(word(extension, 3)), (4,))[3] = version
    return True


@njit(nogil=True, inline="always")
def parts_of(frame, threaded):
    """Parts that a kernel runs over: argument 0, the number of threads."""
    return np.int64(ints(argument(frame, 0))[0]) if threaded else np.int64(1)


@njit(nogil=True, inline="always")
def row_of(offsets, work):
    """The first row with at least `work` units before it: one unit per edge and one per row."""
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
    """(first row, row after the last) of a part; parts have equal sums of edges and rows."""
    rows = len(offsets) - 1
    work = np.int64(offsets[rows]) + rows
    first = row_of(offsets, work * part // parts) if part else 0
    return first, row_of(offsets, work * (part + 1) // parts) if part + 1 < parts else rows


@functools.cache
def threads() -> int:
    """Number of threads of one device's kernels: its share of the cores.

    1 where numba has no threading layer that several devices can enter.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    share = max(1, cores // max(1, jax.local_device_count()))
    if share == 1 or not _threadsafe():
        return 1
    return min(share, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


def thread_argument() -> np.ndarray:
    """int32 [1]: the number of threads, as kernels take it."""
    return np.array([threads()], np.int32)


def _threadsafe() -> bool:
    """Makes numba choose a threading layer that several threads can enter; whether there is one.

    A layer that was chosen before stays.
    """
    numba.config.THREADING_LAYER = "threadsafe"  # type: ignore[attr-defined]
    try:
        numba.get_num_threads()  # starts the threads
        return numba.threading_layer() in ("omp", "tbb")  # type: ignore[attr-defined]
    except ValueError:
        return False


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_registered: list[Any] = []
"""Handlers that XLA may call, for the life of the process."""


def register(handlers: Callable[[int, bool], dict[str, Any]]) -> None:
    """Makes `jax.ffi.ffi_call(name, ...)` call each of `handlers(version, threaded)`.

    A function takes the frame's address and returns 0. It is compiled here or read from numba's
    cache. Its `prange` over `parts_of(frame, threaded)` is a plain loop unless threaded: reading
    parallel code ends the process where numba has no threads to run it.
    """
    threaded = threads() > 1
    for name, function in handlers(version(), threaded).items():
        compiled = cfunc(types.int64(types.int64), cache=True, parallel=threaded)
        register_handler(name, compiled(function))


def register_handler(name: str, handler: Any) -> None:
    """Makes `jax.ffi.ffi_call(name, ...)` call a compiled handler."""
    _registered.append(handler)
    capsule = _new_capsule(handler.address, None, None)
    jax.ffi.register_ffi_target(name, capsule, platform="cpu")


ANNOUNCED_AFTER = 2.0
"""Time after which a user is told about a compilation, seconds."""


@contextmanager
def _announced(sentence: str) -> Iterator[None]:
    """Inside, a sentence is printed to the standard error if it takes longer."""
    timer = threading.Timer(ANNOUNCED_AFTER, print, [f"partita: {sentence}"], {"file": sys.stderr})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_is_symbolic: ContextVar[bool] = ContextVar("is_symbolic", default=False)


@contextmanager
def symbolic() -> Iterator[None]:
    """Inside, steps are traced to be priced, not to run: with calls of all kernels over edges."""
    token = _is_symbolic.set(True)
    try:
        yield
    finally:
        _is_symbolic.reset(token)


def is_symbolic() -> bool:
    """Whether steps are traced to be priced."""
    return _is_symbolic.get()


def kernel(name: str, results: Any) -> Callable[..., Any]:
    """The call of a registered handler.

    Handlers take no batches: a `vmap` of one's own calls them once for each entry. Steps to be
    priced have all parts of a graph in dim 0 of all arrays.
    """
    method = "broadcast_all" if is_symbolic() else "sequential"
    return jax.ffi.ffi_call(name, results, vmap_method=method)


def works(self_test: Callable[[], None], name: str) -> bool:
    """Whether a kernel can be used here: `self_test` registers and tries it. Warns once."""
    return is_symbolic() or _passes(self_test, name)


@functools.cache
def _passes(self_test: Callable[[], None], name: str) -> bool:
    if jax.default_backend() != "cpu":
        return False
    try:
        with _announced(f"compiling the {name} kernel for this processor, once"):
            self_test()
        return True
    except Exception as error:  # any failure: the result can be computed without the kernel
        warnings.warn(
            f"The {name} kernel failed its self-test ({type(error).__name__}: {error}): XLA's own "
            "operations, which are slower, replace it.",
            stacklevel=2,
        )
        return False


@functools.cache
def step_options() -> dict[str, Any]:
    """Compiler options of a step.

    On a CPU, XLA may give a product and everything around it to a library as one operation. It then
    writes every number that is spread over rows as a table: twice the memory of a step and 1.5
    times the time (jaxlib 0.10.2, two layers of 16 features). These options prevent that.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options)()
    except jax.errors.JaxRuntimeError:  # another backend, or another version
        return {}
    return options

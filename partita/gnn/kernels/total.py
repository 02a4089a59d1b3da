"""Sums over in-edges, Y = A X, and A^T dY for their gradient: the heart of a graph layer.

    out[v] = factor[v] * (share[v] * x[v] + sum over edges e into v of weight[e] * x[source[e]])          (1, 0 and 1 where there are none)

A row of the result is summed in vector registers over its edges while rows further ahead are fetched, so what remains is the memory's
speed; the vertex's own row and the factor are added there too, since each pass over a table costs as much as a tenth of a sum. Rows wider than the registers are summed in blocks of columns; what is left over at the end is a block that overlaps the one before.
`order` says where an edge's weight is: the transpose has its edges in an order of its own. Where the kernel is not, on an accelerator or where its
self-test fails, the fastest of JAX's own ways takes its place.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCSR
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from partita.execute import processes
from partita.gnn.kernels import bridge
from partita.gnn.kernels.bridge import (
    ARGUMENTS,
    FLOAT,
    LONG,
    RESULTS,
    asked,
    buffer,
    floats,
    ints,
    matrix,
    rows_of,
    spread,
    switch,
)

AHEAD = 12
"""Edges ahead of the one that is added at which rows are fetched."""


BLOCKS = {128: (8, 16), 64: (4, 16), 16: (1, 16), 8: (1, 8), 4: (1, 4)}
"""Columns that are summed at a time, in how many registers of how many numbers."""


@intrinsic
def _add(
    typing,
    columns,
    weighted,
    x,
    ids,
    weights,
    order,
    own,
    out,
    first,
    stop,
    last,
    row_bytes,
    column,
    share,
    factor,
):  # type: ignore[no-untyped-def]
    """One row of the result, from `column` on, `columns` (one of `BLOCKS`) of it. All but share and factor are int64: addresses, edges, bytes."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        columns, weighted, *rest = arguments
        ways = {(width, heavy): 2 * width + heavy for width in BLOCKS for heavy in (0, 1)}
        key = builder.add(builder.mul(columns, ir.Constant(LONG, 2)), weighted)
        switch(
            builder,
            key,
            {
                n: partial(_block, builder, *BLOCKS[width], bool(heavy), *rest)
                for (width, heavy), n in ways.items()
            },
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 13, types.float32, types.float32), generate


def _block(
    b,
    vectors,
    width,
    weighted,
    x,
    ids,
    weights,
    order,
    own,
    out,
    first,
    stop,
    last,
    row_bytes,
    column,
    share,
    factor,
):  # type: ignore[no-untyped-def]
    """Code that sums `vectors` times `width` columns in registers: factor x (share x the row at `own` + the edges' sum), without `own` if share is 0."""
    int32, vector = ir.IntType(32), ir.VectorType(FLOAT, width)
    number = lambda value: ir.Constant(LONG, value)
    at = lambda base, index, kind: b.load(
        b.inttoptr(b.add(base, b.mul(index, number(4))), kind.as_pointer()), align=4
    )
    register = lambda base, j: b.inttoptr(b.add(base, number(j * width * 4)), vector.as_pointer())
    begin, mine, edges, done = (
        b.append_basic_block(what) for what in ("begin", "own", "edges", "done")
    )
    entry, zero = b.block, ir.Constant(vector, None)
    x, own, out = (b.add(base, b.mul(column, number(4))) for base in (x, own, out))

    def met(*ways):  # type: ignore[no-untyped-def]
        """A value for every register, of those with which each block comes here."""
        phis = [b.phi(vector) for _ in range(vectors)]
        for values, block in ways:
            for phi, value in zip(phis, values, strict=True):
                phi.add_incoming(value, block)
        return phis

    b.cbranch(b.fcmp_unordered("!=", share, ir.Constant(FLOAT, 0.0)), mine, begin)
    b.position_at_end(mine)
    shares = [
        b.fmul(b.load(register(own, j), align=4), spread(b, share, width)) for j in range(vectors)
    ]
    b.branch(begin)
    b.position_at_end(begin)
    start = met(([zero] * vectors, entry), (shares, mine))
    b.cbranch(b.icmp_signed("<", first, stop), edges, done)
    b.position_at_end(edges)
    edge = b.phi(LONG)
    sums = met((start, begin))
    row = lambda e: b.add(x, b.mul(b.sext(at(ids, e, int32), LONG), row_bytes))
    ahead = b.add(edge, number(AHEAD))
    _fetch(b, row(b.select(b.icmp_signed("<", ahead, last), ahead, last)), vectors * width * 4)
    here, new = row(edge), []
    weight = (
        spread(b, at(weights, b.sext(at(order, edge, int32), LONG), FLOAT), width)
        if weighted
        else None
    )
    for j, total in enumerate(sums):
        value = b.load(register(here, j), align=4)
        if weight is not None:
            value = b.fmul(value, weight, flags=("contract",))
        new.append(b.fadd(total, value, flags=("contract",)))
        total.add_incoming(new[-1], edges)
    after = b.add(edge, number(1))
    edge.add_incoming(first, begin)
    edge.add_incoming(after, edges)
    b.cbranch(b.icmp_signed("<", after, stop), edges, done)
    b.position_at_end(done)
    for j, total in enumerate(met((start, begin), (new, edges))):
        b.store(b.fmul(total, spread(b, factor, width)), register(out, j), align=4)


def _fetch(b, address, size):  # type: ignore[no-untyped-def]
    """Code that fetches so many bytes into the nearest cache, to be read."""
    int32, pointer, name = ir.IntType(32), ir.IntType(8).as_pointer(), "llvm.prefetch.p0"
    fetch = b.module.globals.get(name) or ir.Function(
        b.module, ir.FunctionType(ir.VoidType(), [pointer, int32, int32, int32]), name
    )
    for q in range(0, size, 64):
        b.call(
            fetch,
            [
                b.inttoptr(b.add(address, ir.Constant(LONG, q)), pointer),
                *(ir.Constant(int32, n) for n in (0, 3, 1)),
            ],
        )


@njit(nogil=True, boundscheck=False, cache=True)
def sum_rows(first, stop, offsets, ids, weights, order, share, factor, x, out):
    """Rows from `first` to before `stop` of `total`; what is absent is empty."""
    last, columns = np.int64(offsets[len(offsets) - 1]) - 1, x.shape[1]
    xp, ip, op, row = (
        np.int64(x.ctypes.data),
        np.int64(ids.ctypes.data),
        np.int64(out.ctypes.data),
        np.int64(4 * columns),
    )
    wp, rp = np.int64(weights.ctypes.data), np.int64(order.ctypes.data)
    weighted, one, none = np.int64(len(order) > 0), np.float32(1), np.float32(0)
    for v in range(first, stop):
        e0, e1, c = np.int64(offsets[v]), np.int64(offsets[v + 1]), 0
        s, f = share[v] if len(share) else none, factor[v] if len(factor) else one
        if columns < 4:
            for q in range(columns):
                total = s * x[v, q] if s != 0 else none
                for e in range(e0, e1):
                    total += weights[order[e]] * x[ids[e], q] if weighted else x[ids[e], q]
                out[v, q] = f * total
            continue
        while c < columns:
            left = columns - c
            step = np.int64(
                128
                if left >= 128
                else 64
                if left >= 64
                else 16
                if columns >= 16
                else 8
                if columns >= 8
                else 4
            )
            at = np.int64(min(c, columns - step))  # the last block overlaps the one before
            _add(
                step,
                weighted,
                xp,
                ip,
                wp,
                rp,
                xp + v * row,
                op + v * row,
                e0,
                e1,
                last,
                row,
                at,
                s,
                f,
            )  # type: ignore[reportCallIssue]
            c += step


@njit(nogil=True, boundscheck=False, cache=True)
def sum_range(first, stop, offsets, ids, x, out):
    """Writes the plain sums over the edges of rows `first` to before `stop` to `out`, on one core."""
    no_floats, no_ids = np.zeros(0, np.float32), np.zeros(0, np.int32)
    sum_rows(first, stop, offsets, ids, no_floats, no_ids, no_floats, no_floats, x, out)


@njit(nogil=True, parallel=True, cache=True)
def _sum_threads(threads, offsets, ids, weights, order, share, factor, x, out):
    for part in prange(threads):
        first, stop = rows_of(offsets, part, threads)
        sum_rows(first, stop, offsets, ids, weights, order, share, factor, x, out)


@njit(nogil=True, inline="always")
def _arguments(frame):
    """Arguments: threads int32 [1], offsets, ids, weights, order, share, factor, x; result [rows, columns]."""
    threads, offsets, ids = (
        ints(buffer(frame, ARGUMENTS, 0)),
        ints(buffer(frame, ARGUMENTS, 1)),
        ints(buffer(frame, ARGUMENTS, 2)),
    )
    weights, order = floats(buffer(frame, ARGUMENTS, 3)), ints(buffer(frame, ARGUMENTS, 4))
    share, factor = floats(buffer(frame, ARGUMENTS, 5)), floats(buffer(frame, ARGUMENTS, 6))
    return (
        threads[0],
        offsets,
        ids,
        weights,
        order,
        share,
        factor,
        matrix(buffer(frame, ARGUMENTS, 7)),
        matrix(buffer(frame, RESULTS, 0)),
    )


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    def alone(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, weights, order, share, factor, x, out = _arguments(frame)
            sum_rows(0, len(offsets) - 1, offsets, ids, weights, order, share, factor, x, out)
        return 0

    def several(frame):  # type: ignore[no-untyped-def]
        if not asked(frame, version):
            threads, offsets, ids, weights, order, share, factor, x, out = _arguments(frame)
            _sum_threads(threads, offsets, ids, weights, order, share, factor, x, out)
        return 0

    return {"partita_gnn_sum": several if threaded else alone}


def _try() -> None:
    """Registers the kernel and sums a small graph by it: AssertionError where a sum is wrong."""
    bridge.register(_handlers(bridge.version(), bridge.threads() > 1))
    offsets, ids, order = (
        np.array([0, 2, 2, 5], np.int32),
        np.array([1, 2, 0, 0, 1], np.int32),
        np.arange(5, dtype=np.int32)[::-1].copy(),
    )
    weights, share, factor = (
        np.arange(5, dtype=np.float32),
        np.array([0, 2, 3], np.float32),
        np.array([1, 0.5, 2], np.float32),
    )
    for columns in (1, 7, 21):
        x = np.arange(3 * columns, dtype=np.float32).reshape(3, columns)
        dense = np.array([[0, 1, 1], [0, 0, 0], [2, 1, 0]], np.float32)
        heavy = np.array([[0, 4, 3], [0, 0, 0], [3, 0, 0]], np.float32)
        with jax.ensure_compile_time_eval():
            assert np.allclose(_call(offsets, ids, x), dense @ x), "a sum is wrong"
            assert np.allclose(_call(offsets, ids, x, weights, order), heavy @ x), (
                "a weighted sum is wrong"
            )
            scaled = (dense @ x + share[:, None] * x) * factor[:, None]
            assert np.allclose(_call(offsets, ids, x, share=share, factor=factor), scaled), (
                "a scaled sum is wrong"
            )


def _call(
    offsets: Any,
    ids: Any,
    x: Any,
    weights: Any = None,
    order: Any = None,
    share: Any = None,
    factor: Any = None,
) -> Any:
    result = jax.ShapeDtypeStruct((offsets.shape[0] - 1, x.shape[1]), jnp.float32)
    no, number = np.zeros(0, np.float32), np.zeros(0, np.int32)
    given = (v if v is not None else no for v in (share, factor))
    pair = (no, number) if weights is None else (weights, order)
    return jax.ffi.ffi_call("partita_gnn_sum", result)(
        np.array([bridge.threads()], np.int32), offsets, ids, *pair, *given, x
    )


def total(
    offsets: Any,
    ids: Any,
    x: Any,
    weights: Any = None,
    order: Any = None,
    share: Any = None,
    factor: Any = None,
) -> Any:
    """float32 [rows, columns]: factor[v] x (share[v] x x[v] + the sum of x over the edges of row v); one direction, without a gradient of its own.

    offsets int32 [rows + 1], ids int32 [edges] into x [vertices, columns]; edge e weighs `weights[order[e]]`, or `weights[e]` without order. share and
    factor float32 [rows] are 0 and 1 where they are None; with a share, row v is of vertex v.
    """
    if bridge.works(_try, "sum"):
        if weights is not None and order is None:
            order = jnp.arange(ids.shape[0], dtype=jnp.int32)
        return _call(offsets, ids, x, weights, order, share, factor)
    if weights is not None and order is not None:
        weights = jnp.asarray(weights)[order]
    found = WAYS[fastest()](offsets, ids, x, weights)
    if share is not None:
        found = found + share[:, None] * x[: found.shape[0]]
    return found if factor is None else found * factor[:, None]


def _by_library(offsets: Any, ids: Any, x: Any, weights: Any) -> Any:
    """By jaxlib's product of a sparse matrix by rows: a kernel of its own on a CPU, cuSPARSE's on a GPU."""
    values = jnp.ones(ids.shape[0], x.dtype) if weights is None else weights
    return (
        BCSR(
            (values, jnp.asarray(ids), jnp.asarray(offsets)),
            shape=(offsets.shape[0] - 1, x.shape[0]),
        )
        @ x
    )


def _by_segments(offsets: Any, ids: Any, x: Any, weights: Any) -> Any:
    """By gathering a row for every edge, and XLA's scatter."""
    rows = x[ids] if weights is None else x[ids] * jnp.asarray(weights)[:, None]
    return jax.ops.segment_sum(
        rows, targets(offsets, ids.shape[0]), offsets.shape[0] - 1, indices_are_sorted=True
    )


WAYS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "library": _by_library,
    "segments": _by_segments,
}
"""Sums by what JAX has, for where the compiled kernel is not: on an accelerator, or where it does not work."""

TRIED = (2**13, 2**17, 64)
"""Vertices, edges and features of the graph that they are tried on."""


@functools.cache
def fastest() -> str:
    """The fastest of `WAYS` here that is right, by the second of two runs; of several processes all take what the first one found."""

    def tried() -> str:
        rows, edges, columns = TRIED
        random = np.random.default_rng(0)
        degrees = np.bincount(random.integers(0, rows, edges) ** 2 // rows, minlength=rows)
        offsets = np.append(0, np.cumsum(degrees)).astype(np.int32)
        ids, x = (
            random.integers(0, rows, edges + 8).astype(np.int32),
            random.standard_normal((rows, columns), np.float32),
        )  # 8 of padding
        sample = np.flatnonzero(degrees)[:: rows // 64]
        expected = np.stack([x[ids[offsets[v] : offsets[v + 1]]].sum(axis=0) for v in sample])
        seconds = {}
        with jax.ensure_compile_time_eval():
            for name, way in WAYS.items():
                program = jax.jit(lambda offsets, ids, x, way=way: way(offsets, ids, x, None))
                given = jax.device_put((offsets, ids, x))
                try:
                    right = np.allclose(
                        np.asarray(program(*given))[sample], expected, rtol=1e-3, atol=1e-3
                    )
                    began = time.perf_counter()
                    jax.block_until_ready(program(*given))
                    seconds[name] = time.perf_counter() - began if right else math.inf
                except Exception:  # whatever it is, another may do
                    seconds[name] = math.inf
        return min(seconds, key=lambda name: seconds[name])

    jax.config.update("jax_bcoo_cusparse_lowering", True)  # or a GPU would do as _by_segments does
    return processes.from_first("kernel", tried)


def targets(offsets: Any, edges: int) -> Any:
    """int32 [edges]: the row of every edge; beyond the last edge of the offsets, the number of rows."""
    return jnp.searchsorted(offsets[1:], jnp.arange(edges, dtype=jnp.int32), side="right").astype(
        jnp.int32
    )

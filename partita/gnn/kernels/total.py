"""Sums over in-edges, Y = A X, and A^T dY for their gradient: the heart of a graph layer.

    out[v] = factor[v] * (share[v] * x[v] + sum over edges e into v of weight[e] * x[source[e]])

Without factor, share or weights they count 1, 0 and 1. A row of the result is summed in vector
registers over its edges while rows further ahead are fetched, so the memory's speed is the limit.
The vertex's own row and the factor are added in the same pass, since a pass over a table costs a
tenth of a sum. Rows wider than the registers are summed in blocks of columns; the last block
overlaps the one before. `order` is the position of an edge's weight: the transpose has its edges in
an order of its own. On an accelerator, or where the kernel fails its self-test, the fastest of
JAX's own operations replaces it.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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
    answers_metadata,
    argument,
    floats,
    ints,
    matrix,
    parts_of,
    result,
    rows_of,
)
from partita.gnn.kernels.codegen import (
    FLOAT,
    INT,
    LONG,
    load_element,
    number,
    prefetch,
    spread,
    switch,
    unpack,
    vector_pointer,
)

AHEAD = 12
"""Edges between the one that is added and the one whose row is fetched."""


class Registers(NamedTuple):
    """Registers that hold a block of a row: `vectors` registers of `width` float32 each."""

    vectors: int
    width: int


BLOCKS = {
    128: Registers(8, 16),
    64: Registers(4, 16),
    16: Registers(1, 16),
    8: Registers(1, 8),
    4: Registers(1, 4),
}
"""Registers by the number of columns that are summed at a time."""


class SumEdges(NamedTuple):
    """Edges of a sum.

    offsets     int32 [rows + 1]
    ids         int32 [edges]
    weights     float32 [edges], or empty
    order       int32 [edges], positions in `weights`; empty without weights
    """

    offsets: Any
    ids: Any
    weights: Any
    order: Any


class RowScale(NamedTuple):
    """Factors of rows, float32 [rows] or empty: of the vertex's own row, and of the result."""

    share: Any
    factor: Any


class RowSum(NamedTuple):
    """One block of one row, all int64: addresses of arrays, edges, bytes of a row, first column."""

    x: Any
    ids: Any
    weights: Any
    order: Any
    own: Any
    out: Any
    first: Any
    stop: Any
    last: Any
    row_bytes: Any
    column: Any


@intrinsic
def _sum_block(
    typing,
    columns,
    weighted,
    row,
    share,
    factor,
):  # type: ignore[no-untyped-def]
    """Sums `columns` columns, one of `BLOCKS`, of a `RowSum` and writes them to its `out`."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        columns, weighted, row, share, factor = arguments
        row = unpack(builder, signature.args[2], row)
        key = builder.add(builder.mul(columns, ir.Constant(LONG, 2)), weighted)
        cases = {}
        for width, registers in BLOCKS.items():
            code = partial(
                _generate_sum,
                builder,
                registers,
                row,
                share,
                factor,
            )
            cases[2 * width] = partial(code, weighted=False)
            cases[2 * width + 1] = partial(code, weighted=True)
        switch(builder, key, cases)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, row, types.float32, types.float32), generate


def _generate_sum(
    b,
    registers,
    row,
    share,
    factor,
    weighted,
):  # type: ignore[no-untyped-def]
    """Code of factor * (share * own row + sum over the edges); reads no own row if share is 0."""
    vectors, width = registers
    vector = ir.VectorType(FLOAT, width)
    column_bytes = b.mul(row.column, number(4))
    x = b.add(row.x, column_bytes)
    own_row = b.add(row.own, column_bytes)
    out = b.add(row.out, column_bytes)
    entry = b.block
    own_block = b.append_basic_block("own")
    begin = b.append_basic_block("begin")
    edges = b.append_basic_block("edges")
    done = b.append_basic_block("done")
    b.cbranch(b.fcmp_unordered("!=", share, ir.Constant(FLOAT, 0.0)), own_block, begin)

    b.position_at_end(own_block)
    own_sums = []
    for j in range(vectors):
        own_values = b.load(vector_pointer(b, own_row, j, vector), align=4)
        own_sums.append(b.fmul(own_values, spread(b, share, width)))
    b.branch(begin)

    b.position_at_end(begin)
    zeros = [ir.Constant(vector, None)] * vectors
    start = _merge(b, vector, (zeros, entry), (own_sums, own_block))
    b.cbranch(b.icmp_signed("<", row.first, row.stop), edges, done)

    b.position_at_end(edges)
    edge = b.phi(LONG)
    sums = _merge(b, vector, (start, begin))
    ahead = b.add(edge, number(AHEAD))
    ahead = b.select(b.icmp_signed("<", ahead, row.last), ahead, row.last)
    prefetch(b, _source_row(b, x, row, ahead), vectors * width * 4)
    source = _source_row(b, x, row, edge)
    weight = spread(b, _edge_weight(b, row, edge), width) if weighted else None
    next_sums = []
    for j, total in enumerate(sums):
        value = b.load(vector_pointer(b, source, j, vector), align=4)
        if weight is not None:
            value = b.fmul(value, weight, flags=("contract",))
        next_sums.append(b.fadd(total, value, flags=("contract",)))
        total.add_incoming(next_sums[-1], edges)
    next_edge = b.add(edge, number(1))
    edge.add_incoming(row.first, begin)
    edge.add_incoming(next_edge, edges)
    b.cbranch(b.icmp_signed("<", next_edge, row.stop), edges, done)

    b.position_at_end(done)
    totals = _merge(b, vector, (start, begin), (next_sums, edges))
    for j, total in enumerate(totals):
        scaled = b.fmul(total, spread(b, factor, width))
        b.store(scaled, vector_pointer(b, out, j, vector), align=4)


def _merge(b, vector, *branches):  # type: ignore[no-untyped-def]
    """One value per register, of the (values, block) that execution came from."""
    phis = [b.phi(vector) for _ in branches[0][0]]
    for values, block in branches:
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)
    return phis


def _source_row(b, x, row, edge):  # type: ignore[no-untyped-def]
    """Address of the row of x from which an edge comes."""
    vertex = b.sext(load_element(b, row.ids, edge, INT), LONG)
    return b.add(x, b.mul(vertex, row.row_bytes))


def _edge_weight(b, row, edge):  # type: ignore[no-untyped-def]
    position = b.sext(load_element(b, row.order, edge, INT), LONG)
    return load_element(b, row.weights, position, FLOAT)


@njit(nogil=True)
def _block_columns(columns, remaining):
    """Number of columns, one of `BLOCKS`, to sum next of rows of `columns`."""
    if remaining >= 128:
        return np.int64(128)
    if remaining >= 64:
        return np.int64(64)
    if columns >= 16:
        return np.int64(16)
    if columns >= 8:
        return np.int64(8)
    return np.int64(4)


@njit(nogil=True, boundscheck=False, cache=True)
def sum_rows(span, edges, scale, x, out):
    """Rows from the first to before the second of a span, of SumEdges and a RowScale."""
    first, stop = span
    offsets, ids, weights, order = edges
    last = np.int64(offsets[len(offsets) - 1]) - 1
    columns = x.shape[1]
    row_bytes = np.int64(4 * columns)
    x_address = np.int64(x.ctypes.data)
    out_address = np.int64(out.ctypes.data)
    ids_address = np.int64(ids.ctypes.data)
    weights_address = np.int64(weights.ctypes.data)
    order_address = np.int64(order.ctypes.data)
    weighted = np.int64(len(order) > 0)
    for v in range(first, stop):
        e0 = np.int64(offsets[v])
        e1 = np.int64(offsets[v + 1])
        share = scale.share[v] if len(scale.share) else np.float32(0)
        factor = scale.factor[v] if len(scale.factor) else np.float32(1)
        if columns < 4:
            for q in range(columns):
                total = share * x[v, q] if share != 0 else np.float32(0)
                for e in range(e0, e1):
                    total += weights[order[e]] * x[ids[e], q] if weighted else x[ids[e], q]
                out[v, q] = factor * total
            continue
        c = 0
        while c < columns:
            step = _block_columns(columns, columns - c)
            column = np.int64(min(c, columns - step))  # the last block overlaps the one before
            row = RowSum(
                x_address,
                ids_address,
                weights_address,
                order_address,
                x_address + v * row_bytes,
                out_address + v * row_bytes,
                e0,
                e1,
                last,
                row_bytes,
                column,
            )
            _sum_block(step, weighted, row, share, factor)  # type: ignore[reportCallIssue]
            c += step


@njit(nogil=True, boundscheck=False, cache=True)
def sum_range(span, offsets, ids, x, out):
    """Writes plain sums over the edges of a span of rows to `out`, on one core."""
    no_floats = np.zeros(0, np.float32)
    edges = SumEdges(offsets, ids, no_floats, np.zeros(0, np.int32))
    sum_rows(span, edges, RowScale(no_floats, no_floats), x, out)


@njit(nogil=True, inline="always")
def _edges(frame):
    """Arguments 1 to 4: offsets, ids, weights, order."""
    return SumEdges(
        ints(argument(frame, 1)),
        ints(argument(frame, 2)),
        floats(argument(frame, 3)),
        ints(argument(frame, 4)),
    )


@njit(nogil=True, inline="always")
def _scale(frame):
    """Arguments 5 and 6: share, factor."""
    return RowScale(floats(argument(frame, 5)), floats(argument(frame, 6)))


def _handlers(version: int, threaded: bool) -> dict[str, Any]:
    """Arguments: threads int32 [1], those of `_edges` and `_scale`, x; result [rows, columns]."""

    def sums(frame):  # type: ignore[no-untyped-def]
        if not answers_metadata(frame, version):
            edges, scale = _edges(frame), _scale(frame)
            x, out = matrix(argument(frame, 7)), matrix(result(frame, 0))
            parts = parts_of(frame, threaded)
            for part in prange(parts):
                sum_rows(rows_of(edges.offsets, part, parts), edges, scale, x, out)
        return 0

    return {"partita_gnn_sum": sums}


def _self_test() -> None:
    """Registers the kernel and sums a small graph by it; AssertionError for a wrong sum."""
    bridge.register(_handlers)
    offsets = np.array([0, 2, 2, 5], np.int32)
    ids = np.array([1, 2, 0, 0, 1], np.int32)
    order = np.arange(5, dtype=np.int32)[::-1].copy()
    weights = np.arange(5, dtype=np.float32)
    share = np.array([0, 2, 3], np.float32)
    factor = np.array([1, 0.5, 2], np.float32)
    dense = np.array([[0, 1, 1], [0, 0, 0], [2, 1, 0]], np.float32)
    weighted = np.array([[0, 4, 3], [0, 0, 0], [3, 0, 0]], np.float32)
    tables = [np.arange(3 * n, dtype=np.float32).reshape(3, n) for n in (1, 7, 21)]

    def sums(x: Any) -> Any:
        plain_sum = _call(offsets, ids, x)
        weighted_sum = _call(offsets, ids, x, weights, order)
        return plain_sum, weighted_sum, _call(offsets, ids, x, share=share, factor=factor)

    with jax.ensure_compile_time_eval():
        results = jax.jit(lambda tables: [sums(x) for x in tables])(tables)
    for x, (plain_sum, weighted_sum, scaled_sum) in zip(tables, results, strict=True):
        assert np.allclose(plain_sum, dense @ x), "a sum is wrong"
        assert np.allclose(weighted_sum, weighted @ x), "a weighted sum is wrong"
        expected = (dense @ x + share[:, None] * x) * factor[:, None]
        assert np.allclose(scaled_sum, expected), "a scaled sum is wrong"


def _call(
    offsets: Any,
    ids: Any,
    x: Any,
    weights: Any = None,
    order: Any = None,
    share: Any = None,
    factor: Any = None,
) -> Any:
    shape = jax.ShapeDtypeStruct((offsets.shape[0] - 1, x.shape[1]), jnp.float32)
    no_floats = np.zeros(0, np.float32)
    if weights is None:
        weights, order = no_floats, np.zeros(0, np.int32)
    share = no_floats if share is None else share
    factor = no_floats if factor is None else factor
    return bridge.kernel("partita_gnn_sum", shape)(
        bridge.thread_argument(),
        offsets,
        ids,
        weights,
        order,
        share,
        factor,
        x,
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
    """float32 [rows, columns]: factor[v] * (share[v] * x[v] + sum of x over the edges of row v).

    One direction, without a gradient of its own. offsets int32 [rows + 1]; ids int32 [edges] into x
    [vertices, columns]. Edge e has the weight `weights[order[e]]`, or `weights[e]` without order.
    share and factor, float32 [rows], default to 0 and 1; with a share, row v belongs to vertex v.
    """
    if bridge.works(_self_test, "sum"):
        if weights is not None and order is None:
            order = jnp.arange(ids.shape[0], dtype=jnp.int32)
        return _call(
            offsets,
            ids,
            x,
            weights,
            order,
            share,
            factor,
        )
    if weights is not None and order is not None:
        weights = jnp.asarray(weights)[order]
    sums = FALLBACKS[fastest()](offsets, ids, x, weights)
    if share is not None:
        sums = sums + share[:, None] * x[: sums.shape[0]]
    return sums if factor is None else sums * factor[:, None]


def _by_library(offsets: Any, ids: Any, x: Any, weights: Any) -> Any:
    """By jaxlib's sparse product by rows: its own kernel on a CPU, cuSPARSE on a GPU."""
    values = jnp.ones(ids.shape[0], x.dtype) if weights is None else weights
    arrays = (values, jnp.asarray(ids), jnp.asarray(offsets))
    return BCSR(arrays, shape=(offsets.shape[0] - 1, x.shape[0])) @ x


def _by_segments(offsets: Any, ids: Any, x: Any, weights: Any) -> Any:
    """By gathering a row for every edge, and XLA's scatter."""
    rows = x[ids] if weights is None else x[ids] * jnp.asarray(weights)[:, None]
    return jax.ops.segment_sum(
        rows,
        targets(offsets, ids.shape[0]),
        offsets.shape[0] - 1,
        indices_are_sorted=True,
    )


FALLBACKS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "library": _by_library,
    "segments": _by_segments,
}
"""Sums by JAX's own operations: for accelerators, and where the compiled kernel does not work."""

TEST_VERTICES = 2**13
TEST_EDGES = 2**17
TEST_FEATURES = 64
"""Size of the graph on which the fallbacks are timed."""


@functools.cache
def fastest() -> str:
    """Name of the fastest correct one of `FALLBACKS` here, by the second of two runs.

    Of several processes, all use the choice of the first one.
    """
    # without this a GPU would sum as _by_segments does
    jax.config.update("jax_bcoo_cusparse_lowering", True)
    return processes.from_first("kernel", _time_fallbacks)


def _unweighted(fallback: Callable[[Any, Any, Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """A fallback as a function of offsets, ids and x."""

    def sums(offsets: Any, ids: Any, x: Any) -> Any:
        return fallback(offsets, ids, x, None)

    return sums


def _time_fallbacks() -> str:
    random = np.random.default_rng(0)
    skewed_rows = random.integers(0, TEST_VERTICES, TEST_EDGES) ** 2 // TEST_VERTICES
    degrees = np.bincount(skewed_rows, minlength=TEST_VERTICES)
    offsets = np.append(0, np.cumsum(degrees)).astype(np.int32)
    padded_edges = TEST_EDGES + 8
    ids = random.integers(0, TEST_VERTICES, padded_edges).astype(np.int32)
    x = random.standard_normal((TEST_VERTICES, TEST_FEATURES), np.float32)
    sample = np.flatnonzero(degrees)[:: TEST_VERTICES // 64]
    expected = np.stack([x[ids[offsets[v] : offsets[v + 1]]].sum(axis=0) for v in sample])
    seconds = {}
    with jax.ensure_compile_time_eval():
        arguments = jax.device_put((offsets, ids, x))
        for name, fallback in FALLBACKS.items():
            program = jax.jit(_unweighted(fallback))
            try:
                sums = np.asarray(program(*arguments))[sample]
                correct = np.allclose(sums, expected, rtol=1e-3, atol=1e-3)
                began = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                seconds[name] = time.perf_counter() - began if correct else math.inf
            except Exception:  # any failure: another fallback may work
                seconds[name] = math.inf
    return min(seconds, key=lambda name: seconds[name])


def targets(offsets: Any, edges: int) -> Any:
    """int32 [edges]: the row of every edge; the number of rows for padding behind the last one."""
    positions = jnp.arange(edges, dtype=jnp.int32)
    return jnp.searchsorted(offsets[1:], positions, side="right").astype(jnp.int32)

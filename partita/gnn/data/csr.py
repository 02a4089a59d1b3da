"""Compressed sparse rows (CSR): edges by one end as arrays, and the compiled loops over them.

The ids of row r are `ids[offsets[r]:offsets[r + 1]]`. Everything here takes and returns plain
arrays: number types, the counting sort that gathers edges by row, the transpose, and copies of rows
that the methods of `Graph` need. Each loop reads every edge once, on one core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit

NARROW = 2**31
"""Largest number of vertices with int32 ids, and of edges with int32 positions. Beyond: int64."""


def position_type(edges: int) -> type[np.signedinteger[Any]]:
    """The number type of edge positions in a graph of `edges` edges."""
    return np.int32 if edges <= NARROW else np.int64


def id_type(vertices: int) -> type[np.signedinteger[Any]]:
    """The number type of vertex ids in a graph of `vertices` vertices."""
    return np.int32 if vertices <= NARROW else np.int64


@dataclass(frozen=True, eq=False)
class Transposed:
    """A graph by source: vertex v sends to `destinations[offsets[v]:offsets[v + 1]]`.

    `order[k]` is the position of edge k in the graph's `sources`, so `weights[order]` are the
    weights in the order of `destinations`. None where the caller did not ask for it.
    """

    offsets: np.ndarray
    destinations: np.ndarray
    order: np.ndarray | None


def aligned(count: int, kind: Any) -> np.ndarray:
    """Array of `count` zeros of type `kind` whose address is a multiple of 64 bytes.

    XLA uses such an array on a CPU without a copy. Zeros take no memory until they are written.
    """
    nbytes = count * np.dtype(kind).itemsize
    buffer = np.zeros(nbytes + 64, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + nbytes].view(kind)


def offsets_of(degrees: np.ndarray) -> np.ndarray:
    """int64 [rows + 1]: the offsets of rows with these lengths.

    >>> offsets_of(np.array([2, 0, 1]))
    array([0, 2, 2, 3])
    """
    offsets = np.zeros(len(degrees) + 1, np.int64)
    np.cumsum(degrees, out=offsets[1:])
    return offsets


def transpose_csr(
    offsets: np.ndarray, ids: np.ndarray, degrees: np.ndarray, ordered: bool
) -> Transposed:
    """The same edges by column; `degrees` [columns] counts how often each column occurs in `ids`.

    `ids` may be longer than the last offset: the results then end in zeros of padding.
    """
    back_offsets = offsets_of(degrees)
    rows = aligned(len(ids), ids.dtype)
    order = aligned(len(ids) if ordered else 0, position_type(len(ids)))
    _transpose(offsets, ids, back_offsets[:-1].copy(), rows, order)
    return Transposed(back_offsets, rows, order if ordered else None)


@njit(cache=True)
def count(keys, counts):
    """Adds the number of occurrences of each key k in `keys` to `counts[k]`."""
    for k in keys:
        counts[k] += 1


@njit(cache=True)
def fill(keys, values, cursor, out):
    """Second pass of a stable counting sort.

    `values[i]` goes to position `cursor[keys[i]]` of `out`, and that cursor advances. Returns the
    number of values placed. It is less than `len(keys)` if a key is out of range or its cursor has
    reached the end of `out`.
    """
    for i in range(len(keys)):
        k = keys[i]
        if k < 0 or k >= len(cursor) or cursor[k] >= len(out):
            return i
        out[cursor[k]] = values[i]
        cursor[k] += 1
    return len(keys)


@njit(cache=True)
def targets_of(offsets, begin, out):
    """Writes the rows of the edges `begin`, `begin + 1`, ... to `out`."""
    v = np.searchsorted(offsets, begin, "right") - 1
    for i in range(len(out)):
        while offsets[v + 1] <= begin + i:
            v += 1
        out[i] = v


@njit(cache=True)
def _transpose(offsets, ids, cursor, rows, order):
    ordered = len(order) > 0
    for v in range(len(offsets) - 1):
        for e in range(offsets[v], offsets[v + 1]):
            s = ids[e]
            k = cursor[s]
            cursor[s] = k + 1
            rows[k] = v
            if ordered:
                order[k] = e


EPSILON = np.finfo(np.float32).eps
"""Distance from 1 to the next float32."""


@njit(cache=True)
def correct_self_edges(offsets, sources, weights, first, out):
    """Writes the weight to add to each row's self edges so that exactly one of them counts.

    Row v is vertex `first + v`. Without a self edge the weight is 1; otherwise the last one counts.
    Empty `weights` stand for ones. Only a missing self edge has exactly 1: another 1, by negative
    weights, is rounded up.
    """
    for v in range(len(offsets) - 1):
        total = np.float32(0)
        last = np.float32(1)
        missing = True
        for e in range(offsets[v], offsets[v + 1]):
            if sources[e] == first + v:
                last = weights[e] if len(weights) else np.float32(1)
                total += last
                missing = False
        correction = last - total
        if correction == 1 and not missing:
            correction += EPSILON
        out[v] = correction


@njit(cache=True)
def widen_rows(offsets, values, new_offsets, out, padding):
    """Copies rows to longer ones and fills the rest of each with `padding`."""
    for v in range(len(offsets) - 1):
        k = new_offsets[v]
        for e in range(offsets[v], offsets[v + 1]):
            out[k] = values[e]
            k += 1
        out[k : new_offsets[v + 1]] = padding


@njit(cache=True)
def append_rows(offsets, values, other_offsets, other_values, new_offsets, out):
    """Copies each row of the first table, and the same row of the other one behind it."""
    for v in range(len(offsets) - 1):
        k = new_offsets[v]
        for e in range(offsets[v], offsets[v + 1]):
            out[k] = values[e]
            k += 1
        for e in range(other_offsets[v], other_offsets[v + 1]):
            out[k] = other_values[e]
            k += 1


@njit(cache=True)
def permute_rows(offsets, values, order, new_offsets, out):
    """Copies row `order[i]` to row i."""
    for i in range(len(order)):
        k = new_offsets[i]
        for e in range(offsets[order[i]], offsets[order[i] + 1]):
            out[k] = values[e]
            k += 1

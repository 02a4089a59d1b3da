"""Checksums of files that Partita writes and nobody edits: a flipped bit is an error, not another
value.

A checksum is a key beside the content. Graphs of older versions have none and are read as before;
measurements without one are refused, since they can be made again.
The checksum of an array is a sum over its elements, so that devices and processes can add those of
their parts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from partita.files.schema import FieldError, Schema, shown

KEY = "checksum"
"""Key of the checksum in an object."""
MODULUS = 2**64
"""Checksums of arrays are sums modulo this number."""
PIECE = 2**20
"""Elements that are summed at a time, which bounds the memory."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 by the golden ratio: its multiples are spread evenly (Knuth, volume 3, 6.4)."""


def checksum(value: Any) -> str:
    """CRC-32 of a plain JSON value, 8 hexadecimal digits; the order of keys does not matter.

    >>> checksum({"a": 1, "b": [2.5]}) == checksum({"b": [2.5], "a": 1})
    True
    """
    content = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(content.encode()):08x}"


def with_checksum(fields: dict[str, Any]) -> dict[str, Any]:
    """An object with the checksum of its other fields."""
    return {KEY: checksum(fields), **fields}


def check_checksum(value: Any, required: bool = False) -> Any:
    """An object without its checksum; FieldError if the checksum is not that of its content, or
    absent and `required`."""
    if type(value) is not dict:
        return value
    if KEY not in value:
        if required:
            raise FieldError(f"without the key {KEY!r}", "measure again")
        return value
    fields = {name: item for name, item in value.items() if name != KEY}
    if value[KEY] != checksum(fields):
        problem = f"{shown(value[KEY])}, and its content has {checksum(fields)}"
        raise FieldError(problem, "restore the file from a copy").inside(KEY)
    return fields


def sealed(schema: Schema, required: bool = False) -> Schema:
    """The schema of an object that may have a checksum beside the fields of `schema`, or must."""
    return lambda value: schema(check_checksum(value, required))


def array_checksum(array: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """The checksum of a part of an array of `shape`; the part begins at the position `start`.

    The sum of bits times a weight per position, modulo 2^64. Weights are odd, so every flipped bit
    changes the sum.

    >>> whole = np.arange(6, dtype="float32").reshape(2, 3)
    >>> left, right = array_checksum(whole[:, :1], (0, 0), (2, 3)), array_checksum(
    ...     whole[:, 1:], (0, 1), (2, 3)
    ... )
    >>> (left + right) % MODULUS == array_checksum(whole, (0, 0), (2, 3))
    True
    """
    if not array.ndim:
        array = array.reshape(1)
        start = (0,)
        shape = (1,)
    if array.dtype.itemsize > 8:
        array = np.ascontiguousarray(array)[..., None].view(np.uint8)
        start = (*start, 0)
        shape = (*shape, array.shape[-1])
    total = 0
    rows = max(1, PIECE // max(1, array[:1].size))
    for first in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[first : first + rows])
        bits = piece.view(f"u{piece.dtype.itemsize}").astype(np.uint64)
        positions = _positions(piece.shape, (start[0] + first, *start[1:]), shape)
        weights = positions * GOLDEN
        weights = (weights ^ (weights >> np.uint64(32))) | np.uint64(1)
        total += int((bits * weights).sum())
    return total % MODULUS


def _positions(size: Sequence[int], start: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Positions in the flattened whole of the elements of a part of `size`."""
    positions = np.zeros((1,) * len(size), np.uint64)
    stride = 1
    for dim in reversed(range(len(size))):
        along = (np.arange(size[dim], dtype=np.uint64) + np.uint64(start[dim])) * np.uint64(stride)
        positions = positions + along.reshape(-1, *(1,) * (len(size) - 1 - dim))
        stride *= shape[dim]
    return positions

"""Digests of arrays, so that graphs are compared by content.

A digest depends on types, shapes and every byte. It is not cryptographic: words are mixed in four
independent lanes at about the bandwidth of memory. A cryptographic hash reads 0.3 to 0.5 GB/s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numba import njit

BYTES_AT_ONCE = 2**24
"""Bytes that are made contiguous at a time."""

LANES = 4
"""Independent lanes: a processor mixes one word while it waits for the product of another."""

SEEDS = np.array(
    [0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93], np.uint64
)
"""First state of the lanes, uint64 [LANES]: odd constants of the splitmix64 generators."""


def array_digest(arrays: Iterable[np.ndarray | None]) -> str:
    """32 hexadecimal digits: the digest of types, shapes and bytes of arrays.

    >>> array_digest([np.arange(3), None]) == array_digest([np.arange(6)[:3], None])
    True
    >>> array_digest([np.arange(3)]) == array_digest([np.arange(3, dtype=np.int32)])
    False
    """
    summary = hashlib.blake2b(digest_size=16)
    for array in arrays:
        if array is None:
            summary.update(b"none;")
        else:
            summary.update(f"{array.dtype.str}{array.shape};".encode())
            summary.update(_mixed(array))
    return summary.hexdigest()


def _mixed(array: np.ndarray) -> bytes:
    """State of the lanes after all words of an array, and the bytes after the last full words."""
    lanes = SEEDS.copy()
    rest = b""
    row_bytes = max(1, array.nbytes // max(1, len(array)))
    rows = max(1, BYTES_AT_ONCE // row_bytes)
    for start in range(0, len(array), rows):
        piece = np.ascontiguousarray(array[start : start + rows])
        data = piece.reshape(-1).view(np.uint8)
        whole = len(data) // (8 * LANES) * 8 * LANES
        _mix(data[:whole].view(np.uint64), lanes)
        rest += data[whole:].tobytes()
    return lanes.tobytes() + rest


@njit(nogil=True, cache=True)
def _mix(words, lanes):
    """Mixes words into lanes.

    Every step is a bijection of the lane, so one changed word always changes it.
    """
    factor = np.uint64(0xFF51AFD7ED558CCD)
    half = np.uint64(32)
    a, b, c, d = lanes[0], lanes[1], lanes[2], lanes[3]
    for i in range(0, len(words), 4):
        a = (a ^ words[i]) * factor
        b = (b ^ words[i + 1]) * factor
        c = (c ^ words[i + 2]) * factor
        d = (d ^ words[i + 3]) * factor
        a ^= a >> half
        b ^= b >> half
        c ^= c >> half
        d ^= d >> half
    lanes[0], lanes[1], lanes[2], lanes[3] = a, b, c, d


def read_only(array: np.ndarray | None) -> bool:
    """Whether neither an array nor one that it is a view of can be written.

    >>> table = np.arange(3)
    >>> view = table[:2]
    >>> view.flags.writeable = False
    >>> read_only(view), read_only(None)
    (False, True)
    """
    base: object = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return True

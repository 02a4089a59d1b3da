"""Dropout of attention by pairs of vertices: a hash of numbers says which edges count for a head.

The pattern is equal for repeated edges, and however a graph is split. JAX and kernels compute the
same hash.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numba import njit

from partita.gnn.kernels.bridge import argument, floats, ints


class PairPattern(NamedTuple):
    """The edges that count for each head in a step.

    source  int32 [sources]: hash of the vertex that an edge begins at
    target  int32 [destinations]: number of the vertex that it ends at
    heads   int32 [heads]: hash of each head
    least   int32 [1]: least hash of an edge that counts
    scale   float32 [1]: factor of an edge that counts
    """

    source: Any
    target: Any
    heads: Any
    least: Any
    scale: Any


def mix(bits: Any) -> Any:
    """Every bit of a uint32 spread over all others (the integer hash 'lowbias32' of C. Wellons)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def least_bits(rate: float) -> np.uint32:
    """The least hash that stays, at a rate of dropout."""
    return np.uint32(min(rate * 2.0**32, 2**32 - 1))


def pair_factors(pattern: PairPattern, source: Any, target: Any) -> Any:
    """float32 [edges, heads]: the factor of edges, of their entries of `pattern`'s first arrays."""
    pairs = mix((source + target).astype(jnp.uint32))
    bits = mix(pairs[:, None] ^ pattern.heads.astype(jnp.uint32))
    return jnp.where(bits >= pattern.least.astype(jnp.uint32), pattern.scale[0], 0)


@njit(nogil=True, inline="always")
def _mixed(bits):
    """`mix` of one number. Numba multiplies uint32 as uint64."""
    bits = np.uint32(bits)
    bits = np.uint32((bits ^ (bits >> np.uint32(16))) * np.uint32(0x7FEB352D))
    bits = np.uint32((bits ^ (bits >> np.uint32(15))) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> np.uint32(16)))


@njit(nogil=True, inline="always")
def pair_bits(pattern, u, v):
    """The hash of an edge from row u to row v."""
    return _mixed(np.uint32(pattern.source[u]) + np.uint32(pattern.target[v]))


@njit(nogil=True, inline="always")
def pair_factor(pattern, bits, head):
    """The factor of an edge with this hash for a head."""
    stays = _mixed(bits ^ np.uint32(pattern.heads[head])) >= np.uint32(pattern.least[0])
    return pattern.scale[0] if stays else np.float32(0)


@njit(nogil=True, inline="always")
def pattern_at(frame, first):
    """The pattern whose arrays are the arguments of a call from `first` on."""
    return PairPattern(
        ints(argument(frame, first)),
        ints(argument(frame, first + 1)),
        ints(argument(frame, first + 2)),
        ints(argument(frame, first + 3)),
        floats(argument(frame, first + 4)),
    )

"""Graphs that are drawn: R-MAT, Erdos-Renyi and stochastic blocks, with features, labels and masks, of any size.

Edge i is a function of the seed and of i alone, so a graph is the same however it is made, piece by piece into a file or in memory, and needs no
memory of its own. Edges are drawn with replacement: they may repeat, and lead from a vertex to itself. Every generator gives an `EdgeStream`:

>>> stream = rmat(4, 30, features=2, classes=3, seed=1)
>>> stream.graph()
rmat: 16 vertices, 30 edges, 2 features, 3 classes; 9 of train, 2 of validation, 5 of test
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
from numba import njit

from partita.errors import GraphError
from partita.gnn.data.csr import id_type
from partita.gnn.data.stream import PIECE, EdgeStream, Piece

ROWS = 2**16
"""Rows of features that are drawn in one go; another number is another graph."""

QUADRANTS = (0.57, 0.19, 0.19, 0.05)
"""The usual probabilities of R-MAT (Chakrabarti et al., SDM 2004; Graph500)."""

APART = 0.5
"""How far the features of a class are from those of another, in deviations of one feature."""

TRAIN, VALIDATION = 0.5, 0.25
"""Shares of the vertices to train on and to validate with; the rest is to test."""


def rmat(
    scale: int,
    edges: int,
    *,
    quadrants: tuple[float, float, float, float] = QUADRANTS,
    features: int = 0,
    classes: int = 16,
    seed: int = 0,
) -> EdgeStream:
    """2^scale vertices and so many edges, a few vertices having most of them (R-MAT; Chakrabarti, Zhan, Faloutsos, SDM 2004).

    For every bit of the ids, an edge falls into one of four quadrants (source bit, target bit) = 00, 01, 10, 11 of these probabilities.
    """
    if not 0 < scale <= 31:
        raise GraphError(
            f"A scale of {scale} is too {'small' if scale <= 0 else 'large'}: there are 2^scale vertices, with a scale from 1 to 31."
        )
    if min(quadrants) < 0 or abs(sum(quadrants) - 1) > 1e-9:
        raise GraphError(
            f"The quadrants {quadrants} are no probabilities: give four numbers from 0 whose sum is 1."
        )
    cuts = np.minimum(np.cumsum(quadrants[:3]) * 2.0**32, 2.0**32).astype(np.uint64)
    return _stream(
        "rmat",
        2**scale,
        edges,
        partial(_rmat, scale=scale, cuts=cuts),
        features,
        classes,
        seed,
        _scattered,
    )


def erdos_renyi(
    vertices: int, edges: int, *, features: int = 0, classes: int = 16, seed: int = 0
) -> EdgeStream:
    """So many vertices, and so many edges between any of them (G(n, m), drawn with replacement; Erdos, Renyi 1959)."""
    return _stream(
        "erdos-renyi",
        vertices,
        edges,
        partial(_uniform, vertices=vertices),
        features,
        classes,
        seed,
        _scattered,
    )


def blocks(
    vertices: int,
    edges: int,
    *,
    within: float = 0.8,
    features: int = 16,
    classes: int = 16,
    seed: int = 0,
) -> EdgeStream:
    """A graph whose vertices of a class know each other: a share `within` of the edges stays in the class of its target, the rest is uniform.

    The stochastic block model (Holland, Laskey, Leinhardt 1983) with blocks of equal size, vertex v in block v mod classes, drawn with replacement.
    """
    if not 0 <= within <= 1:
        raise GraphError(
            f"A share of {within} of the edges cannot stay within a class: give a number from 0 to 1."
        )
    if not 0 < classes <= vertices:
        raise GraphError(
            f"{vertices:,} vertices cannot be {classes:,} classes: give 1 to {vertices:,}."
        )
    draw = partial(_blocks, vertices=vertices, classes=classes, within=np.uint64(within * 2.0**32))
    return _stream("blocks", vertices, edges, draw, features, classes, seed, _in_turn)


def _stream(
    name: str,
    vertices: int,
    edges: int,
    draw: Callable[..., None],
    features: int,
    classes: int,
    seed: int,
    label: Callable[..., np.ndarray],
) -> EdgeStream:
    if not 0 < vertices < 2**32 or edges < 0 or features < 0 or classes < 1:
        raise GraphError(
            f"There is no graph of {vertices:,} vertices, {edges:,} edges, {features:,} features and {classes:,} classes: give at least one vertex (below 2^32) and one class."
        )
    start = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])

    def pieces() -> Iterator[Piece]:
        for begin in range(0, edges, PIECE):
            source, target = (
                np.empty(min(PIECE, edges - begin), id_type(vertices)) for _ in range(2)
            )
            draw(np.uint64(start), begin, source=source, target=target)
            yield source, target, None

    tables: dict[str, Callable[[], Iterable[np.ndarray]]] = {}
    if features:
        tables["features"] = partial(_features, vertices, features, classes, seed, label)
        tables["labels"] = partial(_by_rows, vertices, partial(label, classes=classes, seed=seed))
        for what, low, high in (
            ("train", 0.0, TRAIN),
            ("validation", TRAIN, TRAIN + VALIDATION),
            ("test", TRAIN + VALIDATION, 1.0),
        ):
            tables[what] = partial(
                _by_rows, vertices, partial(_drawn, seed=seed, low=low, high=high)
            )
    return EdgeStream(pieces, vertices, edges, tables, name)


def _by_rows(vertices: int, rows: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
    for begin in range(0, vertices, ROWS):
        yield rows(np.arange(begin, min(begin + ROWS, vertices)))


def _features(
    vertices: int, features: int, classes: int, seed: int, label: Callable[..., np.ndarray]
) -> Iterator[np.ndarray]:
    """Normal around the centre of the class, deviation 1."""
    centres = np.random.default_rng([seed, 1]).standard_normal(
        (classes, features), np.float32
    ) * np.float32(APART)
    for begin in range(0, vertices, ROWS):
        v = np.arange(begin, min(begin + ROWS, vertices))
        yield (
            np.random.default_rng([seed, 2, begin]).standard_normal((len(v), features), np.float32)
            + centres[label(v, classes=classes, seed=seed)]
        )


def _scattered(v: np.ndarray, classes: int, seed: int) -> np.ndarray:
    return (_hashed(v, seed, 3) % np.uint64(classes)).astype(np.int32)


def _in_turn(v: np.ndarray, classes: int, seed: int) -> np.ndarray:
    return (v % classes).astype(np.int32)


def _drawn(v: np.ndarray, seed: int, low: float, high: float) -> np.ndarray:
    """A mask of the vertices whose draw is between two numbers; vertex 0 draws 0, so that someone is trained on."""
    draw = np.where(v == 0, 0.0, _hashed(v, seed, 4) / 2.0**64)
    return (draw >= low) & (draw < high)


def _hashed(v: np.ndarray, seed: int, salt: int) -> np.ndarray:
    return _mix_all(
        v.astype(np.uint64),
        np.uint64(np.random.SeedSequence([seed, salt]).generate_state(1, np.uint64)[0]),
    )


# ---------------------------------------------------------------------------------------------------------------- kernels
#
# 64 random bits of a counter by splitmix64 (Steele, Lea, Flood, OOPSLA 2014)


@njit(cache=True)
def _mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def _mix_all(values, seed):
    out = np.empty_like(values)
    for i in range(len(values)):
        out[i] = _mix(_mix(values[i]) ^ seed)
    return out


@njit(cache=True)
def _below(bits, n):
    """A whole number below n < 2^32, of the upper 32 of 64 random bits."""
    return ((bits >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)


@njit(cache=True)
def _rmat(seed, begin, scale, cuts, source, target):
    low = np.uint64(0xFFFFFFFF)
    for i in range(len(source)):
        state = _mix(seed ^ _mix(np.uint64(begin + i)))
        s, t, bits = 0, 0, np.uint64(0)
        for level in range(scale):
            if level & 1:
                bits >>= np.uint64(32)
            else:
                state = _mix(state)
                bits = state
            draw = bits & low
            down = draw >= cuts[1]
            right = (draw >= cuts[2]) | ((draw >= cuts[0]) & (not down))
            s = 2 * s + down
            t = 2 * t + right
        source[i] = s
        target[i] = t


@njit(cache=True)
def _uniform(seed, begin, vertices, source, target):
    for i in range(len(source)):
        state = _mix(seed ^ _mix(np.uint64(begin + i)))
        source[i] = _below(state, vertices)
        target[i] = _below(_mix(state), vertices)


@njit(cache=True)
def _blocks(seed, begin, vertices, classes, within, source, target):
    for i in range(len(source)):
        state = _mix(seed ^ _mix(np.uint64(begin + i)))
        t = np.int64(_below(state, vertices))
        second = _mix(state)
        if (second & np.uint64(0xFFFFFFFF)) < within:
            block = t % classes
            members = (vertices - block + classes - 1) // classes
            s = np.int64(_below(second, members)) * classes + block
        else:
            s = np.int64(_below(second, vertices))
        source[i] = s
        target[i] = t

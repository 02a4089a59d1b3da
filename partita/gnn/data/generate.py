"""Random graphs of any size: R-MAT, Erdos-Renyi and stochastic blocks, with vertex tables.

Edge i is a function of the seed and i alone. A graph is therefore the same in memory and in files,
whatever the pieces, and its generation needs no memory. Edges are drawn with replacement: they may
repeat, and may be self edges. Every generator returns an `EdgeStream`:

>>> stream = rmat(4, 30, features=2, classes=3, seed=1)
>>> stream.graph()
rmat: 16 vertices, 30 edges, 2 features, 3 classes; 9 of train, 2 of validation, 5 of test
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numba import njit

from partita.errors import GraphError
from partita.gnn.data.csr import id_type
from partita.gnn.data.stream import PIECE, EdgeStream, Piece

MOST = {"vertices": 2**32, "edges": 2**63, "features": 2**31, "classes": 2**31}
"""Numbers that are too large for a graph."""

ROWS = 2**16
"""Rows of features that are drawn at a time; a different number is a different graph."""

QUADRANTS = (0.57, 0.19, 0.19, 0.05)
"""The usual probabilities of R-MAT (Chakrabarti et al., SDM 2004; Graph500)."""

CENTRE_DEVIATION = 0.5
"""Standard deviation of the classes' centres, in standard deviations of one feature."""

MASK_DRAWS = {"train": (0.0, 0.5), "validation": (0.5, 0.75), "test": (0.75, 1.0)}
"""Draws between 0 and 1 for which a vertex is in a mask."""


@dataclass(frozen=True)
class VertexDraws:
    """How features, labels and masks of the vertices are drawn.

    label_of    (vertices, classes, seed) -> int32 labels
    """

    vertices: int
    features: int
    classes: int
    seed: int
    label_of: Callable[[np.ndarray, int, int], np.ndarray]

    def labels(self, v: np.ndarray) -> np.ndarray:
        """int32 labels of some vertices."""
        return self.label_of(v, self.classes, self.seed)

    def tables(self) -> dict[str, Callable[[], Iterable[np.ndarray]]]:
        """The tables of an `EdgeStream`; none without features."""
        if not self.features:
            return {}
        tables: dict[str, Callable[[], Iterable[np.ndarray]]] = {
            "features": self._feature_rows,
            "labels": partial(self._by_rows, self.labels),
        }
        for name, (low, high) in MASK_DRAWS.items():
            tables[name] = partial(self._by_rows, partial(self._mask, low, high))
        return tables

    def _by_rows(self, rows: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        for begin in range(0, self.vertices, ROWS):
            yield rows(np.arange(begin, min(begin + ROWS, self.vertices)))

    def _feature_rows(self) -> Iterator[np.ndarray]:
        """Features normal around the centre of the class, with standard deviation 1."""
        random = np.random.default_rng([self.seed, 1])
        centres = random.standard_normal((self.classes, self.features), np.float32)
        centres *= np.float32(CENTRE_DEVIATION)
        for begin in range(0, self.vertices, ROWS):
            v = np.arange(begin, min(begin + ROWS, self.vertices))
            random = np.random.default_rng([self.seed, 2, begin])
            noise = random.standard_normal((len(v), self.features), np.float32)
            yield noise + centres[self.labels(v)]

    def _mask(self, low: float, high: float, v: np.ndarray) -> np.ndarray:
        """Whether each vertex's draw is in a range. Vertex 0 draws 0, so training has a vertex."""
        draw = np.where(v == 0, 0.0, _hash(v, self.seed, 4) / 2.0**64)
        return (draw >= low) & (draw < high)


def rmat(
    scale: int,
    edges: int,
    *,
    quadrants: tuple[float, float, float, float] = QUADRANTS,
    features: int = 0,
    classes: int = 16,
    seed: int = 0,
) -> EdgeStream:
    """R-MAT: 2^scale vertices, a few of which have most edges (Chakrabarti et al., SDM 2004).

    For every bit of the ids, an edge falls into one of four quadrants, (source bit, target bit) =
    00, 01, 10, 11, with the probabilities `quadrants`.
    """
    if not 0 < scale <= 31:
        raise GraphError(
            f"scale={scale} is out of range: use 1 to 31, for a graph of 2^scale vertices."
        )
    if min(quadrants) < 0 or abs(sum(quadrants) - 1) > 1e-9:
        raise GraphError(
            f"quadrants={quadrants} are no probabilities: give four numbers from 0 with the sum 1."
        )
    cuts = np.minimum(np.cumsum(quadrants[:3]) * 2.0**32, 2.0**32).astype(np.uint64)
    draws = VertexDraws(2**scale, features, classes, seed, _hashed_label)
    return _stream("rmat", edges, partial(_draw_rmat, scale=scale, cuts=cuts), draws)


def erdos_renyi(
    vertices: int, edges: int, *, features: int = 0, classes: int = 16, seed: int = 0
) -> EdgeStream:
    """G(n, m), drawn with replacement: edges between any vertices (Erdos and Renyi 1959)."""
    draws = VertexDraws(vertices, features, classes, seed, _hashed_label)
    return _stream("erdos-renyi", edges, partial(_draw_uniform, vertices=vertices), draws)


def blocks(
    vertices: int,
    edges: int,
    *,
    within: float = 0.8,
    features: int = 16,
    classes: int = 16,
    seed: int = 0,
) -> EdgeStream:
    """Stochastic block model (Holland, Laskey and Leinhardt 1983), drawn with replacement.

    Vertex v is in block v mod classes. A share `within` of the edges begins in the block of its
    target, the rest anywhere.
    """
    if not 0 <= within <= 1:
        raise GraphError(f"within={within} is no share of the edges: give a number from 0 to 1.")
    if not 0 < classes <= vertices:
        raise GraphError(
            f"{vertices:,} vertices cannot have {classes:,} classes: use 1 to {vertices:,}."
        )
    threshold = np.uint64(within * 2.0**32)
    draw = partial(_draw_blocks, vertices=vertices, classes=classes, threshold=threshold)
    draws = VertexDraws(vertices, features, classes, seed, _cyclic_label)
    return _stream("blocks", edges, draw, draws)


def _stream(
    name: str, edges: int, draw_edges: Callable[..., None], draws: VertexDraws
) -> EdgeStream:
    """The stream of edges that `draw_edges(state, begin, source=, target=)` fills in."""
    vertices = draws.vertices
    for count, noun, least in (
        (vertices, "vertices", 1),
        (edges, "edges", 0),
        (draws.features, "features", 0),
        (draws.classes, "classes", 1),
    ):
        if not least <= count < MOST[noun]:
            raise GraphError(
                f"A graph of {count:,} {noun} is impossible: give {least} to {MOST[noun] - 1:,}."
            )
    state = np.random.SeedSequence(draws.seed).generate_state(1, np.uint64)[0]

    def pieces() -> Iterator[Piece]:
        for begin in range(0, edges, PIECE):
            size = min(PIECE, edges - begin)
            source = np.empty(size, id_type(vertices))
            target = np.empty(size, id_type(vertices))
            draw_edges(state, begin, source=source, target=target)
            yield source, target, None

    return EdgeStream(pieces, vertices, edges, draws.tables(), name)


def _hashed_label(v: np.ndarray, classes: int, seed: int) -> np.ndarray:
    """Labels that are independent of the vertex numbers."""
    return (_hash(v, seed, 3) % np.uint64(classes)).astype(np.int32)


def _cyclic_label(v: np.ndarray, classes: int, seed: int) -> np.ndarray:
    return (v % classes).astype(np.int32)


def _hash(v: np.ndarray, seed: int, salt: int) -> np.ndarray:
    """uint64 [n]: random bits of vertices."""
    key = np.random.SeedSequence([seed, salt]).generate_state(1, np.uint64)[0]
    return _mix_all(v.astype(np.uint64), key)


# --------------------------------------------------------------------------------------- kernels
#
# 64 random bits of a counter by splitmix64 (Steele, Lea, Flood, OOPSLA 2014)


@njit(cache=True)
def _mix(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def _mix_all(values, key):
    out = np.empty_like(values)
    for i in range(len(values)):
        out[i] = _mix(_mix(values[i]) ^ key)
    return out


@njit(cache=True)
def _below(bits, n):
    """An integer below n < 2^32, from the upper 32 of 64 random bits."""
    return ((bits >> np.uint64(32)) * np.uint64(n)) >> np.uint64(32)


@njit(cache=True)
def _draw_rmat(seed, begin, scale, cuts, source, target):
    low_bits = np.uint64(0xFFFFFFFF)
    for i in range(len(source)):
        state = _mix(seed ^ _mix(np.uint64(begin + i)))
        s = 0
        t = 0
        bits = np.uint64(0)
        for level in range(scale):
            if level & 1:
                bits >>= np.uint64(32)
            else:
                state = _mix(state)
                bits = state
            draw = bits & low_bits
            source_bit = draw >= cuts[1]
            target_bit = (draw >= cuts[2]) | ((draw >= cuts[0]) & (not source_bit))
            s = 2 * s + source_bit
            t = 2 * t + target_bit
        source[i] = s
        target[i] = t


@njit(cache=True)
def _draw_uniform(seed, begin, vertices, source, target):
    for i in range(len(source)):
        state = _mix(seed ^ _mix(np.uint64(begin + i)))
        source[i] = _below(state, vertices)
        target[i] = _below(_mix(state), vertices)


@njit(cache=True)
def _draw_blocks(seed, begin, vertices, classes, threshold, source, target):
    """`threshold` of 2^32 edges begin in the block of their target."""
    for i in range(len(source)):
        state = _mix(seed ^ _mix(np.uint64(begin + i)))
        t = np.int64(_below(state, vertices))
        second = _mix(state)
        if (second & np.uint64(0xFFFFFFFF)) < threshold:
            block = t % classes
            members = (vertices - block + classes - 1) // classes
            s = np.int64(_below(second, members)) * classes + block
        else:
            s = np.int64(_below(second, vertices))
        source[i] = s
        target[i] = t

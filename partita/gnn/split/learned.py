"""What a part of a graph costs, learnt from measured times, and the split points that make the slowest device least slow.

The time of a device is linear in a few sums over its part: of vertices, edges, and what says how well rows are found in the cache (`NAMES`).
`prefix_sums` makes the sums of any contiguous range a subtraction. `Learner` fits the coefficients, none negative, together with a factor for
every device, so that one that is slow gets less. `best_points` finds the split points.

Source: Jia et al., "Improving the Accuracy, Scalability, and Performance of Graph Neural Networks with Roc", MLSys 2020, section 4. The
factor of a device and the rows that all devices have place for are added here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import njit
from scipy.optimize import nnls

from partita.gnn.data.graph import Graph

NAMES = ("rows", "vertices", "edges", "runs", "ranges", "cold")
"""What the time of a part is made of: rows that every device has place for (those of the largest part, which dense layers compute on every
device); vertices; in-edges; maximal runs of in-neighbours with consecutive numbers; ranges of `RANGE` vertices that a vertex's in-edges begin in,
in their order; in-edges that begin at a vertex outside the `HOT` most read."""
RANGE, HOT = 64, 16384
FORGET = 0.98
"""What an epoch's measurements weigh after one more epoch."""
KEPT = 64
"""Splits, and epochs of each, whose measurements are kept."""
RECENT = 9
"""Epochs of a split whose median is what it takes: one that something else disturbed does not count, and a device that changes is seen in half as many."""
TURNS, SETTLED, FAR = 64, 1e-5, 0.98
"""Turns of the fit between coefficients and devices at most; the change of a device's factor by which it ends; the most of a turn that the next is taken
to go."""
ALIKE = 0.002
"""Pull of a device's factor to 1, beside its measurements: devices are alike where parts alone explain the times."""
OUTLIER = 3.0
"""Residuals beyond so many typical ones weigh less, as in Huber's estimator."""


@njit(nogil=True, cache=True)
def _add_up(offsets, sources, hot, span, out):
    for v in range(len(offsets) - 1):
        runs, ranges, cold = 0, 0, 0
        last, place = np.int64(-2), np.int64(-1)
        for e in range(offsets[v], offsets[v + 1]):
            source = np.int64(sources[e])
            runs += source != last + 1 and source != last
            ranges += source // span != place
            cold += not hot[source]
            last, place = source, source // span
        out[v + 1, 0] = out[v, 0] + 1
        out[v + 1, 1] = out[v, 1] + offsets[v + 1] - offsets[v]
        out[v + 1, 2] = out[v, 2] + runs
        out[v + 1, 3] = out[v, 3] + ranges
        out[v + 1, 4] = out[v, 4] + cold


def prefix_sums(graph: Graph) -> np.ndarray:
    """float64 [vertices + 1, 5]: the sums of all features but `rows` over the vertices before each.

    >>> prefix_sums(Graph.from_edges([0, 1, 3], [1, 1, 1], 4))[-1].tolist()
    [4.0, 3.0, 2.0, 1.0, 0.0]
    """
    hot = np.ones(graph.vertices, np.bool_)
    if graph.vertices > HOT:
        hot[np.argpartition(graph.out_degrees(), graph.vertices - HOT)[: graph.vertices - HOT]] = (
            False
        )
    out = np.zeros((graph.vertices + 1, len(NAMES) - 1))
    _add_up(graph.offsets, graph.sources, hot, RANGE, out)
    return out


def features_of(sums: np.ndarray, points: np.ndarray, rows: int | None = None) -> np.ndarray:
    """float64 [parts, 6]: the features of every part, where each device has place for so many rows, or for those of the largest part."""
    own = np.diff(sums[points], axis=0)
    return np.column_stack(
        [np.full(len(own), np.diff(points).max() if rows is None else rows), own]
    )


@dataclass(frozen=True)
class Cost:
    """seconds of device d = slowness[d] x (weights . features of its part)."""

    weights: np.ndarray
    slowness: np.ndarray

    def seconds(self, sums: np.ndarray, points: np.ndarray, rows: int | None = None) -> np.ndarray:
        """float64 [parts]: what each device is predicted to compute for; `rows`: as in `features_of`."""
        return self.slowness * (features_of(sums, points, rows) @ self.weights)


def best_points(
    sums: np.ndarray, cost: Cost, rows: int | None = None, edges: int | None = None
) -> np.ndarray:
    """int64 [devices + 1]: split points of the least greatest predicted seconds; with `rows`, where every device has place for just so many,
    and for so many `edges` if that is said.

    For a given number of rows that every device has place for, the least time by which a sweep that gives every device as much as it can do
    gets to the end is found by halving, each sweep O(devices log vertices). Numbers of rows are tried from the fewest possible upwards.
    """
    vertices, devices = len(sums) - 1, len(cost.slowness)
    before = sums @ cost.weights[1:]
    if rows is not None:
        return _sweeps(before, cost, rows, None if edges is None else (sums[:, 1], edges))
    least = -(-vertices // devices)
    tried = [vertices]
    if cost.weights[0] > 0:  # otherwise more room costs nothing
        tried += sorted(
            {
                min(vertices, int(np.ceil(least * vertices ** (k / 24) / least ** (k / 24))))
                for k in range(24)
            }
        )
    return min(
        (_sweeps(before, cost, rows) for rows in tried),
        key=lambda points: cost.seconds(sums, points).max(),
    )


def _sweeps(
    before: np.ndarray, cost: Cost, rows: int, edges: tuple[np.ndarray, int] | None = None
) -> np.ndarray:
    """The split points of the least greatest seconds among those of at most so many vertices a part; `edges`: those before each vertex, the most of a part."""
    constant, low = cost.weights[0] * rows, 0.0
    high = float(cost.slowness.max() * (before[-1] + constant))
    found = _sweep(before, high * (1 + 1e-9) / cost.slowness - constant, rows, edges)
    for _ in range(64):
        middle = (low + high) / 2
        points = _sweep(before, middle / cost.slowness - constant, rows, edges)
        if points[-1] == len(before) - 1:
            high, found = middle, points
        else:
            low = middle
        if high - low <= 1e-12 * high:
            break
    found[-1] = len(before) - 1
    return found


def _sweep(
    before: np.ndarray, budgets: np.ndarray, rows: int, edges: tuple[np.ndarray, int] | None
) -> np.ndarray:
    points = np.zeros(len(budgets) + 1, np.int64)
    upto = lambda sums, at, most: np.searchsorted(sums, sums[at] + most, side="right") - 1
    for d, budget in enumerate(budgets):
        at = points[d]
        last = upto(before, at, budget) if budget >= 0 else at
        if edges is not None:
            last = min(last, upto(edges[0], at, edges[1]))
        points[d + 1] = max(at, min(last, at + rows, len(before) - 1))
    return points


def begun(sums: np.ndarray, parts: int, row: float, edge: float) -> np.ndarray:
    """int64 [parts + 1]: split points for the first epochs, of the least greatest seconds where nothing is measured yet and devices are alike.

    `row`, `edge`: seconds for each row that there is place for, and for each in-edge. As many edges in every part would give a part of few edges
    a vertex many vertices, and every device computes as many rows.

    >>> sums = prefix_sums(Graph.from_edges([0] * 6 + [1, 2, 3], [0] * 6 + [1, 2, 3], 4))
    >>> begun(sums, 2, 0.0, 1.0), begun(sums, 2, 9.0, 1.0)
    (array([0, 1, 4]), array([0, 2, 4]))
    """
    weights = np.zeros(len(NAMES))
    weights[NAMES.index("rows")], weights[NAMES.index("edges")] = row, edge
    return best_points(sums, Cost(weights, np.ones(parts)))


@dataclass
class _Seen:
    """What was measured of parts with these features, by which devices, in its last epochs; `trust`: epochs of it, older ones less."""

    features: np.ndarray
    devices: np.ndarray
    seconds: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=RECENT))
    trust: float = 0.0


class Learner:
    """Measured seconds in, a `Cost` out. `error` says how far its predictions were from what came next."""

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self._seen: list[_Seen] = []
        self._errors: list[float] = []
        self.cost: Cost | None = None

    def add(
        self, features: np.ndarray, seconds: np.ndarray, devices: np.ndarray | None = None
    ) -> Cost:
        """The cost after what was measured: features [n, 6], seconds [n], by which device [n] (one after the other if None)."""
        devices = np.arange(len(seconds)) if devices is None else devices
        if self.cost is not None:
            off = np.abs(
                self.cost.slowness[devices]
                * (features @ self.cost.weights)
                / np.maximum(seconds, 1e-12)
                - 1
            )
            self._errors = [*self._errors[1 - KEPT :], float(np.median(off))]
        for seen in self._seen:
            seen.trust *= FORGET
        if not self._seen or not np.array_equal(self._seen[-1].features, features):
            self._seen = [*self._seen[1 - KEPT :], _Seen(features, devices)]
        self._seen[-1].seconds.append(np.asarray(seconds, float))
        self._seen[-1].trust += 1
        self.cost = self._fitted()
        return self.cost

    @property
    def error(self) -> float | None:
        """The median relative error of predictions made before what they predicted was measured; None before there was one."""
        return float(np.median(self._errors[-8:])) if self._errors else None

    def _fitted(self) -> Cost:
        """Least squares, in turn over the coefficients (with a pull to 'it is all edges' that ends when parts have varied) and the devices."""
        features = np.concatenate([seen.features for seen in self._seen])
        seconds = np.concatenate([np.median(seen.seconds, axis=0) for seen in self._seen])
        device = np.concatenate([seen.devices for seen in self._seen])
        known = np.concatenate([np.full(len(seen.devices), seen.trust) for seen in self._seen])
        trust, unit = known, max(seconds.mean(), 1e-12)
        scale = np.where(features.mean(axis=0) > 0, features.mean(axis=0), 1)
        x, y = features / scale, seconds / unit
        varied = len(np.unique(np.round(x, 3), axis=0)) / self.devices
        pull, toward = 0.1 / varied**2, np.zeros(x.shape[1])
        toward[NAMES.index("edges")] = y.mean()
        slowness, weights = (
            (np.ones(self.devices) if self.cost is None else self.cost.slowness),
            toward,
        )
        turns = [np.log(slowness)]
        for _ in range(TURNS):
            root = np.sqrt(trust)
            rows = (root * slowness[device])[:, None] * x
            square, right = (
                rows.T @ rows + pull * np.eye(x.shape[1]),
                rows.T @ (root * y) + pull * toward,
            )
            lower = np.linalg.cholesky(square + 1e-12 * np.trace(square) * np.eye(x.shape[1]))
            weights, _ = nnls(lower.T, np.linalg.solve(lower, right))  # the same minimum, of 6 rows
            plain = x @ weights
            tie = ALIKE * np.bincount(device, trust, self.devices) * (plain**2).mean() + 1e-12
            slowness = (np.bincount(device, trust * plain * y, self.devices) + tie) / (
                np.bincount(device, trust * plain**2, self.devices) + tie
            )
            turns.append(np.log(np.maximum(slowness, 1e-3)))
            turns[-1] -= turns[-1].mean()
            if (
                len(turns) == 4
            ):  # the way of turns that each go a share of the one before is gone at once
                last, step = turns[-2] - turns[-3], turns[-1] - turns[-2]
                share = min(max(0.0, float(last @ step) / max(float(last @ last), 1e-30)), FAR)
                turns = [turns[-1] + step * share / (1 - share)]
            slowness = np.exp(turns[-1])
            left = np.abs(y - slowness[device] * plain)
            usual = OUTLIER * max(1.4826 * float(np.median(left)), 1e-9)
            trust = known * np.minimum(1, usual / np.maximum(left, 1e-12))
            if len(turns) > 1 and np.abs(turns[-1] - turns[-2]).max() < SETTLED:
                break
        return Cost(weights * unit / scale, slowness)


# ------------------------------------------------------------------------------------------------------------ nothing measured

RANGES = 48
"""Ranges of vertices that a calibration times."""


def calibrated(
    graph: Graph, sums: np.ndarray, width: int, report: Callable[..., Any] | None = None
) -> tuple[np.ndarray, float]:
    """(weights [6], relative error): sums over the in-edges of random contiguous ranges, timed on this machine by one core.

    The error is the median one of ranges that the fit had not seen. `width`: features of a vertex. Sums of a layer alone: not of dense layers.
    """
    import time

    from partita.gnn.kernels.total import sum_range

    random = np.random.default_rng(0)
    offsets, ids = (
        graph.offsets.astype(np.int32),
        np.asarray(graph.sources).astype(np.int32, copy=False),
    )
    x, out = (
        np.ones((graph.vertices, width), np.float32),
        np.zeros((graph.vertices, width), np.float32),
    )
    timed = lambda a, b: sum_range(a, b, offsets, ids, x, out)
    timed(0, min(graph.vertices, 1))
    features, seconds = [], []
    for i in range(RANGES):
        # ranges of equal edges, of equal vertices and in between: hubs alone, and many vertices with few edges
        length = random.uniform(0.02, 0.2)
        first = random.uniform(0, 1 - length)
        if i % 2:
            a, b = (np.array([first, first + length]) * graph.vertices).astype(int)
        else:
            a, b = np.searchsorted(
                graph.offsets[:-1], np.array([first, first + length]) * graph.edges
            )
        b = min(graph.vertices, max(b, a + 1))
        a = min(a, b - 1)
        took = []
        for _ in range(3):
            began = time.perf_counter()
            timed(a, b)
            took.append(time.perf_counter() - began)
        features.append(np.append(0.0, sums[b] - sums[a]))
        seconds.append(min(took))
        if report is not None:
            report("timing ranges", i + 1, RANGES)
    features, seconds, half = np.array(features), np.array(seconds), RANGES // 2
    learner, one = Learner(1), np.zeros(RANGES, int)
    for part in (slice(half), slice(half, None)):
        cost = learner.add(features[part], seconds[part], one[part])
    return cost.weights, learner.error or 0.0  # pyright: ignore[reportPossiblyUnboundVariable]


# --------------------------------------------------------------------------------------------------------------- in training

LEAST = 0.02
"""Share of an epoch that another split must save at least."""


ENOUGH = 3
"""Epochs that a split is measured for at least."""
STEPS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the way to the best split that are looked at."""
TRIED = 0.25
"""Share of the time left that must be worth more than a move for a split to be tried only to learn from it."""


class Balance:
    """The learnt split of a graph, of these prefix `sums`, in training: measured seconds of every epoch in, new split points out when they pay.

    A move that disappoints teaches what times are made of, and the next one is better for it. Where none promises more, `trials`, other split
    points, are measured if training is long enough, since splits that are alike cannot tell. A split that was measured to be better than what was predicted
    is taken again.
    """

    def __init__(
        self, sums: np.ndarray, points: np.ndarray, trials: Sequence[np.ndarray] = ()
    ) -> None:
        self.sums, self.points, self.trials = sums, points, list(trials)
        self.learner = Learner(len(points) - 1)
        self.moves: list[list[int]] = []
        self.rows, self.edges = 0, None
        self._epochs = 0
        self._slowest: dict[tuple[int, ...], list[float]] = {}

    def measured(self, seconds: np.ndarray, rows: int, edges: int | None = None) -> None:
        """Takes the computing seconds of every device in an epoch; `rows`, `edges`: those it has place for."""
        self.rows, self.edges = rows, edges
        self.learner.add(features_of(self.sums, self.points, rows), seconds)
        self._slowest.setdefault((rows, *self.points.tolist()), []).append(float(seconds.max()))
        self._epochs += 1

    def better(
        self, epochs: int, making: float, compiling: float, fits: Callable[[np.ndarray], bool]
    ) -> tuple[np.ndarray, bool] | None:
        """(split points, whether with other place) that save most in the `epochs` that are left, beyond the seconds that a move takes.

        A move takes `making` the parts, and `compiling` too where they have other place or do not fit into what there is. None if nothing pays, or
        too little was seen yet. Where the best split does not fit, one that goes as far in its direction may.
        """
        learnt = self.learner.cost
        if learnt is None or self._epochs < ENOUGH:
            return None
        was = {split: float(np.median(seconds[-KEPT:])) for split, seconds in self._slowest.items()}
        now, here = (
            was[self._here(self.points)],
            learnt.seconds(self.sums, self.points, self.rows).max(),
        )
        sure = max(LEAST, min(self.learner.error or 0.0, 0.2) / 2)  # or noise would be followed
        found: list[tuple[float, np.ndarray, bool]] = [
            (then, np.array(split[1:], np.int64), split[0] != self.rows)
            for split, then in was.items()
        ]
        straight = best_points(self.sums, learnt, self.rows, self.edges) - self.points
        aims = [(self.points + (share * straight).astype(np.int64), self.rows) for share in STEPS]
        for points, rows in [*aims, (best_points(self.sums, learnt), None)]:
            then = learnt.seconds(self.sums, points, rows).max()
            if self._here(points) not in was and then < (1 - LEAST) * here:
                found.append((float(then), points, rows is None))
        most, best = 0.0, None
        for then, points, other in sorted(found, key=lambda one: one[0]):
            if then >= (1 - sure) * now:
                break
            saved = (now - then) * epochs - making
            if saved > most and (other or not fits(points)):  # whether it fits takes long to see
                saved -= compiling
            if saved > most:
                most, best = saved, (points, other)
        if best is not None:
            return best
        while self.trials:
            points = self.trials.pop(0)
            if self._here(points) not in was and TRIED * now * epochs > making + compiling:
                return points, True
        self._epochs = 0  # what did not pay is not looked at again in every epoch
        return None

    def _here(self, points: np.ndarray) -> tuple[int, ...]:
        """What is measured of these split points with the place that there is, as a key."""
        return (self.rows, *points.tolist())

    def moved(self, points: np.ndarray) -> None:
        """Goes on with other split points."""
        self.points, self._epochs = points, 0
        self.moves.append([int(p) for p in points])

    def facts(self) -> dict[str, Any]:
        """What was learnt, as JSON has it: moves, predicted seconds, slowness of the devices (1: the middle one), error of predictions."""
        cost = self.learner.cost
        found: dict[str, Any] = {
            "moves": len(self.moves),
            "points": [int(p) for p in self.points],
            "error": self.learner.error,
        }
        if cost is not None:
            middle = float(np.median(cost.slowness))
            found |= {
                "seconds": cost.seconds(self.sums, self.points, self.rows).tolist(),
                "slowness": (cost.slowness / middle).tolist(),
                "weights": dict(zip(NAMES, (cost.weights * middle).tolist(), strict=True)),
            }
        return found

"""Learned splits: the cost of parts of a graph from measured times, and the best split points.

The seconds of a device are linear in a few sums over its part (`NAMES`): vertices, edges, and sums
that tell how often rows are in the cache. `prefix_sums` makes the sums of any contiguous range a
subtraction. `Learner` fits the coefficients, none of them negative, together with a factor for
every device, so that a slow device gets less. `best_points` gives the split points, and `Balance`
decides in training when a move pays.

Source: Jia et al., "Improving the Accuracy, Scalability, and Performance of Graph Neural Networks
with Roc", MLSys 2020, section 4. The factor of a device and the rows of its padding are additions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from scipy.optimize import nnls

from partita.gnn.data.graph import Graph

NAMES = ("rows", "vertices", "edges", "runs", "ranges", "cold")
"""The sums that the seconds of a part are linear in.

rows        rows of every device, those of the largest part, which dense layers compute on every
            device
vertices    vertices of the part
edges       its in-edges
runs        maximal runs of in-neighbours with consecutive numbers
ranges      ranges of `RANGE` vertices that a vertex's in-edges begin in, in their order
cold        in-edges that begin at a vertex outside the `HOT` most read ones"""

RANGE = 64
"""Vertices of a range that `ranges` counts."""

HOT = 16384
"""Vertices that are read most, and whose rows are taken to be in the cache."""

FORGET = 0.98
"""Weight of an epoch's measurements after one more epoch."""

MEMORY = 64
"""Splits, and epochs of each, whose measurements stay."""

RECENT = 9
"""Epochs of a split whose median counts as its time. One disturbed epoch does not matter, and a
device that changes is noticed in half of them."""

ITERATIONS = 64
"""Iterations of the fit, between coefficients and devices, at most."""

SETTLED = 1e-5
"""Change of the logarithm of a device's factor by which the fit ends."""

FAR = 0.98
"""Ratio of successive changes, at most, that the fit extrapolates by."""

ALIKE = 0.002
"""Pull of a device's factor to 1, beside its measurements: devices are alike where parts alone
explain the times."""

OUTLIER = 3.0
"""Typical residuals beyond which a residual weighs less, as in Huber's estimator."""


# ------------------------------------------------------------------------------- sums over parts


@njit(nogil=True, cache=True)
def _add_up(offsets, sources, hot, span, out):
    for v in range(len(offsets) - 1):
        runs = 0
        ranges = 0
        cold = 0
        last = np.int64(-2)
        place = np.int64(-1)
        for e in range(offsets[v], offsets[v + 1]):
            source = np.int64(sources[e])
            runs += source != last + 1 and source != last
            ranges += source // span != place
            cold += not hot[source]
            last = source
            place = source // span
        out[v + 1, 0] = out[v, 0] + 1
        out[v + 1, 1] = out[v, 1] + offsets[v + 1] - offsets[v]
        out[v + 1, 2] = out[v, 2] + runs
        out[v + 1, 3] = out[v, 3] + ranges
        out[v + 1, 4] = out[v, 4] + cold


def prefix_sums(graph: Graph) -> np.ndarray:
    """float64 [vertices + 1, 5]: the sums of all `NAMES` but `rows` over the vertices before each.

    >>> prefix_sums(Graph.from_edges([0, 1, 3], [1, 1, 1], 4))[-1].tolist()
    [4.0, 3.0, 2.0, 1.0, 0.0]
    """
    hot = np.ones(graph.vertices, np.bool_)
    cold = graph.vertices - HOT
    if cold > 0:
        hot[np.argpartition(graph.out_degrees(), cold)[:cold]] = False
    out = np.zeros((graph.vertices + 1, len(NAMES) - 1))
    _add_up(graph.offsets, graph.sources, hot, RANGE, out)
    return out


def features_of(sums: np.ndarray, points: np.ndarray, rows: int | None = None) -> np.ndarray:
    """float64 [parts, 6]: the sums `NAMES` of every part.

    `rows` of every device, or those of the largest part.
    """
    part_sums = np.diff(sums[points], axis=0)
    if rows is None:
        rows = int(np.diff(points).max())
    return np.column_stack([np.full(len(part_sums), rows), part_sums])


@dataclass(frozen=True)
class Cost:
    """Seconds of device d = slowness[d] x (weights . sums of its part).

    Weights [6], slowness [devices].
    """

    weights: np.ndarray
    slowness: np.ndarray

    def seconds(self, sums: np.ndarray, points: np.ndarray, rows: int | None = None) -> np.ndarray:
        """float64 [parts]: predicted seconds of each device; `rows`: as in `features_of`."""
        return self.slowness * (features_of(sums, points, rows) @ self.weights)


# ---------------------------------------------------------------------------------- split points


class EdgeLimit(NamedTuple):
    """The in-edges before each vertex [vertices + 1], and those of a part at most."""

    before: np.ndarray
    most: int


def best_points(
    sums: np.ndarray, cost: Cost, rows: int | None = None, edges: int | None = None
) -> np.ndarray:
    """int64 [devices + 1]: the split points with the least seconds of the slowest device.

    With `rows`, every device has exactly that capacity of rows, and of `edges` if given. Without,
    numbers of rows are tried from the smallest possible upwards. For a number of rows, the least
    time in which a sweep that gives every device all that it can do reaches the end is bisected; a
    sweep takes O(devices log vertices).
    """
    before = sums @ cost.weights[1:]
    if rows is not None:
        limit = None if edges is None else EdgeLimit(sums[:, 1], edges)
        return _fastest(before, cost, rows, limit)
    candidates = [_fastest(before, cost, count) for count in _row_counts(len(sums) - 1, cost)]
    return min(candidates, key=lambda points: cost.seconds(sums, points).max())


def _row_counts(vertices: int, cost: Cost) -> list[int]:
    """Numbers of rows of every device that are tried, in geometric steps."""
    smallest = -(-vertices // len(cost.slowness))
    counts = set()
    if cost.weights[0] > 0:  # otherwise more rows cost nothing
        for k in range(24):
            count = np.ceil(smallest * vertices ** (k / 24) / smallest ** (k / 24))
            counts.add(min(vertices, int(count)))
    return [vertices, *sorted(counts)]


def _fastest(
    before: np.ndarray, cost: Cost, rows: int, edges: EdgeLimit | None = None
) -> np.ndarray:
    """The fastest split points with at most that many vertices, and edges, in each part.

    `before` [vertices + 1]: seconds of the vertices before each.
    """
    constant = cost.weights[0] * rows
    low = 0.0
    high = float(cost.slowness.max() * (before[-1] + constant))
    best = _sweep(before, high * (1 + 1e-9) / cost.slowness - constant, rows, edges)
    for _ in range(64):
        middle = (low + high) / 2
        points = _sweep(before, middle / cost.slowness - constant, rows, edges)
        if points[-1] == len(before) - 1:
            high = middle
            best = points
        else:
            low = middle
        if high - low <= 1e-12 * high:
            break
    best[-1] = len(before) - 1
    return best


def _sweep(
    before: np.ndarray, budgets: np.ndarray, rows: int, edges: EdgeLimit | None
) -> np.ndarray:
    """Split points where each device in turn gets all vertices that its budget allows."""
    points = np.zeros(len(budgets) + 1, np.int64)
    for d, budget in enumerate(budgets):
        first = points[d]
        last = _up_to(before, first, budget) if budget >= 0 else first
        if edges is not None:
            last = min(last, _up_to(edges.before, first, edges.most))
        points[d + 1] = max(first, min(last, first + rows, len(before) - 1))
    return points


def _up_to(sums: np.ndarray, first: np.int64, most: float) -> Any:
    """The last vertex up to which the sum from the first one is within a limit."""
    return np.searchsorted(sums, sums[first] + most, side="right") - 1


def initial_points(
    sums: np.ndarray, parts: int, row_seconds: float, edge_seconds: float
) -> np.ndarray:
    """int64 [parts + 1]: split points before anything is measured, of devices that are alike.

    `row_seconds` of each row of a device, `edge_seconds` of each in-edge. An equal number of edges
    in every part would give many vertices to a part with few edges a vertex, and every device
    computes the rows of the largest part.

    >>> sums = prefix_sums(Graph.from_edges([0] * 6 + [1, 2, 3], [0] * 6 + [1, 2, 3], 4))
    >>> initial_points(sums, 2, 0.0, 1.0), initial_points(sums, 2, 9.0, 1.0)
    (array([0, 1, 4]), array([0, 2, 4]))
    """
    weights = np.zeros(len(NAMES))
    weights[NAMES.index("rows")] = row_seconds
    weights[NAMES.index("edges")] = edge_seconds
    return best_points(sums, Cost(weights, np.ones(parts)))


# --------------------------------------------------------------------------------------- the fit


@dataclass
class SplitMeasurements:
    """Times of parts in their last epochs.

    features    float64 [n, 6]: their sums
    devices     int [n]: the devices that computed them
    seconds     float64 [n] of each epoch
    trust       weight of the split: its epochs, older ones less
    """

    features: np.ndarray
    devices: np.ndarray
    seconds: deque[np.ndarray] = field(default_factory=lambda: deque(maxlen=RECENT))
    trust: float = 0.0


class Learner:
    """Takes measured seconds and gives a `Cost`.

    `error` tells how far its predictions were from later measurements.
    """

    def __init__(self, devices: int) -> None:
        self.devices = devices
        self.cost: Cost | None = None
        self._splits: list[SplitMeasurements] = []
        self._errors: list[float] = []

    def add(
        self, features: np.ndarray, seconds: np.ndarray, devices: np.ndarray | None = None
    ) -> Cost:
        """The cost after more measurements.

        features    float64 [n, 6]: sums of parts
        seconds     float64 [n]
        devices     int [n]; None: 0 to n - 1
        """
        if devices is None:
            devices = np.arange(len(seconds))
        if self.cost is not None:
            predicted = self.cost.slowness[devices] * (features @ self.cost.weights)
            errors = np.abs(predicted / np.maximum(seconds, 1e-12) - 1)
            self._errors = [*self._errors[1 - MEMORY :], float(np.median(errors))]
        for split in self._splits:
            split.trust *= FORGET
        if not self._splits or not np.array_equal(self._splits[-1].features, features):
            self._splits = [*self._splits[1 - MEMORY :], SplitMeasurements(features, devices)]
        self._splits[-1].seconds.append(np.asarray(seconds, float))
        self._splits[-1].trust += 1
        self.cost = self._fit()
        return self.cost

    @property
    def error(self) -> float | None:
        """The median relative error of predictions against later measurements.

        None before there was one.
        """
        return float(np.median(self._errors[-8:])) if self._errors else None

    def _fit(self) -> Cost:
        """Weighted least squares, alternating between the coefficients and the devices.

        The coefficients are pulled towards "all time is edges", until parts have varied.
        """
        features = np.concatenate([split.features for split in self._splits])
        seconds = np.concatenate([np.median(split.seconds, axis=0) for split in self._splits])
        device = np.concatenate([split.devices for split in self._splits])
        trusts = [np.full(len(split.devices), split.trust) for split in self._splits]
        base_trust = np.concatenate(trusts)
        unit = max(seconds.mean(), 1e-12)
        means = features.mean(axis=0)
        scale = np.where(means > 0, means, 1)
        x = features / scale
        y = seconds / unit
        varied = len(np.unique(np.round(x, 3), axis=0)) / self.devices
        pull = 0.1 / varied**2
        toward = np.zeros(x.shape[1])
        toward[NAMES.index("edges")] = y.mean()

        trust = base_trust
        weights = toward
        slowness = np.ones(self.devices) if self.cost is None else self.cost.slowness
        logarithms = [np.log(slowness)]
        for _ in range(ITERATIONS):
            root = np.sqrt(trust)
            rows = (root * slowness[device])[:, None] * x
            weights = _fitted_weights(rows, root * y, pull, toward)
            plain = x @ weights
            slowness = _fitted_slowness(plain, y, device, trust, self.devices)
            logarithms.append(np.log(np.maximum(slowness, 1e-3)))
            logarithms[-1] -= logarithms[-1].mean()
            if len(logarithms) == 4:
                logarithms = [_extrapolated(logarithms)]
            slowness = np.exp(logarithms[-1])
            residuals = np.abs(y - slowness[device] * plain)
            usual = OUTLIER * max(1.4826 * float(np.median(residuals)), 1e-9)
            trust = base_trust * np.minimum(1, usual / np.maximum(residuals, 1e-12))
            extrapolated = len(logarithms) == 1
            if not extrapolated and np.abs(logarithms[-1] - logarithms[-2]).max() < SETTLED:
                break
        return Cost(weights * unit / scale, slowness)


def _fitted_weights(
    rows: np.ndarray, seconds: np.ndarray, pull: float, toward: np.ndarray
) -> np.ndarray:
    """[6]: coefficients, none negative, of rows [n, 6] and seconds [n].

    `pull`: ridge penalty `toward` others.
    """
    size = rows.shape[1]
    square = rows.T @ rows + pull * np.eye(size)
    right = rows.T @ seconds + pull * toward
    lower = np.linalg.cholesky(square + 1e-12 * np.trace(square) * np.eye(size))
    # The same minimum as that of all rows, of 6 rows.
    weights, _ = nnls(lower.T, np.linalg.solve(lower, right))
    return weights


def _fitted_slowness(
    plain: np.ndarray, seconds: np.ndarray, device: np.ndarray, trust: np.ndarray, devices: int
) -> np.ndarray:
    """[devices]: factors of devices, pulled to 1.

    `plain` [n]: predicted seconds of their parts without these factors.
    """
    tie = ALIKE * np.bincount(device, trust, devices) * (plain**2).mean() + 1e-12
    covariance = np.bincount(device, trust * plain * seconds, devices)
    variance = np.bincount(device, trust * plain**2, devices)
    return (covariance + tie) / (variance + tie)


def _extrapolated(logarithms: Sequence[np.ndarray]) -> np.ndarray:
    """The limit of iterations whose changes are each the same share of the one before."""
    before = logarithms[-2] - logarithms[-3]
    change = logarithms[-1] - logarithms[-2]
    ratio = float(before @ change) / max(float(before @ before), 1e-30)
    share = min(max(0.0, ratio), FAR)
    return logarithms[-1] + change * share / (1 - share)


# --------------------------------------------------------------------- without measured training

RANGES = 48
"""Ranges of vertices that a calibration times."""


def calibrated(
    graph: Graph, sums: np.ndarray, width: int, report: Callable[..., Any] | None = None
) -> tuple[np.ndarray, float]:
    """(weights [6], relative error) of sums over random contiguous ranges, timed on one core.

    The error is the median one of ranges that the fit had not seen. `width`: features of a vertex.
    Dense layers are not part of it. `report(text, done, all)` is called after every range.
    """
    random = np.random.default_rng(0)
    timed = _timed_sums(graph, width)
    timed(0, min(graph.vertices, 1))
    features = []
    seconds = []
    for i in range(RANGES):
        first, last = _random_range(graph, random, by_vertices=i % 2 == 1)
        features.append(np.append(0.0, sums[last] - sums[first]))
        seconds.append(min(timed(first, last) for _ in range(3)))
        if report is not None:
            report("timing ranges", i + 1, RANGES)
    learner = Learner(1)
    one_device = np.zeros(RANGES // 2, int)
    half = RANGES // 2
    learner.add(np.array(features[:half]), np.array(seconds[:half]), one_device)
    cost = learner.add(np.array(features[half:]), np.array(seconds[half:]), one_device)
    return cost.weights, learner.error or 0.0


def _timed_sums(graph: Graph, width: int) -> Callable[[int, int], float]:
    """A function of (first, last): seconds of summing over the in-edges of these vertices."""
    from partita.gnn.kernels.total import sum_range

    offsets = graph.offsets.astype(np.int32)
    ids = np.asarray(graph.sources).astype(np.int32, copy=False)
    x = np.ones((graph.vertices, width), np.float32)
    out = np.zeros((graph.vertices, width), np.float32)

    def timed(first: int, last: int) -> float:
        began = time.perf_counter()
        sum_range((first, last), offsets, ids, x, out)
        return time.perf_counter() - began

    return timed


def _random_range(graph: Graph, random: np.random.Generator, by_vertices: bool) -> tuple[int, int]:
    """(first, last) of a range with a random share of the vertices, or of the edges.

    Ranges by edges are hubs alone; those by vertices have many vertices with few edges.
    """
    length = random.uniform(0.02, 0.2)
    begin = random.uniform(0, 1 - length)
    shares = np.array([begin, begin + length])
    if by_vertices:
        first, last = (shares * graph.vertices).astype(int)
    else:
        first, last = np.searchsorted(graph.offsets[:-1], shares * graph.edges)
    last = min(graph.vertices, max(last, first + 1))
    return min(first, last - 1), last


# ----------------------------------------------------------------------------------- in training

GAIN = 0.02
"""Share of an epoch that another split must save at least."""

ENOUGH = 3
"""Epochs that a split is measured for at least."""

STEPS = (1.0, 0.75, 0.5, 0.25)
"""Shares of the way to the best split that are considered."""

TRIED = 0.25
"""Share of the time left that must be worth more than a move for a split to be tried only to learn
from it."""


class Candidate(NamedTuple):
    """Another split.

    seconds         predicted or measured, of its slowest device
    points          split points
    other_capacity  whether it needs another capacity than the devices have
    """

    seconds: float
    points: np.ndarray
    other_capacity: bool


class Balance:
    """The learned split of a graph in training.

    It takes the seconds of every epoch and gives new split points when they pay.

    A move that disappoints teaches the makeup of times, and the next one is better for it. Where no
    split promises more, `trials`, other split points, are measured if training is long enough,
    since splits that are alike tell little. A split whose measured time was better than the
    predicted ones is taken again. `sums`: the graph's `prefix_sums`.
    """

    def __init__(
        self, sums: np.ndarray, points: np.ndarray, trials: Sequence[np.ndarray] = ()
    ) -> None:
        self.sums = sums
        self.points = points
        self.trials = list(trials)
        self.learner = Learner(len(points) - 1)
        self.moves: list[list[int]] = []
        self.rows = 0
        self.edges: int | None = None
        self._epochs = 0
        self._slowest: dict[tuple[int, ...], list[float]] = {}

    def measured(self, seconds: np.ndarray, rows: int, edges: int | None = None) -> None:
        """Takes the computing seconds of every device in an epoch.

        `rows`, `edges`: the capacity of each.
        """
        self.rows = rows
        self.edges = edges
        self.learner.add(features_of(self.sums, self.points, rows), seconds)
        self._slowest.setdefault(self._split(self.points), []).append(float(seconds.max()))
        self._epochs += 1

    def better(
        self,
        epochs: int,
        making_seconds: float,
        compiling_seconds: float,
        fits: Callable[[np.ndarray], bool],
    ) -> tuple[np.ndarray, bool] | None:
        """(split points, whether they need other capacity) that save most, or None if nothing pays.

        A move takes `making_seconds`, and `compiling_seconds` too with other capacity, or if
        `fits(points)` is false. None also while too little is measured. Where the best split does
        not fit, one in its direction may.
        """
        cost = self.learner.cost
        if cost is None or self._epochs < ENOUGH:
            return None
        measured = {
            split: float(np.median(seconds[-MEMORY:])) for split, seconds in self._slowest.items()
        }
        now = measured[self._split(self.points)]
        # Gains below the error of predictions would follow noise.
        margin = max(GAIN, min(self.learner.error or 0.0, 0.2) / 2)
        most_saved = 0.0
        best = None
        for seconds, points, other_capacity in self._candidates(cost, measured):
            if seconds >= (1 - margin) * now:
                break
            saved = (now - seconds) * epochs - making_seconds
            # The question whether parts fit is the expensive one, so it comes last.
            if saved > most_saved and (other_capacity or not fits(points)):
                saved -= compiling_seconds
            if saved > most_saved:
                most_saved = saved
                best = (points, other_capacity)
        if best is not None:
            return best
        move_seconds = making_seconds + compiling_seconds
        while self.trials:
            points = self.trials.pop(0)
            if self._split(points) not in measured and TRIED * now * epochs > move_seconds:
                return points, True
        # Splits that did not pay are not considered again in every epoch.
        self._epochs = 0
        return None

    def _candidates(self, cost: Cost, measured: dict[tuple[int, ...], float]) -> list[Candidate]:
        """Other splits, the fastest first: those measured, and those predicted to be faster."""
        candidates = []
        for split, seconds in measured.items():
            points = np.array(split[1:], np.int64)
            candidates.append(Candidate(seconds, points, split[0] != self.rows))
        now = cost.seconds(self.sums, self.points, self.rows).max()
        way = best_points(self.sums, cost, self.rows, self.edges) - self.points
        targets: list[tuple[np.ndarray, int | None]] = []
        for share in STEPS:
            targets.append((self.points + (share * way).astype(np.int64), self.rows))
        targets.append((best_points(self.sums, cost), None))
        for points, rows in targets:
            seconds = cost.seconds(self.sums, points, rows).max()
            if self._split(points) not in measured and seconds < (1 - GAIN) * now:
                candidates.append(Candidate(float(seconds), points, rows is None))
        return sorted(candidates, key=lambda candidate: candidate.seconds)

    def _split(self, points: np.ndarray) -> tuple[int, ...]:
        """A split with the capacity of rows there is, as a key of measurements."""
        return (self.rows, *points.tolist())

    def moved(self, points: np.ndarray) -> None:
        """Continues with other split points."""
        self.points = points
        self._epochs = 0
        self.moves.append([int(point) for point in points])

    def facts(self) -> dict[str, Any]:
        """Facts for JSON.

        Moves, split points, error of predictions, predicted seconds, slowness of devices (median
        1), weights of the sums.
        """
        cost = self.learner.cost
        facts: dict[str, Any] = {
            "moves": len(self.moves),
            "points": [int(point) for point in self.points],
            "error": self.learner.error,
        }
        if cost is not None:
            middle = float(np.median(cost.slowness))
            weights = (cost.weights * middle).tolist()
            facts["seconds"] = cost.seconds(self.sums, self.points, self.rows).tolist()
            facts["slowness"] = (cost.slowness / middle).tolist()
            facts["weights"] = dict(zip(NAMES, weights, strict=True))
        return facts

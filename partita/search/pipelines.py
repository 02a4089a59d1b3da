"""Plans in stages: how many, where one ends and the next begins, how many microbatches, what is recomputed, and the split inside a stage.

Every number of stages (the slow axes of the mesh tell them apart) and of microbatches, with runs recomputed and without, is a *shape*. A shape is first
sketched: its operators, equal ones as one (`search.fold`), are split over the axes that are left by the exact search, then dealt to stages in the order of the
model, so that the slowest stage is as fast as can be and every stage fits in memory; a stage ends only where little is handed on. That takes
some hundredths of a second and says about what a step takes and a device holds. Shapes that could not be faster if nothing were sent are not even sketched.
The sketches that look fastest are then simulated, memory included, and the best plan that fits is kept.

Alpa (Zheng et al., OSDI 2022) has the two levels, stages outside and splits inside; here every stage splits the same axes.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from partita.cost.evaluate import PARTS
from partita.cost.moves import group_of
from partita.cost.terms import Terms
from partita.errors import PlanError
from partita.graph.operator_graph import Label, OperatorGraph, Phase
from partita.machine import Machine
from partita.plans.layout import label_sharding
from partita.plans.pipeline import is_pipeline, sample_factor
from partita.plans.plan import TIME, Axis, Mesh, Plan
from partita.search.base import Problem, Progress, Report
from partita.search.bound import lower_bounds_by_phase
from partita.search.candidates import assignment_of
from partita.search.elimination import PricedProblem
from partita.search.fold import fold
from partita.search.network import CostNetwork, build
from partita.search.reduce import reduce
from partita.simulation.pipelined import PipelinedStep

PER_STAGE = (1, 2, 4, 8, 16)
"""Microbatches per stage that are tried."""
USUAL = 8
"""Microbatches per stage that are tried first."""
ALONE = (1, 4, 16, 64)
"""Microbatches where there is one stage: fewer are faster, more hold less."""
NARROW = 1.2
"""A stage may end where no more than so many times the bytes are handed on than at the best place around."""
SECONDS = 10.0
"""How long to look at most, unless it is said."""
INSTRUCTIONS = 150_000
"""Instructions of all steps that are simulated, at most: some seconds. At least FEWEST steps are."""
FEWEST = 8
PRICES = 5
"""Prices of a byte that are tried until a shape fits, and as many between the last two."""
TRIES, DIVISIONS = 3, 3
"""Splits that are tried for one shape until one fits, and divisions into stages for one split."""
ROOM = 0.95
"""The part of a device's memory that operators may be dealt into: what runs need for themselves comes on top."""
SLACK = 1.001
"""How much slower than it could be the slowest stage may be, for stages that hold less."""
FAR = 1.25
"""Where a number of stages looks so much slower than another, the next smaller one is not looked at."""
CHOICES = 50
"""Choices per operator inside a stage, about: fewer than where nothing but them is looked for."""
NETWORKS = 4
"""Cost networks that are kept: shapes with and without recomputation share theirs."""
HALVINGS = 16
"""Halvings of an interval until its middle is taken for the answer."""


@dataclass(frozen=True)
class _Shape:
    """What is tried: the axes that tell stages apart are the first `axes` of the mesh."""

    axes: int
    stages: int
    microbatches: int
    recompute: bool

    @property
    def again(self) -> int:
        """How often a microbatch goes forward."""
        return 2 if self.recompute else 1

    @property
    def flying(self) -> float:
        """Microbatches that a stage holds at once, on the average of all stages."""
        return min(self.microbatches, (self.stages + 1) / 2)

    @property
    def passes(self) -> int:
        """How long a step is, in passes of one microbatch through a stage."""
        return self.microbatches + self.stages - 1


@dataclass(frozen=True)
class _Sketch:
    """About what a shape comes to: seconds of a step, and those that are left where all hides that can."""

    shape: _Shape
    seconds: float
    least: float
    price: float
    """Seconds that a byte cost."""
    limit: float
    """Bytes that a device was to hold."""
    states: tuple[int, ...]
    runs: _Runs
    """What is divided into stages."""
    inside: CostNetwork
    """What the states stand for; without tables."""
    tries: int
    """Limits that are left to try where it does not fit."""


def stage(
    graph: OperatorGraph,
    machine: Machine,
    mesh: Mesh,
    terms: Terms,
    limit: int,
    most: float,
    report: Report | None = None,
    bound: float = 0.0,
    seconds: float | None = None,
) -> PipelinedStep | None:
    """The fastest staged plan found that takes less than `most` and fits `limit` bytes a device; None if there is none.

    It simulates a number of plans that depends on the graph alone, and ends after about so many `seconds`, half of them at most for sketches where there is one to
    simulate. Where no plan at all is known to fit (`most` is infinite), it goes on until one is found. Ctrl-C ends with the best so far.
    """
    begun, best = time.perf_counter(), None
    late = lambda part: (
        time.perf_counter() - begun > part * (SECONDS if seconds is None else seconds)
    )  # noqa: E731
    looks = max(FEWEST, INSTRUCTIONS // max(1, len(graph.instructions)))
    queue = _Queue(_Shapes(graph, machine, mesh, terms, limit))
    try:
        while (best is None and math.isinf(most)) or (looks > 0 and not late(1.0)):
            least = most if best is None else best.seconds
            what = queue.next(least, late(0.5))
            if what is None:
                break
            if isinstance(what, _Shape):
                queue.put(queue.shapes.sketch(what, limit, TRIES))
                continue
            looks -= 1
            found = queue.shapes.simulated(what)
            if isinstance(found, _Sketch):
                queue.put(found)
            elif found is not None and found.seconds < least:
                best, least = found, found.seconds
            if report is not None:
                report(
                    Progress(
                        f"{what.shape.stages} stages, {what.shape.microbatches} microbatches",
                        least,
                        bound,
                    )
                )
    except KeyboardInterrupt:  # the best so far
        pass
    return best


class _Queue:
    """What comes next: one sketch of every number of stages, then whatever looks fastest, a shape to be sketched or a sketch to be simulated.

    How much more than its lower bound a shape takes is guessed from those sketched with as many stages: a power of the number of microbatches.
    """

    def __init__(self, shapes: _Shapes) -> None:
        self.shapes = shapes
        self.sketches: list[tuple[float, int, _Sketch]] = []
        self.count = 0
        self.left = {
            axes: sorted(shapes.every(axes), key=shapes.usual)
            for axes in reversed(range(len(shapes.mesh.axes) + 1))
        }
        """Shapes by axes, the usual ones first; small meshes first."""
        self.more: dict[int, dict[int, float]] = {}
        """Axes -> microbatches -> seconds of a sketch over its lower bound."""
        self.seconds: dict[int, float] = {}
        """Axes -> those of the fastest sketch."""

    def put(self, sketch: _Sketch | None) -> None:
        if sketch is not None:
            heapq.heappush(self.sketches, (sketch.seconds, self.count, sketch))
            self.count += 1
            shape = sketch.shape
            self.more.setdefault(shape.axes, {}).setdefault(
                shape.microbatches, sketch.seconds / self.shapes.least(shape)
            )
            self.seconds[shape.axes] = min(sketch.seconds, self.seconds.get(shape.axes, math.inf))

    def next(self, most: float, late: bool) -> _Shape | _Sketch | None:
        """What may take less than `most`; where it is `late`, a sketch if there is one."""
        while self.sketches and self.sketches[0][-1].least >= most:
            heapq.heappop(self.sketches)
        promising = min(most, self.sketches[0][0] if self.sketches else math.inf)
        if not (late and self.sketches):
            for left in self.left.values():
                left[:] = [shape for shape in left if self.shapes.least(shape) < most]
            first = next(
                (
                    axes
                    for axes, left in self.left.items()
                    if left and axes not in self.more and not self._far(axes)
                ),
                None,
            )
            if first is not None:
                return self.left[first].pop(0)
            guess, axes, n = min(
                (
                    (self._guess(shape), axes, n)
                    for axes, left in self.left.items()
                    for n, shape in enumerate(left)
                ),
                default=(math.inf, 0, 0),
            )
            if guess < promising:
                return self.left[axes].pop(n)
        return heapq.heappop(self.sketches)[-1] if self.sketches else None

    def _far(self, axes: int) -> bool:
        """Whether so few stages are not looked at, as a few more are slow."""
        return self.seconds.get(axes + 1, 0.0) > FAR * min(self.seconds.values(), default=math.inf)

    def _guess(self, shape: _Shape) -> float:
        """About the seconds of a shape that is not sketched."""
        known = self.more.get(shape.axes)
        if known is None:
            return math.inf if self._far(shape.axes) else self.shapes.least(shape)
        distance = lambda m: abs(math.log(m / shape.microbatches))  # noqa: E731
        near, *others = sorted(known, key=distance)
        if not others:  # what is more may fall with the number of microbatches, until two are known
            return self.shapes.least(shape) * (
                1 + (known[near] - 1) * min(1.0, shape.microbatches / near)
            )
        power = math.log(known[others[0]] / known[near]) / math.log(others[0] / near)
        return self.shapes.least(shape) * max(
            1.0, known[near] * (shape.microbatches / near) ** power
        )


@dataclass(eq=False)
class _Shapes:
    """All shapes of a graph on a mesh, with what is known of them."""

    graph: OperatorGraph
    machine: Machine
    mesh: Mesh
    terms: Terms
    limit: int
    _networks: dict[tuple[int, int], CostNetwork] = field(default_factory=dict)
    _independent: dict[int, bool] = field(default_factory=dict)

    @cached_property
    def narrow(self) -> list[int]:
        """Operators after which a stage or a recomputed run may end."""
        return _narrow(len(self.graph.operators), _handed_on(self.terms))

    @cached_property
    def crossing(self) -> list[_Crossing]:
        """Per such place, what is handed on over it in the forward pass, as it is kept where it was made."""
        found: list[_Crossing] = [[] for _ in self.narrow]
        for home, reader, label, nbytes in _handed_on(self.terms):
            for n in range(bisect_left(self.narrow, home), bisect_left(self.narrow, reader)):
                found[n].append((home, label, nbytes))
        return found

    @cached_property
    def sent(self) -> tuple[list[_Crossing], list[_Crossing]]:
        """Per such place, what goes over it in the forward pass and in the backward pass, as the next that reads it wants it."""
        found: tuple[list[_Crossing], list[_Crossing]] = (
            [[] for _ in self.narrow],
            [[] for _ in self.narrow],
        )
        readers: dict[tuple[int, int, bool], list[tuple[int, Label, int]]] = {}
        for m in self.terms.edges:
            if m.phase == m.read_phase != "update" and (m.phase == "forward") == (
                m.home < m.reader
            ):
                readers.setdefault((m.tensor, m.home, m.phase == "forward"), []).append(
                    (m.reader, m.dims[1], m.nbytes * m.trips)
                )
        for (_, home, forward), every in readers.items():
            every.sort(key=lambda reader: reader[0], reverse=not forward)
            at = home
            for reader, label, nbytes in every:
                for n in range(
                    bisect_left(self.narrow, min(at, reader)),
                    bisect_left(self.narrow, max(at, reader)),
                ):
                    found[0 if forward else 1][n].append((reader, label, nbytes))
                at = reader
        return found

    @cached_property
    def kernels(self) -> dict[Phase, float]:
        """Seconds that all devices together compute at least, by phase."""
        return lower_bounds_by_phase(self.terms, self.machine)

    @cached_property
    def bytes(self) -> tuple[int, int]:
        """Bytes of variables, their slots and gradients, and of forward values that the backward pass reads, of all devices together."""
        stored = [s for own in self.terms.operators for s in own.stored]
        resident = sum(nbytes for own in self.terms.operators for nbytes, _ in own.resident)
        return sum(2 * s.nbytes + s.slots for s in stored) + resident, sum(
            nbytes for own in self.terms.operators for nbytes, _ in own.activations
        )

    def every(self, axes: int) -> Iterator[_Shape]:
        """All shapes whose stages these first axes tell apart."""
        stages = math.prod(self.mesh.sizes[:axes])
        if stages <= len(self.narrow) + 1:
            for microbatches in ALONE if stages == 1 else [stages * n for n in PER_STAGE]:
                if self.graph.batch_size % microbatches == 0 and self.independent(microbatches):
                    for recompute in (False, True) if (stages, microbatches) != (1, 1) else (True,):
                        yield _Shape(axes, stages, microbatches, recompute)

    def independent(self, microbatches: int) -> bool:
        """Whether a microbatch goes forward without values of other samples (`independent`)."""
        if microbatches not in self._independent:
            self._independent[microbatches] = independent(self.graph, self.terms, microbatches)
        return self._independent[microbatches]

    def usual(self, shape: _Shape) -> tuple[float, bool]:
        """How far a shape is from what is usual: the less, the sooner it is looked at."""
        return abs(math.log(shape.microbatches / (USUAL * shape.stages))), shape.recompute

    def least(self, shape: _Shape) -> float:
        """Seconds of a step in which nothing is sent and stages are equal."""
        seconds = self.kernels
        whole = shape.again * seconds["forward"] + seconds["backward"]
        return (whole * shape.passes / shape.microbatches + seconds["update"]) / self.mesh.size

    def holds(self, shape: _Shape) -> float:
        """Bytes that all stages together hold at least, on a device of each."""
        state, kept = self.bytes
        return (
            (state + (0.0 if shape.recompute else kept / shape.microbatches * shape.flying))
            * shape.stages
            / self.mesh.size
        )

    def _network(self, shape: _Shape) -> CostNetwork:
        key = (shape.axes, shape.microbatches)
        if key not in self._networks:
            inner = [Axis(TIME, shape.microbatches, -1)] if shape.microbatches > 1 else []
            if len(self._networks) == NETWORKS:
                del self._networks[next(iter(self._networks))]
            self._networks[key] = build(
                self.graph,
                self.machine,
                Mesh((*inner, *self.mesh.axes[shape.axes :])),
                terms=self.terms,
                limit=CHOICES,
            )
        return self._networks[key]

    def sketch(self, shape: _Shape, limit: float, tries: int, price: float = 0.0) -> _Sketch | None:
        """What a shape comes to if a device may hold so many bytes, a byte at `price` or more seconds; None where it does not fit."""
        if not tries or self.holds(shape) > limit * shape.stages:
            return None
        costs = _Costs(self._network(shape), shape)
        problem = costs.problem
        if sum(float(nbytes.min()) for nbytes in problem.nbytes) > limit * shape.stages:
            return None
        folded = fold(problem)
        reduced = reduce(folded.problem)
        priced = PricedProblem(reduced.problem)
        inside = replace(
            costs.network, problem=Problem([], []), parts=[], activations=[], gradients=[], moves={}
        )

        def at(price: float) -> _Sketch | None:
            states = folded.lift(reduced.lift(priced.solve(price)[0]))
            dealt = costs.dealt(self, states, limit)
            return dealt and _Sketch(
                shape, dealt[0], dealt[1], price, limit, states, dealt[2], inside, tries - 1
            )

        low, found = 0.0, at(price)
        if found is None:
            low, price = (
                price,
                max(
                    8 * price,
                    sum(float(s.min()) for s in reduced.problem.seconds)
                    / (limit * shape.stages)
                    / 64,
                ),
            )
            for _ in range(PRICES):
                found = at(price)
                if found is not None:
                    break
                low, price = price, 8 * price
            for _ in range(
                PRICES if found is not None else 0
            ):  # cheaper bytes are faster, as long as it fits
                if price < 1.1 * low:
                    break
                middle = math.sqrt(low * price) if low else price / 8
                cheaper = at(middle)
                if cheaper is None:
                    low = middle
                    continue
                price, found = (
                    middle,
                    min(found, cheaper, key=lambda sketch: sketch.seconds) if found else cheaper,
                )
        return found

    def simulated(self, sketch: _Sketch) -> PipelinedStep | _Sketch | None:
        """The plan of a sketch that fits, its step to be simulated; where none does, a sketch that holds less."""
        inner, limit, staged = sketch.inside.plan(sketch.states), sketch.limit, None
        try:  # bytes are looked at first: they are known without simulating
            for _ in range(DIVISIONS):
                division = sketch.runs.divided(limit)
                if division is None:
                    break
                plan = _plan(inner, self.graph, self.mesh, sketch.shape, division, self.narrow)
                if not is_pipeline(plan):  # all fits as it is: that is no plan in stages
                    return None
                if staged is None:
                    staged = PipelinedStep.of(self.graph, self.machine, plan, self.terms)
                else:  # split alike
                    staged = staged.with_plan(plan)
                if staged.peak_bytes <= self.limit:
                    return (
                        staged if staged.seconds < math.inf else None
                    )  # simulated here: what waits in a circle is a PlanError
                limit *= min(0.98, self.limit / staged.peak_bytes)
        except PlanError:
            return None
        return self.sketch(sketch.shape, limit, sketch.tries, sketch.price)


@dataclass(frozen=True, eq=False)
class _Own:
    """By state of an operator: seconds of a microbatch, and of them those forward; the same without what may hide; seconds once a step; bytes.

    `kept` are bytes of a microbatch's forward values, `fixed` all others.
    """

    each: np.ndarray
    forward: np.ndarray
    shown: np.ndarray
    shown_forward: np.ndarray
    once: np.ndarray
    fixed: np.ndarray
    kept: np.ndarray


@dataclass(frozen=True)
class _Division:
    """Where stages end, as numbers of runs, and which runs are recomputed."""

    ends: Sequence[int]
    again: Sequence[int]


_Crossing = list[tuple[int, Label, int]]
"""Values: (operator, label in its factors, bytes)."""


class _Costs:
    """What operators cost in a shape, and the division into stages that follows from it."""

    def __init__(self, network: CostNetwork, shape: _Shape) -> None:
        self.network, self.shape = network, shape
        self.shown = 1 - network.placement.machine.backend.overlap
        made: dict[int, _Own] = {}
        for parts, nbytes, kept, gradients, states in zip(
            network.parts,
            network.problem.nbytes,
            network.activations,
            network.gradients,
            network.states,
            strict=True,
        ):
            if id(parts) not in made:
                made[id(parts)] = self._own(
                    parts, nbytes, kept, gradients, np.array([state.zero == 3 for state in states])
                )
        self.own = [made[id(parts)] for parts in network.parts]

    def _own(
        self,
        parts: np.ndarray,
        nbytes: np.ndarray,
        kept: np.ndarray,
        gradients: np.ndarray,
        apart: np.ndarray,
    ) -> _Own:
        """`apart`: whether variables are stored in parts, and gathered whenever a microbatch goes forward."""
        row = {part: parts[n] for n, part in enumerate(PARTS)}
        gather = row["gather", "forward"] * self.shown
        once = (
            row["compute", "update"]
            + row["exchange", "update"]
            + row["sum", "backward"] * self.shown
            + np.where(apart, 0.0, gather)
        )
        computed, sent = (
            row["compute", "forward"] + np.where(apart, gather, 0.0),
            row["exchange", "forward"],
        )
        back, sent_back = row["compute", "backward"], row["exchange", "backward"]
        forward, shown = computed + sent, computed + self.shown * sent
        return _Own(
            forward + back + sent_back,
            forward,
            shown + back + self.shown * sent_back,
            shown,
            once,
            nbytes - kept + gradients,
            kept,
        )

    @property
    def problem(self) -> Problem:
        """Seconds of all stages together in a step that waits as this shape does, and bytes of all stages: what is in flight is kept so often."""
        flying, again, passes = (
            0.0 if self.shape.recompute else self.shape.flying,
            self.shape.again - 1,
            self.shape.passes,
        )
        made = {
            id(own): (
                (own.each + again * own.forward) * passes + own.once,
                own.fixed + own.kept * flying,
            )
            for own in self.own
        }
        problem = Problem(
            [made[id(own)][0] for own in self.own], [made[id(own)][1] for own in self.own]
        )
        tables: dict[int, np.ndarray] = {}
        for ends, table in self.network.problem.tables.items():
            if id(table) not in tables:
                tables[id(table)] = table * passes
            problem.tables[ends] = tables[id(table)]
        return problem

    def dealt(
        self, shapes: _Shapes, states: Sequence[int], limit: float
    ) -> tuple[float, float, _Runs] | None:
        """(about the seconds of a step, those that do not hide, what is divided into stages); None where it does not fit."""
        shape, network, last = self.shape, self.network, self.shape.microbatches - 1
        begins = np.array([0, *(c + 1 for c in shapes.narrow)])
        of = {
            what: np.array([getattr(own, what)[i] for own, i in zip(self.own, states, strict=True)])
            for what in _Own.__annotations__
        }
        for (u, v), table in network.problem.tables.items():
            of["each"][v] += table[states[u], states[v]]
            of["shown"][v] += table[states[u], states[v]] * self.shown
        run = {what: np.add.reduceat(values, begins) for what, values in of.items()}
        handed, forth, back = (
            [0.0, *self._nbytes(crossing, states)] for crossing in (shapes.crossing, *shapes.sent)
        )
        links = group_of(tuple(range(shape.axes)), shapes.mesh)
        hops = [
            network.placement.seconds("collective_permute", there, links)
            + network.placement.seconds("collective_permute", here, links)
            for there, here in zip(forth, back, strict=True)
        ]
        runs = _Runs(shape, run, handed, hops)
        division = runs.divided(limit)
        if division is None:
            return None
        again, cuts = np.zeros(len(begins)), np.array([0, *(e + 1 for e in division.ends)])
        again[list(division.again)] = 1.0
        stages = lambda values: np.add.reduceat(values, cuts[:-1])  # noqa: E731
        every, least = (
            stages(run[what] + again * run[forward])
            for what, forward in (("each", "forward"), ("shown", "shown_forward"))
        )
        ending = stages(run["once"])
        every = every + np.array(
            [*(hops[c] for c in cuts[1:-1]), 0.0]
        )  # a stage has no microbatch to spare for the time in which one is on its way
        seconds = float(every.sum() + (last * every + ending).max())
        before = (
            np.cumsum(least) - least
        )  # a stage begins when those before it have passed one microbatch on, and ends before they take the last one back
        return seconds, float((before + (last + 1) * least + ending).max()), runs

    def _nbytes(self, places: Sequence[_Crossing], states: Sequence[int]) -> list[float]:
        """Bytes of a device and microbatch, place by place."""
        ways: dict[tuple[int, Label], int] = {}
        found = []
        for crossing in places:
            total = 0.0
            for home, label, nbytes in crossing:
                if (home, label) not in ways:
                    split = label_sharding(
                        label, assignment_of(self.network.choice(home, states[home]))
                    )
                    ways[home, label] = self.network.placement.shard_count(
                        [a for axes in split for a in axes]
                    )
                total += nbytes / ways[home, label]
            found.append(total)
        return found


class _Runs:
    """Operators in runs, which are dealt to stages and recomputed as wholes: as few as memory needs, those first that free most bytes in a second.

    Stages near the first hold more microbatches at once, so that it is their runs that are recomputed, or they that have fewer.
    """

    def __init__(
        self,
        shape: _Shape,
        run: Mapping[str, np.ndarray],
        handed: Sequence[float],
        hops: Sequence[float],
    ) -> None:
        """`handed` is what enters every run, `hops` the seconds in which a microbatch goes there and comes back."""
        self.shape, self.handed, self.count = shape, handed, len(handed)
        self.hops = [*(shape.microbatches * seconds for seconds in hops), 0.0]
        self.working = shape.again * float(
            run["kept"][:-1].max(initial=0.0)
        )  # what a run needs in its backward pass: gradients, and values made again
        sums = lambda values: [0.0, *np.cumsum(values).tolist()]  # noqa: E731
        self.busy = sums(run["each"] * shape.microbatches + run["once"])
        self.fixed, self.kept = sums(run["fixed"]), sums(run["kept"])
        kinds: dict[tuple[str, str], list[int]] = {}
        for n, (freed, seconds) in enumerate(
            zip(run["kept"] - np.array(handed), run["forward"] * shape.microbatches, strict=True)
        ):
            if freed > 0 and n < self.count - 1:  # what ends the forward pass is needed at once
                kinds.setdefault((f"{freed:.6g}", f"{seconds:.6g}"), []).append(n)
        self.kinds = sorted(
            ((float(freed), float(seconds), runs) for (freed, seconds), runs in kinds.items()),
            key=lambda kind: kind[1] / kind[0],
        )

    def _again(
        self, begin: int, end: int, stage: int, room: float
    ) -> tuple[float, float, list[tuple[int, int, int]]]:
        """(bytes that are missing however much is recomputed, seconds of a stage of these runs, (kind, first, how many) that are recomputed)."""
        flying = min(self.shape.microbatches, self.shape.stages - stage)
        over = (
            self.fixed[end]
            - self.fixed[begin]
            + (self.kept[end] - self.kept[begin] + self.handed[begin]) * flying
            - room
        )
        seconds, found = self.busy[end] - self.busy[begin] + self.hops[end], []
        for k, (freed, more, runs) in enumerate(self.kinds):
            if over <= 0:
                break
            first = bisect_left(runs, begin)
            count = min(bisect_left(runs, end) - first, math.ceil(over / (freed * flying)))
            over, seconds = over - count * freed * flying, seconds + count * more
            found.append((k, first, count))
        return over, seconds, found

    def _fill(self, slowest: float, room: float) -> list[int] | None:
        """Where stages end that are as full as they may be, from the first on; the later ones get at least one run each."""
        found, begin = [], 0
        for stage in range(self.shape.stages):

            def fits(end: int, begin: int = begin, stage: int = stage) -> bool:
                over, seconds, _ = self._again(begin, end, stage, room)
                return over <= 0 and seconds <= slowest

            low, high = (
                begin,
                min(
                    self.count - self.shape.stages + stage + 1,
                    bisect_right(self.busy, self.busy[begin] + slowest, begin) - 1,
                ),
            )
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(middle) else (low, middle - 1)
            if low == begin:
                return None
            found.append(low - 1)
            begin = low
        return found if begin == self.count else None

    def divided(self, limit: float) -> _Division | None:
        """The division in which the slowest stage takes least, and of those the fullest holds least, of so many bytes a device; None if none fits."""
        room, whole = (
            limit * ROOM - self.working,
            self.busy[-1] + max(self.hops) + sum(more * len(runs) for _, more, runs in self.kinds),
        )
        low, high, best = self.busy[-1] / self.shape.stages, whole, self._fill(whole, room)
        if best is None:
            return None
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self._fill(middle, room)
            low, high, best = (low, middle, found) if found is not None else (middle, high, best)
        least = 0.0
        for _ in range(HALVINGS):
            middle = (least + room) / 2
            found = self._fill(high * SLACK, middle)
            least, room, best = (
                (least, middle, found) if found is not None else (middle, room, best)
            )
        again = [
            n
            for stage, (begin, end) in enumerate(self._pairs(best))
            for n in self._chosen(begin, end, stage, room)
        ]
        return _Division(best, sorted(again))

    def _pairs(self, ends: Sequence[int]) -> Iterator[tuple[int, int]]:
        return itertools.pairwise([0, *(e + 1 for e in ends)])

    def _chosen(self, begin: int, end: int, stage: int, room: float) -> list[int]:
        return [
            n
            for k, first, count in self._again(begin, end, stage, room)[2]
            for n in self.kinds[k][2][first : first + count]
        ]


def independent(graph: OperatorGraph, terms: Terms, microbatches: int) -> bool:
    """Whether microbatches go forward independently of each other.

    They do not where a forward value that microbatches split along one dim is read along another dim, or whole: products
    between samples (contrastive losses) need all samples at once.
    """
    if microbatches == 1:
        return True
    time_factor = [sample_factor(graph, o, {}, microbatches) for o in range(len(graph.operators))]

    def split_dim(operator: int, label: Label) -> int:
        """The dim of a value that microbatches split in an operator, -1 if none."""
        factor = time_factor[operator]
        return label.index(factor) if factor >= 0 and factor in label else -1

    inside = [move for own in terms.operators for move in own.moves]
    for move in (*terms.edges, *inside):
        if move.phase == move.read_phase == "forward":
            source, target = move.dims
            dim = split_dim(move.home, source)
            if dim >= 0 and dim != split_dim(move.reader, target):
                return False
    return True


def _handed_on(terms: Terms) -> list[tuple[int, int, Label, int]]:
    """(home, last reader, label, bytes) of what operators hand on in the forward pass."""
    last: dict[int, tuple[int, int, Label, int]] = {}
    for m in terms.edges:
        if m.phase == m.read_phase == "forward" and m.home < m.reader:
            home, reader, label, nbytes = last.get(
                m.tensor, (m.home, m.reader, m.dims[0], m.nbytes * m.trips)
            )
            last[m.tensor] = (home, max(reader, m.reader), label, nbytes)
    return [*last.values()]


def _narrow(count: int, handed_on: Sequence[tuple[int, int, Label, int]]) -> list[int]:
    """Operators after which a stage or a recomputed run may end: those where little is handed on, compared with places around."""
    handed = np.zeros(count + 1)
    for home, reader, _, nbytes in handed_on:
        handed[home] += nbytes
        handed[reader] -= nbytes
    handed = np.cumsum(handed)[:-1]
    reach = max(4, count // 64)
    return [
        o
        for o in range(count - 1)
        if handed[o] <= NARROW * handed[max(0, o - reach) : min(count - 1, o + reach + 1)].min()
    ]


def _plan(
    inner: Plan,
    graph: OperatorGraph,
    mesh: Mesh,
    shape: _Shape,
    division: _Division,
    narrow: Sequence[int],
) -> Plan:
    """The plan that splits inside stages as `inner` does, its stages and recomputed runs those of a division."""
    names, lasts = [o.name for o in graph.operators], [*narrow, len(graph.operators) - 1]
    choices, stage_of, ends = {}, 0, [lasts[n] for n in division.ends]
    for o, name in enumerate(names):
        if o > ends[stage_of]:
            stage_of += 1
        at, left = {}, stage_of
        for axis in reversed(mesh.axes[: shape.axes]):
            at[axis.name] = f"at({left % axis.size})"
            left //= axis.size
        choices[name] = at | {a: use for a, use in inner.choices[name].items() if a != TIME}
    runs = tuple((names[lasts[n - 1] + 1 if n else 0], names[lasts[n]]) for n in division.again)
    return replace(
        inner, mesh=mesh, choices=choices, microbatches=shape.microbatches, recompute=runs
    )

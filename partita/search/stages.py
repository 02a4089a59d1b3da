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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from partita.cost.evaluate import PARTS
from partita.cost.moves import group_of
from partita.cost.terms import Terms
from partita.errors import PlanError
from partita.graph.graph import Graph, Label, Phase
from partita.machine import Machine
from partita.plan.layout import resolve
from partita.plan.plan import TIME, Axis, Mesh, Plan
from partita.plan.stages import recomputed, stages_of
from partita.search.base import Problem, Progress, Report
from partita.search.bound import least_by_phase
from partita.search.candidates import assignment_of
from partita.search.elimination import Priced
from partita.search.fold import fold
from partita.search.network import Network, build
from partita.search.reduce import reduce
from partita.simulate.stages import Staged

PER_STAGE = (1, 2, 4, 8, 16)
"""Microbatches per stage that are tried."""
ALONE = (1, 4, 16, 64)
"""Microbatches where there is one stage: fewer are faster, more hold less."""
NARROW = 1.2
"""A stage may end where no more than so many times the bytes are handed on than at the best place around."""
SECONDS = 10.0
"""How long to look at most, unless it is said."""
INSTRUCTIONS = 150_000
"""Instructions of all steps that are simulated, at most: some seconds. At least FEWEST steps are."""
FEWEST = 4
PRICES = 5
"""Prices of a byte that are tried until a shape fits, and as many between the last two."""
TRIES = 4
"""Limits of memory that are tried for one shape."""
ROOM = 0.95
"""The part of a device's memory that operators may be dealt into: what runs need for themselves comes on top."""
SLACK = (1.001, 1.1, 1.5)
"""How much slower than it could be the slowest stage may be, for stages that hold less."""
NETWORKS = 4
"""Cost networks that are kept: shapes with and without recomputation share theirs."""
HALVINGS = 24
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
    held: float
    """Bytes that a device of the fullest stage holds, in the division that holds least."""
    states: tuple[int, ...]
    ends: Sequence[Sequence[int]]
    """Last operators of the stages: the fastest division, then some that hold less."""
    inside: Network
    """What the states stand for; without tables."""
    tries: int
    """Limits that are left to try where it does not fit."""


def stage(
    graph: Graph, machine: Machine, mesh: Mesh, terms: Terms, limit: int, most: float, report: Report | None = None, bound: float = 0.0,
    seconds: float | None = None,
) -> Staged | None:  # fmt: skip
    """The fastest staged plan found that takes less than `most` and fits `limit` bytes a device; None if there is none.

    It simulates a number of plans that depends on the graph alone, and ends after about so many `seconds`, half of them at most for sketches where there is one to
    simulate. Where no plan at all is known to fit (`most` is infinite), it goes on until one is found. Ctrl-C ends with the best so far.
    """
    begun, best = time.perf_counter(), None
    late = lambda part: time.perf_counter() - begun > part * (SECONDS if seconds is None else seconds)  # noqa: E731
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
                report(Progress(f"{what.shape.stages} stages, {what.shape.microbatches} microbatches", least, bound))
    except KeyboardInterrupt:  # the best so far
        pass
    return best


class _Queue:
    """What comes next: one sketch of every number of stages, then whatever looks fastest, a shape to be sketched or a sketch to be simulated.

    A shape not sketched yet is taken to need as much more than its lower bound as others of as many stages: most of that is sent inside stages.
    """

    def __init__(self, shapes: _Shapes) -> None:
        self.shapes = shapes
        self.sketches: list[tuple[float, int, _Sketch]] = []
        self.count = 0
        self.left = {axes: sorted(shapes.every(axes), key=shapes.least, reverse=True) for axes in reversed(range(len(shapes.mesh.axes) + 1))}
        """Shapes by axes, the fastest last; small meshes first."""
        self.more: dict[int, float] = {}
        """Axes -> the least seconds of a sketch over its lower bound."""

    def put(self, sketch: _Sketch | None) -> None:
        if sketch is not None:
            heapq.heappush(self.sketches, (sketch.seconds, self.count, sketch))
            self.count += 1
            more = sketch.seconds / self.shapes.least(sketch.shape)
            self.more[sketch.shape.axes] = min(more, self.more.get(sketch.shape.axes, math.inf))

    def next(self, most: float, late: bool) -> _Shape | _Sketch | None:
        """What may take less than `most`; where it is `late`, a sketch if there is one."""
        while self.sketches and self.sketches[0][-1].least >= most:
            heapq.heappop(self.sketches)
        promising = min(most, self.sketches[0][0] if self.sketches else math.inf)
        if not (late and self.sketches):
            first = {axes: self.shapes.least(left[-1]) for axes, left in self.left.items() if left}
            new = next((axes for axes, seconds in first.items() if axes not in self.more and seconds < promising), None)
            if new is None and first:
                axes = min(first, key=lambda axes: first[axes] * self.more.get(axes, 1.0))
                new = axes if first[axes] * self.more.get(axes, 1.0) < promising else None
            if new is not None:
                return self.left[new].pop()
        return heapq.heappop(self.sketches)[-1] if self.sketches else None


@dataclass(eq=False)
class _Shapes:
    """All shapes of a graph on a mesh, with what is known of them."""

    graph: Graph
    machine: Machine
    mesh: Mesh
    terms: Terms
    limit: int
    _networks: dict[tuple[int, int], Network] = field(default_factory=dict)

    @cached_property
    def narrow(self) -> list[int]:
        """Operators after which a stage or a recomputed run may end."""
        return _narrow(len(self.graph.operators), _handed_on(self.terms))

    @cached_property
    def crossing(self) -> list[list[tuple[int, Label, int]]]:
        """Per such place, (home, label, bytes) of what is handed on over it."""
        found: list[list[tuple[int, Label, int]]] = [[] for _ in self.narrow]
        for home, reader, label, nbytes in _handed_on(self.terms):
            for n in range(bisect_left(self.narrow, home), bisect_left(self.narrow, reader)):
                found[n].append((home, label, nbytes))
        return found

    @cached_property
    def kernels(self) -> dict[Phase, float]:
        """Seconds that all devices together compute at least, by phase."""
        return least_by_phase(self.terms, self.machine)

    @cached_property
    def bytes(self) -> tuple[int, int]:
        """Bytes of variables, their slots and gradients, and of forward values that the backward pass reads, of all devices together."""
        stored = [s for own in self.terms.operators for s in own.stored]
        resident = sum(nbytes for own in self.terms.operators for nbytes, _ in own.resident)
        return sum(2 * s.nbytes + s.slots for s in stored) + resident, sum(nbytes for own in self.terms.operators for nbytes, _ in own.kept)

    def every(self, axes: int) -> Iterator[_Shape]:
        """All shapes whose stages these first axes tell apart."""
        stages = math.prod(self.mesh.sizes[:axes])
        if stages <= len(self.narrow) + 1:
            for microbatches in ALONE if stages == 1 else [stages * n for n in PER_STAGE]:
                if self.graph.batch_size % microbatches == 0:
                    for recompute in (False, True) if (stages, microbatches) != (1, 1) else (True,):
                        yield _Shape(axes, stages, microbatches, recompute)

    def least(self, shape: _Shape) -> float:
        """Seconds of a step in which nothing is sent and stages are equal."""
        seconds = self.kernels
        whole = shape.again * seconds["forward"] + seconds["backward"]
        return (whole * shape.passes / shape.microbatches + seconds["update"]) / self.mesh.size

    def holds(self, shape: _Shape) -> float:
        """Bytes that all stages together hold at least, on a device of each."""
        state, kept = self.bytes
        return (state + (0.0 if shape.recompute else kept / shape.microbatches * shape.flying)) * shape.stages / self.mesh.size

    def _network(self, shape: _Shape) -> Network:
        key = (shape.axes, shape.microbatches)
        if key not in self._networks:
            inner = [Axis(TIME, shape.microbatches, -1)] if shape.microbatches > 1 else []
            if len(self._networks) == NETWORKS:
                del self._networks[next(iter(self._networks))]
            self._networks[key] = build(self.graph, self.machine, Mesh((*inner, *self.mesh.axes[shape.axes :])), terms=self.terms)
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
        priced = Priced(reduced.problem)
        inside = replace(costs.network, problem=Problem([], []), parts=[], kept=[], gradients=[], moves={})

        def at(price: float) -> _Sketch | None:
            states = folded.lift(reduced.lift(priced.solve(price)[0]))
            dealt = costs.dealt(self, states, limit)
            return dealt and _Sketch(shape, dealt[0], dealt[1], price, dealt[2], states, dealt[3], inside, tries - 1)

        low, found = 0.0, at(price)
        if found is None:
            low, price = price, max(8 * price, sum(float(s.min()) for s in reduced.problem.seconds) / (limit * shape.stages) / 64)
            for _ in range(PRICES):
                found = at(price)
                if found is not None:
                    break
                low, price = price, 8 * price
            for _ in range(PRICES if found is not None else 0):  # cheaper bytes are faster, as long as it fits
                if price < 1.1 * low:
                    break
                middle = math.sqrt(low * price) if low else price / 8
                cheaper = at(middle)
                if cheaper is None:
                    low = middle
                    continue
                price, found = middle, min(found, cheaper, key=lambda sketch: sketch.seconds) if found else cheaper
        return found

    def simulated(self, sketch: _Sketch) -> Staged | _Sketch | None:
        """The plan of a sketch that fits, its step to be simulated; where none does, a sketch that holds less."""
        inner, least, staged = sketch.inside.plan(sketch.states), math.inf, None
        try:  # bytes are looked at first: they are known without simulating
            for ends in sketch.ends:
                plan = _plan(inner, self.graph, self.mesh, sketch.shape, ends, self.narrow)
                if staged is None:
                    staged = Staged.of(self.graph, self.machine, plan, self.terms)
                else:  # split alike
                    staged = replace(staged, plan=plan, stage=stages_of(self.graph, plan), run_of=recomputed(self.graph, plan))
                if staged.peak <= self.limit:
                    return staged if staged.seconds < math.inf else None  # simulated here: what waits in a circle is a PlanError
                least = min(least, staged.peak)
        except PlanError:
            return None
        return self.sketch(sketch.shape, sketch.held * 0.97 * self.limit / least, sketch.tries, sketch.price)


@dataclass(frozen=True, eq=False)
class _Own:
    """By state of an operator: seconds of a microbatch, those that do not hide, seconds once a step; bytes, those of forward values by microbatch."""

    each: np.ndarray
    shown: np.ndarray
    once: np.ndarray
    fixed: np.ndarray
    kept: np.ndarray


class _Costs:
    """What operators cost in a shape, and the division into stages that follows from it."""

    def __init__(self, network: Network, shape: _Shape) -> None:
        self.network, self.shape = network, shape
        self.shown = 1 - network.place.machine.backend.overlap
        made: dict[int, _Own] = {}
        for parts, nbytes, kept, gradients, states in zip(
            network.parts, network.problem.nbytes, network.kept, network.gradients, network.states, strict=True
        ):
            if id(parts) not in made:
                made[id(parts)] = self._own(parts, nbytes, kept, gradients, np.array([state.zero == 3 for state in states]))
        self.own = [made[id(parts)] for parts in network.parts]

    def _own(self, parts: np.ndarray, nbytes: np.ndarray, kept: np.ndarray, gradients: np.ndarray, apart: np.ndarray) -> _Own:
        """`apart`: whether variables are stored in parts, and gathered whenever a microbatch goes forward."""
        row = {part: parts[n] for n, part in enumerate(PARTS)}
        again, shown = self.shape.again, self.shown
        gather = row["gather", "forward"] * shown
        computed = again * row["compute", "forward"] + row["compute", "backward"] + np.where(apart, again * gather, 0.0)
        sent = again * row["exchange", "forward"] + row["exchange", "backward"]
        once = row["compute", "update"] + row["exchange", "update"] + row["sum", "backward"] * shown + np.where(apart, 0.0, gather)
        return _Own(computed + sent, computed + shown * sent, once, nbytes - kept + gradients, kept)

    @property
    def problem(self) -> Problem:
        """Seconds of all stages together in a step that waits as this shape does, and bytes of all stages: what is in flight is kept so often."""
        flying = 0.0 if self.shape.recompute else self.shape.flying
        made = {id(own): (own.each * self.shape.passes + own.once, own.fixed + own.kept * flying) for own in self.own}
        problem = Problem([made[id(own)][0] for own in self.own], [made[id(own)][1] for own in self.own])
        tables: dict[int, np.ndarray] = {}
        for ends, table in self.network.problem.tables.items():
            if id(table) not in tables:
                tables[id(table)] = table * self.shape.passes
            problem.tables[ends] = tables[id(table)]
        return problem

    def dealt(self, shapes: _Shapes, states: Sequence[int], limit: float) -> tuple[float, float, float, list[list[int]]] | None:
        """(about the seconds of a step, those that do not hide, bytes held, last operators of stages in some divisions); None where no division fits."""
        shape, network, narrow = self.shape, self.network, shapes.narrow
        of = lambda what: np.array([getattr(own, what)[i] for own, i in zip(self.own, states, strict=True)])  # noqa: E731
        each, shown, once, fixed, kept = (of(what) for what in ("each", "shown", "once", "fixed", "kept"))
        for (u, v), table in network.problem.tables.items():
            each[v] += table[states[u], states[v]]
            shown[v] += table[states[u], states[v]] * self.shown
        handed, begins = self._handed(shapes, states), np.array([0, *(c + 1 for c in narrow)])
        working = shape.again * float(np.add.reduceat(kept, begins)[:-1].max(initial=0.0))  # of a run in its backward pass: gradients, and values made again
        if shape.recompute:  # what enters a run is kept; what ends the forward pass is needed at once, and not recomputed
            entering = np.zeros(len(kept))
            entering[begins[1:]] = handed
            entering[begins[-1] :] += kept[begins[-1] :]
            kept = entering
        ends = [*narrow, len(kept) - 1]
        sums = lambda x: [float(s) for s in np.concatenate([[0.0], np.cumsum(x)])[[0, *(e + 1 for e in ends)]]]  # noqa: E731
        busy, fixed, kept = sums(each * shape.microbatches + once), sums(fixed), sums(kept)
        divisions = [*_divided(shape, busy, fixed, kept, limit * ROOM - working)]
        if not divisions:
            return None
        stages = [(e + 1, at + 1, min(shape.microbatches, shape.stages - n)) for n, (at, e) in enumerate(itertools.pairwise([-1, *divisions[-1]]))]
        held = working + max(fixed[e] - fixed[at] + (kept[e] - kept[at]) * flying for e, at, flying in stages)
        cuts = np.array([0, *(e + 1 for e in divisions[0])])
        sent = [handed[e] for e in divisions[0][:-1]]
        hop = network.place.seconds("collective_permute", max(sent, default=0.0), group_of(tuple(range(shape.axes)), shapes.mesh))
        added = [np.array(sums(x))[cuts] for x in (each, shown, once)]
        every, least, ending = (np.diff(x) for x in added)
        last = shape.microbatches - 1
        seconds = float(every.sum() + (last * np.maximum(every, 2 * hop) + ending).max() + 2 * hop * (shape.stages - 1))
        before = np.cumsum(least) - least  # a stage begins when those before it have passed one microbatch on, and ends before they take the last one back
        return seconds, float((before + (last + 1) * least + ending).max()), held, [[ends[e] for e in division] for division in divisions]

    def _handed(self, shapes: _Shapes, states: Sequence[int]) -> list[float]:
        """Bytes of a device and microbatch that go from before to after every place where a stage may end."""
        ways: dict[tuple[int, Label], int] = {}
        found = []
        for crossing in shapes.crossing:
            total = 0.0
            for home, label, nbytes in crossing:
                if (home, label) not in ways:
                    split = resolve(label, assignment_of(self.network.choice(home, states[home])))
                    ways[home, label] = self.network.place.ways([a for axes in split for a in axes])
                total += nbytes / ways[home, label]
            found.append(total)
        return found


def _divided(shape: _Shape, busy: Sequence[float], fixed: Sequence[float], kept: Sequence[float], room: float) -> Iterator[list[int]]:
    """Places where stages end: the slowest stage takes least, and of those the fullest holds least; then somewhat slower ones that hold less.

    The arguments are sums of what comes before every place, 0 first.
    """
    places = len(busy) - 1

    def fill(slowest: float, room: float) -> list[int] | None:
        """Stages as full as they may be, from the first on; the later ones get at least one place each."""
        found, at = [], 0
        for s in range(shape.stages):
            flying = min(shape.microbatches, shape.stages - s)
            most = min(bisect_right(busy, busy[at] + slowest, at), places - shape.stages + s + 2) - 1
            held = lambda e, at=at, flying=flying: fixed[e] - fixed[at] + (kept[e] - kept[at]) * flying  # noqa: E731
            if most > at and held(most) > room:
                most = bisect_right(range(places + 1), room, at + 1, most, key=held) - 1
            if most <= at:
                return None
            found.append(most - 1)
            at = most
        return found if at == places else None

    low, high = busy[-1] / shape.stages, busy[-1]
    best = fill(high, room)
    if best is None:
        return
    for _ in range(HALVINGS if shape.stages > 1 else 0):
        middle = (low + high) / 2
        found = fill(middle, room)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    for slack in SLACK if shape.stages > 1 else (1.0,):  # of the divisions that are so fast, the one whose fullest stage holds least
        least, most, even = 0.0, room, best
        for _ in range(HALVINGS if shape.stages > 1 else 0):
            middle = (least + most) / 2
            found = fill(high * slack, middle)
            least, most, even = (least, middle, found) if found is not None else (middle, most, even)
        yield even


def _handed_on(terms: Terms) -> list[tuple[int, int, Label, int]]:
    """(home, last reader, label, bytes) of what operators hand on in the forward pass."""
    last: dict[int, tuple[int, int, Label, int]] = {}
    for m in terms.edges:
        if m.phase == m.wanted == "forward" and m.home < m.reader:
            home, reader, label, nbytes = last.get(m.tensor, (m.home, m.reader, m.dims[0], m.nbytes * m.trips))
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
    return [o for o in range(count - 1) if handed[o] <= NARROW * handed[max(0, o - reach) : min(count - 1, o + reach + 1)].min()]


def _plan(inner: Plan, graph: Graph, mesh: Mesh, shape: _Shape, ends: Sequence[int], narrow: Sequence[int]) -> Plan:
    """The plan that splits inside stages as `inner` does, its stages ending after these operators."""
    choices, stage_of, begins = {}, 0, [0, *(e + 1 for e in ends[:-1])]
    runs: list[tuple[str, str]] = []
    names = [o.name for o in graph.operators]
    for o, name in enumerate(names):
        if o > ends[stage_of]:
            stage_of += 1
        at, left = {}, stage_of
        for axis in reversed(mesh.axes[: shape.axes]):
            at[axis.name] = f"at({left % axis.size})"
            left //= axis.size
        choices[name] = at | {a: use for a, use in inner.choices[name].items() if a != TIME}
    if shape.recompute:
        cuts = sorted({*narrow, *ends})
        firsts = sorted({0, *begins, *(c + 1 for c in cuts if c + 1 < len(names))})
        runs = [(names[a], names[b - 1]) for a, b in zip(firsts, firsts[1:], strict=False)]  # what ends the forward pass is needed at once
    return replace(inner, mesh=mesh, choices=choices, microbatches=shape.microbatches, recompute=tuple(runs))

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
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from partita.search.elimination import eliminate
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
ROUNDS = 10
"""How often the exact search prices memory: what it finds is only the start of a plan in stages."""
TRIES = 4
"""Budgets of memory that are tried for one shape."""
ROOM = 0.95
"""The part of a device's memory that operators may be dealt into: what runs need for themselves comes on top."""
SLACK = (1.001, 1.1, 1.5)
"""How much slower than it could be the slowest stage may be, for stages that hold less."""
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
    nbytes: float
    """Of all stages together, as the search adds them up."""
    states: tuple[int, ...]
    ends: Sequence[Sequence[int]]
    """Last operators of the stages: the fastest division, then some that hold less."""
    inside: Network
    """What the states stand for; without tables."""
    tries: int
    """Budgets that are left to try where it does not fit."""


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
    shapes = _Shapes(graph, machine, mesh, terms, limit)
    queue = _Queue()
    for shape in shapes.every():  # both ways of a shape at once: they share the costs of operators
        queue.put(shapes.least(replace(shape, recompute=False)), shape)
    try:
        while queue.entries and not ((best is not None or math.isfinite(most)) and (late(1.0) or looks <= 0)):
            seen, what = queue.pop(late(0.5))
            least = most if best is None else best.seconds
            if isinstance(what, _Shape):
                own = shapes.least(what)
                if seen < own and own >= min(least, queue.promising):
                    queue.put(own, what)
                elif own < least:
                    queue.put_sketch(shapes.sketch(what, float(limit) * what.stages, TRIES))
            elif what.least < least:
                looks -= 1
                found = shapes.simulated(what)
                if isinstance(found, Staged) and found.seconds < least:
                    best, least = found, found.seconds
                elif isinstance(found, _Sketch):
                    queue.put_sketch(found)
                if report is not None:
                    report(Progress(f"{what.shape.stages} stages, {what.shape.microbatches} microbatches", least, bound))
    except KeyboardInterrupt:  # the best so far
        pass
    return best


class _Queue:
    """What may come next, by the seconds that it would take: shapes by a lower bound on them, sketches by theirs. Of equal ones the first."""

    def __init__(self) -> None:
        self.entries: list[tuple[float, int, _Shape | _Sketch]] = []
        self.count = 0

    def put(self, seconds: float, what: _Shape | _Sketch) -> None:
        heapq.heappush(self.entries, (seconds, self.count, what))
        self.count += 1

    def put_sketch(self, sketch: _Sketch | None) -> None:
        if sketch is not None:
            self.put(sketch.seconds, sketch)

    @property
    def promising(self) -> float:
        """The least seconds of a sketch."""
        return min((seconds for seconds, _, what in self.entries if isinstance(what, _Sketch)), default=math.inf)

    def pop(self, late: bool) -> tuple[float, _Shape | _Sketch]:
        """The first; where it is `late`, the first sketch, if there is one."""
        entry = min((e for e in self.entries if isinstance(e[2], _Sketch)), default=None) if late else None
        if entry is None:
            entry = heapq.heappop(self.entries)
        else:
            self.entries.remove(entry)
            heapq.heapify(self.entries)
        return entry[0], entry[2]


@dataclass(eq=False)
class _Shapes:
    """All shapes of a graph on a mesh, with what is known of them."""

    graph: Graph
    machine: Machine
    mesh: Mesh
    terms: Terms
    limit: int
    _last: tuple[tuple[int, int], Network] | None = None

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

    def every(self) -> Iterator[_Shape]:
        """All shapes: few stages first."""
        for axes in range(len(self.mesh.axes) + 1):
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
        if self._last is None or self._last[0] != key:
            inner = [Axis(TIME, shape.microbatches, -1)] if shape.microbatches > 1 else []
            self._last = key, build(self.graph, self.machine, Mesh((*inner, *self.mesh.axes[shape.axes :])), terms=self.terms)
        return self._last[1]

    def sketch(self, shape: _Shape, budget: float, tries: int) -> _Sketch | None:
        """What a shape comes to within `budget` bytes of all stages together; None where it does not fit."""
        if not tries or self.holds(shape) > budget:
            return None
        costs = _Costs(self._network(shape), shape)
        problem = costs.problem
        if sum(float(nbytes.min()) for nbytes in problem.nbytes) > budget:
            return None
        folded = fold(problem)
        reduced = reduce(folded.problem)
        while tries > 0:
            result = eliminate(reduced.problem, budget, rounds=ROUNDS)
            if result.stopped:
                raise KeyboardInterrupt
            if not result.feasible:
                return None
            states = folded.lift(reduced.lift(result.states))
            dealt, tries = costs.dealt(self, states), tries - 1
            if dealt is not None:
                inside = replace(costs.network, problem=Problem([], []), parts=[], kept=[], gradients=[], moves={})
                return _Sketch(shape, *dealt[:2], result.nbytes, states, dealt[2], inside, tries)
            budget = min(budget, result.nbytes) * 0.8
        return None

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
        return self.sketch(sketch.shape, sketch.nbytes * min(0.95, self.limit / least), sketch.tries)


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

    def dealt(self, shapes: _Shapes, states: Sequence[int]) -> tuple[float, float, list[list[int]]] | None:
        """(about the seconds of a step, those that do not hide, last operators of stages in some divisions); None where no division fits."""
        shape, network, narrow = self.shape, self.network, shapes.narrow
        of = lambda what: np.array([getattr(own, what)[i] for own, i in zip(self.own, states, strict=True)])  # noqa: E731
        each, shown, once, fixed, kept = (of(what) for what in ("each", "shown", "once", "fixed", "kept"))
        for (u, v), table in network.problem.tables.items():
            each[v] += table[states[u], states[v]]
            shown[v] += table[states[u], states[v]] * self.shown
        handed, working = self._handed(shapes, states), 0.0
        if shape.recompute:  # what enters a run is kept; what ends the forward pass is needed at once, and not recomputed
            begins = np.array([0, *(c + 1 for c in narrow)])
            working = float(np.add.reduceat(kept, begins)[:-1].max(initial=0.0))
            entering = np.zeros(len(kept))
            entering[begins[1:]] = handed
            entering[begins[-1] :] += kept[begins[-1] :]
            kept = entering
        ends = [*narrow, len(kept) - 1]
        sums = lambda x: [float(s) for s in np.concatenate([[0.0], np.cumsum(x)])[[0, *(e + 1 for e in ends)]]]  # noqa: E731
        busy = sums(each * shape.microbatches + once)
        divisions = [*_divided(shape, busy, sums(fixed), sums(kept), shapes.limit * ROOM - working)]
        if not divisions:
            return None
        cuts = np.array([0, *(e + 1 for e in divisions[0])])
        sent = [handed[e] for e in divisions[0][:-1]]
        hop = network.place.seconds("collective_permute", max(sent, default=0.0), group_of(tuple(range(shape.axes)), shapes.mesh))
        added = [np.array(sums(x))[cuts] for x in (each, shown, once)]
        every, least, ending = (np.diff(x) for x in added)
        last = shape.microbatches - 1
        seconds = float(every.sum() + (last * np.maximum(every, 2 * hop) + ending).max() + 2 * hop * (shape.stages - 1))
        before = np.cumsum(least) - least  # a stage begins when those before it have passed one microbatch on, and ends before they take the last one back
        return seconds, float((before + (last + 1) * least + ending).max()), [[ends[e] for e in division] for division in divisions]

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

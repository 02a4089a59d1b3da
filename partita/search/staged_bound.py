"""A lower bound on every plan with stages: all choices, and the time in which stages wait.

A *shape* is a number of stages and of microbatches. Each stage has an equal share of the devices.
Three facts bound the step of a shape from below:

- Work. The relaxation of all choices (`search.relaxation`) on the devices of one stage, for one
  microbatch, bounds the seconds of all stages together: kernels, collectives that block them, and
  additions of gradients. A move between stages is none of these, so the most that its potentials
  add is taken off. Stages are numbered in the order of the model, so a border between two
  neighbours is a cut of the graph, and the heaviest cut bounds all of them.
- Waiting. A stage starts after the first microbatch has passed all earlier ones, and these
  take the last one back after it. If stage s takes y(s) for all of its m microbatches, a step of
  T seconds has y(s) <= T - (y(1) + ... + y(s-1)) / m, and all of s stages together at most
  m T (1 - (1 - 1/m)^s).
- Python starts each pass.

Stages wait like that if they have an operator of the *spine*: a row of operators that wait for each
other, the one of most work. All operators of any other stage lie between two neighbours of the
spine, so its work is small.

Shapes are bounded by their kernels first. The lowest one is then relaxed, until the lowest bound is
that of a relaxed shape. The work of a shape bounds that of shapes with more microbatches too.

Not covered: operators on some slices of an axis that others use as a whole (placement), whose bound
is that of kernels alone (`search.bound`).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from partita.cost.moves import Placement
from partita.cost.terms import Terms
from partita.graph.operator_graph import OperatorGraph
from partita.plans.borders import MOVABLE
from partita.plans.phases import DataFlow
from partita.plans.plan import TIME, Axis, Mesh
from partita.search.base import Array
from partita.search.bound import lower_bounds_by_operator
from partita.search.pipeline_division import most_work
from partita.search.relaxation import Relaxed, Times, relax
from partita.simulation.base import DISPATCH_SECONDS

MOST_RELAXED = 40
"""Shapes that are relaxed, at most: the others keep the bound of their kernels."""
FEWER = 4
"""Microbatches of a shape over those of the one that is relaxed first: the same choices have at
least as much work in more microbatches."""
BORDER_SHARE = 0.02
"""Share of the work that moves between stages may take off a bound, at most."""
FLOW_UNITS = 1 << 28
"""Units of the heaviest cut: flows are whole numbers."""

Edges = list[list[int]]
"""[operator]: the operators that wait for it."""


class StagedShape(NamedTuple):
    """Numbers of stages and of microbatches, and the axes of a stage."""

    stages: int
    microbatches: int
    inner: tuple[Axis, ...]

    @property
    def passes(self) -> int:
        """Length of a step of equal stages, in passes of one microbatch through a stage."""
        return self.microbatches + self.stages - 1

    def has_more_work(self, other: StagedShape) -> bool:
        """Whether microbatches of another shape on the same devices are cut into smaller ones."""
        is_cut = self.microbatches % other.microbatches == 0
        return self.inner == other.inner and is_cut


class Work(NamedTuple):
    """Least work of the stages of a shape."""

    of_operator: Array
    """[operator]: seconds of its stage."""
    between: float
    """Seconds of moves between stages among them, at most."""
    waits: bool
    """Whether stages wait for all of the work; it has no sums of gradients and no update, then."""


@dataclass(frozen=True, eq=False)
class StagedBound:
    """Lower bounds of the shapes of a graph's plans with stages."""

    graph: OperatorGraph
    placement: Placement
    terms: Terms
    _relaxed: dict[StagedShape, tuple[Work | None, float]] = field(default_factory=dict, repr=False)
    """Cache: the work of shapes, and the seconds of a bound that were enough."""

    def seconds(self, one_program_seconds: float = 0.0) -> float:
        """Lower bound of a step under every plan whose operators all have a stage.

        `one_program_seconds`: the same for plans without stages and microbatches. Microbatches
        alone add work, unless they fit in a faster memory.
        """
        bounds = {}
        proved = set()
        for shape in self.shapes():
            bounds[shape] = self.of_kernels(shape)
            is_known = shape.stages == 1 and self._has_one_bandwidth
            if shape.passes == 1 or is_known:
                bounds[shape] = max(bounds[shape], one_program_seconds)
                if one_program_seconds > 0:
                    proved.add(shape)
        for _ in range(MOST_RELAXED):
            lowest = min(bounds, key=lambda shape: bounds[shape])
            if lowest in proved:
                break
            fewer = lowest._replace(microbatches=lowest.microbatches // FEWER)
            enough = min((bounds[shape] for shape in proved), default=math.inf)
            is_useful = fewer not in proved and bounds.get(fewer, math.inf) < enough
            shape = fewer if is_useful else lowest
            work = self.relaxed(shape, enough)
            if self.of_work(shape, work) < enough:
                proved.add(shape)
            for other in bounds if self._has_one_bandwidth else [shape]:
                if other.has_more_work(shape):
                    bounds[other] = max(bounds[other], self.of_work(other, work))
        return min(bounds.values())

    def shapes(self) -> Iterator[StagedShape]:
        """All shapes: stages over any number of axes, those of the slowest links first."""
        by_size: dict[int, list[int]] = defaultdict(list)
        for number, axis in enumerate(self.placement.mesh.axes):
            by_size[axis.size].append(number)
        batch = max(1, self.graph.batch_size)
        counts = [m for m in range(1, batch + 1) if batch % m == 0]
        numbers = (range(len(axes) + 1) for axes in by_size.values())
        for taken in itertools.product(*numbers):
            pairs = zip(by_size.values(), taken, strict=True)
            inner = sorted(itertools.chain(*(axes[number:] for axes, number in pairs)))
            axes = tuple(self.placement.mesh.axes[number] for number in inner)
            stages = self.placement.mesh.size // math.prod(axis.size for axis in axes)
            if stages <= len(self.graph.operators):
                for microbatches in counts:
                    yield StagedShape(stages, microbatches, axes)

    # ------------------------------------------------------------ bounds of one shape

    def of_shape(self, shape: StagedShape, enough: float) -> float:
        """Lower bound of a shape, or one that is `enough` seconds.

        The work of relaxed shapes with fewer microbatches comes first.
        """
        seconds = self.of_kernels(shape)
        if self._has_one_bandwidth:
            for other, (work, _) in self._relaxed.items():
                if shape.has_more_work(other):
                    seconds = max(seconds, self.of_work(shape, work))
        if seconds >= enough:
            return seconds
        return max(seconds, self.of_work(shape, self.relaxed(shape, enough)))

    def of_kernels(self, shape: StagedShape) -> float:
        """Lower bound of a shape by its kernels and additions, evenly divided."""
        seconds = max(self._kernels_at_work(shape), self._kernels_waiting(shape))
        return max(seconds, 2 * _additions(shape) * DISPATCH_SECONDS)

    def _kernels_at_work(self, shape: StagedShape) -> float:
        work = self._kernel_seconds + self._addition_seconds * _additions(shape)
        return float(work.sum()) / self.placement.mesh.size

    def _kernels_waiting(self, shape: StagedShape) -> float:
        devices = self.placement.mesh.size // shape.stages
        passes = self._pass_seconds + self._addition_seconds * _additions(shape)
        return self._waiting(shape, passes / devices, 0.0)

    def relaxed(self, shape: StagedShape, enough: float = math.inf) -> Work | None:
        """The work of a shape by the relaxation of all choices; None where none is computed.

        It is the least work that the relaxation proves, or one whose bound is `enough` seconds.
        """
        if shape in self._relaxed:
            work, was_enough = self._relaxed[shape]
            seconds = self.of_work(shape, work)
            if seconds < was_enough or seconds >= enough:
                return work
        work = self._relax(shape, enough)
        self._relaxed[shape] = work, enough
        return work

    def _relax(self, shape: StagedShape, enough: float) -> Work | None:
        waits = self._kernels_waiting(shape) > self._kernels_at_work(shape)
        times = Times(
            once=0.0 if waits else 1.0,
            repeated=float(shape.microbatches),
            additions=_additions(shape),
            most_move_seconds=self._most_move_seconds(shape),
        )
        time = (Axis(TIME, shape.microbatches, -1),) if shape.microbatches > 1 else ()
        placement = Placement(self.placement.machine, Mesh((*time, *shape.inner)))

        @cache
        def work_of(relaxed: Relaxed) -> Work:
            return Work(relaxed.of_operator, self._between_stages(relaxed, shape.stages), waits)

        def is_enough(relaxed: Relaxed) -> bool:
            # Most bounds are too low even with all moves: these need no heaviest cut.
            with_all_moves = Work(relaxed.of_operator, 0.0, waits)
            if self.of_work(shape, with_all_moves) < enough:
                return False
            return self.of_work(shape, work_of(relaxed)) >= enough

        relaxed = relax(self.graph, placement, self.terms, times, is_enough)
        return work_of(relaxed) if relaxed else None

    def of_work(self, shape: StagedShape, work: Work | None) -> float:
        """Lower bound of a shape with this work, or more."""
        if work is None:
            return 0.0
        if work.waits:
            return self._waiting(shape, work.of_operator, work.between)
        return (float(work.of_operator.sum()) - work.between) / shape.stages

    def _waiting(self, shape: StagedShape, seconds: Array, between: float) -> float:
        """Lower bound of a shape whose operators take these seconds of a stage, or more.

        `between`: seconds that are no work, because they are moves between stages.
        """
        if not self.spine.operators:
            return 0.0
        work = float(seconds.sum()) - between
        aside = self.spine.most_aside(seconds)
        bounds = []
        for in_row in range(1, shape.stages + 1):
            rest = work - (shape.stages - in_row) * aside
            bounds.append(rest / most_work(in_row, shape.microbatches))
        return max(0.0, min(bounds))

    def _between_stages(self, relaxed: Relaxed, stages: int) -> float:
        """Most seconds that the potentials of moves between stages add."""
        if stages == 1:
            return 0.0
        cut, unordered = self._heaviest_cut(np.maximum(relaxed.of_moves, 0.0))
        return (stages - 1) * cut + unordered

    def _heaviest_cut(self, of_moves: Array) -> tuple[float, float]:
        """(most weight of moves that one border cuts, weight of moves that any border may cut)."""
        weights: dict[tuple[int, int], float] = defaultdict(float)
        unordered = 0.0
        for move, weight in zip(self.terms.edges, of_moves.tolist(), strict=True):
            one, other = sorted((move.home, move.reader))
            if self._are_ordered[one, other]:
                weights[one, other] += weight
            else:
                unordered += weight
        return heaviest_cut(self.spine.forward, weights), unordered

    def _most_move_seconds(self, shape: StagedShape) -> float:
        """Seconds of a move above which it counts as a move between stages.

        Those of all borders are a small share of the work, then.
        """
        cut, unordered = self._cut_moves
        moves = (shape.stages - 1) * cut + unordered * (shape.stages > 1)
        if not moves:
            return math.inf
        work = self._kernel_seconds + self._addition_seconds * _additions(shape)
        return BORDER_SHARE * float(work.sum()) * shape.stages / self.placement.mesh.size / moves

    # ------------------------------------------------------------ what all shapes share

    @cached_property
    def spine(self) -> Spine:
        return Spine.of(self.graph, self._pass_seconds)

    @cached_property
    def _cut_moves(self) -> tuple[float, float]:
        """Numbers of moves that one border cuts, at most, and that any border may cut."""
        return self._heaviest_cut(np.ones(len(self.terms.edges)))

    @cached_property
    def _are_ordered(self) -> dict[tuple[int, int], bool]:
        """Ends of moves -> whether the larger one waits for the smaller one."""
        ends = {tuple(sorted((move.home, move.reader))) for move in self.terms.edges}
        return {(one, other): self.spine.is_before(one, other) for one, other in ends}

    @property
    def _has_one_bandwidth(self) -> bool:
        """Whether small kernels read their operands no faster than large ones."""
        machine = self.placement.machine
        return float(machine.bandwidth_for(np.zeros(1))[0]) == machine.memory_bandwidth

    @cached_property
    def _kernel_seconds(self) -> Array:
        """[operator]: least seconds of its kernels on one device."""
        return np.array(lower_bounds_by_operator(self.terms, self.placement.machine))

    @cached_property
    def _pass_seconds(self) -> Array:
        """[operator]: the same without the update."""
        machine = self.placement.machine
        return np.array(lower_bounds_by_operator(self.terms, machine, ("forward", "backward")))

    @cached_property
    def _addition_seconds(self) -> Array:
        """[operator]: seconds in which one device adds its gradients."""
        bandwidth = float(self.placement.machine.bandwidth_for(np.zeros(1))[0])
        nbytes = [sum(v.added for v in operator.stored) for operator in self.terms.operators]
        return np.array(nbytes, float) / bandwidth


def _additions(shape: StagedShape) -> int:
    """Numbers of additions of gradients in a step."""
    return shape.microbatches if shape.microbatches > 1 else 0


# ---------------------------------------------------------------- the order of operators


@dataclass(frozen=True, eq=False)
class Spine:
    """Operators in a row: both passes of each wait for those of its neighbours."""

    operators: tuple[int, ...]
    before: Array
    """[operator]: the last place of the row that it waits for, -1 for none. Its own in the row."""
    after: Array
    """[operator]: the first place that waits for it, the length of the row for none."""
    forward: Edges
    """[operator]: operators with larger numbers whose forward pass reads its values."""

    @staticmethod
    def of(graph: OperatorGraph, seconds: Array) -> Spine:
        """The row of most seconds, [operator].

        Its operators have instructions that never move over the border of two stages.
        """
        flow = DataFlow.of(graph)
        forward, backward = _edges(flow)
        weights = np.where(_stays(flow), seconds, 0.0)
        row: list[int] = []
        for operator in _heaviest_path(forward, weights):
            if weights[operator] > 0 and (not row or _reaches(backward, row[-1], operator)):
                row.append(operator)
        place = {operator: number for number, operator in enumerate(row)}
        before = np.full(len(forward), -1)
        after = np.full(len(forward), len(row))
        for operator, readers in enumerate(forward):
            before[operator] = place.get(operator, before[operator])
            for reader in readers:
                before[reader] = max(before[reader], before[operator])
        for operator in reversed(range(len(forward))):
            later = [after[reader] for reader in forward[operator]]
            after[operator] = place.get(operator, min(later, default=len(row)))
        return Spine(tuple(row), before, after, forward)

    def most_aside(self, seconds: Array) -> float:
        """Most seconds of a stage without an operator of the row, given those of operators.

        Its operators have a gap in common, between two neighbours of the row.
        """
        most = np.zeros(len(self.operators) + 2)
        for operator in set(range(len(seconds))) - set(self.operators):
            most[self.before[operator] + 1] += max(0.0, seconds[operator])
            most[self.after[operator] + 1] -= max(0.0, seconds[operator])
        return float(np.cumsum(most).max())

    def is_before(self, one: int, other: int) -> bool:
        """Whether an operator waits for another with a smaller number in the forward pass."""
        return _reaches(self.forward, one, other)


def _edges(flow: DataFlow) -> tuple[Edges, Edges]:
    """Pairs of operators, the smaller number first, of which one waits for the other.

    The first value has [operator]: those that wait for its forward pass, the second one those whose
    backward pass its own waits for.
    """
    forward: list[set[int]] = [set() for _ in flow.graph.operators]
    backward: list[set[int]] = [set() for _ in flow.graph.operators]
    for tensor, source in flow.producer.items():
        phase = flow.classes[source]
        home = flow.owner(source)
        for reader in flow.readers.get(tensor, ()):
            owner = flow.owner(reader)
            if min(home, owner) < 0 or flow.classes[reader] != phase:
                continue
            if phase == "forward" and home < owner:
                forward[home].add(owner)
            if phase == "backward" and owner < home:
                backward[owner].add(home)
    return [sorted(each) for each in forward], [sorted(each) for each in backward]


def _stays(flow: DataFlow) -> Array:
    """[operator]: whether it has instructions of both passes that stay on its stage."""
    phases: list[set[str]] = [set() for _ in flow.graph.operators]
    for number in range(len(flow.statements)):
        owner = flow.owner(number)
        if owner >= 0 and flow.instruction(number).name not in MOVABLE:
            phases[owner].add(flow.classes[number])
    return np.array([{"forward", "backward"} <= each for each in phases])


def _heaviest_path(forward: Edges, weights: Array) -> list[int]:
    """The path of most weight through a graph whose edges lead to larger numbers."""
    best = np.array(weights, float)
    previous = np.full(len(forward), -1)
    for operator, readers in enumerate(forward):
        for reader in readers:
            weight = best[operator] + weights[reader]
            if weight > best[reader]:
                best[reader] = weight
                previous[reader] = operator
    path = []
    operator = int(best.argmax()) if len(best) else -1
    while operator >= 0:
        path.append(operator)
        operator = int(previous[operator])
    return path[::-1]


def _reaches(edges: Edges, source: int, target: int) -> bool:
    """Whether edges lead from one operator to another with a larger number."""
    seen: set[int] = set()
    waiting = [source]
    while waiting:
        for reader in edges[waiting.pop()]:
            if reader == target:
                return True
            if reader < target and reader not in seen:
                seen.add(reader)
                waiting.append(reader)
    return False


def heaviest_cut(forward: Edges, weights: dict[tuple[int, int], float]) -> float:
    """Most weight between operators before a border and those after it.

    Operators before a border read nothing from after it: a closure of the graph. The heaviest one
    is a minimum cut (Picard, "Maximal Closure of a Graph", Management Science 1976).
    """
    total = max(weights.values(), default=0.0)
    if total <= 0:
        return 0.0
    count = len(forward)
    gain = np.zeros(count)
    for (one, other), weight in weights.items():
        gain[one] += weight
        gain[other] -= weight
    unit = float(np.abs(gain).sum()) / FLOW_UNITS
    source, sink = count, count + 1
    rows, columns, capacities = [], [], []
    for operator, seconds in enumerate(gain):
        ends = (source, operator) if seconds > 0 else (operator, sink)
        rows.append(ends[0])
        columns.append(ends[1])
        capacities.append(math.ceil(seconds / unit) if seconds > 0 else int(-seconds / unit))
    for operator, readers in enumerate(forward):
        for reader in readers:
            # An operator before the border has those that it reads before the border.
            rows.append(reader)
            columns.append(operator)
            capacities.append(2 * FLOW_UNITS)
    size = count + 2
    network = csr_array((np.array(capacities, np.int32), (rows, columns)), shape=(size, size))
    cut = maximum_flow(network, source, sink).flow_value
    positive = sum(math.ceil(seconds / unit) for seconds in gain if seconds > 0)
    return (positive - cut) * unit

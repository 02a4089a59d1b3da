"""Pipelines: plans with stages, microbatches, rematerialization, and splits inside a stage.

A *shape* is a number of stages (the slow axes of the mesh number them), of microbatches, and
rematerialization or not. Three steps lead from shapes to a plan:

1. Lower bounds: stages that send nothing, then the relaxation of all choices
   (`search.staged_bound`). Shapes that cannot beat the best plan are dropped.
2. A *sketch*, some hundredths of a second: operators, equal ones as one (`search.fold`), are split
   over the remaining axes by the exact search, then divided into stages in the order of the model
   (`search.pipeline_division`), for each schedule.
3. A simulation with memory, of the sketches that look fastest.

Alpa (Zheng et al., OSDI 2022) has the two levels, stages outside and splits inside. Here every
stage splits the same axes.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from partita.cost.moves import Placement
from partita.cost.terms import Terms
from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph, Phase
from partita.plans.baselines import megatron
from partita.plans.pipeline import is_pipeline, sample_factor, stage_plan
from partita.plans.plan import TIME, Axis, Mesh, Plan
from partita.search.base import Problem, Progress
from partita.search.bound import lower_bounds_by_phase
from partita.search.elimination import PricedProblem
from partita.search.fold import Folded, fold
from partita.search.network import CostNetwork, build
from partita.search.pipeline_costs import ShapeCosts
from partita.search.pipeline_cuts import Cuts, independent
from partita.search.pipeline_division import Division, PipelineShape, Runs
from partita.search.portfolio import Limits
from partita.search.reduce import Reduced, reduce
from partita.search.staged_bound import StagedBound, StagedShape
from partita.simulation.pipelined import PipelinedStep

PER_STAGE = (1, 2, 4, 8, 16)
"""Microbatches per stage that are tried."""
USUAL = 8
"""Microbatches per stage that are tried first."""
ONE_STAGE = (1, 4, 16, 64)
"""Microbatches without stages: fewer are faster, more need less memory."""
SKETCHES = 60
"""Sketches, at most, unless there is a time limit: work, so that a busy machine finds the same
plan."""
INSTRUCTIONS = 150_000
"""Instructions of all simulated steps, at most: some seconds."""
MIN_SIMULATIONS = 8
"""Simulated steps, at least, whatever their instructions."""
SKETCH_SHARE = 0.5
"""Share of the sketches, or of the time limit, after which waiting sketches are simulated before
new shapes."""
PRICES = 5
"""Prices of a byte that are tried until a shape fits, and again between the last two."""
TRIES = 3
"""Sketches of one shape until one fits in memory."""
DIVISIONS = 3
"""Divisions into stages of one sketch until one fits in memory."""
FAR = 1.25
"""Slowdown of a number of stages beyond which larger numbers are skipped."""
CHOICES = 50
"""Choices per operator inside a stage, about: fewer than in a search without stages."""
NEIGHBOUR = 0.99
"""Guessed seconds of shapes with half or twice the microbatches of the fastest sketch with as many
stages, relative to that sketch: they are sketched before it is simulated."""
LEAST_STORED = 0.1
"""Least share of activations that stages store, and the least difference from all of them."""
NETWORKS = 24
"""Cost networks in memory: shapes with and without rematerialization share theirs, and all sketches
of a shape."""


def pipelines(
    staged: StagedBound,
    limits: Limits,
    limit_seconds: float = math.inf,
    bound: float = 0.0,
) -> Iterator[PipelinedStep]:
    """Ever faster simulated pipelines that are faster than `limit_seconds` and fit in memory.

    Without a time limit, the numbers of sketches and simulations depend on the graph alone. If no
    plan is known to fit (`limit_seconds` is infinite), the search continues until one fits. No
    shape is relaxed then: memory decides, and a relaxation, which knows none, is far below plans.

    Args:
        staged: The graph on a machine, with the bounds of its shapes.
        limits: Bytes of a device, and a time limit or none.
        bound: Lower bound of the step, for reports.
    """
    start = time.perf_counter()
    sketches = 0
    simulations = max(MIN_SIMULATIONS, INSTRUCTIONS // max(1, len(staged.graph.instructions)))
    space = PipelineSpace(staged, limits.budget)
    queue = _Queue(space)
    best_seconds = limit_seconds
    while True:
        progress = sketches / SKETCHES
        if limits.seconds is not None:
            progress = (time.perf_counter() - start) / max(limits.seconds, 1e-9)
        must_find = math.isinf(best_seconds)
        if not must_find and (len(space.simulated) >= simulations or progress > 1):
            return
        candidate = queue.next(best_seconds, late=progress > SKETCH_SHARE)
        if candidate is None:
            return
        if isinstance(candidate, PipelineShape):
            if math.isfinite(limit_seconds):
                bound_seconds = space.relaxed_bound(candidate, best_seconds)
                if bound_seconds >= best_seconds:
                    queue.drop(candidate, bound_seconds)
                    continue
            sketches += 1
            queue.put(space.sketch(candidate, limits.budget, TRIES))
            continue
        stored_share = space.stored_share
        outcome = space.simulate(candidate, best_seconds)
        if space.stored_share != stored_share:
            # All shapes need less memory than their sketches so far.
            queue = _Queue(space)
            sketches = 0
        if isinstance(outcome, Sketch):
            queue.put(outcome)
        elif outcome is not None and outcome.seconds < best_seconds:
            best_seconds = outcome.seconds
            yield outcome
        if limits.report is not None:
            shape = candidate.shape
            text = f"{shape.stages} stages, {shape.microbatches} microbatches"
            limits.report(Progress(text, best_seconds, bound))


# ---------------------------------------------------------------- the order of candidates


@dataclass(frozen=True)
class Sketch:
    """The estimate of a shape."""

    shape: PipelineShape
    seconds: float
    lower_bound: float
    """Seconds if everything hides that can."""
    price: float
    """Price of a byte, seconds."""
    limit_bytes: float
    """Bytes of a device that the division was for."""
    states: tuple[int, ...]
    runs: Runs
    network: CostNetwork
    """The network of the states, without tables."""
    tries: int
    """Sketches of the shape that remain if this one does not fit."""


class _Queue:
    """Candidates in the order of their promise.

    One sketch of every number of stages comes first, then the fastest shape or sketch.
    If no plan is known to fit, the fastest of these sketches is simulated next: its memory may
    change all sketches.

    The excess of a shape over its lower bound is guessed from the sketches with the same number of
    stages: a power of the number of microbatches.
    """

    def __init__(self, space: PipelineSpace) -> None:
        self.space = space
        self.sketches: list[tuple[float, int, Sketch]] = []
        self.count = 0
        # Shapes by axes, few stages first; of each, the usual shapes first.
        self.shapes = {
            axes: sorted(space.shapes(axes), key=space.distance_from_usual)
            for axes in range(len(space.mesh.axes) + 1)
        }
        # Axes -> microbatches -> seconds of a sketch over its lower bound.
        self.excess: dict[int, dict[int, float]] = {}
        # Axes -> seconds of the fastest sketch.
        self.fastest: dict[int, float] = {}
        # Axes -> microbatches of that sketch.
        self.fastest_microbatches: dict[int, int] = {}

    def put(self, sketch: Sketch | None) -> None:
        if sketch is None:
            return
        heapq.heappush(self.sketches, (sketch.seconds, self.count, sketch))
        self.count += 1
        self._learn(sketch.shape, sketch.seconds)

    def drop(self, shape: PipelineShape, seconds: float) -> None:
        """Leaves a shape without a sketch. Its lower bound is `seconds`."""
        self._learn(shape, seconds)

    def _learn(self, shape: PipelineShape, seconds: float) -> None:
        excess = seconds / self.space.lower_bound(shape)
        self.excess.setdefault(shape.axes, {}).setdefault(shape.microbatches, excess)
        if seconds < self.fastest.get(shape.axes, math.inf):
            self.fastest[shape.axes] = seconds
            self.fastest_microbatches[shape.axes] = shape.microbatches

    def next(
        self,
        best_seconds: float,
        late: bool,
    ) -> PipelineShape | Sketch | None:
        """The next candidate that may beat the best plan; if it is `late`, a waiting sketch."""
        while self.sketches and self.sketches[0][-1].lower_bound >= best_seconds:
            heapq.heappop(self.sketches)
        if not (late and self.sketches):
            shape = self._next_shape(best_seconds)
            if shape is not None:
                self.shapes[shape.axes].remove(shape)
                return shape
        return heapq.heappop(self.sketches)[-1] if self.sketches else None

    def _next_shape(self, best_seconds: float) -> PipelineShape | None:
        """The next shape to sketch, None if a sketch is more promising."""
        for shapes in self.shapes.values():
            shapes[:] = [s for s in shapes if self.space.lower_bound(s) < best_seconds]
        for axes, shapes in self.shapes.items():
            if shapes and axes not in self.excess and not self._far(axes):
                return shapes[0]
        if math.isinf(best_seconds) and self.sketches and not self.space.simulated:
            return None
        promising = min(best_seconds, self.sketches[0][0]) if self.sketches else best_seconds
        guesses = [
            (self._guess(shape), axes, number)
            for axes, shapes in self.shapes.items()
            for number, shape in enumerate(shapes)
        ]
        guess, axes, number = min(guesses, default=(math.inf, 0, 0))
        return self.shapes[axes][number] if guess < promising else None

    def _far(self, axes: int) -> bool:
        """Whether a number of stages is skipped, because the next smaller one is slow."""
        fastest = min(self.fastest.values(), default=math.inf)
        return self.fastest.get(axes - 1, 0.0) > FAR * fastest

    def _is_next_to_fastest(self, shape: PipelineShape) -> bool:
        """Whether the fastest sketch of as many stages has half or twice the microbatches. A power
        of microbatches says little there: between them memory may demand rematerialization.
        """
        fastest = self.fastest_microbatches[shape.axes]
        return fastest in (2 * shape.microbatches, shape.microbatches, shape.microbatches / 2)

    def _guess(self, shape: PipelineShape) -> float:
        """Seconds of a shape before its sketch, about."""
        lower_bound = self.space.lower_bound(shape)
        excess = self.excess.get(shape.axes)
        if excess is None:
            return math.inf if self._far(shape.axes) else lower_bound
        microbatches = shape.microbatches
        if self._is_next_to_fastest(shape):
            return NEIGHBOUR * self.fastest[shape.axes]

        def distance(sketched: int) -> float:
            return abs(math.log(sketched / microbatches))

        nearest, *others = sorted(excess, key=distance)
        if not others:  # one sketch: its excess may fall with fewer microbatches
            ratio = min(1.0, microbatches / nearest)
            return lower_bound * (1 + (excess[nearest] - 1) * ratio)
        second = others[0]
        power = math.log(excess[second] / excess[nearest]) / math.log(second / nearest)
        return lower_bound * max(1.0, excess[nearest] * (microbatches / nearest) ** power)


# ---------------------------------------------------------------- shapes, sketches, plans


@dataclass(eq=False)
class PipelineSpace:
    """All shapes of a graph on a mesh, with their bounds, sketches and simulations."""

    staged: StagedBound
    limit_bytes: float
    simulated: set[int] = field(default_factory=set)
    """Plans that were simulated."""
    stored_share: float = 1.0
    """Share of all activations that stages store. Compilers compute light ones again, as a step
    whose memory was simulated shows."""
    _networks: dict[tuple[int, int], CostNetwork] = field(default_factory=dict)
    _independent: dict[int, bool] = field(default_factory=dict)
    _experts_on: dict[Mesh, list[Plan]] = field(default_factory=dict)

    @property
    def graph(self) -> OperatorGraph:
        """The graph of a step."""
        return self.staged.graph

    @property
    def placement(self) -> Placement:
        """The whole mesh on its machine."""
        return self.staged.placement

    @property
    def terms(self) -> Terms:
        """The cost terms of the graph."""
        return self.staged.terms

    @property
    def mesh(self) -> Mesh:
        return self.placement.mesh

    @cached_property
    def cuts(self) -> Cuts:
        return Cuts(self.graph, self.terms)

    @cached_property
    def kernel_seconds(self) -> dict[Phase, float]:
        """By phase, lower bound of the seconds that all devices together compute."""
        return lower_bounds_by_phase(self.terms, self.placement.machine)

    @cached_property
    def variable_bytes(self) -> int:
        """Bytes of variables, their slots and gradients, of all devices together."""
        total = 0
        for operator in self.terms.operators:
            total += sum(2 * stored.nbytes + stored.slots for stored in operator.stored)
            total += sum(nbytes for nbytes, _ in operator.resident)
        return total

    @cached_property
    def activation_bytes(self) -> int:
        """Bytes of forward values that the backward pass reads, of all devices together."""
        return sum(
            nbytes for operator in self.terms.operators for nbytes, _ in operator.activations
        )

    def shapes(self, axes: int) -> Iterator[PipelineShape]:
        """All shapes whose stages are numbered by the first `axes` of the mesh."""
        stages = math.prod(self.mesh.sizes[:axes])
        if stages > len(self.cuts.ends) + 1:
            return
        counts = ONE_STAGE if stages == 1 else [stages * count for count in PER_STAGE]
        for microbatches in counts:
            if self.graph.batch_size % microbatches or not self._is_independent(microbatches):
                continue
            plain = (stages, microbatches) == (1, 1)
            for rematerialize in (True,) if plain else (False, True):
                yield PipelineShape(
                    axes=axes,
                    stages=stages,
                    microbatches=microbatches,
                    rematerialize=rematerialize,
                )

    def _is_independent(self, microbatches: int) -> bool:
        if microbatches not in self._independent:
            self._independent[microbatches] = independent(self.graph, self.terms, microbatches)
        return self._independent[microbatches]

    def distance_from_usual(self, shape: PipelineShape) -> tuple[float, bool]:
        """Distance of a shape from the usual one: near shapes come first."""
        usual = USUAL * shape.stages
        return abs(math.log(shape.microbatches / usual)), shape.rematerialize

    def lower_bound(self, shape: PipelineShape) -> float:
        """Seconds of a step with stages that end together, send and rematerialize nothing.

        A shape that rematerializes does so in as few runs as its memory demands.
        """
        seconds = self.kernel_seconds
        whole = seconds["forward"] + seconds["backward"]
        pipelined = whole * shape.stages / shape.capacity
        return (pipelined + seconds["update"]) / self.mesh.size

    def relaxed_bound(self, shape: PipelineShape, enough: float) -> float:
        """Lower bound of a shape by all choices of its operators, or one of `enough` seconds.

        0 for one stage: its relaxation takes longer than a sketch.
        """
        if shape.stages == 1:
            return 0.0
        inner = self.mesh.axes[shape.axes :]
        return self.staged.of_shape(StagedShape(shape.stages, shape.microbatches, inner), enough)

    def min_bytes(self, shape: PipelineShape) -> float:
        """Lower bound of the bytes of one device of each stage, all stages together."""
        activations = 0.0
        if not shape.rematerialize:
            stored_bytes = self.activation_bytes * self.stored_share
            activations = stored_bytes / shape.microbatches * shape.in_flight
        return (self.variable_bytes + activations) * shape.stages / self.mesh.size

    def sketch(
        self,
        shape: PipelineShape,
        limit_bytes: float,
        tries: int,
        price: float = 0.0,
    ) -> Sketch | None:
        """The fastest sketch of a shape that fits in `limit_bytes` per device; None if none fits.

        A byte costs `price` seconds or more.
        """
        if not tries or self.min_bytes(shape) > limit_bytes * shape.stages:
            return None
        costs = ShapeCosts(self._network(shape), shape, self.stored_share)
        problem = costs.problem()
        min_bytes = sum(float(nbytes.min()) for nbytes in problem.nbytes)
        if min_bytes > limit_bytes * shape.stages:
            return None
        return _Sketcher(
            self,
            costs,
            problem,
            limit_bytes,
            tries - 1,
        ).search(price)

    def _network(self, shape: PipelineShape) -> CostNetwork:
        """The cost network inside a stage, of one microbatch."""
        key = (shape.axes, shape.microbatches)
        if key not in self._networks:
            time_axes = (Axis(TIME, shape.microbatches, -1),) if shape.microbatches > 1 else ()
            inner = self.mesh.axes[shape.axes :]
            if len(self._networks) == NETWORKS:
                oldest = next(iter(self._networks))
                del self._networks[oldest]
            self._networks[key] = build(
                self.graph,
                self.placement.machine,
                Mesh((*time_axes, *inner)),
                baselines=list(self._experts(shape.microbatches, inner)),
                terms=self.terms,
                limit=CHOICES,
            )
        return self._networks[key]

    def _experts(self, microbatches: int, axes: Sequence[Axis]) -> Iterator[Plan]:
        """Tensor parallelism over devices of a node, samples over all other axes, where these
        divide the samples of a microbatch. The candidates of large meshes leave some of it out.
        """
        for plan in self._megatron_plans(Mesh(tuple(axes))):
            staged = stage_plan(self.graph, replace(plan, microbatches=microbatches))
            if microbatches == 1 or self._divides_samples(staged, microbatches):
                yield staged

    def _megatron_plans(self, mesh: Mesh) -> list[Plan]:
        """Tensor parallelism over one device axis of a node, over two, and so on."""
        if mesh not in self._experts_on:
            axes = mesh.axes
            innermost = [axis for axis in axes if axis.level == axes[-1].level]
            name = self.placement.machine.name
            self._experts_on[mesh] = [
                megatron(self.graph, name, mesh, "data x tensor", sample_axes=len(axes) - count)
                for count in range(1, len(innermost) + 1)
            ]
        return self._experts_on[mesh]

    def _divides_samples(self, staged: Plan, microbatches: int) -> bool:
        """Whether microbatches split the samples of all operators that have them."""
        for number, operator in enumerate(self.graph.operators):
            has_samples = sample_factor(self.graph, number, {}, microbatches) >= 0
            if has_samples and TIME not in staged.choices[operator.name]:
                return False
        return True

    def simulate(
        self,
        sketch: Sketch,
        best_seconds: float = math.inf,
    ) -> PipelinedStep | Sketch | None:
        """The simulated step of a sketch, if it fits; else a sketch that needs less memory.

        None if there is neither, if the plan is no pipeline, or if its step takes `best_seconds` or
        more: a peak takes longer to compute than a step.
        """
        inner = sketch.network.plan(sketch.states)
        limit_bytes = sketch.limit_bytes
        step: PipelinedStep | None = None
        try:
            for _ in range(DIVISIONS):
                division = sketch.runs.divide(limit_bytes)
                if division is None:
                    break
                plan = self._plan(inner, sketch.shape, division)
                if not is_pipeline(plan) or self._is_known(plan):
                    return None
                step = self._step(plan) if step is None else step.with_plan(plan)
                row = self.staged.spine.operators
                if math.isfinite(best_seconds) and step.least_seconds(row) >= best_seconds:
                    return None
                # The simulation runs here: stages that wait for each other are a PlanError.
                if step.seconds >= best_seconds:
                    return None
                self._learn(sketch, division, step)
                if step.peak_bytes <= self.limit_bytes:
                    return step
                limit_bytes *= min(0.98, self.limit_bytes / step.peak_bytes)
        except PlanError:
            return None
        return self.sketch(
            sketch.shape,
            limit_bytes,
            sketch.tries,
            sketch.price,
        )

    def _learn(self, sketch: Sketch, division: Division, step: PipelinedStep) -> None:
        """Takes the share of stored activations from the first step whose memory is simulated."""
        if self.stored_share < 1.0:
            return
        expected_bytes = 0.0
        stored_bytes = 0.0
        for stage, memory in enumerate(step.memories):
            expected = sketch.runs.stored_bytes(division, stage)
            if expected is not None:
                expected_bytes += expected
                stored_bytes += memory.microbatch_bytes
        if expected_bytes > 0:
            share = max(LEAST_STORED, stored_bytes / expected_bytes)
            self.stored_share = share if share < 1 - LEAST_STORED else 1.0

    def _is_known(self, plan: Plan) -> bool:
        """Whether a plan was simulated before: a shape that may rematerialize need not do it."""
        choices = tuple(tuple(choice.items()) for choice in plan.choices.values())
        storage = tuple(plan.storage.items())
        key = hash((plan.microbatches, plan.schedule, plan.recompute, choices, storage))
        if key in self.simulated:
            return True
        self.simulated.add(key)
        return False

    def _step(self, plan: Plan) -> PipelinedStep:
        return PipelinedStep.of(
            self.graph,
            self.placement.machine,
            plan,
            self.terms,
        )

    def _plan(
        self,
        inner: Plan,
        shape: PipelineShape,
        division: Division,
    ) -> Plan:
        """The plan that splits inside stages as `inner`, with the stages of a division."""
        names = [operator.name for operator in self.graph.operators]
        last_operators = [*self.cuts.ends, len(names) - 1]
        stage_ends = [last_operators[run] for run in division.ends]
        stage_axes = self.mesh.axes[: shape.axes]
        choices = {}
        stage = 0
        for operator, name in enumerate(names):
            if operator > stage_ends[stage]:
                stage += 1
            choice = _slices(stage, stage_axes)
            choice |= {axis: use for axis, use in inner.choices[name].items() if axis != TIME}
            choices[name] = choice
        runs = []
        for run in division.rematerialized:
            first = last_operators[run - 1] + 1 if run else 0
            runs.append((names[first], names[last_operators[run]]))
        return replace(
            inner,
            mesh=self.mesh,
            choices=choices,
            microbatches=shape.microbatches,
            schedule=division.schedule,
            recompute=tuple(runs),
        )


def _slices(stage: int, axes: Sequence[Axis]) -> dict[str, str]:
    """The slices of axes that are a stage, the last axis fastest."""
    slices = {}
    for axis in reversed(axes):
        slices[axis.name] = f"at({stage % axis.size})"
        stage //= axis.size
    return slices


@dataclass(eq=False)
class _Sketcher:
    """The search for the price of a byte at which a shape fits in memory and is fastest."""

    space: PipelineSpace
    costs: ShapeCosts
    problem: Problem
    limit_bytes: float
    tries: int

    @cached_property
    def folded(self) -> Folded:
        return fold(self.problem)

    @cached_property
    def reduced(self) -> Reduced:
        return reduce(self.folded.problem)

    @cached_property
    def priced(self) -> PricedProblem:
        return PricedProblem(self.reduced.problem)

    @cached_property
    def network(self) -> CostNetwork:
        """The network of the states, without what sketches do not need."""
        return replace(
            self.costs.network,
            problem=Problem.of([], []),
            parts=[],
            activations=[],
            gradients=[],
            sums=[],
            moves={},
            move_kinds={},
        )

    def at_price(self, price: float) -> Sketch | None:
        """The sketch with a byte at this price; None if it does not fit."""
        states, *_ = self.priced.solve(price)
        lifted = self.folded.lift(self.reduced.lift(states))
        space = self.space
        estimate = self.costs.estimate(
            space.mesh,
            space.cuts,
            lifted,
            self.limit_bytes,
        )
        if estimate is None:
            return None
        return Sketch(
            self.costs.shape,
            estimate.seconds,
            estimate.lower_bound,
            price,
            self.limit_bytes,
            lifted,
            estimate.runs,
            self.network,
            self.tries,
        )

    def search(self, price: float) -> Sketch | None:
        """The sketch at `price` if it fits, else the fastest of higher prices."""
        sketch = self.at_price(price)
        if sketch is not None:
            return sketch
        lower = price
        price = max(8 * price, self._first_price())
        for _ in range(PRICES):
            sketch = self.at_price(price)
            if sketch is not None:
                return self._cheaper(sketch, lower, price)
            lower = price
            price = 8 * price
        return None

    def _first_price(self) -> float:
        """A price at which all memory costs one 64th of the step."""
        seconds = sum(float(choices.min()) for choices in self.reduced.problem.seconds)
        return seconds / (self.limit_bytes * self.costs.shape.stages) / 64

    def _cheaper(
        self,
        sketch: Sketch,
        lower: float,
        price: float,
    ) -> Sketch:
        """The fastest sketch at prices between one that is too low to fit and one that fits."""
        for _ in range(PRICES):
            if price < 1.1 * lower:
                break
            middle = math.sqrt(lower * price) if lower else price / 8
            cheaper = self.at_price(middle)
            if cheaper is None:
                lower = middle
                continue
            price = middle
            sketch = min(sketch, cheaper, key=lambda candidate: candidate.seconds)
        return sketch

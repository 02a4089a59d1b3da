"""The best plan for a graph on a machine: from baselines to a checked result.

Stages, in order (`find`):

    baselines          plans that an expert would write
    network            candidates per operator and their costs (`search.network`)
    exact search       the least sum of costs within a budget of bytes (`search.elimination`), on a
                       GPU with optimizer slots in host memory too, if memory limits plans
    MCMC               the shortest simulated step, from several plans (`search.mcmc`)
    rematerialization  splits together with rematerialized operators, if memory limits plans
                       (`search.together`)
    memory check       real peak memory (`cost.memory`), which is no sum of parts
    pipeline stages    stages, microbatches and rematerialization (`search.pipelines`), optional
    placement          operators on slices of axes (`search.placement`), optional

If a plan exceeds device memory, the budget is lowered in proportion and the exact search runs
again. MCMC matters only where collectives hide behind kernels: elsewhere a step is the sum of its
parts, and the exact plan is proved best.

Plans with pipeline stages or placement run in pieces (`execute.staged`). They are larger spaces
with lower bounds of their own (`search.staged_bound`, `search.bound`), so the result has three.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from partita.cost.evaluate import attached_uses
from partita.cost.memory import PeakMemory
from partita.cost.moves import Placement
from partita.cost.predict import Prediction, build_prediction
from partita.cost.terms import Terms
from partita.errors import MemoryBudgetError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.graph.rematerialize import Run
from partita.machine import Machine
from partita.plans.baselines import baselines_of
from partita.plans.layout import is_accelerated, layout_of
from partita.plans.notes import with_use_notes
from partita.plans.pipeline import is_one_program, is_placed
from partita.plans.plan import Mesh, Plan, is_gpu, mesh_for
from partita.search.base import Progress, Report, SearchResult
from partita.search.baselines import HOPELESS, Baselines, peak_bytes
from partita.search.bound import lower_bound_seconds
from partita.search.elimination import eliminate
from partita.search.garbage import young_collections_only
from partita.search.memory_notes import memory_notes
from partita.search.network import CostNetwork, build
from partita.search.offload import fewest_offloaded
from partita.search.optional import PLACEMENT, STAGES, BestStep, OptionalPart
from partita.search.pipelines import pipelines
from partita.search.placement import placements
from partita.search.portfolio import (
    MIN_GAIN,
    ROUNDING,
    SEARCHES,
    Limits,
    Search,
    elimination,
    without_idle_splits,
)
from partita.search.recomputation import least_with_recomputation
from partita.search.reduce import reduce
from partita.search.relaxation import least_step_seconds
from partita.search.rematerialization import (
    groupings,
    stored_bytes,
    with_fewest_runs,
)
from partita.search.staged_bound import StagedBound
from partita.search.together import best_together
from partita.simulation.base import SimulatedStep
from partita.simulation.simulate import predicted
from partita.units import format_bytes, format_seconds

SAME_SPEED = 0.005
"""Relative difference below which two plans are as fast as each other in notes."""
SMALL_GAP = 0.02
"""Gap between two bounds below which the higher one is not worth its time."""
RESERVE = 0.05
"""Share of a device's memory that is reserved for the runtime."""
BUDGETS = 6
"""Budgets of bytes that are tried until a plan fits in memory."""
BUDGET_MARGIN = 0.98
"""Margin of a lowered budget: plans come in steps of bytes."""
REMATERIALIZED_PLANS = 2
"""Plans above the memory of a device, the fastest first, for which runs are rematerialized."""
LARGE = 50_000
"""Instructions above which the search for stages, if it follows, is left the plans of one program
that need more memory: plans of one stage are among its shapes. Each peak takes seconds there."""
RUNNABLE_SHARE = 0.5
"""Share of the time limit for plans that can run, if stages and placement follow."""
STAGES_SHARE = 0.6
"""Share of the remaining time limit for stages, if placement follows."""

IN_PIECES = (
    "placed operators, stages, microbatches and rematerialized runs run as programs of their own"
)
NO_FASTER = "no pipeline or placement that was examined is predicted to be faster"


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """The best plan of a search so far, with its prediction and the lower bounds of its spaces."""

    plan: Plan
    prediction: Prediction
    network: CostNetwork
    baselines: Baselines
    fits: bool
    """Whether the plan fits in memory."""
    smallest_bytes: int
    """Least peak memory of the plans that the search examined, bytes of a device."""
    bound_seconds: float
    """Lower bound of the step of every plan that can run, seconds."""
    staged_bound_seconds: float | None = None
    """The same for plans with stages and microbatches too, seconds; None if not searched."""
    placed_bound_seconds: float | None = None
    """The same for plans with placed operators too, seconds; None if not searched."""
    stopped: bool = False
    """Whether Ctrl-C ended the search."""
    history: tuple[Progress, ...] = ()
    """Progress of the exact search and MCMC."""
    failures: tuple[str, ...] = ()
    """Sentences about optional parts that failed."""

    @property
    def gap(self) -> float:
        """Relative excess over the lower bound of the plan's space, 0 if proved best.

        That of plans of one program, or of the larger space for another plan.
        """
        staged_gap = self.staged_gap
        if staged_gap is not None and not is_one_program(self.plan):
            return staged_gap
        return _gap(self.prediction.seconds, self.bound_seconds)

    @property
    def larger_bound_seconds(self) -> float | None:
        """Lower bound of plans with stages, and of placed operators if the plan has some, seconds.

        None if they were not searched.
        """
        return self.placed_bound_seconds if is_placed(self.plan) else self.staged_bound_seconds

    @property
    def staged_gap(self) -> float | None:
        """Relative excess over the lower bound of the larger space, None if it was not searched."""
        bound_seconds = self.larger_bound_seconds
        return None if bound_seconds is None else _gap(self.prediction.seconds, bound_seconds)


def _gap(seconds: float, bound_seconds: float) -> float:
    return max(0.0, seconds / bound_seconds - 1) if bound_seconds > 0 else 0.0


def mesh_of(machine: Machine) -> Mesh:
    """The logical mesh of a machine: every level split into prime axes, slow levels first."""
    return mesh_for(level.size for level in machine.levels)


def capacity(machine: Machine) -> int:
    """Bytes of a device that a plan may use."""
    return int(machine.memory_bytes * (1 - RESERVE))


def fits(
    machine: Machine,
    prediction: Prediction,
    excess: float = 1.0,
) -> bool:
    """Whether the device closest to its capacity holds `excess` times its predicted peak."""
    kind = machine.of_kind(prediction.kind)
    return prediction.peak_bytes <= int(capacity(kind) / max(1.0, excess))


def check_search(search: object) -> None:
    """PlanError unless `search` names a search."""
    if not isinstance(search, str) or search not in SEARCHES:
        raise PlanError(f"There is no search {search!r}: use {', '.join(map(repr, SEARCHES))}.")


def find(
    graph: OperatorGraph,
    machine: Machine,
    report: Report | None = None,
    excess: float = 1.0,
    seconds: float | None = None,
    seed: int = 0,
    stages: bool = False,
    search: str = "portfolio",
) -> PlanResult:
    """The plan of least predicted step time that fits the machine's memory. No baseline is faster.

    Args:
        report: Called with the progress of the search.
        excess: Observed memory of a compiled plan over its predicted memory.
        seconds: Time limit, approximate. None: a fixed number of proposals, which gives the same
            plan every time.
        seed: Seed of random proposals.
        stages: Whether plans with pipeline stages, microbatches, rematerialization and placed
            operators are in the space. They run in pieces.
        search: A key of `portfolio.SEARCHES`.

    Raises:
        MemoryBudgetError: No plan fits. The message gives the smallest need.
        PlanError: The search is unknown, or `seconds` are too short for one plan.
    """
    check_search(search)
    request = _Request(
        graph,
        machine,
        report,
        excess,
        seed,
        _Clock(seconds),
        stages and machine.devices > 1,
    )
    with young_collections_only():
        return _found(request, SEARCHES[search])


def _found(request: _Request, search: Search) -> PlanResult:
    """The result of a request, with the notes of its plan."""
    graph, machine = request.graph, request.machine
    baselines = _baselines(request)
    request.clock.check(graph, machine)
    if request.stages:
        result = _runnable(
            request,
            baselines,
            search,
            RUNNABLE_SHARE,
        )
        result = _with_larger_space(request, result)
    else:
        result = _runnable(
            request,
            baselines,
            search,
            1.0,
        )
    if not result.fits:
        raise _memory_error(request, result)
    return _noted(request, result)


def find_placed(graph: OperatorGraph, machine: Machine) -> PlanResult:
    """The result of `find` with placed operators in the space, without stages and microbatches.

    This is FlexFlow's space. MemoryBudgetError if no plan fits.
    """
    request = _Request(graph, machine, None, 1.0, 0, _Clock(None), stages=False)
    result = _runnable(request, _baselines(request), SEARCHES["portfolio"], 1.0)
    if not result.fits:
        raise _memory_error(request, result)
    result = replace(result, placed_bound_seconds=_placed_bound(request, result))
    return _noted(request, _with_placement(request, result, result))


# ---------------------------------------------------------------- the request


@dataclass(frozen=True)
class _Clock:
    """The time limit of a search, from its start."""

    seconds: float | None
    start: float = field(default_factory=time.perf_counter)

    def share(self, part: float) -> float | None:
        """A part of the remaining seconds, None without a limit."""
        if self.seconds is None:
            return None
        elapsed = time.perf_counter() - self.start
        return max(0.0, self.seconds - elapsed) * part

    def check(
        self,
        graph: OperatorGraph,
        machine: Machine,
    ) -> None:
        """PlanError if the time is up before the first plan."""
        elapsed = time.perf_counter() - self.start
        if self.seconds is not None and elapsed > self.seconds:
            raise PlanError(
                f"{format_seconds(self.seconds)} are too short to find one plan of '{graph.name}' "
                f"on {machine.name}: its costs alone took {format_seconds(elapsed)}. "
                f"Use at least --seconds {math.ceil(elapsed + 1)}, or remove --seconds."
            )


@dataclass(frozen=True)
class _Request:
    """The inputs that all stages of a search share."""

    graph: OperatorGraph
    machine: Machine
    report: Report | None
    excess: float
    seed: int
    clock: _Clock
    stages: bool
    """Whether stages are searched, too."""

    @property
    def limit_bytes(self) -> int:
        """Bytes of a device that a plan may use by its prediction."""
        return int(capacity(self.machine) / max(1.0, self.excess))

    @property
    def leaves_to_stages(self) -> bool:
        """Whether plans of one program above the memory of a device are left to stages."""
        return self.stages and len(self.graph.instructions) > LARGE

    @property
    def hopeless(self) -> float:
        """Memory of a plan of one program, relative to that of a device, above which it is given
        up."""
        return 1.0 if self.leaves_to_stages else HOPELESS

    def limits(
        self,
        budget: float,
        time_share: float,
    ) -> Limits:
        """Limits of a part of the search that may take a share of the remaining time."""
        return Limits(
            budget,
            self.clock.share(time_share),
            self.seed,
            self.report,
        )


# ---------------------------------------------------------------- plans that can run


def _can_offload(request: _Request) -> bool:
    """Whether optimizer slots may be in the memory of the host.

    XLA:GPU reads them from there; XLA:TPU copies all of them to the device before the update.
    """
    machine = request.machine
    has_memory = machine.host_memory is not None and not machine.kinds
    return has_memory and is_gpu(request.graph.target)


def _baselines(request: _Request, terms: Terms | None = None, offload: bool = False) -> Baselines:
    """The baselines, and the cost network that has their choices among its candidates.

    Args:
        terms: Cost terms of the graph, if they exist already.
        offload: Whether optimizer slots in the memory of the host are among the candidates.
    """
    graph, machine = request.graph, request.machine
    mesh = mesh_of(machine)
    plans = {name: make(graph, machine.name, mesh) for name, make in baselines_of(graph).items()}
    network = build(
        graph,
        machine,
        mesh,
        list(plans.values()),
        terms=terms,
        offload=offload,
    )
    return Baselines(network, plans)


def _runnable(
    request: _Request,
    baselines: Baselines,
    search: Search,
    time_share: float,
) -> PlanResult:
    """The best plan that all devices run at once. `fits` is False if none fits in memory."""
    limit_bytes = request.limit_bytes

    def limits(budget: float) -> Limits:
        return request.limits(budget, time_share)

    searched, peaks = _search_within_memory(
        request,
        baselines,
        search,
        limits,
    )
    if max(peaks.values()) > limit_bytes and not searched.stopped and _can_offload(request):
        baselines = _baselines(request, baselines.network.terms, offload=True)
        searched, peaks = _search_within_memory(request, baselines, search, limits)
    states = searched.states
    if searched.feasible:
        states = without_idle_splits(baselines.space, states)
    if states not in peaks:
        peaks[states] = peak_bytes(baselines.network, baselines.network.plan(states))
    if peaks[states] <= limit_bytes:
        searched = replace(searched, states=states)
    network = baselines.network
    plan = network.plan(searched.states)
    fits_memory = peaks[searched.states] <= limit_bytes
    if fits_memory or not request.leaves_to_stages:
        prediction = predicted(request.graph, request.machine, plan, network.terms)
    else:
        prediction = _counted(request, plan, searched)
    result = PlanResult(
        plan=plan,
        prediction=prediction,
        network=network,
        baselines=baselines,
        fits=fits_memory,
        smallest_bytes=min(peaks.values()),
        bound_seconds=bound_of_all_plans(network, searched.bound),
        stopped=searched.stopped,
        history=searched.history,
        failures=searched.failures,
    )
    result = _or_baseline(request, result)
    if result.plan.offload and result.fits:
        plan, prediction = fewest_offloaded(
            request.graph, request.machine, result.plan, result.prediction, limit_bytes
        )
        result = replace(result, plan=plan, prediction=prediction)
    if max(peaks.values()) > limit_bytes and is_accelerated(request.graph):
        result = _or_rematerialized(request, result, limits(limit_bytes), peaks)
    return _or_one_device(request, result) if result.fits else result


def _counted(request: _Request, plan: Plan, searched: SearchResult) -> Prediction:
    """The prediction of a plan of one program that is left to stages, by the sums of the search."""
    return build_prediction(
        plan,
        request.machine,
        operators=(),
        memory=PeakMemory(
            math.ceil(searched.nbytes), 0, 0, 0, 0, 0, 0, 0, "", np.zeros(0), np.zeros(0)
        ),
        traffic={},
        flops=0.0,
        seconds=searched.seconds,
    )


def bound_of_all_plans(network: CostNetwork, bound_seconds: float) -> float:
    """Lower bound on all plans, given that on plans of the network's states.

    On large meshes axes are dealt out several at a time. The work of the kernels bounds the plans
    between, or the relaxation of all choices where that may be much higher.
    """
    if network.deals_singly:
        return bound_seconds
    placement = network.placement
    kernels = lower_bound_seconds(network.terms, placement.machine, placement.mesh.size)
    if kernels >= bound_seconds * (1 - SMALL_GAP):
        return min(bound_seconds, kernels)
    relaxation = least_step_seconds(network.graph, placement, network.terms)
    return max(kernels, relaxation)


def _or_rematerialized(
    request: _Request,
    result: PlanResult,
    limits: Limits,
    peaks: Mapping[tuple[int, ...], int],
) -> PlanResult:
    """The result with rematerialization in the space, where memory limits plans without it.

    `peaks`: states that were examined -> peak memory, bytes.
    """
    if request.machine.kinds or result.stopped:
        return result
    network, baselines = result.network, result.baselines
    fastest = elimination(baselines.space, replace(limits, budget=np.inf))
    if network.deals_singly:  # other bounds count no memory, so they hold with rematerialization
        least = eliminate(reduce(least_with_recomputation(network).problem).problem, limits.budget)
        bound = max(fastest.bound, least.bound)
        result = replace(result, bound_seconds=min(result.bound_seconds, bound))
    if request.leaves_to_stages or _seconds_to_beat(result) <= result.bound_seconds:
        return result
    states = [states for states in baselines.states.values() if states is not None]
    joint = best_together(network, limits, states, result.bound_seconds)
    smallest_bytes = min(result.smallest_bytes, joint.smallest_bytes)
    result = replace(result, smallest_bytes=smallest_bytes, stopped=joint.stopped)
    if joint.prediction is not None:
        if joint.prediction.seconds < _seconds_to_beat(result):
            result = replace(result, plan=joint.plan, prediction=joint.prediction, fits=True)
        return result
    choices = groupings(request.graph, network.terms)
    if not choices:
        return result
    large = []
    for name, plan in baselines.plans.items():
        own_states = baselines.states[name]
        variables = 0.0 if own_states is None else stored_bytes(network, own_states)
        if variables <= request.limit_bytes:
            large.append(replace(plan, name="found"))
    states = [fastest.states, *peaks]
    large += [network.plan(one) for one in states if one not in baselines.states.values()]
    return _fastest_rematerialized(request, result, large, choices)


def _fastest_rematerialized(
    request: _Request,
    result: PlanResult,
    plans: Sequence[Plan],
    choices: Sequence[Sequence[Run]],
) -> PlanResult:
    """The result, or a faster one: a plan that is too large with some runs rematerialized."""
    graph, machine, limit_bytes = request.graph, request.machine, request.limit_bytes
    predictions: dict[str, tuple[Prediction, Plan]] = {}
    for plan in plans:
        key = f"{plan.choices} {plan.storage}"
        if key not in predictions:
            predictions[key] = (predicted(graph, machine, plan, result.network.terms), plan)
    for prediction, plan in _hopeful(list(predictions.values()), limit_bytes):
        if prediction.seconds >= _seconds_to_beat(result):
            continue
        for runs in choices:
            smaller = with_fewest_runs(graph, machine, plan, prediction, runs, limit_bytes)
            smallest_bytes = min(result.smallest_bytes, smaller.peak_bytes)
            result = replace(result, smallest_bytes=smallest_bytes)
            if smaller.peak_bytes > limit_bytes:
                continue
            after = predicted(graph, machine, smaller.plan)
            beaten = result.prediction.seconds
            if not result.plan.recompute:
                beaten = _seconds_to_beat(result)
            if after.seconds < beaten:
                result = replace(result, plan=smaller.plan, prediction=after, fits=True)
    return result


def _hopeful(
    plans: Sequence[tuple[Prediction, Plan]], limit_bytes: int
) -> list[tuple[Prediction, Plan]]:
    """The plans above a limit that may fit without activations: the fastest, and the smallest."""

    def least_bytes(pair: tuple[Prediction, Plan]) -> float:
        prediction, _ = pair
        memory = prediction.memory
        variables = memory.parameters + memory.optimizer + memory.state + memory.batch
        activations = sum(operator.nbytes for operator in prediction.operators) - variables
        return max(variables, memory.peak - activations)

    large = [pair for pair in plans if pair[0].peak_bytes > limit_bytes >= least_bytes(pair)]
    large.sort(key=lambda pair: pair[0].seconds)
    tried = large[:REMATERIALIZED_PLANS]
    rest = large[REMATERIALIZED_PLANS:]
    return tried + ([min(rest, key=least_bytes)] if rest else [])


def _search_within_memory(
    request: _Request,
    baselines: Baselines,
    search: Search,
    limits: Callable[[float], Limits],
) -> tuple[SearchResult, dict[tuple[int, ...], int]]:
    """The result of a search that fits in memory, or else the last one.

    The second value is the peak memory of all states examined, bytes.

    The exact search comes first, its budget lowered until its plan fits. The whole search then
    has that budget.
    """
    space = baselines.space
    network = baselines.network
    peaks: dict[tuple[int, ...], int] = {}
    limit_bytes = request.limit_bytes
    budget = float(limit_bytes)
    run: Search = elimination
    fitting: SearchResult | None = None
    for _ in range(BUDGETS):
        result = run(space, limits(budget))
        if not result.feasible and request.leaves_to_stages:
            peaks[result.states] = math.ceil(result.nbytes)
        if result.states not in peaks:
            peaks[result.states] = peak_bytes(network, network.plan(result.states))
        peak = peaks[result.states]
        if peak <= limit_bytes:
            fitting = result
            if run is search or result.stopped:
                break
            run = search
        elif not result.feasible or result.stopped:
            break
        else:
            budget = min(budget, result.nbytes) * limit_bytes / peak * BUDGET_MARGIN
    return fitting or result, peaks


def _or_baseline(request: _Request, result: PlanResult) -> PlanResult:
    """The fastest baseline that fits, if it is faster than the plan or the plan does not fit.

    Only a search that was interrupted, or whose budget was lowered, ends above a baseline that
    fits.
    """
    limit_seconds = result.prediction.seconds * (1 - 1e-12) if result.fits else np.inf
    name = result.baselines.fastest(request.limit_bytes, limit_seconds, request.hopeless)
    if name is None:
        return result
    plan, prediction = result.baselines[name]
    return replace(
        result,
        plan=replace(plan, name="found"),
        prediction=prediction,
        fits=True,
    )


def _or_one_device(request: _Request, result: PlanResult) -> PlanResult:
    """The plan of one device, with the reason, if nothing is split or splitting does not pay."""
    baselines, plan = result.baselines, result.plan
    if plan.mesh.size == 1:
        return result
    alone_seconds = baselines.seconds("one device")
    if plan.is_split:
        if result.prediction.seconds < alone_seconds * (1 - ROUNDING):
            return result
        if baselines["one device"][1].peak_bytes > capacity(request.machine):
            return result
    graph = request.graph
    one = Plan(
        graph.name,
        plan.machine,
        Mesh(()),
        {operator.name: {} for operator in graph.operators},
        {},
        plan.name,
        plan.batch_size,
        target=graph.target,
        notes=(
            _one_device_reason(
                request,
                baselines,
                plan.mesh.size,
                alone_seconds,
            ),
        ),
    )
    prediction = predicted(graph, request.machine, one)
    return replace(result, plan=one, prediction=replace(prediction, plan=plan.name))


def _one_device_reason(
    request: _Request,
    baselines: Baselines,
    devices: int,
    alone_seconds: float,
) -> str:
    split_plans = [prediction for _, prediction in baselines.values() if prediction.traffic]
    if not split_plans:
        return (
            f"one of {devices} devices is used: no size that a plan could split (batch "
            f"{request.graph.batch_size}, channels, units) is a multiple of a prime factor of "
            f"{devices}"
        )
    best = min(split_plans, key=lambda prediction: prediction.seconds)
    return (
        f"one of {devices} devices is used: splitting does not pay, the best split "
        f"('{best.plan}') is predicted at {format_seconds(best.seconds)} against "
        f"{format_seconds(alone_seconds)}"
    )


# ---------------------------------------------------------------- the larger space


def _with_larger_space(request: _Request, result: PlanResult) -> PlanResult:
    """The result with stages and placement in the space."""
    one_program = result
    result = replace(result, placed_bound_seconds=_placed_bound(request, result))
    network = result.network
    staged = StagedBound(request.graph, network.placement, network.terms)
    result = _with_stages(request, result, staged)
    result = _with_placement(request, result, one_program)
    return replace(result, staged_bound_seconds=_staged_bound(request, result, staged))


def _placed_bound(request: _Request, result: PlanResult) -> float:
    """Lower bound of plans with placed operators too: the kernels alone, evenly divided."""
    machine = request.machine
    kernels = lower_bound_seconds(result.network.terms, machine, machine.devices)
    return min(result.bound_seconds, kernels)


def _staged_bound(request: _Request, result: PlanResult, staged: StagedBound) -> float | None:
    """Lower bound of plans with stages; of kernels alone if the devices differ or time is up."""
    if request.machine.kinds or request.clock.share(1.0) == 0.0:
        return result.placed_bound_seconds
    return min(result.bound_seconds, staged.seconds(result.bound_seconds))


def _with_stages(request: _Request, result: PlanResult, staged: StagedBound) -> PlanResult:
    """The result with pipeline stages in the space, where all devices are equal."""
    if request.machine.kinds:
        return result
    steps = pipelines(
        staged,
        request.limits(request.limit_bytes, STAGES_SHARE),
        limit_seconds=_seconds_to_beat(result),
        bound=result.placed_bound_seconds or 0.0,
    )
    return _faster(result, STAGES, steps)


def _with_placement(
    request: _Request,
    result: PlanResult,
    one_program: PlanResult,
) -> PlanResult:
    """The result with placed operators in the space.

    `one_program` is the best without placement and stages. Placement hardly changes memory: it is
    not tried if no plan of one program is near the memory of a device.
    """
    most_bytes = request.hopeless * request.limit_bytes
    if not one_program.fits and one_program.smallest_bytes > most_bytes:
        return result
    start = one_program.plan
    if not start.mesh.axes:
        start, _ = result.baselines["one device"]

    def fits_memory(step: SimulatedStep) -> bool:
        return fits(request.machine, step.prediction(), request.excess)

    steps = placements(
        request.graph,
        request.machine,
        start,
        result.network.terms,
        request.limits(request.limit_bytes, 1.0),
        limit_seconds=_seconds_to_beat(result),
        fits=fits_memory,
        bound=result.placed_bound_seconds or 0.0,
    )
    return _faster(result, PLACEMENT, steps)


def _seconds_to_beat(result: PlanResult) -> float:
    """Seconds below which a plan of the larger space is worth it; infinite if no plan fits yet."""
    seconds = result.prediction.seconds if result.fits else np.inf
    return seconds * (1 - MIN_GAIN)


def _faster(
    result: PlanResult,
    part: OptionalPart,
    steps: Iterator[SimulatedStep],
) -> PlanResult:
    """The result with the last of ever faster steps, and a sentence if the part failed."""
    best = BestStep()
    predictions: list[Prediction] = []

    def predict() -> None:
        if best.step is not None:
            predictions.append(best.step.prediction())

    failures = part.run(lambda: best.follow(steps)) + part.run(predict)
    result = replace(result, failures=(*result.failures, *failures))
    if best.step is None or not predictions:
        return result
    return replace(
        result,
        plan=replace(best.step.plan, name="found", notes=()),
        prediction=replace(predictions[0], plan="found"),
        fits=True,
    )


# ---------------------------------------------------------------- the result


def _noted(request: _Request, result: PlanResult) -> PlanResult:
    """The result with the notes of its plan, and its prediction and bounds in the plan."""
    notes = [*result.plan.notes, *request.graph.notes]
    notes += _speedup(request, result)
    notes += memory_notes(
        request.graph, request.machine, result.plan, result.prediction, result.network.terms
    )
    if not is_one_program(result.plan):
        notes.append(IN_PIECES)
    else:
        if result.stopped:
            notes.append("the search was stopped; this is the best plan it had")
        if result.staged_bound_seconds is not None:
            notes.append(NO_FASTER)
        notes += _attached_notes(request, result)
    notes += result.failures
    plan = replace(
        result.plan,
        notes=tuple(notes),
        predicted=_predicted(result),
        machine_digest=request.machine.digest,
    )
    return replace(result, plan=with_use_notes(plan, request.machine))


def _attached_notes(request: _Request, result: PlanResult) -> list[str]:
    """Notes about compute attached to the memory of the machine."""
    if not request.machine.attached:
        return []
    network = result.network
    assignments = layout_of(request.graph, result.plan).assignments
    uses = attached_uses(network.terms, Placement(request.machine, result.plan.mesh), assignments)
    trained_bytes = 0
    for argument in request.graph.arguments:
        if argument.role == "parameter" and argument.result != argument.tensor:
            trained_bytes += request.graph.tensors[argument.tensor].nbytes
    return [use.note(result.prediction.seconds, trained_bytes) for use in uses]


def _speedup(request: _Request, result: PlanResult) -> list[str]:
    """A note about the speed of the plan relative to data parallel."""
    baselines = result.baselines
    seconds = result.prediction.seconds
    if not baselines.fits("data parallel", capacity(request.machine)):
        return ["data parallel does not fit in memory"]
    if seconds <= 0:
        return []
    speedup = baselines.seconds("data parallel") / seconds
    if abs(speedup - 1) < SAME_SPEED:
        return ["predicted as fast as data parallel"]
    return [f"predicted {speedup:.2f} x as fast as data parallel"]


def _predicted(result: PlanResult) -> dict[str, Any]:
    """The `predicted` entry of a plan."""
    seconds = result.prediction.seconds
    entry = result.prediction.to_json()
    entry["bound_seconds"] = min(result.bound_seconds, seconds)
    if result.larger_bound_seconds is not None:
        entry["staged_bound_seconds"] = min(result.larger_bound_seconds, seconds)
    return entry


def _memory_error(request: _Request, result: PlanResult) -> MemoryBudgetError:
    graph, machine = request.graph, request.machine
    baselines = result.baselines
    smallest = min(result.smallest_bytes, *(baselines.peak_bytes(name) for name in baselines))
    failures = "".join(f" Note: {failure}" for failure in result.failures)
    return MemoryBudgetError(
        f"'{graph.name}' with batch {graph.batch_size} fits {machine.name} under no plan: "
        f"the smallest needs {format_bytes(smallest)} per device, and a device has "
        f"{format_bytes(machine.memory_bytes)}, of which {format_bytes(request.limit_bytes)} may "
        f"be used. Use more devices, a smaller batch, or devices with more memory.{failures}"
    )

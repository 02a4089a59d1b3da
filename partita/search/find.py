"""The best plan for a graph on a machine: baselines, cost network, exact search, walks on the simulator, and the memory of what it found.

Exact search minimises the additive cost of `cost.evaluate` within a budget of bytes that is additive too. Where the machine's collectives
hide behind kernels a step is less than a sum: walks from the exact plan and all baselines then minimise the simulated step, against
a bound that holds for every plan. Real peak memory is not a sum either, so the plan found is measured by `cost.memory`, and
where it does not fit the budget is lowered by what was missed and the search runs again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from partita.cost.memory import memory
from partita.cost.predict import Prediction
from partita.errors import MemoryBudgetError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.plans.pipeline import runnable
from partita.plans.plan import Mesh, Plan, mesh_for
from partita.search.base import Progress, Report, SearchResult
from partita.search.bound import lower_bound_seconds
from partita.search.candidates import names_of
from partita.search.network import CostNetwork, build, storage_of
from partita.search.pipelines import stage
from partita.search.placement import place
from partita.search.portfolio import MIN_GAIN, SEARCHES, Limits, Search, SearchSpace, elimination
from partita.simulation.simulate import predicted
from partita.units import format_bytes, format_seconds

RESERVE = 0.05
"""The part of a device's memory that is left to the runtime."""


@dataclass(frozen=True)
class Found:
    """A plan with its prediction, the search that found it, and what the baselines are predicted to cost."""

    plan: Plan
    prediction: Prediction
    result: SearchResult
    network: CostNetwork
    baselines: Baselines


def mesh_of(machine: Machine) -> Mesh:
    """The logical mesh over a machine's devices: every level split into prime axes, slow levels first."""
    return mesh_for(level.size for level in machine.levels)


def capacity(machine: Machine) -> int:
    """Bytes of a device that a plan may use."""
    return int(machine.memory_bytes * (1 - RESERVE))


def fits(machine: Machine, prediction: Prediction, excess: float = 1.0) -> bool:
    """Whether the device that holds most of what it has may hold that, and `excess` times as much if that was seen."""
    return prediction.peak_bytes <= int(
        capacity(machine.of_kind(prediction.kind)) / max(1.0, excess)
    )


def find(
    graph: OperatorGraph,
    machine: Machine,
    report: Callable[[Progress], None] | None = None,
    excess: float = 1.0,
    seconds: float | None = None,
    seed: int = 0,
    stages: bool = False,
    search: str = "portfolio",
) -> Found:
    """The plan of least predicted step time that fits the machine's memory.

    Never worse than any baseline by its own measure. Raises MemoryBudgetError, with the smallest need, if nothing fits. `excess`
    is how many times what is predicted a plan was seen to need. The whole search takes about so many `seconds`, else walks make a number of
    proposals that finds the same plan for the same `seed`. With `stages`, plans that place operators on parts of the machine, cut the batch into
    microbatches or recompute are in the space too: they can be simulated, and not yet run. `search` is one of `portfolio.SEARCHES`.
    Raises PlanError where there is no such search, and where the seconds do not suffice for a look at one plan.
    """
    if search not in SEARCHES:
        raise PlanError(f"There is no search {search!r}: use {', '.join(map(repr, SEARCHES))}.")
    clock = _Clock(seconds)
    found = _whole(
        graph, machine, report, excess, clock, 0.5 if stages else 1.0, seed, SEARCHES[search]
    )
    if stages and machine.devices > 1:
        limit = int(capacity(machine) / max(1.0, excess))
        most = found.prediction.seconds if isinstance(found, Found) else np.inf
        bound = min(
            found.result.bound, lower_bound_seconds(found.network.terms, machine, machine.devices)
        )
        terms, best = found.network.terms, None
        if not machine.kinds:
            staged = stage(
                graph,
                machine,
                mesh_of(machine),
                terms,
                limit,
                most * (1 - MIN_GAIN),
                report,
                bound,
                clock.share(0.6),
            )
            best = staged and (staged.plan, staged.prediction())
        start = found.plan if found.plan.mesh.axes else found.baselines["one device"][0]
        enough = lambda placed: fits(machine, placed.prediction(), excess)  # noqa: E731
        if (
            isinstance(found, Found) or found.smallest <= HOPELESS * limit
        ):  # places hold what the plan holds that they begin from, or little less
            placed = place(
                graph,
                machine,
                start,
                terms,
                (best[1].seconds if best else most) * (1 - MIN_GAIN),
                enough,
                report,
                bound,
                clock.share(1.0),
                seed,
            )
            best = (
                (replace(placed.plan, name="found"), replace(placed.prediction(), plan="found"))
                if placed
                else best
            )
        found = replace(found, result=replace(found.result, bound=bound))
        if best is not None:
            return _elsewhere(found, graph, machine, *best)
        note = "of the plans in stages and with placed operators that were looked at none is predicted to be faster; what is proved is proved of those without"
        found = replace(found, plan=replace(found.plan, notes=(*found.plan.notes, note)))
    if isinstance(found, _Unfit):
        limit, least = (
            int(capacity(machine) / max(1.0, excess)),
            min(found.smallest, *(found.baselines.peak(name) for name in found.baselines)),
        )
        raise MemoryBudgetError(
            f"'{graph.name}' with batch {graph.batch_size} fits {machine.name} under no plan: the smallest needs "
            f"{format_bytes(least)} per device, and a device has {format_bytes(machine.memory_bytes)}, of which {format_bytes(limit)} "
            f"may be used. Use more devices, a smaller batch, or devices with more memory."
        )
    return found


@dataclass(frozen=True)
class _Clock:
    """The seconds that a search may take, from when it is made."""

    seconds: float | None
    begun: float = field(default_factory=time.perf_counter)

    def share(self, part: float) -> float | None:
        """A part of what is left."""
        return (
            None
            if self.seconds is None
            else max(0.0, self.seconds - (time.perf_counter() - self.begun)) * part
        )

    def check(self, graph: OperatorGraph, machine: Machine) -> None:
        """PlanError where the time is up before one plan could be looked at."""
        taken = time.perf_counter() - self.begun
        if self.seconds is not None and taken > self.seconds:
            raise PlanError(
                f"{format_seconds(self.seconds)} are too short to look at one plan of '{graph.name}' on {machine.name}: its costs alone took "
                f"{format_seconds(taken)}. Write at least --seconds {math.ceil(taken + 1)}, or leave --seconds away."
            )


HOPELESS = 2.0
"""What holds so many times a device's memory, by a count of variables and kept activations alone, is not looked at closer."""


class Baselines(Mapping[str, tuple[Plan, Prediction]]):
    """All baselines with their predictions, each predicted when it is asked for: most are seen to be slower before."""

    def __init__(self, network: CostNetwork, plans: Mapping[str, Plan]) -> None:
        self.network, self.plans = network, plans
        self.states = {name: network.states_of(plan) for name, plan in plans.items()}
        self.space = SearchSpace(
            network, [states for states in self.states.values() if states is not None]
        )
        self.known: dict[str, Prediction] = {}
        self.peaks: dict[str, int] = {}

    def __getitem__(self, name: str) -> tuple[Plan, Prediction]:
        plan = self.plans[name]
        if name not in self.known:
            n = self.network
            same = next(
                (p for other, p in self.known.items() if _alike(self.plans[other], plan)), None
            )
            self.known[name] = (
                replace(same, plan=name)
                if same
                else predicted(n.graph, n.placement.machine, plan, n.terms)
            )
        return plan, self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)

    def seconds(self, name: str) -> float:
        """Predicted seconds of one: of states of the network they are known without a prediction."""
        states = self.states[name]
        if states is None or name in self.known:
            return self[name][1].seconds
        return (
            self.space.simulated.seconds(states)
            if self.space.overlaps
            else self.network.problem.cost(states)
        )

    def peak(self, name: str) -> int:
        """Bytes that one holds at its peak."""
        plan, n = self.plans[name], self.network
        if name not in self.peaks:
            same = next(
                (peak for other, peak in self.peaks.items() if _alike(self.plans[other], plan)),
                None,
            )
            self.peaks[name] = (
                same
                or memory(
                    n.graph, plan.mesh, layout_of(n.graph, plan), n.placement.machine.backend
                ).peak
            )
        return self.peaks[name]

    def fits(self, name: str, limit: int) -> bool:
        """Whether one holds no more than so many bytes: what is far from it is seen without looking at its values."""
        states = self.states[name]
        return (
            states is None or self.network.problem.memory_bytes(states) <= HOPELESS * limit
        ) and self.peak(name) <= limit

    def fastest(self, limit: int, under: float = np.inf) -> str | None:
        """The fastest that takes less than so many seconds and fits; None if none does."""
        faster = sorted((s, name) for name in self.plans for s in [self.seconds(name)] if s < under)
        return next((name for _, name in faster if self.fits(name, limit)), None)


def _alike(one: Plan, other: Plan) -> bool:
    return one.mesh == other.mesh and one.choices == other.choices and one.storage == other.storage


@dataclass(frozen=True)
class _Unfit:
    """A search that found nothing that fits: the plan that holds least, and the bytes of the smallest that was seen."""

    plan: Plan
    smallest: int
    result: SearchResult
    network: CostNetwork
    baselines: Baselines


def _elsewhere(
    found: Found | _Unfit,
    graph: OperatorGraph,
    machine: Machine,
    plan: Plan,
    prediction: Prediction,
) -> Found:
    """The same search with a plan in stages or with placed operators as what was found."""
    result = replace(found.result, seconds=prediction.seconds, feasible=True)
    base, notes = found.baselines, [*graph.notes]
    if base.fits("data parallel", capacity(machine)):
        notes.append(
            f"predicted {base.seconds('data parallel') / prediction.seconds:.2f} x as fast as data parallel"
        )
    else:
        notes.append("data parallel does not fit in memory")
    notes.append(
        "placed operators, stages, microbatches and recomputed runs can be planned and simulated, and not yet run"
    )
    plan = replace(plan, notes=tuple(notes), predicted=_predicted(prediction, result))
    return Found(plan, prediction, result, found.network, found.baselines)


def _whole(
    graph: OperatorGraph,
    machine: Machine,
    report: Report | None,
    excess: float,
    clock: _Clock,
    part: float,
    seed: int,
    search: Search,
) -> Found | _Unfit:
    """The best plan that all devices run at once."""
    mesh, limit = mesh_of(machine), int(capacity(machine) / max(1.0, excess))
    plans = {name: make(graph, machine.name, mesh) for name, make in BASELINES.items()}
    network = build(graph, machine, mesh, list(plans.values()))
    clock.check(graph, machine)
    baselines = Baselines(network, plans)
    space = baselines.space
    result, peak, smallest = _fitting(
        space, search, limit, lambda budget: Limits(budget, clock.share(part), seed, report)
    )
    plan = network.plan(result.states)
    best = baselines.fastest(limit) if peak > limit else None
    if peak > limit and best is None:
        return _Unfit(plan, smallest, result, network, baselines)
    prediction = predicted(graph, machine, plan, network.terms)
    if (
        best is None
    ):  # only an interrupted search, or one that memory has pushed up, ends above a baseline that fits
        best = baselines.fastest(limit, prediction.seconds * (1 - 1e-12))
    if best is not None:
        plan, prediction = replace(plans[best], name="found"), baselines[best][1]
    plan, prediction = _one_device(graph, machine, plan, prediction, baselines)
    notes = (*plan.notes, *_notes(graph, prediction, baselines, result))
    plan = replace(plan, notes=notes, predicted=_predicted(prediction, result))
    return Found(plan, prediction, result, network, baselines)


def _fitting(
    space: SearchSpace, search: Search, limit: int, limits: Callable[[float], Limits]
) -> tuple[SearchResult, int, int]:
    """(what a search finds that fits so many bytes, or else what it found last; what that needs; the least that anything seen needs).

    The exact search comes first, its budget lowered until what it finds fits; the whole search then has that budget, and starts from plans that do.
    """
    network, budget, run = space.network, float(limit), elimination
    seen: dict[tuple[int, ...], int] = {}
    fitting = None
    for _ in range(6):
        result = run(space, limits(budget))
        if result.states not in seen:
            plan = network.plan(result.states)
            seen[result.states] = memory(
                network.graph,
                plan.mesh,
                layout_of(network.graph, plan),
                network.placement.machine.backend,
            ).peak
        peak = seen[result.states]
        if peak <= limit:
            fitting, done, run = result, run is search, search
            if done or result.stopped:
                break
        elif not result.feasible or result.stopped:
            break
        else:
            budget = min(budget, result.nbytes) * limit / peak * 0.98
    found = fitting or result
    return found, seen[found.states], min(seen.values())


def _one_device(
    graph: OperatorGraph, machine: Machine, plan: Plan, prediction: Prediction, baselines: Baselines
) -> tuple[Plan, Prediction]:
    """If nothing is split, or splitting does not pay, the plan is one device."""
    alone = baselines.seconds("one device")
    split = any(plan.choices.values()) or bool(plan.storage)
    if plan.mesh.size > 1 and (
        not split
        or prediction.seconds >= alone
        and baselines["one device"][1].peak_bytes <= capacity(machine)
    ):
        mesh = Mesh(())
        one = Plan(
            graph.name,
            plan.machine,
            mesh,
            {o.name: {} for o in graph.operators},
            {},
            plan.name,
            plan.batch_size,
        )
        others = [p for _, p in baselines.values() if p.traffic]
        if not others:
            why = (
                f"one of {plan.mesh.size} devices is used: nothing can be split {plan.mesh.size} ways, because no size (batch "
                f"{graph.batch_size}, channels, units) is a multiple of its prime factors that a plan could use"
            )
            return replace(one, notes=(why,)), replace(
                predicted(graph, machine, one), plan=plan.name
            )
        best = min(others, key=lambda p: p.seconds)
        why = (
            f"one of {plan.mesh.size} devices is used: splitting does not pay, the best split ('{best.plan}') is predicted at "
            f"{format_seconds(best.seconds)} against {format_seconds(alone)}"
        )
        return replace(one, notes=(why,)), replace(predicted(graph, machine, one), plan=plan.name)
    return plan, prediction


def _notes(
    graph: OperatorGraph, prediction: Prediction, baselines: Baselines, result: SearchResult
) -> tuple[str, ...]:
    notes = list(graph.notes)
    if prediction.seconds > 0:
        notes.append(
            f"predicted {baselines.seconds('data parallel') / prediction.seconds:.2f} x as fast as data parallel"
        )
    if result.stopped:
        notes.append("the search was stopped; this is the best plan it had")
    return tuple(notes)


def _predicted(prediction: Prediction, result: SearchResult) -> dict:
    found = prediction.to_json()
    found["bound_seconds"] = min(result.bound, prediction.seconds)
    return found


def alternatives(
    network: CostNetwork, plan: Plan, most: int = 8
) -> list[list[tuple[dict[str, str], int, float, float]]]:
    """Per operator other choices for it, all others as planned: (choice, ZeRO level, seconds more, bytes more), best first."""
    states = network.states_of(plan) if runnable(plan) else None
    return [
        [] if states is None else _alternatives(network, states, o, most)
        for o in range(len(network.states))
    ]


def _alternatives(
    network: CostNetwork, states: Sequence[int], o: int, most: int
) -> list[tuple[dict[str, str], int, float, float]]:
    problem = network.problem
    seconds = problem.seconds[o] + sum(
        table[:, states[other]] for other, table in network.neighbours[o]
    )
    found = []
    for i in np.argsort(seconds, kind="stable"):
        state = network.states[o][i]
        more = (
            float(seconds[i] - seconds[states[o]]),
            float(problem.nbytes[o][i] - problem.nbytes[o][states[o]]),
        )
        # Variables that cannot be split further are stored the same whatever the level says.
        if i != states[o] and (not state.zero or storage_of(network, o, i)):
            found.append(
                (
                    names_of(network.graph, network.placement.mesh, network.choice(o, i)),
                    state.zero,
                    *more,
                )
            )
        if len(found) == most:
            break
    return found

"""The best plan for a graph on a machine: baselines, cost network, exact search, walks on the simulator, and the memory of what it found.

Exact search minimises the additive cost of `cost.evaluate` within a budget of bytes that is additive too. Where the machine's collectives
hide behind kernels a step is less than a sum: walks from the exact plan and all baselines then minimise the simulated step, against
a bound that holds for every plan. Real peak memory is not a sum either, so the plan found is measured by `cost.memory`, and
where it does not fit the budget is lowered by what was missed and the search runs again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from partita.cost.memory import memory
from partita.cost.predict import Prediction
from partita.errors import MemoryBudgetError
from partita.graph.graph import Graph
from partita.machine import Machine
from partita.plan.baselines import BASELINES
from partita.plan.layout import layout
from partita.plan.plan import Mesh, Plan, mesh_for
from partita.plan.stages import is_staged
from partita.search.base import Progress, Report, SearchResult
from partita.search.candidates import names_of
from partita.search.elimination import eliminate
from partita.search.mcmc import walk
from partita.search.network import Network, build, stored_by
from partita.search.reduce import Reduced, reduce
from partita.search.simulated import Simulated, relaxed, simulated
from partita.search.stages import least_seconds, stage
from partita.simulate.simulate import predicted
from partita.simulate.stages import Staged
from partita.simulate.stages import predicted as staged_prediction
from partita.units import format_bytes, format_seconds

RESERVE = 0.05
"""The part of a device's memory that is left to the runtime."""


@dataclass(frozen=True)
class Found:
    """A plan with its prediction, the search that found it, and what the baselines are predicted to cost."""

    plan: Plan
    prediction: Prediction
    result: SearchResult
    network: Network
    baselines: Mapping[str, tuple[Plan, Prediction]]


def mesh_of(machine: Machine) -> Mesh:
    """The logical mesh over a machine's devices: every level split into prime axes, slow levels first."""
    return mesh_for(level.size for level in machine.levels)


def capacity(machine: Machine) -> int:
    """Bytes of a device that a plan may use."""
    return int(machine.memory_bytes * (1 - RESERVE))


def find(
    graph: Graph, machine: Machine, report: Callable[[Progress], None] | None = None, excess: float = 1.0, seconds: float | None = None,
    seed: int = 0, stages: bool = False,
) -> Found:  # fmt: skip
    """The plan of least predicted step time that fits the machine's memory.

    Never worse than any baseline by its own measure. Raises MemoryBudgetError, with the smallest need, if nothing fits. `excess`
    is how many times what is predicted a plan was seen to need. Walks take so many `seconds`, else a number of proposals that makes
    the same plan of the same `seed`. With `stages`, plans that place operators on parts of the machine, cut the batch into microbatches or
    recompute are in the space too: they can be simulated, and not yet run.
    """
    found, smallest = _whole(graph, machine, report, excess, seconds, seed)
    if stages and machine.devices > 1:
        limit = int(capacity(machine) / max(1.0, excess))
        most = found.prediction.seconds if smallest is None else np.inf
        bound = min(found.result.bound, least_seconds(found.network.terms, machine, machine.devices))
        better = stage(graph, machine, mesh_of(machine), found.network.terms, limit, most * (1 - WORTH), report, bound, seconds)
        found = replace(found, result=replace(found.result, bound=bound))
        if better is not None:
            return _staged(found, better)
        note = "of the plans in stages that were looked at none is predicted to be faster; what is proved is proved of those without"
        found = replace(found, plan=replace(found.plan, notes=(*found.plan.notes, note)))
    if smallest is not None:
        limit, least = int(capacity(machine) / max(1.0, excess)), min(smallest, *(p.peak_bytes for _, p in found.baselines.values()))
        raise MemoryBudgetError(
            f"'{graph.name}' with batch {graph.batch_size} fits {machine.name} under no plan: the smallest needs "
            f"{format_bytes(least)} per device, and a device has {format_bytes(machine.memory_bytes)}, of which {format_bytes(limit)} "
            f"may be used. Use more devices, a smaller batch, or devices with more memory."
        )
    return found


HOPELESS = 2.0
"""Where variables and kept activations alone are so many times a device's memory, the peak is not worked out to see that it does not fit."""


class _Baselines(Mapping[str, tuple[Plan, Prediction]]):
    """All baselines with their predictions, each predicted when it is asked for: most are seen to be slower before."""

    def __init__(self, network: Network, plans: Mapping[str, Plan]) -> None:
        self.network, self.plans = network, plans
        self.states = {name: network.states_of(plan) for name, plan in plans.items()}
        self.known: dict[str, Prediction] = {}

    def __getitem__(self, name: str) -> tuple[Plan, Prediction]:
        plan = self.plans[name]
        if name not in self.known:
            n = self.network
            same = next((p for other, p in self.known.items() if _alike(self.plans[other], plan)), None)
            self.known[name] = replace(same, plan=name) if same else predicted(n.graph, n.place.machine, plan, n.terms)
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
        return self.simulated.seconds(states) if self.network.place.machine.backend.overlap > 0 else self.network.problem.cost(states)

    @cached_property
    def simulated(self) -> Simulated:
        return simulated(self.network)

    def fastest(self, limit: int, under: float = np.inf) -> str | None:
        """The fastest that takes less than so many seconds and fits; None if none does."""
        hopeless = {name for name, states in self.states.items() if states is not None and self.network.problem.held(states) > HOPELESS * limit}
        faster = sorted((s, name) for name in self.plans if name not in hopeless for s in [self.seconds(name)] if s < under)
        return next((name for _, name in faster if self[name][1].peak_bytes <= limit), None)


def _alike(one: Plan, other: Plan) -> bool:
    return one.mesh == other.mesh and one.choices == other.choices and one.storage == other.storage


def _staged(found: Found, staged: Staged) -> Found:
    """The same search with a staged plan as what was found."""
    prediction = staged_prediction(staged)
    result = replace(found.result, seconds=prediction.seconds, feasible=True)
    base, graph = found.baselines["data parallel"][1], staged.graph
    notes = [*graph.notes]
    if base.peak_bytes <= capacity(staged.machine):
        notes.append(f"predicted {base.seconds / prediction.seconds:.2f} x as fast as data parallel")
    else:
        notes.append("data parallel does not fit in memory")
    notes.append("stages, microbatches and recomputed runs can be planned and simulated, and not yet run")
    plan = replace(staged.plan, notes=tuple(notes), predicted=_predicted(prediction, result))
    return Found(plan, prediction, result, found.network, found.baselines)


def _whole(
    graph: Graph, machine: Machine, report: Callable[[Progress], None] | None, excess: float, seconds: float | None, seed: int
) -> tuple[Found, int | None]:  # fmt: skip
    """The best plan that all devices run at once; if it does not fit, the bytes of the smallest that was found."""
    mesh, limit = mesh_of(machine), int(capacity(machine) / max(1.0, excess))
    plans = {name: make(graph, machine.name, mesh) for name, make in BASELINES.items()}
    network = build(graph, machine, mesh, list(plans.values()))
    reduced = reduce(network.problem)
    baselines = _Baselines(network, plans)
    starts = [states for states in baselines.states.values() if states is not None]
    budget = float(limit)
    result, plan, smallest, course = None, None, None, None
    for _ in range(6):
        result = eliminate(reduced.problem, budget, report)
        result = replace(result, states=reduced.lift(result.states))
        if machine.backend.overlap > 0 and result.feasible and not result.stopped:
            course = course or _Course(baselines.simulated, reduce(relaxed(network)))
            result = course.walk(result, starts, budget, seconds, seed, report)
        plan = network.plan(result.states)
        peak = memory(graph, mesh, layout(graph, plan), machine.backend).peak
        smallest = peak if smallest is None else min(smallest, peak)
        if peak <= limit or not result.feasible or result.stopped:
            break
        budget = min(budget, result.nbytes) * limit / peak * 0.98
    assert result is not None and plan is not None and smallest is not None
    prediction, unfit = predicted(graph, machine, plan, network.terms), None
    if prediction.peak_bytes > limit:
        best = baselines.fastest(limit)
        unfit = smallest if best is None else None
    else:  # only an interrupted search, or one that memory has pushed up, ends above a baseline that fits
        best = baselines.fastest(limit, prediction.seconds * (1 - 1e-12))
    if best is not None:
        plan, prediction = replace(plans[best], name="found"), baselines[best][1]
    plan, prediction = _one_device(graph, machine, plan, prediction, baselines)
    notes = (*plan.notes, *_notes(graph, prediction, baselines, result))
    plan = replace(plan, notes=notes, predicted=_predicted(prediction, result))
    return Found(plan, prediction, result, network, baselines), unfit


PROPOSALS = 1 << 27
"""Proposals of a walk times tasks of the step, unless seconds are given: a second or two."""
WORTH = 0.01
"""What a walk must gain over the exact plan, which is the more regular one: less than predictions can tell apart is not worth it."""


@dataclass(frozen=True, eq=False)
class _Course:
    """What walks on the simulator need of a network: the simulation, and an additive problem below it."""

    simulated: Simulated
    below: Reduced

    def walk(
        self, exact: SearchResult, starts: Sequence[Sequence[int]], budget: float, seconds: float | None, seed: int, report: Report | None
    ) -> SearchResult:  # fmt: skip
        """The best states that walks find, with a bound on the simulated step of any."""
        least = eliminate(self.below.problem, budget)
        most = None if seconds is not None else max(20_000, PROPOSALS // self.simulated.tasks.count)
        starts = [exact.states, self.below.lift(least.states), *starts]
        found, _ = walk(self.simulated, starts, budget, least.bound, np.inf if seconds is None else seconds, seed, report, most)
        plain = self.simulated.seconds(exact.states)
        if plain <= found.seconds * (1 + WORTH):
            found = replace(found, states=exact.states, seconds=plain, nbytes=exact.nbytes)
        return replace(found, history=(*exact.history, *found.history))


def _one_device(
    graph: Graph, machine: Machine, plan: Plan, prediction: Prediction, baselines: _Baselines
) -> tuple[Plan, Prediction]:
    """If nothing is split, or splitting does not pay, the plan is one device."""
    alone = baselines.seconds("one device")
    split = any(plan.choices.values()) or bool(plan.storage)
    if plan.mesh.size > 1 and (not split or prediction.seconds >= alone and baselines["one device"][1].peak_bytes <= capacity(machine)):
        mesh = Mesh(())
        one = Plan(graph.name, plan.machine, mesh, {o.name: {} for o in graph.operators}, {}, plan.name, plan.batch_size)
        others = [p for _, p in baselines.values() if p.traffic]
        if not others:
            why = (
                f"one of {plan.mesh.size} devices is used: nothing can be split {plan.mesh.size} ways, because no size (batch "
                f"{graph.batch_size}, channels, units) is a multiple of its prime factors that a plan could use"
            )
            return replace(one, notes=(why,)), replace(predicted(graph, machine, one), plan=plan.name)
        best = min(others, key=lambda p: p.seconds)
        why = (
            f"one of {plan.mesh.size} devices is used: splitting does not pay, the best split ('{best.plan}') is predicted at "
            f"{format_seconds(best.seconds)} against {format_seconds(alone)}"
        )
        return replace(one, notes=(why,)), replace(predicted(graph, machine, one), plan=plan.name)
    return plan, prediction


def _notes(
    graph: Graph, prediction: Prediction, baselines: _Baselines, result: SearchResult
) -> tuple[str, ...]:
    notes = list(graph.notes)
    if prediction.seconds > 0:
        notes.append(f"predicted {baselines.seconds('data parallel') / prediction.seconds:.2f} x as fast as data parallel")
    if result.stopped:
        notes.append("the search was stopped; this is the best plan it had")
    return tuple(notes)


def _predicted(prediction: Prediction, result: SearchResult) -> dict:
    found = prediction.to_json()
    found["bound_seconds"] = min(result.bound, prediction.seconds)
    return found


def alternatives(network: Network, plan: Plan, operator: int, most: int = 8) -> list[tuple[dict[str, str], int, float, float]]:
    """Other choices for one operator, all others as planned: (choice, ZeRO level, seconds more, bytes more), best first."""
    states = network.states_of(plan) if not is_staged(plan) else None
    if states is None:
        return []
    problem, o = network.problem, operator
    seconds = problem.seconds[o].copy()
    for (u, v), table in problem.tables.items():
        if u == o:
            seconds += table[:, states[v]]
        elif v == o:
            seconds += table[states[u], :]

    found = []
    for i in np.argsort(seconds, kind="stable"):
        state = network.states[o][i]
        more = float(seconds[i] - seconds[states[o]]), float(problem.nbytes[o][i] - problem.nbytes[o][states[o]])
        # Variables that cannot be split further are stored the same whatever the level says.
        if i != states[o] and (not state.zero or stored_by(network, o, state)):
            found.append((names_of(network.graph, network.place.mesh, state.choice), state.zero, *more))
    return found[:most]

"""Plans in stages: how many, where one ends and the next begins, how many microbatches, what is recomputed, and the split inside a stage.

For a number of stages (the slow axes of the mesh tell them apart) and of microbatches, operators are split over the axes that are left by the
exact search of an SPMD plan, its seconds those of all microbatches and its budget that of all stages. Operators are then dealt to stages in the order
of the model, so that the slowest stage is as fast as can be and every stage fits in memory; a stage ends only where little is handed on. What comes out
is simulated, memory included, and the best plan that fits is kept.

Alpa (Zheng et al., OSDI 2022) has the two levels, stages outside and splits inside; here every stage splits the same axes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partita.cost.evaluate import PARTS, engine_dtype
from partita.cost.terms import Terms
from partita.errors import PlanError
from partita.graph.graph import Graph
from partita.machine import Machine
from partita.plan.plan import TIME, Axis, Mesh, Plan
from partita.search.base import Problem, Progress, Report
from partita.search.elimination import eliminate
from partita.search.network import Network, build
from partita.search.reduce import reduce
from partita.simulate.stages import Staged

PER_STAGE = (4, 8, 2, 16, 1)
"""Microbatches per stage that are tried, in this order."""
ALONE = (1, 4, 16, 64)
"""Microbatches where there is one stage: fewer are faster, more hold less."""
NARROW = 1.2
"""A stage may end where no more than so many times the bytes are handed on than at the best place around."""
SECONDS = 10.0
"""How long to look, unless it is said."""
ROUNDS = 10
"""How often the exact search prices memory: what it finds is only the start of a plan in stages."""
TRIES = 3
"""Budgets of memory that are tried for one number of stages and microbatches."""
ROOM = 0.95
"""The part of a device's memory that operators may be dealt into: what runs need for themselves comes on top."""
SLACK = (1.001, 1.1, 1.5)
"""How much slower than it could be the slowest stage may be, for stages that hold less."""
HALVINGS = 40
"""Halvings of an interval until its middle is taken for the answer."""


@dataclass(frozen=True)
class _Shape:
    """What is tried: the axes that tell stages apart are the first `axes` of the mesh."""

    axes: int
    stages: int
    microbatches: int
    recompute: bool


def stage(
    graph: Graph, machine: Machine, mesh: Mesh, terms: Terms, limit: int, most: float, report: Report | None = None, bound: float = 0.0,
    seconds: float | None = None,
) -> Staged | None:  # fmt: skip
    """The fastest staged plan found within `seconds` that takes less than `most` and fits `limit` bytes a device; None if there is none.

    Where no plan at all is known to fit (`most` is infinite), it is looked for until one is found. The number of stages and microbatches that
    is being looked at when the time is up is looked at to the end. Ctrl-C ends with the best so far.
    """
    until, best = time.perf_counter() + (SECONDS if seconds is None else seconds), None
    narrow = _narrow(graph, terms)
    networks: dict[tuple[int, int], Network] = {}
    hopeless: set[tuple[int, int]] = set()
    try:
        for shape in _shapes(graph, mesh):
            if time.perf_counter() > until and (best is not None or math.isfinite(most)):
                break
            key = (shape.axes, shape.microbatches)
            if not shape.recompute and key in hopeless:
                continue
            if key not in networks:
                inner = [Axis(TIME, shape.microbatches, -1)] if shape.microbatches > 1 else []
                networks[key] = build(graph, machine, Mesh((*inner, *mesh.axes[shape.axes :])), terms=terms)
            found = _fitting(networks[key], mesh, shape, narrow, limit, most if best is None else best.seconds)
            if found is None and best is None and not math.isfinite(most):
                hopeless.add(key)  # what does not fit with runs recomputed does not fit without
            best = found or best
            if report is not None:
                so_far = min(most, best.seconds if best is not None else most)
                report(Progress(f"{shape.stages} stages, {shape.microbatches} microbatches", so_far, bound))
    except KeyboardInterrupt:  # the best so far
        pass
    return best


def _shapes(graph: Graph, mesh: Mesh) -> Iterator[_Shape]:
    """All that is tried, the likelier first: few stages before many."""
    for per_stage, alone in zip(PER_STAGE, (*ALONE, 0), strict=True):
        for axes in range(len(mesh.axes) + 1):
            stages = math.prod(mesh.sizes[:axes])
            microbatches = alone if stages == 1 else stages * per_stage
            if stages > len(graph.operators) or not microbatches or graph.batch_size % microbatches:
                continue
            for recompute in (True, False):
                if (stages, microbatches, recompute) != (1, 1, False):
                    yield _Shape(axes, stages, microbatches, recompute)


def _fitting(network: Network, mesh: Mesh, shape: _Shape, narrow: Sequence[int], limit: int, most: float) -> Staged | None:
    """The plan of a shape; None if it does not fit, or cannot be faster than `most`."""
    graph, machine = network.graph, network.place.machine
    problem = _problem(network, shape)
    budget = float(limit) * shape.stages
    if sum(float(nbytes.min()) for nbytes in problem.nbytes) > budget:
        return None
    reduced = reduce(problem)
    for _ in range(TRIES):
        result = eliminate(reduced.problem, budget, rounds=ROUNDS)
        if result.stopped:
            raise KeyboardInterrupt
        if not result.feasible or result.bound / shape.stages > most:
            return None
        states = reduced.lift(result.states)
        plans = [_plan(network, mesh, shape, states, ends, narrow) for ends in _dealt(network, problem, shape, states, narrow, limit)]
        if not plans:
            return None
        try:  # bytes are looked at first: they are known without simulating; the last plan holds least
            dealt = [Staged.of(graph, machine, plan, network.terms) for plan in plans]
            least = dealt[-1].peak
            if least <= limit:
                staged = next(s for s in dealt if s.peak <= limit)
                return staged if staged.seconds < most else None
        except PlanError:
            return None
        budget = min(budget, result.nbytes) * min(0.8, limit / least)
    return None


def _weights(shape: _Shape) -> np.ndarray:
    """How often a step does each of PARTS."""
    m = shape.microbatches
    forward = 2.0 * m if shape.recompute else float(m)
    times = {("compute", "forward"): forward, ("exchange", "forward"): forward, ("compute", "backward"): float(m), ("exchange", "backward"): float(m)}
    return np.array([times.get(part, 1.0) for part in PARTS])


def _problem(network: Network, shape: _Shape) -> Problem:
    """Seconds of all stages together in a step, and bytes of all stages: what is in flight is kept so often."""
    overlap, m = network.place.machine.backend.overlap, shape.microbatches
    weights = _weights(shape) * np.array([1 - overlap if kind in ("sum", "gather") else 1.0 for kind, _ in PARTS])
    flying = 0.0 if shape.recompute else min(m, (shape.stages + 1) / 2) - 1
    made: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for parts, nbytes, kept, states in zip(network.parts, network.problem.nbytes, network.kept, network.states, strict=True):
        if id(parts) not in made:
            seconds = weights @ parts
            gather = PARTS.index(("gather", "forward"))
            whole = np.array([state.zero == 3 for state in states])  # what is stored in parts is gathered for every microbatch
            seconds = seconds + np.where(whole, parts[gather] * (m - 1) * (1 - overlap), 0.0)
            made[id(parts)] = (seconds, nbytes + kept * flying - (kept if shape.recompute else 0.0))
    own = [made[id(parts)] for parts in network.parts]
    problem = Problem([s for s, _ in own], [b for _, b in own])
    tables: dict[int, np.ndarray] = {}
    for ends, table in network.problem.tables.items():
        problem.tables[ends] = tables.setdefault(id(table), table * m)
    return problem


def _narrow(graph: Graph, terms: Terms) -> list[int]:
    """Operators after which a stage or a recomputed run may end: those where little is handed on, compared with places around."""
    count = len(graph.operators)
    handed = np.zeros(count + 1)
    last: dict[int, tuple[int, int, int]] = {}
    for m in terms.edges:
        if m.phase == m.wanted == "forward" and m.home < m.reader:
            home, reader, nbytes = last.get(m.tensor, (m.home, m.reader, m.nbytes * m.trips))
            last[m.tensor] = (min(home, m.home), max(reader, m.reader), nbytes)
    for home, reader, nbytes in last.values():
        handed[home] += nbytes
        handed[reader] -= nbytes
    handed = np.cumsum(handed)[:-1]
    reach = max(4, count // 64)
    return [o for o in range(count - 1) if handed[o] <= NARROW * handed[max(0, o - reach) : min(count - 1, o + reach + 1)].min()]


def _dealt(
    network: Network, problem: Problem, shape: _Shape, states: Sequence[int], narrow: Sequence[int], limit: int
) -> Iterator[list[int]]:  # fmt: skip
    """Last operators of the stages: the slowest stage takes least, and of those the fullest holds least; then somewhat slower ones that hold less."""
    count = len(states)
    seconds = np.array([problem.seconds[o][states[o]] for o in range(count)])
    for (u, v), table in problem.tables.items():
        seconds[v] += table[states[u], states[v]]
    if shape.stages == 1:
        yield [count - 1]
        return
    kept = np.array([network.kept[o][states[o]] for o in range(count)])
    held = np.array([network.problem.nbytes[o][states[o]] for o in range(count)]) - kept
    ends = [*narrow, count - 1]
    time_to = np.concatenate([[0.0], np.cumsum(seconds)])[[e + 1 for e in ends]]
    held_to, kept_to = (np.concatenate([[0.0], np.cumsum(x)])[[e + 1 for e in ends]] for x in (held, kept))

    def fill(slowest: float, room: float) -> list[int] | None:
        """Stages as full as they may be, from the first on; the later ones get at least one place each."""
        found, at = [], -1
        for s in range(shape.stages):
            flying = 0.0 if shape.recompute else float(min(shape.microbatches, shape.stages - s))
            t, h, k = (x[at] if at >= 0 else 0.0 for x in (time_to, held_to, kept_to))
            fits = (time_to - t <= slowest) & (held_to - h + (kept_to - k) * flying <= room)
            most = int(np.searchsorted(~fits[at + 1 :], True)) + at
            most = min(most, len(ends) - shape.stages + s)
            if most <= at:
                return None
            found.append(most)
            at = most
        return found if at == len(ends) - 1 else None

    low, high = float(time_to[-1]) / shape.stages, float(time_to[-1])
    best = fill(high, limit * ROOM)
    if best is None:
        return
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = fill(middle, limit * ROOM)
        low, high, best = (low, middle, found) if found is not None else (middle, high, best)
    for slack in SLACK:  # of the divisions that are so fast, the one whose fullest stage holds least
        least, room, even = 0.0, limit * ROOM, best
        for _ in range(HALVINGS):
            middle = (least + room) / 2
            found = fill(high * slack, middle)
            least, room, even = (least, middle, found) if found is not None else (middle, room, even)
        yield [ends[e] for e in even]


def _plan(network: Network, mesh: Mesh, shape: _Shape, states: Sequence[int], ends: Sequence[int], narrow: Sequence[int]) -> Plan:
    """The plan that splits inside stages as the states say, its stages ending after these operators."""
    inner = network.plan(states)
    choices, stage_of, begins = {}, 0, [0, *(e + 1 for e in ends[:-1])]
    runs: list[tuple[str, str]] = []
    names = [o.name for o in network.graph.operators]
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


def least_seconds(terms: Terms, machine: Machine, devices: int) -> float:
    """A bound on the step of any plan: every kernel at the machine's rates and in its fastest memory, shared out to all devices without a rest.

    No split, place or order makes a kernel less work, and recomputation makes more of it.
    """
    kinds = [machine.of_kind(n) for n in range(len(machine.kinds) or 1)]  # where devices differ, each kernel on those that are fastest at it
    fastest = [float(kind.bandwidth_for(np.zeros(1))[0]) for kind in kinds]
    least = 0.0
    for w in (w for own in terms.operators for w in own.work):
        moved = sum(nbytes for nbytes, _ in w.traffic)
        rates = [(kind.rate(w.op_class, engine_dtype(w.dtype)), bandwidth) for kind, bandwidth in zip(kinds, fastest, strict=True)]
        least += w.trips * min(max(w.flops / rate, moved / bandwidth) for rate, bandwidth in rates)
    return least / devices

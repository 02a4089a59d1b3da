"""Plans that place operators: branches and layers at slices of axes, so that they run at the same time on devices of their own.

Only what need not wait for each other can gain. `branches` reads off the graph where it forks and joins. From a plan that all devices run at once, the
branches, and the layers that have parallel parts (unrolled steps follow each other from layer to layer), are dealt to the slices of an axis or of a level's
axes; then single moves are tried: an operator, a branch, or all equal branches at another slice, or back on all of them, and a neighbour to where its reader
is. Each is simulated (`simulate.placed`), unless its kernels alone take too long; the best that fits is kept. A hill climb, not a walk: a step with
places costs milliseconds where a compiled one costs microseconds. FlexFlow's proposals are single operators (MLSys 2019, section 6.2).
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from partita.cost.terms import Terms
from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.plans.check import check
from partita.plans.plan import Plan, placed_slice
from partita.search.base import Progress, Report
from partita.search.bound import lower_bounds_by_operator
from partita.simulation.placed import PlacedStep

SECONDS = 5.0
"""How long to look at most, unless it is said."""
MOVES = 200
"""Single moves that are tried, at most."""
INSTRUCTIONS = 50_000
"""Instructions of the steps that are simulated one after the other without a better one: then it ends. At least FEWEST steps are."""
FEWEST = 4


def place(
    graph: OperatorGraph,
    machine: Machine,
    start: Plan,
    terms: Terms,
    most: float,
    fits: Callable[[PlacedStep], bool],
    report: Report | None = None,
    bound: float = 0.0,
    seconds: float | None = None,
    seed: int = 0,
) -> PlacedStep | None:
    """The fastest plan found with operators placed on the axes of `start` that takes less than `most` seconds and fits; None if there is none.

    A step that is being simulated when the time is up is simulated to the end. Ctrl-C ends with the best so far.
    """
    until, best, rng = (
        time.perf_counter() + (SECONDS if seconds is None else seconds),
        None,
        random.Random(seed),
    )
    parallel = branches(graph)
    if not (parallel or machine.kinds) or not start.mesh.axes:
        return None
    floor, seen = None if machine.kinds else _Floor(graph, machine, start, terms), set()
    patience = left = max(FEWEST, INSTRUCTIONS // len(graph.instructions))

    def better(plan: Plan) -> PlacedStep | None:
        nonlocal left
        least, places = (
            most if best is None else best.seconds,
            tuple(tuple(choice.items()) for choice in plan.choices.values()),
        )
        if places in seen or floor is not None and floor.seconds(plan) >= least:
            return None
        seen.add(places)
        try:
            placed = PlacedStep.of(graph, machine, check(plan, graph), terms)
        except PlanError:
            return None
        if not machine.kinds and placed.lower_bound_seconds >= least:
            return None
        left -= 1
        if placed.seconds >= least or not fits(placed):
            return None
        left = patience
        if report is not None:
            report(Progress("places", placed.seconds, bound))
        return placed

    try:
        for plan in _dealt(graph, start, terms, parallel, bool(machine.kinds)):
            if time.perf_counter() > until or not left:
                return best
            best = better(plan) or best
        units = _units(graph, terms, parallel)
        for _ in range(MOVES if units else 0):
            if time.perf_counter() > until or not left:
                break
            best = (
                better(_moved(start if best is None else best.plan, graph, terms, units, rng))
                or best
            )
    except KeyboardInterrupt:  # the best so far
        pass
    return best


def branches(graph: OperatorGraph) -> list[list[list[int]]]:
    """Fork by fork, the branches up to where they join: operators that are connected with each other, and need not wait for another branch forward.

    An operator before and after which all others have to run forks or joins, and is in none.
    """
    before, after = [0] * len(graph.operators), [0] * len(graph.operators)
    heavy = {operator.heavy: o for o, operator in enumerate(graph.operators)}
    upstream: dict[int, int] = {}
    for i, x in enumerate(
        graph.instructions
    ):  # what only joins branches is light: its operator's heavy instruction waits for none of them
        found = 0
        for t in x.operands:
            found |= upstream.get(t, 0)
        if i in heavy:
            before[heavy[i]] = found
            found |= 1 << heavy[i]
        upstream |= dict.fromkeys(x.results, found)
    for o, mine in enumerate(before):
        for other in range(len(after)) if mine else ():
            after[other] |= (mine >> other & 1) << o
    everyone = (1 << len(before)) - 1
    forks: list[list[list[int]]] = []
    run: list[int] = []
    for o in range(len(before) + 1):
        if o < len(before) and before[o] | after[o] | 1 << o != everyone:
            run.append(o)
            continue
        parts: list[list[int]] = []
        for member in run:
            joined = [p for p in parts if any(before[member] >> other & 1 for other in p)]
            parts = [p for p in parts if p not in joined] + [
                sorted([*(x for p in joined for x in p), member])
            ]
        if len(parts) > 1 or any(
            before[a] >> b & 1 == after[a] >> b & 1 == 0
            for p in parts
            for a in p
            for b in p
            if a != b
        ):
            forks.append(sorted(parts))
        run = []
    return forks


def at(
    plan: Plan, graph: OperatorGraph, places: Mapping[int, int | None], axes: Sequence[int]
) -> Plan:
    """The plan with some operators at slices of axes (counted over all of them together), or on all slices where None."""
    choices, mesh = dict(plan.choices), plan.mesh
    for o, slot in places.items():
        names = [mesh.axes[a].name for a in axes]
        choice = {a: use for a, use in choices[graph.operators[o].name].items() if a not in names}
        left = slot or 0
        for a in reversed(axes) if slot is not None else ():
            choice[mesh.axes[a].name] = f"at({left % mesh.sizes[a]})"
            left //= mesh.sizes[a]
        choices[graph.operators[o].name] = choice
    home = {
        a.path: graph.operators[graph.home[a.tensor]].name
        for a in graph.arguments
        if graph.home[a.tensor] >= 0
    }
    storage = {
        p: s
        for p, s in plan.storage.items()
        if p not in home or all(placed_slice(choices[home[p]].get(a, "")) is None for a in s.axes)
    }
    return replace(plan, choices=choices, storage=storage)


class _Floor:
    """Seconds that no placed plan is shorter than, in which operators that are on all devices are split as in `start`: what the busiest devices compute.

    An operator on a part of the devices is at best shared out to them without a rest.
    """

    def __init__(self, graph: OperatorGraph, machine: Machine, start: Plan, terms: Terms) -> None:
        self.names, self.mesh = [o.name for o in graph.operators], start.mesh
        self.everywhere = [
            float(cost.compute[0]) for cost in PlacedStep.of(graph, machine, start, terms).costs
        ]
        self.least = [
            seconds / machine.devices for seconds in lower_bounds_by_operator(terms, machine)
        ]

    def seconds(self, plan: Plan) -> float:
        common, apart = 0.0, defaultdict(float)
        for name, everywhere, least in zip(self.names, self.everywhere, self.least, strict=True):
            pins = tuple(
                (a, use) for a, use in plan.choices[name].items() if placed_slice(use) is not None
            )
            if pins:
                apart[tuple(sorted(pins))] += least * math.prod(
                    self.mesh.sizes[self.mesh.index[a]] for a, _ in pins
                )
            else:
                common += everywhere
        return common + max(apart.values(), default=0.0)


def _dealt(
    graph: OperatorGraph,
    start: Plan,
    terms: Terms,
    parallel: Sequence[Sequence[Sequence[int]]],
    differ: bool,
) -> Iterator[Plan]:
    """Branches and layers dealt to slices; where devices differ, also everything at one slice."""
    work = [sum(w.flops * w.trips for w in own.work) for own in terms.operators]
    inside = {o for fork in parallel for branch in fork for o in branch}
    layers: dict[str, list[int]] = defaultdict(list)
    for o in sorted(inside):
        layers[graph.operators[o].name.split("/")[0]].append(o)
    for axes in _targets(start):
        slices = math.prod(start.mesh.sizes[a] for a in axes)
        if differ:
            yield from (
                at(start, graph, dict.fromkeys(range(len(work)), i), axes) for i in range(slices)
            )
        places: dict[int, int | None] = {}
        for fork in parallel:
            load = [0.0] * slices
            for branch in sorted(fork, key=lambda b: -sum(work[o] for o in b)):
                least = min(range(slices), key=load.__getitem__)
                places |= dict.fromkeys(branch, least)
                load[least] += sum(work[o] for o in branch)
        yield at(start, graph, places, axes)
        if 1 < len(layers) < len(inside):
            yield at(
                start,
                graph,
                {
                    o: n * slices // len(layers)
                    for n, mine in enumerate(layers.values())
                    for o in mine
                },
                axes,
            )


def _targets(start: Plan) -> list[tuple[int, ...]]:
    """The axes on which operators are placed together: those of a level, and each by itself; fast links first, of equal axes one."""
    levels: dict[int, list[int]] = defaultdict(list)
    for n, axis in enumerate(start.mesh.axes):
        levels[axis.level].append(n)
    found = []
    for _, axes in sorted(levels.items(), reverse=True):
        found += dict.fromkeys([tuple(axes), *((a,) for a in axes)])
    return found


def _units(
    graph: OperatorGraph, terms: Terms, parallel: Sequence[Sequence[Sequence[int]]]
) -> list[tuple[int, ...]]:
    """What is moved at once: operators of branches, branches, and all branches that are equal."""
    equal: dict[tuple[str, ...], list[int]] = defaultdict(list)
    found: dict[tuple[int, ...], None] = {}
    for fork in parallel:
        for branch in fork:
            equal[tuple(terms.operators[o].digest for o in branch)] += branch
            found |= dict.fromkeys([tuple(branch), *((o,) for o in branch)])
    return [*found, *(mine for mine in map(tuple, equal.values()) if mine not in found)]


def _moved(
    plan: Plan,
    graph: OperatorGraph,
    terms: Terms,
    units: Sequence[tuple[int, ...]],
    rng: random.Random,
) -> Plan:
    """The plan with one unit elsewhere: at a slice, on all slices, or where a neighbour is."""
    unit, axes = rng.choice(units), rng.choice(_targets(plan))
    slices = math.prod(plan.mesh.sizes[a] for a in axes)
    near = [
        m.reader if m.home in unit else m.home
        for m in terms.edges
        if (m.home in unit) != (m.reader in unit)
    ]
    if near and rng.random() < 0.3:
        choice = plan.choices[graph.operators[rng.choice(near)].name]
        uses = [placed_slice(choice.get(plan.mesh.axes[a].name, "")) for a in axes]
        if None not in uses:
            slot = 0
            for a, i in zip(axes, uses, strict=True):
                slot = slot * plan.mesh.sizes[a] + (i or 0)
            return at(plan, graph, dict.fromkeys(unit, slot), axes)
    return at(plan, graph, dict.fromkeys(unit, rng.choice([None, *range(slices)])), axes)

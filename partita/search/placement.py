"""Placement: operators on slices of axes, so that branches and layers run at the same time.

Only operators that need not wait for each other can gain (`search.branches`). From the best plan
without placement, in order:

1. Branches, and layers with parallel parts (unrolled steps follow each other from layer to layer),
   are dealt to the slices of an axis, or of all axes of a level.
2. Single moves: an operator, a branch, or all equal branches go to another slice, to all slices, or
   to the slice of a neighbour.

Each plan is simulated (`simulation.placed`), unless its kernels or one of its links alone take too
long. This is a hill climb, not MCMC: a placed step costs milliseconds, a compiled one microseconds.
FlexFlow's proposals are single operators (MLSys 2019, section 6.2).
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from partita.cost.evaluate import PHASES
from partita.cost.terms import Terms
from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph, per_graph
from partita.machine import Machine
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan, placed_slice
from partita.search.base import Progress
from partita.search.bound import lower_bounds_by_operator
from partita.search.branches import Fork, branches
from partita.search.portfolio import Limits
from partita.simulation.base import DISPATCH_SECONDS
from partita.simulation.placed import PlacedStep

MOVES = 200
"""Single moves, at most."""
INSTRUCTIONS = 50_000
"""Instructions of the steps that are simulated without a better one before the search ends."""
ALL_INSTRUCTIONS = 500_000
"""Instructions of all steps that are simulated, at most, unless there is a time limit: some seconds
of work, so that a busy machine finds the same plan."""
MIN_SIMULATIONS = 4
"""Simulated steps without a better one, at least, whatever their instructions."""
NEIGHBOUR_SHARE = 0.3
"""Share of moves that go to the slice of a neighbour."""


def placements(
    graph: OperatorGraph,
    machine: Machine,
    start: Plan,
    terms: Terms,
    limits: Limits,
    limit_seconds: float = math.inf,
    fits: Callable[[PlacedStep], bool] = lambda step: True,
    bound: float = 0.0,
) -> Iterator[PlacedStep]:
    """Ever faster simulated steps with operators placed on the axes of `start`.

    Without a time limit, the number of simulations depends on the graph alone. The simulation of a
    step is not interrupted by the limit.

    Args:
        limits: A time limit or none, and the seed of moves.
        limit_seconds: Seconds that a step must be faster than.
        fits: Whether a step fits in memory.
        bound: Lower bound of the step, for reports.
    """
    start_seconds = time.perf_counter()
    forks = branches(graph)
    if not (forks or machine.kinds) or not start.mesh.axes:
        return
    if limit_seconds <= len(PHASES) * 2 * DISPATCH_SECONDS:
        return
    climb = _Climb(
        graph,
        machine,
        start,
        terms,
        fits,
        limit_seconds,
    )
    plans = _plans(climb, forks, random.Random(limits.seed))
    for plan in plans:
        if limits.seconds is None:
            ends = climb.simulated_instructions > ALL_INSTRUCTIONS
        else:
            ends = time.perf_counter() - start_seconds > limits.seconds
        if ends or not climb.patience:
            return
        step = climb.improvement(plan)
        if step is not None:
            yield step
            if limits.report is not None:
                limits.report(Progress("placement", step.seconds, bound))


def _plans(
    climb: _Climb,
    forks: Sequence[Fork],
    rng: random.Random,
) -> Iterator[Plan]:
    """The plans to try. Moves start from the best plan so far."""
    graph, terms = climb.graph, climb.terms
    yield from _dealt_plans(
        graph,
        climb.start,
        terms,
        forks,
        differ=bool(climb.machine.kinds),
    )
    units = _units(terms, forks)
    for _ in range(MOVES if units else 0):
        yield _moved(
            climb.best_plan,
            graph,
            terms,
            units,
            rng,
        )


@dataclass(eq=False)
class _Climb:
    """The best placed step so far, and the simulations that remain until a better one."""

    graph: OperatorGraph
    machine: Machine
    start: Plan
    terms: Terms
    fits: Callable[[PlacedStep], bool]
    best_seconds: float
    examined: set[tuple[object, ...]] = field(default_factory=set)
    simulated_instructions: int = 0
    """Instructions of all steps that were simulated."""

    def __post_init__(self) -> None:
        self.best_plan = self.start
        self.patience = self.max_patience

    @property
    def max_patience(self) -> int:
        return max(MIN_SIMULATIONS, INSTRUCTIONS // len(self.graph.instructions))

    @cached_property
    def floor(self) -> _LowerBound | None:
        """Lower bounds of plans, for equal devices."""
        if self.machine.kinds:
            return None
        return _LowerBound(
            self.graph,
            self.machine,
            self.start,
            self.terms,
        )

    def improvement(self, plan: Plan) -> PlacedStep | None:
        """The step of a plan if it is new, faster than the best, and fits in memory."""
        key = tuple(tuple(choice.items()) for choice in plan.choices.values())
        if key in self.examined:
            return None
        if _dispatch_seconds(plan) >= self.best_seconds:
            return None
        if self.floor is not None and self.floor.seconds(plan) >= self.best_seconds:
            return None
        self.examined.add(key)
        try:
            checked = check(plan, self.graph)
            step = PlacedStep.of(
                self.graph,
                self.machine,
                checked,
                self.terms,
            )
        except PlanError:
            return None
        equal_devices = not self.machine.kinds
        if equal_devices and step.lower_bound_seconds >= self.best_seconds:
            return None
        self.patience -= 1
        self.simulated_instructions += len(self.graph.instructions)
        if equal_devices and step.path_seconds >= self.best_seconds:
            return None
        if step.busy_seconds >= self.best_seconds or step.seconds >= self.best_seconds:
            return None
        if not self.fits(step):
            return None
        self.patience = self.max_patience
        self.best_seconds = step.seconds
        self.best_plan = step.plan
        return step


class _LowerBound:
    """Lower bound of placed steps: the compute time of the busiest devices.

    Operators that are not placed are split as in `start`.

    A placed operator is at best divided evenly over its devices.
    """

    def __init__(
        self,
        graph: OperatorGraph,
        machine: Machine,
        start: Plan,
        terms: Terms,
    ) -> None:
        self.names = [operator.name for operator in graph.operators]
        self.mesh = start.mesh
        costs = PlacedStep.of(
            graph,
            machine,
            start,
            terms,
        ).costs
        self.everywhere = [float(cost.compute[0]) for cost in costs]
        bounds = lower_bounds_by_operator(terms, machine)
        self.divided = [seconds / machine.devices for seconds in bounds]

    def seconds(self, plan: Plan) -> float:
        common = 0.0
        placed: dict[tuple[tuple[str, str], ...], float] = defaultdict(float)
        for name, everywhere, divided in zip(
            self.names, self.everywhere, self.divided, strict=True
        ):
            slices = _slices(plan.choices[name])
            if not slices:
                common += everywhere
                continue
            axes = [self.mesh.index[axis] for axis, _ in slices]
            placed[slices] += divided * _slice_count(self.mesh, axes)
        return common + max(placed.values(), default=0.0)


def _slices(choice: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The axes that an operator is placed on, each with its slice, in order of their names."""
    slices = []
    for axis, use in choice.items():
        if placed_slice(use) is not None:
            slices.append((axis, use))
    return tuple(sorted(slices))


def _dispatch_seconds(plan: Plan) -> float:
    """Python's seconds to start the programs of a step, which no device waits less for.

    Operators on different slices run as programs of their own: a forward, a backward and an update
    at every place.
    """
    places = len({_slices(choice) for choice in plan.choices.values()})
    return len(PHASES) * places * DISPATCH_SECONDS if places > 1 else 0.0


# ---------------------------------------------------------------- plans


def at(
    plan: Plan,
    graph: OperatorGraph,
    slices: Mapping[int, int | None],
    axes: Sequence[int],
) -> Plan:
    """The plan with some operators on slices of axes, or on all slices where None.

    Slices are numbered over all of the axes.
    """
    mesh = plan.mesh
    choices = dict(plan.choices)
    names = [mesh.axes[axis].name for axis in axes]
    for operator, number in slices.items():
        name = graph.operators[operator].name
        choice = {axis: use for axis, use in choices[name].items() if axis not in names}
        if number is not None:
            choice |= _slice_choice(mesh, axes, number)
        choices[name] = choice
    home = _operator_of_variable(graph)

    def storable(path: str, axes: Sequence[str]) -> bool:
        """Whether a variable's operator uses all slices of these axes."""
        if path not in home:
            return True
        choice = choices[home[path]]
        return all(placed_slice(choice.get(axis, "")) is None for axis in axes)

    storage = {p: stored for p, stored in plan.storage.items() if storable(p, stored.axes)}
    return replace(plan, choices=choices, storage=storage)


@per_graph
def _operator_of_variable(graph: OperatorGraph) -> dict[str, str]:
    """Path of an argument -> its operator."""
    home = {}
    for argument in graph.arguments:
        operator = graph.home[argument.tensor]
        if operator >= 0:
            home[argument.path] = graph.operators[operator].name
    return home


def _slice_choice(
    mesh: Mesh,
    axes: Sequence[int],
    number: int,
) -> dict[str, str]:
    """The choice of one slice of axes, the last axis fastest."""
    choice = {}
    for axis in reversed(axes):
        choice[mesh.axes[axis].name] = f"at({number % mesh.sizes[axis]})"
        number //= mesh.sizes[axis]
    return choice


def _slice_number(
    mesh: Mesh,
    axes: Sequence[int],
    choice: Mapping[str, str],
) -> int | None:
    """The slice of axes that a choice is on, None if it is on several."""
    number = 0
    for axis in axes:
        place = placed_slice(choice.get(mesh.axes[axis].name, ""))
        if place is None:
            return None
        number = number * mesh.sizes[axis] + place
    return number


def _slice_count(mesh: Mesh, axes: Sequence[int]) -> int:
    return math.prod(mesh.sizes[axis] for axis in axes)


def _dealt_plans(
    graph: OperatorGraph,
    start: Plan,
    terms: Terms,
    forks: Sequence[Fork],
    differ: bool,
) -> Iterator[Plan]:
    """Branches and layers dealt to slices. If devices differ, also all operators on one slice."""
    work = []
    for operator in terms.operators:
        work.append(sum(kernel.flops * kernel.trips for kernel in operator.work))
    layers = _layers(graph, forks)
    inside = sum(len(operators) for operators in layers)
    for axes in _axis_groups(start):
        count = _slice_count(start.mesh, axes)
        if differ:
            operators = range(len(work))
            for number in range(count):
                yield at(
                    start,
                    graph,
                    dict.fromkeys(operators, number),
                    axes,
                )
        dealt = _dealt_branches(forks, work, count)
        yield at(
            start,
            graph,
            dealt,
            axes,
        )
        if 1 < len(layers) < inside:
            slices: dict[int, int | None] = {}
            for number, operators in enumerate(layers):
                slices |= dict.fromkeys(operators, number * count // len(layers))
            yield at(
                start,
                graph,
                slices,
                axes,
            )


def _layers(graph: OperatorGraph, forks: Sequence[Fork]) -> list[list[int]]:
    """The operators of branches by layer."""
    inside: set[int] = set()
    for fork in forks:
        for branch in fork:
            inside.update(branch)
    layers: dict[str, list[int]] = defaultdict(list)
    for operator in sorted(inside):
        layer, *_ = graph.operators[operator].name.split("/")
        layers[layer].append(operator)
    return [*layers.values()]


def _dealt_branches(
    forks: Sequence[Fork],
    work: Sequence[float],
    count: int,
) -> dict[int, int | None]:
    """Operator -> slice: the branch with most work first, each on the slice with least."""

    def branch_work(branch: Sequence[int]) -> float:
        return sum(work[operator] for operator in branch)

    slices: dict[int, int | None] = {}
    for fork in forks:
        load = [0.0] * count
        for branch in sorted(fork, key=lambda branch: -branch_work(branch)):
            lightest = min(range(count), key=load.__getitem__)
            slices |= dict.fromkeys(branch, lightest)
            load[lightest] += branch_work(branch)
    return slices


def _axis_groups(start: Plan) -> list[tuple[int, ...]]:
    """Groups of axes for placement: those of a level, and each alone; fast links first."""
    levels: dict[int, list[int]] = defaultdict(list)
    for number, axis in enumerate(start.mesh.axes):
        levels[axis.level].append(number)
    groups: list[tuple[int, ...]] = []
    for _, axes in sorted(levels.items(), reverse=True):
        single = [(axis,) for axis in axes]
        groups += dict.fromkeys([tuple(axes), *single])
    return groups


def _units(terms: Terms, forks: Sequence[Fork]) -> list[tuple[int, ...]]:
    """Operators that move together: operators of branches, branches, and all equal branches."""
    equal: dict[tuple[str, ...], list[int]] = defaultdict(list)
    units: dict[tuple[int, ...], None] = {}
    for fork in forks:
        for branch in fork:
            digests = [terms.operators[operator].digest for operator in branch]
            equal[tuple(digests)] += branch
            units[tuple(branch)] = None
            units |= dict.fromkeys((operator,) for operator in branch)
    groups = [tuple(operators) for operators in equal.values()]
    return [*units, *(group for group in groups if group not in units)]


def _moved(
    plan: Plan,
    graph: OperatorGraph,
    terms: Terms,
    units: Sequence[tuple[int, ...]],
    rng: random.Random,
) -> Plan:
    """The plan with one unit on another slice, on all slices, or on the slice of a neighbour."""
    unit = rng.choice(units)
    axes = rng.choice(_axis_groups(plan))
    neighbours = []
    for move in terms.edges:
        home_inside = move.home in unit
        reader_inside = move.reader in unit
        if home_inside and not reader_inside:
            neighbours.append(move.reader)
        elif reader_inside and not home_inside:
            neighbours.append(move.home)
    if neighbours and rng.random() < NEIGHBOUR_SHARE:
        neighbour = graph.operators[rng.choice(neighbours)].name
        number = _slice_number(plan.mesh, axes, plan.choices[neighbour])
        if number is not None:
            return at(
                plan,
                graph,
                dict.fromkeys(unit, number),
                axes,
            )
    count = _slice_count(plan.mesh, axes)
    number = rng.choice([None, *range(count)])
    return at(
        plan,
        graph,
        dict.fromkeys(unit, number),
        axes,
    )

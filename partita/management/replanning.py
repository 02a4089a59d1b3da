"""Another plan for a running training whose steps have become slower or faster, with no process to
name: its links have changed.

The seconds of a step before and after give the bandwidth of the machine's outermost links: the
factor by which the prediction, corrected by measured steps (`management.plan_costs`), grows as the
measurement did. The first process searches the best plan for these links beside the training, and
tells the others; it takes effect after the wait of a policy (`policies.rule`). A plan that sends
nothing over a link cannot show that the link has recovered.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from partita.errors import PartitaError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.management.plan_costs import CorrectedCosts
from partita.management.plan_table import in_state
from partita.management.policies.rule import Rule
from partita.management.policies.waiting import Slowdown, WaitingPolicy
from partita.management.program_table import ProgramTable, check_script
from partita.management.traces import MachineState
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.search.find import find
from partita.simulation.simulate import predicted

LEAST_GAIN = 1.1
"""Predicted gain from which a plan is changed."""
SLOWEST_LINK = 1e-4
"""Smallest factor of a link's bandwidth that is looked for."""
LIKELY_FACTOR = 0.2
"""Part of the bandwidth of the outermost links in the likely state that a plan is prepared for."""
SEARCH = ("search", "plan")
"""The key of a search in the table of programs."""
HALVINGS = 24
"""Halvings of the interval in which a link's factor is looked for."""


@dataclass(frozen=True)
class Situation:
    """A step whose time has changed."""

    graph: OperatorGraph
    machine: Machine
    """As described."""
    plan: Plan
    step_seconds: float
    """Measured now."""
    earlier_seconds: float
    """Measured before the change."""
    earlier_factor: float
    """Of the bandwidth of the outermost links before the change."""
    change_seconds: float
    """Price of another plan: its compilation, mostly."""
    prepared: Plan | None = None
    """A plan that is compiled beforehand: a change to it is free."""


@dataclass(frozen=True)
class Proposal:
    """A plan that is predicted to be faster."""

    plan: Plan
    reason: str
    gain: float
    """Seconds of a step now, over those predicted for the plan."""
    wait_seconds: float
    """Until the change, by the policy."""
    factor: float
    """Of the bandwidth of the outermost links."""

    def to_json(self) -> dict[str, Any]:
        """A plain JSON value; `from_json` of it equals this proposal."""
        return {**vars(self), "plan": self.plan.to_json()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Proposal:
        """The proposal of a JSON value that this module wrote."""
        return Proposal(**{**value, "plan": Plan.from_json(value["plan"])})


def link_factor(situation: Situation, costs: CorrectedCosts) -> float:
    """Factor of the outermost links' bandwidth that explains the seconds of a step, at most 1.

    The smallest one that is looked for if no factor does; that of before for a plan whose step
    hardly depends on the links.
    """
    low, high = SLOWEST_LINK, 1.0
    fastest = _seconds(situation, situation.plan, high, costs)
    if _seconds(situation, situation.plan, low, costs) < LEAST_GAIN * fastest:
        return situation.earlier_factor
    times = situation.step_seconds / situation.earlier_seconds
    seconds = times * _seconds(situation, situation.plan, situation.earlier_factor, costs)
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        if _seconds(situation, situation.plan, middle, costs) > seconds:
            low = middle
        else:
            high = middle
    return high


def propose(
    situation: Situation, costs: CorrectedCosts, policy: WaitingPolicy | None = None
) -> Proposal | None:
    """The best plan for links that explain a step's seconds; None if it is hardly faster.

    It uses as many devices as the plan so far: every process keeps its part.
    """
    policy = policy or Rule()
    factor = link_factor(situation, costs)
    machine = _with_links(situation.machine, factor)
    timed = []
    for plan in _candidates(situation.graph, machine, situation.plan):
        timed.append((_seconds(situation, plan, factor, costs), plan))
    best, plan = min(timed, key=lambda pair: pair[0])
    change_seconds = situation.change_seconds
    if situation.prepared is not None:
        seconds = _seconds(situation, situation.prepared, factor, costs)
        if seconds < LEAST_GAIN * best:
            best, plan, change_seconds = seconds, situation.prepared, 0.0
    now = _seconds(situation, situation.plan, factor, costs)
    if now < LEAST_GAIN * best:
        return None
    slowdown = Slowdown(now, best, change_seconds, ())
    level = situation.machine.levels[0].name
    times = situation.step_seconds / situation.earlier_seconds
    speed = f"{times:.1f} x longer" if times > 1 else f"{1 / times:.1f} x shorter"
    reason = f"steps take {speed}, as with '{level}' at {factor:.0%} of its bandwidth"
    return Proposal(plan, reason, now / best, policy.wait(slowdown), factor)


def plan_for_slow_links(graph: OperatorGraph, machine: Machine, plan: Plan) -> Plan:
    """The best plan for outermost links with LIKELY_FACTOR of their bandwidth, of as many devices
    as the plan so far."""
    slow = _with_links(machine, LIKELY_FACTOR)
    candidates = [plan, *_candidates(graph, slow, plan)]
    return min(candidates, key=lambda other: predicted(graph, slow, other).seconds)


def _candidates(graph: OperatorGraph, machine: Machine, plan: Plan) -> list[Plan]:
    """The plan that a search finds, and expert plans, of as many devices as the plan so far.

    EndedScriptError, soon after the script has ended.
    """
    candidates = [find(graph, machine, lambda progress: check_script()).plan]
    for baseline in BASELINES.values():
        check_script()
        try:
            candidates.append(check(baseline(graph, machine.name, plan.mesh), graph))
        except PlanError:
            continue
    candidates = [other for other in candidates if other.devices == plan.devices]
    return [other for other in candidates if is_one_program(other)] or [plan]


def _with_links(machine: Machine, factor: float) -> Machine:
    """A machine whose outermost links have a part of their bandwidth."""
    if factor == 1.0:
        return machine
    state = MachineState(links=((machine.levels[0].name, factor),))
    return in_state(machine, state, machine.devices)


def _seconds(situation: Situation, plan: Plan, factor: float, costs: CorrectedCosts) -> float:
    """Corrected seconds of a step of a plan with slower links."""
    machine = _with_links(situation.machine, factor)
    return costs.seconds(predicted(situation.graph, machine, plan)).seconds


class Replanner:
    """Searches for another plan beside the training, in the first process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.costs = CorrectedCosts()
        self.factor = 1.0
        """Of the bandwidth of the outermost links, as the present plan was chosen for."""
        self._proposal: Proposal | None = None
        self._due = 0.0

    def begin(self, situation: Situation, table: ProgramTable) -> None:
        """Begins a search in the thread of a table; one under way goes on instead."""
        if table.is_done(SEARCH):
            table.keep(lambda key: key != SEARCH)
        self._proposal = None
        table.begin(SEARCH, partial(self._search, situation))

    def _search(self, situation: Situation) -> None:
        start = self.clock()
        try:
            machine = _with_links(situation.machine, situation.earlier_factor)
            earlier = predicted(situation.graph, machine, situation.plan)
            self.costs.probe(earlier, situation.earlier_seconds)
            proposal = propose(situation, self.costs)
        except PartitaError:
            # No plan fits with these links: the training goes on as it is.
            return
        if proposal is not None:
            self._due = start + proposal.wait_seconds
            self._proposal = proposal

    def due(self) -> Proposal | None:
        """The proposal whose wait is over, once."""
        proposal = self._proposal
        if proposal is None or self.clock() < self._due:
            return None
        self._proposal = None
        self.factor = proposal.factor
        return proposal

    def cancel(self) -> None:
        """Forgets a proposal that is not due: the reason for it is gone."""
        self._proposal = None

"""Replays of a trace: the steps that a policy of plan changes makes in its time.

A change costs the compilation of a plan that was not used before, and a move of the state. A loss
of a device that the plan uses forces a change and costs a restart, with the steps since the last
snapshot. The clairvoyant oracle knows the whole trace: dynamic programming over times and plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from partita.management.plan_table import PlanTable
from partita.management.policies.at_once import AtOnce
from partita.management.policies.never import Never
from partita.management.policies.rule import Rule
from partita.management.policies.waiting import Slowdown, WaitingPolicy
from partita.management.traces import MachineState, Segment, Trace

WAITING: Mapping[str, type[WaitingPolicy]] = {"rule": Rule, "at-once": AtOnce, "never": Never}
"""Name -> policy of plan changes."""


@dataclass(frozen=True)
class Prices:
    """Seconds of changes; assumed, until measured."""

    compile: float = 20.0
    """Of a plan that was not used before."""
    move: float = 1.0
    """Of the state to another plan."""
    restart: float = 10.0
    """After a loss, with the steps since the last snapshot."""


@dataclass(frozen=True)
class Change:
    """A change of plan, as it is logged."""

    second: float
    plan: str
    price: float
    reason: str

    def __str__(self) -> str:
        return f"{self.second:.0f} s: {self.reason}; {self.plan}, costs {self.price:g} s"


@dataclass(frozen=True)
class Stretch:
    """A time in which a run does not change."""

    seconds: float
    plan: str
    rate: float
    """Steps per second; 0 while the plan changes."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The result of a replay."""

    policy: str
    steps: float
    seconds: float
    """Of the trace."""
    changes: tuple[Change, ...] = field(repr=False)
    stretches: tuple[Stretch, ...] = field(default=(), repr=False)
    """In order; none of the oracle, whose changes are not known."""

    def to_json(self) -> dict[str, Any]:
        changes = []
        for change in self.changes:
            figures = {"second": change.second, "plan": change.plan, "price": change.price}
            changes.append({**figures, "reason": change.reason})
        return {
            "policy": self.policy,
            "steps": self.steps,
            "seconds": self.seconds,
            "changes": changes,
        }


class _Run:
    """A run over the segments of a trace."""

    def __init__(self, table: PlanTable, policy: WaitingPolicy, prices: Prices) -> None:
        self.table = table
        self.policy = policy
        self.prices = prices
        self.plan = table.best(MachineState())
        self.compiled = {self.plan}
        self.steps = 0.0
        self.pause = 0.0
        """Seconds of a change that are still to come."""
        self.changes: list[Change] = []
        self.stretches: list[Stretch] = []
        self.slow_since: dict[str, float] = {}
        """Plan -> since when another one is faster."""
        self.lengths: dict[str, list[float]] = {}
        """Plan -> seconds of the times in which another one was faster."""

    def segment(self, segment: Segment) -> None:
        """Runs through a time without events."""
        row = self.table.seconds[segment.state]
        best = self.table.best(segment.state)
        now = segment.start
        end = segment.start + segment.seconds
        if self.plan not in row:
            self._change(now, best, self.prices.restart, f"devices are lost ({segment.state})")
        self._note_slowdowns(now, row)
        if row[best] < row[self.plan]:
            price = self._price(best)
            lengths = tuple(self.lengths.get(self.plan, ()))
            slowdown = Slowdown(row[self.plan], row[best], price, lengths)
            change_at = max(now, self.slow_since[self.plan] + self.policy.wait(slowdown))
            if change_at < end:
                self._run(change_at - now, row[self.plan])
                gain = row[self.plan] / row[best]
                self._change(change_at, best, 0.0, f"{segment.state}: {gain:.2f} x faster")
                now = change_at
        self._run(end - now, row[self.plan])

    def _note_slowdowns(self, now: float, row: Mapping[str, float]) -> None:
        """Writes down for each used plan when it becomes slower than another one, and how long."""
        fastest = min(row.values())
        for plan in self.compiled:
            if plan not in row:
                self.slow_since.pop(plan, None)
            elif row[plan] > fastest:
                self.slow_since.setdefault(plan, now)
            elif plan in self.slow_since:
                self.lengths.setdefault(plan, []).append(now - self.slow_since.pop(plan))

    def _price(self, plan: str) -> float:
        return self.prices.move + (0.0 if plan in self.compiled else self.prices.compile)

    def _change(self, second: float, plan: str, extra: float, reason: str) -> None:
        price = self._price(plan) + extra
        self.changes.append(Change(second, plan, price, reason))
        self.pause += price
        self.plan = plan
        self.compiled.add(plan)

    def _run(self, seconds: float, step_seconds: float) -> None:
        paused = min(seconds, self.pause)
        self.pause -= paused
        self.steps += (seconds - paused) / step_seconds
        for length, rate in ((paused, 0.0), (seconds - paused, 1 / step_seconds)):
            if length > 0:
                self.stretches.append(Stretch(length, self.plan, rate))


def replay(
    trace: Trace, table: PlanTable, policy: WaitingPolicy, prices: Prices | None = None
) -> Replay:
    """The steps of a policy of plan changes in the time of a trace."""
    run = _Run(table, policy, prices or Prices())
    segments = trace.segments()
    for segment in segments:
        run.segment(segment)
    seconds = sum(segment.seconds for segment in segments)
    return Replay(
        policy=policy.name,
        steps=run.steps,
        seconds=seconds,
        changes=tuple(run.changes),
        stretches=tuple(run.stretches),
    )


def clairvoyant(
    trace: Trace, table: PlanTable, prices: Prices | None = None, others: Sequence[Replay] = ()
) -> Replay:
    """The most steps that changes at events can reach, with all plans compiled at their first use.

    Compilation is charged once for each plan, at its first use. `others` are replays of policies;
    the best of them counts if it is better, since changes between events are not examined here.
    """
    prices = prices or Prices()
    segments = trace.segments()
    start = table.best(MachineState())
    best: dict[tuple[str, frozenset[str]], float] = {(start, frozenset({start})): 0.0}
    for segment in segments:
        row = table.seconds[segment.state]
        reached: dict[tuple[str, frozenset[str]], float] = {}
        for (plan, compiled), steps in best.items():
            for target in row:
                price = _change_price(plan, target, compiled, plan in row, prices)
                running = max(0.0, segment.seconds - price)
                key = target, compiled | {target}
                total = steps + running / row[target]
                reached[key] = max(total, reached.get(key, -math.inf))
        best = reached
    steps = max([*best.values(), *(other.steps for other in others)])
    seconds = sum(segment.seconds for segment in segments)
    return Replay(policy="oracle", steps=steps, seconds=seconds, changes=())


def _change_price(
    plan: str, target: str, compiled: frozenset[str], can_stay: bool, prices: Prices
) -> float:
    if plan == target:
        return 0.0
    price = prices.move + (0.0 if target in compiled else prices.compile)
    return price if can_stay else price + prices.restart

"""Balance: work moves away from a process that has become slow, and back when it is not; and the
plan changes when steps become slower with nobody to name.

Every process notes the times of its threads at each step (`management.monitor`). Every few steps
they exchange these, so all decide the same. One program serves all shares. Once it is compiled, a
change costs nothing and comes at once; the first change costs the compilation, and comes after the
wait of a policy (`policies.rule`), unless the program is made ready before the first step.

A predicted gain is that of the slowest device's work. The log of measured over predicted gain
corrects later predictions (recursive least squares): a step has parts that do not move.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np

from partita.errors import LostProcessError, PartitaError
from partita.management.contract import Training
from partita.management.decisions import Decision, DecisionLog
from partita.management.least_squares import RecursiveLeastSquares
from partita.management.monitor import SlowProcesses, StepChanges, ThreadClock, ThreadTimes
from partita.management.policies.rule import Rule
from partita.management.policies.waiting import Slowdown, WaitingPolicy
from partita.management.replanning import (
    Proposal,
    Replanner,
    Situation,
    plan_for_slow_links,
)
from partita.management.shares import MICROBATCHES, relative_seconds, shares_of
from partita.plans.plan import Plan

FEWEST_STEPS = 5
"""Steps between two exchanges, at least."""
MOST_STEPS = 200
"""Steps between two exchanges, at most."""
OVERHEAD = 0.002
"""Fraction of the time that exchanges may take, and readings of threads' times too."""
LEAST_GAIN = 1.1
"""Predicted gain from which shares change."""
NEARLY_FULL = 0.8
"""Speed from which a slow process is about to be forgotten."""
LEAST_EXPONENT = 0.05
"""Smallest log(measured) / log(predicted) of a gain that counts: the time before and after may
differ for another reason."""
LEAST_CHANGE = 1.3
"""Seconds of a step over the usual ones, from which another plan is looked for."""
STEPS_TO_NAME = 5
"""Readings after a change of a step's seconds in which a slow process may be named."""
ONE = np.ones(1)


@dataclass(frozen=True)
class Change:
    """A change of shares whose gain is still to be measured."""

    step: int
    seconds: float
    """Median of the last steps before it."""
    gain: float
    """Predicted, not corrected."""


@dataclass(frozen=True)
class Shift:
    """A change of shares that is worth it."""

    shares: tuple[int, ...] | None
    """Microbatches per device; None for even parts."""
    reason: str
    gain: float = 1.0
    """Seconds of a step now, over those with the shares."""
    corrected_gain: float = 1.0
    """By the gains that were measured."""


class Balance:
    """A manager that shifts work between processes. `management.contract` states its methods."""

    def __init__(
        self,
        log: DecisionLog,
        acts: bool = True,
        ready: bool = False,
        clock: ThreadClock | None = None,
        policy: WaitingPolicy | None = None,
    ) -> None:
        self.log = log
        self.acts = acts
        self.ready = ready
        """Whether the program for shares is compiled before the first step."""
        self.clock = clock or ThreadClock()
        self.policy = policy or Rule()
        self.shares: tuple[int, ...] | None = None
        """Microbatches per device; None while all have the plan's even parts."""
        self._key: Hashable = None
        """The shapes of the first step: others have even parts."""
        self._alive: tuple[int, ...] = ()
        self._microbatches = 0
        """0 before the step is compiled for shares."""
        self._refused = ""
        """Why the step has no shares."""
        self._slow = SlowProcesses()
        self._correction = RecursiveLeastSquares(1, forgetting=0.9, prior=1.0)
        self._stride = 1
        """Steps between two readings of the threads' times."""
        self._unread: list[float] = []
        """Seconds of the steps since the last reading."""
        self._laps: list[tuple[float, ThreadTimes]] = []
        """(seconds of a step, times of threads) of the readings since the last exchange."""
        self._was_disturbed = False
        """Whether a thread has compiled or searched beside a step since the last exchange."""
        self._next_round = 0
        self._round_seconds: deque[float] = deque([0.001], maxlen=10)
        """Of the last exchanges; most contain waiting for another process."""
        self._change: Change | None = None
        self._changes = StepChanges()
        self._unexplained: tuple[float, int] | None = None
        """(seconds over the usual ones, readings since) of a change of steps that no slow process
        explains."""
        self._replanner = Replanner()
        self._prepared: Plan | None = None
        """A plan for slow links that is compiled beside the training."""
        self._compile_seconds = 0.0
        """Of the first process's last compilation."""
        self._now = 0.0
        """Time of the first process at the last exchange, seconds."""
        self._slow_since: float | None = None
        self._slow_lengths: list[float] = []
        """Seconds of earlier times in which a process was slow."""
        self._told: frozenset[int] = frozenset()
        """Slow processes that were reported without a change."""

    # ------------------------------------------------------------------------------------- steps

    def before_step(self, training: Training, key: Hashable, state: Any, batch: Any) -> None:
        """Exchanges times and changes shares, if it is time."""
        if training.group.alive != self._alive:
            self._begin(training, key)
        if len(self._alive) < 2 or training.plan is None or key != self._key:
            return
        if self._lacks_shares(training, key):
            # Later programs are compiled beside the training: after a loss nobody waits for them.
            if training.step:
                training.begin_shares(key)
            else:
                self._prepare(training, key)
        if training.step >= self._next_round:
            self._round(training, key)

    def after_step(
        self, training: Training, key: Hashable, state: Any, batch: Any, seconds: float
    ) -> None:
        """Notes the times of the step, and of the work in front of it."""
        if key != self._key:
            return
        self._was_disturbed = self._was_disturbed or training.table.is_working
        self._unread.append(seconds)
        if len(self._unread) >= self._stride:
            self._laps.append((mean(self._unread), self.clock.lap()))
            self._unread = []

    def lost(self, training: Training, state: Any, error: LostProcessError) -> Any:
        """Cannot go on without a lost process."""
        raise error

    def _begin(self, training: Training, key: Hashable) -> None:
        """Begins to watch a set of processes. One that is back knows nothing of earlier times, so
        the others forget them too: all decide alike."""
        self._alive = training.group.alive
        self._key = key
        self._correction = RecursiveLeastSquares(1, forgetting=0.9, prior=1.0)
        self._slow_lengths = []
        self._slow_since = None
        self._told = frozenset()
        self._forget(training)

    def _forget(self, training: Training) -> None:
        """Begins to watch another program: new processes, or another plan."""
        self.shares = None
        self._microbatches = 0
        self._refused = ""
        self._slow = SlowProcesses()
        self._laps = []
        self._unread = []
        self._change = None
        self._changes.restart()
        self._unexplained = None
        self._prepared = None
        self._next_round = training.step + FEWEST_STEPS

    def _prepare(self, training: Training, key: Hashable, where: str = "") -> None:
        """Compiles the step for shares, or notes that it was compiled elsewhere."""
        start = time.perf_counter()
        refused = ""
        try:
            self._microbatches = training.prepare_shares(key)
        except LostProcessError:
            raise
        except PartitaError as error:
            refused = str(error)
        seconds = time.perf_counter() - start
        # Memory may be too small for one of them only.
        self._refused = max(training.group.exchanged("shares", refused))
        if self._refused:
            sentence = f"work cannot move between processes: {self._refused}"
            self._add(training, "stay", sentence)
            return
        sentence = (
            f"work can move between processes in {self._microbatches} microbatches "
            f"(compiled {where or f'in {seconds:.1f} s'})"
        )
        self._add(training, "prepare", sentence, compile_seconds=seconds)

    def _shares_are_done(self, training: Training, key: Hashable) -> bool:
        """Whether this process has compiled the step for shares beside the training, and the others
        do not know it yet."""
        return self._lacks_shares(training, key) and training.begin_shares(key)

    def _lacks_shares(self, training: Training, key: Hashable) -> bool:
        """Whether the step is to be compiled for shares before a process is slow."""
        if not self.ready or not self.acts or self._refused:
            return False
        return not training.has_shares(key)

    def _plan_for_slow_links(self, training: Training, key: Hashable) -> dict[str, Any] | None:
        """The plan to prepare for slow links, once the first process has found it beside the
        training; that of the training if none is better. On a CPU the search would slow the
        training down, whether links do or not."""
        plan = training.plan
        is_wanted = self.acts and training.host_is_idle and training.group.is_first
        if plan is None or self._prepared is not None or not is_wanted:
            return None
        search = partial(plan_for_slow_links, training.graph(key), training.machine(), plan)
        training.table.begin(("search", "links"), search)
        if not training.table.is_done(("search", "links")):
            return None
        try:
            return training.table.get(("search", "links")).to_json()
        except PartitaError:
            return plan.to_json()

    # ---------------------------------------------------------------------------------- decisions

    def _round(self, training: Training, key: Hashable) -> None:
        """Exchanges the times of all processes, and decides from them, as all others do."""
        start = time.perf_counter()
        laps = [[seconds, *times] for seconds, times in self._laps]
        proposal = self._replanner.due()
        plan = None if proposal is None else proposal.to_json()
        message = {
            "laps": laps,
            "round": min(self._round_seconds),
            "reading": self.clock.seconds,
            "plan": plan,
            "now": start,
            "compile": training.compile_seconds,
            "shares": self._shares_are_done(training, key),
            "prepare": self._plan_for_slow_links(training, key),
            "disturbed": self._was_disturbed,
        }
        own = json.dumps(message)
        self._laps = []
        self._was_disturbed = False
        values = [json.loads(text) for text in training.group.exchanged("balance", own)]
        if all(value["shares"] for value in values):
            self._prepare(training, key, "beside the training")
        if values[0]["prepare"] is not None:
            self._prepared = Plan.from_json(values[0]["prepare"])
            training.prepare_plan(key, self._prepared)
        self._now = values[0]["now"]
        self._compile_seconds = values[0]["compile"]
        steps = min(len(value["laps"]) for value in values)
        rows = [[value["laps"][n] for value in values] for n in range(steps)]
        step_seconds = median(row[0][0] for row in rows) if rows else 0.0
        # A thread that compiles or searches takes processor time from the steps of its process.
        is_disturbed = any(value["disturbed"] for value in values)
        if values[0]["plan"] is not None:
            self._change_plan(training, Proposal.from_json(values[0]["plan"]))
        elif rows and not is_disturbed:
            self._add_stretches(rows)
            self._measure(training, step_seconds)
            self._decide(training, key, step_seconds)
            self._look_for_plans(training, key, [row[0][0] for row in rows])
        cost = max(value["round"] for value in values)
        fewest = 1 if is_disturbed or self._unexplained is not None else FEWEST_STEPS
        self._next_round = training.step + _steps_between(cost, step_seconds, fewest)
        reading = max(value["reading"] for value in values)
        self._stride = _steps_between(reading, step_seconds, fewest=1)
        self._round_seconds.append(time.perf_counter() - start)

    def _add_stretches(self, rows: Sequence[Sequence[Sequence[float]]]) -> None:
        """Takes in the times [step, process, (seconds, running, queued)] of an exchange."""
        for row in rows:
            stretches = [ThreadTimes(running, queued).stretch for _, running, queued in row]
            self._slow.add(dict(zip(self._alive, stretches, strict=True)))

    def _decide(self, training: Training, key: Hashable, step_seconds: float) -> None:
        """Changes shares where that is predicted to be faster."""
        owners = training.device_processes(key)
        if not self._slow.named:
            self._recover(training, owners)
            return
        since = self._slow_since = self._slow_since or self._now
        shift = self._best_shift(owners)
        if shift is None:
            return
        is_compiled = self._refused or training.has_shares(key)
        if self.acts and not is_compiled:
            slowdown = Slowdown(
                step_seconds,
                step_seconds / shift.corrected_gain,
                self._compile_seconds,
                tuple(self._slow_lengths),
            )
            if self._now - since >= self.policy.wait(slowdown):
                self._prepare(training, key)
                self._decide(training, key, step_seconds)
            return
        self._change_shares(training, owners, shift)
        if self.shares == shift.shares:
            self._change = Change(training.step, step_seconds, shift.gain)

    def _recover(self, training: Training, owners: Sequence[int]) -> None:
        """Goes back to even parts, with nobody slow."""
        self._told = frozenset()
        if self._slow_since is not None:
            self._slow_lengths.append(self._now - self._slow_since)
            self._slow_since = None
        if self.shares is not None:
            reason = "all processes are at full speed again"
            self._change_shares(training, owners, Shift(None, reason))

    def _best_shift(self, owners: Sequence[int]) -> Shift | None:
        """The fastest shares for the speeds of processes, if they are worth a change."""
        speeds = {process: self._slow.speed(process) for process in self._alive}
        if any(speeds[process] > NEARLY_FULL for process in self._slow.named):
            return None
        device_speeds = [speeds[process] for process in owners]
        microbatches = self._microbatches or MICROBATCHES
        now = self.shares or (microbatches / len(owners),) * len(owners)
        best = shares_of(device_speeds, microbatches)
        gain = relative_seconds(now, device_speeds) / relative_seconds(best, device_speeds)
        corrected = gain ** math.exp(float(self._correction.weights[0]))
        if best == self.shares or corrected < LEAST_GAIN:
            return None
        slow = " and ".join(
            f"process {process} is {1 / speeds[process]:.1f} x slower"
            for process in sorted(self._slow.named)
        )
        return Shift(best, f"{slow} than the others", gain, corrected)

    def _change_shares(self, training: Training, owners: Sequence[int], shift: Shift) -> None:
        """Changes shares, or says what would be done."""
        text = f"shares {_text(owners, self.shares)} -> {_text(owners, shift.shares)}"
        effect = "costs nothing"
        if shift.shares is not None:
            effect = f"{shift.corrected_gain:.1f} x faster"
        figures = {
            "shares": shift.shares,
            "predicted_gain": shift.gain,
            "corrected_gain": shift.corrected_gain,
            "slow": {process: self._slow.speed(process) for process in sorted(self._slow.named)},
        }
        if self.acts and not self._refused:
            training.change_shares(shift.shares)
            self.shares = shift.shares
            self._add(training, "shares", f"{shift.reason}; {text}, {effect}", **figures)
        elif self._told != self._slow.named:
            hint = "its work cannot move" if self.acts else f"would change {text}, {effect}"
            self._add(training, "stay", f"{shift.reason}; {hint}", **figures)
        self._told = self._slow.named

    # -------------------------------------------------------------------------------------- plans

    def _look_for_plans(self, training: Training, key: Hashable, seconds: Sequence[float]) -> None:
        """Searches for another plan when steps have changed and no process is slow."""
        if self._slow.named or self.shares is not None:
            self._changes.restart()
            self._unexplained = None
            self._replanner.cancel()
            return
        if self._unexplained is not None:
            factor, readings = self._unexplained
            self._unexplained = factor, readings + len(seconds)
            if self._unexplained[1] >= STEPS_TO_NAME:
                self._unexplained = None
                if training.group.is_first:
                    self._begin_search(training, key)
        for value in seconds:
            factor = self._changes.add(value)
            if factor is None:
                continue
            self._replanner.cancel()
            is_large = max(factor, 1 / factor) > LEAST_CHANGE
            self._unexplained = (factor, 0) if is_large else None

    def _begin_search(self, training: Training, key: Hashable) -> None:
        assert training.plan is not None and self._changes.usual is not None
        situation = Situation(
            graph=training.graph(key),
            machine=training.machine(),
            plan=training.plan,
            step_seconds=self._changes.reference,
            earlier_seconds=self._changes.usual,
            earlier_factor=self._replanner.factor,
            change_seconds=self._compile_seconds,
            prepared=self._prepared,
        )
        self._replanner.begin(situation, training.table)

    def _change_plan(self, training: Training, proposal: Proposal) -> None:
        """Changes the plan, or says what would be done."""
        assert training.plan is not None
        change = f"plan '{training.plan.name}' -> '{proposal.plan.name}'"
        effect = f"{proposal.gain:.1f} x faster, costs about {self._compile_seconds:.1f} s"
        figures = {"predicted_gain": proposal.gain, "wait_seconds": proposal.wait_seconds}
        if not self.acts:
            self._add(
                training, "stay", f"{proposal.reason}; would change {change}, {effect}", **figures
            )
            return
        training.change(proposal.plan)
        self._forget(training)
        self._add(training, "switch", f"{proposal.reason}; {change}, {effect}", **figures)

    # ----------------------------------------------------------------------------------- learning

    def _measure(self, training: Training, step_seconds: float) -> None:
        """Learns from the gain of the last change, once all exchanged steps are after it."""
        change = self._change
        if change is None or training.step < change.step + FEWEST_STEPS + 1:
            return
        self._change = None
        measured = change.seconds / step_seconds
        if not self._slow.named:
            return
        # The correction is an exponent: log(measured) = exp(w) x log(predicted).
        exponent = max(LEAST_EXPONENT, math.log(measured) / math.log(change.gain))
        residual = math.log(exponent) - float(self._correction.weights[0])
        self._correction.update(ONE, residual)
        speed = f"{measured:.1f} x faster" if measured >= 1 else f"{1 / measured:.1f} x slower"
        sentence = f"steps are {speed} with these shares"
        self._add(
            training, "measured", sentence, measured_gain=measured, predicted_gain=change.gain
        )

    def _add(self, training: Training, action: str, sentence: str, **figures: Any) -> None:
        if training.group.is_first:
            self.log.add(Decision(training.step, action, sentence, figures))


def _steps_between(cost_seconds: float, step_seconds: float, fewest: int) -> int:
    """Steps from one exchange or reading to the next, for a cost of at most OVERHEAD.

    >>> _steps_between(0.001, 0.1, 5), _steps_between(0.001, 0.01, 5), _steps_between(0.001, 0.0, 5)
    (5, 50, 200)
    """
    if step_seconds <= 0:
        return MOST_STEPS
    steps = math.ceil(cost_seconds / (OVERHEAD * step_seconds))
    return min(MOST_STEPS, max(fewest, steps))


def _text(owners: Sequence[int], shares: Sequence[int] | None) -> str:
    """Microbatches per process.

    >>> _text((0, 0, 1, 1), (6, 6, 2, 2)), _text((0, 1), None)
    ('12:4', 'even')
    """
    if shares is None:
        return "even"
    totals: dict[int, int] = {}
    for process, share in zip(owners, shares, strict=True):
        totals[process] = totals.get(process, 0) + share
    return ":".join(str(total) for total in totals.values())

"""Survival: a training goes on without a lost process, in the processes that are left.

Each process keeps the last two snapshots of the whole state in its memory, and the batches since.
After a loss the survivors leave the dead, agree on a snapshot that all of them have, split the
state over their devices, and run the batches again that came after it. The interrupted step comes
next, with the batch that it had, so losses are those of a run that lost nobody, and callbacks see
every step once.

A snapshot costs a copy to host memory, and for split variables a gather. The time between two is
PACE times as long, at most LONGEST. All processes take it before the same step.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from partita.errors import LostProcessError, MemoryBudgetError, PartitaError, ProcessError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.machine.host_memory import free_memory_bytes
from partita.management.contract import PlanFor, Training
from partita.management.decisions import Decision, DecisionLog
from partita.management.survivor_plans import survivor_plan
from partita.plans.plan import Plan
from partita.units import format_bytes, format_seconds

KEPT = 2
"""Snapshots that are kept: a process may be lost while the others take the last one."""
PACE = 1000.0
"""Least time between two snapshots, in durations of one: they cost a tenth of a percent."""
LONGEST = 60.0
"""Most seconds between two snapshots: after a loss, so much is computed again at most."""
FIRST_INTERVAL = 10
"""Steps between the first two snapshots, before the time of a step is known."""
WORD_SECONDS = 30.0
"""Time in which the launcher must say who is lost, seconds."""
UNTIMED = 3
"""Snapshots whose time does not count: they compile the programs that gather variables."""
LEAST_BATCH_BYTES = 2**26
"""Memory that batches may take in any case."""
SAMPLES = 64
"""Values by which a change of an array that is kept without a copy is noticed."""
SUM_SHARE = 0.003
"""Largest part of a step's time in which all of its values are summed, too."""
SUM_SPEED = 20e9
"""Bytes that one core sums in a second, from main memory."""


@dataclass(frozen=True)
class Snapshot:
    """The state before a step, in host memory."""

    step: int
    leaves: Sequence[np.ndarray]


@dataclass(frozen=True)
class Replayed:
    """A step that can be run again."""

    step: int
    key: Hashable
    batch: Any
    replaced: Mapping[int, np.ndarray] = field(default_factory=dict)
    """Leaf -> its new value, where others than the step before have set it: a callback, or Keras
    when it resets metrics."""
    fingerprint: Sequence[bytes] = ()
    """Of the arrays in the batch that are views of the user's."""
    is_summed: bool = False
    """Whether the fingerprint has the sums of all values."""


@dataclass(frozen=True)
class Growth:
    """A process that is back is to be taken in."""

    key: Hashable
    """Of the coming step."""
    event: int
    """Losses and returns until then."""


class Survival:
    """A manager that goes on without lost processes. `management.contract` states its methods."""

    def __init__(self, log: DecisionLog, is_ready: bool = False) -> None:
        """With `is_ready`, the programs for the loss of any one process are compiled beforehand."""
        self.log = log
        self.is_ready = is_ready
        self._prepared: set[Hashable] = set()
        """Keys of steps that are prepared for losses, under a plan."""
        self._prepared_plan: Plan | None = None
        self._plans: dict[tuple[int, str], str] = {}
        """Number of devices and plan before, as JSON -> plan for them or reason why there is none:
        agreed for losses that may come."""
        self._searched: set[int] = set()
        """Numbers of devices whose plan is searched beside the training, by the first process."""
        self._alive: tuple[int, ...] = ()
        """The processes of the last step."""
        self._snapshots: deque[Snapshot] = deque(maxlen=KEPT)
        self._taken = 0
        """Snapshots since the begin, or since a loss."""
        self._replayed: deque[Replayed] = deque()
        """The steps since the older snapshot."""
        self._running: Replayed | None = None
        """The step that has begun."""
        self._last: list[Any] = []
        """The leaves of the state that the last step returned."""
        self._next_snapshot = 0
        self._step_seconds: deque[float] = deque(maxlen=25)
        self._refusal = ""
        """Why there are no snapshots."""
        self._batch_room = LEAST_BATCH_BYTES
        """Memory for the batches since a snapshot, bytes, equal in all processes."""
        self._growth: Growth | None = None
        """Agreed at the last snapshot, and to be carried out."""
        self._used: dict[int, Plan] = {}
        """The last plan for each number of devices."""

    # ------------------------------------------------------------------------------------- steps

    def before_step(self, training: Training, key: Hashable, state: Any, batch: Any) -> None:
        """Takes a snapshot if it is due, and notes the batch."""
        alive = training.group.alive
        if self._alive and alive != self._alive:
            raise LostProcessError("A process was lost in another training.")
        self._alive = alive
        if training.plan is not None:
            self._used[training.group.devices_of(alive)] = training.plan
        is_done = len(alive) == 1 and not training.group.returned()
        if self._refusal or is_done:
            self._forget()
            return
        leaves = training.leaves(state)
        replaced = self._replaced(training, leaves)
        if not self._snapshots and not self._fits(training, leaves):
            return
        batch = training.batch_copy(batch)
        if replaced is None or training.step >= self._next_snapshot:
            self._take(training, key, state, batch, is_new=replaced is None)
        if training.plan is not self._prepared_plan:
            self._begin_again(training)
        if key not in self._prepared and not training.is_evaluation(key):
            self._prepared.add(key)
            self._prepare(training, key)
        arrays = training.leaves(batch)
        is_summed = self._can_sum(arrays)
        fingerprint = fingerprint_of(arrays, is_summed)
        replaced = replaced or {}
        self._running = Replayed(training.step, key, batch, replaced, fingerprint, is_summed)

    def after_step(
        self, training: Training, key: Hashable, state: Any, batch: Any, seconds: float
    ) -> None:
        """Notes that the step is done."""
        if self._running is None:
            return
        self._replayed.append(self._running)
        self._running = None
        self._last = training.leaves(state)
        self._step_seconds.append(seconds)

    def _forget(self) -> None:
        self._snapshots.clear()
        self._replayed.clear()
        self._running = None
        self._last = []

    def _replaced(
        self, training: Training, leaves: Sequence[Any]
    ) -> Mapping[int, np.ndarray] | None:
        """Leaves that others have set since the last step; None if this process cannot read all of
        them, or if the state is another one."""
        if len(leaves) != len(self._last):
            return None
        copies: dict[int, np.ndarray] = {}
        for number, (leaf, last) in enumerate(zip(leaves, self._last, strict=True)):
            if leaf is last:
                continue
            copy = training.own_copy(leaf)
            if copy is None:
                return None
            copies[number] = copy
        return copies

    # --------------------------------------------------------------------------------- snapshots

    def snapshot_at(self, step: int) -> None:
        """Takes a snapshot before a step, and takes in who is back; all processes call it alike."""
        self._next_snapshot = step

    def _fits(self, training: Training, leaves: Sequence[Any]) -> bool:
        """Whether snapshots fit in memory, the same in all processes; says so if not."""
        state_bytes = sum(int(leaf.nbytes) for leaf in leaves)
        self._batch_room = max(LEAST_BATCH_BYTES, state_bytes)
        needed = (KEPT + 1) * state_bytes + self._batch_room
        free = free_memory_bytes() // len(training.group.alive)
        answers = training.group.exchanged("memory for snapshots", str(free))
        least = min(map(int, answers))
        if needed <= least:
            return True
        self._refusal = (
            f"snapshots do not fit in memory: each of {len(answers)} processes needs "
            f"{format_bytes(needed)}, and has {format_bytes(least)} free, so a lost process ends "
            "the run. Add --restarts 3, which saves on the disk."
        )
        figures = {"needed_bytes": needed, "free_bytes": least}
        self._decide(training, Decision(training.step, "stay", self._refusal, figures))
        return False

    def _take(
        self, training: Training, key: Hashable, state: Any, batch: Any, is_new: bool
    ) -> None:
        """Takes a snapshot, and sets the step of the next one; a new state makes older ones
        useless. A LostProcessError leads to `lost` where a process that is back is taken in."""
        start = time.monotonic()
        snapshot = Snapshot(training.step, training.to_host(state))
        seconds = time.monotonic() - start
        steps = self._interval(training, seconds, batch)
        can_grow = training.can_grow and not training.is_evaluation(key)
        event = training.group.returned() if can_grow else 0
        message = json.dumps([steps, event, self._found(training)])
        answers = [json.loads(text) for text in training.group.exchanged("snapshot", message)]
        self._agree(training, answers[0][2])
        if is_new:
            self._forget()
        self._snapshots.append(snapshot)
        self._taken += 1
        self._next_snapshot = training.step + max(steps for steps, *_ in answers)
        while self._replayed and self._replayed[0].step < self._snapshots[0].step:
            self._replayed.popleft()
        event = min(event for _, event, _ in answers)
        if event and training.plan is not None:
            self._growth = Growth(key, event)
            raise LostProcessError("A process that was started again is taken in.")

    def _interval(self, training: Training, seconds: float, batch: Any) -> int:
        """Steps to the next snapshot, by the time that this one has taken."""
        if self._taken < UNTIMED or not self._step_seconds:
            return FIRST_INTERVAL
        steps = math.ceil(min(PACE * seconds, LONGEST) / max(self._median_step(), 1e-6))
        batch_bytes = sum(leaf.nbytes for leaf in training.leaves(batch) if not is_view(leaf))
        return max(1, min(steps, self._batch_room // (KEPT * max(1, batch_bytes))))

    def _median_step(self) -> float:
        """Seconds of a step."""
        ordered = sorted(self._step_seconds)
        return ordered[len(ordered) // 2]

    def _can_sum(self, arrays: Sequence[Any]) -> bool:
        """Whether a step lasts long enough for a sum of all values in the views of its batch."""
        if not self._step_seconds:
            return True
        nbytes = sum(view.nbytes for view in filter(is_view, arrays))
        return nbytes <= SUM_SHARE * SUM_SPEED * self._median_step()

    # -------------------------------------------------------------------------------------- loss

    def lost(self, training: Training, state: Any, error: LostProcessError) -> Any:
        """The state before the interrupted step, in the live processes.

        Another loss meanwhile begins it again.
        """
        start = time.monotonic()
        growth, self._growth = self._growth, None
        if growth is not None:
            try:
                return self._grown(training, state, growth)
            except LostProcessError as another:
                error = another
        causes: dict[int, str] = {}
        while True:
            causes.update(training.group.leave_lost(WORD_SECONDS))
            if self._refusal or training.group.alive == self._alive:
                silence = f"the launcher has named no lost process in {WORD_SECONDS:.0f} s."
                raise LostProcessError(f"{error} Reason: {self._refusal or silence}")
            self._alive = training.group.alive
            try:
                state, snapshot_step, count = self._recovered(training, state)
            except LostProcessError as another:
                error = another
                continue
            seconds = time.monotonic() - start
            decision = shrink_decision(training, causes, snapshot_step, count, seconds)
            self._decide(training, decision)
            return state

    def _recovered(self, training: Training, state: Any) -> tuple[Any, int, int]:
        """(state, step of the snapshot, steps that were run again)."""
        leaves = training.leaves(state)
        running = self._running
        self._running = None
        replaced = running.replaced if running else self._replaced(training, leaves)
        if not self._snapshots:
            self._snapshots.extend(self._own_snapshot(training, leaves))
        elif replaced is None:
            raise ProcessError(
                "A process was lost just after the script had set split variables, so the others "
                "cannot go on. Start again from the last save, or add --restarts 3."
            )
        step = self._agreed_step(training)
        while self._snapshots[-1].step > step:
            self._snapshots.pop()
        steps = [each for each in self._replayed if each.step >= step]
        check_unchanged(training, steps)
        training.change_members(self._planner(training))
        # Gloo waits 30 s for the others of a new group, who may compile longer than this one.
        training.group.exchanged("survivors' program", "")
        state = training.with_leaves(state, self._snapshots[-1].leaves)
        for each in steps:
            state = with_replaced(training, state, each.replaced)
            _, state = training.execute(each.key, state, each.batch)
        self._last = training.leaves(state)
        self._begin_again(training)
        return with_replaced(training, state, replaced or {}), step, len(steps)

    def _grown(self, training: Training, state: Any, growth: Growth) -> Any:
        """The state for all processes that are there after an event, of the snapshot that was just
        taken."""
        start = time.monotonic()
        assert training.plan is not None
        before = set(training.group.alive)
        devices = training.group.devices_of(training.group.alive_after(growth.event))
        plan = self._planner(training)(training.graph(growth.key), training.plan, devices)
        leaves = self._snapshots[-1].leaves
        training.grow(growth.event, plan, leaves)
        state = training.with_leaves(state, leaves)
        # The others begin here, and all do alike.
        self._forget()
        self._begin_again(training)
        self._taken = 0
        self._alive = training.group.alive
        back = sorted(set(self._alive) - before)
        self._decide(training, grow_decision(training, back, time.monotonic() - start))
        return state

    def _own_snapshot(self, training: Training, leaves: Sequence[Any]) -> list[Snapshot]:
        """A snapshot of a state that this process has whole, as before the first step."""
        copies = [training.own_copy(leaf) for leaf in leaves]
        arrays = [copy for copy in copies if copy is not None]
        return [Snapshot(training.step, arrays)] if len(arrays) == len(copies) else []

    def _agreed_step(self, training: Training) -> int:
        """The step of the last snapshot that all have; they take the next one at the same step."""
        own = [snapshot.step for snapshot in self._snapshots]
        answers = training.group.exchanged("recovery", json.dumps([training.step, own]))
        pairs = [json.loads(answer) for answer in answers]
        self._next_snapshot = max(step for step, _ in pairs) + 1
        self._taken = 0
        common = set(own).intersection(*(steps for _, steps in pairs))
        if not common:
            raise ProcessError(
                "The processes that are left have no snapshot in common, so they cannot go on. "
                "Start again from the last save, or add --restarts 3."
            )
        return max(common)

    # ------------------------------------------------------------------------------------- plans

    def _prepare(self, training: Training, key: Hashable) -> None:
        """Compiles for the loss of any one process: before the first step if that is to be ready;
        later, or where it is free, beside the training."""
        if training.plan is None:
            return
        if self.is_ready and training.step == 0:
            try:
                training.prepare(key, self._planner(training))
            except LostProcessError:
                raise
            except PartitaError as error:
                self._say_end(training, error)
        elif (self.is_ready or training.host_is_idle) and training.group.is_first:
            self._search(training, key)

    def _search(self, training: Training, key: Hashable) -> None:
        """Begins to search plans for the loss of any one process, beside the training."""
        plan = training.plan
        assert plan is not None
        alive = training.group.alive
        for process in alive:
            devices = training.group.devices_of([other for other in alive if other != process])
            if devices == 0:
                continue
            known = self._known_plan(plan, devices)
            if known:
                training.table.make(("search", devices), lambda known=known: known)
            else:
                machine = training.machine(devices)
                search = partial(_searched_plan, training.graph(key), plan, machine)
                training.table.begin(("search", devices), search)
            self._searched.add(devices)

    def _found(self, training: Training) -> dict[str, str]:
        """Number of devices -> plan, once all searches are done, for the others to know."""
        searched = sorted(self._searched)
        if not all(training.table.is_done(("search", devices)) for devices in searched):
            return {}
        self._searched.clear()
        return {str(devices): training.table.get(("search", devices)) for devices in searched}

    def _agree(self, training: Training, found: Mapping[str, str]) -> None:
        """Notes plans that the first process has found, and compiles them beside the training."""
        if not found or training.plan is None:
            return
        for devices, text in found.items():
            self._plans[_key(training.plan, int(devices))] = text
        for key in self._prepared:
            try:
                training.prepare(key, self._agreed_plan, beside=True)
            except PartitaError as error:
                self._say_end(training, error)

    def _agreed_plan(self, graph: OperatorGraph, plan: Plan, devices: int) -> Plan:
        """The plan for fewer devices that all processes know."""
        text = self._plans.get(_key(plan, devices))
        return _read_plan(text or json.dumps({"error": f"no plan for {devices} devices is known"}))

    def _say_end(self, training: Training, error: PartitaError) -> None:
        sentence = f"a lost process ends the run: {error}"
        self._decide(training, Decision(training.step, "stay", sentence))

    def _begin_again(self, training: Training) -> None:
        """Prepares for losses anew: there are other processes, or another plan."""
        self._prepared_plan = training.plan
        self._prepared.clear()
        self._searched.clear()

    def _planner(self, training: Training) -> PlanFor:
        """Plans for fewer devices as the first live process does, which tells the others."""

        def plan_for(graph: OperatorGraph, plan: Plan, devices: int) -> Plan:
            text = ""
            if training.group.is_first:
                # A machine with a process that is back is not there before its plan is.
                known = self._known_plan(plan, devices)
                text = known or _searched_plan(graph, plan, training.machine(devices))
            text = training.group.exchanged(f"plan for {devices} devices", text)[0]
            self._plans[_key(plan, devices)] = text
            return _read_plan(text)

        return plan_for

    def _known_plan(self, plan: Plan, devices: int) -> str:
        """The plan for a number of devices, as JSON, if it was used or agreed on before; else
        empty."""
        if devices in self._used:
            return json.dumps(self._used[devices].to_json())
        return self._plans.get(_key(plan, devices), "")

    def _decide(self, training: Training, decision: Decision) -> None:
        if training.group.is_first:
            self.log.add(decision)


def _key(plan: Plan, devices: int) -> tuple[int, str]:
    """The key of the plan for a number of devices after another plan."""
    return devices, json.dumps(plan.to_json())


def _searched_plan(graph: OperatorGraph, plan: Plan, machine: Machine) -> str:
    """The plan for fewer devices, or the reason why there is none, as JSON."""
    try:
        return json.dumps(survivor_plan(graph, plan, machine).to_json())
    except PartitaError as error:
        return json.dumps({"error": str(error)})


def _read_plan(text: str) -> Plan:
    """The plan of a JSON text; MemoryBudgetError with the reason in place of one."""
    answer = json.loads(text)
    if "error" in answer:
        raise MemoryBudgetError(answer["error"])
    return Plan.from_json(answer)


def is_view(leaf: Any) -> bool:
    """Whether an array shows another one's memory."""
    return isinstance(leaf, np.ndarray) and leaf.base is not None


def fingerprint_of(arrays: Sequence[Any], is_summed: bool) -> list[bytes]:
    """About SAMPLES values of each view among the arrays of a batch, and the sum of its words.

    A sum shows a change of any one value; samples show values in another order.

    >>> batch = np.arange(999.0)[:500]
    >>> before = fingerprint_of([batch], is_summed=True)
    >>> batch[13] += 1
    >>> before == fingerprint_of([batch], is_summed=True)
    False
    """
    fingerprint = []
    for view in filter(is_view, arrays):
        values = view.reshape(-1)
        fingerprint.append(values[:: max(1, view.size // SAMPLES)].tobytes())
        if is_summed:
            octets = values.view(np.uint8)
            end = len(octets) // 8 * 8
            fingerprint.append(octets[:end].view(np.uint64).sum().tobytes())
            fingerprint.append(octets[end:].tobytes())
    return fingerprint


def check_unchanged(training: Training, steps: Sequence[Replayed]) -> None:
    """ProcessError if a batch that was kept without a copy has changed."""
    for each in steps:
        fingerprint = fingerprint_of(training.leaves(each.batch), each.is_summed)
        if fingerprint != each.fingerprint:
            raise ProcessError(
                "A process was lost, and a callback has changed arrays that 'fit' trains on, so "
                f"the batch of step {each.step} cannot be run again. Start again from the last "
                "save, or give 'fit' a generator or shuffle=True: their batches are copies."
            )


def with_replaced(training: Training, state: Any, replaced: Mapping[int, np.ndarray]) -> Any:
    """A state with other arrays for some of its leaves."""
    if not replaced:
        return state
    leaves = training.leaves(state)
    for number, leaf in replaced.items():
        leaves[number] = leaf
    return training.with_leaves(state, leaves)


def shrink_decision(
    training: Training, causes: Mapping[int, str], snapshot_step: int, count: int, seconds: float
) -> Decision:
    """The decision to go on without lost processes, once it has been carried out."""
    alive = training.group.alive
    lost = "; ".join(f"process {number} {cause}" for number, cause in sorted(causes.items()))
    devices = training.group.devices_of(alive)
    plan = f"{training.plan.name} over" if training.plan is not None else "planned anew for"
    plan = f"{plan} {devices} device{'s' if devices > 1 else ''}"
    again = f"{count} step{'s' if count != 1 else ''} run again"
    sentence = (
        f"{lost}; {listed(sorted(alive))} go{'es' if len(alive) == 1 else ''} on after "
        f"{format_seconds(seconds)}, {plan}, {again} from the snapshot of step {snapshot_step}"
    )
    figures = {
        "lost": sorted(causes),
        "alive": list(alive),
        "devices": devices,
        "snapshot_step": snapshot_step,
        "steps_again": count,
        "seconds": seconds,
    }
    return Decision(training.step, "shrink", sentence, figures)


def grow_decision(training: Training, back: Sequence[int], seconds: float) -> Decision:
    """The decision to take processes in that are back, once it has been carried out."""
    alive = training.group.alive
    devices = training.group.devices_of(alive)
    assert training.plan is not None
    sentence = (
        f"{listed(back)} {'are' if len(back) > 1 else 'is'} back; {listed(sorted(alive))} go on "
        f"after {format_seconds(seconds)}, {training.plan.name} over {devices} devices"
    )
    figures = {"back": list(back), "alive": list(alive), "devices": devices, "seconds": seconds}
    return Decision(training.step, "grow", sentence, figures)


def listed(processes: Sequence[int]) -> str:
    """Processes as a phrase.

    >>> listed([2]), listed([0, 1, 3])
    ('process 2', 'processes 0, 1 and 3')
    """
    *others, last = map(str, processes)
    return f"processes {', '.join(others)} and {last}" if others else f"process {last}"

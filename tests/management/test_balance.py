"""Balance shifts work away from a slow process once, back when it is not, and says why."""

import json
import math
import threading
import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from partita.errors import PlanError
from partita.management import balance as module
from partita.management.balance import Balance
from partita.management.decisions import Decision, DecisionLog
from partita.management.monitor import ThreadClock, ThreadTimes
from partita.management.policies.waiting import Slowdown, WaitingPolicy
from partita.management.program_table import ProgramTable
from partita.management.shares import relative_seconds
from partita.plans.plan import Mesh, Plan

EVEN = (4, 4, 4, 4)


class Log(DecisionLog):
    """Keeps decisions."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "decisions", [])

    def add(self, decision: Decision) -> None:
        vars(self)["decisions"].append(decision)


class Clock(ThreadClock):
    """The times of the first process."""

    def lap(self) -> ThreadTimes:
        return ThreadTimes(0.05, 0.01)


class Group:
    """Two processes with two devices each; the speed of the second one changes."""

    alive: tuple[int, ...] = (0, 1)
    is_first = True
    speed = 1.0

    def __init__(self) -> None:
        self.stretches: list[float] = []
        """Of the second process, since the last exchange."""

    def exchanged(self, name: str, value: str) -> list[str]:
        if name != "balance":
            return [value, ""]
        laps = []
        for (seconds, _, _), stretch in zip(json.loads(value)["laps"], self.stretches, strict=True):
            laps.append([seconds, 0.05, 0.05 * (stretch - 1)])
        self.stretches = []
        return [value, json.dumps({**json.loads(value), "laps": laps})]


class Training:
    """A training whose steps take as long as the slowest device needs, and a fixed part."""

    name = "model"
    compile_seconds = 0.5
    plan: Plan | None = Plan("model", "host", Mesh.of((2, 2)), {})

    def __init__(self, refusal: str = "") -> None:
        self.group: Any = Group()
        self.step = 0
        self.refusal = refusal
        self.shares: tuple[int, ...] | None = None
        self.is_prepared = False
        self.is_compiled = False
        """Whether the program for shares is compiled beside the training."""
        self.table = ProgramTable()
        self.host_is_idle = False
        self.prepared: list[Plan] = []

    def graph(self, key: Hashable) -> str:
        return "graph"

    def machine(self) -> str:
        return "machine"

    def prepare_plan(self, key: Hashable, plan: Plan) -> None:
        self.prepared.append(plan)

    def begin_shares(self, key: Hashable) -> bool:
        return self.is_compiled

    def device_processes(self, key: Hashable) -> tuple[int, ...]:
        return (0, 0, 1, 1)

    def has_shares(self, key: Hashable) -> bool:
        return self.is_prepared

    def prepare_shares(self, key: Hashable) -> int:
        if self.refusal:
            raise PlanError(self.refusal)
        self.is_prepared = True
        return 16

    def change_shares(self, shares: Sequence[int] | None) -> None:
        self.shares = None if shares is None else tuple(shares)

    @property
    def seconds(self) -> float:
        speeds = (1.0, 1.0, self.group.speed, self.group.speed)
        return 0.09 * relative_seconds(self.shares or EVEN, speeds) + 0.01

    def run(self, balance: Balance, steps: int) -> None:
        for _ in range(steps):
            balance.before_step(self, "key", None, None)  # type: ignore[arg-type]
            seconds = self.seconds
            self.step += 1
            self.group.stretches.append(1.2 / self.group.speed)
            balance.after_step(self, "key", None, None, seconds)  # type: ignore[arg-type]


def balance(
    acts: bool = True, ready: bool = True, policy: WaitingPolicy | None = None
) -> tuple[Balance, list[Decision]]:
    log = Log()
    return Balance(log, acts, ready, Clock(), policy), vars(log)["decisions"]


@pytest.fixture(autouse=True)
def searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search for slow links finds a plan by another name."""
    monkeypatch.setattr(
        module, "plan_for_slow_links", lambda graph, machine, plan: replace(plan, name="slow links")
    )


def test_work_moves_away_from_a_slow_process_and_back():
    training = Training()
    manager, decisions = balance()
    training.run(manager, 40)
    assert [decision.action for decision in decisions] == ["prepare"]
    training.group.speed = 0.25
    training.run(manager, 10)
    assert training.shares == (7, 7, 1, 1)
    training.run(manager, 30)
    moved = next(decision for decision in decisions if decision.action == "shares")
    assert moved.step <= 50
    assert "process 1 is 4.0 x slower than the others; shares even -> 14:2, 2.3 x" in str(moved)
    assert str(moved).endswith("x faster")
    measured = next(decision for decision in decisions if decision.action == "measured")
    assert measured.sentence == "steps are 2.2 x faster with these shares"
    training.group.speed = 1.0
    training.run(manager, 20)
    assert training.shares is None
    assert "all processes are at full speed again; shares 14:2 -> even, costs nothing" in str(
        decisions[-1]
    )
    training.run(manager, 200)
    assert len(decisions) == 4


class Waits(WaitingPolicy):
    """Notes the slow times that it is asked about, and waits as it is told."""

    name = "waits"
    seconds = math.inf

    def __init__(self) -> None:
        self.asked: list[Slowdown] = []

    def wait(self, slowdown: Slowdown) -> float:
        self.asked.append(slowdown)
        return self.seconds


def test_after_a_loss_shares_are_compiled_beside_the_training_and_used_once_all_have_them():
    training = Training()
    manager, decisions = balance()
    training.run(manager, 10)
    training.is_prepared = False
    training.group.alive, training.group.stretches = (1, 0), []
    training.run(manager, 20)
    assert [decision.action for decision in decisions] == ["prepare"]
    training.is_compiled = True
    training.run(manager, 10)
    assert [decision.action for decision in decisions] == ["prepare", "prepare"]
    assert decisions[1].sentence.endswith("16 microbatches (compiled beside the training)")


def test_nobody_is_slow_while_a_thread_compiles_beside_the_training():
    training = Training()
    manager, decisions = balance()
    training.run(manager, 20)
    may_end = threading.Event()
    training.table.begin("program", lambda: may_end.wait(10))
    training.group.speed = 0.25
    training.run(manager, 60)
    assert [decision.action for decision in decisions] == ["prepare"]
    may_end.set()
    training.table.get("program")
    while training.table.is_working:
        time.sleep(0.001)
    training.run(manager, 60)
    assert training.shares == (7, 7, 1, 1)


def test_a_plan_is_searched_soon_after_links_have_slowed_down(monkeypatch: pytest.MonkeyPatch):
    begun: list[int] = []
    monkeypatch.setattr(Training, "seconds", property(lambda self: self.link_seconds + 0.01))
    monkeypatch.setattr(
        module.Replanner, "begin", lambda self, situation, table: begun.append(training.step)
    )
    training = Training()
    training.link_seconds = 0.1  # type: ignore[attr-defined]
    manager, _ = balance()
    training.run(manager, 60)
    assert not begun
    training.link_seconds = 0.5  # type: ignore[attr-defined]
    training.run(manager, 60)
    # Five steps to the next exchange, five in which a slow process may be named.
    assert len(begun) == 1 and begun[0] <= 71


def test_a_plan_for_slow_links_is_prepared_once():
    training = Training()
    training.host_is_idle = True
    manager, _ = balance()
    while not training.prepared and training.step < 10_000:
        training.run(manager, 50)
    training.run(manager, 400)
    assert [plan.name for plan in training.prepared] == ["slow links"]
    training = Training()
    manager, _ = balance()
    training.run(manager, 400)
    assert training.prepared == []


def test_a_program_that_is_not_ready_is_compiled_after_the_wait_of_the_policy():
    training = Training()
    policy = Waits()
    manager, decisions = balance(ready=False, policy=policy)
    training.run(manager, 40)
    training.group.speed = 0.25
    training.run(manager, 30)
    assert not decisions and not training.is_prepared
    slowdown = policy.asked[-1]
    assert slowdown.change_seconds == 0.5
    assert slowdown.seconds / slowdown.best_seconds == pytest.approx(16 / 7)
    policy.seconds = 0.0
    training.run(manager, 10)
    assert [decision.action for decision in decisions[:2]] == ["prepare", "shares"]
    training.group.speed = 1.0
    training.run(manager, 30)
    training.group.speed = 0.25
    training.run(manager, 30)
    assert training.shares == (7, 7, 1, 1)
    assert len(policy.asked) < 30  # a program that is there needs no wait


def test_watching_says_once_what_it_would_do():
    training = Training()
    manager, decisions = balance(acts=False)
    training.group.speed = 0.25
    training.run(manager, 60)
    assert training.shares is None and not training.is_prepared
    (decision,) = decisions
    assert "would change shares even -> 14:2, 2.3 x faster" in decision.sentence


def test_a_step_without_shares_is_refused_once_with_its_reason():
    training = Training("'norm' computes a sample with values of the others.")
    manager, decisions = balance()
    training.group.speed = 0.25
    training.run(manager, 60)
    first, second = (decision.sentence for decision in decisions)
    assert (
        first == "work cannot move between processes: 'norm' computes a sample with values "
        "of the others."
    )
    assert second == "process 1 is 4.0 x slower than the others; its work cannot move"


class Unmoved(Training):
    """A training that no change makes faster."""

    @property
    def seconds(self) -> float:
        return 0.1


def test_a_gain_that_does_not_come_is_predicted_smaller_and_then_not_tried():
    training = Unmoved()
    manager, decisions = balance()
    for _ in range(10):
        training.group.speed = 0.25
        training.run(manager, 40)
        training.group.speed = 1.0
        training.run(manager, 40)
    gains = [d.figures["corrected_gain"] for d in decisions if "slower" in d.sentence]
    assert gains == sorted(gains, reverse=True)
    assert 1 < len(gains) < 10


@pytest.mark.parametrize("alive", [(0,), (1,)])
def test_one_process_has_nobody_to_share_with(alive: tuple[int, ...]):
    training = Training()
    training.group.alive = alive
    manager, decisions = balance()
    training.run(manager, 20)
    assert not decisions

"""Survival by hand: a training of one number, its processes played by the test."""

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partita.errors import LostProcessError, MemoryBudgetError, ProcessError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.management import survival
from partita.management.decisions import Decision, DecisionLog
from partita.management.program_table import ProgramTable
from partita.management.survival import Survival, listed
from partita.management.survivor_plans import survivor_plan
from partita.plans.baselines import data_parallel, zero
from partita.plans.plan import Plan
from partita.search.find import RESERVE, find, fits, mesh_of
from partita.simulation.simulate import predicted

DATA = Path(__file__).parents[1] / "data"


@dataclass
class PlayedGroup:
    """Three processes; the others have the snapshots of this one, unless the test says otherwise."""

    alive: tuple[int, ...] = (0, 1, 2)
    is_first: bool = True
    news: dict[int, str] = field(default_factory=dict)
    others_lack: Callable[[int], bool] = lambda step: False

    def devices_of(self, processes: Sequence[int]) -> int:
        return len(processes)

    def exchanged(self, name: str, value: str) -> list[str]:
        other = value
        if name == "recovery":
            step, snapshots = json.loads(value)
            other = json.dumps([step, [each for each in snapshots if not self.others_lack(each)]])
        return [value] + [other] * (len(self.alive) - 1)

    def leave_lost(self, seconds: float) -> dict[int, str]:
        news, self.news = self.news, {}
        self.alive = tuple(number for number in self.alive if number not in news)
        return news

    def returned(self) -> int:
        return 0

    def has_news(self) -> bool:
        return bool(self.news)


class PlayedTraining:
    """Each step multiplies a number and adds the batch; a step may lose a process midway."""

    name = "played"
    plan: Any = None
    can_grow = False
    host_is_idle = False
    graph: Any
    machine: Any
    table: Any
    prepare: Any

    def is_evaluation(self, key: Any) -> bool:
        return False

    def __init__(self) -> None:
        self.step = 0
        self.group = PlayedGroup()
        self.lost_at: list[int] = []

    def change_members(self, plan_for: Any) -> None:
        pass

    def execute(self, key: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        if self.lost_at and self.lost_at[0] == self.step:
            self.lost_at.pop(0)
            self.group.news = {self.group.alive[-1]: "was killed (SIGKILL)"}
            state[0][:] = np.nan
            raise LostProcessError("lost")
        return None, [state[0] * 0.5 + batch, state[1] + 1.0]

    def leaves(self, state: Any) -> list[Any]:
        return list(state) if isinstance(state, list) else [state]

    def with_leaves(self, state: Any, leaves: Sequence[Any]) -> Any:
        return [np.array(leaf) for leaf in leaves]

    def to_host(self, state: Any) -> list[np.ndarray]:
        return [np.array(leaf) for leaf in state]

    def own_copy(self, leaf: Any) -> np.ndarray:
        return np.array(leaf)

    def batch_copy(self, batch: Any) -> Any:
        return np.array(batch)

    def run(self, manager: Survival, state: Any, batch: Any) -> Any:
        """A step as `execute.steps.StepRunner` runs it."""
        while True:
            try:
                manager.before_step(self, "key", state, batch)  # type: ignore[arg-type]
                _, state = self.execute("key", state, batch)
            except LostProcessError as error:
                state = manager.lost(self, state, error)  # type: ignore[arg-type]
                continue
            self.step += 1
            manager.after_step(self, "key", state, batch, 0.01)  # type: ignore[arg-type]
            return state


def train(training: PlayedTraining, manager: Survival, steps: int = 60) -> list[float]:
    """The numbers after each step; every seventh step begins with a number that a callback sets."""
    state = [np.zeros(1), np.zeros(1)]
    numbers = []
    for step in range(steps):
        if step % 7 == 3:
            state = [state[0], np.full(1, 100.0 * step)]
        state = training.run(manager, state, np.full(1, float(step)))
        numbers.append(float(state[0][0] + state[1][0]))
    return numbers


@pytest.mark.parametrize("seed", range(8))
def test_a_training_that_loses_processes_has_the_numbers_of_one_that_does_not(seed: int) -> None:
    straight = train(PlayedTraining(), Survival(DecisionLog()))
    training = PlayedTraining()
    draw = random.Random(seed)
    training.lost_at = sorted(draw.sample(range(60), 2))
    said: list[str] = []
    assert train(training, Survival(DecisionLog(said.append))) == straight
    assert training.group.alive == (0,)
    assert len(said) == 2 and "for 1 device, " in said[1]


def test_the_survivors_take_the_snapshot_that_all_of_them_have() -> None:
    straight = train(PlayedTraining(), Survival(DecisionLog()))
    training = PlayedTraining()
    training.lost_at = [21]
    training.group.others_lack = lambda step: step == 20
    said: list[str] = []
    assert train(training, Survival(DecisionLog(said.append))) == straight
    assert "11 steps run again from the snapshot of step 10" in said[0]


def machine_of(devices: int, memory_bytes: int | None = None) -> Machine:
    machine = load("h100:4").with_devices(devices)
    if memory_bytes is None:
        return machine
    return machine.revised({"device.memory.hbm.capacity": memory_bytes}, "a test", "assumed")


def test_survivors_keep_an_expert_plan_and_search_another_one_for_a_found_one() -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    expert = zero(1)(graph, "h100:4", mesh_of(machine_of(4)))
    assert survivor_plan(graph, expert, machine_of(2)).name == expert.name
    assert survivor_plan(graph, expert, machine_of(1)).mesh.axes == ()
    found = find(graph, machine_of(4)).plan
    chosen = survivor_plan(graph, replace(found, name="found"), machine_of(2))
    seconds = predicted(graph, machine_of(2), chosen).seconds
    same = data_parallel(graph, "h100:2", mesh_of(machine_of(2)))
    assert chosen.devices == 2 and seconds <= predicted(graph, machine_of(2), same).seconds


def test_survivors_split_weights_that_do_not_fit_whole() -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    plan = data_parallel(graph, "h100:4", mesh_of(machine_of(4)))
    whole = predicted(graph, machine_of(2), data_parallel(graph, "h100:2", mesh_of(machine_of(2))))
    small = machine_of(2, int(0.985 * whole.peak_bytes / (1 - RESERVE)))
    chosen = survivor_plan(graph, plan, small)
    assert chosen.devices == 2 and fits(small, predicted(graph, small, chosen))
    with pytest.raises(MemoryBudgetError, match=r"the smallest needs .* and a device has 1\.0 KiB"):
        survivor_plan(graph, plan, machine_of(2, 1024))


@pytest.mark.parametrize("column", [0, 150])
def test_batches_that_a_callback_has_changed_are_not_run_again(column: int) -> None:
    data = np.arange(60.0 * 300).reshape(60, 300)
    training = PlayedTraining()
    training.batch_copy = lambda batch: batch  # type: ignore[method-assign]
    manager = Survival(DecisionLog())
    state = [np.zeros(1), np.zeros(1)]
    training.lost_at = [18]
    sentence = r"changed arrays that 'fit' trains on, so the batch of step 15 cannot be run again\."
    with pytest.raises(ProcessError, match=sentence):
        for step in range(20):
            data[15, column] += step == 17
            state = training.run(manager, state, data[step])


def test_views_are_summed_where_that_takes_a_small_part_of_a_step() -> None:
    data = np.zeros((8, 2**17))
    manager = Survival(DecisionLog())
    # 64 KiB in a step of 10 ms, then 1 MiB
    training = PlayedTraining()
    training.batch_copy = lambda batch: batch  # type: ignore[method-assign]
    state = [np.zeros(2**13), np.zeros(1)]
    for batch in (data[0, : 2**13], data[0, : 2**13], data[1], data[2, : 2**13]):
        state = [np.zeros(batch.shape), state[1]]
        state = training.run(manager, state, batch)
    assert [each.is_summed for each in manager._replayed][-3:] == [True, False, True]


def test_without_a_common_snapshot_the_run_ends_with_a_sentence() -> None:
    training = PlayedTraining()
    training.lost_at = [21]
    training.group.others_lack = lambda step: True
    with pytest.raises(ProcessError, match=r"no snapshot in common, .* or add --restarts 3\.$"):
        train(training, Survival(DecisionLog()))


def test_snapshots_that_do_not_fit_are_refused_with_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(survival, "free_memory_bytes", lambda: 3 * 2**20)
    training = PlayedTraining()
    training.lost_at = [5]
    log = DecisionLog(None, tmp_path / "decisions.jsonl")
    with pytest.raises(LostProcessError, match=r"^lost Reason: snapshots do not fit in memory"):
        train(training, Survival(log))
    (line,) = (tmp_path / "decisions.jsonl").read_text().splitlines()
    decision = json.loads(line)
    assert decision["action"] == "stay" and decision["free_bytes"] == 2**20
    assert decision["sentence"] == (
        "snapshots do not fit in memory: each of 3 processes needs 64.0 MiB, and has 1.0 MiB "
        "free, so a lost process ends the run. Add --restarts 3, which saves on the disk."
    )


def test_a_file_of_decisions_that_cannot_be_written_is_given_up(tmp_path: Path) -> None:
    said: list[str] = []
    file = tmp_path / "removed" / "decisions.jsonl"
    log = DecisionLog(said.append, file)
    for step in range(2):
        log.add(Decision(step, "stay", "nothing to do"))
    reason = f"'{file}' takes no more decisions: No such file or directory. They are printed only."
    assert said == ["step 0: nothing to do", reason, "step 1: nothing to do"]


def test_snapshots_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(survival.time, "monotonic", lambda: clock[0])
    training = PlayedTraining()
    taken: list[int] = []

    def to_host(state: Any) -> list[np.ndarray]:
        taken.append(training.step)
        clock[0] += 0.004
        return [np.array(leaf) for leaf in state]

    monkeypatch.setattr(training, "to_host", to_host)
    train(training, Survival(DecisionLog()), steps=900)
    # 0.004 s in 400 steps of 0.01 s
    assert taken == [0, 10, 20, 30, 430, 830]


def machine_plan(devices: int) -> Plan:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    return data_parallel(graph, f"h100:{devices}", mesh_of(machine_of(devices)))


def test_plans_for_losses_are_searched_beside_the_training_and_agreed_on() -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    training = PlayedTraining()
    training.plan = zero(1)(graph, "h100:4", mesh_of(machine_of(4)))
    training.host_is_idle = True
    training.graph = lambda key: graph
    training.machine = machine_of
    training.table = ProgramTable()
    prepared: dict[int, list[str]] = {}

    def prepare(key: Any, plan_for: Any, beside: bool) -> None:
        assert beside
        plan = plan_for(graph, training.plan, 2)
        prepared.setdefault(training.step, []).append(plan.name)

    training.prepare = prepare
    survival = Survival(DecisionLog())
    train(training, survival, 10)
    while not training.table.is_done(("search", 2)):
        time.sleep(0.005)
    assert prepared == {}
    train(training, survival, 11)
    # With the first snapshot after the search; no plan is searched twice.
    assert prepared == {10: ["ZeRO-1"]}
    # The plan of before a loss is known where a process is back: nobody looks at its machine.
    training.machine = None
    back = survival._planner(training)(graph, machine_plan(2), 3)  # type: ignore[arg-type]
    assert back == training.plan
    (devices, before), text = next(iter(survival._plans.items()))
    assert devices == 2 and Plan.from_json(json.loads(before)) == training.plan
    assert Plan.from_json(json.loads(text)).devices == 2


def test_results_are_made_in_turn_and_forgotten_where_they_are_of_no_use() -> None:
    table = ProgramTable()
    begun, may_end = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        may_end.wait(10)
        return "slow"

    table.begin("slow", slow)
    table.begin("next", lambda: "never")
    table.begin("useless", lambda: "never")
    begun.wait(10)
    # The thread has not reached it, so the caller makes it.
    assert table.get("next") is None and table.get("unknown") is None
    table.make("next", lambda: "now")
    table.keep(lambda key: key != "useless")
    assert not table.is_done("slow")
    may_end.set()
    assert table.get("slow") == "slow" and table.get("next") == "now"
    assert table.get("useless") is None


def test_processes_as_a_phrase() -> None:
    assert listed((0, 2)) == "processes 0 and 2"

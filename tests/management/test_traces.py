"""Traces and replays: hand-worked examples, laws, and sentences."""

import json
import math
from pathlib import Path

import pytest

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.management.plan_table import PlanTable, in_state, plan_table
from partita.management.policies.at_once import AtOnce
from partita.management.policies.names import chosen_names
from partita.management.policies.never import Never
from partita.management.policies.rule import Rule, learned_wait
from partita.management.policies.waiting import Slowdown
from partita.management.replay import WAITING, Prices, clairvoyant, replay
from partita.management.traces import Event, MachineState, Trace, load_trace, slow_downs

GRAPH = OperatorGraph.load(Path(__file__).parents[1] / "data" / "mlp.graph.json")
SLOW = MachineState(slow=((0, 0.5),))
TABLE = PlanTable(
    {},
    {MachineState(): {"all": 1.0, "fewer": 1.25}, SLOW: {"all": 2.0, "fewer": 1.25}},
)
PRICES = Prices(compile=9.0, move=1.0, restart=0.0)


def one_slowdown(length: float) -> Trace:
    return slow_downs([length], [100.0], device=0, factor=0.5)


def test_never_pays_the_whole_slow_time_and_at_once_the_price() -> None:
    """100 s before and after; 100 s at half speed, or a change of 10 s and back of 1 s."""
    trace = one_slowdown(100.0)
    assert replay(trace, TABLE, Never(), PRICES).steps == pytest.approx(100 + 50 + 100)
    at_once = replay(trace, TABLE, AtOnce(), PRICES)
    assert at_once.steps == pytest.approx(100 + 90 / 1.25 + 99)
    assert [change.price for change in at_once.changes] == [10.0, 1.0]
    assert str(at_once.changes[0]) == "100 s: device 0 at 50%: 1.60 x faster; fewer, costs 10 s"


def test_ski_rental_waits_until_the_loss_is_the_price() -> None:
    """The loss is 0.375 of the time, so 10 s are lost after 26.7 s."""
    slowdown = Slowdown(2.0, 1.25, 10.0, ())
    assert Rule().wait(slowdown) == pytest.approx(10 / 0.375)
    assert Rule().wait(Slowdown(2.0, 1.25, 0.0, ())) == 0.0
    short = replay(one_slowdown(20.0), TABLE, Rule(), PRICES)
    assert short.changes == ()


def test_the_learned_wait_is_typical() -> None:
    long = Slowdown(2.0, 1.25, 10.0, (500.0,) * 6)
    assert learned_wait(long) == 0.0
    short = Slowdown(2.0, 1.25, 10.0, (5.0,) * 6)
    assert learned_wait(short) == 5.0
    assert Rule().wait(short) == 5.0 < 10 / 0.375


@pytest.mark.parametrize("length", [3.0, 30.0, 300.0])
def test_no_policy_beats_the_clairvoyant(length: float) -> None:
    trace = slow_downs([length] * 8, [50.0] * 8, device=0, factor=0.5)
    runs = [replay(trace, TABLE, WAITING[name](), PRICES) for name in WAITING]
    oracle = clairvoyant(trace, TABLE, PRICES)
    assert max(run.steps for run in runs) <= oracle.steps * (1 + 1e-9)
    for run in runs:
        assert sum(part.seconds for part in run.stretches) == pytest.approx(run.seconds)
        assert sum(part.seconds * part.rate for part in run.stretches) == pytest.approx(run.steps)
    by_name = {run.policy: run.steps for run in runs}
    assert by_name["rule"] > 0.75 * oracle.steps


def test_a_loss_forces_a_change() -> None:
    lost = MachineState(lost=frozenset({1}))
    table = PlanTable({}, {MachineState(): {"all": 1.0}, lost: {"fewer": 2.0}})
    trace = Trace((Event(100.0, "lost", 1), Event(200.0, "back", 1), Event(300.0, "end")))
    prices = Prices(compile=9.0, move=1.0, restart=5.0)
    run = replay(trace, table, Never(), prices)
    # 15 s of 100 are lost; then the devices are back and the plan for fewer is none of theirs.
    assert run.steps == pytest.approx(100 + 85 / 2 + 94)


def test_states_follow_events_and_slow_the_machine() -> None:
    trace = Trace(
        (
            Event(5.0, "link", level="node", factor=0.5),
            Event(9.0, "slow", 2, factor=0.25),
            Event(20.0, "slow", 2, factor=1.0),
            Event(30.0, "lost", 2),
            Event(31.0, "end"),
        )
    )
    segments = trace.segments()
    assert [segment.seconds for segment in segments] == [5.0, 4.0, 11.0, 10.0, 1.0]
    assert str(segments[2].state) == "device 2 at 25%; node at 50%"
    machine = load("h100:8")
    slow = in_state(machine, segments[2].state, 8)
    assert slow.rate("dot", "bfloat16") == machine.rate("dot", "bfloat16") / 4
    assert slow.levels[-1].bandwidth == machine.levels[-1].bandwidth / 2
    fast = in_state(machine, segments[2].state, 7)  # without the slow one
    assert fast.rate("dot", "bfloat16") == machine.rate("dot", "bfloat16")


def test_plans_are_searched_for_all_states() -> None:
    states = [SLOW, MachineState(lost=frozenset({1}))]
    table = plan_table(GRAPH, load("host:4"), states)
    # A batch of 64 does not divide into three, so the fourth device is better left as well.
    assert list(table.plans) == ["4 devices", "1 device", "2 devices"]
    assert table.best(states[1]) == "2 devices" and "4 devices" not in table.seconds[states[1]]
    assert table.seconds[SLOW]["4 devices"] > table.seconds[MachineState()]["4 devices"]


def test_a_trace_is_saved_and_loaded(tmp_path: Path) -> None:
    trace = slow_downs([3.0, 4.0], [1.0, 2.0], device=1, factor=0.5)
    path = tmp_path / "events.jsonl"
    path.write_text(trace.to_text())
    assert load_trace(path) == trace


def test_sentences(tmp_path: Path) -> None:
    def loaded(*lines: str) -> Trace:
        path = tmp_path / "events.jsonl"
        path.write_text("\n".join(lines))
        return load_trace(path)

    four = load("h100:4")
    with pytest.raises(PlanError, match="names device 4 at 1 s, and 'h100:4' has devices 0 to 3: "):
        loaded('{"second": 1, "event": "lost", "device": 4}').check(four)
    with pytest.raises(PlanError, match="names level 'net' at 1 s, and 'h100:4' has network, node"):
        loaded('{"second": 1, "event": "link", "level": "net", "factor": 2}').check(four)
    lost = [json.dumps({"second": 1, "event": "lost", "device": device}) for device in range(4)]
    with pytest.raises(PlanError, match="has lost all 4 devices at 1 s, and nothing can run"):
        loaded(*lost).check(four)
    with pytest.raises(PlanError, match="has lost the only device at 1 s, and nothing can run"):
        loaded(lost[0]).check(load("h100:1"))
    with pytest.raises(PlanError, match="brings device 2 back at 1 s, and it was not lost: add"):
        loaded('{"second": 1, "event": "back", "device": 2}').check(four)
    assert str(MachineState(lost=frozenset({5, 3}))) == "without devices 3, 5"
    with pytest.raises(PlanError, match="line 1: event 'slow' lacks its factor: add \"factor\""):
        loaded('{"second": 1, "event": "slow", "device": 1}')
    with pytest.raises(PlanError, match="line 2: second 1 is before 2 of the line above: sort"):
        loaded('{"second": 2, "event": "back", "device": 1}', '{"second": 1, "event": "end"}')
    with pytest.raises(PlanError, match="line 2: the trace has ended: move 'end' to the last line"):
        loaded('{"second": 2, "event": "end"}', '{"second": 3, "event": "end"}')
    with pytest.raises(
        PlanError, match="ends at 0 s, so nothing runs: give its end a later second"
    ):
        loaded('{"second": 0, "event": "end"}')
    with pytest.raises(PlanError, match="loses device 0 at 1 s, and it was lost before: remove"):
        loaded(lost[0], lost[0]).check(four)
    with pytest.raises(PlanError, match=r"line 1 is not a trace of events .*: write a JSON object"):
        loaded("hello")
    with pytest.raises(PlanError, match="line 1: event is 'sloww'"):
        loaded('{"second": 1, "event": "sloww"}')
    with pytest.raises(PlanError, match="has no events: write a JSON object a line"):
        loaded("")
    with pytest.raises(PlanError, match="There is no policy of plan changes 'ondemand': use all"):
        chosen_names("ondemand", tuple(WAITING), "policy of plan changes")
    assert math.isinf(Never().wait(Slowdown(2.0, 1.0, 1.0, ())))

"""The order of passes: by hand, and its laws."""

import pytest

from partita.errors import PlanError
from partita.plans.pipeline import Pass, order, stage_schedule
from partita.plans.plan import Mesh, Plan
from partita.plans.schema import SCHEDULES

WAITS = {
    (1, "forward"): [(0, "forward")],
    (0, "backward"): [(1, "backward")],
}


def two_stages(microbatches: int, schedule: str = "1f1b") -> Plan:
    choices = {"first": {"a": "at(0)"}, "last": {"a": "at(1)"}}
    return Plan(
        "graph",
        "machine",
        Mesh.of((2,)),
        choices,
        microbatches=microbatches,
        schedule=schedule,
    )


def test_two_stages_and_two_microbatches_by_hand():
    assert order(two_stages(2), WAITS) == [
        Pass(0, "forward", 0),
        Pass(0, "forward", 1),
        Pass(1, "forward", 0),
        Pass(1, "backward", 0),
        Pass(1, "forward", 1),
        Pass(1, "backward", 1),
        Pass(0, "backward", 0),
        Pass(0, "backward", 1),
    ]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_every_stage_follows_its_schedule_and_waits(microbatches: int, schedule: str):
    plan = two_stages(microbatches, schedule)
    passes = order(plan, WAITS)
    for stage in range(2):
        own = [(p.phase, p.microbatch) for p in passes if p.stage == stage]
        assert own == stage_schedule(plan, stage)
    for (stage, phase), sources in WAITS.items():
        for source in sources:
            for microbatch in range(microbatches):
                before = passes.index(Pass(*source, microbatch))
                assert before < passes.index(Pass(stage, phase, microbatch))


def test_a_circle_is_refused():
    waits = {(0, "forward"): [(1, "forward")], (1, "forward"): [(0, "forward")]}
    with pytest.raises(PlanError, match="wait for each other in a circle"):
        order(two_stages(1), waits)

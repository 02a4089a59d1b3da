"""Gaps of a plan to its lower bounds, and their texts."""

from dataclasses import replace

from partita.plans.plan import Plan, mesh_for
from partita.report.gaps import gaps_of
from partita.report.tables import summary

PLAN = Plan(
    "net",
    "h100:2",
    mesh_for((2,)),
    {"dense": {}},
    {},
    predicted={"seconds": 1.1, "bound_seconds": 1.0, "peak_bytes": 8, "traffic_bytes": {}},
)


def test_a_plan_that_can_run_is_compared_with_both_bounds() -> None:
    plan = replace(PLAN, predicted={**PLAN.predicted, "staged_bound_seconds": 0.88})
    first = next(iter(summary(plan)))
    runnable = "within 10.0% of the lower bound"
    staged = "within 25.0% of the lower bound with stages"
    assert f"{runnable}; {staged}" in first
    assert "stages" not in next(iter(summary(PLAN)))


def test_a_pipeline_is_compared_with_the_bound_of_its_own_space() -> None:
    plan = replace(
        PLAN,
        microbatches=4,
        predicted={**PLAN.predicted, "bound_seconds": 1.1, "staged_bound_seconds": 1.0},
    )
    assert gaps_of(plan).runnable is None
    first = next(iter(summary(plan)))
    assert "proved" not in first and "within 10.0% of the lower bound with stages" in first

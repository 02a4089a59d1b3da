"""Schedules of pipelines in the search: the order of passes, and stages that end together."""

import numpy as np
import pytest

from partita.plans.pipeline import most_in_flight
from partita.plans.plan import Mesh, Plan
from partita.search.pipeline_costs import last_ends
from partita.search.pipeline_division import OperatorFigures, PipelineShape, Runs
from partita.simulation.engine import run
from partita.simulation.pipeline_tasks import StageEdge, StagePasses, Transfer, pipeline_tasks

STAGES = 4
FORWARD_SECONDS = np.array([0.3, 0.4, 0.2, 0.1])
BACKWARD_SECONDS = np.array([0.5, 0.6, 0.7, 0.3])


def in_flight(schedule: str, microbatches: int, stages: int = STAGES) -> np.ndarray:
    later = range(stages - 1, -1, -1)
    return np.array([most_in_flight(schedule, microbatches, number) for number in later])


@pytest.mark.parametrize("schedule", ["1f1b", "eager-1f1b"])
@pytest.mark.parametrize("microbatches", [1, 3, 16])
def test_the_replay_of_passes_is_the_simulation_of_a_chain(
    schedule: str, microbatches: int
) -> None:
    choices = {f"operator{n}": {"a": f"at({n})"} for n in range(STAGES)}
    mesh = Mesh.of((STAGES,))
    plan = Plan("g", "m", mesh, choices, microbatches=microbatches, schedule=schedule)
    passes = []
    for forward, backward in zip(FORWARD_SECONDS, BACKWARD_SECONDS, strict=True):
        passes.append(StagePasses(forward, backward, 0.0))
    transfers = {}
    for n in range(STAGES - 1):
        transfers[StageEdge(n, n + 1, "forward", "forward")] = Transfer(0.05, 1.0)
        transfers[StageEdge(n + 1, n, "backward", "backward")] = Transfer(0.05, 1.0)
    hops = np.array([0.0, 0.05, 0.05, 0.05])
    ahead = in_flight(schedule, microbatches)
    ends = last_ends(FORWARD_SECONDS, BACKWARD_SECONDS, hops, ahead, microbatches)
    simulated = run(pipeline_tasks(plan, passes, transfers).tasks).seconds
    assert ends.max() == pytest.approx(simulated)


def runs(shape: PipelineShape, count: int, schedule: str) -> Runs:
    """Equal runs, each of three seconds for one microbatch, that need no memory."""
    ones, zeros = np.ones(count), np.zeros(count)
    figures = OperatorFigures(
        microbatch=3 * ones,
        forward=ones,
        exposed=3 * ones,
        exposed_forward=ones,
        repeated=ones,
        exposed_repeated=ones,
        once=zeros,
        fixed=zeros,
        activations=zeros,
    )
    return Runs(shape, figures, [0.0] * count, [0.0] * count, schedule)


def test_stages_have_less_work_the_later_they_start_and_end_together() -> None:
    shape = PipelineShape(axes=4, stages=16, microbatches=128, rematerialize=False)
    seconds = {}
    for schedule in ("1f1b", "eager-1f1b"):
        division = runs(shape, 1600, schedule).divide(1.0)
        assert division is not None and division.schedule == schedule
        sizes = np.diff([-1, *division.ends])
        ahead = in_flight(schedule, 128, 16)
        seconds[schedule] = last_ends(sizes, 2 * sizes, np.zeros(16), ahead, 128).max()
        if schedule == "1f1b":
            assert sizes.max() - sizes.min() <= 1
        else:
            assert (np.diff(sizes) <= 0).all() and sizes[0] > 1.1 * sizes[-1]
    least = 3 * 1600 * 128 / shape.capacity
    assert seconds["1f1b"] == pytest.approx(3 * 100 * 143, rel=0.01)
    assert least <= seconds["eager-1f1b"] < 1.015 * least < 0.97 * seconds["1f1b"]

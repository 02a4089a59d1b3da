"""The search for stages: what it finds fits, is what is simulated, and is no worse than without."""

from dataclasses import replace
from pathlib import Path

import pytest

from partita.errors import MemoryBudgetError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.check import check
from partita.plans.pipeline import runnable
from partita.plans.plan import Plan
from partita.search.base import Progress
from partita.search.bound import lower_bound_seconds
from partita.search.find import capacity, find, mesh_of
from partita.search.pipelines import stage
from partita.simulation.simulate import predicted

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def small(graph: OperatorGraph, share: float, name: str = "k80-cluster:1") -> Machine:
    """A machine whose devices have this share of what the smallest plan without stages needs."""
    whole = load(name).with_devices(4)
    least = find(graph, whole).prediction.peak_bytes
    return whole.revised(
        {
            f"device.memory.{whole.device.memories[0].name}.capacity": int(least * share)
            * whole.device.memories[0].shared_by
        },
        "a test",
    )


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_what_is_found_fits_is_what_is_simulated_and_is_a_file(graph: OperatorGraph) -> None:
    where = load("k80-cluster").with_devices(8)
    network = find(graph, where)
    best = stage(
        graph,
        where,
        mesh_of(where),
        network.network.terms,
        capacity(where),
        float("inf"),
        seconds=5,
    )
    assert best is not None
    plan = check(Plan.from_json(best.plan.to_json()), graph)
    assert not runnable(plan) and best.peak_bytes <= capacity(where)
    again = predicted(graph, where, plan)
    assert again.seconds == best.seconds and again.peak_bytes == best.peak_bytes
    assert lower_bound_seconds(network.network.terms, where, 8) <= best.seconds


def test_what_fits_under_no_plan_without_stages_is_found_with_them() -> None:
    graph = GRAPHS["transformer"]
    where = small(graph, 0.5)
    with pytest.raises(MemoryBudgetError):
        find(graph, where)
    found = find(graph, where, stages=True, seconds=10)
    assert not runnable(found.plan) and found.prediction.peak_bytes <= capacity(where)
    assert found.plan.predicted["bound_seconds"] <= found.prediction.seconds
    assert "not yet run" in " ".join(found.plan.notes)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_looking_at_stages_never_makes_it_slower(graph: OperatorGraph) -> None:
    where = load("h100:4")
    where = replace(where, backend=replace(where.backend, overlap=0.5))
    plain, staged = find(graph, where), find(graph, where, stages=True, seconds=2)
    assert staged.prediction.seconds <= plain.prediction.seconds
    assert staged.result.bound <= plain.result.bound
    assert (
        not runnable(staged.plan)
        or "that were looked at none is predicted to be faster" in staged.plan.notes[-1]
    )


def test_ctrl_c_takes_the_best_so_far() -> None:
    graph, where, asked = GRAPHS["cnn"], load("k80-cluster").with_devices(8), []

    def stop(progress: Progress) -> None:
        if progress.best < float("inf"):
            asked.append(progress.best)
            raise KeyboardInterrupt

    network = find(graph, where).network
    best = stage(graph, where, mesh_of(where), network.terms, capacity(where), float("inf"), stop)
    assert best is not None and asked == [best.seconds]

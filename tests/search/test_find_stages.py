"""The search for stages: what it finds fits, is what is simulated, and is no worse than without."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from partita.cost.moves import Placement
from partita.cost.terms import Terms, cost_terms
from partita.errors import MemoryBudgetError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.pipeline import is_one_program
from partita.plans.plan import Plan
from partita.search import find as find_module
from partita.search import pipelines as pipeline_search
from partita.search import portfolio
from partita.search.base import Progress
from partita.search.baselines import peak_bytes
from partita.search.bound import lower_bound_seconds
from partita.search.find import capacity, find, mesh_of
from partita.search.network import CostNetwork
from partita.search.optional import BestStep
from partita.search.pipelines import PipelineSpace, Sketch, pipelines
from partita.search.portfolio import Limits
from partita.search.staged_bound import StagedBound
from partita.simulation.base import SimulatedStep
from partita.simulation.simulate import predicted, simulated_step

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def fastest(
    graph: OperatorGraph, machine: Machine, terms: Terms, limits: Limits
) -> SimulatedStep | None:
    """The fastest pipeline of a search."""
    best = BestStep()
    staged = StagedBound(graph, Placement(machine, mesh_of(machine)), terms)
    best.follow(pipelines(staged, limits))
    return best.step


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_where_no_plan_fits_yet_the_fastest_of_the_first_sketches_is_simulated(
    graph: OperatorGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory may change all sketches, so others would be in vain."""
    machine = load("dgx-h100:2")
    sketches: list[Sketch] = []
    simulated: list[Sketch] = []
    make = PipelineSpace.sketch

    def sketched(space: PipelineSpace, *arguments: Any) -> Sketch | None:
        sketch = make(space, *arguments)
        sketches.extend([sketch] if sketch else [])
        return sketch

    def failed(_: PipelineSpace, sketch: Sketch, *__: Any) -> None:
        simulated.append(sketch)
        raise InterruptedError

    monkeypatch.setattr(PipelineSpace, "sketch", sketched)
    monkeypatch.setattr(PipelineSpace, "simulate", failed)
    with pytest.raises(InterruptedError):
        fastest(graph, machine, cost_terms(graph, machine.backend), Limits())
    assert len({sketch.shape.axes for sketch in sketches}) == len(sketches) > 1
    assert simulated == [min(sketches, key=lambda sketch: sketch.seconds)]


def small(graph: OperatorGraph, share: float, name: str = "k80-cluster:1") -> Machine:
    """A machine whose devices have this share of what the smallest plan without stages needs."""
    whole = load(name).with_devices(4)
    # A GPU's libraries have more work space than the models of these tests need.
    whole = replace(whole, backend=replace(whole.backend, platform="cpu"))
    least = find(graph, whole).prediction.peak_bytes
    return whole.revised(
        {
            f"device.memory.{whole.device.memories[0].name}.capacity": int(least * share)
            * whole.device.memories[0].shared_by
        },
        "a test",
    )


def test_a_busy_machine_finds_the_same_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, where = GRAPHS["mlp"], load("k80-cluster").with_devices(4)
    terms = cost_terms(graph, where.backend)
    limits = Limits(capacity(where))
    best = fastest(graph, where, terms, limits)
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(pipeline_search.time, "perf_counter", lambda: float(next(hours)))
    again = fastest(graph, where, terms, limits)
    assert best is not None and again is not None and again.plan == best.plan


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_what_is_found_fits_is_what_is_simulated_and_is_a_file(graph: OperatorGraph) -> None:
    where = load("k80-cluster").with_devices(8)
    network = find(graph, where).network
    best = fastest(graph, where, network.terms, Limits(capacity(where), seconds=1))
    assert best is not None
    plan = check(Plan.from_json(best.plan.to_json()), graph)
    assert not is_one_program(plan) and best.peak_bytes <= capacity(where)
    again = predicted(graph, where, plan)
    assert again.seconds == best.seconds and again.peak_bytes == best.peak_bytes
    assert lower_bound_seconds(network.terms, where, 8) <= best.seconds


def test_what_fits_under_no_plan_without_stages_is_found_with_them() -> None:
    graph = GRAPHS["transformer"]
    where = small(graph, 0.5)
    with pytest.raises(MemoryBudgetError):
        find(graph, where)
    found = find(graph, where, stages=True, seconds=10)
    assert not is_one_program(found.plan) and found.prediction.peak_bytes <= capacity(where)
    assert found.plan.predicted["bound_seconds"] <= found.prediction.seconds
    assert "programs of their own" in " ".join(found.plan.notes)
    assert found.gap == found.staged_gap


def test_large_plans_of_one_program_are_left_to_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = GRAPHS["transformer"]
    where = small(graph, 0.5)
    peaks = []

    def counted(network: CostNetwork, plan: Plan) -> int:
        peaks.append(plan)
        return peak_bytes(network, plan)

    monkeypatch.setattr(find_module, "peak_bytes", counted)
    usual = find(graph, where, stages=True)
    assert peaks
    peaks.clear()
    monkeypatch.setattr(find_module, "LARGE", 0)
    found = find(graph, where, stages=True)
    assert not peaks
    assert found.prediction.seconds == usual.prediction.seconds
    assert found.staged_bound_seconds == usual.staged_bound_seconds
    with pytest.raises(MemoryBudgetError, match="the smallest needs"):
        find(graph, small(graph, 0.01), stages=True)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_looking_at_stages_never_makes_it_slower(graph: OperatorGraph) -> None:
    where = load("h100:4")
    where = replace(where, backend=replace(where.backend, overlap=0.5))
    plain, staged = find(graph, where), find(graph, where, stages=True)
    assert staged.prediction.seconds <= plain.prediction.seconds
    assert staged.bound_seconds == plain.bound_seconds
    assert staged.staged_bound_seconds is not None
    assert staged.staged_bound_seconds <= plain.bound_seconds
    assert (
        not is_one_program(staged.plan)
        or "no pipeline or placement that was examined is predicted to be faster"
        in staged.plan.notes[-1]
    )


def test_ctrl_c_takes_the_best_so_far() -> None:
    graph, where, asked = GRAPHS["cnn"], load("k80-cluster").with_devices(8), []

    def stop(progress: Progress) -> None:
        if progress.best < float("inf"):
            asked.append(progress.best)
            raise KeyboardInterrupt

    network = find(graph, where).network
    best = fastest(graph, where, network.terms, Limits(capacity(where), report=stop))
    assert best is not None and asked == [best.seconds]


def test_the_bound_of_plans_that_run_stays_apart_from_that_of_the_larger_space() -> None:
    graph, where = GRAPHS["transformer"], load("h100:4")
    plain = find(graph, where)
    staged = find(graph, where, stages=True)
    assert "staged_bound_seconds" not in plain.plan.predicted
    assert staged.bound_seconds == plain.bound_seconds
    predicted_entry = staged.plan.predicted
    assert predicted_entry["staged_bound_seconds"] <= predicted_entry["bound_seconds"]
    assert staged.staged_gap is not None
    assert staged.gap == (plain.gap if is_one_program(staged.plan) else staged.staged_gap)


def broken(*arguments: object, **options: object) -> Iterator[SimulatedStep]:
    """A part of a search that finds one step and fails."""
    graph, where = GRAPHS["cnn"], load("h100:4")
    plan = BASELINES["one device"](graph, where.name, mesh_of(where))
    yield simulated_step(graph, where, replace(plan, microbatches=4))
    raise IndexError("an injected fault")


@pytest.mark.parametrize(
    ("part", "name"), [("pipelines", "pipeline stages"), ("placements", "placement")]
)
def test_a_failing_part_ends_with_the_best_plan_so_far_and_a_sentence(
    part: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ("pipelines", "placements"):
        monkeypatch.setattr(find_module, each, broken if each == part else nothing)
    result = find(GRAPHS["cnn"], load("h100:4"), stages=True)
    assert result.plan.microbatches == 4
    (note,) = [note for note in result.plan.notes if "failed" in note]
    assert f"the search for {name} failed" in note
    assert "IndexError: an injected fault" in note and "--no-stages" in note


def nothing(*arguments: object, **options: object) -> Iterator[SimulatedStep]:
    return iter(())


def interrupted(*arguments: object, **options: object) -> Iterator[SimulatedStep]:
    raise KeyboardInterrupt
    yield


def refused(*arguments: object, **options: object) -> Iterator[SimulatedStep]:
    raise PlanError("a mistake of the user")
    yield


def test_ctrl_c_and_mistakes_of_the_user_keep_their_meaning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(find_module, "placements", nothing)
    monkeypatch.setattr(find_module, "pipelines", interrupted)
    result = find(GRAPHS["mlp"], load("h100:4"), stages=True)
    assert not result.failures
    monkeypatch.setattr(find_module, "pipelines", refused)
    with pytest.raises(PlanError, match="a mistake of the user"):
        find(GRAPHS["mlp"], load("h100:4"), stages=True)


def test_a_failing_proof_ends_with_the_plan_and_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("an injected fault")

    graph, where = GRAPHS["mlp"], load("h100:4")
    where = replace(where, backend=replace(where.backend, overlap=0.5))
    plan = find(graph, where).plan
    monkeypatch.setattr(portfolio, "prove", fault)
    result = find(graph, where, search="exhaustive")
    assert result.prediction.seconds <= plan.predicted["seconds"] * (1 + portfolio.MIN_GAIN)
    assert "the search for a proof failed" in result.plan.notes[-1]

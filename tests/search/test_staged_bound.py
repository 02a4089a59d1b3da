"""The bound of plans with stages: below every simulated plan, by hand for a chain of operators."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.cost.moves import Placement
from partita.cost.terms import cost_terms
from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES, storage_for
from partita.plans.plan import Mesh, Plan
from partita.search import relaxation
from partita.search.candidates import candidates, names_of
from partita.search.find import mesh_of
from partita.search.pipeline_division import PipelineShape
from partita.search.pipelines import PipelineSpace, pipelines
from partita.search.portfolio import Limits
from partita.search.staged_bound import Spine, StagedBound, StagedShape, heaviest_cut
from partita.simulation import pipelined
from partita.simulation.pipelined import PipelinedStep

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}
SHAPES = 3
PLANS = 4


def staged_bound(graph: OperatorGraph, machine: Machine) -> StagedBound:
    terms = cost_terms(graph, machine.backend)
    return StagedBound(graph, Placement(machine, mesh_of(machine)), terms)


def random_plans(bound: StagedBound, shape: StagedShape, draw: random.Random) -> Iterator[Plan]:
    """Plans of a shape: stages from any operator to any other, choices and storage at random."""
    graph, mesh = bound.graph, bound.placement.mesh
    inner = Mesh(shape.inner)
    stage_axes = [axis for axis in mesh.axes if axis not in shape.inner]
    splits = []
    for number in range(len(graph.operators)):
        splits.append([names_of(graph, inner, c) for c in candidates(graph, number, inner)])
    for _ in range(PLANS):
        names = [operator.name for operator in graph.operators]
        choices = {
            name: dict(draw.choice(split)) for name, split in zip(names, splits, strict=True)
        }
        plan = Plan(graph.name, bound.placement.machine.name, inner, choices, {}, "random")
        zero = draw.choice((0, 1, 3))
        storage = storage_for(graph, plan, zero) if zero else {}
        starts = sorted(draw.sample(range(1, len(names)), shape.stages - 1))
        for number, name in enumerate(names):
            stage = sum(number >= start for start in starts)
            for axis in reversed(stage_axes):
                choices[name][axis.name] = f"at({stage % axis.size})"
                stage //= axis.size
        yield replace(
            plan,
            mesh=mesh,
            storage=storage,
            batch_size=graph.batch_size,
            target=graph.target,
            microbatches=shape.microbatches,
        )


@pytest.mark.parametrize(("name", "overlap"), [("mlp", 0.0), ("transformer", 0.5)])
def test_no_plan_with_stages_is_below_the_bound_of_its_shape(name: str, overlap: float) -> None:
    machine = load("dgx-h100:2").with_devices(8)
    device = replace(machine.device, overhead=0.0)
    backend = replace(machine.backend, overlap=overlap)
    machine = replace(machine, device=device, backend=backend)
    bound = staged_bound(GRAPHS[name], machine)
    draw = random.Random(0)
    shapes = [s for s in bound.shapes() if s.microbatches > 1]
    ratios = []
    for shape in draw.sample(shapes, SHAPES):
        least = bound.of_shape(shape, np.inf)
        assert least == max(bound.of_kernels(shape), bound.of_work(shape, bound.relaxed(shape)))
        for plan in random_plans(bound, shape, draw):
            try:
                step = PipelinedStep.of(bound.graph, machine, plan, bound.terms)
                ratios.append(least / step.seconds)
            except PlanError:
                continue
    assert ratios and max(ratios) <= 1 + 1e-9


def test_relaxations_stop_at_a_bound_that_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = relaxation._Relaxation.sweep
    swept: list[relaxation._Relaxation] = []

    def counted(problem: relaxation._Relaxation) -> None:
        swept.append(problem)
        sweep(problem)

    monkeypatch.setattr(relaxation._Relaxation, "sweep", counted)
    bound = staged_bound(GRAPHS["transformer"], load("dgx-h100:2"))
    shape = next(s for s in bound.shapes() if s.stages == 2 and s.microbatches == 4)
    half = 0.5 * staged_bound(bound.graph, bound.placement.machine).of_shape(shape, np.inf)
    sweeps = len(swept)
    swept.clear()
    assert half <= bound.of_work(shape, bound.relaxed(shape, half)) <= 2 * half
    assert len(swept) < sweeps
    assert bound.of_work(shape, bound.relaxed(shape)) == 2 * half  # more than was enough
    swept.clear()
    assert bound.of_shape(shape, half) == bound.of_shape(shape, np.inf) == 2 * half
    assert not swept


def test_shapes_that_cannot_beat_the_best_plan_are_not_sketched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bound = staged_bound(GRAPHS["transformer"], load("dgx-h100:2"))
    sketched: list[PipelineShape] = []
    monkeypatch.setattr(PipelineSpace, "sketch", lambda _, shape, *__: sketched.append(shape))
    space = PipelineSpace(bound, 1 << 40)
    shapes = [s for axes in range(5) for s in space.shapes(axes) if s.stages > 1]
    seconds = sorted(space.relaxed_bound(shape, 1e9) for shape in shapes)
    limit_seconds = seconds[len(seconds) // 2]
    assert not list(pipelines(bound, Limits(), limit_seconds))
    staged = {shape for shape in sketched if shape.stages > 1}
    assert staged == {s for s in shapes if space.relaxed_bound(s, 1e9) < limit_seconds}
    assert len(staged) < sum(space.lower_bound(shape) < limit_seconds for shape in shapes)


def test_additions_of_gradients_are_those_of_the_simulator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelined, "DISPATCH_SECONDS", 0.0)
    machine = load("h100:1")
    bound = staged_bound(GRAPHS["mlp"], machine)
    plan = BASELINES["one device"](bound.graph, machine.name, mesh_of(machine))
    plan = replace(plan, microbatches=4)
    (adding,) = PipelinedStep.of(bound.graph, machine, plan).passes
    monkeypatch.setattr(PipelinedStep, "_added_bytes", lambda *_: 0)
    (plain,) = PipelinedStep.of(bound.graph, machine, plan).passes
    seconds = adding.backward - plain.backward
    assert bound._addition_seconds.sum() == pytest.approx(seconds)


def test_waiting_of_a_chain_by_hand() -> None:
    bound = staged_bound(GRAPHS["mlp"], load("h100:4"))
    shape = StagedShape(2, 2, ())
    # Both stages take y1 and y2 for two microbatches, of 1 second: max(y1, y1 / 2 + y2) = 2 / 3.
    assert bound._waiting(shape, np.full(3, 1 / 3), 0.0) == pytest.approx(2 / 3)
    # One microbatch waits for nothing else, and 1 / 4 second of the work is a move.
    alone = StagedShape(2, 1, ())
    assert bound._waiting(alone, np.full(3, 1 / 3), 0.25) == pytest.approx(0.75)


def test_a_spine_passes_the_heaviest_operators_and_leaves_branches_aside() -> None:
    graph = GRAPHS["transformer"]
    seconds = np.ones(len(graph.operators))
    names = [operator.name for operator in graph.operators]
    key, query = (names.index(f"multi_head_attention/{name}") for name in ("key", "query"))
    seconds[key] = 2.0
    spine = Spine.of(graph, seconds)
    assert key in spine.operators and query not in spine.operators
    assert spine.before[query] < spine.after[query]
    aside = [number for number in range(len(names)) if number not in spine.operators]
    assert 0 < spine.most_aside(seconds) < len(aside)


def test_the_heaviest_cut_has_operators_before_it_that_read_nothing_after_it() -> None:
    forward = [[1, 2], [3], [3], []]
    weights = {(0, 1): 1.0, (0, 2): 2.0, (1, 3): 4.0, (2, 3): 1.0}
    # Before the cut: 0 and 1. All of 0's readers after it: 3; 0, 1 and 2: 5.
    assert heaviest_cut(forward, weights) == pytest.approx(6.0, rel=1e-6)
    assert heaviest_cut(forward, {}) == 0.0

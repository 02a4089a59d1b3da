"""A transformer too large for data parallelism: no expert's pipeline is faster than the plan."""

import math
import re
from dataclasses import replace

import pytest

from partita.cost.moves import Placement
from partita.cost.terms import Terms, cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan
from partita.search.find import mesh_of
from partita.search.optional import BestStep
from partita.search.pipelines import PipelineSpace, pipelines
from partita.search.portfolio import Limits
from partita.search.staged_bound import StagedBound
from partita.simulation.pipelined import PipelinedStep

BLOCKS = 8


@pytest.fixture(scope="module")
def graph() -> OperatorGraph:
    import keras

    import partita
    from partita.bench.networks import gpt3
    from partita.capture.program import capture_program

    with partita.abstract():
        model = gpt3(width=1024, blocks=BLOCKS, heads=8, length=512, vocabulary=8192)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return capture_program(model, 128).graph


@pytest.fixture(scope="module")
def terms(graph: OperatorGraph) -> Terms:
    return cost_terms(graph, machine().backend)


def machine() -> Machine:
    return load("dgx-a100:8")


def pipeline(
    graph: OperatorGraph, where: Machine, axes: int, microbatches: int, again: bool
) -> Plan:
    """An expert's pipeline: equal numbers of blocks over the nodes, rematerialized or not.

    Inside a stage, samples are split over half of the axes, and Megatron's pattern over the others.
    """
    mesh = mesh_of(where)
    count, names = math.prod(mesh.sizes[:axes]), [o.name for o in graph.operators]
    inner = BASELINES["data x tensor"](graph, where.name, Mesh(mesh.axes[axes:]))
    matches = [re.search(r"attention(\d+)", name) for name in names]
    block = [int(match[1]) if match else -1 for match in matches]
    choices, stage_of, runs = {}, 0, []
    for o, name in enumerate(names):
        if block[o] > 0 and block[o] not in block[:o]:  # the first of its block
            stage_of = block[o] * count // BLOCKS
            runs.append(o)
        at, left = {}, stage_of
        for axis in reversed(mesh.axes[:axes]):
            at[axis.name] = f"at({left % axis.size})"
            left //= axis.size
        choices[name] = at | dict(inner.choices[name])
    assert len(set(block)) == BLOCKS + 1
    recompute = (
        tuple(
            (names[a], names[b - 1])
            for a, b in zip([0, *runs], [*runs, len(names) - 1], strict=True)
        )
        if again
        else ()
    )
    return check(
        replace(inner, mesh=mesh, choices=choices, microbatches=microbatches, recompute=recompute),
        graph,
    )


@pytest.mark.parametrize(("axes", "microbatches", "again"), [(1, 8, False), (3, 32, True)])
def test_what_is_found_is_no_slower_than_an_experts_pipeline_in_the_same_memory(
    graph: OperatorGraph, terms: Terms, axes: int, microbatches: int, again: bool
) -> None:
    where = machine()
    expert = PipelinedStep.of(
        graph, where, pipeline(graph, where, axes, microbatches, again), terms
    )
    placement = Placement(where, mesh_of(where))
    search = BestStep()
    search.follow(pipelines(StagedBound(graph, placement, terms), Limits(expert.peak_bytes)))
    best = search.step
    assert best is not None and best.peak_bytes <= expert.peak_bytes
    assert best.seconds <= expert.seconds


def test_a_sketch_is_near_what_is_simulated_and_what_it_leaves_out_is_not_below_it(
    graph: OperatorGraph, terms: Terms
) -> None:
    where = machine()
    placement = Placement(where, mesh_of(where))
    space = PipelineSpace(StagedBound(graph, placement, terms), int(where.memory_bytes))
    near = []
    shapes = [s for axes in range(5) for s in space.shapes(axes) if s.microbatches > 1]
    for shape in shapes[::7]:
        sketch = space.sketch(shape, space.limit_bytes, 1)
        assert sketch is not None and sketch.lower_bound <= sketch.seconds
        staged = space.simulate(sketch)
        assert isinstance(staged, PipelinedStep)
        assert space.lower_bound(shape) <= sketch.lower_bound <= staged.seconds * (1 + 1e-9)
        near.append(staged.seconds / sketch.seconds)
    assert len(near) > 4 and min(near) > 0.5 and max(near) < 1.5


def test_a_mask_that_every_device_makes_is_no_operators_own_work(
    graph: OperatorGraph, terms: Terms
) -> None:
    """Masks of all blocks are computed in one place: their work is split as their readers."""
    assert any(x.name == "and" and x.flops > 1e8 for x in graph.instructions)
    assert not [
        own.name for own in terms.operators for w in own.work if w.flops > 1e8 and not w.factors
    ]


def test_the_first_simulated_memory_gives_the_share_of_activations_that_stages_store(
    graph: OperatorGraph, terms: Terms
) -> None:
    where = machine()
    placement = Placement(where, mesh_of(where))
    space = PipelineSpace(StagedBound(graph, placement, terms), int(where.memory_bytes))
    shape = next(s for s in space.shapes(2) if s.microbatches == 32 and not s.rematerialize)
    sketch = space.sketch(shape, space.limit_bytes, 1)
    assert sketch is not None
    twice = [2 * nbytes for nbytes in sketch.runs.activations]
    sketch.runs.activations = twice
    sketch.runs.entering = [2 * nbytes for nbytes in sketch.runs.entering]
    step = space.simulate(sketch)
    assert isinstance(step, PipelinedStep) and not step.plan.recompute
    assert space.stored_share == pytest.approx(0.5, rel=0.1)
    stored_bytes = sum(memory.microbatch_bytes for memory in step.memories)
    assert sketch.runs.stored_bytes(sketch.runs.divide(space.limit_bytes), 0) is not None
    assert sum(twice) and stored_bytes == pytest.approx(space.stored_share * twice[-1], rel=0.1)
    later = space.sketch(shape, space.limit_bytes, 1)
    assert later is not None and later.runs.activations[-1] == pytest.approx(twice[-1] / 4, rel=0.1)


def test_one_of_equal_stages_is_rematerialized(graph: OperatorGraph, terms: Terms) -> None:
    where = machine()
    plan = pipeline(graph, where, 3, 8, again=False)
    stored = PipelinedStep.of(graph, where, plan, terms)
    names = [operator.name for operator in graph.operators]
    for stage in (2, 4):
        members = [
            name for name, other in zip(names, stored.stage_of, strict=True) if other == stage
        ]
        step = stored.with_plan(replace(plan, recompute=((members[0], members[-1]),)))
        longer = [a.backward > b.backward for a, b in zip(step.passes, stored.passes, strict=True)]
        assert longer == [number == stage for number in range(8)]

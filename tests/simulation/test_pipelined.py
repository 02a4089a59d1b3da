"""Pipelined steps: by hand, against the uniform step, and errors."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.adapt import fit_mesh
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.diff import diff
from partita.plans.pipeline import (
    in_flight,
    operator_stages,
    stage_count,
    stage_plan,
    stage_schedule,
)
from partita.plans.plan import Mesh, Plan
from partita.plans.schema import SCHEDULES
from partita.search.find import mesh_of
from partita.search.staged_bound import Spine
from partita.simulation import pipelined
from partita.simulation.engine import run
from partita.simulation.pipeline_tasks import StageEdge, StagePasses, Transfer, pipeline_tasks
from partita.simulation.pipelined import DISPATCH_SECONDS, PipelinedStep
from partita.simulation.placed import PlacedStep
from partita.simulation.simulate import predicted, simulate

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}
FORWARD = StageEdge(0, 1, "forward", "forward")
BACKWARD = StageEdge(1, 0, "backward", "backward")


def machine(overlap: float = 0.0, name: str = "h100:4") -> Machine:
    whole = load(name)
    return replace(whole, backend=replace(whole.backend, overlap=overlap))


def in_two(
    graph: OperatorGraph,
    where: Machine,
    inner: str = "data parallel",
    microbatches: int = 1,
    first: float = 0.5,
    **more: object,
) -> Plan:
    """Two stages, on the halves of the first axis; inside, a baseline."""
    mesh = mesh_of(where)
    plan = BASELINES[inner](graph, where.name, Mesh(mesh.axes[1:]))
    ends = int(len(graph.operators) * first)
    choices = {
        o.name: {mesh.axes[0].name: f"at({int(n >= ends)})", **plan.choices[o.name]}
        for n, o in enumerate(graph.operators)
    }
    return check(
        replace(plan, mesh=mesh, choices=choices, microbatches=microbatches, **more), graph
    )  # type: ignore[arg-type]


def by_hand(
    plan: Plan,
    passes: tuple[float, float, float],
    seconds: Mapping[StageEdge, float],
) -> float:
    """Seconds of a step with these seconds of passes (in every stage) and of transfers."""
    transfers = {
        edge: Transfer(transfer_seconds, 0.0) for edge, transfer_seconds in seconds.items()
    }
    stage_passes = [StagePasses(*passes)] * stage_count(plan)
    return run(pipeline_tasks(plan, stage_passes, transfers).tasks).seconds


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("plan", BASELINES)
def test_one_stage_and_one_microbatch_equal_the_uniform_step(
    graph: OperatorGraph, plan: str
) -> None:
    where = machine()
    made = BASELINES[plan](graph, where.name, mesh_of(where))
    staged = PipelinedStep.of(graph, where, made)
    whole = predicted(graph, where, made)
    assert staged.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert staged.peak_bytes == whole.peak_bytes


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_equal_stages_take_microbatches_plus_earlier_stages_by_hand(
    schedule: str, count: int
) -> None:
    graph = GRAPHS["mlp"]
    plan = in_two(graph, machine(), microbatches=count, schedule=schedule)
    assert by_hand(plan, (1.0, 2.0, 0.0), {}) == count * 3.0  # nothing is handed on: nobody waits
    seconds = {FORWARD: 0.0, BACKWARD: 0.0}
    assert by_hand(plan, (1.0, 2.0, 0.0), seconds) == (count + 1) * 3.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_takes_no_less_than_its_passes_without_transfers(schedule: str) -> None:
    graph, where = GRAPHS["transformer"], machine(0.5)
    step = PipelinedStep.of(graph, where, in_two(graph, where, microbatches=4, schedule=schedule))
    row = Spine.of(graph, np.ones(len(graph.operators))).operators
    waiting_for_nobody = step.least_seconds(())
    assert 0 < waiting_for_nobody < step.least_seconds(row) <= step.seconds


def test_earlier_stages_do_not_wait_for_the_update_of_later_ones() -> None:
    plan = in_two(GRAPHS["mlp"], machine(), microbatches=4)
    seconds = {FORWARD: 0.0, BACKWARD: 0.0}
    assert by_hand(plan, (1.0, 2.0, 7.0), seconds) == 5 * 3.0 + 7.0


def test_transfers_between_stages_take_turns_on_the_link_by_hand() -> None:
    graph = GRAPHS["mlp"]
    plan = in_two(graph, machine(), microbatches=4, schedule="gpipe")
    # The link is never idle. Then come the last forward pass and all backward passes.
    assert by_hand(plan, (1.0, 1.0, 0.0), {FORWARD: 10.0}) == 1 + 4 * 10 + 1 + 4


def test_schedules_have_the_stated_microbatches_in_flight() -> None:
    graph = GRAPHS["mlp"]
    for schedule, held in (("gpipe", (8, 8)), ("1f1b", (2, 1)), ("eager-1f1b", (4, 1))):
        plan = in_two(graph, machine(), microbatches=8, schedule=schedule)
        for stage in (0, 1):
            flying = most = 0
            for phase, _ in stage_schedule(plan, stage):
                flying += 1 if phase == "forward" else -1
                most = max(most, flying)
            assert most == in_flight(plan, stage) == held[stage] and flying == 0


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_stages_partition_the_variables(graph: OperatorGraph) -> None:
    where = machine()
    staged = PipelinedStep.of(graph, where, in_two(graph, where, "one device"))
    held = [m.parameters for m, _ in staged.memories]
    assert sum(held) == sum(
        graph.tensors[a.tensor].nbytes
        for a in graph.arguments
        if a.role == "parameter" and graph.home[a.tensor] >= 0
    )
    assert all(0 < h < sum(held) for h in held)


def test_microbatches_and_rematerialization_need_less_memory_and_more_time() -> None:
    graph, where = GRAPHS["transformer"], machine()
    plan = BASELINES["one device"](graph, where.name, mesh_of(where))
    names = [o.name for o in graph.operators]
    half = len(names) // 2
    cut = replace(plan, microbatches=4)
    again = replace(plan, recompute=((names[0], names[half - 1]), (names[half], names[-1])))
    whole, cut_, again_ = (predicted(graph, where, check(p, graph)) for p in (plan, cut, again))
    assert cut_.peak_bytes < whole.peak_bytes and again_.peak_bytes < whole.peak_bytes
    forward = PipelinedStep.of(graph, where, plan).passes[0][0]
    assert again_.seconds == pytest.approx(whole.seconds + forward, rel=1e-6)
    assert cut_.seconds > whole.seconds  # weights are read four times


def test_less_rematerialization_is_faster_and_needs_more_memory() -> None:
    graph, where = GRAPHS["transformer"], machine()
    plan = replace(BASELINES["one device"](graph, where.name, mesh_of(where)), microbatches=4)
    names = [o.name for o in graph.operators]
    half = len(names) // 2
    first, second = (names[0], names[half - 1]), (names[half], names[-1])
    none, some, all_ = (
        predicted(graph, where, check(replace(plan, recompute=runs), graph))
        for runs in ((), (first,), (first, second))
    )
    assert none.seconds < some.seconds < all_.seconds
    assert some.peak_bytes > all_.peak_bytes


def test_a_microbatch_adds_its_gradients_and_python_starts_every_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, where = GRAPHS["mlp"], machine()
    plan = replace(BASELINES["one device"](graph, where.name, mesh_of(where)), microbatches=4)
    (started,) = PipelinedStep.of(graph, where, check(plan, graph)).passes
    assert started.forward == DISPATCH_SECONDS
    monkeypatch.setattr(pipelined, "DISPATCH_SECONDS", 0.0)
    (adding,) = PipelinedStep.of(graph, where, check(plan, graph)).passes
    monkeypatch.setattr(PipelinedStep, "_added_bytes", lambda *_: 0)
    (plain,) = PipelinedStep.of(graph, where, check(plan, graph)).passes
    parameters = [a.tensor for a in graph.arguments if a.role == "parameter"]
    shapes = [graph.tensors[t].shape for t in parameters]
    # cuBLAS adds the gradients of kernels to their sums, which it reads besides.
    nbytes = sum(4 * math.prod(shape) * (1 if len(shape) == 2 else 3) for shape in shapes)
    seconds = nbytes / float(where.bandwidth_for(np.array(nbytes)))
    assert adding.forward == plain.forward
    assert adding.backward - plain.backward == pytest.approx(seconds)
    assert adding.update == plain.update


def test_stored_shards_are_gathered_once_under_zero_1_and_per_microbatch_under_zero_3(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelined, "DISPATCH_SECONDS", 0.0)
    graph, where = GRAPHS["mlp"], machine()
    passes = {}
    for name in ("data parallel", "ZeRO-1", "ZeRO-3"):
        plan = replace(BASELINES[name](graph, where.name, mesh_of(where)), microbatches=4)
        (passes[name],) = PipelinedStep.of(graph, where, check(plan, graph)).passes
    plain, slots, variables = passes.values()
    assert slots[:2] == plain[:2] and slots[2] != plain[2]
    assert variables[0] > plain[0] and variables[1] == plain[1]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_gradients_of_stored_shards_are_all_reduced_in_front_of_an_update_of_its_own(
    microbatches: int,
) -> None:
    graph, where = GRAPHS["mlp"], machine()
    one_program = BASELINES["ZeRO-1"](graph, where.name, mesh_of(where))
    assert "reduce_scatter" in predicted(graph, where, one_program).traffic
    whole, slots, variables = (
        predicted(graph, where, in_two(graph, where, inner, microbatches))
        for inner in ("data parallel", "ZeRO-1", "ZeRO-3")
    )
    for stored in (slots, variables):
        assert "reduce_scatter" not in stored.traffic
        assert stored.traffic["all_reduce"] == whole.traffic["all_reduce"]
    # New variables are gathered once per step, variables in shards for each microbatch.
    gathers = variables.traffic["all_gather"]
    assert gathers == microbatches * slots.traffic["all_gather"]


def test_sums_of_stored_shards_take_the_seconds_of_all_reduces_in_pieces_only() -> None:
    graph, where = GRAPHS["mlp"], machine()

    def sum_seconds(plan: Plan) -> float:
        step = PlacedStep.of(graph, where, plan)
        return float(sum(cost.gradient_sum_seconds[0] for cost in step.costs))

    names = ("data parallel", "ZeRO-1")
    staged = [sum_seconds(in_two(graph, where, inner)) for inner in names]
    whole = [sum_seconds(BASELINES[name](graph, where.name, mesh_of(where))) for name in names]
    assert staged[1] == staged[0] > 0
    assert whole[1] < whole[0]


def test_gradients_of_several_microbatches_are_summed_alone_before_the_update() -> None:
    graph, where = GRAPHS["mlp"], machine(0.9)
    once, several = (
        PipelinedStep.of(graph, where, in_two(graph, where, microbatches=count)) for count in (1, 2)
    )
    for stage in range(2):
        sum_seconds = float(
            sum(several.costs[o].waiting_sum_seconds[0] for o in several._members(stage))
        )
        update_seconds = several.passes[stage].update - sum_seconds
        assert sum_seconds > 0
        assert update_seconds == pytest.approx(once.passes[stage].update)


def test_copies_and_gradients_of_a_microbatch_wait_for_one_gather(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelined, "DISPATCH_SECONDS", 0.0)
    graph, where = replace(GRAPHS["transformer"], target="cuda"), machine()
    names = [operator.name for operator in graph.operators]
    added = {}
    for name in ("data parallel", "ZeRO-3"):
        plan = replace(BASELINES[name](graph, where.name, mesh_of(where)), microbatches=4)
        again = replace(plan, recompute=((names[6], names[14]),))
        plain, repeated = (
            PipelinedStep.of(graph, where, check(p, graph)).passes[0].backward
            for p in (plan, again)
        )
        added[name] = repeated - plain
    assert added["ZeRO-3"] == pytest.approx(added["data parallel"])


def test_the_timeline_has_a_row_per_stage_and_the_predicted_length() -> None:
    graph, where = GRAPHS["transformer"], machine(0.5)
    plan = in_two(graph, where, microbatches=4)
    timeline = simulate(graph, where, plan)
    assert timeline.seconds == predicted(graph, where, plan).seconds
    assert {s.group for s in timeline.spans} == {"stage 0", "stage 1"} and timeline.groups == 2
    for group in ("stage 0", "stage 1"):
        spans = sorted(
            (s for s in timeline.spans if s.group == group and s.kind == "compute"),
            key=lambda s: s.start,
        )
        assert len(spans) == 9 and all(
            a.end <= b.start * (1 + 1e-9) for a, b in zip(spans, spans[1:], strict=False)
        )
    assert timeline.idle["bubble"] > 0 and max(n for _, n in timeline.memory) == timeline.peak_bytes
    path = timeline.critical_path()
    assert path[0].start == 0 and path[-1].end == timeline.seconds


def test_a_pipelined_plan_survives_a_file() -> None:
    graph, where = GRAPHS["mlp"], machine()
    names = [o.name for o in graph.operators]
    plan = in_two(graph, where, microbatches=2, recompute=((names[0], names[0]),))
    again = check(Plan.from_json(plan.to_json()), graph)
    assert (
        again == plan
        and operator_stages(graph, again) == operator_stages(graph, plan)
        and not diff(plan, again)
    )
    assert diff(plan, replace(plan, microbatches=4, recompute=())) == [
        "microbatches: 2 -> 4",
        f"rematerialized: {names[0]} ... {names[0]} -> nothing",
    ]
    assert (
        "2 microbatches" in str(plan) and stage_plan(graph, plan).devices == 2 * 2
    )  # two devices a stage, two times


def test_invalid_stages_are_refused_with_one_sentence() -> None:
    graph, where = GRAPHS["mlp"], machine()
    plan = in_two(graph, where)
    first, last = graph.operators[0].name, graph.operators[-1].name
    axis, other = (a.name for a in plan.mesh.axes[:2])
    wrong = {
        f"'{first}' is placed on slice 7 of axis '{axis}', which has slices 0 to 1.": {
            "choices": {**plan.choices, first: {axis: "at(7)"}}
        },
        f"'{first}' has no slice of axis '{axis}'": {
            "choices": {**plan.choices, first: {other: "S"}},
            "microbatches": 2,
        },
        f"A batch of {graph.batch_size} cannot be cut into 7 microbatches. "
        "Use a number that divides it, such as 8.": {"microbatches": 7},
        "Stage 1 of the plan has no operators.": {
            "choices": {name: {axis: "at(0)"} for name in plan.choices},
            "microbatches": 2,
        },
        "The plan rematerializes 'nobody', which the model does not have": {
            "recompute": (("nobody", last),)
        },
        "overlaps with another run or ends before it begins": {"recompute": ((last, first),)},
    }
    for sentence, changes in wrong.items():
        with pytest.raises(PlanError) as error:
            check(replace(plan, **changes), graph)
        assert sentence in str(error.value)
    backwards = {
        name: {**choice, axis: f"at({1 - int(choice[axis][3])})"}
        for name, choice in plan.choices.items()
    }
    with pytest.raises(PlanError, match="Number the stages in the order of the model"):
        simulate(graph, where, check(replace(plan, choices=backwards, microbatches=2), graph))
    assert (
        simulate(graph, where, check(replace(plan, choices=backwards), graph)).seconds
        == simulate(graph, where, plan).seconds
    )  # once is no order


def test_a_plan_of_other_levels_is_fitted_to_the_machine_or_refused() -> None:
    graph = GRAPHS["mlp"]
    plan = in_two(graph, load("h100:4"), microbatches=4)
    strange = replace(plan, mesh=Mesh(tuple(replace(a, level=0) for a in plan.mesh.axes)))
    assert fit_mesh(plan, load("h100:4")) is plan
    assert [a.level for a in fit_mesh(strange, load("h100:4")).mesh.axes] == [1, 1]
    assert (
        simulate(graph, load("h100:4"), fit_mesh(strange, load("h100:4"))).seconds
        == simulate(graph, load("h100:4"), plan).seconds
    )
    with pytest.raises(
        PlanError,
        match=r"splits 2 x 2 ways, which does not divide h100:6 with "
        r"1 \(network\) x 6 \(node\). Plan again",
    ):
        fit_mesh(strange, load("h100:6"))


def test_a_value_between_two_updates_is_sent_after_the_last_backward_pass() -> None:
    plan = in_two(GRAPHS["mlp"], machine(), microbatches=2)
    edge = StageEdge(0, 1, "update", "update")
    alone = by_hand(plan, (1.0, 2.0, 0.0), {})
    assert by_hand(plan, (1.0, 2.0, 0.0), {edge: 5.0}) == alone + 5.0

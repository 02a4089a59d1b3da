"""A uniform step: against its parts, against the additive prediction, and by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.cost.predict import predict
from partita.cost.terms import cost_terms
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.baselines import BASELINES
from partita.search.find import mesh_of
from partita.simulation.engine import check, run, sweep
from partita.simulation.simulate import simulate
from partita.simulation.structure import step_structure
from partita.simulation.uniform import UniformStep

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def machine(overlap: float, name: str = "h100:4") -> Machine:
    whole = load(name)
    return replace(whole, backend=replace(whole.backend, overlap=overlap))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("plan", BASELINES)
def test_without_overlap_a_step_takes_the_sum_of_its_parts(graph: OperatorGraph, plan: str) -> None:
    where = machine(0.0)
    made = BASELINES[plan](graph, where.name, mesh_of(where))
    timeline = simulate(graph, where, made)
    assert timeline.seconds == pytest.approx(predict(graph, where, made).seconds, rel=1e-9)
    assert timeline.seconds == pytest.approx(sum(s.seconds for s in timeline.spans), rel=1e-9)
    assert all(s.critical for s in timeline.spans if s.seconds > 0)


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("plan", ["data parallel", "ZeRO-3", "tensor parallel"])
def test_more_overlap_never_hurts_and_never_beats_the_kernels_or_the_links(
    graph: OperatorGraph, plan: str
) -> None:
    before = float("inf")
    for overlap in (0.0, 0.3, 0.7, 1.0):
        where = machine(overlap)
        timeline = simulate(graph, where, BASELINES[plan](graph, where.name, mesh_of(where)))
        kernels = sum(s.seconds for s in timeline.spans if s.kind == "compute")
        links = sum(s.seconds for s in timeline.spans if s.kind not in ("compute", "held up"))
        assert (
            max(kernels, links) * (1 - 1e-12)
            <= timeline.seconds
            <= min(before, kernels + links) * (1 + 1e-12)
        )
        assert timeline.seconds == pytest.approx(kernels + sum(timeline.idle.values()), rel=1e-9)
        before = timeline.seconds
    assert (
        before < kernels + links or plan == "tensor parallel"
    )  # whose collectives all block: nothing is hidden


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_more_bandwidth_never_hurts(graph: OperatorGraph) -> None:
    slow, fast = machine(0.5), machine(0.5).revised({"level.node.bandwidth": 4e12}, "a test")
    for name, make in BASELINES.items():
        plan = make(graph, slow.name, mesh_of(slow))
        assert simulate(graph, fast, plan).seconds <= simulate(graph, slow, plan).seconds, name


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_spans_of_a_stream_do_not_overlap_and_gradient_sums_hide_behind_the_backward_pass(
    graph: OperatorGraph,
) -> None:
    where = machine(1.0)
    timeline = simulate(graph, where, BASELINES["data parallel"](graph, where.name, mesh_of(where)))
    for stream in ("kernels", "links"):
        spans = [s for s in timeline.spans if s.stream == stream]
        assert all(a.end <= b.start * (1 + 1e-12) for a, b in zip(spans, spans[1:], strict=False))
    ends = {
        s.operator: s.end for s in timeline.spans if s.kind == "compute" and s.phase == "backward"
    }
    sums = [s for s in timeline.spans if s.kind == "sum"]
    assert sums and all(s.start >= ends[s.operator] * (1 - 1e-12) for s in sums)
    assert sums[0].end < max(ends.values())  # it does not wait for the whole backward pass
    path = timeline.critical_path()
    assert path[0].start == 0 and path[-1].end == timeline.seconds
    assert all(a.end == pytest.approx(b.start) for a, b in zip(path, path[1:], strict=False))


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_the_memory_curve_peaks_at_the_predicted_memory(graph: OperatorGraph) -> None:
    where = machine(0.3)
    for make in BASELINES.values():
        timeline = simulate(graph, where, make(graph, where.name, mesh_of(where)))
        assert (
            max(n for _, n in timeline.memory) == timeline.peak_bytes == sum(timeline.held.values())
        )
        assert [t for t, _ in timeline.memory] == sorted(t for t, _ in timeline.memory)
        assert timeline.memory[-1][0] == timeline.seconds


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_an_incremental_sweep_over_plans_equals_a_whole_run_to_the_bit(
    graph: OperatorGraph, overlap: float
) -> None:
    h100 = machine(overlap)
    mesh = mesh_of(h100)
    times = None
    previous = np.zeros(0)
    for make in BASELINES.values():
        step = UniformStep(
            graph, h100, make(graph, h100.name, mesh), cost_terms(graph, h100.backend)
        )
        tasks = check(step.tasks.tasks)
        whole = run(tasks)
        if times is None:
            times = whole
        elif (tasks.seconds != previous).any():
            sweep(
                int(np.flatnonzero(tasks.seconds != previous)[0]),
                tasks.seconds,
                tasks.stream,
                tasks.streams,
                tasks.first,
                tasks.before,
                times.start,
                times.end,
            )
        assert times.end.tobytes() == whole.end.tobytes()
        previous = tasks.seconds


def test_every_cost_term_has_a_slot() -> None:
    for graph in GRAPHS.values():
        found = cost_terms(graph)
        step = step_structure(graph, found)
        kinds = {(s.kind, s.operator, s.phase) for s in step.slots}
        for o, own in enumerate(found.operators):
            assert all(("compute", o, w.phase) in kinds for w in own.work)
            assert all(("exchange", o, h.phase) in kinds for h in own.halos)
        shares: dict[tuple[int, str], float] = {}
        for s in step.slots:
            if s.kind == "compute":
                shares[s.operator, s.phase] = shares.get((s.operator, s.phase), 0.0) + s.share
        assert all(total == pytest.approx(1.0) for total in shares.values())
        moved = {(m.home, m.reader, m.phase, m.read_phase) for m in found.edges}
        assert moved == {
            (s.operator, s.reader, s.phase, s.read_phase) for s in step.slots if s.kind == "move"
        }


def test_slots_of_interleaved_operators_have_an_order() -> None:
    import keras

    import partita
    from partita.capture.program import capture_program

    with partita.abstract():
        model = keras.applications.MobileNetV3Small(
            weights=None, input_shape=(64, 64, 3), classes=16
        )  # squeezes and excites
    model.compile("sgd", "sparse_categorical_crossentropy")
    graph = capture_program(model, 16).graph
    step = step_structure(graph, cost_terms(graph, machine(0.5).backend))
    assert all(b < n for n, before in enumerate(step.before) for b in before)
    assert any(s.share < 1 for s in step.slots)


def test_collectives_of_input_gradients_do_not_wait_for_weight_gradients() -> None:
    graph = replace(GRAPHS["transformer"], target="cuda")
    step = step_structure(graph, cost_terms(graph, machine(0.5).backend))
    kernels: dict[int, list[int]] = {}
    for n, slot in enumerate(step.slots):
        if (slot.kind, slot.phase) == ("compute", "backward"):
            kernels.setdefault(slot.operator, []).append(n)
    summed = {slot.operator for slot in step.slots if slot.kind == "sum"}
    apart = {o: slots for o, slots in kernels.items() if o in summed and len(slots) == 2}
    assert apart
    for n, slot in enumerate(step.slots):
        if slot.phase != "backward" or slot.operator not in apart:
            continue
        inputs, weights = apart[slot.operator]
        assert inputs < weights
        if slot.kind == "sum":
            assert step.before[n] == (weights,)
        elif slot.kind in ("exchange", "move"):
            assert weights not in step.before[n]


def test_weight_gradients_hide_collectives_of_input_gradients() -> None:
    where = machine(1.0)
    seconds = []
    for target in ("", "cuda"):
        graph = replace(GRAPHS["transformer"], target=target)
        plan = BASELINES["tensor parallel"](graph, where.name, mesh_of(where))
        seconds.append(simulate(graph, where, replace(plan, target=target)).seconds)
    assert seconds[1] < 0.99 * seconds[0]

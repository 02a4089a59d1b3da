"""Placed steps: folding changes nothing, traffic and memory by hand, devices that differ."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.cost.predict import predict
from partita.cost.terms import cost_terms
from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import DeviceKind, Machine, load
from partita.machine import check as check_machine
from partita.machine.parts import slowest_kind
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.diff import diff
from partita.plans.plan import Plan
from partita.search.bound import lower_bound_seconds
from partita.search.find import fits, mesh_of
from partita.simulation.placed import PlacedStep
from partita.simulation.simulate import predicted, simulate

DATA = Path(__file__).parents[1] / "data"
GRAPHS = {
    name: OperatorGraph.load(DATA / f"{name}.graph.json") for name in ("mlp", "cnn", "transformer")
}


def machine(overlap: float = 0.0, name: str = "k80-cluster", devices: int = 8) -> Machine:
    whole = load(name).with_devices(devices)
    return replace(whole, backend=replace(whole.backend, overlap=overlap))


@st.composite
def plans(draw: st.DrawFn) -> tuple[OperatorGraph, Machine, Plan]:
    """A baseline of a graph on a machine, with some operators placed on slices of some axes."""
    graph = GRAPHS[draw(st.sampled_from(["mlp", "cnn"] * 3 + ["transformer"]))]
    where = machine(
        draw(st.sampled_from([0.0, 0.4, 1.0])),
        *draw(st.sampled_from([("k80-cluster", 8), ("h100:4", 4), ("dgx-h100:2", 16)])),
    )
    mesh = mesh_of(where)
    base = BASELINES[draw(st.sampled_from(list(BASELINES)))](graph, where.name, mesh)
    axes = draw(st.lists(st.sampled_from(mesh.axes), max_size=3, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 20)))
    choices = {
        o: {**choice, **{a.name: f"at({rng.integers(a.size)})" for a in axes if rng.random() < 0.5}}
        for o, choice in base.choices.items()
    }
    conv = {
        graph.operators[n].name
        for n in range(len(graph.operators))
        if graph.operators[n].kind == "conv"
    }
    choices = {
        o: {a: use for a, use in c.items() if use[:3] == "at(" or o not in conv} if axes else c
        for o, c in choices.items()
    }
    return (
        graph,
        where,
        check(replace(base, choices=choices, storage={} if axes else base.storage), graph),
    )


@settings(max_examples=40, deadline=None)
@given(plans())
def test_folded_and_unfolded_steps_are_equal(
    case: tuple[OperatorGraph, Machine, Plan],
) -> None:
    folded, unfolded = PlacedStep.of(*case), PlacedStep.of(*case, fold=False)
    assert unfolded.groups.count == case[2].devices
    assert folded.seconds == unfolded.seconds
    assert 0 < folded.busy_seconds <= folded.seconds * (1 + 1e-12)
    assert 0 < folded.path_seconds <= folded.seconds * (1 + 1e-12)
    assert folded.traffic == unfolded.traffic
    assert [m.peak for m in folded.memories] == [
        unfolded.memories[unfolded.groups.number.reshape(-1)[d]].peak
        for d in _first_devices(folded)
    ]


def _first_devices(placed: PlacedStep) -> list[int]:
    """One device of every group."""
    whole = placed.groups.number.reshape(
        [s if a in placed.groups.axes else 1 for a, s in enumerate(placed.plan.mesh.sizes)]
    )
    return [
        int(np.flatnonzero(np.broadcast_to(whole, placed.plan.mesh.sizes).reshape(-1) == c)[0])
        for c in range(placed.groups.count)
    ]


@pytest.mark.parametrize(
    ("graph", "overlap"), [(GRAPHS["mlp"], 0.0), (GRAPHS["mlp"], 1.0), (GRAPHS["cnn"], 0.4)]
)
def test_without_placed_operators_one_group_equals_a_uniform_step(
    graph: OperatorGraph, overlap: float
) -> None:
    where = machine(overlap)
    for make in BASELINES.values():
        plan = make(graph, where.name, mesh_of(where))
        placed = PlacedStep.of(graph, where, plan)
        assert placed.groups.count == 1 and placed.seconds == simulate(graph, where, plan).seconds
        assert placed.prediction().memory.peak == predict(graph, where, plan).memory.peak
        assert {
            kind: round(sent / plan.devices) for kind, sent in placed.traffic.items()
        } == predict(graph, where, plan).traffic


def two_branches() -> OperatorGraph:
    """Two dense layers read the same batch; a third one reads both.

    The second one's operator joins them.
    """
    import keras

    import partita
    from partita.capture.program import capture_program

    with partita.abstract():
        x = keras.Input((256,))
        both = keras.layers.Concatenate()(
            [keras.layers.Dense(512, name=name)(x) for name in ("left", "right")]
        )
        model = keras.Model(x, keras.layers.Dense(8, name="out")(both))
    model.compile("sgd", "mse")
    return capture_program(model, 64).graph


def placed(graph: OperatorGraph, where: Machine, **choices: str) -> PlacedStep:
    """A step with the use of the machine's only axis by operator; others are replicated."""
    mesh = mesh_of(where)
    return PlacedStep.of(
        graph,
        where,
        check(
            Plan(
                graph.name,
                where.name,
                mesh,
                {
                    o.name: {"a": choices[o.name]} if o.name in choices else {}
                    for o in graph.operators
                },
            ),
            graph,
        ),
    )


def test_branches_on_two_devices_run_at_the_same_time_by_hand() -> None:
    graph, where = two_branches(), machine(0.0, "h100:2", 2)
    one, two = (
        placed(graph, where, left="at(0)", right="at(0)", out="at(0)"),
        placed(graph, where, left="at(0)", right="at(1)", out="at(0)"),
    )
    piece = {}
    for n, slot in enumerate(two.structure.slots):
        if slot.kind == "compute":
            piece.setdefault((graph.operators[slot.operator].name, slot.phase), []).append(
                float(two.seconds_of_kind[0][n])
            )
    dense, join = piece["right", "forward"]
    apart, right = piece["right", "backward"]
    (left,), (out_f,), (out_b,) = (
        piece["left", "forward"],
        piece["out", "forward"],
        piece["out", "backward"],
    )
    level = where.levels[1]
    send = lambda width: level.latency + 64 * width * 4 / level.bandwidth
    there = (
        max(dense, left + send(512)) + join
    )  # device 1 has its own half and waits for the other one
    gradient = there + send(1024) + out_f + out_b + send(1024) + apart
    ends = [
        gradient + right + sum(piece["right", "update"]),
        gradient
        + send(512)
        + sum(piece["left", "backward"])
        + sum(piece["left", "update"] + piece["out", "update"]),
    ]
    assert two.seconds == pytest.approx(max(ends), rel=1e-12)
    assert two.traffic == {"transfer": 64 * 4 * (512 + 1024 + 1024 + 512)}
    assert (
        two.seconds < one.seconds == pytest.approx(sum(sum(p) for p in piece.values()), rel=1e-12)
    )
    held = {a.path.split("/")[0]: 0 for a in graph.arguments if a.role == "parameter"}
    for a in graph.arguments:
        if a.role == "parameter":
            held[graph.operators[graph.home[a.tensor]].name] = (
                held.get(graph.operators[graph.home[a.tensor]].name, 0)
                + graph.tensors[a.tensor].nbytes
            )
    assert [m.parameters for m in two.memories] == [held["left"] + held["out"], held["right"]]


@pytest.mark.parametrize(
    ("right", "out", "sent"),
    [
        (
            "at(1)",
            "at(1)",
            {"transfer": 2 * 64 * 512 * 4},
        ),  # the left half there, its gradient back
        (
            "at(1)",
            "",
            {"transfer": 2 * 64 * 512 * 4, "broadcast": 64 * 1024 * 4},
        ),  # whole at both: the gradient is there already
        (
            "at(1)",
            "S",
            {
                "transfer": 2 * 64 * 512 * 4,
                "scatter": 64 * 1024 * 4 / 2,
                "gather": 64 * 1024 * 4 / 2,
                "all_reduce": 2 * 4 * (1024 * 8 + 8) + 2 * 4,
            },
        ),
    ],
)
def test_traffic_between_operators_on_different_slices(
    right: str, out: str, sent: dict[str, float]
) -> None:
    graph = two_branches()
    assert (
        placed(
            graph,
            machine(0.0, "h100:2", 2),
            left="at(0)",
            right=right,
            **({"out": out} if out else {}),
        ).traffic
        == sent
    )


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=GRAPHS)
def test_all_operators_on_slice_0_equal_one_device(graph: OperatorGraph) -> None:
    where = machine(0.4, devices=4)
    mesh = mesh_of(where)
    corner = Plan(
        graph.name,
        where.name,
        mesh,
        {o.name: {a.name: "at(0)" for a in mesh.axes} for o in graph.operators},
    )
    alone = BASELINES["one device"](graph, where.name, mesh)
    here, there = predicted(graph, where, check(corner, graph)), predicted(graph, where, alone)
    assert (
        here.seconds == pytest.approx(there.seconds, rel=1e-12)
        and here.peak_bytes == there.peak_bytes
        and not here.traffic
    )


def test_more_bandwidth_never_hurts_a_chain_of_placed_operators() -> None:
    graph, where = GRAPHS["mlp"], machine(0.0, "h100:4", 4)
    mesh = mesh_of(where)
    plan = Plan(
        graph.name,
        where.name,
        mesh,
        {o.name: {mesh.axes[0].name: f"at({n % 2})"} for n, o in enumerate(graph.operators)},
    )
    seconds = [
        predicted(graph, where.revised({"level.node.bandwidth": b}, "a test"), plan).seconds
        for b in (1e9, 1e10, 1e11, 1e12)
    ]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]


def test_no_placed_plan_beats_the_lower_bound() -> None:
    graph, where = GRAPHS["transformer"], machine(0.4, devices=4)
    found, mesh, rng = cost_terms(graph, where.backend), mesh_of(where), np.random.default_rng(0)
    for _ in range(5):
        choices = {
            o.name: {a.name: f"at({rng.integers(a.size)})" for a in mesh.axes}
            for o in graph.operators
        }
        assert predicted(
            graph, where, Plan(graph.name, where.name, mesh, choices), found
        ).seconds >= lower_bound_seconds(found, where, 4)


def test_a_placed_plan_is_a_file_and_its_timeline_has_rows_of_every_group() -> None:
    graph, where = GRAPHS["mlp"], machine(0.4, "h100:4", 4)
    mesh = mesh_of(where)
    first, last = graph.operators[0].name, graph.operators[-1].name
    base = BASELINES["data parallel"](graph, where.name, mesh)
    plan = check(replace(base, choices={**base.choices, last: {"a": "at(1)", "b": "S"}}), graph)
    again = check(Plan.from_json(plan.to_json()), graph)
    assert again == plan and diff(base, plan) == [f"{last}: S:a,b -> at(1):a S:b"]
    timeline = simulate(graph, where, plan)
    assert timeline.groups == 2 and {group for group, _ in timeline.rows()} == {"a=0", "a=1"}
    assert [row for row in timeline.rows() if row[1] == "kernels"] == [
        ("a=0", "kernels"),
        ("a=1", "kernels"),
    ]
    assert {s.group for s in timeline.spans if s.operator == last and s.kind == "compute"} == {
        "a=1"
    }
    assert {s.group for s in timeline.spans if s.operator == first and s.kind == "compute"} == {
        "a=0",
        "a=1",
    }
    assert (
        max(n for _, n in timeline.memory) == timeline.peak_bytes
        and timeline.seconds == predicted(graph, where, plan).seconds
    )
    assert timeline.seconds == pytest.approx(
        timeline.busy_part() * timeline.seconds + sum(timeline.idle.values())
    )
    path = timeline.critical_path()
    assert min(s.start for s in path) == 0 and max(s.end for s in path) == timeline.seconds


def test_storage_on_slices_without_the_operator_is_refused() -> None:
    graph, where = GRAPHS["mlp"], machine(0.0, "h100:4", 4)
    plan = BASELINES["ZeRO-1"](graph, where.name, mesh_of(where))
    path = next(iter(plan.storage))
    home = graph.operators[
        next(graph.home[a.tensor] for a in graph.arguments if a.path == path)
    ].name
    with pytest.raises(
        PlanError,
        match=rf"stores '{path}' over axis 'a', but its operator '{home}' "
        rf"is only on slice 1 of it. Store it over other axes",
    ):
        check(replace(plan, choices={**plan.choices, home: {"a": "at(1)"}}), graph)


def test_the_number_of_tasks_does_not_grow_with_devices() -> None:
    graph, tasks = GRAPHS["mlp"], []
    for devices in (8, 64):
        where = machine(0.5, devices=devices)
        axis = mesh_of(where).axes[-1].name
        choices = {o.name: {axis: f"at({n % 2})"} for n, o in enumerate(graph.operators)}
        tasks.append(
            PlacedStep.of(
                graph, where, Plan(graph.name, where.name, mesh_of(where), choices)
            ).tasks.tasks.count
        )
    assert tasks[0] == tasks[1]


def mixed(where: Machine, *counts: int, slower: float = 1.0) -> Machine:
    """A machine of equal devices with kinds of devices instead, every second kind slower."""
    of = lambda n: replace(
        where.device,
        engines=tuple(
            replace(e, peak=e.peak / (slower if n % 2 else 1.0)) for e in where.device.engines
        ),
    )
    kinds = tuple(
        DeviceKind(d.name, d.overhead, d.memories, d.engines, d.points, f"kind{n}", count)
        for n, count in enumerate(counts)
        for d in [of(n)]
    )
    found = replace(where, kinds=kinds, device=slowest_kind(kinds))
    check_machine(found)
    return found


@pytest.mark.parametrize("graph", [GRAPHS["mlp"], GRAPHS["cnn"]], ids=["mlp", "cnn"])
def test_equal_kinds_are_one_and_all_wait_for_slower_devices(graph: OperatorGraph) -> None:
    for overlap in (0.0, 0.4):
        where = machine(overlap)
        for make in BASELINES.values():
            plan = make(graph, where.name, mesh_of(where))
            plain, equal = predicted(graph, where, plan), predicted(graph, mixed(where, 3, 5), plan)
            assert equal.seconds == pytest.approx(plain.seconds, rel=1e-12) and (
                equal.peak_bytes,
                equal.traffic,
            ) == (plain.peak_bytes, plain.traffic)
            slow = mixed(where, 3, 5, slower=100.0)
            waits = predicted(graph, slow, plan).seconds
            assert (
                predicted(graph, slow.of_kind(0), plan).seconds
                < waits
                <= predicted(graph, slow.of_kind(1), plan).seconds * (1 + 1e-12)
            )


@settings(max_examples=30, deadline=None)
@given(plans(), st.data())
def test_folding_of_different_devices_changes_no_time(
    case: tuple[OperatorGraph, Machine, Plan], data: st.DataObject
) -> None:
    graph, where, plan = case
    first = data.draw(st.integers(1, where.devices - 1))
    where = mixed(where, first, where.devices - first, slower=7.0)
    folded, unfolded = (
        PlacedStep.of(graph, where, plan),
        PlacedStep.of(graph, where, plan, fold=False),
    )
    assert folded.seconds == unfolded.seconds
    assert folded.traffic == pytest.approx(unfolded.traffic)
    assert folded.groups.count <= unfolded.groups.count


def test_a_collective_over_all_devices_needs_one_group_per_kind() -> None:
    graph = GRAPHS["mlp"]
    where = mixed(machine(0.4, devices=64), 13, 51, slower=3.0)
    plan = BASELINES["data parallel"](graph, where.name, mesh_of(where))
    timeline = simulate(graph, where, plan)
    assert timeline.groups == 2 and PlacedStep.of(graph, where, plan).groups.device_counts == [
        13,
        51,
    ]
    assert all(group.endswith(("kind0", "kind1")) for group, _ in timeline.rows())


def test_a_plan_fits_if_every_kind_of_device_has_its_memory() -> None:
    graph, plain = GRAPHS["mlp"], machine(0.0, "h100:2", 2)
    where = mixed(plain, 1, 1)
    first, last = graph.operators[0].name, graph.operators[-1].name
    plan = Plan(
        graph.name,
        where.name,
        mesh_of(where),
        {o.name: {"a": f"at({int(o.name == last)})"} for o in graph.operators},
    )
    assert first != last
    big, small = (
        predicted(graph, where, plan).peak_bytes,
        PlacedStep.of(graph, where, plan).memories[1].peak,
    )
    assert small < big
    room = (big + small) // 2

    def capacity(*amounts: int) -> Machine:
        return where.revised(
            {
                f"kind.kind{n}.memory.{where.device.memories[0].name}.capacity": int(amount / 0.95)
                + 1
                for n, amount in enumerate(amounts)
            },
            "a test",
        )

    assert fits(capacity(big, 2 * small), predicted(graph, capacity(big, 2 * small), plan))
    for amounts in ((room, big), (2 * big, small // 2)):
        assert not fits(capacity(*amounts), predicted(graph, capacity(*amounts), plan))


def test_microbatches_on_different_devices_are_refused() -> None:
    graph, where = GRAPHS["mlp"], mixed(machine(), 4, 4)
    plan = replace(BASELINES["one device"](graph, where.name, mesh_of(where)), microbatches=2)
    with pytest.raises(PlanError, match="cannot be simulated on k80-cluster, whose devices differ"):
        simulate(graph, where, plan)


def test_a_collective_shares_its_link_only_with_devices_that_send() -> None:
    """Four devices share a node's network card.

    A layer on one of them has it alone, two layers on two of them have half of it each.
    """
    graph = two_branches()
    where = machine(name="k80-cluster", devices=16)
    mesh = mesh_of(where)
    split = {axis.name: "S" for axis in mesh.axes if axis.level == 0}
    inner = [axis.name for axis in mesh.axes if axis.level > 0]

    def gradient_seconds(**slices: str) -> float:
        choices = {}
        for operator in graph.operators:
            choices[operator.name] = dict(split)
            choices[operator.name] |= {axis: slices[operator.name] for axis in inner}
        plan = check(Plan(graph.name, where.name, mesh, choices, batch_size=64), graph)
        step = PlacedStep.of(graph, where, plan)
        spans = step.timeline().spans
        return max(span.seconds for span in spans if span.kind != "compute")

    nbytes = 4 * (256 * 512 + 512)
    card = where.levels[0].bandwidth
    steps = 2 * where.levels[0].latency * 2
    one = gradient_seconds(left="at(0)", right="at(0)", out="at(0)")
    assert one == pytest.approx(steps + 2 * 3 / 4 * nbytes / card, rel=0.2)
    two = gradient_seconds(left="at(0)", right="at(1)", out="at(0)")
    assert two - steps == pytest.approx(2 * (one - steps), rel=0.2)

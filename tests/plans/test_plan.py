"""Plan files: saving and loading is the identity, and messages name every mistake."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.planning import check_plan
from partita.plans.check import check
from partita.plans.diff import diff
from partita.plans.plan import Axis, Mesh, Plan, Storage, mesh_for

DATA = Path(__file__).parents[1] / "data"
MESH = Mesh.of((2, 2))


def small(**changes: object) -> Plan:
    fields = {
        "graph": "net",
        "machine": "host",
        "mesh": MESH,
        "choices": {"conv": {"a": "S", "b": "S"}, "dense": {"a": "P"}},
    }
    return Plan(**{**fields, **changes})  # type: ignore[arg-type]


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.dictionaries(st.sampled_from("ab"), st.sampled_from(["S", "A1", "P", "R"])),
    ),
    st.dictionaries(
        st.text(max_size=8),
        st.builds(Storage, st.integers(0, 3), st.just(("a", "b")), st.sampled_from([1, 2, 3])),
    ),
)
def test_saving_and_loading_is_the_identity(choices: dict, storage: dict) -> None:
    plan = small(choices=choices, storage=storage, notes=("a note",), predicted={"seconds": 0.5})
    plan = replace(plan, machine_digest="0a1b")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_a_plan_prints_runs_of_layers_on_one_line() -> None:
    plan = small(
        choices={"c1": {"a": "S"}, "c2": {"a": "S"}, "d": {}},
        storage={"d/kernel": Storage(0, ("a",), 3)},
    )
    assert str(plan).splitlines() == [
        "plan 'found' for net on host: a=2 x b=2",
        "  c1 ... c2 (2): S:a",
        "  d: replicate",
        "  1 variable stored ZeRO-3 over a",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "The plan: colour is an unknown key: use only schema, "),
        ({"schema": 9}, "schema is 9: plan again, because this version reads 1."),
        (
            {"operators": {"conv": "S:z"}},
            "operators.conv is over the unknown axis 'z': the mesh has a, b.",
        ),
        (
            {"operators": {"conv": "S"}},
            'operators.conv is \'S\': give factor:axes, as in "S:a,b P:c", or "replicate".',
        ),
        (
            {"operators": {"conv": "replicate S:a"}},
            "operators.conv is 'replicate S:a': 'replicate' stands alone: it splits no factor.",
        ),
        ({"target": "moon"}, "target is 'moon': give a text such as 'cpu', 'cuda' or 'tpu'."),
        (
            {"operators": {"conv": "S:a P:a"}},
            "operators.conv is 'S:a P:a', with axis 'a' for S and P: use an axis once.",
        ),
        (
            {"operators": {"conv": 3}},
            "operators.conv is 3: give a text of at most 100,000 characters.",
        ),
        (
            {"mesh": {"a": {"size": 1}}},
            "mesh.a.size is 1: give a whole number from 2 to 16,777,216.",
        ),
        ({"mesh": ["a"]}, "mesh is a list of 1: give an object of at most 24 keys."),
        (
            {"mesh": {"a": {"size": 2, "level": "x"}}},
            "mesh.a.level is 'x': give a whole number from 0 to 63.",
        ),
        ({"operators": 3}, "operators is 3: give an object of at most 10,000,000 keys."),
        ({"notes": 5}, "notes is 5: give a list of at most 10,000,000 items."),
        (
            {"predicted": {"seconds": "fast"}},
            "predicted.seconds is 'fast': give a finite number of at least 0.",
        ),
        (
            {"storage": {"k": {"dim": "x", "axes": ["a"], "zero": 1}}},
            "storage.k.dim is 'x': give a whole number from 0 to 63.",
        ),
        (
            {"storage": {"k": {"dim": 0}}},
            "storage.k.axes is missing: give an object with dim, axes, zero.",
        ),
        (
            {"storage": {"k": {"dim": 0, "axes": ["q"], "zero": 1}}},
            "storage.k.axes is over the unknown axis 'q': the mesh has a, b.",
        ),
    ],
)
def test_a_malformed_plan_is_refused_by_key(change: dict, message: str) -> None:
    with pytest.raises(PlanError) as error:
        Plan.from_json({**small().to_json(), **change})
    assert message in str(error.value)


def test_a_missing_key_is_named() -> None:
    value = small().to_json()
    del value["mesh"]
    with pytest.raises(
        PlanError, match="The plan: mesh is missing: give an object with schema, graph,"
    ):
        Plan.from_json(value)


def test_a_file_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="There is no file '.*absent.json': give a file that"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"schema": 1,\n oops}')
    with pytest.raises(
        PlanError, match=r"bad.json is not a plan \(.* in line 2, column 2\): give a file"
    ):
        Plan.load(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\x80\x81")
    with pytest.raises(
        PlanError,
        match=r"is no text in UTF-8 \(byte 0 is 0x80\): give a file that 'partita plan --save-plan' wrote.",
    ):
        Plan.load(tmp_path / "binary.json")
    with pytest.raises(PlanError, match="is a folder: name a file."):
        Plan.load(tmp_path)
    with pytest.raises(PlanError, match="None is of type 'NoneType', no name of a file: name a"):
        Plan.load(None)  # type: ignore[arg-type]
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(
        PlanError, match="list.json: the content is a list of 0: give an object with schema, "
    ):
        Plan.load(tmp_path / "list.json")


def test_diff_names_the_changes() -> None:
    other = small(
        choices={"conv": {"a": "S", "b": "S"}, "dense": {"b": "R"}},
        storage={"dense/kernel": Storage(0, ("a",), 1)},
    )
    assert diff(small(), small()) == []
    assert diff(small(), other) == [
        "dense: P:a -> R:b",
        "dense/kernel: absent -> ZeRO-1 dim 0 over a",
    ]
    axes = (Axis("a", 2, 0), Axis("b", 2, 1))
    one, two = small(mesh=Mesh(axes)), small(mesh=Mesh((axes[0], Axis("b", 2, 0))))
    levels = "a=2 (level 0) x b=2 (level 1) -> a=2 (level 0) x b=2 (level 0)"
    assert diff(one, two) == [f"mesh: {levels}"]


def test_a_mesh_has_small_prime_axes_slow_levels_first() -> None:
    mesh = mesh_for((6, 4))
    assert [(a.name, a.size, a.level) for a in mesh.axes] == [
        ("a", 3, 0),
        ("b", 2, 0),
        ("c", 2, 1),
        ("d", 2, 1),
    ]
    assert mesh_for((1,)).size == 1


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        (Storage(0, ("a",), 4), "with ZeRO stage 4: give 1, 2 or 3."),
        (Storage(0, ("a", "a"), 3), "an axis is twice. Store it over other axes."),
        (Storage(0, ("b",), 3), "splits it over 'b' already. Store it over other axes."),
        (Storage(9, ("a",), 3), "The plan splits dim 9 of"),
        (Storage(0, ("c",), 3), "is not a multiple of 5. Store it over fewer axes."),
    ],
)
def test_storage_that_cannot_be_is_refused(storage: Storage, reason: str) -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    (path, *_) = (a.path for a in graph.arguments if a.role == "parameter")
    home = graph.home[next(a.tensor for a in graph.arguments if a.path == path)]
    choices = {operator.name: {"a": "S"} for operator in graph.operators}
    choices[graph.operators[home].name] = {"a": "S", "b": "P"}
    plan = Plan(graph.name, "h100:20", Mesh.of((2, 2, 5)), choices, {path: storage})
    with pytest.raises(PlanError) as error:
        check(plan, graph)
    assert reason in str(error.value)


def test_the_variable_that_a_plan_means_is_named() -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    path = next(a.path for a in graph.arguments if a.role == "parameter")
    short = path.partition("/")[2]
    choices = {operator.name: {"a": "S"} for operator in graph.operators}
    plan = Plan(graph.name, "h100:4", Mesh.of((2, 2)), choices, {short: Storage(0, ("b",), 3)})
    with pytest.raises(PlanError, match=f"the model does not have. Did you mean '{path}'"):
        check(plan, graph)


def test_claims_belong_to_the_machine_that_a_plan_was_made_for() -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    choices = {operator.name: {"a": "S", "b": "S"} for operator in graph.operators}
    fields = {"notes": ("twice as fast",), "predicted": {"seconds": 1.0}}
    plan = Plan(graph.name, "h100:4", Mesh.of((2, 2)), choices, **fields)
    assert check_plan(plan, graph, load("h100:4")).notes == ("twice as fast",)
    elsewhere = check_plan(plan, graph, load("h100:8"))
    assert elsewhere.notes == ("the plan uses 4 of 8 devices: 4 are idle",)
    assert not elsewhere.predicted and elsewhere.machine == "h100:8"
    h100 = load("h100:4")
    slower = h100.revised({"level.node.bandwidth": 1e9}, "an edit", "assumed")
    old = replace(plan, machine_digest=h100.digest)
    assert check_plan(old, graph, h100).predicted == {"seconds": 1.0}
    changed = check_plan(old, graph, slower)
    assert not changed.predicted and not changed.machine_digest
    assert changed.notes == (
        "the saved predictions are for other numbers of 'h100:4' and are dropped",
    )
    assert check_plan(plan, graph, slower).predicted, "a file without a digest is as before"
    assert diff(old, replace(old, machine_digest=slower.digest)) == [
        "machine: h100:4 -> the same with other numbers"
    ]
    alone = Plan(graph.name, "h100:1", Mesh(()), {name: {} for name in choices})
    notes = check_plan(alone, graph, load("h100:2")).notes
    assert notes == ("the plan uses 1 of 2 devices: 1 is idle",)


@pytest.mark.parametrize(
    ("used", "note"),
    [
        ("abc", ()),
        ("c", ("'hand' splits no operator over axes a, b: 4 groups of devices do the same work",)),
        ("bc", ("'hand' splits no operator over axis a: 2 groups of devices do the same work",)),
        ("", ("'hand' splits no operator here: every device computes the whole step",)),
    ],
)
def test_a_plan_whose_devices_repeat_work_says_so(used: str, note: tuple[str, ...]) -> None:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    path = next(a.path for a in graph.arguments if a.role == "parameter")
    choices = {operator.name: dict.fromkeys(used, "S") for operator in graph.operators}
    storage = {path: Storage(0, ("c",), 3)} if used != "abc" else {}
    plan = Plan(graph.name, "h100:8", Mesh.of((2, 2, 2)), choices, storage, "hand")
    checked = check_plan(plan, graph, load("h100:8"))
    assert checked.notes == note
    assert check_plan(checked, graph, load("h100:8")).notes == note, "once"

"""Plan files: saving and loading is the identity, and messages name every mistake."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.plans.diff import diff
from partita.plans.plan import Mesh, Plan, Storage, mesh_for

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
        "  1 variables stored ZeRO-3 over a",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "has an unknown key 'colour'. Allowed:"),
        ({"schema": 9}, "has schema 9; this version of Partita reads 1. Plan again."),
        (
            {"operators": {"conv": "S:z"}},
            "operators.conv: there is no axis 'z'; the mesh has a, b.",
        ),
        ({"operators": {"conv": "S"}}, "operators.conv: 'S' is not factor:axes, e.g. \"S:a,b\"."),
        (
            {"operators": {"conv": "S:a P:a"}},
            "operators.conv: axis 'a' is used twice, for S and P.",
        ),
        (
            {"operators": {"conv": 3}},
            'operators.conv: needs a text like "S:a,b P:c" or "replicate", not 3.',
        ),
        ({"mesh": {"a": {"size": 1}}}, 'mesh.a: needs {"size": at least 2, "level": number}'),
        ({"mesh": ["a"]}, "mesh: needs an object, not ['a']. Plan again."),
        (
            {"mesh": {"a": {"size": 2, "level": "x"}}},
            'mesh.a: needs {"size": at least 2, "level": number}',
        ),
        ({"operators": 3}, "operators: needs an object, not 3. Plan again."),
        ({"notes": 5}, "notes: needs a list, not 5. Plan again."),
        (
            {"predicted": {"seconds": "fast"}},
            "predicted.seconds: needs a number, not 'fast'. Plan again.",
        ),
        (
            {"storage": {"k": {"dim": "x", "axes": ["a"], "zero": 1}}},
            'storage.k: needs {"dim", "axes", "zero": 1, 2 or 3}',
        ),
        ({"storage": {"k": {"dim": 0}}}, 'storage.k: needs {"dim", "axes", "zero": 1, 2 or 3}'),
        (
            {"storage": {"k": {"dim": 0, "axes": ["q"], "zero": 1}}},
            "storage.k: there is no axis 'q'; the mesh has a, b.",
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
    with pytest.raises(PlanError, match="lacks the key 'mesh'"):
        Plan.from_json(value)


def test_a_file_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="There is no plan file"):
        Plan.load(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text('{"schema": 1,\n oops}')
    with pytest.raises(PlanError, match="is not a plan: .* in line 2, column 2"):
        Plan.load(tmp_path / "bad.json")
    (tmp_path / "binary.json").write_bytes(b"\x80\x81")
    with pytest.raises(
        PlanError,
        match="is not a plan: it is not text. Give a file that 'partita plan --save-plan' wrote.",
    ):
        Plan.load(tmp_path / "binary.json")
    with pytest.raises(PlanError, match="cannot be read: Is a directory. Give a file that"):
        Plan.load(tmp_path)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PlanError, match="is not a JSON object"):
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


def test_a_mesh_has_small_prime_axes_slow_levels_first() -> None:
    mesh = mesh_for((6, 4))
    assert [(a.name, a.size, a.level) for a in mesh.axes] == [
        ("a", 3, 0),
        ("b", 2, 0),
        ("c", 2, 1),
        ("d", 2, 1),
    ]
    assert mesh_for((1,)).size == 1

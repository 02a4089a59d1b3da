"""Imports go one way: errors, units; graph, machine; plan; cost; simulate; search; capture, execute; keras, report; api; bench; terminal; gnn_cli; cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import partita

ROOT = Path(partita.__file__).parent
ORDER = [
    {"errors"},
    {"units"},
    {"graph", "machine"},
    {"plans"},
    {"cost"},
    {"simulation"},
    {"search"},
    {"capture"},
    {"execute"},
    {"keras", "gnn", "manage", "report"},
    {"api"},
    {"bench"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
PURE = {"errors", "units", "graph", "machine", "plans", "cost", "simulation", "search"}
DOORS = {
    ("keras", "api"): "import partita.keras is a way in",
}
"""Imports against the order that are allowed inside functions, and why."""


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(imported module, whether inside a function) of every import of a source; a relative one begins with a dot."""
    tree = ast.parse(source)
    inside = {
        n
        for f in ast.walk(tree)
        if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"partita.{a.name}" for a in node.names] if module == "partita" else [module]
            yield from ((name, node in inside) for name in names)


def offences(mine: str, source: str) -> list[str]:
    """What a module of the folder (or top-level module) `mine` imports and must not."""
    found = []
    for name, inside in imports(source):
        package, *rest = name.split(".")
        if package == "":
            found.append(f"the relative import {name}")
        elif package == "partita":
            theirs = rest[0] if rest and rest[0] in RANK else "__init__"
            if (
                theirs != mine
                and RANK[theirs] >= RANK[mine]
                and not (inside and (mine, theirs) in DOORS)
            ):
                found.append(f"{name}, which does not come before {mine}")
        elif mine in PURE and package in ("jax", "jaxlib", "keras"):
            found.append(f"{name}: {mine} works without it")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_comes_before_it(path: Path) -> None:
    mine = path.relative_to(ROOT).with_suffix("").parts[0]
    assert mine in RANK, f"{mine} has no place in the order yet"
    assert offences(mine, path.read_text()) == []


@pytest.mark.parametrize(
    ("mine", "source"),
    [
        ("plans", "from partita.cost.terms import cost_terms"),
        ("plans", "def f():\n    from partita.cost.terms import cost_terms"),
        ("plans", "from partita.api import parallelize"),
        ("graph", "import partita.machine"),
        ("capture", "from partita.execute import program"),
        ("cost", "import partita"),
        ("cost", "from partita import api"),
        ("report", "from partita.keras.fit import attach"),
        ("search", "def f():\n    import jax.numpy as jnp"),
        ("search", "if True:\n    from keras import layers"),
        ("execute", "from . import program"),
    ],
)
def test_an_import_against_the_order_is_found(mine: str, source: str) -> None:
    assert len(offences(mine, source)) == 1


def test_imports_down_the_order_and_through_a_door_are_none_of_its_business() -> None:
    assert (
        offences(
            "cli",
            "import json\nfrom partita import errors\ndef f():\n    from partita.api import plan",
        )
        == []
    )
    assert offences("keras", "def f():\n    from partita.api import parallelize") == []


def test_the_doors_are_all_in_use() -> None:
    for (mine, theirs), why in DOORS.items():
        sources = [p.read_text() for p in (ROOT / mine).rglob("*.py")]
        assert any((f"partita.{theirs}", True) in set(imports(s)) for s in sources), (
            f"nothing uses the door: {why}"
        )

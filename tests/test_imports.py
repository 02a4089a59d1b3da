"""Imports go one way, down the list ORDER."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import partita

ROOT = Path(partita.__file__).parent
ORDER = [
    {"errors"},
    {"units", "keras_backend"},
    {"graph", "machine"},
    {"plans"},
    {"cost"},
    {"simulation"},
    {"search"},
    {"capture"},
    {"execute"},
    {"planning"},
    {"comparison", "offers"},
    {"keras", "gnn", "manage", "report"},
    {"api"},
    {"bench"},
    {"cli"},
    {"__init__", "__main__"},
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
PURE = {"errors", "units", "graph", "machine", "plans", "cost", "simulation", "search"}


def imports(source: str) -> Iterator[str]:
    """Every module that a source imports, inside functions too; a relative import begins with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (
                [f"partita.{a.name}" for a in node.names] if module == "partita" else [module]
            )


def offences(importer: str, source: str) -> list[str]:
    """Imports that a module of the folder (or top-level module) `importer` must not have."""
    forbidden = []
    for name in imports(source):
        package, *rest = name.split(".")
        if package == "":
            forbidden.append(f"the relative import {name}")
        elif package == "partita":
            imported = rest[0] if rest and rest[0] in RANK else "__init__"
            if imported != importer and RANK[imported] >= RANK[importer]:
                forbidden.append(f"{name}, which does not come before {importer}")
        elif importer in PURE and package in ("jax", "jaxlib", "keras"):
            forbidden.append(f"{name}: {importer} works without it")
    return forbidden


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
        ("plans", "def f():\n    from partita.api import parallelize"),
        ("keras", "def f():\n    from partita.api import plan"),
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


def test_an_import_down_the_order_is_allowed() -> None:
    source = "import json\nfrom partita import errors\ndef f():\n    from partita.api import plan"
    assert offences("cli", source) == []

"""Imports go one way: errors, units; graph, machine; plan; cost; simulate; search; capture, execute; keras, report; api; cli."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import partita

ROOT = Path(partita.__file__).parent
ORDER = [
    {"errors"}, {"units"}, {"graph", "machine"}, {"plan"}, {"cost"}, {"simulate"}, {"search"}, {"capture", "execute"},
    {"keras", "gnn", "manage", "report"}, {"api"}, {"cli"}, {"__init__", "__main__"},
]  # fmt: skip
PURE = {"errors", "units", "graph", "machine", "plan", "cost", "simulate", "search"}
DOORS = {
    ("plan", "api"): "plan.apply(model) and plan.layout_map(model) are the way back up, inside functions",
}
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted(ROOT.rglob("*.py"))


def folder_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(imported module, whether inside a function) of every import of a file."""
    tree = ast.parse(path.read_text())
    inside = {n for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node in inside


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_what_comes_before_it(path: Path) -> None:
    mine = folder_of(path)
    for name, inside in imports(path):
        parts = name.split(".")
        if parts[0] == "partita":
            theirs = parts[1] if len(parts) > 1 else "__init__"
            if inside and (mine, theirs) in DOORS:
                continue
            same_rank_allowed = theirs == mine or {mine, theirs} == {"capture", "execute"}
            assert RANK[theirs] < RANK[mine] or same_rank_allowed, f"{path.name} imports {name}, which comes after {mine}"
        if mine in PURE:
            assert parts[0] not in ("jax", "jaxlib", "keras"), f"{path.name} imports {name}: '{mine}' is planned without it"

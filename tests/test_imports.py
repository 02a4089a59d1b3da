"""Imports follow the table of CONTRIBUTING.md and have no cycles."""

import ast
import re
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import partita

ROOT = Path(partita.__file__).parent
TABLE = (ROOT.parent / "CONTRIBUTING.md").read_text().split("## The file map")[1]
ROWS = re.findall(r"^\| (`.*?) \| .* \| (yes|no) \|$", TABLE, re.M)
"""Per row of the table: its packages, and whether they may import JAX and Keras."""
RANK = {name: rank for rank, row in enumerate(ROWS) for name in re.findall(r"`(\w+)`", row[0])}
PURE = {name for packages, jax in ROWS if jax == "no" for name in re.findall(r"`(\w+)`", packages)}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in sorted(ROOT.rglob("*.py"))}


def imports(source: str, for_types: bool = True) -> Iterator[str]:
    """All names that a source imports, inside functions too. A relative one begins with a dot.

    Without `for_types`, imports in `if TYPE_CHECKING:` are left out: they never run.
    """
    tree = ast.parse(source)
    if not for_types:
        tree.body = [node for node in tree.body if not is_for_types(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def offences(importer: str, source: str) -> list[str]:
    """Imports that a module of the package (or top-level module) `importer` must not have."""
    forbidden = []
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "":
            forbidden.append(f"the relative import {name}")
        elif top == "partita":
            imported = rest[0] if rest and rest[0] in RANK else "__init__"
            if imported != importer and RANK[imported] >= RANK[importer]:
                forbidden.append(f"{name}, which does not come before {importer}")
        elif importer in PURE and top in ("jax", "jaxlib", "keras"):
            forbidden.append(f"{name}: {importer} works without it")
    return forbidden


def imported_modules(module: str, sources: dict[str, str]) -> set[str]:
    """The modules among `sources` that a module imports, without its own package."""
    modules = set()
    for name in imports(sources[module], for_types=False):
        while name and name not in sources:
            name = name.rpartition(".")[0]
        if name and name != module:
            modules.add(name)
    return modules


def import_cycle(sources: dict[str, str]) -> Iterable[str]:
    """The modules of an import cycle, empty if there is none.

    A package may import its members; a member that imports its package closes a cycle. The root
    package is no exception: its members name each other, not the package.
    """
    graph = {module: imported_modules(module, sources) for module in sources}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return ()


def test_the_table_names_all_packages() -> None:
    packages = {path.stem for path in ROOT.iterdir() if path.suffix == ".py"}
    packages |= {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(RANK) == packages


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_only_what_comes_before_it(module: str) -> None:
    package = module.split(".")[1] if "." in module else "__init__"
    assert offences(package, SOURCES[module]) == []


@pytest.mark.parametrize(
    ("package", "source"),
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
def test_an_import_against_the_order_is_found(package: str, source: str) -> None:
    assert len(offences(package, source)) == 1


def test_an_import_down_the_order_is_allowed() -> None:
    source = "import json\nfrom partita import errors\ndef f():\n    from partita.api import plan"
    assert offences("cli", source) == []


def test_modules_have_no_import_cycle() -> None:
    assert list(import_cycle(SOURCES)) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"p.a": "import p.b", "p.b": "from p.a import x"},
        {"p.a": "import p.b", "p.b": "def f():\n    from p import a"},
        {"p": "from p.a import x", "p.a": "import p"},
        {"p.a": "import p.b", "p.b": "if FLAG:\n    import p.a"},
    ],
)
def test_an_import_cycle_is_found(sources: dict[str, str]) -> None:
    assert import_cycle(sources)


def test_imports_for_types_close_no_cycle() -> None:
    sources = {"p.a": "import p.b", "p.b": "if TYPE_CHECKING:\n    import p.a"}
    assert not import_cycle(sources)


def test_a_package_may_import_its_members() -> None:
    assert not import_cycle({"p": "from p.a import x", "p.a": "import q"})

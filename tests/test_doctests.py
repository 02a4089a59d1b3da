"""The examples in docstrings hold, in every module of the package and in the tests' own helpers."""

import doctest
import importlib
from pathlib import Path

import pytest

import partita

ROOT = Path(partita.__file__).parent
MODULES = [
    ".".join(p.relative_to(ROOT.parent).with_suffix("").parts) for p in sorted(ROOT.rglob("*.py"))
]
HELPERS = ["test_docs", "test_examples"]


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("__main__")] + HELPERS)
def test_the_examples_in_docstrings_hold(name: str) -> None:
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0


def test_there_are_examples_to_run() -> None:
    finder = doctest.DocTestFinder()
    found = [
        t
        for m in MODULES
        if "__main__" not in m
        for t in finder.find(importlib.import_module(m.removesuffix(".__init__")))
    ]
    assert sum(bool(t.examples) for t in found) >= 5

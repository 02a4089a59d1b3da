"""Programs of the zoo compute on several devices what they compute on one.

One of each kind runs on three devices; `benchmarks/zoo.py` runs all on one to four. Plans are for a
machine whose links cost next to nothing, so that even small layers are split. A sample is also
planned with pipeline stages; `benchmarks/stages.py` plans all.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from zoo.compare import PROGRAMS, difference

ONE_OF_A_KIND = [
    "callbacks",
    "custom_gradients",
    "eagerly",
    "equinox_mlp",
    "experts",
    "frozen_then_tuned",
    "gan",
    "generator",
    "gradient_accumulation",
    "lora",
    "lstm",
    "mixed_bfloat16",
    "moving_average",
    "nnx_in_place",
    "odd_batches",
    "own_train_step",
    "resnet",
    "saving",
    "scanned_layers",
    "shared_layers",
    "static_and_keywords",
    "subclassed",
]


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_a_program_computes_the_same_on_three_devices(name: str) -> None:
    found = difference(PROGRAMS[name], 3)
    assert found.worst <= PROGRAMS[name].tolerance, str(found)
    assert found.split or PROGRAMS[name].sentence, "nothing was split, so nothing was tested"
    assert PROGRAMS[name].sentence in " ".join(found.said)


def test_the_programs_are_all_in_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "programs.md").read_text()
    for program in PROGRAMS.values():
        assert f"| `{program.name}` | {program.shows} |" in page, (
            "python benchmarks/zoo.py --list prints the table"
        )


def benchmark(name: str) -> ModuleType:
    """A script of the benchmarks as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


STAGES = benchmark("stages")


@pytest.mark.parametrize(
    ("seed", "machine"),
    [(3, "h100:8"), (6, "tpu-v5e:16"), (7, "k80-cluster:2"), (9, "h100:8")],
)
def test_a_random_model_is_planned_with_stages(seed: int, machine: str) -> None:
    """Grouped and depthwise convolutions, and products between samples."""
    captures = partial(STAGES.captured_random, seed)
    check_searches("random", f"seed {seed}", captures, [machine])


@pytest.mark.parametrize("name", ["gan", "lora", "lstm", "scanned_layers"])
def test_a_program_is_planned_with_stages(name: str) -> None:
    captures = partial(STAGES.captured_program, name)
    check_searches("zoo", name, captures, STAGES.MACHINES)


def test_a_model_with_depthwise_convolutions_is_planned_with_stages() -> None:
    captures = partial(STAGES.captured_application, "MobileNet")
    check_searches("applications", "MobileNet", captures, ["tpu-v5e:16"])


def check_searches(
    kind: str, case: str, captures: Callable[[], list[Any]], machines: Sequence[str]
) -> None:
    """All searches of a case succeed; their time limit is one that a busy machine keeps."""
    searches = list(STAGES.searched(kind, case, captures, machines, seconds=20))
    assert len(searches) >= len(machines)
    refused = [search for search in searches if "refused" in search.outcome]
    failed = [search for search in searches if search.failed]
    assert not failed and not refused, "\n".join(map(str, searches))
    assert kind in STAGES.table(searches)

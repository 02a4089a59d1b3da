"""Programs of the zoo compute on several devices what they compute on one.

Here one of each kind runs on three devices; `benchmarks/zoo.py` runs all on one to four. Plans are made for a machine whose links cost
next to nothing, so that even small layers are worth splitting.
"""

from __future__ import annotations

from pathlib import Path

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

"""The benchmark that compares modules with PyTorch runs: its smallest case, as a process."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "torchax", reason="torchax is not installed, so PyTorch is not tested: make test-torch"
)
pytest.importorskip(
    "transformers", reason="transformers is not installed, so torch_equality.py is not run"
)
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "torch_equality.py"


def test_a_perceptron_trains_as_in_torch_on_one_and_four_devices() -> None:
    command = [sys.executable, str(SCRIPT), "--only", "mlp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 modules within 0.0001" in done.stdout

"""Scripts in processes of their own: the first example of the documentation, and the smallest case
of the benchmark that compares modules with PyTorch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "torchax", reason="torchax is not installed, so PyTorch is not tested: make test-torch"
)
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "torch_equality.py"


def test_the_first_example_of_the_documentation_runs_in_a_new_process(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "pytorch.md").read_text()
    script = tmp_path / "train.py"
    script.write_text(text.split("```python\n")[1].split("```")[0])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed, so torch_equality.py is not run",
)
def test_a_perceptron_trains_as_in_torch_on_one_and_four_devices() -> None:
    command = [sys.executable, str(SCRIPT), "--only", "mlp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 modules within 0.0001" in done.stdout

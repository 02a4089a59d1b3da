"""Planning from a saved graph works in an interpreter where neither JAX nor Keras can be imported."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "keras"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
from partita.api import found
from partita.graph.graph import Graph
from partita.machine import load

plan = found(Graph.load(sys.argv[1]), load("dgx-h100"))
print(plan)
assert plan.choices and plan.predicted["seconds"] > 0
"""


def test_a_saved_graph_is_planned_without_jax() -> None:
    graph = Path(__file__).parent / "data" / "cnn.graph.json"
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(graph)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan 'found' for cnn on dgx-h100")

"""Planning from a saved graph works in an interpreter where neither JAX nor Keras can be
imported.
"""

import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"
REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "keras"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
"""
PLAN = """
from partita.planning import best_plan, check_plan, predict_plan
from partita.graph.check import check
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.plans.baselines import BASELINES
from partita.plans.layout import layout_of
from partita.plans.diff import diff
from partita.plans.plan import Plan
from partita.search.find import mesh_of

graph, machine = check(OperatorGraph.load(sys.argv[1])), load("dgx-h100")
for make in BASELINES.values():
    baseline = make(graph, machine.name, mesh_of(machine))
    assert len(layout_of(graph, baseline).shardings) == len(graph.tensors)
plan = best_plan(graph, machine)
print(plan)
assert plan.predicted["seconds"] <= min(b["seconds"] for b in plan.why["baselines"].values())
plan.save(sys.argv[2])
again = check_plan(Plan.load(sys.argv[2]), graph, machine)
assert again == plan and diff(again, plan) == []
assert abs(predict_plan(graph, machine, again).seconds - plan.predicted["seconds"]) <= 1e-9 * plan.predicted["seconds"]
"""


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", REFUSE + program, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_a_saved_graph_is_planned(name: str, tmp_path: Path) -> None:
    done = run(PLAN, str(DATA / f"{name}.graph.json"), str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"plan 'found' for {name} on dgx-h100")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["machine", "show", "h100:8"], ["explain", "PLAN"], ["diff", "PLAN", "PLAN"]],
)
def test_plans_and_machines_are_shown(arguments: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "plan.json")
    assert run(PLAN, str(DATA / "mlp.graph.json"), path).returncode == 0
    arguments = [path if a == "PLAN" else a for a in arguments]
    done = run("from partita.cli.main import main\nsys.argv[0] = 'partita'\nmain()", *arguments)
    assert done.returncode == 0 and done.stdout, done.stderr


def test_what_needs_jax_says_so() -> None:
    assert "jax must not be needed" in run("import partita.capture.jax_functions").stderr

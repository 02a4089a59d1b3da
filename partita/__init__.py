"""Partita: takes a training program, finds the fastest way to split it over devices, proves that it
fits, runs it, shows why.

>>> import partita
>>> model = partita.parallelize(model)                       # doctest: +SKIP
>>> model.fit(x, y, batch_size=256)                          # doctest: +SKIP
>>> plan = partita.plan(model, batch_size=256, devices=8)    # doctest: +SKIP

Importing it requests JAX of Keras (KERAS_BACKEND=jax), unless you have chosen a backend. Its names
are imported at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from partita.keras_backend import prefer_jax
from partita.version import VERSION

prefer_jax()

if TYPE_CHECKING:
    from partita.api import compare, compile_for, manage, parallelize, plan, simulate
    from partita.capture.keras_models import abstract
    from partita.capture.program import capture_program
    from partita.comparison import Comparison
    from partita.errors import PartitaError
    from partita.execute.compilers.compiled_plan import CompiledPlan
    from partita.graph.operator_graph import OperatorGraph
    from partita.keras.checkpoint import Checkpoint
    from partita.keras.layout_map import layout_map
    from partita.machine import Machine
    from partita.machine import load as load_machine
    from partita.offers import Objective, Offer, compare_machines
    from partita.planning import SearchOptions, best_plan, check_plan, predict_plan
    from partita.plans.plan import Plan
    from partita.simulation.timeline import Timeline

__version__ = VERSION
__all__ = [
    "Checkpoint",
    "Comparison",
    "CompiledPlan",
    "Machine",
    "Objective",
    "Offer",
    "OperatorGraph",
    "PartitaError",
    "Plan",
    "SearchOptions",
    "Timeline",
    "abstract",
    "best_plan",
    "capture_program",
    "check_plan",
    "compare",
    "compare_machines",
    "compile_for",
    "layout_map",
    "load_machine",
    "manage",
    "parallelize",
    "plan",
    "predict_plan",
    "simulate",
]

_MODULES = {
    "Checkpoint": "keras.checkpoint",
    "Comparison": "comparison",
    "CompiledPlan": "execute.compilers.compiled_plan",
    "Machine": "machine",
    "Objective": "offers",
    "Offer": "offers",
    "OperatorGraph": "graph.operator_graph",
    "PartitaError": "errors",
    "Plan": "plans.plan",
    "SearchOptions": "planning",
    "Timeline": "simulation.timeline",
    "abstract": "capture.keras_models",
    "best_plan": "planning",
    "capture_program": "capture.program",
    "check_plan": "planning",
    "compare_machines": "offers",
    "layout_map": "keras.layout_map",
    "predict_plan": "planning",
}
"""The modules of names, by default `api`."""
_PACKAGES = ("gnn", "torch")
"""Packages for users, which `import partita` alone gives too."""


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"partita.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'partita' has no attribute {name!r}")
    import_module("partita.api")  # gives plans their tables for notebooks
    if name == "load_machine":
        value = import_module("partita.machine").load
    else:
        value = getattr(import_module(f"partita.{_MODULES.get(name, 'api')}"), name)
    globals()[name] = value
    return value

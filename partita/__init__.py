"""Partita: takes a training program, finds the fastest way to split it over devices, proves that it
fits, runs it, shows why.

>>> import partita
>>> model = partita.parallelize(model)                       # doctest: +SKIP
>>> model.fit(x, y, batch_size=256)                          # doctest: +SKIP
>>> plan = partita.plan(model, batch_size=256, devices=8)    # doctest: +SKIP

Importing it imports neither JAX nor Keras. It requests JAX of Keras (KERAS_BACKEND=jax), unless you
have chosen a backend.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from partita.keras_backend import prefer_jax

prefer_jax()

from partita.api import compare, compile_for, manage, parallelize, plan, simulate
from partita.capture.program import capture_program
from partita.comparison import Comparison
from partita.errors import PartitaError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine
from partita.machine import load as load_machine
from partita.offers import Objective, Offer, compare_machines
from partita.planning import SearchOptions, best_plan, check_plan, predict_plan
from partita.plans.plan import Plan
from partita.report.notebook import plan_html
from partita.simulation.timeline import Timeline
from partita.version import VERSION

if TYPE_CHECKING:
    from partita.capture.keras_models import abstract
    from partita.execute.compilers.compiled_plan import CompiledPlan
    from partita.keras.checkpoint import Checkpoint
    from partita.keras.layout_map import layout_map

Plan._repr_html_ = plan_html  # pyright: ignore[reportAttributeAccessIssue]
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

_IMPORTED_ON_USE = {
    "Checkpoint": "partita.keras.checkpoint",
    "CompiledPlan": "partita.execute.compilers.compiled_plan",
    "abstract": "partita.capture.keras_models",
    "layout_map": "partita.keras.layout_map",
}
"""Names that need Keras, and their modules: planning from a file does not need it."""


def __getattr__(name: str) -> Any:
    if name not in _IMPORTED_ON_USE:
        raise AttributeError(f"module 'partita' has no attribute {name!r}")
    return getattr(import_module(_IMPORTED_ON_USE[name]), name)

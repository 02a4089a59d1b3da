"""Partita: takes a training program, finds the fastest way to split it over devices, proves that it fits, runs it, shows why.

>>> import partita
>>> model = partita.parallelize(model)                        # then fit as always      # doctest: +SKIP
>>> plan = partita.plan(model, batch_size=256, devices=8)     # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from partita.api import compare, layout_map, parallelize, plan, simulate
from partita.errors import PartitaError
from partita.plans.plan import Plan

if TYPE_CHECKING:
    from partita.capture.keras_models import abstract
    from partita.keras.checkpoint import Checkpoint

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "PartitaError",
    "Plan",
    "abstract",
    "compare",
    "layout_map",
    "parallelize",
    "plan",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """What needs Keras is fetched when it is first asked for: planning from a file does not."""
    if name == "abstract":
        from partita.capture.keras_models import abstract

        return abstract
    if name == "Checkpoint":
        from partita.keras.checkpoint import Checkpoint

        return Checkpoint
    raise AttributeError(f"module 'partita' has no attribute {name!r}")

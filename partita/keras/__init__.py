"""All of Keras, with training made parallel: `import partita.keras as keras` instead of `import keras`.

Importing it only asks for JAX, since TensorFlow, where a script imports that next, imports Keras too. When a name of Keras is
first asked for, Keras starts, a CPU stands for one device per core, and every model that is trained from there on is planned at
its first batch, as by `partita run`. A plan is said on stderr, in a line; PARTITA_QUIET=1 keeps it quiet.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

from partita.errors import PartitaError
from partita.keras.aliases import Alias

if TYPE_CHECKING:
    from keras import *  # noqa: F403

_on = ExitStack()


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(f"module 'partita.keras' has no attribute {name!r}")
    return getattr(_keras(), name)


def __dir__() -> list[str]:
    return dir(_keras())


@cache
def _keras() -> Any:
    """Keras on JAX, its training made parallel, unless a command does that already."""
    use_jax()
    import keras

    from partita.execute.function import current

    if current() is None:
        from partita.execute.devices import start_host_devices

        start_host_devices()
        from partita.execute.verify import check_compiled
        from partita.keras.fit import attaching
        from partita.planning import describe, make_planner
        from partita.units import format_seconds

        def seen(captured: Any, machine: Any, plan: Any) -> None:
            _say(
                f"'{plan.graph}' on {machine.name}: {describe(plan)}; {format_seconds(plan.predicted['seconds'])} a step predicted"
            )

        _on.enter_context(attaching(make_planner(on_plan=seen), _say, check_compiled))
    return keras


def _say(sentence: str) -> None:
    if not os.environ.get("PARTITA_QUIET"):
        print(f"partita: {sentence}", file=sys.stderr)


def use_jax() -> None:
    """Keras on the JAX backend; PartitaError where it is already imported on another."""
    os.environ["KERAS_BACKEND"] = "jax"
    keras: Any = sys.modules.get("keras")
    if keras is not None and hasattr(keras, "backend") and keras.backend.backend() != "jax":
        raise PartitaError(
            f"Keras is already imported on the {keras.backend.backend()} backend, and only JAX programs can be planned. "
            "Set KERAS_BACKEND=jax before importing Keras or TensorFlow, which imports it."
        )


os.environ["KERAS_BACKEND"] = "jax"
if not any(isinstance(finder, Alias) and finder.alias == __name__ for finder in sys.meta_path):
    sys.meta_path.append(Alias(__name__, "keras", lambda: _keras() is not None))

"""All of Keras, its training made parallel: `import partita.keras as keras` for `import keras`.

The import itself only requests JAX, so that a script may import TensorFlow, which imports Keras,
after it. The first use of a name of Keras starts Keras, with one virtual device per core on a CPU.
From then on every model that is trained is planned at its first batch, as by `partita run`. Each
plan is reported on stderr in one line; PARTITA_QUIET=1 silences it.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Any

from partita.keras.aliases import Alias
from partita.keras_backend import prefer_jax, select_jax

if TYPE_CHECKING:
    from keras import *  # noqa: F403

_attached = ExitStack()
"""Keeps Keras's trainer wrapped until the interpreter ends."""


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(f"module 'partita.keras' has no attribute {name!r}")
    return getattr(_keras(), name)


def __dir__() -> list[str]:
    return dir(_keras())


@cache
def _keras() -> Any:
    """Keras on JAX, its training made parallel, unless a command does that already."""
    select_jax(_say)
    import keras

    from partita.execute.function import current

    if current() is None:
        _make_training_parallel()
    return keras


def _make_training_parallel() -> None:
    from partita.execute.devices import start_host_devices

    start_host_devices()
    from partita.execute.verify import check_compiled
    from partita.keras.hooks import attaching
    from partita.planning import make_planner

    _attached.enter_context(attaching(make_planner(on_plan=_say_plan), _say, check_compiled))


def _say_plan(captured: Any, machine: Any, plan: Any) -> None:
    from partita.planning import plan_sentence

    _say(plan_sentence(plan, machine))


def _say(sentence: str) -> None:
    if not os.environ.get("PARTITA_QUIET"):
        print(f"partita: {sentence}", file=sys.stderr)


def _start() -> bool:
    """Starts Keras for an import below `partita.keras`, which is always served."""
    return _keras() is not None


prefer_jax()
if not any(isinstance(finder, Alias) and finder.alias == __name__ for finder in sys.meta_path):
    sys.meta_path.append(Alias(__name__, "keras", _start))

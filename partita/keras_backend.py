"""Keras's backend: JAX is requested before Keras is imported, and checked before a model is
planned.

Keras reads KERAS_BACKEND, then its file keras.json, when it is first imported, and never again.
Nothing here imports Keras.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partita.errors import PartitaError

VARIABLE = "KERAS_BACKEND"


def prefer_jax() -> None:
    """Requests JAX, unless Keras is imported already or the user has chosen a backend."""
    if "keras" not in sys.modules and chosen_backend() is None:
        os.environ[VARIABLE] = "jax"


def select_jax(say: Callable[[str], None]) -> None:
    """Requests JAX for a program that runs on nothing else, and says so if the user chose
    otherwise.

    PartitaError if Keras is imported already, on another backend.
    """
    require_jax()
    backend = chosen_backend()
    if backend not in (None, "jax"):
        say(f"Keras is set to the {backend} backend, and runs on JAX here")
    os.environ[VARIABLE] = "jax"


def note_backend(say: Callable[[str], None]) -> None:
    """Says once if a script has requested another backend since `select_jax`, to no effect."""
    requested = os.environ.get(VARIABLE)
    if requested not in (None, "", "jax"):
        say(f"The script sets {VARIABLE}={requested}, and Keras runs on JAX here")
        os.environ[VARIABLE] = "jax"


def require_jax() -> None:
    """PartitaError if Keras is imported, on another backend than JAX."""
    backend = running_backend()
    if backend not in (None, "jax"):
        raise PartitaError(
            f"Keras is already imported on the {backend} backend, and Partita plans JAX programs "
            f"only. Set {VARIABLE}=jax before importing Keras or TensorFlow, which imports it."
        )


def running_backend() -> str | None:
    """The backend of Keras; None before Keras is imported."""
    keras: Any = sys.modules.get("keras")
    if keras is None or not hasattr(keras, "backend"):
        return None
    return keras.backend.backend()


def chosen_backend() -> str | None:
    """The backend that the user has chosen by KERAS_BACKEND or in keras.json; None for no choice.

    Keras itself writes "tensorflow" into keras.json when it is first imported, so that value is
    not a choice.
    """
    variable = os.environ.get(VARIABLE)
    if variable:
        return variable
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        backend = json.loads((folder / "keras.json").read_text(encoding="utf-8")).get("backend")
    except (OSError, ValueError, AttributeError, RecursionError, RuntimeError):
        return None
    return backend if isinstance(backend, str) and backend != "tensorflow" else None

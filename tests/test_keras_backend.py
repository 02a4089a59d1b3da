"""Importing Partita requests JAX of Keras, and never against the user's choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from partita.errors import PartitaError
from partita.keras_backend import chosen_backend, require_jax, select_jax


def python(code: str, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter of a user without settings."""
    unset = ("KERAS_BACKEND", "KERAS_HOME")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=home,
        env=environment | {"HOME": str(home)} | more,
    )


@pytest.mark.parametrize("module", ["partita", "partita.keras", "partita.gnn"])
def test_keras_runs_on_jax_after_partita_without_any_variable(module: str, tmp_path: Path) -> None:
    done = python(f"import {module}, keras; print(keras.backend.backend())", tmp_path)
    assert done.stdout == "jax\n", done.stderr


def test_importing_partita_imports_nothing_large(tmp_path: Path) -> None:
    large = ("jax", "keras", "numpy", "scipy", "partita.planning")
    code = f"import sys, partita; print([m for m in {large} if m in sys.modules])"
    assert python(code, tmp_path).stdout == "[]\n"


def test_the_users_backend_stays_and_planning_refuses_it_in_one_sentence(tmp_path: Path) -> None:
    code = (
        "import partita, keras\n"
        "print(keras.backend.backend())\n"
        "model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])\n"
        "try: partita.plan(model, 8)\n"
        "except partita.PartitaError as error: print(error)\n"
        "try: partita.parallelize(model)\n"
        "except partita.PartitaError as error: print(error)\n"
    )
    done = python(code, tmp_path, KERAS_BACKEND="numpy")
    backend, *errors = done.stdout.splitlines()
    assert backend == "numpy", done.stderr
    assert len(errors) == 2 and errors[0] == errors[1]
    assert errors[0].startswith("Keras is already imported on the numpy backend")


def test_a_backend_in_keras_json_is_a_choice_unless_keras_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert chosen_backend() is None
    for content, backend in [
        ({"backend": "torch"}, "torch"),
        ({"backend": "tensorflow"}, None),
        ({"backend": 3}, None),
        ([], None),
    ]:
        (tmp_path / "keras.json").write_text(json.dumps(content))
        assert chosen_backend() == backend
    (tmp_path / "keras.json").write_text("{")
    assert chosen_backend() is None


def test_a_command_selects_jax_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences: list[str] = []
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    select_jax(sentences.append)
    assert os.environ["KERAS_BACKEND"] == "jax"
    assert sentences == ["Keras is set to the torch backend, and runs on JAX here"]
    select_jax(sentences.append)
    assert len(sentences) == 1


def test_keras_on_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(PartitaError, match="Set KERAS_BACKEND=jax before importing Keras"):
        require_jax()

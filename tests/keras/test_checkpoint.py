"""Checkpoints match by structure, and a resumed run sees the samples in the same order."""

import copy
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import keras
import numpy as np
import pytest

import partita
from partita.errors import PartitaError
from partita.execute import members
from partita.execute.board import Event

orbax: Any = pytest.importorskip("orbax.checkpoint")
HOLDER = """
import sys, time
from pathlib import Path
from partita.files.folders import lock
file = lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""
X = np.random.default_rng(0).standard_normal((32, 8)).astype("float32")


def fit(folder: Path, epochs: int, width: int = 2) -> Any:
    keras.utils.set_random_seed(7)
    layers = [keras.Input((8,)), keras.layers.Dense(width)]
    model: Any = keras.Sequential(layers)
    model.compile("adam", "mse")
    checkpoint = partita.Checkpoint(folder)
    return model, model.fit(
        X, X[:, :width], batch_size=8, epochs=epochs, verbose=0, callbacks=[checkpoint]
    )


def test_a_model_that_is_made_again_resumes_on_the_uninterrupted_curve(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 2)
    # The layers have other automatic names now, and NumPy's seed another history.
    _, rest = fit(tmp_path / "parts", 4)
    assert rest.epoch == [2, 3]
    assert rest.history["loss"] == pytest.approx(whole.history["loss"][2:], rel=1e-6)


def test_a_training_that_is_complete_says_why_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, 2)
    assert "partita" not in capsys.readouterr().err
    _, history = fit(tmp_path, 2)
    assert history.history == {}
    sentence = "Nothing is left to train: the checkpoint in .* has 2 epochs, and epochs=2"
    assert re.search(sentence, capsys.readouterr().err)
    fit(tmp_path, 3)
    assert "partita" not in capsys.readouterr().err


def test_the_first_live_process_writes_after_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "parts", 1)
    with monkeypatch.context() as patch:
        # As process 1 of 2, after the loss of process 0.
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(jax, "process_index", lambda: 1)
        patch.setattr(members._group, "events", (Event(0, "was killed"),))
        _, middle = fit(tmp_path / "parts", 2)
    _, rest = fit(tmp_path / "parts", 4)
    assert (middle.epoch, rest.epoch) == ([1], [2, 3])
    assert rest.history["loss"] == pytest.approx(whole.history["loss"][2:], rel=1e-6)


def test_ctrl_c_while_a_checkpoint_is_written_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = orbax.CheckpointManager
    save = manager.save

    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return save(*arguments, **options)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(manager, "save", interrupted)
            fit(tmp_path, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    _, rest = fit(tmp_path, 2)
    assert rest.epoch == [1]


def test_a_folder_that_another_run_uses_is_refused(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(
            PartitaError, match="Another run saves its checkpoints in .* Name another"
        ):
            fit(tmp_path, 1)
    finally:
        holder.kill()
        holder.wait()
    fit(tmp_path, 1)
    with pytest.raises(PartitaError, match="cannot be copied .* a folder of its own"):
        copy.deepcopy(partita.Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("keep", 0), ("keep", "2"), ("every", 0), ("every", 1.5), ("folder", None)]
)
def test_a_wrong_setting_is_refused_at_once(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(PartitaError, match=f"{name}={value!r} is no .* give"):
        partita.Checkpoint(**{"folder": tmp_path, name: value})


def test_a_model_of_another_structure_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    with pytest.raises(PartitaError, match="are of another model: '00000 sequential/dense/kernel'"):
        fit(tmp_path, 2, width=3)


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    checksums = next(
        path for path in tmp_path.rglob("checksums/*") if "sequential" in path.read_text()
    )
    changed = re.sub(
        r": (\d+)", lambda match: f": {int(match[1]) ^ 1}", checksums.read_text(), count=1
    )
    checksums.write_text(changed)
    with pytest.raises(PartitaError, match=r"cannot be read: .00000 .*kernel. is damaged .*Delete"):
        fit(tmp_path, 2)
    shutil.rmtree(checksums.parent)
    with pytest.raises(
        PartitaError, match=r"The checkpoint of epoch 1 .* cannot be read: .*Delete"
    ):
        fit(tmp_path, 2)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert partita.Checkpoint("~/run").folder == tmp_path / "run"

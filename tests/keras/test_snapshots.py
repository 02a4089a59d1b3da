"""A call of `fit` that was interrupted goes on after its last snapshot, in a script run again."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from partita.keras.snapshots import saving_snapshots

pytest.importorskip("orbax.checkpoint")
X = np.random.default_rng(0).standard_normal((32, 8)).astype("float32")


class Lost(Exception):
    """The end of a process."""


class LoseAt(keras.callbacks.Callback):
    def __init__(self, epoch: int | None) -> None:
        super().__init__()
        self.lost_epoch = epoch
        self.seen: list[int] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seen.append(epoch)
        if epoch == self.lost_epoch:
            raise Lost


def run(
    folder: Path, lost_epoch: int | None = None, report: Callable[[str], None] = print
) -> tuple[Any, Any, LoseAt]:
    """A script with two calls of `fit`, the second one interrupted."""
    keras.utils.set_random_seed(7)
    lose = LoseAt(lost_epoch)
    with saving_snapshots(folder, report):
        layers = [keras.Input((8,)), keras.layers.Dropout(0.3), keras.layers.Dense(2)]
        model: Any = keras.Sequential(layers)
        model.compile("adam", "mse")
        settings = {"batch_size": 8, "verbose": 0}
        first = model.fit(X, X[:, :2], epochs=2, **settings)
        second = model.fit(X, X[:, :2], epochs=4, callbacks=[lose], **settings)
    return first, second, lose


def test_a_script_run_again_has_the_history_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("partita.keras.snapshots.PACE", 0.0)
    straight_first, straight_second, _ = run(tmp_path / "straight")
    with pytest.raises(Lost):
        run(tmp_path / "lost", lost_epoch=2)
    first, second, lose = run(tmp_path / "lost")
    assert lose.seen == [2, 3], "complete epochs are not run again"
    assert first.epoch == [0, 1] and second.epoch == [0, 1, 2, 3]
    assert first.history == straight_first.history
    assert second.history["loss"] == pytest.approx(straight_second.history["loss"], rel=1e-6)
    assert re.search(r"^'sequential_?\d*' goes on after epoch 2$", capsys.readouterr().out, re.M)


def test_snapshots_take_a_bounded_share_of_the_time(tmp_path: Path) -> None:
    _, second, _ = run(tmp_path)
    saved = {path.name for path in (tmp_path / "fit-1").iterdir() if path.name.isdigit()}
    assert saved == {"0", "3"}, "the first epoch, and the last; those between are too short"
    assert second.epoch == [0, 1, 2, 3]


def test_a_folder_without_space_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    sentences: list[str] = []
    run(tmp_path, report=sentences.append)
    assert re.fullmatch(
        r"no snapshots: they need .* in '.*', which has 100 B free. Set TMPDIR to another folder. "
        "A restart begins anew.",
        sentences[0],
    )
    assert not any(path.name.isdigit() for path in (tmp_path / "fit-1").iterdir())

"""Files of callbacks in the processes that write none."""

import errno
import os
from pathlib import Path

import pytest

from partita.keras.saving import _move_files, log_aside


class Logger:
    """Keras's TensorBoard, as far as its folder goes."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir

    def set_model(self, model: object) -> None:
        Path(self.log_dir).mkdir(exist_ok=True)
        (Path(self.log_dir) / "events").write_text(str(model))

    def on_train_end(self, logs: object = None) -> None:
        assert (Path(self.log_dir) / "events").exists()


def test_a_logger_writes_aside_and_leaves_nothing(tmp_path: Path) -> None:
    logger = Logger(str(tmp_path / "logs"))
    log_aside(Logger)
    logger.set_model("model")
    aside = Path(logger.log_dir)
    assert aside.is_dir() and aside != tmp_path / "logs"
    logger.on_train_end()
    assert not aside.exists() and not (tmp_path / "logs").exists()


def exported(folder: Path, content: str) -> Path:
    """A folder with a file `m.keras` and a folder `m`, as `save` and `export` write them."""
    (folder / "m").mkdir(parents=True)
    (folder / "m" / "variables").write_text(content)
    (folder / "m.keras").write_text(content)
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_files_and_folders_of_models_replace_the_old_ones(tmp_path: Path) -> None:
    old = exported(tmp_path / "old", "old")
    (old / "m" / "stale").write_text("old")
    (old / "link.keras").symlink_to(old / "m.keras")
    new = exported(tmp_path / "new", "new")
    (new / "m.keras").rename(new / "link.keras")
    assert _move_files(str(new), str(old)) == (0, "", "")
    assert contents(old) == {"m/variables": "new", "m.keras": "new", "link.keras": "new"}
    assert (old / "link.keras").is_symlink()
    assert sorted(path.name for path in old.iterdir()) == ["link.keras", "m", "m.keras"]


def test_an_exported_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = exported(tmp_path / "old", "old"), exported(tmp_path / "new", "new")
    (new / "m.keras").unlink()
    replace = os.replace

    def full(source: str | Path, target: str | Path) -> None:
        if target == old / "m" and not str(source).endswith(".old"):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    number, reason, _ = _move_files(str(new), str(old))
    assert (number, reason) == (errno.ENOSPC, "No space left on device")
    assert contents(old) == {"m/variables": "old", "m.keras": "old"}

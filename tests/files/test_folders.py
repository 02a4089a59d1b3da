"""Folders in use are told from those whose processes were killed."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from partita.files import folders
from partita.files.folders import TEMPORARY, FolderInUseError, lock, temporary_folder

HOLDER = """
import sys, time
from pathlib import Path
from partita.files.folders import temporary_folder
with temporary_folder("board-", Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_a_folder_is_removed_after_its_process_was_killed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "board-of-the-user").mkdir()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        folder = Path(holder.stdout.readline().strip())
        with pytest.raises(FolderInUseError):
            lock(folder, TEMPORARY)
        monkeypatch.setattr(folders, "SETTLED", 0.0)
        with temporary_folder("board-", tmp_path) as own, temporary_folder("board-", tmp_path):
            assert folder.exists() and own.exists()
    finally:
        holder.kill()
        holder.wait()
    monkeypatch.setattr(folders, "SETTLED", time.time())
    with temporary_folder("board-", tmp_path):
        assert folder.exists()
    monkeypatch.setattr(folders, "SETTLED", 0.0)
    with temporary_folder("board-", tmp_path) as own:
        assert own.exists() and not folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["board-of-the-user"]


def test_folders_are_not_locked_on_systems_without_such_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    spec = importlib.util.spec_from_file_location("folders_without_locks", str(folders.__file__))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.lock(tmp_path) is None
    with module.temporary_folder("board-", tmp_path), module.temporary_folder("b", tmp_path):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []

"""Folders in use: locked while their process lives, so that others can tell.

The lock is the operating system's (`lockf` of a hidden file). It ends with the process, also after
`kill -9`, and a child of the process does not inherit it. Within one process a folder may be locked
again. On file systems without locks, and on Windows, no folder counts as in use.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".partita-lock"
TEMPORARY = ".partita-temporary"
"""Name of the locked file in a folder that may be removed."""
SETTLED = 60.0
"""Age from which an unlocked folder is abandoned, seconds: its maker locks it at once."""
_own: set[Path] = set()
"""Temporary folders of this process."""


class FolderInUseError(Exception):
    """A folder that another process has locked."""


def lock(folder: Path, name: str = LOCK) -> BinaryIO | None:
    """A file that holds the lock of a folder until it is closed; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        file = (folder / name).open("wb")
    except OSError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise FolderInUseError(str(folder)) from None
    except OSError:
        file.close()
        return None
    return file


@contextmanager
def temporary_folder(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new folder that is removed at the end. Earlier ones with this prefix, whose processes were
    killed, are removed at the begin."""
    place = parent if parent is not None else Path(tempfile.gettempdir())
    with suppress(OSError):
        _remove_abandoned(place, prefix)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=place, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _own.add(folder)
        file = lock(folder, TEMPORARY)
        try:
            yield folder
        finally:
            if file is not None:
                file.close()
            _own.discard(folder)


def _remove_abandoned(place: Path, prefix: str) -> None:
    """Removes this user's temporary folders with a prefix that nobody has locked."""
    if fcntl is None:
        return
    names = [name for name in os.listdir(place) if name.startswith(prefix)]
    for folder in {place / name for name in names} - _own:
        with suppress(OSError, FolderInUseError):
            status = (folder / TEMPORARY).stat()
            if status.st_uid != os.getuid() or time.time() - status.st_mtime < SETTLED:
                continue
            file = lock(folder, TEMPORARY)
            if file is not None:
                shutil.rmtree(folder, ignore_errors=True)
                file.close()

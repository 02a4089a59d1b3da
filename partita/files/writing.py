"""Files that are written: beside their target, then moved into its place.

A draft is written in a new folder beside the target, flushed to the disk, and renamed. If writing
ends early, by a full disk, Ctrl-C, a kill or a bad entry, the old file is as it was. A link given
as target stays, and the file that it names is written. Devices and pipes (/dev/stdout) are written
directly. Nothing is written through a memory map, because a disk that fills then kills the process.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from partita.errors import PartitaError

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Error numbers of a disk without space."""


class Drafts:
    """Files while they are written; `open_drafts` creates one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths: dict[Path, Path] = {}

    def open(self, final: Path) -> BinaryIO:
        """A new file to write; files are renamed in the order of opening."""
        return self.path(final).open("wb")

    def path(self, final: Path) -> Path:
        """Temporary path of a file."""
        return self._paths.setdefault(final, self.folder / final.name)

    def has(self, final: Path) -> bool:
        """Whether a file is among the drafts."""
        return final in self._paths

    def scratch(self, name: str) -> Path:
        """Path of a file that is deleted at the end."""
        return self.folder / f"scratch-{name}"

    def finish(self) -> None:
        """Gives all files their names, when all are on the disk."""
        for path in self._paths.values():
            _flush(path)
        for final, path in self._paths.items():
            target = _target(final)
            _keep_mode(target, path)
            path.replace(target)
        with suppress(OSError):
            _flush(self.folder.parent)


@contextmanager
def open_drafts(final: Path) -> Iterator[Drafts]:
    """Drafts of `final` and other files in the same folder.

    They get their names if the body ends well, and are deleted otherwise. OSError where files
    cannot be written.
    """
    target = _target(final)
    _check_target(target)
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from None
    try:
        drafts = Drafts(folder)
        yield drafts
        drafts.finish()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def path_of(value: Any, name: str = "path") -> Path:
    """A value as a path; PartitaError if it is none. `name`: of the argument, for the message."""
    if not isinstance(value, str | os.PathLike):
        raise PartitaError(f"{name} is of type '{type(value).__name__}': give the path of a file.")
    return Path(value)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Writes a file as a whole: it has the new content, or the old one after an OSError."""
    final = path_of(path)
    if is_special(final):
        with final.open("wb") as file:
            file.write(content)
        return
    with open_drafts(final) as drafts, drafts.open(final) as file:
        file.write(content)


def write_text(path: str | Path, content: str) -> None:
    """Writes a text in UTF-8, as `write_bytes` does."""
    write_bytes(path, content.encode("utf-8"))


def check_writable(path: str | Path) -> None:
    """OSError if a file cannot be written later; leaves no trace."""
    final = Path(path)
    if is_special(final):
        with final.open("ab"):
            return
    with open_drafts(final):
        pass


def _target(final: Path) -> Path:
    """The file that a path or a link names, also a link to a file that does not exist yet."""
    return Path(os.path.realpath(final)) if final.is_symlink() else final


def is_special(path: Path) -> bool:
    """Whether a path is a device, a pipe or a socket, which cannot be replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _check_target(target: Path) -> None:
    """OSError for a target that must not be replaced: a folder, or a file without permission."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))


def _keep_mode(target: Path, draft: Path) -> None:
    """The draft gets the permissions of the file that it replaces."""
    with suppress(OSError):
        draft.chmod(stat.S_IMODE(target.stat().st_mode))


def _flush(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)

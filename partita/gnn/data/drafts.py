"""Files that are written under temporary names and renamed when all are complete.

If writing ends early, by a full disk, Ctrl-C or a bad entry, the files under the final names stay
as they were. Nothing is written through a memory map, because a disk that fills then kills the
process.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from partita.errors import GraphError
from partita.units import format_bytes

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Error numbers of a disk without space."""


class Drafts:
    """The files of one graph while they are written; `open_drafts` creates one."""

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
        """Gives all files their names."""
        for final, path in self._paths.items():
            path.replace(final)


@contextmanager
def open_drafts(final: Path, size: int = 0) -> Iterator[Drafts]:
    """Drafts of `final` and its companions in the same folder.

    They get their names if the body ends well, and are deleted otherwise. `size` is a lower bound
    of their bytes: GraphError before anything is written if the disk has less space, and when it
    fills anyway.
    """
    try:
        free = shutil.disk_usage(final.parent).free
        if free < size:
            raise GraphError(
                f"{str(final)!r} needs {format_bytes(size)} and the disk has "
                f"{format_bytes(free)} free: "
                "free space, or write to another disk."
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise GraphError(
            f"{str(final)!r} cannot be written ({error.strerror}): name a file in a folder that "
            "exists."
        ) from None
    try:
        drafts = Drafts(folder)
        yield drafts
        drafts.finish()
    except OSError as error:
        if error.errno in FULL:
            raise GraphError(
                f"The disk is full ({os.strerror(error.errno)}): the incomplete {str(final)!r} was "
                "deleted. Free space, or write to another disk."
            ) from None
        raise GraphError(f"{str(final)!r} cannot be written: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)

"""Files that are there when they are whole: written under another name in the same folder, renamed at the end.

Whatever ends the writing early, a full disk, Ctrl-C, a bad entry, leaves what stood under the final names as it was. Nothing is written
through a memory map, because a disk that fills then kills the process.
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


class Drafts:
    """The files of one graph while they are written; `drafts` makes one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._finals: dict[Path, Path] = {}

    def open(self, final: Path) -> BinaryIO:
        """A file to write, which gets its final name at the end, after those that were opened before it."""
        return self.path(final).open("wb")

    def path(self, final: Path) -> Path:
        """Where a file is until it gets its final name."""
        return self._finals.setdefault(final, self.folder / final.name)

    def has(self, final: Path) -> bool:
        """Whether a file is among them."""
        return final in self._finals

    def scratch(self, name: str) -> Path:
        """A file that is gone at the end."""
        return self.folder / f"scratch-{name}"

    def finish(self) -> None:
        """Gives all files their names."""
        for final, path in self._finals.items():
            path.replace(final)


@contextmanager
def drafts(final: Path, size: int = 0) -> Iterator[Drafts]:
    """Drafts of `final` and its companions in the same folder; if the body ends well they get their names, otherwise they are gone.

    `size` in bytes is what they will need at least: GraphError before anything is written if the disk has less, and when it fills anyway.
    """
    try:
        free = shutil.disk_usage(final.parent).free
        if free < size:
            raise GraphError(
                f"{str(final)!r} needs {format_bytes(size)}, and the disk has {format_bytes(free)} free: make room, or write to another disk."
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    except OSError as error:
        raise GraphError(
            f"{str(final)!r} cannot be written: {error.strerror}. Name a file in a folder that exists."
        ) from None
    try:
        made = Drafts(folder)
        yield made
        made.finish()
    except OSError as error:
        if error.errno in FULL:
            raise GraphError(
                f"The disk was full before {str(final)!r} was whole ({os.strerror(error.errno)}): what was written is removed. Make room, or write to another disk."
            ) from None
        raise GraphError(f"{str(final)!r} cannot be written: {error.strerror}.") from None
    finally:
        with suppress(OSError):
            shutil.rmtree(folder)

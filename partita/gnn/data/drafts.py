"""The files of a graph while they are written (`partita.files.writing`), with a check of the disk's
space before, and errors in sentences."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from partita.errors import GraphError
from partita.files import writing
from partita.files.writing import FULL, Drafts
from partita.units import format_bytes

__all__ = ["Drafts", "open_drafts"]


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
                f"{format_bytes(free)} free: free space, or write to another disk."
            )
        writing.check_writable(final)
    except OSError as error:
        raise GraphError(
            f"{str(final)!r} cannot be written ({error.strerror}): name a file in a folder that "
            "exists."
        ) from None
    try:
        with writing.open_drafts(final) as drafts:
            yield drafts
    except OSError as error:
        if error.errno in FULL:
            raise GraphError(
                f"The disk is full ({os.strerror(error.errno)}): the incomplete {str(final)!r} was "
                "deleted. Free space, or write to another disk."
            ) from None
        raise GraphError(f"{str(final)!r} cannot be written: {error.strerror}.") from None

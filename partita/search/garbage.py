"""A pause of Python's full garbage collections.

A search makes millions of lasting values and few cycles. Each full collection visits all values
again, those of the imported packages too: a tenth of a search. Collections of young values go on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

NEVER = 1 << 30
"""Collections of the middle generation before a full one."""

_lock = Lock()
_thresholds: list[tuple[int, int, int]] = []
"""Those before each pause that has not ended: the first are the usual ones."""


@contextmanager
def young_collections_only() -> Iterator[None]:
    """A block without full collections. Pauses of several threads end with the last of them."""
    with _lock:
        _thresholds.append(gc.get_threshold())
        young, middle, _ = _thresholds[0]
        gc.set_threshold(young, middle, NEVER)
    try:
        yield
    finally:
        with _lock:
            usual = _thresholds[0]
            _thresholds.pop()
            if not _thresholds:
                gc.set_threshold(*usual)

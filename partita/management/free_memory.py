"""Memory of this host that is free."""

from __future__ import annotations

import os
import re
from pathlib import Path

GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)
"""(limit, use) of this process's control group, versions 2 and 1."""


def free_memory_bytes() -> int:
    """Memory that new arrays may take, of this host or of this process's control group."""
    free = re.search(r"MemAvailable:\s*(\d+) kB", _text("/proc/meminfo"))
    if free:
        amounts = [int(free[1]) * 1024]
    else:
        amounts = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit, use in GROUPS:
        most, taken = _text(limit).strip(), _text(use).strip()
        if most.isdigit() and taken.isdigit():
            amounts.append(max(0, int(most) - int(taken)))
    return min(amounts)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""

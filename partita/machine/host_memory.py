"""Memory of this host, or of this process's control group: all of it, and what is free."""

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


def host_memory_bytes() -> int:
    """Memory of this host, or of this process's control group if that is less."""
    return min([_host_bytes("MemTotal"), *(limit for limit, _ in _groups())])


def free_memory_bytes() -> int:
    """Memory that new arrays may take, of this host or of this process's control group."""
    free = [max(0, limit - use) for limit, use in _groups()]
    return min([_host_bytes("MemAvailable"), *free])


def _host_bytes(name: str) -> int:
    """A figure of Linux; the memory of the host where there is none."""
    figure = re.search(rf"{name}:\s*(\d+) kB", _text("/proc/meminfo"))
    if figure:
        return int(figure[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups() -> list[tuple[int, int]]:
    """(limit, use) of the control groups that have a limit, bytes."""
    groups = []
    for limit, use in GROUPS:
        most, taken = _text(limit).strip(), _text(use).strip()
        if most.isdigit() and taken.isdigit():
            groups.append((int(most), int(taken)))
    return groups


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""

"""Limits of a run: control groups of Linux for cores and memory, and a network of its own.

They need root; the network needs iproute2.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
FILES = {
    "cpu": ("cpu.max", "cpu.cfs_quota_us"),
    "memory": ("memory.max", "memory.limit_in_bytes"),
}
"""Controller -> the file of its limit, versions 2 and 1."""
PERIOD = 10_000
"""Time after which a quota of cores is renewed, microseconds."""
LEAST_QUOTA = 1000
"""The smallest quota that Linux takes, microseconds."""


@contextmanager
def control_groups(controller: str, count: int) -> Iterator[list[Path]]:
    """New control groups of a controller, "cpu" or "memory"; all processes in them must have ended
    at the end. Exits with a sentence where there are none."""
    parent = ROOT if (ROOT / "cgroup.controllers").exists() else ROOT / controller
    groups = [parent / f"partita-{controller}-{os.getpid()}-{n}" for n in range(count)]
    try:
        for group in groups:
            try:
                group.mkdir()
            except OSError as error:
                sys.exit(f"{group} cannot be made: {error.strerror}. Run this as root.")
            if not any((group / name).exists() for name in FILES[controller]):
                sys.exit(f"{group} has no limit: enable the controller '{controller}' in {parent}.")
        yield groups
    finally:
        for group in filter(Path.is_dir, groups):
            group.rmdir()


def limit_cores(group: Path, cores: float | None, period: int = PERIOD) -> None:
    """Gives the processes of a group a number of cores; None for all."""
    quota = None if cores is None else max(LEAST_QUOTA, int(cores * period))
    if (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{quota or 'max'} {period}")
        return
    (group / "cpu.cfs_quota_us").write_text("-1")
    (group / "cpu.cfs_period_us").write_text(str(period))
    (group / "cpu.cfs_quota_us").write_text(str(quota or -1))


def limit_memory(group: Path, limit_bytes: int) -> None:
    """Gives the processes of a group at most some bytes."""
    names = [name for name in FILES["memory"] if (group / name).exists()]
    (group / names[0]).write_text(str(limit_bytes))


def enter(group: Path, process: int) -> None:
    """Moves a process into a group."""
    (group / "cgroup.procs").write_text(str(process))


@contextmanager
def network(rate: str) -> Iterator[list[str]]:
    """A network namespace with a loopback of a rate, as the start of a command; none without a
    rate."""
    if not rate:
        yield []
        return
    name = f"partita-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    inside = ["ip", "netns", "exec", name]
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        shape_loopback(rate, "add", inside)
        yield inside
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


def shape_loopback(rate: str, action: str = "change", inside: Sequence[str] = ()) -> None:
    """Gives the loopback of a network a rate; the network is this process's, or that of a command."""
    shape = ["tbf", "rate", rate, "burst", "256kb", "latency", "400ms"]
    command = ["tc", "qdisc", action, "dev", "lo", "root", *shape]
    subprocess.run([*inside, *command], check=True)


def with_limits() -> dict[str, str]:
    """The environment of a run whose script imports this module."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

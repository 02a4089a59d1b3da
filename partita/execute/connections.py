"""Closing this process's connections to others of the same host, to end a wait inside XLA.

Gloo passes the end of a process only to those that exchange data with it. In a ring of four, the
one opposite waits for a neighbour that has given up, for ever: nothing in JAX ends its wait. When
its sockets are closed, it does.

Linux only: /proc tells which sockets belong to which process.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress

TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
ESTABLISHED = "01"


def close_connections(process_ids: Iterable[int]) -> int:
    """Shuts the TCP connections between this process and others down; their number.

    The file descriptors stay open, so their owner sees an error and not a foreign file.
    """
    ends: dict[str, tuple[str, str]] = {}
    for local, remote, inode in _established():
        ends[inode] = local, remote
    theirs: set[tuple[str, str]] = set()
    for process_id in process_ids:
        for inode in _sockets(process_id).values():
            if inode in ends:
                theirs.add(ends[inode])
    number = 0
    for descriptor, inode in _sockets(os.getpid()).items():
        local, remote = ends.get(inode, ("", ""))
        if (remote, local) in theirs:
            _shut(descriptor)
            number += 1
    return number


def _shut(descriptor: int) -> None:
    with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _established() -> Iterator[tuple[str, str, str]]:
    """(local end, remote end, inode) of the TCP connections of this host, as Linux writes them."""
    for path in TABLES:
        with suppress(OSError), open(path, encoding="ascii") as file:
            next(file, None)
            for line in file:
                words = line.split()
                if words[3] == ESTABLISHED:
                    yield words[1], words[2], words[9]


def _sockets(process_id: int) -> dict[int, str]:
    """File descriptor -> inode of the sockets of a process; empty if it is gone."""
    folder = f"/proc/{process_id}/fd"
    sockets: dict[int, str] = {}
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError):
                match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(f"{folder}/{name}"))
                if match:
                    sockets[int(name)] = match[1]
    return sockets

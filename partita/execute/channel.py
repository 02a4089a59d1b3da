"""Arrays between processes, from one to another: offered under a number, asked for by that number.

By `jax.experimental.transfer`, asynchronous on both sides. A number that nobody offers is waited
for without end there, so `Channel` watches what it has asked for.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

QUIET_SECONDS = 30
"""Time for which a process waits for an array without a message, seconds."""


@dataclass(frozen=True)
class _Wait:
    """A value that this process waits for."""

    array: Any
    name: str
    peer: int
    since: float


class Channel:
    """The connections of this process to the others, for arrays.

    Args:
        coordinator: Host and port of process 0.
        exchange: Gives the texts of all processes for the text of this one.
        timeout: Time limit for an array of another process, seconds.
    """

    def __init__(
        self,
        coordinator: str,
        exchange: Callable[[str], list[str]],
        timeout: float,
    ) -> None:
        from jax.experimental import transfer

        self.timeout = timeout
        host = _own_host(coordinator)
        device = jax.local_devices()[0]
        self.server = transfer.start_transfer_server(device.client, f"{host}:0", [f"{host}:0"] * 2)
        self.addresses = exchange(self.server.address())
        self.connections: dict[int, Any] = {}
        self.next_number = 0
        self.waits: deque[_Wait] = deque()
        threading.Thread(target=self._watch, daemon=True).start()

    def reserve(self, count: int) -> int:
        """The first of `count` numbers that no other message has."""
        first = self.next_number
        self.next_number += count
        return first

    def offer(self, number: int, arrays: Sequence[Any], copies: bool) -> None:
        """Offers arrays of one device. With `copies` their memory may be reused at once."""
        values = [array.copy() for array in arrays] if copies else list(arrays)
        self.server.await_pull(number, values)

    def ask(self, peer: int, number: int, shapes: Sequence[Any], name: str) -> list[Any]:
        """Arrays that another process offers, or will."""
        if peer not in self.connections:
            self.connections[peer] = self.server.connect(self.addresses[peer])
        arrays = self.connections[peer].pull(number, list(shapes))
        self.waits.append(_Wait(arrays[0], name, peer, time.monotonic()))
        return arrays

    def settle(self) -> None:
        """Returns when all arrays that this process has asked for have arrived."""
        for wait in list(self.waits):
            if not wait.array.is_deleted():
                jax.block_until_ready(wait.array)

    def _watch(self) -> None:
        """Reports a long wait, and ends this process after the time limit.

        It does not raise: the main thread waits inside JAX, and cannot be interrupted there.
        """
        reported: _Wait | None = None
        while True:
            time.sleep(min(1.0, self.timeout / 4))
            while self.waits and _is_over(self.waits[0].array):
                self.waits.popleft()
            if not self.waits:
                continue
            wait = self.waits[0]
            seconds = time.monotonic() - wait.since
            if seconds > self.timeout:
                _say(f"error: {waits_too_long(wait.name, wait.peer, self.timeout)}")
                os._exit(3)
            if seconds > QUIET_SECONDS and reported is not wait:
                reported = wait
                end = time.time() + self.timeout - seconds
                until = time.strftime("%H:%M:%S", time.localtime(end))
                _say(f"{_waits(wait.name, wait.peer)}, until {until}")


def _is_over(array: Any) -> bool:
    """Whether an array has arrived, is deleted, or has failed."""
    return array.is_deleted() or array.is_ready()


def _waits(name: str, peer: int) -> str:
    process = f"process {jax.process_index()} of {jax.process_count()}"
    return f"{process} waits for {name} of process {peer}"


def waits_too_long(name: str, peer: int, seconds: float) -> str:
    """The message of a process that waited for a value in vain."""
    process = f"process {jax.process_index()} of {jax.process_count()}"
    return (
        f"{process} has waited {seconds:g} s for {name} of process {peer}, which does not send it. "
        "Run the same script with the same batches in all processes, and look at the output of "
        f"process {peer}."
    )


def _say(sentence: str) -> None:
    print(f"partita: {sentence}", file=sys.stderr, flush=True)


def _own_host(coordinator: str) -> str:
    """The address of this host by which it reaches the coordinator."""
    host, _, port = coordinator.rpartition(":")
    name = host.strip("[]")
    family, kind, protocol, _, address = socket.getaddrinfo(
        name, int(port), type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own = str(probe.getsockname()[0])
    return f"[{own}]" if ":" in own else own

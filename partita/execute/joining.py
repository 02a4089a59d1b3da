"""Joining the other processes of a group, and watching that they answer.

`jax.distributed` joins them. XLA's collectives (gloo, NCCL) connect them.
"""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import jax

from partita.errors import LostProcessError, ProcessError
from partita.execute import members
from partita.execute.board import Board
from partita.execute.process_group import ADDRESS, ProcessGroup, uses_one_accelerator
from partita.execute.processes import store

HEARTBEAT = 28
"""Silence after which a process counts as dead, seconds."""

SILENCE = 9
"""Silence after which a process is named, seconds: less than half of HEARTBEAT, after which JAX may
end the others itself."""
ALIVE = "partita/alive"
"""Folder of the coordinator's store with a number per process that grows while it runs."""
ENDED = "ended"
"""In place of that number, when a process ends."""
WATCH_PERIOD = 2
"""Time between two questions which processes are alive, seconds."""
joined = False
"""Whether this process has joined others."""


def join(membership: ProcessGroup, say: Callable[[str], None], board: Board | None = None) -> None:
    """Waits for the other processes. With the board of a launcher, which then also coordinates
    them, this process outlives the others.

    After the timeout it ends this process with a message and code 3. It does not raise: JAX ends
    a process whose wait failed, with a stack trace of its own. A watching thread ends the process
    just before.
    """
    process = f"process {membership.index} of {membership.count}"
    joined_event = threading.Event()
    watch = threading.Thread(
        target=_watch,
        args=(membership, joined_event, say),
        daemon=True,
    )
    watch.start()
    if board is not None:
        jax.config.update("jax_enable_recoverability", True)
    elif membership.index == 0:
        _check_port(membership.address)
    # The preemption service catches SIGTERM, and would train on.
    jax.config.update("jax_enable_preemption_service", False)
    service = nullcontext() if board is None else _service_elsewhere()
    try:
        with service:
            jax.distributed.initialize(**_join_options(membership))
            if board is not None and board.events():
                _forget_topology(membership)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ProcessError(
            f"{process} cannot join the others at {membership.address}: {reason}"
        ) from None
    finally:
        joined_event.set()
    global joined
    joined = True
    if board is not None:
        members.watch(board)
    _watch_others(membership, say)
    # On a CPU, the question for the backend has started gloo.
    if jax.default_backend() == "cpu":
        _let_compute_first()


def _forget_topology(membership: ProcessGroup) -> None:
    """Lets process 0, which is started again, write the list of all devices anew: JAX writes it
    once, and would end the process."""
    if membership.index == 0:
        store().key_value_delete("cpu:global_topology/cpu")


@contextmanager
def _service_elsewhere() -> Iterator[None]:
    """Inside, process 0 starts no coordination service when it joins: the launcher has it, so that
    process 0 may end as any other."""
    from jax._src import distributed

    library: Any = vars(distributed)["_jax"]
    start = library.get_distributed_runtime_service
    library.get_distributed_runtime_service = lambda *positional, **keywords: None
    try:
        yield
    finally:
        library.get_distributed_runtime_service = start


def _watch_others(membership: ProcessGroup, say: Callable[[str], None]) -> None:
    """Names the processes of a group that do not answer any more.

    JAX ends a process HEARTBEAT seconds after another one was lost, with a stack trace that names
    nobody. A thread writes a number into the coordinator's store and reads those of the others. A
    process whose number stays the same is named, and may go on if it has only been busy. If the
    store itself does not answer, this process ends. A launcher watches its processes itself.
    """
    if os.environ.get("PARTITA_LAUNCHED"):
        return
    ending = threading.Event()
    answered = [time.monotonic()]

    def end() -> None:
        ending.set()
        with suppress(Exception):
            store().key_value_set(f"{ALIVE}/{membership.index}", ENDED, allow_overwrite=True)

    # Runs before JAX's own handler, which waits for the others.
    atexit.register(end)

    def ask() -> None:
        changes = Changes()
        number = 0
        while not ending.wait(WATCH_PERIOD):
            number += 1
            try:
                key = f"{ALIVE}/{membership.index}"
                store().key_value_set(key, str(number), allow_overwrite=True)
                numbers = dict(store().key_value_dir_get(ALIVE))
            except Exception:
                return
            answered[0] = time.monotonic()
            for name in changes.silent(numbers, answered[0]):
                say(silence_sentence(name.rpartition("/")[2], membership.count))

    threading.Thread(target=ask, daemon=True).start()
    if membership.index:
        watch = threading.Thread(target=_watch_first, args=(ending, answered, say), daemon=True)
        watch.start()


def _watch_first(
    ending: threading.Event, answered: Sequence[float], say: Callable[[str], None]
) -> None:
    """Ends this process after process 0, which coordinates, has not answered for SILENCE seconds.

    `answered` has the time of its last answer.
    """
    late = 0
    while late < 2:
        if ending.wait(WATCH_PERIOD):
            return
        # Twice, because this thread may wake up before the one that has an answer.
        late = late + 1 if time.monotonic() - answered[0] > SILENCE else 0
    say(
        f"error: process 0 has not answered for {SILENCE} s: it hangs, was stopped or has ended, "
        "so this process stops. The last save is complete: start all again from it."
    )
    sys.stderr.flush()
    os._exit(LostProcessError.exit_code)


class Changes:
    """The times at which values in the coordinator's store changed last."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, float]] = {}
        self._named: set[str] = set()

    def silent(self, values: Mapping[str, str], now: float) -> list[str]:
        """The keys whose values have been the same for SILENCE seconds, each of them once.

        >>> changes = Changes()
        >>> [changes.silent({"0": "5", "1": str(now)}, now) for now in (0, 8, 10, 12)]
        [[], [], ['0'], []]
        """
        for key, value in values.items():
            if self._last.get(key, ("", 0.0))[0] != value:
                self._last[key] = value, now
                self._named.discard(key)
        silent = [
            key
            for key, (value, since) in self._last.items()
            if now - since > SILENCE and value != ENDED and key not in self._named
        ]
        self._named.update(silent)
        return silent


def silence_sentence(index: str, count: int) -> str:
    """The sentence about a process that has not written to the store for SILENCE seconds."""
    return (
        f"process {index} of {count} has not answered for {SILENCE} s. If it hangs or was stopped, "
        f"the others end within {HEARTBEAT} s: the last save is complete, start all again from it."
    )


def _watch(
    membership: ProcessGroup,
    joined_event: threading.Event,
    say: Callable[[str], None],
) -> None:
    """Reports a wait of more than 3 s, and ends this process after the timeout."""
    timeout = membership.timeout
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + timeout))
    process = f"process {membership.index} of {membership.count}"
    if not joined_event.wait(3):
        say(f"{process} waits at {membership.address} for the others, until {until}")
    if joined_event.wait(max(0, timeout - 3)):
        return
    if membership.index == 0:
        reason = "one of the others has not started"
    else:
        reason = f"process 0 does not answer at {membership.address}"
    say(
        f"error: {process} has waited {timeout} s for the others: {reason}. Start all "
        f"{membership.count} with the same address, and check that every host can reach it."
    )
    os._exit(3)


def _join_options(membership: ProcessGroup) -> dict[str, Any]:
    """Arguments of `jax.distributed.initialize`."""
    options: dict[str, Any] = {
        "coordinator_address": membership.address,
        "num_processes": membership.count,
        "process_id": membership.index,
        "initialization_timeout": membership.timeout + 30,
        "heartbeat_timeout_seconds": HEARTBEAT,
        "cluster_detection_method": "deactivate",
    }
    bind_address = _bind_address(membership.address)
    if bind_address is not None:
        options["coordinator_bind_address"] = bind_address
    if uses_one_accelerator(membership):
        options["local_device_ids"] = [membership.local_index]
    return options


def _bind_address(address: str) -> str | None:
    """The address at which process 0 listens: the named one alone.

    None, all interfaces, if the name of this host is only known to itself (127.0.1.1 in
    /etc/hosts), or belongs to a router in front of it.

    >>> _bind_address("localhost:1234"), _bind_address("127.0.0.1:1234")
    ('127.0.0.1:1234', '127.0.0.1:1234')
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    numbers = sorted({str(entry[4][0]) for entry in found}, key=lambda number: ":" in number)
    local = [number for number in numbers if _is_local(number)]
    if not local:
        return None
    is_loopback = local[0].startswith("127.") or local[0] == "::1"
    if is_loopback and host not in ("localhost", *numbers):
        return None
    return f"[{local[0]}]:{port}" if ":" in local[0] else f"{local[0]}:{port}"


def _is_local(number: str) -> bool:
    """Whether an address is one of this host."""
    family = socket.AF_INET6 if ":" in number else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((number, 0))
        except OSError:
            return False
    return True


def _let_compute_first() -> None:
    """Schedules gloo's thread as SCHED_BATCH, so it does not preempt a computation on waking.

    Gloo's thread wakes when a message comes, and polls until the computing thread has given the
    message's destination. If both share a core, the computing thread waits for the end of a time
    slice: 4 ms for a collective that takes 0.1 ms (Linux 6.18, jaxlib 0.10.2). Gloo's thread is
    recognized by its system call: a wait for at most 64 events, for 10 ms
    (gloo/transport/tcp/loop.cc). Systems without SCHED_BATCH are left unchanged.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for _ in range(50):
        names = os.listdir("/proc/self/task")
        threads = [int(name) for name in names if _system_call(name)[3:5] == ["0x40", "0xa"]]
        for thread in threads:
            with suppress(OSError):
                os.sched_setscheduler(
                    thread,
                    os.SCHED_BATCH,
                    os.sched_param(0),
                )
        if threads:
            return
        time.sleep(0.002)


def _system_call(thread: str) -> list[str]:
    """Number and arguments of the system call that a thread of this process is in.

    Empty if /proc does not give it.
    """
    try:
        with open(f"/proc/self/task/{thread}/syscall") as file:
            return file.read().split()
    except OSError:
        return []


def _check_port(address: str) -> None:
    """Raises a ProcessError if another program listens on the port.

    JAX would share the port, and wait for processes that reach the other program.
    """
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise ProcessError(
                f"Port {port} of {address} is in use. Give another one in {ADDRESS} "
                "(in JAX_COORDINATOR_PORT if a launcher gives the host), or end the program that "
                "uses it."
            ) from None

"""Several processes that train one program together.

`jax.distributed` joins them. XLA's collectives (gloo, NCCL) connect them. Every process runs the
same script from the same seed and reads the same batches, and puts only its part on its devices.

Equal inputs are checked before the first step, through the coordinator's store: the plan, the
step, the first weights and batch. A difference then is an error message, not a wrong result.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from partita.errors import LostProcessError, PartitaError, ProcessError
from partita.execute import members
from partita.execute.board import Board
from partita.execute.channel import Channel

TIMEOUT = 300
"""Time limit for the other processes to start, seconds."""
WAIT_SECONDS = 3600
"""Time limit for an array of another process, which may be saving files, seconds."""
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
ADDRESS = "JAX_COORDINATOR_ADDRESS"
LOST = ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "Connection closed", "heartbeat")
"""Words in JAX's errors after a process has ended."""


@dataclass(frozen=True)
class Launcher:
    """A program that starts processes, and the names of its environment variables."""

    name: str
    count: str
    """Number of processes."""
    index: str
    """Index of this process."""
    local_count: str
    """Number of processes on this host."""
    local_index: str
    """Index of this process on its host."""
    job: tuple[str, ...]
    """Variables that identify a run among others on the same hosts."""


# mpirun inside a Slurm allocation comes first: Slurm then numbers the starters of the processes.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE",),
    ),
    Launcher(
        "MPICH",
        "PMI_SIZE",
        "PMI_RANK",
        "MPI_LOCALNRANKS",
        "MPI_LOCALRANKID",
        ("SLURM_JOB_ID",),
    ),
    Launcher(
        "Slurm",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_LOCALID",
        ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together, seen from one of them.

    A process that was started by hand does not know the others on its host: `local_count` is 1.
    """

    count: int
    index: int
    address: str
    """Host and port at which process 0 listens."""
    timeout: int = TIMEOUT
    """Time limit for the other processes to start, seconds."""
    local_count: int = 1
    """Number of processes on this host."""
    local_index: int = 0
    """Index of this process on its host."""


def group(environment: Mapping[str, str] | None = None) -> ProcessGroup | None:
    """The group that this process was started in, from its environment; None for a single one.

    Three variables give it by hand: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.
    Slurm and MPI give it by their own variables, in some cases without the address. A batch
    script of Slurm is not a step of several tasks, whatever the number of tasks requested: it
    starts a single process.

    >>> by_hand = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2"}
    >>> member = group(by_hand | {"JAX_PROCESS_ID": "1"})
    >>> member.count, member.index, member.address, member.timeout
    (2, 1, '10.0.0.1:1234', 300)
    >>> group({})
    """
    variables = os.environ if environment is None else environment
    timeout = _number(variables, "PARTITA_TIMEOUT", TIMEOUT)
    address = variables.get(ADDRESS)
    missing = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name not in variables]
    if address and not missing:
        count = _number(variables, "JAX_NUM_PROCESSES")
        index = _number(variables, "JAX_PROCESS_ID")
        _check_index(count, index, "JAX_PROCESS_ID")
        _check_address(address)
        return ProcessGroup(count, index, address, timeout) if count > 1 else None
    for launcher in LAUNCHERS:
        if _started_by(launcher, variables):
            return _launched_group(launcher, variables, timeout)
    if address:
        verb = "are" if len(missing) > 1 else "is"
        raise PartitaError(
            f"{ADDRESS} is set to '{address}', and {' and '.join(missing)} {verb} not. "
            "Set all three: the number of processes, and the index of this one, from 0."
        )
    return None


def _started_by(launcher: Launcher, variables: Mapping[str, str]) -> bool:
    """Whether a launcher has started this process and others."""
    if launcher.count not in variables or launcher.index not in variables:
        return False
    return _number(variables, launcher.count) > 1


def _launched_group(
    launcher: Launcher,
    variables: Mapping[str, str],
    timeout: int,
) -> ProcessGroup:
    """The group by a launcher's variables."""
    count = _number(variables, launcher.count)
    index = _number(variables, launcher.index)
    local_count = _local_count(variables, launcher)
    local_index = _number(variables, launcher.local_index, 0)
    address = variables.get(ADDRESS) or _address(variables, launcher, local_count)
    _check_index(count, index, launcher.index)
    _check_address(address)
    return ProcessGroup(
        count,
        index,
        address,
        timeout,
        local_count,
        local_index,
    )


def _check_index(count: int, index: int, name: str) -> None:
    if not 0 <= index < count:
        raise PartitaError(
            f"{name} is {index}, and there are {count} processes: number them 0 to {count - 1}."
        )


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise PartitaError(
            f"{ADDRESS} is '{address}': write the host of process 0 and a port, "
            "as in '10.0.0.1:1234'."
        )


def _local_count(variables: Mapping[str, str], launcher: Launcher) -> int:
    """Number of the group's processes on this host. Slurm lists all nodes, as in '2(x3),1'."""
    if launcher.name != "Slurm":
        return _number(variables, launcher.local_count, 1)
    text = variables.get(launcher.local_count, "1")
    counts: list[int] = []
    for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(nodes or 1)
    node = _number(variables, "SLURM_NODEID", 0)
    return counts[min(node, len(counts) - 1)]


def _address(
    variables: Mapping[str, str],
    launcher: Launcher,
    local_count: int,
) -> str:
    """The address of process 0 under a launcher: its first host and a port.

    The port is above those that the system gives out. It comes from the name of the job, so all
    processes get the same one and two jobs rarely do.
    """
    count = _number(variables, launcher.count)
    host = "127.0.0.1" if local_count == count else _first_host(variables, launcher)
    port = _port(variables, launcher)
    if not host or not port:
        raise PartitaError(
            f"{launcher.name} started {count} processes without an address for process 0. "
            f"Give all of them its host and a free port, as in {ADDRESS}=10.0.0.1:1234."
        )
    return f"{host}:{port}"


def _port(variables: Mapping[str, str], launcher: Launcher) -> str:
    """The port of process 0; empty if the launcher does not name the job."""
    port = variables.get("JAX_COORDINATOR_PORT")
    if port:
        return port
    job = [variables[name] for name in launcher.job if name in variables]
    if not job:
        return ""
    return str(61440 + zlib.crc32(".".join(job).encode()) % 4096)


def _first_host(variables: Mapping[str, str], launcher: Launcher) -> str:
    """The host of process 0, by Open MPI's head node or Slurm's node list; empty without either."""
    uri = variables.get("OMPI_MCA_orte_hnp_uri", "")
    head = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    if head and launcher.name == "Open MPI":
        return head[1] or f"[{head[2]}]"
    job_nodes = variables.get("SLURM_JOB_NODELIST", "")
    nodes = variables.get("SLURM_STEP_NODELIST", job_nodes)
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if first is None:
        return ""
    return "".join(part or "" for part in first.groups())


def _number(
    variables: Mapping[str, str],
    name: str,
    default: int | None = None,
) -> int:
    if name not in variables and default is not None:
        return default
    text = variables[name]
    if not text.isdigit():
        raise PartitaError(f"{name} is '{text}': write a whole number.")
    return int(text)


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
        _store().key_value_delete("cpu:global_topology/cpu")


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
            _store().key_value_set(f"{ALIVE}/{membership.index}", ENDED, allow_overwrite=True)

    # Runs before JAX's own handler, which waits for the others.
    atexit.register(end)

    def ask() -> None:
        changes = Changes()
        number = 0
        while not ending.wait(WATCH_PERIOD):
            number += 1
            try:
                key = f"{ALIVE}/{membership.index}"
                _store().key_value_set(key, str(number), allow_overwrite=True)
                numbers = dict(_store().key_value_dir_get(ALIVE))
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


def uses_one_accelerator(
    membership: ProcessGroup,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Whether this process uses only the accelerator of its local index.

    A single process on a host drives all accelerators, and so does a process whose launcher gave
    it its own one.

    >>> single = ProcessGroup(2, 1, "a:1")
    >>> third = ProcessGroup(8, 2, "a:1", local_count=4, local_index=2)
    >>> uses_one_accelerator(single, {}), uses_one_accelerator(third, {})
    (False, True)
    >>> uses_one_accelerator(third, {"CUDA_VISIBLE_DEVICES": "2"})
    False
    """
    variables = os.environ if environment is None else environment
    if membership.local_count <= 1 or "JAX_LOCAL_DEVICE_IDS" in variables:
        return False
    visible = variables.get("CUDA_VISIBLE_DEVICES")
    return visible is None or membership.local_index < len(visible.split(","))


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


joined = False
"""Whether this process has joined others."""


def alone() -> bool:
    """Whether this process trains by itself."""
    return members.count() == 1


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return members.index() == members.first()


_uses: dict[tuple[int, str], int] = {}
"""Number of uses of a name in the store, by generation of the group."""
SLICE = 0.1
"""Time of a wait for the store, after which losses are looked for, seconds."""


def _store() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _key(name: str) -> str:
    """A key for the n-th use of `name` by this generation of the group, equal in all processes."""
    generation = members.generation()
    use = generation, name
    _uses[use] = _uses.get(use, 0) + 1
    return f"partita/{generation}/{name}/{_uses[use]}"


def check_losses(activity: str) -> None:
    """LostProcessError if the launcher has reported a loss that this process has not left yet."""
    news = members.news()
    if news:
        lost = ", ".join(f"process {loss.process} {loss.cause}" for loss in news)
        raise LostProcessError(f"{lost} during {activity}, so the others stop.")


def _value(key: str, seconds: float) -> str:
    """The value of a key in the store, waited for; JaxRuntimeError after the time limit, and a
    LostProcessError if a process is lost meanwhile."""
    if members.board() is None:
        return _store().blocking_key_value_get(key, int(seconds * 1000))
    end = time.monotonic() + seconds
    with members.meeting():
        while True:
            try:
                return _store().blocking_key_value_get(key, int(SLICE * 1000))
            except jax.errors.JaxRuntimeError:
                check_losses("a meeting")
                if time.monotonic() > end:
                    raise


def from_first(
    name: str,
    make: Callable[[], str],
    seconds: int = 3600,
) -> str:
    """The result of `make` in the first process, given to every process.

    `seconds` is the time limit of the others. An error of the first process is raised in all
    processes, as a ProcessError in the others.
    """
    if members.is_returning():
        return _recalled(name, make)
    if alone():
        return make()
    key = _key(name)
    if is_first():
        try:
            value = make()
        except BaseException as error:
            _store().key_value_set(key, f"error {error}")
            raise
        _store().key_value_set(key, f"value {value}")
        return value
    answer = _value(key, seconds)
    status, _, value = answer.partition(" ")
    if status == "error":
        raise ProcessError(value)
    return value


def _recalled(name: str, make: Callable[[], str]) -> str:
    """The first process's result at the same point of the script, while this one catches up."""
    board = members.board()
    assert board is not None
    last = len(board.events())
    for generation in range(last + 1):
        use = generation, name
        key = f"partita/{generation}/{name}/{_uses.get(use, 0) + 1}"
        try:
            answer = _store().key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            continue
        _uses[use] = _uses.get(use, 0) + 1
        return str(answer).partition(" ")[2]
    return make()


def exchanged(name: str, value: str) -> list[str]:
    """The values of all live processes, in their order. All must call it at the same point.

    ProcessError for one that does not within the time limit.
    """
    key = _key(name)
    _store().key_value_set(f"{key}/{members.index()}", value)
    values: list[str] = []
    for i in members.alive():
        try:
            values.append(_value(f"{key}/{i}", TIMEOUT))
        except jax.errors.JaxRuntimeError:
            raise ProcessError(
                f"Process {i} has not reached its first step {TIMEOUT} s after the others. "
                "Run the same script in all processes."
            ) from None
    return values


def same(name: str, digest: str, hint: str) -> None:
    """Compares a digest over all processes.

    Raises a ProcessError that names the processes that differ from the first. `name` is a plural
    that starts the message ("Plans"); `hint` is the fix.
    """
    if alone():
        return
    digests = exchanged(f"same/{name}", digest)
    numbers = members.alive()
    different = [str(i) for i, value in zip(numbers, digests, strict=True) if value != digests[0]]
    if different:
        processes = "process" if len(different) == 1 else "processes"
        raise ProcessError(
            f"{name} differ between process {numbers[0]} and "
            f"{processes} {', '.join(different)}. {hint}"
        )


def is_local(value: Any) -> bool:
    """Whether a value is this process's own: not an array that processes have together, nor one of
    a device group. All processes find the same answer.
    """
    if not isinstance(value, jax.Array):
        return True
    return value.is_fully_addressable and not is_of_group(value)


def is_of_group(value: Any) -> bool:
    """Whether an array is on devices of some processes only, for all processes to know of."""
    if alone() or not isinstance(value, jax.Array):
        return False
    if not isinstance(value.sharding, jax.sharding.NamedSharding):
        return False
    return len(_members(value)) < members.count()


def _members(value: jax.Array) -> list[int]:
    """The processes that have a part of an array."""
    return sorted({device.process_index for device in value.sharding.device_set})


def digest(values: Any) -> str:
    """A digest of a text, or of the arrays of a tree that are this process's own."""
    if isinstance(values, str):
        return hashlib.sha256(values.encode()).hexdigest()
    checksum = 0
    for x in jax.tree.leaves(values):
        if is_local(x):
            data = np.ascontiguousarray(np.asarray(x))
            checksum = zlib.crc32(data.tobytes(), checksum)
    return f"{checksum:08x}"


def put(values: Any, shardings: Any) -> Any:
    """Values with the given shardings. Both are trees; one sharding serves all values.

    Every process puts its part of a value that all processes have.
    """
    if alone():
        return jax.device_put(values, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _put(x, shardings), values)
    return jax.tree.map(_put, values, shardings)


def _put(value: Any, sharding: Any) -> Any:
    if not is_local(value):
        if value.sharding.is_equivalent_to(sharding, value.ndim):
            return value
        if value.sharding.device_set == sharding.device_set and not is_of_group(value):
            return _resharded(sharding)(value)
        value = whole(value)
    array = np.asarray(value)
    if isinstance(value, (bool, int, float, complex)):
        array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
    return jax.make_array_from_callback(
        array.shape,
        sharding,
        lambda index: array[index],
        dtype=array.dtype,
    )


_reshards: dict[Any, Any] = {}
"""Compiled copies, by sharding of the result."""


def _resharded(sharding: Any) -> Any:
    if sharding not in _reshards:
        _reshards[sharding] = jax.jit(lambda x: x, out_shardings=sharding)
    return _reshards[sharding]


def whole(value: Any) -> np.ndarray:
    """All values of an array.

    For an array that is split over processes, or that some of them have, all processes must call
    this at the same point.
    """
    if is_of_group(value):
        return _from_group(value)
    if is_local(value) or value.is_fully_replicated:
        return np.asarray(value)
    with together("reading the weights"):
        return np.asarray(replicated(value))


def replicated(value: jax.Array) -> jax.Array:
    """An array on all devices of its mesh."""
    mesh = value.sharding.mesh  # type: ignore[union-attr]
    return _resharded(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(value)


def _from_group(value: jax.Array) -> np.ndarray:
    """All values of an array of a device group, given to every process by the first one of it."""
    link = channel()
    first = link.reserve(jax.process_count())
    index = members.index()
    owners = _members(value)
    with together("reading the weights"):
        if index not in owners:
            here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            shape = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=here)
            return np.asarray(link.ask(owners[0], first + index, [shape], "a variable")[0])
        array = value if value.is_fully_replicated else replicated(value)
        own = array.addressable_data(0)
        if index == owners[0]:
            for other in sorted(set(members.alive()) - set(owners)):
                link.offer(first + other, [own], copies=True)
        return np.asarray(own)


@functools.cache
def channel() -> Channel:
    """The channel of this process to the others, opened at the first use, which all reach."""
    from jax._src import distributed

    address = str(distributed.global_state.coordinator_address)
    return Channel(address, lambda own: exchanged("channel", own), WAIT_SECONDS)


def settle() -> None:
    """Returns when every process has received all arrays that it has asked for.

    Before a collective: on a CPU it may take all threads, and arrays would not be sent.
    """
    channel().settle()
    _store().wait_at_barrier(_key("settle"), WAIT_SECONDS * 1000, list(members.alive()))


def meet() -> None:
    """Returns when all processes have called it."""
    if members.generation():
        exchanged("meet", "")
    elif not alone():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("partita")


@contextmanager
def together(activity: str) -> Iterator[None]:
    """A block in which all processes compute together.

    If a process is lost, raises a LostProcessError in place of gloo's or NCCL's error.
    `activity` is the block's name in the message.
    """
    try:
        with members.meeting():
            yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        text = str(error)
        if alone() or not any(word in text for word in LOST):
            raise
        raise LostProcessError(
            f"{_lost()} in the middle of {activity}, so the others stop. "
            "The last save is complete: start again from it."
        ) from None


def _lost() -> str:
    """The processes that no longer answer, by the coordinator's heartbeats, as a phrase."""
    unnamed = "Another process ended"
    if os.environ.get("PARTITA_LAUNCHED"):
        # The launcher names it.
        return unnamed
    indices = members.alive()
    try:
        alive = _store().get_live_nodes(list(indices))
    except Exception:
        return unnamed
    lost = [str(i) for i in indices if i not in alive]
    return f"Process {', '.join(lost)} ended" if lost else unnamed

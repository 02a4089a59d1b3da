"""Several processes that train one program together. `jax.distributed` joins them; XLA's collectives (gloo, NCCL) carry the work.

Every process runs the same script from the same seed and reads the same batches; on its devices it puts only its own part of
them. What must be equal in all of them (the plan, the step, the first weights and batch) is compared through the
coordinator's store before the first step, so that a difference is a sentence and not a wrong result.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from partita.errors import LostProcessError, PartitaError, ProcessError

TIMEOUT = 300
"""Seconds that a process waits for the others to come."""
HEARTBEAT = 30
"""Seconds after which a process that says nothing is taken for dead."""


@dataclass(frozen=True)
class Launcher:
    """Who starts processes, and the variables in which it says how many there are and which one this is, in all and on this host.

    `job` has what tells one run from others on the same hosts.
    """

    name: str
    count: str
    index: str
    here: str
    local: str
    job: tuple[str, ...]


LAUNCHERS = (  # mpirun inside a Slurm allocation comes first: Slurm then numbers what starts the processes
    Launcher(
        "Open MPI",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        ("PMIX_NAMESPACE",),
    ),
    Launcher(
        "MPICH", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID", ("SLURM_JOB_ID",)
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
class Group:
    """The processes that train together. Process 0 listens at `address`; `here` of them are on this host, of which this is `local`.

    Started by hand, a process knows nothing of others on its host: `here` is then 1.
    """

    count: int
    index: int
    address: str
    timeout: int = TIMEOUT
    here: int = 1
    local: int = 0


def group(environment: Mapping[str, str] | None = None) -> Group | None:
    """The group that this process was started in, by what its environment says; None where it is alone.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it by hand; Slurm and MPI say it themselves, all or but
    the address. A batch script of Slurm is no step of several tasks, however many were asked for: what it starts is alone.

    >>> group({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    Group(count=2, index=1, address='10.0.0.1:1234', timeout=300, here=1, local=0)
    >>> group({})
    """
    said = os.environ if environment is None else environment
    timeout = _number(said, "PARTITA_TIMEOUT", TIMEOUT)
    address = said.get("JAX_COORDINATOR_ADDRESS")
    missing = [name for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID") if name not in said]
    if address and not missing:
        return _group(said, address, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", timeout)
    for launcher in LAUNCHERS:
        if launcher.count in said and launcher.index in said and _number(said, launcher.count) > 1:
            here, local = _here(said, launcher), _number(said, launcher.local, 0)
            found = _group(
                said,
                address or _address(said, launcher, here),
                launcher.count,
                launcher.index,
                timeout,
            )
            return found and replace(found, here=here, local=local)
    if address:
        raise PartitaError(
            f"JAX_COORDINATOR_ADDRESS is set to '{address}', and {' and '.join(missing)} {'are' if missing[1:] else 'is'} not. Set all three: how many processes "
            "there are, and which one this is, from 0."
        )
    return None


def _group(
    said: Mapping[str, str], address: str, count_name: str, index_name: str, timeout: int
) -> Group | None:
    count, index = _number(said, count_name), _number(said, index_name)
    if not 0 <= index < count:
        raise PartitaError(
            f"{index_name} is {index}, and there are {count} processes: number them 0 to {count - 1}."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise PartitaError(
            f"JAX_COORDINATOR_ADDRESS is '{address}': write the host of process 0 and a port, as in '10.0.0.1:1234'."
        )
    return Group(count, index, address, timeout) if count > 1 else None


def _here(said: Mapping[str, str], launcher: Launcher) -> int:
    """How many processes of the group are on this host; Slurm says it for all nodes, as in '2(x3),1'."""
    if launcher.name != "Slurm":
        return _number(said, launcher.here, 1)
    nodes = [
        int(n)
        for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", said.get(launcher.here, "1"))
        for _ in range(int(times or 1))
    ]
    return nodes[min(_number(said, "SLURM_NODEID", 0), len(nodes) - 1)]


def _address(said: Mapping[str, str], launcher: Launcher, here: int) -> str:
    """Where process 0 of what a launcher started listens: on its first host, at a port above those that the system gives out.

    The port comes from the name of the job, so that all processes find the same one and two jobs seldom do.
    """
    job = [said[name] for name in launcher.job if name in said]
    port = said.get("JAX_COORDINATOR_PORT") or (
        str(61440 + zlib.crc32(".".join(job).encode()) % 4096) if job else ""
    )
    head = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", said.get("OMPI_MCA_orte_hnp_uri", ""))
    nodes = re.match(
        r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)",
        said.get("SLURM_STEP_NODELIST", said.get("SLURM_JOB_NODELIST", "")),
    )
    if here == _number(said, launcher.count):
        host = "127.0.0.1"
    elif head and launcher.name == "Open MPI":
        host = head[1] or f"[{head[2]}]"
    else:
        host = "".join(part or "" for part in nodes.groups()) if nodes else ""
    if not host or not port:
        raise PartitaError(
            f"{launcher.name} has started {said[launcher.count]} processes and does not say where process 0 listens. Give all of them "
            "its host and a free port, as in JAX_COORDINATOR_ADDRESS=10.0.0.1:1234."
        )
    return f"{host}:{port}"


def _number(said: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in said and default is not None:
        return default
    if not said[name].isdigit():
        raise PartitaError(f"{name} is '{said[name]}': write a whole number.")
    return int(said[name])


def join(who: Group, say: Callable[[str], None]) -> None:
    """Waits for the other processes. Where they do not come in time, this process ends with a sentence and code 3.

    Not by an error: JAX ends a process that waited in vain with a stack trace of its own, so a watch ends it just before.
    """
    until = time.strftime("%H:%M:%S", time.localtime(time.time() + who.timeout))
    where = f" at {who.address}"
    mine = f"process {who.index} of {who.count}"
    there = threading.Event()

    def watch() -> None:
        if not there.wait(3):
            say(f"{mine} waits{where} for the others, until {until}")
        if not there.wait(max(0, who.timeout - 3)):
            others = (
                "one of the others has not started"
                if who.index == 0
                else f"process 0 does not answer{where}"
            )
            say(
                f"error: {mine} has waited {who.timeout} s for the others: {others}. Start all {who.count} with the same address, "
                "and see that it can be reached from every host."
            )
            os._exit(3)

    threading.Thread(target=watch, daemon=True).start()
    if who.index == 0:
        _listen(who.address)
    how: dict[str, Any] = {
        "coordinator_address": who.address,
        "num_processes": who.count,
        "process_id": who.index,
    }
    how |= {
        "initialization_timeout": who.timeout + 30,
        "heartbeat_timeout_seconds": HEARTBEAT,
        "cluster_detection_method": "deactivate",
    }
    if who.address.startswith("127."):
        how["coordinator_bind_address"] = who.address
    if own_accelerator(who):
        how["local_device_ids"] = [who.local]
    jax.config.update(
        "jax_enable_preemption_service", False
    )  # it catches SIGTERM, and would train on
    try:
        jax.distributed.initialize(**how)
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"{mine} cannot join the others{where}: {str(error).strip().splitlines()[0]}"
        ) from None
    finally:
        there.set()
    global joined
    joined = True
    if jax.default_backend() == "cpu":  # which has started gloo
        _let_compute_first()


def _let_compute_first() -> None:
    """Makes gloo's thread one that does not push others aside when it wakes (SCHED_BATCH), where the system has such.

    It wakes when a message comes, and asks for events in a circle until the thread that computes has said where to put it. Where both
    share a core, that thread then waits for the end of a time slice: 4 ms for a collective that takes 0.1 (Linux 6.18, jaxlib 0.10.2). What gloo's thread is
    known by: it waits for at most 64 events for 10 ms (gloo/transport/tcp/loop.cc).
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    for _ in range(50):
        threads = [
            int(name)
            for name in os.listdir("/proc/self/task")
            if _call_of(name)[3:5] == ["0x40", "0xa"]
        ]
        for thread in threads:
            with suppress(OSError):
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
        if threads:
            return
        time.sleep(0.002)


def _call_of(thread: str) -> list[str]:
    """The number and the arguments of the system call that a thread of this process is in, as /proc says it; nothing where it does not."""
    try:
        with open(f"/proc/self/task/{thread}/syscall") as file:
            return file.read().split()
    except OSError:
        return []


def own_accelerator(who: Group, environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process takes the one accelerator of its number on this host, and not all that it sees.

    A process that is the only one of its host drives all of them; so does one that was given its own by the launcher.

    >>> alone, third = Group(2, 1, "a:1"), Group(8, 2, "a:1", here=4, local=2)
    >>> own_accelerator(alone, {}), own_accelerator(third, {}), own_accelerator(third, {"CUDA_VISIBLE_DEVICES": "2"})
    (False, True, False)
    """
    said = os.environ if environment is None else environment
    visible = said.get("CUDA_VISIBLE_DEVICES")
    return (
        who.here > 1
        and "JAX_LOCAL_DEVICE_IDS" not in said
        and (visible is None or who.local < len(visible.split(",")))
    )


def _listen(address: str) -> None:
    """ProcessError if another program listens on the port; JAX would share it, and wait for processes that come to the other one."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise ProcessError(
                f"Port {port} of {address} is in use. Give another one (in JAX_COORDINATOR_ADDRESS; in JAX_COORDINATOR_PORT where a launcher "
                "says the host), or end the program that has it."
            ) from None


joined = False
"""Whether this process has joined others."""


def alone() -> bool:
    """Whether this process trains by itself."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return jax.process_index() == 0


_asked: dict[str, int] = {}


def _store() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def _key(name: str) -> str:
    """A key that is the same in all processes the n-th time that each asks for `name`."""
    _asked[name] = _asked.get(name, 0) + 1
    return f"partita/{name}/{_asked[name]}"


def from_first(name: str, make: Callable[[], str], seconds: int = 3600) -> str:
    """What process 0 makes, in every process. An error of process 0 is raised in all of them, as a ProcessError in the others."""
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
    kind, _, value = _store().blocking_key_value_get(key, seconds * 1000).partition(" ")
    if kind == "error":
        raise ProcessError(value)
    return value


def same(what: str, digest: str, hint: str) -> None:
    """Compares a digest over all processes; a ProcessError names those that differ from process 0."""
    if alone():
        return
    key, store = _key(f"same/{what}"), _store()
    store.key_value_set(f"{key}/{jax.process_index()}", digest)
    found = []
    for i in range(jax.process_count()):
        try:
            found.append(store.blocking_key_value_get(f"{key}/{i}", TIMEOUT * 1000))
        except jax.errors.JaxRuntimeError:
            raise ProcessError(
                f"Process {i} has not come to its first step after {TIMEOUT} s, and the others have. Do all run the same script?"
            ) from None
    other = [str(i) for i, one in enumerate(found) if one != found[0]]
    if other:
        raise ProcessError(
            f"{what} of process {', '.join(other)} differs from that of process 0. {hint}"
        )


def digest(values: Any) -> str:
    """A digest of a text, or of the arrays of a tree as far as they are here."""
    if isinstance(values, str):
        return hashlib.sha256(values.encode()).hexdigest()
    found = 0
    for x in jax.tree.leaves(values):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            found = zlib.crc32(np.ascontiguousarray(np.asarray(x)).tobytes(), found)
    return f"{found:08x}"


def put(values: Any, shardings: Any) -> Any:
    """Values where the shardings want them, of a tree of either. Every process puts what it has of a value that all have."""
    if alone():
        return jax.device_put(values, shardings)
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda x: _put(x, shardings), values)
    return jax.tree.map(_put, values, shardings)


def _put(value: Any, sharding: Any) -> Any:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        if value.sharding.is_equivalent_to(sharding, value.ndim):
            return value
        return _resharded(sharding)(value)
    here = np.asarray(value)
    if isinstance(value, (bool, int, float, complex)):
        here = here.astype(jax.dtypes.canonicalize_dtype(here.dtype))
    return jax.make_array_from_callback(here.shape, sharding, lambda index: here[index])


_reshards: dict[Any, Any] = {}


def _resharded(sharding: Any) -> Any:
    if sharding not in _reshards:
        _reshards[sharding] = jax.jit(lambda x: x, out_shardings=sharding)
    return _reshards[sharding]


def whole(value: Any) -> np.ndarray:
    """An array's values, all of them. Of one that is split over processes, all processes have to ask at the same point."""
    if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    mesh = value.sharding.mesh  # type: ignore[union-attr]
    with together("reading the weights"):
        return np.asarray(
            _resharded(jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(value)
        )


def meet() -> None:
    """Returns when all processes have come here."""
    if not alone():
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices("partita")


@contextmanager
def together(doing: str) -> Iterator[None]:
    """Inside, all processes compute together; where one of them is gone, a ProcessError says so instead of what gloo says."""
    try:
        yield
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        text = str(error)
        if alone() or not any(
            word in text
            for word in ("Gloo", "gloo", "NCCL", "UNAVAILABLE", "Connection closed", "heartbeat")
        ):
            raise
        raise LostProcessError(
            f"{_gone()} in the middle of {doing}, so the others stop. What was saved last is whole: start again from it."
        ) from None


def _gone() -> str:
    """Which processes no longer answer, by the coordinator's heartbeats."""
    everyone: Sequence[int] = range(jax.process_count())
    if os.environ.get("PARTITA_LAUNCHED"):
        return "Another process ended"  # the launcher names it
    try:
        alive = _store().get_live_nodes(list(everyone))
    except Exception:
        return "Another process ended"
    gone = [str(i) for i in everyone if i not in alive]
    return f"Process {', '.join(gone)} ended" if gone else "Another process ended"

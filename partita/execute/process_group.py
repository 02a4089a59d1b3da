"""The group of processes that this one was started in, by its environment.

Three variables of JAX give it by hand; Slurm, Open MPI and MPICH by their own variables.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from partita.errors import PartitaError

TIMEOUT = 300
"""Time limit for the other processes to start, seconds."""
ADDRESS = "JAX_COORDINATOR_ADDRESS"
COUNT = "JAX_NUM_PROCESSES"
INDEX = "JAX_PROCESS_ID"


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
    missing = [name for name in (ADDRESS, COUNT, INDEX) if not variables.get(name)]
    if not missing:
        assert address is not None
        count = _number(variables, COUNT)
        if not count:
            raise PartitaError(f"{COUNT} is 0: write the number of processes, at least 1.")
        index = _number(variables, INDEX)
        _check_index(count, index, INDEX)
        _check_address(address)
        return ProcessGroup(count, index, address, timeout) if count > 1 else None
    for launcher in LAUNCHERS:
        if _started_by(launcher, variables):
            return _launched_group(launcher, variables, timeout)
    given = [name for name in (ADDRESS, COUNT, INDEX) if name not in missing]
    if given and variables.get(COUNT, "") != "1":
        verb = "are" if len(missing) > 1 else "is"
        raise PartitaError(
            f"{given[0]} is set to '{variables[given[0]]}', and {' and '.join(missing)} {verb} "
            "not. Set all three: the host and port of process 0, the number of processes, and the "
            "index of this one, from 0."
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
    if not host or not _is_number(port) or not 0 < int(port) < 65536:
        raise PartitaError(
            f"{ADDRESS} is '{address}': write the host of process 0 and a port from 1 to 65535, "
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
    if not _is_number(text):
        raise PartitaError(f"{name} is '{text}': write a whole number.")
    return int(text)


def _is_number(text: str) -> bool:
    """Whether a text consists of the digits 0 to 9."""
    return text.isascii() and text.isdigit()


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

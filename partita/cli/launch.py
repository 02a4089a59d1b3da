"""Starts several processes on this host that train together, and ends them together.

Process 0 alone prints. If another one fails, the end of its standard error is printed.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from partita.cli.survivors import Survivors, is_killed
from partita.errors import INTERRUPTED, LostProcessError, PartitaError
from partita.execute.board import Board

GRACE = 5.0
"""Time for the other processes to end by themselves when one has failed, and again after a signal,
seconds."""
POLL = 0.05
"""Time between two looks at the processes, seconds."""
SURVIVAL_POLL = 0.03
"""The same, while others wait to hear who is lost, seconds."""
STOPPED = 15.0
"""Time after which a process that a signal has suspended counts as lost, seconds."""
SHOWN_LINES = 20
"""Lines of the standard error of a failed process that are printed."""
PARENT_DEATH_SIGNAL = 1
"""Linux's option of `prctl` for the signal at the end of the parent process."""


@dataclass(frozen=True)
class Managed:
    """A group that goes on without lost processes."""

    board: Board
    address: str
    """Where the launcher coordinates it."""
    returns: int
    """Lost processes that are started again, at most."""


@dataclass(frozen=True)
class Outcome:
    """The end of a group of processes."""

    code: int
    """The group's exit code."""
    is_loss: bool = False
    """Whether a process was killed or hung: started again, the group may go on."""


def launch(
    count: int,
    arguments: Sequence[str],
    devices: int | None,
    say: Callable[[str], None],
    restarts: int = 0,
    survives: bool = False,
    after_loss: str = "",
) -> int:
    """The exit code of `count` processes that each run `partita` with these arguments.

    It is the code of the first one that failed, or 0. Each process has its share of the cores, and
    one CPU device per core, or its share of `devices`. One that fails, is killed or ends early
    stops the others within 2 * GRACE seconds. If it was killed or hung, all are started again, at
    most `restarts` times; an error of the script would come again and ends the run. If `survives`,
    the others go on without it first, and all are started again when none is left. `after_loss` is
    said when a loss has ended the run.
    """
    run_group = partial(_run_with_board, returns=restarts) if survives else _run_group
    seed = os.environ.get("PARTITA_SEED", str(random.SystemRandom().randrange(2**31)))
    for restart in range(1, restarts + 1):
        outcome = run_group(count, arguments, devices, seed, say)
        if not outcome.is_loss:
            return outcome.code
        say(f"starting again (restart {restart} of {restarts})")
    outcome = run_group(count, arguments, devices, seed, say)
    if outcome.is_loss and after_loss:
        say(after_loss)
    return outcome.code


def _run_with_board(
    count: int,
    arguments: Sequence[str],
    devices: int | None,
    seed: str,
    say: Callable[[str], None],
    returns: int,
) -> Outcome:
    """A group that any process may leave: this one coordinates it, tells who is lost, and starts
    lost ones again, at most `returns` times."""
    from partita.cli.survivors import coordination, new_board

    address = _free_address()
    with new_board(count) as board, coordination(address, count):
        more = [*arguments[:1], "--board", str(board.folder), *arguments[1:]]
        managed = Managed(board, address, returns)
        return _run_group(count, more, devices, seed, say, managed)


def _run_group(
    count: int,
    arguments: Sequence[str],
    devices: int | None,
    seed: str,
    say: Callable[[str], None],
    managed: Managed | None = None,
) -> Outcome:
    """Starts the processes and watches them until all have ended."""
    if devices is not None and devices % count:
        raise PartitaError(
            f"{devices} devices cannot be divided among {count} processes: give a multiple of "
            f"{count}, or no --devices."
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(cores) // count)
    local_devices = devices // count if devices else share
    address = managed.address if managed is not None else _free_address()
    environment = _common_environment(address, count, local_devices, seed)
    processes: list[subprocess.Popen[bytes]] = []
    errors: list[IO[bytes] | None] = []
    outputs = (os.dup(1), os.dup(2)) if managed is not None else ()

    def start(number: int, prints: bool = False) -> tuple[subprocess.Popen[bytes], Any]:
        """(a process, the file of its standard error if it does not print)."""
        own_cores = [cores[(number * share + k) % len(cores)] for k in range(share) if cores]
        stderr = None if prints else tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            [sys.executable, "-m", "partita", *arguments],
            env={**environment, "JAX_PROCESS_ID": str(number)},
            stdout=None if prints else subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=_initializer(set(own_cores)),
            pass_fds=outputs,
        )
        return process, stderr

    def start_again(number: int) -> subprocess.Popen[bytes]:
        process, errors[number] = start(number)
        return process

    try:
        for number in range(count):
            process, stderr = start(number, prints=number == 0)
            processes.append(process)
            errors.append(stderr)
        survivors = None
        if managed is not None:
            again = start_again if managed.returns else None
            survivors = Survivors(processes, managed.board, outputs, say, again, managed.returns)
        with _signals_raised():
            return _watch(processes, errors, say, survivors)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for descriptor in outputs:
            os.close(descriptor)


def _common_environment(address: str, count: int, local_devices: int, seed: str) -> dict[str, str]:
    """Environment variables of all processes."""
    return {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "PARTITA_LAUNCHED": "1",
        "PARTITA_SEED": seed,
        "PARTITA_LOCAL_DEVICES": str(local_devices),
    }


def _free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def _initializer(cores: set[int]) -> Callable[[], None]:
    """Code that a process runs first: it stays on its cores, and on Linux ends with its parent."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def initialize() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if prctl is not None:
            prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)

    return initialize


class _Terminated(Exception):
    """This process received SIGTERM, or its terminal is closed."""


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `_Terminated`: the started processes must not outlive it."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _watch(
    processes: list[subprocess.Popen[bytes]],
    errors: list[IO[bytes] | None],
    say: Callable[[str], None],
    survivors: Survivors | None = None,
) -> Outcome:
    """The end of the processes; the failure of one ends the others, and is reported. With
    `survivors`, a process that is killed or hangs does not end the others."""
    interrupted = False
    culprit: int | None = None
    try:
        stopped_since: dict[int, float] = {}
        while True:
            if survivors is not None:
                survivors.look()
                if len(survivors.lost) == len(processes):
                    return Outcome(LostProcessError.exit_code, is_loss=True)
            codes = _codes(processes, survivors)
            if any(code not in (None, 0) and not _is_loss(code, survivors) for code in codes):
                break
            if all(code == 0 for code in codes):
                return Outcome(0)
            if survivors is None or _is_one_left(processes):
                culprit = _stopped_too_long(processes, stopped_since)
            if culprit is not None:
                break
            time.sleep(POLL if survivors is None else SURVIVAL_POLL)
        if culprit is None:
            # Looked up now: others may fail in consequence, in ways that do not show it.
            culprit = _independent_failure(_codes(processes, survivors))
            _wait(processes, GRACE)
        if culprit is None:
            culprit = _silent(processes)
    except KeyboardInterrupt:
        # In a terminal, the other processes have received it too.
        interrupted = True
        _wait(processes, GRACE)
    except _Terminated:
        _send(processes, signal.SIGTERM)
        say(f"a signal asked to stop; the {len(processes)} processes were stopped.")
        return Outcome(128 + signal.SIGTERM)
    if interrupted:
        _send(processes, signal.SIGINT)
    _send(processes, signal.SIGTERM)
    hangs = culprit is not None and processes[culprit].poll() is None
    codes = _codes(processes, survivors)
    if hangs and culprit is not None:
        say(
            f"process {culprit} of {len(codes)} (pid {processes[culprit].pid}) does not answer: it "
            "hangs or was stopped; the others were stopped."
        )
        return Outcome(LostProcessError.exit_code, is_loss=True)
    if interrupted or any(code in (INTERRUPTED, -signal.SIGINT) for code in codes):
        return Outcome(INTERRUPTED)
    if culprit is None:
        lost = survivors.lost if survivors is not None else ()
        culprit = _culprit([None if n in lost else code for n, code in enumerate(codes)])
    if culprit is None:
        return Outcome(0)
    code = _report_failure(culprit, codes, errors[culprit], say)
    gave_up = code == LostProcessError.exit_code and survivors is not None
    return Outcome(code, is_loss=gave_up or (codes[culprit] or 0) < 0)


def _codes(
    processes: Sequence[subprocess.Popen[bytes]], survivors: Survivors | None
) -> list[int | None]:
    """The exit codes so far; 0 for a process that the others go on without."""
    lost = survivors.lost if survivors is not None else ()
    codes = [process.poll() for process in processes]
    return [0 if number in lost else code for number, code in enumerate(codes)]


def _is_loss(code: int | None, survivors: Survivors | None) -> bool:
    """Whether an exit code is one of those that the others go on after."""
    return survivors is not None and is_killed(code)


def _stopped_too_long(
    processes: Sequence[subprocess.Popen[bytes]], stopped_since: dict[int, float]
) -> int | None:
    """The process that a signal has suspended for STOPPED seconds while others run, by /proc."""
    states = [_state(process.pid) for process in processes]
    now = time.monotonic()
    for number, state in enumerate(states):
        if state != "T" or all(other == "T" for other in states):
            stopped_since.pop(number, None)
        elif now - stopped_since.setdefault(number, now) > STOPPED:
            return number
    return None


def _is_one_left(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether all processes but one have ended, so that nobody waits for the last one."""
    running = sum(process.poll() is None for process in processes)
    return running == 1 and len(processes) > 1


def _state(process_id: int) -> str:
    """The state of a process on Linux: R, S, T (suspended), ...; empty if it is not known."""
    try:
        with open(f"/proc/{process_id}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _silent(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The only process that still runs after all others have ended because of another one."""
    codes = [process.poll() for process in processes]
    running = [number for number, code in enumerate(codes) if code is None]
    if len(running) != 1 or len(running) == len(codes) or 0 in codes:
        return None
    return running[0]


def _report_failure(
    culprit: int, codes: Sequence[int | None], errors: IO[bytes] | None, say: Callable[[str], None]
) -> int:
    """Prints how a process failed, with the end of its standard error; gives the exit code."""
    code = codes[culprit] or 0
    if errors is not None:
        errors.seek(0)
        lines = errors.read().decode(errors="replace").splitlines()
        for line in lines[-SHOWN_LINES:]:
            sys.stderr.write(f"[process {culprit}] {line}\n")
    if code < 0:
        end = f"was killed ({signal.Signals(-code).name})"
    elif code:
        end = f"stopped with code {code}"
    else:
        end = "ended before the others"
    if len(codes) == 1:
        say(f"the process {end}.")
    else:
        say(f"process {culprit} of {len(codes)} {end}; the others were stopped.")
    return 128 - code if code < 0 else code or 1


def _culprit(codes: Sequence[int | None]) -> int | None:
    """The process that failed first, as far as the exit codes tell; None if none failed.

    The code of a process that was lost before is None.

    >>> _culprit([75, -9]), _culprit([2, 2]), _culprit([75, 0]), _culprit([0, 0]), _culprit([-6, 1])
    (1, 0, 1, None, 1)
    >>> _culprit([None, 75])
    1
    """
    if all(code == 0 for code in codes):
        return None
    independent = _independent_failure(codes)
    if independent is not None:
        return independent
    if 0 in codes:
        return codes.index(0)
    return next(number for number, code in enumerate(codes) if code)


def _independent_failure(codes: Sequence[int | None]) -> int | None:
    """The first process with an exit code that is no consequence of the end of another one."""
    consequences = (0, LostProcessError.exit_code, -signal.SIGABRT, -signal.SIGTERM, None)
    for number, code in enumerate(codes):
        if code not in consequences:
            return number
    return None


def _send(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    """Sends a signal to all processes that still run, and gives them time to end."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
    _wait(processes, GRACE)


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Waits for the end of all processes, at most some seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(POLL)

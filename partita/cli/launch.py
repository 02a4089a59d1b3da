"""Starts several processes on this host that train together, and ends them together. Only
process 0 prints."""

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
from typing import IO, Any

from partita.errors import PartitaError

GRACE = 5.0
"""Seconds that the other processes have to end by themselves when one has failed, and again
after they are asked to."""
LOST = 75
"""Exit code of a process that stops because another one is gone."""


def launch(
    count: int, arguments: Sequence[str], devices: int | None, say: Callable[[str], None]
) -> int:
    """The exit code of `count` processes that each run `partita` with these arguments: of the first
    that failed, else 0.

    Each gets its share of the cores and stands for as many CPU devices, or for its share of
    `devices`. One that fails, is killed or ends early stops the others within 2 * GRACE seconds.
    """
    if devices is not None and devices % count:
        raise PartitaError(
            f"{devices} devices cannot be shared out to {count} processes: give a multiple of "
            f"{count}, or no --devices."
        )
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    share = max(1, len(cores) // count)
    port = _free_port()
    common = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "PARTITA_LAUNCHED": "1",
        "PARTITA_SEED": os.environ.get("PARTITA_SEED", str(random.SystemRandom().randrange(2**31))),
        "PARTITA_LOCAL_DEVICES": str(devices // count if devices else share),
    }
    running: list[subprocess.Popen[bytes]] = []
    errors: list[IO[bytes] | None] = []
    try:
        for i in range(count):
            mine = {cores[(i * share + k) % len(cores)] for k in range(share)} if cores else set()
            stderr = tempfile.TemporaryFile() if i else None  # noqa: SIM115
            errors.append(stderr)
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "partita", *arguments],
                    env={**common, "JAX_PROCESS_ID": str(i)},
                    stdout=subprocess.DEVNULL if i else None,
                    stderr=stderr,
                    preexec_fn=_beginning(mine),
                )
            )
        with _told_of_sigterm():
            return _watch(running, errors, say)
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()


class _Terminated(Exception):
    """This process was sent SIGTERM, or its terminal is gone."""


@contextmanager
def _told_of_sigterm() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise `_Terminated`: the processes started here must not
    outlive this one."""

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _beginning(cores: set[int]) -> Callable[[], None]:
    """What a process does first: keeps to its cores, and on Linux asks to be ended when the one
    that started it is."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    parent_death_signal = 1

    def begin() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if prctl is not None:
            prctl(parent_death_signal, signal.SIGTERM)

    return begin


def _watch(
    running: list[subprocess.Popen[bytes]],
    errors: list[IO[bytes] | None],
    say: Callable[[str], None],
) -> int:
    """Waits for all processes; when one fails, gives the others time to end, then ends them, and
    says which one it was."""
    interrupted, asks, sooner = False, [signal.SIGTERM], None
    try:
        while all(p.poll() in (None, 0) for p in running):
            if all(p.poll() == 0 for p in running):
                return 0
            time.sleep(0.05)
        sooner = _by_itself(
            [p.poll() for p in running]
        )  # others may fail because of it, and not know
        _wait(running, GRACE)
    except KeyboardInterrupt:  # from a terminal, the others have it too
        interrupted, asks = True, [signal.SIGINT, signal.SIGTERM]
        _wait(running, GRACE)
    except _Terminated:
        _ask(running, signal.SIGTERM)
        say(f"told to end; the {len(running)} processes were stopped.")
        return 128 + signal.SIGTERM
    for ask in asks:
        _ask(running, ask)
    codes = [p.poll() for p in running]
    if interrupted or any(code in (130, -signal.SIGINT) for code in codes):
        return 130
    first = _culprit(codes) if sooner is None else sooner
    if first is None:
        return 0
    code = codes[first] or 0
    errors_of = errors[first]
    if errors_of is not None:
        errors_of.seek(0)
        tail = errors_of.read().decode(errors="replace").splitlines()[-20:]
        sys.stderr.write("".join(f"[process {first}] {line}\n" for line in tail))
    how = (
        f"was killed ({signal.Signals(-code).name})"
        if code < 0
        else f"stopped with code {code}"
        if code
        else "ended before the others"
    )
    say(f"process {first} of {len(running)} {how}; the others were stopped.")
    return 128 - code if code < 0 else code or 1


def _culprit(codes: Sequence[int | None]) -> int | None:
    """The process that failed for a reason of its own, not because another one or the launcher
    ended it.

    >>> _culprit([75, -9]), _culprit([2, 2]), _culprit([75, 0]), _culprit([0, 0]), _culprit([-6, 1])
    (1, 0, 1, None, 1)
    """
    if all(code == 0 for code in codes):
        return None
    own = _by_itself(codes)
    early = [i for i, code in enumerate(codes) if code == 0]
    return (
        own
        if own is not None
        else next(iter([*early, *(i for i, code in enumerate(codes) if code)]))
    )


def _by_itself(codes: Sequence[int | None]) -> int | None:
    """The first process that ended with a code that is no consequence of another one's end."""
    consequences = (0, LOST, -signal.SIGABRT, -signal.SIGTERM, None)
    return next((i for i, code in enumerate(codes) if code not in consequences), None)


def _ask(running: Sequence[subprocess.Popen[bytes]], ask: signal.Signals) -> None:
    """Sends a signal to all that still run, and gives them time to end."""
    for process in running:
        if process.poll() is None:
            process.send_signal(ask)
    _wait(running, GRACE)


def _wait(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(p.poll() is None for p in running):
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

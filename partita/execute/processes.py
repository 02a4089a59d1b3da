"""Several processes that train one program together: what they agree on.

Every process runs the same script from the same seed and reads the same batches. Equal inputs are
checked before the first step, through the coordinator's store: the plan, the step, the first
weights and batch. A difference then is an error message, not a wrong result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from partita.errors import LostProcessError, ProcessError
from partita.execute import members
from partita.execute.process_group import TIMEOUT

LOST = (
    "Gloo",
    "gloo",
    "NCCL",
    "UNAVAILABLE",
    "Connection closed",
    "recv() failed",
    "send() failed",
    "heartbeat",
)
"""Words in JAX's errors after a process has ended."""


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


def store() -> Any:
    """The coordinator's store of keys and values."""
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
        return store().blocking_key_value_get(key, int(seconds * 1000))
    end = time.monotonic() + seconds
    with members.meeting():
        while True:
            try:
                return store().blocking_key_value_get(key, int(SLICE * 1000))
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
            store().key_value_set(key, f"error {error}")
            raise
        store().key_value_set(key, f"value {value}")
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
            answer = store().key_value_try_get(key)
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
    store().key_value_set(f"{key}/{members.index()}", value)
    values: list[str] = []
    for i in members.alive():
        try:
            values.append(_value(f"{key}/{i}", TIMEOUT))
        except jax.errors.JaxRuntimeError:
            place = "its first step" if name.startswith("same/") else f"the meeting '{name}'"
            raise ProcessError(
                f"Process {i} has not reached {place} {TIMEOUT} s after the others. "
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


def agreed_failure(name: str, reason: str) -> str:
    """Why this process cannot do something that all do alike, or else why another one cannot; ""
    if all can. All must call it at the same point; after a loss each answers for itself."""
    if alone() or members.generation():
        return reason
    reasons = exchanged(name, reason)
    others = zip(members.alive(), reasons, strict=True)
    failures = [f"Process {number}: {text}" for number, text in others if text]
    return reason or next(iter(failures), "")


def meet_in_store(name: str, seconds: int) -> None:
    """Returns when all live processes have called it, without a collective."""
    store().wait_at_barrier(_key(name), seconds * 1000, list(members.alive()))


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
        alive = store().get_live_nodes(list(indices))
    except Exception:
        return unnamed
    lost = [str(i) for i in indices if i not in alive]
    return f"Process {', '.join(lost)} ended" if lost else unnamed

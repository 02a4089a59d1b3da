"""What all commands share: where they print, and how they end when the user is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from partita.cli.launch import LOST, launch
from partita.errors import LostProcessError, PartitaError, ProcessError

out, err = Console(), Console(stderr=True, highlight=False)


def leave(code: int) -> NoReturn:
    """Ends with an exit code; one of several processes at once, where JAX would wait for the others to end well too."""
    processes = sys.modules.get("partita.execute.processes")
    if code and processes is not None and processes.joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code) from None


@contextmanager
def errors() -> Iterator[None]:
    """A user's mistake is one sentence and exit code 2; Ctrl-C is one word and 130."""
    try:
        yield
    except ProcessError as error:
        lost = isinstance(error, LostProcessError)
        if not (
            lost and os.environ.get("PARTITA_LAUNCHED")
        ):  # who launched it names the process that is gone
            err.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        leave(LOST if lost else 2)
    except PartitaError as error:
        err.print(f"error: {error}", markup=False, style="red", soft_wrap=True)
        leave(2)
    except KeyboardInterrupt:
        err.print("stopped.", markup=False)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(0) from None


def say(quiet: bool) -> Callable[[str], None]:
    """What prints a line of Partita's own, or nothing."""
    return (
        (lambda text: None)
        if quiet
        else (lambda text: err.print(f"partita: {text}", markup=False, soft_wrap=True))
    )


def join() -> bool:
    """Where this process was started as one of several: waits for the others, and seeds what scripts draw alike in all of them.

    Whether it is the one that prints.
    """
    from partita.execute.processes import group, is_first
    from partita.execute.processes import join as join_group

    who = group()
    if who is None:
        return True
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from partita.execute.devices import start_host_devices

    local = os.environ.get("PARTITA_LOCAL_DEVICES", "1")
    start_host_devices(int(local) if local.isdigit() else 1)
    join_group(who, say(False))
    from partita.execute.processes import from_first

    seed = from_first(
        "seed", lambda: os.environ.get("PARTITA_SEED", str(int.from_bytes(os.urandom(4)) >> 1))
    )
    import keras

    keras.utils.set_random_seed(int(seed))
    return is_first()


def in_processes(count: int, devices: int | None) -> None:
    """Where several processes are asked for: starts them, with so many devices in all, and ends as they end. One of them goes on."""
    if count > 1 and not os.environ.get("PARTITA_LAUNCHED"):
        raise typer.Exit(launch(count, _arguments_of_one(), devices, say(False)))


def _arguments_of_one() -> list[str]:
    """The command line of one of several processes: this one's, less --processes."""
    given = sys.argv[1:]
    at = next(i for i, argument in enumerate(given) if argument.partition("=")[0] == "--processes")
    return given[:at] + given[at + (1 if "=" in given[at] else 2) :]


def keep_stdout() -> None:
    """From here on only Python prints to the standard output: gloo, which greets there, writes to the standard error."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(own, "w", encoding="utf-8")

"""What all commands share: where they print, and how they end when the user is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from partita.errors import LostProcessError, PartitaError, ProcessError
from partita.launch import LOST

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
        if not (lost and os.environ.get("PARTITA_LAUNCHED")):  # who launched it names the process that is gone
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

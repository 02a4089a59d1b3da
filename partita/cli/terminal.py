"""The terminal: the consoles, messages, the line of progress, and how commands end when the
user is wrong.

The consoles print text as it is: names of layers and files may hold square brackets and colons,
which Rich would read as markup and as emoji.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from partita.errors import INTERRUPTED, LostProcessError, PartitaError, ProcessError
from partita.search.base import Progress
from partita.units import format_seconds

LEAST_COLUMNS = 80
"""Columns of the narrowest table. In a narrower terminal its lines run over; Rich would drop the
names of the layers."""
FILE_COLUMNS = 120
"""Columns of a table in a file or a pipe, where `COLUMNS` does not say otherwise."""


def _wide(console: Console) -> Console:
    """A console for tables."""
    in_file = not console.is_terminal and "COLUMNS" not in os.environ
    console.width = max(console.width, FILE_COLUMNS if in_file else LEAST_COLUMNS)
    return console


out = _wide(Console(markup=False, emoji=False, highlight=False))
err = Console(markup=False, emoji=False, highlight=False, stderr=True)
err_table = _wide(Console(markup=False, emoji=False, highlight=False, stderr=True))
"""The standard error for tables: the line of progress must fit the terminal."""


def say(text: str) -> None:
    """Prints a sentence of Partita's own."""
    err.print(f"partita: {text}", soft_wrap=True)


def say_nothing(text: str) -> None:
    """Takes the place of `say` in a quiet command."""


def say_timing(done: int, total: int) -> None:
    """Prints how many operators have been timed."""
    say(f"{done} of {total} operators timed")


def leave(code: int) -> NoReturn:
    """Ends with an exit code. One of several processes ends at once: JAX would wait for the
    others to end well too."""
    joining = sys.modules.get("partita.execute.joining")
    if code and joining is not None and joining.joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code) from None


@contextmanager
def errors() -> Iterator[None]:
    """Turns a user's mistake into a message and exit code 2, and Ctrl-C into a word and 130."""
    try:
        yield
    except ProcessError as error:
        lost = isinstance(error, LostProcessError)
        if not (lost and _launcher_names_lost()):
            _print_error(error)
        leave(LostProcessError.exit_code if lost else 2)
    except PartitaError as error:
        _print_error(error)
        leave(2)
    except KeyboardInterrupt:
        err.print("stopped.")
        raise typer.Exit(INTERRUPTED) from None
    except (RuntimeError, AssertionError, ValueError) as error:
        sentence = _failed_import_of_jax(error) or _absent_platform()
        if not sentence:
            raise
        _print_error(PartitaError(sentence))
        leave(2)
    except BrokenPipeError:
        # `main` discards the rest of the output.
        raise typer.Exit(0) from None


def _launcher_names_lost() -> bool:
    """Whether the launcher says all that there is to say about a lost process. Processes that it
    manages might have gone on, and say themselves why they do not."""
    members = sys.modules.get("partita.execute.members")
    is_managed = members is not None and members.board() is not None
    return bool(os.environ.get("PARTITA_LAUNCHED")) and not is_managed


def _failed_import_of_jax(error: Exception) -> str:
    """The sentence on a variable of the environment that JAX refuses when it is imported; ""
    for other errors."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_of_flags = frames[-1].f_globals.get("__name__") == "jax._src.config"
    if not is_of_flags or "jax" in sys.modules:
        return ""
    reason = str(error).rstrip(".")
    return f"JAX cannot be imported: {reason}. Correct or unset this variable of the environment."


def _absent_platform() -> str:
    """The sentence on platforms that JAX was told to use and cannot; "" without such."""
    devices = sys.modules.get("partita.execute.devices")
    return devices.absent_platform_sentence() if devices is not None else ""


def _print_error(error: PartitaError) -> None:
    err.print(f"error: {error}", style="red", soft_wrap=True)


class Activity:
    """One spinner line that names the running activity, and follows a search; nothing outside a
    terminal.

    Activities may nest: the end of one restores the line of the activity around it.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        """Whether the command prints for people, not JSON."""
        self._texts: list[str] = []
        self._spinner: Any = None
        if shown and err.is_terminal:
            self._spinner = err.status(Text(""), spinner="dots")

    @contextmanager
    def show(self, text: str) -> Iterator[None]:
        """Inside, the line shows a text."""
        self._texts.append(text)
        self.update(text)
        try:
            yield
        finally:
            self._texts.pop()
            if self._texts:
                self.update(self._texts[-1])
            elif self._spinner is not None:
                self._spinner.stop()

    def update(self, text: str) -> None:
        """Changes the text of the running activity."""
        if self._spinner is not None and self._texts:
            self._texts[-1] = text
            self._spinner.update(Text(text))
            self._spinner.start()

    def report(self, progress: Progress) -> None:
        """Shows the progress of a search."""
        self.update(
            f"searching ({progress.step}): best {format_seconds(progress.best)}, "
            f"bound {format_seconds(progress.bound)}; Ctrl-C takes the best"
        )

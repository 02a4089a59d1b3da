"""The `partita` command: one file per command or group of commands, assembled here."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from partita.cli import bench, gnn, machine, manage
from partita.cli.compare import compare
from partita.cli.options import PASS_THROUGH, ScriptCommand, SentenceGroup, command
from partita.cli.plan import plan
from partita.cli.run import run
from partita.cli.saved import diff, explain
from partita.cli.simulate import simulate
from partita.cli.terminal import say
from partita.version import VERSION

OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
"""Errors of a standard output that cannot be written."""

app = typer.Typer(
    cls=SentenceGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"partita {VERSION}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Partita trains Keras and JAX programs over several devices.

    It finds the fastest way to split a training step, proves that it fits, runs it, and shows why.

    Example: partita run --devices 4 train.py
    """


command(app, context_settings=PASS_THROUGH, cls=ScriptCommand)(run)
command(app, context_settings=PASS_THROUGH, cls=ScriptCommand)(plan)
command(app, context_settings=PASS_THROUGH, cls=ScriptCommand)(compare)
command(app, context_settings=PASS_THROUGH, cls=ScriptCommand)(simulate)
command(app)(explain)
command(app)(diff)
app.add_typer(machine.app, name="machine")
app.add_typer(manage.app, name="manage")
app.add_typer(bench.app, name="bench")
app.add_typer(gnn.app, name="gnn")


def main() -> None:
    """The entry point of the `partita` command.

    A reader that closes the output (`| head`) ends the command; an output that cannot be written
    (a full disk) is one sentence.
    """
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(0)
    except OSError as error:
        # Errors of files name them; this one is of the standard output.
        if error.filename is not None or error.errno not in OUTPUT_ERRORS:
            raise
        _discard_output()
        say(f"the output cannot be written: {error.strerror}.")
        sys.exit(1)


def _discard_output() -> None:
    """Points the standard output at nothing, so that its rest causes no error at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

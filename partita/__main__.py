"""The entry point of the `partita` command, and of `python -m partita`.

Imports take seconds on a busy machine, so Ctrl-C is answered from the first one on.
"""

import _thread
import atexit
import contextlib
import functools
import os
import sys
import threading
from typing import Any

from partita.errors import INTERRUPTED


def main() -> None:
    """Runs the command of the command line."""
    _open_closed_output()
    keep_interrupts()
    try:
        from partita.cli.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        _leave_interrupted()
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        _leave_interrupted()


def _leave_interrupted() -> None:
    """Ends an interrupted command after its exit functions, without Python's own teardown.

    Threads of XLA may still run a step. The teardown then ends in a segmentation fault, in plain
    Keras too (jaxlib 0.10.2).
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)


def keep_interrupts() -> None:
    """Makes Ctrl-C certain.

    Python drops an exception in a callback of its garbage collector, and JAX has such a callback.
    A KeyboardInterrupt that is dropped there is raised again a moment later.
    """
    sys.unraisablehook = functools.partial(_interrupt_again, sys.unraisablehook)


def _interrupt_again(other_hook: Any, unraisable: Any) -> None:
    """A `sys.unraisablehook` that raises a dropped KeyboardInterrupt again."""
    if unraisable.exc_type is KeyboardInterrupt:
        threading.Timer(0.01, _thread.interrupt_main).start()
    else:
        other_hook(unraisable)


def _open_closed_output() -> None:
    """Points a standard output or error that is closed (`>&-`) at nothing."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


if __name__ == "__main__":
    main()

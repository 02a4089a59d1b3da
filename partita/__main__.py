"""The entry point of the `partita` command, and of `python -m partita`.

Imports take seconds on a busy machine, so Ctrl-C is answered from the first one on.
"""

import os
import sys


def main() -> None:
    """Runs the command of the command line."""
    _open_closed_output()
    try:
        from partita.cli.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(130)


def _open_closed_output() -> None:
    """Points a standard output or error that is closed (`>&-`) at nothing."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, "w", closefd=False))


if __name__ == "__main__":
    main()

"""The entry point of the `partita` command, and of `python -m partita`.

Imports take seconds on a busy machine, so Ctrl-C is answered from the first one on.
"""

import sys


def main() -> None:
    """Runs the command of the command line."""
    try:
        from partita.cli.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

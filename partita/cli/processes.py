"""Commands that run in several processes on this host: start them, join them, keep their output
apart."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer

from partita.cli.launch import launch
from partita.cli.terminal import say
from partita.errors import PartitaError
from partita.files.folders import temporary_folder
from partita.keras_backend import select_jax


def run_in_processes(
    count: int,
    devices: int | None,
    restarts: int = 0,
    survives: bool = False,
    after_loss: str = "",
) -> None:
    """Starts this command in several processes, with `devices` in all, and ends as they end;
    returns in each of them.

    After the loss of a process all are started again, at most `restarts` times. They save
    snapshots in a folder that the option --snapshots names. If the group `survives`, the others go
    on first, as the notice board says that the option --board names. `after_loss` is said when a
    loss has ended the run.
    """
    if os.environ.get("PARTITA_LAUNCHED") or (count == 1 and not restarts):
        return
    if restarts:
        _check_ungrouped()
    arguments = sys.argv[1:]
    for option in ("--processes", "--restarts"):
        arguments = _without(option, arguments)
    if not restarts:
        raise typer.Exit(launch(count, arguments, devices, say, 0, survives, after_loss))
    with temporary_folder("partita-snapshots-") as folder:
        arguments[1:1] = ["--snapshots", str(folder)]
        raise typer.Exit(launch(count, arguments, devices, say, restarts, survives, after_loss))


def _check_ungrouped() -> None:
    """PartitaError if another program has started this process as one of several."""
    from partita.execute.process_group import group

    if group() is not None:
        raise PartitaError(
            "--restarts is for processes of this host that --processes starts, and this process "
            "belongs to a group that another program started. Let that program start it again, "
            "and give fit a partita.Checkpoint."
        )


def _without(option: str, arguments: list[str]) -> list[str]:
    """A command line without the first use of an option that takes a value; words after `--` are
    the script's.

    >>> _without("--processes", ["run", "--processes", "2", "train.py"])
    ['run', 'train.py']
    >>> _without("--processes", ["run", "train.py", "--", "--processes", "2"])
    ['run', 'train.py', '--', '--processes', '2']
    """
    dashes = arguments.index("--") if "--" in arguments else len(arguments)
    names = [argument.partition("=")[0] for argument in arguments[:dashes]]
    if option not in names:
        return arguments
    position = names.index(option)
    words = 1 if "=" in arguments[position] else 2
    return arguments[:position] + arguments[position + words :]


def join_processes(board: Path | None = None) -> bool:
    """Waits for the other processes, if there are any, and seeds Keras alike in all; whether
    this process prints. `board` is the folder of the launcher's notice board, if it has one."""
    from partita.execute.board import Board
    from partita.execute.joining import join
    from partita.execute.process_group import group
    from partita.execute.processes import from_first, is_first

    membership = group()
    if membership is None:
        return True
    select_jax(say)
    from partita.execute.devices import start_host_devices

    local_devices = os.environ.get("PARTITA_LOCAL_DEVICES", "1")
    start_host_devices(int(local_devices) if local_devices.isdigit() else 1)
    join(membership, say, None if board is None else Board(board, membership.count))
    seed = int(from_first("seed", _seed))
    import keras

    keras.utils.set_random_seed(seed)
    return is_first()


def _seed() -> str:
    """The seed of all processes: PARTITA_SEED, by default a random one."""
    seed = os.environ.get("PARTITA_SEED", str(int.from_bytes(os.urandom(4)) >> 1))
    if not (seed.isascii() and seed.isdigit() and int(seed) < 2**32):
        raise PartitaError(f"PARTITA_SEED is '{seed}': write a whole number below 2^32.")
    return seed


def keep_stdout() -> None:
    """Reserves the standard output for Python's prints: gloo, which greets there, then writes to
    the standard error."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(stdout, "w", encoding="utf-8")


def start_devices(count: int | None) -> None:
    """Sets up virtual devices before JAX starts, on a CPU: `count`, or one per core. Keras runs
    on JAX."""
    select_jax(say)
    from partita.execute.devices import start_host_devices

    start_host_devices(count)

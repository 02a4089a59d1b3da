"""Commands that run in several processes on this host: start them, join them, keep their output
apart."""

from __future__ import annotations

import os
import sys

import typer

from partita.cli.launch import launch
from partita.cli.terminal import say
from partita.keras_backend import select_jax


def run_in_processes(count: int, devices: int | None) -> None:
    """Starts this command in several processes, with `devices` in all, and ends as they end;
    returns in each of them."""
    if count > 1 and not os.environ.get("PARTITA_LAUNCHED"):
        raise typer.Exit(launch(count, _arguments_of_one(), devices, say))


def _arguments_of_one() -> list[str]:
    """The command line of one of several processes: this command's, without --processes."""
    arguments = sys.argv[1:]
    names = [argument.partition("=")[0] for argument in arguments]
    position = names.index("--processes")
    words = 1 if "=" in arguments[position] else 2
    return arguments[:position] + arguments[position + words :]


def join_processes() -> bool:
    """Waits for the other processes, if there are any, and seeds Keras alike in all; whether
    this process prints."""
    from partita.execute.processes import from_first, group, is_first, join

    membership = group()
    if membership is None:
        return True
    select_jax(say)
    from partita.execute.devices import start_host_devices

    local_devices = os.environ.get("PARTITA_LOCAL_DEVICES", "1")
    start_host_devices(int(local_devices) if local_devices.isdigit() else 1)
    join(membership, say)
    seed = int(from_first("seed", _seed))
    import keras

    keras.utils.set_random_seed(seed)
    return is_first()


def _seed() -> str:
    return os.environ.get("PARTITA_SEED", str(int.from_bytes(os.urandom(4)) >> 1))


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

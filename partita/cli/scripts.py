"""The training step of a script, captured for the commands that plan it without training."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from partita.cli.options import Target, is_module, note_slips
from partita.cli.processes import start_devices
from partita.cli.terminal import Activity, say
from partita.keras_backend import select_jax
from partita.machine import Machine, load

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured


def capture_script(
    context: typer.Context,
    script: Path,
    target: Target,
    activity: Activity,
    execute: bool = False,
) -> tuple[Captured, Machine]:
    """The captured step of a script's first training call, and the machine to plan it for.

    Args:
        context: Holds the arguments of the script.
        execute: Whether plans will also run on the local devices.
    """
    note_slips(context)
    select_jax(say)
    machine = load(target.machine) if target.machine is not None else None
    if execute or machine is None:
        start_devices(target.devices)
    else:
        _leave_accelerators()
    from partita.keras.script import Script, plan_script
    from partita.planning import resolve_machine

    machine = resolve_machine(machine, target.devices)
    # The script's own lines would make the JSON invalid.
    output = nullcontext() if activity.shown else redirect_stdout(sys.stderr)
    with activity.show(f"running {script} up to its first training step"), output:
        capture_target = "" if execute else machine.target
        captured = plan_script(Script(script, context.args, is_module(context)), capture_target)
    return captured, machine


def _leave_accelerators() -> None:
    """Keeps JAX from starting accelerators: a plan for another machine needs none, and a compiler
    that is installed without its devices would complain about them.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

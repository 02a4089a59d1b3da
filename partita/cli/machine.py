"""`partita machine`: machines that plans can be made for, and measurements of this one."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from partita.cli.files import save_text
from partita.cli.options import Devices, Json, Processes
from partita.cli.processes import join_processes, keep_stdout, run_in_processes, start_devices
from partita.cli.terminal import Activity, errors, out
from partita.machine import load, presets
from partita.machine.parts import Value

app = typer.Typer(no_args_is_help=True, help="List, show and measure machines.")


@app.command("measure")
def measure(
    devices: Devices = None,
    processes: Processes = 1,
    as_json: Json = False,
) -> None:
    """Measure this machine's devices and links, for later plans.

    Takes under a minute. With --processes, the links between processes are measured, as 'partita
    run --processes' joins them.

    Example: partita machine measure --processes 2
    """
    with errors():
        run_in_processes(processes, devices)
        if as_json:
            keep_stdout()
        prints = join_processes()
        start_devices(devices)
        from partita.execute.calibrate import calibrate, check_cache, file_of, key_of
        from partita.execute.devices import at_hand
        from partita.report.tables import calibration_table

        activity = Activity(prints)
        machine = at_hand(devices)
        path = file_of(key_of(machine.devices))
        if prints:
            check_cache(path)
        with activity.show("measuring"):
            calibration = calibrate(
                machine, lambda program: activity.update(f"measuring {program}")
            )
        if not prints:
            return
        save_text(calibration.to_toml(), path, "calibration")
        if as_json:
            value = {
                "file": str(path),
                "key": calibration.key,
                "values": calibration.values,
                "error": calibration.error,
            }
            print(json.dumps(value))
        else:
            out.print(calibration_table(calibration.measured))
            out.print(
                f"median error of the model on its own measurements: {calibration.error:.0%}; "
                f"saved to {path}",
                soft_wrap=True,
            )


@app.command("list")
def list_presets() -> None:
    """List the machines that come with Partita."""
    with errors():
        for name in presets():
            machine = load(name)
            out.print(f"{name:14} {machine.devices:5} x {machine.device.name}")


@app.command("show")
def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A preset, with a count ('h100:16'), or a .toml file.", show_default=False
        ),
    ],
) -> None:
    """Show a machine's devices and links, with sources."""
    with errors():
        machine = load(name)
        out.print(str(machine))
        for path, (value, source, status) in machine.provenance().items():
            out.print(f"  {path} = {_number_text(value)}  [{status}] {source}")


def _number_text(value: Value) -> str:
    """A number, or numbers in brackets."""
    if isinstance(value, tuple):
        return f"[{', '.join(_number_text(item) for item in value)}]"
    return f"{value:g}"

"""`partita bench`: the papers' tables beside Partita's, and predictions beside measurements."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli.files import save_text
from partita.cli.launch import launch
from partita.cli.options import Json
from partita.cli.processes import join_processes, keep_stdout, start_devices
from partita.cli.terminal import Activity, errors, out, say, say_nothing
from partita.keras_backend import select_jax

app = typer.Typer(no_args_is_help=True, help="Benchmark Partita.")

STEPS_FILE = "steps.json"


@app.command("papers")
def papers(
    only: Annotated[
        str | None,
        typer.Option(
            help="One network, as vgg16, resnet-101, nmt or llama.", show_default="all networks"
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(help="One machine, as k80-flat or p100-cluster.", show_default="the clusters"),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(help="One number of devices.", min=2, show_default="4, 8, 16, 32 and 64"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan the papers' networks beside the papers' figures.

    Networks of FlexFlow and OptCNN are planned and simulated on the papers' clusters. Needs no GPU,
    and allocates no weights.

    Example: partita bench papers --only vgg16
    """
    with errors():
        select_jax(say)
        from partita.bench.papers import cases, run

        chosen = cases(only, machine, devices)
        activity = Activity(not as_json)
        rows = []
        with activity.show("planning"):
            for number, case in enumerate(chosen, 1):
                activity.update(
                    f"{number} of {len(chosen)}: {case.network} on {case.devices} devices of "
                    f"{case.machine}"
                )
                rows.append(run(case).to_json())
        if as_json:
            print(json.dumps(rows))
        else:
            _print_papers(rows)


def _print_papers(rows: Sequence[dict[str, Any]]) -> None:
    from partita.report.bench_tables import papers_lines, papers_table, searches_table

    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["case"]["paper"], row["case"]["machine"])
        tables.setdefault(key, []).append(row)
    for (paper, machine), members in tables.items():
        title = f"{paper}'s networks on {machine}" if paper else machine
        out.print(papers_table(members, title))
    out.print(searches_table(rows))
    for line in papers_lines(rows):
        out.print(line, soft_wrap=True)


@app.command("fidelity")
def fidelity(
    models: Annotated[
        str,
        typer.Option(
            help="Models, separated by commas, as mlp,cnn,lstm.", show_default="all models"
        ),
    ] = "",
    devices: Annotated[
        str, typer.Option(help="Numbers of devices of one process; '' for none.")
    ] = "1,2",
    processes: Annotated[
        str, typer.Option(help="Numbers of processes, joined by gloo; '' for none.")
    ] = "2",
    rounds: Annotated[
        int, typer.Option(help="Measured rounds, after one warm-up round.", min=1)
    ] = 5,
    plans: Annotated[
        int,
        typer.Option(help="Largest number of plans of a model.", min=1, show_default="all plans"),
    ] = 1000,
    as_json: Json = False,
) -> None:
    """Compare predicted and measured steps on this host.

    Steps run under baselines, random plans and the searched plan. Takes half an hour or more;
    nothing else should run. With --plans 3 --rounds 3 --devices 2 it takes a third of that.

    Example: partita bench fidelity --models mlp,lstm --devices 2 --processes ''
    """
    with errors():
        select_jax(say)
        from partita.bench.fidelity import Step, chosen_models, settings, summaries
        from partita.report.bench_tables import FIDELITY, fidelity_summary, fidelity_table

        names = chosen_models(models)
        steps = []
        for process_count, device_count in settings(devices, processes):
            effort = ["--rounds", str(rounds), "--plans", str(plans)]
            if as_json:
                effort.append("--quiet")
            measured = _measure_setting(process_count, device_count, names, effort)
            if not as_json:
                out.print(fidelity_table(measured))
            steps += measured
        summed = summaries([Step(**step) for step in steps])
        if as_json:
            print(json.dumps({"steps": steps, "summaries": summed}))
            return
        out.print(fidelity_summary(summed))
        out.print(FIDELITY)


def _measure_setting(
    processes: int, devices: int, models: Sequence[str], effort: Sequence[str]
) -> list[dict[str, Any]]:
    """The steps of all models, each measured by processes of its own; ends with the exit code of
    processes that failed."""
    with tempfile.TemporaryDirectory() as folder:
        commands = [["fidelity-measure", folder, "--model", model, *effort] for model in models]
        commands.append(["fidelity-predict", folder, *models])
        for command in commands:
            code = launch(processes, ["bench", *command], devices, say)
            if code:
                raise typer.Exit(code)
        return json.loads((Path(folder) / STEPS_FILE).read_text(encoding="utf-8"))


def _start(folder: Path) -> bool:
    """Starts the devices of a process of 'partita bench fidelity'; whether it is the first.

    The folder is its cache: earlier measurements must not enter, nor these ones stay.
    """
    keep_stdout()
    os.environ["PARTITA_CACHE"] = str(folder)
    is_first = join_processes()
    start_devices(int(os.environ["PARTITA_LOCAL_DEVICES"]))
    return is_first


@app.command("fidelity-measure", hidden=True)
def fidelity_measure(
    folder: Path,
    model: Annotated[str, typer.Option()],
    rounds: Annotated[int, typer.Option()],
    plans: Annotated[int, typer.Option()],
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
) -> None:
    """Measure a model in this process or group of processes for 'partita bench fidelity'."""
    with errors():
        prints = _start(folder)
        from partita.bench.fidelity import Effort, measure, measured_machine

        report = say if prints and not quiet else say_nothing
        machine = measured_machine(folder, report)
        measurement = measure(model, machine, Effort(rounds, plans), report)
        if prints:
            measurement.save(folder)


@app.command("fidelity-predict", hidden=True)
def fidelity_predict(folder: Path, models: list[str]) -> None:
    """Predict the steps that 'fidelity-measure' has measured, and write both to a file."""
    with errors():
        prints = _start(folder)
        from partita.bench.fidelity import MeasuredModel, measured_machine, predictions

        measurements = [MeasuredModel.load(model, folder) for model in models]
        steps = predictions(measurements, measured_machine(folder))
        if prints:
            text = json.dumps([vars(step) for step in steps])
            save_text(text, folder / STEPS_FILE, "steps file")

"""The command line: parse, call the API, print. `partita run train.py` is the door most people come in by."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.cli import gnn as gnn_cli
from partita.cli.terminal import err, errors, in_processes, join, keep_stdout, leave, out, say
from partita.errors import PlanError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Trains a Keras 3 program over several devices: finds the fastest way to split it, proves that it fits, runs it, shows why.",
)
machines = typer.Typer(no_args_is_help=True, help="The machines that plans can be made for.")
app.add_typer(machines, name="machine")
benches = typer.Typer(no_args_is_help=True, help="How good Partita is: tables to hold it against.")
app.add_typer(benches, name="bench")
app.add_typer(gnn_cli.app, name="gnn")

THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}


def _meant(context: typer.Context, word: str, likeness: float) -> str:
    """The option of a command that a word is a slip of, or nothing."""
    options = [
        name
        for parameter in context.command.params
        for name in parameter.opts
        if name.startswith("--")
    ]
    return next(iter(difflib.get_close_matches(word.partition("=")[0], options, 1, likeness)), "")


def _no_option(context: typer.Context, script: Path) -> Path:
    """The script itself; a usage error if an option that there is not stands in its place."""
    word = str(script)
    if word.startswith("-"):
        near = _meant(context, word, 0.5)
        raise typer.BadParameter(
            f"there is no option {word!r}.{f' Did you mean {near!r}?' if near else ''} Options for the script come after the script."
        )
    return script


Script = Annotated[
    Path,
    typer.Argument(
        help="A Keras training script. What follows it and is not listed below is passed to it.",
        show_default=False,
        callback=_no_option,
    ),
]
Devices = Annotated[
    int | None, typer.Option(help="How many devices to use; default: those at hand.", min=1)
]
MachineName = Annotated[
    str | None,
    typer.Option(
        help="A machine to plan for, owned or not: 'dgx-h100:8', 'h100:16', or a .toml file."
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        help="Write a page that shows the plan to this .html file: splits, time, memory, traffic."
    ),
]
MeasureOperators = Annotated[
    bool,
    typer.Option(
        "--measure-operators",
        help="Time operators on the devices at hand first, forward and backward; kept, so that it takes its time once.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON for machines instead of tables for people.")
]


@app.command(context_settings=THROUGH)
def run(
    context: typer.Context,
    script: Script,
    devices: Devices = None,
    plan: Annotated[
        Path | None, typer.Option(help="Run this plan instead of searching for one.")
    ] = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Also run one step on one device first and print the differences."
        ),
    ] = False,
    measure_operators: MeasureOperators = False,
    report: Report = None,
    processes: Annotated[
        int,
        typer.Option(
            help="Start so many processes on this host, a share of its cores each, that train together.",
            min=1,
        ),
    ] = 1,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print nothing of Partita's own but errors.")
    ] = False,
) -> None:
    """Run an existing Keras script, unchanged, its training split over the devices.

    Example: partita run train.py --devices 4 --save-plan plan.json -- --epochs 3
    """
    with errors():
        if not os.environ.get("PARTITA_LAUNCHED"):
            _can_write(report=report, plan=save_plan)
            _note_slips(context)
        wanted = devices or _planned_devices(plan)
        in_processes(processes, wanted)
        quiet = not join() or quiet
        start_devices(wanted)
        from partita.keras.script import run_script
        from partita.planning import SearchOptions, make_planner, simulate_plan

        simulated: list[tuple[Any, Any]] = []

        def seen(captured: Any, machine: Any, chosen: Any) -> None:
            if report is not None:
                simulated.append((chosen, simulate_plan(captured, machine, chosen)))
            if save_plan is not None:
                _write(save_plan, lambda: chosen.save(save_plan))
            if not quiet:
                from partita.report.tables import plan_table, summary

                if chosen.why:
                    err.print(plan_table(chosen))
                for line in summary(chosen):
                    err.print(line)
                if save_plan is not None:
                    err.print(f"plan written to {save_plan}")

        pages: list[Path] = []

        def trained(job: Any) -> None:
            if report is not None:
                number = f"-{len(pages) + 1}" if pages else ""
                pages.append(report.with_name(f"{report.stem}{number}{report.suffix}"))
                _write_page(
                    pages[-1],
                    job.plan,
                    job.measured,
                    next((step for plan, step in simulated if plan is job.plan), None),
                )

        with progress(quiet) as shown:
            options = SearchOptions(
                measure_operators=measure_operators, report=shown, report_timing=timing(quiet)
            )
            choose = make_planner(plan, devices, options=options, on_plan=seen)
            code = run_script(
                script, context.args, choose, report=say(quiet), verify=verify, trained=trained
            )
        if report is not None and not quiet:
            err.print(
                f"report written to {', '.join(map(str, pages))}"
                if pages
                else "nothing was trained, so there is no report"
            )
    leave(code)


@app.command(context_settings=THROUGH)
def plan(
    context: typer.Context,
    script: Script,
    devices: Devices = None,
    machine: MachineName = None,
    save_plan: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    measure_operators: MeasureOperators = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="How long the whole search may take; default: exact search, then a second or two of walks, then some seconds of stages and places.",
            min=0,
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="portfolio (all that pay), elimination (the least sum), mcmc (walks from the baselines) or exhaustive (proves the fastest; small networks)."
        ),
    ] = "portfolio",
    stages: Annotated[
        bool | None,
        typer.Option(
            "--stages/--no-stages",
            help="Whether to look at pipelines, microbatches and recomputation too, which can be simulated and not yet run; default: with --machine.",
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            help="What is best where there are several machines: 'step' (the fastest) or 'cost-per-epoch'."
        ),
    ] = "step",
    price: Annotated[
        str,
        typer.Option(
            help="What a device costs for an hour: a number, or by machine, 'h100=2.5,a100=1.5'; without, device hours are counted.",
            show_default=False,
        ),
    ] = "",
    samples: Annotated[int, typer.Option(help="Samples of an epoch.", min=1)] = 1_000_000,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Find the fastest plan for a script, without training: table, prediction, comparison with the baselines.

    Of several machines, separated by commas, a table says what each would do and cost; what is saved is the best one's plan.

    Example: partita plan train.py --machine dgx-h100:4
    Example: partita plan train.py --machine h100:8,h100:64,a100:64 --objective cost-per-epoch --price h100=2.5,a100=1.5
    """
    with errors():
        _can_write(report=report, plan=save_plan)
        if machine is not None and "," in machine or objective != "step":
            _compare_machines(
                context,
                script,
                devices,
                machine,
                objective,
                price,
                samples,
                seconds,
                search,
                stages,
                save_plan,
                report,
                as_json,
            )
            return
        captured, where = _captured(context, script, devices, machine, as_json)
        from partita.planning import (
            SearchOptions,
            check_measurable,
            search_plan,
            simulate_plan,
            with_reasons,
        )
        from partita.report.tables import comparison_table, plan_table, summary

        with progress(as_json) as shown:
            staged = machine is not None if stages is None else stages
            if measure_operators:
                check_measurable(machine)
            options = SearchOptions(
                seconds=seconds,
                stages=staged,
                search=search,
                measure_operators=measure_operators,
                report=shown,
                report_timing=timing(as_json),
            )
            result = search_plan(captured, where, options)
            chosen = with_reasons(result)
        if save_plan is not None:
            _write(save_plan, lambda: chosen.save(save_plan))
        if report is not None:
            _write_page(
                report,
                chosen,
                timeline=simulate_plan(captured, result.network.placement.machine, chosen),
            )
        if as_json:
            print(json.dumps(chosen.to_json()))
            return
        out.print(plan_table(chosen))
        rows = [{"name": n, **b} for n, b in chosen.why["baselines"].items()] + [
            {"name": "found", **chosen.predicted}
        ]
        out.print(
            comparison_table(
                sorted(rows, key=lambda r: r["seconds"]),
                "predicted, against what an expert would write",
            )
        )
        for line in summary(chosen):
            out.print(line, highlight=False)


def _compare_machines(
    context: typer.Context,
    script: Path,
    devices: int | None,
    machine: str | None,
    objective: str,
    price: str,
    samples: int,
    seconds: float | None,
    search: str,
    stages: bool | None,
    save_plan: Path | None,
    report: Path | None,
    as_json: bool,
) -> None:
    """`plan` for several machines."""
    from partita.machine import load

    if machine is None:
        raise PlanError(
            "An objective compares machines: name them, as in --machine h100:8,h100:64."
        )
    if devices is not None:
        raise PlanError(
            "Of several machines each says how many devices it has: write --machine h100:8,h100:64 without --devices."
        )
    prices = _prices(price)
    machines = [load(name.strip()) for name in machine.split(",") if name.strip()]
    captured, _ = _captured(context, script, None, machines[0].name, as_json)
    from partita.offers import Objective, compare_machines
    from partita.planning import SearchOptions, simulate_plan, with_reasons
    from partita.report.tables import offers_table

    with progress(as_json) as shown:
        found = compare_machines(
            captured,
            machines,
            Objective(objective, prices, samples),
            SearchOptions(seconds=seconds, stages=stages is not False, search=search, report=shown),
        )
    rows, best = [offer.to_json() for offer in found], found[0].result
    if best is not None and (save_plan is not None or report is not None):
        chosen = with_reasons(best)
        if save_plan is not None:
            _write(save_plan, lambda: chosen.save(save_plan))
        if report is not None:
            _write_page(report, chosen, timeline=simulate_plan(captured, found[0].machine, chosen))
    if as_json:
        print(json.dumps(rows))
        return
    out.print(offers_table(rows, captured.graph.name, samples))
    for row in rows:
        out.print(f"{row['machine']}: {row['note']}", highlight=False, markup=False, soft_wrap=True)


def _prices(text: str) -> dict[str, float]:
    """Prices by name of what was written, "" for one that holds for all.

    >>> _prices("2.5"), _prices("h100=2.5, a100=1.5")
    ({'': 2.5}, {'h100': 2.5, 'a100': 1.5})
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            found[name.strip()] = -1.0
        if not 0 < found[name.strip()] < float("inf"):
            raise PlanError(
                f"{part!r} is no price: write a number above 0, or names with numbers, as in --price h100=2.5,a100=1.5."
            )
    return found


@app.command(context_settings=THROUGH)
def compare(
    context: typer.Context,
    script: Script,
    devices: Devices = None,
    machine: MachineName = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Also compile every plan and time it on the devices at hand."
        ),
    ] = False,
    measure_operators: MeasureOperators = False,
    as_json: Json = False,
) -> None:
    """Every baseline and the found plan side by side, predicted; with --measure, measured too.

    Example: partita compare train.py --devices 8
    """
    with errors():
        captured, where = _captured(context, script, devices, machine, as_json, measure)
        from partita.comparison import compare_plans
        from partita.planning import SearchOptions, check_measurable
        from partita.report.tables import comparison_table

        with progress(as_json) as report:
            if measure_operators:
                check_measurable(machine)
            options = SearchOptions(
                measure_operators=measure_operators, report=report, report_timing=timing(as_json)
            )
            result = compare_plans(captured, where, options, measure)
        if as_json:
            print(json.dumps(result.to_json()))
        else:
            out.print(
                comparison_table(result.to_json()["plans"], f"{result.graph} on {result.machine}")
            )


@app.command(context_settings=THROUGH)
def simulate(
    context: typer.Context,
    script: Script,
    devices: Devices = None,
    machine: MachineName = None,
    plan: Annotated[
        str,
        typer.Option(
            help="A plan file, 'found' (searched for), or what an expert would write: dp, tp, owt, fsdp, ..."
        ),
    ] = "found",
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Write the timeline to this file, for ui.perfetto.dev or chrome://tracing."
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            help="Write a page that shows the timeline, and the plan if it has reasons, to this .html file."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """One training step under a plan, simulated: time, what waits for what, memory and traffic. No device is needed.

    Example: partita simulate train.py --machine k80-cluster --plan dp --trace trace.json
    """
    with errors():
        _can_write(trace=trace, report=report)
        captured, where = _captured(context, script, devices, machine, as_json)
        from partita.planning import resolve_plan, simulate_plan
        from partita.report.tables import timeline_summary, timeline_table
        from partita.report.trace import trace as trace_of

        with progress(as_json) as shown:
            chosen = resolve_plan(plan, captured.graph, where, shown)
        timeline = simulate_plan(captured, where, chosen)
        if trace is not None:
            _write(trace, lambda: _save(trace, json.dumps(trace_of(timeline))), "trace")
        if report is not None:
            _write_page(
                report,
                chosen if chosen.why and chosen.machine == where.name else None,
                timeline=timeline,
            )
        if as_json:
            print(json.dumps(timeline.to_json()))
            return
        out.print(timeline_table(timeline))
        for line in timeline_summary(timeline):
            out.print(line, highlight=False, markup=False)
        if trace is not None:
            err.print(
                f"trace written to {trace}: open it at ui.perfetto.dev or chrome://tracing",
                markup=False,
                soft_wrap=True,
            )
        if report is not None:
            err.print(f"report written to {report}", markup=False, soft_wrap=True)


@app.command()
def explain(
    plan_file: Annotated[
        Path, typer.Argument(help="A plan that Partita saved.", show_default=False)
    ],
    layer: Annotated[
        str | None, typer.Argument(help="A layer path of the plan; default: the whole plan.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Why a plan is as it is: what was chosen, and what the alternatives would cost in time and memory."""
    with errors():
        from partita.plans.plan import Plan
        from partita.report.tables import explain_table, plan_table, summary

        loaded = Plan.load(plan_file)
        reasons = loaded.why.get("operators", {})
        if layer is not None and layer not in loaded.choices:
            near = difflib.get_close_matches(layer, loaded.choices, 3, 0.4)
            hint = (
                f"Did you mean {' or '.join(repr(n) for n in near)}?"
                if near
                else f"It has {', '.join(list(loaded.choices)[:8])}, ..."
            )
            raise PlanError(f"The plan {str(plan_file)!r} has no layer {layer!r}. {hint}")
        if layer is not None and layer not in reasons:
            raise PlanError(
                f"The plan {str(plan_file)!r} keeps no reasons for {layer!r}: save it with 'partita plan --save-plan'."
            )
        if as_json:
            print(json.dumps(reasons.get(layer, {}) if layer else loaded.to_json()))
        elif layer is not None:
            out.print(explain_table(loaded, layer))
        else:
            out.print(plan_table(loaded))
            for line in summary(loaded):
                out.print(line, highlight=False)


@app.command()
def diff(
    left: Annotated[Path, typer.Argument(show_default=False)],
    right: Annotated[Path, typer.Argument(show_default=False)],
) -> None:
    """What two plans do differently, a line each."""
    with errors():
        from partita.plans.diff import diff as differences
        from partita.plans.plan import Plan

        for line in differences(Plan.load(left), Plan.load(right)) or ["The plans do the same."]:
            out.print(line, highlight=False, markup=False)


@machines.command("measure")
def machine_measure(
    devices: Devices = None,
    processes: Annotated[
        int,
        typer.Option(
            help="Measure so many processes on this host, joined as 'run --processes' joins them.",
            min=1,
        ),
    ] = 1,
    as_json: Json = False,
) -> None:
    """Measure what this machine's devices and links really do, and keep it for the plans that are made here.

    Takes under a minute. Example: partita machine measure --processes 2
    """
    with errors():
        in_processes(processes, devices)
        if as_json:
            keep_stdout()
        first = join()
        start_devices(devices)
        from partita.execute.calibrate import calibrate, file_of
        from partita.execute.devices import at_hand
        from partita.report.tables import calibration_table

        with (
            err.status("measuring", spinner="dots")
            if err.is_terminal and first
            else _nothing() as status
        ):
            found = calibrate(
                at_hand(devices),
                lambda what: status.update(f"measuring {what}") if status is not None else None,
            )
        if first:
            path = file_of(found.key)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, lambda: _save(path, found.to_toml()), "calibration")
            if as_json:
                print(
                    json.dumps(
                        {
                            "file": str(path),
                            "key": found.key,
                            "values": found.values,
                            "error": found.error,
                        }
                    )
                )
            else:
                out.print(calibration_table(found.measured))
                out.print(
                    f"the model is {found.error:.0%} off its own measurements in the median; kept in {path}",
                    highlight=False,
                    soft_wrap=True,
                )


@machines.command("list")
def machine_list() -> None:
    """The machines that come with Partita."""
    with errors():
        from partita.machine import load, presets

        for name in presets():
            found = load(name)
            out.print(f"{name:14} {found.devices:5} x {found.device.name}", highlight=False)


@machines.command("show")
def machine_show(
    name: Annotated[
        str, typer.Argument(help="A preset, with a count ('h100:16'), or a .toml file.")
    ],
) -> None:
    """A machine's devices and links, and where each number comes from."""
    with errors():
        from partita.machine import load

        found = load(name)
        out.print(str(found), highlight=False, markup=False)
        for path, (value, source, status) in found.provenance().items():
            out.print(f"  {path} = {value:g}  [{status}] {source}", highlight=False, markup=False)


@benches.callback()
def bench() -> None:
    """How good Partita is: tables to hold it against."""


@benches.command("papers")
def bench_papers(
    only: Annotated[
        str | None,
        typer.Option(
            help="One network: lenet, alexnet, vgg16, inception-v3, resnet-101, rnntc, rnnlm, rnnlm-2, nmt, llama, gpt3."
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="One machine, the papers' ('k80-cluster', 'p100-cluster') or any other; default: both clusters."
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="One device count; default: 4, 8, 16, 32 and 64, as far as the machine goes.",
            min=2,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """The tables of FlexFlow and OptCNN beside ours: networks of the papers' sizes, planned and simulated on the papers' clusters.

    No GPU is needed, no weight is allocated. Example: partita bench papers --only vgg16
    """
    with errors():
        os.environ.setdefault("KERAS_BACKEND", "jax")
        from partita.bench.papers import cases, run
        from partita.report.tables import papers_lines, papers_table, searches_table

        chosen, rows = cases(only, machine, devices), []
        with (
            err.status("", spinner="dots")
            if err.is_terminal and not as_json
            else _nothing() as status
        ):
            for number, case in enumerate(chosen, 1):
                if status is not None:
                    status.update(
                        f"{number} of {len(chosen)}: {case.network} on {case.devices} devices of {case.machine}"
                    )
                rows.append(run(case).to_json())
        if as_json:
            print(json.dumps(rows))
            return
        for paper, name in dict.fromkeys((r["case"]["paper"], r["case"]["machine"]) for r in rows):
            out.print(
                papers_table(
                    [
                        r
                        for r in rows
                        if (r["case"]["paper"], r["case"]["machine"]) == (paper, name)
                    ],
                    f"{paper}'s networks on {name}" if paper else name,
                )
            )
        out.print(searches_table(rows))
        for line in papers_lines(rows):
            out.print(line, highlight=False, markup=False, soft_wrap=True)


@benches.command("fidelity")
def bench_fidelity(
    models: Annotated[
        str,
        typer.Option(
            help="Models, separated by commas: mlp, cnn, alexnet, transformer, resnet, recommender, lstm, unet; default: all."
        ),
    ] = "",
    devices: Annotated[
        str,
        typer.Option(
            help="Devices of one process, of one thread each; counts separated by commas, '' for none."
        ),
    ] = "1,2",
    processes: Annotated[
        str,
        typer.Option(
            help="Processes with a share of the cores each, joined by gloo; counts separated by commas, '' for none."
        ),
    ] = "2",
    rounds: Annotated[
        int, typer.Option(help="Times that every plan takes its turn, after one to warm up.", min=1)
    ] = 5,
    as_json: Json = False,
) -> None:
    """Predicted against measured on this host: steps of models under what experts would write, plans at random, and the plan found.

    Half an hour or more where nothing else runs. Example: partita bench fidelity --models mlp,lstm --devices 2 --processes ''
    """
    with errors():
        os.environ.setdefault("KERAS_BACKEND", "jax")
        from partita.bench.fidelity import Step, chosen_models, settings, summaries
        from partita.cli.launch import launch
        from partita.report.tables import FIDELITY, fidelity_summary, fidelity_table

        names, steps = chosen_models(models), []
        for processes_of_it, devices_of_it in settings(devices, processes):
            with tempfile.TemporaryDirectory() as folder:
                into = Path(folder) / "steps.json"
                said = [
                    "--models",
                    ",".join(names),
                    "--rounds",
                    str(rounds),
                    "--into",
                    str(into),
                    *(["--quiet"] if as_json else []),
                ]
                code = launch(
                    processes_of_it, ["bench", "fidelity-here", *said], devices_of_it, say(False)
                )
                if code:
                    raise typer.Exit(code)
                found = json.loads(into.read_text(encoding="utf-8"))
            if not as_json:
                out.print(fidelity_table(found))
            steps += found
        summed = summaries([Step(**s) for s in steps])
        if as_json:
            print(json.dumps({"steps": steps, "summaries": summed}))
            return
        out.print(fidelity_summary(summed))
        out.print(FIDELITY, highlight=False, markup=False)


@benches.command("fidelity-here", hidden=True)
def bench_fidelity_here(
    models: Annotated[str, typer.Option()],
    rounds: Annotated[int, typer.Option()],
    into: Annotated[Path, typer.Option()],
    quiet: Annotated[bool, typer.Option("--quiet")] = False,
) -> None:
    """What `bench fidelity` starts: measures in this process, or in this group of processes, and writes the steps to a file."""
    with errors():
        keep_stdout()
        os.environ["PARTITA_CACHE"] = str(
            into.parent
        )  # what was measured before, and what will be, stays out of it
        first = join()
        start_devices(int(os.environ["PARTITA_LOCAL_DEVICES"]))
        from partita.bench.fidelity import run

        found = run(models.split(","), rounds, say(quiet or not first))
        if first:
            _save(into, json.dumps([vars(s) for s in found]))


# ------------------------------------------------------------------------------------------------------------- shared


def main() -> None:
    """The entry point of the `partita` command."""
    app()


def start_devices(count: int | None) -> None:
    """Before JAX starts: on a CPU, as many virtual devices as asked for, one per core by default; Keras on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    os.environ.setdefault(
        "TF_CPP_MIN_LOG_LEVEL", "2"
    )  # XLA's partitioner tells everyone of reshards in evaluate()
    from partita.execute.devices import start_host_devices

    start_host_devices(count)


def _planned_devices(plan: Path | None) -> int | None:
    from partita.plans.plan import Plan

    return Plan.load(plan).devices if plan is not None else None


def _captured(
    context: typer.Context,
    script: Path,
    devices: int | None,
    machine: str | None,
    quiet: bool,
    execute: bool = False,
) -> tuple[Any, Any]:
    """The step of a script's first fit, and the machine to plan it for."""
    _note_slips(context)
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from partita.machine import load

    where = None
    if machine is not None:
        where = load(machine) if devices is None else load(machine).with_devices(devices)
    if execute or where is None:
        start_devices(devices)
    from partita.keras.script import plan_script
    from partita.planning import resolve_machine

    if where is None:
        where = resolve_machine(None, devices)
    with (
        err.status(f"running {script} up to its first fit", spinner="dots")
        if not quiet and err.is_terminal
        else _nothing()
    ):
        captured = plan_script(script, context.args)
    return captured, where


def _note_slips(context: typer.Context) -> None:
    """Says which of the script's options are nearly the command's own: a slip would pass unseen."""
    for word in context.args:
        near = _meant(context, word, 0.8) if word.startswith("--") else ""
        if near:
            say(False)(f"{word!r} is passed to the script. If you mean {near!r}, write that.")


def _can_write(**files: Path | None) -> None:
    """PlanError if one of the files, by what it is, cannot be written: it is better known before an hour's work than after."""

    def touch(path: Path) -> None:
        there = path.exists()
        with path.open("a"):
            pass
        if not there:
            path.unlink()

    for what, path in files.items():
        if path is not None:
            _write(path, lambda path=path: touch(path), what)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[Any], None] | None]:
    """A line that follows a search: best so far and bound. None where there is no terminal to show it on."""
    if quiet or not err.is_terminal:
        yield None
        return
    from partita.units import format_seconds

    status = err.status("searching", spinner="dots")

    def report(p: Any) -> None:
        status.start()
        status.update(
            f"searching ({p.step}): best {format_seconds(p.best)}, bound {format_seconds(p.bound)}; Ctrl-C takes the best"
        )

    try:
        yield report
    finally:
        status.stop()


def timing(quiet: bool) -> Callable[[int, int], None] | None:
    """Says how many operators have been timed."""
    if quiet:
        return None
    return lambda done, whole: err.print(
        f"partita: {done} of {whole} operators timed", markup=False
    )


def _write_page(path: Path, plan: Any, measured: Any = None, timeline: Any = None) -> None:
    """The page of a plan, with its simulated step if there is one; without a plan, that of the step alone."""
    from partita.report.html import page, timeline_page

    _write(
        path,
        lambda: _save(
            path, timeline_page(timeline) if plan is None else page(plan, measured, timeline)
        ),
        "report",
    )


def _save(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write(path: Path, write: Callable[[], None], what: str = "plan") -> None:
    try:
        write()
    except OSError as error:
        raise PlanError(
            f"The {what} cannot be written to {str(path)!r}: {error.strerror}. Name a file in a folder that exists."
        ) from None

"""`partita simulate`: the timeline of one training step under a plan."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.files import check_writable, save_page, save_text
from partita.cli.options import Json, Script, Target
from partita.cli.scripts import capture_script
from partita.cli.terminal import Activity, err, errors, out
from partita.planning import given_plan, resolve_plan, simulate_plan
from partita.simulation.timeline import Timeline


@dataclass(frozen=True)
class TimelineFiles:
    """Files that a timeline is written to."""

    trace: Annotated[
        Path | None,
        typer.Option(help="Write the timeline to this file, for ui.perfetto.dev."),
    ] = None
    report: Annotated[
        Path | None, typer.Option(help="Write a page about the step to this .html file.")
    ] = None


def simulate(
    context: typer.Context,
    script: Script,
    target: Target,
    files: TimelineFiles,
    plan: Annotated[
        str,
        typer.Option(help="A plan file, 'found' (searches), or a baseline: dp, tp, owt, fsdp, ..."),
    ] = "found",
    as_json: Json = False,
) -> None:
    """Simulate one training step; needs no device.

    Prints time by cause, the critical path, memory and traffic.

    Example: partita simulate train.py --machine k80-cluster --plan dp
    """
    with errors():
        check_writable(script, trace=files.trace, report=files.report)
        given = given_plan(plan) or "found"
        activity = Activity(not as_json)
        captured, machine = capture_script(context, script, target, activity)
        with activity.show("searching"):
            chosen = resolve_plan(given, captured.graph, machine, activity.report)
        with activity.show("simulating"):
            timeline = simulate_plan(captured, machine, chosen)
        if files.trace is not None:
            from partita.report.trace import trace

            save_text(json.dumps(trace(timeline)), files.trace, "trace")
        if files.report is not None:
            has_reasons = bool(chosen.why) and chosen.machine == machine.name
            save_page(files.report, chosen if has_reasons else None, timeline)
        if as_json:
            print(json.dumps(timeline.to_json()))
        else:
            _print_timeline(timeline, files)


def _print_timeline(timeline: Timeline, files: TimelineFiles) -> None:
    from partita.report.tables import timeline_summary, timeline_table

    out.print(timeline_table(timeline))
    for line in timeline_summary(timeline):
        out.print(line)
    if files.trace is not None:
        err.print(
            f"trace written to {files.trace}: open it at ui.perfetto.dev or chrome://tracing",
            soft_wrap=True,
        )
    if files.report is not None:
        err.print(f"report written to {files.report}", soft_wrap=True)

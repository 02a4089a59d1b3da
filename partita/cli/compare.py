"""`partita compare`: all baselines and the searched plan side by side."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from partita.cli.options import Json, MeasureOperators, Script, Target
from partita.cli.scripts import capture_script
from partita.cli.terminal import Activity, errors, out, say_timing
from partita.comparison import compare_plans
from partita.planning import SearchOptions, check_measurable


def compare(
    context: typer.Context,
    script: Script,
    target: Target,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Compile every plan and time it on the local devices."),
    ] = False,
    measure_operators: MeasureOperators = False,
    as_json: Json = False,
) -> None:
    """Compare the fastest plan with the baselines.

    Example: partita compare train.py --devices 8
    """
    with errors():
        if measure_operators:
            check_measurable(target.machine)
        activity = Activity(not as_json)
        captured, machine = capture_script(context, script, target, activity, execute=measure)
        from partita.report.tables import comparison_table

        options = SearchOptions(
            measure_operators=measure_operators,
            report=activity.report,
            report_timing=None if as_json else say_timing,
        )
        with activity.show("searching"):
            result = compare_plans(captured, machine, options, measure)
        if as_json:
            print(json.dumps(result.to_json()))
        else:
            title = f"{result.graph} on {result.machine}"
            out.print(comparison_table(result.to_json()["plans"], title))

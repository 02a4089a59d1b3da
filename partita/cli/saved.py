"""`partita explain` and `partita diff`: plans that were saved."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.options import Json
from partita.cli.terminal import errors, out
from partita.errors import PlanError
from partita.machine import load
from partita.plans.adapt import with_claims_for
from partita.plans.plan import Plan

PlanFile = Annotated[Path, typer.Argument(help="A saved plan.", show_default=False)]
LISTED_LAYERS = 8


def explain(
    plan_file: PlanFile,
    layer: Annotated[
        str | None, typer.Argument(help="A layer of the plan.", show_default="the whole plan")
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            help="The plan's machine as it is now: predictions for other numbers are dropped.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain a plan: its choices and their alternatives.

    Example: partita explain plan.json dense_1
    """
    with errors():
        saved = Plan.load(plan_file)
        plan = saved if machine is None else _for_machine(saved, plan_file, machine)
        if layer is not None and plan is not saved:
            raise PlanError(
                f"The reasons in {str(plan_file)!r} are for other numbers of {plan.machine!r}: "
                f"plan again with 'partita plan --machine {machine} --save-plan'."
            )
        if layer is not None:
            _explain_layer(plan, plan_file, layer, as_json)
        elif as_json:
            print(json.dumps(plan.to_json()))
        else:
            from partita.report.tables import legend, plan_table, summary

            out.print(plan_table(plan))
            out.print(legend(plan))
            for line in summary(plan):
                out.print(line)


def _for_machine(plan: Plan, plan_file: Path, name: str) -> Plan:
    """The plan with the predictions that hold for a machine of this name or file."""
    from partita.planning import resolve_machine

    machine = load(name)
    if machine.name != plan.machine:
        machine = resolve_machine(machine, plan.devices)  # "mine, 4 devices"
    if machine.name != plan.machine:
        raise PlanError(
            f"The plan {str(plan_file)!r} is for '{plan.machine}', and {name!r} is another "
            "machine. Give the plan's machine, or plan again."
        )
    return with_claims_for(plan, machine)


def _explain_layer(plan: Plan, plan_file: Path, layer: str, as_json: bool) -> None:
    from partita.report.tables import explain_table

    reasons = plan.why.get("operators", {})
    if layer not in plan.choices:
        raise PlanError(
            f"The plan {str(plan_file)!r} has no layer {layer!r}. {_similar_layers(plan, layer)}"
        )
    if layer not in reasons:
        raise PlanError(
            f"The plan {str(plan_file)!r} has no reasons for {layer!r}: save it with 'partita "
            "plan --save-plan'."
        )
    if as_json:
        print(json.dumps(reasons[layer]))
    else:
        out.print(explain_table(plan, layer))


def _similar_layers(plan: Plan, layer: str) -> str:
    near = difflib.get_close_matches(layer, plan.choices, 3, 0.4)
    if near:
        return f"Did you mean {' or '.join(repr(name) for name in near)}?"
    more = ", ..." if len(plan.choices) > LISTED_LAYERS else "."
    return f"It has {', '.join(list(plan.choices)[:LISTED_LAYERS])}{more}"


def diff(left: PlanFile, right: PlanFile) -> None:
    """List the differences of two plans.

    Example: partita diff old.json new.json
    """
    with errors():
        from partita.plans.diff import diff as differences

        lines = differences(Plan.load(left), Plan.load(right))
        for line in lines or ["The plans do the same."]:
            out.print(line)

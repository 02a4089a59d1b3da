"""`partita plan`: plans a script's training step for one machine, or compares several machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partita.cli.files import check_writable, save_page, save_plan
from partita.cli.options import Json, PlanFiles, Pricing, Script, Search, Target
from partita.cli.scripts import capture_script
from partita.cli.terminal import Activity, errors, out, say, say_nothing, say_timing
from partita.errors import CompilerError, MemoryBudgetError, PlanError
from partita.machine import load
from partita.offers import Objective, Offer, compare_machines
from partita.planning import (
    SearchOptions,
    check_measurable,
    plan_that_compiles,
    search_plan,
    simulate_plan,
    with_reasons,
)
from partita.plans.plan import Plan

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured
    from partita.execute.compilers.compiled_plan import CompiledPlan
    from partita.machine import Machine

Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the plan as the machine would, and compare.")
]


def plan(
    context: typer.Context,
    script: Script,
    target: Target,
    search: Search,
    pricing: Pricing,
    files: PlanFiles,
    as_json: Json = False,
    compile_plan: Compile = False,
) -> None:
    """Plan a training script without training it.

    Prints the plan, its prediction, and the baselines. Several machines, separated by commas, are
    compared in a table, and the plan of the best one is saved.

    Example: partita plan train.py --machine dgx-h100:4

    Example: partita plan train.py --machine h100:8,h100:64 --objective cost-per-epoch

    With --compile, the compiler of the machine compiles the plan here, without its devices.

    Example: partita plan train.py --machine tpu-v5e:16 --compile
    """
    with errors():
        check_writable(script, report=files.report, plan=files.save_plan)
        several = target.machine is not None and "," in target.machine
        if several and compile_plan:
            raise PlanError(
                "--compile cannot be used with several machines. Name one, as in --machine h100:8."
            )
        counts_cost = several or pricing.objective != "step"
        if pricing.price and not counts_cost:
            raise PlanError(
                "--price is for the cost of an epoch, which is not asked for. Add --objective "
                "cost-per-epoch."
            )
        if counts_cost:
            _plan_for_machines(context, script, target, search, pricing, files, as_json)
        else:
            _plan_for_machine(context, script, target, search, files, as_json, compile_plan)


def _plan_for_machine(
    context: typer.Context,
    script: Path,
    target: Target,
    search: Search,
    files: PlanFiles,
    as_json: bool,
    compile_plan: bool,
) -> None:
    """Plans for one machine, and prints the plan beside the baselines."""
    if search.measure_operators:
        check_measurable(target.machine)
    activity = Activity(not as_json)
    by_default = target.machine is not None
    options = SearchOptions(
        seconds=search.seconds,
        stages=by_default if search.stages is None else search.stages,
        search=search.search,
        measure_operators=search.measure_operators,
        report=activity.report,
        report_timing=None if as_json else say_timing,
    )
    captured, machine = capture_script(context, script, target, activity)
    with activity.show("searching"):
        result = search_plan(captured, machine, options)
        chosen = with_reasons(result)
    compiled: CompiledPlan | str | None = None
    if compile_plan:
        with activity.show("compiling"):
            note = say_nothing if as_json else say
            chosen, compiled = _compiled(captured, machine, chosen, note, options)
    if files.save_plan is not None:
        save_plan(chosen, files.save_plan)
    if files.report is not None:
        # The machine of the result knows the times of operators that were timed.
        timed_machine = result.network.placement.machine
        save_page(files.report, chosen, simulate_plan(captured, timed_machine, chosen))
    if as_json:
        print(json.dumps({**chosen.to_json(), **_compiled_json(compiled)}))
    else:
        _print_plan(chosen)
        _print_compiled(compiled)


def _compiled(
    captured: Captured,
    machine: Machine,
    chosen: Plan,
    say: Callable[[str], None],
    options: SearchOptions,
) -> tuple[Plan, CompiledPlan | str]:
    """The plan that fits by the machine's compiler and its compiled program; the first plan and
    one sentence where there is none."""
    try:
        return plan_that_compiles(captured, machine, chosen, say, options)
    except (CompilerError, MemoryBudgetError, PlanError) as error:
        return chosen, str(error)
    except KeyboardInterrupt:
        return chosen, "The compilation was stopped; this is the plan that the search found."


def _compiled_json(compiled: CompiledPlan | str | None) -> dict[str, object]:
    if compiled is None:
        return {}
    if isinstance(compiled, str):
        return {"compiled": {"error": compiled}}
    return {"compiled": compiled.to_json()}


def _print_compiled(compiled: CompiledPlan | str | None) -> None:
    """The compiler's figures as a table, or the sentence why there are none."""
    from partita.report.tables import compiled_table

    if isinstance(compiled, str):
        say(f"Not compiled. {compiled}")
    elif compiled is not None:
        out.print(compiled_table(compiled.rows(), compiled.machine, compiled.compiler))
        out.print(f"compiled in {compiled.compile_seconds:.0f} s by {compiled.version}")


def _print_plan(plan: Plan) -> None:
    from partita.report.tables import comparison_table, legend, plan_table, summary

    out.print(plan_table(plan))
    out.print(legend(plan))
    rows = [{"name": name, **figures} for name, figures in plan.why["baselines"].items()]
    rows.append({"name": "found", **plan.predicted})
    rows.sort(key=lambda row: row["seconds"])
    out.print(comparison_table(rows, "predicted, beside the plans that an expert would write"))
    for line in summary(plan):
        out.print(line)


def _plan_for_machines(
    context: typer.Context,
    script: Path,
    target: Target,
    search: Search,
    pricing: Pricing,
    files: PlanFiles,
    as_json: bool,
) -> None:
    """Plans for several machines, and prints the throughput and cost of each."""
    if target.machine is None:
        raise PlanError(
            "--objective compares machines, and none are named. Name them, as in --machine "
            "h100:8,h100:64."
        )
    if target.devices is not None:
        raise PlanError(
            "--devices cannot be used with several machines. Give the devices of each, as in "
            "--machine h100:8,h100:64."
        )
    prices = parse_prices(pricing.price)
    names = [name.strip() for name in target.machine.split(",")]
    machines = [load(name) for name in names if name]
    if not machines:
        raise PlanError(
            f"--machine is {target.machine!r}, which names no machine: write for example "
            "--machine h100:8,h100:64."
        )
    activity = Activity(not as_json)
    options = SearchOptions(
        seconds=search.seconds,
        stages=search.stages is not False,
        search=search.search,
        report=activity.report,
    )
    objective = Objective(pricing.objective, prices, pricing.samples)
    objective.check_machines(machines)
    captured, _ = capture_script(context, script, Target(machine=machines[0].name), activity)
    with activity.show("searching"):
        offers = compare_machines(captured, machines, objective, options)
    best = offers[0]
    writes = files.save_plan is not None or files.report is not None
    if best.result is not None and writes:
        chosen = with_reasons(best.result)
        if files.save_plan is not None:
            save_plan(chosen, files.save_plan)
        if files.report is not None:
            save_page(files.report, chosen, simulate_plan(captured, best.machine, chosen))
    if as_json:
        print(json.dumps([offer.to_json() for offer in offers]))
    else:
        _print_offers(offers, captured.graph.name, pricing.samples)


def _print_offers(offers: list[Offer], graph: str, samples: int) -> None:
    from partita.report.tables import offers_table

    rows = [offer.to_json() for offer in offers]
    out.print(offers_table(rows, graph, samples))
    for row in rows:
        out.print(f"{row['machine']}: {row['note']}", soft_wrap=True)


def parse_prices(text: str) -> dict[str, float]:
    """Price of a device for an hour by name; "" is the name of one price for all.

    >>> parse_prices("2.5"), parse_prices("h100=2.5, a100=1.5")
    ({'': 2.5}, {'h100': 2.5, 'a100': 1.5})
    """
    prices = {}
    for item in text.split(","):
        item = item.strip()
        if item:
            name, _, number = item.rpartition("=")
            if name.strip() in prices:
                raise PlanError(f"--price is {text!r}, with two prices for one name: give one.")
            prices[name.strip()] = _price(number, item)
    return prices


def _price(number: str, item: str) -> float:
    try:
        price = float(number)
    except ValueError:
        price = -1.0
    if not 0 < price < float("inf"):
        raise PlanError(
            f"{item!r} is no price: write a number above 0, or names with numbers, as in --price "
            "h100=2.5,a100=1.5."
        )
    return price

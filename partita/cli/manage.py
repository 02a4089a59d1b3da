"""`partita manage`: policies that decide while a machine changes, simulated."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from partita.cli.files import check_writable, save_text
from partita.cli.options import PASS_THROUGH, Json, Script, ScriptCommand, Target, command
from partita.cli.scripts import capture_script
from partita.cli.terminal import Activity, errors, out
from partita.errors import PlanError
from partita.machine import load

app = typer.Typer(no_args_is_help=True, help="Simulate policies for clocks and plans.")


@dataclass(frozen=True)
class SimulatedRun:
    """The run that policies for operating points decide about."""

    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of the run, rounded to whole passes of about 1 s.",
            min=1,
            show_default="30 s of steps",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the kernels' efficiencies.", min=0)] = 1
    learned: Annotated[
        Path | None,
        typer.Option("--learned", help="A trained policy, of 'partita manage train'."),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(help="Write events and decisions over time to this .html file."),
    ] = None


@command(app, "simulate", context_settings=PASS_THROUGH, cls=ScriptCommand)
def simulate(
    context: typer.Context,
    script: Script,
    target: Target,
    run: SimulatedRun,
    policy: Annotated[
        str, typer.Option(help="'all', or some with commas: oracle, schedule, ondemand, ...")
    ] = "all",
    trace: Annotated[
        Path | None,
        typer.Option(help="Replay the events of this file, for policies that change plans."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate policies for the operating points of a machine.

    Prints joules, seconds, E x T, performance per watt, the peak temperature, and the regret
    against a clairvoyant oracle: on the machine as described, and on one that differs.

    Example: partita manage simulate train.py --machine odroid-xu3 --policy all

    With --trace, devices and links become slow, are lost and return; policies change the plan.

    Example: partita manage simulate train.py --machine dgx-h100:4 --trace events.jsonl --report
    runs.html
    """
    with errors():
        from partita.management.comparison import compare_policies
        from partita.management.hardware import hardware_of
        from partita.management.program import step_program
        from partita.management.registry import policy_names
        from partita.management.school import load_policy
        from partita.report.policy_tables import policy_summary, policy_table

        if target.machine is None:
            raise PlanError(
                "Policies act on simulated machines, and none is named: add --machine odroid-xu3."
            )
        check_writable(report=run.report)
        if trace is not None:
            if run.learned is not None or run.steps is not None:
                raise PlanError(
                    "--learned and --steps are for operating points, and a trace is replayed by "
                    "policies that change plans: remove them, or remove --trace."
                )
            _replay(context, script, target, trace, policy, run.report, as_json)
            return
        trained = None if run.learned is None else load_policy(run.learned)
        names = policy_names(policy, has_file=trained is not None)
        hardware = hardware_of(load(target.machine))
        if trained is not None:
            trained.check(hardware)
        activity = Activity(not as_json)
        captured, machine = capture_script(context, script, target, activity)
        program = step_program(captured.graph, machine.backend)
        with activity.show("simulating"):
            comparisons = compare_policies(
                program,
                machine,
                names,
                steps=run.steps,
                seed=run.seed,
                learned=trained,
            )
        if run.report is not None:
            from partita.report.policy_page import policy_page

            save_text(policy_page(comparisons), run.report, "report")
        if as_json:
            print(json.dumps([comparison.to_json() for comparison in comparisons]))
            return
        for comparison in comparisons:
            out.print(policy_table(comparison))
        for line in policy_summary(comparisons, run.steps):
            out.print(line, soft_wrap=True)


def _replay(
    context: typer.Context,
    script: Path,
    target: Target,
    trace: Path,
    policy: str,
    report: Path | None,
    as_json: bool,
) -> None:
    """Replays a trace under policies that change plans, and prints the steps of each."""
    from partita.management.plan_table import plan_table
    from partita.management.policies.names import chosen_names
    from partita.management.replay import WAITING, clairvoyant, replay
    from partita.management.traces import load_trace
    from partita.report.policy_tables import replay_note, replay_table

    events = load_trace(trace)
    names = chosen_names(policy, ("oracle", *WAITING), "policy of plan changes")
    assert target.machine is not None
    events.check(load(target.machine))
    activity = Activity(not as_json)
    captured, machine = capture_script(context, script, target, activity)
    states = [segment.state for segment in events.segments()]
    with activity.show("searching plans for the states of the trace"):
        table = plan_table(captured.graph, machine, states)
    runs = [replay(events, table, WAITING[name]()) for name in WAITING]
    chosen = [run for run in runs if run.policy in names]
    replays = [clairvoyant(events, table, others=runs), *chosen]
    if report is not None:
        from partita.report.replay_page import replay_page

        page = replay_page(captured.graph.name, machine.name, events, replays)
        save_text(page, report, "report")
    if as_json:
        print(json.dumps([run.to_json() for run in replays]))
        return
    title = f"{captured.graph.name} on {machine.name}: {replays[0].seconds:g} s of {trace}"
    out.print(replay_table(replays, title))
    for run in chosen:
        for change in run.changes:
            out.print(f"{run.policy}, {change}", soft_wrap=True)
    out.print(replay_note(), soft_wrap=True)


@app.command("train")
def train(
    machine: Annotated[str, typer.Option(help="A machine with several operating points.")],
    save: Annotated[Path, typer.Option(help="Write the policy to this file.")],
) -> None:
    """Train a policy that imitates the clairvoyant oracle.

    DAgger in the simulator: it learns from seven Keras steps and from synthetic ones. The file is
    readable JSON. Needs scikit-learn: pip install 'partita[manage]'.

    Example: partita manage train --machine rk3588 --save policy.json
    """
    with errors():
        from partita.management.hardware import hardware_of
        from partita.management.program import school_programs
        from partita.management.school import train_policy

        check_writable(policy=save)
        hardware = hardware_of(load(machine))
        programs = school_programs()
        activity = Activity(True)
        with activity.show(f"training on {len(programs)} programs"):
            policy = train_policy(hardware, programs)
        save_text(policy.to_text(), save, "policy")
        leaves = policy.tree.features.count(-1)
        out.print(f"policy for {machine} with {leaves} leaves written to {save}", soft_wrap=True)

"""`partita manage`: policies that decide while a machine changes, simulated."""

from __future__ import annotations

import json
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


@command(app, "simulate", context_settings=PASS_THROUGH, cls=ScriptCommand)
def simulate(
    context: typer.Context,
    script: Script,
    target: Target,
    policy: Annotated[
        str, typer.Option(help="'all', or some with commas: oracle, schedule, ondemand, ...")
    ] = "all",
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps of the run.", min=1, show_default="30 s of steps"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the kernels' efficiencies.", min=0)] = 1,
    learned: Annotated[
        Path | None,
        typer.Option("--learned", help="A trained policy, of 'partita manage train'."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Simulate policies for the operating points of a machine.

    Prints joules, seconds, E x T, performance per watt, the peak temperature, and the regret
    against a clairvoyant oracle: on the machine as described, and on one that differs.

    Example: partita manage simulate train.py --machine odroid-xu3 --policy all
    """
    with errors():
        from partita.manage.comparison import compare_policies
        from partita.manage.program import step_program
        from partita.manage.registry import policy_names
        from partita.manage.school import load_policy
        from partita.report.policy_tables import policy_summary, policy_table

        if target.machine is None:
            raise PlanError(
                "Policies act on simulated machines, and none is named: add --machine odroid-xu3."
            )
        trained = None if learned is None else load_policy(learned)
        names = policy_names(policy, has_file=trained is not None)
        activity = Activity(not as_json)
        captured, machine = capture_script(context, script, target, activity)
        program = step_program(captured.graph, machine.backend)
        with activity.show("simulating"):
            comparisons = compare_policies(
                program,
                machine,
                names,
                steps=steps,
                seed=seed,
                learned=trained,
            )
        if as_json:
            print(json.dumps([comparison.to_json() for comparison in comparisons]))
            return
        for comparison in comparisons:
            out.print(policy_table(comparison))
        for line in policy_summary(comparisons):
            out.print(line, soft_wrap=True)


@app.command("train")
def train(
    machine: Annotated[str, typer.Option(help="A machine with several operating points.")],
    save: Annotated[Path, typer.Option(help="Write the policy to this file.")],
) -> None:
    """Train a policy that imitates the clairvoyant oracle (DAgger), in the simulator.

    It learns from seven Keras steps and from synthetic ones. The file is readable JSON. Needs
    scikit-learn: pip install 'partita[manage]'.

    Example: partita manage train --machine rk3588 --save policy.json
    """
    with errors():
        from partita.manage.hardware import hardware_of
        from partita.manage.program import school_programs
        from partita.manage.school import train_policy

        check_writable(policy=save)
        hardware = hardware_of(load(machine))
        programs = school_programs()
        activity = Activity(True)
        with activity.show(f"training on {len(programs)} programs"):
            policy = train_policy(hardware, programs)
        save_text(policy.to_text(), save, "policy")
        leaves = policy.tree.features.count(-1)
        out.print(f"policy for {machine} with {leaves} leaves written to {save}", soft_wrap=True)

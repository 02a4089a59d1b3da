"""`partita run`: runs a training script, its training split over the devices."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partita.cli.files import check_writable, save_page, save_plan
from partita.cli.options import (
    Devices,
    Manage,
    MeasureOperators,
    PlanFiles,
    Processes,
    Restarts,
    Script,
    is_module,
    note_slips,
)
from partita.cli.processes import join_processes, run_in_processes, start_devices
from partita.cli.terminal import (
    Activity,
    err,
    err_table,
    errors,
    leave,
    say,
    say_nothing,
    say_timing,
)
from partita.errors import PartitaError
from partita.machine import Machine
from partita.management.contract import Manager
from partita.management.decisions import Decision
from partita.management.managers import ManageOptions, ManagerFactory, new_manager
from partita.planning import (
    SearchOptions,
    given_plan,
    make_planner,
    other_plans,
    simulate_plan,
)
from partita.plans.plan import Plan, numbered_path
from partita.simulation.timeline import Timeline

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured
    from partita.keras.script import Trained


ACT = "act"
READY = "ready"
WATCH = "watch"
"""Values of --manage; without one it acts."""
WOULD_GO_ON = "with --manage, the other processes would go on from a snapshot in their memory."
"""Said after a loss under --manage=watch."""
STARTS_AGAIN = "start again from the last save; --restarts 3 does so by itself."
"""Said after a loss that has ended a run whose processes might have gone on."""


@dataclass(frozen=True)
class Group:
    """The devices and processes that train together."""

    devices: Devices = None
    processes: Processes = 1
    restarts: Restarts = 0
    manage: Manage = None
    decisions: Annotated[
        Path | None,
        typer.Option(help="Append the decisions of --manage to this file (JSON lines)."),
    ] = None
    board: Annotated[Path | None, typer.Option(hidden=True)] = None
    """The folder in which a launcher says who is lost."""
    snapshots: Annotated[Path | None, typer.Option(hidden=True)] = None
    """The folder in which a run that may be started again saves its snapshots."""


def run(
    context: typer.Context,
    script: Script,
    group: Group,
    files: PlanFiles,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Run this plan: a file (of several models: the first), or a baseline: dp, tp, ...",
            show_default="search for one",
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Run one step on one device too, and print the differences."),
    ] = False,
    measure_operators: MeasureOperators = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors.")] = False,
) -> None:
    """Run a training script, split over the devices.

    Example: partita run --devices 4 --save-plan plan.json train.py --epochs 3

    Example: partita run -m mypackage.train --epochs 3

    Example: partita run --processes 4 --restarts 3 train.py

    Example: partita run --processes 4 --manage --decisions decisions.jsonl train.py
    """
    with errors():
        if not os.environ.get("PARTITA_LAUNCHED"):
            check_writable(script, report=files.report, plan=files.save_plan)
            note_slips(context)
        devices = group.devices
        given = given_plan(plan) if plan is not None else None
        if devices is None and plan is not None and isinstance(given, Plan):
            plans = [given, *(other for _, other in other_plans(plan).values())]
            devices = max(each.devices for each in plans)
        check_manage(group)
        survives = group.manage in (ACT, READY) and group.processes > 1
        after_loss = ""
        if group.manage == WATCH and group.processes > 1:
            after_loss = WOULD_GO_ON
        elif survives and not group.restarts:
            after_loss = STARTS_AGAIN
        run_in_processes(group.processes, devices, group.restarts, survives, after_loss)
        prints = join_processes(group.board) and not quiet
        start_devices(devices)
        from partita.keras.script import Script, run_script

        activity = Activity(prints)
        record = Record(files, prints, group.devices is None and given is None)
        options = SearchOptions(
            measure_operators=measure_operators,
            report=activity.report,
            report_timing=say_timing if prints else None,
        )
        report = say if prints else say_nothing
        with _snapshots_in(group.snapshots, report):
            code = run_script(
                Script(script, context.args, is_module(context)),
                make_planner(plan, group.devices, options=options, on_plan=record.planned),
                report=report,
                verify=verify,
                trained=record.trained,
                activity=activity.show,
                manage=manager_factory(group, None if quiet else say, record.decisions),
            )
        record.finish()
    leave(code)


def check_manage(group: Group) -> None:
    """PartitaError for a wrong --manage; says what it can do for one process."""
    if group.manage not in (None, ACT, READY, WATCH):
        raise PartitaError(
            f"--manage is {group.manage!r}: write --manage; --manage=ready to compile for a loss "
            "beforehand; or --manage=watch to be told only."
        )
    if group.manage is None and group.decisions is not None:
        raise PartitaError("--decisions is for --manage: add --manage, or remove --decisions.")
    if group.manage is None or os.environ.get("PARTITA_LAUNCHED"):
        return
    check_writable(decisions=group.decisions)
    if group.processes == 1:
        restarts = "it is started again" if group.restarts else "add --restarts 3 to start it again"
        say(f"--manage with one process: no other one can go on after its end; {restarts}.")


def manager_factory(
    group: Group, tell: Callable[[str], None] | None, taken: list[Decision] | None = None
) -> ManagerFactory:
    """Gives a manager for each training of a run, by its own options or those of the command; their
    decisions are added to `taken`."""
    options = ManageOptions(
        acts=group.manage != WATCH,
        ready=group.manage == READY,
        log=group.decisions,
    )

    def make(given: ManageOptions | None = None) -> Manager | None:
        if group.manage is None and given is None:
            return None
        return new_manager(given or options, tell, taken)

    return make


def _snapshots_in(
    folder: Path | None, report: Callable[[str], None]
) -> AbstractContextManager[None]:
    """Inside, Keras's `fit` saves snapshots in a folder, and resumes from them."""
    if folder is None:
        return nullcontext()
    from partita.keras.snapshots import saving_snapshots

    return saving_snapshots(folder, report)


@dataclass
class Record:
    """Prints and writes the plans of a run, and the pages of the programs that it trained."""

    files: PlanFiles
    prints: bool
    tells_devices: bool = False
    """Whether to say that there is one device, and how to get more."""
    steps: list[tuple[Plan, Timeline]] = field(default_factory=list)
    """Plans with their simulated steps, for the pages."""
    decisions: list[Decision] = field(default_factory=list)
    """Decisions of --manage, for the next page."""
    pages: list[Path] = field(default_factory=list)
    """Pages that were written."""
    plans: dict[str, Path] = field(default_factory=dict)
    """Name of a program -> the file of its last plan."""
    legend_printed: bool = False

    def planned(self, captured: Captured, machine: Machine, plan: Plan) -> None:
        """Called with each new plan."""
        if self.files.report is not None:
            self.steps.append((plan, simulate_plan(captured, machine, plan)))
        if self.files.save_plan is not None:
            number = len(self.plans) + 1
            path = self.plans.setdefault(plan.graph, numbered_path(self.files.save_plan, number))
            save_plan(plan, path)
        if self.prints:
            self._print(plan)
            self._tell_devices()

    def _tell_devices(self) -> None:
        """Says once that there is one device, if so."""
        from partita.execute.devices import one_device_sentence

        if self.tells_devices and one_device_sentence():
            say(one_device_sentence())
        self.tells_devices = False

    def _print(self, plan: Plan) -> None:
        from partita.report.tables import legend, plan_table, summary

        if plan.why:
            err_table.print(plan_table(plan))
            if not self.legend_printed:
                err.print(legend(plan))
                self.legend_printed = True
        for line in summary(plan):
            err.print(line)
        if plan.graph in self.plans:
            err.print(f"plan written to {self.plans[plan.graph]}")

    def trained(self, job: Trained) -> None:
        """Called with each program that was trained, in the end."""
        if self.files.report is None:
            return
        path = numbered_path(self.files.report, len(self.pages) + 1)
        timelines = [timeline for plan, timeline in self.steps if plan is job.plan]
        decisions = [decision.to_json() for decision in self.decisions]
        self.decisions.clear()
        save_page(path, job.plan, timelines[0] if timelines else None, job.measured, decisions)
        self.pages.append(path)

    def finish(self) -> None:
        """Prints which pages were written."""
        if self.files.report is None or not self.prints:
            return
        if self.pages:
            err.print(f"report written to {', '.join(map(str, self.pages))}")
        else:
            err.print("nothing was trained, so there is no report")

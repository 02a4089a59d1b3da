"""The verbs: plan, simulate, compare, parallelize, manage; and compile_for.

    program -> capture -> graph -> search -> plan -> simulated timeline, or verified run

A program is a compiled Keras model or a jittable training step (plain JAX, Optax, Linen, NNX,
Equinox). The machine is the local devices unless `machine` names another ("dgx-h100:8", a .toml
file, a Machine); `devices` takes that many devices of it.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, Unpack

from partita.capture.program import capture_program, checked_call, is_keras_model
from partita.comparison import Comparison, compare_plans
from partita.errors import PartitaError, PlanError
from partita.files.writing import path_of
from partita.machine import Machine
from partita.planning import (
    PlanListener,
    SearchOptions,
    check_functions,
    check_measurable,
    given_plan,
    make_planner,
    plan_sentence,
    resolve_machine,
    resolve_plan,
    search_plan,
    simulate_plan,
    with_reasons,
)
from partita.plans.plan import Plan
from partita.report.notebook import comparison_html, notebook_say, plan_html, timeline_html
from partita.search.base import Report
from partita.simulation.timeline import Timeline

if TYPE_CHECKING:
    from partita.execute.compilers.compiled_plan import CompiledPlan

Plan._repr_html_ = plan_html  # pyright: ignore[reportAttributeAccessIssue]
Timeline._repr_html_ = timeline_html  # pyright: ignore[reportAttributeAccessIssue]
Comparison._repr_html_ = comparison_html  # pyright: ignore[reportAttributeAccessIssue]

Program = TypeVar("Program")


class PlanOptions(TypedDict, total=False):
    """Options of `plan`."""

    seconds: float | None
    """Time limit of the whole search, seconds; by default none, so that the plan is always the
    same."""
    stages: bool
    """Whether pipelines, microbatches and rematerialization are in the space."""
    search: str
    """Name of a search: "portfolio", "elimination", "mcmc" or "exhaustive"."""
    measure_operators: bool
    """Whether operators are timed on the local devices first."""
    report: Report | None
    """Called with the progress of the search."""


class StepOptions(TypedDict, total=False):
    """Options of `parallelize`."""

    static_argnums: int | Sequence[int]
    """Positions of arguments that are compiled in, as for `jax.jit`."""
    donate: bool | None
    """Whether the old state is donated; by default as the step's own `jax.jit` says, and yes
    without one."""
    measure_operators: bool
    """Whether operators are timed on the local devices first."""
    say: Callable[[str], None] | None
    """Called with sentences about the plan and the compiled step."""
    report: Report | None
    """Called with the progress of the search."""


def plan(
    model: Any,
    batch_size: int | None = None,
    *,
    args: Sequence[Any] | None = None,
    devices: int | None = None,
    machine: str | Machine | None = None,
    batch: Any = None,
    **options: Unpack[PlanOptions],
) -> Plan:
    """The fastest plan for a program on a machine, with its reasons.

    Give `batch_size` for a model that knows its input shapes, else a `batch` (x, y) of arrays or
    shapes. Give `args`, the arguments of a call, for a step.
    """
    _check_names("plan", PlanOptions, options)
    search = SearchOptions(**options)
    if search.measure_operators:
        check_measurable(machine)
    target_machine = resolve_machine(machine, devices)
    captured = capture_program(model, batch_size, batch, args, target_machine.target or None)
    return with_reasons(search_plan(captured, target_machine, search))


def simulate(
    model: Any,
    batch_size: int | None = None,
    *,
    plan: Plan | str | Path = "found",
    args: Sequence[Any] | None = None,
    devices: int | None = None,
    machine: str | Machine | None = None,
    batch: Any = None,
    report: Report | None = None,
) -> Timeline:
    """The timeline of one training step of a program under a plan; the machine need not exist.

    The plan is a Plan, a plan file, the name of a baseline ("dp", "owt", "tensor parallel", ...),
    or "found": the fastest.
    """
    check_functions(report=report)
    target_machine = resolve_machine(machine, devices)
    captured = capture_program(model, batch_size, batch, args, target_machine.target or None)
    return simulate_plan(captured, target_machine, plan, report)


def compile_for(
    plan: Plan | str | Path,
    program: Any,
    batch_size: int | None = None,
    *,
    machine: str | Machine | None = None,
    args: Sequence[Any] | None = None,
    batch: Any = None,
) -> CompiledPlan:
    """A plan compiled by the compiler of a machine that need not be here, beside the plan's own
    figures: peak memory, collectives, FLOPs.

    The plan is a Plan, a plan file, or a name as for `simulate`. The program is a Keras model or a
    step, as for `plan`, or a step that `capture_program` has captured. The machine is the one that
    the plan is for, unless it is given; a name needs one. The compiled program stays in Partita's
    cache.

    Raises a CompilerError if the compiler is not installed, does not know the machine, or gives
    up; and a MemoryBudgetError if the compiler refuses the program as too large.

    >>> plan = partita.plan(model, 256, machine="tpu-v5e:8")             # doctest: +SKIP
    >>> print(partita.compile_for(plan, model, 256))                     # doctest: +SKIP
    """
    from partita.capture.jax_functions import Captured
    from partita.execute.compilers.compiled_plan import compile_captured

    given = given_plan(plan)
    if machine is None:
        if not isinstance(given, Plan):
            raise PlanError(f"The plan '{plan}' names no machine: give one, as machine='h100:8'.")
        machine = given.machine
    resolved = resolve_machine(machine)
    captured = program
    if not isinstance(program, Captured):
        captured = capture_program(program, batch_size, batch, args, resolved.target or None)
    if not isinstance(given, Plan):
        given = resolve_plan(plan, captured.graph, resolved)
    return compile_captured(captured, given, resolved)


def compare(
    model: Any,
    batch_size: int | None = None,
    *,
    devices: int | None = None,
    machine: str | Machine | None = None,
    batch: Any = None,
    measure: bool = False,
    measure_operators: bool = False,
    report: Report | None = None,
) -> Comparison:
    """All baselines and the fastest plan side by side; with `measure`, each is compiled and
    timed on the local devices."""
    target_machine = resolve_machine(machine, devices)
    target = None if measure else target_machine.target or None
    captured = capture_program(model, batch_size, batch, target=target)
    search = SearchOptions(measure_operators=measure_operators, report=report)
    return compare_plans(captured, target_machine, search, measure)


def parallelize(
    model: Program,
    args: Sequence[Any] | None = None,
    *,
    devices: int | None = None,
    machine: str | Machine | None = None,
    plan: Plan | str | Path | None = None,
    **options: Unpack[StepOptions],
) -> Program:
    """The same program, training over several devices by a plan, or else by the fastest one.

    A Keras model, built or not, compiled or not, is planned at the first batch of its `fit`; its
    weights are moved, not made anew. A step is given with the `args` of a call, arrays or shapes;
    the result is called like it. The arguments that it returns changed are its state.

    In a script under `partita run` or `partita plan`, the command's devices and plan hold unless
    they are given here.

    >>> step = parallelize(train_step, (params, opt_state, batch))       # doctest: +SKIP
    >>> params, opt_state, loss = step(params, opt_state, batch)         # doctest: +SKIP
    """
    from partita.execute.function import ParallelStep, current

    _check_names("parallelize", StepOptions, options)
    check_functions(say=options.get("say"), report=options.get("report"))
    session = current()
    say = options.get("say") or (session.say if session is not None else notebook_say())
    if session is None and machine is None and devices is None and plan is None:
        _tell_of_devices(say)
    if session is not None and devices is None and machine is None and plan is None:
        planner = session.planner
    else:
        search = SearchOptions(
            measure_operators=options.get("measure_operators", False),
            report=options.get("report"),
        )
        planner = make_planner(plan, devices, machine, search, _teller_of_plans(say))
    program: Any = model
    if is_keras_model(program):
        from partita.keras.fit import attach, attached

        attach(program, planner, report=say)
        started: Any = attached(program)
        result: Any = program
    else:
        function, call_args = checked_call(program, args)
        result = started = ParallelStep(
            function,
            planner,
            static_argnums=options.get("static_argnums", ()),
            donate=options.get("donate"),
            say=say,
            target=session.target if session is not None else None,
        )
        result.prepare(call_args)
    if session is not None:
        session.started.append(started)
    return result


def manage(
    model: Program,
    *,
    survive: bool = True,
    shares: bool = True,
    ready: bool = False,
    log: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Program:
    """The same program, managed while it trains: it goes on when a process is lost, and work moves
    away from a process that is slow.

    Give a Keras model, or a step that `parallelize` has returned. Only a launcher can tell who is
    lost, so start the script with `partita run --processes N --manage`. There every training is
    managed by the options of the command, unless you give others here.

    Args:
        survive: Whether the training goes on in the processes that are left.
        shares: Whether work moves away from slow processes, and another plan is taken when links
            have slowed.
        ready: Whether the programs for shares, and for the loss of any one process, are compiled
            before the first step.
        log: A file to which every decision is appended, as a line of JSON.
        say: Called with a sentence for every decision.

    >>> partita.manage(model, log="decisions.jsonl")                     # doctest: +SKIP
    """
    from partita.execute import members
    from partita.execute.function import ParallelStep, current
    from partita.management.managers import ManageOptions, new_manager

    check_functions(say=say)
    file = None if log is None else Path(os.path.expanduser(path_of(log, "log")))
    program: Any = model
    session = current()
    if is_keras_model(program):
        from partita.keras.fit import attached

        if attached(program) is None:
            parallelize(program)
        training: Any = attached(program)
    elif isinstance(program, ParallelStep):
        training = program
    else:
        raise PartitaError(
            f"A '{type(program).__name__}' cannot be managed: give a Keras model, or the step that "
            "partita.parallelize has returned."
        )
    tell = say or (session.say if session is not None else notebook_say())
    if survive and members.board() is None and tell is not None:
        tell(
            f"'{training.name}' does not survive a lost process: start the script with 'partita "
            "run --processes N --manage'."
        )
    options = ManageOptions(survive=survive, shares=shares, ready=ready, log=file)
    if session is not None and say is None:
        training.runner.manager = session.manage(options)
    else:
        training.runner.manager = new_manager(options, tell)
    return model


def _tell_of_devices(say: Callable[[str], None] | None) -> None:
    """Says that JAX has one device, if so, and how to get more; without `say` as a warning."""
    from partita.execute.devices import one_device_sentence
    from partita.execute.process_group import group

    if group() is not None:
        return
    sentence = one_device_sentence()
    if sentence and say is not None:
        say(sentence)
    elif sentence:
        warnings.warn(sentence, stacklevel=3)


def _teller_of_plans(say: Callable[[str], None] | None) -> PlanListener | None:
    """A listener that says what a plan for several devices splits; None without `say`."""
    if say is None:
        return None

    def tell(captured: Any, target: Machine, plan: Plan) -> None:
        if target.devices > 1:
            say(f"{plan_sentence(plan, target)}.")

    return tell


def _check_names(verb: str, known: type, options: Mapping[str, Any]) -> None:
    """TypeError for an option that a verb does not have."""
    for name in options:
        if name not in known.__annotations__:
            similar = difflib.get_close_matches(name, known.__annotations__, 1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise TypeError(f"partita.{verb}() has no option {name!r}.{hint}")

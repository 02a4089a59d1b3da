"""From a captured step to a checked plan: resolve the machine, search, add reasons, resolve names
of plans.

The verbs in `api.py` and the command line are made of these functions. They take captured steps and
graphs, so that they work on graphs from a file, without JAX or Keras; imports that need JAX stand
in the functions that use the local devices.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.cost.predict import OperatorPrediction, Prediction
from partita.errors import MachineError, MemoryBudgetError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.adapt import (
    fit_mesh,
    fit_plan,
    microbatches_note,
    with_claims_for,
    with_normalizations,
)
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.notes import with_use_notes
from partita.plans.pipeline import is_one_program, is_pipeline, stage_count
from partita.plans.plan import Plan, choice_text, numbered_path, offload_text, placed_slice
from partita.search.alternatives import alternatives
from partita.search.base import Report
from partita.search.find import PlanResult, capacity, check_search, find, mesh_of
from partita.simulation.simulate import predicted as simulated_prediction
from partita.simulation.simulate import simulate as simulated
from partita.simulation.timeline import Timeline
from partita.units import format_bytes, format_seconds, is_whole_number

if TYPE_CHECKING:
    from partita.capture.jax_functions import Captured
    from partita.execute.compilers.compiled_plan import CompiledPlan
    from partita.execute.function import Planner

TimingReport = Callable[[int, int], None]
"""Called with the number of operators timed so far, and the number to time."""
PlanListener = Callable[[Any, Machine, Plan], None]
"""Called with a captured step, its machine and its plan."""
MEASURED_SEARCHES = 4
"""Searches at most while operators are timed: each may choose untimed operators."""
ALTERNATIVES = 5
"""Alternatives per operator that a plan keeps as reasons."""
CLAIMS = ("predicted", "why", "notes", "machine_digest")
"""Fields of a plan that hold for the numbers of one machine."""
BASELINE_FIGURES = ("seconds", "seconds_compute", "peak_bytes", "traffic_bytes", "joules")
"""Figures of a baseline that a plan keeps as reasons."""


ARGUMENTS: Mapping[str, tuple[type, str]] = {
    "graph": (OperatorGraph, "the 'graph' of a captured program"),
    "machine": (Machine, "partita.load_machine('h100:8')"),
    "plan": (Plan, "a Plan, as partita.best_plan returns it"),
}
"""Arguments of public functions: their type, and what to give."""


def check_types(**values: Any) -> None:
    """PlanError for one of `ARGUMENTS` of another type."""
    for name, value in values.items():
        kind, fix = ARGUMENTS[name]
        if not isinstance(value, kind):
            raise PlanError(
                f"{name} is of type '{type(value).__name__}', not {kind.__name__}: give {fix}."
            )


def check_functions(**values: Any) -> None:
    """PlanError for an argument that is neither a function nor None."""
    for name, value in values.items():
        if value is not None and not callable(value):
            raise PlanError(
                f"{name} is of type '{type(value).__name__}', which cannot be called: give a "
                "function, or None."
            )


@dataclass(frozen=True)
class SearchOptions:
    """How to search. The defaults have no time limit, and give the same plan every time."""

    seconds: float | None = None
    """Time limit of the whole search, seconds."""
    stages: bool = False
    """Whether pipelines, microbatches and rematerialization are in the space."""
    search: str = "portfolio"
    """Name of a search, a key of `search.portfolio.SEARCHES`."""
    measure_operators: bool = False
    """Whether operators are timed on the local devices first."""
    report: Report | None = None
    """Called with the progress of the search."""
    report_timing: TimingReport | None = None
    """Called with the progress of timing operators."""

    def __post_init__(self) -> None:
        seconds = self.seconds
        if seconds is not None and not (isinstance(seconds, Real) and seconds >= 0):
            raise PlanError(
                f"seconds={seconds!r} is no time limit: give a number of at least 0, or None."
            )
        check_search(self.search)
        check_functions(report=self.report, report_timing=self.report_timing)


DEFAULTS = SearchOptions()


# --------------------------------------------------------------------------------------- machines


def resolve_machine(machine: str | Machine | None, devices: int | None = None) -> Machine:
    """The machine of a name or file, the local devices for None; with `devices`, that many
    devices of it."""
    _check_devices(devices)
    # A small integer of NumPy would overflow in products with bytes.
    devices = int(devices) if devices is not None else None
    if machine is None:
        from partita.execute.devices import detect

        return detect(devices)
    if not isinstance(machine, Machine | str | os.PathLike):
        raise MachineError(
            f"machine is of type '{type(machine).__name__}': give a name ('h100:8'), a .toml file "
            "or a Machine."
        )
    whole = machine if isinstance(machine, Machine) else load(machine)
    if not devices or devices == whole.devices:
        return whole
    part = whole.with_devices(devices)
    kind, _, count = whole.name.rpartition(":")
    name = f"{whole.name}, 1 device" if devices == 1 else f"{whole.name}, {devices} devices"
    if count.isdecimal() and devices * int(count) % whole.devices == 0:
        name = f"{kind}:{devices * int(count) // whole.devices}"
    return replace(part, name=name)


def _check_devices(devices: int | None) -> None:
    """MachineError for a number of devices that is none."""
    if devices is not None and not is_whole_number(devices, 1):
        raise MachineError(
            f"devices={devices!r} is no number of devices: give a whole number above 0."
        )


def check_measurable(machine: str | Machine | None) -> None:
    """PlanError unless operators can be timed for a machine: it must be the local devices, None."""
    if machine is not None:
        raise PlanError(
            "Operators can be timed on the local devices only, and the plan is for the machine "
            f"{str(machine)!r}. "
            "Remove the machine, or do not measure operators."
        )


# --------------------------------------------------------------------------------------- searches


def best_plan(graph: OperatorGraph, machine: Machine, report: Report | None = None) -> Plan:
    """The fastest plan for a graph on a machine, with its reasons."""
    check_types(graph=graph, machine=machine)
    return with_reasons(find(graph, machine, report))


def search_plan(
    captured: Captured, machine: Machine, options: SearchOptions = DEFAULTS
) -> PlanResult:
    """The result of a search for a captured step; `options` may ask for timed operators."""
    if options.measure_operators:
        result = search_measured(captured, machine, options)
        assert result is not None, "process 0 searches"
        return result

    return _searched(captured, machine, options)


def _searched(
    captured: Captured, machine: Machine, options: SearchOptions, excess: float = 1.0
) -> PlanResult:
    """The result of a search by predicted times; `excess` is observed over predicted memory."""

    def search(stages: bool) -> PlanResult:
        return find(
            captured.graph,
            machine,
            options.report,
            excess,
            options.seconds,
            stages=stages,
            search=options.search,
        )

    return _that_runs(captured, search(options.stages), lambda: search(False))


def _that_runs(
    captured: Captured, result: PlanResult, without_stages: Callable[[], PlanResult]
) -> PlanResult:
    """The result if its plan can run, else that of a search without stages, with a note on the
    faster plan. A plan that cannot run stays if no other fits in memory; its note gives the reason.
    """
    plan = result.plan
    if is_one_program(plan):
        return result
    from partita.execute.dispatch import changed_meanings, joint_updates
    from partita.execute.staged import in_pieces

    try:
        step = in_pieces(captured, plan)
    except PlanError as error:
        reason = str(error)
    else:
        notes = [*changed_meanings(step.cut, plan), *joint_updates(step.cut)]
        return _with_notes(result, notes)
    seconds = format_seconds(result.prediction.seconds)
    try:
        other = without_stages()
    except MemoryBudgetError:
        return _with_notes(result, [f"this plan cannot run: {reason}"])
    note = f"a faster plan ({describe(plan)}; {seconds} a step) cannot run: {reason}"
    return _with_notes(other, [note])


def _with_notes(result: PlanResult, notes: Sequence[str]) -> PlanResult:
    plan = replace(result.plan, notes=(*result.plan.notes, *notes))
    return replace(result, plan=plan)


def search_fitting_plan(
    captured: Captured, machine: Machine, options: SearchOptions = DEFAULTS
) -> PlanResult:
    """`search_plan`, with stages and microbatches in the space if no other plan fits in memory."""
    try:
        return search_plan(captured, machine, options)
    except MemoryBudgetError:
        if options.stages or machine.devices == 1:
            raise
        return search_plan(captured, machine, replace(options, stages=True))


def search_measured(
    captured: Captured, machine: Machine, options: SearchOptions = DEFAULTS
) -> PlanResult | None:
    """The result of a search with timed operators; None in every process but process 0.

    The operators of the baselines and of the plan are timed, and the search runs again with their
    times, until all operators of its plan have been timed. Process 0 searches; all processes time.
    Plans in stages are not in the space.
    """
    from partita.execute.operators import measured_operators
    from partita.execute.processes import from_first

    results: list[PlanResult] = []

    def search() -> str:
        """Searches, and gives the plans whose operators are to be timed."""
        result = find(
            captured.graph,
            machine,
            options.report,
            seconds=options.seconds,
            search=options.search,
        )
        results.append(result)
        plans = [plan for plan, _ in results[0].baselines.values()]
        plans += [result.plan for result in results]
        return json.dumps([plan.to_json() for plan in plans])

    for _ in range(MEASURED_SEARCHES):
        plans = [Plan.from_json(value) for value in json.loads(from_first("plans", search))]
        before = _timed_operators(machine)
        machine = measured_operators(captured, machine, plans, options.report_timing)
        if _timed_operators(machine) == before:
            break
    else:
        from_first("plans", search)
    return results[-1] if results else None


def _timed_operators(machine: Machine) -> set[Any] | None:
    """Keys of the operators that were timed on a machine."""
    return set(machine.times.seconds) if machine.times is not None else None


def with_reasons(result: PlanResult) -> Plan:
    """The plan of a search with the reasons that `partita explain` shows: per operator its cost
    and its alternatives."""
    is_searched = result.plan.mesh.axes or result.plan.offload
    chosen = result.plan if is_searched else result.baselines["one device"][0]
    operators = {}
    for cost, others in zip(
        result.prediction.operators,
        alternatives(result.baselines.space, chosen, ALTERNATIVES),
        strict=True,
    ):
        shown = [_alternative(result, *other) for other in others]
        operators[cost.name] = {**_figures(cost), "alternatives": shown}
    baselines = {}
    limit = capacity(result.network.placement.machine)
    for name, (_, prediction) in result.baselines.items():
        figures = prediction.to_json()
        baselines[name] = {key: figures[key] for key in BASELINE_FIGURES if key in figures}
        if prediction.peak_bytes > limit:
            baselines[name]["fits"] = False
    return replace(result.plan, why={"operators": operators, "baselines": baselines})


def _figures(cost: OperatorPrediction) -> dict[str, float]:
    """Seconds by cause, and bytes, of an operator, as a plan file stores them."""
    return {
        "compute": cost.compute,
        "activations": cost.activations,
        "gradients": cost.gradients,
        "moves": cost.moves,
        "bytes": cost.nbytes,
        "traffic": cost.traffic,
    }


def _alternative(
    result: PlanResult, choice: Mapping[str, str], storage: str, seconds: float, nbytes: float
) -> dict[str, Any]:
    text = choice_text(choice, result.network.placement.mesh)
    if storage:
        text += f" {storage}"
    return {"choice": text, "seconds": seconds, "bytes": nbytes}


# ------------------------------------------------------------------------------------ given plans


def check_plan(plan: Plan, graph: OperatorGraph, machine: Machine) -> Plan:
    """A plan, fitted to the batch of a graph and to a machine; PlanError if it cannot be."""
    check_types(graph=graph, machine=machine, plan=plan)
    if plan.devices > machine.devices:
        raise PlanError(
            f"The plan '{plan.name}' is for {plan.devices} devices; {machine.name} has "
            f"{machine.devices}. "
            f"Plan again for {machine.devices}, or give the plan {plan.devices} devices."
        )
    plan = replace(plan, choices=with_normalizations(plan.choices, graph))
    same_model = set(plan.choices) == {operator.name for operator in graph.operators}
    both_batches_known = bool(plan.batch_size and graph.batch_size)
    planned = plan.microbatches
    if same_model and both_batches_known and plan.batch_size != graph.batch_size:
        plan = fit_plan(plan, graph)
    plan = with_use_notes(with_claims_for(fit_mesh(check(plan, graph), machine), machine), machine)
    note = microbatches_note(planned, graph.batch_size, plan.microbatches)
    if plan.microbatches < planned and note not in plan.notes:
        plan = replace(plan, notes=(*plan.notes, note))
    return plan


SHORT_NAMES = {
    "dp": "data parallel",
    "tp": "tensor parallel",
    "tp-sp": "tensor parallel with sequence",
    "owt": "one weird trick",
    "fsdp": "ZeRO-3",
    "dp-tp": "data x tensor",
    "one": "one device",
}
"""Short names of baselines."""


def resolve_plan(
    plan: Plan | str | Path,
    graph: OperatorGraph,
    machine: Machine,
    report: Report | None = None,
) -> Plan:
    """A checked plan for a graph on a machine.

    Args:
        plan: A plan, a plan file, the name of a baseline ("dp", "tensor parallel", ...), or
            "found", which searches.
        report: Called with the progress of a search.
    """
    given = given_plan(plan)
    if given is None:
        return best_plan(graph, machine, report)
    return _applied(given, graph, machine)


def given_plan(plan: Plan | str | Path) -> Plan | str | None:
    """A plan, or that of a file; the name of a baseline; None for "found", which searches.

    PlanError if it is none of these.
    """
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, Path)):
        raise PlanError(
            f"plan is of type '{type(plan).__name__}', which is no plan: give a Plan, the path of "
            "its file, or a name such as 'dp'."
        )
    text = str(plan)
    name = SHORT_NAMES.get(text.lower(), text)
    if name == "found":
        return None
    by_key = {_key(baseline): baseline for baseline in BASELINES}
    if _key(name) in by_key:
        return by_key[_key(name)]
    if not os.path.exists(name):  # False too for a text that is too long for a path
        names = sorted({*SHORT_NAMES, *(by_key.keys() - SHORT_NAMES.keys())})
        raise PlanError(
            f"There is no plan file and no plan named {text!r}. Give a file that 'partita plan "
            "--save-plan' wrote, "
            f"'found', or one of {', '.join(names)}."
        )
    return Plan.load(name)


def other_plans(plan: Plan | str | Path) -> dict[str, tuple[Path, Plan]]:
    """The plans of a script's other programs, by name: those of the files `plan-2.json`, ... beside
    a plan file, as `--save-plan plan.json` writes them. No others for a plan that is no file.
    """
    first = given_plan(plan)
    if isinstance(plan, Plan) or not isinstance(first, Plan):
        return {}
    others: dict[str, tuple[Path, Plan]] = {}
    number = 2
    while (path := numbered_path(Path(plan), number)).exists():
        other = Plan.load(path)
        if other.graph != first.graph:
            others.setdefault(other.graph, (path, other))
        number += 1
    return others


def _applied(given: Plan | str, graph: OperatorGraph, machine: Machine) -> Plan:
    """A given plan or baseline for a graph on a machine, checked."""
    if isinstance(given, str):
        return with_use_notes(BASELINES[given](graph, machine.name, mesh_of(machine)), machine)
    return check_plan(given, graph, machine)


def _key(name: str) -> str:
    """The spelling by which names of baselines are compared.

    >>> _key("Data x tensor")
    'data-x-tensor'
    """
    return name.lower().replace(" ", "-")


def make_planner(
    plan: Plan | str | Path | None = None,
    devices: int | None = None,
    machine: str | Machine | None = None,
    options: SearchOptions = DEFAULTS,
    on_plan: PlanListener | None = None,
) -> Planner:
    """A function from a captured step to its plan: the given one of `resolve_plan`, checked, or
    else the result of a search.

    Its second argument is the MemoryBudgetError of a compiler that refused the plan before: it then
    gives the fastest plan that is smaller. A given plan is not replaced; the error names the
    smaller one. Of several processes process 0 searches. A step whose name is that of a plan in
    `other_plans` gets that plan.
    """
    _check_devices(devices)
    first = given_plan(plan) if plan is not None else None
    others = other_plans(plan) if plan is not None else {}
    if options.measure_operators:
        check_measurable(machine)
    from partita.execute import members
    from partita.execute.processes import from_first

    def searched_plan(captured: Captured, local: Machine) -> Plan:
        measured = search_measured(captured, local, options) if options.measure_operators else None

        def best() -> str:
            result = measured or search_fitting_plan(captured, local, options)
            return json.dumps(with_reasons(result).to_json())

        return Plan.from_json(json.loads(from_first("plan", best)))

    def choose(captured: Captured, refused: MemoryBudgetError | None = None) -> Plan:
        path, given = others.get(captured.graph.name, (None, first))
        needed = devices or (given.devices if isinstance(given, Plan) else None)
        if machine is None and members.generation():
            needed = None  # after a loss: all that are left
        target = resolve_machine(machine, needed)
        if refused is not None:
            return _smaller_plan(captured.graph, target, given, refused, options.report)
        if given is not None:
            chosen = _with_prediction(_applied(given, captured.graph, target), captured, target)
            if path is not None:
                chosen = replace(chosen, notes=(*chosen.notes, f"read from {path.name}"))
        else:
            chosen = searched_plan(captured, target)
        if on_plan is not None:
            on_plan(captured, target, chosen)
        return chosen

    return choose


def _with_prediction(plan: Plan, captured: Captured, machine: Machine) -> Plan:
    """A plan with its prediction and the costs of its operators, without alternatives; of several
    processes process 0 predicts them."""
    from partita.execute.processes import from_first

    def claims() -> str:
        if plan.predicted:
            claimed = plan
        else:
            prediction = predict_plan(captured.graph, machine, plan)
            operators = {
                cost.name: {**_figures(cost), "alternatives": []} for cost in prediction.operators
            }
            claimed = replace(
                plan,
                predicted=prediction.to_json(),
                why={"operators": operators},
                machine_digest=machine.digest,
            )
        return json.dumps({name: getattr(claimed, name) for name in CLAIMS})

    # The saved claims of a plan may hold for the machine of one process only.
    values = json.loads(from_first("prediction", claims))
    return replace(plan, **{**values, "notes": tuple(values["notes"])})


def _smaller_plan(
    graph: OperatorGraph,
    machine: Machine,
    given: Plan | str | None,
    refused: MemoryBudgetError,
    report: Report | None,
) -> Plan:
    """The fastest plan that fits by the memory that the compiler reports; MemoryBudgetError
    names it if a plan was given."""
    excess = refused.excess or 1.0
    smaller = with_reasons(find(graph, machine, report, excess))
    if given is None:
        return smaller
    needed_bytes = int(smaller.predicted["peak_bytes"] * excess)
    raise MemoryBudgetError(
        f"{refused} The nearest plan that fits: {describe(smaller)}; {format_bytes(needed_bytes)} "
        "a device, "
        f"a step predicted at {format_seconds(smaller.predicted['seconds'])}. Remove the plan to "
        "run it."
    )


def plan_that_compiles(
    captured: Captured,
    machine: Machine,
    plan: Plan,
    say: Callable[[str], None],
    options: SearchOptions = DEFAULTS,
) -> tuple[Plan, CompiledPlan]:
    """A plan with its compiled program: the given plan, or a smaller one if the compiler of the
    machine counts more memory than a device has.

    The search is told by how much the compiler's peak exceeds the predicted one. `say` gets a
    sentence for every new plan. Raises a MemoryBudgetError if no plan fits, or none of `REFUSALS`
    new ones, and a CompilerError if there is no compiler.
    """
    from partita.execute.compilers.compiled_plan import compile_captured
    from partita.execute.function import REFUSALS

    excess = 1.0
    for refusals in range(REFUSALS + 1):
        try:
            compiled = compile_captured(captured, plan, machine)
            compiled.check_fits()
        except MemoryBudgetError as error:
            if error.excess is None or refusals == REFUSALS:
                raise
            excess = max(excess, error.excess)
            problem = str(error).split(". Use")[0]
            say(f"{problem}. Planned again within that limit.")
            plan = with_reasons(_searched(captured, machine, options, excess))
        else:
            return plan, compiled
    raise AssertionError("the loop returns or raises")


# ------------------------------------------------------------------------------------ predictions


def predict_plan(graph: OperatorGraph, machine: Machine, plan: Plan) -> Prediction:
    """Predicted seconds, memory and traffic of a plan for a graph on a machine."""
    check_types(graph=graph, machine=machine, plan=plan)
    return simulated_prediction(graph, machine, check(plan, graph))


def simulate_plan(
    captured: Captured,
    machine: Machine,
    plan: Plan | str | Path = "found",
    report: Report | None = None,
) -> Timeline:
    """The timeline of one step of a captured step under a plan; see `resolve_plan` for names of
    plans."""
    graph = captured.graph
    return simulated(graph, machine, resolve_plan(plan, graph, machine, report))


def plan_sentence(plan: Plan, machine: Machine) -> str:
    """A plan on a machine in a line, or the reason if it leaves all devices but one idle."""
    from partita.execute.function import is_split

    name = f"'{plan.graph}' on {machine.name}"
    if machine.devices > 1 and plan.notes and not is_split(plan):
        return f"{name}: {plan.notes[0]}"
    step = format_seconds(plan.predicted["seconds"])
    return f"{name}: {describe(plan)}; {step} a step predicted"


def describe(plan: Plan) -> str:
    """A plan in a line: operators per kind of split, stored variables, stages, microbatches."""
    if not plan.mesh.axes:
        return "one device"
    parts = [_splits_text(list(plan.choices.values()))]
    if plan.storage:
        parts.append(f"{len(plan.storage)} variables stored in parts")
    if stage_count(plan) > 1 and is_pipeline(plan):
        parts.append(f"{stage_count(plan)} stages")
    elif stage_count(plan) > 1:
        placed = [choice for choice in plan.choices.values() if _is_placed(choice)]
        parts.append(f"{len(placed)} placed")
    if plan.microbatches > 1:
        parts.append(f"{plan.microbatches} microbatches")
    if plan.recompute:
        parts.append("rematerialization")
    if plan.offload:
        parts.append(offload_text(plan.offload))
    return ", ".join(parts)


def _splits_text(choices: Sequence[Mapping[str, str]]) -> str:
    """Operators per kind of split, the most frequent kind first."""
    kinds: Counter[str] = Counter()
    for choice in choices:
        for use in {use for use in choice.values() if placed_slice(use) is None}:
            kinds[use[0]] += 1
    texts = [
        f"{count} of {len(choices)} operators by {kind}" for kind, count in kinds.most_common()
    ]
    return ", ".join(texts) or "nothing split"


def _is_placed(choice: Mapping[str, str]) -> bool:
    return any(placed_slice(use) is not None for use in choice.values())

"""The whole way on one screen: model -> capture -> graph -> search -> plan -> run, verified -> report."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from partita.cost.predict import Prediction
from partita.errors import CaptureError, MemoryBudgetError, PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.plans.adapt import fit_mesh, fit_plan
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.layout import layout_of
from partita.plans.pipeline import is_pipeline, stage_count
from partita.plans.plan import Plan, choice_text, placed_slice
from partita.search.base import Progress
from partita.search.find import Found, alternatives, find, fits, mesh_of
from partita.simulation.simulate import predicted as simulated_prediction
from partita.simulation.simulate import simulate as simulated
from partita.simulation.timeline import Timeline
from partita.units import format_bytes, format_seconds

Report = Callable[[Progress], None]
Say = Callable[[int, int], None]
"""Told how many of how many operators have been timed."""
SEARCHES = 4
"""Searches at most while operators are measured: each may find a plan with some that have not been."""


def plan(
    model: Any,
    batch_size: int | None = None,
    *,
    args: Sequence[Any] | None = None,
    devices: int | None = None,
    machine: str | Machine | None = None,
    batch: Any = None,
    measure_operators: bool = False,
    seconds: float | None = None,
    stages: bool = False,
    search: str = "portfolio",
    report: Report | None = None,
) -> Plan:
    """The fastest plan found for a compiled Keras model, or for any jittable training step, on a machine.

    For a model, give `batch_size` if it knows its input shapes, else a `batch` (x, y) of arrays or shapes. For a step, give the
    `args` of a call, arrays or shapes. The machine is the devices at hand unless `machine` names another ("dgx-h100:8", a
    .toml file); `devices` takes that many of it. With `measure_operators`, operators are timed on the devices at hand first. `seconds` is how
    long the whole search may take; by default it takes as long as it needs, always to the same plan. With `stages`, pipelines, microbatches and
    recomputation are in the space: such plans can be simulated, and not yet run. `search` is one of `search.portfolio.SEARCHES`.
    """
    captured = capture(model, batch_size, batch, args)
    measure = measure_operators and here(machine)
    return explained(
        searched(
            captured,
            machine_of(machine, devices),
            report,
            measure,
            seconds=seconds,
            stages=stages,
            search=search,
        )
    )


def here(machine: str | Machine | None) -> bool:
    """Whether operators can be measured for that machine: PlanError unless it is the devices at hand."""
    if machine is not None:
        raise PlanError(
            f"Operators can be measured only on the devices at hand, and a plan for the machine {str(machine)!r} is asked for. "
            "Leave the machine or the measuring away."
        )
    return True


def is_model(program: Any) -> bool:
    """Whether a program is a Keras model; what is not one is taken for a training step."""
    keras = sys.modules.get("keras")
    return keras is not None and isinstance(program, keras.Model)


def capture(
    model: Any, batch_size: int | None = None, batch: Any = None, args: Sequence[Any] | None = None
) -> Any:
    """The captured training step of a compiled Keras model, or of a step called with `args`: its `.graph` prints, saves and plans."""
    if not is_model(model):
        from partita.capture.functions import call_of, capture_call

        return capture_call(_step(model, args), call_of(model, args or (), {})).captured
    from partita.capture.keras_models import batch_like, capture_model

    if batch is None:
        batch = batch_like(model, batch_size or 32)
    return capture_model(model, batch)


def machine_of(machine: str | Machine | None, devices: int | None = None) -> Machine:
    """The machine of that name, or the devices at hand; `devices` of it."""
    if isinstance(machine, Machine):
        return machine.with_devices(devices) if devices else machine
    if machine is not None:
        whole = load(machine)
        return whole.with_devices(devices) if devices else whole
    from partita.execute.devices import detect

    return detect(devices)


def found(graph: OperatorGraph, machine: Machine, report: Report | None = None) -> Plan:
    """The fastest plan for a graph on a machine, with what its alternatives would cost."""
    return explained(find(graph, machine, report))


def explained(result: Found) -> Plan:
    """The plan of a search, with the reasons that `partita explain` shows: per operator, its cost and its alternatives."""
    why, mesh = {}, result.plan.mesh
    chosen = result.plan if mesh.axes else result.baselines["one device"][0]
    for o, found in zip(
        result.prediction.operators, alternatives(result.network, chosen, 5), strict=True
    ):
        others = [
            {
                "choice": choice_text(choice, result.network.placement.mesh)
                + (f" ZeRO-{zero}" if zero else ""),
                "seconds": seconds,
                "bytes": nbytes,
            }
            for choice, zero, seconds, nbytes in found
        ]
        why[o.name] = {
            "compute": o.compute,
            "activations": o.activations,
            "gradients": o.gradients,
            "moves": o.moves,
            "bytes": o.nbytes,
            "traffic": o.traffic,
            "alternatives": others,
        }
    kept = ("seconds", "seconds_compute", "peak_bytes", "traffic_bytes")
    baselines = {
        n: {k: v for k, v in p.to_json().items() if k in kept}
        for n, (_, p) in result.baselines.items()
    }
    return replace(result.plan, why={"operators": why, "baselines": baselines})


def searched(
    captured: Any,
    machine: Machine,
    report: Report | None = None,
    measure: bool = False,
    say: Say | None = None,
    seconds: float | None = None,
    stages: bool = False,
    search: str = "portfolio",
) -> Found:
    """The fastest plan for a captured step. With `measure`, by operators timed on the devices at hand; with `stages`, pipelines too.

    What is timed are the operators of the baselines and of the plan found; with their times the search goes on, until it finds a
    plan whose operators have all been timed.
    """
    if not measure:
        return find(captured.graph, machine, report, seconds=seconds, stages=stages, search=search)
    result = timed_search(captured, machine, report, say, seconds, search)
    assert result is not None, "process 0 searches"
    return result


def timed_search(
    captured: Any,
    machine: Machine,
    report: Report | None,
    say: Say | None,
    seconds: float | None,
    search: str = "portfolio",
) -> Found | None:
    """`searched` with operators timed. Of several processes process 0 searches, and all time: the others have no result."""
    from partita.execute.operators import measured_operators
    from partita.execute.processes import from_first

    found: list[Found] = []

    def plans() -> str:
        """Searches; the plans that there are by now."""
        found.append(find(captured.graph, machine, report, seconds=seconds, search=search))
        known = [
            *(plan for plan, _ in found[0].baselines.values()),
            *(result.plan for result in found),
        ]
        return json.dumps([plan.to_json() for plan in known])

    for _ in range(SEARCHES):
        wanted = [Plan.from_json(value) for value in json.loads(from_first("plans", plans))]
        better = measured_operators(captured, machine, wanted, say)
        known, timed = (
            m.times.seconds.keys() if m.times is not None else None for m in (machine, better)
        )
        machine = better
        if known == timed:
            break
    else:
        from_first("plans", plans)
    return found[-1] if found else None


OBJECTIVES = ("step", "cost-per-epoch")
SAMPLES = 1_000_000
"""Samples of an epoch, unless it is said."""


@dataclass(frozen=True)
class Offer:
    """What one machine would do for a program. `device_hours` and `cost` are those of an epoch; no plan where none fits, and why."""

    machine: Machine
    found: Found | None
    seconds: float = math.inf
    """Of a step."""
    samples_per_second: float = 0.0
    epoch_seconds: float = math.inf
    device_hours: float = math.inf
    cost: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        known = ("seconds", "samples_per_second", "epoch_seconds", "device_hours", "cost")
        figures = {k: getattr(self, k) if self.found is not None else None for k in known}
        return {
            "machine": self.machine.name,
            "devices": self.machine.devices,
            **figures,
            "note": self.note,
        }


def offers(
    captured: Any,
    machines: Sequence[Machine],
    objective: str = "step",
    prices: Mapping[str, float] | None = None,
    samples: int = SAMPLES,
    report: Report | None = None,
    seconds: float | None = None,
    stages: bool = False,
    search: str = "portfolio",
) -> list[Offer]:
    """Each machine with the best plan for a captured step, best offer first: the fastest step, or the cheapest epoch of so many samples.

    `prices` are those of a device for an hour, in any currency, by the name of the device, of the machine or of its preset; "" for all others. Without
    a price the cheapest epoch is that of the fewest device hours. A machine that no plan fits comes last, and its offer says why.
    """
    if objective not in OBJECTIVES:
        raise PlanError(
            f"There is no objective {objective!r}: use {' or '.join(map(repr, OBJECTIVES))}."
        )
    batch = captured.graph.batch_size
    if objective != "step" and not batch:
        raise PlanError(
            "An epoch has no cost here: the step has no batch of samples to count. Use the objective 'step'."
        )
    price_of = [
        next(
            (
                prices[k]
                for k in (m.name, m.name.partition(":")[0], m.device.name, "")
                if k in prices
            ),
            None,
        )
        if prices
        else None
        for m in machines
    ]
    missing = [
        m.name for m, price in zip(machines, price_of, strict=True) if prices and price is None
    ]
    if missing:
        raise PlanError(
            f"There is no price for {', '.join(missing)}: give one of a device for an hour, for all machines or for none, as in --price h100=2.5,a100=1.5."
        )
    found = []
    for machine, price in zip(machines, price_of, strict=True):
        try:
            best = searched(
                captured, machine, report, seconds=seconds, stages=stages, search=search
            )
        except MemoryBudgetError as error:
            found.append(Offer(machine, None, note=str(error)))
            continue
        step = best.prediction.seconds
        epoch = step * samples / batch if batch else math.inf
        hours = epoch * machine.devices / 3600
        cost = hours * price if price is not None else None
        found.append(
            Offer(machine, best, step, batch / step, epoch, hours, cost, "; ".join(best.plan.notes))
        )
    if objective == "step":
        return sorted(found, key=lambda o: o.seconds)
    return sorted(
        found, key=lambda o: o.device_hours if o.cost is None else o.cost
    )  # one that does not fit has neither, and comes last


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
    """One training step of a compiled Keras model, or any jittable training step, under a plan on a machine, owned or not: its timeline.

    The plan is a Plan, a plan's file, or a name: "found" (the fastest, searched for), or one of what an expert would write ("dp", "owt",
    "tensor parallel", ...: `named_plan`).
    """
    return simulate_captured(
        capture(model, batch_size, batch, args), machine_of(machine, devices), plan, report
    )


def simulate_captured(
    captured: Any, machine: Machine, plan: Plan | str | Path = "found", report: Report | None = None
) -> Timeline:
    """`simulate` for a step that is captured already."""
    return simulated(captured.graph, machine, named_plan(plan, captured.graph, machine, report))


SHORT = {
    "dp": "data parallel",
    "tp": "tensor parallel",
    "owt": "one weird trick",
    "fsdp": "ZeRO-3",
    "dp-tp": "data x tensor",
    "one": "one device",
}


def named_plan(
    plan: Plan | str | Path, graph: OperatorGraph, machine: Machine, report: Report | None = None
) -> Plan:
    """The plan of that name or file for a graph on a machine, checked; PlanError says which names there are."""
    if isinstance(plan, Plan):
        return check_plan(plan, graph, machine)
    name = SHORT.get(str(plan).lower(), str(plan))
    plain = {n.lower().replace(" ", "-"): n for n in BASELINES}
    if name == "found":
        return found(graph, machine, report)
    if name in BASELINES or name.lower().replace(" ", "-") in plain:
        return BASELINES[plain.get(name.lower().replace(" ", "-"), name)](
            graph, machine.name, mesh_of(machine)
        )
    if not Path(name).exists():
        names = ", ".join(sorted({*SHORT, *(n for n in plain if n not in SHORT)}))
        raise PlanError(
            f"There is no plan file {str(plan)!r}, nor a plan of that name. Give a file that 'partita plan --save-plan' wrote, 'found', or one of {names}."
        )
    return check_plan(Plan.load(name), graph, machine)


@dataclass(frozen=True)
class Compared:
    """One plan of a comparison: what it is predicted, and if asked for, measured to take."""

    name: str
    plan: Plan
    prediction: Prediction
    fits: bool
    measured: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Every baseline and the found plan, fastest first by prediction."""

    graph: str
    machine: str
    rows: tuple[Compared, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return {
            "graph": self.graph,
            "machine": self.machine,
            "plans": [
                {
                    "name": r.name,
                    "fits": r.fits,
                    "measured_seconds": r.measured,
                    **r.prediction.to_json(),
                }
                for r in self.rows
            ],
        }


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
    """Every baseline and the found plan side by side; with `measure`, each is compiled and timed on the devices at hand."""
    captured = capture(model, batch_size, batch)
    return compare_captured(
        captured, machine_of(machine, devices), measure, report, measure_operators
    )


def compare_captured(
    captured: Any,
    machine: Machine,
    measure: bool = False,
    report: Report | None = None,
    measure_operators: bool = False,
    say: Say | None = None,
) -> Comparison:
    """`compare` for a step that is captured already."""
    result = searched(captured, machine, report, measure_operators, say)
    plans = {**{n: p for n, (p, _) in result.baselines.items()}, "found": result.plan}
    predictions = {**{n: p for n, (_, p) in result.baselines.items()}, "found": result.prediction}
    times: Mapping[str, float | None] = {}
    if measure:
        from partita.execute.measure import step_seconds

        times = step_seconds(captured, plans)
    rows = [
        Compared(n, plans[n], predictions[n], fits(machine, predictions[n]), times.get(n))
        for n in plans
    ]
    return Comparison(
        captured.graph.name, machine.name, tuple(sorted(rows, key=lambda r: r.prediction.seconds))
    )


def _step(program: Any, args: Sequence[Any] | None) -> Any:
    """A training step that was given with the arguments of a call; CaptureError where it is something else."""
    if not callable(program):
        raise CaptureError(
            f"A {type(program).__name__} cannot be parallelized. Give a Keras model, or a function: "
            "partita.parallelize(train_step, (params, opt_state, batch))."
        )
    if args is None or isinstance(args, (str, dict)) or not isinstance(args, Sequence):
        raise CaptureError(
            f"The step '{getattr(program, '__name__', program)}' needs the arguments of a call, arrays or shapes, as a tuple: "
            "partita.parallelize(train_step, (params, opt_state, batch))."
        )
    return program


def parallelize(
    model: Any,
    args: Sequence[Any] | None = None,
    *,
    devices: int | None = None,
    machine: str | Machine | None = None,
    plan: Plan | str | Path | None = None,
    static_argnums: Sequence[int] = (),
    donate: bool | None = None,
    measure_operators: bool = False,
    say: Callable[[str], None] | None = None,
    report: Report | None = None,
) -> Any:
    """The same program, training over several devices by the plan given, else by the best one found.

    A Keras model, built or not, compiled or not: planning waits for the first batch of its `fit`; weights are moved, never made
    anew. Any jittable training step (plain JAX, Optax, Linen, NNX, Equinox) with the `args` of a call, arrays or shapes: what
    comes back is called like it. The arguments that it gives back changed are its state. The old state is donated, as `jax.jit` of
    the step says; of a step that is not jitted yet always, unless `donate` says otherwise.

    In a script under `partita run` or `partita plan`, the command's devices and plan are taken where none are given here.

    >>> step = parallelize(train_step, (params, opt_state, batch))       # doctest: +SKIP
    >>> params, opt_state, loss = step(params, opt_state, batch)         # doctest: +SKIP
    """
    from partita.execute.function import ParallelStep, current

    session = current()
    unsaid = devices is None and machine is None and plan is None
    wanted = (
        session.planner
        if session is not None and unsaid
        else planner(devices, machine, plan, report, measure=measure_operators)
    )
    say = say if say is not None or session is None else session.say
    if is_model(model):
        from partita.keras.fit import attach, attached

        attach(model, wanted, report=say)
        if session is not None:
            session.started.append(attached(model))
        return model
    step = ParallelStep(
        _step(model, args), wanted, static_argnums=static_argnums, donate=donate, say=say
    )
    step.prepare(args or ())
    if session is not None:
        session.started.append(step)
    return step


def planner(
    devices: int | None = None,
    machine: str | Machine | None = None,
    plan: Plan | str | Path | None = None,
    report: Report | None = None,
    seen: Callable[[Any, Machine, Plan], None] | None = None,
    measure: bool = False,
    say: Say | None = None,
) -> Callable[..., Plan]:
    """What turns a captured step into its plan: the given one if it fits, else a search. `seen` is told of it.

    With `measure`, operators are timed first, which `say` is told of. Given the error of a compiler that refused the plan for its memory, it finds the next one.
    """
    given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    from partita.execute.processes import from_first

    def choose(captured: Any, refused: MemoryBudgetError | None = None) -> Plan:
        where = machine_of(machine, devices or (given.devices if given is not None else None))
        if refused is not None:
            return _smaller(captured.graph, where, given, refused, report)
        if given is not None:
            chosen = check_plan(given, captured.graph, where)
        else:
            timed = (
                timed_search(captured, where, report, say, None)
                if measure and here(machine)
                else None
            )
            best = lambda: json.dumps(
                explained(timed or searched(captured, where, report)).to_json()
            )  # noqa: E731
            chosen = Plan.from_json(json.loads(from_first("plan", best)))
        if seen is not None:
            seen(captured, where, chosen)
        return chosen

    return choose


def _smaller(
    graph: OperatorGraph,
    machine: Machine,
    given: Plan | None,
    refused: MemoryBudgetError,
    report: Report | None,
) -> Plan:
    """The fastest plan that fits when the compiler's word is taken; a given plan is not replaced, but the error names the other."""
    nearest = explained(find(graph, machine, report, refused.excess or 1.0))
    if given is None:
        return nearest
    need, seconds = (
        nearest.predicted["peak_bytes"] * (refused.excess or 1.0),
        nearest.predicted["seconds"],
    )
    raise MemoryBudgetError(
        f"{refused} The nearest plan that fits: {describe(nearest)}; {format_bytes(int(need))} a device, a step predicted at "
        f"{format_seconds(seconds)}. Leave the plan away to run it."
    )


def describe(plan: Plan) -> str:
    """A plan in a few words: how many operators each kind of split is used for, and how variables are stored."""
    if not plan.mesh.axes:
        return "one device"
    splits = [
        {kind for kind in choice.values() if placed_slice(kind) is None}
        for choice in plan.choices.values()
    ]
    kinds = Counter(kind[0] for found in splits for kind in found)
    split = ", ".join(
        f"{count} of {len(plan.choices)} operators by {kind}" for kind, count in kinds.most_common()
    )
    stored = f", {len(plan.storage)} variables stored in parts" if plan.storage else ""
    staged = f", {stage_count(plan)} stages" if stage_count(plan) > 1 else ""
    if staged and not is_pipeline(plan):
        staged = f", {sum(any(placed_slice(use) is not None for use in choice.values()) for choice in plan.choices.values())} placed"
    staged += f", {plan.microbatches} microbatches" if plan.microbatches > 1 else ""
    return f"{split or 'nothing split'}{stored}{staged}{', recomputing' if plan.recompute else ''}"


def check_plan(given: Plan, graph: OperatorGraph, machine: Machine) -> Plan:
    """A loaded plan, if it fits this graph and the devices at hand; PlanError says what to do otherwise."""
    if given.devices > machine.devices:
        raise PlanError(
            f"The plan '{given.name}' is for {given.devices} devices; {machine.name} has {machine.devices}. "
            f"Plan again for {machine.devices}, or run with --devices {given.devices}."
        )
    same_model = set(given.choices) == {o.name for o in graph.operators}
    if (
        same_model
        and given.batch_size
        and graph.batch_size
        and given.batch_size != graph.batch_size
    ):
        given = fit_plan(given, graph)
    return fit_mesh(check(given, graph), machine)


def predicted(graph: OperatorGraph, machine: Machine, plan: Plan) -> Prediction:
    """What a plan is predicted to cost on a machine."""
    return simulated_prediction(graph, machine, check(plan, graph))


def layout_map(plan: Plan, model: Any, batch_size: int | None = None) -> Any:
    """A `keras.distribution.LayoutMap` that lays the model's variables out as the plan does.

    Keras then partitions the step by its own propagation: the variables' layouts are the plan's, the rest is XLA's guess.
    """
    import keras

    captured = capture(model, batch_size or plan.batch_size)
    where = layout_of(captured.graph, check(plan, captured.graph))
    wanted = {
        a.path: [tuple(axes) for axes in where.shardings[a.tensor]]
        for a in captured.graph.arguments
        if a.role == "parameter"
    }
    # A Keras layout takes one axis per dim: axes that always split a dim together become one.
    blocks = sorted(
        {axes for dims in wanted.values() for axes in dims if axes}, key=lambda b: (-len(b), b)
    )
    kept: list[tuple[int, ...]] = []
    for block in blocks:
        if any(set(block) & set(other) for other in kept):
            path = next(p for p, dims in wanted.items() if block in dims)
            raise PlanError(
                f"This plan has no LayoutMap: it splits a dim of '{path}' over part of the axes that another variable's dim is "
                f"split over, and a Keras layout takes one whole axis per dim. Use partita.parallelize(model, plan=plan) instead."
            )
        kept.append(block)
    used = {x for block in kept for x in block}
    grid = sorted([*kept, *((x,) for x in range(len(plan.mesh.axes)) if x not in used)])
    if [x for block in grid for x in block] != list(range(len(plan.mesh.axes))):
        raise PlanError(
            "This plan has no LayoutMap: the axes that it combines are not neighbours. Use partita.parallelize(model, plan=plan) instead."
        )
    names = {block: "_".join(plan.mesh.axes[x].name for x in block) for block in grid}
    shape = [math.prod(plan.mesh.sizes[x] for x in block) for block in grid]
    at_hand = keras.distribution.list_devices()
    if len(at_hand) < plan.devices:
        raise PlanError(
            f"The plan is for {plan.devices} devices, and Keras sees {len(at_hand)}. Plan again for {len(at_hand)}."
        )
    device_mesh = keras.distribution.DeviceMesh(
        shape or [1], list(names.values()) or ["a"], at_hand[: plan.devices]
    )
    found_map = keras.distribution.LayoutMap(device_mesh)
    for path, dims in wanted.items():
        found_map[path] = tuple(names[axes] if axes else None for axes in dims)
    return found_map

"""Predicted against measured: steps of models under plans on the devices of this machine.

Each model is measured by a process or a group of processes of its own, as users train it: memory
that other models leave behind can change a step threefold. `measured_machine` measures rates and
links once, as `partita machine measure` does. `measure` times a model's operators and a step under
every plan, with the plans taking turns. `predictions` then predicts each step in three ways
(`WAYS`): from rates and links; from a fit to operators of the other models; from its own timed
operators. `summary` gives the accuracy of one way. PARTITA_CACHE names the folder that these
processes share.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from partita.bench.fidelity_models import MODELS
from partita.capture.jax_functions import Captured
from partita.capture.program import capture_program
from partita.cost.terms import cost_terms
from partita.errors import PartitaError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, fitted_times
from partita.planning import predict_plan, search_measured
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan
from partita.search.candidates import candidates, names_of
from partita.search.find import PlanResult, find, mesh_of
from partita.search.pipelines import PipelineSpace, Sketch
from partita.search.staged_bound import StagedBound
from partita.simulation.pipelined import PipelinedStep

WAYS = ("rates", "fitted", "measured")
"""Basis of a prediction: rates and links, a fit to other models' operators, timed operators."""
MIN_PLANS = 6
"""Smallest number of plans of a model on several devices; random plans fill the rest."""
ROUNDS = 5
"""Measured rounds."""

MICROBATCHES = 2
"""Microbatches per stage of the measured pipeline."""
MAX_PLANS = 1000
"""Largest number of plans of a model, by default more than there are."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """Size of a measurement."""

    rounds: int = ROUNDS
    plans: int = MAX_PLANS
    """Largest number of plans of a model: the chosen one, data parallel, a random one, others."""


def _report_nothing(text: str) -> None:
    pass


@dataclass(frozen=True)
class Step:
    """A model's step under a plan: measured (median) and predicted seconds."""

    place: str
    """Devices or processes that ran it: "1 device", "2 processes"."""
    model: str
    plan: str
    chosen: bool
    """Whether Partita chooses this plan with timed operators."""
    seconds: float
    rates: float
    fitted: float | None
    """Prediction from other models; None if there is no other model."""
    measured: float
    fit_error: float | None
    """Relative error that the fit to the other models states."""
    shares: Mapping[str, float]
    """Fraction of the compute of `measured` whose operators are "measured" or "fitted"."""


@dataclass(frozen=True)
class Summary:
    """Accuracy of predictions: relative errors, and Kendall's tau (None below two steps)."""

    steps: int
    median: float
    p95: float
    worst: float
    tau: float | None
    tau_within: tuple[float, float] | None
    """Tau over the plans of one model: (median, lowest) of the models."""


def summary(steps: Sequence[Step], way: str) -> Summary | None:
    """Accuracy of one of `WAYS`; None if it predicted no step."""
    predicted = [step for step in steps if getattr(step, way) is not None]
    if not predicted:
        return None
    errors = sorted(abs(getattr(step, way) / step.seconds - 1) for step in predicted)
    pairs_by_model: dict[Any, list[tuple[float, float]]] = {}
    for step in predicted:
        pair = (getattr(step, way), step.seconds)
        pairs_by_model.setdefault((step.place, step.model), []).append(pair)
    taus = []
    for pairs in pairs_by_model.values():
        value = tau(pairs)
        if value is not None:
            taus.append(value)
    return Summary(
        steps=len(predicted),
        median=statistics.median(errors),
        p95=percentile(errors, 0.95),
        worst=errors[-1],
        tau=tau([(getattr(step, way), step.seconds) for step in predicted]),
        tau_within=(statistics.median(taus), min(taus)) if taus else None,
    )


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest of sorted values that at least this fraction of them does not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0, 3.0, 4.0], 0.95)
    (2.0, 4.0)
    """
    return values[max(0, math.ceil(part * len(values)) - 1)]


def tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau of (predicted, measured) seconds; None for one pair, or if all are equal.

    >>> tau([(1.0, 2.0), (2.0, 3.0), (3.0, 9.0)]), tau([(1.0, 3.0), (2.0, 2.0)]), tau([(1.0, 1.0)])
    (1.0, -1.0, None)
    """
    from scipy.stats import kendalltau

    if len(pairs) < 2:
        return None
    predicted = [pair[0] for pair in pairs]
    measured = [pair[1] for pair in pairs]
    result: Any = kendalltau(predicted, measured)
    return None if math.isnan(result[0]) else float(result[0])


def chosen_over_best(steps: Iterable[Step]) -> dict[tuple[str, str], float]:
    """Measured step of the chosen plan over the fastest one, per (place, model) with several
    plans.
    """
    steps_by_model: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        steps_by_model.setdefault((step.place, step.model), []).append(step)
    ratios = {}
    for key, group in steps_by_model.items():
        if len(group) > 1:
            chosen = next(step.seconds for step in group if step.chosen)
            ratios[key] = chosen / min(step.seconds for step in group)
    return ratios


def summaries(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """A row per place and way, then for all places together, as JSON values."""
    places = list(dict.fromkeys(step.place for step in steps))
    if len(places) > 1:
        places.append("all")
    rows = []
    for place in places:
        group = [step for step in steps if place in (step.place, "all")]
        for way in WAYS:
            accuracy = summary(group, way)
            if accuracy is not None:
                rows.append(_summary_row(place, way, accuracy, group))
    return rows


def _summary_row(
    place: str,
    way: str,
    accuracy: Summary,
    steps: Sequence[Step],
) -> dict[str, Any]:
    ratios = sorted(chosen_over_best(steps).values()) if way == "measured" else []
    errors = [step.fit_error for step in steps if step.fit_error is not None]
    return {
        "place": place,
        "way": way,
        **vars(accuracy),
        "chosen_over_best": (statistics.median(ratios), ratios[-1]) if ratios else None,
        "fit_error": statistics.median(errors) if errors and way == "fitted" else None,
    }


def chosen_models(text: str) -> list[str]:
    """The models of a comma-separated list; all for an empty one.

    PartitaError names the choices.
    """
    names = [part.strip() for part in text.split(",") if part.strip()] or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise PartitaError(
                f"'{name}' is not a model of this benchmark: use one of {', '.join(MODELS)}."
            )
    return names


def settings(devices: str, processes: str) -> list[tuple[int, int]]:
    """(processes, devices) of each setting, from the counts of the command line.

    >>> settings("1,2", "2"), settings("", "4")
    ([(1, 1), (1, 2), (2, 2)], [(4, 4)])
    """
    pairs = [(1, count) for count in _counts(devices, "--devices", 1)]
    pairs += [(count, count) for count in _counts(processes, "--processes", 2)]
    if not pairs:
        raise PartitaError(
            "No setting is left to measure: give --devices, --processes or both, as in "
            "--devices 1,2."
        )
    return pairs


def _counts(text: str, option: str, minimum: int) -> list[int]:
    counts = []
    for part in text.split(","):
        part = part.strip()
        if not part:
            continue
        if not part.isdigit() or int(part) < minimum:
            raise PartitaError(
                f"{option} has {part!r}: write whole numbers of at least {minimum}, separated by "
                f"commas, as in {option} 2,4."
            )
        counts.append(int(part))
    return counts


# Plans


def plans_of(
    graph: OperatorGraph,
    machine: Machine,
    baselines: Mapping[str, Plan],
    chosen: Plan,
    by_rates: Plan,
    most: int = MAX_PLANS,
) -> tuple[dict[str, Plan], str]:
    """(plans to measure, each a distinct program; name of the chosen one).

    The plans are the baselines, with a pipeline, `chosen` (found with timed operators), `by_rates`
    (found without), and random plans, at least one and enough to reach `MIN_PLANS`. One device has
    one plan. At most `most` remain, in the order of `Effort.plans`.
    """
    if machine.devices == 1:
        return {"one device": baselines["one device"]}, "one device"
    by_program: dict[str, tuple[str, Plan]] = {}
    named = {**baselines, "found": chosen, "found by rates": by_rates}
    for name, plan in named.items():
        by_program.setdefault(program(plan), (name, plan))
    missing = max(1, MIN_PLANS - len(by_program))
    for seed in range(1, 4 * missing + 1):
        plan = random_plan(graph, machine, mesh_of(machine), seed)
        if missing and program(plan) not in by_program:
            by_program[program(plan)] = (f"random {seed}", plan)
            missing -= 1
    plans = dict(by_program.values())
    chosen_name = by_program[program(chosen)][0]
    preferred = dict.fromkeys([chosen_name, "data parallel", list(plans)[-1], *plans])
    names = [name for name in preferred if name in plans]
    return {name: plans[name] for name in names[:most]}, chosen_name


def program(plan: Plan) -> str:
    """A text that is equal for plans with the same program.

    Data x tensor is data parallel on two devices, and ZeRO-2 is ZeRO-1.
    """
    stored = sorted((path, s.dim, s.axes, s.zero == 3) for path, s in plan.storage.items())
    return repr((plan.devices, plan.microbatches, plan.to_json()["operators"], stored))


def pipeline(graph: OperatorGraph, result: PlanResult) -> Plan | None:
    """The fastest plan with a stage per device of the first axis and two microbatches a stage.

    None on one device, and for a step that cannot be cut.
    """
    network = result.network
    space = PipelineSpace(StagedBound(graph, network.placement, network.terms), math.inf)
    for shape in space.shapes(1) if space.mesh.axes else ():
        if shape.rematerialize or shape.microbatches != MICROBATCHES * shape.stages:
            continue
        sketch = space.sketch(shape, math.inf, tries=1)
        step = space.simulate(sketch) if isinstance(sketch, Sketch) else None
        return check(step.plan, graph) if isinstance(step, PipelinedStep) else None
    return None


def random_plan(
    graph: OperatorGraph,
    machine: Machine,
    mesh: Mesh,
    seed: int,
) -> Plan:
    """A legal plan with a random choice per kind of operator, as equal operators have in real
    plans.
    """
    generator = random.Random(seed)
    position_by_kind: dict[Any, float] = {}
    choices = {}
    for number, operator in enumerate(graph.operators):
        options = candidates(graph, number, mesh)
        factors = [graph.factors[f] for f in operator.factors]
        kind = (operator.kind, tuple((factor.name, factor.size) for factor in factors))
        position = position_by_kind.setdefault(kind, generator.random())
        option = options[int(position * len(options))]
        choices[operator.name] = names_of(graph, mesh, option)
    plan = Plan(
        graph.name,
        machine.name,
        mesh,
        choices,
        name="random",
        batch_size=graph.batch_size,
    )
    return check(plan, graph)


# Measurement


RATES_FILE = "rates.json"
MEASUREMENTS_FILE = "{}.measured.json"
"""File of a model."""


@dataclass(frozen=True)
class MeasuredModel:
    """One model with its plans and their measured seconds."""

    model: str
    plans: dict[str, Plan]
    chosen: str
    seconds: dict[str, float]

    def save(self, folder: Path) -> None:
        """Writes the measurements for `load`."""
        plans = {name: plan.to_json() for name, plan in self.plans.items()}
        text = json.dumps({**vars(self), "plans": plans})
        (folder / MEASUREMENTS_FILE.format(self.model)).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, model: str, folder: Path) -> MeasuredModel:
        """The measurements of a model that `save` wrote."""
        text = (folder / MEASUREMENTS_FILE.format(model)).read_text(encoding="utf-8")
        values = json.loads(text)
        plans = {name: Plan.from_json(value) for name, value in values.pop("plans").items()}
        return cls(plans=plans, **values)


def measured_machine(folder: Path, report: Report = _report_nothing) -> Machine:
    """The devices of this machine with rates and links, measured once for a folder in a minute.

    All processes of a group call it together.
    """
    from partita.execute.calibrate import calibrate
    from partita.execute.devices import at_hand
    from partita.execute.processes import from_first, is_first

    path = folder / RATES_FILE
    text = from_first("rates", lambda: path.read_text("utf-8") if path.exists() else "")
    if not text:
        rates = calibrate(at_hand(), lambda subject: report(f"measuring {subject}"))
        text = from_first("rates", lambda: json.dumps(rates.values))
        if is_first():
            path.write_text(text, encoding="utf-8")
    return at_hand().revised(json.loads(text), "measured for this run")


def measure(
    name: str,
    machine: Machine,
    effort: Effort = Effort(),
    report: Report = _report_nothing,
) -> MeasuredModel:
    """The measured steps of a model, in about a minute. `machine` has measured rates and links.

    All processes of a group call it together.
    """
    from partita.execute.measure import step_seconds
    from partita.execute.operators import measured_operators
    from partita.execute.processes import from_first

    report(f"{name}: timing operators, searching a plan")
    captured = _captured(name)
    result = search_measured(captured, machine)
    text = from_first(
        "plans to measure", lambda: _plans_to_measure(captured, result, machine, effort.plans)
    )
    chosen, plan_texts = json.loads(text)
    plans = {plan_name: Plan.from_json(value) for plan_name, value in plan_texts.items()}
    measured_operators(captured, machine, list(plans.values()))
    report(f"{name}: compiling and timing {len(plans)} plan{'s' if len(plans) > 1 else ''}")
    seconds = step_seconds(captured, plans, effort.rounds)
    return MeasuredModel(name, plans, chosen, dict(seconds))


def _captured(name: str) -> Captured:
    """The step of a model, named after it, with the same names of layers in every process."""
    import keras

    keras.utils.clear_session()
    model, batch = MODELS[name]()
    captured = capture_program(model, batch)
    return replace(captured, graph=replace(captured.graph, name=name))


def _plans_to_measure(
    captured: Any,
    result: Any,
    machine: Machine,
    most: int,
) -> str:
    """JSON of (name of the chosen plan, plans by name).

    Several processes run no plan of one device.
    """
    from partita.execute.processes import alone

    baselines = {name: plan for name, (plan, _) in result.baselines.items()}
    staged = pipeline(captured.graph, result)
    if staged is not None:
        baselines["pipeline"] = staged

    def usable(plan: Plan) -> Plan:
        return plan if plan.devices > 1 or alone() else baselines["one device"]

    chosen_plan = usable(result.plan)
    by_rates = usable(find(captured.graph, machine).plan)
    plans, chosen = plans_of(
        captured.graph,
        machine,
        baselines,
        chosen_plan,
        by_rates,
        most,
    )
    return json.dumps([chosen, {name: plan.to_json() for name, plan in plans.items()}])


def predictions(measurements: Sequence[MeasuredModel], machine: Machine) -> list[Step]:
    """The measured steps with their predictions. `machine` has no times of operators: those that
    `measure` wrote are read.

    All processes of a group call it together.
    """
    from partita.execute.calibrate import key_of
    from partita.execute.operators import file_of_operators, load, measured_operators

    place = _place(machine)
    records = load(file_of_operators(machine), key_of(machine.devices)).values()
    steps = []
    for measurement in measurements:
        captured = _captured(measurement.model)
        graph = captured.graph
        timed = measured_operators(captured, machine, list(measurement.plans.values()))
        terms = cost_terms(graph, machine.backend)
        digests = {operator.digest for operator in terms.operators}
        others = []
        for record in records:
            if record["digest"] not in digests and record["model"] != graph.name:
                others.append(record)
        fitted = replace(machine, times=fitted_times(others)) if others else None
        for name in measurement.plans:
            step = _predicted_step(measurement, name, graph, (machine, fitted, timed), place)
            steps.append(step)
    return steps


def _place(machine: Machine) -> str:
    import jax

    processes = jax.process_count()
    if processes > 1:
        return f"{processes} processes"
    return f"{machine.devices} device{'' if machine.devices == 1 else 's'}"


def _predicted_step(
    measurement: MeasuredModel,
    name: str,
    graph: OperatorGraph,
    machines: tuple[Machine, Machine | None, Machine],
    place: str,
) -> Step:
    """A measured step of a graph. `machines`: with rates alone, with a fit to other models' times,
    and with the times of the model's own operators."""
    rates, fitted, timed = machines
    plan = measurement.plans[name]
    by_operators = predict_plan(graph, timed, plan)
    compute = sum(operator.compute for operator in by_operators.operators) or 1.0
    shares = {}
    for source in ("measured", "fitted"):
        seconds = [o.compute for o in by_operators.operators if o.source == source]
        shares[source] = sum(seconds) / compute
    fit_error = None
    fitted_seconds = None
    if fitted is not None:
        fitted_seconds = predict_plan(graph, fitted, plan).seconds
        fit_error = fitted.times.error if fitted.times else None
    return Step(
        place=place,
        model=measurement.model,
        plan=name,
        chosen=name == measurement.chosen,
        seconds=measurement.seconds[name],
        rates=predict_plan(graph, rates, plan).seconds,
        fitted=fitted_seconds,
        measured=by_operators.seconds,
        fit_error=fit_error,
        shares=shares,
    )

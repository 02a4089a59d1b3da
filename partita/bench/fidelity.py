"""Predicted against measured: models under plans on the devices at hand, and how far off each way to predict is.

`run` measures in this process, or in all processes of a group together: rates and links once, as `partita machine measure` does, then per model
its operators and a step under every plan, the plans taking turns. Each step is predicted three ways (`WAYS`): by rates and links alone; by a
fit to operators of the other models, none of its own; and by its own operators, timed. `summary` says how good one way is. Nothing is read from
what the user has measured before, where PARTITA_CACHE names an empty folder.

The models are small ones of every kind that people train. Nothing in Partita is fitted to them.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import layers

from partita.capture.program import capture_program
from partita.cost.terms import cost_terms
from partita.errors import PartitaError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, fitted_times
from partita.planning import predict_plan, search_measured
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan
from partita.search.candidates import candidates, names_of
from partita.search.find import find, mesh_of

WAYS = ("rates", "fitted", "measured")
"""By what a step is predicted: what `machine measure` finds; a fit to other models' operators; operators that were timed."""
LEAST = 6
"""Plans of a model on several devices, at least: as many are made at random as are missing."""
ROUNDS = 5


@dataclass(frozen=True)
class Step:
    """A model's step under a plan: seconds measured (median) and predicted. `fitted` is None where there is no other model to fit to."""

    place: str
    """What it ran on: "1 device", "2 processes"."""
    model: str
    plan: str
    chosen: bool
    """Whether this is the plan that Partita finds with operators timed."""
    seconds: float
    rates: float
    fitted: float | None
    measured: float
    fit_error: float | None
    """The error that the fit to the other models states of itself."""
    shares: Mapping[str, float]
    """The part of the compute of the `measured` prediction whose operators were "measured" or "fitted"."""


@dataclass(frozen=True)
class Summary:
    """How near predictions come to measured steps: relative errors, and Kendall's tau (None of fewer than two steps)."""

    steps: int
    median: float
    p95: float
    worst: float
    tau: float | None
    tau_within: tuple[float, float] | None
    """Of the plans of a model: in the median, and the lowest."""


def summary(steps: Sequence[Step], way: str) -> Summary | None:
    """How good one of WAYS is; None where no step was predicted so."""
    pairs = [(s, value) for s in steps if (value := getattr(s, way)) is not None]
    if not pairs:
        return None
    errors = sorted(abs(value / s.seconds - 1) for s, value in pairs)
    cells: dict[Any, list[tuple[float, float]]] = {}
    for s, value in pairs:
        cells.setdefault((s.place, s.model), []).append((value, s.seconds))
    within = sorted(t for cell in cells.values() if (t := tau(cell)) is not None)
    return Summary(
        len(pairs),
        statistics.median(errors),
        percentile(errors, 0.95),
        errors[-1],
        tau([(value, s.seconds) for s, value in pairs]),
        (statistics.median(within), within[0]) if within else None,
    )


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest of sorted values that at least this part of them does not exceed.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5), percentile([1.0, 2.0, 3.0, 4.0], 0.95)
    (2.0, 4.0)
    """
    return values[max(0, math.ceil(part * len(values)) - 1)]


def tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau of predicted and measured times; None for a single one, or where all are alike.

    >>> tau([(1.0, 2.0), (2.0, 3.0), (3.0, 9.0)]), tau([(1.0, 3.0), (2.0, 2.0)]), tau([(1.0, 1.0)])
    (1.0, -1.0, None)
    """
    from scipy.stats import kendalltau

    if len(pairs) < 2:
        return None
    result: Any = kendalltau(
        [predicted for predicted, _ in pairs], [seconds for _, seconds in pairs]
    )
    return None if math.isnan(result[0]) else float(result[0])


def chosen_over_best(steps: Iterable[Step]) -> dict[tuple[str, str], float]:
    """Per model with several plans, the measured step of the plan found over the fastest one's."""
    cells: dict[tuple[str, str], list[Step]] = {}
    for s in steps:
        cells.setdefault((s.place, s.model), []).append(s)
    return {
        cell: next(s.seconds for s in found if s.chosen) / min(s.seconds for s in found)
        for cell, found in cells.items()
        if len(found) > 1
    }


def summaries(steps: Sequence[Step]) -> list[dict[str, Any]]:
    """Per setting, and for all of them together, one row for each of WAYS that something was predicted by."""
    places = list(dict.fromkeys(s.place for s in steps))
    rows = []
    for place in (*places, *(["all"] if len(places) > 1 else [])):
        here = [s for s in steps if place in (s.place, "all")]
        over = sorted(chosen_over_best(here).values())
        for way in WAYS:
            found = summary(here, way)
            if found is not None:
                chosen = (statistics.median(over), over[-1]) if over and way == "measured" else None
                said = (
                    [s.fit_error for s in here if s.fit_error is not None]
                    if way == "fitted"
                    else []
                )
                rows.append(
                    {
                        "place": place,
                        "way": way,
                        **vars(found),
                        "chosen_over_best": chosen,
                        "fit_error": statistics.median(said) if said else None,
                    }
                )
    return rows


def chosen_models(text: str) -> list[str]:
    """The models named, separated by commas; all where none is. PartitaError says which there are."""
    names = [n for n in (part.strip() for part in text.split(",")) if n] or list(MODELS)
    unknown = [n for n in names if n not in MODELS]
    if unknown:
        raise PartitaError(
            f"There is no model {unknown[0]!r} to bench. There are {', '.join(MODELS)}."
        )
    return names


def settings(devices: str, processes: str) -> list[tuple[int, int]]:
    """(processes, devices) to measure on, of counts as the command line has them.

    >>> settings("1,2", "2"), settings("", "4")
    ([(1, 1), (1, 2), (2, 2)], [(4, 4)])
    """
    counts = []
    for text, what, least in ((devices, "--devices", 1), (processes, "--processes", 2)):
        parts = [p for p in (part.strip() for part in text.split(",")) if p]
        wrong = [p for p in parts if not p.isdigit() or int(p) < least]
        if wrong:
            raise PartitaError(
                f"{what} has {wrong[0]!r}: write whole numbers of at least {least}, separated by commas, as in {what} 2,4."
            )
        counts.append([int(p) for p in parts])
    found = [(1, n) for n in counts[0]] + [(n, n) for n in counts[1]]
    if not found:
        raise PartitaError(
            "There is nothing to measure on: give --devices, --processes, or both, as in --devices 1,2."
        )
    return found


# --------------------------------------------------------------------------------------------------------------- plans


def plans_of(
    graph: OperatorGraph, machine: Machine, known: Mapping[str, Plan], chosen: Plan, by_rates: Plan
) -> tuple[dict[str, Plan], str]:
    """The plans to measure, each a program of its own, and the name of the one that is `chosen`.

    They are the `known` ones, what is found with and without timing operators, and plans at random, one or as many as LEAST asks for. On one device there is
    one.
    """
    if machine.devices == 1:
        return {"one device": known["one device"]}, "one device"
    found: dict[str, tuple[str, Plan]] = {}
    for name, plan in {**known, "found": chosen, "found by rates": by_rates}.items():
        found.setdefault(program(plan), (name, plan))
    missing = max(1, LEAST - len(found))
    for seed in range(1, 4 * missing + 1):
        plan = random_plan(graph, machine, mesh_of(machine), seed)
        if missing and program(plan) not in found:
            found[program(plan)] = (f"random {seed}", plan)
            missing -= 1
    return dict(found.values()), found[program(chosen)][0]


def program(plan: Plan) -> str:
    """What tells a plan's program from another's: data x tensor is data parallel on two devices, ZeRO-2 is ZeRO-1."""
    stored = sorted((path, s.dim, s.axes, s.zero == 3) for path, s in plan.storage.items())
    return repr((plan.devices, plan.to_json()["operators"], stored))


def random_plan(graph: OperatorGraph, machine: Machine, mesh: Mesh, seed: int) -> Plan:
    """A legal plan that gives every operator any of its choices; equal operators the same one, as in plans that people write."""
    dice, alike, choices = random.Random(seed), {}, {}
    for number, operator in enumerate(graph.operators):
        options = candidates(graph, number, mesh)
        kind = (
            operator.kind,
            tuple((graph.factors[f].name, graph.factors[f].size) for f in operator.factors),
        )
        wanted = alike.setdefault(kind, dice.random())
        choices[operator.name] = names_of(graph, mesh, options[int(wanted * len(options))])
    return check(
        Plan(graph.name, machine.name, mesh, choices, name="random", batch_size=graph.batch_size),
        graph,
    )


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass
class _Done:
    """One model, measured."""

    model: str
    graph: OperatorGraph
    plans: dict[str, Plan]
    chosen: str
    machine: Machine
    seconds: dict[str, float]


def run(
    models: Sequence[str], rounds: int = ROUNDS, say: Callable[[str], None] = lambda text: None
) -> list[Step]:
    """The steps of these models on the devices at hand; of several processes, which call this together, process 0 has them.

    Takes a minute for rates and links, and about one for each model.
    """
    from partita.execute.calibrate import calibrate
    from partita.execute.devices import at_hand
    from partita.execute.processes import from_first

    found = calibrate(at_hand(), lambda what: say(f"measuring {what}"))
    machine = at_hand().revised(
        json.loads(from_first("rates", lambda: json.dumps(found.values))), "measured for this run"
    )
    return measured(models, machine, rounds, say)


def measured(
    models: Sequence[str],
    machine: Machine,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda text: None,
) -> list[Step]:
    """`run` where the rates and links of the machine are known."""
    from partita.execute.measure import step_seconds
    from partita.execute.operators import measured_operators
    from partita.execute.processes import alone, from_first, is_first

    done: list[_Done] = []
    for number, name in enumerate(models, 1):
        say(f"model {number} of {len(models)}, {name}: timing operators, looking for a plan")
        model, batch = MODELS[name]()
        captured = capture_program(model, batch)
        result = search_measured(captured, machine)

        def wanted(captured: Any = captured, result: Any = result) -> str:
            known = {n: plan for n, (plan, _) in result.baselines.items()}
            best, by_rates = (
                p if p.devices > 1 or alone() else known["one device"]
                for p in (result.plan, find(captured.graph, machine).plan)
            )
            plans, chosen = plans_of(captured.graph, machine, known, best, by_rates)
            return json.dumps([chosen, {n: plan.to_json() for n, plan in plans.items()}])

        chosen, texts = json.loads(from_first("plans to measure", wanted))
        plans = {n: Plan.from_json(text) for n, text in texts.items()}
        timed = measured_operators(captured, machine, list(plans.values()))
        say(
            f"model {number} of {len(models)}, {name}: compiling and timing {len(plans)} plan{'s' if len(plans) > 1 else ''}"
        )
        done.append(
            _Done(name, captured.graph, plans, chosen, timed, step_seconds(captured, plans, rounds))
        )
    return predictions(done, machine) if is_first() else []


def predictions(done: Sequence[_Done], machine: Machine) -> list[Step]:
    """What was measured, with what is predicted; `machine` is the one without times of operators."""
    import jax

    from partita.execute.calibrate import key_of
    from partita.execute.operators import file_of_operators, load

    count, what = (
        (jax.process_count(), "process") if jax.process_count() > 1 else (machine.devices, "device")
    )
    place = f"{count} {what}{'' if count == 1 else 'es' if what == 'process' else 's'}"
    records = load(file_of_operators(machine), key_of(machine.devices)).values()
    found = []
    for d in done:
        own = {t.digest for t in cost_terms(d.graph, machine.backend).operators}
        others = [r for r in records if r["digest"] not in own and r["model"] != d.graph.name]
        fit = replace(machine, times=fitted_times(others)) if others else None
        for name, plan in d.plans.items():
            by_operators = predict_plan(d.graph, d.machine, plan)
            whole = sum(o.compute for o in by_operators.operators) or 1.0
            found.append(
                Step(
                    place,
                    d.model,
                    name,
                    name == d.chosen,
                    d.seconds[name],
                    predict_plan(d.graph, machine, plan).seconds,
                    predict_plan(d.graph, fit, plan).seconds if fit is not None else None,
                    by_operators.seconds,
                    fit.times.error if fit is not None and fit.times else None,
                    {
                        s: sum(o.compute for o in by_operators.operators if o.source == s) / whole
                        for s in ("measured", "fitted")
                    },
                )
            )
    return found


# -------------------------------------------------------------------------------------------------------------- models


def mlp() -> Any:
    model = keras.Sequential(
        [
            keras.Input((512,)),
            *(layers.Dense(1024, activation="relu") for _ in range(4)),
            layers.Dense(16),
        ]
    )
    model.compile("adam", "mse")
    return model, 256


def cnn() -> Any:
    blocks: list[Any] = [keras.Input((32, 32, 3))]
    for width in (32, 64, 128):
        blocks += [
            layers.Conv2D(width, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
        ]
    return classifier(
        keras.Sequential(
            [*blocks, layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dense(16)]
        ),
        "adam",
    ), 64


def alexnet() -> Any:
    """As in Krizhevsky 2014, 61 million parameters."""
    convolutions = [
        layers.Conv2D(64, 11, 4, padding="same", activation="relu"),
        layers.MaxPooling2D(3, 2),
        layers.Conv2D(192, 5, padding="same", activation="relu"),
        layers.MaxPooling2D(3, 2),
        layers.Conv2D(384, 3, padding="same", activation="relu"),
        layers.Conv2D(256, 3, padding="same", activation="relu"),
        layers.Conv2D(256, 3, padding="same", activation="relu"),
        layers.MaxPooling2D(3, 2),
    ]
    dense = [
        layers.Flatten(),
        layers.Dense(4096, activation="relu"),
        layers.Dense(4096, activation="relu"),
        layers.Dense(1000),
    ]
    return classifier(keras.Sequential([keras.Input((224, 224, 3)), *convolutions, *dense])), 32


def transformer() -> Any:
    words = keras.Input((64,), dtype="int32")
    x = layers.Embedding(8192, 256)(words)
    for _ in range(2):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, 64)(y, y, use_causal_mask=True)
        y = layers.LayerNormalization()(x)
        x = x + layers.Dense(256)(layers.Dense(1024, activation="gelu")(y))
    return classifier(keras.Model(words, layers.Dense(8192)(x))), 16


def resnet() -> Any:
    """ResNet-18 for images of 32 x 32 pixels."""
    image = keras.Input((32, 32, 3))
    x = layers.ReLU()(
        layers.BatchNormalization()(layers.Conv2D(64, 3, padding="same", use_bias=False)(image))
    )
    for stage, width in enumerate((64, 128, 256, 512)):
        for stride in (1 + (stage > 0), 1):
            y = layers.ReLU()(
                layers.BatchNormalization()(
                    layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
                )
            )
            y = layers.BatchNormalization()(
                layers.Conv2D(width, 3, padding="same", use_bias=False)(y)
            )
            if x.shape != y.shape:
                x = layers.BatchNormalization()(layers.Conv2D(width, 1, stride, use_bias=False)(x))
            x = layers.ReLU()(x + y)
    return classifier(keras.Model(image, layers.Dense(100)(layers.GlobalAveragePooling2D()(x)))), 32


def recommender() -> Any:
    inputs = [keras.Input((), dtype="int32", name=f"column{i}") for i in range(8)]
    x = layers.Concatenate()([layers.Embedding(50_000, 32)(i) for i in inputs])
    for width in (1024, 512, 256):
        x = layers.Dense(width, activation="relu")(x)
    return classifier(keras.Model(inputs, layers.Dense(2)(x))), 512


def lstm() -> Any:
    words = keras.Input((32,), dtype="int32")
    x = layers.Embedding(8192, 256)(words)
    x = layers.LSTM(512)(layers.LSTM(512, return_sequences=True)(x))
    return classifier(keras.Model(words, layers.Dense(8192)(x))), 64


def unet() -> Any:
    def block(x: Any, width: int) -> Any:
        for _ in range(2):
            x = layers.ReLU()(
                layers.BatchNormalization()(layers.Conv2D(width, 3, padding="same")(x))
            )
        return x

    image = keras.Input((64, 64, 3))
    x, kept = image, []
    for width in (16, 32, 64):
        kept.append(block(x, width))
        x = layers.MaxPooling2D()(kept[-1])
    x = block(x, 128)
    for width in (64, 32, 16):
        x = block(layers.Concatenate()([layers.Conv2DTranspose(width, 2, 2)(x), kept.pop()]), width)
    return classifier(keras.Model(image, layers.Conv2D(4, 1)(x)), "adam"), 16


def classifier(model: Any, optimizer: str = "") -> Any:
    """The model, compiled to learn classes; by momentum unless another optimizer is named."""
    model.compile(
        optimizer or keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


MODELS: Mapping[str, Callable[[], Any]] = {
    f.__name__: f for f in (mlp, cnn, alexnet, transformer, resnet, recommender, lstm, unet)
}
"""By name, what makes a compiled Keras model and the batch that it is trained with."""

"""Plans ranked by corrected costs after five probes, on simulated hardware not as described.

    python benchmarks/manage_costs.py --plans 60 --draws 10

For each saved graph, random plans for four devices are predicted on the machine as described. A
"measurement" is the prediction on a machine whose engines, memory, latency and links have other
figures, drawn once for each row of the table, with 3 % of noise; a quota slows its engines and
memory. The first probe is the best plan as described, each later one the best by the corrected
costs that was not probed. Prints the excess of the best-ranked plan over the best of all, before
and after the probes, and the part of the other plans inside their 90 % intervals.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from partita.cost.predict import Prediction, predict
from partita.cost.terms import Terms, cost_terms
from partita.errors import PlanError
from partita.graph.operator_graph import OperatorGraph
from partita.machine import Machine, load
from partita.management.plan_costs import CorrectedCosts
from partita.plans.baselines import BASELINES
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan, mesh_for
from partita.search.candidates import candidates, names_of

DATA = Path(__file__).parents[1] / "tests" / "data"
GRAPHS = ("mlp", "cnn", "transformer")
QUOTAS = (1.0, 0.5, 0.3)
PROBES = 5
NOISE = 0.03


def random_plans(graph: OperatorGraph, mesh: Mesh, count: int) -> list[Plan]:
    """Different legal plans: data parallel, with other splits of some operators."""
    draw = random.Random(0)
    base = BASELINES["data parallel"](graph, "host", mesh)
    plans = [base]
    while len(plans) < count:
        choices = dict(base.choices)
        part = draw.random()
        for number, operator in enumerate(graph.operators):
            if draw.random() < part:
                choice = draw.choice(candidates(graph, number, mesh))
                choices[operator.name] = names_of(graph, mesh, choice)
        try:
            plans.append(check(replace(base, choices=choices), graph))
        except PlanError:
            continue  # a split that XLA gets wrong
    return plans


def other_machine(machine: Machine, generator: np.random.Generator, quota: float) -> Machine:
    """The machine with other figures than those of its description."""
    values: dict[str, float] = {}
    factors: Mapping[str, tuple[float, float]] = {
        ".peak": (0.6, 1.4),
        ".bandwidth": (0.6, 1.4),
        ".latency": (0.5, 2.0),
    }
    for path, (value, _, _) in machine.provenance().items():
        for ending, (low, high) in factors.items():
            if path.endswith(ending) and isinstance(value, float | int):
                is_link = path.startswith("level.")
                factor = generator.uniform(low, high)
                values[path] = value * factor * (1.0 if is_link else quota)
    return machine.revised(values, "drawn at random", "assumed")


def excess(ranking: np.ndarray, measured: np.ndarray) -> float:
    """Seconds of the best-ranked plan over the least seconds, minus 1."""
    return float(measured[int(ranking.argmin())] / measured.min() - 1)


def row(predictions: list[Prediction], measured: np.ndarray) -> tuple[float, float, float]:
    """Excess before and after the probes, and the part of plans inside their intervals."""
    described = np.array([prediction.seconds for prediction in predictions])
    costs = CorrectedCosts()
    ranking = described.copy()
    probed: dict[int, float] = {}
    for _ in range(PROBES):
        unprobed = [number for number in range(len(ranking)) if number not in probed]
        chosen = min(unprobed, key=lambda number: ranking[number])
        probed[chosen] = float(measured[chosen])
        costs.probe(predictions[chosen], measured[chosen])
        corrected = [costs.seconds(prediction) for prediction in predictions]
        ranking = np.array([one.seconds for one in corrected])
        for number, seconds in probed.items():
            ranking[number] = seconds
    for number, one in enumerate(corrected):
        if number not in probed:
            ranking[number] = one.high
    inside = []
    for number, one in enumerate(corrected):
        if number not in probed:
            inside.append(one.low <= measured[number] <= one.high)
    return excess(described, measured), excess(ranking, measured), float(np.mean(inside))


def predictions_of(
    graph: OperatorGraph, machine: Machine, plans: list[Plan], terms: Terms
) -> list[Prediction]:
    return [predict(graph, machine, plan, terms) for plan in plans]


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--plans", type=int, default=60)
    parser.add_argument("--draws", type=int, default=10, help="machines for each row")
    parser.add_argument("--first", type=int, default=0, help="the first machine")
    parser.add_argument("--graphs", nargs="+", default=list(GRAPHS))
    arguments = parser.parse_args()
    machine = load("host:4")
    parts = []
    print("graph        quota  excess before / after probes (worst)  inside the 90 % interval")
    for name in arguments.graphs:
        graph = OperatorGraph.load(DATA / f"{name}.graph.json")
        terms = cost_terms(graph, machine.backend)
        plans = random_plans(graph, mesh_for((4,)), arguments.plans)
        described = predictions_of(graph, machine, plans, terms)
        for quota in QUOTAS:
            rows = []
            for seed in range(arguments.first, arguments.first + arguments.draws):
                generator = np.random.default_rng(seed)
                other = other_machine(machine, generator, quota)
                true = [p.seconds for p in predictions_of(graph, other, plans, terms)]
                noise = np.exp(generator.normal(0.0, NOISE, len(true)))
                rows.append(row(described, np.array(true) * noise))
            before, after, inside = np.mean(rows, 0)
            parts.append(inside)
            worst = max(figures[1] for figures in rows)
            print(
                f"{name:12} {quota:4.0%}  {before:9.1%} / {after:6.1%} ({worst:6.1%}) {inside:18.0%}"
            )
    print(f"inside the 90 % interval in the mean of the rows: {np.mean(parts):.1%}")


if __name__ == "__main__":
    main()

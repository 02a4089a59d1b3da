"""Corrected costs of plans: factors are found, and the interval narrows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from partita.cost.predict import Prediction, predict
from partita.graph.operator_graph import OperatorGraph
from partita.machine import load
from partita.management.plan_costs import CorrectedCosts
from partita.plans.baselines import BASELINES
from partita.plans.plan import mesh_for

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    graph = OperatorGraph.load(DATA / "mlp.graph.json")
    machine = load("host:4")
    plans = [
        BASELINES[name](graph, "host", mesh_for((4,)))
        for name in ("data parallel", "tensor parallel", "one weird trick")
    ]
    return [predict(graph, machine, plan) for plan in plans]


def measured(prediction: Prediction, kernels: float, links: float) -> float:
    """Seconds on hardware where kernels and exchanges take other times."""
    parts = prediction.by_cause()
    return parts.pop("compute") * kernels + sum(parts.values()) * links


def test_probes_find_the_factors_of_kernels_and_links(predictions: list[Prediction]) -> None:
    costs = CorrectedCosts()
    first = costs.seconds(predictions[0])
    assert first.seconds == pytest.approx(predictions[0].seconds)
    for _ in range(20):
        for prediction in predictions[:2]:
            costs.probe(prediction, measured(prediction, kernels=2.0, links=0.5))
    for prediction in predictions[:2]:
        corrected = costs.seconds(prediction)
        truth = measured(prediction, kernels=2.0, links=0.5)
        assert corrected.seconds == pytest.approx(truth, rel=0.15)
        assert corrected.high / corrected.low < first.high / first.low
    assert costs.seconds(predictions[0]).low < measured(predictions[0], 2.0, 0.5)


def test_one_probe_corrects_its_own_plan(predictions: list[Prediction]) -> None:
    costs = CorrectedCosts()
    prediction = predictions[0]
    costs.probe(prediction, 2.0 * prediction.seconds)
    corrected = costs.seconds(prediction)
    assert corrected.seconds == pytest.approx(2.0 * prediction.seconds, rel=0.02)
    # Other plans have kernels and links in other parts.
    assert costs.seconds(predictions[1]).high / costs.seconds(predictions[1]).low > 1.2


def test_a_scaled_prediction_needs_no_new_factor(predictions: list[Prediction]) -> None:
    costs = CorrectedCosts()
    costs.probe(predictions[0], predictions[0].seconds)
    assert costs.model.weights == pytest.approx(np.zeros(4), abs=1e-9)
    doubled = replace(predictions[0], seconds=2 * predictions[0].seconds)
    assert costs.seconds(doubled).seconds == pytest.approx(2 * predictions[0].seconds)

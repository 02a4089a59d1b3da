"""Plans with equal splits have one layout; values derived from a graph are computed once."""

from dataclasses import replace
from pathlib import Path

import pytest

from partita.graph.operator_graph import OperatorGraph, producers
from partita.machine import load
from partita.plans.baselines import baselines_of
from partita.plans.layout import layout_of
from partita.search.find import mesh_of

MACHINE = load("h100:4")


@pytest.fixture(scope="module")
def graph() -> OperatorGraph:
    return OperatorGraph.load(Path(__file__).parents[1] / "data/mlp.graph.json")


def test_plans_with_equal_splits_share_a_layout(graph):
    plans = {
        n: make(graph, MACHINE.name, mesh_of(MACHINE)) for n, make in baselines_of(graph).items()
    }
    plan = plans["data parallel"]
    assert layout_of(graph, replace(plan, name="found")) is layout_of(graph, plan)
    assert layout_of(graph, plans["ZeRO-3"]) != layout_of(graph, plan)
    assert layout_of(replace(graph), plan) is not layout_of(graph, plan)


def test_a_graph_keeps_its_values_while_others_come_and_go(graph):
    value = producers(graph)
    for _ in range(20):
        assert producers(replace(graph)) == value
    assert producers(graph) is value

"""The learned partitioner.

It recovers the costs behind synthetic times, splits optimally, and training with it gives the
numbers of one device.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import partita.gnn as gnn
from partita.errors import GraphError
from partita.gnn.kernels import stamp
from partita.gnn.nn import models
from partita.gnn.split import learned
from partita.gnn.split.choice import edge_seconds, row_seconds
from partita.gnn.split.learned import (
    Balance,
    Cost,
    Learner,
    best_points,
    features_of,
    initial_points,
    prefix_sums,
)
from partita.gnn.split.partition import arranged, by_edges, by_metis, by_vertices
from partita.machine import host


def skewed(vertices: int = 600, edges: int = 6000) -> gnn.Graph:
    """A graph whose first vertices have most in-edges, and whose last read the first more often."""
    random = np.random.default_rng(0)
    target = (random.random(edges) ** 3 * vertices).astype(int)
    source = (random.random(edges) ** 2 * vertices).astype(int)
    return gnn.Graph.from_edges(
        source,
        target,
        vertices,
        features=random.standard_normal((vertices, 6)),
        labels=random.integers(0, 3, vertices),
        train=random.random(vertices) < 0.5,
    )


def test_features_of_parts_are_those_counted_one_by_one() -> None:
    graph = gnn.Graph.from_edges([0, 1, 2, 70, 5, 5], [0, 0, 0, 0, 2, 2], 80)
    features = features_of(prefix_sums(graph), np.array([0, 1, 80]))
    assert features.tolist() == [[79, 1, 4, 2, 2, 0], [79, 79, 2, 1, 1, 0]]


def test_few_most_read_vertices_are_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "HOT", 1)
    assert prefix_sums(gnn.Graph.from_edges([3, 3, 1], [0, 1, 1], 4))[-1, 4] == 1


def test_the_fit_recovers_costs_and_a_slow_device_from_noisy_times() -> None:
    graph = skewed()
    sums, random = prefix_sums(graph), np.random.default_rng(1)
    truth = Cost(np.array([0, 2e-6, 1e-6, 0, 0, 0]), np.array([1.0, 1, 2, 1]))
    learner = Learner(4)
    for epoch in range(40):
        points = np.sort([0, *random.integers(0, graph.vertices, 3), graph.vertices])
        features = features_of(sums, points)
        seconds = (truth.slowness * (features @ truth.weights) + 1e-5) * random.lognormal(
            0, 0.03, 4
        )
        if epoch % 10 == 5:
            seconds[1] *= 8  # somebody else had the core
        cost = learner.add(features, seconds)
    assert cost.slowness / np.median(cost.slowness) == pytest.approx([1, 1, 2, 1], rel=0.08)
    points = by_edges(graph, 4)
    assert cost.seconds(sums, points) == pytest.approx(truth.seconds(sums, points) + 1e-5, rel=0.1)
    assert learner.error is not None and learner.error < 0.1
    assert (
        truth.seconds(sums, best_points(sums, cost)).max()
        < 1.05 * truth.seconds(sums, best_points(sums, truth)).max()
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 9)] * 5), min_size=1, max_size=9),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
    st.lists(st.sampled_from([0.5, 1, 2]), min_size=1, max_size=3),
)
def test_split_points_are_as_good_as_any(
    rows: list[tuple[int, ...]], weights: list[int], slowness: list[float]
) -> None:
    sums = np.concatenate([np.zeros((1, 5)), np.cumsum(np.array(rows, float), axis=0)])
    cost, vertices, parts = (
        Cost(np.array(weights, float), np.array(slowness)),
        len(rows),
        len(slowness),
    )
    inner = (
        np.stack(np.meshgrid(*[np.arange(vertices + 1)] * (parts - 1)), -1).reshape(-1, parts - 1)
        if parts > 1
        else [[]]
    )
    all_points = [
        np.array([0, *cuts, vertices], int) for cuts in inner if list(cuts) == sorted(cuts)
    ]
    points = best_points(sums, cost)
    assert points[0] == 0 and points[-1] == vertices and (np.diff(points) >= 0).all()
    fastest = min(cost.seconds(sums, p).max() for p in all_points)
    assert cost.seconds(sums, points).max() <= fastest * (1 + 1e-6) + 1e-9
    room = int(
        np.median([np.diff(sums[p][:, 1]).max() for p in all_points])
    )  # of edges, which about half of the splits fit into
    fitting = [p for p in all_points if np.diff(sums[p][:, 1]).max() <= room]
    points = best_points(sums, cost, vertices, room)
    if fitting:
        assert np.diff(sums[points][:, 1]).max() <= room
        assert (
            cost.seconds(sums, points, vertices).max()
            <= min(cost.seconds(sums, p, vertices).max() for p in fitting) * (1 + 1e-6) + 1e-9
        )


always = lambda points: True


def test_where_compiling_costs_more_than_it_gains_a_split_moves_as_far_as_there_is_capacity() -> (
    None
):
    graph = skewed()
    balance = Balance(prefix_sums(graph), by_edges(graph, 2))
    place = int(1.1 * np.diff(balance.sums[balance.points][:, 1]).max())
    for _ in range(3):
        balance.measured(
            features_of(balance.sums, balance.points)[:, 2] * np.array([3e-3, 1e-3]), 600, place
        )
    balance.learner.cost = Cost(np.array([0, 0, 1e-3, 0, 0, 0]), np.array([3.0, 1.0]))
    before = balance.points
    fits = lambda points: np.diff(balance.sums[points][:, 1]).max() <= place
    move = balance.better(10, 0.0, 1e6, fits)
    assert move is not None and fits(move[0]) and move[0][1] < before[1]


def test_where_a_split_does_not_fit_one_in_its_direction_is_taken() -> None:
    graph = skewed()
    balance = Balance(prefix_sums(graph), by_edges(graph, 2))
    for _ in range(3):
        balance.measured(
            features_of(balance.sums, balance.points)[:, 2] * np.array([3e-3, 1e-3]), 600
        )
    balance.learner.cost = Cost(np.array([0, 0, 1e-3, 0, 0, 0]), np.array([3.0, 1.0]))
    first, best = int(balance.points[1]), int(best_points(balance.sums, balance.learner.cost)[1])
    move = balance.better(10, 0.0, 1e6, lambda points: first - points[1] <= 0.6 * (first - best))
    assert (
        move is not None
        and move[0].tolist() == [0, first - int(0.5 * (first - best)), 600]
        and not move[1]
    )


def test_an_epoch_that_something_disturbed_teaches_nothing() -> None:
    graph, costs = skewed(), []
    sums, true = (
        prefix_sums(graph),
        Cost(np.array([0, 0, 1e-3, 0, 0, 0]), np.array([1.0, 1.0, 2.0])),
    )
    for disturbed in (1.0, np.array([5.0, 1.0, 3.0])):
        learner = Learner(3)
        for points in (by_edges(graph, 3), by_vertices(graph, 3)):
            for epoch in range(5):
                learner.add(
                    features_of(sums, points),
                    true.seconds(sums, points) * (disturbed if epoch == 1 else 1),
                )
        assert learner.cost is not None
        costs.append(learner.cost)
    assert costs[1].slowness == pytest.approx(costs[0].slowness, rel=0.05)


def test_a_split_moves_only_when_the_epochs_left_pay_for_it() -> None:
    graph = skewed()
    balance = Balance(prefix_sums(graph), np.array([0, 300, 600]))

    def measured() -> np.ndarray:
        for _ in range(3):
            seconds = features_of(balance.sums, balance.points)[:, 2] * 1e-3
            balance.measured(seconds, 600)
        return seconds

    seconds = measured()
    saved = seconds.max() - seconds.mean()
    assert balance.better(10, saved * 20, 0.0, always) is None
    measured()
    move = balance.better(10, saved * 5, saved * 3, always)
    assert move is not None and not move[1]
    balance.moved(move[0])
    now = features_of(balance.sums, move[0])[:, 2]
    assert now.max() < 1.05 * now.mean() and balance.facts()["moves"] == 1
    measured()
    assert balance.better(10, 0.0, 0.0, always) is None


def test_a_step_with_capacity_for_fewer_rows_is_compiled_where_rows_cost_more_than_that() -> None:
    graph = skewed()
    moves = []
    for row in (0, 1e-2):
        balance = Balance(prefix_sums(graph), np.array([0, 20, 600]))
        for _ in range(3):
            balance.measured(
                features_of(balance.sums, balance.points, 600) @ np.array([row, 0, 1e-3, 0, 0, 0]),
                600,
            )
        balance.learner.cost = Cost(np.array([row, 0, 1e-3, 0, 0, 0]), np.ones(2))
        moves.append(balance.better(10, 0.0, 5.0, always))
    assert moves[0] is None or not moves[0][1]
    assert moves[1] is not None and moves[1][1] and np.diff(moves[1][0]).max() < 600


def busy(events: list[int], used: list[int], alone: bool = True) -> float:
    """Nanoseconds of 1000 in which the process uses `used` until each event and the end."""
    *before, all_of_it = used
    return (
        stamp._busy(
            np.array([*zip(events, before, strict=True)])[::-1], (0, 0), (1000, all_of_it), alone
        )
        * 1e9
    )


def test_a_device_is_busy_but_for_waiting_for_an_exchange() -> None:
    begin, end = 1, 0
    events = [
        200 + begin,
        400 + end,
        500 + begin,
        600 + begin,
        700 + end,
        800 + end,
    ]  # between the last two that begin it computes
    assert busy(events, [0] * 7) == pytest.approx(600)
    early = [
        100 + begin,
        200 + begin,
        300 + end,
        800 + begin,
        900 + end,
        900 + end,
    ]  # nothing needs the first before the end
    assert busy(early, [0] * 7) == pytest.approx(800)


def test_processor_time_of_a_lone_process_in_an_exchange_counts_as_computing() -> None:
    begin, end = 1, 0
    events = [200 + begin, 600 + end]
    assert busy(events, [100, 150, 350]) == pytest.approx(600 + 2 * 50), (
        "computes for 600 and uses 300"
    )
    assert busy(events, [200, 300, 700]) == pytest.approx(600 + 100), "never faster than it is"
    assert busy(events, [20, 320, 360]) == pytest.approx(600 + 400), "no longer than the exchange"
    assert busy(events, [100, 150, 350], alone=False) == pytest.approx(600)


@pytest.fixture
def moving(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Training that takes these split points one after the other, whatever they gain."""
    splits = [np.array([0, 10, 50, 600]), np.array([0, 20, 40, 600]), np.array([0, 200, 200, 600])]
    monkeypatch.setattr(Balance, "better", lambda *_: (splits.pop(0), False) if splits else None)
    return splits


def fitted(make: Any, graph: gnn.Graph, epochs: int = 9, **how: Any) -> tuple[Any, dict[str, Any]]:
    keras.utils.set_random_seed(0)
    model = make(hidden=8, classes=3)
    model.compile(keras.optimizers.Adam(0.02), metrics=["accuracy"])
    return model, model.fit(graph, epochs=epochs, verbose=0, **how).history


def test_training_that_moves_the_split_gives_the_numbers_of_one_device(
    moving: list[np.ndarray],
) -> None:
    graph = skewed()
    alone, expected = fitted(models.GCN, graph)
    model, history = fitted(models.GCN, graph, devices=3, partition="learned")
    assert (
        not moving
        and model.balance.facts()["moves"] == 3
        and model.parts.points.tolist() == [0, 200, 200, 600]
    )
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=2e-4)
    np.testing.assert_allclose(model.predict(graph), alone.predict(graph), rtol=1e-2, atol=1e-3)


def test_stamps_tell_a_device_with_more_to_do_from_one_that_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph, seconds = skewed(2000, 600_000), []
    uneven = np.array([0, by_edges(graph, 20)[1], 2000])
    monkeypatch.setattr(Balance, "measured", lambda self, took, rows, edges: seconds.append(took))
    monkeypatch.setattr(
        Balance, "better", lambda *_: (uneven, False) if len(seconds) == 1 else None
    )
    model, _ = fitted(models.GCN, graph, epochs=16, devices=2, partition="learned")
    assert model.parts.edges[1] > 10 * model.parts.edges[0]
    little, much = np.min(seconds[2:], axis=0)  # whatever else the machine does
    assert 0 < little < 0.7 * much


def test_metis_is_asked_for_the_undirected_graph_and_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(
        GraphError,
        match="needs the package pymetis: run `pip install pymetis`, or use 'edges' or 'learned'",
    ):
        by_metis(skewed(), 2)
    graph, asked = gnn.Graph.from_edges([0, 0, 1, 3], [0, 2, 3, 1], 4, labels=[5, 6, 7, 8]), []

    def part_graph(
        parts: int, xadj: list[int], adjncy: list[int], vweights: list[int]
    ) -> tuple[int, list[int]]:
        asked.append((parts, xadj, adjncy, vweights))
        return 0, [1, 0, 1, 0]

    monkeypatch.setitem(sys.modules, "pymetis", types.SimpleNamespace(part_graph=part_graph))
    relabelled, points, order = arranged(graph, 2, "metis")
    assert asked == [(2, [0, 1, 2, 3, 4], [2, 3, 0, 1], [2, 2, 2, 2])]
    assert points.tolist() == [0, 2, 4] and order is not None and order.tolist() == [1, 3, 0, 2]
    assert relabelled.labels is not None and relabelled.labels.tolist() == [6, 8, 5, 7]


def test_one_device_measures_nothing() -> None:
    model, _ = fitted(models.GCN, skewed(), epochs=1, partition="learned")
    assert model.balance is None and jax.device_count() > 1


def test_learning_begins_with_fewer_rows_in_a_part_the_more_a_row_takes() -> None:
    graph = skewed()
    sums, rows = prefix_sums(graph), []
    for row in (0.0, 1e-4, 1.0):
        points = initial_points(sums, 4, row, 1e-6)
        cost = Cost(np.array([row, 0, 1e-6, 0, 0, 0]), np.ones(4))
        assert (
            cost.seconds(sums, points).max()
            <= min(cost.seconds(sums, other(graph, 4)).max() for other in (by_edges, by_vertices))
            * 1.05
        )
        rows.append(int(np.diff(points).max()))
    assert rows[0] > rows[1] >= rows[2]


def test_an_edge_counts_backward_but_where_features_are_summed() -> None:
    machine = host(1, 1 << 30)
    first, then = [(8, "sum"), (4, "sum")], [(4, "sum"), (4, "sum")]
    assert edge_seconds(first, 8, machine) * machine.memory_bandwidth * 2 == pytest.approx(
        32 + 2 * 16 + 3 * 128
    )
    assert edge_seconds(then, 8, machine) * machine.memory_bandwidth * 2 == pytest.approx(
        4 * 16 + 4 * 128
    )
    assert row_seconds(then, 1000, machine) > row_seconds(then, 10, machine) > 0

"""Training on whole graphs.

Every model gives the same numbers however the graph is split, learns, is saved, trains on without
preparing or compiling anew, and explains errors.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import partita.gnn as gnn
from partita.errors import GraphError, MachineError
from partita.gnn import prepare as preparing
from partita.gnn import step, trainer
from partita.gnn.data import graph as graph_module
from partita.gnn.data.arrays import ARRAYS, TABLES
from partita.gnn.data.digest import read_only
from partita.gnn.nn import models
from partita.gnn.prepare import PreparationKey, Split
from partita.gnn.split.choice import columns_of, neighbours
from partita.gnn.split.partition import (
    AggregationKind,
    aggregations_of_part,
    arranged,
    by_edges,
    by_vertices,
    cut,
    near_training,
    split_points,
)
from partita.machine import load


def drawn(vertices: int = 23, edges: int = 60, weights: bool = False) -> gnn.Graph:
    """A directed graph with self edges, repeated edges and isolated vertices, of three classes."""
    random = np.random.default_rng(0)
    source, target = random.integers(0, vertices - 3, (2, edges)) ** 2 // vertices
    split = random.permutation(vertices)
    return gnn.Graph.from_edges(
        np.append(source, source[:5]),
        np.append(target, target[:5]),
        vertices,
        features=random.standard_normal((vertices, 9)),
        labels=random.integers(0, 3, vertices),
        train=split[:12],
        validation=split[12:17],
        test=split[17:],
        weights=random.random(edges + 5) if weights else None,
    )


def trained(make: Callable[..., Any], graph: gnn.Graph, **options: Any) -> tuple[Any, Any]:
    """(model, history) of three epochs from the same weights."""
    keras.utils.set_random_seed(0)
    model = make(hidden=8, classes=3, l2=0.01)
    model.compile(keras.optimizers.Adam(0.05), metrics=["accuracy"])
    return model, model.fit(graph, epochs=3, verbose=0, **options).history


MODELS = {**models.MODELS, "sage-max": lambda **named: models.SAGE(aggregation="max", **named)}
SPLIT_OPTIONS = [(4, np.arange(23) * 7 % 23 % 4 // 2 * 3, 1), (4, [0, 0, 20, 20, 23], 2)]
"""Devices, partition, and devices that share vertices and split features.

The first has a part for every vertex, as METIS gives them, two of them empty. The second has split
points with two empty parts, and both kinds of splits at once.
"""


@pytest.mark.parametrize("name", MODELS)
def test_split_training_gives_the_numbers_of_one_device(name: str) -> None:
    graph = drawn(weights=name in ("gcn", "gatedgraph"))
    alone, history = trained(MODELS[name], graph)
    assert (
        set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
        and len(history["loss"]) == 3
    )
    for devices, partition, columns in SPLIT_OPTIONS:
        model, split_history = trained(
            MODELS[name], graph, devices=devices, partition=partition, columns=columns
        )
        for key, values in history.items():
            np.testing.assert_allclose(
                split_history[key],
                values,
                rtol=2e-4,
                atol=1e-5,
                err_msg=f"{key}, {devices} by {partition}, {columns}",
            )
        np.testing.assert_allclose(model.predict(graph), alone.predict(graph), rtol=1e-2, atol=1e-3)
        for weights, expected_weights in zip(model.get_weights(), alone.get_weights(), strict=True):
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-2, atol=1e-3)


def test_an_order_inside_changes_no_result() -> None:
    graph, part = drawn(weights=True), np.arange(23) % 4
    alone, expected = trained(models.GCN, graph)
    for order, how in (
        ("degree", {}),
        (np.arange(23)[::-1], {"devices": 4, "partition": part}),
        ("neighbours", {"devices": 3, "partition": "learned"}),
    ):
        model, split_history = trained(models.GCN, graph, order=order, **how)
        np.testing.assert_allclose(split_history["loss"], expected["loss"], rtol=2e-4)
        np.testing.assert_allclose(model.predict(graph), alone.predict(graph), rtol=1e-2, atol=1e-3)
        if how.get("devices") == 4:
            assert model.parts.vertices.tolist() == np.bincount(part).tolist()


def test_an_order_that_is_none_is_refused() -> None:
    for wrong, sentence in (
        ("size", "order='size' is unknown: use 'degree', 'neighbours', or list"),
        ([0, 0], "has 2 entries for 23 vertices"),
    ):
        with pytest.raises(GraphError, match=sentence):
            trained(models.GCN, drawn(), order=wrong)


def test_any_number_of_parts_gives_the_same_predictions() -> None:
    graph = drawn()
    model, _ = trained(models.GCN, graph)
    alone = model.predict(graph)
    for parts in range(2, 8):
        model._graph_trainer.split = Split(parts, columns=parts if parts == 3 else None)
        np.testing.assert_allclose(model.predict(graph), alone, rtol=1e-4, atol=1e-5)
        assert (
            model.parts.edges.sum() == graph.edges and model.parts.vertices.sum() == graph.vertices
        )


def test_evaluate_and_traffic_of_a_split_graph() -> None:
    graph = drawn()
    alone, split = (trained(models.GCN, graph, devices=devices, columns=1)[0] for devices in (1, 2))
    for mask in ("train", "validation", "test"):
        np.testing.assert_allclose(
            split.evaluate(graph, mask), alone.evaluate(graph, mask), rtol=1e-4
        )
    turn = int(split.parts.fetched.max())
    assert alone.traffic(graph) == 0 and split.traffic(graph) <= 2 * turn * 4 * (
        8 + 8 + 3 + 3
    )  # two layers, there and back; fewer where only what the training vertices see is summed


def test_a_part_fetches_only_rows_that_it_needs_and_each_once() -> None:
    graph = gnn.Graph.from_edges([2, 2, 2, 3, 0], [0, 1, 0, 1, 0], 4)
    parts = cut(graph, np.array([0, 2, 4]))
    assert parts.fetched.tolist() == [2, 0] and parts.edges.tolist() == [5, 0]


def test_parts_fetch_the_rows_that_their_edges_begin_at() -> None:
    graph = drawn(200, 900)
    to = np.repeat(np.arange(200), graph.in_degrees())
    for points in ([0, 20, 90, 200], [0, 0, 100, 200]):
        edges = [
            graph.sources[(to >= a) & (to < b)] for a, b in zip(points, points[1:], strict=False)
        ]
        expected = [
            len({s for s in e if not a <= s < b})
            for e, a, b in zip(edges, points, points[1:], strict=False)
        ]
        assert cut(graph, np.array(points)).fetched.tolist() == expected


@pytest.mark.parametrize("weights", [False, True])
def test_place_behind_the_edges_of_a_part_holds_zeros(weights: bool) -> None:
    graph = drawn(200, 900, weights)
    parts = cut(
        graph,
        np.array([0, 20, 90, 200]),
        kinds=[AggregationKind(apart=True), AggregationKind()],
        moves=True,
    )
    for way in (way for i in range(parts.count) for way in aggregations_of_part(graph, parts, i)):
        for edges, heavy in [(way.edges, way.weights)] + ([way.far] if way.far else []):
            used = edges.offsets[-1]
            behind = [
                a[used:]
                for a in (edges.ids, edges.back_ids, edges.back_order, heavy)
                if a is not None
            ]
            assert len(behind) == 2 + 2 * weights and all(len(a) and not a.any() for a in behind)


def few_training() -> gnn.Graph:
    """A graph of 200 vertices, three of them to learn from."""
    graph = drawn(200, 500, weights=True)
    train = np.zeros(200, bool)
    train[[5, 6, 50]] = True
    return replace(graph, train=train)


@pytest.mark.parametrize("name", ["gcn", "sage-max", "gatv2"])
def test_a_step_sums_only_over_what_the_training_vertices_see(name: str) -> None:
    graph = few_training()
    if name != "gcn":
        graph = replace(graph, weights=None)
    for how in ({}, {"devices": 3, "columns": 1}):
        model, history = trained(MODELS[name], graph, **how)
        ways = model._graph_trainer.device.prepared.data.block.aggregations
        assert [w.near for w in ways[:2]] == [-1, 0] and ways[1].edges.ids.size < ways[
            0
        ].edges.ids.size / 4
        kind = type(model)
        type(model).by_vertex = False
        try:
            whole, expected = trained(MODELS[name], graph, **how)
        finally:
            kind.by_vertex = True
        assert len(whole._graph_trainer.device.prepared.data.block.aggregations) == 1
        for key, values in expected.items():
            np.testing.assert_allclose(
                history[key], values, rtol=2e-4, atol=1e-5, err_msg=f"{key}, {how}"
            )
        for weights, expected_weights in zip(model.get_weights(), whole.get_weights(), strict=True):
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-2, atol=1e-3)


def test_vertices_near_training_grow_by_an_edge_at_a_time_while_their_edges_are_few() -> None:
    path = gnn.Graph.from_edges(range(9), range(1, 10), 10, train=[9])
    assert [np.flatnonzero(near).tolist() for near in near_training(path, 9)] == [
        [9],
        [8, 9],
    ]  # the third would make 6 of 9 edges
    assert near_training(replace(path, train=np.ones(10, bool)), 9) == [] == near_training(path, 0)


def test_features_are_split_where_every_part_needs_most_rows_of_all() -> None:
    random = np.random.default_rng(0)
    dense = gnn.Graph.from_edges(*random.integers(0, 4000, (2, 40000)), 4000)
    ring = gnn.Graph.from_edges(np.arange(400), (np.arange(400) + 1) % 400)
    machine = load("h100:4")
    calls = [(64, "sum"), (32, "attention")]
    columns = dict(columns_of(calls, dense, by_vertices(dense, 4), machine))
    assert (
        set(columns) == {64}
        and columns[64] in (2, 4)
        and columns_of(calls, ring, by_vertices(ring, 4), machine) == ()
    )
    assert neighbours(load("dgx-h100:16"), 12) == ((0, 2), (1, 8))


def test_partitioners_cover_the_vertices_and_share_out_what_they_say() -> None:
    graph = gnn.Graph.from_edges([0] * 12, [0] * 6 + [1] * 3 + [5] * 3, 9)
    for parts in range(1, 12):
        for points in (by_edges(graph, parts), by_vertices(graph, parts)):
            assert (
                points[0] == 0
                and points[-1] == 9
                and (np.diff(points) >= 0).all()
                and len(points) == parts + 1
            )
    assert by_edges(graph, 2).tolist() == [0, 1, 9] and by_vertices(graph, 3).tolist() == [
        0,
        3,
        6,
        9,
    ]


@pytest.fixture
def preparations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the graphs that are prepared."""
    digests: list[str] = []

    def prepare(graph: gnn.Graph, key: PreparationKey) -> Any:
        digests.append(key.graph)
        return preparing.prepare(graph, key)

    monkeypatch.setattr(trainer, "prepare", prepare)
    return digests


def copied(graph: gnn.Graph) -> gnn.Graph:
    """An equal graph, of other arrays and another name."""
    arrays = {field: getattr(graph, field) for field in ARRAYS}
    copies = {field: None if a is None else a.copy() for field, a in arrays.items()}
    return gnn.Graph(**copies, name="copy")


def other(graph: gnn.Graph) -> gnn.Graph:
    """A graph of one edge less."""
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    tables = {field: getattr(graph, field) for field in TABLES}
    return gnn.Graph.from_edges(graph.sources[1:], targets[1:], **tables)


SPLITS = [{}, {"devices": 3, "partition": np.arange(23) % 3}, {"order": np.arange(23)[::-1]}]


@pytest.mark.parametrize("split", SPLITS)
def test_graphs_in_turn_are_prepared_and_compiled_once(
    split: dict[str, Any], preparations: list[str]
) -> None:
    first = drawn()
    second = other(first)
    model, _ = trained(models.GCN, first, **split)
    model.fit(second, verbose=0, **split)
    for graph in (first, second):
        model.evaluate(graph)
        model.predict(graph)
    programs = model._graph_trainer.steps.programs()
    device_data = model._graph_trainer.device.prepared.data
    for graph in (first, second, copied(first), copied(second)):
        equal_split = {name: np.array(v) if name != "devices" else v for name, v in split.items()}
        model.fit(graph, epochs=2, verbose=0, **equal_split)
        model.evaluate(graph)
        model.predict(graph)
    assert model._graph_trainer.device.prepared.data is device_data
    assert model._graph_trainer.steps.programs() == programs
    assert preparations == [first.digest, second.digest]


def test_another_split_or_architecture_is_another_preparation(preparations: list[str]) -> None:
    graph = drawn()
    model, _ = trained(models.GCN, graph)
    for split in ({"devices": 2}, {"devices": 2, "columns": 2}, {"order": "degree"}):
        model.fit(graph, verbose=0, **split)
    assert len(preparations) == 4
    prepared = model._graph_trainer.device.prepared
    weighted = replace(prepared.key.architecture, matrix_entries=0)
    assert replace(prepared, key=replace(prepared.key, architecture=weighted)) != prepared
    assert replace(prepared, seconds=0.0) == prepared
    assert replace(prepared, points=(0, 1)) != prepared


def test_a_model_compiled_anew_keeps_graphs_and_compiles_steps(preparations: list[str]) -> None:
    graph = drawn()
    model, _ = trained(models.GCN, graph)
    probabilities = model.predict(graph)

    def first_class(labels: Any, probabilities: Any) -> Any:
        return 1 - probabilities[:, 0]

    for loss in ("sparse_categorical_crossentropy", first_class):
        model.compile(keras.optimizers.SGD(0.0), loss, metrics=["accuracy"])
        model.fit(graph, verbose=0)
    penalty = sum(float(value) for value in model.losses)
    expected = np.mean(1 - probabilities[graph.train, 0]) + penalty
    assert model.evaluate(graph, "train")[0] == pytest.approx(expected, rel=1e-4)
    assert len(preparations) == 1


@pytest.mark.parametrize("table", ["features", "labels", "train", "sources"])
def test_a_graph_that_was_changed_in_place_gives_its_own_numbers(table: str) -> None:
    graph = copied(drawn())
    before = copied(graph)
    model, _ = trained(models.GCN, graph)
    values = getattr(graph, table)
    values[:] = 2 * values % 23 if table == "sources" else np.roll(values, 1, axis=0)
    model.fit(graph, verbose=0)
    for changed in (graph, before):
        # A device may read the arrays of `graph` themselves; `before` has their first content.
        fresh = keras.models.clone_model(model)
        fresh.set_weights(model.get_weights())
        fresh.compile("adam", metrics=["accuracy"])
        np.testing.assert_allclose(
            model.evaluate(changed, "train"), fresh.evaluate(copied(changed), "train"), rtol=1e-5
        )
        np.testing.assert_allclose(
            model.predict(changed), fresh.predict(copied(changed)), rtol=1e-5
        )


def test_a_digest_is_of_the_content_and_computed_once_if_that_cannot_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = copied(drawn(weights=True))
    edge_features = np.ones((len(graph.sources), 2), np.float32)
    members = np.zeros(graph.vertices, np.int32)
    graph = replace(graph, edge_features=edge_features, members=members)
    assert copied(graph).digest == graph.digest
    different = []
    for field in ARRAYS:
        values = getattr(graph, field).copy()
        values[-1] = values[-1] + 1 if values.dtype != bool else ~values[-1]
        different.append(replace(graph, **{field: values}).digest)
    different.append(replace(graph, validation=None).digest)
    assert len({graph.digest, *different}) == len(ARRAYS) + 2
    view = graph.features[:]
    view.flags.writeable = False
    assert not read_only(view)
    for field in ARRAYS:
        getattr(graph, field).flags.writeable = False
    assert read_only(view)
    digest = graph.digest
    monkeypatch.setattr(graph_module, "array_digest", None)
    assert graph.digest == digest


def test_few_graphs_stay_on_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [drawn()]
    for _ in range(5):
        graphs.append(other(graphs[-1]))
    model, _ = trained(models.GCN, graphs[0])
    state = model._graph_trainer
    for graph in graphs[1:]:
        model.evaluate(graph)
    assert [run.prepared.source for run in state._runs.values()] == graphs[-trainer.GRAPHS :]
    model.evaluate(graphs[-2])
    assert state.device.prepared.source is graphs[-2]
    spare_bytes = 2 * max(run.prepared.device_bytes for run in state._runs.values())
    monkeypatch.setattr(trainer, "SPARE_BYTES", spare_bytes)
    model.evaluate(graphs[-1])
    assert len(state._runs) == 3
    monkeypatch.setattr(trainer, "SPARE_BYTES", 0)
    model.evaluate(graphs[0])
    assert [run.prepared.source for run in state._runs.values()] == [graphs[0]]


def test_programs_of_a_step_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PROGRAMS", 2)
    graph = drawn()
    model, _ = trained(models.GCN, graph)
    for _ in range(4):
        graph = other(graph)
        model.predict(graph)
    assert model._graph_trainer.steps.programs() <= 1 + 1 + 3


def test_training_leaves_one_attribute_on_a_model_which_is_not_saved(tmp_path: Path) -> None:
    graph = drawn()
    model = models.GCN(hidden=8, classes=3)
    model.compile("adam", metrics=["accuracy"])
    keras_attributes = set(vars(keras.Model())) | set(vars(model))
    model.fit(graph, verbose=0)
    model.save(tmp_path / "before.keras")
    model.fit(graph, verbose=0, devices=2, callbacks=[keras.callbacks.Callback()])
    model.evaluate(graph)
    added = {name for name in vars(model) if name not in keras_attributes}
    assert added <= {"history", "_initial_epoch", "_build_shapes_dict", "_losses_override"}
    model.save(tmp_path / "after.keras")
    sizes = [(tmp_path / name).stat().st_size for name in ("before.keras", "after.keras")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)
    again = keras.saving.load_model(tmp_path / "after.keras")
    assert again._graph_trainer is not model._graph_trainer and again.parts is None


def test_a_saved_model_predicts_the_same_and_trains_on(tmp_path: Path) -> None:
    graph = drawn()
    model, _ = trained(models.GCN, graph)
    model.save(tmp_path / "gcn.keras")
    again = keras.saving.load_model(tmp_path / "gcn.keras")
    np.testing.assert_allclose(again.predict(graph), model.predict(graph), rtol=1e-6)
    history, expected = (m.fit(graph, epochs=2, verbose=0).history for m in (again, model))
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    model = MODELS[name](hidden=8, classes=3, layers=3, dropout=0.1)
    model.build((None, 9))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_config() == model.get_config() and again.get_config()["layers"] == 3
    assert [w.tolist() for w in again.get_weights()] == [w.tolist() for w in model.get_weights()]


def test_callbacks_see_epochs_and_can_stop() -> None:
    seen: list[float] = []

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(float(np.abs(self.model.get_weights()[0]).sum()))
            self.model.stop_training = epoch == 1

    model = models.GCN(4, 3)
    model.compile("adam")
    assert (
        len(model.fit(drawn(), epochs=9, callbacks=[Stop()], verbose=0).epoch) == 2
        and seen[0] != seen[1]
    )


def test_a_network_learns_classes_that_keep_to_themselves() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    source = random.integers(0, 20, 400) * 3
    graph = gnn.Graph.from_edges(
        source + (kind := random.integers(0, 3, 400)),
        random.integers(0, 20, 400) * 3 + kind,
        60,
        features=np.eye(60),
        labels=labels,
        train=range(6),
        test=range(6, 60),
    )
    keras.utils.set_random_seed(0)
    model = models.GCN(16, 3, dropout=0.0)
    model.compile(keras.optimizers.Adam(0.05), metrics=["accuracy"])
    model.fit(graph, epochs=60, verbose=0)
    assert model.evaluate(graph, return_dict=True)["accuracy"] > 0.9
    assert model.predict(graph, [5, 4]).argmax(axis=1).tolist() == [2, 1]


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (
            {"features": None},
            "has no features: give Graph.from_edges(features=...) a row for every vertex.",
        ),
        (
            {"labels": None},
            "has no labels: give Graph.from_edges(labels=...) one for every vertex, "
            "-1 where there is none.",
        ),
        (
            {"train": None},
            "The training mask of 'graph' is empty: mark at least one vertex, train=[...].",
        ),
        (
            {"labels": np.full(23, 7, np.int32)},
            "Vertex 0 has the label 7, and the model has 3 classes, 0 to 2: "
            "make it with classes=8.",
        ),
    ],
)
def test_what_cannot_be_learnt_is_one_sentence(broken: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GraphError) as error:
        trained(models.GCN, replace(drawn(), **broken))
    assert sentence in str(error.value)


def test_bad_options_of_fit_are_one_sentence() -> None:
    for options, sentence in (
        ({"epochs": 1.5}, "epochs=1.5 is out of range: give a whole number of at least 0."),
        ({"initial_epoch": -1}, "initial_epoch=-1 is out of range: give a whole number of at"),
        ({"validation_freq": 0}, "validation_freq=0 is out of range: give a whole number of at"),
        ({"devices": True}, "devices=True is out of range: give a whole number of at least 1."),
        ({"columns": "2"}, "columns='2' is out of range: give a whole number of at least 1."),
        ({"memory": "-1GiB"}, 'give bytes, or a text such as "4GiB".'),
        ({"partition": None}, "partition=None is unknown: give a name, or a list of integers."),
        ({"partition": [0, 1.5, 23]}, "partition is float64 [3]: give a list of integers."),
        ({"order": ["a"] * 23}, "order is <U1 [23]: give a list of integers."),
        ({"class_weight": [1, 2]}, "class_weight is a list: give a dict, such as {0: 1.0, 1: 3.0}"),
        ({"class_weight": {0: "a"}}, "The class_weight of class 0 is a: use finite weights"),
        ({"vertex_weight": ["a"] * 23}, "vertex_weight is <U1 [23]: give one weight for each"),
        ({"callbacks": ["early"]}, "callbacks has a str: give a list of keras.callbacks.Callback."),
        ({"verbose": "loud"}, "verbose='loud' is unknown: use 'auto', 0, 1 or 2."),
    ):
        model: Any = models.GCN(4, 3)
        model.compile()
        with pytest.raises(GraphError) as error:
            model.fit(drawn(), **{"verbose": 0} | options)
        assert sentence in str(error.value)


def test_bad_splits_are_one_sentence() -> None:
    with pytest.raises(
        GraphError,
        match="partition='fair' is no partitioner: use 'vertices', 'edges', 'learned' or 'metis', "
        "or give split",
    ):
        split_points(drawn(), 2, "fair")
    with pytest.raises(
        GraphError, match="Vertex 22 is given to part 2, and there are 2 parts: use parts 0 to 1"
    ):
        arranged(drawn(), 2, [0] * 22 + [2])
    with pytest.raises(
        GraphError,
        match=r"The split points \[0, 30\] do not cut 23 vertices into 1 parts: "
        "give 2 numbers that rise from 0 to 23",
    ):
        split_points(drawn(), 1, [0, 30])
    with pytest.raises(
        GraphError,
        match="columns=3 does not divide 4 devices: use a divisor of 4",
    ):
        trained(models.GCN, drawn(), devices=4, columns=3)
    with pytest.raises(MachineError, match="Cannot use 99 devices: JAX has"):
        trained(models.GCN, drawn(), devices=99)
    with pytest.raises(GraphError, match="units=30 is not a multiple of heads=8"):
        models.GATv2(hidden=30, classes=3)
    with pytest.raises(
        GraphError, match="aggregation='median' is unknown: use 'mean', 'max', 'sum'"
    ):
        models.SAGE(aggregation="median")

"""Definitions of layers, losses and weights: dense references, and refusals of silent errors."""

import dataclasses
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from partita import gnn
from partita.errors import GraphError
from partita.gnn.nn.block import block_of
from partita.gnn.step import check_output

VERTICES = 23


def random_graph(weighted: bool = False, labels: Any = None, **tables: Any) -> gnn.Graph:
    """A directed graph with repeated edges, repeated self edges and vertices without edges."""
    random = np.random.default_rng(1)
    source, target = random.integers(0, 18, (2, 90))
    source = np.concatenate([source, [3, 3, 5]])
    target = np.concatenate([target, [3, 3, 5]])
    features = random.standard_normal((VERTICES, 5))
    if labels is None:
        labels = random.integers(0, 4, VERTICES)
    weights = 0.5 + random.random(len(source)) if weighted else None
    return gnn.Graph.from_edges(
        source,
        target,
        VERTICES,
        features=features,
        labels=labels,
        train=np.arange(VERTICES) % 2 == 0,
        weights=weights,
        **tables,
    )


def edges_of(graph: gnn.Graph) -> list[tuple[int, int, float]]:
    """(source, target, weight) of every edge."""
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    weights = np.ones(graph.edges) if graph.weights is None else graph.weights
    return list(zip(graph.sources.tolist(), targets.tolist(), weights.tolist(), strict=True))


def with_one_self_edge(graph: gnn.Graph) -> np.ndarray:
    """[target, source] sums of weights, where the last self edge of a vertex, or 1, counts."""
    matrix = np.zeros((graph.vertices, graph.vertices))
    own = np.ones(graph.vertices)
    for source, target, weight in edges_of(graph):
        if source == target:
            own[source] = weight
        else:
            matrix[target, source] += weight
    return matrix + np.diag(own)


def output(layer: Any, graph: gnn.Graph, x: Any = None, **options: Any) -> np.ndarray:
    """The result of a layer on the features of a whole graph."""
    block = jax.tree.map(jnp.asarray, block_of(graph))
    rows = graph.features if x is None else x
    tables = jax.tree.map(jnp.asarray, rows)
    return np.asarray(layer(tables, graph=block, **options))


@pytest.mark.parametrize("weighted", [False, True])
def test_gcn_counts_one_self_edge_of_several(weighted: bool) -> None:
    graph = random_graph(weighted)
    layer = gnn.GCNConv(3)
    given = output(layer, graph)
    adjacency = with_one_self_edge(graph)
    root = adjacency.sum(axis=1) ** -0.5
    expected = (root[:, None] * adjacency * root) @ graph.features @ np.asarray(layer.kernel)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_attention_counts_one_self_edge_of_several() -> None:
    graph = random_graph()
    several = gnn.GATv2Conv(4, heads=2)
    given = output(several, graph)
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    apart = graph.sources != targets
    one_each = gnn.Graph.from_edges(
        np.append(graph.sources[apart], np.arange(VERTICES)),
        np.append(targets[apart], np.arange(VERTICES)),
        VERTICES,
        features=graph.features,
    )
    np.testing.assert_allclose(given, output(several, one_each), rtol=1e-4, atol=1e-6)


def test_a_vertex_of_degree_zero_sends_and_receives_nothing() -> None:
    # the self edge of vertex 0 has the weight 0, so that its degree is 0
    graph = gnn.Graph.from_edges(
        [0, 0, 1], [0, 1, 2], 3, features=np.eye(3), labels=[0, 1, 0], weights=[0.0, 1.0, 1.0]
    )
    layer = gnn.GCNConv(3)
    given = output(layer, graph)
    kernel = np.asarray(layer.kernel)
    expected = np.array([[0, 0, 0], [0, 0.5, 0], [0, 0.5, 0.5]]) @ kernel
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def fitted(model: Any, graph: gnn.Graph, loss: Any = "sparse_categorical_crossentropy", **how: Any):
    """The losses of two epochs."""
    model.compile(keras.optimizers.Adam(0.05), loss)
    return model.fit(graph, epochs=2, verbose=0, **how).history["loss"]


def test_a_negative_degree_is_refused() -> None:
    graph = gnn.Graph.from_edges(
        [0, 1],
        [1, 0],
        features=np.eye(2),
        labels=[0, 1],
        train=[0],
        weights=[-3.0, 1.0],
    )
    with pytest.raises(GraphError, match="in-edges of vertex 1, its self edge included, sum to -2"):
        fitted(gnn.GCN(), graph)


@pytest.mark.parametrize("kind", [gnn.GCN, gnn.SAGE, gnn.GIN, gnn.CommNet, gnn.GatedGraph])
def test_edge_weights_count(kind: Any) -> None:
    losses = []
    for weighted in (False, True):
        keras.utils.set_random_seed(0)
        losses.append(fitted(kind(hidden=8, classes=4), random_graph(weighted))[0])
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_attention_and_maxima_refuse_edge_weights() -> None:
    for model, kind in ((gnn.GATv2(), "attention"), (gnn.SAGE(aggregation="max"), "max")):
        with pytest.raises(GraphError, match=rf"an aggregation \({kind}\) that does not read them"):
            fitted(model, random_graph(weighted=True))


@pytest.mark.parametrize("layer", [gnn.GATConv(4), gnn.GATv2Conv(4), gnn.SAGEConv(4, "max")])
def test_layers_called_on_a_graph_refuse_edge_weights_that_they_do_not_read(layer: Any) -> None:
    graph = random_graph(weighted=True)
    with pytest.raises(GraphError, match=r"an aggregation \(\w+\) that does not read them"):
        layer(graph.features, graph=graph)
    layer(graph.features, graph=dataclasses.replace(graph, weights=None))


def test_an_edge_attribute_of_pyg_is_the_weight() -> None:
    for shape in (2, (2, 1)):
        data = SimpleNamespace(
            edge_index=np.array([[0, 1], [1, 0]]), edge_attr=np.ones(shape) * 3, num_nodes=2
        )
        assert gnn.Graph.from_pyg(data).weights.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("labels", "loss"),
    [
        (np.linspace(-1, 1.5, VERTICES), "mse"),
        (np.arange(VERTICES * 3).reshape(VERTICES, 3) % 2, "binary_crossentropy"),
    ],
)
def test_targets_train_alike_on_devices_and_within_memory(labels: Any, loss: str) -> None:
    graph = random_graph(labels=labels)
    assert graph.has_targets and "targets" in repr(graph)
    output_activation = None if loss == "mse" else "sigmoid"
    losses = []
    for how in ({}, {"devices": 3}, {"memory": "1MiB"}):
        keras.utils.set_random_seed(0)
        model = gnn.GCN(hidden=4, classes=graph.classes, output=output_activation)
        losses.append(fitted(model, graph, loss, **how))
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-4)
    rows = model.predict(graph)
    assert rows.shape == graph.labels.shape


def test_the_loss_of_a_regression_is_the_mean_over_the_mask() -> None:
    graph = random_graph(labels=np.linspace(-1, 1.5, VERTICES))
    model = gnn.GCN(hidden=4, classes=1, output=None)
    fitted(model, graph, "mse")
    squares = (model.predict(graph) - graph.labels) ** 2
    assert model.evaluate(graph, "train") == pytest.approx(squares[graph.train].mean(), rel=1e-4)


def test_micro_f1_is_over_the_vertices_of_the_mask() -> None:
    labels = np.random.default_rng(4).integers(0, 2, (VERTICES, 3))
    graph: Any = random_graph(labels=labels, test=np.arange(VERTICES) % 2 == 1)
    for devices, memory in ((1, None), (2, None), (1, "1MiB")):
        model = gnn.GCN(hidden=4, classes=3, output="sigmoid")
        metric = keras.metrics.F1Score("micro", threshold=0.5, name="f1")
        by_label = keras.metrics.F1Score(None, threshold=0.5, name="by_label")
        model.compile("adam", "binary_crossentropy", metrics=[metric, by_label])
        model.fit(graph, epochs=1, verbose=0, devices=devices, memory=memory)
        given = model.predict(graph)[graph.test] > 0.5
        expected = labels[graph.test] > 0
        hits = 2 * (given & expected).sum() / (given.sum() + expected.sum())
        of_labels = 2 * (given & expected).sum(0) / (given.sum(0) + expected.sum(0))
        figures = model.evaluate(graph, return_dict=True)
        assert figures["f1"] == pytest.approx(hits, rel=1e-5)
        assert figures["by_label"] == pytest.approx(of_labels, rel=1e-5)


def test_vertices_without_edges_attend_to_themselves() -> None:
    x = np.random.default_rng(1).standard_normal((5, 3))
    given: Any = {"features": x, "labels": np.arange(5) % 2, "train": np.arange(5)}
    graph = gnn.Graph.from_edges([], [], 5, **given)
    model = gnn.GAT(hidden=4, classes=2, heads=2)
    fitted(model, graph, "sparse_categorical_crossentropy")
    own = gnn.Graph.from_edges(np.arange(5), np.arange(5), 5, **given)
    np.testing.assert_allclose(model.predict(graph), model.predict(own), rtol=1e-5)


def test_outputs_must_fit_the_targets() -> None:
    graph = random_graph(labels=np.zeros((VERTICES, 3)))
    with pytest.raises(GraphError, match="3 targets per vertex, and the model has classes=2"):
        fitted(gnn.GCN(classes=2), graph, "mse")


@pytest.mark.parametrize(
    ("output", "kind"), [((jnp.ones(3), jnp.ones(3)), "tuple"), (jnp.ones(()), "number")]
)
def test_a_model_has_one_output_with_a_row_per_vertex(output: Any, kind: str) -> None:
    with pytest.raises(GraphError, match=f"The output of 'net' is a {kind}: return one array"):
        check_output(SimpleNamespace(name="net"), output)


def test_weights_of_classes_and_vertices_multiply_the_loss() -> None:
    graph = random_graph()
    vertex_weight = np.linspace(0, 2, VERTICES)
    class_weight = {0: 3.0, 2: 0.5}
    weights = vertex_weight * np.array([3, 1, 0.5, 1])[graph.labels]
    for how in ({}, {"devices": 2}, {"memory": "1MiB"}):
        keras.utils.set_random_seed(0)
        model = gnn.GCN(hidden=4, classes=4, dropout=0.0)
        model.compile("sgd")
        model.fit(graph, epochs=0)
        rows = model.predict(graph)
        values = -np.log(rows[np.arange(VERTICES), graph.labels])
        options = {"class_weight": class_weight, "vertex_weight": vertex_weight, **how}
        first = model.fit(graph, epochs=1, verbose=0, **options).history["loss"][0]
        assert first == pytest.approx((values * weights)[graph.train].mean(), rel=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vertex_weight": [1.0]}, "one weight for each of the 23 vertices"),
        ({"vertex_weight": -np.ones(VERTICES)}, "vertex_weight of vertex 0 is -1"),
        ({"class_weight": {7: 1.0}}, "class_weight has the class 7"),
        ({"class_weight": {1: np.inf}}, "class_weight of class 1 is inf"),
        (
            {"vertex_weight": np.zeros(VERTICES)},
            r"By vertex_weight all \d+ training vertices of '.*' have the weight 0, so nothing "
            "would be trained: give some of them a positive weight.",
        ),
        ({"class_weight": dict.fromkeys(range(4), 0.0)}, "By class_weight all"),
    ],
)
def test_bad_weights_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        fitted(gnn.GCN(classes=4), random_graph(), **options)


@pytest.mark.parametrize("kind", [gnn.GCN, gnn.GIN, gnn.GATv2, gnn.GatedGraph])
def test_mixed_precision_trains_close_to_float32(kind: Any) -> None:
    losses = []
    for policy in ("float32", "mixed_bfloat16"):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy(policy)
        try:
            losses.append(fitted(kind(hidden=8, classes=4), random_graph()))
        finally:
            keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(losses[1], losses[0], rtol=3e-2)


class OwnNetwork(gnn.GraphModel):
    """Two convolutions with something between them."""

    def __init__(self, between: Any) -> None:
        super().__init__(classes=4, layers=0)
        self.enter = gnn.GCNConv(8)
        self.leave = gnn.GCNConv(4, activation="softmax")
        self.between = between

    def build(self, input_shape: Any) -> None:
        self.enter.build(input_shape)
        self.between.build((None, 8))
        self.leave.build((None, 8))
        self.built = True

    def call(self, x: Any, graph: Any, training: bool = False) -> Any:
        h = self.enter(x, graph=graph)
        h = self.inner(h, graph, training)
        return self.leave(jax.nn.relu(h), graph=graph)

    def inner(self, h: Any, graph: Any, training: bool) -> Any:
        return self.between(h, training=training)


class Penalized(OwnNetwork):
    def inner(self, h: Any, graph: Any, training: bool) -> Any:
        self.add_loss(0.01 * (h**2).sum())
        return h


class Centred(OwnNetwork):
    def inner(self, h: Any, graph: Any, training: bool) -> Any:
        return h - h.mean(axis=0)


@pytest.mark.parametrize(
    ("kind", "between", "sentence"),
    [
        (OwnNetwork, keras.layers.BatchNormalization, "Use gnn.VertexBatchNormalization"),
        (OwnNetwork, lambda: keras.layers.Dropout(0.5), "Use gnn.VertexDropout"),
        (Penalized, keras.layers.Identity, "Use graph.vertex_sum"),
        (Centred, keras.layers.Identity, "Centred gives other numbers on 2 devices than on one"),
    ],
)
def test_a_network_that_differs_on_devices_is_refused(
    kind: Any, between: Any, sentence: str
) -> None:
    with pytest.raises(GraphError, match=sentence):
        fitted(kind(between()), random_graph(), devices=2)


def test_a_layer_that_trains_since_compile_is_tested_again() -> None:
    model = OwnNetwork(keras.layers.BatchNormalization())
    model.between.trainable = False
    graph = random_graph()
    fitted(model, graph, devices=2)
    model.between.trainable = True
    model.compile("sgd")
    with pytest.raises(GraphError, match="Use gnn.VertexBatchNormalization"):
        model.fit(graph, epochs=1, devices=2, verbose=0)


class ExactNetwork(OwnNetwork):
    """Batch normalization, dropout and a penalty by the means for several devices."""

    def __init__(self) -> None:
        super().__init__(gnn.VertexBatchNormalization())
        self.drop = gnn.VertexDropout(0.5)

    def inner(self, h: Any, graph: Any, training: bool) -> Any:
        h = self.between(h, graph=graph, training=training)
        self.add_loss(0.01 * graph.vertex_sum(h**2).sum())
        return self.drop(h - graph.vertex_mean(h), graph=graph, training=training)


def test_sums_over_vertices_give_the_numbers_of_one_device() -> None:
    graph = random_graph()
    results = []
    for devices in (1, 2, 3):
        keras.utils.set_random_seed(0)
        model = ExactNetwork()
        model.compile("sgd")
        losses = model.fit(graph, epochs=2, verbose=0, devices=devices).history["loss"]
        results.append((losses, model.get_weights()))
    for losses, weights in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-4)
        for value, expected in zip(weights, results[0][1], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-2, atol=1e-3)


def test_batch_normalization_is_that_of_keras() -> None:
    graph = random_graph()
    own, keras_layer = (
        gnn.VertexBatchNormalization(),
        keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
    )
    for training in (True, False):
        given = output(own, graph, training=training)
        expected = np.asarray(keras_layer(graph.features, training=training))
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


class HastyNetwork(OwnNetwork):
    by_vertex = True

    def inner(self, h: Any, graph: Any, training: bool) -> Any:
        return h - h.mean(axis=0)


def test_a_wrong_promise_of_by_vertex_is_refused() -> None:
    with pytest.raises(GraphError, match="HastyNetwork sets by_vertex = True, and not only"):
        fitted(HastyNetwork(keras.layers.Identity()), random_graph())


class OwnLoss(gnn.GCN):
    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        return 0.0


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda g: OwnLoss().compile(), "OwnLoss.compute_loss would not run"),
        (lambda g: gnn.GCN().compile(loss_weights=[2.0]), "loss_weights would be ignored"),
        (lambda g: fitted(gnn.GCN(), g.features), "fit was given a ndarray: give a gnn.Graph"),
        (lambda g: fitted(gnn.GCN(), g, sample_weight=[1]), "'sample_weight': use vertex_weight="),
        (lambda g: fitted(gnn.GCN(), g, colour=1), "no option 'colour': use devices, memory, part"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(act: Any, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        act(random_graph())


def test_rows_of_other_vertices_have_no_gradient() -> None:
    # at a row of zeros the cosine has none: NaN
    from partita.gnn.prepare import data_of
    from partita.gnn.step import loss_sum

    graph: Any = random_graph(labels=np.random.default_rng(0).standard_normal((VERTICES, 3)))
    model = gnn.GCN(classes=3)
    model.compile("sgd", "cosine_similarity")
    rows = np.repeat(graph.train[:, None], 3, axis=1).astype(np.float32)
    gradient = jax.grad(lambda rows: loss_sum(model, rows, data_of(graph), "train"))(rows)
    assert np.isfinite(gradient).all() and not gradient[~graph.train].any()


def test_a_model_is_called_on_a_graph() -> None:
    graph: Any = random_graph()
    model = gnn.GCN(classes=4)
    rows = model(graph.features, graph=graph)
    model.compile("adam")
    np.testing.assert_allclose(rows, model.predict(graph), rtol=1e-5)


# ------------------------------------------------------------------------------ message passing


class EdgeLayer(gnn.MessagePassing):
    """Messages of both ends and of the edge; two heads of scores with 'softmax'."""

    def build(self, input_shape: Any) -> None:
        width = input_shape[-1]
        self.kernel = self.add_weight(shape=(width, 6), name="kernel")
        self.target = self.add_weight(shape=(width, 6), name="target")
        self.edge = self.add_weight(shape=(2, 6), name="edge")

    def message(self, x_source: Any, x_target: Any, edge: Any) -> Any:
        terms = x_source @ self.kernel.value + x_target @ self.target.value + edge @ self.edge.value
        values = jnp.sin(terms)
        if self.aggregate != "softmax":
            return values
        heads = values.reshape(-1, 2, 3)
        return heads.sum(axis=2), heads

    def update(self, x: Any, aggregated: Any) -> Any:
        return aggregated.reshape(-1, 6) + 1


def graph_with_edge_features() -> gnn.Graph:
    graph = random_graph()
    random = np.random.default_rng(2)
    targets = np.repeat(np.arange(VERTICES), graph.in_degrees())
    return gnn.Graph.from_edges(
        graph.sources,
        targets,
        VERTICES,
        features=graph.features,
        labels=graph.labels,
        train=graph.train,
        edge_features=random.standard_normal((graph.edges, 2)),
    )


def expected_messages(layer: EdgeLayer, graph: gnn.Graph) -> np.ndarray:
    """The layer vertex by vertex, edge by edge."""
    kernel, target, edge = (np.asarray(w) for w in (layer.kernel, layer.target, layer.edge))
    rows = np.zeros((VERTICES, 6))
    for v in range(VERTICES):
        first, last = graph.offsets[v : v + 2]
        if first == last:
            continue
        sources = graph.features[graph.sources[first:last]]
        terms = sources @ kernel + graph.features[v] @ target
        messages = np.sin(terms + graph.edge_features[first:last] @ edge)
        if layer.aggregate == "softmax":
            heads = messages.reshape(-1, 2, 3)
            shares = np.exp(heads.sum(axis=2))
            shares /= shares.sum(axis=0)
            rows[v] = (shares[:, :, None] * heads).sum(axis=0).reshape(6)
        else:
            rows[v] = getattr(np, layer.aggregate)(messages, axis=0)
    return rows + 1


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max", "softmax"])
def test_messages_are_aggregated_edge_by_edge(aggregate: str) -> None:
    graph = graph_with_edge_features()
    layer = EdgeLayer(aggregate)
    given = output(layer, graph)
    np.testing.assert_allclose(given, expected_messages(layer, graph), rtol=1e-4, atol=1e-5)


class EdgeNetwork(gnn.GraphModel):
    """Two layers of messages."""

    by_vertex = True

    def __init__(self, aggregate: str) -> None:
        super().__init__(classes=4, layers=0)
        self.first = EdgeLayer(aggregate)
        self.second = EdgeLayer(aggregate)
        self.leave = keras.layers.Dense(4, activation="softmax")

    def build(self, input_shape: Any) -> None:
        self.first.build(input_shape)
        self.second.build((None, 6))
        self.leave.build((None, 6))
        self.built = True

    def stages(self) -> list[Any]:
        return [
            lambda x, graph, training: self.first(x, graph=graph),
            lambda x, graph, training: self.second(x, graph=graph),
            lambda x, graph, training: self.leave(x),
        ]


@pytest.mark.parametrize("aggregate", ["sum", "mean", "max", "softmax"])
def test_messages_train_alike_on_devices_and_within_memory(aggregate: str) -> None:
    graph = graph_with_edge_features()
    results = []
    for how in ({}, {"devices": 2}, {"devices": 3, "order": "degree"}, {"memory": "1MiB"}):
        keras.utils.set_random_seed(0)
        model = EdgeNetwork(aggregate)
        model.compile("sgd")
        losses = model.fit(graph, epochs=2, verbose=0, **how).history["loss"]
        results.append((losses, model.get_weights()))
    for losses, weights in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-4)
        for value, expected in zip(weights, results[0][1], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-5)


class Directions(gnn.MessagePassing):
    """Differences of unit length over the length of the edge: singular for rows of zeros."""

    def message(self, x_source: Any, x_target: Any, edge: Any) -> Any:
        difference = x_source - x_target
        return difference / jnp.linalg.norm(difference, axis=1, keepdims=True) / edge

    def update(self, x: Any, aggregated: Any) -> Any:
        return x + aggregated


class UnitNetwork(gnn.GraphModel):
    """Rows of unit length before every layer."""

    def __init__(self, aggregate: str) -> None:
        super().__init__(classes=4, layers=0)
        self.first = gnn.GCNConv(4)
        self.second = Directions(aggregate)
        self.leave = gnn.GCNConv(4, activation="softmax")

    def build(self, input_shape: Any) -> None:
        self.first.build(input_shape)
        self.second.build((None, 4))
        self.leave.build((None, 4))
        self.built = True

    def call(self, x: Any, graph: Any, training: bool = False) -> Any:
        x = jnp.log(x)
        for layer in (self.first, self.second, self.leave):
            x = layer(x / jnp.linalg.norm(x, axis=1, keepdims=True), graph=graph)
        return x


@pytest.mark.parametrize("aggregate", ["mean", "softmax"])
def test_functions_without_a_value_at_zero_are_finite_in_padding(aggregate: str) -> None:
    random = np.random.default_rng(0)
    source, target = random.integers(0, VERTICES, (2, 60))
    graph = gnn.Graph.from_edges(
        *np.stack([source, target])[:, source != target],
        VERTICES,
        features=0.1 + random.random((VERTICES, 5)),
        labels=random.integers(0, 4, VERTICES),
        train=range(VERTICES),
        weights=0.5 + random.random(int((source != target).sum())),
    )
    results = []
    for how in ({}, {"devices": 4, "partition": [0, 0, 2, 20, VERTICES]}):
        keras.utils.set_random_seed(0)
        model = UnitNetwork(aggregate)
        model.compile("sgd")
        losses = model.fit(graph, epochs=3, verbose=0, **how).history["loss"]
        results.append(np.append(losses, model.get_weights()[0]))
    assert np.isfinite(results[0]).all()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-6)


class Positions(gnn.GraphModel):
    """A learned row for every vertex, which parts cannot have."""

    def __init__(self) -> None:
        super().__init__(classes=4, layers=0)
        self.leave = gnn.GCNConv(4, activation="softmax")

    def build(self, input_shape: Any) -> None:
        self.rows = self.add_weight(shape=(VERTICES, 3), name="rows")
        self.leave.build((None, input_shape[-1] + 3))
        self.built = True

    def call(self, x: Any, graph: Any, training: bool = False) -> Any:
        return self.leave(keras.ops.concatenate([x, self.rows], axis=1), graph=graph)


def test_a_network_for_one_number_of_vertices_trains_on_one_device() -> None:
    model = Positions()
    model.compile("sgd")
    model.fit(random_graph(), verbose=0)
    with pytest.raises(GraphError, match="Positions fails on 68 vertices, and parts have any"):
        model.fit(random_graph(), devices=2, verbose=0)


def test_a_mean_in_float16_counts_many_vertices() -> None:
    block = block_of(gnn.Graph.from_edges([0], [1], 70_000))
    rows = jnp.full((70_000, 1), 2.0, jnp.float16)
    mean = block.vertex_mean(rows)
    assert mean.dtype == jnp.float16
    assert float(mean[0]) == 2.0


def test_dropout_of_rows_with_several_dims_is_that_of_their_columns() -> None:
    block = jax.tree.map(jnp.asarray, block_of(random_graph()))
    rows = jnp.ones((VERTICES, 6))
    results = []
    for shape in ((VERTICES, 6), (VERTICES, 3, 2)):
        keras.utils.set_random_seed(0)
        dropped = gnn.VertexDropout(0.5)(rows.reshape(shape), graph=block, training=True)
        results.append(np.asarray(dropped).reshape(VERTICES, 6))
    assert 0 < results[0].mean() < 2
    np.testing.assert_array_equal(results[1], results[0])


class Maxima(gnn.MessagePassing):
    """The largest rows of in-neighbours."""

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape


class MaximaNetwork(gnn.GraphModel):
    def conv(self, last: bool, **options: Any) -> Any:
        return Maxima("max", name=options["name"])


def test_a_layer_of_messages_is_a_layer_of_a_model() -> None:
    graph = random_graph()
    model = MaximaNetwork(hidden=5, classes=5, layers=2)
    layer: Any = Maxima("max")
    given: Any = model(graph.features, graph=graph)
    once: Any = layer(graph.features, graph=graph)
    np.testing.assert_array_equal(given, layer(once, graph=graph))


def test_edge_features_follow_their_edges() -> None:
    graph = graph_with_edge_features()
    order = np.random.default_rng(0).permutation(VERTICES)
    layer = EdgeLayer("sum")
    expected = output(layer, graph)
    changed = graph.relabelled(order)
    np.testing.assert_allclose(output(layer, changed), expected[order], rtol=1e-5, atol=1e-5)
    both = graph.with_reverse_edges()
    assert both.edge_features.sum() == pytest.approx(2 * graph.edge_features.sum(), rel=1e-4)
    added = graph.with_self_edges()
    assert added.edge_features.sum() == pytest.approx(graph.edge_features.sum(), rel=1e-4)


def test_edge_features_without_a_reader_are_refused() -> None:
    with pytest.raises(GraphError, match="has edge features, and the model has no layer that"):
        fitted(gnn.GCN(classes=4), graph_with_edge_features())
    with pytest.raises(GraphError, match="aggregate='median' is unknown: use 'sum', 'mean'"):
        gnn.MessagePassing("median")


# ------------------------------------------------------------------------------ options of layers


def test_gcn_without_normalization_or_self_edges() -> None:
    graph = random_graph(weighted=True)
    adjacency = np.zeros((VERTICES, VERTICES))
    for source, target, weight in edges_of(graph):
        adjacency[target, source] += weight
    degrees = adjacency.sum(axis=1)
    root = np.divide(1, np.sqrt(degrees), out=np.zeros(VERTICES), where=degrees > 0)
    for options, matrix in (
        ({"normalize": False}, adjacency),
        ({"self_edges": False}, root[:, None] * adjacency * root),
    ):
        layer = gnn.GCNConv(3, **options)
        given = output(layer, graph)
        expected = matrix @ graph.features @ np.asarray(layer.kernel)
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_sage_sums_projects_and_normalizes() -> None:
    graph = random_graph()
    adjacency = np.zeros((VERTICES, VERTICES))
    for source, target, _ in edges_of(graph):
        adjacency[target, source] += 1
    layer = gnn.SAGEConv(3, "sum", project=True, normalize=True)
    given = output(layer, graph)
    projection, own, kernel = (
        np.asarray(weight) for weight in (layer.projection, layer.own, layer.kernel)
    )
    rows = np.maximum(graph.features @ projection, 0)
    expected = adjacency @ rows @ kernel + graph.features @ own
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_heads_without_concatenation_are_averaged() -> None:
    graph = random_graph()
    averaged = gnn.GATv2Conv(3, 2, concat=False, residual=True, head_bias=True)
    given = output(averaged, graph)
    joined = gnn.GATv2Conv(6, 2, head_bias=True)
    joined.build((None, 5))
    for name in ("kernel", "destination", "score", "kernel_shift", "destination_shift"):
        getattr(joined, name).assign(getattr(averaged, name))
    heads = output(joined, graph).reshape(VERTICES, 2, 3)
    expected = heads.mean(axis=1) + graph.features @ np.asarray(averaged.own)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: gnn.GCNConv(4),
        lambda: gnn.SAGEConv(4, project=True),
        lambda: gnn.GINConv(4),
        lambda: gnn.GATv2Conv(4, 2, head_bias=True, residual=True),
        lambda: gnn.GatedGraphConv(6),
    ],
)
def test_weights_return_from_the_names_of_pyg(make: Any) -> None:
    first, second = make(), make()
    for layer in (first, second):
        layer.build((None, 5))
    state = {name: array + 0.5 for name, array in gnn.pyg_state(first).items()}
    gnn.load_pyg_state(second, state)
    given = gnn.pyg_state(second)
    assert given.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(given[name], array)


def test_weights_of_another_layer_are_refused() -> None:
    layer = gnn.GCNConv(4)
    with pytest.raises(GraphError, match="has no weights yet"):
        gnn.pyg_state(layer)
    layer.build((None, 5))
    with pytest.raises(GraphError, match=r"missing bias; unknown lin_l\.weight"):
        gnn.load_pyg_state(layer, {"lin.weight": np.zeros((4, 5)), "lin_l.weight": np.zeros(1)})
    with pytest.raises(GraphError, match=r"lin\.weight has the shape \[5, 4\], and .* needs"):
        gnn.load_pyg_state(layer, {"lin.weight": np.zeros((5, 4)), "bias": np.zeros(4)})


WAYS: tuple[dict[str, Any], ...] = ({}, {"devices": 2}, {"memory": "1MiB"})
"""Options of `fit`: one device, several, a memory plan."""


class SquaredOfFirst(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.square(keras.ops.cast(y_true, "float32") - y_pred[:, 0])


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.SparseCategoricalCrossentropy(reduction="sum"),
        keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight"),
        keras.losses.SparseCategoricalCrossentropy(ignore_class=1),
        SquaredOfFirst(reduction="sum"),
    ],
)
def test_a_loss_is_reduced_as_in_keras(loss: Any) -> None:
    graph = random_graph()
    weights = np.linspace(0, 2, VERTICES).astype("f")
    for how in WAYS:
        keras.utils.set_random_seed(0)
        model = gnn.GCN(hidden=4, classes=4, dropout=0.0)
        model.compile("sgd", loss)
        model.fit(graph, epochs=0)
        trained = graph.train
        rows = model.predict(graph)[trained]
        expected = float(loss(graph.labels[trained], rows, weights[trained]))
        history = model.fit(graph, epochs=1, verbose=0, vertex_weight=weights, **how).history
        assert history["loss"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("how", WAYS)
def test_a_scaled_loss_gives_the_same_weights(how: Any) -> None:
    weights = []
    for scaled in (False, True):
        keras.utils.set_random_seed(0)
        optimizer: Any = keras.optimizers.SGD(0.5)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        model = gnn.GCN(hidden=4, classes=4, dropout=0.0)
        model.compile(optimizer)
        model.fit(random_graph(), epochs=3, verbose=0, **how)
        weights.append(np.concatenate([np.ravel(w) for w in model.get_weights()]))
    np.testing.assert_allclose(weights[1], weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", WAYS)
def test_averages_take_the_place_of_weights_at_the_end_of_fit(how: Any) -> None:
    keras.utils.set_random_seed(0)
    optimizer = keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5)
    model = gnn.GCN(hidden=4, classes=4, dropout=0.0)
    model.compile(optimizer)
    for _ in range(2):
        model.fit(random_graph(), epochs=2, verbose=0, **how)
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(model.trainable_variables, averages, strict=True):
        np.testing.assert_array_equal(variable.numpy(), average.numpy())


class Largest(keras.metrics.Metric):
    def __init__(self, masked: bool = True) -> None:
        super().__init__(name="largest")
        self.largest = self.add_weight(shape=(), initializer="zeros", name="largest")
        self.masked = masked

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        if self.masked and sample_weight is not None:
            y_pred = y_pred * sample_weight[:, None]
        self.largest.assign(keras.ops.maximum(self.largest, keras.ops.max(y_pred)))

    def result(self) -> Any:
        return self.largest


def test_a_metric_whose_counts_do_not_add_up_needs_one_device() -> None:
    for how in WAYS:
        model = gnn.GCN(hidden=4, classes=4, dropout=0.0)
        model.compile("sgd", metrics=[Largest()])
        if how:
            with pytest.raises(GraphError, match="'largest/largest' has counts that do not add"):
                model.fit(random_graph(), verbose=0, **how)
        else:
            history = model.fit(random_graph(), verbose=0, epochs=1).history
            assert 0 < history["largest"][0] < 1


def of_the_batch(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(y_pred)


@pytest.mark.parametrize("metric", [partial(Largest, masked=False), lambda: of_the_batch])
def test_a_metric_that_reads_all_rows_is_refused(metric: Any) -> None:
    model = gnn.GCN(hidden=4, classes=4)
    model.compile("sgd", metrics=[metric()])
    with pytest.raises(GraphError, match="reads rows of weight 0|with one value per row"):
        model.fit(random_graph(), verbose=0)


def test_a_metric_of_keras_without_weights_per_row_is_refused() -> None:
    graph = random_graph(labels=np.eye(3)[np.arange(VERTICES) % 3])
    model = gnn.GCN(hidden=4, classes=3, output="sigmoid")
    model.compile("sgd", "binary_crossentropy", metrics=[keras.metrics.BinaryIoU()])
    with pytest.raises(GraphError, match="with one value per row"):
        model.fit(graph, verbose=0)


def against_the_mean(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.square(y_pred - keras.ops.mean(y_pred, axis=0)), axis=-1)


@pytest.mark.parametrize("loss", [keras.losses.Circle(), against_the_mean])
def test_a_loss_that_compares_vertices_is_refused(loss: Any) -> None:
    model = gnn.GCN(hidden=4, classes=4)
    model.compile("sgd", loss)
    with pytest.raises(GraphError, match="of a vertex depends on other vertices"):
        model.fit(random_graph(), verbose=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss": ["mse"]}, "loss is a list, and a graph has one output: give one loss."),
        ({"metrics": {"a": "mse"}}, "metrics is a dict, and a graph has one output: give a list."),
        ({"loss": keras.losses.MeanSquaredError(reduction=None)}, "has no reduction"),
    ],
)
def test_losses_and_metrics_of_several_outputs_are_refused(options: Any, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        gnn.GCN(classes=4).compile("sgd", **options)


def test_a_correlation_is_a_number_on_several_devices() -> None:
    targets = np.random.default_rng(0).standard_normal((VERTICES, 3))
    graph = dataclasses.replace(random_graph(), labels=targets.astype("f"))
    results = []
    for how in WAYS:
        keras.utils.set_random_seed(0)
        model = gnn.GCN(hidden=4, classes=3, dropout=0.0, output=None)
        model.compile("sgd", "mse", metrics=[keras.metrics.PearsonCorrelation()])
        history = model.fit(graph, epochs=1, verbose=0, **how).history
        results.append(history["pearson_correlation"][0])
    assert np.isfinite(results).all()
    np.testing.assert_allclose(results, results[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m, g: m.predict(g, vertices=[23]), "vertices lists 23 of 23 rows"),
        (lambda m, g: m.predict(g, vertices="a"), "vertices is <U1"),
        (lambda m, g: m.train_on_batch(g), r"train_on_batch has no meaning .* use fit\(graph\)"),
        (lambda m, g: m(g.features[:5], graph=g), "5 rows were given for the 23 vertices"),
        (lambda m, g: m(g.features, graph=[1]), "graph is a list: give a gnn.Graph"),
        (lambda m, g: m(g.features[:, 0], graph=g), r"rows are \[23\]: give a table"),
        (lambda m, g: m(g.features), r"GCN 'gcn.*' is called without a graph: .*graph=graph"),
        (lambda m, g: gnn.SAGEConv(3)(g.features, graph=None), "SAGEConv .* without a graph"),
        (lambda m, g: gnn.MessagePassing()(g.features), "MessagePassing .* without a graph"),
        (lambda m, g: gnn.VertexDropout(0.5)(g.features, training=True), "Dropout .* without a g"),
        (lambda m, g: gnn.VertexBatchNormalization()(g.features), "Normalization .* without a g"),
        (lambda m, g: m.compile("sgd", run_eagerly=True), "run_eagerly would be ignored"),
        (lambda m, g: m.compile("sgd", metrics="accuracy"), "metrics is a str, .* give a list"),
        (
            lambda m, g: m.fit(g, devices=2, partition=np.array([0, 30, 23], np.uint8)),
            r"split points \[0, 30, 23\] do not cut 23 vertices",
        ),
        (lambda m, g: gnn.GCN(hidden=0), "hidden=0 is out of range"),
        (lambda m, g: gnn.GCN(hidden="8"), "hidden='8' is out of range"),
        (lambda m, g: gnn.GCN(classes=0), "classes=0 is out of range"),
        (lambda m, g: gnn.GCN(layers=-1), "layers=-1 is out of range"),
        (lambda m, g: gnn.GCN(layers=0), "layers=0 is out of range"),
        (lambda m, g: m.fit(g, devices=2, partition=[0] * 99), r"split points \[0.* \.\.\. do not"),
        (lambda m, g: m.fit(g, devices=2, partition=[[0], [1, 2]]), "Give rows of one length"),
        (lambda m, g: gnn.GCN(dropout=1.5), "dropout of 1.5 is out of range"),
        (lambda m, g: gnn.GCNConv(0), "units=0 is out of range"),
        (lambda m, g: gnn.RelationalConv(4, relations=0), "relations=0 is out of range"),
    ],
)
def test_a_mistake_is_a_sentence(call: Any, sentence: str) -> None:
    graph = random_graph()
    model = gnn.GCN(hidden=4, classes=4)
    model.compile("sgd")
    with pytest.raises(GraphError, match=sentence):
        call(model, graph)


@pytest.mark.parametrize(
    ("aggregate", "message", "sentence"),
    [
        ("sum", lambda x: x[:5], r"is \[5, .* return a row for every row"),
        ("max", lambda x: x.sum(), r"is \[\], and .* return a row for every row"),
        ("mean", lambda x: (x, x), "is a tuple of 2: return one array"),
        ("softmax", lambda x: (x, x, x), "is a tuple of 3: return one array"),
        ("softmax", lambda x: (x[:, :2], x), "scores .* and values .*: return scores"),
    ],
)
def test_messages_of_another_shape_are_refused(
    aggregate: str, message: Callable[[Any], Any], sentence: str
) -> None:
    class Wrong(gnn.MessagePassing):
        def message(self, x_source: Any, x_target: Any, edge: Any) -> Any:
            return message(x_source)

    graph = random_graph()
    with pytest.raises(GraphError, match=sentence):
        Wrong(aggregate)(graph.features, graph=graph)


def test_a_graph_may_be_given_by_position() -> None:
    graph = random_graph()
    layer = gnn.MessagePassing()
    rows = layer(graph.features, graph)
    np.testing.assert_array_equal(rows, layer(graph.features, graph=graph))


def test_messages_without_a_function_of_ones_own_read_weights() -> None:
    graph = random_graph(weighted=True)
    rows = np.asarray(gnn.MessagePassing()(graph.features, graph=graph))
    expected = np.zeros_like(graph.features)
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    np.add.at(expected, targets, graph.features[graph.sources] * graph.weights[:, None])
    np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)


class FreeNetwork(gnn.GraphModel):
    """Dense layers around a function of (model, rows, graph, training)."""

    def __init__(self, inner: Any, builds: bool = True) -> None:
        super().__init__(classes=4, layers=0)
        self.enter = keras.layers.Dense(8)
        self.leave = keras.layers.Dense(4, activation="softmax")
        self.inner = inner
        self.builds = builds

    def build(self, input_shape: Any) -> None:
        if self.builds:
            self.enter.build(input_shape)
        self.leave.build((None, 8))
        self.built = True

    def call(self, x: Any, graph: Any, training: bool = False) -> Any:
        return self.leave(self.inner(self, self.enter(x), graph, training))


def mean_without_training(model: Any, h: Any, graph: Any, training: bool) -> Any:
    return h if training else h - h.mean(axis=0)


def small_mean_penalty(model: Any, h: Any, graph: Any, training: bool) -> Any:
    model.add_loss(1e-3 * (h**2).mean())
    return h


def sum_in_a_branch(model: Any, h: Any, graph: Any, training: bool) -> Any:
    return jax.lax.cond(h.sum() > 0, graph.sum, lambda rows: rows, h)


def penalty_per_vertex(model: Any, h: Any, graph: Any, training: bool) -> Any:
    model.add_loss((h**2).sum(axis=1))
    return h


@pytest.mark.parametrize(
    ("inner", "devices", "sentence"),
    [
        (mean_without_training, 2, "its call without training combines the rows"),
        (small_mean_penalty, 2, "its add_loss combines the rows"),
        (sum_in_a_branch, 2, "aggregates in a branch of cond"),
        (penalty_per_vertex, 1, r"add_loss is given an array \[23\]: give one number"),
        (lambda model, h, graph, training: h[:-1], 1, "has 22 rows for 23 vertices"),
    ],
)
def test_a_free_network_that_would_go_wrong_is_refused(
    inner: Any, devices: int, sentence: str
) -> None:
    with pytest.raises(GraphError, match=sentence):
        fitted(FreeNetwork(inner), random_graph(), devices=devices)


def test_a_layer_that_is_not_built_is_named() -> None:
    model = FreeNetwork(lambda model, h, graph, training: h, builds=False)
    for _ in range(2):
        with pytest.raises(GraphError, match="Layer 'dense.*' of FreeNetwork is not built"):
            fitted(model, random_graph())


@pytest.mark.parametrize("operation", ["sum", "mean", "max"])
def test_an_aggregation_is_mapped_over_a_dim(operation: str) -> None:
    block = jax.tree.map(jnp.asarray, block_of(random_graph()))
    function = getattr(block, operation)
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, VERTICES, 4)), jnp.float32)

    def penalty(x: Any) -> Any:
        return (function(x) ** 2).sum()

    for mapped, single in ((function, function), (jax.grad(penalty), jax.grad(penalty))):
        expected = [single(table) for table in rows]
        np.testing.assert_allclose(jax.vmap(mapped)(rows), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "aggregate",
    [
        lambda block, x: block.sum(x[:5]),
        lambda block, x: block.mean(x[:, None]),
        lambda block, x: block.max(x[:, 0]),
        lambda block, x: block.ends(x[:5]),
        lambda block, x: block.ends(x, x[:5]),
        lambda block, x: block.attention(x[:5, None], x[:, None], jnp.ones((1, 5))),
        lambda block, x: block.attention(x, x, jnp.ones((1, 5))),
    ],
)
def test_aggregations_of_other_rows_are_refused(aggregate: Any) -> None:
    graph = random_graph()
    block = jax.tree.map(jnp.asarray, block_of(graph))
    with pytest.raises(GraphError, match="An aggregation is given rows .* for 23 vertices"):
        aggregate(block, jnp.asarray(graph.features))

"""Options of layers and models: dense references, devices and memory plans, PyG's names."""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from test_gnn_semantics import (
    VERTICES,
    edges_of,
    fitted,
    graph_with_edge_features,
    output,
    random_graph,
)

from partita import gnn
from partita.errors import GraphError
from partita.gnn.nn.block import as_block
from partita.gnn.nn.stages import JumpStage


def adjacency_of(graph: gnn.Graph) -> np.ndarray:
    """[target, source] sums of edge weights."""
    matrix = np.zeros((graph.vertices, graph.vertices))
    for source, target, weight in edges_of(graph):
        matrix[target, source] += weight
    return matrix


def array(variable: Any) -> Any:
    return np.asarray(variable, np.float64)


@pytest.mark.parametrize("weighted", [False, True])
def test_improved_gcn_adds_self_edges_of_weight_two(weighted: bool) -> None:
    graph = random_graph(weighted)
    layer = gnn.GCNConv(3, improved=True)
    given = output(layer, graph)
    matrix = np.zeros((VERTICES, VERTICES))
    self_weights = np.full(VERTICES, 2.0)
    for source, target, weight in edges_of(graph):
        if source == target:
            self_weights[source] = weight
        else:
            matrix[target, source] += weight
    matrix += np.diag(self_weights)
    root = matrix.sum(axis=1) ** -0.5
    expected = (root[:, None] * matrix * root) @ graph.features @ array(layer.kernel)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


def test_a_self_edge_whose_correction_is_one_is_not_missing() -> None:
    graph = gnn.Graph.from_edges([0, 0], [0, 0], 2, weights=[-1.0, 5.0])
    corrections = graph.self_edge_corrections(0, 2)
    assert corrections[1] == 1 != corrections[0] == pytest.approx(1, rel=1e-6)


def test_a_pair_of_rows_begins_and_ends_edges() -> None:
    graph: Any = random_graph()
    source = graph.features
    target = np.random.default_rng(1).standard_normal((VERTICES, 2)).astype(np.float32)
    for units in (2, 9):
        layer = gnn.SAGEConv(units, "sum")
        given = np.asarray(output(layer, graph, (source, target)))
        expected = adjacency_of(graph) @ source @ array(layer.kernel) + target @ array(layer.own)
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(GraphError, match="GCNConv takes one table of rows, not a pair"):
        output(gnn.GCNConv(3), graph, (source, source))
    with pytest.raises(GraphError, match="GINConv adds rows of 5 and 2 features"):
        output(gnn.GINConv(3), graph, (source, target))


def test_sage_without_own_rows() -> None:
    graph: Any = random_graph()
    for units in (2, 9):
        layer = gnn.SAGEConv(units, "sum", root_weight=False)
        given = output(layer, graph)
        expected = adjacency_of(graph) @ graph.features @ array(layer.kernel)
        np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)


def test_gin_runs_a_network_of_ones_own() -> None:
    graph: Any = random_graph()
    dense = keras.layers.Dense(3, "tanh")
    normed = gnn.GINConv(3, mlp=[gnn.VertexDropout(0.5), gnn.VertexBatchNormalization(), dense])
    assert output(normed, graph, training=True).shape == (VERTICES, 3)
    layer = gnn.GINConv(3, mlp=dense, epsilon=0.5, train_epsilon=False)
    given = output(layer, graph)
    sums = 1.5 * graph.features + adjacency_of(graph) @ graph.features
    expected = np.tanh(sums @ array(dense.kernel))
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
    assert layer.trainable_variables == dense.trainable_variables
    for mlp, sentence in ((keras.layers.Dense(4), "has 4 features, and units=3"), (3, "has a int")):
        with pytest.raises(GraphError, match=sentence):
            output(gnn.GINConv(3, mlp=mlp), graph)


def test_gine_sums_rows_with_edge_features() -> None:
    graph: Any = graph_with_edge_features()
    layer: Any = gnn.GINEConv(3, mlp=keras.layers.Dense(3), edge_dim=2)
    given = output(layer, graph)
    sums = array(graph.features) * (1 + array(layer.epsilon))
    edge_rows = graph.edge_features @ array(layer.edge_kernel)
    for (source, target, _), row in zip(edges_of(graph), edge_rows, strict=True):
        sums[target] += np.maximum(graph.features[source] + row, 0)
    expected = sums @ array(layer.mlp[0].kernel)
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-4)
    sentence = "^GINEConv .* needs 5 features of every edge, and the graph has 2"
    with pytest.raises(GraphError, match=sentence):
        output(gnn.GINEConv(3), graph)
    with pytest.raises(GraphError, match="needs 2 features of every edge, and the graph has no"):
        output(gnn.GINEConv(3, edge_dim=2), random_graph())


def attention_scores(layer: Any, source: Any, target: Any, edge: Any) -> Any:
    """[heads]: the score of an edge between rows."""

    def heads(row: Any, kernel: Any) -> Any:
        return (row @ array(kernel)).reshape(layer.heads, -1)

    def leaky(z: Any) -> Any:
        return np.where(z > 0, z, 0.2 * z)

    if isinstance(layer, gnn.GATv2Conv):
        z = heads(source, layer.kernel) + heads(target, layer.destination)
        return (leaky(z + heads(edge, layer.edge_kernel)) * array(layer.score)).sum(axis=1)
    total = (heads(source, layer.kernel) * array(layer.source_score)).sum(axis=1)
    total += (heads(target, layer.kernel) * array(layer.target_score)).sum(axis=1)
    return leaky(total + (heads(edge, layer.edge_kernel) * array(layer.edge_score)).sum(axis=1))


@pytest.mark.parametrize("kind", [gnn.GATConv, gnn.GATv2Conv])
@pytest.mark.parametrize("self_edges", [False, True])
def test_attention_reads_edge_features(kind: Any, self_edges: bool) -> None:
    graph: Any = graph_with_edge_features()
    layer = kind(4, 2, edge_dim=2, self_edges=self_edges)
    given = output(layer, graph)
    x = array(graph.features)
    expected = np.zeros((VERTICES, 2, 2))
    for v in range(VERTICES):
        edges = range(graph.offsets[v], graph.offsets[v + 1])
        ends = [(int(graph.sources[e]), array(graph.edge_features[e])) for e in edges]
        if self_edges:
            ends = [(u, edge) for u, edge in ends if u != v]
            mean = np.mean([edge for _, edge in ends], axis=0) if ends else np.zeros(2)
            ends.append((v, mean))
        if not ends:
            continue
        scores = np.array([attention_scores(layer, x[u], x[v], edge) for u, edge in ends])
        shares = np.exp(scores) / np.exp(scores).sum(axis=0)
        for share, (u, _) in zip(shares, ends, strict=True):
            expected[v] += share[:, None] * (x[u] @ array(layer.kernel)).reshape(2, 2)
    np.testing.assert_allclose(given, expected.reshape(VERTICES, 4), rtol=1e-4, atol=1e-5)


def test_attention_by_edges_equals_the_kernel() -> None:
    graph: Any = random_graph()
    kernel, by_edges = gnn.GATv2Conv(4, 2), gnn.GATv2Conv(4, 2, negative_slope=0.2 + 1e-9)
    expected = output(kernel, graph)
    by_edges.build((None, 5))
    by_edges.set_weights(kernel.get_weights())
    np.testing.assert_allclose(output(by_edges, graph), expected, rtol=1e-5, atol=1e-6)


def test_attention_dropout_keeps_the_mean() -> None:
    source, target = np.argwhere(np.ones((60, 60))).T
    graph = gnn.Graph.from_edges(source, target, 60, features=np.ones((60, 1)))
    layer = gnn.GATv2Conv(8, 8, dropout=0.4)
    kept = output(layer, graph) / array(layer.kernel)
    dropped = output(layer, graph, training=True) / array(layer.kernel)
    np.testing.assert_allclose(kept, 1, rtol=1e-4)
    assert 0.9 < dropped.mean() < 1.1
    assert 0.08 < dropped.std() < 0.13  # sqrt(0.4 / 0.6 / 60) = 0.105


@pytest.mark.parametrize("self_edges", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_attention_dropout_in_kernels_equals_that_by_edges(devices: int, self_edges: bool) -> None:
    graph: Any = random_graph()
    trained = []
    for slope in (0.2, 0.2 + 1e-9):  # kernels have the slope 0.2
        keras.utils.set_random_seed(3)
        options = {"dropout": 0.4, "self_edges": self_edges, "negative_slope": slope}
        model = gnn.GATv2(8, 4, heads=2, layers=3, dropout=0.0, layer_options=options)
        model.compile(keras.optimizers.SGD(0.1))
        history = model.fit(graph, epochs=3, devices=devices, order="degree", verbose=0)
        trained.append([history.history["loss"], *model.get_weights()])
    for by_kernel, by_edges in zip(*trained, strict=True):
        np.testing.assert_allclose(by_kernel, by_edges, rtol=1e-5, atol=1e-6)


def test_gradients_of_dropped_attention_equal_those_by_edges() -> None:
    graph: Any = random_graph()
    block = as_block(graph, graph.features)
    results = []
    for slope in (0.2, 0.2 + 1e-9):
        keras.utils.set_random_seed(5)
        layer = gnn.GATv2Conv(6, 2, dropout=0.5, negative_slope=slope)
        layer.build((None, graph.feature_count))
        weights = [variable.value for variable in layer.trainable_variables]
        others = [variable.value for variable in layer.non_trainable_variables]

        def loss(weights: Any, x: Any, layer: Any = layer, others: Any = others) -> Any:
            y, _ = layer.stateless_call(weights, others, x, graph=block, training=True)
            return (y * jnp.arange(y.size).reshape(y.shape) ** 0.5).sum() / 10

        results.append(jax.tree.leaves(jax.grad(loss, (0, 1))(weights, array(graph.features))))
    largest = max(map(np.linalg.norm, results[1]))
    for by_kernel, by_edges in zip(*results, strict=True):
        assert np.linalg.norm(by_kernel - by_edges) <= 1e-6 * largest


def deep_gcn() -> gnn.GraphModel:
    options = {"improved": True}
    return gnn.GCN([8, 8], 4, norm="batch", residual=True, layer_options=options)


def jumping_gat() -> gnn.GraphModel:
    return gnn.GATv2(8, 4, heads=2, jk="cat", norm="layer", layer_options={"dropout": 0.5})


@pytest.mark.parametrize("make", [deep_gcn, jumping_gat])
def test_options_train_alike_on_devices_and_within_memory(make: Any, tmp_path: Any) -> None:
    graph: Any = random_graph()
    results = []
    ways = ({"devices": 3, "order": "degree"}, {"memory": "1MiB"}, {})
    for how in ways if make is jumping_gat else (ways[0], ways[2]):
        keras.utils.set_random_seed(0)
        model = make()
        results.append((fitted(model, graph, **how), model.predict(graph)))
    for losses, rows in results[:-1]:
        np.testing.assert_allclose(losses, results[-1][0], rtol=1e-4)
        np.testing.assert_allclose(rows, results[-1][1], rtol=1e-2, atol=1e-3)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(graph), model.predict(graph), rtol=1e-6)


def test_a_network_of_ones_own_is_saved() -> None:
    layer: Any = gnn.GINConv(3, mlp=[keras.layers.Dense(3), gnn.VertexBatchNormalization()])
    again: Any = gnn.GINConv.from_config(layer.get_config())
    assert [type(part) for part in again.mlp] == [type(part) for part in layer.mlp]


@pytest.mark.parametrize("mode", ["cat", "max"])
def test_jumping_knowledge_reads_all_layers(mode: str) -> None:
    graph: Any = random_graph()
    model = gnn.GCN(6, 4, 3, dropout=0.0, jk=mode, output=None)
    model.build((None, 5))
    rows, results = graph.features, []
    for conv in model.convs:
        rows = output(conv, graph, rows)
        results.append(rows)
    read = np.concatenate(results, axis=1) if mode == "cat" else np.max(results, axis=0)
    expected = read @ array(model.leave.kernel)
    np.testing.assert_allclose(output(model, graph), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_maximum_compares_its_arguments_alone() -> None:
    """XLA may compute an argument again with other rounding: the result then equals neither."""
    stage = JumpStage(lambda x, graph, training: jnp.sin(x), "max", 2)
    graph: Any = None
    gradient = jax.grad(lambda x: stage(x, graph, True).sum())
    text = str(jax.make_jaxpr(gradient)(jnp.ones((3, 4))))
    assert " ge " in text and " eq " not in text


def test_a_residual_adds_the_input() -> None:
    graph: Any = random_graph()
    plain = gnn.GCN(5, 4, 3, dropout=0.0)
    deep = gnn.GCN(5, 4, 3, dropout=0.0, residual=True)
    stages = []
    for model in (plain, deep):
        model.build((None, 5))
        stages.append(model.stages()[0])
    deep.set_weights(plain.get_weights())
    first = output(lambda x, graph: stages[0](x, graph, False), graph)
    with_own = output(lambda x, graph: stages[1](x, graph, False), graph)
    np.testing.assert_allclose(with_own, first + graph.features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: gnn.GCN(norm="instance"),
            "norm='instance' is unknown: use None, 'batch', 'layer'",
        ),
        (lambda: gnn.GCN(jk="lstm"), "jk='lstm' is unknown"),
        (lambda: gnn.GCN([8, 4], 3, 2), "makes 3 layers, and layers=2"),
        (lambda: gnn.GCN([8, 4], 3, jk="max"), "with jk needs equal widths"),
        (lambda: gnn.GatedGraph(jk="cat"), "GatedGraph has no norm, jk, residual and readout"),
        (lambda: gnn.GATConv(5, 2), "units=5 is not a multiple of heads=2"),
    ],
)
def test_bad_options_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda: gnn.GINConv(4, mlp=[keras.layers.Dense(6, "relu"), keras.layers.Dense(4)]),
            {"eps", "nn.0.weight", "nn.0.bias", "nn.2.weight", "nn.2.bias"},
        ),
        (lambda: gnn.GATConv(4, 2), {"att_src", "att_dst", "bias", "lin.weight"}),
        (
            lambda: gnn.GATv2Conv(4, 2, head_bias=True, share_weights=True),
            {"att", "bias", "lin_l.weight", "lin_l.bias", "lin_r.weight", "lin_r.bias"},
        ),
        (
            lambda: gnn.GCN(4, 3, norm="batch"),
            {"convs.0.lin.weight", "convs.0.bias", "convs.1.lin.weight", "convs.1.bias"}
            | {f"norms.0.module.{name}" for name in ("weight", "bias", "running_mean")}
            | {"norms.0.module.running_var", "norms.0.module.num_batches_tracked"},
        ),
        (
            lambda: gnn.GCN(4, 3, norm="layer"),
            {"convs.0.lin.weight", "convs.0.bias", "convs.1.lin.weight", "convs.1.bias"}
            | {"norms.0.weight", "norms.0.bias"},
        ),
    ],
)
def test_names_of_pyg(make: Any, names: set[str]) -> None:
    layer = make()
    layer.build((None, 5))
    state = {name: value + 1 for name, value in gnn.pyg_state(layer).items()}
    assert set(state) == names
    gnn.load_pyg_state(layer, state)
    for name, value in gnn.pyg_state(layer).items():
        if "tracked" not in name:
            np.testing.assert_array_equal(value, state[name])


def test_two_matrices_for_a_shared_one_are_refused() -> None:
    model = gnn.GATv2(4, 3, heads=2, layer_options={"share_weights": True})
    model.build((None, 5))
    state = gnn.pyg_state(model)
    changed = {**state, "convs.0.lin_r.weight": state["convs.0.lin_r.weight"] + 1}
    sentence = r"convs\.0\.lin_l\.weight and convs\.0\.lin_r\.weight differ, and .* has one weight"
    with pytest.raises(GraphError, match=sentence):
        gnn.load_pyg_state(model, changed)


def test_stacked_weights_of_another_size_are_refused() -> None:
    layer = gnn.GatedGraphConv(6)
    layer.build((None, 5))
    state = gnn.pyg_state(layer)
    before = array(layer.gates)
    for wrong in (state["weight"][:1], state["weight"][:, :5]):
        with pytest.raises(GraphError, match=r"weight has the shape \[.*needs \[2, 6, 6\]"):
            gnn.load_pyg_state(layer, {**state, "weight": wrong, "rnn.weight_ih": before.T + 1})
    np.testing.assert_array_equal(array(layer.gates), before)


def test_wrong_options_of_layers_are_named() -> None:
    with pytest.raises(GraphError, match=r"No layer has these layer_options \(nix\): .* GCNConv"):
        gnn.GCN(8, 4, layer_options={"nix": 1})
    with pytest.raises(GraphError, match="layer_options=3 is no dictionary: give options by name"):
        gnn.GCN(8, 4, layer_options=3)  # pyright: ignore
    with pytest.raises(GraphError, match="has 'units': give the widths as hidden= and classes="):
        gnn.GCN(8, 4, layer_options={"units": 1})


def test_a_metric_of_other_labels_is_named() -> None:
    graph = random_graph()
    for metric in (keras.metrics.F1Score(name="f1"), "nix"):
        model = gnn.GCN(4, 4)
        model.compile("sgd", metrics=[metric])
        with pytest.raises(GraphError, match=r"The metrics.* cannot be computed for labels \["):
            model.fit(graph, epochs=1, verbose=0)

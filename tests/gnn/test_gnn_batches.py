"""Batches of graphs with a readout, and graphs of several kinds of edges."""

from typing import Any

import keras
import numpy as np
import pytest
from test_gnn_options import array
from test_gnn_semantics import VERTICES, fitted, output, random_graph

from partita import gnn
from partita.errors import GraphError


def small_graphs(count: int = 9) -> list[gnn.Graph]:
    """Random directed graphs of 1 to 6 vertices."""
    random = np.random.default_rng(0)
    graphs = []
    for i in range(count):
        vertices = 1 + i % 6
        source, target = random.integers(0, vertices, (2, 2 * vertices))
        features = random.standard_normal((vertices, 5))
        graphs.append(gnn.Graph.from_edges(source, target, vertices, features=features))
    return graphs


def test_a_batch_is_the_graphs_side_by_side() -> None:
    graphs = small_graphs()
    union: Any = gnn.batch(graphs, labels=np.arange(9) % 3, train=[0, 3, 8])
    layer = gnn.GCNConv(4)
    expected = np.concatenate([output(layer, graph) for graph in graphs])
    np.testing.assert_allclose(output(layer, union), expected, rtol=1e-5, atol=1e-6)
    assert union.members.tolist() == [i for i, g in enumerate(graphs) for _ in range(g.vertices)]
    assert union.labels[union.first_members].tolist() == [0, 1, 2] * 3
    assert np.flatnonzero(union.train).tolist() == union.first_members[[0, 3, 8]].tolist()


@pytest.mark.parametrize("aggregation", ["sum", "mean", "max"])
def test_a_readout_aggregates_the_vertices_of_each_graph(aggregation: str) -> None:
    graphs = small_graphs()
    given = output(lambda x, graph: graph.readout(x, aggregation), gnn.batch(graphs))
    rows = [getattr(np, aggregation)(graph.features, axis=0) for graph in graphs]
    expected = np.repeat(rows, [graph.vertices for graph in graphs], axis=0)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


def test_graphs_are_predicted_alike_on_devices_and_within_memory() -> None:
    union: Any = gnn.batch(small_graphs(), labels=np.arange(9) % 3, train=range(7), test=[7, 8])
    results = []
    for how in ({"devices": 3, "order": np.arange(union.vertices)[::-1]}, {"memory": "1MiB"}, {}):
        keras.utils.set_random_seed(0)
        model = gnn.GIN(8, 3, layers=1, readout="max")
        losses = fitted(model, union, **how)
        results.append((losses, model.predict(union)))
        if how:
            continue
        rows = results[-1][1]
        expected = -np.log(rows[[7, 8], [7 % 3, 8 % 3]]).mean()
        assert model.evaluate(union) == pytest.approx(expected, rel=1e-4)
        assert rows.shape == (9, 3)
    for losses, rows in results[:-1]:
        np.testing.assert_allclose(losses, results[-1][0], rtol=1e-4)
        np.testing.assert_allclose(rows, results[-1][1], rtol=1e-3, atol=1e-4)


def test_targets_of_graphs_and_their_files(tmp_path: Any) -> None:
    union: Any = gnn.batch(small_graphs(), labels=np.arange(9) / 2, train=range(9))
    assert union.has_targets and union.labels[union.first_members, 0].tolist()[3] == 1.5
    gnn.save(union, tmp_path / "batch.npz")
    assert gnn.open(tmp_path / "batch.npz").digest == union.digest
    with pytest.raises(GraphError, match="cannot hold the targets of 'batch'"):
        gnn.save(union, tmp_path / "batch.lux")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: gnn.batch([]), "A batch of no graphs"),
        (lambda: gnn.batch("ab"), "A batch has a str among its graphs"),
        (lambda: gnn.Graph.from_edges([0], [1], 3.5), "vertices=3.5 is out of range"),
        (lambda: gnn.Graph.from_relations({}), "takes the edges of each kind by its name"),
        (lambda: gnn.Graph.from_relations([[0], [1]]), "takes the edges of each kind by its name"),
        (lambda: gnn.split_links(random_graph(), validation="a"), "validation='a' and test=0.1"),
        (lambda: gnn.pyg_state(3), "A int is no layer"),
        (
            lambda: gnn.batch([*small_graphs(2), gnn.Graph.from_edges([0], [0])]),
            "Graph 2 of the batch has features of width 0, and the first one of 5",
        ),
        (lambda: gnn.batch(small_graphs(2), labels=[1]), "labels has 1 rows for 2 graphs"),
        (lambda: gnn.Graph.from_edges([0], [1], members=[0, 2]), "Graph 1 of the batch has no"),
        (lambda: gnn.Graph.from_edges([0], [1], members=[0, -1]), "Vertex 1 is a member of graph"),
        (lambda: fitted(gnn.GCN(4, 4, readout="mean"), random_graph()), "needs a batch of graphs"),
        (lambda: gnn.GCN(readout="median"), "readout='median' is unknown: use None, 'sum'"),
    ],
)
def test_bad_batches_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(GraphError, match=sentence):
        make()


# ------------------------------------------------------------------------------ kinds of edges


def relational_graph() -> gnn.Graph:
    random = np.random.default_rng(3)
    relations = {name: random.integers(0, VERTICES, (2, 40)) for name in ("a", "b", "c")}
    return gnn.Graph.from_relations(
        {name: (ends[0], ends[1]) for name, ends in relations.items()},
        VERTICES,
        features=random.standard_normal((VERTICES, 5)),
        labels=random.integers(0, 4, VERTICES),
        train=range(12),
    )


@pytest.mark.parametrize("aggregation", ["mean", "sum"])
@pytest.mark.parametrize("bases", [None, 2])
def test_each_kind_of_edges_has_a_matrix(aggregation: str, bases: int | None) -> None:
    graph: Any = relational_graph()
    layer = gnn.RelationalConv(4, 3, aggregation=aggregation, bases=bases)
    given = output(layer, graph)
    kernels = array(layer.kernels)
    if bases:
        kernels = np.einsum("rb,bfu->rfu", array(layer.shares), kernels)
    expected = graph.features @ array(layer.own)
    targets = np.repeat(np.arange(VERTICES), graph.in_degrees())
    for kind in range(3):
        adjacency = np.zeros((VERTICES, VERTICES))
        marked = graph.edge_features[:, kind] > 0
        np.add.at(adjacency, (targets[marked], graph.sources[marked]), 1)
        if aggregation == "mean":
            adjacency /= np.maximum(adjacency.sum(axis=1, keepdims=True), 1)
        expected += adjacency @ graph.features @ kernels[kind]
    np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-5)


class RelationalNetwork(gnn.GraphModel):
    """Two relational layers."""

    def conv(self, last: bool, **options: Any) -> Any:
        return gnn.RelationalConv(relations=3, **options)


def test_kinds_of_edges_train_alike_on_devices() -> None:
    results = []
    for devices in (2, 1):
        keras.utils.set_random_seed(0)
        results.append(fitted(RelationalNetwork(6, 4), relational_graph(), devices=devices))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def test_another_number_of_kinds_is_refused() -> None:
    with pytest.raises(GraphError, match="relations=2, and the graph has 3 edge features"):
        output(gnn.RelationalConv(4, 2), relational_graph())
    with pytest.raises(GraphError, match="Sums by edge features need some"):
        output(gnn.RelationalConv(4, 2), random_graph())

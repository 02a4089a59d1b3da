"""The graph: constructors, transpose, derived graphs, checks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.errors import GraphError
from partita.gnn import Graph, check
from partita.gnn.data import order

LAW = settings(deadline=None, max_examples=60)  # the first example compiles
FIELDS = ("offsets", "sources", "features", "labels", "train", "validation", "test", "weights")


@st.composite
def graphs(draw: st.DrawFn, heavy: bool | None = None) -> Graph:
    """Small graphs with isolated vertices, self edges, repeated edges, and every table or none."""
    vertices = draw(st.integers(1, 9))
    ids = st.integers(0, vertices - 1)
    edges = draw(st.lists(st.tuples(ids, ids), max_size=25))
    given: dict[str, Any] = {}
    if draw(st.booleans()) if heavy is None else heavy:
        given["weights"] = np.arange(len(edges), dtype=np.float32) + 0.5
    if draw(st.booleans()):
        given["features"] = np.arange(vertices * 3, dtype=np.float32).reshape(vertices, 3)
        given["labels"] = np.arange(vertices) % 4
        given |= {
            what: np.arange(vertices) % 3 == i
            for i, what in enumerate(("train", "validation", "test"))
        }
    return Graph.from_edges([a for a, _ in edges], [b for _, b in edges], vertices, **given)


def pairs(graph: Graph) -> list[tuple[int, int, float]]:
    """The multiset of a graph's edges with their weights, sorted."""
    targets = np.repeat(np.arange(graph.vertices), graph.in_degrees())
    weights = np.ones(graph.edges) if graph.weights is None else graph.weights
    return sorted(zip(graph.sources.tolist(), targets.tolist(), weights.tolist(), strict=True))


def equal(a: Graph, b: Graph) -> bool:
    """Whether two graphs have the same arrays of the same types."""
    both = [(getattr(a, f), getattr(b, f)) for f in FIELDS]
    return all(
        (x is None and y is None)
        or (x is not None and y is not None and x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in both
    )


@LAW
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=40))
def test_from_edges_keeps_the_edges_and_their_order_at_every_target(
    edges: list[tuple[int, int]],
) -> None:
    graph = Graph.from_edges(
        [a for a, _ in edges], [b for _, b in edges], 8, weights=np.arange(len(edges))
    )
    assert graph.offsets.dtype == np.int64 and graph.sources.dtype == np.int32
    for v in range(8):
        into = [(a, i) for i, (a, b) in enumerate(edges) if b == v]
        row = slice(graph.offsets[v], graph.offsets[v + 1])
        assert list(zip(graph.sources[row], graph.weights[row], strict=True)) == into  # pyright: ignore


@LAW
@given(graphs())
def test_the_transpose_has_the_same_edges_the_other_way_round(graph: Graph) -> None:
    back = graph.transposed()
    turned = Graph(
        back.offsets,
        back.destinations,
        weights=None if graph.weights is None else graph.weights[back.order],
    )
    assert sorted((b, a, w) for a, b, w in pairs(graph)) == pairs(turned)
    assert np.array_equal(
        graph.sources[back.order], np.repeat(np.arange(graph.vertices), graph.out_degrees())
    )
    assert graph.transposed() is back


@LAW
@given(graphs())
def test_transposed_twice_is_the_same_multiset(graph: Graph) -> None:
    once = graph.transposed()
    twice = Graph(once.offsets, once.destinations).transposed()
    assert pairs(Graph(twice.offsets, twice.destinations)) == pairs(replace(graph, weights=None))


@LAW
@given(graphs())
def test_degrees_count_the_edges_at_both_ends(graph: Graph) -> None:
    assert graph.in_degrees().tolist() == [
        sum(b == v for _, b, _ in pairs(graph)) for v in range(graph.vertices)
    ]
    assert graph.out_degrees().tolist() == [
        sum(a == v for a, _, _ in pairs(graph)) for v in range(graph.vertices)
    ]


@LAW
@given(graphs())
def test_self_edges_are_added_where_there_is_none(graph: Graph) -> None:
    loops = {a for a, b, _ in pairs(graph) if a == b}
    more = check(graph.with_self_edges())
    assert pairs(more) == sorted(
        pairs(graph) + [(v, v, 1.0) for v in range(graph.vertices) if v not in loops]
    )
    assert equal(more.with_self_edges(), more)


@LAW
@given(graphs())
def test_reverse_edges_are_added(graph: Graph) -> None:
    assert pairs(check(graph.with_reverse_edges())) == sorted(
        pairs(graph) + [(b, a, w) for a, b, w in pairs(graph)]
    )


@LAW
@given(graphs(), st.randoms())
def test_relabelled_is_the_same_graph_in_other_numbers(graph: Graph, random: Any) -> None:
    new = list(range(graph.vertices))
    random.shuffle(new)
    other = check(graph.relabelled(new))
    assert sorted((new[a], new[b], w) for a, b, w in pairs(other)) == pairs(graph)
    for table in ("features", "labels", "train", "validation", "test"):
        values = getattr(graph, table)
        if values is not None:
            back = np.empty_like(values)
            back[new] = getattr(other, table)
            assert np.array_equal(back, values)
    assert equal(other.relabelled(np.argsort(new)), graph)


@LAW
@given(graphs())
def test_orders_name_every_vertex_once(graph: Graph) -> None:
    for make in (order.by_degree, order.by_neighbours):
        assert sorted(make(graph)) == list(range(graph.vertices))
    assert (np.diff(graph.relabelled(order.by_degree(graph)).out_degrees()) <= 0).all()


def test_an_order_by_neighbours_unshuffles_a_path() -> None:
    path = np.random.default_rng(0).permutation(50)
    graph = Graph.from_edges([*path[:-1], *path[1:]], [*path[1:], *path[:-1]])
    near = graph.relabelled(order.by_neighbours(graph))
    assert (
        max(abs(a - b) for a, b, _ in pairs(near))
        == 1
        < max(abs(a - b) for a, b, _ in pairs(graph))
    )


# ---------------------------------------------------------------------------------------- made from


class Tensor:
    """The used part of a PyTorch tensor."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)

    def detach(self) -> Tensor:
        return self

    cpu = detach

    def numpy(self) -> np.ndarray:
        return self.values


SOURCE, TARGET = [0, 1, 2, 2], [1, 2, 0, 1]
X, Y = np.eye(4, 2, dtype=np.float32), np.array([1, 0, 2, 1])
TRAIN = np.array([True, False, True, False])
PLAIN = Graph.from_edges(SOURCE, TARGET, 4, features=X, labels=Y, train=TRAIN)


def test_from_pyg_reads_data_with_edge_index() -> None:
    data = SimpleNamespace(
        edge_index=Tensor([SOURCE, TARGET]),
        x=Tensor(X),
        y=Tensor(Y[:, None]),
        train_mask=Tensor(TRAIN),
        num_nodes=4,
    )
    assert equal(Graph.from_pyg(data), PLAIN)


class SparseTensor(Tensor):
    """A sparse one in bfloat16, of which NumPy takes neither."""

    layout = "torch.sparse_coo"
    dtype = "torch.bfloat16"

    def to_dense(self) -> SparseTensor:
        self.layout = "torch.strided"
        return self

    def float(self) -> Tensor:
        assert self.layout == "torch.strided"
        return Tensor(self.values)

    def numpy(self) -> np.ndarray:
        raise TypeError


def test_sparse_and_bfloat16_tensors_are_arrays() -> None:
    graph = Graph.from_edges(SOURCE, TARGET, 4, features=SparseTensor(X), labels=Y, train=TRAIN)
    assert equal(graph, PLAIN)


def test_from_pyg_makes_edge_types_edge_features() -> None:
    data = SimpleNamespace(edge_index=Tensor([SOURCE, TARGET]), edge_type=Tensor([0, 2, 0, 1]))
    relations = {"a": ([0, 2], [1, 0]), "b": ([2], [1]), "c": ([1], [2])}
    assert equal(Graph.from_pyg(data), Graph.from_relations(relations))
    data.edge_attr = Tensor([[1.0, 2.0]] * 4)
    with pytest.raises(GraphError, match="edge_type and edge_attr"):
        Graph.from_pyg(data)


@pytest.mark.parametrize(
    ("labels", "expected"), [([-2.0, 3, 0], [[-2.0], [3], [0]]), ([-1.0, 3, 0], [-1, 3, 0])]
)
def test_whole_numbers_below_minus_one_are_targets(labels: Any, expected: Any) -> None:
    graph = Graph.from_edges([0], [1], labels=np.array(labels))
    assert graph.labels is not None
    assert graph.labels.tolist() == expected


@pytest.mark.parametrize("weights", [[1.0, 2, 3, 4], None])
@pytest.mark.parametrize("torch_sparse", [True, False])
def test_from_pyg_reads_data_with_adj_t(torch_sparse: bool, weights: Any) -> None:
    heavy = Tensor(weights or [1.0, 1, 1, 1])
    entries = SimpleNamespace(
        coalesce=lambda: SimpleNamespace(
            indices=lambda: (Tensor(TARGET), Tensor(SOURCE)), values=lambda: heavy
        )
    )
    rows = (
        SimpleNamespace(coo=lambda: (Tensor(TARGET), Tensor(SOURCE), heavy))
        if torch_sparse
        else SimpleNamespace(to_sparse_coo=lambda: entries)
    )
    data = SimpleNamespace(
        adj_t=rows, x=Tensor(X), y=Tensor(Y), train_mask=Tensor(TRAIN), num_nodes=4
    )
    assert equal(
        Graph.from_pyg(data),
        Graph.from_edges(SOURCE, TARGET, features=X, labels=Y, train=TRAIN, weights=weights),
    )


def test_from_dgl_reads_a_homogeneous_graph() -> None:
    graph = SimpleNamespace(
        is_homogeneous=True,
        edges=lambda order: (Tensor(SOURCE), Tensor(TARGET)),
        num_nodes=lambda: 4,
        ndata={"feat": Tensor(X), "label": Tensor(Y), "train_mask": Tensor(TRAIN.astype(np.uint8))},
        edata={"w": Tensor([[1.0], [2], [3], [4]])},
    )
    assert equal(Graph.from_dgl(graph), PLAIN)
    assert equal(
        Graph.from_dgl(graph, weights="w"),
        Graph.from_edges(SOURCE, TARGET, features=X, labels=Y, train=TRAIN, weights=[1, 2, 3, 4]),
    )


class Networkx:
    """The used part of a NetworkX graph: nodes and edges with attributes."""

    def __init__(
        self,
        nodes: dict[str, dict[str, Any]],
        edges: list[tuple[str, str, dict[str, Any]]],
        directed: bool,
    ) -> None:
        self.nodes, self._edges, self._directed = nodes, edges, directed

    def edges(self, data: bool) -> list[tuple[str, str, dict[str, Any]]]:
        assert data
        return self._edges

    def is_directed(self) -> bool:
        return self._directed


@pytest.mark.parametrize("directed", [True, False])
def test_from_networkx_reads_both_kinds_of_graph(directed: bool) -> None:
    nodes = {n: {"x": [float(i), 1.0], "y": i} for i, n in enumerate("abc")}
    graph = Graph.from_networkx(
        Networkx(nodes, [("a", "b", {"w": 2.0}), ("c", "c", {"w": 3.0})], directed),
        features="x",
        labels="y",
        weights="w",
    )
    assert pairs(graph) == sorted([(0, 1, 2.0), (2, 2, 3.0)] + ([] if directed else [(1, 0, 2.0)]))
    assert graph.features is not None and graph.labels is not None
    assert graph.features.tolist() == [[0, 1], [1, 1], [2, 1]] and graph.labels.tolist() == [
        0,
        1,
        2,
    ]


@pytest.mark.parametrize("kind", ["coo", "csr", "csc", "lil"])
def test_from_scipy_takes_every_format_and_keeps_values_that_are_not_all_one(kind: str) -> None:
    ones = scipy.sparse.coo_array((np.ones(4), (SOURCE, TARGET)), shape=(4, 4)).asformat(kind)
    assert (
        pairs(Graph.from_scipy(ones)) == pairs(replace(PLAIN, weights=None))
        and Graph.from_scipy(ones).weights is None
    )
    assert pairs(Graph.from_scipy(2 * ones)) == [(a, b, 2.0) for a, b, _ in pairs(PLAIN)]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_ids_may_have_any_integer_type(dtype: Any) -> None:
    assert equal(
        Graph.from_edges(
            np.array(SOURCE, dtype),
            np.array(TARGET, dtype),
            features=X,
            labels=Y.astype(dtype),
            train=TRAIN,
        ),
        PLAIN,
    )


def test_sparse_features_lists_of_vertices_and_unlabelled_vertices_are_accepted() -> None:
    graph = Graph.from_edges(
        SOURCE, TARGET, features=scipy.sparse.csr_array(X), labels=[1.0, np.nan, 2, 1], train=[2, 0]
    )
    assert graph.features is not None and graph.labels is not None and graph.train is not None
    assert (
        np.array_equal(graph.features, X)
        and graph.labels.tolist() == [1, -1, 2, 1]
        and graph.train.tolist() == TRAIN.tolist()
    )
    assert graph.classes == 3 and graph.vertices == 4


# ------------------------------------------------------------------------------------------ refused

LARGE = scipy.sparse.coo_array(([1], ([0], [1])), shape=(2, 3))
HETERO = SimpleNamespace(edge_types=[("a", "to", "b")])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Graph.from_edges([0, 1, 5], [1, 0, 0], 3),
            "Edge 2 from 5 to 0 is outside the 3 vertices: use ids from 0 to 2.",
        ),
        (
            lambda: Graph.from_edges([0, -1], [1, 0]),
            "Edge 1 from -1 to 0 is outside the 2 vertices: use ids from 0 to 1.",
        ),
        (
            lambda: Graph.from_edges([0, 1], [9, 0], features=np.ones((2, 1))),
            "Edge 0 from 0 to 9 is outside the 2 vertices",
        ),
        (
            lambda: Graph.from_edges([0, 1], [1]),
            "source has 2 entries and target has 1: give one of each per edge.",
        ),
        (
            lambda: Graph.from_edges([0.5], [1]),
            "source is float64 [1]: give a list of integers.",
        ),
        (
            lambda: Graph.from_edges([[0]], [[1]]),
            "source is int64 [1, 1]: give a list of integers.",
        ),
        (
            lambda: Graph.from_edges([], []),
            "The number of vertices is unknown without edges: give vertices=.",
        ),
        (
            lambda: Graph.from_edges([0], [1], weights=[1, 2]),
            "weights has 2 entries for 1 edges: give one per edge",
        ),
        (lambda: Graph.from_edges([0], [1], weights=["a"]), "weights is <U1 [1]: give one number"),
        (lambda: Graph.from_edges([0], [1], weights=[[1, 2]]), "weights is int64 [1, 2]: give one"),
        (
            lambda: Graph.from_edges([0], [1], weights=np.ma.masked_array([1.0], [True])),
            "An array has masked entries",
        ),
        (
            lambda: Graph.from_edges([0], [1], 3, train=[0, 1, 1]),
            "train has a 0 or 1 for every vertex: give bools",
        ),
        (lambda: Graph.from_edges([0], [1], members=[0, 2**33]), "members has 8,589,934,592"),
        (
            lambda: Graph.from_relations({"a": ([0], [1], [2])}),
            "Relation 'a' has 3 entries: give (source, target), two lists.",
        ),
        (
            lambda: Graph.from_edges([0], [1], weights=[np.inf], name="g"),
            "g: The weight of edge 0 is inf: use finite weights.",
        ),
        (
            lambda: Graph.from_edges([0], [1], features=[1.0, 2.0]),
            "features is float64 [2]: give numbers [vertices, features].",
        ),
        (
            lambda: Graph.from_edges([0], [1], 2, features=np.ones((3, 1))),
            "graph: features has 3 rows for 2 vertices: give one per vertex.",
        ),
        (
            lambda: Graph.from_edges([0], [1], features=[[0, 1], [2, np.nan]]),
            "graph: Feature 1 of vertex 1 is nan: replace it with a finite number",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=[0, 1, 2], vertices=2),
            "labels has 3 rows for 2 vertices",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=[0, -2]),
            "Label -2 of vertex 1 is negative: use 0, 1, ..., or -1 for no label.",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=[0.5, np.inf]),
            "graph: Target 0 of vertex 1 is inf: use finite numbers, or NaN for no target.",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=[0, 2**40]),
            f"Label {2**40} of vertex 1 is out of range: use 0 to 2,147,483,647",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=np.ones((2, 2, 2))),
            "labels is float64 [2, 2, 2]: give one integer per vertex, or numbers",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=[[0, 1], [1, np.nan]], train=[1]),
            "Vertex 1 is in the train mask and has no label (NaN): remove it",
        ),
        (
            lambda: Graph.from_edges([0], [1], train=[False, False]),
            "The training mask is empty: mark vertices to train on",
        ),
        (lambda: Graph.from_edges([0], [1], train=[True]), "train has 1 rows for 2 vertices"),
        (
            lambda: Graph.from_edges([0], [1], test=[0, 7]),
            "test lists vertex 7 of 2 vertices: use ids from 0 to 1.",
        ),
        (
            lambda: Graph.from_edges([0], [1], test=[0.0, 1.0]),
            "test is float64 [2]: give one bool per vertex, or a list of vertices.",
        ),
        (
            lambda: Graph.from_edges([0], [1], labels=[0, -1], test=[1]),
            "Vertex 1 is in the test mask and has no label (-1): remove it from the mask",
        ),
        (
            lambda: PLAIN.relabelled([0, 1, 1, 2]),
            "The order omits vertex 3: list every vertex once.",
        ),
        (lambda: PLAIN.relabelled([0, 1]), "The order has 2 entries for 4 vertices"),
        (lambda: Graph.from_scipy(LARGE), "The matrix has 2 rows and 3 columns: give a square one"),
        (
            lambda: Graph.from_pyg(HETERO),
            "has neither edge_index nor adj_t, but the edge types ('a', 'to', 'b'): give a Data",
        ),
        (
            lambda: Graph.from_pyg(SimpleNamespace(edge_index=Tensor(np.zeros((5, 2), int)))),
            "edge_index has shape [5, 2]: give [2, edges], sources above targets.",
        ),
        (
            lambda: Graph.from_pyg(
                SimpleNamespace(
                    edge_index=Tensor([[0], [1]]), train_mask=Tensor(np.ones((2, 10), bool))
                )
            ),
            "train_mask has 10 columns, one per split: choose one, for example data.train_mask = "
            "data.train_mask[:, 0].",
        ),
        (
            lambda: Graph.from_dgl(SimpleNamespace(is_homogeneous=False, canonical_etypes=["x"])),
            "The DGL graph has the edge types x: give a graph of one type",
        ),
        (
            lambda: Graph.from_networkx(Networkx({"a": {}}, [], True), features="x"),
            "Node 'a' has no attribute 'x' for features='x': give one to every node.",
        ),
        (
            lambda: Graph.from_networkx(Networkx({"a": {}}, [("a", "a", {})], True), weights="w"),
            "The edge from 'a' to 'a' has no attribute 'w': give one to every edge.",
        ),
    ],
)
def test_bad_input_is_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def i32(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def i64(*ids: int) -> np.ndarray:
    return np.array(ids, np.int64)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            Graph(i32(0, 1), i32(0)),
            "graph: offsets is int32 [2]: use int64 [vertices + 1].",
        ),
        (Graph(i64(0), i32()), "The graph has no vertices: give edges, or vertices=."),
        (Graph(i64(0, 1), i64(0)), "sources is int64: use int32 for 1 vertices."),
        (Graph(i64(1, 1), i32(0)), "The first offset is 1: it must be 0."),
        (
            Graph(i64(0, 3, 2, 3), i32(0, 0, 0)),
            "offsets fall from 3 to 2 at vertex 1: they must not decrease.",
        ),
        (
            Graph(i64(0, 1, 2), i32(0, 0, 0)),
            "The last offset is 2 for 3 sources: they must be equal.",
        ),
        (
            Graph(i64(0, 1, 3), i32(0, 1, 2)),
            "Edge 2 into vertex 1 comes from vertex 2: use ids from 0 to 1.",
        ),
        (
            Graph(i64(0, 1, 3), i32(0, -1, 1)),
            "Edge 1 into vertex 1 comes from vertex -1: use ids from 0 to 1.",
        ),
        (
            Graph(i64(0, 1), i32(0), weights=np.ones(1)),
            "weights is float64 [1]: use float32 [1], one per edge.",
        ),
        (
            Graph(i64(0, 1), i32(0), features=np.ones((1, 1))),
            "features is float64 [1, 1]: use float32 [vertices, features].",
        ),
        (
            Graph(i64(0, 1), i32(0), train=np.ones(1)),
            "train is float64 [1]: use bool [vertices].",
        ),
    ],
)
def test_check_names_the_first_entry_that_is_wrong(graph: Graph, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        check(graph)
    assert message in str(caught.value)


def test_a_bad_entry_in_a_later_piece_is_named() -> None:
    features = np.zeros((600_000, 16), np.float32)
    features[500_001, 7] = np.inf
    with pytest.raises(GraphError, match="Feature 7 of vertex 500,001 is inf"):
        check(Graph(np.zeros(600_001, np.int64), i32(), features=features))


@pytest.mark.parametrize("dtype", ["float16", "longdouble"])
def test_weights_of_any_precision_are_read(dtype):
    weights = np.array([0.5, 2.0, 3.0], dtype)
    graph = Graph.from_edges([0, 1, 1], [1, 0, 2], weights=weights)
    assert graph.weights.tolist() == [2.0, 0.5, 3.0]

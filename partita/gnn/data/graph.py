"""The graph of full-graph training: directed edges, and features, label and masks of every vertex.

`Graph` is the value: constructors from arrays and from other libraries' graphs, degrees, the
transpose, and graphs derived from it. `check` states what later stages rely on. The loops are in
`csr`, the conversion of input in `arrays` and `foreign`, files in `files`.

Edges are stored by destination (CSR): the in-edges of vertex v come from
`sources[offsets[v]:offsets[v + 1]]`, in the order in which they were given. An aggregation then
reads rows of its sources and writes every row of its result once. The backward pass reads the
transpose, made at the first request. The price: 4 bytes per edge, and 8 more for the transpose.
Arrays may be memory-mapped files; nothing here changes one or copies one whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack

import numpy as np

from partita.errors import GraphError
from partita.gnn.data import csr, foreign
from partita.gnn.data.arrays import (
    ARRAYS,
    MASKS,
    TABLES,
    VertexTables,
    as_count,
    as_edge_features,
    as_ids,
    as_tables,
    as_weights,
    check_ids,
    vertex_count,
)
from partita.gnn.data.checks import (
    check_edge_features,
    check_edges,
    check_tables,
    check_transpose,
    check_weights,
)
from partita.gnn.data.csr import Transposed, id_type, offsets_of, transpose_csr
from partita.gnn.data.digest import array_digest, read_only


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A directed graph by destination; an undirected one has every edge in both directions.

    offsets     int64 [vertices + 1], from 0 to the number of edges
    sources     int32 [edges] (int64 beyond 2^31 vertices)
    features    float32 [vertices, F], or None
    labels      classes, int32 [vertices] from 0, -1 for no label; or targets, float32 [vertices, n]
                of a regression or of n labels, NaN for no target; or None
    train, validation, test     bool [vertices], or None
    weights     float32 [edges] in the order of `sources`, or None
    edge_features   float32 [edges, D] in the order of `sources`, or None
    members     int32 [vertices]: the graph of a `batch` that each vertex belongs to, or None
    """

    offsets: np.ndarray
    sources: np.ndarray
    features: np.ndarray | None = None
    labels: np.ndarray | None = None
    train: np.ndarray | None = None
    validation: np.ndarray | None = None
    test: np.ndarray | None = None
    weights: np.ndarray | None = None
    name: str = "graph"
    edge_features: np.ndarray | None = None
    members: np.ndarray | None = None

    # ----------------------------------------------------------------------------- constructors

    @staticmethod
    def from_edges(
        source: Any,
        target: Any,
        vertices: int | None = None,
        *,
        weights: Any = None,
        edge_features: Any = None,
        name: str = "graph",
        **tables: Unpack[VertexTables],
    ) -> Graph:
        """The graph with an edge from `source[i]` to `target[i]` for every i; edges may repeat.

        `vertices` defaults to the rows of `features` or `labels`, or else to the largest id plus
        one. `weights` has a number per edge, `edge_features` a row. `features` may be a SciPy
        matrix. A mask is one bool per vertex or a list of vertices. Raises GraphError, which names
        the first bad entry.

        >>> graph = Graph.from_edges([0, 1, 1], [1, 0, 2], labels=[0, 1, 1], train=[0])
        >>> graph
        graph: 3 vertices, 3 edges, 2 classes; 1 of train
        >>> graph.offsets, graph.sources
        (array([0, 1, 2, 3]), array([1, 0, 1], dtype=int32))
        """
        source = as_ids("source", source)
        target = as_ids("target", target)
        if len(source) != len(target):
            raise GraphError(
                f"source has {len(source):,} entries and target has {len(target):,}: give one of "
                "each per edge."
            )
        if vertices is None:
            vertices = vertex_count(source, target, tables)
        vertices = as_count("vertices", vertices, 0)
        check_ids(source, target, vertices)
        edge_weights = as_weights(weights, len(source))
        degrees = np.zeros(vertices, np.int64)
        csr.count(target, degrees)
        offsets = offsets_of(degrees)

        def by_target(values: np.ndarray, kind: Any) -> np.ndarray:
            out = np.empty(len(source), kind)
            csr.fill(target, values, offsets[:-1].copy(), out)
            return out

        arrays: dict[str, Any] = as_tables(tables, vertices)
        if edge_weights is not None:
            arrays["weights"] = by_target(edge_weights, np.float32)
        edge_table = as_edge_features(edge_features, len(source))
        if edge_table is not None:
            rows = by_target(np.arange(len(source)), np.int64)
            arrays["edge_features"] = edge_table[rows].astype(np.float32)
        return check(Graph(offsets, by_target(source, id_type(vertices)), **arrays, name=name))

    @staticmethod
    def from_relations(
        relations: Mapping[str, tuple[Any, Any]], vertices: int | None = None, **arguments: Any
    ) -> Graph:
        """The graph of several kinds of edges, given as (source, target) by the kind's name.

        Edge features mark the kinds in the order of their names here, one column for each, as
        `RelationalConv` reads them. `arguments` are the named arguments of `from_edges`.

        >>> relations = {"cites": ([0, 1], [1, 2]), "writes": ([2], [0])}
        >>> Graph.from_relations(relations).edge_features.tolist()
        [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]
        """
        if not isinstance(relations, Mapping) or not relations:
            raise GraphError(
                "from_relations takes the edges of each kind by its name, as {'cites': (source, "
                "target)}."
            )
        for name, pair in relations.items():
            if len(pair) != 2:
                raise GraphError(
                    f"Relation {name!r} has {len(pair)} entries: give (source, target), two lists."
                )
        ends = [
            (as_ids(f"{name} source", source), as_ids(f"{name} target", target))
            for name, (source, target) in relations.items()
        ]
        kinds = np.repeat(np.arange(len(ends)), [len(source) for source, _ in ends])
        return Graph.from_edges(
            np.concatenate([source for source, _ in ends]),
            np.concatenate([target for _, target in ends]),
            vertices,
            edge_features=np.eye(len(ends), dtype=np.float32)[kinds],
            **arguments,
        )

    @staticmethod
    def from_scipy(matrix: Any, **arguments: Any) -> Graph:
        """The graph of a square sparse matrix: entry [i, j] is an edge from i to j.

        This is the convention of `scipy.sparse.csgraph`. Values are the weights, unless every value
        is 1. `arguments` are the named arguments of `from_edges`.

        >>> import scipy.sparse
        >>> Graph.from_scipy(scipy.sparse.coo_array(([1, 1], ([0, 1], [1, 0])), shape=(3, 3)))
        graph: 3 vertices, 2 edges
        """
        return Graph.from_edges(**foreign.scipy_edges(matrix) | arguments)

    @staticmethod
    def from_networkx(
        graph: Any, *, weights: str | None = None, name: str = "graph", **tables: Any
    ) -> Graph:
        """The graph of a NetworkX graph, vertices in the order of `graph.nodes`.

        An undirected edge counts in both directions. `weights` names an edge attribute. Each of
        `features`, `labels`, `train`, `validation`, `test` names a node attribute, or is an array
        as for `from_edges`.
        """
        return Graph.from_edges(**foreign.networkx_edges(graph, weights, tables), name=name)

    @staticmethod
    def from_pyg(data: Any, *, name: str = "graph") -> Graph:
        """The graph of a PyG `Data` with edge_index or adj_t.

        Takes x, y, train_mask, val_mask, test_mask and edge_weight where the data has them. An
        edge_attr of one number per edge stands for edge_weight, of several for edge features. An
        edge_type becomes a column of edge features for each type, as in `from_relations`.
        """
        return Graph.from_edges(**foreign.pyg_edges(data), name=name)

    @staticmethod
    def from_dgl(graph: Any, *, weights: str | None = None, name: str = "graph") -> Graph:
        """The graph of a homogeneous DGL graph; `weights` names the edge data to use as weights.

        Takes feat, label, train_mask, val_mask and test_mask from ndata where it has them.
        """
        return Graph.from_edges(**foreign.dgl_edges(graph, weights), name=name)

    # ----------------------------------------------------------------------------- properties

    def __repr__(self) -> str:
        weighted = " with weights" if self.weights is not None else ""
        counts = [f"{self.vertices:,} vertices", f"{self.edges:,} edges{weighted}"]
        if self.edge_features is not None:
            counts.append(f"{self.edge_features.shape[1]:,} edge features")
        if self.features is not None:
            counts.append(f"{self.feature_count:,} features")
        if self.labels is not None:
            counts.append(f"{self.classes:,} {'targets' if self.has_targets else 'classes'}")
        if self.members is not None:
            counts.insert(0, f"{self.graphs:,} graphs")
        masks = []
        for name in MASKS:
            mask = getattr(self, name)
            if mask is not None:
                masks.append(f"{np.count_nonzero(mask):,} of {name}")
        text = f"{self.name}: {', '.join(counts)}"
        return f"{text}; {', '.join(masks)}" if masks else text

    @property
    def vertices(self) -> int:
        """Number of vertices."""
        return len(self.offsets) - 1

    @property
    def edges(self) -> int:
        """Number of edges, with repeated edges and self edges."""
        return len(self.sources)

    @property
    def graphs(self) -> int:
        """Number of graphs of a batch, 0 for a graph that is no batch."""
        return 0 if self.members is None else int(self.members.max(initial=-1)) + 1

    @property
    def first_members(self) -> np.ndarray:
        """int64 [graphs]: the first vertex of each graph of a batch."""
        if self.members is None:
            return np.zeros(0, np.int64)
        return np.unique(self.members, return_index=True)[1]

    @cached_property
    def classes(self) -> int:
        """Number of classes (the largest label plus one), or of targets; 0 without labels."""
        if self.labels is None or not len(self.labels):
            return 0
        if self.has_targets:
            return int(self.labels.shape[1])
        return int(self.labels.max()) + 1

    @property
    def has_targets(self) -> bool:
        """Whether labels are numbers to predict, not classes."""
        return self.labels is not None and self.labels.ndim == 2

    @property
    def feature_count(self) -> int:
        """Number of features of a vertex, 0 without features."""
        return 0 if self.features is None else int(self.features.shape[1])

    @property
    def immutable(self) -> bool:
        """Whether no array can be written, as for the arrays of files."""
        return all(read_only(getattr(self, field)) for field in ARRAYS)

    @property
    def digest(self) -> str:
        """Digest of all arrays; equal for graphs of equal content, whatever their names.

        It is computed once for an immutable graph, and at each call otherwise.
        """
        if self.immutable:
            return self._digest
        return array_digest([getattr(self, field) for field in ARRAYS])

    @cached_property
    def _digest(self) -> str:
        return array_digest([getattr(self, field) for field in ARRAYS])

    def tables(self) -> dict[str, np.ndarray | None]:
        """The tables with one row per vertex, by name."""
        return {name: getattr(self, name) for name in TABLES}

    def in_degrees(self) -> np.ndarray:
        """int64 [vertices]: number of in-edges of every vertex."""
        return np.diff(self.offsets)

    def out_degrees(self) -> np.ndarray:
        """int64 [vertices]: number of out-edges of every vertex."""
        return self._out_degrees

    @cached_property
    def _out_degrees(self) -> np.ndarray:
        degrees = np.zeros(self.vertices, np.int64)
        csr.count(self.sources, degrees)
        return degrees

    def self_edge_corrections(self, first: int, last: int) -> np.ndarray:
        """float32 [last - first]: weight to add to a vertex's self edges so that one counts.

        The vertices are from `first` to before `last`. 1 without a self edge, 1 - k with k of them.
        With weights, the last self edge counts, as in PyG.

        >>> Graph.from_edges([0, 0, 1], [0, 0, 2]).self_edge_corrections(0, 3)
        array([-1.,  1.,  1.], dtype=float32)
        """
        corrections = np.empty(last - first, np.float32)
        weights = np.zeros(0, np.float32) if self.weights is None else self.weights
        offsets = self.offsets[first : last + 1]
        csr.correct_self_edges(offsets, self.sources, weights, first, corrections)
        return corrections

    # ----------------------------------------------------------------------------- transpose

    def transposed(self, ordered: bool = True) -> Transposed:
        """The graph by source.

        With `ordered` it has its `order`, and is made once and stored with the graph. Without, it
        is made at every call, for callers that keep a copy.
        """
        if ordered or self.stored_transpose is not None:
            return self._transposed
        return transpose_csr(self.offsets, self.sources, self.out_degrees(), False)

    @cached_property
    def _transposed(self) -> Transposed:
        return transpose_csr(self.offsets, self.sources, self.out_degrees(), True)

    @property
    def stored_transpose(self) -> Transposed | None:
        """The transpose, if it was made or read from a file; None otherwise."""
        return self.__dict__.get("_transposed")

    def with_transpose(self, transposed: Transposed) -> Graph:
        """The same graph that stores a transpose, read from a file, instead of making its own."""
        graph = replace(self)
        graph.__dict__["_transposed"] = transposed
        return graph

    def as_it_is(self) -> Graph:
        """The same graph without derived values that earlier content of its arrays may have."""
        if self.immutable:
            return self
        edges_fixed = read_only(self.offsets) and read_only(self.sources)
        if self.stored_transpose is not None and edges_fixed:
            return self.with_transpose(self.stored_transpose)
        return replace(self)

    # ----------------------------------------------------------------------------- derived graphs

    def with_self_edges(self) -> Graph:
        """The graph in which every vertex has a self edge.

        A missing one is added with weight 1 and features of 0, behind the vertex's other in-edges.

        >>> Graph.from_edges([0, 1], [1, 1]).with_self_edges().sources
        array([0, 0, 1], dtype=int32)
        """
        missing = self.self_edge_corrections(0, self.vertices) == 1
        offsets = offsets_of(self.in_degrees() + missing)

        def widened(values: np.ndarray, padding: int) -> np.ndarray:
            out = np.empty(offsets[-1], values.dtype)
            csr.widen_rows(self.offsets, values, offsets, out, values.dtype.type(padding))
            return out

        sources = widened(self.sources, 0)
        sources[offsets[1:][missing] - 1] = np.flatnonzero(missing)
        return replace(self, offsets=offsets, sources=sources, **self.edge_tables(widened))

    def edge_tables(self, take: Callable[[np.ndarray, int], np.ndarray]) -> dict[str, Any]:
        """Weights and edge features of a graph of other edges.

        `take(values, padding)` gives values [edges] in the order of those edges. A new one has the
        padding: weight 1 and features of 0.
        """
        weights = None if self.weights is None else take(self.weights, 1)
        features = self.edge_features
        if features is not None:
            rows = take(np.arange(self.edges), self.edges)
            if rows.max(initial=-1) == self.edges:
                features = np.pad(features, ((0, 1), (0, 0)))
            features = features[rows]
        return {"weights": weights, "edge_features": features}

    def with_reverse_edges(self) -> Graph:
        """The graph with the reverse of every edge added, of the same weight.

        An undirected graph that is stored in one direction becomes the graph it stands for.
        """
        back = self.transposed()
        assert back.order is not None
        order = back.order
        offsets = self.offsets + back.offsets

        def joined(values: np.ndarray, back_values: np.ndarray) -> np.ndarray:
            out = np.empty(offsets[-1], values.dtype)
            csr.append_rows(self.offsets, values, back.offsets, back_values, offsets, out)
            return out

        sources = joined(self.sources, back.destinations)
        tables = self.edge_tables(lambda values, padding: joined(values, values[order]))
        return replace(self, offsets=offsets, sources=sources, **tables)

    def relabelled(self, order: Any) -> Graph:
        """The same graph with new vertex numbers: vertex i of the result is vertex `order[i]` here.

        Values per vertex of the result, say predictions y, return to this numbering by
        `z[order] = y`. `partita.gnn.data.order` has orders that number vertices near those that are
        read with them.

        >>> graph = Graph.from_edges([0, 0], [1, 2], labels=[5, 6, 7])
        >>> graph.relabelled([2, 1, 0]).labels
        array([7, 6, 5], dtype=int32)
        """
        order = _check_order(as_ids("order", order), self.vertices)
        number = np.empty(self.vertices, self.sources.dtype)
        number[order] = np.arange(self.vertices, dtype=self.sources.dtype)
        offsets = offsets_of(self.in_degrees()[order])

        def permuted(values: np.ndarray, padding: int = 0) -> np.ndarray:
            out = np.empty(self.edges, values.dtype)
            csr.permute_rows(self.offsets, values, order, offsets, out)
            return out

        tables = self.edge_tables(permuted)
        for name, table in self.tables().items():
            tables[name] = None if table is None else table[order]
        return replace(self, offsets=offsets, sources=number[permuted(self.sources)], **tables)


def _check_order(order: np.ndarray, vertices: int) -> np.ndarray:
    """The order itself; GraphError unless it lists every vertex once."""
    if len(order) != vertices:
        raise GraphError(
            f"The order has {len(order):,} entries for {vertices:,} vertices: list every vertex "
            "once."
        )
    listed = np.zeros(vertices, np.bool_)
    inside = (order >= 0) & (order < vertices)
    listed[order[inside]] = True
    if not listed.all():
        raise GraphError(
            f"The order omits vertex {int(np.argmin(listed)):,}: list every vertex once."
        )
    return order


def check(graph: Graph) -> Graph:
    """The graph itself, if later stages may rely on it; GraphError names the first bad entry.

    They rely on: offsets from 0, never decreasing, up to the number of edges; ids and labels in
    range; one row per vertex in every table; finite features and weights; a labelled vertex in a
    training mask that is given. Memory: a few MiB beside the graph, and 9 bytes per vertex.
    """
    try:
        check_edges(graph.offsets, graph.sources)
        if graph.weights is not None:
            check_weights(graph.weights, graph.edges)
        if graph.edge_features is not None:
            check_edge_features(graph.edge_features, graph.edges)
        check_tables(graph.tables(), graph.vertices)
        if graph.stored_transpose is not None:
            check_transpose(graph.stored_transpose, graph.vertices, graph.edges)
    except GraphError as error:
        raise GraphError(f"{graph.name}: {error}") from None
    return graph

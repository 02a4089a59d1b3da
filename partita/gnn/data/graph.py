"""The graph of full-graph training: who sends to whom, and what is known of every vertex.

Here: the value `Graph` with its transpose, self edges and relabelling; how it comes about from arrays and from SciPy, NetworkX,
PyG, DGL and OGB (by duck typing: none of them but SciPy is imported); `check`. Files are in `files`, which this module does not know.

Edges are kept by destination (CSR): the sources of the in-edges of vertex v are `sources[offsets[v]:offsets[v + 1]]`, in the order in
which they were given. So an aggregation reads rows of its sources and writes every row of its result once; the backward pass
reads the transpose, which is made when it is first asked for. The price: 4 bytes an edge, and 8 more for the transpose. Arrays may be
memory-mapped files; nothing here changes or copies one as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from partita.errors import GraphError
from partita.gnn.data.digest import array_digest, read_only

NARROW = 2**31
"""Up to so many vertices ids are int32, and up to so many edges positions are; beyond, int64."""

ROWS_AT_ONCE = 2**18
"""Rows that a check looks at in one go, so that it needs little memory whatever the graph."""

TABLES = {
    "features": np.float32,
    "labels": np.int32,
    "train": np.bool_,
    "validation": np.bool_,
    "test": np.bool_,
}
"""The fields with a row per vertex, and their types."""

ARRAYS = ("offsets", "sources", *TABLES, "weights")
"""The fields that are arrays."""


def position_type(edges: int) -> type[np.signedinteger[Any]]:
    """The type of positions of so many edges."""
    return np.int32 if edges <= NARROW else np.int64


def id_type(vertices: int) -> type[np.signedinteger[Any]]:
    """The type of vertex ids in a graph of so many vertices."""
    return np.int32 if vertices <= NARROW else np.int64


@dataclass(frozen=True, eq=False)
class Transposed:
    """A graph by source: `destinations[offsets[v]:offsets[v + 1]]` are the vertices that v sends to.

    `order[k]` is the position of that edge in the graph's `sources`, so `weights[order]` are its weights; None where nobody asked for it.
    """

    offsets: np.ndarray
    destinations: np.ndarray
    order: np.ndarray | None


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A directed graph by destination; an undirected one has every edge in both directions.

    offsets     int64 [vertices + 1], from 0 up to the number of edges
    sources     int32 [edges] (int64 beyond 2^31 vertices)
    features    float32 [vertices, F], or None
    labels      int32 [vertices] from 0, -1 where there is none; or None
    train, validation, test     bool [vertices], or None
    weights     float32 [edges] in the order of `sources`, or None
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

    # ------------------------------------------------------------------------------------------------------- made from

    @staticmethod
    def from_edges(
        source: Any,
        target: Any,
        vertices: int | None = None,
        *,
        features: Any = None,
        labels: Any = None,
        train: Any = None,
        validation: Any = None,
        test: Any = None,
        weights: Any = None,
        name: str = "graph",
    ) -> Graph:
        """The graph with an edge from `source[i]` to `target[i]` for every i; edges may repeat.

        `vertices` defaults to the rows of `features` or `labels`, or else to the largest id and one more. `features` may be a
        SciPy matrix. A mask is one bool per vertex or a list of vertices. Raises GraphError, which names the first bad entry.

        >>> graph = Graph.from_edges([0, 1, 1], [1, 0, 2], labels=[0, 1, 1], train=[0])
        >>> graph
        graph: 3 vertices, 3 edges, 2 classes; 1 of train
        >>> graph.offsets, graph.sources
        (array([0, 1, 2, 3]), array([1, 0, 1], dtype=int32))
        """
        source, target = _ids(source, "source"), _ids(target, "target")
        if len(source) != len(target):
            raise GraphError(
                f"There are {len(source):,} sources and {len(target):,} targets: an edge needs one of each."
            )
        if vertices is None:
            vertices = _vertices(source, target, features, labels)
        within(source, target, vertices)
        weights = None if weights is None else _array(weights).reshape(-1)
        if weights is not None and len(weights) != len(source):
            raise GraphError(
                f"There are {len(weights):,} weights for {len(source):,} edges: give one for each edge, in their order."
            )
        degrees = np.zeros(vertices, np.int64)
        count(target, degrees)
        offsets = offsets_of(degrees)
        sources = np.empty(len(source), id_type(vertices))
        fill(target, source, offsets[:-1].copy(), sources)
        placed = None
        if weights is not None:
            placed = np.empty(len(source), np.float32)
            fill(target, weights, offsets[:-1].copy(), placed)
        tables = _tables(
            vertices,
            {
                "features": features,
                "labels": labels,
                "train": train,
                "validation": validation,
                "test": test,
            },
        )
        return check(Graph(offsets, sources, **tables, weights=placed, name=name))

    @staticmethod
    def from_scipy(matrix: Any, **tables: Any) -> Graph:
        """The graph of a square sparse matrix: entry [i, j] is an edge from i to j, as in `scipy.sparse.csgraph`.

        Values are the weights, unless every one is 1. `tables` are the named arguments of `from_edges`.

        >>> import scipy.sparse
        >>> Graph.from_scipy(scipy.sparse.coo_array(([1, 1], ([0, 1], [1, 0])), shape=(3, 3)))
        graph: 3 vertices, 2 edges
        """
        rows, columns = matrix.shape
        if rows != columns:
            raise GraphError(
                f"A matrix of {rows:,} rows and {columns:,} columns is no graph: both are the vertices, so they must be equal."
            )
        entries = matrix.tocoo()
        given: dict[str, Any] = {
            "weights": None if (entries.data == 1).all() else entries.data
        } | tables
        return Graph.from_edges(entries.row, entries.col, rows, **given)

    @staticmethod
    def from_networkx(
        graph: Any, *, weights: str | None = None, name: str = "graph", **tables: Any
    ) -> Graph:
        """The graph of a NetworkX one: vertices in the order of `graph.nodes`, both directions of an edge where it is undirected.

        `weights` names an edge attribute; each of `features`, `labels`, `train`, `validation`, `test` names a node attribute, or is an
        array as for `from_edges`.
        """
        nodes = list(graph.nodes)
        number = {node: i for i, node in enumerate(nodes)}
        edges = [(number[a], number[b], values) for a, b, values in graph.edges(data=True)]
        if not graph.is_directed():
            edges += [(b, a, values) for a, b, values in edges if a != b]
        given = {
            what: _attribute(graph, nodes, what, key) if isinstance(key, str) else key
            for what, key in tables.items()
        }
        heavy = None
        if weights is not None:
            bare = next(((a, b) for a, b, values in edges if weights not in values), None)
            if bare is not None:
                raise GraphError(
                    f"The edge from {nodes[bare[0]]!r} to {nodes[bare[1]]!r} has no attribute {weights!r}: every edge needs its weight."
                )
            heavy = np.array([values[weights] for _, _, values in edges], np.float32)
        source, target = (np.array([e[side] for e in edges], np.int64) for side in (0, 1))
        return Graph.from_edges(source, target, len(nodes), weights=heavy, name=name, **given)

    @staticmethod
    def from_pyg(data: Any, *, name: str = "graph") -> Graph:
        """The graph of a PyG `Data`: edge_index or adj_t, and x, y, train_mask, val_mask, test_mask, edge_weight where it has them."""
        edges: Any = getattr(data, "edge_index", None)
        rows: Any = getattr(data, "adj_t", None)
        if edges is None and rows is None:
            kinds = (
                f" It has the edge types {', '.join(map(str, data.edge_types))}."
                if getattr(data, "edge_types", None)
                else ""
            )
            raise GraphError(
                f"A {type(data).__name__} without edge_index or adj_t is no graph of one kind of edge.{kinds} Give a Data, e.g. data.to_homogeneous()."
            )
        weights = getattr(data, "edge_weight", None)
        if edges is not None:
            edges = _array(edges)
            if edges.ndim != 2 or edges.shape[0] != 2:
                raise GraphError(
                    f"edge_index has the shape {edges.shape}: [2, edges] is needed, sources above targets."
                )
            source, target = edges
        else:
            if hasattr(rows, "coo"):  # torch_sparse
                target, source, weights = rows.coo()
            else:
                entries = rows.to_sparse_coo().coalesce()
                (target, source), weights = entries.indices(), entries.values()
        kept = {
            "features": "x",
            "labels": "y",
            "train": "train_mask",
            "validation": "val_mask",
            "test": "test_mask",
        }
        tables = {ours: _array(getattr(data, theirs, None)) for ours, theirs in kept.items()}
        for ours in ("train", "validation", "test"):
            if tables[ours] is not None and tables[ours].ndim == 2:
                theirs, splits = kept[ours], tables[ours].shape[1]
                raise GraphError(
                    f"{theirs} has {splits} columns, one a split: choose one, e.g. data.{theirs} = data.{theirs}[:, 0]."
                )
        count = getattr(data, "num_nodes", None)
        return Graph.from_edges(
            source,
            target,
            None if count is None else int(count),
            weights=weights,
            name=name,
            **tables,
        )

    @staticmethod
    def from_dgl(graph: Any, *, weights: str | None = None, name: str = "graph") -> Graph:
        """The graph of a homogeneous DGL one: ndata's feat, label, train_mask, val_mask, test_mask where it has them.

        `weights` names the edge data to take as weights.
        """
        if not getattr(graph, "is_homogeneous", True):
            raise GraphError(
                f"The DGL graph has the edge types {', '.join(map(str, graph.canonical_etypes))}: give one of one type, e.g. dgl.to_homogeneous(graph)."
            )
        source, target = graph.edges(order="eid")
        kept = {
            "features": "feat",
            "labels": "label",
            "train": "train_mask",
            "validation": "val_mask",
            "test": "test_mask",
        }
        tables = {
            ours: graph.ndata[theirs] for ours, theirs in kept.items() if theirs in graph.ndata
        }
        if weights is not None and weights not in graph.edata:
            raise GraphError(
                f"The DGL graph has no edge data {weights!r}: it has {', '.join(map(str, graph.edata)) or 'none'}."
            )
        heavy = None if weights is None else graph.edata[weights]
        return Graph.from_edges(
            source, target, int(graph.num_nodes()), weights=heavy, name=name, **tables
        )

    @staticmethod
    def from_ogb(folder: str | Path, *, split: str | None = None) -> Graph:
        """The graph of a node-property data set of OGB as it lies on disk: the folder with `raw/` and `split/` in it.

        Undirected sets (ogbn-products) are kept in one direction: `with_reverse_edges()` adds the other. `split` names one of several.
        """
        from partita.gnn.data.ogb import stream

        return stream(Path(folder), split).graph()

    # ------------------------------------------------------------------------------------------------------- what it is

    def __repr__(self) -> str:
        known = [
            f"{self.vertices:,} vertices",
            f"{self.edges:,} edges{' with weights' if self.weights is not None else ''}",
        ]
        if self.features is not None:
            known.append(f"{self.feature_count:,} features")
        if self.labels is not None:
            known.append(f"{self.classes:,} classes")
        masks = [
            f"{np.count_nonzero(m):,} of {what}"
            for what in ("train", "validation", "test")
            if (m := getattr(self, what)) is not None
        ]
        return f"{self.name}: {', '.join(known)}" + (f"; {', '.join(masks)}" if masks else "")

    @property
    def vertices(self) -> int:
        """How many vertices."""
        return len(self.offsets) - 1

    @property
    def edges(self) -> int:
        """How many edges, repeated ones and self edges included."""
        return len(self.sources)

    @cached_property
    def classes(self) -> int:
        """The largest label and one more; 0 without labels."""
        return 0 if self.labels is None or not len(self.labels) else int(self.labels.max()) + 1

    @property
    def feature_count(self) -> int:
        """Features of a vertex; 0 without any."""
        return 0 if self.features is None else int(self.features.shape[1])

    @property
    def digest(self) -> str:
        """Digest of all arrays; equal for graphs of equal content, whatever their names.

        It is computed once where no array can be written, as those of files, and at each call otherwise.
        """
        arrays = [getattr(self, field) for field in ARRAYS]
        if all(read_only(array) for array in arrays):
            return self._digest
        return array_digest(arrays)

    @cached_property
    def _digest(self) -> str:
        return array_digest([getattr(self, field) for field in ARRAYS])

    def in_degrees(self) -> np.ndarray:
        """int64 [vertices]: in-edges of every vertex."""
        return np.diff(self.offsets)

    def out_degrees(self) -> np.ndarray:
        """int64 [vertices]: out-edges of every vertex."""
        return self._out_degrees

    @cached_property
    def _out_degrees(self) -> np.ndarray:
        counts = np.zeros(self.vertices, np.int64)
        count(self.sources, counts)
        return counts

    def transposed(self, ordered: bool = True) -> Transposed:
        """The graph by source; made once with `order`, and without each time anew, for who keeps a copy."""
        if ordered or "_transposed" in self.__dict__:
            return self._transposed
        return transpose(self.offsets, self.sources, self.out_degrees(), False)

    @cached_property
    def _transposed(self) -> Transposed:
        return transpose(self.offsets, self.sources, self.out_degrees(), True)

    def without_self_edge(self, first: int, last: int) -> np.ndarray:
        """bool [last - first]: whether each vertex from `first` on has no edge to itself."""
        missing = np.ones(last - first, np.bool_)
        _find_self_edges(self.offsets[first : last + 1], self.sources, missing, first)
        return missing

    # --------------------------------------------------------------------------------------------------- made of this one

    def with_self_edges(self) -> Graph:
        """The graph in which every vertex has an edge to itself: one of weight 1 is added, after its other in-edges, where there was none.

        >>> Graph.from_edges([0, 1], [1, 1]).with_self_edges().sources
        array([0, 0, 1], dtype=int32)
        """
        missing = self.without_self_edge(0, self.vertices)
        offsets = offsets_of(self.in_degrees() + missing)
        sources = np.empty(offsets[-1], self.sources.dtype)
        weights = None if self.weights is None else np.empty(offsets[-1], np.float32)
        _add_self_edges(self.offsets, self.sources, missing, offsets, sources)
        if self.weights is not None and weights is not None:
            _copy_rows(self.offsets, self.weights, offsets, weights, np.float32(1))
        return replace(self, offsets=offsets, sources=sources, weights=weights)

    def with_reverse_edges(self) -> Graph:
        """The graph that has the reverse of every edge too, of the same weight: what an undirected graph stored in one direction means."""
        back = self.transposed()
        offsets = self.offsets + back.offsets
        sources = np.empty(offsets[-1], self.sources.dtype)
        _interleave(self.offsets, self.sources, back.offsets, back.destinations, offsets, sources)
        weights = None
        if self.weights is not None:
            weights = np.empty(offsets[-1], np.float32)
            _interleave(
                self.offsets, self.weights, back.offsets, self.weights[back.order], offsets, weights
            )
        return replace(self, offsets=offsets, sources=sources, weights=weights)

    def relabelled(self, order: Any) -> Graph:
        """The same graph with other numbers: vertex i of the result is vertex `order[i]` of this one.

        A value per vertex of the result, say predictions y, comes back to this numbering as `z[order] = y`. `partita.gnn.data.order` has orders
        that put vertices near those they are read with.

        >>> graph = Graph.from_edges([0, 0], [1, 2], labels=[5, 6, 7])
        >>> graph.relabelled([2, 1, 0]).labels
        array([7, 6, 5], dtype=int32)
        """
        order = _ids(order, "order")
        if len(order) != self.vertices:
            raise GraphError(
                f"The order has {len(order):,} entries for {self.vertices:,} vertices: give every vertex once."
            )
        seen = np.zeros(self.vertices, np.bool_)
        inside = (order >= 0) & (order < self.vertices)
        seen[order[inside]] = True
        if not seen.all():
            raise GraphError(
                f"The order leaves out vertex {int(np.argmin(seen)):,}: give every vertex once."
            )
        number = np.empty(self.vertices, self.sources.dtype)
        number[order] = np.arange(self.vertices, dtype=self.sources.dtype)
        offsets = offsets_of(self.in_degrees()[order])
        sources = np.empty(self.edges, self.sources.dtype)
        _relabel(self.offsets, self.sources, order, number, offsets, sources)
        weights = None
        if self.weights is not None:
            weights = np.empty(self.edges, np.float32)
            _permute_rows(self.offsets, self.weights, order, offsets, weights)
        tables = {
            what: None if getattr(self, what) is None else getattr(self, what)[order]
            for what in TABLES
        }
        return replace(self, offsets=offsets, sources=sources, weights=weights, **tables)


# ------------------------------------------------------------------------------------------------------------------ check


def check(graph: Graph) -> Graph:
    """The graph itself, if later stages may rely on it; GraphError names the first entry that is wrong.

    They rely on: offsets from 0, never falling, up to the number of edges; ids and labels in range; a row per vertex in every table; finite
    features and weights; someone in a training mask that there is. Memory: a few MiB beside the graph, and 9 bytes a vertex.
    """
    try:
        _check_edges(graph)
        _check_tables(graph)
        if (back := graph.__dict__.get("_transposed")) is not None:
            _check_transposed(graph, back)
    except GraphError as error:
        raise GraphError(f"{graph.name}: {error}") from None
    return graph


def _check_edges(graph: Graph) -> None:
    offsets, sources = graph.offsets, graph.sources
    if not len(offsets) or offsets.dtype != np.int64:
        raise GraphError("offsets must be int64 [vertices + 1], beginning with 0.")
    if graph.vertices == 0:
        raise GraphError("There is no vertex: give edges, or say how many vertices there are.")
    if sources.dtype != id_type(graph.vertices):
        raise GraphError(
            f"sources are {sources.dtype}: {graph.vertices:,} vertices need {np.dtype(id_type(graph.vertices))}."
        )
    if offsets[0] != 0:
        raise GraphError(f"offsets begin with {offsets[0]:,}: they must begin with 0.")
    falls = np.diff(offsets) < 0
    if falls.any():
        v = int(np.argmax(falls))
        raise GraphError(
            f"offsets fall from {offsets[v]:,} to {offsets[v + 1]:,} at vertex {v:,}: they must never fall."
        )
    if offsets[-1] != len(sources):
        raise GraphError(
            f"offsets end with {offsets[-1]:,} and there are {len(sources):,} sources: they must be equal."
        )
    if len(sources) and (sources.min() < 0 or sources.max() >= graph.vertices):
        at = next(
            start + int(np.argmax(bad))
            for start, part in parts(sources)
            if (bad := (part < 0) | (part >= graph.vertices)).any()
        )
        v = int(np.searchsorted(offsets, at, "right")) - 1
        raise GraphError(
            f"edge {at:,} (into vertex {v:,}) comes from vertex {sources[at]:,}: ids must be 0 to {graph.vertices - 1:,}."
        )
    if graph.weights is not None:
        if graph.weights.shape != sources.shape or graph.weights.dtype != np.float32:
            raise GraphError(
                f"weights are {graph.weights.dtype} {list(graph.weights.shape)}: float32 [{len(sources)}] is needed, one for each edge."
            )
        for start, part in parts(graph.weights):
            if not np.isfinite(part).all():
                at = start + int(np.argmin(np.isfinite(part)))
                raise GraphError(
                    f"the weight of edge {at:,} is {graph.weights[at]}: weights must be finite."
                )


def _check_transposed(graph: Graph, back: Transposed) -> None:
    """The transpose that a file brought along: of as many vertices and edges, and in range."""
    try:
        _check_edges(Graph(back.offsets, back.destinations))
    except GraphError as error:
        raise GraphError(f"in the transpose, {error}") from None
    order: Any = back.order
    if (
        back.offsets.shape != graph.offsets.shape
        or not graph.edges == len(back.destinations) == len(order)
        or len(order)
        and (order.min() < 0 or order.max() >= graph.edges)
    ):
        raise GraphError(
            "the transpose is of another graph: remove its files, and transpose again."
        )


def _check_tables(graph: Graph) -> None:
    for what, dtype in TABLES.items():
        table = getattr(graph, what)
        if table is None:
            continue
        if table.ndim != (2 if what == "features" else 1) or table.dtype != dtype:
            shape = "[vertices, features]" if what == "features" else "[vertices]"
            raise GraphError(
                f"{what} is {table.dtype} {list(table.shape)}: {np.dtype(dtype)} {shape} is needed."
            )
        if len(table) != graph.vertices:
            raise GraphError(
                f"{what} has {len(table):,} rows for {graph.vertices:,} vertices: it needs one for each."
            )
    if graph.features is not None:
        for start, part in parts(graph.features):
            if not np.isfinite(part).all():
                row, column = (int(i) for i in np.argwhere(~np.isfinite(part))[0])
                value = part[row, column]
                raise GraphError(
                    f"feature {column:,} of vertex {start + row:,} is {value}: features must be finite, so put a number there (e.g. numpy.nan_to_num)."
                )
    if graph.labels is not None and len(graph.labels) and graph.labels.min() < -1:
        v = int(np.argmax(graph.labels < -1))
        raise GraphError(
            f"the label of vertex {v:,} is {graph.labels[v]}: labels are 0 or more, or -1 for none."
        )
    if graph.train is not None and not graph.train.any():
        raise GraphError(
            "the training mask is empty: mark the vertices to train on, or leave the mask away."
        )
    for what in ("train", "validation", "test"):
        mask = getattr(graph, what)
        if mask is not None and graph.labels is not None and (mask & (graph.labels < 0)).any():
            v = int(np.argmax(mask & (graph.labels < 0)))
            raise GraphError(
                f"vertex {v:,} is in the {what} mask and has no label (-1): take it out of the mask, or label it."
            )


def parts(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """An array in pieces of a few rows, each with where it begins."""
    rows = max(1, ROWS_AT_ONCE * 16 // max(1, int(np.prod(array.shape[1:]))))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


# ---------------------------------------------------------------------------------------------------------- what is given


def _array(values: Any) -> Any:
    """What was given as a NumPy array: a list, an array, a tensor of PyTorch on any device; None stays None."""
    if values is None or isinstance(values, np.ndarray):
        return values
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _ids(values: Any, what: str) -> np.ndarray:
    found = _array(values)
    if found.size == 0:
        return np.zeros(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise GraphError(
            f"{what} is {found.dtype} {list(found.shape)}: a list of whole numbers is needed."
        )
    return found


def _vertices(source: np.ndarray, target: np.ndarray, features: Any, labels: Any) -> int:
    for table in (features, labels):
        if table is not None:
            return int(table.shape[0]) if hasattr(table, "shape") else len(table)
    if not len(source):
        raise GraphError(
            "Without edges it is not known how many vertices there are: say vertices=."
        )
    largest = max(int(source.max()), int(target.max()))
    plausible(largest, len(source))
    return largest + 1


def plausible(largest: int, edges: int) -> None:
    """GraphError if ids are so large for so few edges that they are numbers of something else, which would take all memory."""
    if largest >= 2**28 and largest > 256 * edges:
        raise GraphError(
            f"The largest id is {largest:,} and there are {edges:,} edges: number the vertices from 0 without gaps, or say vertices=."
        )


def within(source: np.ndarray, target: np.ndarray, vertices: int, before: int = 0) -> None:
    """GraphError for the first edge one of whose ends is not a vertex; `before` edges came before these."""
    bad = [
        np.argmax(m)
        for ids in (source, target)
        if len(ids) and (ids.min() < 0 or ids.max() >= vertices)
        for m in [(ids < 0) | (ids >= vertices)]
    ]
    if bad:
        i = int(min(bad))
        raise GraphError(
            f"Edge {before + i:,} leads from {source[i]:,} to {target[i]:,}, and there are {vertices:,} vertices: ids must be 0 to {vertices - 1:,}."
        )


def _tables(vertices: int, given: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """The fields with a row per vertex in their types."""
    return {
        what: None if values is None else _table(what, values, vertices)
        for what, values in given.items()
    }


def _table(what: str, values: Any, vertices: int) -> np.ndarray:
    if what == "features":
        found = values.toarray() if hasattr(values, "toarray") else _array(values)
        if found.ndim != 2 or found.dtype.kind not in "fiub":
            raise GraphError(
                f"features is {found.dtype} {list(found.shape)}: numbers [vertices, features] are needed."
            )
        return np.ascontiguousarray(found, np.float32)
    return (
        as_labels(_array(values)) if what == "labels" else as_mask(what, _array(values), vertices)
    )


def as_mask(what: str, found: np.ndarray, vertices: int) -> np.ndarray:
    """bool [vertices] of a mask, or of a list of vertices."""
    if found.ndim != 1 or found.dtype.kind not in "biu" and found.size:
        raise GraphError(
            f"{what} is {found.dtype} {list(found.shape)}: one bool per vertex or a list of vertices is needed."
        )
    if found.dtype == np.bool_ or (
        found.dtype == np.uint8 and len(found) == vertices and found.max(initial=0) <= 1
    ):
        return found.astype(np.bool_, copy=False)
    outside = (found < 0) | (found >= vertices)
    if outside.any():
        raise GraphError(
            f"{what} lists vertex {found[np.argmax(outside)]:,}, and there are {vertices:,} vertices: ids must be 0 to {vertices - 1:,}."
        )
    mask = np.zeros(vertices, np.bool_)
    mask[found.astype(np.int64)] = True
    return mask


def as_labels(found: np.ndarray) -> np.ndarray:
    """int32 [vertices] of labels; NaN (OGB's papers100M) is none."""
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1 or found.dtype.kind not in "iufb":
        raise GraphError(
            f"labels is {found.dtype} {list(found.shape)}: one whole number per vertex is needed."
        )
    if found.dtype.kind == "f":
        found = np.where(np.isnan(found), -1, found)
        if (found != np.floor(found)).any():
            v = int(np.argmax(found != np.floor(found)))
            raise GraphError(
                f"the label of vertex {v:,} is {found[v]}: labels are whole numbers from 0, or -1 for none."
            )
    if len(found) and (found.max() >= NARROW or found.min() < -NARROW):
        v = int(np.argmax((found >= NARROW) | (found < -NARROW)))
        raise GraphError(
            f"the label of vertex {v:,} is {found[v]}: labels are 0 to {NARROW - 1:,}, or -1 for none."
        )
    return found.astype(np.int32)


def _attribute(graph: Any, nodes: list[Any], what: str, key: str) -> np.ndarray:
    """A node attribute of a NetworkX graph, a row per node."""
    bare = next((n for n in nodes if key not in graph.nodes[n]), None)
    if bare is not None:
        raise GraphError(
            f"Node {bare!r} has no attribute {key!r}, which {what}={key!r} asks for: every node needs it."
        )
    return np.array([graph.nodes[n][key] for n in nodes])


# ---------------------------------------------------------------------------------------------------------------- kernels


def aligned(count: int, kind: Any) -> np.ndarray:
    """Zeros of this type that begin at a multiple of 64 bytes: XLA on a CPU then takes them as they are, without a copy. Many take no memory yet."""
    nbytes = count * np.dtype(kind).itemsize
    room = np.zeros(nbytes + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + nbytes].view(kind)


def offsets_of(degrees: np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each row begins, of how long each is."""
    offsets = np.zeros(len(degrees) + 1, np.int64)
    np.cumsum(degrees, out=offsets[1:])
    return offsets


def transpose(
    offsets: np.ndarray, ids: np.ndarray, degrees: np.ndarray, ordered: bool
) -> Transposed:
    """Columns with their rows, of rows with their columns `ids[offsets[r]:offsets[r + 1]]`, each of which is there `degrees` times in all.

    What it has has the room of `ids`, zeros behind where those are longer than the edges.
    """
    back = offsets_of(degrees)
    rows, order = (
        aligned(len(ids), ids.dtype),
        aligned(len(ids) if ordered else 0, position_type(len(ids))),
    )
    _transpose(offsets, ids, back[:-1].copy(), rows, order)
    return Transposed(back, rows, order if ordered else None)


@njit(cache=True)
def count(keys, counts):
    """Adds to counts[k] how often k is in keys."""
    for k in keys:
        counts[k] += 1


@njit(cache=True)
def fill(keys, values, cursor, out):
    """The stable counting sort's second pass: values[i] goes to where the cursor of keys[i] stands, which moves on.

    How many were placed: fewer than there are if one has no place.
    """
    for i in range(len(keys)):
        k = keys[i]
        if k < 0 or k >= len(cursor) or cursor[k] >= len(out):
            return i
        out[cursor[k]] = values[i]
        cursor[k] += 1
    return len(keys)


@njit(cache=True)
def targets_of(offsets, begin, out):
    """The targets of the edges from position `begin` on."""
    v = np.searchsorted(offsets, begin, "right") - 1
    for i in range(len(out)):
        while offsets[v + 1] <= begin + i:
            v += 1
        out[i] = v


@njit(cache=True)
def _transpose(offsets, sources, cursor, destinations, order):
    ordered = len(order) > 0
    for v in range(len(offsets) - 1):
        for e in range(offsets[v], offsets[v + 1]):
            s = sources[e]
            k = cursor[s]
            cursor[s] = k + 1
            destinations[k] = v
            if ordered:
                order[k] = e


@njit(cache=True)
def _find_self_edges(offsets, sources, missing, first):
    for v in range(len(offsets) - 1):
        for e in range(offsets[v], offsets[v + 1]):
            if sources[e] == first + v:
                missing[v] = False
                break


@njit(cache=True)
def _add_self_edges(offsets, sources, missing, new, out):
    for v in range(len(offsets) - 1):
        k = new[v]
        for e in range(offsets[v], offsets[v + 1]):
            out[k] = sources[e]
            k += 1
        if missing[v]:
            out[k] = v


@njit(cache=True)
def _copy_rows(offsets, values, new, out, rest):
    """Rows into longer ones, the rest of each filled with `rest`."""
    for v in range(len(offsets) - 1):
        k = new[v]
        for e in range(offsets[v], offsets[v + 1]):
            out[k] = values[e]
            k += 1
        out[k : new[v + 1]] = rest


@njit(cache=True)
def _interleave(offsets, values, others, more, new, out):
    """Each row of one after the same row of the other."""
    for v in range(len(offsets) - 1):
        k = new[v]
        for e in range(offsets[v], offsets[v + 1]):
            out[k] = values[e]
            k += 1
        for e in range(others[v], others[v + 1]):
            out[k] = more[e]
            k += 1


@njit(cache=True)
def _relabel(offsets, sources, order, number, new, out):
    for i in range(len(order)):
        k = new[i]
        for e in range(offsets[order[i]], offsets[order[i] + 1]):
            out[k] = number[sources[e]]
            k += 1


@njit(cache=True)
def _permute_rows(offsets, values, order, new, out):
    for i in range(len(order)):
        k = new[i]
        for e in range(offsets[order[i]], offsets[order[i] + 1]):
            out[k] = values[e]
            k += 1

"""From a graph to the data of a training step, on one device or on several.

`prepare(graph, key)` numbers the vertices, cuts them into parts, chooses how each aggregation is
split, and places every part on its device. Its result is one frozen value, a `PreparedGraph`. The
key states everything that decides it: the content of the graph, the split, and the architecture of
the model. Equal keys give equal data, so that prepared graphs are reused. Of several processes each
prepares the parts of its own devices only.

Steps and their programs are in `step`, training in `runs` and `trainer`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.core
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partita.errors import GraphError
from partita.execute import process_arrays, processes
from partita.execute.devices import at_hand, detect
from partita.gnn.data.arrays import MASKS, as_array, as_count, as_ids
from partita.gnn.data.digest import array_digest
from partita.gnn.data.graph import Graph
from partita.gnn.data.order import order_of
from partita.gnn.kernels import stamp
from partita.gnn.kernels.bridge import symbolic
from partita.gnn.nn.block import (
    AXIS,
    Block,
    block_of,
    of_vertices,
    recorded_calls,
    refuse_unread_weights,
)
from partita.gnn.split.choice import columns_of, edge_seconds, row_seconds
from partita.gnn.split.learned import initial_points, prefix_sums
from partita.gnn.split.partition import (
    AggregationKind,
    Capacity,
    Parts,
    aggregations_of_part,
    arranged,
    block_of_part,
    cut,
    near_training,
    restored,
)

BY_EDGES = ("attention", "message")
"""Kinds of aggregations whose features cannot be split over devices."""

DEGREE_TOLERANCE = 1e-5
"""Share of the largest weight by which rounding may take a degree of 0 below 0."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GraphData:
    """Arguments of a step.

    x           float32 [rows, features]
    labels      int32 [rows] or float32 [rows, n], 0 for a vertex without a label
    masks       float32 [rows] of each of `MASKS`
    block       the edges
    importance  float32 [rows]: weight of each vertex in the training loss; None: 1
    """

    x: Any
    labels: Any
    masks: dict[str, Any]
    block: Block
    importance: Any = None


# --------------------------------------------------------------------------------------- the key


@dataclass(frozen=True)
class Numbers:
    """An array that is compared by its digest."""

    digest: str
    values: np.ndarray = field(compare=False, repr=False)

    @staticmethod
    def of(values: Any) -> Numbers:
        """A copy of numbers, so that later changes of theirs do not matter."""
        array = np.array(values)
        return Numbers(array_digest([array]), array)


@dataclass(frozen=True)
class Split:
    """A graph over devices, as `fit` is asked for it; arrays become `Numbers`, compared by content.

    GraphError if `columns` does not divide the devices.

    partition   a partitioner, split points [devices + 1], or the part of every vertex [vertices]
    columns     devices that share the features of an aggregation; None: the cheapest number
    order       the order that vertices are numbered by; None: as given
    """

    devices: int = 1
    partition: Any = "edges"
    columns: int | None = None
    order: Any = None

    def __post_init__(self) -> None:
        as_count("devices", self.devices, 1)
        if self.columns is not None and self.devices % as_count("columns", self.columns, 1):
            raise GraphError(
                f"columns={self.columns} does not divide {self.devices} devices: "
                f"use a divisor of {self.devices}."
            )
        for field_name in ("partition", "order"):
            value = getattr(self, field_name)
            if isinstance(value, (str, Numbers)) or (field_name == "order" and value is None):
                continue
            if np.ndim(as_array(value)) == 0:
                raise GraphError(
                    f"{field_name}={value!r} is unknown: give a name, or a list of integers."
                )
            # signed, so that differences of falling points are negative
            ids = as_ids(field_name, value).astype(np.int64)
            object.__setattr__(self, field_name, Numbers.of(ids))

    @property
    def learns(self) -> bool:
        """Whether the split moves between epochs, by measured times."""
        return self.devices > 1 and self.partition == "learned"


def all_devices(devices: int) -> int:
    """The number of devices of all processes that train together."""
    if processes.alone():
        return devices
    count = jax.device_count()
    if devices not in (1, count):
        raise GraphError(
            f"devices={devices} is not the number of devices of all {jax.process_count()} "
            f"processes: use devices={count}, or remove it."
        )
    return count


@dataclass(frozen=True)
class Architecture:
    """The properties of a model that decide how graphs are prepared for it.

    aggregations    (features, 'sum', 'max' or 'attention') of every aggregation, in order
    matrix_entries  trainable numbers in matrices
    matrix_columns  columns of these matrices: features that their products give a row
    by_vertex       whether vertices meet in aggregations only (`FullGraphTraining`)
    normalizes      for each division by square roots of degrees: the weight of a missing self edge,
                    0 where none is added
    """

    aggregations: tuple[tuple[int, str], ...]
    matrix_entries: int
    matrix_columns: int
    by_vertex: bool
    normalizes: tuple[float, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether every aggregation is a sum, which can be taken over edges in portions."""
        return all(kind == "sum" for _, kind in self.aggregations)


def architecture_of(model: Any, graph: Graph) -> Architecture:
    """The architecture of a built model on graphs like this one.

    Its shapes are traced; nothing is computed.
    """

    def predict(trainable: Any, others: Any, data: GraphData) -> Any:
        return model.stateless_call(trainable, others, data.x, graph=data.block, training=False)[0]

    with recorded_calls() as calls, symbolic():
        jax.eval_shape(
            predict,
            _shapes(model.trainable_variables),
            _shapes(model.non_trainable_variables),
            _data_shapes(graph),
        )
    _check_built(model)
    matrices = [v.shape for v in model.trainable_variables if len(v.shape) > 1]
    return Architecture(
        aggregations=tuple(calls.aggregations),
        matrix_entries=sum(int(np.prod(shape)) for shape in matrices),
        matrix_columns=sum(shape[-1] for shape in matrices),
        by_vertex=bool(vars(type(model)).get("by_vertex") and model.by_vertex),
        normalizes=tuple(sorted(calls.normalizes)),
    )


def _check_built(model: Any) -> None:
    """GraphError if a traced call has built a layer: its variables have no values."""
    for layer in model._flatten_layers(include_self=False):
        if any(isinstance(v._value, jax.core.Tracer) for v in layer.variables):
            raise GraphError(
                f"Layer {layer.name!r} of {type(model).__name__} is not built before it is called: "
                "build it in the model's build(input_shape), as layer.build((None, features)), and "
                "make the model anew."
            )


def _data_shapes(graph: Graph) -> GraphData:
    """The data of a whole graph as shapes, from those of a small one."""
    weights = None if graph.weights is None else np.zeros(5, np.float32)
    edge_features = None
    if graph.edge_features is not None:
        edge_features = np.zeros((5, graph.edge_features.shape[1]), np.float32)
    small = Graph(
        np.array([0, 5, 5], np.int64),
        np.zeros(5, np.int32),
        np.zeros((2, graph.feature_count), np.float32),
        weights=weights,
        edge_features=edge_features,
        members=None if graph.members is None else np.zeros(2, np.int32),
    )
    sizes = {1: 1, 2: graph.vertices, 3: graph.vertices + 1, 5: graph.edges}

    def grown(array: Any) -> Any:
        return jax.ShapeDtypeStruct((sizes[array.shape[0]], *array.shape[1:]), array.dtype)

    return jax.tree.map(grown, data_of(small))


def check_weights_suit(graph: Graph, architecture: Architecture) -> None:
    """GraphError if the aggregations of a model cannot use the edge weights of a graph."""
    kinds = {kind for _, kind in architecture.aggregations}
    if graph.edge_features is not None and "message" not in kinds:
        raise GraphError(
            f"'{graph.name}' has edge features, and the model has no layer that reads them: use a "
            "gnn.MessagePassing layer, or remove them with "
            "dataclasses.replace(graph, edge_features=None)."
        )
    if graph.weights is None:
        return
    if graph.edge_features is not None:
        raise GraphError(
            f"'{graph.name}' has edge weights and edge features, and a gnn.MessagePassing layer "
            "reads one of them: make the weights a column of the edge features."
        )
    for _, kind in architecture.aggregations:
        refuse_unread_weights(f"'{graph.name}'", kind)
    if not architecture.normalizes or graph.weights.min(initial=0) >= 0:
        return
    _, self_correction, load = of_vertices(graph, 0, graph.vertices)
    for missing in architecture.normalizes:
        added = np.where(self_correction == 1, missing, self_correction)
        degrees = load + added if missing else load
        if degrees.min() < -DEGREE_TOLERANCE * np.abs(graph.weights).max():
            vertex = int(np.argmin(degrees))
            with_self_edge = ", its self edge included," if missing else ""
            raise GraphError(
                f"The weights of the in-edges of vertex {vertex:,}{with_self_edge} sum to "
                f"{degrees[vertex]:g}, which has no square root for the normalization of GCNConv: "
                "use weights that are not negative, or GCNConv(normalize=False)."
            )


def _shapes(variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(v.value.shape, v.value.dtype) for v in variables]


@dataclass(frozen=True)
class PreparationKey:
    """Everything that decides the data of a step.

    graph       `Graph.digest`
    importance  float32 [vertices] of `GraphData.importance`, or None
    """

    graph: str
    split: Split
    architecture: Architecture
    importance: Numbers | None = None


def within_memory(key: PreparationKey) -> PreparationKey:
    """The key of a memory plan: no split features, and aggregations over all edges."""
    return replace(
        key,
        split=replace(key.split, columns=1),
        architecture=replace(key.architecture, by_vertex=False),
    )


# ------------------------------------------------------------------------------------- the value


@dataclass(frozen=True)
class PreparedGraph:
    """A graph as the steps of a model read it.

    Two are equal if their keys and split points are: these decide the rest.

    key             graph, split and model that the data was prepared for
    points          split points; () on one device
    source          the graph as given
    numbered        the graph as its vertices are numbered inside
    order           the user's number of each vertex of `numbered`; None if they are the same
    near            vertices near the training ones, as `near_training` gives them
    parts           contents of the devices; None on one device
    data            the arguments of a step, on the devices
    sums            `prefix_sums` of a split that is learned, else None
    seconds         seconds of the whole preparation
    placing_seconds seconds of cutting and placing alone, the price of another split
    """

    key: PreparationKey
    points: tuple[int, ...]
    source: Graph = field(compare=False, repr=False)
    numbered: Graph = field(compare=False, repr=False)
    order: np.ndarray | None = field(compare=False, repr=False)
    near: tuple[np.ndarray, ...] = field(compare=False, repr=False)
    parts: Parts | None = field(compare=False, repr=False)
    data: GraphData = field(compare=False, repr=False)
    sums: np.ndarray | None = field(compare=False, repr=False)
    seconds: float = field(compare=False)
    placing_seconds: float = field(compare=False)

    @property
    def devices(self) -> int:
        return self.key.split.devices

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """(features, devices that share them) of aggregations of that many features.

        () on one device.
        """
        return self.data.block.columns

    def in_given_order(self, rows: np.ndarray) -> np.ndarray:
        """[vertices, ...] in the user's numbers, of rows as steps give them."""
        if self.parts is not None:
            return self.parts.joined(rows)
        return rows if self.order is None else restored(rows, self.order)

    def tile(self, table: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        """float32 [rows, columns]: a tile of a table [vertices, columns] in the user's numbers.

        Of several devices [devices, rows, columns], of the rows of each. Rows of padding are 0.
        """
        points = [0, self.numbered.vertices] if self.parts is None else self.parts.points
        order = self.order if self.parts is None else self.parts.order
        tiles = np.zeros((self.devices, *_size_of(rows, columns)), np.float32)
        for i in range(self.devices):
            first, last = (min(points[i] + row, points[i + 1]) for row in (rows.start, rows.stop))
            vertices = slice(first, last) if order is None else order[first:last]
            tiles[i, : last - first] = table[vertices, columns]
        return tiles[0] if self.devices == 1 else tiles

    @property
    def device_bytes(self) -> int:
        """Bytes of the data on each device."""
        return sum(array.nbytes for array in jax.tree.leaves(self.data)) // self.devices


def _size_of(rows: slice, columns: slice) -> tuple[int, int]:
    return rows.stop - rows.start, columns.stop - columns.start


def prepare(graph: Graph, key: PreparationKey) -> PreparedGraph:
    """The prepared graph of a key. GraphError or MachineError if the split is not possible."""
    began = time.perf_counter()
    split = key.split
    at_hand(split.devices)
    numbered, order = _numbered(graph.as_it_is(), split.order)
    sums = points = near = None
    if split.learns:
        # One-time costs, and waiting for other processes, are no part of the price of a move.
        stamp.ready()
        _load_kernels()
        sums = prefix_sums(numbered)
        points = _first_points(sums, graph.feature_count, key)
        near = _near(numbered, key.architecture)
        processes.meet()
    placing_began = time.perf_counter()
    if split.devices == 1:
        near = _near(numbered, key.architecture)
        parts = None
        data = jax.device_put(_whole(numbered, order, near, _importance(key, order)))
    else:
        graph_cut = _cut(numbered, order, key, near=near, points=points)
        near = graph_cut.near
        parts = graph_cut.parts
        data = _on_devices(graph_cut, key)
    ended = time.perf_counter()
    return PreparedGraph(
        key=key,
        points=_tuple_of(parts),
        source=graph,
        numbered=numbered,
        order=order,
        near=near,
        parts=parts,
        data=data,
        sums=sums,
        seconds=ended - began,
        placing_seconds=ended - placing_began,
    )


def resplit(
    prepared: PreparedGraph, points: np.ndarray, capacity: Capacity | None
) -> PreparedGraph:
    """The same graph split at other points.

    `capacity`: sizes of every device, if the parts fit; otherwise they have the sizes they need.
    """
    began = time.perf_counter()
    key = prepared.key
    graph_cut = _cut(
        prepared.numbered, prepared.order, key, prepared.near, points=points, capacity=capacity
    )
    data = _on_devices(graph_cut, key)
    return replace(
        prepared,
        points=_tuple_of(graph_cut.parts),
        parts=graph_cut.parts,
        data=data,
        placing_seconds=time.perf_counter() - began,
    )


def fits(prepared: PreparedGraph, points: np.ndarray) -> bool:
    """Whether parts between these split points fit into the capacity of the parts there are."""
    assert prepared.parts is not None
    capacity = prepared.parts.capacity
    graph_cut = _cut(
        prepared.numbered,
        prepared.order,
        prepared.key,
        prepared.near,
        points=points,
        capacity=capacity,
    )
    return graph_cut.parts.capacity == capacity


def _tuple_of(parts: Parts | None) -> tuple[int, ...]:
    return () if parts is None else tuple(parts.points.tolist())


def _numbered(graph: Graph, order: str | Numbers | None) -> tuple[Graph, np.ndarray | None]:
    """(the graph as its vertices are numbered inside, their order if it is another one)."""
    if order is None:
        return graph, None
    vertices = order_of(graph, order.values if isinstance(order, Numbers) else order)
    return graph.relabelled(vertices), vertices


def _near(graph: Graph, architecture: Architecture) -> tuple[np.ndarray, ...]:
    """Vertices that each of the last aggregations of a training step needs, the last one first."""
    if not architecture.by_vertex:
        return ()
    return tuple(near_training(graph, len(architecture.aggregations)))


def _load_kernels() -> None:
    """Compiles or loads the kernels that make parts, on a graph of two vertices."""
    small = Graph.from_edges([0, 1], [1, 0])
    block_of_part(small, cut(small, np.array([0, 1, 2])), 0)


def _first_points(sums: np.ndarray, features: int, key: PreparationKey) -> np.ndarray:
    """Split points before anything is measured, by the machine's seconds of rows and edges."""
    architecture = key.architecture

    def seconds() -> str:
        machine = detect(key.split.devices)
        aggregations = architecture.aggregations
        row = row_seconds(aggregations, architecture.matrix_entries, machine)
        edge = edge_seconds(aggregations, features, machine)
        return json.dumps([row, edge])

    row, edge = json.loads(processes.from_first("rows and edges", seconds))
    return initial_points(sums, key.split.devices, row, edge)


# --------------------------------------------------------------------------------------- cutting


@dataclass(frozen=True)
class GraphCut:
    """Parts of a graph: the graph as it is numbered for them.

    Devices that share aggregations; `PreparedGraph.near`.
    """

    graph: Graph
    parts: Parts
    columns: tuple[tuple[int, int], ...]
    near: tuple[np.ndarray, ...]


def _cut(
    numbered: Graph,
    order: np.ndarray | None,
    key: PreparationKey,
    near: tuple[np.ndarray, ...] | None = None,
    points: np.ndarray | None = None,
    capacity: Capacity | None = None,
) -> GraphCut:
    """The parts of a graph by the partition of a key, or between `points`.

    `capacity`: as in `partition.cut`.
    """
    split = key.split
    partition = _partition_inside(split, numbered, order) if points is None else points
    graph, points, new_order = arranged(numbered, split.devices, partition)
    if new_order is not None:
        order = new_order if order is None else order[new_order]
    if near is None:
        near = _near(graph, key.architecture)
    columns = _columns(graph, points, key)
    kinds = _aggregation_kinds(key.architecture, dict(columns), near)
    parts = cut(graph, points, capacity, kinds, moves=split.learns)
    return GraphCut(graph, replace(parts, order=order), columns, near)


def _partition_inside(split: Split, numbered: Graph, order: np.ndarray | None) -> Any:
    """The partition, with the part of every vertex in the order of the numbers inside."""
    if not isinstance(split.partition, Numbers):
        return split.partition
    values = split.partition.values
    by_vertex = len(values) == numbered.vertices != split.devices + 1
    return values[order] if order is not None and by_vertex else values


def _columns(graph: Graph, points: np.ndarray, key: PreparationKey) -> tuple[tuple[int, int], ...]:
    """(features, devices that share them) of aggregations that more than one device shares."""
    split = key.split
    aggregations = key.architecture.aggregations
    if split.columns is None and not split.learns:

        def cheapest() -> str:
            return json.dumps(columns_of(aggregations, graph, points, detect(split.devices)))

        chosen = json.loads(processes.from_first("columns", cheapest))
        return tuple((width, columns) for width, columns in chosen)
    if split.columns is None or split.columns == 1:
        return ()
    widths = sorted({width for width, kind in aggregations if kind not in BY_EDGES})
    return tuple((width, split.columns) for width in widths)


def _aggregation_kinds(
    architecture: Architecture, columns: dict[int, int], near: Sequence[np.ndarray]
) -> list[AggregationKind]:
    """The kinds of aggregations of parts: over all edges, and near the training vertices."""
    used = set()
    for width, kind in architecture.aggregations:
        used.add(1 if kind in BY_EDGES else columns.get(width, 1))
    apart = architecture.linear
    kinds = [
        AggregationKind(columns=count, apart=apart and count == 1) for count in sorted(used or {1})
    ]
    for edges, vertices in enumerate(near):
        kinds.append(AggregationKind(columns=1, near=edges, keep=vertices, apart=apart))
    return kinds


# --------------------------------------------------------------------------------------- placing


def mesh_of(devices: int) -> Mesh:
    """The mesh of the first devices; its one axis splits vertices."""
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def data_of(graph: Graph, importance: np.ndarray | None = None) -> GraphData:
    """The data of a whole graph, as arrays of NumPy."""
    x, labels, masks = _tables(graph)
    return GraphData(x, labels, masks, block_of(graph), importance)


def _importance(key: PreparationKey, order: np.ndarray | None) -> np.ndarray | None:
    """The weight of each vertex in the loss, in the order of the numbers inside."""
    if key.importance is None:
        return None
    values = key.importance.values
    return values if order is None else values[order]


def _tables(graph: Graph) -> tuple[Any, Any, dict[str, Any]]:
    """(x, labels, masks) of all vertices."""
    if graph.labels is None:
        labels = np.zeros(graph.vertices, np.int32)
    elif graph.has_targets:
        labels = np.nan_to_num(graph.labels, nan=0.0)
    else:
        labels = np.maximum(graph.labels, 0)
    masks = {}
    for name in MASKS:
        mask = getattr(graph, name)
        if mask is None:
            mask = np.zeros(graph.vertices, np.float32)
        masks[name] = mask.astype(np.float32)
    return graph.features, labels, masks


def _whole(
    graph: Graph,
    order: np.ndarray | None,
    near: Sequence[np.ndarray],
    importance: np.ndarray | None,
) -> GraphData:
    """The data of a graph on one device, as arrays of NumPy."""
    data = data_of(graph, importance)
    kinds = [AggregationKind(near=edges, keep=keep) for edges, keep in enumerate(near)]
    whole = cut(graph, np.array([0, graph.vertices]), None, kinds)
    block = replace(
        data.block,
        aggregations=(*data.block.aggregations, *aggregations_of_part(graph, whole, 0)),
        vertex=None if order is None else order.astype(np.int32),
    )
    return replace(data, block=block)


def _on_devices(graph_cut: GraphCut, key: PreparationKey) -> GraphData:
    """The data of every device under a leading dim; each process makes that of its own devices."""
    graph, parts = graph_cut.graph, graph_cut.parts
    split = key.split
    processes.same(
        "Graphs, or their splits,", _digest(graph, parts), "Read the same file in all processes."
    )
    mesh = mesh_of(split.devices)
    pieces = []
    for i, device in enumerate(mesh.devices):
        if device.process_index != jax.process_index():
            continue
        data = _data_of_part(graph_cut, key, i)
        piece = jax.tree.map(lambda array: array[None], data)
        pieces.append(jax.device_put(piece, device))
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def joined(*arrays: jax.Array) -> jax.Array:
        shape = (split.devices, *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(arrays))

    return jax.tree.map(joined, *pieces)


def _data_of_part(graph_cut: GraphCut, key: PreparationKey, i: int) -> GraphData:
    """The data of part i, as arrays of NumPy."""
    graph, parts = graph_cut.graph, graph_cut.parts
    block = block_of_part(graph, parts, i)
    block = replace(block, columns=graph_cut.columns, timed=key.split.learns)
    tables = (*_tables(graph), _importance(key, parts.order))
    x, labels, masks, importance = jax.tree.map(lambda table: parts.of_part(i, table), tables)
    return GraphData(x, labels, masks, block, importance)


def first_part(graph: Graph, key: PreparationKey) -> GraphData:
    """The data of the first part of a key's split, as arrays of NumPy; all parts have its sizes."""
    numbered, order = _numbered(graph.as_it_is(), key.split.order)
    if key.split.devices == 1:
        near = _near(numbered, key.architecture)
        return _whole(numbered, order, near, _importance(key, order))
    graph_cut = _cut(numbered, order, key)
    return _data_of_part(graph_cut, key, 0)


def _digest(graph: Graph, parts: Parts) -> str:
    """Digest of everything that processes must have in common."""
    sizes = np.array([graph.vertices, graph.edges, graph.feature_count])
    return process_arrays.digest([sizes, parts.points, parts.edges, parts.fetched])

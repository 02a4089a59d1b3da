"""The training state of one model: prepared graphs, compiled steps, the memory plan.

`GraphTrainer` gives the `TrainingRun` of a graph. Runs are reused by content: an equal graph,
though another object, with an equal split is neither prepared nor compiled again. Of a graph whose
arrays can be written, the content is read at every call, so that a changed graph is another one.

At most `GRAPHS` graphs stay on the devices, and earlier ones only within `SPARE_BYTES`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from partita.errors import GraphError
from partita.execute import processes
from partita.gnn.agreement import check_agreement, is_known_to_agree
from partita.gnn.data.graph import Graph, check
from partita.gnn.fitting import check_fits
from partita.gnn.prepare import (
    Architecture,
    Numbers,
    PreparationKey,
    PreparedGraph,
    Split,
    architecture_of,
    check_weights_suit,
    prepare,
    within_memory,
)
from partita.gnn.runs import DeviceRun, TrainingRun
from partita.gnn.spill.run import MemoryRun, budget_of
from partita.gnn.step import CompiledSteps

GRAPHS = 4
"""Prepared graphs of a model that stay on the devices at most."""

SPARE_BYTES = 2**30
"""Bytes of each device that earlier graphs may take together, beside the last one."""


class GraphTrainer:
    """The runs of one model, each under the key that decides its data.

    split           the split of the last `fit`, which `evaluate` and `predict` use too
    memory          the run of the last `fit` if that had a memory plan
    device          the last run on devices
    epoch_seconds   seconds of every training step so far, the compilation in the first
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.steps = CompiledSteps(model)
        self.split = Split()
        self.memory: MemoryRun | None = None
        self._memory_is_valid = False
        self.device: DeviceRun | None = None
        self.epoch_seconds: list[float] = []
        self._runs: dict[PreparationKey, DeviceRun] = {}
        self._architectures: dict[tuple[int, bool, int, bool], Architecture] = {}
        self._features: int | None = None
        self._agreements: set[tuple[Architecture, bool]] = set()
        self._importance: tuple[str, Numbers] | None = None

    @property
    def prepared(self) -> PreparedGraph | None:
        """The data of the last graph."""
        if self.memory is not None:
            return self.memory.prepared
        return None if self.device is None else self.device.prepared

    def compiled_anew(self) -> None:
        """Forgets everything that depends on optimizer, loss, metrics or layers.

        Prepared graphs stay.
        """
        self.steps.clear()
        self._architectures.clear()
        self._agreements.clear()
        self._memory_is_valid = False

    def begin(
        self,
        graph: Graph,
        split: Split,
        memory: str | int | None,
        importance: np.ndarray | None = None,
    ) -> TrainingRun:
        """The run of a `fit`, within `memory` if given. The model and the optimizer are built.

        `importance`: float32 [vertices], weight of each vertex in the training loss.
        """
        if memory is not None:
            _check_planned(split)
        self.split = split
        weighted = importance is not None
        self._importance = (graph.digest, Numbers.of(importance)) if weighted else None
        if memory is None:
            self.memory = None
            run: TrainingRun = self.on_devices(graph, "train")
        else:
            run = self._within(graph, budget_of(memory), "train")
        self.build_optimizer()
        return run

    def build_optimizer(self) -> None:
        """Makes the optimizer's variables; one of a scaled loss would make them each time."""
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)

    def run_of(self, graph: Graph, mask: str | None) -> TrainingRun:
        """The run that evaluates or predicts.

        It is the memory plan's if the last `fit` had one, on this graph.
        """
        if self.memory is None or not self.memory.serves(graph):
            return self.on_devices(graph, mask)
        return self._within(graph, self.memory.budget, mask)

    def on_devices(self, graph: Graph, mask: str | None) -> DeviceRun:
        """The run over a prepared graph, a reused one if the content is the same.

        GraphError if the mask is empty.
        """
        run = self._reused(graph)
        if run is None:
            self._check(graph)
        if mask is not None:
            _check_mask(self.model, graph, mask)
        key = self._key(graph)
        if mask == "train":
            if run is None:
                check_fits(self.model, graph, key)
            # Also of a prepared graph: a layer may train since the model was compiled again.
            self._check_agreement(graph, key)
        if run is None:
            run = DeviceRun(self.model, self.steps, prepare(graph, key))
            self._features = graph.feature_count
        self._keep(run)
        return run

    def checked_key(self, graph: Graph, split: Split) -> PreparationKey:
        """The key of training on a graph by a split. The model is built; nothing is prepared.

        GraphError for a graph that does not suit the model.
        """
        self._check(graph)
        _check_mask(self.model, graph, "train")
        return PreparationKey(graph.digest, split, self._architecture(graph))

    def _reused(self, graph: Graph) -> DeviceRun | None:
        """The run of an equal graph, split and architecture, if there is one."""
        if graph.feature_count != self._features:
            return None
        key = self._key(graph)
        run = self._runs.get(key)
        if run is None:
            return None
        source = run.prepared.source
        if source is not graph and source.digest != key.graph:
            # Devices may read the arrays of the graph themselves, and those have changed.
            del self._runs[key]
            return None
        return run

    def _check_agreement(self, graph: Graph, key: PreparationKey) -> None:
        """GraphError unless a step of a user's own network gives one device's numbers."""
        tested = (key.architecture, key.split.devices > 1)
        as_one_device = key.split.devices == 1 and not key.architecture.by_vertex
        if as_one_device or is_known_to_agree(self.model) or tested in self._agreements:
            return
        check_agreement(self.model, graph, key.split, key.architecture)
        self._agreements.add(tested)

    def _key(self, graph: Graph) -> PreparationKey:
        """The key of a graph, with the importance of its vertices in the last `fit`."""
        digest = graph.digest
        importance = self._importance_of(digest)
        return PreparationKey(digest, self.split, self._architecture(graph), importance)

    def _importance_of(self, digest: str) -> Numbers | None:
        weighted = self._importance is not None and self._importance[0] == digest
        return self._importance[1] if weighted and self._importance is not None else None

    def _keep(self, run: DeviceRun) -> None:
        """Makes a run the last one, and drops the earliest others beyond the limits."""
        self.device = run
        self._runs.pop(run.prepared.key, None)
        self._runs[run.prepared.key] = run
        earlier = list(self._runs.values())[:-1]
        spare_bytes = sum(other.prepared.device_bytes for other in earlier)
        for other in earlier:
            if len(self._runs) <= GRAPHS and spare_bytes <= SPARE_BYTES:
                break
            spare_bytes -= other.prepared.device_bytes
            del self._runs[other.prepared.key]

    def _within(self, graph: Graph, budget: int, mask: str | None) -> MemoryRun:
        """The run within a budget of memory in bytes. Graphs on the devices are dropped for it."""
        memory = self.memory if self._memory_is_valid else None
        reused = memory is not None and memory.budget == budget and memory.serves(graph)
        if not reused:
            self._check(graph)
        key = within_memory(self._key(graph))
        if mask is not None:
            _check_mask(self.model, graph, mask)
        if memory is None or not reused or memory.key != key:
            self.memory = None
            self._check_agreement(graph, key)
            self.build_optimizer()
            self._runs.clear()
            self.device = None
            self._features = graph.feature_count
            memory = self.memory = MemoryRun(self.model, graph, budget, key)
            self._memory_is_valid = True
        return memory

    def _architecture(self, graph: Graph) -> Architecture:
        kind = _kind_of(graph)
        if kind not in self._architectures:
            self._architectures[kind] = architecture_of(self.model, graph)
        return self._architectures[kind]

    def _check(self, graph: Graph) -> None:
        """GraphError if a graph does not suit the model. Builds the model if necessary."""
        check(graph.as_it_is())
        if graph.features is None:
            raise GraphError(
                f"'{graph.name}' has no features: "
                "give Graph.from_edges(features=...) a row for every vertex."
            )
        if not self.model.built:
            self.model.build((None, graph.feature_count))
        if self._features not in (None, graph.feature_count):
            raise GraphError(
                f"'{graph.name}' has {graph.feature_count} features, and the model was built for "
                f"{self._features}: use a graph of {self._features} features, or another model."
            )
        check_weights_suit(graph, self._architecture(graph))


def _kind_of(graph: Graph) -> tuple[int, bool, int, bool]:
    """(features of a vertex, whether edges have weights, features of an edge, whether a batch).

    Aggregations depend on them.
    """
    edge_features = 0 if graph.edge_features is None else graph.edge_features.shape[1]
    return (
        graph.feature_count,
        graph.weights is not None,
        edge_features,
        graph.members is not None,
    )


def _check_planned(split: Split) -> None:
    """GraphError for a split that a memory plan cannot train by."""
    if not processes.alone():
        raise GraphError(
            "memory cannot be combined with several processes: a memory plan is for the devices "
            "of one. Remove memory, or start one process."
        )
    if split.learns:
        raise GraphError(
            "partition='learned' cannot be combined with memory: a memory plan is for fixed parts. "
            "Use 'edges', 'vertices' or 'metis', or remove memory."
        )
    if split.columns not in (None, 1):
        raise GraphError(
            f"columns={split.columns} cannot be combined with memory: a memory plan splits "
            "vertices alone. Remove columns, or memory."
        )


def _check_mask(model: Any, graph: Graph, mask: str) -> None:
    """GraphError if a mask has no labels that the model can learn or be evaluated by."""
    if graph.labels is None:
        raise GraphError(
            f"'{graph.name}' has no labels: "
            "give Graph.from_edges(labels=...) one for every vertex, -1 where there is none."
        )
    marked = getattr(graph, mask)
    if marked is None or not marked.any():
        name = "training" if mask == "train" else mask
        raise GraphError(
            f"The {name} mask of '{graph.name}' is empty: mark at least one vertex, {mask}=[...]."
        )
    if getattr(model, "links", False):
        vertices = np.flatnonzero(marked)
        if (graph.offsets[vertices + 1] - graph.offsets[vertices] != 2).any():
            raise GraphError(
                f"The {mask} mask of '{graph.name}' has vertices that are no pairs, and a model of "
                "links=True predicts pairs: use gnn.split_links(graph).samples(), or "
                "gnn.with_pairs."
            )
    classes = getattr(model, "classes", None)
    if graph.has_targets:
        if classes not in (None, graph.classes):
            raise GraphError(
                f"'{graph.name}' has {graph.classes} targets per vertex, and the model has "
                f"classes={classes} outputs: make it with classes={graph.classes}."
            )
        return
    if classes is not None and classes > 1 and graph.labels.max(initial=-1) >= classes:
        vertex = int(np.argmax(graph.labels >= classes))
        raise GraphError(
            f"Vertex {vertex:,} has the label {graph.labels[vertex]}, and the model has {classes} "
            f"classes, 0 to {classes - 1}: make it with classes={graph.labels.max() + 1}."
        )

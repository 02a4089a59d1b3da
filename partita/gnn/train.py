"""Full-graph training: a step is one forward and backward pass over the whole graph.

`FullGraphTraining` gives a Keras model `fit`, `evaluate` and `predict` on a `Graph`. The loss is
the mean over the vertices of the training mask, of any Keras loss. Metrics are weighted by the
mask. The graph is an argument of the step, not a part of it. A model has one attribute beside those
of Keras, its `GraphTrainer`, which is not saved.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypedDict, Unpack

import keras
import numpy as np

from partita.errors import GraphError, PartitaError
from partita.gnn.data.arrays import MASKS, as_array, as_count, as_ids
from partita.gnn.data.graph import Graph
from partita.gnn.importance import importance_of
from partita.gnn.prepare import Split, all_devices
from partita.gnn.runs import TrainingRun
from partita.gnn.spill.run import MemoryRun
from partita.gnn.split.learned import Balance
from partita.gnn.split.partition import Parts
from partita.gnn.trainer import GraphTrainer

if keras.backend.backend() != "jax":
    raise PartitaError(
        f"Keras is already imported on the {keras.backend.backend()} backend, "
        "and graph networks need JAX. Set KERAS_BACKEND=jax first."
    )


class SplitOptions(TypedDict, total=False):
    """Options of `fit` for the split of a graph over devices, as in `Split`."""

    partition: Any
    columns: int | None
    order: Any


class FitOptions(SplitOptions, total=False):
    """Options of `fit` for the split and for the loss.

    class_weight    weight in the training loss of the vertices of a class: {class: weight}
    vertex_weight   weight in the training loss of every vertex, [vertices]
    """

    class_weight: Any
    vertex_weight: Any


class FullGraphTraining:
    """Trains a Keras model whose call is `call(x, block, training)` on whole graphs.

    Comes before `keras.Model` among the bases.

    A class that sets `by_vertex = True` itself promises two things: its vertices meet in the
    block's aggregations only, and each aggregation is traced once. A training step then sums only
    over edges that the training vertices can see.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._graph_trainer = GraphTrainer(self)

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = "sparse_categorical_crossentropy",
        *,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **named: Any,
    ) -> None:
        """Keras's own. All metrics are over the vertices of a mask.

        GraphError for `loss_weights`, and for a class with a training step of its own: full-graph
        training would not run it.
        """
        if named.get("loss_weights") is not None:
            raise GraphError(
                "loss_weights would be ignored: a graph has one loss. Use "
                "fit(vertex_weight=...) or fit(class_weight=...)."
            )
        if named.get("run_eagerly"):
            raise GraphError(
                "run_eagerly would be ignored: a step over a graph is compiled. Remove it, or call "
                "model(features, graph=graph) to look at values."
            )
        _check_steps(type(self))
        _check_of_one_output("loss", loss, (list, tuple, dict))
        no_list = (dict, str, keras.metrics.Metric)
        _check_of_one_output("metrics", metrics, no_list)
        _check_of_one_output("weighted_metrics", weighted_metrics, no_list)
        _check_reduction(loss)
        masked = [*(metrics or []), *(weighted_metrics or [])]
        keras_model: Any = super()
        keras_model.compile(optimizer, loss, weighted_metrics=masked or None, **named)
        self._graph_trainer.compiled_anew()

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Keras's own: compiles as before the model was saved, and builds the optimizer."""
        model: Any = self
        self.compile(**keras.saving.deserialize_keras_object(config))
        if model.built:
            model.optimizer.build(model.trainable_variables)

    def fit(
        self,
        graph: Graph,
        epochs: int = 1,
        *,
        callbacks: Sequence[Any] | None = None,
        verbose: Any = "auto",
        validation_freq: int = 1,
        initial_epoch: int = 0,
        devices: int = 1,
        memory: str | int | None = None,
        **options: Unpack[FitOptions],
    ) -> Any:
        """Keras's history: loss and metrics of each epoch, with `val_` of the validation mask.

        An epoch is one step. Training values are of the step itself (dropout on, weights before the
        update), as in Keras. A second `fit` on an equal graph with equal options prepares and
        compiles nothing.

        devices     devices that each hold a part of the vertices; of several processes, those of
                    all (1 stands for all)
        partition   'edges', 'vertices', 'learned' (from measured times, moved between epochs when
                    that pays), 'metis'
                    (needs pymetis), split points [devices + 1], or the part of every vertex
                    [vertices]
        columns     devices of a group that share their vertices and split the features of an
                    aggregation; the default
                    is the cheapest number for each aggregation, by the machine
        order       'degree', 'neighbours', or the vertices in another order: numbers inside, so
                    that rows that are
                    read together lie together. Results are in your numbers, split points in those
                    of the order.
        memory      "4GiB" or bytes of each device. The rest goes to the host and comes back, by a
                    plan that `model.memory.facts()` reports.
        class_weight, vertex_weight
                    weights of vertices in the training loss, by class or one for each, as in Keras:
                    the weighted sum is divided by the number of training vertices

        `evaluate` and `predict` then use the same devices. Raises GraphError for a graph or a split
        that does not work.
        """
        model: Any = self
        model._assert_compile_called("fit")
        _check_graph(graph, "fit")
        split_options: dict[str, Any] = dict(options)
        _check_options(split_options)
        epochs = as_count("epochs", epochs, 0)
        initial_epoch = as_count("initial_epoch", initial_epoch, 0)
        validation_freq = as_count("validation_freq", validation_freq, 1)
        _check_reports(callbacks, verbose)
        class_weight = split_options.pop("class_weight", None)
        vertex_weight = split_options.pop("vertex_weight", None)
        importance = importance_of(graph, class_weight, vertex_weight)
        split = Split(all_devices(devices), **split_options)
        run = self._graph_trainer.begin(graph, split, memory, importance)
        validates = graph.validation is not None and bool(graph.validation.any())
        model.stop_training = False
        model._initial_epoch = None
        callback_list = self._callback_list(callbacks, epochs, verbose)
        callback_list.on_train_begin()
        logs = self._train_epochs(
            run,
            # A checkpoint that was restored sets the epoch to continue from.
            range(model._initial_epoch or initial_epoch, epochs),
            callback_list,
            shares_state=bool(callbacks),
            validation_freq=validation_freq if validates else 0,
        )
        if epochs:
            # Averages of the weights take their place, as at the end of Keras's fit.
            model.optimizer.finalize_variable_values(model.trainable_variables)
        callback_list.on_train_end(logs)
        return model.history

    def _train_epochs(
        self,
        run: TrainingRun,
        epochs: range,
        callback_list: Any,
        shares_state: bool,
        validation_freq: int,
    ) -> dict[str, float]:
        """The logs of the last epoch.

        With `shares_state`, callbacks read and write the model's variables between epochs. Without,
        the arrays stay with the steps. `validation_freq`: epochs per validation, 0 for none.
        """
        model: Any = self
        state = run.state()
        logs: dict[str, float] = {}
        for epoch in epochs:
            callback_list.on_epoch_begin(epoch)
            callback_list.on_train_batch_begin(0)
            if shares_state:
                state = run.state()
            logs, state = self._train_epoch(run, state)
            if shares_state:
                run.store(state)
            callback_list.on_train_batch_end(0, logs)
            if validation_freq and (epoch + 1) % validation_freq == 0:
                values = _numbers(run.evaluate(state, "validation"))
                logs |= {f"val_{name}": value for name, value in values.items()}
            callback_list.on_epoch_end(epoch, logs)
            run.after_epoch(0 if model.stop_training else epochs.stop - epoch - 1)
            if model.stop_training:
                break
        if not shares_state:
            run.store(state)
        return logs

    def _callback_list(self, callbacks: Any, epochs: int, verbose: Any) -> Any:
        """Callbacks as Keras runs them, with the history."""
        if isinstance(callbacks, keras.callbacks.CallbackList):
            return callbacks
        return keras.callbacks.CallbackList(
            callbacks,
            add_history=True,
            add_progbar=verbose not in (0, "auto"),
            verbose=verbose,
            epochs=epochs,
            steps=1,
            model=self,
        )

    def _train_epoch(self, run: TrainingRun, state: Any) -> tuple[dict[str, float], Any]:
        """(logs, state after) of one step, whose seconds are noted."""
        began = time.perf_counter()
        logs, state = run.train(state)
        numbers = _numbers(logs)
        self.epoch_seconds.append(time.perf_counter() - began)
        return numbers, state

    def evaluate(
        self, graph: Graph, mask: str = "test", *, return_dict: bool = False, verbose: Any = 0
    ) -> Any:
        """Loss and metrics over the vertices of a mask: 'train', 'validation' or 'test'."""
        model: Any = self
        model._assert_compile_called("evaluate")
        _check_graph(graph, "evaluate")
        if mask not in MASKS:
            raise GraphError(f"mask={mask!r} is no mask of a graph: use {', '.join(MASKS)}.")
        run = self._graph_trainer.run_of(graph, mask)
        logs = _numbers(run.evaluate(run.state(), mask))
        if return_dict:
            return logs
        return list(logs.values()) if len(logs) > 1 else logs["loss"]

    def predict(self, graph: Graph, vertices: Any = None) -> np.ndarray:
        """float32 [vertices, classes]: the output for all vertices, or for these in their order.

        For a model with a readout, [graphs, classes]: the output for the graphs of a batch.
        """
        _check_graph(graph, "predict")
        run = self._graph_trainer.run_of(graph, None)
        rows = run.predict(run.state())
        if getattr(self, "readout", None) is not None:
            rows = rows[graph.first_members]
        return rows if vertices is None else rows[_numbers_of_rows(vertices, len(rows))]

    def train_on_batch(self, *arguments: Any, **options: Any) -> Any:
        """GraphError: a graph is no batch."""
        raise _without_batches("train_on_batch", "fit(graph)")

    def test_on_batch(self, *arguments: Any, **options: Any) -> Any:
        """GraphError: a graph is no batch."""
        raise _without_batches("test_on_batch", "evaluate(graph)")

    def predict_on_batch(self, *arguments: Any, **options: Any) -> Any:
        """GraphError: a graph is no batch."""
        raise _without_batches("predict_on_batch", "predict(graph)")

    def traffic(self, graph: Graph) -> int:
        """Bytes of rows that the devices exchange in a training step, padding included."""
        return self._graph_trainer.run_of(graph, "train").traffic()

    @property
    def epoch_seconds(self) -> list[float]:
        """Seconds of every training step so far, the compilation in the first."""
        return self._graph_trainer.epoch_seconds

    @property
    def parts(self) -> Parts | None:
        """Contents of each device; None on one device or before the first graph."""
        prepared = self._graph_trainer.prepared
        return None if prepared is None else prepared.parts

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """(features, devices that share them) of aggregations of that many features.

        () on one device.
        """
        prepared = self._graph_trainer.prepared
        return () if prepared is None else prepared.columns

    @property
    def prepare_seconds(self) -> float:
        """Seconds of preparing the data of the last graph."""
        prepared = self._graph_trainer.prepared
        return 0.0 if prepared is None else prepared.seconds

    @property
    def balance(self) -> Balance | None:
        """The learner of the parts' times with partition='learned', else None."""
        device = self._graph_trainer.device
        return None if device is None or device.mover is None else device.mover.balance

    @property
    def memory(self) -> MemoryRun | None:
        """The memory plan of the last `fit`; None without one."""
        return self._graph_trainer.memory


KERAS_STEPS = (
    "compute_loss",
    "compute_metrics",
    "make_train_function",
    "predict_step",
    "test_step",
    "train_step",
)
"""Methods of Keras models that full-graph training does not run."""

REPLACEMENTS = {
    "sample_weight": "use vertex_weight=",
    "validation_data": "mark vertices of the graph, Graph.from_edges(validation=...)",
    "validation_split": "mark vertices of the graph, Graph.from_edges(validation=...)",
    "batch_size": "remove it: a step is over the whole graph",
    "steps_per_epoch": "remove it: an epoch is one step",
    "shuffle": "remove it: a step is over the whole graph",
}
"""Options of Keras's fit that this one does not have, and what to do."""


def _check_steps(kind: type) -> None:
    """GraphError if a user's class has methods that full-graph training would not run."""
    for parent in kind.__mro__:
        if parent is FullGraphTraining:
            return
        for name in KERAS_STEPS:
            if name in vars(parent):
                raise GraphError(
                    f"{kind.__name__}.{name} would not run: full-graph training has its own steps. "
                    "Give compile(loss=, metrics=), or use self.add_loss in call."
                )


def _without_batches(method: str, replacement: str) -> GraphError:
    return GraphError(f"{method} has no meaning for a graph: use {replacement}.")


def _numbers_of_rows(vertices: Any, count: int) -> np.ndarray:
    """Numbers of rows, as given or of a mask; GraphError for others than those of `count` rows."""
    given = as_array(vertices)
    if given.dtype == np.bool_ and given.shape == (count,):
        return np.flatnonzero(given)
    numbers = as_ids("vertices", given)
    outside = (numbers < 0) | (numbers >= count)
    if outside.any():
        raise GraphError(
            f"vertices lists {numbers[np.argmax(outside)]:,} of {count:,} rows: use numbers from 0 "
            f"to {count - 1:,}."
        )
    return numbers


def _check_of_one_output(option: str, value: Any, kinds: Any) -> None:
    """GraphError for a loss or metrics that are given for each of several outputs."""
    if isinstance(value, kinds):
        form = "one loss" if option == "loss" else "a list"
        raise GraphError(
            f"{option} is a {type(value).__name__}, and a graph has one output: give {form}."
        )


def _check_reduction(loss: Any) -> None:
    """GraphError for a loss that stays one number per vertex."""
    if isinstance(loss, keras.losses.Loss) and loss.reduction in (None, "none"):
        raise GraphError(
            f"The loss {loss.name!r} has no reduction, and a step needs one number: make it with "
            "reduction='sum_over_batch_size', 'sum' or 'mean_with_sample_weight'."
        )


def _check_graph(graph: Any, method: str) -> None:
    if not isinstance(graph, Graph):
        raise GraphError(
            f"{method} was given a {type(graph).__name__}: give a gnn.Graph, as "
            "gnn.Graph.from_edges(source, target, features=x, labels=y) makes it."
        )


def _check_reports(callbacks: Any, verbose: Any) -> None:
    """GraphError for callbacks, or a `verbose`, that are none of Keras."""
    if verbose not in ("auto", 0, 1, 2):
        raise GraphError(f"verbose={verbose!r} is unknown: use 'auto', 0, 1 or 2.")
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return
    for callback in keras.tree.flatten(callbacks or []):
        if not isinstance(callback, keras.callbacks.Callback):
            raise GraphError(
                f"callbacks has a {type(callback).__name__}: give a list of "
                "keras.callbacks.Callback."
            )


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name not in FitOptions.__annotations__:
            known = ", ".join(FitOptions.__annotations__)
            fix = REPLACEMENTS.get(name, f"use devices, memory, {known}")
            raise GraphError(f"fit on a graph has no option {name!r}: {fix}.")


def trained_facts(model: Any, graph: Graph) -> dict[str, Any]:
    """Facts of a trained model for JSON.

    Loss, accuracy over every mask, seconds of epochs (median, first, all) and of preparation,
    parts, features that are split, bytes exchanged in an epoch, the learned split, the memory plan.
    """
    logs = {}
    for mask in MASKS:
        marked = getattr(graph, mask)
        if marked is not None and marked.any():
            logs[mask] = model.evaluate(graph, mask, return_dict=True)
    seconds = model.epoch_seconds
    facts = {
        "graph": graph.name,
        "edges": graph.edges,
        "epochs": len(seconds),
        "prepare_seconds": model.prepare_seconds,
        "loss": logs["train"]["loss"],
        "accuracy": {mask: values["accuracy"] for mask, values in logs.items()},
        "epoch_seconds": float(np.median(seconds[1:] or seconds)) if seconds else None,
        "first_seconds": seconds[0] if seconds else None,
        "seconds": seconds,
        "parts": [],
        "columns": {},
        "traffic": 0,
    }
    if model.parts is not None:
        facts["parts"] = _part_facts(model.parts)
        facts["columns"] = {str(width): devices for width, devices in model.columns if devices > 1}
        facts["traffic"] = model.traffic(graph)
    if model.balance is not None:
        facts["learned"] = model.balance.facts()
    if model.memory is not None:
        facts["memory"] = model.memory.facts()
    return facts


def _part_facts(parts: Parts) -> list[dict[str, int]]:
    """Vertices, in-edges and fetched rows of each part."""
    rows = zip(parts.vertices, parts.edges, parts.fetched, strict=True)
    return [{"vertices": int(v), "edges": int(e), "fetched": int(f)} for v, e, f in rows]


def normalised(graph: Graph) -> Graph:
    """The graph with features divided by the sum of their row, as is usual for counts of words.

    Rows of zeros stay.

    >>> normalised(Graph.from_edges([0], [1], features=[[1, 3], [0, 0]])).features.tolist()
    [[0.25, 0.75], [0.0, 0.0]]
    """
    if graph.features is None or (graph.features < 0).any():
        raise GraphError(
            f"The features of '{graph.name}' cannot be divided by their sum: "
            "there are none, or negative ones. Give features that are not negative."
        )
    sums = graph.features.sum(axis=1, keepdims=True)
    return replace(graph, features=graph.features / np.where(sums > 0, sums, 1))


def _numbers(logs: dict[str, Any]) -> dict[str, Any]:
    """Loss and metrics as plain numbers, the loss first; an array for a metric by label."""
    names = sorted(logs, key=lambda name: name != "loss")
    return {
        name: np.asarray(logs[name]) if np.ndim(logs[name]) else float(logs[name]) for name in names
    }

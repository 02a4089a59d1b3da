"""Full-graph training: every step is one forward and backward pass over the whole graph, compiled once.

`FullGraphTraining` gives a Keras model `fit`, `evaluate` and `predict` on a Graph. The loss is the mean over the vertices of the training
mask, whatever Keras loss it is; metrics are weighted by the mask. The graph is an argument of the step, not a part of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from partita.errors import GraphError
from partita.gnn.block import Block, block_of
from partita.gnn.graph import Graph, check

MASKS = ("train", "validation", "test")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Data:
    """What a step reads: x [rows, features], labels [rows] (0 where there is none), a mask float32 [rows] for each split, the edges."""

    x: Any
    labels: Any
    masks: dict[str, Any]
    graph: Block


class FullGraphTraining:
    """Trains a Keras model whose call is `call(x, block, training)` on whole graphs. Comes before `keras.Model` among the bases."""

    def compile(
        self, optimizer: Any = "adam", loss: Any = "sparse_categorical_crossentropy", *, metrics: Any = None, **named: Any
    ) -> None:
        """Keras's own; metrics are of the vertices of a mask."""
        super().compile(optimizer, loss, weighted_metrics=metrics, **named)  # type: ignore[misc]
        self._steps: dict[str, Any] = {}

    def fit(
        self, graph: Graph, epochs: int = 1, *, callbacks: Sequence[Any] | None = None, verbose: Any = "auto", validation_freq: int = 1,
        initial_epoch: int = 0,
    ) -> Any:  # fmt: skip
        """Keras's history: loss and metrics of the training mask, and with `val_` of the validation mask, of every epoch.

        An epoch is one step. Training values are of the step itself (dropout on, weights before the update), as in Keras.
        """
        model: Any = self
        model._assert_compile_called("fit")
        data = self._prepared(graph, "train")
        validates = float(data.masks["validation"].sum()) > 0
        model.stop_training = False
        model.optimizer.build(model.trainable_variables)
        run = callbacks if isinstance(callbacks, keras.callbacks.CallbackList) else keras.callbacks.CallbackList(
            callbacks, add_history=True, add_progbar=verbose not in (0, "auto"), verbose=verbose, epochs=epochs, steps=1, model=model
        )  # fmt: skip
        observed = bool(callbacks)
        run.on_train_begin()
        state = self._state()
        logs: dict[str, Any] = {}
        for epoch in range(initial_epoch, epochs):
            run.on_epoch_begin(epoch)
            run.on_train_batch_begin(0)
            if observed:
                state = self._state()
            began = time.perf_counter()
            logs, state = self._step("train", self._train_step, donate=True)(state, data)
            logs = _numbers(logs)
            self.epoch_seconds.append(time.perf_counter() - began)
            if observed:
                self._keep(state)
            run.on_train_batch_end(0, logs)
            if validates and (epoch + 1) % validation_freq == 0:
                values = self._step("validation", self._test_step)(state[:2], data)
                logs |= {f"val_{name}": value for name, value in _numbers(values).items()}
            run.on_epoch_end(epoch, logs)
            if model.stop_training:
                break
        self._keep(state if not observed else self._state())
        run.on_train_end(logs)
        return model.history

    @property
    def epoch_seconds(self) -> list[float]:
        """Seconds of every training step so far, the compilation in the first."""
        return self.__dict__.setdefault("_epoch_seconds", [])

    def evaluate(self, graph: Graph, mask: str = "test", *, return_dict: bool = False, verbose: Any = 0) -> Any:
        """Loss and metrics over the vertices of a mask: 'train', 'validation' or 'test'."""
        model: Any = self
        model._assert_compile_called("evaluate")
        if mask not in MASKS:
            raise GraphError(f"There is no mask {mask!r}: a graph has {', '.join(MASKS)}.")
        data = self._prepared(graph, mask)
        logs = self._step(mask, self._test_step)(self._state()[:2], data)
        logs = _numbers(logs)
        return logs if return_dict else list(logs.values()) if len(logs) > 1 else logs["loss"]

    def predict(self, graph: Graph, vertices: Any = None) -> np.ndarray:
        """float32 [vertices, classes]: the model's output for every vertex of a graph, or for those asked for, in their order."""
        data = self._prepared(graph, None)
        found = np.asarray(self._step("predict", self._predict_step)(self._state()[:2], data))[: graph.vertices]
        return found if vertices is None else found[np.asarray(vertices)]

    # --------------------------------------------------------------------------------------------------------- what it needs

    def _prepared(self, graph: Graph, mask: str | None) -> Data:
        """A graph as a step reads it; the last one is kept."""
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] is not graph:
            model: Any = self
            check(graph)
            if graph.features is None:
                raise GraphError(f"'{graph.name}' has no features: give Graph.from_edges(features=...) a row for every vertex.")
            if not model.built:
                model.build((None, graph.feature_count))
            kept = graph, jax.device_put(_data(graph))
            self.__dict__["_kept"] = kept
        if mask is not None:
            _can_learn(graph, mask, self.__dict__.get("classes"))
        return kept[1]

    def _state(self) -> Any:
        """(trainable, other, optimizer's variables) as arrays."""
        model: Any = self
        optimizer = model.optimizer.variables if getattr(model, "optimizer", None) is not None else []
        return tuple(
            [v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables, optimizer)
        )

    def _keep(self, state: Any) -> None:
        """Puts arrays back into the model's variables."""
        model: Any = self
        groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
        for variables, values in zip(groups, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable._value = value

    def _step(self, name: str, function: Any, donate: bool = False) -> Any:
        steps = self.__dict__.setdefault("_steps", {})
        if name not in steps:
            steps[name] = jax.jit(lambda state, data: function(state, data, name), donate_argnums=0 if donate else ())
        return steps[name]

    # -------------------------------------------------------------------------------------------------------------- the steps

    def _train_step(self, state: Any, data: Data, mask: str) -> Any:
        model: Any = self
        trainable, others, optimizer = state
        count = data.masks[mask].sum()

        def loss(trainable: Any) -> Any:
            predicted, others_after, penalties = model.stateless_call(
                trainable, others, data.x, graph=data.graph, training=True, return_losses=True
            )
            value = self._summed_loss(predicted, data, mask) / count
            return value + sum(penalties), (value, predicted, others_after)

        gradients, (value, predicted, others) = jax.grad(loss, has_aux=True)(trainable)
        trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": value, **self._judged(predicted, data, mask)}, (trainable, others, optimizer)

    def _test_step(self, state: Any, data: Data, mask: str) -> Any:
        model: Any = self
        predicted, _ = model.stateless_call(*state, data.x, graph=data.graph, training=False)
        return {
            "loss": self._summed_loss(predicted, data, mask) / data.masks[mask].sum(),
            **self._judged(predicted, data, mask),
        }

    def _predict_step(self, state: Any, data: Data, mask: str) -> Any:
        model: Any = self
        return model.stateless_call(*state, data.x, graph=data.graph, training=False)[0]

    def _summed_loss(self, predicted: Any, data: Data, mask: str) -> Any:
        """The sum of the loss over the vertices of a mask."""
        model: Any = self
        loss = keras.losses.get(model.loss)
        values = loss.call(data.labels, predicted) if isinstance(loss, keras.losses.Loss) else loss(data.labels, predicted)
        return jnp.where(data.masks[mask] > 0, values, 0).sum()

    def _judged(self, predicted: Any, data: Data, mask: str) -> dict[str, Any]:
        """The metrics over the vertices of a mask."""
        model: Any = self
        if model._compile_metrics is None:
            return {}
        if not model._compile_metrics.built:
            model._compile_metrics.build(data.labels, predicted)
        metrics = model._compile_metrics.variables
        fresh = [(v, jnp.zeros(v.shape, v.dtype)) for v in metrics]
        with keras.StatelessScope(state_mapping=fresh):
            model._compile_metrics.update_state(data.labels, predicted, sample_weight=data.masks[mask])
            return dict(model._compile_metrics.result())


def _data(graph: Graph) -> Data:
    none = np.zeros(graph.vertices, np.float32)
    labels = np.zeros(graph.vertices, np.int32) if graph.labels is None else np.maximum(graph.labels, 0)
    masks = {what: none if getattr(graph, what) is None else getattr(graph, what).astype(np.float32) for what in MASKS}
    return Data(graph.features, labels, masks, block_of(graph))


def _numbers(logs: dict[str, Any]) -> dict[str, float]:
    """What a step says of itself as plain numbers, the loss first."""
    return {name: float(logs[name]) for name in sorted(logs, key=lambda name: name != "loss")}


def _can_learn(graph: Graph, mask: str, classes: int | None) -> None:
    """GraphError where a mask of the graph holds nothing to learn from or to be judged by."""
    if graph.labels is None:
        raise GraphError(
            f"'{graph.name}' has no labels: give Graph.from_edges(labels=...) one for every vertex, -1 where there is none."
        )
    marked = getattr(graph, mask)
    if marked is None or not marked.any():
        what = {"train": "training", "validation": "validation", "test": "test"}[mask]
        raise GraphError(f"The {what} mask of '{graph.name}' is empty: mark at least one vertex, {mask}=[...].")
    if classes is not None and graph.classes > classes:
        v = int(np.argmax(graph.labels >= classes))
        raise GraphError(
            f"Vertex {v:,} has the label {graph.labels[v]}, and the model has {classes} classes, 0 to {classes - 1}: make it with classes={graph.classes}."
        )

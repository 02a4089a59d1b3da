"""Full-graph training: every step is one forward and backward pass over the whole graph, compiled once.

`FullGraphTraining` gives a Keras model `fit`, `evaluate` and `predict` on a Graph. The loss is the mean over the vertices of the training
mask, whatever Keras loss it is; metrics are weighted by the mask. The graph is an argument of the step, not a part of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partita.errors import GraphError, PartitaError
from partita.execute import processes
from partita.execute.devices import at_hand, detect
from partita.gnn.data.graph import Graph, check
from partita.gnn.data.order import order_of
from partita.gnn.kernels import stamp
from partita.gnn.kernels.bridge import step_options
from partita.gnn.nn.block import AXIS, Block, block_of, counted
from partita.gnn.spill.run import Planned
from partita.gnn.split.choice import columns_of, edge_seconds, row_seconds
from partita.gnn.split.learned import Balance, begun, prefix_sums
from partita.gnn.split.partition import (
    Kind,
    Parts,
    Room,
    aggregations_of_part,
    arranged,
    block_of_part,
    by_vertices,
    cut,
    near_training,
    restored,
)
from partita.units import parse

if keras.backend.backend() != "jax":
    raise PartitaError(
        f"Keras is already imported on the {keras.backend.backend()} backend, and graph networks need JAX. Set KERAS_BACKEND=jax first."
    )

MASKS = ("train", "validation", "test")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Data:
    """What a step reads: x [rows, features], labels [rows] (0 where there is none), a mask float32 [rows] for each split, the edges."""

    x: Any
    labels: Any
    masks: dict[str, Any]
    graph: Block


@dataclass(frozen=True)
class Split:
    """How a graph is put on devices, as `fit` was told."""

    devices: int
    partition: Any = "edges"
    columns: int | None = None
    order: Any = None

    @property
    def learns(self) -> bool:
        return self.devices > 1 and isinstance(self.partition, str) and self.partition == "learned"


class FullGraphTraining:
    """Trains a Keras model whose call is `call(x, block, training)` on whole graphs. Comes before `keras.Model` among the bases.

    A class that says `by_vertex = True` itself promises that its vertices meet in the block's aggregations only, each of them traced once: then a
    training step sums only over edges that the training vertices can see.
    """

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = "sparse_categorical_crossentropy",
        *,
        metrics: Any = None,
        weighted_metrics: Any = None,
        **named: Any,
    ) -> None:
        """Keras's own; all metrics are of the vertices of a mask."""
        judged = [*(metrics or []), *(weighted_metrics or [])]
        super().compile(optimizer, loss, weighted_metrics=judged or None, **named)  # type: ignore[misc]
        self.__dict__["_steps"] = {}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """As Keras does it: compiled as before it was saved, with room for the optimizer's state."""
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
        partition: Any = "edges",
        columns: int | None = None,
        order: Any = None,
        memory: str | int | None = None,
    ) -> Any:
        """Keras's history: loss and metrics of the training mask, and with `val_` of the validation mask, of every epoch.

        An epoch is one step. Training values are of the step itself (dropout on, weights before the update), as in Keras.
        Over several `devices` each has a part of the vertices, cut by `partition`: 'edges', 'vertices', 'learned' (from measured times, moved
        between epochs when that pays), 'metis' (needs pymetis), split points [devices + 1], or the part of every vertex [vertices].
        In an aggregation, groups of `columns` devices each take a slice of the features of their vertices; None: as is cheapest for each, by the
        machine. `evaluate` and `predict` then use the same devices. Of several processes each makes the parts of its own devices only, and `devices` are those
        of all of them; 1 stands for all. With an `order` ('degree', 'neighbours', or the vertices in an order of yours) vertices are numbered by it inside, so that
        those that are read together lie together; results are in your numbers, split points in those of the order. Within a `memory` ("4GiB" or bytes) on one device what does not fit goes to the
        host and comes back, by a plan that `model.memory.facts()` then states.
        """
        model: Any = self
        model._assert_compile_called("fit")
        if memory is not None and order is not None:
            raise GraphError(
                "A memory plan trains a graph as it is numbered: give it graph.relabelled(order), and leave out order."
            )
        within = self._within(graph, memory, devices)
        self.__dict__["_split"] = Split(_all_devices(devices), partition, columns, order)
        data: Any = self._prepared(graph, "train") if within is None else None
        validates = graph.validation is not None and bool(graph.validation.any())
        model.stop_training = False
        model.optimizer.build(model.trainable_variables)
        run = (
            callbacks
            if isinstance(callbacks, keras.callbacks.CallbackList)
            else keras.callbacks.CallbackList(
                callbacks,
                add_history=True,
                add_progbar=verbose not in (0, "auto"),
                verbose=verbose,
                epochs=epochs,
                steps=1,
                model=model,
            )
        )
        observed = bool(callbacks)
        model._initial_epoch = None
        run.on_train_begin()
        initial_epoch = model._initial_epoch or initial_epoch  # a checkpoint says where it was
        state = self._state()
        logs: dict[str, Any] = {}
        for epoch in range(initial_epoch, epochs):
            run.on_epoch_begin(epoch)
            run.on_train_batch_begin(0)
            if observed:
                state = self._state()
            step: Any = (
                within.step
                if within is not None
                else self._step("train", self._train_step, donate=True)
            )
            compiled = 0 if within is not None else step._cache_size()
            stamp.clear()
            began = time.perf_counter()
            with processes.together("training"):
                logs, state = jax.block_until_ready(step(state, data))
            ended = time.perf_counter()
            logs = _numbers(logs)
            self.epoch_seconds.append(time.perf_counter() - began)
            if self.balance is not None:
                data = self._rebalanced(
                    graph, data, began, ended, step._cache_size() > compiled, epochs - epoch - 1
                )
            if observed:
                self._keep(state)
            run.on_train_batch_end(0, logs)
            if validates and (epoch + 1) % validation_freq == 0:
                values = (
                    self._step("validation", self._test_step)(state[:2], data)
                    if within is None
                    else within.judged(state, "validation")
                )
                logs |= {f"val_{name}": value for name, value in _numbers(values).items()}
            run.on_epoch_end(epoch, logs)
            if model.stop_training:
                break
            if within is not None and epoch + 1 < epochs:
                within.replan()
        self._keep(state if not observed else self._state())
        run.on_train_end(logs)
        return model.history

    def _within(self, graph: Graph, memory: str | int | None, devices: int) -> Planned | None:
        """The step that keeps to a memory, where one is given."""
        self.__dict__["memory"] = None
        if memory is None:
            return None
        if _all_devices(devices) > 1:
            raise GraphError(
                f"A memory plan is of one device, and here are {_all_devices(devices)}: leave out memory, or use devices=1."
            )
        model: Any = self
        self._checked(graph)
        _can_learn(graph, "train", self.__dict__.get("classes"))
        model.optimizer.build(model.trainable_variables)
        budget = int(parse(memory, "B") if isinstance(memory, str) else memory)
        for kept in ("_kept", "_balance"):  # of an earlier fit
            self.__dict__.pop(kept, None)
        self.__dict__["feature_count"] = graph.feature_count
        data = jax.device_put(replace(_data(graph), x=None))
        within = self.__dict__["memory"] = Planned(model, graph, data, self._state(), budget)
        return within

    @property
    def epoch_seconds(self) -> list[float]:
        """Seconds of every training step so far, the compilation in the first."""
        return self.__dict__.setdefault("_epoch_seconds", [])

    @property
    def columns(self) -> tuple[tuple[int, int], ...]:
        """(features, devices that share them) of aggregations of so many features; nothing on one device."""
        return self.__dict__["_kept"][2].graph.columns if "_kept" in self.__dict__ else ()

    @property
    def prepare_seconds(self) -> float:
        """Seconds that it took to make what the devices hold of the last graph."""
        return self.__dict__.get("_prepare_seconds", 0.0)

    def traffic(self, graph: Graph) -> int:
        """Bytes of vertices' rows that the devices send each other in a training step on a graph, forward and backward, filling included."""
        data = self._prepared(graph, "train")
        step = self._step("train", self._train_step, donate=True)
        return _sent(
            step.trace(self._state(), data).jaxpr, self.parts.count if self.parts is not None else 1
        )

    def evaluate(
        self, graph: Graph, mask: str = "test", *, return_dict: bool = False, verbose: Any = 0
    ) -> Any:
        """Loss and metrics over the vertices of a mask: 'train', 'validation' or 'test'."""
        model: Any = self
        model._assert_compile_called("evaluate")
        if mask not in MASKS:
            raise GraphError(f"There is no mask {mask!r}: a graph has {', '.join(MASKS)}.")
        within = self.__dict__.get("memory")
        if within is not None and within.graph is graph:
            _can_learn(graph, mask, self.__dict__.get("classes"))
            logs = within.judged(self._state(), mask)
        else:
            data = self._prepared(graph, mask)
            logs = self._step(mask, self._test_step)(self._state()[:2], data)
        logs = _numbers(logs)
        return logs if return_dict else list(logs.values()) if len(logs) > 1 else logs["loss"]

    def predict(self, graph: Graph, vertices: Any = None) -> np.ndarray:
        """float32 [vertices, classes]: the model's output for every vertex of a graph, or for those asked for, in their order."""
        within = self.__dict__.get("memory")
        if within is not None and within.graph is graph:
            found = within.predicted(self._state())
        else:
            data = self._prepared(graph, None)
            found = processes.whole(
                self._step("predict", self._predict_step, rows=True)(self._state()[:2], data)
            )
            order = self.__dict__["_numbered"][1]
            if self.parts is not None:
                found = self.parts.joined(found)
            elif order is not None:
                found = restored(found, order)
        return found if vertices is None else found[np.asarray(vertices)]

    # --------------------------------------------------------------------------------------------------------- what it needs

    def _prepared(self, graph: Graph, mask: str | None) -> Data:
        """A graph as a step reads it; the last one is kept."""
        split = self.__dict__.setdefault("_split", Split(_all_devices(1)))
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] is not graph or kept[1] is not split:
            self._checked(graph)
            self.__dict__["_calls"] = self._aggregations(graph)
            began = time.perf_counter()
            numbered = self.__dict__["_numbered"] = _numbered(graph, split.order)
            sums, points = None, None
            if (
                split.learns
            ):  # what is done once, and waiting for the others, is no part of what a move takes
                stamp.ready()
                _warm()
                sums = prefix_sums(numbered[0])
                points = self._begun(sums, graph.feature_count, split.devices)
                self._near(numbered[0])
                processes.meet()
            placing = time.perf_counter()
            kept = graph, split, *self._placed(graph, split, points=points)
            moving = [time.perf_counter() - placing, 0.0]
            balance = (
                None if sums is None or kept[3] is None else _balance(numbered[0], sums, kept[3])
            )
            self.__dict__.update(
                _kept=kept,
                feature_count=graph.feature_count,
                _steps={},
                _balance=balance,
                _moving=moving,
            )
            self.__dict__["_prepare_seconds"] = time.perf_counter() - began
        if mask is not None:
            _can_learn(graph, mask, self.__dict__.get("classes"))
        return kept[2]

    def _checked(self, graph: Graph) -> None:
        """GraphError where a graph is not one for this model, which is built for its features if it is not yet."""
        model: Any = self
        check(graph)
        if graph.features is None:
            raise GraphError(
                f"'{graph.name}' has no features: give Graph.from_edges(features=...) a row for every vertex."
            )
        if not model.built:
            model.build((None, graph.feature_count))
        expected = self.__dict__.get("feature_count", graph.feature_count)
        if expected != graph.feature_count:
            raise GraphError(
                f"'{graph.name}' has {graph.feature_count} features, and the model was built for {expected}."
            )

    def _placed(
        self, graph: Graph, split: Split, room: Room | None = None, points: np.ndarray | None = None
    ) -> tuple[Data, Parts | None]:
        """The graph's data on its devices, split at these points if given; of several processes each makes what its own devices have."""
        devices = split.devices
        at_hand(devices)
        _check_columns(split.columns, devices)
        if devices == 1:
            graph, order = self.__dict__["_numbered"]
            data = _data(graph)
            aggregations = aggregations_of_part(
                graph, cut(graph, np.array([0, graph.vertices]), None, self._near(graph)), 0
            )
            vertex = None if order is None else order.astype(np.int32)
            return jax.device_put(
                replace(
                    data,
                    graph=replace(
                        data.graph,
                        aggregations=(*data.graph.aggregations, *aggregations),
                        vertex=vertex,
                    ),
                )
            ), None
        graph, parts, by_width = self._cut(graph, split, room, points)
        processes.same(
            "The graph, or how it is split,", _digest(graph, parts), "Do all read the same file?"
        )
        mesh, tables, pieces = _mesh(devices), _tables(graph), []
        for i, device in enumerate(mesh.devices):
            if device.process_index == jax.process_index():
                block = replace(
                    block_of_part(graph, parts, i), columns=by_width, timed=split.learns
                )
                x, labels, masks = jax.tree.map(lambda table, i=i: parts.of_part(i, table), tables)
                pieces.append(
                    jax.device_put(
                        jax.tree.map(lambda x: x[None], Data(x, labels, masks, block)), device
                    )
                )
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        joined = lambda *own: jax.make_array_from_single_device_arrays(
            (devices, *own[0].shape[1:]), sharding, list(own)
        )
        return jax.tree.map(joined, *pieces), parts

    def _cut(
        self, graph: Graph, split: Split, room: Room | None, points: np.ndarray | None = None
    ) -> tuple[Graph, Parts, tuple[tuple[int, int], ...]]:
        """(the graph as it is numbered for its parts, what they hold, devices that share the features of aggregations of so many); at these points, if given."""
        calls, columns, timed = self.__dict__["_calls"], split.columns, split.learns
        apart = _linear(calls)
        graph, order = self.__dict__["_numbered"]
        partition = split.partition if points is None else points
        if (
            order is not None
            and not isinstance(partition, str)
            and len(partition) == graph.vertices != split.devices + 1
        ):
            partition = np.asarray(partition)[order]
        graph, points, again = arranged(graph, split.devices, partition)
        order = order if again is None else again if order is None else order[again]
        if columns is None and not timed:
            chosen = lambda: json.dumps(columns_of(calls, graph, points, detect(split.devices)))
            by_width = tuple(
                (width, c) for width, c in json.loads(processes.from_first("columns", chosen))
            )
        else:
            by_width = tuple(
                (width, columns)
                for width, kind in sorted(set(calls))
                if kind != "attention" and columns not in (None, 1)
            )
        used = {
            dict(by_width).get(width, 1) if kind != "attention" else 1 for width, kind in calls
        } or {1}
        kinds = [
            *(Kind(c, apart=apart and c == 1) for c in sorted(used)),
            *self._near(graph, apart),
        ]
        return graph, replace(cut(graph, points, room, kinds, moves=timed), order=order), by_width

    def _begun(self, sums: np.ndarray, features: int, devices: int) -> np.ndarray:
        """Where learning begins, of a graph of these prefix sums: by what the machine says of rows and edges, before anything is measured."""
        model: Any = self
        matrices = sum(int(np.prod(v.shape)) for v in model.trainable_variables if len(v.shape) > 1)

        def seconds() -> str:
            machine, calls = detect(devices), self.__dict__["_calls"]
            return json.dumps(
                [row_seconds(calls, matrices, machine), edge_seconds(calls, features, machine)]
            )

        return begun(sums, devices, *json.loads(processes.from_first("rows and edges", seconds)))

    def _aggregations(self, graph: Graph) -> list[tuple[int, str]]:
        """(features, kind) of every aggregation of the model on a graph, in their order, as one vertex without edges tells: nothing is computed."""
        model: Any = self
        weights = None if graph.weights is None else np.zeros(0, np.float32)
        one = Graph(
            np.zeros(2, np.int64),
            np.zeros(0, np.int32),
            np.zeros((1, graph.feature_count), np.float32),
            weights=weights,
        )
        shapes = lambda group: [jax.ShapeDtypeStruct(v.value.shape, v.value.dtype) for v in group]
        state = shapes(model.trainable_variables), shapes(model.non_trainable_variables)
        with counted() as calls:
            jax.eval_shape(
                lambda state, data: self._predict_step(state, data, ""), state, _data(one)
            )
        return calls.seen

    def _near(self, graph: Graph, apart: bool = False) -> list[Kind]:
        """Ways over the edges that a training step needs alone, from the last aggregation backwards, as far as that spares much; those of the last graph are
        kept."""
        if not vars(type(self)).get("by_vertex"):
            return []
        kept, calls = self.__dict__.get("_near_kept"), len(self.__dict__["_calls"])
        if kept is None or kept[0] is not graph or kept[1] != calls:
            kept = self.__dict__["_near_kept"] = graph, calls, near_training(graph, calls)
        return [Kind(1, k, keep, apart) for k, keep in enumerate(kept[2])]

    @property
    def parts(self) -> Parts | None:
        """What each device holds; None on one device or before the first graph."""
        return self.__dict__["_kept"][3] if "_kept" in self.__dict__ else None

    @property
    def balance(self) -> Balance | None:
        """What was learnt of the parts' times with partition='learned'; None otherwise."""
        return self.__dict__.get("_balance")

    def _rebalanced(
        self, graph: Graph, data: Data, began: float, ended: float, compiled: bool, left: int
    ) -> Data:
        """The data of the next epoch: learns from the times of this one, and splits the graph anew if that pays in the epochs left."""
        balance, parts, moving = self.balance, self.parts, self.__dict__["_moving"]
        assert balance is not None and parts is not None
        if compiled:  # what it took says what it costs, not how fast a part is
            moving[1] = ended - began
            return data
        seen = np.append(stamp.busy(began, ended, parts.count), moving)
        if (
            jax.process_count() > 1
        ):  # each has noted the times of its own devices, and all must decide alike
            from jax.experimental import multihost_utils

            every = np.asarray(multihost_utils.process_allgather(seen.astype(np.float32)), float)
            seen = np.append(
                every[:, : parts.count].sum(axis=0), every[:, parts.count :].max(axis=0)
            )
        balance.measured(seen[: parts.count], parts.rows, parts.edge_room)
        split, (making, compiling) = self.__dict__["_split"], seen[parts.count :]

        fits = lambda points: self._cut(graph, split, parts.room, points)[1].room == parts.room
        found = balance.better(left, float(making), float(compiling), fits)
        if found is None:
            return data
        points, other = found
        started = time.perf_counter()
        placed = self._placed(graph, split, None if other else parts.room, points)
        moving[0] = time.perf_counter() - started
        self.__dict__["_kept"] = graph, split, *placed
        balance.moved(points)
        return placed[0]

    @property
    def _mesh(self) -> Mesh | None:
        return None if self.parts is None else _mesh(self.parts.count)

    def _state(self) -> Any:
        """(trainable, other, optimizer's variables) as arrays, on every device."""
        model: Any = self
        optimizer = (
            model.optimizer.variables if getattr(model, "optimizer", None) is not None else []
        )
        groups = (model.trainable_variables, model.non_trainable_variables, optimizer)
        state = tuple([v.value for v in group] for group in groups)
        return (
            state
            if self._mesh is None
            else processes.put(state, NamedSharding(self._mesh, PartitionSpec()))
        )

    def _keep(self, state: Any) -> None:
        """Puts arrays back into the model's variables."""
        model: Any = self
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
        )
        if self._mesh is not None:
            state = jax.tree.map(lambda x: x.addressable_data(0), state)
        for variables, values in zip(groups, state, strict=True):
            for variable, value in zip(variables, values, strict=True):
                variable._value = value

    def _step(self, mask: str, function: Any, donate: bool = False, rows: bool = False) -> Any:
        """A step for a mask over the placed graph, compiled once; `rows`: what it returns has a row per vertex."""
        steps, mesh, key = self.__dict__["_steps"], self._mesh, (function.__name__, mask)
        if key not in steps:
            step = lambda state, data: function(state, data, mask)
            if mesh is not None:
                whole, spec = step, PartitionSpec(AXIS)
                mine = lambda state, data: whole(state, jax.tree.map(lambda x: x[0], data))
                result = (lambda *args: mine(*args)[None]) if rows else mine
                step = jax.shard_map(
                    result,
                    mesh=mesh,
                    in_specs=(PartitionSpec(), spec),
                    out_specs=spec if rows else PartitionSpec(),
                    check_vma=False,
                )
            steps[key] = jax.jit(
                step, donate_argnums=0 if donate else (), compiler_options=step_options()
            )
        return steps[key]

    # -------------------------------------------------------------------------------------------------------------- the steps

    def _train_step(self, state: Any, data: Data, mask: str) -> Any:
        """Each device differentiates its own vertices' share of the loss; the exchange of rows takes gradients to where rows came from."""
        model: Any = self
        trainable, others, optimizer = state
        count = _over_parts(data.masks[mask].sum(), data)

        def loss(trainable: Any) -> Any:
            with counted(len(self.__dict__["_calls"])):
                predicted, others_after, penalties = model.stateless_call(
                    trainable, others, data.x, graph=data.graph, training=True, return_losses=True
                )
            value = self._summed_loss(predicted, data, mask) / count
            penalty = sum(penalties) / data.graph.parts
            return value + penalty, (value + penalty, predicted, others_after)

        gradients, (value, predicted, others) = jax.grad(loss, has_aux=True)(trainable)
        gradients, value = _over_parts((gradients, value), data)
        trainable, optimizer = model.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"loss": value, **self._judged(predicted, data, mask)}, (
            trainable,
            others,
            optimizer,
        )

    def _test_step(self, state: Any, data: Data, mask: str) -> Any:
        model: Any = self
        predicted, _, penalties = model.stateless_call(
            *state, data.x, graph=data.graph, training=False, return_losses=True
        )
        total, count = _over_parts(
            (self._summed_loss(predicted, data, mask), data.masks[mask].sum()), data
        )
        return {"loss": total / count + sum(penalties), **self._judged(predicted, data, mask)}

    def _predict_step(self, state: Any, data: Data, mask: str) -> Any:
        model: Any = self
        return model.stateless_call(*state, data.x, graph=data.graph, training=False)[0]

    def _summed_loss(self, predicted: Any, data: Data, mask: str) -> Any:
        """The sum of the loss over this device's vertices of a mask."""
        model: Any = self
        loss: Any = keras.losses.get(model.loss)
        values = (
            loss.call(data.labels, predicted)
            if isinstance(loss, keras.losses.Loss)
            else loss(data.labels, predicted)
        )
        return jnp.where(data.masks[mask] > 0, values, 0).sum()

    def _judged(self, predicted: Any, data: Data, mask: str) -> dict[str, Any]:
        """The metrics over the vertices of a mask. What a metric counts adds up over devices."""
        model: Any = self
        metrics = model._compile_metrics
        if metrics is None:
            return {}
        if not metrics.built:
            metrics.build(data.labels, predicted)
        with keras.StatelessScope(
            state_mapping=[(v, jnp.zeros(v.shape, v.dtype)) for v in metrics.variables]
        ):
            metrics.update_state(data.labels, predicted, sample_weight=data.masks[mask])
            for variable in metrics.variables:
                variable.assign(_over_parts(variable.value, data))
            return dict(metrics.result())


def trained_facts(model: Any, graph: Graph) -> dict[str, Any]:
    """What there is to say of a trained model, as JSON has it: loss, accuracy of every mask, seconds of epochs (median, first, all) and of making the parts,
    parts, features split, bytes sent an epoch, what was learnt of the parts, the memory plan."""
    judged = {
        what: model.evaluate(graph, what, return_dict=True)
        for what in MASKS
        if (m := getattr(graph, what)) is not None and m.any()
    }
    parts, seconds = model.parts, model.epoch_seconds
    return {
        "graph": graph.name,
        "edges": graph.edges,
        "epochs": len(seconds),
        "prepare_seconds": model.prepare_seconds,
        "loss": judged["train"]["loss"],
        "accuracy": {what: logs["accuracy"] for what, logs in judged.items()},
        "epoch_seconds": float(np.median(seconds[1:] or seconds)) if seconds else None,
        "first_seconds": seconds[0] if seconds else None,
        "seconds": seconds,
        "parts": []
        if parts is None
        else [
            {"vertices": int(v), "edges": int(e), "fetched": int(f)}
            for v, e, f in zip(parts.vertices, parts.edges, parts.fetched, strict=True)
        ],
        "columns": {} if parts is None else {str(width): c for width, c in model.columns if c > 1},
        "traffic": model.traffic(graph) if parts is not None else 0,
        **({"learned": model.balance.facts()} if model.balance is not None else {}),
        **({"memory": model.memory.facts()} if model.__dict__.get("memory") is not None else {}),
    }


def _sent(jaxpr: Any, parts: int) -> int:
    """Bytes of the exchanges of a program, those of inner programs among them, over all devices."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("ppermute", "all_to_all"):
            groups = equation.params.get("axis_index_groups")
            stays = (
                parts // len(groups[0]) if groups else 0
            )  # of an all-to-all, what a device keeps
            total += (parts - stays) * sum(
                v.aval.size * v.aval.dtype.itemsize for v in equation.outvars
            )
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            total += _sent(inner, parts) if hasattr(inner, "eqns") else 0
    return total


def normalised(graph: Graph) -> Graph:
    """The graph with features divided by their row's sum, as is usual for counts of words; rows of zeros stay.

    >>> normalised(Graph.from_edges([0], [1], features=[[1, 3], [0, 0]])).features.tolist()
    [[0.25, 0.75], [0.0, 0.0]]
    """
    if graph.features is None or (graph.features < 0).any():
        raise GraphError(
            f"The features of '{graph.name}' cannot be divided by their sum: there are none, or negative ones."
        )
    sums = graph.features.sum(axis=1, keepdims=True)
    return replace(graph, features=graph.features / np.where(sums > 0, sums, 1))


def _over_parts(values: Any, data: Data) -> Any:
    """The sums of values over all devices."""
    if data.graph.parts == 1:
        return values
    return data.graph.left(jax.lax.psum(data.graph.entered(values), AXIS))


def _linear(calls: Sequence[tuple[int, str]]) -> bool:
    """Whether all aggregations are sums, which can be taken over some edges first and the others later."""
    return all(kind == "sum" for _, kind in calls)


def _mesh(parts: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:parts]), (AXIS,))


def _check_columns(columns: int | None, devices: int) -> None:
    if columns is not None and (columns < 1 or devices % columns):
        raise GraphError(
            f"{devices} devices cannot be put into groups of {columns}: columns must divide the devices."
        )


def _digest(graph: Graph, parts: Parts) -> str:
    """Of what all processes must have alike."""
    return processes.digest(
        [
            np.array([graph.vertices, graph.edges, graph.feature_count]),
            parts.points,
            parts.edges,
            parts.fetched,
        ]
    )


def _all_devices(devices: int) -> int:
    """How many devices take part: of several processes all, whoever's they are."""
    if processes.alone():
        return devices
    there = jax.device_count()
    if devices not in (1, there):
        raise GraphError(
            f"{jax.process_count()} processes have {there} devices in all, and devices={devices} was asked for: give {there}, or leave it out."
        )
    return there


def _numbered(graph: Graph, order: Any) -> tuple[Graph, np.ndarray | None]:
    """(the graph as its vertices are numbered inside, in which order they are, if not as they were)."""
    if order is None:
        return graph, None
    order = order_of(graph, order)
    return graph.relabelled(order), order


def _warm() -> None:
    """Loads what makes parts, on a small graph."""
    small = Graph.from_edges([0, 1], [1, 0])
    block_of_part(small, cut(small, np.array([0, 1, 2])), 0)


def _balance(graph: Graph, sums: np.ndarray, parts: Parts) -> Balance:
    """Learning that starts from the parts, and tries equal vertices and what lies half-way."""
    even = by_vertices(graph, parts.count)
    return Balance(sums, parts.points, [even, (even + parts.points) // 2])


def _data(graph: Graph) -> Data:
    return Data(*_tables(graph), block_of(graph))


def _tables(graph: Graph) -> tuple[Any, Any, dict[str, Any]]:
    """(x, labels, masks) of all vertices."""
    none = np.zeros(graph.vertices, np.float32)
    labels = (
        np.zeros(graph.vertices, np.int32) if graph.labels is None else np.maximum(graph.labels, 0)
    )
    masks = {
        what: none if getattr(graph, what) is None else getattr(graph, what).astype(np.float32)
        for what in MASKS
    }
    return graph.features, labels, masks


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
        raise GraphError(
            f"The {what} mask of '{graph.name}' is empty: mark at least one vertex, {mask}=[...]."
        )
    if classes is not None and graph.classes > classes:
        v = int(np.argmax(graph.labels >= classes))
        raise GraphError(
            f"Vertex {v:,} has the label {graph.labels[v]}, and the model has {classes} classes, 0 to {classes - 1}: make it with classes={graph.classes}."
        )

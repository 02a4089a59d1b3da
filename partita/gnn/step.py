"""The steps of training: their state, loss, metrics and compiled programs.

Every form of training takes loss and metrics from here: steps over whole graphs below, and
operators of memory plans (`spill`). Sums over vertices, of the loss and of each metric's counts,
add up over devices and over ranges of rows. A step is a function of the state and of the graph's
data. It is compiled once for each shape of the data, so that a graph that was trained on before
compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import keras
from jax.sharding import NamedSharding, PartitionSpec
from keras.src.backend import get_keras_mask

from partita.errors import GraphError
from partita.execute import process_arrays
from partita.gnn.kernels.bridge import step_options
from partita.gnn.nn.block import AXIS, recorded_calls
from partita.gnn.prepare import GraphData, PreparedGraph, mesh_of
from partita.gnn.trials import check_loss, check_metrics, metrics_error

PROGRAMS = 64
"""Programs of a step, for data of different shapes, after which all of them are dropped."""

# -------------------------------------------------------------------------------------- the state


class StepState(NamedTuple):
    """Variables of a model as arrays: trainable, non-trainable, the optimizer's."""

    trainable: list[Any]
    others: list[Any]
    optimizer: list[Any]


def state_of(model: Any) -> StepState:
    """The values of a model's variables; without an optimizer before `compile`."""
    optimizer = getattr(model, "optimizer", None)
    return StepState(
        [v.value for v in model.trainable_variables],
        [v.value for v in model.non_trainable_variables],
        [] if optimizer is None else [v.value for v in optimizer.variables],
    )


def store_state(model: Any, state: StepState) -> None:
    """Puts arrays back into the variables of a compiled model."""
    groups = (model.trainable_variables, model.non_trainable_variables, model.optimizer.variables)
    for variables, values in zip(groups, state, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable._value = value


# ------------------------------------------------------------------------------ loss and metrics


def loss_sum(model: Any, predicted: Any, data: GraphData, mask: str, importance: Any = None) -> Any:
    """The sum of the loss over the vertices of a mask, a scalar.

    `importance`, float32 [rows], multiplies the loss of each vertex. GraphError unless the loss has
    one value per vertex.
    """
    check_output(model, predicted)
    _check_rows(model, predicted, len(data.masks[mask]))
    # A loss may have no gradient at the rows of other vertices, and 0 times NaN is NaN.
    counts = (data.masks[mask] > 0).reshape(-1, *[1] * (predicted.ndim - 1))
    safe = jnp.where(counts, predicted.astype(jnp.float32), 0.5)
    values, counted = _loss_values(model, safe, data, mask)
    check_loss(*_loss_function(model), labels_like(predicted, data), predicted)
    if importance is not None:
        values = values * importance
    return jnp.where(counted, values, 0).sum()


def loss_divisor(
    model: Any, predicted: Any, data: GraphData, mask: str, importance: Any = None
) -> Any:
    """The number that divides the sum of the loss of all devices, a scalar.

    By Keras's reductions: the vertices of the mask that the loss does not ignore, or the sum of
    their `importance`, or 1. `predicted` tells the shape of the output alone.
    """
    _, counted = _loss_values(model, jnp.full(predicted.shape, 0.5, jnp.float32), data, mask)
    reduction = getattr(keras.losses.get(model.loss), "reduction", "sum_over_batch_size")
    if reduction == "sum":
        return jnp.ones(())
    weights = jnp.ones(counted.shape, jnp.float32)
    if reduction == "mean_with_sample_weight" and importance is not None:
        weights = importance
    total = data.block.sum_over_devices(jnp.where(counted, weights, 0).sum())
    return jnp.where(total > 0, total, 1)


def _loss_values(model: Any, predicted: Any, data: GraphData, mask: str) -> tuple[Any, Any]:
    """([rows] the loss of each vertex, bool [rows] whether it counts)."""
    loss, function = _loss_function(model)
    try:
        values = function(labels_like(predicted, data), predicted)
    except ValueError as error:
        raise GraphError(
            f"The loss cannot be computed for labels {list(data.labels.shape)} and outputs "
            f"{list(predicted.shape)}: {error}. Use a model with an output for each target."
        ) from error
    if values.shape != data.masks[mask].shape:
        name = getattr(loss, "name", None) or getattr(loss, "__name__", type(loss).__name__)
        raise GraphError(
            f"The loss {name!r} has the shape {list(values.shape)} for labels "
            f"{list(data.labels.shape)} and outputs {list(predicted.shape)}: use a loss with one "
            "value per vertex, and a model with an output for each target (classes=)."
        )
    counted = data.masks[mask] > 0
    unignored = get_keras_mask(values)
    return values, counted if unignored is None else counted & unignored


def _loss_function(model: Any) -> tuple[Any, Any]:
    """(the loss, its values for labels and outputs)."""
    loss: Any = keras.losses.get(model.loss)
    return loss, loss.call if isinstance(loss, keras.losses.Loss) else loss


def check_output(model: Any, predicted: Any) -> None:
    """GraphError unless the output of a model is one array with a row per vertex."""
    if getattr(predicted, "ndim", 0) > 0:
        return
    kind = "number" if hasattr(predicted, "ndim") else type(predicted).__name__
    raise GraphError(
        f"The output of '{model.name}' is a {kind}: return one array [rows, features]. Of several "
        "outputs, return keras.ops.concatenate(outputs, axis=1), and give a loss that splits it."
    )


def _check_rows(model: Any, predicted: Any, rows: int) -> None:
    """GraphError unless an output has a row per vertex."""
    if len(predicted) != rows:
        raise GraphError(
            f"The output of '{model.name}' has {len(predicted):,} rows for {rows:,} vertices: "
            "return a row for every row of x."
        )


def check_penalties(penalties: Sequence[Any]) -> None:
    """GraphError unless penalties of `add_loss` are numbers."""
    for penalty in penalties:
        if jnp.ndim(penalty) > 0:
            raise GraphError(
                f"add_loss is given an array {list(jnp.shape(penalty))}: give one number, such as "
                "self.add_loss(graph.vertex_sum(penalties)) of one penalty per vertex."
            )


def labels_like(predicted: Any, data: GraphData) -> Any:
    """Labels [rows, 1] for a model with one output, as Keras gives them to losses and metrics."""
    labels = data.labels
    return labels[:, None] if labels.ndim == 1 and predicted.shape[-1] == 1 else labels


def build_metrics(model: Any, data: GraphData, predicted: Any, splits: bool) -> None:
    """Makes the variables of the metrics if there are none yet.

    GraphError for metrics that cannot count the vertices of a mask, in parts if it `splits`.
    """
    metrics = model._compile_metrics
    if metrics is None:
        return
    labels = labels_like(predicted, data)
    if not metrics.built:
        try:
            metrics.build(labels, predicted)
            # Some metrics, as F1 scores, make theirs when they are updated.
            with keras.StatelessScope():
                metrics.update_state(labels, predicted)
        except (TypeError, ValueError) as error:
            raise metrics_error(metrics, labels, predicted, error) from error
    check_metrics(metrics, partial(_counts_of, model), labels, predicted, splits)


def zero_counts(model: Any) -> list[Any]:
    """The counts of the metrics over no vertices."""
    metrics = model._compile_metrics
    if metrics is None:
        return []
    return [jnp.zeros(v.shape, v.dtype) for v in metrics.variables]


def metric_counts(model: Any, predicted: Any, data: GraphData, mask: str) -> list[Any]:
    """The metrics' variables over the vertices of a mask; those of several sets add up."""
    if model._compile_metrics is None:
        return []
    weights = data.masks[mask]
    labels = _ordinary_outside(weights, labels_like(predicted, data))
    return _counts_of(model, labels, _ordinary_outside(weights, predicted), weights)


def _ordinary_outside(weights: Any, rows: Any) -> Any:
    """Rows with ordinary numbers where the weight is 0; classes stay.

    Padding is constant, a correlation with it is not a number, and 0 times that is none either.
    """
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        return rows
    ordinary = jnp.linspace(0.25, 0.75, rows.shape[-1]).astype(rows.dtype)
    counts = (weights > 0).reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(counts, rows, ordinary if rows.ndim > 1 else 0.5)


def _counts_of(model: Any, labels: Any, predicted: Any, weights: Any) -> list[Any]:
    """The metrics' variables over rows with their weights."""
    metrics = model._compile_metrics
    zeros = list(zip(metrics.variables, zero_counts(model), strict=True))
    with keras.StatelessScope(state_mapping=zeros):
        metrics.update_state(labels, predicted, sample_weight=weights)
        return [variable.value for variable in metrics.variables]


def logs_of(model: Any, loss: Any, counts: Sequence[Any]) -> dict[str, Any]:
    """Loss and metrics by name, of a loss and of the metrics' counts."""
    metrics = model._compile_metrics
    if metrics is None:
        return {"loss": loss}
    with keras.StatelessScope(state_mapping=list(zip(metrics.variables, counts, strict=True))):
        results = metrics.result()
        # A result may be a variable of its metric.
        return {"loss": loss} | {k: keras.ops.convert_to_tensor(v) for k, v in results.items()}


def _logs_over_devices(
    model: Any, loss: Any, predicted: Any, data: GraphData, mask: str
) -> dict[str, Any]:
    """Loss and metrics by name, of the loss of all devices and this device's predicted rows."""
    build_metrics(model, data, predicted, splits=data.block.parts > 1)
    counts = metric_counts(model, predicted, data, mask)
    return logs_of(model, loss, [data.block.sum_over_devices(count) for count in counts])


# ------------------------------------------------------------------------------------- the steps


def train_step(model: Any, aggregations: int, state: StepState, data: GraphData) -> Any:
    """(logs, state after) of one step over the training mask, as `differentiated` computes it."""
    scale = loss_scale(model, state.optimizer)
    gradients, value, predicted, others = differentiated(model, aggregations, state, data, scale)
    trainable, optimizer = model.optimizer.stateless_apply(
        state.optimizer, gradients, state.trainable
    )
    logs = _logs_over_devices(model, value, predicted, data, "train")
    return logs, StepState(trainable, others, optimizer)


def loss_scale(model: Any, optimizer: Sequence[Any]) -> Any:
    """The factor by which an optimizer of these values expects the gradients, a scalar.

    It is 1 but for loss scaling, which keeps gradients in the range of float16.
    """
    values = list(zip(model.optimizer.variables, optimizer, strict=True))
    with keras.StatelessScope(state_mapping=values):
        return model.optimizer.scale_loss(jnp.ones(()))


def differentiated(
    model: Any, aggregations: int, state: StepState, data: GraphData, scale: Any = 1.0
) -> tuple[Any, Any, Any, Any]:
    """(gradients, loss, this device's output, other variables after) over the training mask.

    Each device differentiates its own vertices' share of the loss. The exchange of rows takes
    gradients back to the devices that the rows came from. `aggregations`: their number, which tells
    the last ones. `scale` multiplies the gradients.
    """
    trainable, others, _ = state
    x = data.block.filled(data.x)

    def loss(trainable: Any) -> Any:
        with recorded_calls(aggregations):
            predicted, others_after, penalties = model.stateless_call(
                trainable, others, x, graph=data.block, training=True, return_losses=True
            )
        check_penalties(penalties)
        total = loss_sum(model, predicted, data, "train", data.importance)
        value = total / loss_divisor(model, predicted, data, "train", data.importance)
        value = value + sum(penalties) / data.block.parts
        return scale * value, (value, predicted, others_after)

    gradients, (value, predicted, others) = jax.grad(loss, has_aux=True)(trainable)
    gradients, value = data.block.sum_over_devices((gradients, value))
    return gradients, value, predicted, others


def evaluation_step(model: Any, mask: str, state: StepState, data: GraphData) -> dict[str, Any]:
    """Logs over the vertices of a mask, without dropout."""
    predicted, _, penalties = model.stateless_call(
        state.trainable, state.others, data.x, graph=data.block, training=False, return_losses=True
    )
    total = data.block.sum_over_devices(loss_sum(model, predicted, data, mask))
    loss = total / loss_divisor(model, predicted, data, mask) + sum(penalties)
    return _logs_over_devices(model, loss, predicted, data, mask)


def prediction_step(model: Any, state: StepState, data: GraphData) -> Any:
    """[rows, classes]: the output of a model, without dropout."""
    predicted = model.stateless_call(
        state.trainable, state.others, data.x, graph=data.block, training=False
    )[0]
    check_output(model, predicted)
    _check_rows(model, predicted, len(data.x))
    return predicted.astype(jnp.float32)


class CompiledSteps:
    """The steps of one model, each compiled once for data of a shape.

    They are valid until the model is compiled anew.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._programs: dict[tuple[Any, ...], Any] = {}

    def train(self, prepared: PreparedGraph) -> Any:
        """The training step, which reuses the memory of the state that is given."""
        aggregations = len(prepared.key.architecture.aggregations)
        step = partial(train_step, self.model, aggregations)
        return self._program(("train", aggregations), step, prepared.devices, donates=True)

    def evaluate(self, prepared: PreparedGraph, mask: str) -> Any:
        """The evaluation step of a mask. Only the state without the optimizer's is read."""
        step = partial(evaluation_step, self.model, mask)
        return self._program(("evaluate", mask), step, prepared.devices)

    def predict(self, prepared: PreparedGraph) -> Any:
        """The prediction step; over several devices its result has a leading dim of devices."""
        step = partial(prediction_step, self.model)
        return self._program(("predict",), step, prepared.devices, rows=True)

    def programs(self) -> int:
        """Number of compiled programs."""
        return sum(program._cache_size() for program in self._programs.values())

    def clear(self) -> None:
        """Drops all programs."""
        self._programs.clear()

    def _program(
        self,
        name: tuple[Any, ...],
        step: Callable[[StepState, GraphData], Any],
        devices: int,
        donates: bool = False,
        rows: bool = False,
    ) -> Any:
        key = (*name, devices)
        if key not in self._programs:
            self._programs[key] = jax.jit(
                on_each_device(step, devices, (False, True), rows),
                donate_argnums=0 if donates else (),
                compiler_options=step_options(),
            )
        program = self._programs[key]
        if program._cache_size() > PROGRAMS:
            program.clear_cache()
        return program


def on_each_device(
    function: Callable[..., Any], devices: int, own: Sequence[bool], gives_own: bool
) -> Callable[..., Any]:
    """A function that each of several devices computes; on one device, the function itself.

    own         for each argument, whether its arrays have a leading dim of devices, of which each
                device is given its own entry. Every device is given other arguments whole.
    gives_own   whether results have such a dim. Otherwise all devices give equal ones.
    """
    if devices == 1:
        return function

    def one_device(*arguments: Any) -> Any:
        given = []
        for argument, is_own in zip(arguments, own, strict=True):
            given.append(jax.tree.map(lambda array: array[0], argument) if is_own else argument)
        result = function(*given)
        return jax.tree.map(lambda array: array[None], result) if gives_own else result

    split, everywhere = PartitionSpec(AXIS), PartitionSpec()
    return jax.shard_map(
        one_device,
        mesh=mesh_of(devices),
        in_specs=tuple(split if is_own else everywhere for is_own in own),
        out_specs=split if gives_own else everywhere,
        check_vma=False,
    )


def on_all_devices(state: StepState, devices: int) -> StepState:
    """A state with a copy of every array on each of several devices."""
    if devices == 1:
        return state
    return process_arrays.put(state, NamedSharding(mesh_of(devices), PartitionSpec()))


def of_first_device(state: StepState, devices: int) -> StepState:
    """A state that several devices have equally, as arrays of the first one."""
    if devices == 1:
        return state
    return jax.tree.map(lambda array: array.addressable_data(0), state)


def exchanged_bytes(jaxpr: Any, devices: int) -> int:
    """Bytes of the exchanges of a program and of its inner programs, over all devices."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("ppermute", "all_to_all"):
            groups = equation.params.get("axis_index_groups")
            # A device sends no bytes of its own slice of an all-to-all.
            stays = devices // len(groups[0]) if groups else 0
            nbytes = sum(v.aval.size * v.aval.dtype.itemsize for v in equation.outvars)
            total += (devices - stays) * nbytes
        total += sum(exchanged_bytes(inner, devices) for inner in inner_programs(equation))
    return total


def peak_bytes(jaxpr: Any) -> int:
    """Bytes of the values inside a program at its peak, without its inputs.

    A result takes the place of an operand of its size that is read for the last time.
    """
    last_reads: dict[Any, int] = {}
    for number, equation in enumerate(jaxpr.eqns):
        last_reads.update((v, number) for v in equation.invars if not hasattr(v, "val"))
    last_reads.update((v, len(jaxpr.eqns)) for v in jaxpr.outvars if not hasattr(v, "val"))
    alive: dict[Any, int] = {}
    peak = 0
    for number, equation in enumerate(jaxpr.eqns):
        results = {v: v.aval.size * v.aval.dtype.itemsize for v in equation.outvars}
        dead = [v for v in alive if last_reads.get(v, -1) <= number]
        replaced = [alive[v] for v in dead if alive[v] in results.values()]
        inside = max(map(peak_bytes, inner_programs(equation)), default=0)
        before = sum(alive.values())
        peak = max(peak, before + max(sum(results.values()) - sum(replaced), inside))
        alive.update(results)
        for v in dead:
            del alive[v]
    return peak


def inner_programs(equation: Any) -> Iterator[Any]:
    """The programs in an operation's parameters."""
    for inner in jax.tree.leaves(equation.params, is_leaf=_is_program):
        program = getattr(inner, "jaxpr", inner)
        if hasattr(program, "eqns"):
            yield program


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")

"""Trials of a loss and of metrics of one's own, on a few random rows.

Steps add up the losses of single vertices, and the counts of metrics over parts of the vertices. A
loss that compares vertices with each other, and a metric whose counts do not add up, would silently
give other numbers. Keras's own are known, but for the losses that compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import keras
import numpy as np

from partita.errors import GraphError
from partita.files.reading import short_reason

ROWS = 8
"""Random rows of a trial."""
COMPARING = ("circle", "Circle")
"""Keras's losses that compare samples with each other, though they have a value for each."""
Values = Callable[[Any, Any], Any]
"""A function of (labels, outputs)."""


def check_loss(loss: Any, values: Values, labels: Any, predicted: Any) -> None:
    """GraphError if the loss of a vertex depends on other vertices.

    `values` gives the loss [rows] of arrays such as `labels` and `predicted`.
    """
    name = getattr(loss, "__name__", type(loss).__name__)
    if _is_of_keras(loss) and name not in COMPARING:
        return
    with jax.ensure_compile_time_eval():
        given, outputs = _random_rows(labels, predicted)
        whole = np.asarray(values(given, outputs))
        halves = _by_halves(lambda half: values(given[half], outputs[half]))
    if whole.shape == (ROWS,) and not _equal(np.concatenate(halves), whole):
        raise GraphError(
            f"The loss {name!r} of a vertex depends on other vertices, and a step adds up losses "
            "of single ones: use a loss that does not compare them, or self.add_loss in call."
        )


def check_metrics(
    metrics: Any, counts: Callable[[Any, Any, Any], Any], labels: Any, predicted: Any, splits: bool
) -> None:
    """GraphError for metrics that count rows of weight 0, and if vertices are split, for metrics
    whose counts over two sets do not add up.

    `counts` gives the variables of the metrics, after rows of arrays such as `labels` and
    `predicted`, with their weights.
    """
    are_of_keras = all(
        _is_of_keras(metric) and _is_of_keras(_function_of(metric)) for metric in metrics.metrics
    )
    ones = np.ones(ROWS, np.float32)
    with jax.ensure_compile_time_eval():
        given, outputs = _random_rows(labels, predicted)
        try:
            if are_of_keras:
                jax.eval_shape(counts, given, outputs, ones)
                return
            whole = counts(given, outputs, ones)
            halves = _by_halves(lambda half: counts(given[half], outputs[half], ones[half]))
            masked = counts(given, outputs, np.repeat(np.array([1, 0], np.float32), ROWS // 2))
        except (TypeError, ValueError) as error:
            raise metrics_error(metrics, labels, predicted, error) from error
    sums = [np.asarray(one) + np.asarray(other) for one, other in zip(*halves, strict=True)]
    for variable, total, first, of_mask, added in zip(
        metrics.variables, whole, halves[0], masked, sums, strict=True
    ):
        if not _equal(of_mask, first):
            raise GraphError(
                f"The metric of {variable.path!r} reads rows of weight 0, and a mask is given as "
                "weights: return one value per row, or use sample_weight in its update_state."
            )
        if splits and not _equal(added, total):
            raise GraphError(
                f"The metric of {variable.path!r} has counts that do not add up over vertices, as "
                "several devices and memory plans need: use a metric that sums, or devices=1."
            )


def metrics_error(metrics: Any, labels: Any, predicted: Any, error: Exception) -> GraphError:
    """The error for metrics that cannot be computed for these labels and outputs."""
    # The list is empty before the metrics are made.
    names = "".join(f" {metric.name}," for metric in metrics.metrics).rstrip(",")
    return GraphError(
        f"The metrics{names} cannot be computed for labels {list(labels.shape)}, outputs "
        f"{list(predicted.shape)} and a weight per row: {short_reason(str(error))}. Use metrics "
        "for such labels (one-hot ones are [rows, classes]), with one value per row."
    )


def _function_of(metric: Any) -> Any:
    """The user's function that Keras made a metric of, or the metric itself."""
    return getattr(metric, "_fn", metric)


def _is_of_keras(value: Any) -> bool:
    module = getattr(value, "__module__", type(value).__module__)
    return module.partition(".")[0] == "keras"


def _by_halves(function: Callable[[slice], Any]) -> list[Any]:
    return [function(slice(0, ROWS // 2)), function(slice(ROWS // 2, ROWS))]


def _random_rows(labels: Any, predicted: Any) -> tuple[Any, Any]:
    """Rows of labels and outputs like those of a graph: shapes, number types, classes."""
    random = np.random.default_rng(0)
    outputs = random.uniform(0.1, 0.9, (ROWS, *predicted.shape[1:])).astype(np.float32)
    shape = (ROWS, *labels.shape[1:])
    kind = np.dtype(labels.dtype)
    if kind.kind == "f":
        given = random.uniform(0, 1, shape).astype(kind)
    else:
        given = random.integers(0, max(2, predicted.shape[-1]), shape).astype(kind)
    return keras.ops.convert_to_tensor(given), keras.ops.convert_to_tensor(outputs)


def _equal(one: Any, other: Any) -> bool:
    return np.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)

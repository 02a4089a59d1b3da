"""The jobs of a step: functions that run one group of pieces on one range of rows or columns.

A training step runs every group forward, then the last one in both directions with the loss between
("turn"), then the others backward. A backward job computes its group again by itself. An evaluation
or prediction runs forward only. Values that add up from job to job are in a `Carry`.
Penalties of layers count in the one job that no plan runs again: in training, the backward one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import keras

from partita.gnn.nn.block import Block
from partita.gnn.prepare import GraphData
from partita.gnn.spill.groups import GroupedModel, PieceGroup, run_group
from partita.gnn.step import loss_divisor, loss_sum, metric_counts, zero_counts

KINDS = ("train", "evaluate", "predict")
"""Kinds of steps: training, evaluation over the vertices of the training mask, prediction."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Carry:
    """Sums from job to job.

    others      non-trainable variables after the step
    total       gradients of the trainable variables
    loss        the loss
    counts      the counts of the metrics
    """

    others: list[Any]
    total: list[Any]
    loss: Any
    counts: list[Any]

    def with_others(self, changed: dict[int, Any]) -> Carry:
        """With other values of variables, by number."""
        return replace(self, others=[changed.get(k, v) for k, v in enumerate(self.others)])

    def with_loss(self, loss: Any, counts: Sequence[Any] | None = None) -> Carry:
        """With more loss, and more counts if given."""
        if counts is None:
            return replace(self, loss=self.loss + loss)
        sums = [a + b for a, b in zip(self.counts, counts, strict=True)]
        return replace(self, loss=self.loss + loss, counts=sums)

    def with_gradients(self, used: Sequence[int], gradients: Sequence[Any]) -> Carry:
        """With more gradients, of the variables of these numbers."""
        total = list(self.total)
        for k, gradient in zip(used, gradients, strict=True):
            total[k] = total[k] + gradient
        return replace(self, total=total)


def first_carry(model: Any, parts: int, trainable: Any, others: Any) -> Carry:
    """The carry at the begin of a step: the penalty of the weights and its gradients.

    Each of `parts` devices begins with its share of both.
    """

    def penalty(trainable: Any) -> Any:
        values = list(zip(model.trainable_variables, trainable, strict=True))
        with keras.StatelessScope(state_mapping=values):
            return sum(model.losses, start=jnp.zeros(())) / parts

    value, gradients = jax.value_and_grad(penalty)(trainable)
    copies = [jnp.array(v, copy=True) for v in others]
    return Carry(copies, gradients, value, zero_counts(model))


def last_carry(carry: Carry, data: GraphData) -> Carry:
    """The carry at the end of a step: the sums of all devices."""
    sums = (carry.total, carry.loss, carry.counts)
    total, loss, counts = data.block.sum_over_devices(sums)
    return Carry(carry.others, total, loss, counts)


@dataclass(frozen=True)
class JobInputs:
    """The inputs of a job beside tables.

    first   the number of the first row or column, int32
    size    rows or columns
    """

    carry: Carry
    trainable: Any
    others: Any
    data: GraphData
    first: Any
    size: int


@dataclass(frozen=True)
class Job:
    """A job for every range of a group: `function(inputs, tables)` gives (carry, tables).

    kind            'forward', 'turn', 'backward', 'evaluate' or 'predict'
    number          the number of the group
    reads, writes   (table with the same tiles, name) of each table
    """

    kind: str
    number: int
    function: Callable[[JobInputs, tuple[Any, ...]], Any]
    reads: Sequence[tuple[str, str]]
    writes: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Backward:
    """A group backward.

    targets     tables whose gradients are given
    reads       tables that are read, none if the gradient does not depend on them
    sums        the targets that have a gradient so far
    """

    group: PieceGroup
    targets: Sequence[str]
    reads: Sequence[str]
    sums: Sequence[str]


def jobs_of(model: Any, grouped: GroupedModel, kind: str) -> Iterator[Job]:
    """The jobs of a step of this kind, in order."""
    *inner, end = grouped.groups
    counts_penalties = kind == "evaluate"
    for i, group in enumerate(inner):
        function = partial(_forward, model, group, counts_penalties)
        yield Job("forward", i, function, _same(group.reads), _same(group.writes))
    if kind == "train":
        yield from _learning_jobs(model, grouped.groups)
        return
    if kind == "evaluate":
        function = partial(_evaluate, model, end)
    else:
        function = partial(_forward, model, end, counts_penalties)
    yield Job(kind, len(inner), function, _same(end.reads), [])


def _learning_jobs(model: Any, groups: Sequence[PieceGroup]) -> Iterator[Job]:
    """The turn and the backward jobs."""
    last = len(groups) - 1
    end = groups[last]
    differentiated = _differentiated(groups)
    targets = [name for name in end.reads if name in differentiated]
    # The tables that hold the sums of gradients so far.
    gradients = {name: f"d{name}" for name in targets}
    yield Job(
        "turn",
        last,
        partial(_turn, model, end, targets),
        _same(end.reads),
        [(name, gradients[name]) for name in targets],
    )
    for i in reversed(range(last)):
        group = groups[i]
        if not differentiated & set(group.writes):
            continue
        targets = [name for name in group.reads if name in differentiated]
        reads = [] if group.linear and not group.used else [*group.reads]
        above = [(name, gradients[name]) for name in group.writes]
        sums = [(name, gradients[name]) for name in targets if name in gradients]
        for name in targets:
            gradients[name] = gradients[name] + "+" if name in gradients else f"d{name}"
        if not targets and not group.used and not group.penalizes:
            continue
        backward = Backward(group, targets, reads, [name for name, _ in sums])
        yield Job(
            "backward",
            i,
            partial(_backward, model, backward),
            [*_same(reads), *above, *sums],
            [(name, gradients[name]) for name in targets],
        )


def _differentiated(groups: Sequence[PieceGroup]) -> set[str]:
    """Tables that depend on trainable variables, and so have a gradient.

    A group with a penalty alone has a backward job too, which counts the penalty.
    """
    tables: set[str] = set()
    for group in groups:
        if group.used or group.penalizes or tables & set(group.reads):
            tables |= set(group.writes)
    return tables


def _same(tables: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, name) for name in tables]


# --------------------------------------------------------------------------------- the functions


def _forward(
    model: Any,
    group: PieceGroup,
    counts_penalties: bool,
    inputs: JobInputs,
    tables: tuple[Any, ...],
) -> Any:
    """(carry, tables written), with penalties in the carry if they count here."""
    named = dict(zip(group.reads, tables, strict=True))
    written, changed, penalties = _run(model, group, inputs, inputs.trainable, named)
    carry = inputs.carry.with_others(changed)
    if counts_penalties:
        carry = carry.with_loss(_penalty_share(penalties, inputs))
    return carry, written


def _evaluate(model: Any, group: PieceGroup, inputs: JobInputs, tables: tuple[Any, ...]) -> Any:
    """(carry with loss and metrics, no tables)."""
    named = dict(zip(group.reads, tables, strict=True))
    (rows,), _, penalties = _run(model, group, inputs, inputs.trainable, named)
    part = _part(group, inputs)
    loss = _penalty_share(penalties, inputs) + _loss_share(model, rows, part, inputs.data)
    return inputs.carry.with_loss(loss, metric_counts(model, rows, part, "train")), []


def _turn(
    model: Any,
    group: PieceGroup,
    targets: Sequence[str],
    inputs: JobInputs,
    tables: tuple[Any, ...],
) -> Any:
    """Forward, loss, metrics and backward: (carry, gradients of the target tables)."""
    named = dict(zip(group.reads, tables, strict=True))
    part = _part(group, inputs)

    def loss(weights: Any, target_tables: dict[str, Any]) -> Any:
        trainable = _replaced(inputs.trainable, group.used, weights)
        given = named | target_tables
        (rows,), changed, penalties = _run(model, group, inputs, trainable, given)
        of_rows = _loss_share(model, rows, part, inputs.data)
        return of_rows + _penalty_share(penalties, inputs), (rows, changed)

    weights = [inputs.trainable[k] for k in group.used]
    target_tables = {name: named[name] for name in targets}
    differentiated = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (value, (rows, changed)), gradients = differentiated(weights, target_tables)
    of_weights, of_tables = gradients
    carry = inputs.carry.with_others(changed)
    carry = carry.with_loss(value, metric_counts(model, rows, part, "train"))
    return carry.with_gradients(group.used, of_weights), [of_tables[name] for name in targets]


def _backward(model: Any, backward: Backward, inputs: JobInputs, tables: tuple[Any, ...]) -> Any:
    """(carry, gradients of the target tables, added to those so far).

    `tables` are those read, then the gradients of those written, then the sums so far.
    """
    group = backward.group
    reads_end = len(backward.reads)
    writes_end = reads_end + len(group.writes)
    named = dict(zip(backward.reads, tables[:reads_end], strict=True))
    above = list(tables[reads_end:writes_end])
    before = dict(zip(backward.sums, tables[writes_end:], strict=True))
    if not named:
        # The values do not matter: the group is linear.
        named = {name: jnp.zeros_like(above[0]) for name in group.reads}

    def run(weights: Any, target_tables: dict[str, Any]) -> Any:
        trainable = _replaced(inputs.trainable, group.used, weights)
        given = named | target_tables
        written, _, penalties = _run(model, group, inputs, trainable, given)
        return written, _penalty_share(penalties, inputs)

    weights = [inputs.trainable[k] for k in group.used]
    target_tables = {name: named[name] for name in backward.targets}
    (_, penalty), pull_back = jax.vjp(run, weights, target_tables)
    of_weights, of_tables = pull_back((above, jnp.ones_like(penalty)))
    gradients = []
    for name in backward.targets:
        gradient = of_tables[name]
        gradients.append(gradient + before[name] if name in before else gradient)
    carry = inputs.carry.with_loss(penalty)
    return carry.with_gradients(group.used, of_weights), gradients


def _penalty_share(penalties: Sequence[Any], inputs: JobInputs) -> Any:
    """A device's share of penalties, whose sum over the devices is the penalty."""
    return sum(penalties, start=jnp.zeros(())) / inputs.data.block.parts


def _run(
    model: Any, group: PieceGroup, inputs: JobInputs, trainable: Any, tables: dict[str, Any]
) -> Any:
    """A group on the range of a job, as `run_group` gives it."""
    graph = inputs.data.block
    column = inputs.first
    if group.by == "rows":
        graph = _rows_of(graph, inputs)
        column = 0
    return run_group(model, group, (trainable, inputs.others), graph, column, tables)


def _rows_of(graph: Block, inputs: JobInputs) -> Block:
    """The block with the numbers of the vertices of a range of rows, which dropout reads."""
    if graph.vertex is None:
        return replace(graph, first=graph.first + inputs.first)
    return replace(graph, vertex=_range_of(inputs)(graph.vertex))


def _range_of(inputs: JobInputs) -> Callable[[Any], Any]:
    """A function of a table that gives the range of rows of a job."""
    return partial(jax.lax.dynamic_slice_in_dim, start_index=inputs.first, slice_size=inputs.size)


def _part(group: PieceGroup, inputs: JobInputs) -> GraphData:
    """The data with labels and training mask of the range of rows."""
    data = inputs.data
    if group.by != "rows":
        return data
    slices = _range_of(inputs)
    importance = None if data.importance is None else slices(data.importance)
    masks = {"train": slices(data.masks["train"])}
    return replace(data, labels=slices(data.labels), masks=masks, importance=importance)


def _loss_share(model: Any, rows: Any, part: GraphData, data: GraphData) -> Any:
    """The share of the loss over the training mask of the rows of a part."""
    predicted = jax.ShapeDtypeStruct((*data.labels.shape[:1], *rows.shape[1:]), rows.dtype)
    divisor = loss_divisor(model, predicted, data, "train", data.importance)
    return loss_sum(model, rows, part, "train", part.importance) / divisor


def _replaced(values: Sequence[Any], numbers: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Values with new ones in place of those of these numbers."""
    replaced = list(values)
    for k, value in zip(numbers, new, strict=True):
        replaced[k] = value
    return replaced

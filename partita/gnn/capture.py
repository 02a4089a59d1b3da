"""The training step over parts of a graph as an operator graph, to be priced on any machine.

The step of one device (`step.train_step`) is traced over a leading dim of devices. A plan splits
that dim over the devices, so that plans, simulation, timeline and report see the step as any other:
kernels over edges and dense products at the sizes of a part, exchanges of rows, sums of gradients.
Messages of rows between devices are one all-to-all of as many bytes. Nothing is allocated on a
device, and no weight is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from partita.capture.jax_functions import Captured, Leaf, capture_step
from partita.capture.targets import CaptureTarget
from partita.gnn.data.graph import Graph
from partita.gnn.kernels import bridge
from partita.gnn.nn.block import AXIS, TO_ALL, Aggregation, Block, HaloMessage
from partita.gnn.nn.sums import Edges
from partita.gnn.prepare import GraphData, PreparationKey, first_part
from partita.gnn.step import StepState, state_of, train_step


def capture_training(
    model: Any, graph: Graph, key: PreparationKey, target: CaptureTarget | None = None
) -> Captured:
    """The training step of a compiled, built model over the parts of a key.

    `target`: the platform that will run the step, by default that of the local devices. GraphError
    for a split that is not possible.
    """
    devices = key.split.devices
    data = _shapes_of(first_part(graph, key))
    aggregations = len(key.architecture.aggregations)

    def step(state: StepState, data: GraphData) -> Any:
        def one_device(data: GraphData) -> Any:
            return train_step(model, aggregations, state, data)

        if devices == 1:
            return one_device(data)
        return jax.vmap(one_device, axis_name=AXIS, out_axes=None)(data)

    if devices > 1:
        data = jax.tree.map(lambda shape: _stacked(shape, devices), _with_one_message(data))
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    state = jax.tree.map(_shape, state_of(model))
    with bridge.symbolic():
        return capture_step(
            step,
            state,
            data,
            _leaves(model),
            name=f"{model.name} on {graph.name}",
            batch_size=devices,
            target=target,
        )


def _leaves(model: Any) -> list[Leaf]:
    """The variables of a state, in order."""
    parameters = [variable.path for variable in model.trainable_variables]
    leaves = [Leaf(path, "parameter") for path in parameters]
    leaves += [Leaf(variable.path, "state") for variable in model.non_trainable_variables]
    for variable in model.optimizer.variables:
        matches = [path for path in parameters if path.replace("/", "_") in variable.path]
        parameter = max(matches, key=len, default=None)
        leaves.append(Leaf(variable.path, "optimizer", parameter))
    return leaves


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _stacked(shape: jax.ShapeDtypeStruct, devices: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((devices, *shape.shape), shape.dtype)


def _shapes_of(data: GraphData) -> GraphData:
    """The shapes of the data of a part."""
    return jax.tree.map(_shape, data)


def _with_one_message(data: GraphData) -> GraphData:
    """The shapes with one message for all devices instead of one for each."""
    block = data.block
    aggregations = [_joined(aggregation, block) for aggregation in block.aggregations]
    return replace(data, block=replace(block, aggregations=tuple(aggregations)))


def _joined(aggregation: Aggregation, block: Block) -> Aggregation:
    """The shapes of an aggregation with one message: of the rows of all messages, and as many
    for the device itself as for each other."""
    if not aggregation.halo:
        return aggregation
    sent = sum(message.pick.ids.shape[0] for message in aggregation.halo)
    devices = block.parts
    count = devices * -(-sent // (devices - 1))
    rows = _numbers(count)
    pick = Edges(_numbers(count + 1), rows, _numbers(block.rows + 1), rows)
    halo = (HaloMessage(pick, TO_ALL),)
    if aggregation.far is None:
        edges = _with_columns(aggregation.edges, count - sent)
        return replace(aggregation, edges=edges, halo=halo)
    far_edges, far_weights = aggregation.far
    far = (_with_columns(far_edges, count - sent), far_weights)
    return replace(aggregation, far=far, halo=halo)


def _with_columns(edges: Edges, more: int) -> Edges:
    """The shapes of edges from more columns."""
    return replace(edges, back_offsets=_numbers(edges.back_offsets.shape[0] + more))


def _numbers(size: int) -> jax.ShapeDtypeStruct:
    """The shape of whole numbers."""
    return jax.ShapeDtypeStruct((size,), np.dtype("int32"))

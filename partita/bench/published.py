"""Plans as the papers publish them: expert strategies, and OptCNN's plan for VGG-16.

`expert` is FlexFlow's expert-designed strategy of a network family: one weird trick (arXiv
1404.5997) for convolutional networks; for recurrent ones data parallelism across nodes and model
parallelism in a node, every recurrent layer with all of its steps on its own device (arXiv
1609.08144). FlexFlow has no transformers; their expert plan is Megatron's (arXiv 1909.08053) over
half of the axes, and samples over the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from partita.bench.networks import Family
from partita.graph.operator_graph import OperatorGraph
from partita.plans.baselines import BASELINES, choice_by_kinds
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan

AXES_OF_A_NODE = 2
"""Axes of a node where a machine has one level: four devices, as on FlexFlow's clusters."""


def expert(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
    family: Family,
) -> Plan:
    """The plan that an expert would write for a network of a family."""
    return EXPERTS[family](graph, machine, mesh)


def one_weird_trick(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Convolutions by sample, dense layers by parameter."""
    return check(BASELINES["one weird trick"](graph, machine, mesh), graph)


def layers_on_devices(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Samples over nodes (the outermost level); in a node each recurrent layer on its own device.
    Where a machine has one level, its last axes are those of a node.

    Embeddings are on the device of the layer that reads them. Operators behind the recurrent layers
    are split over the devices of the node, the softmax's weights by word (arXiv 1609.08144, section
    3.2 and figure 1). With more layers than devices, layers share devices in turn.
    """
    outer = [n for n, axis in enumerate(mesh.axes) if axis.level == 0]
    inner = [n for n, axis in enumerate(mesh.axes) if axis.level > 0]
    if not inner:
        inner = outer[-AXES_OF_A_NODE:]
        outer = outer[:-AXES_OF_A_NODE]
    devices_in_node = math.prod(mesh.sizes[n] for n in inner)
    layer_of = {}
    for operator in graph.operators:
        parts = operator.name.split("/")
        if "cell" in parts[-1]:
            layer_of[operator.name] = parts[0]
    number = {layer: n for n, layer in enumerate(dict.fromkeys(layer_of.values()))}
    choices = {}
    device = None
    # Backwards, so that an operator before a layer gets the device of the layer that reads it.
    for operator in reversed(graph.operators):
        if operator.name in layer_of:
            device = number[layer_of[operator.name]]
        if device is None:
            kinds = [("S", outer), ("PS", inner)]
            choices[operator.name] = choice_by_kinds(
                graph,
                operator,
                mesh,
                kinds,
            )
            continue
        choice = choice_by_kinds(
            graph,
            operator,
            mesh,
            [("S", outer)],
        )
        position = device % devices_in_node
        for n in reversed(inner):
            choice[mesh.axes[n].name] = f"at({position % mesh.sizes[n]})"
            position //= mesh.sizes[n]
        choices[operator.name] = choice
    ordered = {operator.name: choices[operator.name] for operator in graph.operators}
    return _plan(
        graph,
        machine,
        mesh,
        ordered,
        "layers on devices",
    )


def optcnn_vgg16(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """OptCNN's plan for VGG-16 on 4 devices (arXiv 1802.04924, table 5).

    Early convolutions n=4, the last three n=1 h=2 w=2, the first two dense layers c=4, the third
    c=2, softmax 1. Poolings are split like the convolution before them; the last one, whose 7 x 7
    results do not divide by two, by sample. The softmax is light and belongs to the third dense
    layer.
    """
    assert mesh.sizes == (2, 2), "published for 4 devices"
    a, b = (axis.name for axis in mesh.axes)
    choices = {}
    for operator in graph.operators:
        if operator.name.startswith("block5_conv"):
            factors = [graph.factors[f] for f in operator.factors]
            height, width = [factor.name for factor in factors if factor.kind == "A"][:2]
            choices[operator.name] = {a: height, b: width}
        elif operator.name in ("fc1", "fc2"):
            choices[operator.name] = {a: "P", b: "P"}
        elif operator.name == "predictions":
            choices[operator.name] = {a: "P"}
        else:
            choices[operator.name] = {a: "S", b: "S"}
    return _plan(graph, machine, mesh, choices, "OptCNN's")


def _plan(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
    choices: dict[str, dict[str, str]],
    name: str,
) -> Plan:
    plan = Plan(
        graph.name,
        machine,
        mesh,
        choices,
        name=name,
        batch_size=graph.batch_size,
    )
    return check(plan, graph)


def megatron(
    graph: OperatorGraph,
    machine: str,
    mesh: Mesh,
) -> Plan:
    """Samples over the outer half of the axes, weights over the inner half, by column and by row in
    turn.
    """
    return check(BASELINES["data x tensor"](graph, machine, mesh), graph)


EXPERTS: dict[Family, Callable[[OperatorGraph, str, Mesh], Plan]] = {
    "convolutional": one_weird_trick,
    "recurrent": layers_on_devices,
    "transformer": megatron,
}

"""Plans as the papers publish them: what an expert wrote, and what OptCNN found.

`expert` is what FlexFlow calls the expert-designed strategy of a network: one weird trick (arXiv 1404.5997) for convolutional ones,
data parallel across nodes and model parallel in a node (arXiv 1609.08144) for recurrent ones: every recurrent layer, with all of its
steps, on a device of its own. For transformers, which FlexFlow
has none of, it is Megatron's (arXiv 1909.08053) over half of the axes, samples over the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from partita.bench.networks import Family
from partita.graph.operator_graph import OperatorGraph
from partita.plans.baselines import BASELINES, choice_by_kinds
from partita.plans.check import check
from partita.plans.plan import Mesh, Plan


def expert(graph: OperatorGraph, machine: str, mesh: Mesh, family: Family) -> Plan:
    """The plan that an expert would write for a network of a family."""
    return EXPERTS[family](graph, machine, mesh)


def one_weird_trick(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Convolutions by sample, dense layers by parameter."""
    return check(BASELINES["one weird trick"](graph, machine, mesh), graph)


def layers_on_devices(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Samples over the nodes (the machine's outermost level); in a node every recurrent layer, all steps of it, on a device of its own.

    Embeddings are where the layer is that reads them. What follows the recurrent layers is split over the devices of the node, the softmax's weights by
    word (arXiv 1609.08144, section 3.2 and figure 1). Where there are more layers than devices they take turns.
    """
    nodes = [n for n, axis in enumerate(mesh.axes) if axis.level == 0]
    inside = [n for n, axis in enumerate(mesh.axes) if axis.level > 0]
    recurrent = {
        o.name: o.name.split("/")[0] for o in graph.operators if "cell" in o.name.split("/")[-1]
    }
    number = {layer: n for n, layer in enumerate(dict.fromkeys(recurrent.values()))}
    choices, device = {}, None
    for o in reversed(graph.operators):
        device = number[recurrent[o.name]] if o.name in recurrent else device
        choices[o.name] = choice_by_kinds(graph, o, mesh, [("S", nodes), ("PS", inside)])
        if device is not None:
            left = device % math.prod(mesh.sizes[n] for n in inside)
            choices[o.name] = choice_by_kinds(graph, o, mesh, [("S", nodes)])
            for n in reversed(inside):
                choices[o.name][mesh.axes[n].name] = f"at({left % mesh.sizes[n]})"
                left //= mesh.sizes[n]
    choices = {o.name: choices[o.name] for o in graph.operators}
    return check(
        Plan(
            graph.name,
            machine,
            mesh,
            choices,
            name="layers on devices",
            batch_size=graph.batch_size,
        ),
        graph,
    )


def optcnn_vgg16(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """The plan that OptCNN found for VGG-16 on 4 devices (arXiv 1802.04924, table 5).

    Early convolutions n=4, the last three n=1 h=2 w=2, the first two dense layers c=4, the third c=2, softmax 1. Poolings are split like
    the convolution before them; the last one, whose 7 x 7 results no two devices can share evenly, by sample. The softmax is light and
    computed where the third dense layer is.
    """
    assert mesh.sizes == (2, 2), "published for 4 devices"
    a, b = (axis.name for axis in mesh.axes)
    choices = {}
    for o in graph.operators:
        if o.name.startswith("block5_conv"):
            high, wide = [graph.factors[f].name for f in o.factors if graph.factors[f].kind == "A"][
                :2
            ]
            choices[o.name] = {a: high, b: wide}
        elif o.name in ("fc1", "fc2"):
            choices[o.name] = {a: "P", b: "P"}
        elif o.name == "predictions":
            choices[o.name] = {a: "P"}
        else:
            choices[o.name] = {a: "S", b: "S"}
    return check(
        Plan(graph.name, machine, mesh, choices, name="OptCNN's", batch_size=graph.batch_size),
        graph,
    )


def megatron(graph: OperatorGraph, machine: str, mesh: Mesh) -> Plan:
    """Samples over the outer half of the axes, weights over the inner half, by column and by row in turn."""
    return check(BASELINES["data x tensor"](graph, machine, mesh), graph)


EXPERTS: dict[Family, Callable[[OperatorGraph, str, Mesh], Plan]] = {
    "convolutional": one_weird_trick,
    "recurrent": layers_on_devices,
    "transformer": megatron,
}

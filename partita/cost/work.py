"""FLOPs of one device in a step: every instruction's work over the factors that split its iteration space."""

from __future__ import annotations

import math
from collections.abc import Sequence

from partita.cost.collectives import DEFAULT, collectives, reaches
from partita.cost.fusion import fused_under
from partita.cost.partial import seen_labels
from partita.graph.graph import Graph, Instruction, Label
from partita.machine import Backend
from partita.plan.layout import Layout
from partita.plan.plan import Mesh


def local_flops(graph: Graph, mesh: Mesh, layout: Layout, backend: Backend = DEFAULT, loops_once: bool = False) -> float:
    """FLOPs per device of one step by XLA's counting: what several kernels compute counts in each, and sums of all-reduces count.

    `loops_once` counts a loop's body once, as XLA's cost analysis does.
    """
    seen, total, fused = seen_labels(graph), 0.0, fused_under(graph, layout, backend.recomputes)
    for i, x in enumerate(graph.instructions):
        if not x.flops:
            continue
        flops = x.flops * max(1, len(fused.computed_in[i])) * (1 if loops_once else x.trips)
        if graph.owner[i] < 0:
            total += flops
            continue
        assignment = layout.assignments[graph.owner[i]]
        labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)] + [graph.labels[t] for t in x.results]
        axes = {a for label in labels for f in label for a in assignment.get(f, ())}
        axes |= {a for t in x.results for dim in layout.own[t] for a in dim}  # an update is done where its slots are kept
        for reach in reaches(x, labels, graph.labels[x.results[0]]) if x.name == "convolution" else ():
            if assignment.get(reach.factor):
                flops *= reach.window.edges()
        if backend.dense_grouped_gradients and x.batch_groups > 1:
            groups = x.batch_groups / math.prod(mesh.sizes[a] for f in group_factors(x, labels) for a in assignment.get(f, ()))
            # Of the pairs of groups, those of a group with itself are then selected (a comparison, a selection) and summed up.
            total += (
                3
                * groups
                * graph.tensors[x.results[0]].size
                / math.prod(mesh.sizes[a] for d in layout.own[x.results[0]] for a in d)
            )
            flops *= groups
        total += flops / math.prod(mesh.sizes[a] for a in axes)
    for c in collectives(graph, mesh, layout, backend):
        if c.kind == "all_reduce":
            total += c.nbytes / c.itemsize * (1 if loops_once else c.trips)
    return total


def group_factors(x: Instruction, labels: Sequence[Label]) -> tuple[int, ...]:
    """The graph's factors over the groups of a grouped convolution: those that index both operands and the result."""
    a, b, c = ({f for f in label if f >= 0} for label in labels[:3])
    return tuple(sorted(a & b & c))

"""FLOPs of one device in a step: every instruction's work over the factors that split its iteration space."""

from __future__ import annotations

import math
from collections.abc import Sequence

from partita.cost.collectives import DEFAULT, Collective, Reach, collectives, reaches
from partita.cost.fusion import fused_under
from partita.cost.partial import seen_labels
from partita.graph.operator_graph import Instruction, Label, OperatorGraph, per_graph
from partita.machine import Backend
from partita.plans.layout import Layout, Sharding
from partita.plans.plan import Mesh


def local_flops(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    backend: Backend = DEFAULT,
    loops_once: bool = False,
    sent: Sequence[Collective] | None = None,
) -> float:
    """FLOPs per device of one step by XLA's counting: what several kernels compute counts in each, and sums of all-reduces count.

    `loops_once` counts a loop's body once, as XLA's cost analysis does. `sent` are the layout's collectives, if they are known already.
    """
    total, fused = 0.0, fused_under(graph, layout, backend.recomputes)
    ways: dict[tuple[int, frozenset[int], tuple[Sharding, ...]], int] = {}
    for i, factors, over, groups_of in _working(graph):
        x, owner = graph.instructions[i], graph.owner[i]
        flops = x.flops * max(1, len(fused.computed_in[i])) * (1 if loops_once else x.trips)
        if owner < 0:
            total += flops
            continue
        assignment, results = (
            layout.assignments[owner],
            tuple(layout.shardings[t] for t in x.results),
        )
        for reach in over:
            if assignment.get(reach.factor):
                flops *= reach.window.padding_ratio()
        if backend.dense_grouped_gradients and x.batch_groups > 1:
            groups = x.batch_groups / math.prod(
                mesh.sizes[a] for f in groups_of for a in assignment.get(f, ())
            )
            # Of the pairs of groups, those of a group with itself are then selected (a comparison, a selection) and summed up.
            total += (
                3
                * groups
                * graph.tensors[x.results[0]].size
                / math.prod(mesh.sizes[a] for d in results[0] for a in d)
            )
            flops *= groups
        key = (owner, factors, results)
        if key not in ways:
            axes = {a for f in factors for a in assignment.get(f, ())}
            axes |= {
                a for own in results for dim in own for a in dim
            }  # an update is done where its slots are kept
            ways[key] = math.prod(mesh.sizes[a] for a in axes)
        total += flops / ways[key]
    for c in collectives(graph, mesh, layout, backend) if sent is None else sent:
        if c.kind == "all_reduce":
            total += c.nbytes / c.itemsize * (1 if loops_once else c.trips)
    return total


@per_graph
def _working(
    graph: OperatorGraph,
) -> tuple[tuple[int, frozenset[int], tuple[Reach, ...], tuple[int, ...]], ...]:
    """The instructions that take FLOPs: (instruction, factors of what it reads and makes, windows of a convolution, factors over its groups)."""
    seen, found = seen_labels(graph), []
    for i, x in enumerate(graph.instructions):
        if x.flops:
            labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)] + [
                graph.labels[t] for t in x.results
            ]
            over = reaches(x, labels, graph.labels[x.results[0]]) if x.name == "convolution" else ()
            groups = group_factors(x, labels) if x.batch_groups > 1 else ()
            found.append(
                (i, frozenset(f for label in labels for f in label if f >= 0), over, groups)
            )
    return tuple(found)


def group_factors(x: Instruction, labels: Sequence[Label]) -> tuple[int, ...]:
    """The graph's factors over the groups of a grouped convolution: those that index both operands and the result."""
    a, b, c = ({f for f in label if f >= 0} for label in labels[:3])
    return tuple(sorted(a & b & c))

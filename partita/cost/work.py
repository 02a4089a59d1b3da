"""FLOPs of one device in a step: every instruction's work over the factors that split its iteration space."""

from __future__ import annotations

import math

from partita.cost.collectives import seen_labels
from partita.graph.graph import Graph
from partita.plan.layout import Layout
from partita.plan.plan import Mesh


def local_flops(graph: Graph, mesh: Mesh, layout: Layout, loops_once: bool = False) -> float:
    """FLOPs per device of one step by XLA's counting; `loops_once` counts a loop's body once, as XLA's cost analysis does."""
    seen, total = seen_labels(graph), 0.0
    for i, x in enumerate(graph.instructions):
        if not x.flops:
            continue
        trips = 1 if loops_once else x.trips
        if graph.owner[i] < 0:
            total += x.flops * trips
            continue
        assignment = layout.assignments[graph.owner[i]]
        labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)] + [graph.labels[t] for t in x.results]
        axes = {a for label in labels for f in label for a in assignment.get(f, ())}
        axes |= {a for t in x.results for dim in layout.own[t] for a in dim}  # an update is done where its slots are kept
        total += x.flops * trips / math.prod(mesh.sizes[a] for a in axes)
    return total

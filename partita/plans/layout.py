"""What a plan makes of every value: the sharding of each tensor, and where a reader wants another one.

This is the one place where labels and choices become shardings. The cost model, the annotated program and the comparison
with the compiler all read it, so that they cannot mean different things.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from partita.graph.operator_graph import Label, OperatorGraph, per_graph
from partita.plans.plan import Mesh, Plan, Storage, placed_slice

Sharding = tuple[tuple[int, ...], ...]
"""Per dim of a tensor, the mesh axes (by index) that split it, major to minor."""


@dataclass(frozen=True)
class Read:
    """A tensor that some readers want under another sharding than its own."""

    tensor: int
    operator: int
    target: Sharding
    readers: tuple[tuple[int, int], ...]
    """(instruction, operand position); -1 as instruction: the result of the step at that position."""


@dataclass(frozen=True)
class Layout:
    """Shardings of all tensors under a plan (`shardings`), and the reads that differ from them."""

    shardings: tuple[Sharding, ...]
    reads: tuple[Read, ...]
    assignments: tuple[dict[int, tuple[int, ...]], ...]
    """Per operator: factor -> mesh axes."""


def label_sharding(label: Label, assignment: Mapping[int, tuple[int, ...]]) -> Sharding:
    """The sharding of a tensor with this label: per dim the axes of its factor."""
    return tuple(assignment.get(f, ()) for f in label)


def operator_assignments(
    graph: OperatorGraph, plan: Plan
) -> tuple[dict[int, tuple[int, ...]], ...]:
    """Per operator, factor -> the mesh axes that split it, in mesh order."""
    found = []
    for operator in graph.operators:
        by_name = {graph.factors[f].name: f for f in operator.factors}
        assignment: dict[int, tuple[int, ...]] = defaultdict(tuple)
        choice = plan.choices[operator.name]
        for number, axis in enumerate(plan.mesh.axes):
            if axis.name in choice and placed_slice(choice[axis.name]) is None:
                assignment[by_name[choice[axis.name]]] += (number,)
        found.append(dict(assignment))
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def spare_axes(
    shape: tuple[int, ...], sharding: Sharding, mesh: Mesh
) -> tuple[int, tuple[int, ...]] | None:
    """The dim of a tensor that can be split furthest over the axes that its sharding leaves free, and those axes."""
    taken = {a for dim in sharding for a in dim}
    best: tuple[int, int, tuple[int, ...]] = (0, 0, ())
    for d, (n, axes) in enumerate(zip(shape, sharding, strict=True)):
        left, found = n // math.prod(mesh.sizes[a] for a in axes), []
        whole = left
        for a, size in enumerate(mesh.sizes):
            if a not in taken and left % size == 0 and mesh.axes[a].level >= 0:
                found.append(a)
                left //= size
        best = max(best, (whole // left, -d, tuple(found)))
    return (-best[1], best[2]) if best[2] else None


@per_graph
def update_families(graph: OperatorGraph) -> dict[int, int]:
    """Tensor -> the parameter (argument tensor) whose update it belongs to.

    The update of a parameter is done where its slots are kept: its slots, and every value of the update phase computed from
    them with the parameter's own shape and label.
    """
    tensor_of = {a.path: a.tensor for a in graph.arguments}
    family = {a.tensor: a.tensor for a in graph.arguments if a.role == "parameter"}
    for a in graph.arguments:
        if (
            a.role == "optimizer"
            and a.parameter in tensor_of
            and graph.labels[a.tensor] == graph.labels[tensor_of[a.parameter]]
        ):
            family[a.tensor] = tensor_of[a.parameter]
    update = [x for x in graph.instructions if x.phase == "update" and x.trips == 1]
    computed = {t for x in update for t in x.results}

    def spread(known: tuple[int, ...], unknown: tuple[int, ...]) -> None:
        roots = {family[t] for t in known if t in family}
        if len(roots) == 1:
            p = next(iter(roots))
            for t in unknown:
                if (
                    t in computed
                    and graph.labels[t] == graph.labels[p]
                    and graph.tensors[t].shape == graph.tensors[p].shape
                ):
                    family.setdefault(t, p)

    for x in update:
        spread(x.operands, x.results)
    for x in reversed(update):
        spread(x.results, x.operands)
    return family


def layout_of(graph: OperatorGraph, plan: Plan) -> Layout:
    """Every tensor's sharding under the plan, and every read that wants another one."""
    assignments = operator_assignments(graph, plan)
    alike: dict[tuple[int, Label], Sharding] = {}
    for known in set(zip(graph.home, graph.labels, strict=True)):
        alike[known] = (
            label_sharding(known[1], assignments[known[0]])
            if known[0] >= 0
            else ((),) * len(known[1])
        )
    own = [alike[known] for known in zip(graph.home, graph.labels, strict=True)]
    stored = _stored(graph, plan, assignments)
    family = update_families(graph) if stored else {}
    kept = {a.tensor: a for a in graph.arguments}
    reads: dict[tuple[int, int, Sharding], list[tuple[int, int]]] = defaultdict(list)
    base: dict[int, Sharding] = {}
    for t, p in family.items():
        if p in stored and (t not in kept or kept[t].role == "optimizer" or stored[p][0].zero == 3):
            base[t], own[t] = own[t], stored[p][1]
    updates = {
        made[t] for made in [_makers(graph)] for t, p in family.items() if p in stored and t in made
    }
    named = {(i, position) for use in graph.uses for i, position in use.instructions}
    for i in sorted(updates):
        x = graph.instructions[i]
        p = next(family[t] for t in x.results if family.get(t) in stored)
        extended = stored[p][1]
        for position, t in enumerate(x.operands):
            if (
                graph.labels[t] == graph.labels[p]
                and family.get(t, p) == p
                and graph.tensors[t].shape == graph.tensors[p].shape
            ):
                if own[t] != extended:
                    reads[t, graph.home[p], extended].append((i, position))
                named.add((i, position))
    for use in graph.uses:
        target = label_sharding(use.label, assignments[use.operator])
        if target != own[use.tensor]:
            readers = [r for r in use.instructions if r[0] not in updates]
            if readers:
                reads[use.tensor, use.operator, target] += readers
    if base:
        for i, x in enumerate(graph.instructions):
            if i not in updates:
                for position, t in enumerate(x.operands):
                    if t in base and (i, position) not in named and base[t] != own[t]:
                        reads[t, graph.owner[i], base[t]].append((i, position))
    place = {r: n for n, r in enumerate(graph.outputs)}
    for a in graph.arguments:
        if a.result is not None and own[a.result] != own[a.tensor]:
            reads[a.result, graph.home[a.tensor], own[a.tensor]].append((-1, place[a.result]))
    found = tuple(Read(t, o, target, tuple(readers)) for (t, o, target), readers in reads.items())
    return Layout(tuple(own), found, assignments)


@per_graph
def _makers(graph: OperatorGraph) -> dict[int, int]:
    """Tensor -> the instruction that makes it."""
    return {t: i for i, x in enumerate(graph.instructions) for t in x.results}


def _stored(
    graph: OperatorGraph, plan: Plan, assignments: tuple[dict[int, tuple[int, ...]], ...]
) -> dict[int, tuple[Storage, Sharding]]:
    """Parameter tensor -> its storage and the sharding in which its update is done."""
    found = {}
    for a in graph.arguments:
        storage = plan.storage.get(a.path)
        if storage is not None and a.role == "parameter" and graph.home[a.tensor] >= 0:
            sharding = list(
                label_sharding(graph.labels[a.tensor], assignments[graph.home[a.tensor]])
            )
            sharding[storage.dim] += tuple(plan.mesh.index[x] for x in storage.axes)
            found[a.tensor] = (storage, tuple(sharding))
    return found

"""The collectives that a plan causes, one by one: what XLA's partitioner is expected to emit for a laid-out graph.

Four causes: a reduction over a split factor (an all-reduce of the result, one for each dim that is summed), a window that reaches over a split dim (a halo
exchange by permutes), a read under another sharding (the steps of its reshard), and a variable stored apart (the same).
The search's tables (`cost.terms`) sum the same formulas; a test holds them equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from partita.cost.partial import reduced_factors, seen_labels, waiting
from partita.cost.reshard import emitted_steps, step_bytes
from partita.graph.operator_graph import (
    ITEMSIZE,
    Instruction,
    OperatorGraph,
    Phase,
    Window,
    constant_tensors,
    per_graph,
)
from partita.machine import Backend
from partita.plans.layout import Layout, Sharding, label_sharding
from partita.plans.plan import Mesh

DEFAULT = Backend()


@dataclass(frozen=True, slots=True)
class Collective:
    """One expected collective. `nbytes` is per device and execution: the result of an all_gather, else the operand."""

    kind: str
    nbytes: int
    axes: tuple[int, ...]
    trips: int
    operator: int
    phase: Phase
    cause: str
    path: str
    itemsize: int = 4

    @property
    def total(self) -> int:
        return self.nbytes * self.trips


def local_bytes(
    shape: Sequence[int], itemsize: int, sharding: Sharding, sizes: Sequence[int]
) -> int:
    """Bytes of one device's part of a tensor; a dim that does not divide evenly is rounded up."""
    return itemsize * math.prod(
        -(-n // math.prod(sizes[a] for a in axes)) for n, axes in zip(shape, sharding, strict=True)
    )


def collectives(
    graph: OperatorGraph, mesh: Mesh, layout: Layout, backend: Backend = DEFAULT
) -> list[Collective]:
    """Every collective of one step under the layout, in program order of their causes."""
    return [*_computed(graph, mesh, layout, backend), *_moved(graph, mesh, layout)]


@dataclass(frozen=True, slots=True)
class Reach:
    """A window over a split dim of operand 0: the graph's factor, the dim, the window, and the factors that split the operand."""

    factor: int
    dim: int
    window: Window
    label: tuple[int, ...]


def reaches(
    x: Instruction, labels: Sequence[tuple[int, ...]], result: tuple[int, ...]
) -> tuple[Reach, ...]:
    """The windows of an instruction that reach over dims that may be split.

    XLA cuts the whole operand of a convolution as its result is split, and its parts then exchange halos as well; pooling reads its
    window from the whole.
    """
    if x.rule is None or not x.windows:
        return ()
    split: dict[int, int] = {}
    if x.name == "convolution":
        split = {m[0]: f for f, m in zip(result, x.rule.results[0], strict=False) if m and f >= 0}
    label = tuple(
        f if f >= 0 or not m else split.get(m[0], -1)
        for f, m in zip(labels[0], x.rule.operands[0], strict=False)
    )
    windows = dict(x.windows)
    return tuple(
        Reach(f, dim, windows[m[0]], label)
        for dim, (f, m) in enumerate(zip(label, x.rule.operands[0], strict=False))
        if f >= 0 and m and m[0] in windows and windows[m[0]].halo_elements(2) != (0, 0)
    )


@per_graph
def sums_and_reaches(
    graph: OperatorGraph,
) -> tuple[tuple[int, int, tuple[int, ...], tuple[Reach, ...]], ...]:
    """The instructions that sum factors away or reach over dims: (instruction, its operator, the factors, the windows)."""
    seen, found = seen_labels(graph), []
    for i, x in enumerate(graph.instructions):
        if graph.owner[i] >= 0 and x.rule is not None:
            labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
            factors, over = (
                reduced_factors(x, labels),
                reaches(x, labels, graph.labels[x.results[0]]),
            )
            if factors or over:
                found.append((i, graph.owner[i], factors, over))
    return tuple(found)


def _computed(
    graph: OperatorGraph, mesh: Mesh, layout: Layout, backend: Backend
) -> Iterator[Collective]:
    free, (wait, tops) = constant_tensors(graph), waiting(graph, layout)
    for t, i in tops.items():  # gradients that were added up first
        yield _reduction(graph, mesh, backend, i, t, layout.shardings[t], wait[t])
    for i, operator, factors, over in sums_and_reaches(graph):
        x, assignment = graph.instructions[i], layout.assignments[operator]
        if all(t in free for t in x.results):
            continue
        for f in factors if wait.keys().isdisjoint(x.results) else ():
            axes = assignment.get(f, ())
            if not axes:
                continue
            for t in x.results:
                yield _reduction(
                    graph, mesh, backend, i, t, label_sharding(graph.labels[t], assignment), axes
                )
        for reach in over:
            axes = assignment.get(reach.factor, ())
            if axes:
                tensor, parts = graph.tensors[x.operands[0]], math.prod(mesh.sizes[a] for a in axes)
                read = label_sharding(reach.label, assignment)
                part = local_bytes(tensor.shape, ITEMSIZE.get(tensor.dtype, 4), read, mesh.sizes)
                row = part // -(-tensor.shape[reach.dim] // parts)
                for need in reach.window.halo_elements(parts):
                    if need:
                        yield Collective(
                            "collective_permute",
                            row * need,
                            axes,
                            x.trips,
                            operator,
                            x.phase,
                            "halo",
                            x.path,
                        )


def _reduction(
    graph: OperatorGraph,
    mesh: Mesh,
    backend: Backend,
    i: int,
    t: int,
    sharding: Sharding,
    axes: tuple[int, ...],
) -> Collective:
    """The sum over axes of a result of an instruction: an all-reduce, or where it has several results a gathering of each."""
    x, tensor = graph.instructions[i], graph.tensors[t]
    kind = "all_reduce" if len(x.results) == 1 else "all_gather"
    itemsize = ITEMSIZE.get(tensor.dtype, 4)
    if (
        kind == "all_reduce"
        and tensor.dtype in ("bfloat16", "float16")
        and backend.promotes_16_bit_all_reduce
    ):
        itemsize = 4
    group = math.prod(mesh.sizes[a] for a in axes) if kind == "all_gather" else 1
    nbytes = local_bytes(tensor.shape, itemsize, sharding, mesh.sizes) * group
    return Collective(
        kind, nbytes, axes, x.trips, graph.owner[i], x.phase, "reduction", x.path, itemsize
    )


@per_graph
def _makers(graph: OperatorGraph) -> dict[int, tuple[int, Phase, str]]:
    """Tensor -> how often it is made in a step, in which phase, and the path of what makes it."""
    found: dict[int, tuple[int, Phase, str]] = {
        a.tensor: (1, "forward", a.path) for a in graph.arguments
    }
    for loop in graph.loops:
        for _, inside, _, _ in loop.carried:
            found[inside] = graph.instructions[loop.instruction].trips * loop.trips, "forward", ""
    found.update({t: (x.trips, x.phase, x.path) for x in graph.instructions for t in x.results})
    return found


def _moved(graph: OperatorGraph, mesh: Mesh, layout: Layout) -> Iterator[Collective]:
    makers = _makers(graph)
    done: set[tuple[int, Sharding]] = set()
    free = constant_tensors(graph)
    for read in layout.reads:
        if read.tensor in free:
            continue
        tensor, before = graph.tensors[read.tensor], layout.shardings[read.tensor]
        for step in emitted_steps(before, read.target, mesh.sizes, tensor.shape):
            nbytes = step_bytes(
                step, before, tensor.shape, ITEMSIZE.get(tensor.dtype, 4), mesh.sizes
            )
            before = step.result
            if nbytes and (read.tensor, step.result) not in done:
                trips, phase, path = makers.get(read.tensor, (1, "forward", ""))
                yield Collective(
                    step.kind, nbytes, step.axes, trips, read.operator, phase, "reshard", path
                )
            done.add((read.tensor, step.result))

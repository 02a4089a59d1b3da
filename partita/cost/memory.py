"""Peak memory of a step per device: liveness over the program at local sizes.

A value takes memory from the kernel that makes it to the last one that reads it. Not every value does: what XLA fuses is computed
inside its readers (`cost.fusion`), and reads of it are reads of what it is made from. The state is donated, so new
variables take the place of the old ones. A reshard is a value of its own. Gradients that are reduced wait for each other, because XLA
combines their all-reduces, and the sums are new values.

The static part (who reads what, when) is computed once per graph and kept with it; another layout only changes sizes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from partita.cost.collectives import DEFAULT
from partita.cost.fusion import fused_under, reads, transposes
from partita.cost.partial import gradients, read_labels, reduced_factors
from partita.cost.work import group_factors
from partita.graph.operator_graph import (
    ITEMSIZE,
    IdentityKey,
    OperatorGraph,
    constant_tensors,
    per_graph,
)
from partita.machine import Backend
from partita.plans.layout import Layout, Sharding
from partita.plans.plan import Mesh

MARGIN = 1.05
"""What is added for what is not seen (copies for another layout, padding): too little is worse than too much."""


KINDS = ("parameters", "optimizer", "state", "batch", "activations", "gradients", "temporaries")
"""What holds memory at the peak of a step: the fields of `PeakMemory` beside the peak itself."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes per device at the peak of a step, by what holds them."""

    peak: int
    parameters: int
    optimizer: int
    state: int
    batch: int
    activations: int
    gradients: int
    temporaries: int
    operator: str
    """The operator that runs at the peak."""
    course: np.ndarray = field(compare=False, repr=False)
    """Bytes held while each instruction runs, and when all have."""


@dataclass(frozen=True)
class _Program:
    """What of a graph's memory does not depend on the layout."""

    free: frozenset[int]
    """Values made from nothing but scalars: every device makes its own part, inside its readers."""
    made: dict[int, int]
    reduces: tuple[tuple[int, tuple[int, ...], int], ...]
    """(instruction, factors it sums away, result) of the reductions of gradients."""
    scatters: tuple[tuple[int, int], ...]
    """(instruction, when its operand is first there) of backward passes of pooling by maximum."""
    kernels: tuple[tuple[int, int], ...]
    """(instruction, result) of the weight gradients of convolutions."""
    loops: dict[int, tuple[int, dict[int, int]]]
    """Per loop, the last instruction of its body, and result -> operand."""
    zeros: tuple[tuple[int, int], ...]
    """(instruction, operand) of scatters into a constant, which XLA makes early."""
    flipped: tuple[tuple[int, int, int], ...]
    """(instruction, kernel, when it is first there) of input gradients of convolutions, which read the kernel transposed."""


@per_graph
def _program(graph: OperatorGraph) -> _Program:
    seen = read_labels(graph)
    reduces, kernels = [], []
    for i, x in enumerate(graph.instructions):
        if transposes(x):
            kernels.append((i, x.results[0]))
        if x.phase == "backward" and x.rule is not None and x.rule.reduction and x.trips == 1:
            labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
            factors = reduced_factors(x, labels)
            if factors:
                reduces.append((i, factors, x.results[0]))
    reduces += [(g.additions[-1], g.reduced, g.result) for g in gradients(graph)]
    made = {t: i for i, x in enumerate(graph.instructions) for t in x.results}
    first: dict[int, int] = {}
    for i, x in enumerate(graph.instructions):
        for t in x.operands:
            first.setdefault(t, i)

    def since(t: int) -> int:
        """When a value, or what it is a mere rearrangement of, is first there."""
        while t in made and graph.instructions[made[t]].name in (
            "reverse",
            "transpose",
            "reshape",
            "convert",
            "pad",
        ):
            t = graph.instructions[made[t]].operands[0]
        return made.get(t, first[t])

    flipped = [
        (i, x.operands[1], since(x.operands[1]))
        for i, x in enumerate(graph.instructions)
        if x.name == "convolution" and x.phase == "backward" and not transposes(x)
    ]
    scatters = [
        (i, since(x.operands[0]))
        for i, x in enumerate(graph.instructions)
        if x.name == "select_and_scatter"
    ]
    free = constant_tensors(graph)
    loops = {
        loop.instruction: (loop.body[1] - 1, dict(zip(x.results, x.operands, strict=False)))
        for loop in graph.loops
        for x in [graph.instructions[loop.instruction]]
        if x.name == "while"
    }
    zeros = tuple(
        (i, x.operands[0])
        for i, x in enumerate(graph.instructions)
        if x.name == "scatter" and x.operands[0] in free
    )
    return _Program(
        free, made, tuple(reduces), tuple(scatters), tuple(kernels), loops, zeros, tuple(flipped)
    )


@dataclass(frozen=True)
class _Lives:
    """When values are there, in instructions: from the kernel that makes one (`born`) to the last that reads it (`dies`)."""

    born: dict[int, int]
    dies: dict[int, int]
    until: tuple[int, ...]
    """Per instruction, the last kernel that computes it."""


@lru_cache(maxsize=2)
def _lives(
    graph_key: IdentityKey[OperatorGraph], layout_key: IdentityKey[Layout], backend: Backend
) -> _Lives:
    graph, layout = graph_key.value, layout_key.value
    program = _program(graph)
    fused = fused_under(graph, layout, backend.recomputes)
    dies: dict[int, int] = {}
    for root, kernel in fused.kernels.items():
        x = graph.instructions[root]
        # Transposed copies of operands are made as soon as the operands could be, and kept.
        copied = (
            sorted(program.made.get(t, -1) for t in x.operands)
            if backend.transposed_copies and transposes(x)
            else []
        )
        for t, readers in reads(graph, kernel).items():
            when = program.loops[root][0] if root in program.loops else root
            if copied:
                latest = max(program.made.get(t, -1) if i == root else i for i, _ in readers)
                when = next((c for c in copied if c >= latest), root)
            if dies.get(t, -1) < when:
                dies[t] = when
    born = {t: program.made.get(t, -1) for t in fused.written(graph) - program.free}
    return _Lives(
        born, dies, tuple(max(roots, default=i) for i, roots in enumerate(fused.computed_in))
    )


@dataclass(frozen=True)
class _Held:
    """Everything that takes memory under a layout: an entry per value and reason, with the operator at home with it (-1: none).

    Bytes of a device's part from instruction `start` to `stop`; `kind` is a place in KINDS, -1 where the value is a temporary. Arguments are held all the time.
    """

    arguments: tuple[tuple[str, int, int], ...]
    """(kind, home, bytes)."""
    home: np.ndarray
    nbytes: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    kind: np.ndarray


def memory(
    graph: OperatorGraph,
    mesh: Mesh,
    layout: Layout,
    backend: Backend = DEFAULT,
    operators: frozenset[int] | None = None,
) -> PeakMemory:
    """Bytes per device at the peak of one step under a layout; of a device that only some operators are on, those `operators`."""
    every, count = (
        _held(IdentityKey(graph), IdentityKey(layout), mesh, backend),
        len(graph.instructions),
    )
    kept = np.full(len(graph.operators) + 1, operators is None)
    kept[[*(operators or ())]] = True
    held: dict[str, int] = defaultdict(int)
    for kind, home, nbytes in every.arguments:
        held[kind] += nbytes if kept[home] else 0

    def course(chosen: np.ndarray) -> np.ndarray:
        """Bytes of the chosen entries by instruction."""
        delta = np.zeros(count + 2, np.int64)
        np.add.at(delta, every.start[chosen], every.nbytes[chosen])
        np.subtract.at(delta, every.stop[chosen] + 1, every.nbytes[chosen])
        return np.cumsum(delta)

    present = kept[every.home]
    running = course(present) * MARGIN
    at = int(np.argmax(running))
    constant = sum(held.values())
    owner = graph.owner[at] if at < count else -1
    activations, gradients = (
        int(course(present & (every.kind == KINDS.index(kind)))[at])
        for kind in ("activations", "gradients")
    )
    return PeakMemory(
        constant + int(running[at]),
        held["parameters"],
        held["optimizer"],
        held["state"],
        held["batch"],
        activations,
        gradients,
        int(running[at]) - activations - gradients,
        graph.operators[owner].name if owner >= 0 else "",
        constant + running[: count + 1].astype(np.int64),
    )


@lru_cache(maxsize=2)
def _held(
    graph_key: IdentityKey[OperatorGraph],
    layout_key: IdentityKey[Layout],
    mesh: Mesh,
    backend: Backend,
) -> _Held:
    graph, layout = graph_key.value, layout_key.value
    program = _program(graph)
    lives = _lives(graph_key, layout_key, backend)
    sizes = _Sizes(graph, mesh)
    count = len(graph.instructions)
    roles = {
        "parameter": "parameters",
        "optimizer": "optimizer",
        "state": "state",
        "batch": "batch",
    }
    arguments = {a.tensor: a for a in graph.arguments}
    constant = tuple(
        (roles[a.role], graph.home[a.tensor], sizes(a.tensor, layout.shardings[a.tensor]))
        for a in graph.arguments
    )
    replaced = {a.result: a.tensor for a in graph.arguments if a.result is not None}
    entries: list[tuple[int, int, int, int, int]] = []

    def live(t: int, nbytes: int, start: int, stop: int, kind: str | None = None) -> None:
        entries.append((graph.home[t], nbytes, start, stop, KINDS.index(kind) if kind else -1))

    first_backward = next(
        (i for i, x in enumerate(graph.instructions) if x.phase == "backward"), count
    )
    for t, start in lives.born.items():
        if t in arguments or t in replaced:
            continue
        stop = lives.dies.get(t, -1)
        if start in program.loops:
            # What a loop carries stays where it is: its result is in the place of its operand.
            end, carried = program.loops[start]
            operand = carried.get(t, -1)
            if operand in program.free:
                stop = max(stop, end)
            elif lives.dies.get(operand, -1) <= end:
                if stop <= end:
                    continue
                start = end + 1
        if start < 0 or not graph.tensors[t].shape:
            continue
        kept = start < first_backward <= stop
        live(
            t,
            sizes(t, layout.shardings[t]),
            start,
            max(start, stop),
            "activations" if kept else None,
        )
    for read in layout.reads:
        if read.tensor in program.free:
            continue
        readers = [i for i, _ in read.readers if i >= 0]
        born = lives.born.get(read.tensor, 0)
        stop = max([lives.until[i] for i in readers] or [count])
        live(
            read.tensor,
            sizes(read.tensor, read.target),
            max(0, min(readers, default=count) if read.tensor in arguments else born),
            stop,
        )
    _combined(graph, layout, program, lives, sizes, backend, live)
    for i, t in program.zeros:
        live(t, sizes(t, layout.shardings[graph.instructions[i].results[0]]), 0, i - 1)
    for i, start in program.scatters:
        # XLA:CPU finds the largest of every window early, by a window over positions (an index per dim for every element), and keeps them.
        t, source = graph.instructions[i].operands[:2]
        rank = len(graph.tensors[t].shape)
        live(t, rank * sizes(t, layout.shardings[t]), 0, start)
        live(source, rank * sizes(source, layout.shardings[source]), start, i)
        live(t, sizes(t, layout.shardings[t]), 0, i - 1)
    return _Held(constant, *np.array(entries, np.int64).reshape(-1, 5).T.copy())


def _combined(
    graph: OperatorGraph,
    layout: Layout,
    program: _Program,
    lives: _Lives,
    sizes: _Sizes,
    backend: Backend,
    live,
) -> None:  # noqa: ANN001
    """Gradients that wait for one combined all-reduce, and its sums: both live from the first one made to the last reader."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for i, factors, t in program.reduces:
        assignment = layout.assignments[graph.owner[i]] if graph.owner[i] >= 0 else {}
        axes = tuple(sorted({a for f in factors for a in assignment.get(f, ())}))
        if (
            axes
            and lives.dies.get(t, -1) >= 0
            and graph.instructions[lives.dies[t]].phase == "update"
        ):
            groups[axes].append((i, t))
    waiting = {t for members in groups.values() for _, t in members}
    targets = {r: read.target for read in layout.reads for r in read.readers}
    for i, t in program.kernels if backend.transposed_copies else ():
        # XLA:CPU keeps the weight gradient of a convolution as it is computed and as it is wanted, transposed.
        if t not in waiting:
            live(t, sizes(t, layout.shardings[t]), i, max(i, lives.dies.get(t, i)))
        x = graph.instructions[i]
        for position, o in enumerate(x.operands):
            live(
                o,
                sizes(o, targets.get((i, position), layout.shardings[o])),
                max(0, program.made.get(o, 0)),
                i,
            )
        if x.batch_groups > 1 and backend.dense_grouped_gradients:
            # It computes that of a grouped one for all pairs of groups, and then takes the diagonal.
            label = [*(graph.labels[o] for o in x.operands), graph.labels[t]]
            assignment = layout.assignments[graph.owner[i]] if graph.owner[i] >= 0 else {}
            ways = math.prod(
                sizes.mesh.sizes[a] for f in group_factors(label) for a in assignment.get(f, ())
            )
            live(t, 2 * sizes(t, layout.shardings[t]) * x.batch_groups // ways, i, i)
    for i, t, start in program.flipped if backend.transposed_copies else ():
        live(t, sizes(t, targets.get((i, 1), layout.shardings[t])), start, i)
    for members in groups.values():
        meet = max(i for i, _ in members)
        # Where they meet, every gradient is there twice: as it was made, and summed.
        for _, t in members:
            live(t, sizes(t, layout.shardings[t]), meet, meet, "gradients")


class _Sizes:
    """Bytes of a device's part of a tensor, dims rounded up."""

    def __init__(self, graph: OperatorGraph, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh

    def __call__(self, t: int, sharding: Sharding) -> int:
        tensor = self.graph.tensors[t]
        size = ITEMSIZE.get(tensor.dtype, 4)
        for n, axes in zip(tensor.shape, sharding, strict=True):
            size *= -(-n // math.prod(self.mesh.sizes[a] for a in axes)) if axes else n
        return size

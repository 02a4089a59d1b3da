"""Peak memory of a step per device: liveness over the program at local sizes.

A value takes memory from the instruction that makes it to the last one that reads it. Not every value does: what XLA fuses is
computed again inside its readers (`written_tensors`), and reads of it are reads of what it is made from. The state is donated, so new
variables take the place of the old ones. A reshard is a value of its own. Gradients that are reduced wait for each other, because XLA
combines their all-reduces, and the sums are new values.

The static part (who reads what, when) is computed once per graph and kept with it; another layout only changes sizes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from partita.cost.collectives import reduced_factors, seen_labels
from partita.graph.graph import ITEMSIZE, Graph, constant_tensors
from partita.graph.grouping import HEAVY
from partita.plan.layout import Layout, Sharding
from partita.plan.plan import Mesh

DEAR = {
    "exponential", "log", "tanh", "power", "divide", "rsqrt", "sqrt", "logistic", "erf", "sine", "cosine", "reduce", "concatenate",
    "pad",
}  # fmt: skip
"""Light instructions that XLA computes once and writes, instead of again in every reader."""
WEIGHTLESS = {
    "constant",
    "iota",
    "broadcast_in_dim",
    "reshape",
    "bitcast_convert",
    "while",
    "case",
    "if",
    "optimization_barrier",
}
"""Instructions that move nothing of their own: XLA folds them into their readers."""


MARGIN = 1.05
"""What is added for what is not seen (copies for another layout, padding): too little is worse than too much."""


@dataclass(frozen=True)
class Memory:
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


@dataclass(frozen=True)
class _Program:
    """What of a graph's memory does not depend on the layout."""

    written: frozenset[int]
    free: frozenset[int]
    """Values made from nothing but scalars: every device makes its own part, inside its readers."""
    born: dict[int, int]
    dies: dict[int, int]
    reduces: tuple[tuple[int, tuple[int, ...], int], ...]
    """(instruction, factors it sums away, result) of the reductions of gradients."""
    scatters: tuple[int, ...]
    """Backward passes of pooling by maximum."""
    kernels: tuple[tuple[int, int], ...]
    """(instruction, result) of the weight gradients of convolutions."""
    grouped: tuple[tuple[int, int, int], ...]
    """(instruction, result, factor of the groups) of those of grouped ones."""


def written_tensors(graph: Graph) -> set[int]:
    """Tensors that exist in memory: results of heavy and dear instructions, inputs of heavy ones, outputs, loop values."""
    made = {t: x.name for x in graph.instructions for t in x.results}
    written = set(graph.outputs) | {t for loop in graph.loops for carried in loop.carried for t in carried}
    for x in graph.instructions:
        if x.name in HEAVY or x.name in DEAR:
            written.update(x.results)
        if x.name in HEAVY:
            written.update(t for t in x.operands if made.get(t) not in WEIGHTLESS)
    return written


@lru_cache(maxsize=8)
def _program(key: _Key) -> _Program:
    graph = key.graph
    written = written_tensors(graph)
    made = {t: i for i, x in enumerate(graph.instructions) for t in x.results}
    last: dict[int, int] = {}
    for i in reversed(range(len(graph.instructions))):
        x = graph.instructions[i]
        # A value that is not written is computed in its readers, so what it reads must live until their last.
        until = i
        for t in x.results:
            if t not in written:
                until = max(until, last.get(t, i))
        for t in x.operands:
            last[t] = max(last.get(t, -1), until)
    seen = seen_labels(graph)
    scatters = [i for i, x in enumerate(graph.instructions) if x.name == "select_and_scatter"]
    reduces, kernels, grouped = [], [], []
    for i, x in enumerate(graph.instructions):
        if x.name == "convolution" and x.phase == "backward" and x.rule is not None:
            rule, t = x.rule, x.results[0]
            sides = [{f for dim in side for f in dim if rule.sizes[f] > 1} for side in (*rule.operands[:2], rule.results[0])]
            shared = set.intersection(*sides)
            if graph.instructions[last.get(t, i)].phase == "update":
                kernels.append((i, t))
            if shared and any(rule.sizes[f] > 1 for f in rule.reduction):
                at = next((d for d, dim in enumerate(rule.results[0]) if dim and dim[0] in shared), None)
                if at is not None and graph.labels[t][at] >= 0:
                    grouped.append((i, t, graph.labels[t][at]))
        if x.phase == "backward" and x.rule is not None and x.rule.reduction and x.trips == 1:
            labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
            factors = reduced_factors(x, labels)
            if factors:
                reduces.append((i, factors, x.results[0]))
    free = constant_tensors(graph)
    written -= free
    return _Program(
        frozenset(written),
        free,
        {t: made.get(t, -1) for t in written},
        last,
        tuple(reduces),
        tuple(scatters),
        tuple(kernels),
        tuple(grouped),
    )


class _Key:
    """A graph by identity: hashing it by value would take longer than the work that is kept."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __hash__(self) -> int:
        return id(self.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.graph is self.graph


def memory(graph: Graph, mesh: Mesh, layout: Layout) -> Memory:
    """Bytes per device at the peak of one step under a layout."""
    program = _program(_Key(graph))
    sizes = _Sizes(graph, mesh)
    count = len(graph.instructions)
    held: dict[str, int] = defaultdict(int)
    arguments = {a.tensor: a for a in graph.arguments}
    roles = {"parameter": "parameters", "optimizer": "optimizer", "state": "state", "batch": "batch"}
    for a in graph.arguments:
        held[roles[a.role]] += sizes(a.tensor, layout.own[a.tensor])
    replaced = {a.result: a.tensor for a in graph.arguments if a.result is not None}
    delta = np.zeros(count + 2, np.int64)
    kinds: dict[str, np.ndarray] = {k: np.zeros(count + 2, np.int64) for k in ("activations", "gradients")}

    def live(nbytes: int, start: int, stop: int, kind: str | None = None) -> None:
        delta[start] += nbytes
        delta[stop + 1] -= nbytes
        if kind:
            kinds[kind][start] += nbytes
            kinds[kind][stop + 1] -= nbytes

    first_backward = next((i for i, x in enumerate(graph.instructions) if x.phase == "backward"), count)
    for t in program.written:
        if t in arguments or t in replaced:
            continue
        start, stop = program.born.get(t, -1), program.dies.get(t, -1)
        if start < 0 or not graph.tensors[t].shape:
            continue
        kept = start < first_backward <= stop
        live(sizes(t, layout.own[t]), start, max(start, stop), "activations" if kept else None)
    for read in layout.reads:
        if read.tensor in program.free:
            continue
        readers = [i for i, _ in read.readers if i >= 0]
        born = program.born.get(read.tensor, 0)
        stop = max(
            [program.dies.get(t, i) if t not in program.written else i for i in readers for t in graph.instructions[i].results]
            or [count]
        )
        live(sizes(read.tensor, read.target), max(0, min(readers, default=count) if read.tensor in arguments else born), stop)
    _combined(graph, layout, program, sizes, live)
    for i in program.scatters:
        # XLA:CPU expands it into a window over positions: an index per dim for every element of operand and source.
        x = graph.instructions[i]
        rank, labels = len(graph.tensors[x.operands[0]].shape), (layout.own[x.operands[0]], layout.own[x.operands[1]])
        live(rank * sizes(x.operands[0], labels[0]) + (rank + 1) * sizes(x.operands[1], labels[1]), i, i)
    running = np.cumsum(delta) * MARGIN
    at = int(np.argmax(running))
    constant = sum(held.values())
    owner = graph.owner[at] if at < count else -1
    activations, gradients = (int(np.cumsum(kinds[k])[at]) for k in ("activations", "gradients"))
    return Memory(
        constant + int(running[at]), held["parameters"], held["optimizer"], held["state"], held["batch"], activations, gradients,
        int(running[at]) - activations - gradients, graph.operators[owner].name if owner >= 0 else "",
    )  # fmt: skip


def _combined(graph: Graph, layout: Layout, program: _Program, sizes: _Sizes, live) -> None:  # noqa: ANN001
    """Gradients that wait for one combined all-reduce, and its sums: both live from the first one made to the last reader."""
    groups: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for i, factors, t in program.reduces:
        assignment = layout.assignments[graph.owner[i]] if graph.owner[i] >= 0 else {}
        axes = tuple(sorted({a for f in factors for a in assignment.get(f, ())}))
        if axes and program.dies.get(t, -1) >= 0 and graph.instructions[program.dies[t]].phase == "update":
            groups[axes].append((i, t))
    waiting = {t for members in groups.values() for _, t in members}
    for i, t in program.kernels:
        # XLA:CPU keeps the weight gradient of a convolution as it is computed and as it is wanted, transposed.
        if t not in waiting:
            live(sizes(t, layout.own[t]), i, max(i, program.dies.get(t, i)))
    for i, t, factor in program.grouped:
        # It computes that of a grouped one for all pairs of groups, and then takes the diagonal.
        own = layout.assignments[graph.owner[i]].get(factor, ()) if graph.owner[i] >= 0 else ()
        groups_here = graph.factors[factor].size // math.prod(sizes.mesh.sizes[a] for a in own)
        live(2 * sizes(t, layout.own[t]) * groups_here, i, i)
    for members in groups.values():
        meet = max(i for i, _ in members)
        # Where they meet, every gradient is there twice: as it was made, and summed.
        live(sum(sizes(t, layout.own[t]) for _, t in members), meet, meet, "gradients")


class _Sizes:
    """Bytes of a device's part of a tensor, dims rounded up."""

    def __init__(self, graph: Graph, mesh: Mesh) -> None:
        self.graph, self.mesh = graph, mesh

    def __call__(self, t: int, sharding: Sharding) -> int:
        tensor = self.graph.tensors[t]
        size = ITEMSIZE.get(tensor.dtype, 4)
        for n, axes in zip(tensor.shape, sharding, strict=True):
            size *= -(-n // math.prod(self.mesh.sizes[a] for a in axes)) if axes else n
        return size

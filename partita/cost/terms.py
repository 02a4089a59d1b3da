"""What an operator costs, before any choice: work, reductions, halos, moves, stored variables, all labelled with factors.

`cost_terms(graph)` is computed once. A choice then only divides: a piece of work indexed by factors f, g that are split n_f and
n_g ways costs 1/(n_f n_g) of itself. That is what makes a search over thousands of choices a few array operations
(`cost.evaluate`), and equal operators, the repeated blocks of a network, share one evaluation (`OperatorTerms.key`).

Light instructions are fused as XLA fuses them (`cost.fusion`): a kernel reads what it does not compute, and writes its result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from partita.cost.collectives import DEFAULT, reaches
from partita.cost.fusion import EXPENSIVE, FREE, Fusion, fusion, reads, transposes
from partita.cost.partial import Gradient, gradients, read_labels, reduced_factors
from partita.cost.work import group_factors
from partita.graph.grouping import HEAVY
from partita.graph.operator_graph import (
    Instruction,
    Label,
    OperatorGraph,
    Phase,
    Window,
    constant_tensors,
)
from partita.machine import Backend
from partita.plans.layout import update_families

OP_CLASS = {
    "dot_general": "dot",
    "convolution": "conv",
    "gather": "gather",
    "scatter": "gather",
    "reduce": "reduce",
    "reduce_window": "reduce",
    "select_and_scatter": "reduce",
    "sort": "sort",
}
Factors = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel: FLOPs over an iteration space, and bytes read and written, each piece indexed by factors."""

    op_class: str
    dtype: str
    flops: float
    factors: Factors
    traffic: tuple[tuple[int, Factors], ...]
    trips: int
    phase: Phase
    kind: str = ""
    """What a fit to measured operators tells kernels apart by, finer than engines do: `kind_of`."""
    groups: int = 1
    """Groups of a grouped convolution whose weight gradient this is, which some backends compute for all pairs of them."""
    group_factors: Factors = ()


@dataclass(frozen=True, slots=True)
class Reduction:
    """A result summed over factors: where one is split, its axes all-reduce `nbytes` (or gather, for several results)."""

    kind: str
    nbytes: int
    factors: Factors
    reduced: Factors
    trips: int
    phase: Phase
    parameter: int
    """The parameter (argument tensor) whose gradient this is, -1 for an activation."""
    together: bool = False
    """Whether one collective sums over all factors; else there is one for each."""


@dataclass(frozen=True, slots=True)
class Halo:
    """Rows that neighbours exchange where a window reaches over a split factor: `nbytes` is one of the `rows` of the whole tensor."""

    nbytes: int
    rows: int
    factors: Factors
    split: int
    window: Window
    trips: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor that `reader` wants under another label than its home's: a reshard wherever the two differ.

    Of a gradient that the reader adds to others, the last `sums` entries of both labels are factors over which it is still to be summed. It is
    summed before, unless the reader's own gradient is still to be summed over the same axes, and split alike.
    """

    tensor: int
    nbytes: int
    home: int
    source: Label
    reader: int
    target: Label
    trips: int
    phase: Phase
    """When the tensor is made."""
    read_phase: Phase
    """When it is first read so."""
    sums: int = 0

    @property
    def dims(self) -> tuple[Label, Label]:
        """Both labels without what is still to be summed."""
        count = len(self.source) - self.sums
        return self.source[:count], self.target[:count]


@dataclass(frozen=True, slots=True)
class Stored:
    """A parameter with its slots: bytes, the label they are kept under, and the traffic of their update."""

    path: str
    tensor: int
    shape: tuple[int, ...]
    label: Label
    nbytes: int
    slots: int
    traffic: int


@dataclass
class OperatorTerms:
    """All terms of one operator. Factors are numbers of the graph; `key` is the same for equal operators."""

    work: list[Work] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    halos: list[Halo] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    resident: list[tuple[int, Factors]] = field(default_factory=list)
    """Bytes held all the time besides parameters: state, batch, optimizer variables without a parameter."""
    activations: list[tuple[int, Factors]] = field(default_factory=list)
    """Bytes of forward values that the backward pass reads."""
    factors: Factors = ()
    """The operator's own, which a choice may split."""
    digest: str = ""
    """Of `key`."""
    name: str = ""
    """Of the operator, for what is said of it."""

    def key(self, graph: OperatorGraph, operator: int) -> tuple[object, ...]:
        """Equal for operators that cost the same under equal choices."""
        own = graph.operators[operator].factors
        number = {f: i for i, f in enumerate(own)}
        at = lambda fs: tuple(number.get(f, -1) for f in fs)  # noqa: E731
        return (
            tuple((graph.factors[f].name, graph.factors[f].size) for f in own),
            tuple(
                (
                    w.op_class,
                    w.dtype,
                    w.flops,
                    at(w.factors),
                    tuple((b, at(f)) for b, f in w.traffic),
                    w.trips,
                    w.phase,
                    w.kind,
                    w.groups,
                )
                for w in self.work
            ),
            tuple(
                (
                    r.kind,
                    r.nbytes,
                    at(r.factors),
                    at(r.reduced),
                    r.trips,
                    r.phase,
                    r.parameter >= 0,
                    r.together,
                )
                for r in self.reductions
            ),
            tuple(
                (h.nbytes, h.rows, at(h.factors), at((h.split,)), h.window, h.trips, h.phase)
                for h in self.halos
            ),
            tuple(
                (m.nbytes, at(m.source), at(m.target), m.trips, m.phase, m.sums) for m in self.moves
            ),
            tuple((s.shape, at(s.label), s.nbytes, s.slots, s.traffic) for s in self.stored),
            tuple((b, at(f)) for b, f in self.resident),
            tuple((b, at(f)) for b, f in self.activations),
        )


@dataclass
class Terms:
    """The terms of every operator, and the moves between different operators."""

    operators: list[OperatorTerms]
    edges: list[Move]


def cost_terms(graph: OperatorGraph, backend: Backend = DEFAULT) -> Terms:
    """The cost terms of a graph, compiled as a backend does."""
    seen = read_labels(graph)
    found = [OperatorTerms() for _ in graph.operators]
    family = update_families(graph)
    _works(graph, seen, fusion(graph, backend.recomputes), found)
    _communication(graph, seen, family, found)
    edges = _moves(graph, found)
    _memory(graph, family, fusion(graph, backend.recomputes), found)
    for o, operator in enumerate(graph.operators):
        found[o].factors, found[o].name = operator.factors, operator.name
        found[o].digest = sha256(repr(found[o].key(graph, o)).encode()).hexdigest()[:16]
    return Terms(found, edges)


def _factors(label: Label) -> Factors:
    return tuple(f for f in label if f >= 0)


def _iteration(x: Instruction, labels: list[Label], results: list[Label]) -> Factors:
    """All factors of an instruction's iteration space that its labels name."""
    return tuple(dict.fromkeys(f for label in [*labels, *results] for f in label if f >= 0))


def _works(
    graph: OperatorGraph,
    seen: dict[tuple[int, int], Label],
    fused: Fusion,
    found: list[OperatorTerms],
) -> None:
    """Adds every kernel to its operator; one that is fused across operators is shared out between them.

    What depends on no argument, a mask say, every device makes as far as its readers need it: it belongs to the kernel that it is fused into.
    """
    free = constant_tensors(graph)
    for root, kernel in fused.kernels.items():
        x = graph.instructions[root]
        if x.name in ("while", "case", "if", *FREE) or all(t in free for t in x.results):
            continue
        parts: dict[int, list[int]] = defaultdict(list)
        for i in kernel:
            owner = graph.owner[
                root if all(t in free for t in graph.instructions[i].results) else i
            ]
            if owner >= 0:
                parts[owner].append(i)
        outside = reads(graph, kernel)
        for operator, members in parts.items():
            _work(graph, seen, root, operator, members, outside, found)


def _work(
    graph: OperatorGraph,
    seen: dict[tuple[int, int], Label],
    root: int,
    operator: int,
    members: list[int],
    outside: dict[int, list[tuple[int, int]]],
    found: list[OperatorTerms],
) -> None:
    """Adds an operator's part of a kernel: the work of its instructions, what they read from memory, and what is written."""
    traffic: dict[int, tuple[int, Factors]] = {}
    flops, spaces, free = 0.0, {}, constant_tensors(graph)
    groups: Factors = ()
    for i in members:
        x = graph.instructions[i]
        labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
        for position, t in enumerate(x.operands):
            if (i, position) in outside.get(t, ()) and graph.tensors[t].shape:
                nbytes = graph.tensors[t].nbytes
                if x.name in ("gather", "dynamic_slice", "slice"):
                    nbytes = min(nbytes, 2 * sum(graph.tensors[r].nbytes for r in x.results))
                traffic[t] = (nbytes, _factors(labels[position]))
        if i == root:
            for t in x.results:
                traffic[t] = (graph.tensors[t].nbytes, _factors(graph.labels[t]))
        if x.flops:
            flops += x.flops
            if not all(t in free for t in x.results):
                space = _iteration(x, labels, [graph.labels[t] for t in x.results])
                spaces[space] = spaces.get(space, 0.0) + x.flops
        if x.batch_groups > 1:
            groups = group_factors([*labels, *(graph.labels[t] for t in x.results)])
    moved: dict[Factors, int] = {}
    for nbytes, factors in traffic.values():
        moved[factors] = moved.get(factors, 0) + nbytes
    x = graph.instructions[root]
    if flops < 64 and sum(moved.values()) < 256 and x.name not in HEAVY:
        return
    space = max(spaces, key=lambda s: spaces[s]) if spaces else max(moved, key=len, default=())
    dtype = graph.tensors[max(x.results, key=lambda t: graph.tensors[t].nbytes)].dtype
    found[operator].work.append(
        Work(
            OP_CLASS.get(x.name, "elementwise"),
            dtype,
            flops,
            space,
            tuple(sorted((b, f) for f, b in moved.items())),
            x.trips,
            x.phase,
            kind_of(graph, x, members),
            x.batch_groups,
            groups,
        )
    )


KINDS = {
    "reduce_window": "pooling",
    "select_and_scatter": "gradient of pooling",
    "scatter": "scatter",
    "dynamic_update_slice": "scatter",
    "transpose": "transpose",
    "concatenate": "concatenate",
}
"""Root of a kernel -> what it is to a fit, where that is not its class."""
TRANSCENDENTAL = EXPENSIVE - {"divide", "remainder", "reduce", "gather"}


def kind_of(graph: OperatorGraph, x: Instruction, members: Sequence[int]) -> str:
    """What kind of kernel one is to a fit: its root's class or finer. Libraries have other loops for each of them."""
    if x.name == "convolution":
        return (
            "convolution for a kernel"
            if transposes(x)
            else "dilated convolution"
            if any(w.base > 1 for _, w in x.windows)
            else "conv"
        )
    own = KINDS.get(x.name) or OP_CLASS.get(x.name, "elementwise")
    transcendental = own == "elementwise" and any(
        graph.instructions[i].name in TRANSCENDENTAL for i in members
    )
    return "transcendental" if transcendental else own


def _communication(
    graph: OperatorGraph,
    seen: dict[tuple[int, int], Label],
    family: dict[int, int],
    found: list[OperatorTerms],
) -> None:
    gradient, free = _gradients(graph, family), constant_tensors(graph)
    waits = {t for g in gradients(graph) for t in g.leaves}
    for g in gradients(graph):
        label, nbytes = graph.labels[g.result], graph.tensors[g.result].nbytes
        found[g.operator].reductions.append(
            Reduction(
                "all_reduce",
                nbytes,
                _factors(label),
                g.reduced,
                1,
                "backward",
                gradient.get(g.result, -1),
                together=True,
            )
        )
    for i, x in enumerate(graph.instructions):
        operator = graph.owner[i]
        if operator < 0 or x.rule is None or all(t in free for t in x.results):
            continue
        labels = [seen.get((i, p), graph.labels[t]) for p, t in enumerate(x.operands)]
        reduced = reduced_factors(x, labels)
        if reduced and waits.isdisjoint(x.results):
            kind = "all_reduce" if len(x.results) == 1 else "all_gather"
            for t in x.results:
                tensor = graph.tensors[t]
                found[operator].reductions.append(
                    Reduction(
                        kind,
                        tensor.nbytes,
                        _factors(graph.labels[t]),
                        reduced,
                        x.trips,
                        x.phase,
                        gradient.get(t, -1),
                    )
                )
        for reach in reaches(x, labels, graph.labels[x.results[0]]):
            tensor = graph.tensors[x.operands[0]]
            others = tuple(f for f in _factors(reach.label) if f != reach.factor)
            row = tensor.nbytes // tensor.shape[reach.dim]
            found[operator].halos.append(
                Halo(
                    row,
                    tensor.shape[reach.dim],
                    others,
                    reach.factor,
                    reach.window,
                    x.trips,
                    x.phase,
                )
            )


def _gradients(graph: OperatorGraph, family: dict[int, int]) -> dict[int, int]:
    """Backward tensor -> the parameter whose update reads it, followed back through shape changes."""
    producer = {t: x for x in graph.instructions for t in x.results}
    found: dict[int, int] = {}
    for x in graph.instructions:
        if x.phase != "update":
            continue
        roots = {family[t] for t in x.results if t in family}
        if len(roots) != 1:
            continue
        for t in x.operands:
            while (
                t in producer
                and t not in family
                and producer[t].phase == "backward"
                and graph.tensors[t].shape
            ):
                found[t] = next(iter(roots))
                source = producer[t].operands[0]
                sums_nothing = (
                    producer[t].name == "reduce"
                    and graph.tensors[source].size == graph.tensors[t].size
                )
                if (
                    producer[t].name not in ("reshape", "transpose", "convert", "negate")
                    and not sums_nothing
                ):
                    break
                t = source
    return found


def _moves(graph: OperatorGraph, found: list[OperatorTerms]) -> list[Move]:
    made = {t: x for x in graph.instructions for t in x.results}
    inside = {t: loop for loop in graph.loops for _, t, _, _ in loop.carried}
    free, batch = constant_tensors(graph), {a.tensor for a in graph.arguments if a.role == "batch"}
    edges = [m for g in gradients(graph) for m in _added(graph, g)]
    for m in [m for m in edges if m.home == m.reader]:
        edges.remove(m)
        found[m.home].moves.append(m)
    added = {(t, g.operator) for g in gradients(graph) for t in g.leaves}
    for use in graph.uses:
        home = graph.home[use.tensor]
        if (use.tensor, use.operator) in added:
            continue
        if use.tensor in free or use.tensor in batch or home < 0:
            continue
        x = made.get(use.tensor)
        trips = x.trips if x else inside[use.tensor].trips if use.tensor in inside else 1
        move = Move(
            use.tensor,
            graph.tensors[use.tensor].nbytes,
            home,
            graph.labels[use.tensor],
            use.operator,
            use.label,
            trips,
            x.phase if x else "forward",
            graph.instructions[min(i for i, _ in use.instructions)].phase,
        )
        if home == use.operator:
            found[home].moves.append(move)
        else:
            edges.append(move)
    return edges


def _added(graph: OperatorGraph, gradient: Gradient) -> list[Move]:
    """The moves of gradients to the operator that adds them up: what is its own, split alike and still to be summed alike, does not move."""
    seen, reads = (
        read_labels(graph),
        {
            t: (i, p)
            for i in gradient.additions
            for p, t in enumerate(graph.instructions[i].operands)
        },
    )
    found = []
    for t, reduced in gradient.leaves.items():
        source, target = graph.labels[t], seen.get(reads[t], graph.labels[t])
        pad = max(len(reduced), len(gradient.reduced))
        whole = lambda label, sums, pad=pad: (*label, *sums, *(-1 for _ in range(pad - len(sums))))  # noqa: E731
        if graph.home[t] != gradient.operator or source != target or reduced != gradient.reduced:
            found.append(
                Move(
                    t,
                    graph.tensors[t].nbytes,
                    graph.home[t],
                    whole(source, reduced),
                    gradient.operator,
                    whole(target, gradient.reduced),
                    1,
                    "backward",
                    "backward",
                    pad,
                )
            )
    return found


def _memory(
    graph: OperatorGraph, family: dict[int, int], fused: Fusion, found: list[OperatorTerms]
) -> None:
    slots: dict[int, int] = defaultdict(int)
    for a in graph.arguments:
        if a.role == "optimizer" and a.tensor in family:
            slots[family[a.tensor]] += graph.tensors[a.tensor].nbytes
    for a in graph.arguments:
        home = graph.home[a.tensor]
        if home < 0 or not graph.tensors[a.tensor].shape:
            continue
        tensor = graph.tensors[a.tensor]
        if a.role == "parameter":
            own = slots[a.tensor]
            traffic = 3 * tensor.nbytes + 2 * own
            found[home].stored.append(
                Stored(
                    a.path,
                    a.tensor,
                    tensor.shape,
                    graph.labels[a.tensor],
                    tensor.nbytes,
                    own,
                    traffic,
                )
            )
        elif a.tensor not in family:
            found[home].resident.append((tensor.nbytes, _factors(graph.labels[a.tensor])))
    written = fused.written(graph)
    read_later = {
        t
        for root, kernel in fused.kernels.items()
        if graph.instructions[root].phase == "backward"
        for t in reads(graph, kernel)
    }
    free = constant_tensors(graph)
    for x in graph.instructions:
        if x.phase == "forward" and x.name not in FREE:
            for t in x.results:
                if (
                    t in read_later
                    and t in written
                    and t not in free
                    and graph.tensors[t].nbytes > 64
                    and graph.home[t] >= 0
                ):
                    found[graph.home[t]].activations.append(
                        (graph.tensors[t].nbytes, _factors(graph.labels[t]))
                    )

"""Cost terms of one operator, labelled with factors: values without a graph.

Work indexed by factors f, g that are split n_f and n_g ways costs 1/(n_f n_g) of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from partita.cost.collectives import Reversal
from partita.cost.partial import Factors
from partita.graph.operator_graph import Label, OperatorGraph, Phase, Window

HOST = "host"
"""Class of a copy between device and host."""

Renumber = Callable[[Factors], Factors]
"""Factors of the graph -> their positions among those of an operator, -1 for others."""


@dataclass(frozen=True, slots=True)
class Work:
    """A kernel: FLOPs over an iteration space, and bytes read and written, by factors."""

    op_class: str
    dtype: str
    flops: float
    factors: Factors
    traffic: tuple[tuple[int, Factors], ...]
    trips: int
    phase: Phase
    kind: str = ""
    """For a fit to measured operators, finer than `op_class`: see `kind_of`."""
    groups: int = 1
    """Groups of a grouped convolution, if this is its weight gradient.

    Some backends compute it for all pairs of groups.
    """
    group_factors: Factors = ()
    stored_bytes: int = 0
    """Of `traffic`: bytes read from variables."""
    frozen_bytes: int = 0
    """Of `stored_bytes`: those of variables that the step does not change."""
    written_bytes: int = 0
    """Of `traffic`: bytes of results."""
    launches: bool = True
    """Whether it is a kernel of its own, not the part of one that starts elsewhere."""

    def key(self, renumber: Renumber) -> tuple[object, ...]:
        """Equal for equal work of equal operators."""
        key = (
            self.op_class,
            self.dtype,
            self.flops,
            renumber(self.factors),
            tuple((nbytes, renumber(factors)) for nbytes, factors in self.traffic),
            self.trips,
            self.phase,
            self.kind,
            self.groups,
        )
        return key if self.launches else (*key, "part")


@dataclass(frozen=True, slots=True)
class Reduction:
    """A result summed over factors.

    The axes that split the factors all-reduce it. Where an instruction has several results, they
    gather each.
    """

    kind: str
    nbytes: int
    factors: Factors
    """Factors that index the result."""
    reduced: Factors
    trips: int
    phase: Phase
    parameter: int
    """The parameter (argument tensor) whose gradient this is, -1 for an activation."""
    together: bool = False
    """Whether one collective sums over all factors; else there is one for each."""
    waiting_nbytes: int = 0
    """Bytes of the gradient that devices add up over microbatches before they sum it; 0 where they
    sum the result of each microbatch."""

    def key(self, renumber: Renumber) -> tuple[object, ...]:
        """Equal for equal reductions of equal operators."""
        return (
            self.kind,
            self.nbytes,
            renumber(self.factors),
            renumber(self.reduced),
            self.trips,
            self.phase,
            self.parameter >= 0,
            self.together,
            self.waiting_nbytes,
        )


@dataclass(frozen=True, slots=True)
class Halo:
    """Rows that neighbours exchange where a window reaches over a split factor."""

    nbytes: int
    """Bytes of one row of the whole tensor."""
    rows: int
    """Rows of the whole tensor."""
    factors: Factors
    """Factors that index a row."""
    split: int
    """The factor that the window reaches over."""
    window: Window | Reversal
    trips: int
    phase: Phase

    def key(self, renumber: Renumber) -> tuple[object, ...]:
        """Equal for equal halos of equal operators."""
        return (
            self.nbytes,
            self.rows,
            renumber(self.factors),
            renumber((self.split,)),
            self.window,
            self.trips,
            self.phase,
        )


@dataclass(frozen=True, slots=True)
class Move:
    """A tensor that `reader` reads under another label than its home's.

    It is a reshard wherever the two labels resolve to different shardings.

    A gradient that the reader adds to others may be a partial sum. Then the last `sums` entries of
    both labels are the factors over which it is partial. It is summed before the move, unless the
    reader's own gradient is a partial sum over the same axes, and split alike.

    The compiler of an accelerator makes one collective of several moves that are alike: reads of a
    tensor by several products, or partial sums that are added. Each is charged its share.
    """

    tensor: int
    nbytes: int
    home: int
    source: Label
    reader: int
    target: Label
    trips: int
    phase: Phase
    """Phase in which the tensor is computed."""
    read_phase: Phase
    """Phase of its first read under `target`."""
    sums: int = 0
    scatters: bool = False
    """Whether a partial sum whose reader needs slices of it is a reduce-scatter."""
    joined: int = -1
    """Moves with the same number may be one collective; -1 for none."""
    share: int = 1
    """Number of moves that are one collective."""

    @property
    def dims(self) -> tuple[Label, Label]:
        """Both labels without the factors of partial sums."""
        count = len(self.source) - self.sums
        return self.source[:count], self.target[:count]

    def key(self, renumber: Renumber) -> tuple[object, ...]:
        """Equal for equal moves inside equal operators."""
        return (
            self.nbytes,
            renumber(self.source),
            renumber(self.target),
            self.trips,
            self.phase,
            self.sums,
            self.scatters,
            self.share,
        )


@dataclass(frozen=True, slots=True)
class StoredVariable:
    """A parameter with its optimizer slots."""

    path: str
    tensor: int
    shape: tuple[int, ...]
    label: Label
    nbytes: int
    slots: int
    """Bytes of its optimizer slots."""
    traffic: int
    """Bytes that its update reads and writes."""
    gathered: int
    """Bytes of the whole parameter while it is gathered from slices."""
    added: int
    """Bytes that adding the gradient of a microbatch to the sum of all reads and writes."""
    passes: int = 1
    """Passes of a step that gather it from slices."""

    def key(self, renumber: Renumber) -> tuple[object, ...]:
        """Equal for equal variables of equal operators."""
        key: tuple[object, ...] = (
            self.shape,
            renumber(self.label),
            self.nbytes,
            self.slots,
            self.traffic,
        )
        if self.added != 3 * self.nbytes:
            key += ("added", self.added)
        if self.gathered == self.nbytes and self.passes == 1:
            return key
        return *key, self.gathered, self.passes


@dataclass
class OperatorTerms:
    """All terms of one operator. Factors are numbered as in the graph."""

    work: list[Work] = field(default_factory=list)
    reductions: list[Reduction] = field(default_factory=list)
    halos: list[Halo] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    """Inside the operator."""
    stored: list[StoredVariable] = field(default_factory=list)
    resident: list[tuple[int, Factors]] = field(default_factory=list)
    """Bytes in memory during the whole step, besides parameters.

    Arguments for state, the batch, optimizer variables that belong to no parameter.
    """
    activations: list[tuple[int, Factors]] = field(default_factory=list)
    """Bytes of forward values that the backward pass reads."""
    factors: Factors = ()
    """The operator's own, which a choice may split."""
    digest: str = ""
    """Digest of `key`: the same for equal operators."""
    name: str = ""
    """Name of the operator, for messages."""

    def key(self, graph: OperatorGraph, operator: int) -> tuple[object, ...]:
        """Equal for operators that cost the same under equal choices."""
        factors = graph.operators[operator].factors
        number = {factor: i for i, factor in enumerate(factors)}

        def renumber(label: Factors) -> Factors:
            return tuple(number.get(factor, -1) for factor in label)

        return (
            tuple((graph.factors[factor].name, graph.factors[factor].size) for factor in factors),
            tuple(work.key(renumber) for work in self.work),
            tuple(reduction.key(renumber) for reduction in self.reductions),
            tuple(halo.key(renumber) for halo in self.halos),
            tuple(move.key(renumber) for move in self.moves),
            tuple(variable.key(renumber) for variable in self.stored),
            tuple((nbytes, renumber(label)) for nbytes, label in self.resident),
            tuple((nbytes, renumber(label)) for nbytes, label in self.activations),
        )

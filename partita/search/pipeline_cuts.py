"""Cuts of a graph: the ends of pipeline stages and rematerialized runs, and the values that cross.

A cut is narrow: few bytes are handed on, compared with the places around. Every other end would
make stages send more for no gain. Operators are numbered in the order of the model.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from partita.cost.terms import Terms
from partita.graph.operator_graph import Label, OperatorGraph, Phase
from partita.plans.borders import crossing_tensors
from partita.plans.phases import DataFlow
from partita.plans.pipeline import sample_factor
from partita.search.base import numbered

NARROW = 1.2
"""Bytes that cross a cut at most, relative to the narrowest place around."""
MIN_REACH = 4
"""Operators on either side of a place, at least, that it is compared with."""
REACH_SHARE = 64
"""The same as a share of all operators: one in 64."""
NEAR = 16
"""Operators on either side of a cut that decide which values cross it."""


class CutValue(NamedTuple):
    """A value that crosses a cut, in the factors of the operator that stores or reads it."""

    operator: int
    label: Label
    nbytes: int


class ForwardValue(NamedTuple):
    """A value that an operator hands on to later ones in the forward pass."""

    home: int
    last_reader: int
    label: Label
    nbytes: int


class Cuts:
    """The narrow cuts of a graph. `ends[n]` is the last operator before cut n."""

    def __init__(
        self,
        graph: OperatorGraph,
        terms: Terms,
    ) -> None:
        self.graph = graph
        self.digests = [operator.digest for operator in terms.operators]
        self.values = _forward_values(terms)
        self.ends = _narrow_ends(len(graph.operators), self.values)

    @cached_property
    def stored(self) -> list[list[CutValue]]:
        """Per cut, the forward values that cross it, as their home stores them."""
        stored = []
        for values in self._crossing_values:
            stored.append([CutValue(value.home, value.label, value.nbytes) for value in values])
        return stored

    @cached_property
    def forward(self) -> list[list[CutValue]]:
        """Per cut, the values that the forward pass sends."""
        return [sent["forward"] for sent in self._sent]

    @cached_property
    def backward(self) -> list[list[CutValue]]:
        """Per cut, the values that the backward pass sends."""
        return [sent["backward"] for sent in self._sent]

    @cached_property
    def _crossing_values(self) -> list[list[ForwardValue]]:
        """Per cut, the forward values that cross it."""
        crossing: list[list[ForwardValue]] = [[] for _ in self.ends]
        for value in self.values:
            for cut in self._between(value.home, value.last_reader):
                crossing[cut].append(value)
        return crossing

    @cached_property
    def _sent(self) -> list[dict[Phase, list[CutValue]]]:
        """Per cut, the values that each pass sends: one minimum cut for equal surroundings."""
        kinds = numbered(map(self._surroundings, range(len(self.ends))))
        first = [kinds.index(kind) for kind in range(len(set(kinds)))]
        flow = DataFlow.of(self.graph)
        crossing = crossing_tensors(flow, [self.ends[cut] for cut in first])
        of_kind = [self._sent_tensors(flow, tensors) for tensors in crossing]
        sent = []
        for end, kind in zip(self.ends, kinds, strict=True):
            distance = end - self.ends[first[kind]]
            moved: dict[Phase, list[CutValue]] = {}
            for phase, values in of_kind[kind].items():
                moved[phase] = [self._moved(v, end - distance, distance) for v in values]
            sent.append(moved)
        return sent

    def _sent_tensors(self, flow: DataFlow, tensors: Sequence[int]) -> dict[Phase, list[CutValue]]:
        """The values of tensors, by the pass that sends them."""
        sent: dict[Phase, list[CutValue]] = {"forward": [], "backward": []}
        for t in tensors:
            source = flow.producer[t]
            operator = self.graph.home[t] if self.graph.home[t] >= 0 else flow.owner(source)
            phase = flow.classes[source]
            if phase in sent and operator >= 0:
                nbytes = self.graph.tensors[t].nbytes
                sent[phase].append(CutValue(operator, self.graph.labels[t], nbytes))
        return sent

    def _surroundings(self, cut: int) -> tuple[object, ...]:
        """Equal for cuts between equal operators, that equal values cross."""
        end = self.ends[cut]
        begin = max(0, end + 1 - NEAR)
        values = []
        for value in self._crossing_values[cut]:
            home = end - value.home if end - value.home < NEAR else -value.home - 1
            reader = min(NEAR, value.last_reader - end)
            values.append((home, reader, value.nbytes))
        return end - begin, *self.digests[begin : end + NEAR], *sorted(values)

    def _moved(self, value: CutValue, end: int, distance: int) -> CutValue:
        """The value of a cut at `end` in the surroundings of an equal one, operators further on.

        Operators far away are the same ones.
        """
        if not distance or abs(end - value.operator) >= NEAR:
            return value
        operators = self.graph.operators
        operator = value.operator + distance
        factors = dict(
            zip(operators[value.operator].factors, operators[operator].factors, strict=True)
        )
        label = tuple(factors.get(factor, factor) for factor in value.label)
        return CutValue(operator, label, value.nbytes)

    def _between(
        self,
        one: int,
        other: int,
    ) -> range:
        """The cuts between two operators."""
        first = bisect_left(self.ends, min(one, other))
        last = bisect_left(self.ends, max(one, other))
        return range(first, last)


def _forward_values(terms: Terms) -> list[ForwardValue]:
    values: dict[int, ForwardValue] = {}
    for move in terms.edges:
        in_forward = move.phase == move.read_phase == "forward"
        if not in_forward or move.home >= move.reader:
            continue
        source, _ = move.dims
        nbytes = move.nbytes * move.trips
        value = values.get(move.tensor)
        if value is None:
            values[move.tensor] = ForwardValue(
                move.home,
                move.reader,
                source,
                nbytes,
            )
        else:
            last_reader = max(value.last_reader, move.reader)
            values[move.tensor] = value._replace(last_reader=last_reader)
    return [*values.values()]


def _narrow_ends(count: int, values: Sequence[ForwardValue]) -> list[int]:
    """The operators after which few bytes are handed on, compared with the places around."""
    changes = np.zeros(count + 1)
    for value in values:
        changes[value.home] += value.nbytes
        changes[value.last_reader] -= value.nbytes
    handed_on = np.cumsum(changes)[:-1]
    reach = max(MIN_REACH, count // REACH_SHARE)
    ends = []
    for operator in range(count - 1):
        first = max(0, operator - reach)
        last = min(count - 1, operator + reach + 1)
        narrowest = handed_on[first:last].min()
        if handed_on[operator] <= NARROW * narrowest:
            ends.append(operator)
    return ends


def independent(
    graph: OperatorGraph,
    terms: Terms,
    microbatches: int,
) -> bool:
    """Whether microbatches go forward independently of each other.

    They do not if a forward value that microbatches split along one dim is read along another dim,
    or whole: products between samples (contrastive losses) need all samples at once.
    """
    if microbatches == 1:
        return True
    time_factor = []
    for operator in range(len(graph.operators)):
        time_factor.append(
            sample_factor(
                graph,
                operator,
                {},
                microbatches,
            )
        )

    def split_dim(operator: int, label: Label) -> int:
        """The dim of a value that microbatches split in an operator, -1 if none."""
        factor = time_factor[operator]
        return label.index(factor) if factor >= 0 and factor in label else -1

    inner_moves = [move for operator in terms.operators for move in operator.moves]
    for move in (*terms.edges, *inner_moves):
        in_forward = move.phase == move.read_phase == "forward"
        if not in_forward:
            continue
        source, target = move.dims
        made_dim = split_dim(move.home, source)
        read_dim = split_dim(move.reader, target)
        if made_dim >= 0 and made_dim != read_dim:
            return False
    return True

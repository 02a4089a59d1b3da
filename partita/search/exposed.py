"""Moves that no kernel hides: the next kernel of the program waits for them.

The simulator runs kernels in program order, and collectives in theirs (`simulation.structure`). A
move that reads the result of one kernel and is read by the next one delays it by all of its
seconds, where other collectives block kernels for a part of theirs. That part counts beside the
move for collectives that take their turn before it and begin after the first kernel, and for those
that the second kernel waits for after it. Moves to later kernels may hide behind the next one: they
are left out, if they have no more bytes. Nothing is exposed where a sum or a gather may hide.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from partita.cost.operator_terms import Move
from partita.cost.terms import Terms
from partita.graph.operator_graph import IdentityKey, OperatorGraph, Phase
from partita.machine import Backend
from partita.simulation.structure import Slot, Structure, step_structure

MoveKey = tuple[int, int, Phase, Phase]
"""(home, reader, phase, phase in which the reader reads it)."""


@dataclass(frozen=True)
class Exposed:
    """The share of the seconds of collectives that a lower bound counts."""

    visible: float
    """Share of a collective that other kernels may hide."""
    of_moves: Mapping[MoveKey, float]
    """Shares of other moves: 1 where no kernel hides them, 0 beside those."""

    @staticmethod
    def of(graph: OperatorGraph, terms: Terms, backend: Backend) -> Exposed:
        """The shares of a graph on a backend; without overlap every collective is exposed."""
        if backend.overlap == 0:
            return Exposed(1.0, {})
        return Exposed(1 - backend.overlap, _shares(IdentityKey(graph), IdentityKey(terms)))

    def share(self, move: Move) -> float:
        """Share of a move's seconds."""
        return self.of_moves.get(key_of(move), self.visible)


@dataclass(frozen=True)
class _Moves:
    """Moves of a step by their slots."""

    nbytes: Mapping[MoveKey, float]
    """Bytes of all tensors, those of a joined move divided by its share."""
    joined: Mapping[MoveKey, frozenset[int]]
    """Numbers of joined moves."""

    @staticmethod
    def of(terms: Terms) -> _Moves:
        nbytes: dict[MoveKey, float] = defaultdict(float)
        joined: dict[MoveKey, set[int]] = defaultdict(set)
        for move in terms.edges:
            key = key_of(move)
            nbytes[key] += move.nbytes * move.trips / move.share
            if move.joined >= 0:
                joined[key].add(move.joined)
        return _Moves(nbytes, {key: frozenset(numbers) for key, numbers in joined.items()})

    def outweigh(self, exposed: Sequence[MoveKey], others: Sequence[MoveKey]) -> bool:
        """Whether exposed moves have as many bytes as others, and none is one collective with
        them."""
        groups = [self.joined.get(key, frozenset()) for key in others]
        if any(self.joined.get(key, frozenset()) & group for key in exposed for group in groups):
            return False
        return sum(self.nbytes[key] for key in exposed) >= sum(self.nbytes[key] for key in others)


@lru_cache(maxsize=4)
def _shares(
    graph: IdentityKey[OperatorGraph], terms: IdentityKey[Terms]
) -> Mapping[MoveKey, float]:
    """The shares of moves that are exposed, or beside exposed ones: 1 or 0."""
    structure = step_structure(graph.value, terms.value)
    works = {(o, w.phase) for o, one in enumerate(terms.value.operators) for w in one.work}
    kernels = []
    for number, slot in enumerate(structure.slots):
        if slot.kind == "compute" and slot.share > 0 and (slot.operator, slot.phase) in works:
            kernels.append(number)
    moves = _Moves.of(terms.value)
    shares: dict[MoveKey, float] = {}
    for kernel, following in itertools.pairwise(kernels):
        exposed, others = _between(structure, kernel, following)
        if exposed and others is not None and moves.outweigh(exposed, others):
            shares |= dict.fromkeys(others, 0.0) | dict.fromkeys(exposed, 1.0)
    return shares


def key_of(move: Move) -> MoveKey:
    """The slot of a move."""
    return move.home, move.reader, move.phase, move.read_phase


def _between(
    structure: Structure, kernel: int, following: int
) -> tuple[list[MoveKey], list[MoveKey] | None]:
    """The exposed moves between two kernels that follow each other, and others that may hide.

    None for the others if a collective that is no move may hide.
    """
    slots, before = structure.slots, structure.before
    numbers = [n for n in range(kernel + 1, following) if slots[n].kind not in ("compute", "join")]
    exposed = []
    for number in numbers:
        is_awaited = number in before[following] and _waits_for(structure, number, kernel)
        if slots[number].kind == "move" and is_awaited:
            exposed.append(number)
    hidden = []
    for number in numbers if exposed else ():
        is_first = number < exposed[0] and _waits_for(structure, number, kernel)
        is_last = number > exposed[-1] and number in before[following]
        if number not in exposed and not is_first and not is_last:
            hidden.append(number)
    keys = [_key_of_slot(slots[number]) for number in exposed]
    if any(slots[number].kind != "move" for number in hidden):
        return keys, None
    return keys, [_key_of_slot(slots[number]) for number in hidden]


def _key_of_slot(slot: Slot) -> MoveKey:
    return slot.operator, slot.reader, slot.phase, slot.read_phase


def _waits_for(structure: Structure, number: int, kernel: int) -> bool:
    """Whether a collective waits for a kernel, or for an exchange of its result."""
    for source in structure.before[number]:
        is_exchange = structure.slots[source].kind == "exchange"
        if source == kernel or (is_exchange and kernel in structure.before[source]):
            return True
    return False

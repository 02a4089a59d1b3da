"""Moves that no kernel hides: the next kernel of the program waits for them.

The simulator runs kernels in program order, and collectives in theirs (`simulation.structure`). A
move that reads the result of one kernel and is read by the next one delays it by all of its
seconds, where other collectives block kernels for a part of theirs. Between the two kernels may
begin what the move waits for, and gathers for the next kernel that are issued after the move. Moves
to later kernels that begin there are left out, if they have no more bytes. So are sums and gathers
of operators with small variables, as the scales of normalizations, wherever they begin.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from partita.cost.terms import Move, OperatorTerms, Terms
from partita.graph.operator_graph import IdentityKey, OperatorGraph, Phase
from partita.machine import Backend
from partita.simulation.structure import Structure, step_structure

SMALL_VARIABLES = 1e-4
"""Bytes of an operator's variables relative to those of the largest operator, below which its sums
and gathers are left out."""

MoveKey = tuple[int, int, Phase, Phase]
"""(home, reader, phase, phase in which the reader reads it)."""


@dataclass(frozen=True)
class Exposed:
    """The share of the seconds of collectives that a lower bound counts."""

    visible: float
    """Share of a collective that other kernels may hide."""
    of_moves: Mapping[MoveKey, float]
    """Shares of other moves: 1 where no kernel hides them, 0 beside those."""
    limit_bytes: float
    """Bytes of an operator's variables below which their collectives are left out."""

    @staticmethod
    def of(graph: OperatorGraph, terms: Terms, backend: Backend) -> Exposed:
        """The shares of a graph on a backend; without overlap every collective is exposed."""
        if backend.overlap == 0:
            return Exposed(1.0, {}, 0.0)
        of_moves = _shares(IdentityKey(graph), IdentityKey(terms))
        limit_bytes = _limit_bytes(terms) if of_moves else 0.0
        return Exposed(1 - backend.overlap, of_moves, limit_bytes)

    def share(self, move: Move) -> float:
        """Share of a move's seconds."""
        return self.of_moves.get(key_of(move), self.visible)

    def leaves_out(self, terms: OperatorTerms) -> bool:
        """Whether the sums and gathers of an operator are left out."""
        return _variable_bytes(terms) < self.limit_bytes


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
    limit_bytes = _limit_bytes(terms.value)
    small = frozenset(
        o for o, one in enumerate(terms.value.operators) if _variable_bytes(one) < limit_bytes
    )
    moves = _Moves.of(terms.value)
    shares: dict[MoveKey, float] = {}
    for kernel, following in itertools.pairwise(kernels):
        exposed, others = _between(structure, kernel, following, small)
        if exposed and others is not None and moves.outweigh(exposed, others):
            shares |= dict.fromkeys(others, 0.0) | dict.fromkeys(exposed, 1.0)
    return shares


def key_of(move: Move) -> MoveKey:
    """The slot of a move."""
    return move.home, move.reader, move.phase, move.read_phase


def _limit_bytes(terms: Terms) -> float:
    return SMALL_VARIABLES * max(map(_variable_bytes, terms.operators), default=0)


def _variable_bytes(terms: OperatorTerms) -> int:
    return sum(variable.nbytes for variable in terms.stored)


def _between(
    structure: Structure, kernel: int, following: int, small: frozenset[int]
) -> tuple[list[MoveKey], list[MoveKey] | None]:
    """The exposed and the other moves that begin between two kernels that follow each other.

    None for the others if a collective that is no move begins there, too.
    """
    slots, before = structure.slots, structure.before
    exposed: list[MoveKey] = []
    others: list[MoveKey] = []
    awaited: set[int] = set()
    beside: set[int] = set()
    for number in range(kernel + 1, following):
        slot = slots[number]
        is_read_next = number in before[following]
        if slot.kind == "move":
            key = slot.operator, slot.reader, slot.phase, slot.read_phase
            if is_read_next and _waits_for(structure, number, kernel):
                exposed.append(key)
                awaited.update(before[number])
            else:
                others.append(key)
        elif slot.kind == "exchange":
            beside.add(number)
        elif slot.kind in ("sum", "gather") and slot.operator not in small:
            follows_moves = slot.kind == "gather" and is_read_next and exposed
            if not follows_moves:
                beside.add(number)
    return exposed, others if beside <= awaited else None


def _waits_for(structure: Structure, move: int, kernel: int) -> bool:
    """Whether a move waits for a kernel, or for an exchange of its result."""
    for source in structure.before[move]:
        is_exchange = structure.slots[source].kind == "exchange"
        if source == kernel or (is_exchange and kernel in structure.before[source]):
            return True
    return False

"""A lower bound on every plan of one program, whose operators have any choice and storage.

The cost network of all choices, by numbers of axes (`search.degrees`), is too large to be solved,
so a dual of its linear relaxation is raised: potentials of the shardings of every move, which pay
the operator that writes the tensor and the one that reads it. For any potentials, the least
entries of operators and moves sum to a lower bound. Equal moves share theirs, so the number of
blocks of a network does not matter.

Potentials are raised by block-coordinate ascent: Globerson and Jaakkola, "Fixing Max-Product:
Convergent Message Passing Algorithms for MAP LP-Relaxations" (NIPS 2007), with one potential per
sharding instead of one per state, which makes a table of a few hundred squared out of one of a few
thousand squared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit

from partita.cost.evaluate import PARTS
from partita.cost.moves import Placement
from partita.cost.operator_terms import Move
from partita.cost.terms import Terms
from partita.graph.operator_graph import IdentityKey, Label, OperatorGraph
from partita.machine import Backend
from partita.search.base import Array, numbered
from partita.search.degrees import (
    AxisKinds,
    DegreeCounts,
    Shardings,
    distinct_rows,
    least_addition_seconds,
    least_move_table,
    least_operator_seconds,
)
from partita.search.exposed import Exposed
from partita.search.minima import least_of

MAX_ENTRIES = 80_000_000
"""Entries of all tables, at most: with more, shardings that differ in few axes are one class."""
MAX_CHOICES = 150_000
"""Choices of an operator by numbers of axes above which there is no bound."""
ROUNDED = 1 - 1e-6
"""Factor that keeps a table below its entries when they are rounded to float32."""
SWEEPS = 24
LEAST_RISE = 1e-3
"""Relative rise of a sweep below which the bound is left as it is."""
HOME, READER = 0, 1
"""The two sides of a move."""


def least_step_seconds(graph: OperatorGraph, placement: Placement, terms: Terms) -> float:
    """Lower bound on the simulated step of every plan without stages; 0 where none is computed.

    Kernels count whole, and collectives for the time that they block kernels. There is no bound for
    machines with measured operators or several kinds of devices, and none of too large tables.
    """
    relaxed = relax(graph, placement, terms, Times(once=1.0, repeated=1.0))
    return max(0.0, relaxed.seconds) if relaxed else 0.0


@dataclass(frozen=True)
class Times:
    """The numbers of times that the parts of a step count in its relaxation."""

    once: float
    """Times of the update, of the sums of gradients, and of moves to the update."""
    repeated: float
    """Times of the passes over a microbatch."""
    additions: float = 0.0
    """Times that gradients are added to their sum."""
    most_move_seconds: float = np.inf
    """Seconds that a move counts, at most."""

    def of_parts(self, visible: float) -> Array:
        """[PARTS]: times of each part; collectives count for the time that they block kernels.

        Of several microbatches, a sum of gradients is either hidden by every backward pass or runs
        alone, before the update.
        """
        times = []
        for kind, phase in PARTS:
            part = self.once if phase == "update" else self.repeated
            share = 1.0 if kind == "compute" else visible
            times.append(min(self.once, share * part) if kind == "sum" else share * part)
        return np.array(times)

    def of_move(self, move: Move) -> float:
        """Times of a move."""
        return self.once if "update" in (move.phase, move.read_phase) else self.repeated


@dataclass(frozen=True, eq=False)
class Relaxed:
    """The relaxed problem with raised potentials. Sums of its parts are lower bounds."""

    of_operator: Array
    """[operator]: least seconds, the potentials of its moves included."""
    of_moves: Array
    """[move of the terms]: most that both its potentials add to its operators, seconds."""

    @property
    def seconds(self) -> float:
        """Lower bound of a step in which all moves are made."""
        return float(self.of_operator.sum())


def relax(
    graph: OperatorGraph,
    placement: Placement,
    terms: Terms,
    times: Times,
    is_enough: Callable[[Relaxed], bool] = lambda _: False,
) -> Relaxed | None:
    """The relaxed problem of all choices on a mesh; None where none is computed.

    An axis of microbatches splits samples, as in `plans.pipeline.stage_plan`. The first one that
    `is_enough` is not raised further.
    """
    if placement.machine.times is not None or placement.machine.kinds:
        return None
    kinds = AxisKinds.of(placement)
    parts = _equal_parts(IdentityKey(graph), IdentityKey(terms), placement.machine.backend)
    choices = _Choices.of(graph, kinds, parts, terms)
    if choices.most > MAX_CHOICES:
        return None
    problem = _Relaxation(choices, parts, terms, times)
    problem.add_tables()
    best = problem.relaxed()
    before = -np.inf
    for _ in range(SWEEPS):
        problem.sweep()
        raised = problem.relaxed()
        best = max(best, raised, key=_seconds)
        if is_enough(raised):
            return raised
        if raised.seconds <= before + LEAST_RISE * abs(before):
            break
        before = raised.seconds
    return best


def _seconds(relaxed: Relaxed) -> float:
    return relaxed.seconds


@dataclass(eq=False)
class _View:
    """A tensor under a label: its shardings, and the one of each choice."""

    shardings: Shardings
    number_of_choice: Array
    """[choice]: its sharding."""

    @property
    def number(self) -> Array:
        """[choice]: the class of its sharding."""
        return self.shardings.classes[self.number_of_choice]


@dataclass(eq=False)
class _Operators:
    """Operators with equal choices and costs and equal moves."""

    count: int
    seconds: Array
    """[choice]: seconds, and the potentials of all moves."""
    moves: Counter[tuple[int, int]]
    """(class of moves, side) -> number of them at each operator."""


@dataclass(eq=False)
class _Moves:
    """Equal moves between equal operators, with the potentials of both sides."""

    move: Move
    times: float
    """Times that the seconds of a move count."""
    views: tuple[_View, _View]
    potentials: list[Array] = field(default_factory=list)
    table: Array = field(default_factory=lambda: np.zeros((0, 0)))
    """Seconds, [sharding at home, sharding of the reader]."""
    operators: tuple[list[_Operators], list[_Operators]] = field(default_factory=lambda: ([], []))

    @cached_property
    def key(self) -> tuple[object, ...]:
        """Equal for moves with equal tables."""
        return (*_size(self.move), *(view.shardings.degrees.tobytes() for view in self.views))

    @property
    def entries(self) -> int:
        """Entries of the table."""
        home, reader = self.views
        return home.shardings.count * reader.shardings.count


def _size(move: Move) -> tuple[object, ...]:
    """All of a move but its ends and labels."""
    return move.nbytes, move.trips, move.sums, move.scatters, move.share


class _EqualMoves(NamedTuple):
    """Moves that are equal on every mesh."""

    move: Move
    """One of them."""
    share: float
    """Share of their seconds that counts."""
    home: int
    """Kind of the operator that writes the tensor."""
    reader: int
    """Kind of the one that reads it."""
    source: tuple[int, ...]
    target: tuple[int, ...]
    """Positions of the labels' factors among those of the operators, -1 for others."""


@dataclass(frozen=True, eq=False)
class _EqualParts:
    """Equal moves and operators of a step, the same on every mesh."""

    visible: float
    """Share of a collective that other kernels may hide."""
    kind_of_operator: tuple[int, ...]
    """[operator]: equal for equal costs."""
    moves: Sequence[_EqualMoves]
    of_move: Array
    """[move of the terms]: its number in `moves`."""
    operators: Sequence[tuple[int, Sequence[tuple[int, int]]]]
    """(kind, (number of a move, side of the operator) of each of its moves)."""
    of_operator: Array
    """[operator]: its number in `operators`."""


@lru_cache(maxsize=2)
def _equal_parts(
    graph: IdentityKey[OperatorGraph], terms: IdentityKey[Terms], backend: Backend
) -> _EqualParts:
    exposed = Exposed.of(graph.value, terms.value, backend)
    operators, edges = terms.value.operators, terms.value.edges
    kinds = numbered((operator.digest,) for operator in operators)
    moves: list[_EqualMoves] = []
    number: dict[tuple[object, ...], int] = {}
    of_move = []
    ends: list[list[tuple[int, int]]] = [[] for _ in operators]
    for move in edges:
        source = _positions(operators[move.home].factors, move.source)
        target = _positions(operators[move.reader].factors, move.target)
        equal = _EqualMoves(
            move, exposed.share(move), kinds[move.home], kinds[move.reader], source, target
        )
        key = (*equal[1:], move.phase, move.read_phase, *_size(move))
        if key not in number:
            number[key] = len(moves)
            moves.append(equal)
        of_move.append(number[key])
        ends[move.home].append((number[key], HOME))
        ends[move.reader].append((number[key], READER))
    keys = [(kind, tuple(sorted(one))) for kind, one in zip(kinds, ends, strict=True)]
    return _EqualParts(
        exposed.visible,
        kinds,
        moves,
        np.array(of_move, np.int64),
        list(dict.fromkeys(keys)),
        np.array(numbered(keys), np.int64),
    )


def _positions(factors: Sequence[int], label: Label) -> tuple[int, ...]:
    """Positions of a label's factors among those of an operator, -1 for others."""
    position = {factor: number for number, factor in enumerate(factors)}
    return tuple(position.get(factor, -1) for factor in label)


@dataclass(eq=False)
class _Choices:
    """The choices of all operators by degrees, once per kind of operator."""

    kinds: AxisKinds
    degrees: Mapping[int, Array]
    """Kind of operator -> degrees, [choice, factor, kind of axes]."""

    @staticmethod
    def of(graph: OperatorGraph, kinds: AxisKinds, parts: _EqualParts, terms: Terms) -> _Choices:
        degrees: dict[int, Array] = {}
        for operator, kind in zip(terms.operators, parts.kind_of_operator, strict=True):
            if kind not in degrees:
                factors = [graph.factors[factor] for factor in operator.factors]
                sizes = [factor.size for factor in factors]
                samples = [number for number, one in enumerate(factors) if one.kind == "S"]
                degrees[kind] = kinds.all_degrees(sizes, samples)
        return _Choices(kinds, degrees)

    @property
    def most(self) -> int:
        """Most choices of an operator."""
        return max(map(len, self.degrees.values()), default=0)


class _Relaxation:
    """The relaxed problem of a graph and its potentials, at first 0."""

    def __init__(self, choices: _Choices, parts: _EqualParts, terms: Terms, times: Times) -> None:
        self.kinds = choices.kinds
        self.times = times
        self._parts = parts
        weights = times.of_parts(parts.visible)
        self._degrees = choices.degrees
        self._views: dict[tuple[int, tuple[int, ...]], _View] = {}
        seconds: dict[int, Array] = {}
        for operator, kind in zip(terms.operators, parts.kind_of_operator, strict=True):
            if kind not in seconds:
                split = DegreeCounts(self.kinds, operator.factors, self._degrees[kind])
                seconds[kind] = least_operator_seconds(operator, split, weights)
                seconds[kind] += times.additions * least_addition_seconds(operator, split)
        self.moves: list[_Moves] = []
        self.operators: list[_Operators] = []
        self._of_operator = np.zeros(0, np.int64)
        """[operator]: its number in `operators`."""
        self._of_move = np.zeros(0, np.int64)
        """[move of the terms]: its number in `moves`."""
        self._join(seconds)
        self._fit()

    @property
    def entries(self) -> int:
        """Entries of the different tables of all moves."""
        return sum({moves.key: moves.entries for moves in self.moves}.values())

    def _fit(self) -> None:
        """Joins shardings to classes until all tables have `MAX_ENTRIES` or less."""
        for apart in range(int(self.kinds.counts.max(initial=0)) - 1, 0, -1):
            if self.entries <= MAX_ENTRIES:
                return
            for view in self._views.values():
                view.shardings = Shardings.of(view.shardings.degrees, self.kinds, apart)

    def _join(self, seconds: Mapping[int, Array]) -> None:
        """Fills `moves` and `operators`."""
        number: dict[tuple[object, ...], int] = {}
        number_of: list[int] = []
        """[equal moves]: their number in `moves`."""
        for equal in self._parts.moves:
            times = self.times.of_move(equal.move) * equal.share
            ends = (equal.home, equal.source), (equal.reader, equal.target)
            key = (*ends, times, *_size(equal.move))
            if key not in number:
                number[key] = len(self.moves)
                views = (self._view(*ends[HOME]), self._view(*ends[READER]))
                self.moves.append(_Moves(equal.move, times, views))
            number_of.append(number[key])
        self._of_move = np.array(number_of, np.int64)[self._parts.of_move]
        keys = []
        for kind, ends_of_moves in self._parts.operators:
            keys.append((kind, tuple(sorted((number_of[n], side) for n, side in ends_of_moves))))
        counts: Counter[tuple[int, tuple[tuple[int, int], ...]]] = Counter()
        for key, count in zip(keys, np.bincount(self._parts.of_operator), strict=True):
            counts[key] += int(count)
        position = {key: n for n, key in enumerate(counts)}
        of_equal = np.array([position[key] for key in keys], np.int64)
        self._of_operator = of_equal[self._parts.of_operator]
        for (kind, sides), count in counts.items():
            operators = _Operators(count, seconds[kind].copy(), Counter(sides))
            self.operators.append(operators)
            for number_of_moves, side in operators.moves:
                self.moves[number_of_moves].operators[side].append(operators)

    def _view(self, kind: int, positions: tuple[int, ...]) -> _View:
        """A tensor of an operator of a kind under a label."""
        if (kind, positions) not in self._views:
            degrees = self._degrees[kind]
            unsplit = np.zeros((len(degrees), 1, degrees.shape[2]), np.int64)
            entries = np.concatenate([degrees, unsplit], axis=1)[:, list(positions)]
            rows, number = distinct_rows(entries)
            self._views[kind, positions] = _View(Shardings.of(rows, self.kinds), number)
        return self._views[kind, positions]

    def add_tables(self) -> None:
        """Adds the tables of all moves: the seconds that they block kernels."""
        tables: dict[tuple[object, ...], Array] = {}
        for moves in self.moves:
            shardings = [view.shardings for view in moves.views]
            if moves.key not in tables:
                tables[moves.key] = least_move_table(moves.move, self.kinds, *shardings)
            moves.table = tables[moves.key]
            moves.potentials = [np.zeros(each.count) for each in shardings]

    def sweep(self) -> None:
        """Raises the potentials of all moves."""
        for number in range(len(self.moves)):
            self._raise(number)
        for number in reversed(range(len(self.moves))):
            self._raise(number)

    def relaxed(self) -> Relaxed:
        """The least entries of operators, and the most of moves."""
        operators = np.array([float(each.seconds.min()) for each in self.operators])
        moves = np.array([sum(float(p.max()) for p in each.potentials) for each in self.moves])
        return Relaxed(operators[self._of_operator], moves[self._of_move])

    def _raise(self, number: int) -> None:
        """Best potentials of one class of moves for the operators that most of them connect."""
        moves = self.moves[number]
        home, reader = (max(moves.operators[side], key=_count) for side in (HOME, READER))
        raised = _raised(
            home.seconds / home.moves[number, HOME],
            moves.views[HOME].number,
            moves.potentials[HOME],
            reader.seconds / reader.moves[number, READER],
            moves.views[READER].number,
            moves.potentials[READER],
            moves.table,
            np.float32(ROUNDED * moves.times),
            np.float32(ROUNDED * self.times.most_move_seconds),
        )
        for side, potentials in enumerate(raised):
            change = (potentials - moves.potentials[side])[moves.views[side].number]
            for operators in moves.operators[side]:
                operators.seconds += operators.moves[number, side] * change
            moves.potentials[side] = potentials


def _count(operators: _Operators) -> int:
    return operators.count


@njit(cache=True, fastmath={"nnan", "nsz"})
def _raised(
    home_seconds,
    home_number,
    home_potentials,
    reader_seconds,
    reader_number,
    reader_potentials,
    table,
    times,
    most_seconds,
):
    """Potentials (at home, of the reader) that divide the least sums of a table evenly.

    No two of them sum to more than the table's entry, `times` over, and at most `most_seconds`.
    """
    home = _least(home_seconds, home_number, home_potentials)
    reader = _least(reader_seconds, reader_number, reader_potentials)
    through_reader = np.empty(len(home))
    through_home = np.full(len(reader), np.inf)
    lowered = np.empty(len(reader))
    sums = np.empty(len(reader))
    for s in range(len(home)):
        row = table[s]
        given = home[s]
        for t in range(len(reader)):
            seconds = min(times * row[t], most_seconds)
            sums[t] = seconds + reader[t]
            # Into another array: a minimum in its place is a slow conditional store.
            lowered[t] = min(seconds + given, through_home[t])
        through_home, lowered = lowered, through_home
        through_reader[s] = least_of(sums)
    return (through_reader - home) / 2, (through_home - reader) / 2


@njit(cache=True)
def _least(seconds, number, potentials):
    """[sharding]: least seconds of the choices with it, without its own potential."""
    least = np.full(len(potentials), np.inf)
    for choice in range(len(seconds)):
        sharding = number[choice]
        least[sharding] = min(least[sharding], seconds[choice] - potentials[sharding])
    return least

"""A graph on a machine as a cost network: states per operator, their costs, and tables of moves.

A state of an operator is a choice together with the storage of its variables (`cost.storage`).
Equal operators have one kind, and equal tables of moves too (`Problem.kinds`,
`Problem.table_kinds`, `CostNetwork.move_kinds`): costs are computed once per kind. A kind is
assigned by content (digest of the operator's terms; shardings and bytes of a move).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from partita.cost.evaluate import Assignment, costs_by_rule
from partita.cost.moves import Placement, move_table
from partita.cost.operator_terms import Move, OperatorTerms, StoredVariable
from partita.cost.storage import PLAIN, StorageRule, planned_rule, storage_axes, storage_rules
from partita.cost.terms import Terms, cost_terms
from partita.graph.operator_graph import Label, OperatorGraph, Phase
from partita.machine import Machine
from partita.plans.layout import Sharding, is_accelerated, label_sharding
from partita.plans.plan import Mesh, Plan, Storage
from partita.search.base import (
    Array,
    Ends,
    EqualByContent,
    Neighbour,
    Problem,
    States,
    neighbour_tables,
    numbered,
)
from partita.search.candidates import (
    LIMIT,
    Choice,
    are_dealt_singly,
    assignment_of,
    candidates,
    choice_of,
    names_of,
)

Key = TypeVar("Key")
MoveKey = tuple[int, int, Phase, Phase]
"""(home, reader, phase, phase in which the reader reads it)."""


@dataclass(frozen=True)
class OperatorState:
    """One way to run an operator: its choice, a ZeRO level, and the memory of optimizer slots.

    `choice`: per mesh axis the position, among the operator's own factors, of the factor that the
    axis splits; -1 for none.
    """

    choice: Choice
    zero: int
    outermost: int = 0
    """The outermost level of the machine over which variables are stored in slices."""
    offload: bool = False
    """Whether optimizer slots are in the memory of the host."""

    @property
    def storage(self) -> StorageRule:
        """The storage of the operator's variables."""
        return StorageRule(self.zero, self.outermost, offload=self.offload)


class MicrobatchSums(NamedTuple):
    """Seconds by state of the sums of an operator's gradients over several microbatches."""

    adding: Array
    """A device adds the gradients of a microbatch to their sums."""
    repeated: Array
    """Devices sum gradients of a microbatch, before overlap."""
    waiting: Array
    """Devices sum gradients that they have added up."""


@dataclass(frozen=True, eq=False)
class CostNetwork(EqualByContent):
    """The cost network of a graph on a mesh of a machine, and the meaning of its states."""

    graph: OperatorGraph
    placement: Placement
    terms: Terms
    states: Sequence[Sequence[OperatorState]]
    problem: Problem
    parts: Sequence[Array]
    """Per operator, [PARTS, state]: seconds of the parts of a step, whether they overlap or not."""
    activations: Sequence[Array]
    """Per operator, by state: bytes of forward values that the backward pass reads."""
    gradients: Sequence[Array]
    """Per operator, by state: bytes of the gradients of its variables."""
    sums: Sequence[MicrobatchSums]
    """Per operator: the sums of its gradients in a step of several microbatches."""
    moves: Mapping[MoveKey, Array]
    """Seconds of moves, [state of home, state of reader]."""
    move_kinds: Mapping[MoveKey, int] = field(compare=False)
    """Number per table of moves, the same for equal tables."""
    deals_singly: bool = True
    """Whether no operator's axes are dealt out several at a time (`search.candidates`)."""

    @cached_property
    def neighbours(self) -> list[list[Neighbour]]:
        """Per operator, (other operator, table with its own states as rows)."""
        return neighbour_tables(self.problem)

    @cached_property
    def _state_numbers(self) -> dict[int, dict[OperatorState, int]]:
        """Per kind of operator, state -> number."""
        numbers: dict[int, dict[OperatorState, int]] = {}
        for kind, states in zip(self.problem.kinds, self.states, strict=True):
            if kind not in numbers:
                numbers[kind] = dict(zip(states, range(len(states)), strict=True))
        return numbers

    def choice(self, operator: int, state: int) -> Choice:
        """The choice of an operator in one of its states, in factors of the graph."""
        factors = (*self.graph.operators[operator].factors, -1)
        positions = self.states[operator][state].choice
        return tuple(factors[position] for position in positions)

    def whole(self, operator: int, state: int) -> int | None:
        """The state with the same storage whose choice splits nothing, None if there is none."""
        split = self.states[operator][state]
        whole = replace(split, choice=(-1,) * len(split.choice))
        return self._state_numbers[self.problem.kinds[operator]].get(whole)

    def plan(
        self,
        states: States,
        name: str = "found",
        notes: tuple[str, ...] = (),
    ) -> Plan:
        """The plan with these states."""
        choices: dict[str, dict[str, str]] = {}
        storage: dict[str, Storage] = {}
        offload: list[str] = []
        for o, i in enumerate(states):
            choice = self.choice(o, i)
            operator_name = self.graph.operators[o].name
            choices[operator_name] = names_of(self.graph, self.placement.mesh, choice)
            if self.states[o][i].zero:
                storage |= storage_of(self, o, i)
            if self.states[o][i].offload:
                offload += [v.path for v in self.terms.operators[o].stored if v.slots]
        return Plan(
            self.graph.name,
            self.placement.machine.name,
            self.placement.mesh,
            choices,
            storage,
            name,
            self.graph.batch_size,
            notes=notes,
            target=self.graph.target,
            offload=tuple(offload),
        )

    def states_of(self, plan: Plan) -> tuple[int, ...] | None:
        """The states of a plan; None if one of its choices is no candidate."""
        states = []
        for o, kind in enumerate(self.problem.kinds):
            numbers = self._state_numbers[kind]
            number = numbers.get(self._state_of(plan, o))
            if number is None:
                return None
            states.append(number)
        return tuple(states)

    def _state_of(self, plan: Plan, operator: int) -> OperatorState:
        named = plan.choices[self.graph.operators[operator].name]
        choice = choice_of(self.graph, operator, self.placement.mesh, named)
        rule = planned_rule(self.terms.operators[operator], plan)
        outermost = self._outermost(rule, operator, choice)
        positions = _positions(self.graph, operator, choice)
        with_slots = {v.path for v in self.terms.operators[operator].stored if v.slots}
        if not rule.planned_offload:
            return OperatorState(positions, rule.zero, outermost)
        if rule.planned_offload != with_slots:
            outermost = -1
        return OperatorState(positions, rule.zero, outermost, offload=True)

    def _outermost(self, rule: StorageRule, operator: int, choice: Choice) -> int:
        """The outermost level of a plan's storage, -1 if no search tries this storage."""
        if not rule.planned:
            return 0
        mesh = self.placement.mesh
        planned = dict(rule.planned)
        assignment = assignment_of(choice)
        stored = [v for v in self.terms.operators[operator].stored if v.path in planned]
        for candidate in storage_rules(mesh, is_accelerated(self.graph)):
            if candidate.zero == rule.zero and all(
                sorted(candidate.axes(variable, mesh, assignment)) == sorted(planned[variable.path])
                for variable in stored
            ):
                return candidate.outermost
        return -1


def _positions(graph: OperatorGraph, operator: int, factors: Sequence[int]) -> tuple[int, ...]:
    """Positions of factors of the graph among those of an operator, -1 for any other."""
    operator_factors = graph.operators[operator].factors
    position = {f: n for n, f in enumerate(operator_factors)}
    return tuple(position.get(f, -1) for f in factors)


def storage_of(network: CostNetwork, operator: int, state: int) -> dict[str, Storage]:
    """The storage of an operator's variables in a state, by path."""
    mesh = network.placement.mesh
    rule = network.states[operator][state].storage
    assignment = assignment_of(network.choice(operator, state))
    storage: dict[str, Storage] = {}
    for variable in network.terms.operators[operator].stored:
        split = storage_axes(variable, mesh, assignment, rule.outermost)
        if split:
            dim, axes = split
            names = tuple(mesh.axes[axis].name for axis in axes)
            storage[variable.path] = Storage(dim, names, rule.zero)
    return storage


def build(
    graph: OperatorGraph,
    machine: Machine,
    mesh: Mesh,
    baselines: Sequence[Plan] = (),
    terms: Terms | None = None,
    limit: int = LIMIT,
    offload: bool = False,
) -> CostNetwork:
    """The cost network of a graph on a machine's mesh.

    Args:
        baselines: plans whose choices are all among the candidates.
        terms: cost terms of the graph, if they exist already.
        limit: approximate maximum of choices per operator.
        offload: whether optimizer slots in the memory of the host are in the space.
    """
    placement = Placement(machine, mesh)
    if terms is None:
        terms = cost_terms(graph, machine.backend)
    extras = []
    keys = []
    for o, operator in enumerate(graph.operators):
        extra = []
        for plan in baselines:
            named = plan.choices[operator.name]
            extra.append(choice_of(graph, o, mesh, named))
        positions = [_positions(graph, o, choice) for choice in extra]
        digest = terms.operators[o].digest
        extras.append(extra)
        keys.append((digest, operator.kind, *positions))
    kinds = numbered(keys)
    by_kind: dict[int, _StateCosts] = {}
    deals_singly = True
    for o, kind in enumerate(kinds):
        if kind not in by_kind:
            deals_singly = deals_singly and are_dealt_singly(graph, o, mesh, limit)
            choices = candidates(graph, o, mesh, extras[o], limit)
            operator_terms = terms.operators[o]
            by_kind[kind] = _state_costs(graph, o, placement, operator_terms, choices, offload)
    costs = [by_kind[kind] for kind in kinds]
    states = [cost.states for cost in costs]
    tables = _MoveTables(graph, placement, states, kinds)
    tables.add(terms.edges)
    problem = Problem(
        seconds=[cost.seconds for cost in costs],
        nbytes=[cost.nbytes for cost in costs],
        tables=tables.of_kinds(tables.table_kinds),
        kinds=kinds,
        table_kinds=tables.table_kinds,
    )
    return CostNetwork(
        graph=graph,
        placement=placement,
        terms=terms,
        states=states,
        problem=problem,
        parts=[cost.parts for cost in costs],
        activations=[cost.activations for cost in costs],
        gradients=[cost.gradients for cost in costs],
        sums=[cost.sums for cost in costs],
        moves=tables.of_kinds(tables.move_kinds),
        move_kinds=tables.move_kinds,
        deals_singly=deals_singly,
    )


@dataclass(frozen=True, eq=False)
class _StateCosts:
    """The states of a kind of operator, and by state its costs (attributes of CostNetwork)."""

    states: Sequence[OperatorState]
    seconds: Array
    nbytes: Array
    parts: Array
    activations: Array
    gradients: Array
    sums: MicrobatchSums


def _state_costs(
    graph: OperatorGraph,
    operator: int,
    placement: Placement,
    terms: OperatorTerms,
    choices: Sequence[Choice],
    offload: bool,
) -> _StateCosts:
    """The states and costs of an operator, and of all operators of its kind."""
    rules = (PLAIN,)
    if terms.stored:
        with_slots = any(variable.slots for variable in terms.stored)
        rules = storage_rules(placement.mesh, is_accelerated(graph), offload and with_slots)
    assignments = [assignment_of(choice) for choice in choices]
    costs = costs_by_rule(terms, placement, assignments, rules)
    positions = [_positions(graph, operator, choice) for choice in choices]
    gradients = []
    added = []
    for assignment in assignments:
        gradient_bytes = 0.0
        added_bytes = 0.0
        for variable in terms.stored:
            count = _shard_count(variable, assignment, placement)
            gradient_bytes += variable.nbytes / count
            added_bytes += variable.added / count
        gradients.append(gradient_bytes)
        added.append(added_bytes)
    sums = MicrobatchSums(
        adding=np.tile(
            np.array(added) / placement.machine.bandwidth_for(np.array(added)), len(rules)
        ),
        repeated=np.concatenate([cost.microbatch_sum_seconds for cost in costs]),
        waiting=np.concatenate([cost.waiting_sum_seconds for cost in costs]),
    )
    pairs = itertools.product(rules, positions)
    return _StateCosts(
        states=[
            OperatorState(choice, rule.zero, rule.outermost, rule.offload) for rule, choice in pairs
        ],
        seconds=np.concatenate([cost.seconds for cost in costs]),
        nbytes=np.concatenate([cost.nbytes for cost in costs]),
        parts=np.concatenate([cost.parts() for cost in costs], axis=1),
        activations=np.concatenate([cost.activation_bytes for cost in costs]),
        gradients=np.tile(gradients, len(rules)),
        sums=sums,
    )


def _shard_count(variable: StoredVariable, assignment: Assignment, placement: Placement) -> int:
    """Number of parts into which a choice splits a variable."""
    sharding = label_sharding(variable.label, assignment)
    return placement.shard_count([axis for dim_axes in sharding for axis in dim_axes])


@dataclass(frozen=True, eq=False)
class _View:
    """A tensor under a label: its distinct shardings, and the number of the one of each state."""

    number: int
    shardings: tuple[Sharding, ...]
    sharding_of_state: Array


class _MoveTables:
    """Tables of moves between operators. Equal moves between equal operators have one table.

    `tables` are numbered by kind; `move_kinds` and `table_kinds` are kinds of tables: of the moves
    of two operators in two phases, and of all seconds between two operators.
    """

    def __init__(
        self,
        graph: OperatorGraph,
        placement: Placement,
        states: Sequence[Sequence[OperatorState]],
        kinds: Sequence[int],
    ) -> None:
        self.graph = graph
        self.placement = placement
        self.tables: list[Array] = []
        self.move_kinds: dict[MoveKey, int] = {}
        self.table_kinds: dict[Ends, int] = {}
        self._kind_of_key: dict[tuple[object, ...], int] = {}
        self._views: dict[tuple[object, ...], _View] = {}
        choices = {}
        for kind, operator_states in zip(kinds, states, strict=True):
            if kind not in choices:
                choices[kind] = tuple(state.choice for state in operator_states)
        choice_kinds = dict(zip(choices, numbered(choices.values()), strict=True))
        self._choice_kinds = [choice_kinds[kind] for kind in kinds]
        """Per operator, a number that operators with the same choices share."""
        self._assignments: dict[int, list[Assignment]] = {}
        for kind, choice_kind in choice_kinds.items():
            self._assignments[choice_kind] = list(map(assignment_of, choices[kind]))

    def of_kinds(self, kinds: Mapping[Key, int]) -> dict[Key, Array]:
        """The tables of kinds."""
        return {key: self.tables[kind] for key, kind in kinds.items()}

    def add(self, moves: Sequence[Move]) -> None:
        """Fills `move_kinds` and `table_kinds`."""
        by_key: dict[MoveKey, list[Move]] = {}
        for move in moves:
            key = move.home, move.reader, move.phase, move.read_phase
            by_key.setdefault(key, []).append(move)
        between: dict[Ends, list[int]] = {}
        for key, moves_of_key in by_key.items():
            kinds = self._move_kinds(moves_of_key)
            if not kinds:
                continue
            self.move_kinds[key] = self._sum(kinds)
            home, reader, *_ = key
            ends = (home, reader)
            if home > reader:
                ends = (reader, home)
                kinds = [self._transposed(kind) for kind in kinds]
            between.setdefault(ends, []).extend(kinds)
        for ends, kinds in between.items():
            self.table_kinds[ends] = self._sum(kinds)

    def _move_kinds(self, moves: Sequence[Move]) -> list[int]:
        """Kinds of the tables of moves, without moves that never move anything."""
        kinds = [self._move(move) for move in moves]
        return [kind for kind in kinds if kind is not None]

    def _move(self, move: Move) -> int | None:
        """Kind of the table of one move; None if nothing ever moves."""
        source = self._view(move.home, move.source)
        target = self._view(move.reader, move.target)
        fixed = len(source.shardings) == len(target.shardings) == 1
        if fixed and source.shardings == target.shardings:
            return None
        size = (move.nbytes, move.trips, move.sums, move.scatters, move.share)
        key = ("move", source.number, target.number, size)
        if key not in self._kind_of_key:
            seconds = move_table(move, self.placement, source.shardings, target.shardings)
            rows_and_columns = np.ix_(source.sharding_of_state, target.sharding_of_state)
            self._new(key, seconds[rows_and_columns])
        return self._kind_of_key[key]

    def _view(self, operator: int, label: Label) -> _View:
        """A tensor of an operator under a label; the same for operators with the same choices."""
        positions = _positions(self.graph, operator, label)
        choice_kind = self._choice_kinds[operator]
        key = (choice_kind, positions)
        if key not in self._views:
            shardings = []
            for assignment in self._assignments[choice_kind]:
                shardings.append(label_sharding(positions, assignment))
            self._views[key] = _View(
                number=len(self._views),
                shardings=tuple(dict.fromkeys(shardings)),
                sharding_of_state=np.array(numbered(shardings)),
            )
        return self._views[key]

    def _sum(self, kinds: Sequence[int]) -> int:
        """Kind of the sum of tables."""
        if len(kinds) == 1:
            return kinds[0]
        key = ("sum", *sorted(kinds))
        if key not in self._kind_of_key:
            tables = [self.tables[kind] for kind in kinds]
            self._new(key, sum(tables[1:], tables[0]))
        return self._kind_of_key[key]

    def _transposed(self, kind: int) -> int:
        """Kind of a transposed table."""
        key = ("transposed", kind)
        if key not in self._kind_of_key:
            self._new(key, self.tables[kind].T)
        return self._kind_of_key[key]

    def _new(self, key: tuple[object, ...], table: Array) -> None:
        self._kind_of_key[key] = len(self.tables)
        self.tables.append(table)

"""A graph on a machine as a cost network: candidates per operator, their costs, and tables of moves between operators.

A state of an operator is a choice together with how its variables are stored (plainly, ZeRO-1, ZeRO-3). States that no
neighbour can tell apart are merged, cheapest first, when the search runs (`CostNetwork.problem` keeps the best for a price).
Equal operators share their states and costs, and equal tables of moves are one array: what is the same is computed once, and is known by being the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from partita.cost.evaluate import operator_cost, storage_axes
from partita.cost.moves import Placement, move_table
from partita.cost.terms import Move, OperatorTerms, Terms, cost_terms
from partita.graph.operator_graph import Label, OperatorGraph, Phase
from partita.machine import Machine
from partita.plans.layout import Sharding, label_sharding
from partita.plans.plan import Mesh, Plan, Storage
from partita.search.base import Problem
from partita.search.candidates import LIMIT, Choice, assignment_of, candidates, choice_of, names_of

LEVELS = (0, 1, 3)
"""Ways to store variables that differ in cost: ZeRO-2 is ZeRO-1 in a step that is one program."""


@dataclass(frozen=True)
class OperatorState:
    """One way to run an operator: per mesh axis the place of the factor that it splits among the operator's own, -1 for none; and a ZeRO level."""

    choice: Choice
    zero: int


@dataclass
class CostNetwork:
    """The cost network of a graph on a placed mesh, with what its states stand for. Equal operators share their lists and arrays."""

    graph: OperatorGraph
    placement: Placement
    terms: Terms
    states: list[Sequence[OperatorState]]
    problem: Problem
    parts: list[np.ndarray]
    """Per operator, [PARTS, state]: the seconds of what a step does for it, hidden or not."""
    activations: list[np.ndarray]
    """Per operator, by state: of its bytes those of forward values that the backward pass reads."""
    gradients: list[np.ndarray]
    """Per operator, by state: bytes of the gradients of its variables."""
    moves: dict[tuple[int, int, Phase, Phase], np.ndarray] = field(default_factory=dict)
    """(home, reader, phase, phase in which it is read) -> seconds by state of either."""

    @cached_property
    def neighbours(self) -> list[list[tuple[int, np.ndarray]]]:
        """Per operator, (other operator, table with its own states as rows)."""
        found: list[list[tuple[int, np.ndarray]]] = [[] for _ in self.states]
        for (u, v), table in self.problem.tables.items():
            found[u].append((v, table))
            found[v].append((u, table.T))
        return found

    @cached_property
    def _number(self) -> dict[int, dict[OperatorState, int]]:
        """Per list of states, state -> its number."""
        return {
            id(states): {state: i for i, state in enumerate(states)}
            for states in {id(s): s for s in self.states}.values()
        }

    def choice(self, operator: int, state: int) -> Choice:
        """What an operator does in one of its states, in factors of the graph."""
        factors = (*self.graph.operators[operator].factors, -1)
        return tuple(factors[place] for place in self.states[operator][state].choice)

    def plan(self, states: Sequence[int], name: str = "found", notes: tuple[str, ...] = ()) -> Plan:
        """The plan that states stand for."""
        graph, mesh = self.graph, self.placement.mesh
        choices, storage = {}, {}
        for o, i in enumerate(states):
            choices[graph.operators[o].name] = names_of(graph, mesh, self.choice(o, i))
            if self.states[o][i].zero:
                storage |= storage_of(self, o, i)
        return Plan(
            graph.name,
            self.placement.machine.name,
            mesh,
            choices,
            storage,
            name,
            graph.batch_size,
            notes=notes,
        )

    def states_of(self, plan: Plan) -> tuple[int, ...] | None:
        """The states that stand for a plan, None where it has a choice that is no candidate."""
        found = []
        for o, operator in enumerate(self.graph.operators):
            choice = _placed(
                self.graph,
                o,
                choice_of(self.graph, o, self.placement.mesh, plan.choices[operator.name]),
            )
            levels = {
                plan.storage[s.path].zero
                for s in self.terms.operators[o].stored
                if s.path in plan.storage
            }
            zero = max((1 if level == 2 else level for level in levels), default=0)
            state = self._number[id(self.states[o])].get(OperatorState(choice, zero))
            if state is None:
                return None
            found.append(state)
        return tuple(found)


def _placed(graph: OperatorGraph, operator: int, factors: Sequence[int]) -> tuple[int, ...]:
    """Factors of the graph as places among those of an operator, -1 for what is none of them."""
    place = {f: n for n, f in enumerate(graph.operators[operator].factors)}
    return tuple(place.get(f, -1) for f in factors)


def storage_of(network: CostNetwork, operator: int, state: int) -> dict[str, Storage]:
    """The storage of an operator's variables in a state."""
    found, mesh = {}, network.placement.mesh
    assignment = assignment_of(network.choice(operator, state))
    for s in network.terms.operators[operator].stored:
        where = storage_axes(s, mesh, assignment)
        if where:
            found[s.path] = Storage(
                where[0],
                tuple(mesh.axes[a].name for a in where[1]),
                network.states[operator][state].zero,
            )
    return found


def build(
    graph: OperatorGraph,
    machine: Machine,
    mesh: Mesh,
    baselines: Sequence[Plan] = (),
    terms: Terms | None = None,
    limit: int = LIMIT,
) -> CostNetwork:
    """The cost network of a graph on a machine's mesh. Every choice of the baselines is among the candidates, of which there are about `limit` at most."""
    placement = Placement(machine, mesh)
    terms = terms or cost_terms(graph, machine.backend)
    known: dict[tuple[object, ...], _Costed] = {}
    every: list[_Costed] = []
    for o, operator in enumerate(graph.operators):
        extra = [choice_of(graph, o, mesh, plan.choices[operator.name]) for plan in baselines]
        key = (
            terms.operators[o].digest,
            operator.kind,
            *(_placed(graph, o, choice) for choice in extra),
        )
        if key not in known:
            known[key] = _costed(graph, o, placement, terms.operators[o], extra, limit)
        every.append(known[key])
    states, seconds, nbytes, parts, kept, gradients = (
        (list(mine) for mine in zip(*every, strict=True)) if every else ([] for _ in range(6))
    )
    network = CostNetwork(
        graph, placement, terms, states, Problem(seconds, nbytes), parts, kept, gradients
    )
    _add_moves(network)
    return network


_Costed = tuple[Sequence[OperatorState], np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""States, and by state: seconds, bytes, parts, kept, gradients."""


def _costed(
    graph: OperatorGraph,
    operator: int,
    placement: Placement,
    terms: OperatorTerms,
    extra: Sequence[Choice],
    limit: int,
) -> _Costed:
    """The states of an operator, and of all that are equal to it, with what they cost."""
    levels = LEVELS if terms.stored else (0,)
    choices = candidates(graph, operator, placement.mesh, extra, limit)
    assignments = [assignment_of(choice) for choice in choices]
    costs = [operator_cost(terms, placement, assignments, zero) for zero in levels]
    part = lambda s, assignment: (
        s.nbytes
        / placement.shard_count([a for axes in label_sharding(s.label, assignment) for a in axes])
    )  # noqa: E731
    return (
        [
            OperatorState(_placed(graph, operator, choice), zero)
            for zero in levels
            for choice in choices
        ],
        np.concatenate([c.seconds for c in costs]),
        np.concatenate([c.nbytes for c in costs]),
        np.concatenate([c.parts() for c in costs], axis=1),
        np.concatenate([c.activation_bytes for c in costs]),
        np.tile(
            [float(sum(part(s, assignment) for s in terms.stored)) for assignment in assignments],
            len(levels),
        ),
    )


def _add_moves(network: CostNetwork) -> None:
    graph = network.graph
    views: dict[tuple[object, ...], tuple[tuple[Sharding, ...], np.ndarray]] = {}
    alike: dict[tuple[Choice, ...], int] = {}
    kinds = {
        id(states): alike.setdefault(tuple(s.choice for s in states), len(alike))
        for states in {id(s): s for s in network.states}.values()
    }
    assignments = {
        kind: [assignment_of(choice) for choice in choices] for choices, kind in alike.items()
    }

    def view(operator: int, label: Label) -> tuple[tuple[Sharding, ...], np.ndarray]:
        """(distinct shardings of a tensor under this label, which of them each state gives); the same for operators alike."""
        kind, places = kinds[id(network.states[operator])], _placed(graph, operator, label)
        if (kind, places) not in views:
            number: dict[Sharding, int] = {}
            ids = [
                number.setdefault(label_sharding(places, assignment), len(number))
                for assignment in assignments[kind]
            ]
            views[kind, places] = (tuple(number), np.array(ids))
        return views[kind, places]

    by_pair: dict[tuple[int, int, Phase, Phase], list[Move]] = {}
    for move in network.terms.edges:
        by_pair.setdefault((move.home, move.reader, move.phase, move.read_phase), []).append(move)
    expanded: dict[tuple[object, ...], np.ndarray] = {}
    totals: dict[tuple[int, ...], np.ndarray] = {}

    def total(tables: list[np.ndarray]) -> np.ndarray:
        """Their sum; of the same tables the same array."""
        same = tuple(sorted(map(id, tables)))
        if same not in totals:
            totals[same] = sum(tables[1:], tables[0])
        return totals[same]

    turned: dict[int, np.ndarray] = {}
    between: dict[tuple[int, int], list[np.ndarray]] = {}
    for (home, reader, phase, wanted), moves in by_pair.items():
        tables = []
        for move in moves:
            sources, rows = view(home, move.source)
            targets, columns = view(reader, move.target)
            if len(sources) == len(targets) == 1 and sources == targets:
                continue
            key = (id(sources), id(targets), move.nbytes, move.trips, move.sums)
            if key not in expanded:
                expanded[key] = move_table(move, network.placement, sources, targets)[
                    np.ix_(rows, columns)
                ]
            tables.append(expanded[key])
        if tables:
            network.moves[home, reader, phase, wanted] = total(tables)
            if home > reader:
                tables = [turned.setdefault(id(t), t.T) for t in tables]
            between.setdefault((min(home, reader), max(home, reader)), []).extend(tables)
    network.problem.tables |= {ends: total(tables) for ends, tables in between.items()}

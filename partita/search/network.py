"""A graph on a machine as a cost network: candidates per operator, their costs, and tables of moves between operators.

A state of an operator is a choice together with how its variables are stored (plainly, ZeRO-1, ZeRO-3). States that no
neighbour can tell apart are merged, cheapest first, when the search runs (`Network.problem` keeps the best for a price).
Equal operators are costed once, and equal tables of moves are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from partita.cost.evaluate import operator_cost, storage_axes
from partita.cost.moves import Placement, move_table
from partita.cost.terms import Move, Terms
from partita.cost.terms import terms as terms_of
from partita.graph.graph import Graph, Label, Phase
from partita.machine import Machine
from partita.plan.layout import Sharding, resolve
from partita.plan.plan import Mesh, Plan, Storage
from partita.search.base import Problem
from partita.search.candidates import Choice, assignment_of, candidates, choice_of, names_of

LEVELS = (0, 1, 3)
"""Ways to store variables that differ in cost: ZeRO-2 is ZeRO-1 in a step that is one program."""


@dataclass(frozen=True)
class State:
    """One way to run an operator: its choice, and the ZeRO level of its variables."""

    choice: Choice
    zero: int


@dataclass
class Network:
    """The cost network of a graph on a placed mesh, with what its states stand for."""

    graph: Graph
    place: Placement
    terms: Terms
    states: list[list[State]]
    problem: Problem
    parts: list[np.ndarray]
    """Per operator, [PARTS, state]: the seconds of what a step does for it, hidden or not. Equal operators share their array."""
    kept: list[np.ndarray]
    """Per operator, by state: of its bytes those of forward values that the backward pass reads."""
    moves: dict[tuple[int, int, Phase, Phase], np.ndarray] = field(default_factory=dict)
    """(home, reader, phase, phase in which it is read) -> seconds by state of either."""

    def plan(self, states: Sequence[int], name: str = "found", notes: tuple[str, ...] = ()) -> Plan:
        """The plan that states stand for."""
        graph, mesh = self.graph, self.place.mesh
        choices, storage = {}, {}
        for o, i in enumerate(states):
            state = self.states[o][i]
            choices[graph.operators[o].name] = names_of(graph, mesh, state.choice)
            if state.zero:
                storage |= stored_by(self, o, state)
        return Plan(graph.name, self.place.machine.name, mesh, choices, storage, name, graph.batch_size, notes=notes)

    def states_of(self, plan: Plan) -> tuple[int, ...] | None:
        """The states that stand for a plan, None where it has a choice that is no candidate."""
        found = []
        for o, operator in enumerate(self.graph.operators):
            choice = choice_of(self.graph, o, self.place.mesh, plan.choices[operator.name])
            levels = {plan.storage[s.path].zero for s in self.terms.operators[o].stored if s.path in plan.storage}
            zero = max((1 if level == 2 else level for level in levels), default=0)
            state = State(choice, zero)
            if state not in self.states[o]:
                return None
            found.append(self.states[o].index(state))
        return tuple(found)


def stored_by(network: Network, operator: int, state: State) -> dict[str, Storage]:
    """The storage of an operator's variables in a state."""
    found = {}
    for s in network.terms.operators[operator].stored:
        where = storage_axes(s, network.place.mesh, assignment_of(state.choice))
        if where:
            names = tuple(network.place.mesh.axes[a].name for a in where[1])
            found[s.path] = Storage(where[0], names, state.zero)
    return found


def build(graph: Graph, machine: Machine, mesh: Mesh, baselines: Sequence[Plan] = (), terms: Terms | None = None) -> Network:
    """The cost network of a graph on a machine's mesh. Every choice of the baselines is among the candidates."""
    place = Placement(machine, mesh)
    found = terms or terms_of(graph, machine.backend)
    states: list[list[State]] = []
    seconds, nbytes, parts, kept = [], [], [], []
    costed: dict[tuple[object, ...], tuple[np.ndarray, ...]] = {}
    offered: dict[tuple[object, ...], tuple[Choice, ...]] = {}
    for o, operator in enumerate(graph.operators):
        extra = [choice_of(graph, o, mesh, plan.choices[operator.name]) for plan in baselines]
        levels = LEVELS if found.operators[o].stored else (0,)
        number = {f: i for i, f in enumerate(operator.factors)} | {-1: -1}
        same = found.operators[o].key(graph, o), operator.kind, tuple(tuple(number[f] for f in choice) for choice in extra)
        if same not in offered:
            offered[same] = tuple(tuple(number[f] for f in choice) for choice in candidates(graph, o, mesh, extra))
        local = offered[same]
        back = (*operator.factors, -1)
        choices = [tuple(back[i] for i in choice) for choice in local]
        states.append([State(choice, zero) for zero in levels for choice in choices])
        key = (same, local)
        if key not in costed:
            assignments = [assignment_of(choice) for choice in choices]
            costs = [operator_cost(found.operators[o], place, assignments, zero) for zero in levels]
            costed[key] = (
                np.concatenate([c.seconds for c in costs]),
                np.concatenate([c.nbytes for c in costs]),
                np.concatenate([c.parts() for c in costs], axis=1),
                np.concatenate([c.kept for c in costs]),
            )
        seconds.append(costed[key][0])
        nbytes.append(costed[key][1])
        parts.append(costed[key][2])
        kept.append(costed[key][3])
    problem = Problem(seconds, nbytes)
    network = Network(graph, place, found, states, problem, parts, kept)
    _add_moves(network)
    return network


def _add_moves(network: Network) -> None:
    views: dict[tuple[object, ...], tuple[tuple[Sharding, ...], np.ndarray]] = {}
    alike: dict[tuple[object, ...], int] = {}
    kind: list[int] = []
    for o, operator in enumerate(network.graph.operators):
        number = {f: i for i, f in enumerate(operator.factors)} | {-1: -1}
        mine = tuple(tuple(number[f] for f in s.choice) for s in network.states[o])
        kind.append(alike.setdefault(mine, len(alike)))

    def view(operator: int, label: Label) -> tuple[tuple[Sharding, ...], np.ndarray]:
        """(distinct shardings of a tensor under this label, which of them each state gives); the same for operators alike."""
        factors = network.graph.operators[operator].factors
        key = (kind[operator], tuple(factors.index(f) if f in factors else -1 for f in label))
        if key not in views:
            number: dict[Sharding, int] = {}
            ids = [number.setdefault(resolve(label, assignment_of(s.choice)), len(number)) for s in network.states[operator]]
            views[key] = (tuple(number), np.array(ids))
        return views[key]

    by_pair: dict[tuple[int, int, Phase, Phase], list[Move]] = {}
    for move in network.terms.edges:
        by_pair.setdefault((move.home, move.reader, move.phase, move.wanted), []).append(move)
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
                expanded[key] = move_table(move, network.place, sources, targets)[np.ix_(rows, columns)]
            tables.append(expanded[key])
        if tables:
            network.moves[home, reader, phase, wanted] = total(tables)
            if home > reader:
                tables = [turned.setdefault(id(t), t.T) for t in tables]
            between.setdefault((min(home, reader), max(home, reader)), []).extend(tables)
    network.problem.tables |= {ends: total(tables) for ends, tables in between.items()}

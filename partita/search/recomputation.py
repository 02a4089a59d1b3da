"""Rematerialization as a state of an operator: its activations are stored, or computed again.

A problem of the search gets a second copy of some states, of fewer bytes and more seconds:

- `with_recomputation`, the sum of a plan: the forward kernels and collectives of the operator and
  the moves to it are repeated. Values at narrow cuts stay in memory, because rematerialized runs
  (`search.rematerialization`) end there.
- `least_with_recomputation`, a lower bound for every plan: only products are repeated, and only if
  their results are not stored. All other activations take no memory.

A copy has the moves of its original. So states are dropped before tables are copied, if another
one of the same choice has neither more seconds nor more bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from partita.cost.evaluate import PARTS, ShardCounts, stateless_cost
from partita.cost.partial import Factors
from partita.cost.terms import forward_activations
from partita.graph.operator_graph import OperatorGraph, producers
from partita.machine import Backend
from partita.search.base import Array, Ends, Problem, RecomputedProblem, numbered
from partita.search.candidates import assignment_of
from partita.search.network import CostNetwork, MoveKey
from partita.search.pipeline_cuts import Cuts
from partita.search.reduce import pareto_states
from partita.search.simulated import relaxed

PRODUCTS = ("dot_general", "convolution", "fused_attention")
"""Instructions that cannot be computed again without their FLOPs."""
PRODUCT_CLASSES = ("dot", "conv", "attention")
"""Classes of their kernels."""

StoredTensor = tuple[int, Factors]
"""Bytes of a tensor, and the factors of an operator that split it."""


class Again(NamedTuple):
    """The second copies of an operator's states."""

    seconds: Array
    """[state]: added seconds."""
    freed_bytes: Array
    """[state]: bytes that are not stored. A state that frees none has no second copy."""


def with_recomputation(network: CostNetwork) -> RecomputedProblem:
    """The sum of a plan in which operators may be computed again."""
    repeated = [phase == "forward" and kind in ("compute", "exchange") for kind, phase in PARTS]
    weights = np.array(repeated, float)
    border = _border(network)
    copies: dict[Hashable, Again | None] = {}
    keys = _keys(network, border)
    for o, key in enumerate(keys):
        if key not in copies:
            copies[key] = None
            if o in border:
                freed_bytes = network.activations[o] - _local_bytes(network, o, border[o])
                copies[key] = Again(weights @ network.parts[o], freed_bytes)
    problem = replace(network.problem, kinds=numbered(keys))
    return _with_copies(network, problem, [copies[key] for key in keys], repeats_moves=True)


def least_with_recomputation(network: CostNetwork) -> RecomputedProblem:
    """An additive lower bound of the simulation, also of rematerialized steps.

    On a machine with measured kernels or attached compute, products are repeated in no time.
    """
    problem = relaxed(network)
    machine = network.placement.machine
    products = _products(network.graph, machine.backend)
    if machine.times is not None or machine.attached:
        products = {}
    keys = _keys(network, products)
    nbytes: dict[Hashable, Array] = {}
    copies: dict[Hashable, Again] = {}
    for o, key in enumerate(keys):
        if key not in copies:
            product_bytes = _local_bytes(network, o, products.get(o, ()))
            nbytes[key] = problem.nbytes[o] - network.activations[o] + product_bytes
            copies[key] = Again(_product_seconds(network, o), product_bytes)
    problem = replace(problem, nbytes=[nbytes[key] for key in keys], kinds=numbered(keys))
    return _with_copies(network, problem, [copies[key] for key in keys])


# ---- stored tensors


def _border(network: CostNetwork) -> dict[int, tuple[StoredTensor, ...]]:
    """Operator that may be computed again -> its values that cross narrow cuts.

    Not operators behind the last cut: the backward pass begins with them.
    """
    cuts = Cuts(network.graph, network.terms)
    last = cuts.ends[-1] if cuts.ends else -1
    values: list[dict[StoredTensor, None]] = [{} for _ in range(last + 1)]
    for crossing in cuts.stored:
        for value in crossing:
            if value.operator <= last:
                factors = tuple(factor for factor in value.label if factor >= 0)
                values[value.operator][value.nbytes, factors] = None
    return {o: tuple(crossing) for o, crossing in enumerate(values)}


def _products(graph: OperatorGraph, backend: Backend) -> dict[int, tuple[StoredTensor, ...]]:
    """Operator -> the activations that are stored unless its product is computed again.

    These are results of the product; if kernels read none of them, the smallest activation that is
    computed from them.
    """
    producer = producers(graph)
    direct: dict[int, list[int]] = {}
    derived: dict[int, list[int]] = {}
    for tensor in forward_activations(graph, backend):
        operator = graph.home[tensor]
        heavy = graph.operators[operator].heavy
        if graph.instructions[heavy].name not in PRODUCTS:
            continue
        if producer[tensor] == heavy:
            direct.setdefault(operator, []).append(tensor)
        elif _depends(graph, tensor, operator, heavy):
            derived.setdefault(operator, []).append(tensor)
    stored = {}
    for operator in direct | derived:
        tensors = direct.get(operator)
        if tensors is None:
            tensors = [min(derived[operator], key=lambda tensor: graph.tensors[tensor].nbytes)]
        values = []
        for tensor in tensors:
            factors = tuple(factor for factor in graph.labels[tensor] if factor >= 0)
            values.append((graph.tensors[tensor].nbytes, factors))
        stored[operator] = tuple(values)
    return stored


def _depends(graph: OperatorGraph, tensor: int, operator: int, heavy: int) -> bool:
    """Whether a tensor is computed from an instruction by those of the same operator."""
    producer = producers(graph)
    pending = [tensor]
    seen: set[int] = set()
    while pending:
        index = producer.get(pending.pop(), -1)
        if index == heavy:
            return True
        if index >= 0 and index not in seen and graph.owner[index] == operator:
            seen.add(index)
            pending += graph.instructions[index].operands
    return False


def _keys(network: CostNetwork, tensors: dict[int, tuple[StoredTensor, ...]]) -> list[Hashable]:
    """Per operator, a key: equal for operators of one kind with equal tensors."""
    keys: list[Hashable] = []
    for o, operator in enumerate(network.graph.operators):
        position = {factor: number for number, factor in enumerate(operator.factors)}
        stored = None
        if o in tensors:
            stored = tuple(
                (nbytes, tuple(position.get(factor, -1) for factor in factors))
                for nbytes, factors in tensors[o]
            )
        keys.append((network.problem.kinds[o], stored))
    return keys


# ---- states


def _split(network: CostNetwork, operator: int) -> ShardCounts:
    """The numbers of shards under the states of an operator."""
    states = range(len(network.states[operator]))
    assignments = [assignment_of(network.choice(operator, state)) for state in states]
    return ShardCounts(network.placement, assignments)


def _local_bytes(network: CostNetwork, operator: int, tensors: Sequence[StoredTensor]) -> Array:
    """[state]: bytes of tensors on one device."""
    return _split(network, operator).local_bytes(tensors)


def _product_seconds(network: CostNetwork, operator: int) -> Array:
    """[state]: least seconds to compute the products of an operator again, those of their FLOPs."""
    terms = network.terms.operators[operator]
    work = []
    for one in terms.work:
        if one.phase == "forward" and one.op_class in PRODUCT_CLASSES:
            work.append(replace(one, traffic=(), launches=False))
    products = replace(terms, work=work, halos=[])
    return stateless_cost(products, _split(network, operator), ()).compute


def _with_copies(
    network: CostNetwork,
    problem: Problem,
    copies: Sequence[Again | None],
    repeats_moves: bool = False,
) -> RecomputedProblem:
    """The problem with second copies of states, without states that another one makes needless.

    `repeats_moves`: whether an operator that is computed again repeats the moves to it.
    """
    kinds = problem.kinds
    chosen: dict[int, tuple[Array, Array]] = {}
    seconds: dict[int, Array] = {}
    nbytes: dict[int, Array] = {}
    for o, kind in enumerate(kinds):
        if kind in chosen:
            continue
        count = len(problem.seconds[o])
        origin = np.arange(count)
        again = np.zeros(count, bool)
        all_seconds, all_bytes = problem.seconds[o], problem.nbytes[o]
        copy = copies[o]
        if copy is not None:
            second = np.flatnonzero(copy.freed_bytes > 0)
            origin = np.concatenate([origin, second])
            again = np.concatenate([again, np.ones(len(second), bool)])
            all_seconds = np.concatenate([all_seconds, (all_seconds + copy.seconds)[second]])
            all_bytes = np.concatenate([all_bytes, (all_bytes - copy.freed_bytes)[second]])
        choice = np.array(numbered(state.choice for state in network.states[o]))
        classes = [choice[origin]]
        if repeats_moves:
            classes.append(again.astype(np.int64))
        kept = pareto_states(all_seconds, all_bytes, classes)
        chosen[kind] = origin[kept], again[kept]
        seconds[kind] = all_seconds[kept]
        nbytes[kind] = all_bytes[kept]
    keys: dict[Ends, Hashable] = {}
    tables: dict[Hashable, Array] = {}
    for (u, v), kind in problem.table_kinds.items():
        to_v: MoveKey = (u, v, "forward", "forward")
        to_u: MoveKey = (v, u, "forward", "forward")
        move_kinds = network.move_kinds.get(to_v), network.move_kinds.get(to_u)
        key = (kind, kinds[u], kinds[v], move_kinds if repeats_moves else ())
        if key not in tables:
            rows, again_u = chosen[kinds[u]]
            columns, again_v = chosen[kinds[v]]
            table = problem.tables[u, v][np.ix_(rows, columns)]
            if repeats_moves and to_v in network.moves:
                repeated = network.moves[to_v][np.ix_(rows, columns)]
                table += repeated * again_v
            if repeats_moves and to_u in network.moves:
                repeated = network.moves[to_u][np.ix_(columns, rows)].T
                table += repeated * again_u[:, None]
            tables[key] = table
        keys[u, v] = key
    table_kinds = dict(zip(keys, numbered(keys.values()), strict=True))
    return RecomputedProblem(
        Problem(
            seconds=[seconds[kind] for kind in kinds],
            nbytes=[nbytes[kind] for kind in kinds],
            tables={ends: tables[key] for ends, key in keys.items()},
            kinds=kinds,
            table_kinds=table_kinds,
        ),
        origin=[chosen[kind][0] for kind in kinds],
        again=[chosen[kind][1] for kind in kinds],
    )

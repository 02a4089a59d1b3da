"""The kernels of a step as nodes: one per operator and phase, or several pieces if other operators'
work comes between. On a GPU or TPU the weight gradients of an operator are a piece of their own:
its scheduler runs them after the input gradient, beside the collectives that wait for that one.

An instruction of no operator is a join: it takes no time, and only waits for its operands.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from partita.graph.flat import HEAVY, readers_of
from partita.graph.operator_graph import OperatorGraph, Phase, constant_tensors, producers
from partita.plans.layout import is_accelerated


class Node(NamedTuple):
    """A slot before the slots have an order."""

    kind: str
    number: int
    """The operator, or the instruction of a join."""
    phase: str
    """The phase; of a move also the phase of its reader."""
    piece: int
    """The piece of an operator's kernels, or the reader of a move."""


FIRST_PIECE, LAST_PIECE = -1 << 20, 1 << 20
"""Numbers of the pieces before and after those with an operator's heavy instructions."""
GRADIENT_PIECE = 1 << 19
"""Number of the piece with an operator's weight gradients, after its other heavy instructions."""

HomePhase = tuple[int, Phase]
"""(operator of an instruction, its phase)."""


class KernelWork(NamedTuple):
    """The work of a piece of kernels."""

    position: float
    """The number of its heaviest instruction."""
    share: float
    """Its fraction of the work of the operator in that phase."""


def kernel_nodes(graph: OperatorGraph, placed: bool) -> list[Node | None]:
    """[instruction]: the node of its kernel; None if it takes no time and waits for nothing.

    With `placed` operators, instructions that only pass values on between other operators are
    pieces of their own.
    """
    nodes = _whole_nodes(graph, placed)
    _cut_cycles(graph, nodes)
    return nodes


def _whole_nodes(graph: OperatorGraph, placed: bool) -> list[Node | None]:
    """[instruction]: the node of its operator and phase. Joins in a row are one."""
    if placed:
        pieces = _outer_pieces(graph)
    else:
        pieces = dict.fromkeys(_weight_gradients(graph), GRADIENT_PIECE)
    constants = constant_tensors(graph)
    producer = producers(graph)
    loops = {loop.instruction for loop in graph.loops}
    nodes: list[Node | None] = []
    for i, instruction in enumerate(graph.instructions):
        if i not in loops and all(t in constants for t in instruction.results):
            nodes.append(None)
            continue
        operator = graph.owner[i]
        if operator >= 0:
            piece = pieces.get(i, 0)
            nodes.append(Node("compute", operator, instruction.phase, piece))
            continue
        earlier = [producer[t] for t in instruction.operands if producer.get(t, i) < i]
        sources = {nodes[j] for j in earlier} - {None}
        source = next(iter(sources)) if len(sources) == 1 else None
        if source is not None and source.kind == "join":
            nodes.append(source)
        else:
            nodes.append(Node("join", i, instruction.phase, 0))
    return nodes


def _weight_gradients(graph: OperatorGraph) -> set[int]:
    """The instructions of the backward pass of which only updates need the results, of operators
    with another product in that pass; none if the program is one for a CPU.
    """
    if not is_accelerated(graph):
        return set()
    readers = readers_of(graph)
    gradients: set[int] = set()
    products: dict[int, set[bool]] = defaultdict(set)
    """Operator -> whether a product of its backward pass is a weight gradient, for each."""
    for i in reversed(range(len(graph.instructions))):
        instruction = graph.instructions[i]
        operator = graph.owner[i]
        if instruction.phase != "backward" or operator < 0:
            continue
        places = [j for t in instruction.results for j, _ in readers.get(t, ())]
        is_gradient = instruction.trips == 1 and all(
            j >= 0
            and (
                graph.instructions[j].phase == "update"
                or (j in gradients and graph.owner[j] == operator)
            )
            for j in places
        )
        if is_gradient:
            gradients.add(i)
        if instruction.name in HEAVY:
            products[operator].add(is_gradient)
    return {i for i in gradients if len(products[graph.owner[i]]) == 2}


def _cut_cycles(graph: OperatorGraph, nodes: list[Node | None]) -> None:
    """Cuts nodes that wait for each other into pieces: a new piece after every change to another
    node of the cycle.
    """
    distinct = [node for node in dict.fromkeys(nodes) if node is not None]
    number = {node: n for n, node in enumerate(distinct)}
    pairs = set(_dependences(graph, nodes, number))
    cycle_of = _cycles(pairs, len(distinct))
    piece: dict[Node, int] = {}
    previous: dict[int, Node] = {}
    for i, node in enumerate(nodes):
        if node is None or number[node] not in cycle_of:
            continue
        cycle = cycle_of[number[node]]
        if node not in piece:
            piece[node] = 0
        elif previous[cycle] != node:
            piece[node] += 1
        previous[cycle] = node
        nodes[i] = node._replace(piece=node.piece + piece[node])


def _dependences(
    graph: OperatorGraph,
    nodes: Sequence[Node | None],
    number: dict[Node, int],
) -> Iterator[tuple[int, int]]:
    """(source, reader) of nodes, by number."""
    constants = constant_tensors(graph)
    producer = producers(graph)
    for instruction, reader in zip(graph.instructions, nodes, strict=True):
        if reader is None:
            continue
        for tensor in instruction.operands:
            if tensor not in producer or tensor in constants:
                continue
            source = nodes[producer[tensor]]
            if source is not None and source != reader:
                yield number[source], number[reader]


def _cycles(pairs: Collection[tuple[int, int]], count: int) -> dict[int, int]:
    """Node on a cycle of a directed graph -> its strongly connected component."""
    if not pairs:
        return {}
    sources, readers = zip(*pairs, strict=True)
    weights = np.ones(len(pairs))
    matrix = csr_matrix((weights, (sources, readers)), (count, count))
    _, component = connected_components(matrix, connection="strong")
    size = np.bincount(component)
    return {n: int(c) for n, c in enumerate(component) if size[c] > 1}


def kernel_work(graph: OperatorGraph, nodes: Sequence[Node | None]) -> dict[Node, KernelWork]:
    """The work of every node of kernels: FLOPs and bytes of results, times trips."""
    work: dict[Node, float] = defaultdict(float)
    phase_work: dict[tuple[int, str], float] = defaultdict(float)
    heaviest: dict[Node, tuple[float, int]] = {}
    for i, (instruction, node) in enumerate(zip(graph.instructions, nodes, strict=True)):
        if node is None or node.kind != "compute":
            continue
        result_bytes = sum(graph.tensors[t].nbytes for t in instruction.results)
        own_work = 1.0 + (instruction.flops + result_bytes) * instruction.trips
        work[node] += own_work
        phase_work[node.number, node.phase] += own_work
        flops = instruction.flops * instruction.trips
        heaviest[node] = max(heaviest.get(node, (0.0, i)), (flops, i))
    kernels = {}
    for node, own_work in work.items():
        share = own_work / phase_work[node.number, node.phase]
        kernels[node] = KernelWork(float(heaviest[node][1]), share)
    return kernels


def _outer_pieces(graph: OperatorGraph) -> dict[int, int]:
    """Light instruction -> FIRST_PIECE or LAST_PIECE, if its operator's heavy work does not need it
    or its result.

    The values of branches are joined, and their gradients split, in the operator of one branch. The
    other branches do not wait for that operator's heavy work, nor it for theirs.
    """
    flow = _Flow(graph)
    pieces: dict[int, int] = {}
    for i in reversed(range(len(graph.instructions))):
        home = flow.home(i)
        if graph.owner[i] < 0 or home not in flow.heavy_needs:
            continue
        if not flow.needs[i] <= flow.heavy_needs[home]:
            pieces[i] = LAST_PIECE
        elif not flow.after_heavy[i] and flow.read_elsewhere[i]:
            pieces[i] = FIRST_PIECE
            for j in flow.sources(i):
                if flow.home(j) == home:
                    flow.read_elsewhere[j] = True
    return pieces


class _Flow:
    """Per instruction, the flow of values within and between operators of a phase."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.graph = graph
        self.producer = producers(graph)
        count = len(graph.instructions)
        self.needs: list[frozenset[int]] = []
        """[instruction]: the other operators whose values reach it inside its own operator and
        phase.
        """
        self.after_heavy = [False] * count
        """[instruction]: whether it is heavy, or a heavy instruction of its operator and phase
        precedes it.
        """
        self.read_elsewhere = [False] * count
        """[instruction]: whether another operator reads its results."""
        self.heavy_needs: dict[HomePhase, frozenset[int]] = {}
        """The needs of all heavy instructions of an operator in a phase."""
        for i in range(count):
            self._add(i)

    def home(self, i: int) -> HomePhase:
        return self.graph.owner[i], self.graph.instructions[i].phase

    def sources(self, i: int) -> list[int]:
        """The earlier instructions whose results an instruction reads."""
        operands = self.graph.instructions[i].operands
        return [self.producer[t] for t in operands if self.producer.get(t, i) < i]

    def _add(self, i: int) -> None:
        owner = self.graph.owner
        heavy = self.graph.instructions[i].name in HEAVY
        needs: set[int] = set()
        after_heavy = heavy
        for j in self.sources(i):
            if self.home(j) == self.home(i):
                needs |= self.needs[j]
                after_heavy |= self.after_heavy[j]
            else:
                needs |= {owner[j]} - {-1, owner[i]}
                self.read_elsewhere[j] |= owner[i] not in (-1, owner[j])
        self.needs.append(frozenset(needs))
        self.after_heavy[i] = after_heavy
        if heavy:
            home = self.home(i)
            self.heavy_needs[home] = self.heavy_needs.get(home, frozenset()) | needs
